"""Blocks of rows handed from one process to another in shared memory that is used again.

Memory that is new costs more than what is then done with it: the system clears it, and both processes find each page of
it for the first time. So a worker keeps the pieces that it has handed over, and fills one again when the consumer has
let go of the block in it. One piece holds a block, and not one for each array: each takes a file descriptor on either
side.

The first bytes of a piece say who has it. They need no lock: each change is made by the one side that has it then.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailcache.storage.blocks import Block
from tailcache.storage.corpus import Rows

__all__ = ["Packer", "Parcel", "Unpacker", "shared"]

_ALIGNMENT = 64
_FREE, _SENT, _HELD = 0, 1, 2
_STATE, _KNOWN = 0, 1  # where in a piece: who has it, and whether the consumer has seen it before

Entry = tuple[str, str, tuple[int, ...], bool, int]


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """The arrays of a block.

    Attributes:
      visit: of the order, of which this is the block.
      entries: name, element type, shape, whether it lies column by column, and first byte of each array.
      worker: whose piece of memory holds them.
      number: of that piece, among all of this worker.
      data: [bytes] uint8, the piece; none where the consumer has it already.
      gone: pieces of this worker that will not come again.
    """

    visit: int
    entries: list[Entry]
    worker: str
    number: int
    data: Tensor | None
    gone: list[int] = field(default_factory=list)


class Packer:
    """The pieces of memory of one worker: as many as are on their way or held at a time."""

    def __init__(self) -> None:
        self._worker = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._pieces: dict[int, Tensor] = {}
        self._count = 0
        self._gone: list[int] = []

    def begin(self) -> None:
        """Take back what was sent and will not be received, because another iteration begins."""
        for piece in self._pieces.values():
            header = piece.numpy()
            if header[_STATE] == _SENT:
                header[_STATE] = _FREE

    def pack(self, visit: int, block: Block) -> Parcel:
        """Copy a block into shared memory."""
        arrays: dict[str, NDArray[Any]] = {
            **{f"rows.{name}": values for name, values in vars(block.rows).items()},
            **{f"stored.{name}": values for name, values in block.stored.items()},
            "block.target_offsets": block.target_offsets,
            "block.chosen": block.chosen,
        }
        entries: list[Entry] = []
        size = _ALIGNMENT
        for name, values in arrays.items():
            by_column = values.ndim > 1 and values.flags.f_contiguous
            entries.append((name, values.dtype.str, values.shape, by_column, size))
            size += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
        number = self._free_piece(size)
        piece = self._pieces[number]
        memory = piece.numpy()
        for entry, values in zip(entries, arrays.values(), strict=True):
            _view(memory, entry)[...] = values
        memory[_STATE] = _SENT
        gone, self._gone = self._gone, []
        return Parcel(
            visit=visit,
            entries=entries,
            worker=self._worker,
            number=number,
            data=None if memory[_KNOWN] else piece,
            gone=gone,
        )

    def _free_piece(self, size: int) -> int:
        """The smallest free piece that is large enough; else a new one, for which one that is too small is given up."""
        free = {number: len(piece) for number, piece in self._pieces.items() if piece.numpy()[_STATE] == _FREE}
        enough = [number for number in free if free[number] >= size]
        if enough:
            return min(enough, key=free.__getitem__)
        if free:
            small = max(free, key=free.__getitem__)
            del self._pieces[small]
            self._gone.append(small)
        number, self._count = self._count, self._count + 1
        room = size + size // 8  # so that a block that is somewhat larger fits too
        self._pieces[number] = shared(torch.zeros(room, dtype=torch.uint8))
        return number


class Unpacker:
    """The consumer's side: the pieces of all workers that it has seen."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, int], _Piece] = {}

    def unpack(self, parcel: Parcel) -> Block:
        """The block in a parcel. Its arrays lie in the piece, which the worker has back when they are all gone."""
        for number in parcel.gone:
            self._pieces.pop((parcel.worker, number), None)
        key = parcel.worker, parcel.number
        if parcel.data is not None:
            self._pieces[key] = parcel.data.numpy().view(_Piece)
        memory = self._pieces[key]
        memory[_STATE], memory[_KNOWN] = _HELD, 1
        lease = memory.view(_Lease)
        lease.memory = memory
        parts: dict[str, dict[str, Any]] = {"rows": {}, "stored": {}, "block": {}}
        for entry in parcel.entries:
            part, name = entry[0].split(".")
            parts[part][name] = _view(lease, entry)
        return Block(rows=Rows(**parts["rows"]), stored=parts["stored"], **parts["block"])


class _Piece(np.ndarray[Any, Any]):
    """A piece of memory: another type than an array of it, for NumPy would have that refer to it past the lease."""


class _Lease(np.ndarray[Any, Any]):
    """Stands between a block's arrays and their piece, and dies with the last of them."""

    memory: _Piece | None = None

    def __del__(self) -> None:
        if self.memory is not None:
            self.memory[_STATE] = _FREE


def shared(tensor: Tensor) -> Tensor:
    """The tensor, moved to memory that other processes can be given."""
    moved: Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return moved


def _view(memory: NDArray[np.uint8], entry: Entry) -> NDArray[Any]:
    _, dtype, shape, by_column, first = entry
    return np.ndarray(shape, np.dtype(dtype), memory, first, order="F" if by_column else "C")
