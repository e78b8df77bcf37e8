"""A smaller K, or fewer draws, from what is stored: no teacher needed.

Let K' < K. The tokens of rank K' to K - 1 join the tail, and their probabilities are known. So the new tail's mass, its
entropy and its sums at other temperatures are sums of positive terms, as exact as what they are made of:

    R = sum of w + r                              w the probabilities of those tokens, r the mass beyond the old top K
    H' = sum of f(w/R) + f(r/R) + (r/R) H         f(x) = -x log x, H the old tail's entropy

**Draws.** The new tail is K - K' known tokens, and the old tail, of which nothing is known but its mass and m draws.
Each draw stands for 1/m of it. So the new tail's distribution function is that of K - K' + m atoms, w/R for a known
token and (r/R)/m for a stored draw, and it is inverted at an even grid with one uniform shift (systematic sampling, as
capture does it). The expected count of a known token is m' w/R exactly. That of a token beyond the old top K is
m' (r/R) times its share of the stored draws, whose own expectation is its share of the old tail: m' p/R. So whatever is
linear in the draws stays unbiased, if the shift is independent of the stored draws: it comes from another key
(``shrink_key``).

With K' = K there are no known tokens, and the same grid over m equal atoms takes a random, evenly spaced subset of the
stored draws. Not the first m' of them: they are stored sorted, and those of one position are not independent.

Legend: T positions, K kept tokens, K' kept of them, m stored draws, m' new ones, V vocabulary, G = K - K' + m atoms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.codec import Targets

__all__ = ["shrink", "shrink_key", "tail_sum"]

_BLOCK_POSITIONS = 2048


def shrink_key(corpus_hash: str, teacher_hash: str, seed: int) -> int:
    """A 64-bit key for the draws that are made from one teacher's stored draws, independent of the key they came from.

    The teacher's own hash is in it, so that making smaller ones of smaller ones never uses a number twice.
    """
    text = f"shrink:{corpus_hash}:{teacher_hash}:{seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def shrink(
    targets: Targets,
    top_k: int,
    num_samples: int,
    uniforms_T: NDArray[np.float64],
    *,
    temperatures: Sequence[float] = (),
    full_tail: float | None = None,
) -> Targets:
    """The same positions with fewer kept tokens, fewer draws, or both.

    Args:
      targets: what is stored.
      top_k: K', from 1 to K.
      num_samples: m'. At most m, unless the old top K is the whole vocabulary.
      uniforms_T: [T] in [0, 1), independent of the stored draws: ``uniforms`` of ``shrink_key``.
      temperatures: of the columns of ``log_z_tail``; as many as it has.
      full_tail: mass of the tail from which all draws are different; below, fewer are and each is repeated, as capture
        does it. None: no such thinning. Of no consequence where K' = K.

    Returns:
      Targets whose scalars are float64 sums rounded to float32 once. ``log_target``, ``log_not_target`` and hidden
      states are as they were.

    Raises:
      ValueError: sizes out of range, or draws asked for where nothing of the old tail is known.

    Cost: about 1 µs a position and atom, in blocks of 2,048 positions.
    """
    stored, known = targets.num_samples, targets.token_ids.shape[1] - top_k
    empty = bool(np.isneginf(targets.log_tail).all())
    if top_k < 1 or known < 0 or len(temperatures) != targets.log_z_tail.shape[1]:
        raise ValueError(
            f"expected K' from 1 to {targets.token_ids.shape[1]} and {targets.log_z_tail.shape[1]} temperatures, found "
            f"{top_k} and {len(temperatures)}"
        )
    if num_samples and not (stored or (empty and known)):
        raise ValueError("expected no draws to be asked for: none are stored that could stand for the tail")
    if known == 0 and num_samples == stored:
        return targets
    parts = []
    for first in range(0, max(1, len(targets)), _BLOCK_POSITIONS):
        part = slice(first, first + _BLOCK_POSITIONS)
        parts.append(_shrink(targets[part], top_k, num_samples, uniforms_T[part], temperatures, full_tail))
    return Targets.concatenate(parts)


def _shrink(
    targets: Targets,
    top_k: int,
    num_samples: int,
    uniforms_T: NDArray[np.float64],
    temperatures: Sequence[float],
    full_tail: float | None,
) -> Targets:
    known_TJ = targets.logprobs[:, top_k:].astype(np.float64)
    old_T = targets.log_tail.astype(np.float64)
    mass_T = np.logaddexp(_log_sum(known_TJ), old_T)
    draws = _draws(targets, top_k, num_samples, known_TJ, old_T, mass_T, uniforms_T, full_tail)
    if known_TJ.shape[1] == 0:
        return replace(targets, tail_samples=draws)
    share_T = _exp(old_T, mass_T)
    entropy_T = _surprise(known_TJ, mass_T[:, None]).sum(axis=1) + _surprise(old_T, mass_T)
    entropy_T += share_T * targets.tail_entropy.astype(np.float64)
    columns = [
        np.logaddexp(_log_sum(known_TJ / tau), targets.log_z_tail[:, i].astype(np.float64))
        for i, tau in enumerate(temperatures)
    ]
    log_z = np.stack(columns, axis=1) if columns else np.empty((len(targets), 0))
    return replace(
        targets,
        token_ids=targets.token_ids[:, :top_k],
        logprobs=targets.logprobs[:, :top_k],
        tail_samples=draws,
        log_tail=mass_T.astype(np.float32),
        tail_entropy=entropy_T.astype(np.float32),
        log_z_tail=log_z.astype(np.float32),
    )


def _draws(
    targets: Targets,
    top_k: int,
    num_samples: int,
    known_TJ: NDArray[np.float64],
    old_T: NDArray[np.float64],
    mass_T: NDArray[np.float64],
    uniforms_T: NDArray[np.float64],
    full_tail: float | None,
) -> NDArray[np.int32]:
    num, stored = targets.tail_samples.shape
    if num_samples == 0 or num == 0:
        return np.empty((num, num_samples), np.int32)
    atoms_TG = np.concatenate([targets.token_ids[:, top_k:], targets.tail_samples], axis=1)
    known = known_TJ.shape[1]
    if known == 0:  # equal atoms, in whole numbers: no rounding can reach a draw that is not due
        place_Tm = ((uniforms_T[:, None] + np.arange(num_samples)) * (stored / num_samples)).astype(np.int64)
        return np.take_along_axis(atoms_TG, np.minimum(place_Tm, stored - 1), axis=1)
    width_TG = np.empty(atoms_TG.shape)
    width_TG[:, :known] = _exp(known_TJ, mass_T[:, None])
    if stored:
        width_TG[:, known:] = (_exp(old_T, mass_T) / stored)[:, None]
    upper_TG = np.cumsum(width_TG, axis=1)
    upper_TG /= upper_TG[:, -1:]
    distinct_T1 = np.full((num, 1), num_samples)
    if full_tail is not None:
        distinct_T1[:, 0] = _num_distinct(np.exp(mass_T), num_samples, full_tail)
    point_Tm = (uniforms_T[:, None] + np.arange(num_samples) * distinct_T1 // num_samples) / distinct_T1
    row_T1 = np.arange(num, dtype=np.float64)[:, None]
    below_Tm = np.minimum(point_Tm + row_T1, np.nextafter(row_T1 + 1, 0))  # rounding may not lead into the next row
    found = np.searchsorted((upper_TG + row_T1).ravel(), below_Tm.ravel(), side="right").reshape(num, num_samples)
    place_Tm = found - np.arange(num)[:, None] * atoms_TG.shape[1]
    return np.take_along_axis(atoms_TG, np.minimum(place_Tm, atoms_TG.shape[1] - 1), axis=1)


def _num_distinct(mass_T: NDArray[np.float64], num: int, full_tail: float) -> NDArray[np.int64]:
    """The smallest divisor of ``num`` that is at least its share of the mass, as capture thins its draws."""
    divisors = np.array([d for d in range(1, num + 1) if num % d == 0])
    wanted_T = np.minimum(mass_T * (num / full_tail), num)
    return divisors[np.minimum(np.searchsorted(divisors, wanted_T, side="left"), len(divisors) - 1)]


def tail_sum(
    targets: Targets, top_k: int, vocab_size: int, mean_tail: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """The sum of the positions' normalised tails beyond K', as well as the stored fields can say it.

    What known tokens contribute is exact; what lies beyond the stored K is put where the stored draws are, which is
    right in expectation.

    Args:
      targets: what is stored, with all its K tokens.
      top_k: K', from 1 to K.
      vocab_size: V.
      mean_tail: [V] what stands for the tail beyond K where no draws are stored; without it, nothing does.

    Returns:
      [V] float64.
    """
    known_TJ, old_T = targets.logprobs[:, top_k:].astype(np.float64), targets.log_tail.astype(np.float64)
    mass_T = np.logaddexp(_log_sum(known_TJ), old_T)
    share_T = _exp(old_T, mass_T)
    total = np.zeros(vocab_size)
    if known_TJ.shape[1]:
        weights = _exp(known_TJ, mass_T[:, None])
        total += np.bincount(targets.token_ids[:, top_k:].ravel(), weights.ravel(), vocab_size)
    if targets.num_samples:
        weights = np.broadcast_to((share_T / targets.num_samples)[:, None], targets.tail_samples.shape)
        total += np.bincount(targets.tail_samples.ravel(), weights.ravel(), vocab_size)
    elif mean_tail is not None:
        total += share_T.sum() * mean_tail.astype(np.float64)
    return total


def _log_sum(logs_TJ: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the sum of exponentials of each row; -inf for none."""
    if logs_TJ.shape[1] == 0:
        return np.full(len(logs_TJ), -np.inf)
    result: NDArray[np.float64] = np.logaddexp.reduce(logs_TJ, axis=1)
    return result


def _exp(logs: NDArray[np.float64], log_total: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(logs - log_total); 0 where there is no mass, also of none."""
    some = np.isfinite(logs)
    return np.where(some, np.exp(np.where(some, logs, 0.0) - np.where(some, log_total, 0.0)), 0.0)


def _surprise(logs: NDArray[np.float64], log_total: NDArray[np.float64]) -> NDArray[np.float64]:
    """-x log x of x = exp(logs - log_total), 0 where x is."""
    some = np.isfinite(logs)
    log_share = np.where(some, np.minimum(np.where(some, logs, 0.0) - np.where(some, log_total, 0.0), 0.0), 0.0)
    return -np.exp(log_share) * log_share
