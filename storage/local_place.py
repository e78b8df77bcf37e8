"""A place that is a folder on this machine. Writing is durable: see ``durable``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from tailcache.storage import durable
from tailcache.storage.errors import CorruptError, StorageError
from tailcache.storage.place import Claim, Place
from tailcache.storage.ranges import cut_range, merge_ranges
from tailcache.storage.slabs import empty

__all__ = ["READING", "LocalPlace"]

READING = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""How a file is opened for reading; what is no file does not keep whoever opens it waiting."""


class LocalPlace(Place):
    """A folder.

    Args:
      folder: it need not exist; it is made when something is written.
    """

    def __init__(self, folder: Path, _root: Path | None = None) -> None:
        self._folder, self._root = folder, _root or folder

    def __str__(self) -> str:
        return str(self._folder)

    def __repr__(self) -> str:
        return f"LocalPlace({str(self._folder)!r})"

    def __truediv__(self, name: str) -> Place:
        return LocalPlace(self._folder / name, self._root)

    @property
    def local(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def direct(self) -> Path:
        """The folder."""
        return self._folder

    def _reading(self, name: str) -> AbstractContextManager[None]:
        return durable.named(f"{self._folder}/{name}", "reading", may_miss=True)

    def _opened(self, name: str) -> int:
        """A descriptor for reading, to be closed; only of a file: a pipe would never end, nor would a device."""
        path = f"{self._folder}/{name}"
        descriptor = os.open(path, READING)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise CorruptError(f"{path}: expected a file, found a folder, device or pipe; restore it from a copy")

    def _own(self, name: str) -> Path:
        """A path that is to be written or deleted; it has to lie in this folder by itself, not by way of a link.

        Raises:
          CorruptError: a folder above it, or itself, is a symbolic link: what it points to is no part of the cache.
        """
        path = self._folder / name
        here = self._root
        for part in path.relative_to(self._root).parts:
            here = here / part
            if here.is_symlink():
                raise CorruptError(
                    f"{here}: expected a file or folder of a cache, found a symbolic link, which nothing is written "
                    "through; put what it points to in its place"
                )
        return path

    def read(self, name: str) -> bytes:
        """A whole file."""
        with self._reading(name), open(self._opened(name), "rb") as file:
            return file.read()

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """Some byte ranges of a file: one call for what lies together."""
        merged = merge_ranges(ranges, 0, sys.maxsize)
        pieces = []
        with self._reading(name):
            descriptor = self._opened(name)
            try:
                for first, last in merged:
                    memory = memoryview(empty((last - first,), np.uint8).data)
                    pieces.append(memory[: os.preadv(descriptor, [memory], first)])
            finally:
                os.close(descriptor)
        return [cut_range(merged, pieces, first, last) for first, last in ranges]

    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        """The last bytes of a file, and its size."""
        with self._reading(name), open(self._opened(name), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), count, max(0, size - count)), size

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        path = self._folder / name
        try:
            with durable.named(path, "looking at", may_miss=True):
                return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file whole and durably."""
        path = self._own(name)
        durable.make_folder(path.parent)
        durable.write_file(path, data)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Write a file if there is none: linked into place, which fails where the name is taken."""
        path = self._own(name)
        durable.make_folder(path.parent)
        return durable.create_file(path, data)

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Names and sizes of all files below a folder; also of links, which a cache never has."""
        top = self._folder / below
        found = []
        with durable.named(top, "listing"):
            for folder, folders, names in os.walk(top, onerror=_unless_gone):
                links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
                found += [Path(folder, name) for name in (*names, *links)]
        for path in sorted(found):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                yield path.relative_to(self._folder).as_posix(), path.lstat().st_size

    def folders(self, below: str = "") -> list[str]:
        """Names of the folders directly in a folder."""
        top = self._folder / below
        return sorted(p.name for p in top.iterdir() if p.is_dir()) if top.is_dir() else []

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._own(str(Path(name).parent))
        durable.remove_tree(self._folder / name)

    def delete_all(self, below: str = "") -> None:
        """Delete a folder with all it holds."""
        self._own(str(Path(below).parent))
        durable.remove_tree(self._folder / below if below else self._folder)

    def move(self, name: str, to: str) -> None:
        """Rename a file, durably."""
        source, target = self._own(name), self._own(to)
        durable.make_folder(target.parent)
        durable.move_file(source, target)

    def claim(self, name: str) -> Claim | None:
        """Lock a file of that name; the system takes the lock back when the process dies."""
        path = self._own(name)
        while True:
            durable.make_folder(path.parent)
            try:
                with durable.named(path, "opening", may_miss=True):
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # its folder was deleted just now
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path))
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:  # deleted between the two looks
                same = False
            except OSError as error:
                os.close(descriptor)
                raise StorageError(error.errno, f"{path}: the file system has no locks: {error.strerror}") from error
            if same:
                return _Lock(path, descriptor)
            os.close(descriptor)  # whoever had it deleted the file on releasing it: lock the new one


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # deleted meanwhile
        raise error


class _Lock:
    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Delete the file, then unlock it, so that nobody can hold a lock on a file that is gone."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1
