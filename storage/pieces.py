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


@dataclass(slots=True)
class Span:
    """Where some rows lie in an array, and where in a result they go."""

    starts: NDArray[np.int64]
    """[R] where each row begins."""
    lengths: NDArray[np.int64]
    """[R] elements of each."""
    places: NDArray[np.int64]
    """[R] where each begins in the result."""
    total: int
    """Elements of all of them."""


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
      stored: arrays, or at least one piece of them, each of at least one row; together, their rows fill the result.
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
    runs = _runs(stored)
    for name, out in arrays.items():
        by_column, done = _by_column(out), 0
        for fields, index in runs:
            source, target = fields[name], out[done : done + len(index)]
            if by_column:
                source, target = source.T, target.T
            if len(index):
                np.take(source, index, axis=int(by_column), out=target, mode="clip")
            done += len(index)
    return arrays


def _runs(pieces: Sequence[Piece]) -> list[tuple[Fields, NDArray[np.int64]]]:
    """The rows in the order of the result, neighbours of one piece together: its fields, and where the elements lie."""
    spans = [piece.span for piece in pieces]
    order = np.argsort(np.concatenate([span.places for span in spans]), kind="stable")
    starts = np.concatenate([span.starts for span in spans])[order]
    lengths = np.concatenate([span.lengths for span in spans])[order]
    numbers = np.repeat(np.arange(len(pieces)), [len(span.starts) for span in spans])[order]
    before = np.cumsum(lengths) - lengths
    index = np.repeat(starts - before, lengths)
    index += np.arange(len(index))
    firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
    parts = np.split(index, before[firsts[1:]])
    return [(pieces[number].fields, part) for number, part in zip(numbers[firsts].tolist(), parts, strict=True)]


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return (values if values.ndim == 1 else values.reshape(-1)).view(np.uint8)


def _by_column(values: NDArray[Any]) -> bool:
    return values.ndim > 1 and values.flags.f_contiguous
