"""The training objective: which loss, which tail, which weights; per position, unreduced.

Legend: T target positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from tailcache.storage.errors import ConfigError
from tailcache.trainers.divergences import cross_entropy, forward_kl
from tailcache.trainers.tad import check_split, tad
from tailcache.trainers.tails import check_tail, tail_function
from tailcache.trainers.terms import StudentTerms, TeacherTerms

if TYPE_CHECKING:
    from tailcache.storage.reader import Teacher
    from tailcache.trainers.config import TrainConfig

__all__ = ["DEFAULT_SPLIT", "Objective"]

DEFAULT_SPLIT = 10


@dataclass(frozen=True, kw_only=True)
class Objective:
    """clm_weight * CLM + divergence_weight * DIV of one position.

    Attributes:
      loss: `clm` (no divergence), `kd` (forward KL) or `tad`.
      tail: the tail choice, a name of ``tails.TAILS``.
      top_k: TAD's split K'.
      beta: TAD's beta.
      min_mean_alpha: TAD's lower bound of the mean tail mass.
      clm_weight: weight of the cross-entropy.
      divergence_weight: weight of the divergence.
    """

    loss: str = "tad"
    tail: str = "sampled"
    top_k: int = DEFAULT_SPLIT
    beta: float = 2.0
    min_mean_alpha: float = 0.0
    clm_weight: float = 1.0
    divergence_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in ("clm", "kd", "tad"):
            raise ConfigError(f"loss: expected one of clm, kd, tad; found {self.loss!r}")
        tail_function(self.tail)

    @classmethod
    def from_config(cls, config: TrainConfig) -> Objective:
        """The objective that the settings describe."""
        return cls(
            loss=config.loss,
            tail=config.tail,
            top_k=DEFAULT_SPLIT if config.top_k is None else config.top_k,
            beta=config.beta,
            min_mean_alpha=config.min_mean_alpha,
            clm_weight=config.clm_weight,
            divergence_weight=config.divergence_weight,
        )

    @property
    def wants_beyond(self) -> bool:
        """Whether it needs the student's mass beyond the stored top-K."""
        return self.loss == "tad" or (self.loss == "kd" and self.tail == "bucket")

    @property
    def wants_prior(self) -> bool:
        """Whether it needs the teacher's mean tail."""
        return self.loss != "clm" and self.tail == "prior"

    def check(self, teacher: Teacher) -> None:
        """Refuse, before any training, what this teacher's targets cannot give.

        Raises:
          ConfigError: with the reason and what to choose instead.
        """
        if self.loss == "clm":
            return
        check_tail(
            self.tail,
            top_k=teacher.top_k,
            vocab_size=teacher.vocab_size,
            num_samples=teacher.num_samples,
            mean_tail_V=teacher.mean_tail if self.tail == "prior" else None,
        )
        if self.loss == "tad":
            check_split(self.top_k, teacher.top_k)

    def parts(self, teacher: TeacherTerms, student: StudentTerms, segments_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """The unweighted terms of each position.

        Args:
          teacher: targets of whole segments.
          student: terms of the same positions, with what ``wants_beyond`` and ``wants_prior`` say.
          segments_T: [T] int64.

        Returns:
          CLM [T] and DIV [T] (None for `clm`), nats.
        """
        clm_T = cross_entropy(student)
        if self.loss == "clm":
            return clm_T, None
        tail = tail_function(self.tail)
        if self.loss == "kd":
            return clm_T, forward_kl(teacher, student, tail)
        return clm_T, tad(
            teacher,
            student,
            tail,
            top_k=self.top_k,
            beta=self.beta,
            segments_T=segments_T,
            min_mean_alpha=self.min_mean_alpha,
        )

    def total(self, clm: Tensor, divergence: Tensor | None) -> Tensor:
        """The weighted sum of the two terms, of whatever shape."""
        total = self.clm_weight * clm
        return total if divergence is None else total + self.divergence_weight * divergence
