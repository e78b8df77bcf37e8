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

Legend: T target positions, D hidden width, W width of the student's head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailcache.trainers.divergences import cross_entropy, forward_kl
from tailcache.trainers.fused_head import fused_head
from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.tails import bucket, sampled
from tailcache.trainers.terms import StudentTerms, TeacherTerms, student_terms, terms_from_head

__all__ = ["METRICS", "HeldOutSums", "kl_kind", "metrics_of_hidden", "metrics_of_logits"]

METRICS = ("cross_entropy", "kl", "top1_agreement", "teacher_cross_entropy")


def kl_kind(*, top_k: int, vocab_size: int, num_samples: int) -> str:
    """What the reported KL is: `exact`, `unbiased` (sampled tail) or `lower bound` (bucket)."""
    if top_k >= vocab_size:
        return "exact"
    return "unbiased" if num_samples > 0 else "lower bound"


@torch.no_grad()
def _position_metrics(student: StudentTerms, agrees_T: Tensor, teacher: TeacherTerms) -> Tensor:
    """The metrics of each position, in the order of ``METRICS``: [T, 4] float32.

    Args:
      student: terms of T positions.
      agrees_T: [T] bool; the student's most likely token is the teacher's.
      teacher: the targets of the same positions.
    """
    exact_or_sampled = not teacher.has_tail or teacher.num_samples > 0
    return torch.stack(
        [
            cross_entropy(student),
            forward_kl(teacher, student, sampled if exact_or_sampled else bucket),
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
    terms = fused_head(hidden_TD, head, teacher)
    others_T = torch.maximum(terms.gathered.amax(-1), terms.largest_rest)
    return _position_metrics(terms_from_head(terms, teacher), terms.gathered[:, 0] >= others_T, teacher)


@torch.no_grad()
def metrics_of_logits(logits_TW: Tensor, teacher: TeacherTerms) -> Tensor:
    """The metrics of each position from full logits, W >= V."""
    best_T = logits_TW[:, : teacher.vocab_size].argmax(-1)
    return _position_metrics(student_terms(logits_TW, teacher), best_T == teacher.token_ids[:, 0], teacher)


@dataclass
class HeldOutSums:
    """Sums of the metrics over positions, in float64, so that the batches they came in leave no trace."""

    sums: Tensor
    num_positions: int = 0

    @classmethod
    def empty(cls) -> HeldOutSums:
        """Nothing counted yet."""
        return cls(torch.zeros(len(METRICS), dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Count some positions: [T, 4]."""
        self.sums += values.double().sum(0).cpu()
        self.num_positions += len(values)

    def means(self) -> dict[str, float]:
        """Means by name, and ``positions``."""
        means = (self.sums / max(self.num_positions, 1)).tolist()
        return {**dict(zip(METRICS, means, strict=True)), "positions": self.num_positions}
