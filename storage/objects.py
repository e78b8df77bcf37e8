"""Read slots of shard objects, wherever they lie, without zarr-python's scheduling.

What zarr-python does for such a read is four calls of numcodecs and one NumPy copy per chunk; its asynchronous
pipeline takes twice as long around them (``scripts/bench_reader.py``). So the same calls are made here directly; in a
folder of this machine, where numba is installed, by a compiled loop over all chunks (``storage.direct_reads``). That
all read the same values is tested.

An object is the chunks, in any order, and then an index: (offset, length) of each chunk as little-endian uint64, and
the index' CRC-32C. Each chunk is blosc(bytes(transpose(values))) and its own CRC-32C. Whoever reads an object again
keeps its table of chunks; a read is then one call for the bytes of the wanted chunks and no others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numcodecs import blosc
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

from tailcache.storage.arrays import ArraySpec, checksum_ranges, seal_of
from tailcache.storage.chunk_bounds import ABSENT, CHECKSUM_BYTES, blosc_problem, parse_index
from tailcache.storage.compiled import decode_loops
from tailcache.storage.direct_reads import ChunkTable, Stretch, read_directly
from tailcache.storage.errors import ConfigError, CorruptError, StorageError
from tailcache.storage.limits import chunk_bytes
from tailcache.storage.place import Place
from tailcache.storage.rust_codecs import read_chunks, use_rust
from tailcache.storage.slabs import empty, scratch

__all__ = ["ObjectIndex", "read_array", "read_index", "read_object", "read_objects"]

_crc32c = CRC32C(location="end")
_LITTLE = sys.byteorder == "little"


@dataclass(frozen=True, slots=True)
class ObjectIndex:
    """What an object says of its chunks; not trusted yet."""

    stored: bytes
    """The index as it lies on disk, checksum included."""
    size: int
    """Bytes of the object."""
    seal: str
    """``ArraySpec.chunk_seal`` of the object."""

    def table(self, spec: ArraySpec) -> ChunkTable:
        """Where the chunks lie, checked to be within the object.

        Raises:
          ValueError: cut short, a checksum that does not match, or a chunk elsewhere.
        """
        return parse_index(self.stored, self.size, spec)


def read_index(place: Place, name: str, spec: ArraySpec) -> ObjectIndex:
    """The index of an object and the hash that binds it to its place, from a few bytes of it.

    Raises:
      FileNotFoundError: there is no such object.

    Cost: two calls of the place.
    """
    stored, size = place.read_end(name, spec.index_bytes)
    return ObjectIndex(stored, size, seal_of(stored, place.read_ranges(name, checksum_ranges(stored, size))))


def read_objects(place: Place, stretches: Sequence[Stretch]) -> list[NDArray[Any]]:
    """Decode neighbouring slots of each of some objects.

    Args:
      place: where their group lies.
      stretches: what to read.

    Returns:
      [slots] or [slots, columns] each, of the array's type; what is stored by columns may be laid out so. All may share
      one piece of memory.

    Raises:
      CorruptError: a file is missing or short, a checksum does not match, or a slot is not stored.

    Cost: of a local folder, where there are loops, one compiled call. Else of each, one call of the place for the
    chunks that are needed, and one for the table where it is not known; holds the stored bytes of these chunks, and one
    decoded chunk, beside the result.
    """
    if place.direct is not None and not any(use_rust(_num_chunks(stretch)) for stretch in stretches):
        found = read_directly(place.direct, stretches)
        if found is not None:
            return found
    return place.map(partial(_read, place), stretches)


def read_object(
    place: Place, name: str, spec: ArraySpec, first: int, last: int, where: str, table: ChunkTable | None = None
) -> NDArray[Any]:
    """``read_objects`` of a single one; the arguments are those of a ``Stretch``."""
    [values] = read_objects(place, [Stretch(name, spec, first, last, where, table)])
    return values


def _num_chunks(stretch: Stretch) -> int:
    return -(-stretch.last // stretch.spec.chunk) - stretch.first // stretch.spec.chunk


def _read(place: Place, stretch: Stretch) -> NDArray[Any]:
    """Step by step, so that an error is about the step that it is of."""
    name, spec, first, last = stretch.name, stretch.spec, stretch.first, stretch.last
    trailing = () if spec.columns is None else (spec.columns,)
    if last <= first:
        return np.empty((0, *trailing), np.dtype(spec.dtype))
    table = stretch.table
    try:
        if table is None:
            table = parse_index(*place.read_end(name, spec.index_bytes), spec)
        begin, end = first // spec.chunk, -(-last // spec.chunk)
        ranges = []
        for chunk, (offset, length) in enumerate(table[begin:end].tolist(), begin):
            if offset == ABSENT:
                raise ValueError(f"chunk {chunk} is not stored")
            ranges.append((offset, offset + length))
        if len(ranges) < end - begin:
            raise ValueError(f"expected at least {end} chunks, found {len(table)}")
        read = place.read_ranges(name, ranges)
        size = chunk_bytes(spec)
        payloads = [_payload(stored, b - a, size) for (a, b), stored in zip(ranges, read, strict=True)]
        # By rows, which decoding is faster with, where there are loops to transpose; else as the chunks lie.
        loops = decode_loops(0) if spec.column_major and _LITTLE else None
        order: Literal["C", "F"] = "F" if spec.column_major and loops is None else "C"
        if place.local is not None and use_rust(end - begin):  # which compares no checksums of parts of objects
            number = int(name.split("/")[-1 if spec.columns is None else -2])
            values = read_chunks(place.local, spec, number, begin, end)[first - begin * spec.chunk :][: last - first]
            out = empty(values.shape, values.dtype, order)
            _copy(values, out, loops)
            return out
        out = empty((last - first, *trailing), np.dtype(spec.dtype), order)  # not before there is enough to fill it
        for chunk, payload in enumerate(payloads, begin):
            start = chunk * spec.chunk
            low, high = max(first, start), min(last, start + spec.chunk)
            part = out[low - first : high - first]
            if high - low == spec.chunk and part.flags.c_contiguous and not spec.column_major and _LITTLE:
                blosc.decompress(payload, part)
            else:
                _copy(_decode_chunk(payload, spec)[low - start : high - start], part, loops)
    except (ConfigError, StorageError):  # neither is damage
        raise
    except (OSError, ValueError, RuntimeError, OverflowError, IndexError) as error:
        raise CorruptError(
            f"{stretch.where}: {place}/{name} cannot be decoded ({type(error).__name__}: {error}); run `tailcache "
            "verify` to list all damage, then restore the file from a copy or capture again"
        ) from error
    return out


def read_array(place: Place, spec: ArraySpec, length: int, where: str) -> NDArray[Any]:
    """All of an array: [length] or [length, columns]; one object at a time beside the result.

    Raises:
      CorruptError: an object is missing or damaged.
    """
    values: NDArray[Any] | None = None
    for number in range(spec.num_objects(length)):
        first, last = number * spec.shard, min((number + 1) * spec.shard, length)
        part = read_object(place, spec.object_path(number), spec, 0, last - first, where)
        if values is None:  # not before there is something to put into it
            values = np.empty((length, *part.shape[1:]), part.dtype)
        values[first:last] = part
    assert values is not None, f"{where}: expected an array of at least one element"
    return values


def _payload(stored: bytes | memoryview, length: int, expected: int) -> NDArray[np.uint8]:
    """What a chunk was compressed to, if it is whole and will have the size of a chunk."""
    if len(stored) != length:
        raise ValueError(f"expected a chunk of {length} bytes, found {len(stored)}")
    payload = np.frombuffer(stored, np.uint8)[:-CHECKSUM_BYTES]
    checksum, computed = int.from_bytes(stored[-CHECKSUM_BYTES:], "little"), _crc32c.checksum(payload)
    if checksum != computed:
        raise ValueError(f"stored and computed crc32c checksum do not match: stored {checksum}, computed {computed}")
    problem = blosc_problem(payload.data, expected)
    if problem:
        raise ValueError(problem)
    return payload


def _copy(values: NDArray[Any], out: NDArray[Any], loops: ModuleType | None) -> None:
    """Copy what may lie by columns, by compiled loops where there are any."""
    if loops is None:
        out[:] = values
    else:
        loops.transpose(values.T, out)


def _decode_chunk(payload: NDArray[np.uint8], spec: ArraySpec) -> NDArray[Any]:
    """A chunk's values, in memory of this thread's that the next call uses again."""
    size = chunk_bytes(spec)
    decoded = scratch("decoded", size)[:size]
    blosc.decompress(payload, decoded)
    values = decoded.view(np.dtype(spec.dtype).newbyteorder("<"))
    if spec.columns is None:
        return values.reshape(spec.chunk)
    return values.reshape(spec.columns, spec.chunk).T if spec.column_major else values.reshape(spec.chunk, spec.columns)
