"""Lay documents out in rows, keeping their boundaries, and count everything that happens to them.

    packed         A A A A A | A A B B C | C C C      rows are full except the last; a document that does
                   ^               ^   ^              not fit continues in the next row (^ document starts)
    one-per-row    A A A A A | A A | B B | C C C C    each document begins its own row

Nothing is lost: the rows of one side, read one after another, are its documents one after another, less what
`overlong="cut"` cuts and counts. The held-out side has its own packer, so that no row mixes the two.

Legend: n tokens of a document or row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tailcache.pipeline.documents import Document
from tailcache.storage.alignment import supervise_next
from tailcache.storage.errors import DataError

__all__ = ["Packer", "PackingCounts", "RowSink", "is_held_out"]


class RowSink(Protocol):
    """Where finished rows go: the corpus writer, or a list in a test."""

    def append(
        self,
        tokens: NDArray[np.int64],
        document_start: NDArray[np.bool_],
        wanted: NDArray[np.bool_],
        *,
        held_out: bool,
    ) -> None:
        """Take one row."""
        ...


@dataclass
class PackingCounts:
    """What became of one side's documents. Every stored position has a target or a reason why not.

    tokens = target_positions + at_document_end + at_row_end + next_not_supervised
    """

    documents: int = 0
    """documents with at least one token"""
    rows: int = 0
    """rows written"""
    tokens: int = 0
    """tokens stored"""
    target_positions: int = 0
    """positions with a target"""
    at_document_end: int = 0
    """positions without a target: the last token of a document"""
    at_row_end: int = 0
    """positions without a target: the document goes on in another row"""
    next_not_supervised: int = 0
    """positions without a target: the next token is not supervised (a prompt, a mask)"""
    rows_without_target: int = 0
    """rows in which no position has a target"""
    split_documents: int = 0
    """documents that span several rows"""
    cut_documents: int = 0
    """documents longer than a row that were cut (--overlong cut)"""
    cut_tokens: int = 0
    """tokens not stored because their document was cut"""

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {each.name: int(getattr(self, each.name)) for each in fields(self)}


def is_held_out(content_hash: bytes, share: float, seed: int) -> bool:
    """Whether a document is for evaluation: decided by its content, so that copies are on the same side.

    Args:
      content_hash: sha256 of the document's content.
      share: the expected share of documents, 0 to 1.
      seed: another seed draws another share.
    """
    drawn = hashlib.blake2b(content_hash, digest_size=8, key=f"held-out {seed}".encode("ascii"))
    return int.from_bytes(drawn.digest(), "big") < share * 2.0**64


@dataclass
class Packer:
    """Lays the documents of one side out in rows.

    Attributes:
      sink: takes the finished rows.
      context_length: most tokens in a row.
      one_per_row: each document begins its own row.
      overlong: what becomes of a document longer than a row.
      held_out: which side this is.
      counts: what has happened so far.
    """

    sink: RowSink
    context_length: int
    one_per_row: bool = False
    overlong: Literal["split", "cut", "error"] = "split"
    held_out: bool = False
    counts: PackingCounts = field(default_factory=PackingCounts)
    _pieces: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = field(default_factory=list)
    _filled: int = 0

    def add(self, document: Document) -> None:
        """Lay out one document; full rows go to the sink at once.

        Raises:
          DataError: it is longer than a row and `overlong` is "error".
        """
        tokens, start, wanted = document.tokens, document.document_start, document.wanted
        if len(tokens) > self.context_length and self.overlong != "split":
            if self.overlong == "error":
                raise DataError(
                    f"{document.where}: expected at most {self.context_length} tokens, found {len(tokens)}; "
                    "raise --context-length, or choose --overlong split or cut"
                )
            self.counts.cut_documents += 1
            self.counts.cut_tokens += len(tokens) - self.context_length
            kept = slice(0, self.context_length)
            tokens, start, wanted = tokens[kept], start[kept], wanted[kept]
        if len(tokens) == 0:
            return
        self.counts.documents += 1
        at, was_split = 0, False
        while at < len(tokens):
            taken = slice(at, at + self.context_length - self._filled)
            self._pieces.append((tokens[taken], start[taken], wanted[taken]))
            num_taken = len(tokens[taken])
            self._filled += num_taken
            at += num_taken
            if at < len(tokens):
                goes_on = not start[at]
                was_split |= goes_on
                self._flush(goes_on=goes_on)
            elif self.one_per_row or self._filled == self.context_length:
                self._flush(goes_on=False)
        self.counts.split_documents += was_split

    def finish(self) -> None:
        """Write the last row, however short."""
        if self._filled:
            self._flush(goes_on=False)

    def _flush(self, *, goes_on: bool) -> None:
        """Hand over the row at hand.

        Args:
          goes_on: its last document continues in the next row.
        """
        tokens, start, wanted = (np.concatenate(parts) for parts in zip(*self._pieces, strict=True))
        self._pieces, self._filled = [], 0
        self.sink.append(tokens, start, wanted, held_out=self.held_out)
        num_targets = int(supervise_next(wanted, np.array([0, len(tokens)]), start).sum())
        num_ends = int(start[1:].sum()) + (not goes_on)
        self.counts.rows += 1
        self.counts.tokens += len(tokens)
        self.counts.target_positions += num_targets
        self.counts.at_document_end += num_ends
        self.counts.at_row_end += goes_on
        self.counts.next_not_supervised += len(tokens) - num_targets - num_ends - goes_on
        self.counts.rows_without_target += num_targets == 0
