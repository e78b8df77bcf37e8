"""What every place promises, held by a folder, an object store on moto's server, and file systems of fsspec."""

from __future__ import annotations

import itertools
import pickle
import threading
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailcache.storage.durable import sha256
from tailcache.storage.errors import ConfigError, CorruptError
from tailcache.storage.place import Place, open_place
from tailcache.storage.ranges import cut_range, merge_ranges

KINDS = ["local", "s3", "s3 without disk cache", "memory", "fsspec local"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TAILCACHE_DISK_CACHE", str(tmp_path / "disk-cache"))
    if request.param == "local":
        return open_place(tmp_path / "cache")
    if request.param == "memory":
        return open_place(f"memory://{uuid.uuid4().hex}/cache")
    if request.param == "fsspec local":
        return open_place(f"local://{tmp_path}/cache")
    url: str = request.getfixturevalue("s3_url")
    if request.param == "s3 without disk cache":
        monkeypatch.setenv("TAILCACHE_DISK_CACHE_BYTES", "0")
    return open_place(url)


def test_what_is_written_is_read(place: Place) -> None:
    place.write("a/b.bin", b"0123456789")
    assert place.read("a/b.bin") == (place / "a").read("b.bin") == b"0123456789"
    assert place.read_ranges("a/b.bin", [(8, 20), (0, 2), (4, 4), (10, 12), (1, 9)]) == [
        b"89",
        b"01",
        b"",
        b"",
        b"12345678",
    ]
    assert place.read_ranges("a/b.bin", []) == []
    assert place.read_ranges("a/b.bin", [(30, 40)]) == [b""]
    assert place.read_end("a/b.bin", 3) == (b"789", 10)
    assert place.read_end("a/b.bin", 30) == (b"0123456789", 10)
    assert place.read_end("a/b.bin", 0) == (b"", 10)
    assert (place.size("a/b.bin"), place.size("a"), place.size("a/b.bin/c"), place.size("x")) == (10, None, None, None)
    assert place.exists("a/b.bin")
    assert not place.exists("a")
    place.write("a/b.bin", memoryview(b"new"))
    assert place.read("a/b.bin") == b"new"
    place.delete("a/b.bin")
    place.delete("a/b.bin")
    assert not place.exists("a/b.bin")


def test_an_empty_file_is_a_file(place: Place) -> None:
    place.write("z.bin", b"")
    assert (place.size("z.bin"), place.read("z.bin"), place.read_end("z.bin", 5)) == (0, b"", (b"", 0))
    assert place.read_ranges("z.bin", [(0, 5), (2, 3)]) == [b"", b""]
    assert list(place.files()) == [("z.bin", 0)]


def test_files_and_folders_are_listed(place: Place) -> None:
    for name in ("b/y.bin", "b/x/1", "b.bin", "a/1/2/3", "c"):
        place.write(name, name.encode())
    everything = [("a/1/2/3", 7), ("b/x/1", 5), ("b/y.bin", 7), ("b.bin", 5), ("c", 1)]
    assert list(place.files()) == everything
    assert list(place.files("b")) == [("b/x/1", 5), ("b/y.bin", 7)]
    assert list((place / "b").files()) == [("x/1", 5), ("y.bin", 7)]
    assert list(place.files("missing")) == []
    assert (place.folders(), place.folders("b"), place.folders("missing")) == (["a", "b"], ["x"], [])
    place.delete_all("b")
    place.delete_all("missing")
    assert [name for name, _ in place.files()] == ["a/1/2/3", "b.bin", "c"]
    place.delete_all()
    assert list(place.files()) == []


def test_a_file_can_be_moved(place: Place) -> None:
    place.write("a/one", b"1")
    place.write("two", b"2")
    place.move("a/one", "two")
    assert list(place.files()) == [("two", 1)]
    assert place.read("two") == b"1"
    place.move("two", "d/three")
    assert list(place.files()) == [("d/three", 1)]
    with pytest.raises(FileNotFoundError):
        place.move("missing", "x")


@pytest.mark.parametrize("name", ["missing", "missing/below"])
def test_a_missing_file_is_said_to_be_missing(place: Place, name: str) -> None:
    place.write("here", b"")
    for read in (
        place.read,
        lambda n: place.read_end(n, 1),
        lambda n: place.read_end(n, 0),
        lambda n: place.read_ranges(n, [(0, 1)]),
        lambda n: place.read_ranges(n, [(0, 1), (10 << 20, 11 << 20)]),
        lambda n: place.read_ranges(n, []),
        lambda n: place.read_limited(n, 10),
    ):
        with pytest.raises(FileNotFoundError):
            read(name)


def test_create_keeps_what_is_there(place: Place) -> None:
    assert place.create("x/commit", b"first")
    assert not place.create("x/commit", b"second")
    assert not place.create("x/commit", b"first")
    assert place.read("x/commit") == b"first"
    assert list(place.files()) == [("x/commit", 5)]


def test_only_one_of_many_creates(place: Place) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        if place.create("commit", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert place.read("commit") == str(won[0]).encode()


def test_a_file_beyond_its_limit_is_not_read(place: Place) -> None:
    place.write("big.json", b"x" * 100)
    assert len(place.read_limited("big.json", 100)) == 100
    with pytest.raises(CorruptError, match=r"big\.json: expected at most 99 bytes, found 100"):
        place.read_limited("big.json", 99)


def test_a_large_file_in_several_pieces(place: Place) -> None:
    data = bytes(range(251)) * 150_000  # 37 MB: three pieces, and an upload in parts
    place.write("large", data)
    assert place.size("large") == len(data)
    assert place.read("large") == data
    ranges = [(0, 5), (20_000_000, 37_000_000), (16_777_210, 16_777_220), (len(data) - 3, len(data) + 3)]
    assert place.read_ranges("large", ranges) == [data[a:b] for a, b in ranges]


def test_a_claim_is_held_by_one(place: Place) -> None:
    claim = place.claim("claims/0")
    assert claim is not None
    assert place.claim("claims/0") is None
    other = place.claim("claims/1")
    assert other is not None
    other.release()
    claim.release()
    claim.release()
    assert list(place.files()) == []
    again = place.claim("claims/0")
    assert again is not None
    again.release()


def test_a_place_can_be_sent_to_another_process(place: Place) -> None:
    place.write("a/x", b"1")
    copy = pickle.loads(pickle.dumps(place / "a"))
    if not str(place).startswith("memory"):
        assert copy.read("x") == b"1"
    assert str(copy) == f"{place}/a"


def test_a_local_copy_of_some_files(place: Place) -> None:
    files = {"tokenizer.json": b"{}", "sub/vocabulary.txt": b"a\nb\n"}
    for name, data in files.items():
        place.write(f"corpus/tokenizer/{name}", data)
    hashes = {name: sha256(data) for name, data in files.items()}
    folder = place.local_copy("corpus/tokenizer", hashes)
    assert {name: (folder / name).read_bytes() for name in files} == files
    if "disk-cache" in folder.parts:  # where a copy that was tampered with is made again
        (folder / "tokenizer.json").write_bytes(b"!!")
        (folder / "more").write_bytes(b"")
        again = place.local_copy("corpus/tokenizer", hashes)
        found = {p.relative_to(again).as_posix(): p.read_bytes() for p in again.rglob("*") if p.is_file()}
        assert found == files
    with pytest.raises(CorruptError, match=r"missing: missing; restore"):
        place.local_copy("corpus/tokenizer", {**hashes, "missing": "0" * 64})
    with pytest.raises(CorruptError, match=r"not what was written"):
        place.local_copy("corpus/tokenizer", {"tokenizer.json": "0" * 64})
    for name in ("../x", "/etc/passwd", "a/../../b", "", "a//b", "..\\x"):
        with pytest.raises(CorruptError, match="names of files in this folder"):
            place.local_copy("corpus/tokenizer", {name: "0" * 64})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "expected s3://BUCKET/FOLDER"),
        ("s3:///x", "expected s3://BUCKET/FOLDER"),
        ("s3://b/a//c", "parts are names"),
        ("s3://b/a/../c", "parts are names"),
        ("s3://b/a?x=1", "without \\? and #"),
        ("nonsense://b/a", "or another URL that fsspec knows, found nonsense://"),
    ],
)
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_place(url)


Ranges = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)).map(lambda t: (t[0], t[0] + t[1])), max_size=12)


@given(ranges=Ranges, gap=st.integers(0, 50), largest=st.integers(1, 200), size=st.integers(0, 450))
def test_merged_ranges_hold_all_of_them(ranges: list[tuple[int, int]], gap: int, largest: int, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    merged = merge_ranges(ranges, gap, largest)
    assert all(0 < b - a <= largest for a, b in merged)
    assert all(x[1] <= y[0] for x, y in itertools.pairwise(merged))
    pieces = [data[a:b] for a, b in merged]
    assert [cut_range(merged, pieces, a, b) for a, b in ranges] == [data[a:b] for a, b in ranges]
    wanted = sum(len(set(range(a, b))) for a, b in merged) - len({i for a, b in ranges for i in range(a, b)})
    assert wanted <= gap * max(0, len([r for r in ranges if r[1] > r[0]]) - 1)
