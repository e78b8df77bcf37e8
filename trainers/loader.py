"""A torch ``DataLoader`` over a cache: shuffled rows with their targets, for any number of processes.

    loader = CacheLoader(cache.teacher("a"), batch_rows=8, seed=0, num_workers=2, pin_memory=True)
    for batch in loader:                    # one epoch; the next loop is the next epoch, in another order
        ...
        state = loader.state_dict()         # at any step; load_state_dict goes on after the last batch that was taken

**One order.** An epoch's order of rows (``storage.order``) is decided by seed and epoch alone. A step of all processes
together takes the next rows of it, so the state is one number, the same on every process, and a run can go on from it
with any number of processes and workers, and any batch size: every row is seen exactly once per epoch. Rows that are
held out are not in it.

**Who reads.** Without workers, threads of this process read the next window of blocks while the present one
is consumed. With workers, each of them reads every n-th block of those that this process needs and hands it over in
shared memory. In both cases batches are cut out of the window and decoded here, by threads that are a little ahead;
small batches several at a time, since every call into Python of a thread holds up the others. On a local disk it is the
same threads that read, when no batch is wanted: as many as there are processors, which more would only share.

**accelerate.** The loader gives each process its own rows already. It says so by the mark that accelerate leaves on
loaders it has prepared, so ``Accelerator.prepare`` returns it as it is and shards nothing again; batches are to be
moved to the device by the caller (``Trainer`` does).
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from tailcache.storage.blocks import Cut, TargetRows, walk
from tailcache.storage.codec import OPTIONAL
from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.several import named_arrays
from tailcache.storage.shares import Ends, Stage
from tailcache.trainers.ahead import ahead, on_device
from tailcache.trainers.block_sources import NeededBlocks, Share, Threads, Workers
from tailcache.trainers.parcels import Unpacker
from tailcache.trainers.priority_pool import PriorityPool
from tailcache.trainers.processors import num_processors

if TYPE_CHECKING:
    from tailcache.storage.several import AnyTeacher

__all__ = ["CacheLoader", "as_tensors", "loader_block_rows"]

BLOCK_POSITIONS = 32_768
"""Four inner chunks of the store: a block's ends cut chunks that are decoded again with its neighbours."""
WINDOW_BLOCKS = 8
_STATE_VERSION = 1
_THREADS = 4
"""At most, and no more than there are processors: threads that take turns put each other's data out of the caches."""
_REMOTE_READ_THREADS = 8
"""More, where the time goes into waiting for answers."""
_CUTS_AHEAD = 2
"""Besides the one that is consumed and the one that is waiting to be; each about as large as a block."""


def loader_block_rows(teacher: AnyTeacher) -> int:
    """Rows read together. It depends on the corpus alone, so that every teacher gives one order of rows."""
    return max(1, round(BLOCK_POSITIONS * teacher.corpus.num_rows / max(1, teacher.corpus.num_targets)))


def as_tensors(rows: TargetRows) -> dict[str, torch.Tensor]:
    """The default batch: R rows with their N tokens and T target positions, as tensors, without a copy.

    Returns:
      row_indices [R] (-1 for a row that stands in for none and has no targets), offsets [R + 1] into the tokens and
      target_offsets [R + 1] into the targets; tokens, document_start and supervised [N]; and the fields of ``Targets``,
      [T, ...], the optional ones where they were read; of several teachers, those of the i-th as ``i/NAME``.
    """
    targets = named_arrays(rows.targets)
    arrays = {**vars(rows.rows), **targets, "target_offsets": rows.target_offsets}
    del arrays["held_out"]
    for name, values in targets.items():
        if values.ndim == 2 and values.shape[1] == 0 and name.rpartition("/")[2] in OPTIONAL:
            del arrays[name]
            arrays.pop(f"{name}_scale", None)
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


