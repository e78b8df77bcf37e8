"""Which rows of which corpora a derived cache has, in the order of the corpus they all come from.

Every row of a corpus that was derived knows its place in the **parent**: the corpus that was prepared from text, not
one that was itself derived. So parts of one corpus can be put together again, in any order and after any number of
steps.

Legend: R rows, N tokens, T target positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.errors import ConfigError, CorruptError, FormatError, MismatchError

__all__ = ["Selection", "Window", "select", "spans"]

_WINDOW_TOKENS = 1 << 15  # read at a time, about four chunks


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some rows of one corpus that are read together, and which of them are wanted."""

    source: int
    first: int
    """First row that is read, of the source."""
    last: int
    """One past the last."""
    wanted: NDArray[np.int64]
    """[R] rows of the source, ascending, within [first, last)."""
    where: NDArray[np.int64]
    """[R] which rows of what is being put together these are."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows of one or more corpora of one parent, in the parent's order."""

    corpora: tuple[Corpus, ...]
    source: NDArray[np.int64]
    """[R] which corpus each row is from."""
    row: NDArray[np.int64]
    """[R] which row of that corpus it is; ascending among rows of one corpus."""
    parent_row: NDArray[np.int64]
    """[R] its place in the parent; ascending."""
    parent: dict[str, Any]
    """Of the parent: ``hash``, ``num_rows`` and the ``report`` of how it was prepared."""
    described: dict[str, Any]
    """What was asked for, and how many rows of how many that is."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def whole(self) -> bool:
        """These are all the rows of the parent, so that the corpus is the parent itself."""
        return len(self) == int(self.parent["num_rows"])

    @property
    def unchanged(self) -> bool:
        """These are all the rows of the one corpus there is."""
        return len(self.corpora) == 1 and len(self) == self.corpora[0].num_rows

    @property
    def covers_its_corpora(self) -> bool:
        """No row of any of the corpora is left out."""
        return len(self) == sum(corpus.num_rows for corpus in self.corpora)

    def windows(self, first: int, last: int) -> Iterator[Window]:
        """What has to be read for rows ``first`` to ``last`` (half-open) of the selection, a bounded part at a time."""
        for source, corpus in enumerate(self.corpora):
            where = np.flatnonzero(self.source[first:last] == source)
            wanted = self.row[first:last][where]
            if len(wanted) == 0:
                continue
            step = max(1, _WINDOW_TOKENS * corpus.num_rows // corpus.num_tokens)
            cuts = np.flatnonzero(np.diff(wanted // step) > 0) + 1  # a chunk is decoded once, whatever is taken of it
            for rows, places in zip(np.split(wanted, cuts), np.split(where, cuts), strict=True):
                yield Window(source=source, first=int(rows[0]), last=int(rows[-1]) + 1, wanted=rows, where=places)

    def rows(self, first: int, last: int) -> Rows:
        """Rows ``first`` to ``last`` (half-open) of the selection, in order; ``row_indices`` are the parent's."""
        found = list(self.windows(first, last))
        read = [self.corpora[window.source].rows(window.first, window.last) for window in found]
        picked = [window.wanted - window.first for window in found]
        lengths = np.concatenate([np.diff(rows.offsets)[pick] for rows, pick in zip(read, picked, strict=True)])
        where = np.concatenate([window.where for window in found])
        ends = np.cumsum(lengths)
        order = np.argsort(where)
        tokens = spans((ends - lengths)[order], ends[order])

        def joined(name: str) -> NDArray[Any]:
            parts = [
                getattr(rows, name)[spans(rows.offsets[pick], rows.offsets[pick + 1])]
                for rows, pick in zip(read, picked, strict=True)
            ]
            return np.concatenate(parts)[tokens]

        return Rows(
            row_indices=self.parent_row[first:last],
            offsets=np.append(0, np.cumsum(lengths[order])),
            tokens=joined("tokens"),
            document_start=joined("document_start"),
            supervised=joined("supervised"),
            held_out=np.concatenate([rows.held_out[pick] for rows, pick in zip(read, picked, strict=True)])[order],
        )


