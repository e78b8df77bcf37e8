"""Reference losses: float64, probability space, plain Python loops, typed from the equations.

Nothing here is shared with the code under test: no torch, no log space, no log-sum-exp, no helper of the
package. Distributions are lists of probabilities over the whole vocabulary, one position at a time. `head`
is the list of the teacher's most likely ids; sources are named in trainers/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def softmax(logits: Vector) -> list[float]:
    largest = max(logits)
    exponentials = [math.exp(z - largest) for z in logits]
    total = math.fsum(exponentials)
    return [e / total for e in exponentials]


def top_ids(p: Vector, k: int) -> list[int]:
    return sorted(range(len(p)), key=lambda i: (-p[i], i))[:k]


def others(vocab_size: int, ids: Sequence[int]) -> list[int]:
    return [i for i in range(vocab_size) if i not in set(ids)]


def mass(p: Vector, ids: Sequence[int]) -> float:
    return math.fsum(p[i] for i in ids)


def cross_entropy(q: Vector, y: int) -> float:
    return -math.log(q[y])


def forward_kl(p: Vector, q: Vector) -> float:
    total = 0.0
    for p_i, q_i in zip(p, q, strict=True):
        if p_i > 0:
            total += p_i * math.log(p_i / q_i)
    return total


def entropy(p: Vector) -> float:
    return -math.fsum(p_i * math.log(p_i) for p_i in p if p_i > 0)


def restricted(pi: Vector, ids: Sequence[int]) -> dict[int, float]:
    """A distribution restricted to some ids and renormalised."""
    total = mass(pi, ids)
    return {i: pi[i] / total for i in ids}


def tail_cross_weights(
    choice: str, p: Vector, q: Vector, stored: Sequence[int], samples: Sequence[int], pi: Vector | None
) -> dict[int, float]:
    """The tail choice as weights on the ids beyond the stored ones: what stands for p there, frozen.

    Its gradient is that of the dense loss with these in the place of p: for the bucket, alpha spread as q is.
    """
    beyond = others(len(p), stored)
    alpha = mass(p, beyond)
    if not beyond:
        return {}
    if choice == "bucket":
        alpha_s = mass(q, beyond)
        return {i: alpha * q[i] / alpha_s for i in beyond}
    if choice == "sampled":
        weights = dict.fromkeys(beyond, 0.0)
        for s in samples:
            weights[s] += alpha / len(samples)
        return weights
    if choice == "prior":
        assert pi is not None
        return {i: alpha * share for i, share in restricted(pi, beyond).items()}
    raise AssertionError(choice)


def kl_with_tail(
    choice: str,
    p: Vector,
    q: Vector,
    stored: Sequence[int],
    samples: Sequence[int] = (),
    pi: Vector | None = None,
) -> float:
    """KL(p||q) from what a cache stores: exact on the stored ids, the choice beyond them."""
    beyond = others(len(p), stored)
    value = 0.0
    for i in stored:
        if p[i] > 0:
            value += p[i] * math.log(p[i] / q[i])
    if not beyond:
        return value
    alpha = mass(p, beyond)
    if choice == "bucket":
        return value + alpha * math.log(alpha / mass(q, beyond))
    for i in beyond:  # sum p log p, exact
        if p[i] > 0:
            value += p[i] * math.log(p[i])
    for i, weight in tail_cross_weights(choice, p, q, stored, samples, pi).items():
        value -= weight * math.log(q[i])
    return value


def tad(p: Vector, q: Vector, head: Sequence[int], beta_x: float) -> float:
    """TAD's divergence, dense: KL1 + beta(X) alpha KL2 (eqs. 2-6)."""
    tail = others(len(p), head)
    alpha, alpha_s = mass(p, tail), mass(q, tail)
    kl1 = math.fsum(p[i] * math.log(p[i] / q[i]) for i in head if p[i] > 0)
    if alpha == 0:
        return kl1
    kl1 += alpha * math.log(alpha / alpha_s)
    kl2 = 0.0
    for i in tail:
        if p[i] > 0:
            p_tilde, q_tilde = p[i] / alpha, q[i] / alpha_s
            kl2 += p_tilde * math.log(p_tilde / q_tilde)
    return kl1 + beta_x * alpha * kl2


