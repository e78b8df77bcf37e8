"""Read slots of one shard object: the hot path of training, without zarr-python's scheduling.

What zarr-python does for such a read is four calls of numcodecs and one NumPy copy per chunk; its asynchronous
pipeline takes twice as long around them (``scripts/bench_reader.py``). So the same calls are made here directly. That
both read the same values is tested, and anything but this hot path goes through zarr-python.

An object is the chunks, in any order, and then an index: (offset, length) of each chunk as little-endian uint64, and
the index' CRC-32C. Each chunk is blosc(bytes(transpose(values))) and its own CRC-32C.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs import blosc
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.errors import CorruptError, StorageError
from tailcache.storage.place import Place

__all__ = ["read_object"]

_ABSENT = (1 << 64) - 1
_crc32c = CRC32C(location="end")


def read_object(place: Place, name: str, spec: ArraySpec, first: int, last: int, where: str) -> NDArray[Any]:
    """Decode slots ``first`` to ``last`` (half-open, within the shard) of one object.

    Args:
      place: where its group lies.
      name: the object's file.
      spec: how its array lies on disk.
      first: first slot.
      last: one past the last slot.
      where: what to call this in an error.

    Returns:
      [last - first] or [last - first, columns], of the array's type.

    Raises:
      CorruptError: the file is missing or short, a checksum does not match, or a slot is not stored.

    Cost: two reads, of the index and of the chunks that are needed.
    """
    trailing = () if spec.columns is None else (spec.columns,)
    out = np.empty((last - first, *trailing), np.dtype(spec.dtype))
    if last <= first:
        return out
    try:
        index = _parse_index(place.read_end(name, spec.index_bytes)[0], spec)
        chunks = range(first // spec.chunk, -(-last // spec.chunk))
        ranges = []
        for chunk in chunks:
            offset, length = (int(value) for value in index[chunk])
            if offset == _ABSENT:
                raise ValueError(f"chunk {chunk} is not stored")
            ranges.append((offset, offset + length))
        for chunk, (a, b), stored in zip(chunks, ranges, place.read_ranges(name, ranges), strict=True):
            values = _decode_chunk(stored, b - a, spec)
            begin = chunk * spec.chunk
            low, high = max(first, begin), min(last, begin + spec.chunk)
            out[low - first : high - first] = values[low - begin : high - begin]
    except StorageError:
        raise
    except (OSError, ValueError, RuntimeError, OverflowError, IndexError) as error:
        raise CorruptError(
            f"{where}: {place}/{name} cannot be decoded ({type(error).__name__}: {error}); run `tailcache verify` to "
            "list all damage, then restore the file from a copy or capture again"
        ) from error
    return out


def _parse_index(stored: bytes, spec: ArraySpec) -> NDArray[np.uint64]:
    if len(stored) != spec.index_bytes:
        raise ValueError(f"expected an index of {spec.index_bytes} bytes, found {len(stored)}")
    return np.frombuffer(_crc32c.decode(stored), "<u8").reshape(-1, 2)


def _decode_chunk(stored: bytes, length: int, spec: ArraySpec) -> NDArray[Any]:
    if len(stored) != length:
        raise ValueError(f"expected a chunk of {length} bytes, found {len(stored)}")
    raw = blosc.decompress(_crc32c.decode(stored))
    values = np.frombuffer(raw, np.dtype(spec.dtype).newbyteorder("<"))
    if spec.columns is None:
        return values.reshape(spec.chunk)
    return values.reshape(spec.columns, spec.chunk).T if spec.column_major else values.reshape(spec.chunk, spec.columns)
