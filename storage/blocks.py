"""Blocks of rows with their targets, read together and cut into batches by array operations, never row by row.

Legend: R rows, N tokens, T target positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Rows
from tailcache.storage.errors import MismatchError
from tailcache.storage.pieces import Piece, Pieces, Span, arrays_of
from tailcache.storage.shares import Stage

if TYPE_CHECKING:
    from tailcache.storage.several import AnyTeacher

__all__ = ["Block", "Cut", "Stored", "TargetRows", "gather", "read_block", "walk"]

_MAX_GAP_ROWS = 8  # rows read along rather than starting another read


Stored = dict[str, NDArray[Any]]
"""The stored fields of some target positions, by name: what ``Teacher.decode`` decodes."""


Decode = Callable[[Mapping[str, NDArray[Any] | Pieces], NDArray[np.int64]], Targets]
"""``Teacher.decode``: stored fields, and the corpus rows that they are of."""


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """Some rows and the targets of all their target positions."""

    rows: Rows
    targets: Targets
    target_offsets: NDArray[np.int64]
    """[R + 1] into the targets: those of row ``i`` are ``targets[target_offsets[i]:target_offsets[i + 1]]``."""

    def __len__(self) -> int:
        return len(self.rows)

    def slice(self, first: int, last: int) -> TargetRows:
        """Rows ``first`` to ``last`` (half-open) of these, without a copy."""
        a, b = int(self.target_offsets[first]), int(self.target_offsets[last])
        return TargetRows(
            rows=self.rows.slice(first, last),
            targets=self.targets[a:b],
            target_offsets=self.target_offsets[first : last + 1] - a,
        )

    def without_targets(self) -> TargetRows:
        """The same tokens with nothing to be predicted, as no row of the corpus."""
        silent = replace(
            self.rows,
            row_indices=np.full_like(self.rows.row_indices, -1),
            supervised=np.zeros_like(self.rows.supervised),
        )
        return replace(self, rows=silent, targets=self.targets[:0], target_offsets=np.zeros_like(self.target_offsets))


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some rows as they are held until they are wanted: not decoded, which takes half the memory."""

    rows: Rows
    stored: Stored
    """Empty where targets were not asked for."""
    target_offsets: NDArray[np.int64]
    """[R + 1] into the stored fields."""
    chosen: NDArray[np.int64]
    """Which of the rows were asked for; others between them may have been read along."""

    def __len__(self) -> int:
        return len(self.chosen)


def read_block(
    teacher: AnyTeacher, rows: NDArray[np.int64], *, optional: Collection[str] = (), targets: bool = True
) -> Block:
    """Read some rows, neighbours together.

    Args:
      teacher: an open teacher, or several.
      rows: [R] ascending. What lies between two of them is read along, unless it is much.
      optional: which optional fields to read.
      targets: read the targets too, and not the corpus alone.

    Raises:
      MismatchError: there are not as many targets as supervised positions.
      NotFoundError, CorruptError: as for ``Teacher.rows``.
    """
    parts = []
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > _MAX_GAP_ROWS) + 1):
        first, last = int(run[0]), int(run[-1]) + 1
        read = teacher.corpus.rows(first, last)
        stored = teacher.stored(first, last, optional=optional) if targets else {}
        offsets = np.concatenate([[0], np.cumsum(read.supervised)])[read.offsets].astype(np.int64)
        found = len(stored["tail_entropy"]) if targets else offsets[-1]
        if found != offsets[-1]:
            raise MismatchError(
                f"teacher {teacher.name!r}, rows {first} to {last - 1}: expected {offsets[-1]} targets, one per "
                f"supervised position of the corpus, found {found}; run `tailcache verify`"
            )
        parts.append(Block(rows=read, stored=stored, target_offsets=offsets, chosen=run - first))
    if len(parts) == 1:
        return parts[0]
    joined, pieces, target_offsets = _join([(part, part.chosen) for part in parts])
    return Block(rows=joined, stored=arrays_of(pieces), target_offsets=target_offsets, chosen=np.arange(len(joined)))