def tad_with_tail(
    choice: str,
    p: Vector,
    q: Vector,
    top_k: int,
    stored_top_k: int,
    beta_x: float,
    samples: Sequence[int] = (),
    pi: Vector | None = None,
) -> float:
    """TAD split at K' from a cache that stores K >= K': ranks K'+1..K exact, the choice beyond K."""
    stored = top_ids(p, stored_top_k)
    head = stored[:top_k]
    tail, beyond = others(len(p), head), others(len(p), stored)
    alpha, alpha_s = mass(p, tail), mass(q, tail)
    value = math.fsum(p[i] * math.log(p[i] / q[i]) for i in head if p[i] > 0)
    if not tail:
        return value
    value += alpha * math.log(alpha / alpha_s)
    kl2 = 0.0
    for i in stored[top_k:]:
        if p[i] > 0:
            kl2 += p[i] / alpha * math.log((p[i] / alpha) / (q[i] / alpha_s))
    if beyond and choice == "bucket":
        share, share_s = mass(p, beyond) / alpha, mass(q, beyond) / alpha_s
        kl2 += share * math.log(share / share_s)
    elif beyond:
        for i in beyond:
            if p[i] > 0:
                kl2 += p[i] / alpha * math.log(p[i] / alpha)
        for i, weight in tail_cross_weights(choice, p, q, stored, samples, pi).items():
            kl2 -= weight / alpha * math.log(q[i] / alpha_s)
    return value + beta_x * alpha * kl2


def beta_x(alphas: Vector, segments: Sequence[int], beta: float, min_mean_alpha: float = 0.0) -> list[float]:
    """beta(X) per position (eqs. 2-6): beta over the mean alpha of the position's segment."""
    values = []
    for segment in segments:
        of_segment = [a for a, s in zip(alphas, segments, strict=True) if s == segment]
        mean = math.fsum(of_segment) / len(of_segment)
        values.append(beta / max(mean, min_mean_alpha))
    return values


def cross_entropy_gradient(q: Vector, y: int) -> list[float]:
    return [q_i - (1.0 if i == y else 0.0) for i, q_i in enumerate(q)]


def kl_gradient(p_hat: Vector, q: Vector) -> list[float]:
    """q - p (with what stands for p)."""
    return [q_i - p_i for p_i, q_i in zip(p_hat, q, strict=True)]


def tad_gradient(p_hat: Vector, q: Vector, head: Sequence[int], beta_x: float) -> list[float]:
    """Eq. 6: q - p on the head, q - p + (beta(X) - 1)(q alpha / alpha_S - p) on the tail."""
    tail = set(others(len(q), head))
    alpha, alpha_s = mass(p_hat, list(tail)), mass(q, list(tail))
    gradient = []
    for i, (p_i, q_i) in enumerate(zip(p_hat, q, strict=True)):
        value = q_i - p_i
        if i in tail:
            value += (beta_x - 1) * (q_i * alpha / alpha_s - p_i)
        gradient.append(value)
    return gradient


def with_tail_weights(p: Vector, stored: Sequence[int], weights: dict[int, float]) -> list[float]:
    """p on the stored ids, the choice's weights beyond them."""
    kept = set(stored)
    return [p[i] if i in kept else weights[i] for i in range(len(p))]


def beta_for_cache(p: Sequence[Vector], top_k: int, segments: Sequence[int], beta: float) -> list[float]:
    """beta(X) from full distributions: alpha is the mass off each position's top K'."""
    alphas = [mass(row, others(len(row), top_ids(row, top_k))) for row in p]
    return beta_x(alphas, segments, beta)
