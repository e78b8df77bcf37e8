"""A thread that writes shards while the teacher computes the next ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.targets import Targets, TargetsWriter

__all__ = ["WriterThread"]

_WAITING_SHARDS = 2


class WriterThread:
    """Writes and commits shards in the background; its failure surfaces at the next call.

    Args:
      writer: what it writes with.
      committed: called in that thread after each shard.
    """

    def __init__(self, writer: TargetsWriter, committed: Callable[[], None]) -> None:
        self._writer, self._committed = writer, committed
        self._queue: queue.Queue[tuple[int, Targets, NDArray[np.float64]] | None] = queue.Queue(_WAITING_SHARDS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tailcache-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._writer.write_shard(*item)
                    self._committed()
                except BaseException as error:
                    self._error = error

    def put(self, shard: int, targets: Targets, tail_sum: NDArray[np.float64]) -> None:
        """Hand over a shard; waits while two are waiting."""
        self.check()
        self._queue.put((shard, targets, tail_sum))

    def check(self) -> None:
        """Raise what went wrong there, if anything did."""
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Let the queue drain; does not raise, so that it can be called while another error is on its way."""
        self._queue.put(None)
        self._thread.join()
