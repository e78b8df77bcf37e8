"""Rows are cut so that the teacher sees one document at a time, and every target is asked for once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from capture_fixtures import Part, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from tailcache.pipeline.segments import Batch, batch_segments
from tailcache.storage.corpus import Rows

PARTS = st.lists(
    st.tuples(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=9), st.booleans()),
    min_size=1,
    max_size=5,
)


def rows_of(drawn: list[list[tuple[list[tuple[int, bool]], bool]]]) -> Rows:
    """Only the first part of a row can continue a document."""
    return make_rows(
        [
            [
                Part([t for t, _ in part], starts=starts or i > 0, wanted=[w for _, w in part])
                for i, (part, starts) in enumerate(parts)
            ]
            for parts in drawn
        ]
    )


def prefix(rows: Rows, position: int) -> list[int]:
    """The tokens of a position's own document, within its row, up to it: by walking back."""
    begin = position
    while begin not in rows.offsets and not rows.document_start[begin]:
        begin -= 1
    return [int(token) for token in rows.tokens[begin : position + 1]]


@settings(max_examples=150, deadline=None)
@given(drawn=st.lists(PARTS, min_size=1, max_size=6), batch_positions=st.integers(1, 40))
def test_every_target_is_asked_for_once_after_exactly_its_own_document(
    drawn: list[list[tuple[list[tuple[int, bool]], bool]]], batch_positions: int
) -> None:
    rows = rows_of(drawn)
    positions = [i for i, s in enumerate(rows.supervised) if s]
    seen: list[int] = []
    lengths: list[int] = []
    for batch in batch_segments(rows, batch_positions):
        num, longest = batch.input_ids.shape
        assert num == 1 or batch.num_tokens <= batch_positions
        lengths.append(longest)
        used = np.zeros_like(batch.input_ids, dtype=bool)
        for b, place, following, target in zip(batch.segment, batch.place, batch.next_token, batch.target, strict=True):
            position = positions[target]
            assert batch.input_ids[b, : place + 1].tolist() == prefix(rows, position)
            assert following == rows.tokens[position + 1]
            used[b, : place + 1] = True
            seen.append(int(target))
        for b in range(num):
            own = int(used[b].sum())
            assert used[b, :own].all()
            assert (batch.input_ids[b, own:] == batch.input_ids[b, own - 1]).all(), "read beyond the last target"
        assert used[:, 0].all(), "a segment without targets was computed"
        assert used[:, -1].any(), "padded for nothing"
    assert sorted(seen) == list(range(len(positions)))
    assert lengths == sorted(lengths, reverse=True)


def test_a_continued_document_begins_anew_in_its_row() -> None:
    rows = make_rows([[Part([1, 2, 3])], [Part([4, 5], starts=False), Part([6, 7, 8])]])
    (batch,) = batch_segments(rows, 100)
    assert batch.input_ids.tolist() == [[1, 2], [6, 7], [4, 4]]
    assert batch.target.tolist() == [0, 1, 3, 4, 2]
    assert batch.next_token.tolist() == [2, 3, 7, 8, 5]


def test_nothing_to_do() -> None:
    single = make_rows([[Part([1])], [Part([2]), Part([3])]])
    unwanted = make_rows([[Part([1, 2, 3], wanted=[True, False, False])]])
    assert list(batch_segments(single, 10)) == []
    assert list(batch_segments(unwanted, 10)) == []


@pytest.mark.parametrize("batch_positions", [1, 7, 30])
def test_deterministic(batch_positions: int) -> None:
    generator = np.random.default_rng(0)
    rows = make_rows([[Part(generator.integers(1, 9, n)) for n in generator.integers(1, 7, 3)] for _ in range(5)])

    def flat(batches: list[Batch]) -> list[object]:
        return [getattr(b, f.name).tolist() for b in batches for f in dataclasses.fields(b)]

    assert flat(list(batch_segments(rows, batch_positions))) == flat(list(batch_segments(rows, batch_positions)))


def test_a_segment_longer_than_a_batch_goes_alone() -> None:
    rows = make_rows([[Part(list(range(1, 30)))], [Part([1, 2, 3]), Part([4, 5, 6])]])
    assert [b.input_ids.shape for b in batch_segments(rows, 8)] == [(1, 28), (2, 2)]
