"""Large arrays in memory that was used before.

Memory that is new to a process costs more to touch for the first time than what reading and decoding then does with it,
and the C library gives large blocks back to the system as soon as they are free. Reading asks for the same few sizes
over and over, so what an array no longer needs is kept here for the next one of its size.

An array from here is an ordinary one: its memory is kept again when it, and all views of it, are gone.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["SMALLEST", "empty", "scratch"]

SMALLEST = 1 << 16
"""Bytes; the C library keeps smaller ones itself."""
_LIMIT = 256 << 20  # bytes that are kept
_PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""By default a process and its forks would write into the same memory."""
_kept: dict[int, list[mmap.mmap]] = {}
_num_kept = [0]
_asked: dict[int, None] = {}
"""Sizes, the one that was asked for last at the end."""
_scratch = threading.local()


class _Lease(np.ndarray[Any, Any]):
    """Stands between an array and its memory and dies with the last view: NumPy does not look through another type."""

    __slots__ = ("memory",)
    memory: mmap.mmap

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            _keep(self.memory)


def empty(shape: tuple[int, ...], dtype: DTypeLike, order: Literal["C", "F"] = "C") -> NDArray[Any]:
    """Like ``numpy.empty``; for any number of threads."""
    kind = np.dtype(dtype)
    size = kind.itemsize
    for length in shape:
        size *= length
    if size < SMALLEST:
        return np.empty(shape, kind, order)
    step = 1 << (size.bit_length() - 4)  # sizes in steps of an eighth, so that they recur
    rounded = -(-size // step) * step
    _asked.pop(rounded, None)
    _asked[rounded] = None
    memory = _taken(rounded) or mmap.mmap(-1, rounded, **_PRIVATE)
    lease = _Lease((size,), np.uint8, memory)
    lease.memory = memory
    return np.ndarray(shape, kind, lease, order=order)


def scratch(name: str, size: int) -> NDArray[np.uint8]:
    """At least so many bytes of this thread's, with anything in them; its next call with this name uses them again."""
    held: NDArray[np.uint8] | None = getattr(_scratch, name, None)
    if held is None or len(held) < size:
        held = np.empty(size, np.uint8)
        setattr(_scratch, name, held)
    return held


def _taken(size: int) -> mmap.mmap | None:
    """Memory of this size that is kept, and is so no more."""
    try:
        memory = _kept.get(size, []).pop()
    except IndexError:
        return None
    _num_kept[0] -= size
    return memory


def _keep(memory: mmap.mmap) -> None:
    """Keep memory that is free, rather than that of sizes nobody has asked for longer."""
    size = len(memory)
    # No lock, which a fork could leave locked; to be off by a few is no harm.
    if _num_kept[0] + size > _LIMIT:
        for other in list(_asked):
            while other != size and _num_kept[0] + size > _LIMIT and _taken(other):
                pass
    if _num_kept[0] + size <= _LIMIT:
        _num_kept[0] += size
        _kept.setdefault(size, []).append(memory)
