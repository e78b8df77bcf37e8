"""A place that is a prefix of an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure.

Writing is one PUT, or an upload in parts that becomes visible as a whole at its end; a reader never sees part of a
file. S3 checks a SHA-256 of what arrives. A file is read in pieces of one version: where another one takes its place
meanwhile, reading begins again. How requests fail and are retried is in ``bucket``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tailcache.storage import lease
from tailcache.storage.bucket import PIECE, Bucket, version_of
from tailcache.storage.errors import CorruptError
from tailcache.storage.place import Claim, Place
from tailcache.storage.ranges import cut_range, merge_ranges

__all__ = ["ObjectPlace", "open_object_store"]

_GAP = 256 << 10  # bytes read and dropped rather than asking twice


def open_object_store(kind: str, path: str) -> ObjectPlace:
    """A place in an object store; nothing is asked of it yet.

    Args:
      kind: "s3", "gs" or "az".
      path: the bucket or container, and the folders in it.

    Raises:
      ConfigError: obstore is not installed, or a setting in the environment cannot be understood.
    """
    bucket, _, prefix = path.partition("/")
    return ObjectPlace(Bucket(kind, bucket), prefix)


class ObjectPlace(Place):
    """A prefix of a bucket.

    Args:
      bucket: the bucket.
      prefix: the folder in it, without "/" at either end; may be empty.
    """

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix

    def __str__(self) -> str:
        return self._bucket.url(self._prefix)

    def __repr__(self) -> str:
        return f"ObjectPlace({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return open_object_store, (self._bucket.kind, f"{self._bucket.name}/{self._prefix}".rstrip("/"))

    def __truediv__(self, name: str) -> Place:
        return ObjectPlace(self._bucket, self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".strip("/")

    @property
    def survives_fork(self) -> bool:
        """Not this one."""
        return False

    def map(self, action: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Do something for several files, eight at a time. What is done may not call this again."""
        return self._bucket.map_objects(action, items)

    def read(self, name: str) -> bytes:
        """A whole file: its first 16 MiB, which tell its size, then the rest in pieces of 16 MiB, eight at once."""
        return self._bucket.whole(self._key(name))

    def read_limited(self, name: str, limit: int) -> bytes:
        """A whole file of at most some size, in one request where that is at most 16 MiB."""
        piece = self._bucket.piece(self._key(name), 0, min(limit + 1, PIECE))
        if piece.size > limit:
            raise CorruptError(
                f"{self}/{name}: expected at most {limit} bytes, found {piece.size}; restore it from a copy"
            )
        return piece.data if len(piece.data) == piece.size else self.read(name)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Some byte ranges of a file: one request where they are less than 256 KiB apart, at most eight at once."""
        bucket, key = self._bucket, self._key(name)
        merged = merge_ranges(ranges, _GAP, PIECE)
        if not merged:
            bucket.head(key)
        pieces = bucket.pieces(key, merged)
        return [cut_range(merged, pieces, first, last) for first, last in ranges]

    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        """The last bytes of a file, and its size."""
        bucket, key = self._bucket, self._key(name)
        if count <= 0 or bucket.kind == "az":  # Azure has no ranges from the end
            size = int(bucket.head(key)["size"])
            if min(count, size) <= 0:
                return b"", size
            piece = bucket.piece(key, max(0, size - count), size)
        else:
            piece = bucket.piece(key, -count, 0)
        return piece.data, piece.size

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        try:
            return int(self._bucket.head(self._key(name))["size"])
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file: one PUT up to 16 MiB, beyond that in parts that become visible together."""
        self._bucket.put(self._key(name), memoryview(data).cast("B") if isinstance(data, memoryview) else data)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Write a file if there is none: one conditional PUT.

        Where the answer to an attempt was lost, what is there is compared with ``data``; the same content that another
        process wrote at that very moment counts as written by this one.
        """
        body = memoryview(data).cast("B") if isinstance(data, memoryview) else data
        return self._bucket.put_if(self._key(name), body, "create") is not None

    def _list(self, below: str) -> list[tuple[str, int]]:
        """Keys and sizes below a folder, unsorted."""
        bucket, prefix = self._bucket, self._key(below)

        def collect(_: int) -> list[tuple[str, int]]:
            batches = bucket.obs.list(bucket.reading, prefix or None)
            return [(str(meta["path"]), int(meta["size"])) for batch in batches for meta in batch]

        return bucket.attempt(collect, prefix, "listing")

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Names and sizes of all files below a folder: one request per thousand, all names in memory."""
        start = len(self._prefix) + 1 if self._prefix else 0
        found = sorted(((key[start:], size) for key, size in self._list(below)), key=lambda item: item[0].split("/"))
        yield from found

    def folders(self, below: str = "") -> list[str]:
        """Names of the folders directly in a folder."""
        bucket, prefix = self._bucket, self._key(below)

        def collect(_: int) -> list[str]:
            answer = bucket.obs.list_with_delimiter(bucket.reading, prefix or None)
            return [str(path) for path in answer["common_prefixes"]]

        return sorted(path.rstrip("/").rpartition("/")[2] for path in bucket.attempt(collect, prefix, "listing"))

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._bucket.delete([self._key(name)])

    def delete_all(self, below: str = "") -> None:
        """Delete all files below a folder, a thousand at a time; whoever reads meanwhile sees some of them."""
        keys = [key for key, _ in self._list(below)]
        for first in range(0, len(keys), 1000):
            self._bucket.delete(keys[first : first + 1000])

    def move(self, name: str, to: str) -> None:
        """Copy a file within the store, then delete it: for a moment it has both names."""
        bucket, key, target = self._bucket, self._key(name), self._key(to)
        bucket.attempt(lambda _: bucket.obs.copy(bucket.writing, key, target), key, "copying")
        bucket.delete([key])

    def claim(self, name: str) -> Claim | None:
        """Take a lease: see ``lease``."""
        key = self._key(name)
        return lease.take(_LeaseObject(self._bucket, key), self._bucket.url(key))


class _LeaseObject:
    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket, self._key = bucket, key

    def create(self, data: bytes) -> Any | None:
        return self._bucket.put_if(self._key, data, "create")

    def replace(self, data: bytes, version: Any) -> Any | None:
        return self._bucket.put_if(self._key, data, version)

    def look(self) -> lease.Look | None:
        try:
            data, meta = self._bucket.content(self._key)
        except FileNotFoundError:
            return None
        age = self._bucket.clock(self._key) - meta["last_modified"].timestamp()
        return lease.Look(data=data, version=version_of(meta), age=age)

    def delete(self) -> None:
        self._bucket.delete([self._key])
