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

Legend: T target positions, W width of the student's head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailcache.trainers.divergences import cross_entropy, forward_kl
from tailcache.trainers.tails import bucket, sampled
from tailcache.trainers.terms import TeacherTerms, student_terms

__all__ = ["METRICS", "HeldOutSums", "kl_kind", "position_metrics"]

METRICS = ("cross_entropy", "kl", "top1_agreement", "teacher_cross_entropy")


def kl_kind(*, top_k: int, vocab_size: int, num_samples: int) -> str:
    """What the reported KL is: `exact`, `unbiased` (sampled tail) or `lower bound` (bucket)."""
    if top_k >= vocab_size:
        return "exact"
    return "unbiased" if num_samples > 0 else "lower bound"


@torch.no_grad()
def position_metrics(logits_TW: Tensor, teacher: TeacherTerms, next_tokens_T: Tensor) -> Tensor:
    """The metrics of each position, in the order of ``METRICS``: [T, 4] float32.

    Args:
      logits_TW: [T, W] the student's logits, W >= V.
      teacher: the targets of the same positions.
      next_tokens_T: [T] int64.
    """
    exact_or_sampled = not teacher.has_tail or teacher.num_samples > 0
    student = student_terms(logits_TW, teacher, next_tokens_T, want_beyond=not exact_or_sampled)
    best_T = logits_TW[:, : teacher.vocab_size].argmax(-1)
    return torch.stack(
        [
            cross_entropy(student),
            forward_kl(teacher, student, sampled if exact_or_sampled else bucket),
            (best_T == teacher.token_ids[:, 0]).to(teacher.logprobs.dtype),
            -teacher.log_target,
        ],
        dim=-1,
    )


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
