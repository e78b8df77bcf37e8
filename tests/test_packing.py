"""Packing loses nothing, keeps boundaries, and accounts for every position."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tailcache.pipeline.documents import Document
from tailcache.pipeline.packing import Packer, is_held_out
from tailcache.storage.errors import DataError


@dataclass
class Rows:
    """Keeps the rows it is given."""

    tokens: list[NDArray[np.int64]] = field(default_factory=list)
    starts: list[NDArray[np.bool_]] = field(default_factory=list)
    wanted: list[NDArray[np.bool_]] = field(default_factory=list)
    sides: list[bool] = field(default_factory=list)

    def append(
        self,
        tokens: NDArray[np.int64],
        document_start: NDArray[np.bool_],
        wanted: NDArray[np.bool_],
        *,
        held_out: bool,
    ) -> None:
        assert len(tokens) == len(document_start) == len(wanted) > 0
        self.tokens.append(tokens.copy())
        self.starts.append(document_start.copy())
        self.wanted.append(wanted.copy())
        self.sides.append(held_out)


def document(ids: Sequence[int], wanted: Sequence[bool] | None = None, starts: Sequence[int] = (0,)) -> Document:
    tokens = np.asarray(ids, dtype=np.int64)
    start = np.zeros(len(tokens), dtype=np.bool_)
    if len(tokens):
        start[list(starts)] = True
    flags = np.ones(len(tokens), dtype=np.bool_) if wanted is None else np.asarray(wanted, dtype=np.bool_)
    digest = hashlib.sha256(tokens.tobytes()).digest()
    return Document("here", digest, digest, tokens, start, flags)


def pack(
    documents: Sequence[Document],
    length: int,
    *,
    one_per_row: bool = False,
    overlong: Literal["split", "cut", "error"] = "split",
) -> tuple[Rows, Packer]:
    rows = Rows()
    packer = Packer(rows, length, one_per_row, overlong)
    for each in documents:
        packer.add(each)
    packer.finish()
    return rows, packer


@st.composite
def corpora(draw: st.DrawFn) -> list[Document]:
    made = []
    for _ in range(draw(st.integers(0, 12))):
        length = draw(st.integers(0, 25))
        ids = draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
        wanted = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        made.append(document(ids, wanted))
    return made


@given(corpora(), st.integers(2, 12), st.booleans())
def test_rows_are_the_documents_one_after_another(documents: list[Document], length: int, one_per_row: bool) -> None:
    rows, packer = pack(documents, length, one_per_row=one_per_row)
    full = [each for each in documents if len(each.tokens)]
    if not full:
        assert rows.tokens == []
        return
    assert np.array_equal(np.concatenate(rows.tokens), np.concatenate([each.tokens for each in full]))
    assert np.array_equal(np.concatenate(rows.wanted), np.concatenate([each.wanted for each in full]))
    assert np.array_equal(np.concatenate(rows.starts), np.concatenate([each.document_start for each in full]))
    assert all(len(row) <= length for row in rows.tokens)
    assert packer.counts.documents == len(full)
    if not one_per_row:
        assert all(len(row) == length for row in rows.tokens[:-1])


@given(corpora(), st.integers(2, 12), st.booleans(), st.sampled_from(["split", "cut"]))
def test_every_position_has_a_target_or_a_reason(
    documents: list[Document], length: int, one_per_row: bool, overlong: Literal["split", "cut"]
) -> None:
    rows, packer = pack(documents, length, one_per_row=one_per_row, overlong=overlong)
    counts = packer.counts
    stored = sum(len(row) for row in rows.tokens)
    assert counts.rows == len(rows.tokens)
    assert counts.tokens == stored
    assert stored + counts.cut_tokens == sum(len(each.tokens) for each in documents)
    targets = at_end = at_row_end = masked = 0
    flat_starts = [bool(flag) for row in rows.starts for flag in row]
    index = 0
    for starts, wanted in zip(rows.starts, rows.wanted, strict=True):
        for position in range(len(starts)):
            index += 1
            next_is_new = index == len(flat_starts) or flat_starts[index]
            if next_is_new:
                at_end += 1
            elif position == len(starts) - 1:
                at_row_end += 1
            elif wanted[position + 1]:
                targets += 1
            else:
                masked += 1
    assert (targets, at_end, at_row_end, masked) == (
        counts.target_positions,
        counts.at_document_end,
        counts.at_row_end,
        counts.next_not_supervised,
    )


@given(corpora(), st.integers(2, 12))
def test_one_per_row_never_mixes_documents(documents: list[Document], length: int) -> None:
    rows, _ = pack(documents, length, one_per_row=True)
    assert all(not starts[1:].any() for starts in rows.starts)
    assert sum(bool(starts[0]) for starts in rows.starts) == sum(len(each.tokens) > 0 for each in documents)


@given(corpora(), st.integers(2, 12), st.booleans())
def test_the_same_documents_give_the_same_rows(documents: list[Document], length: int, one_per_row: bool) -> None:
    first, _ = pack(documents, length, one_per_row=one_per_row)
    second, _ = pack(documents, length, one_per_row=one_per_row)
    assert [row.tolist() for row in first.tokens] == [row.tolist() for row in second.tokens]


def test_a_long_document_goes_on_without_a_start() -> None:
    rows, packer = pack([document(range(7)), document([8, 9])], 3)
    assert [row.tolist() for row in rows.tokens] == [[0, 1, 2], [3, 4, 5], [6, 8, 9]]
    assert [row.tolist() for row in rows.starts] == [[True, False, False], [False] * 3, [False, True, False]]
    assert packer.counts.split_documents == 1
    assert packer.counts.at_row_end == 2


def test_a_document_that_fits_exactly_is_not_split() -> None:
    rows, packer = pack([document(range(4)), document(range(4))], 4)
    assert [len(row) for row in rows.tokens] == [4, 4]
    assert (packer.counts.split_documents, packer.counts.at_row_end, packer.counts.at_document_end) == (0, 0, 2)


@pytest.mark.parametrize("one_per_row", [False, True])
def test_cutting_is_counted(one_per_row: bool) -> None:
    rows, packer = pack(
        [document(range(10)), document([1]), document(range(6))], 4, one_per_row=one_per_row, overlong="cut"
    )
    assert (packer.counts.cut_documents, packer.counts.cut_tokens) == (2, 8)
    assert np.concatenate(rows.tokens).tolist() == [0, 1, 2, 3, 1, 0, 1, 2, 3]


def test_an_overlong_document_can_be_an_error() -> None:
    with pytest.raises(DataError, match="here: expected at most 4 tokens, found 5"):
        pack([document(range(5))], 4, overlong="error")
    assert pack([document(range(4))], 4, overlong="error")[1].counts.rows == 1


def test_rows_with_several_documents_of_their_own() -> None:
    rows, packer = pack([document(range(6), starts=(0, 3))], 3, one_per_row=True)
    assert [row.tolist() for row in rows.starts] == [[True, False, False]] * 2
    assert (packer.counts.at_row_end, packer.counts.at_document_end, packer.counts.split_documents) == (0, 2, 0)


def test_a_row_without_targets_is_counted() -> None:
    _, packer = pack([document([1, 2], [True, False]), document([1])], 4, one_per_row=True)
    assert packer.counts.rows_without_target == 2


@given(st.binary(min_size=1, max_size=40), st.integers(0, 5), st.floats(0, 1))
def test_held_out_depends_on_content_seed_and_share_only(content: bytes, seed: int, share: float) -> None:
    digest = hashlib.sha256(content).digest()
    assert is_held_out(digest, share, seed) == is_held_out(digest, share, seed)
    assert not is_held_out(digest, 0.0, seed)
    if is_held_out(digest, share / 2, seed):
        assert is_held_out(digest, share, seed)


def test_held_out_has_the_share_asked_for_and_seeds_differ() -> None:
    digests = [hashlib.sha256(str(index).encode()).digest() for index in range(4000)]
    sides = np.array([[is_held_out(digest, 0.1, seed) for digest in digests] for seed in (0, 1)])
    assert np.allclose(sides.mean(axis=1), 0.1, atol=0.02)
    assert 0 < (sides[0] & sides[1]).mean() < 0.03
