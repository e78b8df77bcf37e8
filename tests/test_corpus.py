"""The corpus store: what is appended comes back, nothing half-written is seen, bad rows are named."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import MODES, Killed, failing_at, killed_at
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_fixtures import FINISH, TOKENIZER_FILES, append_rows, make_corpus, make_rows, speed_up, tree

from tailcache.storage import corpus as corpus_module
from tailcache.storage.arrays import ArraySpec
from tailcache.storage.corpus import Corpus
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.errors import (
    CorruptError,
    DataError,
    FormatError,
    IncompleteError,
    MismatchError,
    NotFoundError,
    StorageError,
)
from tailcache.storage.reader import open_cache
from tailcache.storage.sealed import seal, unseal
from tailcache.storage.verify import verify


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


@pytest.fixture
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of 16 elements in chunks of 4, so that a few rows fill several."""
    monkeypatch.setattr(corpus_module, "_SHARD", 16)
    monkeypatch.setattr(corpus_module, "_CHUNK", 4)
    monkeypatch.setattr(corpus_module, "_BLOCK", 8)


def check(corpus: Corpus, vocab_size: int, lengths: tuple[int, ...], seed: int) -> None:
    """The corpus against a plain list of rows."""
    expected = make_rows(vocab_size, lengths, seed)
    assert corpus.num_rows == len(expected)
    assert corpus.num_tokens == sum(len(row.tokens) for row in expected)
    targets = 0
    for r, row in enumerate(expected):
        found = corpus.rows(r, r + 1)
        np.testing.assert_array_equal(found.tokens, row.tokens)
        np.testing.assert_array_equal(found.document_start, row.document_start)
        supervised = [
            bool(t + 1 < len(row.tokens) and row.wanted[t + 1] and not row.document_start[t + 1])
            for t in range(len(row.tokens))
        ]
        assert found.supervised.tolist() == supervised
        assert found.held_out.tolist() == [row.held_out]
        assert corpus.target_offsets(r, r + 1).tolist() == [targets, targets + sum(supervised)]
        targets += sum(supervised)
    assert corpus.num_targets == targets
    assert corpus.held_out_rows().tolist() == [r for r, row in enumerate(expected) if row.held_out]
    assert corpus.train_rows().tolist() == [r for r, row in enumerate(expected) if not row.held_out]
    tokens = np.concatenate([row.tokens for row in expected])
    np.testing.assert_array_equal(corpus.token_counts, np.bincount(tokens, minlength=vocab_size))
    whole = corpus.rows(0, corpus.num_rows)
    np.testing.assert_array_equal(whole.tokens, tokens)
    part = whole.slice(1, 3)
    alone = corpus.rows(1, 3)
    for name, values in vars(part).items():
        np.testing.assert_array_equal(values, getattr(alone, name))
    assert len(part) == 2


LENGTHS = (9, 1, 12, 7, 2, 11, 5, 16, 8, 40)


@pytest.mark.parametrize("vocab_size", [37, 65_536, 65_537, 262_144])
def test_what_is_appended_comes_back(tmp_path: Path, vocab_size: int) -> None:
    corpus = make_corpus(tmp_path, vocab_size=vocab_size, lengths=LENGTHS, seed=4)
    check(corpus, vocab_size, LENGTHS, 4)
    check(open_cache(tmp_path).corpus, vocab_size, LENGTHS, 4)
    assert (corpus.tokenizer_dir / "tokenizer.json").read_bytes() == TOKENIZER_FILES["tokenizer.json"]
    assert corpus.manifest["source"] == FINISH["source"]


