"""Files that are whole or not there: the order of write, flush, rename and flush of the folder; errors with a name."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tailcache.storage import durable
from tailcache.storage.errors import StorageError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the operating system, in order: the call, and the file or folder it is about."""
    seen: list[tuple[str, str]] = []
    real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def fsync(descriptor: int) -> None:
        seen.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        seen.append(("replace", Path(target).name))
        real_replace(source, target)

    def rename(source: Any, target: Any) -> None:
        seen.append(("rename", Path(target).name))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", rename)
    return seen


def test_write_file_flushes_before_and_after_the_name_exists(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    durable.write_file(folder / "file", b"abc")
    assert calls == [("fsync", "file.tmp"), ("replace", "file"), ("fsync", "folder")]
    assert (folder / "file").read_bytes() == b"abc"
    durable.write_file(folder / "file", memoryview(b"other"))
    assert (folder / "file").read_bytes() == b"other"
    assert [p.name for p in folder.iterdir()] == ["file"]


def test_make_folder_flushes_every_new_name(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    durable.make_folder(tmp_path / "a" / "b")
    assert calls == [("fsync", tmp_path.name), ("fsync", "a")]
    durable.make_folder(tmp_path / "a" / "b")
    assert len(calls) == 2


def test_promote_folder_flushes_all_below_first(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    (tmp_path / "x.tmp" / "inner").mkdir(parents=True)
    durable.promote_folder(tmp_path / "x.tmp", tmp_path / "x")
    assert calls == [("fsync", "x.tmp"), ("fsync", "inner"), ("rename", "x"), ("fsync", tmp_path.name)]
    assert (tmp_path / "x" / "inner").is_dir()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_name_the_file_and_leave_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    path = tmp_path / "file"
    durable.write_file(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match="file: writing failed") as caught:
        durable.write_file(path, b"new")
    assert caught.value.errno == code
    assert os.strerror(code) in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "the temporary file is gone"


def test_missing_places_are_storage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=str(tmp_path)):
        durable.write_file(tmp_path / "nowhere" / "file", b"")
    with pytest.raises(StorageError, match=str(tmp_path)):
        durable.make_folder(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match=str(tmp_path)):
        durable.promote_folder(tmp_path / "nowhere", tmp_path / "x")


def test_remove_and_sweep(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/x.tmp", "a/b/y.tmp", "a/b/kept"):
        (tmp_path / name).write_bytes(b"")
    durable.sweep_temporary(tmp_path)
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["kept"]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    durable.remove_tree(tmp_path / "link")
    assert (tmp_path / "a" / "b" / "kept").exists()
    durable.remove_tree(tmp_path / "a" / "b" / "kept")
    durable.remove_tree(tmp_path / "a")
    durable.remove_tree(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
