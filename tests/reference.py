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


def seen(choice: str, p: Vector, stored: Sequence[int]) -> list[float]:
    """The teacher that a tail choice leaves: for drop and renormalise nothing beyond the stored ids."""
    if choice not in ("drop", "renormalise"):
        return list(p)
    scale = mass(p, stored) if choice == "renormalise" else 1.0
    kept = set(stored)
    return [p_i / scale if i in kept else 0.0 for i, p_i in enumerate(p)]


def tail_cross_weights(
    choice: str,
    p: Vector,
    q: Vector,
    stored: Sequence[int],
    samples: Sequence[int] = (),
    pi: Vector | None = None,
    without: Sequence[int] = (),
) -> dict[int, float]:
    """The tail choice as weights on the ids beyond the stored ones: what stands for p there, frozen.

    Its gradient is that of the dense loss with these in the place of p: for the bucket, alpha spread as q is.
    `without` are ids that are known and taken out of the tail (DKD's true token).
    """
    beyond = others(len(p), stored)
    alpha = mass(p, beyond)
    rest = [i for i in beyond if i not in set(without)]
    rho = mass(p, rest)
    if not rest or choice in ("exact", "drop", "renormalise"):
        kept = seen(choice, p, stored)
        return {i: kept[i] for i in rest}
    if choice == "bucket":
        rho_s = mass(q, rest)
        return {i: rho * q[i] / rho_s for i in rest}
    if choice == "sampled":
        weights = dict.fromkeys(rest, 0.0)
        for s in samples:
            if s in weights:
                weights[s] += alpha / len(samples)
        return weights
    if choice == "uniform":
        return dict.fromkeys(rest, rho / len(rest))
    if choice == "prior":
        assert pi is not None
        return {i: rho * share for i, share in restricted(pi, rest).items()}
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
    p = seen(choice, p, stored)
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
    p = seen(choice, p, stored)
    head = stored[:top_k]
    tail, beyond = others(len(p), head), others(len(p), stored)
    alpha, alpha_s = mass(p, tail), mass(q, tail)
    value = math.fsum(p[i] * math.log(p[i] / q[i]) for i in head if p[i] > 0)
    if alpha == 0:
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
        floor = max(mean, min_mean_alpha)
        values.append(beta / floor if mean > 0 else 1.0)  # no tail at all: it multiplies nothing
    return values


def cross_entropy_gradient(q: Vector, y: int) -> list[float]:
    return [q_i - (1.0 if i == y else 0.0) for i, q_i in enumerate(q)]


def kl_gradient(p_hat: Vector, q: Vector) -> list[float]:
    """q - p (with what stands for p); (sum p) q - p where that does not sum to 1."""
    total = math.fsum(p_hat)
    return [total * q_i - p_i for p_i, q_i in zip(p_hat, q, strict=True)]


def tad_gradient(p_hat: Vector, q: Vector, head: Sequence[int], beta_x: float) -> list[float]:
    """Eq. 6: q - p on the head, q - p + (beta(X) - 1)(q alpha / alpha_S - p) on the tail."""
    tail = set(others(len(q), head))
    alpha, alpha_s = mass(p_hat, list(tail)), mass(q, list(tail))
    gradient = kl_gradient(p_hat, q)
    for i in tail:
        gradient[i] += (beta_x - 1) * (q[i] * alpha / alpha_s - p_hat[i])
    return gradient


def with_tail_weights(p: Vector, stored: Sequence[int], weights: dict[int, float]) -> list[float]:
    """p on the stored ids, the choice's weights beyond them."""
    kept = set(stored)
    return [p[i] if i in kept else weights[i] for i in range(len(p))]


def p_hat(
    choice: str,
    p: Vector,
    q: Vector,
    stored: Sequence[int],
    samples: Sequence[int] = (),
    pi: Vector | None = None,
) -> list[float]:
    """What stands for p under a tail choice, over the whole vocabulary."""
    weights = tail_cross_weights(choice, p, q, stored, samples, pi)
    return with_tail_weights(seen(choice, p, stored), stored, weights)


def beta_for_cache(p: Sequence[Vector], top_k: int, segments: Sequence[int], beta: float) -> list[float]:
    """beta(X) from full distributions: alpha is the mass off each position's top K'; 1 where a segment has none."""
    alphas = [mass(row, others(len(row), top_ids(row, top_k))) for row in p]
    return beta_x(alphas, segments, beta)


# -- atoms: losses that are not linear in the tail ---------------------------------------------------------------

Atoms = list[tuple[float, list[int]]]
"""Each atom's teacher mass, and its ids."""


def atoms(choice: str, p: Vector, stored: Sequence[int], pi: Vector | None = None) -> Atoms:
    """The atoms of a tail choice."""
    if choice in ("bucket", "renormalise"):
        p = seen(choice, p, stored)
        beyond = others(len(p), stored)
        tail: Atoms = [(mass(p, beyond), beyond)] if beyond else []
        return [(p[i], [i]) for i in stored] + tail
    if choice == "drop":
        return [(p[i], [i]) for i in stored]
    stand_in = p_hat(choice, p, p, stored, (), pi)
    return [(p_i, [i]) for i, p_i in enumerate(stand_in)]


