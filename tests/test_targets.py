"""Writing a teacher's targets: killed anywhere, on a full disk, by two at once, with other settings."""

import dataclasses
import errno
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import MODES, Killed, failing_at, killed_at
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from places import cache_folder
from storage_fixtures import (
    Exact,
    make_corpus,
    make_exact,
    speed_up,
    tree,
)

from tailcache.storage.errors import (
    ConfigError,
    CorruptError,
    IncompleteError,
    MismatchError,
    NotFoundError,
    StorageError,
)
from tailcache.storage.inventory import teacher_inventory
from tailcache.storage.reader import open_cache
from tailcache.storage.targets import TargetsWriter, plan_layout


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


ALL_FIELDS: dict[str, Any] = {"temperatures": (2.0, 0.5), "hidden": "int8"}
with_and_without_optional_fields = pytest.mark.parametrize(
    "exact", [{}, ALL_FIELDS], indirect=True, ids=["plain", "all fields"]
)


@pytest.fixture
def exact(tmp_path: Path, request: pytest.FixtureRequest) -> Exact:
    """Several shards; a test may ask for optional fields."""
    return make_exact(make_corpus(tmp_path / "cache"), shard_positions=25, **getattr(request, "param", {}))


def assert_unreadable(exact: Exact, name: str) -> None:
    """A teacher that is not finished is refused; before its first file there is none."""
    path = cache_folder(exact.corpus)
    begun = any(each.is_file() for each in (path / "teachers" / name).rglob("*"))  # a folder alone is nothing yet
    expected = IncompleteError if begun else NotFoundError
    with pytest.raises(expected, match=name):
        open_cache(path).teacher(name)


@pytest.mark.slow
@with_and_without_optional_fields
@pytest.mark.parametrize("mode", ["half", "after"])  # before one operation is after the one before it
def test_killed_at_every_write_ends_in_the_same_bytes(exact: Exact, mode: str) -> None:
    teachers = cache_folder(exact.corpus) / "teachers"
    with killed_at(-1, mode) as counter:
        exact.write("whole")
    total = counter.count
    (teachers / "whole").rename(teachers / "kept")
    expected = tree(teachers / "kept")
    assert total > 40
    for number in range(0, total, 1 if exact.head is None else 3):
        with pytest.raises(Killed), killed_at(number, mode):
            exact.write("whole")
        folder = teachers / "whole"
        if not (folder / "complete.json").exists():
            assert_unreadable(exact, "whole")
        exact.write("whole")
        assert tree(folder) == expected, f"killed {mode} operation {number}, {counter.names[number]}"
        shutil.rmtree(folder)


@with_and_without_optional_fields
def test_killed_twice_in_one_capture(exact: Exact) -> None:
    exact.write("whole")
    teachers = cache_folder(exact.corpus) / "teachers"
    manifest = (teachers / "whole" / "manifest.json").read_bytes()
    with pytest.raises(Killed), killed_at(29, "half"):
        exact.write("broken")
    with pytest.raises(Killed), killed_at(7, "half"):
        exact.write("broken")
    exact.write("broken")
    found, expected = tree(teachers / "broken"), tree(teachers / "whole")
    assert found.keys() == expected.keys()
    sealed = {name for name in expected if name.endswith(".json") and "zarr" not in name}
    assert {n: d for n, d in found.items() if n not in sealed} == {n: d for n, d in expected.items() if n not in sealed}
    assert found["manifest.json"] == manifest or b'"broken"' in found["manifest.json"]


