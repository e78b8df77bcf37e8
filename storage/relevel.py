"""Find the levels again that decoded log-probabilities came from, so that storing them once more loses nothing.

A decoded log-prob is minus its level plus one number for the whole position, which makes the head's mass right. Storing
it as it is would round it to a level again, sometimes to the neighbouring one. So that number is searched for: it is
the one with which all tokens of the position lie on levels. Without it, they are what was stored.

Legend: T positions, K kept tokens, L levels, C candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["on_levels"]

_CANDIDATES = np.arange(-5, 6)
"""Levels around the nearest one that the most likely token may have come from: its own error is half a step, and the
common number is an average of the errors of all tokens."""
_NEAR = 1e-5
"""Nats, and as a share of the log-prob: float32 arithmetic in the decoder."""
_BLOCK_POSITIONS = 4096
_COLUMNS = 6
"""Tokens that the candidates are tried on first; where that does not decide it, all are."""


def on_levels(logprobs_TK: NDArray[np.float32], levels_L: NDArray[np.float32]) -> NDArray[np.float32]:
    """Minus the levels that the log-probs came from, where they came from these levels; else the log-probs.

    Args:
      logprobs_TK: [T, K] decoded log-probabilities, not increasing along K.
      levels_L: [L] the levels that they will be stored with, increasing from 0.

    Returns:
      [T, K] float32, not increasing along K.

    Cost: about 1 µs a position and token.
    """
    result = logprobs_TK.copy()
    some = np.unique(np.linspace(0, logprobs_TK.shape[1] - 1, _COLUMNS).astype(np.int64))
    for first in range(0, len(logprobs_TK), _BLOCK_POSITIONS):
        part_TK = result[first : first + _BLOCK_POSITIONS]
        good_T = _settle(part_TK, np.arange(len(part_TK)), some, levels_L)
        _settle(part_TK, np.flatnonzero(~good_T), np.arange(part_TK.shape[1]), levels_L)
    return result


def _settle(
    part_TK: NDArray[np.float32], chosen: NDArray[np.int64], columns: NDArray[np.int64], levels_L: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Put the levels of some positions in their place, where they are found; say which those are."""
    midpoints_L = levels_L[1:].astype(np.float64) / 2 + levels_L[:-1].astype(np.float64) / 2
    levels64_L = levels_L.astype(np.float64)
    wanted_TK = -part_TK[chosen].astype(np.float64)
    nearest_T = np.searchsorted(midpoints_L, wanted_TK[:, 0])
    start_TC = levels64_L[np.clip(nearest_T[:, None] + _CANDIDATES, 0, len(levels_L) - 1)]
    shift_TC = start_TC - wanted_TK[:, :1]
    tried_TCk = wanted_TK[:, None, columns] + shift_TC[:, :, None]
    off_TCk = np.abs(levels64_L[np.searchsorted(midpoints_L, tried_TCk)] - tried_TCk)
    shift_T1 = np.take_along_axis(shift_TC, off_TCk.sum(axis=2).argmin(axis=1)[:, None], axis=1)
    shifted_TK = wanted_TK + shift_T1
    found_TK = levels64_L[np.searchsorted(midpoints_L, shifted_TK)]
    good_T = (np.abs(found_TK - shifted_TK) <= _NEAR * (1 + wanted_TK)).all(axis=1)
    part_TK[chosen[good_T]] = -found_TK[good_T].astype(np.float32)
    return np.asarray(good_T)
