"""Rows of several arrays, in any order, without a copy: what a decoder reads where it lies.

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
    """Where some rows lie in an array, and where in a result they go.

    Attributes:
      starts: [R] int64, where each row begins.
      lengths: [R] int64, elements of each.
      places: [R] int64, where each row begins in the result.
      total: elements of all of them.
    """

    __slots__ = ("_indices", "lengths", "places", "starts", "total")

    def __init__(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64], total: int
    ) -> None:
        self.starts, self.lengths, self.places, self.total = starts, lengths, places, total
        self._indices: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def indices(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[total] each: where each element lies in the array, and where it goes."""
        if self._indices is None:
            within = np.arange(self.total)
            within -= np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
            self._indices = (
                np.repeat(self.starts, self.lengths) + within,
                np.repeat(self.places, self.lengths) + within,
            )
        return self._indices


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
    return [Piece(stored, Span(np.zeros(1, np.int64), np.array([num], np.int64), np.zeros(1, np.int64), num))]


def arrays_of(stored: Fields | Sequence[Piece], names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Those of some fields that are there, as arrays laid out as they are; of pieces, one copy.

    Args:
      stored: arrays, or at least one piece of them; together, the pieces' rows fill the result.
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
        for piece in stored:
            sources = tuple(_bytes_of(piece.fields[name]) for name in names)
            span = piece.span
            loops.copy_rows(sources, span.starts, span.lengths, span.places, widths, outs)
        return arrays
    for name, out in arrays.items():
        for piece in stored:
            source, (index, places) = piece.fields[name], piece.span.indices
            if _by_column(out):
                out.T[:, places] = source.T[:, index]
            else:
                out[places] = source[index]
    return arrays


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return (values if values.ndim == 1 else values.reshape(-1)).view(np.uint8)


def _by_column(values: NDArray[Any]) -> bool:
    return values.ndim > 1 and values.flags.f_contiguous
