"""Break a storage operation on purpose: kill it before, during or after its n-th change of the disk, or fill the disk.

Everything storage writes goes through ``tailcache.storage.durable``; these context managers wrap that module.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tailcache.storage import durable

MODES = ("before", "half", "after")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it and go on."""


class Counter:
    """How many operations were seen."""

    def __init__(self) -> None:
        self.count = 0
        self.names: list[str] = []


def _half(name: str, arguments: tuple[Any, ...]) -> None:
    """What a process that is killed in the middle of an operation leaves."""
    if name == "write_file":
        path, data = Path(arguments[0]), bytes(arguments[1])
        path.with_name(path.name + durable.TEMPORARY).write_bytes(data[: len(data) // 2])
    elif name == "create_file":
        path, data = Path(arguments[0]), bytes(arguments[1])
        path.with_name(f"{path.name}.123-456{durable.TEMPORARY}").write_bytes(data[: len(data) // 2])
    elif name == "remove_tree":
        path = Path(arguments[0])
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        for file in files[: len(files) // 2]:
            file.unlink()


@contextlib.contextmanager
def killed_at(number: int, mode: str) -> Iterator[Counter]:
    """Raise ``Killed`` at the operation of that number (from 0): before it, half-way or after it; -1 only counts."""
    counter = Counter()
    originals: dict[str, Callable[..., Any]] = {
        name: getattr(durable, name)
        for name in ("write_file", "create_file", "promote_folder", "remove_tree", "make_folder")
    }

    def wrap(name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            this = counter.count
            counter.count += 1
            counter.names.append(f"{name} {arguments[0]}")
            if this == number and mode != "after":
                if mode == "half":
                    _half(name, arguments)
                raise Killed
            result = originals[name](*arguments)
            if this == number:
                raise Killed
            return result

        return wrapped

    try:
        for name in originals:
            setattr(durable, name, wrap(name))
        yield counter
    finally:
        for name, original in originals.items():
            setattr(durable, name, original)


@contextlib.contextmanager
def failing_at(number: int, code: int = errno.ENOSPC) -> Iterator[Counter]:
    """Let the system call of that number (fsync, replace, rename, link, mkdir; from 0) fail; -1 only counts."""
    counter = Counter()
    originals: dict[str, Callable[..., Any]] = {
        name: getattr(os, name) for name in ("fsync", "replace", "rename", "link", "mkdir")
    }

    def wrap(name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            this = counter.count
            counter.count += 1
            if this == number:
                raise OSError(code, os.strerror(code))
            return originals[name](*arguments, **keywords)

        return wrapped

    try:
        for name in originals:
            setattr(os, name, wrap(name))
        yield counter
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    """Flip bits of one byte of a file, in place."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(bytes(data))


def swap(one: Path, other: Path) -> None:
    """Exchange the contents of two files."""
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
