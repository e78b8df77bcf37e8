"""What it costs to open a cache and to read a little of it does not depend on how large the cache is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from counting_place import CountingPlace
from storage_fixtures import make_corpus, make_exact
from synthetic_cache import SyntheticCache

from tailcache.storage.local_place import LocalPlace
from tailcache.storage.reader import Teacher, open_cache

LENGTH = 3


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> LocalPlace:
    """A cache of one row and one shard."""
    folder = tmp_path_factory.mktemp("example")
    make_exact(make_corpus(folder, lengths=(LENGTH,)), shard_positions=1).write("t")
    return LocalPlace(folder)


def opened(example: LocalPlace, num_shards: int) -> tuple[Teacher, CountingPlace]:
    place = CountingPlace(SyntheticCache(example, num_shards))
    return open_cache(place).teacher("t"), place


def cost(example: LocalPlace, num_shards: int, row: int) -> tuple[list[str], int]:
    """What opening and reading one row asks for: the calls, and the bytes."""
    teacher, place = opened(example, num_shards)
    targets, rows = teacher.row(row), teacher.corpus.rows(row, row + 1)
    assert len(targets) == rows.supervised.sum() > 0
    return [method for method, _ in place.asked.calls], place.asked.num_bytes


def test_opening_and_reading_a_row_costs_the_same_for_any_number_of_shards(example: LocalPlace) -> None:
    few_calls, few_bytes = cost(example, 1000, 617)
    many_calls, many_bytes = cost(example, 1_000_000, 617_617)
    assert sorted(many_calls) == sorted(few_calls)
    assert len(many_calls) < 120
    # One chunk of each array of the corpus is larger where the array fills it; no more than that is read.
    assert many_bytes < few_bytes + 7 * 65_536 * 8
    assert not {"files", "folders"} & {*many_calls}


def test_reading_on_costs_no_records_again(example: LocalPlace) -> None:
    teacher, place = opened(example, 1_000_000)
    teacher.row(5)
    place.asked.clear()
    teacher.row(5)
    fields = len(teacher.layout.fields())
    assert [method for method, _ in place.asked.calls] == ["read_ranges"] * fields
    place.asked.clear()
    teacher.row(999_999)
    assert len(place.asked.names("read", "size")) == 1, "the shard's commit record"


def test_positions_are_found_without_reading_all_offsets(example: LocalPlace) -> None:
    teacher, _ = opened(example, 1_000_000)
    per_row = teacher.num_targets // 1_000_000
    wanted = np.random.default_rng(0).integers(0, teacher.num_targets, 9)
    found = teacher.positions(wanted)
    one = teacher.row(0)
    np.testing.assert_array_equal(found.token_ids, one.token_ids[wanted % per_row])
    np.testing.assert_array_equal(teacher.corpus.rows_of_targets(wanted), wanted // per_row)


def test_what_is_remembered_of_objects_is_bounded(example: LocalPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailcache.storage.reader._TABLE_MEMORY", 0)
    teacher, _ = opened(example, 1000)
    for row in range(100):
        teacher.row(row)
    assert len(teacher._tables) == 64


def test_rows_of_targets_equals_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some rows have no target, and where the offsets fill many chunks."""
    monkeypatch.setattr("tailcache.storage.corpus._CHUNK", 4)
    monkeypatch.setattr("tailcache.storage.corpus._SHARD", 8)
    corpus = make_corpus(tmp_path, lengths=(5, 1, 1, 9, 2, 1, 4, 1, 6, 3, 1, 1, 8, 2, 7, 1, 5, 5))
    offsets = corpus.target_offsets(0, corpus.num_rows)
    expected = np.repeat(np.arange(corpus.num_rows), np.diff(offsets))
    every = np.arange(corpus.num_targets)
    np.testing.assert_array_equal(corpus.rows_of_targets(every), expected)
    shuffled = np.random.default_rng(1).permutation(np.concatenate([every, every]))
    np.testing.assert_array_equal(corpus.rows_of_targets(shuffled), expected[shuffled])
    for position in every:
        assert corpus.rows_of_targets(np.array([position])) == expected[position]
    assert corpus.rows_of_targets(every[:0]).shape == (0,)
