"""Read slots of one shard object: the hot path of training, without zarr-python's scheduling.

What zarr-python does for such a read is four calls of numcodecs and one NumPy copy per chunk; its asynchronous
pipeline takes twice as long around them (``scripts/bench_reader.py``). So the same calls are made here directly. That
both read the same values is tested, and anything but this hot path goes through zarr-python.

An object is the chunks, in any order, and then an index: (offset, length) of each chunk as little-endian uint64, and
the index' CRC-32C. Each chunk is blosc(bytes(transpose(values))) and its own CRC-32C.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.errors import CorruptError

__all__ = ["read_object"]

_CHECKSUM_BYTES = 4
_ENTRY_BYTES = 16
_ABSENT = (1 << 64) - 1
_crc32c = CRC32C(location="end")


def read_object(path: Path, spec: ArraySpec, first: int, last: int, where: str) -> NDArray[Any]:
    """Decode slots ``first`` to ``last`` (half-open, within the shard) of one object.

    Args:
      path: the object's file.
      spec: how its array lies on disk.
      first: first slot.
      last: one past the last slot.
      where: what to call this in an error.

    Returns:
      [last - first] or [last - first, columns], of the array's type.

    Raises:
      CorruptError: the file is missing or short, a checksum does not match, or a slot is not stored.
    """
    trailing = () if spec.columns is None else (spec.columns,)
    out = np.empty((last - first, *trailing), np.dtype(spec.dtype))
    if last <= first:
        return out
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            index = _read_index(descriptor, spec)
            for chunk in range(first // spec.chunk, -(-last // spec.chunk)):
                offset, length = (int(value) for value in index[chunk])
                if offset == _ABSENT:
                    raise ValueError(f"chunk {chunk} is not stored")
                values = _decode_chunk(os.pread(descriptor, length, offset), length, spec)
                begin = chunk * spec.chunk
                a, b = max(first, begin), min(last, begin + spec.chunk)
                out[a - first : b - first] = values[a - begin : b - begin]
        finally:
            os.close(descriptor)
    except (OSError, ValueError, RuntimeError, OverflowError, IndexError) as error:
        raise CorruptError(
            f"{where}: {path} cannot be decoded ({type(error).__name__}: {error}); run `tailcache verify` to list all "
            "damage, then restore the file from a copy or capture again"
        ) from error
    return out


def _read_index(descriptor: int, spec: ArraySpec) -> NDArray[np.uint64]:
    size = _ENTRY_BYTES * (spec.shard // spec.chunk) + _CHECKSUM_BYTES
    end = os.fstat(descriptor).st_size
    stored = os.pread(descriptor, size, max(0, end - size))
    if len(stored) != size:
        raise ValueError(f"expected an index of {size} bytes, found {len(stored)}")
    return np.frombuffer(_crc32c.decode(stored), "<u8").reshape(-1, 2)


def _decode_chunk(stored: bytes, length: int, spec: ArraySpec) -> NDArray[Any]:
    if len(stored) != length:
        raise ValueError(f"expected a chunk of {length} bytes, found {len(stored)}")
    raw = blosc.decompress(_crc32c.decode(stored))
    values = np.frombuffer(raw, np.dtype(spec.dtype).newbyteorder("<"))
    if spec.columns is None:
        return values.reshape(spec.chunk)
    return values.reshape(spec.columns, spec.chunk).T if spec.column_major else values.reshape(spec.chunk, spec.columns)
