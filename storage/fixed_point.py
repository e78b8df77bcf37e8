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

__all__ = ["fixed_of", "float_of", "logit_of", "logs_of"]

_EVEN = 1 << 20
_PER_OCTAVE = 1 << 12
_INFINITY = 1 << 30
_LARGEST = _EVEN + 148 * _PER_OCTAVE
"""A bound on finite codes, whatever ``steps``: float32 reaches 2^128."""
_TABLE = 1 << 17


def fixed_of(values: NDArray[np.floating], steps: int) -> NDArray[np.int32]:
    """The codes nearest to some numbers, any shape; no NaN."""
    scaled = np.abs(values.astype(np.float64)) * steps
    finite = np.isfinite(scaled)
    codes = np.rint(np.minimum(scaled, _EVEN))
    huge = finite & (scaled > _EVEN)
    if huge.any():
        codes[huge] = _EVEN + np.rint(_PER_OCTAVE * np.log2(scaled[huge] / _EVEN))
    codes[~finite] = _INFINITY
    signed: NDArray[np.int32] = np.copysign(codes, values).astype(np.int32)
    return signed


def float_of(codes: NDArray[np.int32], steps: int, where: str) -> NDArray[np.float32]:
    """What some codes stand for, any shape.

    Raises:
      CorruptError: a code that stands for nothing.
    """
    values: NDArray[np.float32] = codes.astype(np.float32)
    values *= np.float32(1 / steps)
    if codes.size and (int(codes.max()) > _EVEN or int(codes.min()) < -_EVEN):
        size = np.abs(codes.astype(np.int64))
        if ((size > _LARGEST) & (size != _INFINITY)).any():
            raise CorruptError(
                f"{where}: expected codes up to {_LARGEST} in magnitude, or {_INFINITY} for infinity; found "
                f"{codes.min()} to {codes.max()}; run `tailcache verify`"
            )
        huge = size > _EVEN
        octaves = np.minimum(size[huge] - _EVEN, _LARGEST) / _PER_OCTAVE
        large = np.minimum(_EVEN / steps * 2.0**octaves, float(np.finfo(np.float32).max))
        values[huge] = np.copysign(np.where(size[huge] == _INFINITY, np.inf, large), codes[huge])
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
    table = _softplus_table(steps)
    sizes = np.abs(codes)
    softplus: NDArray[np.float32] = np.take(table, sizes, mode="clip")
    beyond = sizes >= len(table)
    if beyond.any():
        softplus[beyond] = _softplus(-np.abs(logit[beyond]))
    return np.minimum(logit, 0) - softplus, np.minimum(-logit, 0) - softplus


def _softplus(values: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = np.log1p(np.exp(values))
    return found


@functools.lru_cache(maxsize=4)
def _softplus_table(steps: int) -> NDArray[np.float32]:
    """Of minus what each of the first codes stands for: looking it up takes a tenth of the time of working it out."""
    table = _softplus(-float_of(np.arange(_TABLE, dtype=np.int32), steps, "table"))
    table.flags.writeable = False
    return table
