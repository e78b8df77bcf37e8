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
from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Rows

__all__ = ["Parcel", "pack", "shared", "unpack"]

_ALIGNMENT = 64


@dataclass(frozen=True)
class Parcel:
    """The arrays of a block.

    Attributes:
      entries: name, element type, shape and first byte of each.
      data: [bytes] uint8, shared.
    """

    entries: list[tuple[str, str, tuple[int, ...], int]]
    data: Tensor


def pack(block: Block) -> Parcel:
    """Copy a block into shared memory."""
    arrays: dict[str, NDArray[Any]] = {
        **{f"rows.{name}": values for name, values in vars(block.rows).items()},
        **{f"targets.{name}": values for name, values in vars(block.targets).items()},
        "block.target_offsets": block.target_offsets,
        "block.chosen": block.chosen,
    }
    entries, size = [], 0
    for name, values in arrays.items():
        entries.append((name, values.dtype.str, values.shape, size))
        size += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
    data = shared(torch.empty(size, dtype=torch.uint8))
    for entry, values in zip(entries, arrays.values(), strict=True):
        _view(data, entry)[...] = values
    return Parcel(entries, data)


def unpack(parcel: Parcel) -> Block:
    """The block in a parcel; its arrays lie in the parcel's memory."""
    parts: dict[str, dict[str, Any]] = {"rows": {}, "targets": {}, "block": {}}
    for entry in parcel.entries:
        part, name = entry[0].split(".")
        parts[part][name] = _view(parcel.data, entry)
    return Block(rows=Rows(**parts["rows"]), targets=Targets(**parts["targets"]), **parts["block"])


def shared(tensor: Tensor) -> Tensor:
    """The tensor, moved to memory that other processes can be given."""
    moved: Tensor = tensor.share_memory_()  # type: ignore[no-untyped-call]
    return moved


def _view(data: Tensor, entry: tuple[str, str, tuple[int, ...], int]) -> NDArray[Any]:
    _, dtype, shape, first = entry
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(data.numpy(), np.dtype(dtype), count, first).reshape(shape)
