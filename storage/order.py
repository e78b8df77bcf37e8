"""A shuffled order of rows that a seed determines and that is cheap to read.

Reading one row decodes a whole inner chunk, so a plain permutation would decode every chunk many times. Rows are
therefore taken in blocks of neighbours; the blocks are permuted over the whole epoch, and the rows of a few blocks
(a window) are permuted among each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["EpochOrder", "Window", "shuffled_rows", "shuffled_windows"]


def shuffled_windows(
    rows: NDArray[np.int64], *, seed: int, epoch: int, block_rows: int, window_blocks: int
) -> Iterator[tuple[list[NDArray[np.int64]], NDArray[np.int64]]]:
    """Cut rows into blocks, shuffle the blocks, and shuffle the rows inside each window of blocks.

    Args:
      rows: [R] rows to visit, ascending.
      seed: decides the order, with the epoch.
      epoch: another epoch, another order.
      block_rows: neighbours read together.
      window_blocks: blocks held in memory and mixed.

    Yields:
      For each window: its blocks (each an ascending array of rows), and a permutation of all their rows, as
      indices into the concatenation of the blocks.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    blocks = [rows[i : i + block_rows] for i in range(0, len(rows), block_rows)]
    chosen = generator.permutation(len(blocks))
    for i in range(0, len(blocks), window_blocks):
        window = [blocks[b] for b in chosen[i : i + window_blocks]]
        yield window, generator.permutation(sum(len(block) for block in window))


def shuffled_rows(
    rows: NDArray[np.int64], *, seed: int, epoch: int = 0, block_rows: int = 32, window_blocks: int = 16
) -> NDArray[np.int64]:
    """The order of ``shuffled_windows`` as one array: [R] int64, each row once."""
    parts = [
        np.concatenate(window)[permutation]
        for window, permutation in shuffled_windows(
            rows, seed=seed, epoch=epoch, block_rows=block_rows, window_blocks=window_blocks
        )
    ]
    return np.concatenate(parts) if parts else rows[:0]


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of the order: all rows of a few blocks, mixed.

    A *visit* is the number of a block in the order of blocks, so that window w has the visits from
    w * window_blocks on; ``EpochOrder.blocks`` says which block that is.
    """

    first: int
    """How many rows of the order come before it."""
    visits: NDArray[np.int64]
    """[M] which visit each row belongs to."""
    places: NDArray[np.int64]
    """[M] which row of its block it is."""


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of one epoch, from any row of it on, without making all of it.

    It depends on nothing but these six numbers: not on how many processes read it, nor how. A place in it is the
    number of rows before it.

    In version 1 the rows of a window are permuted among each other (``shuffled_windows``). In version 2 the rows of
    each block are permuted, and the window takes one of each of its blocks in turn. So any run of ``window_blocks``
    rows comes from as many parts of the corpus, and a process can take its share of every batch from few blocks.
    """

    num_rows: int
    block_rows: int
    window_blocks: int
    seed: int
    epoch: int
    version: int = 2

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """[num_blocks] the blocks in the order they are visited in; block b has the rows from b * block_rows on."""
        return self._generator().permutation(-(-self.num_rows // self.block_rows))

    def block(self, visit: int) -> slice:
        """The rows of a visit's block."""
        first = int(self.blocks[visit]) * self.block_rows
        return slice(first, min(first + self.block_rows, self.num_rows))

    def windows(self, first_row: int = 0) -> Iterator[Window]:
        """The windows in their order, from the one that has the given row of the order.

        Cost: O(number of blocks) to begin, in version 1 O(rows before it).
        """
        sizes = np.full(len(self.blocks), self.block_rows, np.int64)
        if len(sizes):
            sizes[self.blocks == len(sizes) - 1] = self.num_rows - (len(sizes) - 1) * self.block_rows
        starts = np.concatenate([[0], np.cumsum(sizes)])
        visits = np.arange(0, len(sizes), self.window_blocks)
        generator = self._generator()
        generator.permutation(len(sizes))  # version 1 draws the order of blocks and then that of each window's rows
        for number, visit in enumerate(visits.tolist()):
            own = sizes[visit : visit + self.window_blocks]
            first, last = int(starts[visit]), int(starts[visit + len(own)])
            if self.version == 1:
                mixed = generator.permutation(last - first)
            if last <= first_row:
                continue
            if self.version == 1:
                lanes = np.searchsorted(np.cumsum(own), mixed, side="right")
                places = mixed - (np.cumsum(own) - own)[lanes]
            else:
                lanes, places = self._in_turn(own, number)
            yield Window(first=first, visits=visit + lanes, places=places)

    def _generator(self, *more: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, self.epoch, *more]))

    def _in_turn(self, sizes: NDArray[np.int64], window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """One row of each block in turn, the rows of a block in random order; shorter blocks end earlier."""
        draws = self._generator(window + 1).random((int(sizes.max()), len(sizes)))
        is_row = np.arange(len(draws))[:, None] < sizes
        places = np.argsort(np.where(is_row, draws, np.inf), axis=0)
        lanes = np.broadcast_to(np.arange(len(sizes)), draws.shape)
        return lanes[is_row], places[is_row]
