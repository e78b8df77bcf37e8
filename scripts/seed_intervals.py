"""A mean over seeds and how far to trust it: Student's t interval, exact for few values.

Three seeds are three numbers: the interval is wide, and says so. It covers what the seed decides (initialisation, row
order, dropout), not which text was held out.

Source: M. Abramowitz, I. Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: the distribution of t with a
whole number of degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tailcache.storage.bootstrap import Figure

__all__ = ["mean_over_seeds", "t_quantile"]


def mean_over_seeds(values: Sequence[float], confidence: float = 0.95) -> Figure:
    """The mean and its two-sided interval; no interval for a single value.

    Args:
      values: one per seed, at least one.
      confidence: of the interval, between 0 and 1.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Figure(value=mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(count - 1, confidence) * math.sqrt(variance / count)
    return Figure(value=mean, low=mean - half, high=mean + half)


def t_quantile(freedom: int, confidence: float) -> float:
    """The t with P(-t < T < t) = confidence.

    Args:
      freedom: degrees of freedom, at least 1.
      confidence: between 0 and 1.
    """
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(freedom)), in which the mass rises from 0 to 1
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass_within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _mass_within(angle: float, freedom: int) -> float:
    """P(-t < T < t) for t = sqrt(freedom) tan(angle)."""
    cosine2 = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for step in range(1 + odd, freedom, 2):  # 1 + cos²/2 + 3 cos⁴/8 ..., or cos + 2 cos³/3 ...
        total += term
        term *= cosine2 * step / (step + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
