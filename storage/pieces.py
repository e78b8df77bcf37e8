"""Rows of several arrays, one after another, without a copy: what a decoder reads where it lies.

Legend: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.compiled import decode_loops
from tailcache.storage.slabs import empty

__all__ = ["Piece", "Pieces", "Span", "arrays_of", "pieces_of"]


class Span:
    """Where some rows lie in an array.

    Attributes:
      starts: [R] where each row begins.
      lengths: [R] elements of each.
      total: elements of all of them.
    """

    __slots__ = ("_index", "lengths", "starts", "total")

    def __init__(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self.starts, self.lengths = starts, lengths
        self.total = int(lengths.sum())
        self._index: NDArray[np.int64] | None = None

    @property
    def index(self) -> NDArray[np.int64]:
        """[total] where each element lies in the array."""
        if self._index is None:
            before = np.cumsum(self.lengths) - self.lengths
            self._index = np.repeat(self.starts - before, self.lengths)
            self._index += np.arange(self.total)
        return self._index


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


def pieces_of(values: NDArray[Any] | Pieces) -> Pieces:
    """An array as the only piece."""
    if isinstance(values, Pieces):
        return values
    whole = Span(np.zeros(1, np.int64), np.array([len(values)], np.int64))
    return Pieces((Piece(values, whole),))


def arrays_of(fields: Mapping[str, NDArray[Any] | Pieces]) -> dict[str, NDArray[Any]]:
    """All fields as arrays, laid out as they are; one copy of those that are pieces, whose spans must be the same."""
    arrays = {name: values for name, values in fields.items() if not isinstance(values, Pieces)}
    apart = {name: values for name, values in fields.items() if isinstance(values, Pieces)}
    for name, pieces in apart.items():
        first = pieces.parts[0].values
        arrays[name] = empty(pieces.shape, first.dtype, order="F" if _by_column(first) else "C")
    done = 0
    for parts in zip(*(pieces.parts for pieces in apart.values()), strict=True):
        part = slice(done, done := done + parts[0].span.total)
        _copy(parts, [arrays[name][part] for name in apart])
    return arrays


def _copy(parts: Sequence[Piece], outs: Sequence[NDArray[Any]]) -> None:
    """The rows of some arrays after one another, each into one laid out like it, by rows or by columns."""
    span = parts[0].span
    loops = decode_loops(0)
    if loops is not None and all(part.values.flags.carray for part in parts):
        widths = np.array([part.values[:1].nbytes for part in parts])
        sources = tuple(part.values.reshape(-1).view(np.uint8) for part in parts)
        targets = tuple(out.reshape(-1).view(np.uint8) for out in outs)
        loops.copy_rows(sources, span.starts, span.lengths, widths, targets)
        return
    for part, out in zip(parts, outs, strict=True):
        by_column = _by_column(part.values)
        source, target = (part.values.T, out.T) if by_column else (part.values, out)
        if span.total:
            np.take(source, span.index, axis=int(by_column), out=target, mode="clip")


def _by_column(values: NDArray[Any]) -> bool:
    return values.ndim > 1 and values.flags.f_contiguous
