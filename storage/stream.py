"""Rows of a teacher one after another, in a shuffled order, read in blocks ahead of who consumes them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Rows
from tailcache.storage.order import shuffled_windows

if TYPE_CHECKING:
    from tailcache.storage.reader import Teacher

__all__ = ["stream_rows"]

_READ_THREADS = 2
_MAX_GAP_ROWS = 8  # rows read and dropped rather than starting another read


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
    with ThreadPoolExecutor(_READ_THREADS, "tailcache-reader") as pool:
        for window, permutation in windows:
            blocks = pool.map(lambda block: _read_block(teacher, block, optional), window)
            held = list(itertools.chain.from_iterable(blocks))
            for i in permutation:
                yield held[i]


def _read_block(teacher: Teacher, block: NDArray[np.int64], optional: Collection[str]) -> list[tuple[Rows, Targets]]:
    held = []
    for run in np.split(block, np.flatnonzero(np.diff(block) > _MAX_GAP_ROWS) + 1):
        first, last = int(run[0]), int(run[-1]) + 1
        rows, targets = teacher.corpus.rows(first, last), teacher.rows(first, last, optional=optional)
        offsets = np.concatenate([[0], np.cumsum(rows.supervised)])[rows.offsets]
        for row in run - first:
            held.append((rows.slice(row, row + 1), targets[offsets[row] : offsets[row + 1]]))
    return held
