"""Numbers that look random and depend on the corpus, the seed and the position alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tailcache.pipeline.draws import FULL_TAIL, draw_key, num_distinct, thinned_points, uniforms

Floats = NDArray[np.float64]

WORD = (1 << 64) - 1


def split_mix(state: int) -> int:
    """One output of SplitMix64, in Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def reference(key: int, position: int) -> float:
    keyed = (key + 0x9E3779B97F4A7C15 * position) & WORD
    first = split_mix((keyed - 0x9E3779B97F4A7C15) & WORD)
    return (split_mix(first) >> 11) / 2.0**53


@pytest.mark.parametrize("key", [0, 1, WORD, draw_key("corpus", 3)])
def test_they_are_what_the_published_generator_gives(key: int) -> None:
    """Also what fixes them for good: stored draws must stay reproducible from version to version."""
    positions = np.array([0, 1, 17, 1 << 20, (1 << 62) + 5])
    expected = np.array([reference(key, int(p)) for p in positions])
    np.testing.assert_array_equal(uniforms(key, positions), expected)
    grid = (expected[:, None] + np.array([0.0, 1.0, 2.0])) / 3
    np.testing.assert_array_equal(points_of(expected, 1.0, 3), grid)


def points_of(uniform: Floats, tail_mass: float | Floats, num: int) -> Floats:
    """[T, m], every position with the same tail or each with its own."""
    mass = torch.as_tensor(tail_mass, dtype=torch.float64).expand(len(uniform))
    found: Floats = thinned_points(torch.from_numpy(uniform), mass, num).numpy()
    return found


def test_the_numbers_of_a_position_are_its_own() -> None:
    positions = np.arange(1000)
    mass = np.random.default_rng(1).random(1000) ** 4
    values = uniforms(5, positions)
    whole = points_of(values, mass, 16)
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(points_of(uniforms(5, positions[order]), mass[order], 16), whole[order])
    for start in (0, 1, 999):
        alone = slice(start, start + 1)
        np.testing.assert_array_equal(points_of(uniforms(5, positions[alone]), mass[alone], 16), whole[alone])
    np.testing.assert_array_equal(points_of(values, mass, 1)[:, 0], values)
    assert len(np.unique(points_of(values, 1.0, 16))) == whole.size


def test_shapes_and_range() -> None:
    assert points_of(uniforms(1, np.empty(0, np.int64)), 0.5, 4).shape == (0, 4)
    assert points_of(uniforms(1, np.arange(3)), 0.5, 0).shape == (3, 0)
    values = uniforms(1, np.arange(200_000))
    assert values.min() >= 0
    assert values.max() < 1
    assert (values * 2.0**53 == np.floor(values * 2.0**53)).all()


@pytest.mark.parametrize("num", [1, 2, 3, 16, 64])
def test_one_point_in_each_mth_of_the_way_all_shifted_alike(num: int) -> None:
    points = points_of(uniforms(3, np.arange(5000)), FULL_TAIL, num)
    assert (np.floor(points * num) == np.arange(num)).all()
    np.testing.assert_allclose(np.diff(points, axis=1), 1 / num, rtol=1e-12)
    for column in points.T:  # each by itself is uniform within its part
        assert abs(deviation(np.bincount((column * num * 64).astype(int) % 64, minlength=64))) < 4.5


def smallest_divisor(num: int, at_least: float) -> int:
    return next(d for d in range(1, num + 1) if num % d == 0 and d >= min(at_least, num))


