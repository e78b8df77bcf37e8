"""Decoupled distillation: the KL split at the true token y into what is said of y and what is said of the others.

    TCKD = KL([p_y, 1 - p_y] || [q_y, 1 - q_y])
    NCKD = KL(p^ || q^),  p^ = p / (1 - p_y),  q^ = q / (1 - q_y),  off y
    KL   = TCKD + (1 - p_y) NCKD
    DKD  = a TCKD + b NCKD

NCKD is a KL between two distributions over the vocabulary without y, so here it *is* one: ``without_target`` turns the
terms of p and q into those of p^ and q^, and every tail choice applies to them unchanged. TCKD is exact (``log_target``
and ``log_not_target`` are stored), y among the top-K or not. Where y is off the top-K it is known exactly all the same,
so NCKD's tail is V minus the top-K and minus y, and the identity above is that of a cache that stores y as well.

Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, eqs. 1-7.
Legend: T target positions, K kept by the teacher, m tail samples. Hats are conditional on "not y".
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tailcache.trainers.divergences import forward_kl, kl
from tailcache.trainers.tails import TailFunction
from tailcache.trainers.terms import StudentTerms, TeacherTerms, log_sum

__all__ = ["dkd", "non_target_class_kl", "target_atoms", "target_class_kl", "without_target"]


def target_atoms(teacher: TeacherTerms, student: StudentTerms) -> tuple[Tensor, Tensor]:
    """The two atoms y and "not y": log [p_y, 1 - p_y] and log [q_y, 1 - q_y], [T, 2] each. Exact."""
    return (
        torch.stack([teacher.log_target, teacher.log_not_target], dim=-1),
        torch.stack([student.log_target, student.log_not_target], dim=-1),
    )


def without_target(teacher: TeacherTerms, student: StudentTerms) -> tuple[TeacherTerms, StudentTerms]:
    """The terms of p^ = p / (1 - p_y) and q^ = q / (1 - q_y) over the vocabulary without y.

    With beyond-and-not-y called the rest, of teacher mass rho = alpha - p_y (alpha where y is in the top-K):

    - the top-K: log p_k - log(1 - p_y); -inf at y, for both;
    - the tail: log rho - log(1 - p_y), and its entropy from that of the whole tail by the chain rule;
    - ``sample_logprobs``: [s_j != y] (alpha / rho) log q^(s_j), not a log-prob but such that its mean over j estimates
      the mean of log q^ over the rest without bias;
    - the fills: those of ``fill_logprobs_not_target``.

    rho is a difference where y is off the top-K. y is then less likely than each of the top-K, so 1 - p_y is at least
    1/2, and an error of rho weighs at most twice itself: as little as the rounding of the two stored logs. The
    student's mass of the rest, whose *logarithm* counts, is a sum. For a divergence in which log rho counts as well
    (the reverse KL that ATKD may wrap), a rho that the rounding swallowed, though ids are left, is unknown: both then
    lack that atom.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.

    Returns:
      The two; ``log_target`` is -inf and ``log_not_target`` 0 in both, further temperatures are gone. Where the teacher
      is sure of y (1 - p_y = 0) all its masses are 0.
    """
    log_not_q_T = torch.where(student.log_not_target > -torch.inf, student.log_not_target, 0.0)

    log_beyond_T = teacher.log_target_beyond
    beyond_T = ~teacher.is_target.any(-1) if teacher.mixed is None else log_beyond_T > -torch.inf
    some_T = (teacher.num_beyond - beyond_T.long() > 0) & (teacher.log_tail > -torch.inf)
    unknown_T = some_T & beyond_T & (log_beyond_T >= teacher.log_tail)
    some_T = some_T & ~unknown_T
    # x = log(p_y / alpha) <= 0; 1 - p_y / alpha = -expm1(x). Where y is in the top-K the share of y is 0.
    x_T = torch.where(some_T & beyond_T, log_beyond_T - teacher.log_tail, -torch.inf)
    log_share_T = torch.where(some_T, (-torch.expm1(x_T)).log(), 0.0)
    known_T = torch.where(x_T > -torch.inf, x_T.exp() * torch.where(x_T > -torch.inf, x_T, 0.0), 0.0)
    entropy_T = (teacher.tail_entropy + known_T) / log_share_T.exp() + log_share_T

    head_TK = teacher.logprobs.masked_fill(teacher.is_target, -torch.inf)
    log_rest_T = torch.where(some_T, teacher.log_tail + log_share_T, -torch.inf)
    # The sum of the parts and not log_not_target, which is rounded apart from them: p^ must sum to 1.
    log_not_p_T = log_sum(torch.cat([head_TK, log_rest_T[:, None]], dim=-1))
    log_not_p_T = torch.where(log_not_p_T > -torch.inf, log_not_p_T, 0.0)

    conditional_p = replace(
        teacher,
        logprobs=head_TK - log_not_p_T[:, None],
        log_tail=log_rest_T - log_not_p_T,
        tail_entropy=torch.where(some_T, entropy_T, 0.0),
        log_target=torch.full_like(teacher.log_target, -torch.inf),
        log_not_target=torch.zeros_like(teacher.log_not_target),
        temperatures=(),
        log_z_tail=None,
    )
    drawn_Tm = (teacher.tail_samples != teacher.next_tokens[:, None]) * log_share_T.neg().exp()[:, None]
    conditional_q = replace(
        student,
        logprobs=(student.logprobs - log_not_q_T[:, None]).masked_fill(teacher.is_target, -torch.inf),
        log_target=torch.full_like(student.log_target, -torch.inf),
        log_not_target=torch.zeros_like(student.log_not_target),
        sample_logprobs=drawn_Tm * (student.sample_logprobs - log_not_q_T[:, None]),
        log_beyond=torch.where(unknown_T, -torch.inf, student.log_beyond_not_target - log_not_q_T),
        log_beyond_not_target=student.log_beyond_not_target - log_not_q_T,
        fill_logprobs={name: mean_T - log_not_q_T for name, mean_T in student.fill_logprobs_not_target.items()},
        fill_logprobs_not_target={},
        tempered={},
    )
    return conditional_p, conditional_q


def target_class_kl(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """TCKD = p_y log(p_y / q_y) + (1 - p_y) log((1 - p_y) / (1 - q_y)): the binary KL at the true token.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.

    Returns:
      [T] nats, >= 0. Exact. Gradient: (q_y - p_y) at y, -(q_y - p_y) q^_i elsewhere.

    Source: Zhao et al., CVPR 2022, eq. 5; ATKD's TKD.
    """
    return kl(*target_atoms(teacher, student))


def non_target_class_kl(teacher: TeacherTerms, student: StudentTerms, tail: TailFunction) -> Tensor:
    """NCKD = sum_{i != y} p^_i log(p^_i / q^_i): the KL of what is said of the other tokens.

    The top-K is exact; the tail is the choice's: `sampled` unbiased in value and gradient, `bucket` a lower bound,
    `exact` the dense value, `prior` and `uniform` biased.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.
      tail: one of ``tails.TAILS``.

    Returns:
      [T] nats; 0 where the teacher is sure of y. Gradient: q^_i - p^_i off y, 0 at y.

    Raises:
      ConfigError: the tail needs something that is not stored.

    Source: Zhao et al., CVPR 2022, eq. 5; ATKD's DKD, which is NCKD without the factor 1 - p_y.
    """
    return forward_kl(*without_target(teacher, student), tail)


def dkd(
    teacher: TeacherTerms, student: StudentTerms, tail: TailFunction, *, target_weight: float, non_target_weight: float
) -> Tensor:
    """DKD = a TCKD + b NCKD.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.
      tail: one of ``tails.TAILS``.
      target_weight: a.
      non_target_weight: b; the paper's are 1 and 8 for CIFAR-100, to be tuned elsewhere.

    Returns:
      [T] nats.

    Raises:
      ConfigError: the tail needs something that is not stored.

    Source: Zhao et al., CVPR 2022, eq. 7.
    """
    target_T = target_class_kl(teacher, student)
    return target_weight * target_T + non_target_weight * non_target_class_kl(teacher, student, tail)
