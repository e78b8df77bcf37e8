"""Where each position's tail is drawn, from the corpus and the position alone, not from batching, order or device.

Draws are *systematic*: one uniform number u per position, and the tail's distribution function inverted at (u + j)/m
for j = 0 … m − 1. Each of these points is uniform by itself within its mth, so the expected count of a token is m times
its probability in the tail, as with independent draws, and whatever is linear in the draws is unbiased. But a count
is never off by one or more: a token with m p <= 1 is drawn once at most, and no whole number with the same mean has a
lower variance. So the error of a gradient by tokens, summed over tokens, is never higher, at the same bytes; that of a
single sum over the tail is lower on average, but not for any sum, because neighbouring ids are drawn together or not.

The uniform numbers come from a counter-based generator: the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014) over a key and a counter. Any position's draws can be made
again without the others, and those of different positions are independent.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAMPLING", "draw_key", "systematic_points", "uniforms"]

SAMPLING = "systematic"
"""What a capture's settings say of how its tails were drawn."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_key(corpus_hash: str, seed: int) -> int:
    """A 64-bit key for one corpus and one seed; another seed gives numbers independent of these."""
    return int.from_bytes(hashlib.sha256(f"{corpus_hash}:{seed}".encode()).digest()[:8], "little")


def uniforms(key: int, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One uniform number for each position, independent of all others.

    Args:
      key: from ``draw_key``.
      positions: [T] int64, which positions, counted over the whole corpus.

    Returns:
      [T] float64 in [0, 1), multiples of 2^-53.
    """
    with np.errstate(over="ignore"):
        counters = np.multiply(positions.astype(np.uint64), _GOLDEN, dtype=np.uint64)
        keyed = np.add(counters, np.uint64(key), dtype=np.uint64)
        mixed = _mix(np.add(_mix(keyed), _GOLDEN, dtype=np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def systematic_points(key: int, positions: NDArray[np.int64], num: int) -> NDArray[np.float64]:
    """Where to invert each position's distribution function: one uniform shift of an even grid.

    Args:
      key: from ``draw_key``.
      positions: [T] int64, which positions, counted over the whole corpus.
      num: m, the draws per position; 0 is fine.

    Returns:
      [T, m] float64, increasing, (u + j)/m. Below 1 but for rounding: the last may be 1 where u is within 2^-50 of it.

    Source: Madow, "On the theory of systematic sampling, II", Annals of Mathematical Statistics 20 (1949).
    """
    return (uniforms(key, positions)[:, None] + np.arange(num)) / max(num, 1)
