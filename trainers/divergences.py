"""Cross-entropy and forward KL: pure functions of the terms, nats per position, unreduced.

The caller masks and averages (see ``distill``): that is one separate step, the same for every loss.

Legend: T target positions, K kept by the teacher. p teacher, q student, y the true next token.
"""

from __future__ import annotations

from torch import Tensor

from tailcache.trainers.tails import TailFunction
from tailcache.trainers.terms import StudentTerms, TeacherTerms, weighted

__all__ = ["cross_entropy", "forward_kl"]


def cross_entropy(student: StudentTerms) -> Tensor:
    """CLM = -log q_y, the loss of plain language modelling.

    Args:
      student: terms; ``log_target`` [T] in log space.

    Returns:
      [T] nats, >= 0.

    Source: the CLM term of TAD (arXiv 2602.20816), eq. 1. Gradient with respect to the logits: q - onehot(y).
    """
    return -student.log_target


def forward_kl(teacher: TeacherTerms, student: StudentTerms, tail: TailFunction) -> Tensor:
    """KL(p||q) = sum_{k <= K} p_k (log p_k - log q_k) + alpha * R, with R the tail's mean log-ratio.

    The first K terms are exact. What lies beyond them is the tail's choice: `bucket` gives the K + 1 atom
    lower bound, `sampled` an unbiased estimate, `prior` a biased one. With K == V there is nothing beyond
    and all are the dense KL.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.
      tail: one of ``tails.TAILS``.

    Returns:
      [T] nats. >= 0 for the dense loss and the bucket; an estimate may be slightly negative.

    Raises:
      ConfigError: the tail needs something that is not stored.

    Source: vanilla KD, TAD (arXiv 2602.20816), eq. 1, T = 1. Gradient with respect to the logits: q - p.
    """
    head_T = weighted(teacher.logprobs, teacher.logprobs - student.logprobs).sum(-1)
    return head_T + weighted(teacher.log_tail, tail(teacher, student))