def spans(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers from each start to each end (half-open), one after another."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def select(
    corpora: Sequence[Corpus], *, rows: tuple[int | None, int | None] | None = None, split: str = "all"
) -> Selection:
    """Choose rows.

    Args:
      corpora: one, or several with disjoint rows of one parent, which are put together.
      rows: first and one past the last, counted in what is put together; none at an end: from or to the end.
      split: "all", "train" or "held-out".

    Raises:
      MismatchError: corpora of different parents, or that have rows in common (says which).
      ConfigError: no row is chosen.

    Cost: 24 bytes of memory a row.
    """
    parents = [_parent(corpus) for corpus in corpora]
    for corpus, parent in zip(corpora[1:], parents[1:], strict=True):
        if parent["hash"] != parents[0]["hash"]:
            raise MismatchError(
                f"{corpus.place}: expected rows of the corpus {parents[0]['hash'][:12]}…, as {corpora[0].place} has, "
                f"found rows of {parent['hash'][:12]}…; only parts of one corpus can be merged"
            )
        if _tokenizer(corpus) != _tokenizer(corpora[0]):
            raise MismatchError(f"{corpus.place}: expected the tokenizer of {corpora[0].place}, found another one")
    places = [_places(corpus) for corpus in corpora]
    source = np.repeat(np.arange(len(corpora)), [len(place) for place in places])
    row, place = np.concatenate([np.arange(len(each)) for each in places]), np.concatenate(places)
    order = np.argsort(place, kind="stable")
    source, row, place = source[order], row[order], place[order]
    twice = np.flatnonzero(np.diff(place) == 0)
    if len(twice):
        at = int(twice[0])
        raise MismatchError(
            f"expected caches of disjoint rows, found row {place[at]} of the corpus {parents[0]['hash'][:12]}… in both "
            f"{corpora[source[at]].place} and {corpora[source[at + 1]].place} ({len(twice)} rows in all)"
        )
    chosen = np.zeros(len(row), np.bool_)
    first, last = rows or (None, None)
    chosen[_range(first, last, len(row))] = True
    if split != "all":
        held_out = [np.concatenate(list(corpus.stream("held_out"))) for corpus in corpora]
        of_row = np.concatenate(held_out)[order]
        chosen &= of_row if split == "held-out" else ~of_row
    if not chosen.any():
        raise ConfigError(f"expected some rows to be chosen, found none of {len(row)}")
    described = {"first": first or 0, "last": len(row) if last is None else last, "split": split}
    return Selection(
        corpora=tuple(corpora),
        source=source[chosen],
        row=row[chosen],
        parent_row=place[chosen],
        parent=parents[0],
        described={**described, "rows": int(chosen.sum()), "of": len(row)},
    )


def _range(first: int | None, last: int | None, num: int) -> slice:
    first, last = 0 if first is None else first, num if last is None else last
    if not 0 <= first < last <= num:
        raise ConfigError(f"rows: expected first < last within [0, {num}], found {first}:{last}")
    return slice(first, last)


def _parent(corpus: Corpus) -> dict[str, Any]:
    parent = corpus.parent
    if parent is None:
        return {"hash": corpus.hash, "num_rows": corpus.num_rows, "report": corpus.manifest["report"]}
    if not (
        isinstance(parent, dict)
        and isinstance(parent.get("hash"), str)
        and isinstance(parent.get("report"), dict)
        and type(parent.get("num_rows")) is int
        and parent["num_rows"] >= corpus.num_rows
    ):
        raise FormatError(f"{corpus.place}/manifest.json: 'parent': expected hash, num_rows and report, found others")
    return parent


def _places(corpus: Corpus) -> NDArray[np.int64]:
    if corpus.parent is None:
        return np.arange(corpus.num_rows)
    places = np.concatenate(list(corpus.stream("parent_rows")))
    if (np.diff(places, prepend=-1) < 1).any() or places[-1] >= corpus.parent["num_rows"]:
        raise CorruptError(f"{corpus.place}, parent_rows: expected rows of the parent, ascending, found others")
    return places


def _tokenizer(corpus: Corpus) -> Any:
    return corpus.manifest["tokenizer"].get("fingerprint")
