"""Rows of several arrays, one after another, without a copy: what a decoder reads where it lies.

Legend: R rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.compiled import decode_loops
from tailcache.storage.slabs import empty

__all__ = ["Fields", "Piece", "Span", "arrays_of", "pieces_of"]

Fields = Mapping[str, NDArray[Any]]
"""Arrays by name that have one leading axis."""


class Span:
    """Where some rows lie in an array.

    Attributes:
      starts: [R] int64, where each row begins.
      lengths: [R] int64, elements of each.
      total: elements of all of them.
    """

    __slots__ = ("_index", "lengths", "starts", "total")

    def __init__(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], total: int) -> None:
        self.starts, self.lengths, self.total = starts, lengths, total
        self._index: NDArray[np.int64] | None = None

    @property
    def index(self) -> NDArray[np.int64]:
        """[total] where each element lies in the array."""
        if self._index is None:
            before = np.cumsum(self.lengths) - self.lengths
            self._index = np.repeat(self.starts - before, self.lengths)
            self._index += np.arange(self.total)
        return self._index


@dataclass(slots=True)
class Piece:
    """Some rows of arrays."""

    fields: Fields
    """[n] or [n, columns] each; what was stored by columns may lie so."""
    span: Span


def pieces_of(stored: Fields | Sequence[Piece]) -> Sequence[Piece]:
    """Arrays as the only piece, which has as many elements as the longest of them; else what was given."""
    if not isinstance(stored, Mapping):
        return stored
    num = max(map(len, stored.values()), default=0)
    return [Piece(stored, Span(np.zeros(1, np.int64), np.array([num], np.int64), num))]


def arrays_of(stored: Fields | Sequence[Piece], names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Those of some fields that are there, as arrays laid out as they are; of pieces, one copy.

    Args:
      stored: arrays, or at least one piece of them.
      names: of the fields.
    """
    if isinstance(stored, Mapping):
        return {name: stored[name] for name in names if name in stored}
    first = stored[0].fields
    names = [name for name in names if name in first]
    if not names:
        return {}
    total = sum(piece.span.total for piece in stored)
    arrays = {}
    for name in names:
        values = first[name]
        arrays[name] = empty((total, *values.shape[1:]), values.dtype, order="F" if _by_column(values) else "C")
    loops = decode_loops(0)
    if loops is not None and all(piece.fields[name].flags.carray for piece in stored for name in names):
        widths = np.array([values[:1].nbytes for values in arrays.values()])
        outs = tuple(map(_bytes_of, arrays.values()))
        done = 0
        for piece in stored:
            sources = tuple(_bytes_of(piece.fields[name]) for name in names)
            loops.copy_rows(sources, piece.span.starts, piece.span.lengths, widths, outs, done)
            done += piece.span.total
        return arrays
    for name, out in arrays.items():
        done = 0
        by_column = _by_column(out)
        for piece in stored:
            source, target = piece.fields[name], out[done : done + piece.span.total]
            if by_column:
                source, target = source.T, target.T
            if piece.span.total:
                np.take(source, piece.span.index, axis=int(by_column), out=target, mode="clip")
            done += piece.span.total
    return arrays


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return (values if values.ndim == 1 else values.reshape(-1)).view(np.uint8)


def _by_column(values: NDArray[Any]) -> bool:
    return values.ndim > 1 and values.flags.f_contiguous
