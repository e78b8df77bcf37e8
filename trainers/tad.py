"""Tail-aware distillation: the KL split at the teacher's top K', with its tail weighted up per document.

    KL(p||q) = KL1 + alpha KL2
    KL1      = sum_{k <= K'} p_k log(p_k / q_k) + alpha log(alpha / alpha_S)     K' + 1 atoms
    KL2      = sum over the tail of p~ log(p~ / q~),  p~ = p / alpha,  q~ = q / alpha_S
    L_DIV(t) = KL1 + beta(X) alpha(t) KL2
    beta(X)  = beta / mean over the sequence X of alpha(t)

alpha is the teacher's mass off its top K', alpha_S the student's off the same ids. The gradient with
respect to the logits is q_i - p_i on the head and q_i - p_i + (beta(X) - 1)(q_i alpha / alpha_S - p_i) on
the tail (eq. 6).

The split K' may be any up to the stored K: ranks K'+1 to K are stored and belong to the tail exactly;
beyond K stands the chosen tail. The "sequence" of beta(X) is a segment, a document's part within one row,
and its mean runs over the positions that have a target. beta(X) depends on the teacher only, so no gradient
flows through it.

Everything stays in log space: beta(X) alpha(t) = beta exp(log alpha(t) - log mean alpha) is at most beta
times the segment's length even where alpha underflows float32.

Source: Dasgupta, Cohn, Baldwin, "Don't Ignore the Tail", arXiv 2602.20816.
Legend: T target positions, K kept by the teacher, K' <= K the split (`top_k`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tailcache.storage.errors import ConfigError
from tailcache.trainers.tails import TailFunction
from tailcache.trainers.terms import StudentTerms, TeacherTerms, weighted

__all__ = ["check_split", "log_adaptive_beta", "log_student_tail", "log_teacher_tail", "tad", "weighted_tad"]


def check_split(top_k: int, stored_top_k: int) -> None:
    """Refuse a split outside 1 <= K' <= K.

    Raises:
      ConfigError: says which bound is broken.
    """
    if not 1 <= top_k <= stored_top_k:
        raise ConfigError(
            f"top_k: expected a split 1 <= K' <= {stored_top_k}, this teacher's K; found K' = {top_k}; "
            f"choose a smaller K' or capture the teacher with a larger K"
        )


def log_teacher_tail(teacher: TeacherTerms, top_k: int) -> Tensor:
    """Log alpha at K' = log(sum_{K' < k <= K} p_k + alpha_K): [T] nats, -inf where K' = V.

    Raises:
      ConfigError: K' is not in 1..K.
    """
    check_split(top_k, teacher.top_k)
    return torch.logsumexp(torch.cat([teacher.logprobs[:, top_k:], teacher.log_tail[:, None]], dim=-1), dim=-1)


def log_student_tail(student: StudentTerms, top_k: int) -> Tensor:
    """Log alpha_S, the student's mass off the teacher's top K': [T] nats, -inf where K' = V. Differentiable."""
    if top_k == student.logprobs.shape[-1]:
        return student.log_beyond
    return torch.logsumexp(torch.cat([student.logprobs[:, top_k:], student.log_beyond[:, None]], dim=-1), dim=-1)


def log_adaptive_beta(log_alpha_T: Tensor, segments_T: Tensor, *, beta: float, min_mean_alpha: float = 0.0) -> Tensor:
    """Log beta(X) of each position's segment: log beta - log max(mean of alpha, min_mean_alpha).

    A segment whose mean alpha is tiny makes beta(X) explode (at 4.9e-4 its gradient is 11 times that of KL,
    nearly all of it on the tail); ``min_mean_alpha`` bounds it. 0 is the paper.

    Args:
      log_alpha_T: [T] log alpha at the split, over the positions that have a target and no others.
      segments_T: [T] int64, which segment each position belongs to: numbers from 0, any order, gaps allowed.
      beta: the paper's beta >= 0.
      min_mean_alpha: lower bound of the mean, in [0, 1].

    Returns:
      [T] nats. 0 (that is beta(X) = 1) where the segment has no tail at all: the weight multiplies nothing
      there.

    Raises:
      ConfigError: beta or min_mean_alpha is out of range.

    Source: arXiv 2602.20816, eqs. 2-6; the bound is ours.
    """
    if not (beta >= 0 and math.isfinite(beta)):
        raise ConfigError(f"beta: expected a finite number >= 0, found {beta}")
    if not 0 <= min_mean_alpha <= 1:
        raise ConfigError(f"min_mean_alpha: expected a probability between 0 and 1, found {min_mean_alpha}")
    if log_alpha_T.numel() == 0:
        return log_alpha_T
    num_segments = int(segments_T.max()) + 1
    empty_S = log_alpha_T.new_full((num_segments,), -torch.inf)
    largest_S = empty_S.scatter_reduce(0, segments_T, log_alpha_T, "amax")
    largest_T = largest_S[segments_T]
    tail_T = largest_T > -torch.inf
    shifted_T = torch.where(tail_T, log_alpha_T - torch.where(tail_T, largest_T, 0.0), -torch.inf).exp()
    zeros_S = torch.zeros_like(empty_S)
    sum_S = zeros_S.index_add(0, segments_T, shifted_T)
    count_S = zeros_S.index_add(0, segments_T, torch.ones_like(log_alpha_T))
    log_mean_T = largest_T + (sum_S / count_S)[segments_T].log()
    if min_mean_alpha > 0:
        log_mean_T = torch.where(
            tail_T, log_mean_T.maximum(log_mean_T.new_tensor(math.log(min_mean_alpha))), -torch.inf
        )
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return torch.where(tail_T, log_beta - torch.where(tail_T, log_mean_T, 0.0), 0.0)


def weighted_tad(
    teacher: TeacherTerms, student: StudentTerms, tail: TailFunction, *, top_k: int, log_beta_T: Tensor
) -> Tensor:
    """L_DIV = KL1 + beta(X) alpha KL2 for a given log beta(X); with log beta(X) = 0 it is KL(p||q).

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.
      tail: one of ``tails.TAILS``, for what lies beyond the stored K.
      top_k: the split K', 1 <= K' <= K.
      log_beta_T: [T] log beta(X) of each position.

    Returns:
      [T] nats.

    Raises:
      ConfigError: K' is not in 1..K, or the tail needs something that is not stored.

    Source: arXiv 2602.20816, eqs. 2-6.
    """
    log_alpha_T = log_teacher_tail(teacher, top_k)
    tail_T = log_alpha_T > -torch.inf
    log_alpha_safe_T = torch.where(tail_T, log_alpha_T, 0.0)
    # Where nothing lies beyond K' the student's side is -inf as well; its difference must not become NaN.
    log_ratio_T = log_alpha_safe_T - torch.where(tail_T, log_student_tail(student, top_k), 0.0)

    head_p, head_q = teacher.logprobs[:, :top_k], student.logprobs[:, :top_k]
    kl1_T = weighted(head_p, head_p - head_q).sum(-1) + weighted(log_alpha_T, log_ratio_T)

    stored_p, stored_q = teacher.logprobs[:, top_k:], student.logprobs[:, top_k:]
    kl2_stored_T = weighted(stored_p - log_alpha_safe_T[:, None], stored_p - stored_q - log_ratio_T[:, None]).sum(-1)
    kl2_beyond_T = weighted(teacher.log_tail - log_alpha_safe_T, tail(teacher, student) - log_ratio_T)
    return kl1_T + weighted(log_beta_T + log_alpha_T, kl2_stored_T + kl2_beyond_T)


def tad(
    teacher: TeacherTerms,
    student: StudentTerms,
    tail: TailFunction,
    *,
    top_k: int,
    beta: float,
    segments_T: Tensor,
    min_mean_alpha: float = 0.0,
) -> Tensor:
    """L_DIV of TAD with its adaptive weight: ``weighted_tad`` at beta(X) = beta / mean alpha of the segment.

    Args:
      teacher: the cached targets of whole segments (all their positions, or beta(X) would be another one's).
      student: terms of the same positions; log space.
      tail: one of ``tails.TAILS``.
      top_k: the split K'; the paper's best is 10 (5 to 10).
      beta: the paper's best is 2.
      segments_T: [T] int64 segment of each position.
      min_mean_alpha: see ``log_adaptive_beta``; 0 is the paper.

    Returns:
      [T] nats. The paper's full loss adds the cross-entropy.

    Raises:
      ConfigError: a parameter is out of range, or the tail needs something that is not stored.

    Source: arXiv 2602.20816, eqs. 2-6.
    """
    log_beta_T = log_adaptive_beta(
        log_teacher_tail(teacher, top_k), segments_T, beta=beta, min_mean_alpha=min_mean_alpha
    )
    return weighted_tad(teacher, student, tail, top_k=top_k, log_beta_T=log_beta_T)
