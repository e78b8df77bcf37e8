"""The training objective: clm_weight * CLM + the weighted sum of some divergences, per position, unreduced.

``Objective`` is what the settings ask for, checked against what the cache holds. ``prepare`` makes of it, for one
micro-batch, what is worked out at the student's head (``prepared``).

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tailcache.storage.errors import ConfigError, StudentError
from tailcache.storage.several import Teachers
from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.own_rows import OwnRows, own_log_p
from tailcache.trainers.parts import Part, clm, is_linear, needs_rows, on_exact_atoms, part_of
from tailcache.trainers.prepared import Aids, Prepared
from tailcache.trainers.soundness import Stored, check_sound, default_tail
from tailcache.trainers.stored_head import hidden_states, stored_head
from tailcache.trainers.tad import check_split
from tailcache.trainers.terms import TeacherTerms

if TYPE_CHECKING:
    from tailcache.storage.reader import StoredHead
    from tailcache.storage.several import AnyTeacher
    from tailcache.trainers.batches import Batch
    from tailcache.trainers.config import TrainConfig

__all__ = ["Objective"]

COSINE = "hidden_cosine"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is trained on.

    Attributes:
      clm_weight: weight of the cross-entropy.
      losses: the divergences, each with its weight; their tail choices filled in.
      stored: what the cache holds.
      progress: of training, in [0, 1]; decides the values of schedules.
    """

    clm_weight: float = 1.0
    losses: tuple[LossConfig, ...] = ()
    stored: Stored
    progress: float = 0.0

    @classmethod
    def of(
        cls, clm_weight: float, losses: Sequence[LossConfig], teacher: AnyTeacher, *, live: Stored | None = None
    ) -> Objective:
        """The objective that the settings describe, for this teacher.

        Args:
          clm_weight: weight of the cross-entropy.
          losses: the divergences; a tail choice that is not given becomes the loss's default.
          teacher: an open teacher of a cache.
          live: what a teacher that runs beside the student gives, in place of the cache (``LiveTeacher.stored``); the
            default tail is then its own, `exact`.

        Raises:
          ConfigError: it cannot be had from this cache, or would be wrong; with the reason and what to do.
        """
        # The cosine is no function of the two distributions and is added last.
        ordered = sorted(losses, key=lambda each: each.name == COSINE)
        if sum(each.name == COSINE for each in ordered) > 1:
            raise ConfigError(
                f"losses: expected {COSINE} once, since it has no parameter but its weight; found it twice"
            )
        filled = tuple(replace(each, tail=_tail(each, live)) for each in ordered)
        stored = live or stored_by(teacher, mean_tail=any(each.tail == "prior" for each in filled))
        for each in filled:
            tail = "sampled" if each.name == "rs_kd" else each.tail
            check_sound(each.name, tail, each.temperature, stored, skew=each.skew, wraps=each.wraps)
            if each.name == "tad":
                for progress in (0.0, 1.0):
                    check_split(each.split.whole_at(progress), stored.top_k)
        tails = {each.tail for each in filled}
        if stored.num_teachers > 1 and stored.has_tail and tails >= {"exact", "sampled"}:
            raise ConfigError(
                "losses: with several teachers and the tail 'exact' of one loss, the draws of the teachers are not "
                "used; choose the tail 'exact' for the others too, which costs nothing more"
            )
        return cls(clm_weight=clm_weight, losses=filled, stored=stored)

    @classmethod
    def from_config(cls, config: TrainConfig, teacher: AnyTeacher, *, live: Stored | None = None) -> Objective:
        """The objective of a run; see ``of``."""
        return cls.of(config.clm_weight, config.divergences, teacher, live=live)

    def at(self, progress: float) -> Objective:
        """The same objective with its schedules at another progress in [0, 1]."""
        return replace(self, progress=progress)

    # ---- what it needs ----

    @property
    def optional(self) -> tuple[str, ...]:
        """The optional fields of the cache that it reads."""
        hidden = self.has_cosine or (self.needs_whole and not self.stored.is_live)
        return ("log_z_tail",) * bool(self.temperatures and self.stored.temperatures) + ("hidden",) * hidden

    @property
    def needs_whole(self) -> bool:
        """Whether it needs the teacher's own distributions as a whole."""
        return any(_effective(each, self.stored) == "exact" for each in self.losses)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The further temperatures at which the student's terms are needed."""
        found = {
            e.temperature for e in self.losses if e.temperature != 1.0 and not needs_rows(e, _effective(e, self.stored))
        }
        return tuple(sorted(found))

    @property
    def mean_fills(self) -> tuple[str, ...]:
        """The fills under which means of the student's log q are needed."""
        tails = {_effective(each, self.stored) for each in self.losses if is_linear(each)}
        return tuple(name for name in ("prior", "uniform", "exact") if name in tails)

    @property
    def num_dense(self) -> int:
        """How many of its divergences need whole rows of logits."""
        return sum(needs_rows(each, _effective(each, self.stored)) for each in self.losses)

    @property
    def has_cosine(self) -> bool:
        """Whether it compares hidden states."""
        return any(each.name == COSINE for each in self.losses)

    def check_student(self, head: LinearHead | str) -> None:
        """Refuse a student whose hidden states cannot be compared with the teacher's, if they are to be.

        Args:
          head: the student's, or why it is not linear.

        Raises:
          StudentError: with the reason.
        """
        if self.has_cosine and isinstance(head, str):
            raise StudentError(
                f"loss {COSINE!r}: expected a student whose head is a linear layer, since its input is what is "
                f"compared; found that {head}"
            )

    def needs_projection(self, head: LinearHead | str, teacher: AnyTeacher) -> bool:
        """Whether hidden states are compared and the student's are of another width than the teacher's."""
        return self.has_cosine and not isinstance(head, str) and head.weight.shape[1] != teacher.hidden_width

    def aids(self, teacher: AnyTeacher, device: torch.device) -> Aids:
        """What it needs of a teacher beside its targets; read once."""
        tails = {_effective(each, self.stored) for each in self.losses}
        fills = {}
        if "prior" in tails and not isinstance(teacher, Teachers):
            fills["prior"] = torch.from_numpy(np.asarray(teacher.mean_tail, dtype=np.float32)).to(device)
        if "uniform" in tails:
            fills["uniform"] = torch.ones(teacher.vocab_size, device=device)
        heads: tuple[StoredHead, ...] = ()
        if self.needs_whole and not self.stored.is_live:
            heads = teacher.heads() if isinstance(teacher, Teachers) else (teacher.head(),)
        return Aids(fills=fills, heads=tuple(stored_head(each, device) for each in heads))

    # ---- what it is called ----

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parts: "clm", then "divergence" for a single one, else each by its own name, numbered if repeated."""
        if len(self.losses) == 1:
            return ("clm", "divergence")
        found = ["clm"]
        for each in self.losses:
            count = sum(name.partition("#")[0] == each.name for name in found)
            found.append(f"{each.name}#{count + 1}" if count else each.name)
        return tuple(found)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each part, in the order of ``names``."""
        return (self.clm_weight, *(each.weight for each in self.losses))

    @property
    def scheduled(self) -> dict[str, float]:
        """TAD's beta and K' as they are now; prefixed with the part's name where there are several parts."""
        now: dict[str, float] = {}
        for name, each in zip(self.names[1:], self.losses, strict=True):
            if each.name == "tad":
                prefix = "" if len(self.losses) == 1 else f"{name}_"
                now[f"{prefix}beta"] = each.tail_weight.at(self.progress)
                now[f"{prefix}top_k"] = each.split.whole_at(self.progress)
        return now

    # ---- its value ----

    def prepare(self, teacher: TeacherTerms, batch: Batch, aids: Aids, *, seed: tuple[int, ...] = (0,)) -> Prepared:
        """Its parts for one micro-batch; what the teacher alone decides is worked out.

        Args:
          teacher: the targets of the batch, of whole rows.
          batch: of ``batches.collate``.
          aids: from ``aids``.
          seed: of RS-KD's draws.
        """
        own = own_log_p(batch, aids.heads)
        if isinstance(own, OwnRows) and self.stored.num_teachers > 1:
            teacher = own.terms(self.stored.top_k, teacher.next_tokens)
        parts: list[Part] = [clm]
        for each in self.losses:
            if each.name != COSINE:
                tail = _effective(each, self.stored)
                part = part_of(
                    each,
                    tail,
                    teacher,
                    segments_T=batch["segments"],
                    rows_T=batch["rows"],
                    progress=self.progress,
                    seed=seed,
                )
                parts.append(on_exact_atoms(part) if tail == "bucket" and teacher.mixed is not None else part)
        return Prepared(
            parts=tuple(parts),
            teacher=teacher,
            aids=aids,
            own=own,
            mean_fills=self.mean_fills,
            temperatures=self.temperatures,
            hidden_TD=hidden_states(batch["teacher"]) if self.has_cosine else None,
            num_dense=self.num_dense,
            has_cosine=self.has_cosine,
        )


