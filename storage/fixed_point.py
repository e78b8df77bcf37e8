"""Logs as whole numbers: in even steps where they are ordinary, in even ratios where they are huge.

A code n up to 2^20 in magnitude stands for n / steps; beyond, each code is larger than the one before it by the ratio
2^(1/4096), so that every finite float32 has a code; +-2^30 is infinity. Nothing is clipped.

A probability p is one such number, its logit x = log p - log(1 - p): an error of x is at most an error of either log,
and both keep their relative precision where they are close to 0.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.errors import CorruptError

__all__ = ["EVEN", "INFINITY", "fixed_of", "float_of", "logit_of", "logs_of", "softplus_table"]

EVEN = 1 << 20
_PER_OCTAVE = 1 << 12
INFINITY = 1 << 30
_LARGEST = EVEN + 148 * _PER_OCTAVE
"""A bound on finite codes, whatever ``steps``: float32 reaches 2^128."""
_UNDERFLOW = 104  # nats: exp(-104) is 0 in float32


def fixed_of(values: NDArray[np.floating], steps: int) -> NDArray[np.int32]:
    """The codes nearest to some numbers, any shape; no NaN."""
    scaled = np.abs(values.astype(np.float64)) * steps
    finite = np.isfinite(scaled)
    codes = np.rint(np.minimum(scaled, EVEN))
    huge = finite & (scaled > EVEN)
    if huge.any():
        codes[huge] = EVEN + np.rint(_PER_OCTAVE * np.log2(scaled[huge] / EVEN))
    codes[~finite] = INFINITY
    signed: NDArray[np.int32] = np.copysign(codes, values).astype(np.int32)
    return signed


def float_of(codes: NDArray[np.int32], steps: int, where: str) -> NDArray[np.float32]:
    """What some codes stand for, any shape.

    Raises:
      CorruptError: a code that stands for nothing.
    """
    values: NDArray[np.float32] = codes.astype(np.float32)
    values *= np.float32(1 / steps)
    if codes.size and (int(codes.max()) > EVEN or int(codes.min()) < -EVEN):
        size = np.abs(codes.astype(np.int64))
        if ((size > _LARGEST) & (size != INFINITY)).any():
            raise CorruptError(
                f"{where}: expected codes up to {_LARGEST} in magnitude, or {INFINITY} for infinity; found "
                f"{codes.min()} to {codes.max()}; run `tailcache verify`"
            )
        huge = size > EVEN
        octaves = np.minimum(size[huge] - EVEN, _LARGEST) / _PER_OCTAVE
        large = np.minimum(EVEN / steps * 2.0**octaves, float(np.finfo(np.float32).max))
        values[huge] = np.copysign(np.where(size[huge] == INFINITY, np.inf, large), codes[huge])
    return values


def logit_of(log_p: NDArray[np.floating], log_not_p: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log p - log(1 - p), any shape; infinite where either is."""
    difference: NDArray[np.float64] = log_p.astype(np.float64) - log_not_p.astype(np.float64)
    return difference


def logs_of(
    codes: NDArray[np.int32], logit: NDArray[np.float32], steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The inverse of ``logit_of``: log p and log(1 - p), each to float32's relative precision.

    Args:
      codes: any shape.
      logit: what ``float_of`` makes of them.
      steps: of the codes to a nat.
    """
    softplus = np.take(softplus_table(steps), np.abs(codes), mode="clip")
    return np.minimum(logit, 0) - softplus, np.minimum(-logit, 0) - softplus


@functools.lru_cache(maxsize=4)
def softplus_table(steps: int) -> NDArray[np.float32]:
    """log(1 + exp(-x)) for what each code from 0 on stands for, to where it is 0 for it and all that follow.

    To look it up takes a tenth of the time of working it out. A code is looked up by its magnitude.
    """
    even = np.arange(min(EVEN, _UNDERFLOW * steps) + 1, dtype=np.int32)
    huge = np.arange(EVEN + 1, _LARGEST + 1, dtype=np.int32) if _UNDERFLOW * steps > EVEN else even[:0]
    values = float_of(np.concatenate([even, huge]), steps, "table")
    table: NDArray[np.float32] = np.log1p(np.exp(-values))
    table.flags.writeable = False
    return table
