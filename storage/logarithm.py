"""A logarithm that gives the same bits everywhere.

A library's logarithm may differ in its last bit from processor to processor, and between arrays and single numbers.
This one is additions, multiplications and one division, in one order, each rounded as IEEE 754 has it, so array
operations and compiled loops decode the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LOG_2", "ROOT_HALF_BITS", "SERIES", "natural_log"]

# The loops of ``decode_loops`` are kept compiled with these numbers in them, for as long as that file does not change.
LOG_2 = (6.93147180369123816490e-01, 1.90821492927058770002e-10)
"""log 2 in two parts; the first has few enough bits that its product with an exponent is exact."""
ROOT_HALF_BITS = 0x3FE6A09E667F3BCD
"""The bits of sqrt(1/2): a number is a power of two times one from sqrt(1/2) to sqrt(2)."""
SERIES = tuple(2.0 / (2 * i + 1) for i in reversed(range(11)))
"""log x = r (2 + 2/3 r^2 + 2/5 r^4 + ...), r = (x - 1) / (x + 1): what is left out is below 1e-17 of it."""


def natural_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of positive, finite, normal numbers, nats; minus infinity of 0.

    Args:
      values: any shape, float64.

    Returns:
      The same shape; off by less than 4e-16 of themselves or, near 1, of the number less 1.
    """
    is_zero = values == 0
    bits = np.where(is_zero, 1.0, values).view(np.int64)
    exponents = (bits - ROOT_HALF_BITS) >> 52
    reduced = (bits - (exponents << 52)).view(np.float64)
    ratios = (reduced - 1.0) / (reduced + 1.0)
    squares = ratios * ratios
    series = np.zeros_like(ratios)
    for coefficient in SERIES:
        series = series * squares + coefficient
    found = exponents * LOG_2[0] + (exponents * LOG_2[1] + ratios * series)
    return np.where(is_zero, -np.inf, found)
