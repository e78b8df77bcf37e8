"""The order in which threads read blocks and make batches: blocks are spread over the stage before their own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from itertools import groupby
from typing import Any

import pytest

from tailcache.storage.blocks import walk
from tailcache.trainers.block_sources import Share, Threads


def taken(share: Share, num_steps: int) -> tuple[list[tuple[float, str]], int]:
    """What is to be done in an epoch as one thread would take it up, if all of it were due: rank and kind; stages."""
    work: list[tuple[float, int, str]] = []

    def submit(rank: float, read: Callable[[], Any]) -> Future[Any]:
        work.append((rank, len(work), "block"))
        future: Future[Any] = Future()
        future.set_result(read())
        return future

    stages = list(share.stages(0, 0))
    reading = Threads(lambda visit: visit, submit)  # type: ignore[arg-type, return-value]
    for cut in walk(iter(stages), reading.announce, reading.get, reading.keep_up, num_steps=num_steps):
        assert set(cut.held) >= {int(visit) for visits in cut.visits for visit in visits}
        work.append((cut.begin, len(work), "cut"))
    return [(rank, kind) for rank, _, kind in sorted(work)], len(stages)


@pytest.mark.parametrize("window_blocks", [2, 4, 8, 16])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("rows", [5000, 5003])
def test_blocks_are_read_between_the_batches_of_the_stage_before(window_blocks: int, num_steps: int, rows: int) -> None:
    share = Share(
        num_rows=rows, block_rows=32, window_blocks=window_blocks, seed=3, version=2, batch_rows=8, rank=0,
        world_size=1, ends="even",
    )  # fmt: skip
    order, num_stages = taken(share, num_steps)
    kinds = [kind for _, kind in order]
    assert num_stages > 5
    assert kinds.index("cut") == window_blocks, "the first batches come as soon as their blocks are there"
    for stage in range(num_stages - 1):
        here = [kind for rank, kind in order if stage <= rank < stage + 1]
        if "block" not in here:  # the last rows are shared out from blocks that are held
            assert stage == num_stages - 2
            continue
        assert here[0] == "cut", "somebody waits for it"
        assert here[-1] == "cut", "the next stage's last block is read before"
        runs = [(kind, len(list(run))) for kind, run in groupby(here)]
        cuts_per_block = here.count("cut") / here.count("block")
        assert max(length for kind, length in runs if kind == "block") <= 2
        assert max(length for kind, length in runs if kind == "cut") <= 2 * cuts_per_block + 1


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_any_share_of_any_order_is_taken_stage_by_stage(world_size: int) -> None:
    for rank in range(world_size):
        share = Share(
            num_rows=333, block_rows=7, window_blocks=3, seed=1, version=2, batch_rows=4, rank=rank,
            world_size=world_size, ends="even",
        )  # fmt: skip
        order, num_stages = taken(share, 2)
        assert all(-1 <= at < num_stages for at, _ in order)
        assert all(at < num_stages - 1 for at, kind in order if kind == "block")
