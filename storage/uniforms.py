"""One uniform number for each position, from a key and a counter: any of them can be made again without the others.

The generator is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) over a key and the position's number.

Legend: T positions.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["draw_key", "uniforms"]

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
