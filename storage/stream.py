"""Rows of a teacher one after another, in a shuffled order; the next window of blocks is read meanwhile.

A convenience for who wants rows: training takes whole batches as arrays (``storage.blocks``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.blocks import Block, read_block
from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Rows
from tailcache.storage.order import shuffled_windows

if TYPE_CHECKING:
    from tailcache.storage.reader import Teacher

__all__ = ["stream_rows"]

_READ_THREADS = 2


def stream_rows(
    teacher: Teacher, rows: NDArray[np.int64], *, seed: int, epoch: int, window_blocks: int, optional: Collection[str]
) -> Iterator[tuple[Rows, Targets]]:
    """``Teacher.stream`` of some rows.

    Args:
      teacher: an open teacher.
      rows: [R] ascending.
      seed: decides the order, with the epoch.
      epoch: another epoch, another order.
      window_blocks: blocks held decoded and mixed.
      optional: which optional fields to read.

    Yields:
      One row at a time: the row, and the targets of its target positions.
    """
    windows = shuffled_windows(rows, seed=seed, epoch=epoch, block_rows=teacher.block_rows, window_blocks=window_blocks)
    pool = ThreadPoolExecutor(_READ_THREADS, "tailcache-reader")

    def begun(
        window: tuple[list[NDArray[np.int64]], NDArray[np.int64]] | None,
    ) -> tuple[list[Future[tuple[Block, Targets]]], NDArray[np.int64]] | None:
        if window is None:
            return None
        return [pool.submit(_decoded, teacher, block, optional) for block in window[0]], window[1]

    try:
        current = begun(next(windows, None))
        while current is not None:
            following = begun(next(windows, None))
            blocks = [future.result() for future in current[0]]
            ends = np.cumsum([len(block) for block, _ in blocks])
            numbers = np.searchsorted(ends, current[1], side="right")
            for number, i in zip(numbers.tolist(), (current[1] - ends[numbers]).tolist(), strict=True):
                block, targets = blocks[number]
                row = int(block.chosen[i])  # i counts from the block's end
                first, last = block.target_offsets[row : row + 2].tolist()
                yield block.rows.slice(row, row + 1), targets[first:last]
            current = following
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decoded(teacher: Teacher, rows: NDArray[np.int64], optional: Collection[str]) -> tuple[Block, Targets]:
    block = read_block(teacher, rows, optional=optional)
    return block, teacher.decode(block.stored, block.rows.row_indices)
