"""Rows of several arrays, one after another, without a copy: what a decoder reads where it lies.

Legend: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.slabs import empty

__all__ = ["Piece", "Pieces", "Span", "arrays_of", "pieces_of"]

_LONG_ROW = 256  # elements


class Span:
    """Where some rows lie in an array.

    Attributes:
      starts: [R] where each row begins.
      lengths: [R] elements of each.
      total: elements of all of them.
    """

    __slots__ = ("_index", "_slices", "lengths", "starts", "total")

    def __init__(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self.starts, self.lengths = starts, lengths
        ends = np.cumsum(lengths)
        self.total = int(ends[-1]) if len(ends) else 0
        self._slices: list[tuple[slice, slice]] = []
        self._index: NDArray[np.int64] | None = None
        if self.total >= _LONG_ROW * len(starts):  # a copy for each row, of so many elements that this is the fastest
            for start, end, length in zip(starts.tolist(), ends.tolist(), lengths.tolist(), strict=True):
                self._slices.append((slice(start, start + length), slice(end - length, end)))
        else:
            index = np.repeat(starts - (ends - lengths), lengths)
            self._index = np.add(index, np.arange(self.total), out=index)

    def copy(self, values: NDArray[Any], out: NDArray[Any]) -> None:
        """Copy the rows of an array, one after another; both may lie by columns."""
        if self._index is not None:
            if self.total:
                by_column = values.ndim > 1 and values.flags.f_contiguous
                source, target = (values.T, out.T) if by_column else (values, out)
                np.take(source, self._index, axis=int(by_column), out=target, mode="clip")
            return
        for source_slice, target_slice in self._slices:
            out[target_slice] = values[source_slice]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one array."""

    values: NDArray[Any]
    """[n] or [n, columns]; what was stored by columns may lie so."""
    span: Span


@dataclass(frozen=True, slots=True)
class Pieces:
    """The rows of all pieces, one after another."""

    parts: tuple[Piece, ...]
    """At least one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that they make up."""
        return (sum(part.span.total for part in self.parts), *self.parts[0].values.shape[1:])

    def joined(self) -> NDArray[Any]:
        """That array, laid out as the pieces are; one copy."""
        first = self.parts[0].values
        by_column = first.ndim > 1 and first.flags.f_contiguous
        out = empty(self.shape, first.dtype, order="F" if by_column else "C")
        done = 0
        for part in self.parts:
            part.span.copy(part.values, out[done : done + part.span.total])
            done += part.span.total
        return out


def pieces_of(values: NDArray[Any] | Pieces) -> Pieces:
    """An array as the only piece."""
    if isinstance(values, Pieces):
        return values
    whole = Span(np.zeros(1, np.int64), np.array([len(values)], np.int64))
    return Pieces((Piece(values, whole),))


def arrays_of(stored: Mapping[str, NDArray[Any] | Pieces]) -> dict[str, NDArray[Any]]:
    """All fields as arrays."""
    return {name: value.joined() if isinstance(value, Pieces) else value for name, value in stored.items()}
