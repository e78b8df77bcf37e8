"""Blocks of rows with their targets, read together and cut into batches by array operations, never row by row.

Legend: R rows, N tokens, T target positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Rows
from tailcache.storage.errors import MismatchError
from tailcache.storage.pieces import Fields, Piece, Span, arrays_of
from tailcache.storage.shares import Stage

if TYPE_CHECKING:
    from tailcache.storage.several import AnyTeacher

__all__ = ["Block", "Cut", "Stored", "TargetRows", "gather", "read_block", "walk"]

_MAX_GAP_ROWS = 8  # rows read along rather than starting another read


Stored = dict[str, NDArray[Any]]
"""The stored fields of some target positions, by name: what ``Teacher.decode`` decodes."""


Decode = Callable[[Fields | Sequence[Piece], NDArray[np.int64]], Targets]
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
        sums = np.zeros(len(read.supervised) + 1, np.int64)
        np.cumsum(read.supervised, out=sums[1:])
        offsets = sums[read.offsets]
        found = len(stored["tail_entropy"]) if targets else offsets[-1]
        if found != offsets[-1]:
            raise MismatchError(
                f"teacher {teacher.name!r}, rows {first} to {last - 1}: expected {offsets[-1]} targets, one per "
                f"supervised position of the corpus, found {found}; run `tailcache verify`"
            )
        parts.append(Block(rows=read, stored=stored, target_offsets=offsets, chosen=run - first))
    if len(parts) == 1:
        return parts[0]
    joined, pieces, target_offsets = _join(parts, [part.chosen for part in parts], np.arange(len(rows)))
    together = arrays_of(pieces, parts[0].stored)
    return Block(rows=joined, stored=together, target_offsets=target_offsets, chosen=np.arange(len(joined)))


def gather(
    held: Mapping[int, Block],
    visits: NDArray[np.int64],
    places: NDArray[np.int64],
    decode: Decode,
) -> TargetRows:
    """Some rows of several blocks, in the order asked for, decoded.

    Args:
      held: blocks by their visit.
      visits: [R] which block each row is from.
      places: [R] which row of its block.
      decode: ``Teacher.decode``.
    """
    by_block = np.argsort(visits, kind="stable")
    visits, places = visits[by_block], places[by_block]
    blocks, chosen, first = [], [], 0
    for last in [*(np.flatnonzero(np.diff(visits)) + 1).tolist(), len(visits)]:
        block = held[int(visits[first])]
        blocks.append(block)
        chosen.append(block.chosen[places[first:last]])
        first = last
    rows, pieces, target_offsets = _join(blocks, chosen, by_block)
    targets = decode(pieces, rows.row_indices) if pieces[0].fields else Targets.unread(int(target_offsets[-1]))
    return TargetRows(rows=rows, targets=targets, target_offsets=target_offsets)


def _join(
    blocks: list[Block], chosen: list[NDArray[np.int64]], numbers: NDArray[np.int64]
) -> tuple[Rows, list[Piece], NDArray[np.int64]]:
    """Some rows of each block, in any order; of their targets no copy is made.

    Args:
      blocks: at least one.
      chosen: of each block, the indices in it of at least one row.
      numbers: [R] of these, block by block, which row of the result each is.
    """
    counts = [len(places) for places in chosen]
    sizes = np.array([len(block.rows) for block in blocks])
    wanted = np.concatenate(chosen) + np.repeat(np.cumsum(sizes) - sizes, counts)  # among the rows of all blocks
    entries = wanted + np.repeat(np.arange(len(blocks)), counts)  # among their offsets, of which each has one more
    of_tokens, offsets = _spans([block.rows.offsets for block in blocks], entries, counts, numbers)
    of_targets, target_offsets = _spans([block.target_offsets for block in blocks], entries, counts, numbers)
    by_token = [Piece(vars(block.rows), span) for block, span in zip(blocks, of_tokens, strict=True)]
    in_order = np.empty_like(wanted)
    in_order[numbers] = wanted
    rows = Rows(
        row_indices=np.concatenate([block.rows.row_indices for block in blocks])[in_order],
        offsets=offsets,
        held_out=np.concatenate([block.rows.held_out for block in blocks])[in_order],
        **arrays_of(by_token, ("tokens", "document_start", "supervised")),
    )
    return rows, [Piece(block.stored, span) for block, span in zip(blocks, of_targets, strict=True)], target_offsets


def _spans(
    offsets: list[NDArray[np.int64]], entries: NDArray[np.int64], counts: list[int], numbers: NDArray[np.int64]
) -> tuple[list[Span], NDArray[np.int64]]:
    """Where the elements of some rows of each block lie, and [R + 1] where rows begin in the result.

    Args:
      offsets: of each block, where its rows begin, and where the last one ends.
      entries: [R] of the rows among these, all blocks after one another.
      counts: how many of the rows are of each block, at least one.
      numbers: [R] which row of the result each is.
    """
    together = np.concatenate(offsets)
    starts = together[entries]
    lengths = together[entries + 1] - starts
    in_order = np.empty_like(lengths)
    in_order[numbers] = lengths
    begins = np.zeros(len(entries) + 1, np.int64)
    np.cumsum(in_order, out=begins[1:])
    places = begins[numbers]
    firsts = np.cumsum(counts, dtype=np.int64) - counts
    spans = [
        Span(starts[first : first + count], lengths[first : first + count], places[first : first + count], total)
        for first, count, total in zip(firsts.tolist(), counts, np.add.reduceat(lengths, firsts).tolist(), strict=True)
    ]
    return spans, begins


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
    begin: float
    """Where it begins: the number of its stage, and what part of that has gone before."""

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
    current, number = next(stages, None), 0
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
                begin=number + first / len(current.ends),
            )
            keep_up(min(first + num_steps, len(current.ends)) / len(current.ends))
        current, number = following, number + 1
