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

from tailcache.storage.fixed_point import EVEN, INFINITY
from tailcache.storage.logarithm import LOG_2, ROOT_HALF_BITS, SERIES

__all__ = ["compiled", "copy_rows", "decode_rows", "transpose"]

_SQUARE = 128, 64
"""Positions and columns that are transposed at a time: both sides stay in the processor's first cache."""
_TILE = 32
"""Positions taken through each step together: their results stay in the processor's first cache."""
_LOG_2, _SERIES, _ROOT_HALF = LOG_2, SERIES, np.int64(ROOT_HALF_BITS)
_EVEN, _INFINITY = np.int64(EVEN), np.int64(INFINITY)

Scalars = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(function: Loop) -> Loop:
    """Compile at the first call; keep the result on disk where there is a place for it."""
    made: Any
    try:
        made = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        made = numba.njit(nogil=True)(function)
    result: Loop = made
    return result


@compiled
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


@compiled
def copy_rows(
    arrays: tuple[NDArray[np.uint8], ...],
    starts_R: NDArray[np.int64],
    lengths_R: NDArray[np.int64],
    places_R: NDArray[np.int64],
    widths: NDArray[np.int64],
    out: tuple[NDArray[np.uint8], ...],
) -> None:
    """Copy the rows of some arrays.

    Args:
      arrays: the bytes of each.
      starts_R: where each row begins, in elements.
      lengths_R: elements of each row.
      places_R: where each row begins in the results, in elements.
      widths: bytes of an element of each array.
      out: the bytes of each result.
    """
    for i in range(len(arrays)):
        for row in range(len(starts_R)):
            first, place, length = starts_R[row] * widths[i], places_R[row] * widths[i], lengths_R[row] * widths[i]
            out[i][place : place + length] = arrays[i][first : first + length]


@compiled
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


@compiled
def _decode_scalars(
    codes: Scalars,
    table: NDArray[np.float32],
    steps: float,
    begin: int,
    log_head_t: NDArray[np.float32],
    out: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]],
    done: int,
) -> bool:
    """The scalars of one row, of which there are as many as in ``log_head_t``; whether all of them are ordinary."""
    tail_logit, tail_entropy, target_logit = codes
    log_tail, entropy, log_target, log_not_target = out
    last, zero, right = np.uint64(len(table) - 1), np.float32(0.0), True
    for i in range(len(log_head_t)):
        n, t = np.uint64(begin + i), np.uint64(done + i)
        value, is_right = _float_of(tail_logit[n], steps)
        softplus = table[min(np.uint64(abs(np.int64(tail_logit[n]))), last)]
        log_tail[t], log_head_t[np.uint64(i)] = min(value, zero) - softplus, min(-value, zero) - softplus
        right &= is_right
        value, is_right = _float_of(target_logit[n], steps)
        softplus = table[min(np.uint64(abs(np.int64(target_logit[n]))), last)]
        log_target[t], log_not_target[t] = min(value, zero) - softplus, min(-value, zero) - softplus
        right &= is_right
        entropy[t], is_right = _float_of(tail_entropy[n], steps)
        right &= is_right
    return right


@compiled
def _float_of(code: int, steps: float) -> tuple[Any, Any]:
    """``fixed_point.float_of`` of one code, unless it is huge."""
    size = abs(np.int64(code))
    if size == _INFINITY:
        return np.float32(np.inf if code > 0 else -np.inf), True
    return np.float32(np.float32(code) * np.float32(steps)), size <= _EVEN


