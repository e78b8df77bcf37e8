"""Threads that take up the most urgent work first: the order, errors, and what becomes of work that is given up."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from functools import partial

import pytest

from tailcache.trainers.priority_pool import PriorityPool


@pytest.fixture
def held() -> threading.Event:
    """Set to let the only thread of ``busy`` go on."""
    return threading.Event()


@pytest.fixture
def busy(held: threading.Event) -> PriorityPool:
    """A pool of one thread, which waits."""
    pool, begun = PriorityPool(1, "test"), threading.Event()

    def wait() -> None:
        begun.set()
        assert held.wait(60)

    pool.submit(9, wait)
    assert begun.wait(60)
    return pool


def test_the_lowest_rank_comes_first_and_then_what_was_submitted_first(
    busy: PriorityPool, held: threading.Event
) -> None:
    done: list[str] = []
    for rank, name in [(1, "a"), (1, "b"), (0, "c"), (2, "d"), (0, "e")]:
        busy.submit(rank, partial(done.append, name))
    held.set()
    busy.close(cancel=False)
    assert done == ["c", "e", "a", "b", "d"]


def test_what_is_given_up_is_never_done_and_whoever_waits_is_told(busy: PriorityPool, held: threading.Event) -> None:
    done: list[str] = []
    futures = [busy.submit(0, partial(done.append, name)) for name in "abc"]
    threading.Timer(0.1, held.set).start()
    busy.close(cancel=True)
    assert done == []
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=60)


def test_one_that_was_cancelled_is_left_out(busy: PriorityPool, held: threading.Event) -> None:
    done: list[str] = []
    first, _ = (busy.submit(0, partial(done.append, name)) for name in "ab")
    assert first.cancel()
    held.set()
    busy.close(cancel=False)
    assert done == ["b"]


def test_an_error_comes_to_whoever_asks_for_the_result() -> None:
    pool = PriorityPool(2, "test")

    def fail() -> int:
        raise ValueError("here")

    failed, right = pool.submit(0, fail), pool.submit(0, lambda: 7)
    with pytest.raises(ValueError, match="here"):
        failed.result(timeout=60)
    assert right.result(timeout=60) == 7
    pool.close(cancel=False)
    with pytest.raises(RuntimeError):
        pool.submit(0, fail)
