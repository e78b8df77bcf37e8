"""Reading a capture that has not finished: a prefix of it that never changes, or waiting for its end."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from capture_fixtures import pack, random_documents, save_teacher, tiny_model, write_corpus
from children import Child
from hypothesis import given, settings
from hypothesis import strategies as st
from places import cache_folder
from storage_fixtures import Exact, make_corpus, make_exact, speed_up

from tailcache.storage.codec import Targets
from tailcache.storage.errors import ConfigError, CorruptError, IncompleteError, NotFoundError
from tailcache.storage.layout import commit_path
from tailcache.storage.reader import Cache, Teacher, open_cache
from tailcache.storage.targets import TargetsWriter


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


def same(a: Targets, b: Targets) -> None:
    for field in fields(Targets):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    """A finished capture, for tests that only read; prefixes of it are made by leaving commits out."""
    exact = make_exact(make_corpus(tmp_path_factory.mktemp("finished")), shard_positions=8)
    exact.write("t")
    assert exact.layout.num_shards == 5
    return exact


def unfinished(exact: Exact, folder: Path, committed: list[int]) -> Cache:
    """The capture as it was when only some shards were committed."""
    shutil.copytree(cache_folder(exact.corpus) / "corpus", folder / "corpus")
    cache = open_cache(folder)
    with TargetsWriter(cache.corpus, "t", layout=exact.layout, settings={"seed": 1}) as writer:
        for shard in writer.shards():
            writer.write_shard(shard, *exact.shards[shard])
            if shard == max([*committed, 0]):
                break
    for shard in set(range(exact.layout.num_shards)) - set(committed):
        (folder / "teachers" / "t" / commit_path(shard)).unlink(missing_ok=True)
    return cache


def test_an_unfinished_capture_is_refused_unless_a_prefix_is_asked_for(finished: Exact, tmp_path: Path) -> None:
    cache = unfinished(finished, tmp_path, [0, 1])
    with pytest.raises(IncompleteError, match=r"has not finished.*--unfinished prefix.*--unfinished wait"):
        cache.teacher("t")
    assert cache.teacher("t", unfinished="prefix").num_shards == 2


def test_a_prefix_gives_what_the_whole_gives(finished: Exact, tmp_path: Path) -> None:
    cache = unfinished(finished, tmp_path, [0, 1, 3])
    prefix, whole = cache.teacher("t", unfinished="prefix"), open_cache(cache_folder(finished.corpus)).teacher("t")
    assert (prefix.is_prefix, prefix.num_shards) == (True, 2)
    assert prefix.num_rows == 2 * finished.layout.rows_per_shard
    assert prefix.num_targets == finished.corpus.target_offsets(0, prefix.num_rows)[-1]
    assert (whole.is_prefix, whole.num_shards, whole.num_rows) == (False, 5, 10)
    same(prefix.rows(0, prefix.num_rows), whole.rows(0, prefix.num_rows))
    some = np.arange(prefix.num_targets)[::-1]
    same(prefix.positions(some), whole.positions(some))
    seen = sorted(int(rows.row_indices[0]) for rows, _ in prefix.stream(seed=1))
    assert seen == list(range(prefix.num_rows))
    assert set(prefix.train_rows()) | set(prefix.held_out_rows()) == set(range(prefix.num_rows))
    assert set(whole.train_rows()) == set(finished.corpus.train_rows())


def test_beyond_a_prefix_is_an_error_that_says_so(finished: Exact, tmp_path: Path) -> None:
    prefix = unfinished(finished, tmp_path, [0, 1]).teacher("t", unfinished="prefix")
    of = rf"first 2 of {finished.layout.num_shards} shards"
    for call in (
        lambda: prefix.rows(0, prefix.num_rows + 1),
        lambda: prefix.row(prefix.num_rows),
        lambda: prefix.positions(np.array([0, prefix.num_targets])),
        lambda: list(prefix.stream(seed=0, rows=np.array([0, finished.corpus.num_rows - 1]))),
    ):
        with pytest.raises(IncompleteError, match=of):
            call()
    with pytest.raises(NotFoundError):
        prefix.rows(0, finished.corpus.num_rows + 1)
    with pytest.raises(NotFoundError):
        prefix.positions(np.array([-1]))


def test_no_prefix_yet(finished: Exact, tmp_path: Path) -> None:
    cache = unfinished(finished, tmp_path, [1, 2])
    with pytest.raises(IncompleteError, match=r"at least the first shard.*found 0 without a gap, and 2 in all"):
        cache.teacher("t", unfinished="prefix")
    (tmp_path / "teachers" / "u" / "claims").mkdir(parents=True)
    (tmp_path / "teachers" / "u" / "claims" / "00000000").touch()
    with pytest.raises(IncompleteError, match="before the first shard"):
        cache.teacher("u", unfinished="prefix")
    for kind in ("prefix", "wait"):
        with pytest.raises(NotFoundError):
            cache.teacher("nobody", unfinished=kind)
    with pytest.raises(ConfigError, match="expected 1 to"):
        cache.teacher("t", num_shards=0)
    with pytest.raises(IncompleteError, match="the first 3 shards"):
        cache.teacher("t", num_shards=3)


def test_a_prefix_is_known_by_its_hash_also_when_the_capture_has_finished(finished: Exact, tmp_path: Path) -> None:
    cache = unfinished(finished, tmp_path, [0, 1])
    prefix = cache.teacher("t", unfinished="prefix")
    first = prefix.hash
    same_settings = Exact(cache.corpus, finished.layout, finished.logprobs, finished.targets, finished.shards)
    same_settings.write("t")
    assert prefix.hash == first
    assert cache.teacher("t", num_shards=2).hash == first
    whole = cache.teacher("t")
    assert len({first, whole.hash, cache.teacher("t", num_shards=1).hash}) == 3
    assert whole.hash == open_cache(cache_folder(finished.corpus)).teacher("t").hash
    again = cache.teacher("t", num_shards=2)
    assert (again.num_rows, again.num_targets) == (prefix.num_rows, prefix.num_targets)
    with pytest.raises(IncompleteError, match="finished meanwhile"):
        again.mean_tail  # noqa: B018
    (tmp_path / "teachers" / "t" / commit_path(1)).unlink()
    with pytest.raises(CorruptError, match="commit record is missing"):
        cache.teacher("t", num_shards=2).hash  # noqa: B018


def test_the_mean_tail_of_a_prefix_is_that_of_its_positions(finished: Exact, tmp_path: Path) -> None:
    prefix = unfinished(finished, tmp_path, [0, 1, 2]).teacher("t", unfinished="prefix")
    total = sum(tail for _, tail in finished.shards[:3])
    np.testing.assert_allclose(prefix.mean_tail, total / np.sum(total), rtol=1e-6)
    (tmp_path / "teachers" / "t" / "partial" / "tail_sum-00000001.bin").write_bytes(b"")
    with pytest.raises(CorruptError, match="tail_sum-00000001"):
        Teacher(prefix.corpus, "t", unfinished="prefix").mean_tail  # noqa: B018


def test_waiting_ends_when_the_capture_does(finished: Exact, tmp_path: Path) -> None:
    cache = unfinished(finished, tmp_path, [])
    exact = Exact(cache.corpus, finished.layout, finished.logprobs, finished.targets, finished.shards)
    seen: list[tuple[int, int]] = []

    def write() -> None:
        time.sleep(0.3)
        exact.write("t")

    writer = threading.Thread(target=write)
    writer.start()
    teacher = cache.teacher("t", unfinished="wait", timeout_s=100, progress=lambda done, of: seen.append((done, of)))
    writer.join()
    assert not teacher.is_prefix
    assert seen
    assert seen == sorted(seen)
    assert len(cache.teacher("t", unfinished="wait").rows(0, 10)) == finished.corpus.num_targets


def test_waiting_has_an_end_of_its_own(finished: Exact, tmp_path: Path) -> None:
    cache = unfinished(finished, tmp_path, [0, 2])
    with pytest.raises(IncompleteError, match=r"not finished after 0.2 seconds: 1 of \d+ shards are committed"):
        cache.teacher("t", unfinished="wait", timeout_s=0.2)


@given(st.permutations(range(5)))
@settings(max_examples=24, deadline=None)
def test_any_order_of_commits_shows_a_growing_prefix(finished: Exact, order: list[int]) -> None:
    """Commit records appear one by one, in any order: what is open stays as it is, what is opened is consistent."""
    folder = cache_folder(finished.corpus) / "teachers" / "t"
    whole = open_cache(cache_folder(finished.corpus)).teacher("t")
    kept = {name: (folder / name).read_bytes() for name in ("complete.json", *map(commit_path, range(5)))}
    expected = whole.rows(0, whole.num_rows)
    (folder / "complete.json").unlink()
    for shard in range(whole.num_shards):
        (folder / commit_path(shard)).rename(folder / f"{shard}.kept")
    try:
        opened: list[Teacher] = []
        for number, shard in enumerate(order):
            (folder / f"{shard}.kept").rename(folder / commit_path(shard))
            size = next(i for i in range(6) if i not in order[: number + 1])
            if size:
                opened.append(open_cache(cache_folder(finished.corpus)).teacher("t", unfinished="prefix"))
                assert opened[-1].num_shards == size
            for teacher in opened:
                same(teacher.rows(0, teacher.num_rows), expected[: teacher.num_targets])
    finally:
        for left in folder.glob("*.kept"):
            left.rename(folder / commit_path(int(left.stem)))
        for name, data in kept.items():
            (folder / name).write_bytes(data)


SLOW_CAPTURE = """
import sys, time
from tailcache.pipeline import rows
from tailcache.scripts import cli
batch_segments = rows.batch_segments
def slowly(*arguments):
    for batch in batch_segments(*arguments):
        time.sleep(0.05)
        yield batch