@pytest.mark.slow
@with_and_without_optional_fields
def test_disk_full_at_every_write_names_a_file_and_keeps_earlier_shards(exact: Exact) -> None:
    teachers = cache_folder(exact.corpus) / "teachers"
    teachers.mkdir()
    with failing_at(-1) as counter:
        exact.write("whole")
    expected = tree(teachers / "whole")
    (teachers / "whole").rename(teachers / "kept")
    for number in range(0, counter.count, 2 if exact.head is None else 5):  # a write is three calls: file, name, folder
        with pytest.raises(StorageError) as caught, failing_at(number):
            exact.write("whole")
        assert caught.value.errno == errno.ENOSPC
        assert "cache/teachers" in str(caught.value)
        assert "free some space" in str(caught.value)
        folder = teachers / "whole"
        commits = tree(folder / "commits") if folder.exists() else {}
        for name, data in commits.items():
            assert name.endswith(".json")
            assert expected[f"commits/{name}"] == data
        assert not [name for name in tree(teachers) if name.endswith(".tmp")]
        exact.write("whole")
        assert tree(folder) == expected
        shutil.rmtree(folder)


@with_and_without_optional_fields
def test_a_failed_write_may_be_tried_again_by_the_same_writer(exact: Exact) -> None:
    exact.write("whole")
    teachers = cache_folder(exact.corpus) / "teachers"
    (teachers / "whole").rename(teachers / "kept")
    failures = 0
    with TargetsWriter(exact.corpus, "whole", layout=exact.layout, settings={"seed": 1}, head=exact.head) as writer:
        for shard in range(exact.layout.num_shards):
            for number in range(1000):
                if shard in writer.committed:
                    break
                try:
                    with failing_at(number):
                        writer.write_shard(shard, *exact.shards[shard])
                except StorageError:
                    failures += 1
        writer.finish()
    assert failures > 40
    assert tree(teachers / "whole") == tree(teachers / "kept")


def test_real_sigkill(tmp_path: Path) -> None:
    """A process is killed between its writes; the same command then ends in the bytes of a whole run."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from storage_fixtures import make_exact
        from tailcache.storage import durable
        from tailcache.storage.corpus import Corpus
        exact = make_exact(Corpus(sys.argv[2]), shard_positions=25)
        left = int(sys.argv[3])
        original = os.fsync
        def fsync(descriptor):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            original(descriptor)
        os.fsync = fsync
        exact.write("t")
        """
    )
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    make_exact(make_corpus(whole), shard_positions=25).write("t")
    make_corpus(cache)

    def run(left: int) -> int:
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(cache), str(left)]
        return subprocess.run(command, check=False).returncode

    for left in (3, 40, 20):
        assert run(left) == -signal.SIGKILL
        with pytest.raises((IncompleteError, NotFoundError)):
            open_cache(cache).teacher("t")
    assert run(100_000) == 0
    assert tree(cache) == tree(whole)


def test_resume_is_refused_and_says_what_differs(exact: Exact) -> None:
    exact.write("t", {"dtype": "float32", "nested": {"seed": 1}})
    corpus = exact.corpus
    before = tree(cache_folder(corpus))

    def resume(layout: Any = exact.layout, chosen: dict[str, Any] | None = None) -> None:
        TargetsWriter(
            corpus, "t", layout=layout, settings=chosen or {"dtype": "float32", "nested": {"seed": 1}}
        ).close()

    resume()
    other_k = plan_layout(corpus, top_k=4, num_samples=3, shard_positions=25, chunk=8)
    other_m = plan_layout(corpus, top_k=5, num_samples=2, shard_positions=25, chunk=8)
    other_shards = plan_layout(corpus, top_k=5, num_samples=3, shard_positions=15, chunk=8)
    for layout, field, stored, asked in (
        (other_k, "layout.top_k", 5, 4),
        (other_m, "layout.num_samples", 3, 2),
        (other_shards, "layout.rows_per_shard", exact.layout.rows_per_shard, other_shards.rows_per_shard),
    ):
        with pytest.raises(MismatchError, match=rf"{field}: stored {stored}, asked for {asked}"):
            resume(layout)
    with pytest.raises(MismatchError, match=r"settings.dtype: stored 'float32', asked for 'bfloat16'"):
        resume(chosen={"dtype": "bfloat16", "nested": {"seed": 1}})
    with pytest.raises(MismatchError, match=r"settings.nested.seed: stored 1, asked for 2"):
        resume(chosen={"dtype": "float32", "nested": {"seed": 2}})
    with pytest.raises(MismatchError, match=r"settings.extra: stored None, asked for 1"):
        resume(chosen={"dtype": "float32", "nested": {"seed": 1}, "extra": 1})
    assert tree(cache_folder(corpus)) == before


