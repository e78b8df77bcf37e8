"""The shuffled order of rows: a permutation, decided by seed and epoch, near enough to blocks to be cheap."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tailcache.storage.order import shuffled_rows, shuffled_windows


@given(
    rows=st.sets(st.integers(0, 500), max_size=120),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    block_rows=st.integers(1, 40),
    window_blocks=st.integers(1, 40),
)
def test_every_row_once(rows: set[int], seed: int, epoch: int, block_rows: int, window_blocks: int) -> None:
    given_rows = np.array(sorted(rows), np.int64)
    order = shuffled_rows(given_rows, seed=seed, epoch=epoch, block_rows=block_rows, window_blocks=window_blocks)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), given_rows)
    again = shuffled_rows(given_rows, seed=seed, epoch=epoch, block_rows=block_rows, window_blocks=window_blocks)
    np.testing.assert_array_equal(order, again)


def test_seed_and_epoch_decide() -> None:
    rows = np.arange(300)
    orders = {tuple(shuffled_rows(rows, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_the_order_of_version_1_stays() -> None:
    """A training run that is resumed by a later version must see the rows it has not seen."""
    order = shuffled_rows(np.arange(12), seed=0, epoch=0, block_rows=2, window_blocks=3)
    assert order.tolist() == [10, 11, 7, 4, 6, 5, 1, 0, 8, 3, 2, 9]


def test_a_window_reads_few_blocks_of_neighbours() -> None:
    rows = np.arange(0, 1000, 2)
    seen = []
    for window, permutation in shuffled_windows(rows, seed=1, epoch=2, block_rows=16, window_blocks=4):
        assert len(window) <= 4
        for block in window:
            assert len(block) <= 16
            assert (np.diff(block) == 2).all()
        assert sorted(permutation.tolist()) == list(range(sum(len(block) for block in window)))
        seen.append(np.concatenate(window)[permutation])
    found = np.concatenate(seen)
    np.testing.assert_array_equal(found, shuffled_rows(rows, seed=1, epoch=2, block_rows=16, window_blocks=4))
    assert np.abs(np.corrcoef(found, np.arange(len(found)))[0, 1]) < 0.3


def test_position_of_a_row_is_spread_over_the_epoch() -> None:
    """Over many seeds every row comes at every part of the epoch: mean place within five standard errors."""
    places = np.zeros(64)
    num_seeds = 400
    for seed in range(num_seeds):
        order = shuffled_rows(np.arange(64), seed=seed, block_rows=4, window_blocks=4)
        places[order] += np.arange(64)
    error = 64 / np.sqrt(12 * num_seeds)
    assert np.abs(places / num_seeds - 31.5).max() < 5 * error