def stored_by(teacher: AnyTeacher, *, mean_tail: bool) -> Stored:
    """What a teacher's cache holds; the mean tail is read only if it is asked for."""
    if isinstance(teacher, Teachers):
        return Stored(
            top_k=teacher.top_k,
            vocab_size=teacher.vocab_size,
            num_samples=teacher.num_samples,
            hidden_kind=teacher.hidden_kind,
            num_teachers=len(teacher.teachers),
        )
    return Stored(
        top_k=teacher.top_k,
        vocab_size=teacher.vocab_size,
        num_samples=teacher.num_samples,
        temperatures=tuple(teacher.temperatures),
        hidden_kind=teacher.hidden_kind,
        mean_tail_support=int(np.count_nonzero(teacher.mean_tail)) if mean_tail else 0,
    )


def _tail(loss: LossConfig, live: Stored | None) -> Any:
    if loss.name == "rs_kd":  # it has no choice, and so no such parameter
        return None
    wrapped = loss.wraps if loss.name == "atkd" and loss.wraps != "dkd" else loss.name
    default = default_tail(wrapped, loss.temperature)
    return loss.tail or (default if default is None or live is None else "exact")


def _effective(loss: LossConfig, stored: Stored) -> str | None:
    """The tail choice; with every id stored all are the same, and `bucket` asks for nothing."""
    return loss.tail if stored.has_tail or loss.tail is None else "bucket"