def test_resume_over_another_corpus_is_refused(exact: Exact, tmp_path: Path) -> None:
    exact.write("t")
    other = make_corpus(tmp_path / "other", seed=1)
    (cache_folder(exact.corpus) / "teachers").rename(tmp_path / "other" / "teachers")
    layout = plan_layout(other, top_k=5, num_samples=3, shard_positions=25, chunk=8)
    with pytest.raises(MismatchError, match="corpus_hash: stored"):
        TargetsWriter(other, "t", layout=layout, settings={"seed": 1})
    with pytest.raises(MismatchError, match="captured over the corpus"):
        open_cache(tmp_path / "other").teacher("t")


@pytest.fixture
def many(tmp_path: Path) -> Exact:
    """More shards."""
    return make_exact(make_corpus(tmp_path / "cache"), shard_positions=8)


def test_two_writers_at_once_share_the_shards(many: Exact) -> None:
    """Each skips what the other has, and takes over what the other did not finish."""
    exact = many
    exact.write("t")
    teachers = cache_folder(exact.corpus) / "teachers"
    (teachers / "t").rename(teachers / "kept")

    def open_writer() -> TargetsWriter:
        return TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={"seed": 1}, head=exact.head)

    with open_writer() as one, open_writer() as other:
        first, second = one.shards(), other.shards()
        assert (next(first), next(second)) == (0, 1)
        with pytest.raises(ValueError, match="expected shard 0 first"):
            other.write_shard(1, *exact.shards[1])
        with pytest.raises(MismatchError, match="shard 0: expected one to be written, found that another has it"):
            other.write_shard(0, *exact.shards[0])
        one.write_shard(0, *exact.shards[0])
        other.write_shard(1, *exact.shards[1])
        other.write_shard(next(second), *exact.shards[2])
        assert next(first) == 3
        one.close()  # or dies: the other takes over what it had
        for shard in second:
            other.write_shard(shard, *exact.shards[shard])
        assert (other.positions, other.positions_of_others) == (exact.corpus.num_targets, len(exact.shards[0][0]))
        one.finish()
        other.finish()
    assert tree(teachers / "t") == tree(teachers / "kept")


def test_two_writers_with_other_settings_at_once(exact: Exact) -> None:
    """Neither knows of the other until there is a manifest."""
    with (
        TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={"seed": 1}) as one,
        TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={"seed": 2}) as other,
    ):
        assert (next(one.shards()), next(other.shards())) == (0, 1)
        one.write_shard(0, *exact.shards[0])
        before = tree(one_folder(exact))
        with pytest.raises(MismatchError, match=r"settings.seed: stored 1, asked for 2"):
            other.write_shard(1, *exact.shards[1])
        assert tree(one_folder(exact)) == before


def one_folder(exact: Exact) -> Path:
    return cache_folder(exact.corpus) / "teachers" / "t"


def test_a_claim_that_ended_unnoticed(exact: Exact) -> None:
    """In a store a process may be stopped for longer than its lease: two then do the same shard."""

    class Nothing:
        def release(self) -> None:
            pass

    def late(shard: int) -> TargetsWriter:
        writer = TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={"seed": 1}, head=exact.head)
        writer._claims[shard] = Nothing()
        return writer

    late_first, late_second = late(0), late(1)
    exact.write("t")
    good = tree(one_folder(exact))
    assert late_first.write_shard(0, *exact.shards[0]) > 0
    assert late_second.write_shard(1, *exact.shards[1]) > 0
    targets, tail_sum = exact.shards[1]
    other = dataclasses.replace(targets, tail_entropy=targets.tail_entropy * 1.5)
    with pytest.raises(MismatchError, match="another process has committed other bytes"):
        late(1).write_shard(1, other, tail_sum)
    assert tree(one_folder(exact)) == good


