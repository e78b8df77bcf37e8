"""The power is cut after any call: whatever was not flushed may be gone, torn or there, each part for itself."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Tally
from crash_states import Disk, State
from memory_place import MemoryPlace
from storage_fixtures import Exact, make_corpus, make_exact, speed_up, tree
from syscalls import Call, traced

from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import IncompleteError, NotFoundError
from tailcache.storage.reader import open_cache
from tailcache.storage.targets import TargetsWriter


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


class Watched:
    """All states that the device could be in after any call of some work, each once, and what was promised by then."""

    def __init__(self, root: Path, work: Callable[[Watched], None]) -> None:
        self.promised: list[str] = []
        self.states: dict[str, tuple[State, tuple[str, ...], Call]] = {}
        self.calls = 0
        self._disk, self._generator = Disk(str(root.resolve())), random.Random(0)
        with traced(root, after=self._saw):
            work(self)

    def promise(self, what: str) -> None:
        """From now on, no state may be without it."""
        self.promised.append(what)

    def _saw(self, call: Call) -> None:
        self.calls += 1
        self._disk.saw(call)
        for state in self._disk.states(self._generator, 64):
            digest = hashlib.sha256()
            for name in sorted(state):
                digest.update(name.encode() + b"\0" + hashlib.sha256(state[name]).digest())
            digest.update(repr(self.promised).encode())
            self.states.setdefault(digest.hexdigest(), (state, tuple(self.promised), call))

    def __iter__(self) -> Iterator[tuple[State, tuple[str, ...], Call]]:
        yield from self.states.values()


@pytest.mark.slow
def test_a_capture(tmp_path: Path, tally: Tally) -> None:
    """What was committed is there, right, in every state; the same command goes on from any of them."""
    exact = make_exact(make_corpus(tmp_path / "cache", lengths=(9, 12, 7, 8)), num_samples=0, shard_positions=15)
    exact.write("t")
    teachers = tmp_path / "cache" / "teachers"
    expected = tree(tmp_path / "cache")
    shutil.rmtree(teachers)

    def work(watched: Watched) -> None:
        with TargetsWriter(exact.corpus, "t", layout=exact.layout, settings={"seed": 1}) as writer:
            for shard in writer.shards():
                writer.write_shard(shard, *exact.shards[shard])
                watched.promise(f"shard {shard}")
            writer.finish()
            watched.promise("finished")

    watched = Watched(tmp_path / "cache", work)
    assert tree(tmp_path / "cache") == expected
    outcomes = {"finished": 0, "prefix": 0, "none": 0}
    for number, (state, promised, call) in enumerate(watched):
        kind = look(exact, state, promised, call)
        outcomes[kind] += 1
        if number % 4 == 0:
            place = MemoryPlace(dict(state))
            resumed = Exact(Corpus(place), exact.layout, exact.logprobs, exact.targets, exact.shards)
            resumed.write("t")
            found = {name: data for name, data in place.content.items() if not name.endswith("/")}
            assert found == expected, call
    assert min(outcomes.values()) > 10, outcomes
    tally("states of the disk after a power cut in a capture", len(watched.states))


def look(exact: Exact, state: State, promised: tuple[str, ...], call: Call) -> str:
    """Read all that is readable in a state; say what that is."""
    cache = open_cache(MemoryPlace(state))
    shards = sum(what.startswith("shard") for what in promised)
    try:
        teacher = cache.teacher("t", unfinished="prefix")
    except (IncompleteError, NotFoundError):
        assert not promised, f"lost {promised} after {call}"
        return "none"
    stored = teacher.rows(0, teacher.num_rows)
    np.testing.assert_allclose(stored.log_tail, exact.targets.log_tail[: len(stored)], atol=2.0**-10)
    assert (np.sort(stored.token_ids) == np.sort(exact.targets.token_ids[: len(stored)])).all()
    assert len(stored) >= sum(len(exact.shards[shard][0]) for shard in range(shards)), f"lost a shard after {call}"
    try:
        finished = cache.teacher("t")
    except IncompleteError:
        assert "finished" not in promised, f"lost the end after {call}"
        return "prefix"
    assert abs(float(finished.mean_tail.sum()) - 1) < 1e-6
    assert finished.num_targets == len(stored) == exact.corpus.num_targets
    return "finished"


@pytest.mark.slow
def test_a_corpus(tmp_path: Path, tally: Tally) -> None:
    """There is none, or the whole one."""
    make_corpus(tmp_path / "kept")
    expected = tree(tmp_path / "kept")
    (tmp_path / "cache").mkdir()

    def work(watched: Watched) -> None:
        make_corpus(tmp_path / "cache")
        watched.promise("corpus")

    watched = Watched(tmp_path / "cache", work)
    whole = 0
    for state, promised, call in watched:
        try:
            corpus = open_cache(MemoryPlace(state)).corpus
        except (IncompleteError, NotFoundError):
            assert not promised, call
            continue
        found = {name: data for name, data in state.items() if name.startswith("corpus/") and not name.endswith("/")}
        assert found == expected, call
        assert corpus.num_rows == 10
        whole += 1
    assert 0 < whole < len(watched.states)
    tally("states of the disk after a power cut while a corpus is written", len(watched.states))


def test_the_model_of_a_disk_knows_what_was_not_flushed(tmp_path: Path) -> None:
    """The same test with a writer that flushes nothing finds what can be lost: or it could not fail."""
    from tailcache.storage import durable

    def work(watched: Watched) -> None:
        with durable.open(str(tmp_path / "x.tmp"), "wb") as file:  # type: ignore[attr-defined]
            file.write(b"all of it")
        (tmp_path / "x.tmp").rename(tmp_path / "x")
        watched.promise("x")

    contents = {state.get("x") for state, _, _ in Watched(tmp_path, work)}
    assert contents == {None, b"", b"all ", bytes(9), b"all of it"}