@given(
    num=st.integers(1, 200),
    mass=st.one_of(st.floats(0, 1), st.floats(0, 0.01), st.sampled_from([2.0**-i for i in range(12)])),
)
def test_as_many_different_points_as_the_tail_is_worth(num: int, mass: float) -> None:
    """All from FULL_TAIL on, at least one, and each as often as any other."""
    (distinct,) = num_distinct(torch.tensor([mass], dtype=torch.float64), num).tolist()
    assert distinct == smallest_divisor(num, num * mass / FULL_TAIL)
    (points,) = points_of(np.array([0.3]), mass, num)
    found, repeats = np.unique(points, return_counts=True)
    np.testing.assert_array_equal(found, (0.3 + np.arange(distinct)) / distinct)
    assert (repeats == num // distinct).all()


def test_few_draws_and_numbers_with_few_divisors() -> None:
    mass = torch.tensor([0.0, 1e-30, 0.01, 0.25 / 13, 0.0193, 0.2, 0.2500001, 1.0], dtype=torch.float64)
    assert num_distinct(mass, 1).tolist() == [1] * 8
    assert num_distinct(mass, 13).tolist() == [1, 1, 1, 1, 13, 13, 13, 13]  # a prime: one or all
    assert num_distinct(mass, 12).tolist() == [1, 1, 1, 1, 1, 12, 12, 12]
    assert num_distinct(mass, 16).tolist() == [1, 1, 1, 2, 2, 16, 16, 16]
    assert num_distinct(torch.tensor([torch.nan], dtype=torch.float64), 16).tolist() == [1]


def mean_counts(points: Floats, edges: Floats) -> Floats:
    """Per position and interval between edges, the number of points in it; averaged over the positions."""
    inside = (points[:, :, None] >= edges[:-1]) & (points[:, :, None] < edges[1:])
    mean: Floats = inside.sum(axis=1).mean(axis=0)
    return mean


@pytest.mark.parametrize("num", [1, 2, 6, 7, 12, 16, 24])
def test_expected_counts_are_exact_whatever_the_tail(num: int) -> None:
    """Summed over an even grid of u, what falls into an interval is its share but for the grid's own step."""
    size = 2000
    edges = np.append(0, np.cumsum(np.random.default_rng(num).dirichlet(np.full(30, 0.3))))
    edges[-1] = 1
    grid = (np.arange(size) + 0.5) / size
    for distinct in (d for d in range(1, num + 1) if num % d == 0):
        mass = FULL_TAIL * (distinct - 0.5) / num
        assert num_distinct(torch.tensor([mass], dtype=torch.float64), num).item() == distinct
        error = np.abs(mean_counts(points_of(grid, mass, num), edges) - num * np.diff(edges))
        assert error.max() <= num / distinct / size + 1e-9


def test_a_number_of_points_that_does_not_divide_would_be_biased() -> None:
    """Four points in six places: two of them twice, so the first quarter of the tail comes a third of the time."""
    grid = (np.arange(2000) + 0.5) / 2000
    edges = np.linspace(0, 1, 5)
    uneven = (grid[:, None] + np.arange(6) * 4 // 6) / 4
    np.testing.assert_allclose(mean_counts(uneven, edges), [2, 1, 2, 1])
    mass = FULL_TAIL * 4 / 6
    np.testing.assert_allclose(mean_counts(points_of(grid, mass, 6), edges), [1.5] * 4)


def deviation(counts: NDArray[np.int64]) -> float:
    """Chi-square against even counts, in standard deviations."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - degrees) / np.sqrt(2 * degrees))


def test_even_in_one_dimension_and_between_neighbours() -> None:
    values = uniforms(draw_key("some corpus", 0), np.arange(200_000))
    assert abs(deviation(np.bincount((values * 256).astype(int), minlength=256))) < 4.5
    cells = (values * 16).astype(int)
    for distance in (1, 2, 3, 16, 100, 4096):
        a, b = cells[:-distance], cells[distance:]
        assert abs(deviation(np.bincount(a * 16 + b, minlength=256))) < 4.5, distance


def test_seeds_and_corpora_are_independent() -> None:
    positions = np.arange(40_000)
    keys = [draw_key("a", 0), draw_key("a", 1), draw_key("b", 0), draw_key("a", -1)]
    assert len(set(keys)) == 4
    assert keys == [draw_key("a", 0), draw_key("a", 1), draw_key("b", 0), draw_key("a", -1)]
    assert all(0 <= key <= WORD for key in keys)
    cells = [(uniforms(key, positions) * 16).astype(int) for key in keys]
    for i in range(4):
        for j in range(i):
            assert abs(deviation(np.bincount(cells[i] * 16 + cells[j], minlength=256))) < 4.5