def tempered_atoms(choice: str, p: Vector, stored: Sequence[int], temperature: float) -> Atoms:
    """The atoms of p^(1/tau) / Z, Z over the whole vocabulary (over the stored ids for renormalise)."""
    powers = [p_i ** (1 / temperature) for p_i in p]
    total = mass(powers, stored) if choice == "renormalise" else math.fsum(powers)
    return atoms("drop" if choice == "renormalise" else choice, [w / total for w in powers], stored)


def divergence(name: str, p: float, q: float, weight: float) -> tuple[float, float]:
    """One atom's term of a divergence, and its derivative with respect to q."""
    if q == 0:
        return (0.0, 0.0)  # an atom that both lack
    if name == "kl":
        return (p * math.log(p / q), -p / q) if p > 0 else (0.0, 0.0)
    if name == "reverse_kl":
        return q * math.log(q / p), math.log(q / p) + 1
    if name == "jsd":
        m = weight * p + (1 - weight) * q
        from_p = weight * p * math.log(p / m) if p > 0 else 0.0
        value = from_p + (1 - weight) * q * math.log(q / m)
        slope = -weight * p * (1 - weight) / m + (1 - weight) * (math.log(q / m) + 1 - q * (1 - weight) / m)
        return value, slope
    if name == "skew_kl":
        m = weight * p + (1 - weight) * q
        return (p * math.log(p / m), -p * (1 - weight) / m) if p > 0 else (0.0, 0.0)
    if name == "skew_reverse_kl":
        m = (1 - weight) * p + weight * q
        return q * math.log(q / m), math.log(q / m) + 1 - weight * q / m
    if name == "todi":
        w = p / (p + q)
        value = w * p * math.log(p / q) + (1 - w) * q * math.log(q / p)
        return value, -w * p / q + (1 - w) * (math.log(q / p) + 1)
    raise AssertionError(name)


def atom_loss(name: str, teacher: Atoms, q: Vector, weight: float = 0.0) -> tuple[float, list[float]]:
    """A divergence over atoms and its gradient with respect to the student's logits.

    dq_a/dz_i = q_i ([i in a] - q_a), so dL/dz_i = q_i (slope of i's atom - sum over atoms of q_a slope_a).
    """
    value, mean_slope = 0.0, 0.0
    slopes = [0.0] * len(q)
    for p_a, ids in teacher:
        q_a = mass(q, ids)
        term, slope = divergence(name, p_a, q_a, weight)
        value += term
        mean_slope += q_a * slope
        for i in ids:
            slopes[i] = slope
    return value, [q_i * (slope - mean_slope) for q_i, slope in zip(q, slopes, strict=True)]


def jeffreys(p: Vector, q: Vector) -> float:
    return forward_kl(p, q) + forward_kl(q, p)


# -- decoupled losses ----------------------------------------------------------------------------------------------


def tckd(p: Vector, q: Vector, y: int) -> tuple[float, list[float]]:
    """KL between [p_y, 1 - p_y] and [q_y, 1 - q_y], 1 - p_y being the sum of the others, and its gradient."""
    rest = others(len(q), [y])
    p_not, q_not = mass(p, rest), mass(q, rest)
    value = p_not * math.log(p_not / q_not) if p_not > 0 else 0.0
    if p[y] > 0:
        value += p[y] * math.log(p[y] / q[y])
    gradient = [p[y] * q_i - p_not * q[y] * q_i / q_not for q_i in q]
    gradient[y] = -p[y] * q_not + p_not * q[y]
    return value, gradient


def nckd(
    choice: str,
    p: Vector,
    q: Vector,
    y: int,
    stored: Sequence[int],
    samples: Sequence[int] = (),
    pi: Vector | None = None,
) -> tuple[float, list[float]]:
    """KL between p / (1 - p_y) and q / (1 - q_y) off y, exact on the stored ids, the choice beyond; its gradient."""
    kept = seen(choice, p, stored)
    rest = others(len(q), [y])
    p_not, q_not = mass(kept, rest), mass(q, rest)
    if p_not == 0:
        return 0.0, [0.0] * len(q)
    weights = {i: kept[i] for i in stored if i != y}
    weights.update(tail_cross_weights(choice, p, q, stored, samples, pi, without=[y]))
    value = 0.0
    if choice == "bucket":
        beyond = [i for i in others(len(p), stored) if i != y]
        for p_a, ids in [(p[i], [i]) for i in stored if i != y] + ([(mass(p, beyond), beyond)] if beyond else []):
            value += p_a / p_not * math.log((p_a / p_not) / (mass(q, ids) / q_not))
    else:
        for i in rest:
            if kept[i] > 0:
                value += kept[i] / p_not * math.log(kept[i] / p_not)
            value -= weights[i] / p_not * math.log(q[i] / q_not)
    total = math.fsum(weights.values()) / p_not
    gradient = [0.0 if i == y else total * q[i] / q_not - weights[i] / p_not for i in range(len(q))]
    return value, gradient