@compiled
def _decode_head(
    codes_NK: NDArray[Any],
    gaps_NK: NDArray[Any],
    classes_N: NDArray[Any],
    tables: tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float64]],
    sizes: tuple[int, int, int],
    begin: int,
    log_head_t: NDArray[np.float32],
    codes_K: NDArray[np.int64],
    ids_TK: NDArray[np.int32],
    logprobs_TK: NDArray[np.float32],
    done: int,
) -> bool:
    """Ids and log-probs of the kept tokens of one row.

    A position is gone over several times, so that what a loop needs stays in registers. Levels and codes go together:
    each is a chain of steps that wait for one another, and a processor takes both chains side by side.
    Whether two neighbours share a level, and whether a token is in its list, is as good as random, and a processor that
    guesses it is wrong often: there, one of two numbers is chosen, and nothing is branched to.
    """
    tokens, minus_levels_L, weights_L = tables
    vocab_size, num_classes, class_size = np.int64(sizes[0]), np.int64(sizes[1]), np.int64(sizes[2])
    top_k = codes_NK.shape[1]
    last_level, last_code = np.int64(len(weights_L) - 1), vocab_size + class_size - 1
    none, first_two = np.int64(0), min(2, top_k)
    shares_t = np.empty(_TILE, np.float64)
    number = np.empty(1, np.float64)
    bits = number.view(np.int64)
    right = True
    for first in range(0, len(log_head_t), _TILE):
        count = min(_TILE, len(log_head_t) - first)
        for i in range(count):
            n, t = np.uint64(begin + first + i), np.uint64(done + first + i)
            highest = none
            for column in range(top_k):  # sums of 32-bit numbers, which 64 bits hold
                highest += np.int64(gaps_NK[n, np.uint64(column)])
            if highest > last_level:
                right = False
                continue
            level, share, code = np.uint64(0), 0.0, none
            for column in range(first_two):  # the second one is not a difference even on the first one's level
                k = np.uint64(column)
                level += np.uint64(gaps_NK[n, k])
                logprobs_TK[t, k] = minus_levels_L[level]
                share += weights_L[level]
                code = np.int64(codes_NK[n, k])
                codes_K[k] = code
            for column in range(2, top_k):
                k = np.uint64(column)
                gap = np.uint64(gaps_NK[n, k])
                level += gap
                logprobs_TK[t, k] = minus_levels_L[level]
                share += weights_L[level]  # from the most likely token on
                code = np.int64(codes_NK[n, k]) + (code if gap == np.uint64(0) else none)
                codes_K[k] = code
            shares_t[np.uint64(i)] = share
            chosen = np.int64(classes_N[n]) if num_classes > 1 else none
            to_list = vocab_size + chosen * class_size
            highest = none
            for column in range(top_k):  # a code becomes where its token is
                k = np.uint64(column)
                code = codes_K[k]
                highest = max(highest, code)
                codes_K[k] = code + (to_list if code < class_size else -class_size)
            if highest > last_code or chosen >= num_classes:
                right = False
                continue
            for column in range(top_k):
                k = np.uint64(column)
                ids_TK[t, k] = tokens[np.uint64(codes_K[k])]
        for i in range(count):
            t = np.uint64(done + first + i)
            log_head = np.float64(log_head_t[np.uint64(first + i)])
            shift = np.float32(log_head - _log(shares_t[np.uint64(i)], number, bits))
            for column in range(top_k):
                logprobs_TK[t, np.uint64(column)] += shift
    return right


@compiled
def _decode_samples(
    differences_Nm: NDArray[Any],
    columns: NDArray[np.intp],
    tokens: NDArray[Any],
    vocab_size: int,
    begin: int,
    ids_Tm: NDArray[np.int32],
    done: int,
    num: int,
) -> bool:
    """Ids of the draws of one row of ``num`` positions; whether all their ranks are below V."""
    last, right = np.uint64(vocab_size - 1), True
    for i in range(num):
        n, t = np.uint64(begin + i), np.uint64(done + i)
        rank = np.uint64(0)
        for sample in range(len(columns)):
            j = np.uint64(sample)
            rank += np.uint64(differences_Nm[n, np.uint64(columns[j])])
            ids_Tm[t, j] = tokens[min(rank, last)]
        if rank > last:
            right = False
    return right


@compiled
def decode_rows(
    wide: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    classes_N: NDArray[Any],
    scalars: Scalars,
    starts_R: NDArray[np.int64],
    lengths_R: NDArray[np.int64],
    places_R: NDArray[np.int64],
    tables: tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float64], NDArray[np.float32], NDArray[np.intp]],
    sizes: tuple[int, int, int],
    steps: float,
    out_wide: tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]],
    out_scalars: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]],
) -> bool:
    """All that ``Codec.decode`` makes of some rows of an array of stored fields; one call, so one wait for Python.

    Args:
      wide: token codes [N, K] and gaps between levels [N, K], by rows or by columns, and differences of the sorted
        draws' ranks [N, m]; unsigned.
      classes_N: unsigned; not looked at where there is one class.
      scalars: codes [N] of the tail's logit, the tail's entropy and the target's logit.
      starts_R: where each row begins in these.
      lengths_R: positions of each row.
      places_R: where each row begins in the results.
      tables: tokens [V + C M] of each rank and of each class' list; minus the levels [L], nats; their exponentials, as
        float32 has them; log(1 + exp(-x)) for the scalars' codes; [m] where each of the differences stands.
      sizes: V, C and M.
      steps: a scalar's step, nats.
      out_wide: ids [T, K], log-probs [T, K] (nats) and the draws' ids [T, m].
      out_scalars: [T] each, nats: log tail, the tail's entropy, log p and log(1 - p) of the target.

    Returns:
      Whether all numbers are in their tables, and no scalar is huge; if not, the results are of no use.
    """
    codes_NK, gaps_NK, differences_Nm = wide
    tokens, minus_levels_L, weights_L, softplus, columns = tables
    ids_TK, logprobs_TK, samples_Tm = out_wide
    longest = 0
    for row in range(len(lengths_R)):
        longest = max(longest, lengths_R[row])
    log_head = np.empty(longest, np.float32)
    codes_K = np.empty(codes_NK.shape[1], np.int64)
    right = True
    for row in range(len(starts_R)):
        begin, num, place = starts_R[row], lengths_R[row], places_R[row]
        log_head_t = log_head[:num]
        right &= _decode_scalars(scalars, softplus, steps, begin, log_head_t, out_scalars, place)
        right &= _decode_head(
            codes_NK, gaps_NK, classes_N, (tokens, minus_levels_L, weights_L), sizes, begin, log_head_t, codes_K,
            ids_TK, logprobs_TK, place,
        )  # fmt: skip
        right &= _decode_samples(differences_Nm, columns, tokens, sizes[0], begin, samples_Tm, place, num)
    return right
