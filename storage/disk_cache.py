"""Copies of a remote cache's files on this machine, so that what was read once is read from the disk next time.

    TAILCACHE_DISK_CACHE         the folder (default: tailcache below $XDG_CACHE_HOME or ~/.cache)
    TAILCACHE_DISK_CACHE_BYTES   how much it may hold (default 10 GiB = 10737418240; 0: no copies are kept)

A copy is a whole file, named by the SHA-256 that a commit record or manifest gives for it (``Place.expect``), and its
bytes are held against that hash when it is fetched and again when a process first reads it. So a copy can be neither
stale nor wrong: a file that was replaced has another hash, a damaged copy is thrown away and fetched again, and where
what lies in the store is not what was committed, no copy is made and the reader sees what is there. Files without a
hash on record (manifests, commit records, claims, anything of a shard that is not committed) are never copied, and
neither are files of more than 64 MiB or a quarter of the space, of which only the ranges asked for are read.

Any number of processes share the folder, and the system's page cache with it. One fetches a file while the others wait
for it; to add one, a process locks the folder, deletes the copies that were not used for the longest time until there
is room, writes, and renames. A full or failing disk never fails a read: it goes to the store then.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError
from tailcache.storage.place import MAX_CHECKED, Claim, Place
from tailcache.storage.retry import number_from_environment
from tailcache.storage.sealed import canonical

__all__ = ["CachedPlace", "DiskCache", "disk_cache", "local_copy", "through_disk_cache"]

_LARGEST = 64 << 20
_TOUCH_SECONDS = 60.0  # uses closer together than this count as one
_OFF_SECONDS = 60.0  # how long a disk that failed, or a file that is not what was committed, is left alone
_FOLDER_SECONDS = 7 * 86_400.0  # folders may be in use by a path, so they are kept for some time after their last use
_HASH = re.compile("[0-9a-f]{64}")
_log = logging.getLogger(__name__)


def disk_cache() -> DiskCache | None:
    """The one that the environment describes; none where it is turned off.

    Raises:
      ConfigError: TAILCACHE_DISK_CACHE_BYTES is not a number.
    """
    limit = int(number_from_environment("TAILCACHE_DISK_CACHE_BYTES", 10 << 30))
    named = os.environ.get("TAILCACHE_DISK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return DiskCache(Path(named).expanduser() if named else Path(base) / "tailcache", limit) if limit else None


def through_disk_cache(place: Place) -> Place:
    """A place whose files are copied to the disk, unless that is turned off."""
    cache = disk_cache()
    return place if cache is None else CachedPlace(place, cache)


class DiskCache:
    """A folder of copies.

    Args:
      folder: it is made when something is to be kept.
      limit: bytes that the copies may take together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._checked: dict[str, tuple[int, int, int]] = {}
        self._off_until = 0.0
        self._refused: dict[str, float] = {}

    def holds(self, digest: str, size: int) -> bool:
        """Whether a file would be kept."""
        now = time.monotonic()
        small = size <= min(_LARGEST, self.limit // 4)
        return small and now >= self._off_until and now >= self._refused.get(digest, 0.0)

    def has(self, digest: str) -> bool:
        """There is a copy, whether or not it is damaged."""
        return self._path(digest).is_file()

    def open(self, digest: str, size: int | None, load: Callable[[], bytes]) -> int | None:
        """A descriptor of a checked copy; the caller closes it.

        Args:
          digest: SHA-256 of the file, in hexadecimal.
          size: its bytes, where they are known.
          load: fetches it.

        Returns:
          None where there can be no copy: the disk fails, or what is fetched has another hash.

        Raises:
          Whatever ``load`` raises.
        """
        try:
            found = self._open(digest, size)
            if found is not None:
                return found
            with self._lock(f"{digest[:2]}.lock"):  # one fetches, the others wait
                found = self._open(digest, size)
                if found is not None:
                    return found
                data = _fetch(load, digest, size)
                if data is None or not self.holds(digest, len(data)):
                    self._refused[digest] = time.monotonic() + _OFF_SECONDS
                    return None
                self._insert(digest, data)
                return self._open(digest, size)
        except _LoadError as error:
            raise error.cause from None
        except OSError as error:
            _log.warning("%s: no copies are kept for a while: %s", self.folder, error)
            self._off_until = time.monotonic() + _OFF_SECONDS
            return None

    def _path(self, digest: str) -> Path:
        return self.folder / "files" / digest[:2] / digest

    def _open(self, digest: str, size: int | None) -> int | None:
        """A copy that is there, checked if this process has not done so since it was last written."""
        path = self._path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            now = time.time()
            if now - status.st_atime > _TOUCH_SECONDS:
                with contextlib.suppress(OSError):
                    os.utime(path, ns=(int(now * 1e9), status.st_mtime_ns))
            state = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._checked.get(digest) == state:
                return descriptor
            if size in (None, status.st_size) and sha256(_read_all(descriptor, status.st_size)) == digest:
                self._checked[digest] = state
                return descriptor
            _log.warning("%s: damaged copy, fetching it again", path)
            path.unlink(missing_ok=True)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _insert(self, digest: str, data: bytes) -> None:
        path = self._path(digest)
        with self._lock("space.lock"):
            self._make_room(len(data))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{digest}.{uuid.uuid4().hex}.tmp")
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Delete what was not used for the longest time; called under the lock of the space."""
        ledger = self.folder / "bytes"
        try:
            used = int(ledger.read_text())
        except (FileNotFoundError, ValueError):
            used = self.limit + 1  # not known: count
        if used + size > self.limit:
            used = self._evict(max(0, int(0.9 * self.limit) - size))
        ledger.write_text(str(used + size))

    def _evict(self, target: int) -> int:
        """Delete copies until they take no more than some bytes; what they take then."""
        entries = []
        for path in (self.folder / "files").glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                entries.append((0.0 if path.suffix == ".tmp" else status.st_atime, status.st_size, path))
        now = time.time()
        for folder in (self.folder / "folders").glob("*"):
            with contextlib.suppress(OSError):
                if now - folder.stat().st_mtime > _FOLDER_SECONDS:
                    shutil.rmtree(folder)
                else:
                    target -= sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        used = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if used <= target:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used


class _LoadError(Exception):
    """Wraps what fetching raised, so that it is not taken for an error of the disk."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


def _fetch(load: Callable[[], bytes], digest: str, size: int | None) -> bytes | None:
    """What is fetched if it is what was committed; a second time if it is not at first."""
    for _ in range(2):
        try:
            data = load()
        except Exception as error:
            raise _LoadError(error) from error
        if size in (None, len(data)) and sha256(data) == digest:
            return data
    return None


def _read_all(descriptor: int, size: int) -> bytes:
    return os.pread(descriptor, size, 0)


class CachedPlace(Place):
    """A place of which files that are expected are read from copies.

    Args:
      place: where the files are.
      cache: where the copies are.
    """

    def __init__(
        self,
        place: Place,
        cache: DiskCache,
        known: dict[str, tuple[str, int | None]] | None = None,
        prefix: str = "",
    ) -> None:
        self._place, self._cache = place, cache
        self._known: dict[str, tuple[str, int | None]] = {} if known is None else known
        self._prefix = prefix

    def __str__(self) -> str:
        return str(self._place)

    def __repr__(self) -> str:
        return f"CachedPlace({self._place!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return through_disk_cache, (self._place,)

    def __truediv__(self, name: str) -> Place:
        return CachedPlace(self._place / name, self._cache, self._known, f"{self._prefix}{name}/")

    @property
    def local(self) -> Path | None:
        """None: this place is elsewhere."""
        return self._place.local

    @property
    def survives_fork(self) -> bool:
        """As the place itself."""
        return self._place.survives_fork

    def map(self, action: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Do something for several files, as the place does."""
        return self._place.map(action, items)

    def expect(self, name: str, sha256: str, size: int | None = None) -> None:
        """Read a file from a copy with this hash from now on."""
        if _HASH.fullmatch(sha256) and (size is None or size >= 0):
            self._known[self._prefix + name] = (sha256, size)

    def uncached(self) -> Place:
        """The place itself."""
        return self._place

    def _copy(self, name: str) -> tuple[int, int] | None:
        """Descriptor and size of a copy, if the file is expected and can be copied."""
        digest, size = self._known.get(self._prefix + name, ("", None))
        if not digest:
            return None
        if size is None and not self._cache.has(digest):
            size = self._place.size(name)
            if size is None:
                raise FileNotFoundError(2, "no such file", f"{self}/{name}")
            self._known[self._prefix + name] = (digest, size)
        if not self._cache.holds(digest, size or 0):
            return None
        descriptor = self._cache.open(digest, size, lambda: self._place.read(name))
        return None if descriptor is None else (descriptor, os.fstat(descriptor).st_size)

    def read_checked(self, name: str, expected: str | None, limit: int = MAX_CHECKED) -> bytes:
        """The whole content of a file whose hash is on record; from a copy, where it can be."""
        if expected is not None and _HASH.fullmatch(expected) and self._cache.holds(expected, 0):
            with contextlib.suppress(FileNotFoundError):
                descriptor = self._cache.open(expected, None, lambda: self._place.read_limited(name, limit))
                if descriptor is not None:
                    try:
                        size = os.fstat(descriptor).st_size
                        self.expect(name, expected, size)
                        return _read_all(descriptor, size)
                    finally:
                        os.close(descriptor)
        return self._place.read_checked(name, expected, limit)

    def read_limited(self, name: str, limit: int) -> bytes:
        """A whole file of at most some size."""
        return self._place.read_limited(name, limit)

    def read(self, name: str) -> bytes:
        """A whole file."""
        copy = self._copy(name)
        if copy is None:
            return self._place.read(name)
        try:
            return _read_all(*copy)
        finally:
            os.close(copy[0])

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """Some byte ranges of a file; of an expected one, all of it is fetched the first time."""
        copy = self._copy(name)
        if copy is None:
            return self._place.read_ranges(name, ranges)
        try:
            return [os.pread(copy[0], last - first, first) for first, last in ranges]
        finally:
            os.close(copy[0])

    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        """The last bytes of a file, and its size."""
        copy = self._copy(name)
        if copy is None:
            return self._place.read_end(name, count)
        try:
            return os.pread(copy[0], count, max(0, copy[1] - count)), copy[1]
        finally:
            os.close(copy[0])

    def size(self, name: str) -> int | None:
        """Bytes of a file; an expected one is fetched, for it is about to be read."""
        try:
            copy = self._copy(name)
        except FileNotFoundError:
            return None
        if copy is None:
            return self._place.size(name)
        os.close(copy[0])
        return copy[1]

    def _forget(self, name: str) -> None:
        self._known.pop(self._prefix + name, None)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file."""
        self._forget(name)
        self._place.write(name, data)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Write a file if there is none."""
        return self._place.create(name, data)

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Names and sizes of all files below a folder."""
        return self._place.files(below)

    def folders(self, below: str = "") -> list[str]:
        """Names of the folders directly in a folder."""
        return self._place.folders(below)

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._forget(name)
        self._place.delete(name)

    def delete_all(self, below: str = "") -> None:
        """Delete a folder with all it holds."""
        top = self._prefix + (f"{below}/" if below else "")
        for name in [name for name in self._known if name.startswith(top)]:
            self._known.pop(name, None)
        self._place.delete_all(below)

    def move(self, name: str, to: str) -> None:
        """Give a file another name."""
        self._forget(name)
        self._forget(to)
        self._place.move(name, to)

    def claim(self, name: str) -> Claim | None:
        """Take a claim."""
        return self._place.claim(name)


_temporary: dict[str, Path] = {}
_temporary_lock = threading.Lock()


def local_copy(place: Place, below: str, files: Mapping[str, str]) -> Path:
    """A folder on this machine with some files of a folder of a place: ``Place.local_copy``.

    The folder itself where the place is local; else one in the disk cache, or one that is deleted when this process
    ends.

    Raises:
      CorruptError: a file is missing or not what was written, or its name leads out of the folder.
    """
    for name in files:
        if not name or any(part in ("", ".", "..") for part in re.split(r"[/\\]", name)) or "\0" in name:
            raise CorruptError(f"{place}/{below}: expected names of files in this folder, found {name!r}")
    if place.local is not None:
        _fetch_all(place, below, files)
        return place.local / below
    key = sha256(canonical(dict(files)))
    cache = disk_cache()
    if cache is not None:
        folder = cache.folder / "folders" / key
        try:
            if _is_copy(folder, files):
                os.utime(folder)
                return folder
        except OSError as error:
            _log.warning("%s: cannot be read: %s", folder, error)
    contents = _fetch_all(place, below, files)
    if cache is not None:
        try:
            return _write_folder(folder, contents)
        except OSError as error:
            _log.warning("%s: no copy is kept: %s", folder, error)
    with _temporary_lock:
        if key not in _temporary:
            top = Path(tempfile.mkdtemp(prefix="tailcache-"))
            atexit.register(shutil.rmtree, top, ignore_errors=True)
            _temporary[key] = _write_folder(top / "files", contents)
        return _temporary[key]


def _fetch_all(place: Place, below: str, files: Mapping[str, str]) -> dict[str, bytes]:
    contents = {}
    for name, digest in files.items():
        path = f"{below}/{name}" if below else name
        try:
            contents[name] = place.read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptError(f"{place}/{path}: missing; restore it from a copy") from None
        if sha256(contents[name]) != digest:
            raise CorruptError(f"{place}/{path}: not what was written; restore it from a copy")
    return contents


def _is_copy(folder: Path, files: Mapping[str, str]) -> bool:
    if not folder.is_dir():
        return False
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    return found == set(files) and all(sha256((folder / name).read_bytes()) == files[name] for name in files)


def _write_folder(folder: Path, contents: Mapping[str, bytes]) -> Path:
    """Make a folder as a whole, in place of a damaged one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        for name, data in contents.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(data)
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(folder)
        except OSError:
            if _is_copy(folder, {name: sha256(data) for name, data in contents.items()}):
                return folder  # another process was first
            folder.rename(temporary.with_suffix(".old"))
            shutil.rmtree(temporary.with_suffix(".old"), ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
