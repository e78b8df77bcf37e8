"""The order of an epoch and its shares: every row once, for any number of processes, from any place on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tailcache.storage.order import EpochOrder, shuffled_rows
from tailcache.storage.shares import Ends, num_steps, shares

orders = st.builds(
    EpochOrder,
    num_rows=st.integers(0, 300),
    block_rows=st.integers(1, 40),
    window_blocks=st.integers(1, 10),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    version=st.sampled_from([1, 2]),
)


def rows_of(order: EpochOrder, visits: NDArray[np.int64], places: NDArray[np.int64]) -> list[int]:
    rows: list[int] = (order.blocks[visits] * order.block_rows + places).tolist()
    return rows


def all_rows(order: EpochOrder) -> list[int]:
    return [row for window in order.windows() for row in rows_of(order, window.visits, window.places)]


@settings(deadline=None)
@given(orders, st.integers(0, 400))
def test_an_order_has_every_row_once_and_can_be_entered_anywhere(order: EpochOrder, first_row: int) -> None:
    found = all_rows(order)
    assert sorted(found) == list(range(order.num_rows))
    windows = list(order.windows(first_row))
    if first_row >= order.num_rows:
        assert windows == []
        return
    assert windows[0].first <= first_row < windows[0].first + len(windows[0].visits)
    later = [row for window in windows for row in rows_of(order, window.visits, window.places)]
    assert later == found[windows[0].first :]


@settings(deadline=None)
@given(orders)
def test_version_1_is_the_order_of_shuffled_rows(order: EpochOrder) -> None:
    sizes = {name: getattr(order, name) for name in ("seed", "epoch", "block_rows", "window_blocks")}
    expected = shuffled_rows(np.arange(order.num_rows), **sizes).tolist()
    assert (all_rows(order) == expected) or order.version == 2


def test_seed_and_epoch_decide_version_2() -> None:
    sizes = {"num_rows": 100, "block_rows": 8, "window_blocks": 4}
    found = {tuple(all_rows(EpochOrder(**sizes, seed=seed, epoch=epoch))) for seed in range(4) for epoch in range(4)}
    assert len(found) == 16


def test_the_order_of_version_2_stays() -> None:
    """A training run that is resumed by a later version must see the rows it has not seen."""
    order = EpochOrder(num_rows=12, block_rows=2, window_blocks=3, seed=0, epoch=0)
    assert all_rows(order) == [7, 5, 11, 6, 4, 10, 8, 0, 3, 9, 1, 2]


@settings(deadline=None)
@given(orders.filter(lambda order: order.version == 2))
def test_any_run_of_rows_is_from_as_many_blocks_as_the_window_has(order: EpochOrder) -> None:
    for window in order.windows():
        num = len(np.unique(window.visits))
        full = int(np.bincount(window.visits - window.visits.min()).min())  # rounds with all blocks
        rounds = window.visits[: full * num].reshape(full, num)
        assert (np.sort(rounds, axis=1) == np.unique(window.visits)).all()


@settings(max_examples=150, deadline=None)
@given(
    orders,
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=4),
    st.sampled_from(["even", "short"]),
)
def test_every_row_once_whatever_the_processes(
    order: EpochOrder, phases: list[tuple[int, int, int]], ends: Ends
) -> None:
    """Some steps with W processes of B rows, then with others, from the same place; the last ones go to the end."""
    expected, seen, start = all_rows(order), [], 0
    for number, (world_size, batch_rows, steps) in enumerate(phases):
        is_last = number == len(phases) - 1
        taken = {start}
        for rank in range(world_size):
            settings_ = {"batch_rows": batch_rows, "rank": rank, "world_size": world_size, "ends": ends}
            done = 0
            for stage in shares(order, **settings_, start=start):  # type: ignore[arg-type]
                for visits, places, end in zip(stage.visits, stage.places, stage.ends, strict=True):
                    assert set(visits.tolist()) <= set(stage.needs.tolist())
                    if is_last or done < steps:
                        taken.add(end)
                        if not stage.filler:
                            seen += rows_of(order, visits, places)
                            assert set(rows_of(order, visits, places)) <= set(expected[start:end])
                    done += 1
            assert done == num_steps(order, **settings_, start=start)  # type: ignore[arg-type]
            if ends == "even":
                assert done == -(-(order.num_rows - start) // (batch_rows * world_size))
        start = max(taken)
        assert sorted(seen) == sorted(expected[:start])
    assert start == order.num_rows


@settings(deadline=None)
@given(orders, st.integers(1, 9), st.integers(1, 20))
def test_dropped_ends_are_less_than_a_step(order: EpochOrder, world_size: int, batch_rows: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        stages = list(shares(order, batch_rows=batch_rows, rank=rank, world_size=world_size, ends="drop"))
        steps = [step for stage in stages for step in zip(stage.visits, stage.places, strict=True)]
        assert len(steps) == order.num_rows // (batch_rows * world_size)
        assert all(len(visits) == batch_rows for visits, _ in steps)
        seen += [row for visits, places in steps for row in rows_of(order, visits, places)]
    assert sorted(seen) == sorted(all_rows(order)[: len(seen)])
    assert order.num_rows - len(seen) < world_size * batch_rows


@pytest.mark.parametrize(("world_size", "most"), [(1, 1.0), (2, 0.5), (3, 0.5), (4, 0.25), (8, 0.125), (16, 0.125)])
def test_a_process_reads_its_part_of_the_blocks(world_size: int, most: float) -> None:
    order = EpochOrder(num_rows=32 * 8 * 6, block_rows=32, window_blocks=8, seed=0, epoch=0)
    for rank in range(world_size):
        stages = shares(order, batch_rows=4, rank=rank, world_size=world_size, ends="even")
        assert len({visit for stage in stages for visit in stage.needs.tolist()}) <= most * len(order.blocks)
