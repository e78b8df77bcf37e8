"""A block of rows as one piece of shared memory, to be handed from one process to another.

One piece and not one for each array: each takes a file descriptor on either side as long as it is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailcache.storage.blocks import Block
from tailcache.storage.corpus import Rows

__all__ = ["Parcel", "pack", "shared", "unpack"]

_ALIGNMENT = 64


Entry = tuple[str, str, tuple[int, ...], bool, int]


@dataclass(frozen=True)
class Parcel:
    """The arrays of a block.

    Attributes:
      entries: name, element type, shape, whether it lies column by column, and first byte of each.
      data: [bytes] uint8, shared.
    """

    entries: list[Entry]
    data: Tensor


def pack(block: Block) -> Parcel:
    """Copy a block into shared memory."""
    arrays: dict[str, NDArray[Any]] = {
        **{f"rows.{name}": values for name, values in vars(block.rows).items()},
        **{f"stored.{name}": values for name, values in block.stored.items()},
        "block.target_offsets": block.target_offsets,
        "block.chosen": block.chosen,
    }
    entries: list[Entry] = []
    size = 0
    for name, values in arrays.items():
        by_column = values.ndim > 1 and values.flags.f_contiguous
        entries.append((name, values.dtype.str, values.shape, by_column, size))
        size += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
    data = shared(torch.empty(size, dtype=torch.uint8))
    for entry, values in zip(entries, arrays.values(), strict=True):
        _view(data, entry)[...] = values
    return Parcel(entries, data)


def unpack(parcel: Parcel) -> Block:
    """The block in a parcel; its arrays lie in the parcel's memory."""
    parts: dict[str, dict[str, Any]] = {"rows": {}, "stored": {}, "block": {}}
    for entry in parcel.entries:
        part, name = entry[0].split(".")
        parts[part][name] = _view(parcel.data, entry)
    return Block(rows=Rows(**parts["rows"]), stored=parts["stored"], **parts["block"])


def shared(tensor: Tensor) -> Tensor:
    """The tensor, moved to memory that other processes can be given."""
    moved: Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return moved


def _view(data: Tensor, entry: Entry) -> NDArray[Any]:
    _, dtype, shape, by_column, first = entry
    return np.ndarray(shape, np.dtype(dtype), data.numpy(), first, order="F" if by_column else "C")
