"""Copies on the disk: right or none, within their space, and never in the way."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from s3_server import Faults

from tailcache.storage import disk_cache as module
from tailcache.storage.disk_cache import CachedPlace, DiskCache, disk_cache
from tailcache.storage.errors import CorruptError, StorageError
from tailcache.storage.local_place import LocalPlace
from tailcache.storage.place import Place, open_place


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Counted(LocalPlace):
    """A folder that plays the remote place and counts what is asked of it."""

    def __init__(self, folder: Path, asked: list[str] | None = None) -> None:
        super().__init__(folder)
        self.asked: list[str] = [] if asked is None else asked

    @property
    def local(self) -> Path:
        return None  # type: ignore[return-value]

    def __truediv__(self, name: str) -> Place:
        return Counted(self._folder / name, self.asked)

    def read(self, name: str) -> bytes:
        self.asked.append(f"read {name}")
        return super().read(name)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        self.asked.append(f"ranges {name}")
        return super().read_ranges(name, ranges)


@pytest.fixture
def remote(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "remote")


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "copies", 100_000)


def stored(cache: DiskCache) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in (cache.folder / "files").rglob("*") if p.is_file()}


def put(remote: Place, name: str, data: bytes, through: Place) -> None:
    remote.write(name, data)
    through.expect(name, sha256(data), len(data))


def test_read_once_then_from_the_copy(remote: Counted, cache: DiskCache) -> None:
    place = CachedPlace(remote, cache)
    data = bytes(range(200)) * 10
    put(remote, "a/x", data, place)
    assert place.read_ranges("a/x", [(5, 10), (1990, 3000)]) == [data[5:10], data[1990:]]
    assert (place / "a").read_ranges("x", [(0, 2)]) == [data[:2]]
    assert place.read_end("a/x", 7) == (data[-7:], 2000)
    assert (place.read("a/x"), place.size("a/x")) == (data, 2000)
    assert remote.asked == ["read a/x"]
    assert stored(cache) == {sha256(data): 2000}
    other = CachedPlace(remote, DiskCache(cache.folder, cache.limit))
    other.expect("a/x", sha256(data), 2000)
    assert other.read_ranges("a/x", [(5, 10)]) == [data[5:10]]
    assert remote.asked == ["read a/x"]


def test_a_size_that_is_not_on_record(remote: Counted, cache: DiskCache) -> None:
    place = CachedPlace(remote, cache)
    data = os.urandom(5000)
    remote.write("x", data)
    place.expect("x", sha256(data))
    assert place.read_ranges("x", [(5, 10)]) == [data[5:10]]
    assert place.size("x") == 5000
    for damage in (b"", data[:-1]):
        cache._path(sha256(data)).write_bytes(damage)
        other = CachedPlace(remote, DiskCache(cache.folder, cache.limit))
        other.expect("x", sha256(data))
        assert other.read_end("x", 5) == (data[-5:], 5000)
    large = os.urandom(25_001)
    remote.write("large", large)
    place.expect("large", sha256(large))
    assert place.read_ranges("large", [(5, 10)]) == [large[5:10]]
    assert set(stored(cache)) == {sha256(data)}
    place.expect("missing", sha256(large))
    with pytest.raises(FileNotFoundError):
        place.read_ranges("missing", [(0, 1)])


def test_files_whose_hash_is_on_record_are_read_once(remote: Counted, cache: DiskCache) -> None:
    remote.write("x", b"data")
    for _ in range(2):
        place = CachedPlace(remote, DiskCache(cache.folder, cache.limit))
        assert place.read_checked("x", sha256(b"data")) == b"data"
    assert remote.asked == ["read x"]
    remote.write("large", bytes(25_001))
    assert place.read_checked("large", sha256(bytes(25_001))) == bytes(25_001)
    assert set(stored(cache)) == {sha256(b"data")}
    for wrong in (sha256(b"other"), "x", "../../x", None):
        with pytest.raises(CorruptError, match="x: missing or not what was written"):
            place.read_checked("x", wrong)
    with pytest.raises(CorruptError, match="y: missing or not what was written"):
        place.read_checked("y", sha256(b"data!"))


def test_what_is_not_expected_is_never_copied(remote: Counted, cache: DiskCache) -> None:
    place = CachedPlace(remote, cache)
    remote.write("x", b"old")
    assert place.read_ranges("x", [(0, 3)]) == [b"old"]
    remote.write("x", b"new")
    assert (place.read_ranges("x", [(0, 3)]), place.read("x"), place.read_end("x", 1)) == ([b"new"], b"new", (b"w", 3))
    assert not cache.folder.exists()


def test_a_replaced_file_is_not_served_stale(remote: Counted, cache: DiskCache) -> None:
    place = CachedPlace(remote, cache)
    put(remote, "x", b"old", place)
    assert place.read("x") == b"old"
    place.write("x", b"new")
    assert place.read("x") == b"new"
    place.expect("x", sha256(b"new"), 3)
    assert place.read("x") == b"new"


def test_a_damaged_copy_is_fetched_again(remote: Counted, cache: DiskCache) -> None:
    place = CachedPlace(remote, cache)
    data = os.urandom(5000)
    put(remote, "x", data, place)
    place.read("x")
    path = cache._path(sha256(data))
    for damage in (b"", data[:-1], data + b"x", bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(damage)
        assert place.read_ranges("x", [(0, 6000)]) == [data]
        assert path.read_bytes() == data


def test_what_is_not_what_was_committed_is_not_copied(remote: Counted, cache: DiskCache) -> None:
    """The reader sees what lies there, and finds out by itself."""
    place = CachedPlace(remote, cache)
    remote.write("x", b"damaged!")
    place.expect("x", sha256(b"intact!!"), 8)
    assert place.read_ranges("x", [(0, 8)]) == [b"damaged!"]
    assert place.read_ranges("x", [(0, 8)]) == [b"damaged!"]
    assert place.size("x") == 8
    assert stored(cache) == {}
    assert remote.asked.count("read x") == 2  # and not twice for every range


def test_a_bad_hash_in_a_record_leads_nowhere(remote: Counted, cache: DiskCache) -> None:
    place = CachedPlace(remote, cache)
    remote.write("x", b"data")
    for digest in ("../../../etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n"):
        place.expect("x", digest, 4)
        assert place.read_ranges("x", [(0, 4)]) == [b"data"]
    place.expect("x", sha256(b"data"), -1)
    assert place.read("x") == b"data"
    assert not cache.folder.exists()


def test_a_missing_file_is_missing(remote: Counted, cache: DiskCache) -> None:
    place = CachedPlace(remote, cache)
    place.expect("x", sha256(b"data"), 4)
    with pytest.raises(FileNotFoundError):
        place.read_ranges("x", [(0, 1)])
    assert place.size("x") is None


def test_the_least_recently_used_go_first(remote: Counted, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOUCH_SECONDS", -1.0)
    place = CachedPlace(remote, cache)
    files = [bytes([i]) * 24_000 for i in range(5)]
    for i, data in enumerate(files):
        put(remote, str(i), data, place)
    for i in range(4):
        place.read(str(i))
    place.read("0")
    place.read("4")  # does not fit: down to nine tenths of the limit, this one included
    assert set(stored(cache)) == {sha256(files[i]) for i in (0, 3, 4)}


def test_a_file_that_is_too_large_is_read_in_ranges(remote: Counted, cache: DiskCache) -> None:
    place = CachedPlace(remote, cache)
    put(remote, "x", bytes(25_001), place)
    assert place.read_ranges("x", [(0, 2)]) == [b"\0\0"]
    assert remote.asked == ["ranges x"]
    assert not cache.folder.exists()


@pytest.mark.parametrize("broken", ["no folder", "read-only folder", "a file in the way", "a folder in the way"])
def test_a_disk_that_fails_is_not_in_the_way(
    broken: str, remote: Counted, cache: DiskCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = CachedPlace(remote, cache)
    put(remote, "x", b"data", place)
    if broken == "no folder":
        cache.folder = Path("/proc/nothing/can/be/written/here")
    elif broken == "a file in the way":
        cache.folder.write_bytes(b"")
    elif broken == "a folder in the way":
        cache._path(sha256(b"data")).mkdir(parents=True)
    else:
        monkeypatch.setattr(os, "replace", _no_space)
    for _ in range(2):
        assert place.read_ranges("x", [(1, 3)]) == [b"at"]
        assert (place.read("x"), place.size("x"), place.read_end("x", 1)) == (b"data", 4, (b"a", 4))
    assert caplog.text.count("no copies are kept for a while") == 1


def _no_space(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_fetch_that_fails_is_the_readers_error(
    s3_url: str, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.2")
    place = open_place(s3_url)
    put(place, "x", b"data", place)
    faults.add("500", times=None, methods=("GET",))
    with pytest.raises(StorageError, match="reading failed"):
        place.read_ranges("x", [(0, 2)])
    faults.clear()
    assert place.read_ranges("x", [(0, 2)]) == [b"da"]
    assert caplog.text == ""


WORKER = """
import hashlib, logging, random, sys
from tailcache.storage.place import open_place
seed, url, count, size = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
logging.basicConfig()
place, chosen = open_place(url), random.Random(seed)
def data(i): return hashlib.sha256(str(i).encode()).digest() * (size // 32)
for i in range(count):
    place.expect(str(i), hashlib.sha256(data(i)).hexdigest(), size)
for _ in range(60):
    i = chosen.randrange(count)
    a = chosen.randrange(size)
    assert place.read_ranges(str(i), [(a, a + 100)]) == [data(i)[a:a + 100]], i
"""


@pytest.mark.slow
def test_many_processes_share_one_bounded_folder(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, size, count = 1 << 20, 64 << 10, 40
    monkeypatch.setenv("TAILCACHE_DISK_CACHE_BYTES", str(limit))
    place = open_place(s3_url)
    for i in range(count):
        place.write(str(i), hashlib.sha256(str(i).encode()).digest() * (size // 32))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(seed), s3_url, str(count), str(size)],
            stderr=subprocess.PIPE,
            env=dict(os.environ),
        )
        for seed in range(4)
    ]
    most = 0
    cache = disk_cache()
    assert cache is not None
    while any(process.poll() is None for process in processes):
        with cache._lock("space.lock"):  # nobody writes or deletes: all sizes of one moment
            most = max(most, sum(_sizes(cache.folder / "files")))
        time.sleep(0.005)
    for process in processes:
        assert process.communicate()[1] == b""
        assert process.returncode == 0
    assert size < most <= limit
    assert not list(cache.folder.rglob("*.tmp"))


def _sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(os.path.join(parent, name))
            except FileNotFoundError:
                continue
            assert stat.S_ISREG(status.st_mode)
            yield status.st_size


def test_many_at_once_fetch_a_file_once(s3_url: str, faults: Faults) -> None:
    from concurrent.futures import ThreadPoolExecutor

    data = os.urandom(100_000)
    places = [open_place(s3_url) for _ in range(6)]
    places[0].write("x", data)
    for place in places:
        place.expect("x", sha256(data), len(data))
    faults.clear()
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda p: p.read_ranges("x", [(3, 9)]), places)) == [[data[3:9]]] * 6
    assert faults.count("GET") == 1


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAILCACHE_DISK_CACHE", raising=False)
    monkeypatch.delenv("TAILCACHE_DISK_CACHE_BYTES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = disk_cache()
    assert cache is not None
    assert (cache.folder, cache.limit) == (tmp_path / "tailcache", 10 << 30)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache = disk_cache()
    assert cache is not None
    assert cache.folder == tmp_path / "home" / ".cache" / "tailcache"
    monkeypatch.setenv("TAILCACHE_DISK_CACHE_BYTES", "0")
    assert disk_cache() is None


class SharedFolder(RuleBasedStateMachine):
    """Two processes' views of one folder, files that are replaced in the store, copies that are damaged."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        top = Path(self.folder.name)
        self.remote = Counted(top / "remote")
        self.caches = [DiskCache(top / "copies", 1000) for _ in range(2)]
        self.places = [CachedPlace(self.remote, cache) for cache in self.caches]
        self.content: dict[str, bytes] = {}

    @rule(name=st.sampled_from("abcdef"), data=st.binary(max_size=260))
    def replace(self, name: str, data: bytes) -> None:
        self.remote.write(name, data)
        self.content[name] = data
        for place in self.places:
            place.expect(name, sha256(data), len(data))

    @rule(name=st.sampled_from("abcdef"), who=st.integers(0, 1), first=st.integers(0, 260), count=st.integers(0, 300))
    def read(self, name: str, who: int, first: int, count: int) -> None:
        if name in self.content:
            expected = self.content[name][first : first + count]
            assert self.places[who].read_ranges(name, [(first, first + count)]) == [expected]

    @rule(choice=st.integers(0, 100), damage=st.binary(max_size=10))
    def damage(self, choice: int, damage: bytes) -> None:
        paths = sorted((self.caches[0].folder / "files").glob("*/*"))
        if paths:
            path = paths[choice % len(paths)]
            path.write_bytes(damage if choice % 2 else path.read_bytes() + damage)

    @rule(damage=st.sampled_from([b"", b"x", b"-5", b"0", b"9" * 30]))
    def damage_ledger(self, damage: bytes) -> None:
        if self.caches[0].folder.is_dir():
            (self.caches[0].folder / "bytes").write_bytes(damage)

    @invariant()
    def no_temporary_files(self) -> None:
        assert not list((self.caches[0].folder / "files").rglob("*.tmp"))

    def teardown(self) -> None:
        self.folder.cleanup()


TestSharedFolder = SharedFolder.TestCase
TestSharedFolder.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
