"""Held-out metrics from the cache: how well a student predicts the text, and how close it is to its teacher.

All are means over target positions:

- ``cross_entropy``: -log q_y, nats; exp of it is the perplexity. ``teacher_cross_entropy`` is the teacher's
own.
- ``kl``: KL(p||q), nats: the exact terms of the top-K plus alpha times (log alpha - tail entropy - mean log
q of the
  tail samples). That is cross term and stored entropy, unbiased, and never a reconstructed teacher plugged
  in. Where no samples are stored it is the K + 1 atom lower bound; ``kl_is`` says which. It does not depend
  on the loss the student was trained with, so students of one teacher can be compared.
- ``top1_agreement``: how often student and teacher have the same most likely token.

Of a mixture of teachers see ``mixture_metrics``.

Legend: T target positions, D hidden width, W width of the student's head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailcache.trainers.divergences import cross_entropy, forward_kl
from tailcache.trainers.fused_head import fused_head
from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.mixture import on_common
from tailcache.trainers.tails import bucket, sampled
from tailcache.trainers.terms import StudentTerms, TeacherTerms, student_terms, terms_from_head

__all__ = [
    "METRICS",
    "HeldOutSums",
    "held_out_kl",
    "kl_kind",
    "metrics_of_hidden",
    "metrics_of_logits",
    "of_hidden",
    "of_logits",
    "position_metrics",
]

METRICS = ("cross_entropy", "kl", "top1_agreement", "teacher_cross_entropy")


def kl_kind(*, top_k: int, vocab_size: int, num_samples: int) -> str:
    """What the reported KL is: `exact`, `unbiased` (sampled tail) or `lower bound` (bucket)."""
    if top_k >= vocab_size:
        return "exact"
    return "unbiased" if num_samples > 0 else "lower bound"


def held_out_kl(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """[T] the KL as ``kl_kind`` says: the draws where there are any, else the tail as one atom."""
    if not teacher.has_tail or teacher.num_samples > 0:
        return forward_kl(teacher, student, sampled)
    return forward_kl(*on_common(teacher, student), bucket)


@torch.no_grad()
def position_metrics(student: StudentTerms, agrees_T: Tensor, teacher: TeacherTerms) -> Tensor:
    """The metrics of each position, in the order of ``METRICS``: [T, 4] float32.

    Args:
      student: terms of T positions.
      agrees_T: [T] bool; the student's most likely token is the teacher's.
      teacher: the targets of the same positions.
    """
    return torch.stack(
        [
            cross_entropy(student),
            held_out_kl(teacher, student),
            agrees_T.to(teacher.logprobs.dtype),
            -teacher.log_target,
        ],
        dim=-1,
    )


@torch.no_grad()
def metrics_of_hidden(hidden_TD: Tensor, head: LinearHead, teacher: TeacherTerms) -> Tensor:
    """The metrics of each position from the student's hidden states: no [T, V] is made.

    Args:
      hidden_TD: [T, D] the head's input.
      head: the student's.
      teacher: the targets of the same positions.
    """
    return position_metrics(*of_hidden(hidden_TD, head, teacher), teacher)


@torch.no_grad()
def metrics_of_logits(logits_TW: Tensor, teacher: TeacherTerms) -> Tensor:
    """The metrics of each position from full logits, W >= V."""
    return position_metrics(*of_logits(logits_TW, teacher), teacher)


def of_hidden(hidden_TD: Tensor, head: LinearHead, teacher: TeacherTerms) -> tuple[StudentTerms, Tensor]:
    """The student's terms, and [T] bool where its most likely token is the teacher's."""
    terms = fused_head(hidden_TD, head, teacher)
    others_T = torch.maximum(terms.gathered.amax(-1), terms.largest_rest)
    best_T = terms.gathered.gather(-1, teacher.best_column[:, None])[:, 0]
    return terms_from_head(terms, teacher), best_T >= others_T


def of_logits(logits_TW: Tensor, teacher: TeacherTerms) -> tuple[StudentTerms, Tensor]:
    """The same from full logits, W >= V."""
    best_T = logits_TW[:, : teacher.vocab_size].argmax(-1)
    return student_terms(logits_TW, teacher), best_T == teacher.token_ids.gather(-1, teacher.best_column[:, None])[:, 0]


@dataclass
class HeldOutSums:
    """Sums of the metrics over positions, in float64, so that the batches they came in leave no trace."""

    sums: Tensor
    num_positions: int = 0
    names: tuple[str, ...] = METRICS

    @classmethod
    def empty(cls, names: tuple[str, ...] = METRICS) -> HeldOutSums:
        """Nothing counted yet."""
        return cls(torch.zeros(len(names), dtype=torch.float64), names=names)

    def add(self, values: Tensor) -> None:
        """Count some positions: [T, names]."""
        self.sums += values.double().sum(0).cpu()
        self.num_positions += len(values)

    def means(self) -> dict[str, float]:
        """Means by name, and ``positions``."""
        means = (self.sums / max(self.num_positions, 1)).tolist()
        return {**dict(zip(self.names, means, strict=True)), "positions": self.num_positions}