rows.batch_segments = slowly
sys.exit(cli.main(["capture", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_readers_while_real_captures_write(tmp_path: Path) -> None:
    """Two processes capture together, slowly, while this one opens prefixes again and again and keeps them all."""
    cache_path, vocab_size = tmp_path / "cache", 100
    write_corpus(cache_path, pack(random_documents(80, vocab_size=vocab_size, seed=1), 2), vocab_size=vocab_size)
    model = save_teacher(tmp_path / "model", tiny_model("llama", vocab_size))
    flags = ["--cache", str(cache_path), "--teacher", model, "--name", "t", "--top-k", "8", "--num-samples", "4"]
    flags += ["--device", "cpu", "--batch-positions", "64", "--shard-positions", "30", "--chunk-positions", "16"]
    captures = [Child(SLOW_CAPTURE, *flags) for _ in range(2)]
    held: dict[int, tuple[Teacher, Targets, str]] = {}
    try:
        while any(capture.poll() is None for capture in captures):
            try:
                teacher = open_cache(cache_path).teacher("t", unfinished="prefix")
            except (IncompleteError, NotFoundError):
                time.sleep(0.05)
                continue
            assert teacher.num_shards >= max(held, default=0)
            targets = teacher.rows(0, teacher.num_rows)
            assert len(targets) == teacher.num_targets
            if teacher.is_prefix:
                held.setdefault(teacher.num_shards, (teacher, targets, teacher.hash))
    finally:
        statuses = [capture.wait() for capture in captures]
    assert statuses == [0, 0]
    whole = open_cache(cache_path).teacher("t", unfinished="wait", timeout_s=60)
    expected = whole.rows(0, whole.num_rows)
    assert len(held) > 3
    for number, (teacher, targets, first_hash) in held.items():
        same(targets, expected[: len(targets)])
        same(teacher.rows(0, teacher.num_rows), targets)
        assert open_cache(cache_path).teacher("t", num_shards=number).hash == first_hash
