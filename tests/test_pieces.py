"""Rows of several arrays: what a copy of them would be, and what is decoded of them without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_decode_loops import bits, codec_of, stored_of

from tailcache.storage.compiled import SWITCH
from tailcache.storage.errors import CorruptError
from tailcache.storage.pieces import Piece, Span, arrays_of, pieces_of


def cut(
    blocks: list[dict[str, NDArray[Any]]], rows: list[list[tuple[int, int]]], seed: int = 0
) -> tuple[list[Piece], list[tuple[int, int, int]]]:
    """Some rows of each block, in any order: pieces, and of each row of the result the block, start and length."""
    flat = [(b, start, length) for b, some in enumerate(rows) for start, length in some]
    order = np.random.default_rng(seed).permutation(len(flat))
    ends = np.cumsum([flat[i][2] for i in order])
    places = np.empty(len(flat), np.int64)
    places[order] = ends - [flat[i][2] for i in order]
    pieces = []
    for b, fields in enumerate(blocks):
        starts, lengths = np.array(rows[b], np.int64).reshape(-1, 2).T
        here = places[[i for i, row in enumerate(flat) if row[0] == b]]
        pieces.append(Piece(fields, Span(starts.copy(), lengths.copy(), here, int(lengths.sum()))))
    return pieces, [flat[i] for i in order]


ROWS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(ROWS, min_size=1, max_size=4),
    columns=st.sampled_from([0, 1, 3]),
    by_column=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("switch", ["never", "always"])
def test_joined(switch: str, parts: list[list[tuple[int, int]]], columns: int, by_column: bool, seed: int) -> None:
    if switch == "always":
        pytest.importorskip("numba")
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 1000, (30, columns) if columns else 30) for _ in parts]
    laid = [np.asfortranarray(each) if by_column else each for each in arrays]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, switch)
        made, order = cut([{"a": values, "b": values * 2} for values in laid], parts, seed)
        found = arrays_of(made, ["a", "b", "c"])
    expected = [arrays[i][a : a + n] for i, a, n in order]
    assert list(found) == ["a", "b"]
    assert (found["a"] == np.concatenate(expected)).all()
    assert (found["b"] == 2 * found["a"]).all()
    assert all(each.flags.f_contiguous if by_column and columns else each.flags.c_contiguous for each in found.values())


def test_arrays_are_the_only_piece() -> None:
    values = np.arange(12).reshape(4, 3)
    fields = {"a": values, "b": values[:, 0]}
    whole = pieces_of(fields)
    assert pieces_of(whole) is whole
    assert [piece.span.total for piece in whole] == [4]
    for name in fields:
        assert (arrays_of(whole, [name])[name] == fields[name]).all()
        assert arrays_of(fields, [name, "c"])[name] is fields[name]
    assert arrays_of(whole, ["c"]) == {}


@pytest.mark.parametrize("switch", ["never", "always"])
@pytest.mark.parametrize("by_column", [False, True])
def test_rows_of_several_blocks_are_decoded_where_they_lie(
    monkeypatch: pytest.MonkeyPatch, switch: str, by_column: bool
) -> None:
    if switch == "always":
        pytest.importorskip("numba")
    monkeypatch.setenv(SWITCH, switch)
    codec = codec_of(300, 4, 32, 16)
    blocks = [stored_of(codec, num, 12, 6, 300, 4, seed=num) for num in (90, 70, 100)]
    if not by_column:
        blocks = [{name: np.ascontiguousarray(values) for name, values in block.items()} for block in blocks]
    rows = [[(0, 40), (88, 2), (50, 0)], [(3, 67)], [(60, 33), (0, 1), (99, 1)]]
    pieces, order = cut(blocks, rows)
    assert [i for i, _, _ in order] != sorted(i for i, _, _ in order)  # a block's rows are not together in the result
    copied = {name: np.concatenate([blocks[i][name][a : a + n] for i, a, n in order]) for name in blocks[0]}
    assert bits(codec.decode(pieces)) == bits(codec.decode(copied))


def test_a_code_that_is_wrong_in_the_middle_of_a_piece_is_found() -> None:
    codec = codec_of(300, 4, 32, 16)
    block = stored_of(codec, 50, 12, 6, 300, 4, seed=1)
    good, _ = cut([block], [[(0, 20), (30, 20)]])
    codec.decode(good)
    block["token_codes"][25, 3] = 40_000  # between the rows: nobody's
    codec.decode(good)
    block["token_codes"][35, 3] = 40_000
    with pytest.raises(CorruptError, match=r"shard 7, token_codes: expected codes from 0 to 331, found .*40"):
        codec.decode(good, "shard 7")
