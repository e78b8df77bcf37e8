"""What reading does to each position, as loops compiled by numba; the results are those of array operations.

Array operations go over all numbers of a block once for each step of the arithmetic; a compiled loop takes a position
through all steps while its numbers are in registers, and holds no lock that other threads of the process wait for.

Import it through ``storage.compiled``. Arrays are indexed by unsigned integers: they cannot be negative, which numba
would otherwise look for at every access.

Legend: T positions, K kept tokens, m samples, V vocabulary, L levels, C classes, M tokens of a class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["decode_head", "decode_samples", "transpose"]

_TILE = 128, 64
"""Positions and columns that are transposed at a time: both sides stay in the processor's first cache."""

Loop = TypeVar("Loop", bound=Callable[..., Any])


def _compiled(function: Loop) -> Loop:
    """Compile at the first call; keep the result on disk where there is a place for it."""
    made: Any
    try:
        made = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        made = numba.njit(nogil=True)(function)
    compiled: Loop = made
    return compiled


@_compiled
def transpose(columns_KT: NDArray[Any], out_TK: NDArray[Any]) -> None:
    """Lay out by positions what was stored by columns. NumPy's copy goes along one side and jumps on the other.

    Args:
      columns_KT: integers as they were stored, still in the processor's cache.
      out_TK: result.
    """
    top_k, num = columns_KT.shape
    for first in range(0, num, _TILE[0]):
        last = min(first + _TILE[0], num)
        for left in range(0, top_k, _TILE[1]):
            for column in range(left, min(left + _TILE[1], top_k)):
                k = np.uint64(column)
                for position in range(first, last):
                    out_TK[np.uint64(position), k] = columns_KT[k, np.uint64(position)]


@_compiled
def decode_head(
    codes_TK: NDArray[Any],
    gaps_TK: NDArray[Any],
    lists_T: NDArray[np.int32],
    class_size: int,
    tokens: NDArray[np.int32],
    num_codes: int,
    levels_L2: NDArray[np.float32],
    ids_TK: NDArray[np.int32],
    minus_levels_TK: NDArray[np.float32],
    share_T: NDArray[np.float64],
) -> bool:
    """Ids and levels of the kept tokens.

    Args:
      codes_TK: stored token codes, unsigned.
      gaps_TK: stored gaps between levels, unsigned.
      lists_T: where in ``tokens`` each position's list begins.
      class_size: M; a code below it is a place in the list, any other one M + a place from the start of ``tokens``.
      tokens: [V + C M].
      num_codes: M + V.
      levels_L2: minus the levels in nats, and the exponentials of that.
      ids_TK: result.
      minus_levels_TK: result; nats, not yet rescaled.
      share_T: result; the sum of each position's exponentials, added from the most likely token on.

    Returns:
      Whether all codes and levels are in their tables; if not, the results are of no use.
    """
    num, top_k = codes_TK.shape
    last_level, last_code = np.uint64(len(levels_L2) - 1), np.uint64(num_codes - 1)
    size, zero, one = np.uint64(class_size), np.uint64(0), np.uint64(1)
    wrong = False
    for position in range(num):
        t = np.uint64(position)
        begin_of_list = np.uint64(lists_T[t])
        level, code, highest, share = zero, zero, zero, 0.0  # sums of 32-bit numbers, which 64 bits hold
        for column in range(top_k):
            k = np.uint64(column)
            gap = np.uint64(gaps_TK[t, k])
            level += gap
            place = min(level, last_level)
            minus_levels_TK[t, k] = levels_L2[place, zero]
            share += levels_L2[place, one]
            code = np.uint64(codes_TK[t, k]) + (code if gap == zero and column > 1 else zero)
            highest = max(highest, code)
            place = min(code, last_code)
            ids_TK[t, k] = tokens[place - size if place >= size else place + begin_of_list]
        if level > last_level or highest > last_code:
            wrong = True
        share_T[t] = share
    return not wrong


@_compiled
def decode_samples(
    differences_Tm: NDArray[Any], columns: NDArray[np.intp], tokens: NDArray[np.int32], num: int, ids_Tm: NDArray[Any]
) -> bool:
    """Ids of the draws.

    Args:
      differences_Tm: stored differences of the sorted ranks, unsigned.
      columns: [m] where each of them stands.
      tokens: [V or more] the token of each rank.
      num: V.
      ids_Tm: result.

    Returns:
      Whether all ranks are below V; if not, the results are of no use.
    """
    last, wrong = np.uint64(num - 1), False
    for position in range(len(differences_Tm)):
        t = np.uint64(position)
        rank = np.uint64(0)
        for sample in range(len(columns)):
            j = np.uint64(sample)
            rank += np.uint64(differences_Tm[t, np.uint64(columns[j])])
            ids_Tm[t, j] = tokens[min(rank, last)]
        if rank > last:
            wrong = True
    return not wrong
