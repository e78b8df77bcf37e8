"""Which rows of an epoch's order each process takes at each step, and which blocks it has to read for that.

A step takes the next ``batch_rows * world_size`` rows of the order, whatever their number: so what has been taken is
always the beginning of the order, a number of rows says it, and any other number of processes can go on from there.
Which of a step's rows go to which process is free. They are sorted by the blocks that they lie in and cut into equal
parts, so that a process meets the same few blocks of a window again and again and need not read the others.

Legend: B rows of a process's step, W processes, n steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.order import EpochOrder

__all__ = ["Ends", "Stage", "num_steps", "shares"]

Ends = Literal["even", "short", "drop"]
"""What becomes of the rows that do not fill a last step: they are shared out, and processes for which there are none
left have a step without a row that counts ("even") or no step ("short"); or nobody takes them ("drop")."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The steps of one process that become possible with one more window of the order."""

    needs: NDArray[np.int64]
    """The visits (see ``storage.order``) that the steps take rows of, ascending."""
    visits: list[NDArray[np.int64]]
    """For each step, [B] the visit of each row; fewer in the last one of an epoch."""
    places: list[NDArray[np.int64]]
    """For each step, [B] which row of its block it is."""
    ends: list[int]
    """For each step, how many rows of the order all processes together have taken when it is done."""
    filler: bool = False
    """The only row of the only step stands in for none, and does not count."""


def num_steps(order: EpochOrder, *, batch_rows: int, rank: int, world_size: int, ends: Ends, start: int = 0) -> int:
    """How many steps a process has in an epoch, from some place in the order on."""
    full, rest = divmod(order.num_rows - start, batch_rows * world_size)
    if rest == 0 or ends == "drop":
        return full
    return full + (ends == "even" or _part(rest, rank, world_size)[1] > _part(rest, rank, world_size)[0])


def shares(
    order: EpochOrder, *, batch_rows: int, rank: int, world_size: int, ends: Ends, start: int = 0
) -> Iterator[Stage]:
    """The steps of one process, from some place in the order on.

    Args:
      order: of the epoch.
      batch_rows: rows of a process's step.
      rank: which process, from 0.
      world_size: how many there are.
      ends: what becomes of the rows that do not fill a last step.
      start: rows of the order that have been taken before.

    Yields:
      Stages, each with at least one step.

    Cost: some arrays of a window's length at a time.
    """
    total = batch_rows * world_size
    visits = places = np.empty(0, np.int64)
    taken = start
    for window in order.windows(start):
        skip = max(0, start - window.first)
        visits = np.concatenate([visits, window.visits[skip:]])
        places = np.concatenate([places, window.places[skip:]])
        full = len(visits) // total
        if full:
            sorted_nT = np.argsort(visits[: full * total].reshape(full, total) % order.window_blocks, kind="stable")
            mine_nB = sorted_nT[:, rank * batch_rows : (rank + 1) * batch_rows] + np.arange(full)[:, None] * total
            own = visits[mine_nB]
            ends_n = [taken + (i + 1) * total for i in range(full)]
            yield Stage(needs=np.unique(own), visits=list(own), places=list(places[mine_nB]), ends=ends_n)
            taken += full * total
            visits, places = visits[full * total :], places[full * total :]
    if len(visits) and ends != "drop":
        sorted_T = np.argsort(visits % order.window_blocks, kind="stable")
        first, last = _part(len(visits), rank, world_size)
        filler = first == last
        if filler and ends == "short":
            return
        mine = sorted_T[:1] if filler else sorted_T[first:last]
        yield Stage(
            needs=np.unique(visits[mine]),
            visits=[visits[mine]],
            places=[places[mine]],
            ends=[taken + len(visits)],
            filler=filler,
        )


def _part(num: int, rank: int, world_size: int) -> tuple[int, int]:
    return rank * num // world_size, (rank + 1) * num // world_size
