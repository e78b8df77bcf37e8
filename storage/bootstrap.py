"""Confidence intervals by resampling rows (or documents): their positions are not independent, they nearly are.

Every figure is a function of sums over positions. So it is enough to keep each row's sums, to draw rows with
replacement, and to compute the figure from the resampled sums. All figures share the same draws: a difference of
two teachers, computed from its own column of resampled figures, is a paired difference.

Legend: R rows, M sums per row, B resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Figure", "Resampled"]

_BLOCK_ENTRIES = 1 << 22  # of the matrix of weights held at a time: 32 MB


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure and its confidence interval; no interval where there are fewer than two rows."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """JSON values; what is not finite is null."""
        return {name: x if x is not None and np.isfinite(x) else None for name, x in vars(self).items()}


class Resampled:
    """Sums over all rows and over B resamples of the rows.

    Args:
      sums_RM: [R, M] float64, each row's sums; rows without positions should not be among them.
      names: M names.
      resamples: B; with 0, or with fewer than two rows, there are no intervals.
      confidence: of the intervals, between 0 and 1.
      seed: decides the draws.

    Cost: B * R draws and 2 * B * R * M operations; memory of the sums plus 32 MB.
    """

    def __init__(
        self, sums_RM: NDArray[np.float64], names: list[str], *, resamples: int, confidence: float, seed: int
    ) -> None:
        self._column = {name: m for m, name in enumerate(names)}
        self._tail = (1 - confidence) / 2
        num = len(sums_RM)
        drawn = resamples if num > 1 else 0
        self._sums = np.empty((1 + drawn, len(names)))
        self._sums[0] = sums_RM.sum(axis=0)
        generator = np.random.Generator(np.random.PCG64(seed))
        step = max(1, _BLOCK_ENTRIES // max(1, num))
        for first in range(0, drawn, step):
            count = min(step, drawn - first)
            weights_BR = np.empty((count, num))
            for b in range(count):
                weights_BR[b] = np.bincount(generator.integers(num, size=num), minlength=num)
            self._sums[1 + first : 1 + first + count] = weights_BR @ sums_RM

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """[1 + B] a sum over the rows as they are, then over each resample."""
        return self._sums[:, self._column[name]]

    def figure(self, values: NDArray[np.float64]) -> Figure:
        """A figure and its percentile interval.

        Args:
          values: [1 + B] the figure computed from the sums that ``[]`` gives; NaN for a resample that has nothing to
            compute it from, which is left out.
        """
        drawn = values[1:][~np.isnan(values[1:])]
        if not len(drawn):
            return Figure(value=float(values[0]))
        low, high = np.quantile(drawn, [self._tail, 1 - self._tail])
        return Figure(value=float(values[0]), low=float(low), high=float(high))
