"""A place on a file system that fsspec knows: ``hf://`` (a repository of the Hugging Face hub), ``memory://``, others.

What fsspec's file systems have in common is less than what an object store gives, so a few promises are weaker here:

- **Whole files.** ``hf://`` (a write is a commit) and ``memory://`` show a file whole or not at all. On the others a
  file is written under a name that ends in ".tmp" and renamed, which is as atomic as that file system's renaming.
- **Creating** looks first and writes then, so that two processes that create one file in the same moment may both
  believe that they did. Commits have the same bytes whoever writes them, so that does no harm to a cache.
- **Claims** are files with the time in them, by the clocks of the machines, which must agree within a few seconds.

Capturing on the hub directly is possible, but makes a commit for every file; capturing elsewhere and copying is
quicker.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tailcache.storage import lease
from tailcache.storage.errors import ConfigError, TailcacheError
from tailcache.storage.place import Claim, Place
from tailcache.storage.ranges import cut_range, merge_ranges
from tailcache.storage.retry import Failure, Patience, number_from_environment

__all__ = ["FileSystemPlace", "open_file_system"]

_T = TypeVar("_T")
_GAP = 256 << 10
_LARGEST = 64 << 20
_WRITES_WHOLE = {"hf", "memory"}
_HUB_LEASE_SECONDS = 900.0  # every renewal is a commit
_PASSING_STATUS = {408, 409, 425, 429}
_creating = threading.Lock()


def open_file_system(kind: str, path: str) -> FileSystemPlace:
    """A place on a file system of fsspec; nothing is asked of it yet.

    Args:
      kind: the protocol, as in "hf".
      path: what follows "://".

    Raises:
      ConfigError: fsspec, or the package it needs for this protocol, is not installed, or it knows no such protocol.
    """
    url = f"{kind}://{path}"
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(
            f"{url}: expected the package fsspec, found that it is not installed; install it with "
            "pip install 'tailcache[remote]'"
        ) from error
    try:
        system, root = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(
            f"{url}: fsspec cannot open {kind}:// yet: {error}; install it with pip install 'tailcache[remote]', "
            "or the package that this message names"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{url}: expected a path, s3://, gs://, az://, hf:// or another URL that fsspec knows, found {kind}:// "
            f"({error})"
        ) from error
    except Exception as error:  # whatever a file system does not like about its settings
        raise ConfigError(f"{url}: cannot be opened: {type(error).__name__}: {error}") from error
    patience = Patience(seconds=number_from_environment("TAILCACHE_RETRY_SECONDS", 120))
    return FileSystemPlace(system, kind, root.rstrip("/"), patience)


class FileSystemPlace(Place):
    """A folder of a file system.

    Args:
      system: fsspec's file system.
      kind: its protocol.
      root: the folder, as the file system writes it, without "/" at its end.
      patience: how long something is tried again.
    """

    def __init__(self, system: Any, kind: str, root: str, patience: Patience) -> None:
        self._system, self._kind, self._root, self._patience = system, kind, root, patience

    def __str__(self) -> str:
        return f"{self._kind}://{self._root}"

    def __repr__(self) -> str:
        return f"FileSystemPlace({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return open_file_system, (self._kind, self._root)

    def __truediv__(self, name: str) -> Place:
        return FileSystemPlace(self._system, self._kind, self._path(name), self._patience)

    @property
    def survives_fork(self) -> bool:
        """Many keep connections or threads: none is relied on."""
        return self._kind == "memory"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/") if name else self._root

    def _url(self, name: str) -> str:
        return f"{self}/{name}" if name else str(self)

    def _attempt(self, action: Callable[[], _T], name: str, doing: str) -> _T:
        return self._patience.attempt(
            lambda _: action(), url=self._url(name), doing=doing, judge=lambda error: _judge(error, self._patience)
        )

    def _info(self, name: str) -> dict[str, Any]:
        """What the file system says of a file or folder now, not what it remembers."""
        path = self._path(name)
        self._system.invalidate_cache()
        info: dict[str, Any] = self._system.info(path)
        return info

    def _size(self, name: str) -> int:
        info = self._info(name)
        if info.get("type") == "directory" or info.get("size") is None:
            raise FileNotFoundError(self._url(name))
        return int(info["size"])

    def read(self, name: str) -> bytes:
        """A whole file: its size, then all of it in one request."""

        def read() -> bytes:
            size = self._size(name)
            data = bytes(self._system.cat_file(self._path(name)))
            if len(data) != size:
                raise _Short(f"expected {size} bytes, found {len(data)}")
            return data

        return self._attempt(read, name, "reading")

    def _read_merged(self, name: str, size: int, merged: list[tuple[int, int]]) -> list[bytes]:
        pieces = []
        for first, last in merged:
            end = min(last, size)
            data = bytes(self._system.cat_file(self._path(name), start=first, end=end)) if end > first else b""
            if len(data) != max(0, end - first):
                raise _Short(f"expected the {end - first} bytes {first} to {end} of {size}, found {len(data)}")
            pieces.append(data)
        return pieces

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some byte ranges of a file: one request where they are less than 256 KiB apart, one after another."""
        merged = merge_ranges(ranges, _GAP, _LARGEST)
        pieces = self._attempt(lambda: self._read_merged(name, self._size(name), merged), name, "reading")
        return [cut_range(merged, pieces, first, last) for first, last in ranges]

    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        """The last bytes of a file, and its size."""

        def read() -> tuple[bytes, int]:
            size = self._size(name)
            return self._read_merged(name, size, [(max(0, size - max(0, count)), size)])[0], size

        return self._attempt(read, name, "reading")

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        try:
            return self._attempt(lambda: self._size(name), name, "looking at it")
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file; see the module for how whole it is at any time."""
        self._attempt(lambda: self._put(name, bytes(data)), name, "writing")

    def _put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if self._kind in _WRITES_WHOLE:
            self._system.pipe_file(path, data)
        else:
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(path + ".tmp", data)
            self._system.mv(path + ".tmp", path)
        self._system.invalidate_cache()

    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Write a file if there is none; see the module for what two that try at once may see."""
        body = bytes(data)
        before: list[bool] = []

        def create() -> bool:
            try:
                there = self._size(name)
            except FileNotFoundError:
                there = None
            if there is not None:  # by an earlier attempt whose answer was lost?
                return bool(before) and self._system.cat_file(self._path(name)) == body
            before.append(True)
            self._put(name, body)
            return True

        with _creating:  # memory:// is shared by the threads of a process, and by nobody else
            return self._attempt(create, name, "writing")

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Names and sizes of all files below a folder."""

        def find() -> dict[str, Any]:
            self._system.invalidate_cache()
            try:
                found: dict[str, Any] = self._system.find(self._path(below), detail=True)
            except FileNotFoundError:
                return {}
            return found

        start = len(self._root) + 1
        infos = self._attempt(find, below, "listing")
        names = [(path[start:], int(info["size"])) for path, info in infos.items() if info.get("type") == "file"]
        top = f"{below}/" if below else ""
        yield from sorted((n for n in names if n[0].startswith(top)), key=lambda item: item[0].split("/"))

    def folders(self, below: str = "") -> list[str]:
        """Names of the folders directly in a folder."""

        def listing() -> list[dict[str, Any]]:
            self._system.invalidate_cache()
            try:
                found: list[dict[str, Any]] = self._system.ls(self._path(below), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return found

        found = self._attempt(listing, below, "listing")
        return sorted(e["name"].rstrip("/").rpartition("/")[2] for e in found if e.get("type") == "directory")

    def delete(self, name: str) -> None:
        """Delete a file."""

        def delete() -> None:
            try:
                self._system.rm(self._path(name))
            except FileNotFoundError:
                return
            finally:
                self._system.invalidate_cache()

        self._attempt(delete, name, "deleting")

    def delete_all(self, below: str = "") -> None:
        """Delete a folder with all it holds."""

        def delete() -> None:
            try:
                self._system.rm(self._path(below), recursive=True)
            except FileNotFoundError:
                return
            finally:
                self._system.invalidate_cache()

        self._attempt(delete, below, "deleting")

    def move(self, name: str, to: str) -> None:
        """Give a file another name, replacing what is there: a copy, then a deletion, on most of these systems."""

        def move() -> None:
            self._size(name)
            if self._kind not in _WRITES_WHOLE:
                self._system.makedirs(self._path(to).rpartition("/")[0], exist_ok=True)
            self._system.mv(self._path(name), self._path(to))
            self._system.invalidate_cache()

        self._attempt(move, name, "renaming")

    def claim(self, name: str) -> Claim | None:
        """Take a lease: see ``lease``, and the module for what is weaker here."""
        at_least = _HUB_LEASE_SECONDS if self._kind == "hf" else 0.0
        return lease.take(_LeaseFile(self, name), self._url(name), at_least=at_least)


class _Short(Exception):
    """Fewer or more bytes than the file system says there are."""


def _judge(error: Exception, patience: Patience) -> Failure | None:
    """What an exception of a file system means; none for those of this package."""
    if isinstance(error, TailcacheError | NotImplementedError | TypeError | AttributeError | AssertionError):
        return None
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Failure(kind="missing", text=text, remedy="")
    if isinstance(error, PermissionError) or status in (401, 403):
        remedy = "check the credentials (HF_TOKEN for the Hugging Face hub) and what they allow"
        return Failure(kind="permanent", text=text, remedy=remedy)
    if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS:
        return Failure(kind="permanent", text=text, remedy="check the URL and the settings of its file system")
    network = type(error).__module__.startswith(("httpx", "httpcore", "aiohttp", "requests", "urllib3"))
    if isinstance(status, int) or network or isinstance(error, _Short | OSError | EOFError):
        return Failure(
            kind="transient",
            text=text,
            remedy="check the network and the store, then run the same command again; what is committed stays good "
            f"(TAILCACHE_RETRY_SECONDS, now {patience.seconds:g}, is how long is tried)",
        )
    return Failure(kind="permanent", text=text, remedy="check the URL and the settings of its file system")


class _LeaseFile:
    """A lease with the time in it; its content is its version."""

    def __init__(self, place: FileSystemPlace, name: str) -> None:
        self._place, self._name = place, name

    def create(self, data: bytes) -> Any | None:
        return data if self._place.create(self._name, data) else None

    def replace(self, data: bytes, version: Any) -> Any | None:
        try:
            if self._place.read(self._name) != version:
                return None
        except FileNotFoundError:
            return None
        self._place.write(self._name, data)
        return data

    def look(self) -> lease.Look | None:
        try:
            data = self._place.read(self._name)
        except FileNotFoundError:
            return None
        try:
            written = float(json.loads(data)["time"])
        except (ValueError, TypeError, LookupError, RecursionError):
            written = 0.0
        return lease.Look(data=data, version=data, age=time.time() - written)

    def delete(self) -> None:
        self._place.delete(self._name)