class CacheLoader(DataLoader[Any]):
    """Batches of one process, in the order that seed and epoch determine; see the module.

    Attributes:
      epoch: of the next (or present) iteration.
      num_rows: rows of an epoch, over all processes.
      waited_s: seconds that the consumer has waited for batches so far.
    """

    def __init__(
        self,
        teacher: AnyTeacher,
        *,
        batch_rows: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        rows: NDArray[np.int64] | None = None,
        split: Literal["train", "held-out"] = "train",
        optional: Collection[str] = (),
        targets: bool = True,
        collate: Callable[[TargetRows], Any] = as_tensors,
        ends: Ends = "even",
        window_blocks: int = WINDOW_BLOCKS,
        block_rows: int | None = None,
        order_version: int = 2,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        multiprocessing_context: Any = None,
        pin_memory: bool = False,
    ) -> None:
        """Nothing is read yet.

        Args:
          teacher: an open teacher of a cache, or several (``storage.several.Teachers``).
          batch_rows: rows of a batch.
          seed: decides the order, with the epoch.
          rank: which process this is; by default as ``torch.distributed`` says, else the only one.
          world_size: how many there are; likewise.
          rows: corpus rows to visit; by default all of the split.
          split: what the rows must belong to, so that held-out rows never appear in training.
          optional: the optional fields of the cache that are wanted (``log_z_tail``, ``hidden``).
          targets: read the targets; otherwise the corpus alone is read, and the fields are those of
            ``Targets.unread``. The order of rows is the same.
          collate: makes a batch of rows; called by several threads of this process.
          ends: what becomes of the rows that do not fill a last step of all processes. "even": they are shared out, and
            a process for which there is none left gets a row without any target, so that all make equally many steps
            and every row counts once. "short": there is no such step, so processes may differ by one. "drop": nobody
            sees these rows.
          window_blocks: blocks that are mixed with one another; held in memory twice, the present ones and the next.
          block_rows: rows of a block; by default as many as have about 32,768 target positions.
          order_version: of ``EpochOrder``.
          num_workers: processes that read; without any, threads of this one do.
          prefetch_factor: blocks that each worker is ahead.
          persistent_workers: keep the workers for the next epoch.
          multiprocessing_context: how workers begin; by default as is usual for the platform, but "spawn" where the
            cache is not on a local disk, because what talks to a store does not survive a fork.
          pin_memory: put batches into page-locked memory, where there is a GPU.

        Raises:
          ConfigError: a number that makes no sense, or a row outside the split.
        """
        if rank is None or world_size is None:
            joined = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = (torch.distributed.get_rank() if joined else 0) if rank is None else rank
            world_size = (torch.distributed.get_world_size() if joined else 1) if world_size is None else world_size
        if batch_rows < 1 or window_blocks < 1 or not 0 <= rank < world_size or order_version not in (1, 2):
            raise ConfigError(
                "loader: expected batch_rows and window_blocks of at least 1, 0 <= rank < world_size and order version "
                f"1 or 2; found {batch_rows}, {window_blocks}, rank {rank} of {world_size} and {order_version}"
            )
        allowed = teacher.train_rows() if split == "train" else teacher.held_out_rows()
        chosen = allowed if rows is None else np.unique(np.asarray(rows, dtype=np.int64))
        if (outside := np.setdiff1d(chosen, allowed)).size:
            raise ConfigError(
                f"loader: expected rows of the {split} split, found {len(outside)} that are not, first {outside[0]}"
            )
        self.teacher, self.collate = teacher, collate
        self.num_rows, self.epoch, self.waited_s = len(chosen), 0, 0.0
        self._share = Share(
            num_rows=len(chosen),
            block_rows=block_rows or loader_block_rows(teacher),
            window_blocks=window_blocks,
            seed=int(seed),
            version=order_version,
            batch_rows=batch_rows,
            rank=rank,
            world_size=world_size,
            ends=ends,
        )
        if num_workers and multiprocessing_context is None and not teacher.place.survives_fork:
            multiprocessing_context = "spawn"
        self._rows_hash = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
        self._start = self._taken = 0  # rows of the order, by all processes together
        self._pin = pin_memory and torch.cuda.is_available()
        self._blocks = NeededBlocks(teacher, chosen, tuple(optional), targets, self._share)
        super().__init__(
            self._blocks,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            multiprocessing_context=multiprocessing_context,
            generator=torch.Generator(),  # so that a run's own random numbers do not depend on workers
        )
        self._is_accelerate_prepared = True
        self._unpacker = Unpacker()
        self._cuts: Generator[Any] | None = None  # of the iteration that goes on

    def __len__(self) -> int:
        """Steps of this process in a whole epoch."""
        return self._share.num_steps(0)

    def close(self) -> None:
        """End workers that persist; they begin again with the next iteration. Otherwise they end with the loader."""
        self._iterator = None
        self._unpacker = Unpacker()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; one that was loaded with a state goes on where it was."""
        if epoch != self.epoch:
            self.epoch, self._start, self._taken = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is: after the last batch that it was given. All processes agree after equal steps."""
        over = self._taken > 0 and self._share.is_over(self._taken)
        return {
            "version": _STATE_VERSION,
            "epoch": self.epoch + over,
            "rows_taken": 0 if over else self._taken,
            **self._identity,
        }

    @property
    def _identity(self) -> dict[str, Any]:
        share = self._share
        return {
            "corpus_hash": self.teacher.corpus.hash,
            "num_rows": share.num_rows,
            "rows": self._rows_hash,
            "seed": share.seed,
            "block_rows": share.block_rows,
            "window_blocks": share.window_blocks,
            "order_version": share.version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: the next iteration has the rest of its epoch.

        Args:
          state: of ``state_dict``, of any process of a run with any number of them.

        Raises:
          MismatchError: it speaks of another order; names what differs.
        """
        expected = {"version": _STATE_VERSION, **self._identity}
        differences = [
            f"{name}: the state has {state.get(name)}, this loader {value}"
            for name, value in expected.items()
            if state.get(name) != value
        ]
        taken = state.get("rows_taken")
        if not isinstance(taken, int) or not 0 <= taken <= self.num_rows:
            differences.append(f"rows_taken: expected a number from 0 to {self.num_rows}, found {taken}")
        if differences:
            raise MismatchError(
                f"loader: the state is of another order of rows. {'; '.join(differences)}. Open the same cache and ask "
                "for the same rows, seed and blocks"
            )
        self.epoch, self._start, self._taken = int(state["epoch"]), int(state["rows_taken"]), int(state["rows_taken"])

    def __iter__(self) -> Any:
        """The rest of an epoch: all of it, but for what came before a state that was loaded.

        It begins with the first batch that is asked for.

        Yields:
          What ``collate`` makes of the rows of each step.

        Raises:
          ConfigError: another iteration of this loader has begun since.
        """
        if self._cuts is not None:
            self._cuts.close()
        start, self._start = self._start, 0
        self._taken = start
        self._blocks.begin(self.epoch, start)
        # Workers are started here, before there is any thread that a fork could catch at the wrong moment.
        if not self.persistent_workers:
            self._unpacker = Unpacker()
        source = Workers(super().__iter__(), self._unpacker) if self.num_workers else None
        cuts = self._cuts = ahead(self._begun(self._share.stages(self.epoch, start), source), _CUTS_AHEAD)
        try:
            while True:
                began = time.perf_counter()
                making, ends = next(cuts, (None, []))
                batches = making.result() if making else deque()
                self.waited_s += time.perf_counter() - began
                if not batches:
                    break
                for end in ends:
                    self._taken = end
                    yield batches.popleft()
                    if self._cuts is not cuts:
                        raise ConfigError(
                            "loader: expected one iteration at a time, found that another iteration of this loader has "
                            "begun; make a loader for each"
                        )
        finally:
            cuts.close()
            if self._cuts is cuts:
                self._cuts = None
        self.epoch, self._taken = self.epoch + 1, 0

    def _begun(
        self, stages: Iterator[Stage], source: Workers | None
    ) -> Generator[tuple[Future[deque[Any]], list[int]]]:
        """The batches of some steps as they are being made, and how many rows have been taken after each of them."""
        pool = PriorityPool(min(_THREADS, num_processors()), "tailcache-loader")
        waits = self.teacher.place.local is None
        readers = PriorityPool(_REMOTE_READ_THREADS, "tailcache-reader") if waits and not source else pool
        reading = source or Threads(self._blocks.read, readers.submit)
        choose_device = on_device()

        def made(cut: Cut) -> deque[Any]:
            choose_device()
            return self._made(cut)

        left = False
        num_steps = max(1, self._share.block_rows // self._share.batch_rows)
        try:
            for cut in walk(stages, reading.announce, reading.get, reading.keep_up, num_steps=num_steps):
                yield pool.submit(cut.begin, partial(made, cut)), cut.ends
        except GeneratorExit:
            left = True
            raise
        finally:  # after an error too, the batches that come before it are made
            reading.close()
            for each in {pool, readers}:
                each.close(cancel=left)

    def _made(self, cut: Cut) -> deque[Any]:
        batches = deque(self.collate(rows) for rows in cut.made(self.teacher.decode))
        return deque(map(_pinned, batches)) if self._pin else batches


def _as_it_is(item: Any) -> Any:
    return item


def _pinned(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: _pinned(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(map(_pinned, batch))
    return batch.pin_memory() if hasattr(batch, "pin_memory") else batch