def gather(
    held: Mapping[int, Block],
    visits: NDArray[np.int64],
    places: NDArray[np.int64],
    decode: Decode,
) -> TargetRows:
    """Some rows of several blocks, in the order asked for, decoded.

    Args:
      held: blocks by their visit.
      visits: [R] which block each row is from; rows of one block should be together, each such run is one piece.
      places: [R] which row of its block.
      decode: ``Teacher.decode``.
    """
    runs = np.split(np.arange(len(visits)), np.flatnonzero(np.diff(visits)) + 1)
    blocks = [held[int(visits[run[0]])] for run in runs]
    pairs = [(block, block.chosen[places[run]]) for block, run in zip(blocks, runs, strict=True)]
    rows, stored, target_offsets = _join(pairs)
    targets = decode(stored, rows.row_indices) if stored else Targets.unread(int(target_offsets[-1]))
    return TargetRows(rows=rows, targets=targets, target_offsets=target_offsets)


def _join(pairs: list[tuple[Block, NDArray[np.int64]]]) -> tuple[Rows, dict[str, Pieces], NDArray[np.int64]]:
    """Some rows of each block, by their indices in it, after one another; of their targets no copy is made."""
    of_tokens, offsets = _spans([(block.rows.offsets, places) for block, places in pairs])
    of_targets, target_offsets = _spans([(block.target_offsets, places) for block, places in pairs])

    def by_row(of: Callable[[Rows], NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([of(block.rows)[places] for block, places in pairs])

    def pieces(spans: list[Span], values: list[NDArray[Any]]) -> Pieces:
        return Pieces(tuple(map(Piece, values, spans)))

    by_token = {
        name: pieces(of_tokens, [getattr(block.rows, name) for block, _ in pairs])
        for name in ("tokens", "document_start", "supervised")
    }
    rows = Rows(
        row_indices=by_row(lambda rows: rows.row_indices),
        offsets=offsets,
        held_out=by_row(lambda rows: rows.held_out),
        **arrays_of(by_token),
    )
    stored = {name: pieces(of_targets, [block.stored[name] for block, _ in pairs]) for name in pairs[0][0].stored}
    return rows, stored, target_offsets


def _spans(chosen: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> tuple[list[Span], NDArray[np.int64]]:
    """Where the elements of some rows of each block lie, and [R + 1] where they begin once laid after one another."""
    spans = []
    for offsets, places in chosen:
        starts = offsets[places]
        spans.append(Span(starts, offsets[places + 1] - starts))
    ends = np.cumsum(np.concatenate([span.lengths for span in spans]))
    return spans, np.concatenate([[0], ends]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What some steps of a process, which follow one another, are cut from."""

    held: Mapping[int, Block]
    visits: list[NDArray[np.int64]]
    """Of each step."""
    places: list[NDArray[np.int64]]
    filler: bool
    ends: list[int]
    """How many rows of the order all processes have taken after each step."""

    def made(self, decode: Decode) -> list[TargetRows]:
        """The rows of each step, views of what is gathered and decoded at once; any thread can make them."""
        rows = gather(self.held, np.concatenate(self.visits), np.concatenate(self.places), decode)
        ends = np.cumsum([len(visits) for visits in self.visits]).tolist()
        parts = [rows.slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
        return [part.without_targets() for part in parts] if self.filler else parts


def walk(
    stages: Iterator[Stage],
    announce: Callable[[list[int]], None],
    get: Callable[[int], Block],
    keep_up: Callable[[float], None] = lambda _: None,
    *,
    num_steps: int = 1,
) -> Iterator[Cut]:
    """Go through the steps of a process, holding the blocks that they need, and having the next ones read meanwhile.

    Args:
      stages: of ``shares``.
      announce: is told the visits that will be asked for, before they are, in that order, each once.
      get: a block that was announced; each is asked for once, in the order they were announced in.
      keep_up: is told after each cut what part of its stage is done.
      num_steps: of a cut; there are fewer in the last one of a stage.

    Space: the blocks of two stages.
    """
    held: dict[int, Block] = {}
    current = next(stages, None)
    if current is not None:
        announce(current.needs.tolist())
    while current is not None:
        following = next(stages, None)
        if following is not None:
            announce(np.setdiff1d(following.needs, current.needs).tolist())
        held = {visit: held[visit] if visit in held else get(visit) for visit in current.needs.tolist()}
        for first in range(0, len(current.ends), num_steps):
            steps = slice(first, first + num_steps)
            yield Cut(
                held=held,
                visits=current.visits[steps],
                places=current.places[steps],
                filler=current.filler,
                ends=current.ends[steps],
            )
            keep_up(min(first + num_steps, len(current.ends)) / len(current.ends))
        current = following
