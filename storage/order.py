"""A shuffled order of rows that a seed determines and that is cheap to read.

Reading one row decodes a whole inner chunk, so a plain permutation would decode every chunk many times. Rows are
therefore taken in blocks of neighbours; the blocks are permuted over the whole epoch, and the rows of a few blocks
(a window) are permuted among each other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["shuffled_rows", "shuffled_windows"]


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