def test_shards_come_whole_and_once(exact: Exact) -> None:
    with TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={}) as writer:
        with pytest.raises(ValueError, match="expected shard 0 first"):
            writer.write_shard(1, *exact.shards[1])
        targets, tail_sum = exact.shards[0]
        with pytest.raises(ValueError, match="targets for rows"):
            writer.write_shard(0, targets[1:], tail_sum)
        with pytest.raises(ValueError, match=f"0 of {exact.layout.num_shards} shards"):
            writer.finish()
        writer.write_shard(0, targets, tail_sum)
        with pytest.raises(MismatchError, match="shard 0: expected one to be written"):
            writer.write_shard(0, targets, tail_sum)


def test_shards_in_any_order_give_the_same_bytes(many: Exact) -> None:
    exact = many
    exact.write("t")
    teachers = cache_folder(exact.corpus) / "teachers"
    (teachers / "t").rename(teachers / "kept")
    order = [0, *np.random.default_rng(0).permutation(range(1, exact.layout.num_shards)).tolist()]
    assert order != sorted(order)
    for shard in order:
        with TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={"seed": 1}, head=exact.head) as writer:
            assert not writer.complete
            writer.write_shard(shard, *exact.shards[shard])
            inventory = teacher_inventory(exact.corpus, "t")
            assert inventory.committed_shards == writer.num_committed
            assert inventory.positions == writer.positions
    exact.write("t")
    assert tree(teachers / "t") == tree(teachers / "kept")


def test_a_capture_begun_in_version_1_is_not_continued(exact: Exact) -> None:
    old = dataclasses.replace(exact.layout, format_version=1)
    with TargetsWriter(exact.corpus, "t", layout=old, settings={"versions": {"tailcache": "0.1.0"}}) as writer:
        writer.write_shard(0, *exact.shards[0])
    before = tree(one_folder(exact))
    for asked in ({"versions": {"tailcache": "0.1.0"}}, {"other": 1}):
        with pytest.raises(MismatchError, match=r"in format version 1 .*Finish it with tailcache 0\.1\.0, or del"):
            TargetsWriter(exact.corpus, "t", layout=exact.layout, settings=asked)
    assert tree(one_folder(exact)) == before


def test_damage_is_found_on_resume(exact: Exact) -> None:
    exact.write("t")
    folder = cache_folder(exact.corpus) / "teachers" / "t"
    good = tree(folder)

    def reopen() -> None:
        exact.write("t")

    for name, message in (
        ("manifest.json", "manifest.json: missing"),
        ("commits/00000001.json", "00000001.json: missing, though the capture was complete.*verify --repair"),
        ("vocabulary_order/c/0", "vocabulary_order/c/0: missing or not what was written"),
        ("logprob_levels/zarr.json", "logprob_levels/zarr.json: missing or not what was written"),
    ):
        (folder / name).unlink()
        with pytest.raises(CorruptError, match=message):
            reopen()
        (folder / name).write_bytes(good[name])
    for name in ("commits/00000001.json", "complete.json"):
        (folder / name).write_bytes(good[name].replace(b"1", b"2", 1))
        with pytest.raises(CorruptError, match=Path(name).name):
            reopen()
        (folder / name).write_bytes(good[name])
    (folder / "complete.json").unlink()
    with pytest.raises(CorruptError, match=r"tail_sum-00000000.*no file"):
        reopen()
    (folder / "complete.json").write_bytes(good["complete.json"])
    reopen()
    assert tree(folder) == good


@with_and_without_optional_fields
def test_finishing_twice_changes_nothing(exact: Exact) -> None:
    exact.write("t")
    folder = cache_folder(exact.corpus) / "teachers" / "t"
    good = tree(folder)
    with TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={"seed": 1}, head=exact.head) as writer:
        assert writer.complete
        assert writer.num_committed == exact.layout.num_shards
        objects = sum(len(data) for name, data in good.items() if "/c/" in name)
        constants = sum(len(good[spec.object_path(0)]) for spec in exact.layout.constants().values())
        assert writer.bytes_written == objects - constants
        writer.finish()
    assert tree(folder) == good
    assert not (folder / "partial").exists()


