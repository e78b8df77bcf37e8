"""Where a loader's blocks of rows come from: threads of this process, or worker processes.

Both hand over the blocks that a process needs in the order in which ``storage.blocks.walk`` announces them. A worker
works that order out for itself and reads every n-th block of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from tailcache.storage.blocks import Block, read_block
from tailcache.storage.order import EpochOrder
from tailcache.storage.several import Opening
from tailcache.storage.shares import Ends, Stage, num_steps, shares
from tailcache.trainers.parcels import Packer, Parcel, Unpacker, shared

if TYPE_CHECKING:
    from tailcache.storage.several import AnyTeacher

__all__ = ["NeededBlocks", "Share", "Threads", "Workers"]

_EARLY = 0.75
"""Of a block's share of the stage before: the last block is read beside the last cut but one, so that no thread waits
until another has read it; the first come after the first cut, which somebody is waiting for."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process takes of an order."""

    num_rows: int
    block_rows: int
    window_blocks: int
    seed: int
    version: int
    batch_rows: int
    rank: int
    world_size: int
    ends: Ends

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        return EpochOrder(
            num_rows=self.num_rows,
            block_rows=self.block_rows,
            window_blocks=self.window_blocks,
            seed=self.seed,
            epoch=epoch,
            version=self.version,
        )

    def stages(self, epoch: int, start: int) -> Iterator[Stage]:
        """What this process does in an epoch, from some place in the order on."""
        return shares(
            self.order(epoch),
            batch_rows=self.batch_rows,
            rank=self.rank,
            world_size=self.world_size,
            ends=self.ends,
            start=start,
        )

    def is_over(self, taken: int) -> bool:
        """Whether no process has a step left."""
        left = self.num_rows - taken
        return left == 0 or (self.ends == "drop" and left < self.batch_rows * self.world_size)

    def num_steps(self, start: int) -> int:
        """Steps of this process in an epoch, from some place in the order on."""
        return num_steps(
            self.order(0),
            batch_rows=self.batch_rows,
            rank=self.rank,
            world_size=self.world_size,
            ends=self.ends,
            start=start,
        )


class NeededBlocks(IterableDataset[Parcel]):
    """The blocks that a process needs, in the order it asks for them: every n-th of them in each of n workers."""

    def __init__(
        self, teacher: AnyTeacher, rows: NDArray[np.int64], optional: tuple[str, ...], targets: bool, share: Share
    ) -> None:
        self._teacher: AnyTeacher | None = teacher
        self._opening = Opening.of(teacher)
        self._rows, self._optional, self._targets, self._share = rows, optional, targets, share
        self._begin = shared(torch.zeros(2, dtype=torch.int64))  # workers that persist are told through it
        self._order = share.order(0)
        self._packer: Packer | None = None  # of a worker

    def __len__(self) -> int:
        """Rows of an epoch, over all processes."""
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_teacher": None, "_packer": None}

    def begin(self, epoch: int, start: int) -> None:
        """Say where the next iteration begins."""
        self._begin.copy_(torch.tensor([epoch, start]))
        self._order = self._share.order(epoch)

    def read(self, visit: int) -> Block:
        """Read a block of the present epoch, in this process."""
        assert self._teacher is not None
        rows = self._rows[self._order.block(visit)]
        return read_block(self._teacher, rows, optional=self._optional, targets=self._targets)

    def __iter__(self) -> Iterator[Parcel]:
        worker = get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None or self._teacher is None:
            self._teacher = self._opening.open()  # nothing of another process' files, threads and connections is used
        epoch, start = self._begin.tolist()
        self._order = self._share.order(epoch)
        if self._packer is None:
            self._packer = Packer()
        self._packer.begin()
        held: set[int] = set()
        count = 0
        for stage in self._share.stages(epoch, start):
            needs = stage.needs.tolist()
            for visit in needs:
                if visit not in held:
                    if count % step == number:
                        yield self._packer.pack(visit, self.read(visit))
                    count += 1
            held = set(needs)


class Threads:
    """Blocks read by threads of this process, spread over the stage before the one that they are for.

    Args:
      read: reads the block of a visit.
      submit: has something done, what has the lowest rank first, as ``PriorityPool.submit``; the rank of a cut is where
        it begins.
    """

    def __init__(
        self, read: Callable[[int], Block], submit: Callable[[float, Callable[[], Block]], Future[Block]]
    ) -> None:
        self._read, self._submit = read, submit
        self._pending: dict[int, Future[Block]] = {}
        self._stage = -1  # the one before that of the blocks that are announced next

    def announce(self, visits: list[int]) -> None:
        """Begin to read these."""
        for number, visit in enumerate(visits):
            rank = self._stage + max(1 - _EARLY, number - _EARLY) / len(visits)
            self._pending[visit] = self._submit(rank, partial(self._read, visit))
        self._stage += 1

    def get(self, visit: int) -> Block:
        """One that was announced."""
        return self._pending.pop(visit).result()

    def keep_up(self, part: float) -> None:
        """They go on by themselves."""

    def close(self) -> None:
        """Read nothing more than has been begun."""
        for future in self._pending.values():
            future.cancel()


class Workers:
    """Blocks that come from worker processes, in the order they were announced in."""

    def __init__(self, parcels: Iterator[Parcel], unpacker: Unpacker) -> None:
        self._parcels: Iterator[Parcel] | None = parcels
        self._unpacker = unpacker
        self._due: deque[int] = deque()
        self._here: dict[int, Block] = {}
        self._announced = 0

    def announce(self, visits: list[int]) -> None:
        """Workers know it already."""
        self._due.extend(visits)
        self._announced = len(visits)

    def get(self, visit: int) -> Block:
        """One that was announced."""
        while visit not in self._here:
            self._take()
        return self._here.pop(visit)

    def keep_up(self, part: float) -> None:
        """Workers stop when they are a few blocks ahead: take what they have, evenly, and not all at a window's end."""
        while len(self._due) > max(0.0, (1 - part) * self._announced):
            self._take()

    def _take(self) -> None:
        assert self._parcels is not None
        parcel, visit = next(self._parcels), self._due.popleft()
        if parcel.visit != visit:  # never other rows in silence
            raise RuntimeError(f"loader: expected the block of visit {visit}, found that of visit {parcel.visit}")
        self._here[visit] = self._unpacker.unpack(parcel)

    def close(self) -> None:
        """Take nothing more."""
        self._parcels = None
