"""Schedules: their ends are met, they do not overshoot, and they are what they are called."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailcache.trainers.schedules import Schedule, Shape

SHAPES: list[Shape] = ["constant", "linear", "cosine"]


def test_by_hand() -> None:
    assert [Schedule(2, 4, "constant").at(x) for x in (0.0, 0.3, 1.0)] == [2, 2, 2]
    assert [Schedule(2, 4, "linear").at(x) for x in (0.0, 0.25, 0.5, 1.0)] == [2, 2.5, 3, 4]
    cosine = [Schedule(2, 4, "cosine").at(x) for x in (0.0, 1 / 3, 0.5, 1.0)]
    assert cosine == pytest.approx([2, 2 + 2 * 0.25, 3, 4])
    assert [Schedule(5, 20, "linear").whole_at(x) for x in (0.0, 0.1, 0.5, 0.99, 1.0)] == [5, 6, 12, 20, 20]
    assert isinstance(Schedule(5, 20, "cosine").whole_at(0.3), int)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from(SHAPES), st.lists(st.floats(0, 1), min_size=2))
def test_ends_are_met_and_the_way_is_monotonic(start: float, end: float, shape: Shape, progress: list[float]) -> None:
    schedule = Schedule(start, end, shape)
    assert schedule.at(0.0) == start
    assert schedule.at(1.0) == (start if shape == "constant" else end)
    values = [schedule.at(x) for x in sorted(progress)]
    slack = 1e-9 * max(abs(start), abs(end), 1.0)
    rising = [b - a if end >= start else a - b for a, b in itertools.pairwise(values)]
    assert all(step >= -slack for step in rising)
    assert all(min(start, end) - slack <= value <= max(start, end) + slack for value in values)


@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from(SHAPES), st.floats(0, 1))
def test_whole_numbers_stay_between_the_ends(start: int, end: int, shape: Shape, progress: float) -> None:
    assert min(start, end) <= Schedule(start, end, shape).whole_at(progress) <= max(start, end)


@given(st.floats(0, 1))
def test_a_cosine_is_symmetric_and_slow_at_its_ends(progress: float) -> None:
    schedule = Schedule(0.0, 1.0, "cosine")
    assert schedule.at(progress) + schedule.at(1 - progress) == pytest.approx(1.0)
    assert abs(schedule.at(progress) - progress) <= (math.pi - 2) / (2 * math.pi)
    ahead = schedule.at(progress) - progress
    assert ahead <= 1e-12 if progress <= 0.5 else ahead >= -1e-12


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_its_range_is_refused(progress: float) -> None:
    with pytest.raises(ValueError, match="expected a progress between 0 and 1"):
        Schedule(1, 2, "linear").at(progress)