def conditional(p: Vector, y: int) -> list[float]:
    """p / (1 - p_y) off y, 0 at y."""
    p_not = mass(p, others(len(p), [y]))
    return [0.0 if i == y else p_i / p_not for i, p_i in enumerate(p)]


def atkd_groups(uncertainty: Vector) -> tuple[list[int], list[int]]:
    """Easy and hard positions: hard is UNC >= the median, the lower of the two in the middle."""
    median = sorted(uncertainty)[(len(uncertainty) - 1) // 2]
    hard = [t for t, unc in enumerate(uncertainty) if unc >= median]
    return others(len(uncertainty), hard), hard


def atkd(uncertainty: Vector, target: Vector, divergence_: Vector, easy_weight: float) -> float:
    """lambda mean_easy(D) + (1 - lambda) mean_hard(TKD + D); an empty group adds nothing."""
    easy, hard = atkd_groups(uncertainty)
    value = 0.0
    if easy:
        value += easy_weight * math.fsum(divergence_[t] for t in easy) / len(easy)
    if hard:
        value += (1 - easy_weight) * math.fsum(target[t] + divergence_[t] for t in hard) / len(hard)
    return value


# -- sampled atoms, hidden states ----------------------------------------------------------------------------------


def rs_kd(
    p: Vector, q: Vector, stored: Sequence[int], drawn: Sequence[int], power: float
) -> tuple[float, list[float], list[float]]:
    """Draws of ids with weight p / proposal / N, the proposal p^power on the K + 1 atoms: value, gradient, weights.

    A drawn id beyond the stored ones stands for the tail: its log p is the tail's mean.
    """
    beyond = others(len(p), stored)
    alpha = mass(p, beyond)
    powers = [p[i] ** power for i in stored] + ([alpha**power] if beyond else [])
    total = math.fsum(powers)
    tail_log_p = math.fsum(p[i] / alpha * math.log(p[i]) for i in beyond) if beyond else 0.0
    value, gradient, weights = 0.0, [0.0] * len(q), []
    for s in drawn:
        atom = p[s] if s in stored else alpha
        weight = atom / (atom**power / total) / len(drawn)
        weights.append(weight)
        value += weight * ((math.log(p[s]) if s in stored else tail_log_p) - math.log(q[s]))
        for i in range(len(q)):
            gradient[i] += weight * (q[i] - (1.0 if i == s else 0.0))
    return value, gradient, weights


def cosine_loss(s: Vector, t: Vector) -> tuple[float, list[float]]:
    """1 - cos(s, t) and its gradient with respect to s."""
    s_length, t_length = math.sqrt(math.fsum(x * x for x in s)), math.sqrt(math.fsum(x * x for x in t))
    cos = math.fsum(a * b for a, b in zip(s, t, strict=True)) / (s_length * t_length)
    gradient = [-(b / t_length - cos * a / s_length) / s_length for a, b in zip(s, t, strict=True)]
    return 1 - cos, gradient


def equal_bin(probability: float, num_bins: int) -> int:
    """The bin (m / M, (m + 1) / M] that a probability lies in, 0 for 0."""
    for m in range(num_bins):
        if probability <= (m + 1) / num_bins:
            return m
    return num_bins - 1


def calibration_error(predictions: Sequence[tuple[float, bool]], num_bins: int, num_samples: int) -> float:
    """Sum over bins of |B_m| / N |accuracy - confidence|, N the samples that the predictions are about."""
    total = 0.0
    for m in range(num_bins):
        bin_ = [(p, hit) for p, hit in predictions if equal_bin(p, num_bins) == m]
        if bin_:
            accuracy = sum(hit for _, hit in bin_) / len(bin_)
            confidence = math.fsum(p for p, _ in bin_) / len(bin_)
            total += len(bin_) / num_samples * abs(accuracy - confidence)
    return total


def ece(rows: Sequence[Vector], targets: Sequence[int], num_bins: int) -> float:
    predictions = [(max(row), top_ids(row, 1) == [y]) for row, y in zip(rows, targets, strict=True)]
    return calibration_error(predictions, num_bins, len(rows))


def full_ece(rows: Sequence[Vector], targets: Sequence[int], num_bins: int) -> float:
    predictions = [(p, i == y) for row, y in zip(rows, targets, strict=True) for i, p in enumerate(row)]
    return calibration_error(predictions, num_bins, len(rows))


def common_share(p: Vector, q: Vector, k: int) -> float:
    return len(set(top_ids(p, k)) & set(top_ids(q, k))) / k
