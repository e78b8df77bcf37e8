"""Our logarithm: right to the last digits everywhere, and the same bits from arrays and from compiled loops."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailcache.storage.logarithm import natural_log

POSITIVE = st.floats(float(np.finfo(np.float64).tiny), float(np.finfo(np.float64).max))


def exact(value: float) -> Decimal:
    getcontext().prec = 50
    return Decimal(value).ln()


@given(st.one_of(POSITIVE, st.floats(0.4, 2.5)))
@example(1.0)
@example(math.sqrt(0.5))
@example(math.nextafter(math.sqrt(0.5), 0))
@example(math.nextafter(1.0, 2))
@example(math.nextafter(1.0, 0))
@example(2.0**-1022)
def test_it_is_the_logarithm(value: float) -> None:
    found = Decimal(float(natural_log(np.array([value]))[0]))
    scale = min(abs(exact(value)), abs(Decimal(value) - 1)) if 0.5 < value < 2 else abs(exact(value))
    assert abs(found - exact(value)) <= Decimal("4e-16") * scale


def test_of_nothing_it_is_minus_infinity() -> None:
    assert natural_log(np.array([0.0, 1.0])).tolist() == [-math.inf, 0.0]
    assert natural_log(np.zeros((2, 0))).shape == (2, 0)


def test_compiled_loops_have_the_same_bits() -> None:
    loops = pytest.importorskip("tailcache.storage.decode_loops")
    generator = np.random.default_rng(0)
    values = np.exp(np.concatenate([generator.normal(0, 1, 5000), generator.uniform(-700, 700, 5000), np.zeros(1)]))
    values[:3] = 0.0, 1.0, math.sqrt(0.5)
    number = np.empty(1)
    found = np.array([loops._log(value, number, number.view(np.int64)) for value in values.tolist()])
    assert (found.view(np.int64) == natural_log(values).view(np.int64)).all()
