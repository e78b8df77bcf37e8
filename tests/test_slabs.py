"""Memory is used again only when nothing looks at it any more, and never by two processes."""

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tailcache.storage import slabs
from tailcache.storage.slabs import empty

SHAPE = (1000, 100)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gc.collect()
    slabs._kept.clear()
    slabs._num_kept[0] = 0
    yield
    slabs._kept.clear()
    slabs._num_kept[0] = 0


def address(values: NDArray[Any]) -> int:
    return int(values.__array_interface__["data"][0])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (70_000,), SHAPE, (0, 5)])
def test_an_array_is_an_ordinary_one(shape: tuple[int, ...], order: str) -> None:
    values = empty(shape, np.float32, order)  # type: ignore[arg-type]
    assert type(values) is np.ndarray
    assert values.shape == shape
    assert values.dtype == np.float32
    assert values.flags.writeable
    assert values.flags.c_contiguous if order == "C" else values.flags.f_contiguous
    values[...] = 1
    assert (values == 1).all()


def test_memory_is_used_again_after_the_last_view() -> None:
    values = empty(SHAPE, np.float32)
    where = address(values)
    views: list[Any] = [values[10:20], values.T, torch.from_numpy(values), values.data, values.view(np.uint8)]
    del values
    while views:
        other = empty(SHAPE, np.float32)
        assert address(other) != where
        del other
        slabs._kept.clear()
        views.pop()
    assert address(empty((SHAPE[0] * SHAPE[1],), np.int32)) == where


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_LIMIT", 1 << 20)
    held = [empty(SHAPE, np.float32) for _ in range(10)]
    held.clear()
    assert slabs._num_kept[0] <= 1 << 20
    assert sum(size * len(each) for size, each in slabs._kept.items()) == slabs._num_kept[0] > 0


def test_sizes_that_are_no_more_asked_for_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what was read once would keep the memory that is read into all the time from being kept."""
    monkeypatch.setattr(slabs, "_LIMIT", 1 << 20)
    once = [empty((100_000 + 20_000 * i,), np.uint8) for i in range(8)]
    once.clear()
    several = [empty(SHAPE, np.float32) for _ in range(2)]
    several.clear()
    assert sum(len(each) for size, each in slabs._kept.items() if size >= 400_000) == 2
    assert sum(size * len(each) for size, each in slabs._kept.items()) == slabs._num_kept[0] <= 1 << 20


def test_threads_never_share() -> None:
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            values = empty(SHAPE, np.int32)
            values[...] = number
            if not (values == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_processes_never_share() -> None:
    """A fork and its parent both take what the parent had kept."""
    values = empty(SHAPE, np.int32)
    where = address(values)
    del values
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        mine = empty(SHAPE, np.int32)
        mine[...] = 7
        os.write(write, b"x" if address(mine) == where else b"y")
        os._exit(0)
    mine = empty(SHAPE, np.int32)
    mine[...] = 1
    assert os.read(read, 1) == b"x"
    os.waitpid(child, 0)
    assert (mine == 1).all()
    os.close(read)
    os.close(write)