@pytest.mark.slow
@pytest.mark.usefixtures("_small_shards")
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=3, max_size=12), seed=st.integers(0, 99))
def test_many_small_objects(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int) -> None:
    path = tmp_path_factory.mktemp("cache")
    lengths[0] = 12
    corpus = make_corpus(path, lengths=tuple(lengths), seed=seed)
    check(corpus, 37, tuple(lengths), seed)
    assert len(list((path / "corpus/tokens/c").iterdir())) == -(-sum(lengths) // 16)
    assert verify(path) == []


def test_the_hash_is_of_the_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_corpus(tmp_path / "a")
    again = make_corpus(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b"), "same input, same bytes"
    monkeypatch.setattr(corpus_module, "_SHARD", 16)
    monkeypatch.setattr(corpus_module, "_CHUNK", 4)
    resharded = make_corpus(tmp_path / "c")
    assert first.hash == again.hash == resharded.hash
    others = {
        make_corpus(tmp_path / "d", seed=1).hash,
        make_corpus(tmp_path / "e", vocab_size=38).hash,
        make_corpus(tmp_path / "f", lengths=(9, 1, 12, 7, 2, 11, 5, 1, 8, 5)).hash,
        first.hash,
    }
    assert len(others) == 4


def write_without_cleaning_up(cache: Path, lengths: tuple[int, ...]) -> None:
    """A process that is killed deletes nothing; the operating system only lets go of its lock."""
    writer = CorpusWriter(cache, vocab_size=37)
    try:
        append_rows(writer, make_rows(37, lengths))
        writer.finish(**FINISH)
    finally:
        writer._close()


@pytest.mark.usefixtures("_small_shards")
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_write(tmp_path: Path, mode: str) -> None:
    lengths = (9, 1, 12)
    make_corpus(tmp_path / "whole", lengths=lengths)
    expected = tree(tmp_path / "whole")
    with killed_at(-1, mode) as counter:
        make_corpus(tmp_path / "counted", lengths=lengths)
    cache = tmp_path / "cache"
    for number in range(counter.count):
        with pytest.raises(Killed), killed_at(number, mode):
            write_without_cleaning_up(cache, lengths)
        if (cache / "corpus").exists():
            check(open_cache(cache).corpus, 37, lengths, 0)
            assert (number, mode) in [(counter.count - 1, "after")]
            break
        with pytest.raises((IncompleteError, NotFoundError)):
            open_cache(cache)
        if number % 5 == 0:
            make_corpus(cache, lengths=lengths)
            assert tree(cache) == expected
            (cache / "corpus").rename(tmp_path / f"done{number}")
    else:
        make_corpus(cache, lengths=lengths)
    assert tree(cache) == expected


@pytest.mark.usefixtures("_small_shards")
def test_disk_full_at_every_write(tmp_path: Path) -> None:
    lengths = (9, 1, 12)
    with failing_at(-1) as counter:
        make_corpus(tmp_path / "whole", lengths=lengths)
    (tmp_path / "cache").mkdir()
    for number in range(counter.count - 4):
        with pytest.raises(StorageError) as caught, failing_at(number):
            make_corpus(tmp_path / "cache", lengths=lengths)
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path / "cache") in str(caught.value)
        assert tree(tmp_path / "cache") == {}, "what was written is cleaned up"
    make_corpus(tmp_path / "cache", lengths=lengths)
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_an_error_while_appending_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 10"), CorpusWriter(tmp_path, vocab_size=37) as writer:
        append_rows(writer, [*make_rows(37), *make_rows(99999)])
    assert tree(tmp_path) == {}
    with pytest.raises(NotFoundError):
        open_cache(tmp_path)


def test_two_writers_and_a_second_corpus_are_refused(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path, vocab_size=37) as writer:
        append_rows(writer, make_rows(37))
        with pytest.raises(MismatchError, match="another process is writing there"):
            CorpusWriter(tmp_path, vocab_size=37)
        with pytest.raises(IncompleteError, match="never finished"):
            open_cache(tmp_path)
        writer.finish(**FINISH)
    check(open_cache(tmp_path).corpus, 37, (9, 1, 12, 7, 2, 11, 5, 1, 8, 6), 0)
    before = tree(tmp_path)
    with pytest.raises(MismatchError, match="there is a corpus already"):
        CorpusWriter(tmp_path, vocab_size=37)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": [1, 2, 37]}, "row 1, token 2: expected an id from 0 to 36, found 37"),
        ({"tokens": [-1, 2, 3]}, "row 1, token 0: expected an id from 0 to 36, found -1"),
        ({"tokens": []}, "row 1: expected a non-empty list"),
        ({"tokens": [1.0, 2.0, 3.0]}, "row 1: expected a non-empty list of integer"),
        ({"tokens": [[1, 2, 3]]}, "row 1: expected a non-empty list"),
        ({"wanted": [True]}, "row 1: expected one flag of each kind per token, 3"),
        ({"document_start": [True] * 4}, "row 1: expected one flag of each kind per token, 3"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"tokens": [1, 2, 3], "document_start": [True, False, False], "wanted": [True] * 3}
    with CorpusWriter(tmp_path, vocab_size=37) as writer:
        arrays = {name: np.array(values) for name, values in good.items()}
        writer.append(**arrays, held_out=False)
        broken = {name: np.array(values) for name, values in {**good, **changed}.items()}
        with pytest.raises(DataError, match=message):
            writer.append(**broken, held_out=False)
        writer.append(**arrays, held_out=False)
        corpus = writer.finish(**FINISH)
    assert corpus.rows(0, corpus.num_rows).tokens.tolist() == [1, 2, 3, 1, 2, 3]
    assert verify(tmp_path) == []


def test_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    for rows in ([], make_rows(37, (1, 1, 1))):
        with CorpusWriter(tmp_path, vocab_size=37) as writer:
            append_rows(writer, rows)
            with pytest.raises(DataError, match="at least one position with a target"):
                writer.finish(**FINISH)
    for vocab_size in (0, (1 << 31) + 1):
        with pytest.raises(DataError, match="vocabulary size"):
            CorpusWriter(tmp_path, vocab_size=vocab_size)
    assert tree(tmp_path) == {}


def test_other_formats_are_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    path = tmp_path / "corpus" / "manifest.json"
    record = unseal(path.read_bytes(), "manifest")
    for changed, message in (({"format": "x"}, "found 'x'"), ({"format_version": 9}, "version 1, found 9")):
        path.write_bytes(seal({**record, **changed}))
        with pytest.raises(FormatError, match=message):
            open_cache(tmp_path)
    path.unlink()
    with pytest.raises(CorruptError, match=r"manifest.json: missing"):
        open_cache(tmp_path)


@pytest.mark.usefixtures("_small_shards")
def test_exchanged_objects_of_one_array(tmp_path: Path) -> None:
    make_corpus(tmp_path, lengths=(40, 40))
    one, other = (tmp_path / "corpus/tokens/c" / name for name in "12")
    a, b = one.read_bytes(), other.read_bytes()
    assert len(a) == len(b), "the case that sizes do not tell"
    one.write_bytes(b)
    other.write_bytes(a)
    corpus = open_cache(tmp_path).corpus
    with pytest.raises(CorruptError, match="tokens/c/1: not the object that was written there"):
        corpus.rows(0, 1)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column never holds more than a shard and a row."""
    monkeypatch.setattr(corpus_module, "_SHARD", 64)
    monkeypatch.setattr(corpus_module, "_CHUNK", 64)
    monkeypatch.setattr(ArraySpec, "encode", lambda spec, values: bytes(100))
    with CorpusWriter(tmp_path, vocab_size=37) as writer:
        for row in make_rows(37, (30,) * 200):
            writer.append(row.tokens, row.document_start, row.wanted, held_out=False)
            assert max(column.buffered for column in writer._columns.values()) < 64
