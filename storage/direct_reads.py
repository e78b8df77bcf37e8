"""Slots of several objects in a folder of this machine, by one call of the compiled loop over their chunks."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.chunk_bounds import BLOSC_HEADER, CHECKSUM_BYTES
from tailcache.storage.compiled import chunk_loops
from tailcache.storage.limits import chunk_bytes
from tailcache.storage.local_place import READING
from tailcache.storage.slabs import empty, scratch

__all__ = ["ChunkTable", "Stretch", "read_directly"]

ChunkTable = NDArray[np.uint64]
"""[chunks, 2]: offset and length of each chunk of an object."""
_ALIGNMENT = 64
_MAX_BYTES = 1 << 28
"""Of a result, and of a decoded chunk: what is larger is not allocated before there is something to fill it."""
_LITTLE = sys.byteorder == "little"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring slots of an object."""

    name: str
    """The object's file."""
    spec: ArraySpec
    """How its array lies on disk."""
    first: int
    """First slot, within the shard."""
    last: int
    """One past the last slot."""
    where: str
    """What to call this in an error."""
    table: ChunkTable | None = None
    """Of the object, where it is known; else it is read."""


def read_directly(folder: Path, stretches: Sequence[Stretch]) -> list[NDArray[Any]] | None:
    """Decode some stretches, all of them in memory that one result shares with the others.

    Args:
      folder: which the objects' names are relative to.
      stretches: with tables, which were checked to be of these objects.

    Returns:
      As ``objects.read_objects``; none where that has to do it: where there is no loop for it, or something is wrong.
    """
    loops = chunk_loops() if _LITTLE else None
    if loops is None:
        return None
    wanted, tables, kinds = [], [], []
    path_end = num_chunks = end = largest = 0
    paths = []
    for stretch in stretches:
        spec, first, last = stretch.spec, stretch.first, stretch.last
        kind, columns, slots = np.dtype(spec.dtype), spec.columns or 1, spec.chunk
        begin = first // slots
        if stretch.table is None or first >= last or (spec.column_major and kind.itemsize not in loops.ITEM_BYTES):
            return None
        table = stretch.table[begin : -(-last // slots)]
        path = os.fsencode(f"{folder}/{stretch.name}\0")
        wanted.append((
            path_end, num_chunks, num_chunks + len(table), first - begin * slots, last - first, slots,
            kind.itemsize, columns, spec.column_major, end,
        ))  # fmt: skip
        paths.append(path)
        tables.append(table)
        kinds.append((end, (last - first,) if spec.columns is None else (last - first, columns), kind))
        path_end, num_chunks = path_end + len(path), num_chunks + len(table)
        end += -(-(last - first) * columns * kind.itemsize // _ALIGNMENT) * _ALIGNMENT
        largest = max(largest, chunk_bytes(spec))
    if not stretches or max(end, largest) > _MAX_BYTES:
        return None
    out = empty((end,), np.uint8)
    stored = scratch("stored", largest + BLOSC_HEADER + CHECKSUM_BYTES)  # what blosc adds to what it cannot compress
    decoded = scratch("decoded", largest)
    chunks = np.concatenate(tables).view(np.int64)
    files = np.frombuffer(b"".join(paths), np.uint8)
    if not loops.read_chunks(files, chunks, np.array(wanted), READING, stored, decoded, out):
        return None
    return [
        out[begin : begin + math.prod(shape) * kind.itemsize].view(kind).reshape(shape) for begin, shape, kind in kinds
    ]
