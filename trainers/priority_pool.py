"""Threads that take up the most urgent work first."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["PriorityPool"]

Result = TypeVar("Result")


class PriorityPool:
    """Like ``ThreadPoolExecutor``, but for the order in which work is taken up.

    Args:
      num_threads: how many work at a time.
      name: of the threads.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, name)
        self._due: queue.PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]] = queue.PriorityQueue()
        self._count = itertools.count()

    def submit(self, rank: float, work: Callable[[], Result]) -> Future[Result]:
        """Have something done: of what is due, the lowest rank first, and of one rank what was submitted first."""
        future: Future[Result] = Future()
        self._due.put((rank, next(self._count), future, work))
        self._pool.submit(self._next)
        return future

    def _next(self) -> None:
        _, _, future, work = self._due.get_nowait()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    def close(self, *, cancel: bool) -> None:
        """Take nothing more; wait for what has been begun, and for what is due unless that is to be given up.

        Args:
          cancel: give up what is due.
        """
        self._pool.shutdown(wait=True, cancel_futures=cancel)
        while not self._due.empty():
            self._due.get_nowait()[2].cancel()
