"""A parameter of a loss as a function of how far training is: constant, linear, or half a cosine.

Progress is optimizer steps done / all steps, so it is 0 at the first step and just short of 1 at the last. A run that
is resumed continues where it was; one that is prolonged stretches its schedules, as it does the learning rate's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Schedule", "Shape"]

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """From `start` at progress 0 to `end` at progress 1.

    Attributes:
      start: the first value.
      end: the last value; unused by `constant`.
      shape: `constant` stays at the start; `linear`; `cosine` is (1 - cos(pi progress)) / 2 of the way, slow at both
        ends.
    """

    start: float
    end: float
    shape: Shape = "constant"

    def at(self, progress: float) -> float:
        """The value at a progress in [0, 1]; start and end are met exactly.

        Raises:
          ValueError: progress is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"schedule: expected a progress between 0 and 1, found {progress}")
        if self.shape == "constant" or progress == 0:
            return self.start
        if progress == 1:
            return self.end
        share = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * share

    def whole_at(self, progress: float) -> int:
        """The nearest whole number (halves to the even one): for K."""
        return round(self.at(progress))
