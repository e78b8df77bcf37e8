"""Captures that die or fail at each call that changes the disk: what was committed stays, the rest is made again."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Tally
from places import cache_folder
from storage_fixtures import Exact, make_corpus, make_exact, speed_up, tree
from syscalls import Call, at, die, fail, forked, traced

from tailcache.storage.errors import IncompleteError, NotFoundError, StorageError, TailcacheError
from tailcache.storage.reader import open_cache


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


@pytest.fixture
def exact(tmp_path: Path) -> Exact:
    """Two shards, few fields: the calls are the same for each file."""
    return make_exact(make_corpus(tmp_path / "cache", lengths=(9, 12, 7, 8)), num_samples=0, shard_positions=15)


def calls_of(exact: Exact) -> list[Call]:
    """Every call of a whole capture that changed the disk; it is deleted again."""
    seen: list[Call] = []
    with traced(teachers_of(exact), after=seen.append):
        exact.write("t")
    shutil.rmtree(teachers_of(exact) / "t")
    return seen


def teachers_of(exact: Exact) -> Path:
    folder = cache_of(exact) / "teachers"
    folder.mkdir(exist_ok=True)
    return folder


def cache_of(exact: Exact) -> Path:
    return cache_folder(exact.corpus)


def whole(exact: Exact) -> dict[str, bytes]:
    """The bytes of an uninterrupted capture of the name "t"."""
    exact.write("t")
    expected = tree(teachers_of(exact) / "t")
    shutil.rmtree(teachers_of(exact) / "t")
    return expected


def assert_nothing_half_written(exact: Exact, expected: dict[str, bytes]) -> None:
    """A reader sees a finished teacher, whole, or none; and each record that is there is the right one."""
    folder = teachers_of(exact) / "t"
    found = tree(folder) if folder.exists() else {}
    for name, data in found.items():
        if name in expected and not name.startswith("partial/"):
            assert data == expected[name], f"{name} is visible under its name, but not whole"
    cache = open_cache(cache_of(exact))
    if "complete.json" not in found:
        with pytest.raises((IncompleteError, NotFoundError)):
            cache.teacher("t")
    if "commits/00000000.json" in found:
        teacher = cache.teacher("t", unfinished="prefix")
        stored = teacher.rows(0, teacher.num_rows)
        np.testing.assert_allclose(stored.log_tail, exact.targets.log_tail[: len(stored)], atol=2.0**-10)
        assert len(stored) >= len(exact.shards[0][0])


@pytest.mark.slow
def test_killed_before_within_and_after_every_call(exact: Exact, tally: Tally) -> None:
    """Each time in a process of its own, by SIGKILL; the same command then ends in the same bytes."""
    expected = whole(exact)
    calls = calls_of(exact)
    kills = 0
    for call in [*calls, None]:  # after one call is before the next
        for torn in (False, True) if call and call.name == "write" else (False,):
            number = (call or calls[-1]).number

            def work(number: int = number, torn: bool = torn, last: bool = call is None) -> None:
                hook = at(number, die, torn=torn)
                with traced(teachers_of(exact), **({"after": hook} if last else {"before": hook})):
                    exact.write("t")

            assert forked(work) == -signal.SIGKILL, f"call {number} of {len(calls)}: {call}"
            kills += 1
            assert_nothing_half_written(exact, expected)
            exact.write("t")
            assert tree(teachers_of(exact) / "t") == expected, f"killed at {call}, torn: {torn}"
            shutil.rmtree(teachers_of(exact) / "t")
    assert kills > 150
    tally("processes killed before, within or after a call that changes the disk", kills)


def failing(exact: Exact, calls: list[Call], code: int, kinds: tuple[str, ...], stride: int) -> int:
    """Let each call of some kinds fail with an error of the system; every n-th time, go on afterwards."""
    expected = whole(exact)
    chosen = [call for call in calls if call.name in kinds]
    for count, call in enumerate(chosen):
        torn = call.name == "write"
        with pytest.raises(TailcacheError) as caught:
            run_failing(exact, at(call.number, lambda: fail(code), torn=torn))
        assert isinstance(caught.value, StorageError), caught.value
        assert caught.value.errno == code
        message = str(caught.value)
        assert "cache/teachers" in message, message
        assert any(word in message for word in ("free some space", "read-only", "no permission", "check the disk"))
        assert_nothing_half_written(exact, expected)
        if count % stride == 0:
            exact.write("t")
            assert tree(teachers_of(exact) / "t") == expected, call
        shutil.rmtree(teachers_of(exact) / "t", ignore_errors=True)
    return len(chosen)


def run_failing(exact: Exact, hook: Callable[[Call], None]) -> None:
    with traced(teachers_of(exact), hook):
        exact.write("t")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "kinds", "stride"),
    [
        (errno.ENOSPC, ("open", "write", "fsync", "replace", "rename", "link", "mkdir", "create"), 4),
        (errno.EIO, ("write", "fsync", "replace", "link"), 16),
        (errno.EROFS, ("open", "mkdir", "create", "replace", "link"), 16),
        (errno.EACCES, ("open", "mkdir", "create", "replace", "link"), 16),
    ],
    ids=["ENOSPC", "EIO", "EROFS", "EACCES"],
)
def test_calls_that_fail(exact: Exact, tally: Tally, code: int, kinds: tuple[str, ...], stride: int) -> None:
    calls = calls_of(exact)
    number = failing(exact, calls, code, kinds, stride)
    assert number > 50
    tally(f"calls that failed with {errno.errorcode[code]}", number)
