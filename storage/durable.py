"""Files that are either whole or not there, also after a power cut.

A file is written beside its final name, flushed to the device, renamed into place, and the folder that now
names it is flushed too. Readers never see half a file, and a name seen after a crash has its whole content.

Temporary names end in ``.tmp``; whatever is found under such a name belongs to a process that died and may be
deleted. Every error of the operating system comes out as ``StorageError`` with the file it happened to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from tailcache.storage.errors import StorageError, TailcacheError

__all__ = [
    "TEMPORARY",
    "create_file",
    "make_folder",
    "move_file",
    "named",
    "promote_folder",
    "remove_tree",
    "sha256",
    "sweep_temporary",
    "write_file",
]

TEMPORARY = ".tmp"


def sha256(data: bytes | memoryview) -> str:
    """Hex digest of some bytes."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def named(path: Path | str, doing: str, *, may_miss: bool = False) -> Iterator[None]:
    """Turn the operating system's errors into ``StorageError`` with the file and a remedy.

    Args:
      path: what the error is about.
      doing: what was tried, as in "writing".
      may_miss: leave the error of a missing file as it is.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, TailcacheError) or (may_miss and isinstance(error, FileNotFoundError)):
            raise
        if may_miss and isinstance(error, NotADirectoryError):  # a file where a folder would be: nothing is below it
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
        remedy = {
            errno.ENOSPC: "free some space and run the same command again; what is committed stays good",
            errno.EDQUOT: "raise the quota and run the same command again; what is committed stays good",
            errno.EROFS: "the file system is read-only; choose another place or remount it",
            errno.EACCES: "no permission; check the owner of the folder",
            errno.EPERM: "no permission; check the owner of the folder",
        }.get(error.errno or 0, "check the disk and run the same command again; what is committed stays good")
        raise StorageError(error.errno, f"{path}: {doing} failed: {error.strerror or error}; {remedy}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably; fine if it exists."""
    with named(folder, "creating the folder"):
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            _sync_folder(new.parent)


def _write_flushed(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it is whole on the device before its name exists.

    Args:
      path: the final name; its folder must exist. An existing file is replaced atomically.
      data: the whole content.

    Raises:
      StorageError: the disk is full, read-only or failing (also an ``OSError`` with the original ``errno``).
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with named(path, "writing"):
        try:
            _write_flushed(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def create_file(path: Path, data: bytes | memoryview) -> bool:
    """Write a file as ``write_file`` does, if there is none of that name.

    Returns:
      Whether it was written; False where there was one already, which is left as it is.

    Raises:
      StorageError: the disk is full, read-only or failing.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    with named(path, "writing"):
        try:
            _write_flushed(temporary, data)
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    return True


def move_file(path: Path, to: Path) -> None:
    """Give a file another name on the same device, durably, replacing what is there."""
    with named(path, "renaming", may_miss=True):
        os.replace(path, to)
        _sync_folder(to.parent)
        _sync_folder(path.parent)


def promote_folder(temporary: Path, final: Path) -> None:
    """Give a finished temporary folder its final name, durably. Its files must already be on the device."""
    with named(final, "renaming the finished folder"):
        for folder, _, _ in os.walk(temporary):
            _sync_folder(Path(folder))
        os.rename(temporary, final)
        _sync_folder(final.parent)


def remove_tree(path: Path) -> None:
    """Delete a file or a folder with all it holds; fine if it is not there, or if others delete it too."""
    with named(path, "deleting"):
        while path.is_dir() and not path.is_symlink():
            try:
                shutil.rmtree(path)
            except FileNotFoundError:  # another process was there first
                continue
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # another process has made a file meanwhile
                    raise
        path.unlink(missing_ok=True)


def sweep_temporary(folder: Path) -> None:
    """Delete what a process that died left half-written below a folder."""
    with named(folder, "sweeping temporary files"):
        for parent, _, files in os.walk(folder):
            for name in files:
                if name.endswith(TEMPORARY):
                    (Path(parent) / name).unlink(missing_ok=True)