def test_mean_tail_is_the_mean_of_the_normalised_tails(exact: Exact) -> None:
    exact.write("t")
    mean = open_cache(cache_folder(exact.corpus)).teacher("t").mean_tail
    expected = sum(tail_sum for _, tail_sum in exact.shards)
    np.testing.assert_allclose(mean, np.asarray(expected) / exact.corpus.num_targets, rtol=1e-6)
    assert mean.dtype == np.float32


def test_shards_without_targets(tmp_path: Path) -> None:
    """Rows of one token have no target; a shard of such rows, also the first or the last one, has no objects."""
    corpus = make_corpus(tmp_path / "cache", lengths=(1, 1, 9, 12, 1, 1, 1, 8, 1, 1, 1))
    exact = make_exact(corpus, shard_positions=4)
    assert exact.layout.rows_per_shard == 2
    exact.write("t")
    teacher = open_cache(tmp_path / "cache").teacher("t")
    everything = teacher.rows(0, corpus.num_rows)
    assert len(everything) == corpus.num_targets
    assert len(teacher.rows(0, 2)) == len(teacher.rows(10, 11)) == len(teacher.rows(4, 6)) == 0
    assert teacher.commit(0).files == {}
    picked = teacher.positions(np.arange(corpus.num_targets))
    assert (picked.token_ids == everything.token_ids).all()
    assert sum(len(targets) for _, targets in teacher.stream(seed=0)) == corpus.num_targets


def test_plan_layout_covers_every_row_and_rejects_nonsense(exact: Exact) -> None:
    corpus = exact.corpus
    for shard_positions in (1, 3, 10, 10**9):
        layout = plan_layout(corpus, top_k=1, num_samples=0, shard_positions=shard_positions)
        rows = [layout.shard_rows(s) for s in range(layout.num_shards)]
        assert [first for first, _ in rows[1:]] == [last for _, last in rows[:-1]]
        assert rows[0][0] == 0
        assert rows[-1][1] == corpus.num_rows
        assert layout.shard_slots % layout.chunk == 0
        for first, last in rows:
            offsets = corpus.target_offsets(first, last)
            assert offsets[-1] - offsets[0] <= layout.shard_slots
    good: dict[str, Any] = {"top_k": 5, "num_samples": 3, "shard_positions": 10}
    for field, value in (
        ("top_k", 0),
        ("top_k", 38),
        ("num_samples", -1),
        ("shard_positions", 0),
        ("chunk", 0),
        ("compression_level", 10),
    ):
        with pytest.raises(ConfigError, match=field.removesuffix("_level").replace("compression", "compression level")):
            plan_layout(corpus, **{**good, field: value})
    with pytest.raises(ConfigError, match="num_samples"):
        plan_layout(corpus, top_k=37, num_samples=1, shard_positions=10)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "x.tmp", "x.lock", "a b", "é", "a" * 101])
def test_names_that_are_no_folder_names(exact: Exact, name: str) -> None:
    with pytest.raises(ConfigError, match="teacher name"):
        TargetsWriter(exact.corpus, name, layout=exact.layout, settings={})
    with pytest.raises(ConfigError, match="teacher name"):
        open_cache(cache_folder(exact.corpus)).teacher(name)


def test_layout_attributes_roundtrip_and_reject(exact: Exact) -> None:
    from tailcache.storage.errors import FormatError
    from tailcache.storage.layout import Layout

    attributes = exact.layout.attributes()
    assert Layout.from_attributes(attributes, "x") == exact.layout
    for changed in (
        {"format": "something else"},
        {"format_version": 3},
        {"top_k": "5"},
        {"top_k": True},
        {"top_k": 0},
        {"top_k": 99},
        {"chunk": 7},
        {"num_samples": -1},
        {"vocab_size": None},
        {"temperatures": [1.0]},
        {"hidden": {"kind": "none"}},
    ):
        with pytest.raises(FormatError, match="x"):
            Layout.from_attributes({**attributes, **changed}, "x")
    with pytest.raises(FormatError, match="install the version of tailcache"):
        Layout.from_attributes({**attributes, "format_version": 3}, "x")


