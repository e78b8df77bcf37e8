"""Where a cache lies: a folder, or a prefix of an object store. All of storage reads and writes through this.

A place holds files under relative names with "/" between their parts. A file is written whole: it is either there with
all its bytes, durably, or not there. What differs between a local disk and an object store (renaming, folders, locks,
retries) is behind this interface; nothing else may ask where a cache lies.

``open_place`` knows what kind of place a location means.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError

__all__ = ["MAX_CHECKED", "Claim", "Location", "Place", "open_place"]

MAX_CHECKED = 1 << 30
"""Bytes of a file that is read as a whole, where nothing smaller is known."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Location = str | Path
"""How a user names a place: a path, or a URL such as s3://bucket/folder."""


class Claim(Protocol):
    """The right to do some piece of work, which no other process has while this one is alive and has it."""

    def release(self) -> None:
        """Let others have it; fine if called twice."""


class Place(ABC):
    """A folder or a prefix.

    Errors of every method: ``FileNotFoundError`` where a file that is to be read is not there, ``StorageError`` where
    the disk or the store fails (after retries, where they can help).
    """

    @abstractmethod
    def __str__(self) -> str:
        """The path or URL, for messages."""

    @abstractmethod
    def __truediv__(self, name: str) -> Place:
        """The place below this one."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file."""

    @abstractmethod
    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """Some byte ranges (first, one past the last) of a file, in the order asked for; cut where the file ends."""

    @abstractmethod
    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        """The last bytes of a file (all of it where it is shorter), and its size."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; none where it is not there."""

    def exists(self, name: str) -> bool:
        """A file of this name is there."""
        return self.size(name) is not None

    @abstractmethod
    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file, or replace it, whole and durably; the folders above it are made."""

    @abstractmethod
    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Write a file whole and durably if there is none of that name; say whether it was written."""

    @abstractmethod
    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Names (relative to this place) and sizes of all files below a folder, sorted. Lists: not for opening."""

    @abstractmethod
    def folders(self, below: str = "") -> list[str]:
        """Names of the folders directly in a folder, sorted."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file; fine if it is not there."""

    @abstractmethod
    def delete_all(self, below: str = "") -> None:
        """Delete a folder with all it holds; fine if it is not there."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give a file another name within this place, replacing what is there."""

    @abstractmethod
    def claim(self, name: str) -> Claim | None:
        """Take a claim, or none where another process (or another holder in this one) has it.

        It ends with ``release``, and by itself when the process dies: at once on a local disk, after a lease in a
        store.
        """

    @property
    def local(self) -> Path | None:
        """The folder, where this place is one on this machine."""
        return None

    @property
    def direct(self) -> Path | None:
        """The folder, where its files can be read past this place, which neither counts, delays nor copies anything."""
        return None

    @property
    def survives_fork(self) -> bool:
        """A process that is forked after this place was used can go on using it; else workers must be spawned."""
        return True

    def map(self, action: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """Do something for several files: at once where the time goes into waiting for answers, else one by one."""
        return [action(item) for item in items]

    def expect(self, name: str, sha256: str, size: int | None = None) -> None:  # noqa: B027  a place without copies needs none of it
        """Say what a file holds, from a record that can be trusted.

        From then on, reads of it may be served from a copy on this machine that has this hash, and not from the place
        at all. For files that do not change once they are there; never before they are committed.

        Args:
          name: the file.
          sha256: its hash, in hexadecimal.
          size: its bytes, where that is on record too.
        """

    def uncached(self) -> Place:
        """The place itself where this one may serve copies (see ``expect``): to find out what really lies there."""
        return self

    def local_copy(self, below: str, files: Mapping[str, str]) -> Path:
        """A folder on this machine with some files of a folder, each as its hash on record says.

        Args:
          below: the folder they are in, which is also what their names are relative to.
          files: SHA-256, in hexadecimal, of each name.

        Raises:
          CorruptError: a file is missing or not what was written.
        """
        from tailcache.storage.disk_cache import local_copy

        return local_copy(self, below, files)

    def read_checked(self, name: str, expected: str | None, limit: int = MAX_CHECKED) -> bytes:
        """The whole content of a file whose hash is on record, and whose size is at most ``limit``.

        Raises:
          CorruptError: the file is missing, or not what was written.
        """
        try:
            data = self.read_limited(name, limit)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            data = None
        if data is None or sha256(data) != expected:
            raise CorruptError(f"{self}/{name}: missing or not what was written; restore it from a copy")
        return data

    def read_limited(self, name: str, limit: int) -> bytes:
        """A whole file of at most some size.

        Raises:
          CorruptError: it is larger, so it cannot be what it is taken for.
        """
        size = self.size(name)
        if size is not None and size > limit:
            raise CorruptError(f"{self}/{name}: expected at most {limit} bytes, found {size}; restore it from a copy")
        return self.read(name)


def open_place(location: Location | Place) -> Place:
    """The place that a location means; nothing has to be there yet.

    Args:
      location: a path, ``file://``, ``s3://``, ``gs://``, ``az://``, ``hf://`` or another URL that fsspec knows.

    Raises:
      ConfigError: a URL of an unknown kind, or one whose package is not installed.
    """
    if isinstance(location, Place):
        return location
    text = os.fspath(location)
    if isinstance(location, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) and not text.startswith("file://"):
        from tailcache.storage.remote_place import open_remote

        return open_remote(text)
    from tailcache.storage.local_place import LocalPlace

    return LocalPlace(Path(text.removeprefix("file://")).expanduser())
