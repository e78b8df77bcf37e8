"""Cross-entropy and the divergences: pure functions, nats per position, unreduced.

Two kinds. Those that are linear in the teacher's tail take the teacher, the student and a tail function
(``forward_kl``). The others are functions of atoms, ``f(log_p_TA, log_q_TA) -> [T]`` (see ``atoms``). The caller masks
and averages: that is one separate step, the same for every loss.

All atoms may have p = 0 or p = q = 0; a mass p > 0 where q = 0 (or, for the reverse KL, q > 0 where p = 0) makes a
divergence infinite, and it is. Gradients are with respect to the student's logits z, for distributions that sum to 1.

Legend: T target positions, K kept by the teacher, A atoms. p teacher, q student, y the true next token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tailcache.storage.errors import ConfigError
from tailcache.trainers.tails import TailFunction
from tailcache.trainers.terms import StudentTerms, TeacherTerms, log_sum, weighted

__all__ = [
    "cross_entropy",
    "forward_kl",
    "jsd",
    "kl",
    "log_mixture",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "tempered_kl",
]


def cross_entropy(student: StudentTerms) -> Tensor:
    """CLM = -log q_y, the loss of plain language modelling.

    Args:
      student: terms; ``log_target`` [T] in log space.

    Returns:
      [T] nats, >= 0. Gradient: q - onehot(y). Exact.

    Source: the CLM term of TAD (arXiv 2602.20816), eq. 1.
    """
    return -student.log_target


def forward_kl(teacher: TeacherTerms, student: StudentTerms, tail: TailFunction) -> Tensor:
    """KL(p||q) = sum_{k <= K} p_k (log p_k - log q_k) + alpha R, with R the tail's mean log-ratio.

    The first K terms are exact. What lies beyond them is the tail's choice: `bucket` gives the K + 1 atom
    lower bound, `sampled` an unbiased estimate, `exact` the dense value, `prior` and `uniform` biased ones. With
    K == V there is nothing beyond and all are the dense KL.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.
      tail: one of ``tails.TAILS``.

    Returns:
      [T] nats. >= 0 for the dense loss and the bucket; an estimate may be slightly negative. Gradient: q - p.

    Raises:
      ConfigError: the tail needs something that is not stored.

    Source: vanilla KD, TAD (arXiv 2602.20816), eq. 1, T = 1.
    """
    head_T = weighted(teacher.logprobs, teacher.logprobs - student.logprobs).sum(-1)
    return head_T + weighted(teacher.log_tail, tail(teacher, student))


def tempered_kl(teacher: TeacherTerms, student: StudentTerms, temperature: float, *, bucket: bool) -> Tensor:
    """tau^2 KL(p_tau||q_tau), p_tau proportional to p^(1/tau), from the top-K and the stored log Z of the tail.

    The top-K at tau and the mass beyond them are exact, the shape of that mass is unknown: the last atom is a bucket
    (a lower bound) or is dropped. tau^2 is part of the loss, in value and gradient alike, and so appears nowhere else.

    Args:
      teacher: targets with ``log_z_tail`` for this temperature (or K == V, where none is needed); log space.
      student: terms with ``tempered`` for this temperature; log space.
      temperature: tau > 0.
      bucket: keep the mass beyond the top-K as one atom. False with the stored teacher is `drop`; with
        ``renormalise(teacher)``, whose tail is empty at every temperature, it makes no difference.

    Returns:
      [T] nats. Gradient: tau (q_tau - p_tau), the bucket's with q_tau's own shape beyond the top-K.

    Raises:
      ConfigError: the teacher or the student lacks this temperature.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.
    """
    if temperature not in student.tempered:
        raise ConfigError(
            f"temperature: expected the student's terms at {temperature}, found {list(student.tempered)}; "
            f"make them with temperatures=({temperature},)"
        )
    at = student.tempered[temperature]
    head_TK = teacher.logprobs / temperature
    log_p = torch.cat([head_TK, _log_z_tail(teacher, temperature)[:, None]], dim=-1)
    log_p = log_p - log_sum(log_p)[:, None]
    log_q = torch.cat([at.logprobs, at.log_beyond[:, None]], dim=-1)
    num_atoms = teacher.top_k + bucket
    return temperature**2 * kl(log_p[:, :num_atoms], log_q[:, :num_atoms])


def _log_z_tail(teacher: TeacherTerms, temperature: float) -> Tensor:
    if not teacher.has_tail:
        return torch.full_like(teacher.log_tail, -torch.inf)
    if teacher.log_z_tail is None or temperature not in teacher.temperatures:
        raise ConfigError(
            f"temperature: expected log Z of the teacher's tail at {temperature}, found it at "
            f"{list(teacher.temperatures) or 'no temperature'}; capture the teacher again with "
            f"--temperatures {temperature:g}"
        )
    return teacher.log_z_tail[:, teacher.temperatures.index(temperature)]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p||q) = sum p (log p - log q).

    Args:
      log_p: [T, A] log space.
      log_q: [T, A] log space.

    Returns:
      [T] nats, >= 0 where both sum to 1. Gradient: q - p.

    Source: Kullback and Leibler, 1951.
    """
    return weighted(log_p, log_p - log_q).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q||p) = sum q (log q - log p).

    Args:
      log_p: [T, A] log space, the teacher.
      log_q: [T, A] log space, the student.

    Returns:
      [T] nats, infinite where p is 0 and q is not. Gradient: q (log(q / p) - KL(q||p)).

    Source: Gu et al., "MiniLLM" (arXiv 2306.08543), eq. 1, per token.
    """
    return kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, mixture: float) -> Tensor:
    """Generalised Jensen-Shannon divergence b KL(p||m) + (1 - b) KL(q||m), m = b p + (1 - b) q.

    Args:
      log_p: [T, A] log space, the teacher.
      log_q: [T, A] log space, the student.
      mixture: b, strictly between 0 and 1. JSD / b goes to KL(p||q) as b goes to 0, JSD / (1 - b) to KL(q||p) as b
        goes to 1; at either end it is 0.

    Returns:
      [T] nats, between 0 and the entropy of (b, 1 - b), log 2 at b = 0.5. Gradient: (1 - b) q (log(q / m) - KL(q||m)).

    Raises:
      ConfigError: b is out of range.

    Source: Agarwal et al., "GKD" (arXiv 2306.13649), eq. 1.
    """
    if not 0 < mixture < 1:
        raise ConfigError(
            f"mixture: expected a number between 0 and 1, both excluded, found {mixture}; at 0 and 1 the divergence "
            "is 0: its limits are the losses 'kd' and 'reverse_kl'"
        )
    log_m = log_mixture(log_p, log_q, mixture)
    return mixture * kl(log_p, log_m) + (1 - mixture) * kl(log_q, log_m)


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(p||m), m = lambda p + (1 - lambda) q.

    Args:
      log_p: [T, A] log space, the teacher.
      log_q: [T, A] log space, the student.
      skew: lambda, 0 <= lambda < 1; 0 is the KL. DistiLLM: 0.1.

    Returns:
      [T] nats, at most -log lambda. Gradient: q (r - sum q r), r = -(1 - lambda) p / m.

    Raises:
      ConfigError: lambda is out of range.

    Source: Ko et al., "DistiLLM" (arXiv 2402.03898), section 3.1.
    """
    _check_skew(skew)
    return kl(log_p, log_mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(q||m), m = (1 - lambda) p + lambda q.

    Args:
      log_p: [T, A] log space, the teacher.
      log_q: [T, A] log space, the student.
      skew: lambda, 0 <= lambda < 1; 0 is the reverse KL. DistiLLM: 0.1.

    Returns:
      [T] nats, at most -log lambda. Gradient: q (r - sum q r), r = log(q / m) - lambda q / m.

    Raises:
      ConfigError: lambda is out of range.

    Source: Ko et al., "DistiLLM" (arXiv 2402.03898), section 3.1.
    """
    _check_skew(skew)
    return kl(log_q, log_mixture(log_q, log_p, skew))


def _check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise ConfigError(f"skew: expected a number from 0 to below 1, found {skew}; the published one is 0.1")


def log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Log of weight p + (1 - weight) q, 0 <= weight < 1; -inf, with gradient 0, where both are 0."""
    if weight == 0:
        return log_q
    some = (log_p > -torch.inf) | (log_q > -torch.inf)
    safe_p, safe_q = torch.where(some, log_p, 0.0), torch.where(some, log_q, 0.0)
    return torch.where(some, torch.logaddexp(safe_p + math.log(weight), safe_q + math.log1p(-weight)), -torch.inf)
