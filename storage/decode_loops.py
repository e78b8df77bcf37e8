"""What reading does to each position, as loops compiled by numba; the results are those of array operations.

Array operations go over all numbers of a block once for each step of the arithmetic; a compiled loop takes a position
through all steps while its numbers are in registers, and holds no lock that other threads of the process wait for.

Import it through ``storage.compiled``. Arrays are indexed by unsigned integers: they cannot be negative, which numba
would otherwise look for at every access.

Legend: N positions of an array of stored fields, R rows of it, T positions of these, t positions taken together, K kept
tokens, m samples, V vocabulary, L levels, C classes, M tokens of a class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from tailcache.storage.logarithm import LOG_2, ROOT_HALF_BITS, SERIES

__all__ = ["decode_head", "decode_samples", "transpose"]

_SQUARE = 128, 64
"""Positions and columns that are transposed at a time: both sides stay in the processor's first cache."""
_TILE = 32
"""Positions taken through each step together: their results stay in the processor's first cache."""
_LOG_2, _SERIES, _ROOT_HALF = LOG_2, SERIES, np.int64(ROOT_HALF_BITS)

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
    for first in range(0, num, _SQUARE[0]):
        last = min(first + _SQUARE[0], num)
        for left in range(0, top_k, _SQUARE[1]):
            for column in range(left, min(left + _SQUARE[1], top_k)):
                k = np.uint64(column)
                for position in range(first, last):
                    out_TK[np.uint64(position), k] = columns_KT[k, np.uint64(position)]


@_compiled
def _log(value: float, number: NDArray[np.float64], bits: NDArray[np.int64]) -> float:
    """``natural_log`` of one number, operation by operation; the arrays are one element in two types, to work in."""
    if not value > 0.0:
        return -np.inf
    number[0] = value
    exponent = (bits[0] - _ROOT_HALF) >> np.int64(52)
    bits[0] -= exponent << np.int64(52)
    ratio = (number[0] - 1.0) / (number[0] + 1.0)
    square, series = ratio * ratio, 0.0
    for term in range(len(_SERIES)):
        series = series * square + _SERIES[term]
    result: float = float(exponent) * _LOG_2[0] + (float(exponent) * _LOG_2[1] + ratio * series)
    return result


@_compiled
def decode_head(
    codes_NK: NDArray[Any],
    gaps_NK: NDArray[Any],
    starts_R: NDArray[np.int64],
    lengths_R: NDArray[np.int64],
    lists_T: NDArray[np.int32],
    class_size: int,
    tokens: NDArray[Any],
    num_codes: int,
    levels_L2: NDArray[np.float32],
    log_head_T: NDArray[np.float32],
    ids_TK: NDArray[np.int32],
    logprobs_TK: NDArray[np.float32],
) -> bool:
    """Ids and log-probs of the kept tokens of some rows.

    Whether two neighbours share a level, and whether a token is in its list, is as good as random, and a processor that
    guesses it is wrong often: what depends on it is masked, not branched to.

    Args:
      codes_NK: stored token codes, unsigned.
      gaps_NK: stored gaps between levels, unsigned; by rows or by columns.
      starts_R: where each row begins in the two above.
      lengths_R: positions of each row; T is their sum.
      lists_T: where in ``tokens`` each position's list begins.
      class_size: M; a code below it is a place in the list, any other one M + a place from the start of ``tokens``.
      tokens: [V + C M].
      num_codes: M + V.
      levels_L2: minus the levels in nats, and the exponentials of that.
      log_head_T: nats, log of the kept tokens' mass.
      ids_TK: result.
      logprobs_TK: result, nats.

    Returns:
      Whether all codes and levels are in their tables; if not, the results are of no use.
    """
    top_k = codes_NK.shape[1]
    last_level, last_code = np.int64(len(levels_L2) - 1), np.int64(num_codes - 1)
    size, sign, zero, one = np.int64(class_size), np.int64(63), np.uint64(0), np.uint64(1)
    shares_t = np.empty(_TILE, np.float64)
    number = np.empty(1, np.float64)
    bits = number.view(np.int64)
    wrong, done = False, 0
    for row in range(len(starts_R)):
        for first in range(0, lengths_R[row], _TILE):
            count = min(_TILE, lengths_R[row] - first)
            source, target = starts_R[row] + first, done + first
            for i in range(count):
                n, t = np.uint64(source + i), np.uint64(target + i)
                to_list = np.int64(lists_T[t]) + size
                level, code, highest, share = np.int64(0), np.int64(0), np.int64(0), 0.0
                for column in range(top_k):  # sums of 32-bit numbers, which 64 bits hold
                    k = np.uint64(column)
                    gap = np.int64(gaps_NK[n, k])
                    level += gap
                    place = np.uint64(min(level, last_level))
                    logprobs_TK[t, k] = levels_L2[place, zero]
                    share += levels_L2[place, one]  # from the most likely token on
                    same_level = ((gap - 1) >> sign) & -np.int64(column > 1)
                    code = np.int64(codes_NK[n, k]) + (code & same_level)
                    highest = max(highest, code)
                    index = min(code, last_code) - size
                    ids_TK[t, k] = tokens[np.uint64(index + ((index >> sign) & to_list))]
                if level > last_level or highest > last_code:
                    wrong = True
                shares_t[np.uint64(i)] = share
            for i in range(count):
                t = np.uint64(target + i)
                shift = np.float32(np.float64(log_head_T[t]) - _log(shares_t[np.uint64(i)], number, bits))
                for column in range(top_k):
                    logprobs_TK[t, np.uint64(column)] += shift
        done += lengths_R[row]
    return not wrong


@_compiled
def decode_samples(
    differences_Nm: NDArray[Any],
    starts_R: NDArray[np.int64],
    lengths_R: NDArray[np.int64],
    columns: NDArray[np.intp],
    tokens: NDArray[Any],
    num: int,
    ids_Tm: NDArray[Any],
) -> bool:
    """Ids of the draws of some rows.

    Args:
      differences_Nm: stored differences of the sorted ranks, unsigned.
      starts_R: where each row begins in them.
      lengths_R: positions of each row; T is their sum.
      columns: [m] where each of the differences stands.
      tokens: [V or more] the token of each rank.
      num: V.
      ids_Tm: result.

    Returns:
      Whether all ranks are below V; if not, the results are of no use.
    """
    last, wrong, done = np.uint64(num - 1), False, 0
    for row in range(len(starts_R)):
        for i in range(lengths_R[row]):
            n, t = np.uint64(starts_R[row] + i), np.uint64(done + i)
            rank = np.uint64(0)
            for sample in range(len(columns)):
                j = np.uint64(sample)
                rank += np.uint64(differences_Nm[n, np.uint64(columns[j])])
                ids_Tm[t, j] = tokens[min(rank, last)]
            if rank > last:
                wrong = True
        done += lengths_R[row]
    return not wrong
