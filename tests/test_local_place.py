"""The place on a local disk: what it promises beyond every place (``test_places``): locks, links, what is no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tailcache.storage.errors import CorruptError, StorageError
from tailcache.storage.local_place import LocalPlace
from tailcache.storage.place import open_place


@pytest.fixture
def place(tmp_path: Path) -> LocalPlace:
    return LocalPlace(tmp_path / "cache")


@pytest.mark.parametrize("name", ["missing", "here/below"])
def test_a_missing_file_is_said_to_be_missing(place: LocalPlace, name: str) -> None:
    place.write("here", b"")
    for read in (place.read, lambda n: place.read_end(n, 1), lambda n: place.read_ranges(n, [(0, 1)])):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            read(name)


def test_a_claim_ends_with_its_process(place: LocalPlace) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tailcache.storage.local_place import LocalPlace\n"
        f"claim = LocalPlace(Path({str(place)!r})).claim('claims/0'); print(claim is not None, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert place.claim("claims/0") is None
        process.kill()
        process.wait()
    claim = place.claim("claims/0")
    assert claim is not None
    claim.release()


def test_errors_of_the_disk_have_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="creating the folder"):
        LocalPlace(tmp_path / "file").write("x/y", b"")


def test_locations(tmp_path: Path) -> None:
    assert str(open_place(tmp_path)) == str(open_place(f"file://{tmp_path}")) == str(tmp_path)
    place = open_place(str(tmp_path))
    assert open_place(place) is place
    assert place.local == tmp_path


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_nothing_is_written_or_deleted_by_way_of_a_link(tmp_path: Path, depth: int) -> None:
    """A cache may come from anywhere: its links must not lead a writer out of it."""
    outside = tmp_path / "outside"
    (outside / "b").mkdir(parents=True)
    (outside / "b" / "kept").write_bytes(b"kept")
    (tmp_path / "real").mkdir()
    (tmp_path / "cache").symlink_to("real")  # of the cache itself, its user knows
    root = LocalPlace(tmp_path / "cache")
    root.write("fine/x", b"1")
    link = tmp_path / "cache" / ["a", "t/a", "t/u/a"][depth]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    place = root / str(link.parent.relative_to(tmp_path / "cache"))
    for act in (
        lambda: place.write("a/new", b""),
        lambda: place.write("a/b/kept", b""),
        lambda: place.create("a/new", b""),
        lambda: place.delete("a/b/kept"),
        lambda: place.delete_all("a/b"),
        lambda: place.move("a/b/kept", "here"),
        lambda: place.move("a", "here"),
        lambda: place.claim("a/claim"),
        lambda: (place / "a").write("new", b""),
        lambda: (place / "a" / "b").delete("kept"),
    ):
        with pytest.raises(CorruptError, match=r"a: expected a file or folder of a cache, found a symbolic link"):
            act()
    assert [(path.name, path.is_file() and path.read_bytes()) for path in sorted(outside.rglob("*"))] == [
        ("b", False), ("kept", b"kept"),
    ]  # fmt: skip
    place.delete("a")  # the link, not what it points to
    assert not link.is_symlink()
    assert (outside / "b" / "kept").exists()


def test_what_is_no_file_is_not_read(place: LocalPlace, tmp_path: Path) -> None:
    """A pipe would be waited for, a device read without an end."""
    place.write("folder/x", b"")
    os.mkfifo(tmp_path / "cache" / "pipe")
    (tmp_path / "cache" / "device").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "device"):
        assert place.size(name) is None
        for read in (place.read, lambda n: place.read_end(n, 1), lambda n: place.read_ranges(n, [(0, 1)])):
            with pytest.raises(CorruptError, match=f"{name}: expected a file, found a folder, device or pipe"):
                read(name)
