"""Figures with intervals from the sums of the study's runs: over seeds and over held-out modules at once.

A student's figure varies because of its seed (start, order of the rows) and because of the modules it is measured on.
The mean over seeds has a variance of each kind; both are estimated, added, and an interval is the mean plus or minus
Student's t times the root, with the degrees of freedom of Welch and Satterthwaite. With three seeds that is wide where
seeds disagree, as it should be.

Arms of one seed share their start, their rows and the modules, so a difference of two arms is made within each seed and
each module before anything is averaged: most of what varies drops out.

Source: Satterthwaite, "An Approximate Distribution of Estimates of Variance Components", Biometrics 2, 1946.
Legend: R seeds, C modules, S sums, M bins, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailcache.scripts.seed_intervals import t_quantile
from tailcache.scripts.study_measure import SUMS, full_ece
from tailcache.storage.bootstrap import Figure
from tailcache.storage.errors import DataError

__all__ = ["METRICS", "ArmSums", "Intervals"]

METRICS = ("kl", "cross_entropy", "full_ece", "reverse_kl", "top1_agreement", "student_tail", "mismatch")

_MOST_FREEDOM = 500

Floats = NDArray[np.float64]
Sums = Callable[[Floats], Floats]


@dataclass(frozen=True, kw_only=True)
class ArmSums:
    """What the runs of one arm have measured.

    Attributes:
      seeds: R of them, ascending.
      sums: [R, C, S], see ``study_measure.SUMS``.
      hits, mass: [R, C, M], see ``study_measure.module_sums``; none for points of a curve.
    """

    seeds: tuple[int, ...]
    sums: Floats
    hits: Floats | None = None
    mass: Floats | None = None

    def only(self, seeds: Sequence[int]) -> ArmSums:
        """Some of the seeds."""
        chosen = [self.seeds.index(seed) for seed in seeds]
        return ArmSums(
            seeds=tuple(seeds),
            sums=self.sums[chosen],
            hits=None if self.hits is None else self.hits[chosen],
            mass=None if self.mass is None else self.mass[chosen],
        )


class Intervals:
    """Intervals over seeds and modules; all figures share the same resamples of the modules.

    Args:
      num_modules: C.
      confidence: of the intervals.
      resamples: B, for the variance over modules.
      seed: of the resamples.
    """

    def __init__(self, num_modules: int, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> None:
        if num_modules < 2:
            raise DataError(f"intervals: expected at least two held-out modules, found {num_modules}")
        self.confidence, self.num_modules = confidence, num_modules
        generator = np.random.default_rng(seed)
        even = np.full(num_modules, 1 / num_modules)
        self._weights_BC = generator.multinomial(num_modules, even, size=resamples).astype(np.float64)

    def figure(self, metric: str, arm: ArmSums, *, comparisons: int = 1) -> Figure:
        """A figure of one arm, and its interval; none for a single seed.

        Args:
          metric: one of ``METRICS``.
          arm: its sums.
          comparisons: of how many figures all are to be within their intervals at once (Bonferroni's correction).
        """
        return self._of([self._values(metric, arm)], comparisons)

    def difference(self, metric: str, first: ArmSums, second: ArmSums, *, comparisons: int = 1) -> Figure:
        """First minus second, paired by seed and module, over the seeds that both have."""
        both = sorted(set(first.seeds) & set(second.seeds))
        if not both:
            raise DataError("difference: expected a seed that both arms have, found none")
        signed = [self._values(metric, arm.only(both)) for arm in (first, second)]
        return self._of([signed[0], tuple(-each for each in signed[1])], comparisons)

    def _values(self, metric: str, arm: ArmSums) -> tuple[Floats, Floats]:
        """[R] the figure of each seed, and [B] that of each resample of the modules, mean over seeds."""
        of_seeds = self._metric(metric, arm, lambda each_RCx: each_RCx.sum(1))
        resampled = np.zeros(len(self._weights_BC))
        for r in range(len(arm.seeds)):
            one = arm.only([arm.seeds[r]])
            resampled += self._metric(metric, one, lambda each_1Cx: self._weights_BC @ each_1Cx[0])
        return of_seeds, resampled / len(arm.seeds)

    def _metric(self, metric: str, arm: ArmSums, total: Sums) -> Floats:
        sums = total(arm.sums)
        positions = sums[..., SUMS.index("positions")]
        if metric == "full_ece":
            if arm.hits is None or arm.mass is None:
                raise DataError("full_ece: expected sums by bin, found none")
            found: Floats = full_ece(total(arm.hits), total(arm.mass), positions)
            return found
        return np.asarray(sums[..., SUMS.index(metric)] / positions)

    def _of(self, signed: Sequence[tuple[Floats, ...]], comparisons: int) -> Figure:
        of_seeds = np.sum([each[0] for each in signed], axis=0)
        resampled = np.sum([each[1] for each in signed], axis=0)
        mean, num = float(of_seeds.mean()), len(of_seeds)
        if num < 2:
            return Figure(value=mean)
        over_seeds, over_modules = float(of_seeds.var(ddof=1)) / num, float(resampled.var(ddof=1))
        total = over_seeds + over_modules
        if total == 0:
            return Figure(value=mean, low=mean, high=mean)
        degrees = total**2 / (over_seeds**2 / (num - 1) + over_modules**2 / (self.num_modules - 1))
        freedom = min(_MOST_FREEDOM, math.floor(degrees + 1e-9))  # rounded down: a little too wide
        half = t_quantile(max(1, freedom), 1 - (1 - self.confidence) / comparisons) * math.sqrt(total)
        return Figure(value=mean, low=mean - half, high=mean + half)
