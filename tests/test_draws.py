"""Numbers that look random and depend on the corpus, the seed and the position alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tailcache.pipeline.draws import draw_key, systematic_points, uniforms

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
    np.testing.assert_array_equal(systematic_points(key, positions, 3), grid)


def test_the_numbers_of_a_position_are_its_own() -> None:
    positions = np.arange(1000)
    whole = systematic_points(5, positions, 16)
    order = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(systematic_points(5, positions[order], 16), whole[order])
    for start in (0, 1, 999):
        alone = slice(start, start + 1)
        np.testing.assert_array_equal(systematic_points(5, positions[alone], 16), whole[alone])
    np.testing.assert_array_equal(systematic_points(5, positions, 1)[:, 0], uniforms(5, positions))
    assert len(np.unique(whole)) == whole.size


def test_shapes_and_range() -> None:
    assert systematic_points(1, np.empty(0, np.int64), 4).shape == (0, 4)
    assert systematic_points(1, np.arange(3), 0).shape == (3, 0)
    values = uniforms(1, np.arange(200_000))
    assert values.min() >= 0
    assert values.max() < 1
    assert (values * 2.0**53 == np.floor(values * 2.0**53)).all()


@pytest.mark.parametrize("num", [1, 2, 3, 16, 64])
def test_one_point_in_each_mth_of_the_way_all_shifted_alike(num: int) -> None:
    points = systematic_points(3, np.arange(5000), num)
    assert (np.floor(points * num) == np.arange(num)).all()
    np.testing.assert_allclose(np.diff(points, axis=1), 1 / num, rtol=1e-12)
    for column in points.T:  # each by itself is uniform within its part
        assert abs(deviation(np.bincount((column * num * 64).astype(int) % 64, minlength=64))) < 4.5


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
