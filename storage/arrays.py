"""Zarr v3 arrays with one leading axis, encoded shard by shard.

Every array of a cache has the sharding codec. A shard object is encoded in memory by zarr-python's own
pipeline (deterministic: same values, same bytes) and then written as one durable file; zarr-python also reads
it back. Only standard codecs are used: transpose, bytes, blosc (zstd), crc32c, sharding_indexed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from tailcache.storage.errors import CorruptError

__all__ = ["ArraySpec", "checksum_ranges", "group_metadata", "open_array", "read_slice", "seal_of"]


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """How one array lies on disk; everything but its length, which grows with the corpus."""

    name: str
    dtype: str
    """NumPy name of the element type, little-endian on disk."""
    chunk: int
    """Elements of the leading axis in an inner chunk, the unit of random access."""
    shard: int
    """Elements of the leading axis in a shard object; a multiple of ``chunk``."""
    columns: int | None = None
    """Length of the second axis; none for a one-dimensional array."""
    column_major: bool = False
    """Store inner chunks transposed, so that like stands beside like for the compressor."""
    level: int = 5
    """blosc compression level, 1 to 9."""
    shuffle: str = "shuffle"
    block_bytes: int = 0
    """Bytes that blosc compresses at a time; 0: it chooses."""
    meaning: str = ""
    """One line for the array's attributes."""
    dimensions: tuple[str, str] = ("position", "rank")
    """Names of the axes; the second only where there are columns."""

    def _create(self, store: MemoryStore, length: int) -> zarr.Array[Any]:
        trailing = () if self.columns is None else (self.columns,)
        compressors: list[BytesBytesCodec] = [
            BloscCodec(
                typesize=np.dtype(self.dtype).itemsize,
                cname="zstd",
                clevel=self.level,
                shuffle=self.shuffle,  # type: ignore[arg-type]
                blocksize=self.block_bytes,
            ),
            Crc32cCodec(),
        ]
        return zarr.create_array(
            store,
            shape=(length, *trailing),
            dtype=self.dtype,
            chunks=(self.chunk, *trailing),
            shards=(self.shard, *trailing),
            filters=[TransposeCodec(order=(1, 0))] if self.column_major else None,
            compressors=compressors,
            fill_value=0,
            config={"write_empty_chunks": True},  # so that an object that is not there is damage, never data
            attributes={"meaning": self.meaning},
            dimension_names=self.dimensions[: 1 + len(trailing)],
        )

    def metadata(self, length: int) -> bytes:
        """The bytes of the array's ``zarr.json`` for a given length of the leading axis."""
        store = MemoryStore()
        self._create(store, length)
        return _get(store, "zarr.json") or b""

    def object_path(self, shard: int) -> str:
        """Where a shard object lies, relative to the group."""
        return f"{self.name}/c/{shard}" + ("" if self.columns is None else "/0")

    def num_objects(self, length: int) -> int:
        """Objects of an array of some length of the leading axis."""
        return -(-length // self.shard)

    def encode(self, values: NDArray[Any]) -> bytes | None:
        """One shard object.

        Args:
          values: [n] or [n, columns], n <= shard, cast to the array's type beforehand.

        Returns:
          The object's bytes; none where there are no values. Slots after the last value are not stored.
        """
        if values.dtype != np.dtype(self.dtype) or len(values) > self.shard:
            raise ValueError(
                f"{self.name}: expected at most {self.shard} values of {self.dtype}, found {len(values)} of "
                f"{values.dtype}"
            )
        if len(values) == 0:
            return None
        store = MemoryStore()
        self._create(store, len(values))[:] = values
        return _get(store, self.object_path(0).removeprefix(self.name + "/"))

    @property
    def index_bytes(self) -> int:
        """Bytes of an object's index, its checksum included: what an object ends with."""
        return 16 * (self.shard // self.chunk) + 4

    def chunk_seal(self, data: bytes) -> str:
        """One hash over an object's index and the checksums of its chunks.

        An object ends with its index (offset and length of each chunk, and their CRC-32C), and each chunk ends with
        its own CRC-32C. Reading a chunk verifies both, but nothing in them says *which* object they belong to: an
        object put in the place of another of the same size would be read as if it were that one. Whoever compares
        this hash with the recorded one knows, without reading the rest (``objects.read_index``), that every chunk it
        then decodes is the one that was written there.

        Args:
          data: the object's bytes.
        """
        index = data[max(0, len(data) - self.index_bytes) :]
        return seal_of(index, [data[first:last] for first, last in checksum_ranges(index, len(data))])


def checksum_ranges(index: bytes, size: int) -> list[tuple[int, int]]:
    """Where the checksums of an object's chunks lie, in the order of its index.

    Args:
      index: the object's last ``index_bytes``.
      size: bytes of the whole object.
    """
    entries = np.frombuffer(index[: len(index) // 16 * 16], "<u8").reshape(-1, 2).tolist()
    # Chunks that are not stored have the largest uint64 as their length.
    ends = [offset + length for offset, length in entries if length >= 4 and offset + length <= size]
    return [(end - 4, end) for end in ends]


def seal_of(index: bytes, checksums: Sequence[bytes | memoryview]) -> str:
    """``ArraySpec.chunk_seal`` from its parts."""
    return hashlib.sha256(b"".join([index, *checksums])).hexdigest()


class _WholeStore(LocalStore):
    """A folder whose objects must all be there: zarr would read a missing one as fill values."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        if (value is None or len(value) == 0) and key.startswith("c/"):
            raise FileNotFoundError(f"{self.root / key}: missing or cut short")
        return value


def _get(store: MemoryStore, key: str) -> bytes | None:
    async def get() -> bytes | None:
        buffer = await store.get(key, prototype=default_buffer_prototype())
        return None if buffer is None else buffer.to_bytes()

    return sync(get())


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """The bytes of a group's ``zarr.json``."""
    store = MemoryStore()
    zarr.create_group(store, attributes=attributes)
    return _get(store, "zarr.json") or b""


def open_array(path: Path) -> zarr.Array[Any]:
    """Open an array for reading.

    Raises:
      CorruptError: its ``zarr.json`` is missing or cannot be understood.
    """
    try:
        return zarr.open_array(_WholeStore(path, read_only=True), mode="r", zarr_format=3)
    except Exception as error:  # zarr raises many kinds on a damaged zarr.json
        raise CorruptError(
            f"{path}: expected a zarr v3 array, found none that can be opened ({type(error).__name__}: {error}); "
            "run `tailcache verify`"
        ) from error


def read_slice(array: zarr.Array[Any], first: int, last: int, where: Callable[[], str]) -> NDArray[Any]:
    """Read ``array[first:last]``.

    Args:
      array: an array of a cache.
      first: first element of the leading axis.
      last: one past the last.
      where: says, in case of damage, which field and shard this is.

    Raises:
      CorruptError: a checksum does not match, or an object is cut short.
    """
    try:
        return np.asarray(array[first:last])
    except (asyncio.CancelledError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # crc32c mismatch, blosc failure, short object: zarr has no common class
        raise CorruptError(
            f"{where()}: the stored bytes cannot be decoded ({type(error).__name__}: {error}); run "
            "`tailcache verify` to list all damage, then restore the file from a copy or capture again"
        ) from error
