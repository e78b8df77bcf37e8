"""The off-by-one, against loops that say what the definition says."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tailcache.storage.alignment import next_tokens, segment_ids, supervise_next, target_positions
from tailcache.storage.errors import DataError


@st.composite
def flat_rows(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Row offsets (empty rows too), document starts and wanted tokens."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(lambda found: sum(found) > 0))
    num = sum(lengths)
    flags = st.lists(st.booleans(), min_size=num, max_size=num)
    return np.concatenate([[0], np.cumsum(lengths)]), np.array(draw(flags)), np.array(draw(flags))


@given(flat_rows())
def test_supervise_next(case: tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]) -> None:
    offsets, starts, wanted = case
    expected = []
    for first, last in itertools.pairwise(offsets.tolist()):
        for t in range(first, last):
            expected.append(bool(t + 1 < last and wanted[t + 1] and not starts[t + 1]))
    found = supervise_next(wanted, offsets, starts)
    assert found.dtype == np.bool_
    assert found.tolist() == expected
    positions = target_positions(found)
    assert positions.tolist() == [t for t, flag in enumerate(expected) if flag]
    assert positions.dtype == np.int64
    tokens = np.arange(len(expected)) * 7
    assert next_tokens(tokens, positions).tolist() == [7 * (t + 1) for t in positions]


@given(flat_rows())
def test_segments(case: tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]) -> None:
    offsets, starts, _ = case
    expected, current = [], -1
    for first, last in itertools.pairwise(offsets.tolist()):
        for t in range(first, last):
            current += bool(t == first or starts[t])
            expected.append(current)
    before = starts.copy()
    assert segment_ids(starts, offsets).tolist() == expected
    assert (starts == before).all(), "the argument is left as it was"


def test_targets_never_cross_a_segment() -> None:
    offsets = np.array([0, 4, 8])
    starts = np.array([1, 0, 1, 0, 0, 0, 0, 1], np.bool_)
    found = supervise_next(np.ones(8, np.bool_), offsets, starts)
    assert found.tolist() == [True, False, True, False, True, True, False, False]
    segments = segment_ids(starts, offsets)
    positions = target_positions(found)
    assert (segments[positions] == segments[positions + 1]).all()


def test_lengths_must_agree() -> None:
    with pytest.raises(DataError, match="expected one flag per token, 3 of each; found 2 supervision flags and 3"):
        supervise_next(np.ones(2, np.bool_), np.array([0, 3]), np.ones(3, np.bool_))
