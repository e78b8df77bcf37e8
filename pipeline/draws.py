"""Where each position's tail is drawn: from the corpus, the position and its tail's mass, not from batching or order.

Draws are *systematic*: one uniform number u per position, and the tail's distribution function inverted at (u + j)/m
for j = 0 … m − 1. Each of these points is uniform by itself within its mth, so the expected count of a token is m times
its probability in the tail, as with independent draws, and whatever is linear in the draws is unbiased. But a count
is never off by one or more: a token with m p <= 1 is drawn once at most, and no whole number with the same mean has a
lower variance. So the error of a gradient by tokens, summed over tokens, is never higher, at the same bytes; that of a
single sum over the tail is lower on average, but not for any sum, because neighbouring ids are drawn together or not.

They are *thinned*: where the tail has little mass r, only m_t of the m stored draws are different, and each of these
stands there m/m_t times. A draw still weighs r/m and a token's expected count is still m times its probability, so
nothing that reads draws need know; repeats are differences of 0 between sorted draws and take next to no bytes. The
squared error of a position goes as r²/m_t, so a given number of different draws serves best where m_t is in proportion
to r: optimal allocation (Neyman, "On the two different aspects of the representative method", Journal of the Royal
Statistical Society 97, 1934).

The uniform numbers come from a counter-based generator (``storage.uniforms``): any position's draws can be made again
without the others, and those of different positions are independent.

Legend: T positions, m stored draws per position, m_t <= m different ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailcache.storage.uniforms import draw_key, uniforms

__all__ = ["FULL_TAIL", "SAMPLING", "draw_key", "num_distinct", "thinned_points", "uniforms"]

SAMPLING = "systematic, thinned"
"""What a capture's settings say of how its tails were drawn."""
FULL_TAIL = 0.25
"""Mass beyond the top K from which all m draws are different; below, draws are m / FULL_TAIL per unit of mass.

That ratio is what decides error and bytes as long as few positions exceed FULL_TAIL; those that do get fewer draws than
their mass is worth. Much lower, and the draws would be as many almost everywhere, as if they were not thinned; much
higher, and most of the m would be repeats almost everywhere. Part of a capture's settings."""


def num_distinct(tail_mass_T: Tensor, num: int) -> Tensor:
    """How many different draws each position gets: the smallest divisor of m that is at least m r / FULL_TAIL.

    A divisor, because every draw must be repeated equally often: were one repeated more often than another, the tokens
    under it would be drawn more often than they are due.

    Args:
      tail_mass_T: [T] r, the mass beyond the top K; NaN counts as 0.
      num: m >= 1.

    Returns:
      [T] int64, 1 to m; it never falls as r grows. Depends on nothing but r, so on no draw.
    """
    wanted_T = (tail_mass_T * (num / FULL_TAIL)).clamp(max=num)
    candidate_m = torch.arange(1, num + 1, device=tail_mass_T.device)
    return ((num % candidate_m == 0) & (candidate_m >= wanted_T[:, None])).int().argmax(-1) + 1


def thinned_points(uniforms_T: Tensor, tail_mass_T: Tensor, num: int) -> Tensor:
    """Where to invert each position's distribution function: one uniform shift of an even grid, each point repeated.

    Args:
      uniforms_T: [T] float64 in [0, 1), each position's u.
      tail_mass_T: [T] r, the mass beyond the top K.
      num: m, the draws per position; 0 is fine.

    Returns:
      [T, m] float64, not decreasing: (u + j)/m_t for j = 0 … m_t - 1, each m/m_t times. Below 1 but for rounding: the
      last may be 1 where u is within 2^-50 of it.

    Source: Madow, "On the theory of systematic sampling, II", Annals of Mathematical Statistics 20 (1949).
    """
    if num == 0:
        return uniforms_T.new_empty((len(uniforms_T), 0))
    distinct_T1 = num_distinct(tail_mass_T, num)[:, None]
    place_Tm = torch.arange(num, device=uniforms_T.device) * distinct_T1 // num
    return (uniforms_T[:, None] + place_Tm) / distinct_T1