class CommitProtocol(RuleBasedStateMachine):
    """Append a shard, be killed anywhere, open again, read: always what a plain list says."""

    def __init__(self) -> None:
        super().__init__()
        self.committed: list[int] = []
        self.finished = False
        self.writer: TargetsWriter | None = None

    @initialize()
    def start(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.exact = make_exact(make_corpus(Path(self.folder.name)), top_k=2, num_samples=0, shard_positions=15)
        self.path = cache_folder(self.exact.corpus) / "teachers" / "t"
        self.open()

    def open(self) -> None:
        self.writer = TargetsWriter(self.exact.corpus, "t", layout=self.exact.layout, settings={})
        assert self.writer.num_committed == len(self.committed)

    @precondition(lambda self: len(self.committed) < self.exact.layout.num_shards)
    @rule()
    def append(self) -> None:
        assert self.writer is not None
        shard = len(self.committed)
        self.writer.write_shard(shard, *self.exact.shards[shard])
        self.committed.append(shard)

    @precondition(lambda self: len(self.committed) < self.exact.layout.num_shards)
    @rule(number=st.integers(0, 30), mode=st.sampled_from(MODES))
    def killed_in_append(self, number: int, mode: str) -> None:
        assert self.writer is not None
        shard = len(self.committed)
        try:
            with killed_at(number, mode):
                self.writer.write_shard(shard, *self.exact.shards[shard])
        except Killed:
            pass
        from tailcache.storage.layout import commit_path

        if (self.path / commit_path(shard)).exists():
            self.committed.append(shard)
        self.reopen()

    @rule()
    def reopen(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self.open()

    @precondition(lambda self: len(self.committed) == self.exact.layout.num_shards)
    @rule()
    def finish(self) -> None:
        assert self.writer is not None
        self.writer.finish()
        self.finished = True

    @invariant()
    def readable_exactly_when_finished(self) -> None:
        if self.writer is None:
            return
        cache = open_cache(cache_folder(self.exact.corpus))
        if not self.finished:
            with pytest.raises((IncompleteError, NotFoundError)):
                cache.teacher("t")
            return
        teacher = cache.teacher("t")
        for shard in self.committed:
            stored, given = teacher.rows(*self.exact.layout.shard_rows(shard)), self.exact.shards[shard][0]
            np.testing.assert_allclose(stored.log_tail, given.log_tail, atol=1e-3)
            assert (np.sort(stored.token_ids) == np.sort(given.token_ids)).all()

    def teardown(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.folder.cleanup()


@pytest.mark.slow
class TestCommitProtocol(CommitProtocol.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(
        max_examples=15,
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def test_extra_fields_of_targets_are_told(exact: Exact) -> None:
    """A NaN, a positive log-prob, the wrong order, a tail with all the mass: refused, nothing committed."""
    from tailcache.storage.errors import TeacherError

    good, tail_sum = exact.shards[0]

    def broken(field: str, value: float) -> Any:
        values = getattr(good, field).copy()
        values[1] = value
        return dataclasses.replace(good, **{field: values})

    with TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={}) as writer:
        for field in ("logprobs", "log_tail", "tail_entropy", "log_target", "log_not_target"):
            with pytest.raises(TeacherError, match="target 1 of those to be stored"):
                writer.write_shard(0, broken(field, float("nan")), tail_sum)
        for field, value in (("logprobs", 0.1), ("logprobs", -np.inf), ("log_tail", 0.0), ("log_tail", 1.0)):
            with pytest.raises(TeacherError, match="target 1 of those"):
                writer.write_shard(0, broken(field, value), tail_sum)
        reverse = dataclasses.replace(good, logprobs=good.logprobs[:, ::-1])
        with pytest.raises(TeacherError, match="most likely first"):
            writer.write_shard(0, reverse, tail_sum)
        assert writer.num_committed == 0
