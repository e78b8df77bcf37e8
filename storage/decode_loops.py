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
            right = min(left + _SQUARE[1], top_k)
            four = left + (right - left) // 4 * 4
            for column in range(left, four, 4):  # what is next to one another is written together
                a = np.uint64(column)
                b, c, d = a + np.uint64(1), a + np.uint64(2), a + np.uint64(3)
                for position in range(first, last):
                    t = np.uint64(position)
                    out_TK[t, a] = columns_KT[a, t]
                    out_TK[t, b] = columns_KT[b, t]
                    out_TK[t, c] = columns_KT[c, t]
                    out_TK[t, d] = columns_KT[d, t]
            for column in range(four, right):
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
    minus_levels_L: NDArray[np.float32],
    weights_L: NDArray[np.float64],
    log_head_T: NDArray[np.float32],
    ids_TK: NDArray[np.int32],
    logprobs_TK: NDArray[np.float32],
) -> bool:
    """Ids and log-probs of the kept tokens of some rows.

    A position is gone over once for each thing that is made of it, so that what a loop needs stays in registers.
    Whether two neighbours share a level, and whether a token is in its list, is as good as random, and a processor that
    guesses it is wrong often: there, one of two numbers is chosen, and nothing is branched to.

    Args:
      codes_NK: stored token codes, unsigned.
      gaps_NK: stored gaps between levels, unsigned; by rows or by columns.
      starts_R: where each row begins in the two above.
      lengths_R: positions of each row; T is their sum.
      lists_T: where in ``tokens`` each position's list begins.
      class_size: M; a code below it is a place in the list, any other one M + a place from the start of ``tokens``.
      tokens: [V + C M].
      num_codes: M + V.
      minus_levels_L: minus the levels, nats.
      weights_L: the exponentials of that, as float32 has them.
      log_head_T: nats, log of the kept tokens' mass.
      ids_TK: result.
      logprobs_TK: result, nats.

    Returns:
      Whether all codes and levels are in their tables; if not, the results are of no use.
    """
    top_k = codes_NK.shape[1]
    last_level, last_code = np.int64(len(weights_L) - 1), np.int64(num_codes - 1)
    size, none, first_two = np.int64(class_size), np.int64(0), min(2, top_k)
    codes_K = np.empty(top_k, np.int64)
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
                highest = none
                for column in range(top_k):  # sums of 32-bit numbers, which 64 bits hold
                    highest += np.int64(gaps_NK[n, np.uint64(column)])
                if highest > last_level:
                    wrong = True
                    continue
                level, share = np.uint64(0), 0.0
                for column in range(top_k):
                    k = np.uint64(column)
                    level += np.uint64(gaps_NK[n, k])
                    logprobs_TK[t, k] = minus_levels_L[level]
                    share += weights_L[level]  # from the most likely token on
                shares_t[np.uint64(i)] = share
                code = none
                for column in range(first_two):  # the second one is not a difference even on the first one's level
                    code = np.int64(codes_NK[n, np.uint64(column)])
                    codes_K[np.uint64(column)] = code
                for column in range(2, top_k):
                    k = np.uint64(column)
                    code = np.int64(codes_NK[n, k]) + (code if gaps_NK[n, k] == 0 else none)
                    codes_K[k] = code
                highest = none
                for column in range(top_k):
                    highest = max(highest, codes_K[np.uint64(column)])
                if highest > last_code:
                    wrong = True
                    continue
                to_list = np.int64(lists_T[t])
                for column in range(top_k):
                    k = np.uint64(column)
                    ids_TK[t, k] = tokens[np.uint64(codes_K[k] + (to_list if codes_K[k] < size else -size))]
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
