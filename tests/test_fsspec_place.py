"""File systems of fsspec: the hub's, with a folder in place of its servers, and errors of all kinds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError

from tailcache.storage.errors import ConfigError, StorageError
from tailcache.storage.fsspec_place import FileSystemPlace
from tailcache.storage.place import Place, open_place

REPOSITORY = "datasets/someone/targets"


class LocalHub(LocalFileSystem):  # type: ignore[misc]
    """The calls of ``HfFileSystem`` that a place makes, answered from a folder, with the hub's own exceptions."""

    protocol = "hf"
    cachable = False
    root = ""
    commits = 0
    failures: list[Exception]
    cut = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        text: str = HfFileSystem._strip_protocol(path)
        return text

    def _there(self, path: str) -> str:
        if LocalHub.failures:
            raise LocalHub.failures.pop(0)
        assert path.startswith(REPOSITORY), path
        return os.path.join(LocalHub.root, path)

    def _name(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "name": os.path.relpath(info["name"], LocalHub.root)}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._name(super().info(self._there(path)))

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
        found = LocalFileSystem().ls(self._there(path), detail=True)
        return [self._name(info) if detail else self._name(info)["name"] for info in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data: bytes = Path(self._there(path)).read_bytes()[start:end]
        if LocalHub.cut:
            LocalHub.cut -= 1
            return data[: len(data) // 2]
        return data

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        target = Path(self._there(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(value)
        LocalHub.commits += 1

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        there = self._there(path)
        if not os.path.exists(there):
            raise FileNotFoundError(path)
        super().rm(there, recursive=recursive)
        LocalHub.commits += 1

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        self.pipe_file(path2, self.cat_file(path1))
        self.rm(path1)

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **kwargs: Any) -> dict[str, Any]:
        found = LocalFileSystem().find(self._there(path), detail=True)
        return {self._name(info)["name"]: self._name(info) for info in found.values()}


httpx: Any = import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
"""Which of its forks the hub's client uses."""


def hub_error(status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return HfHubHTTPError(f"{status} for the test", response=response)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("TAILCACHE_DISK_CACHE", str(tmp_path / "disk-cache"))
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "5")
    monkeypatch.setattr(LocalHub, "root", str(tmp_path / "hub"))
    monkeypatch.setattr(LocalHub, "commits", 0)
    monkeypatch.setattr(LocalHub, "failures", [], raising=False)
    known = dict(fsspec.registry)
    fsspec.register_implementation("hf", LocalHub, clobber=True)
    yield open_place(f"hf://{REPOSITORY}/cache")
    from fsspec.registry import _registry

    _registry.clear()
    _registry.update(known)


def test_the_hubs_own_file_system_is_what_opens_hf() -> None:
    place = open_place(f"hf://{REPOSITORY}/cache").uncached()
    assert isinstance(place, FileSystemPlace)
    assert isinstance(place._system, HfFileSystem)
    assert str(place) == f"hf://{REPOSITORY}/cache"
    revision = open_place(f"hf://{REPOSITORY}@v1/cache")
    assert str(revision) == f"hf://{REPOSITORY}@v1/cache"


def test_a_place_on_the_hub(hub: Place) -> None:
    hub.write("a/x", b"0123456789")
    assert (hub.read("a/x"), hub.read_ranges("a/x", [(2, 4), (8, 30)]), hub.read_end("a/x", 2)) == (
        b"0123456789",
        [b"23", b"89"],
        (b"89", 10),
    )
    assert LocalHub.commits == 1
    assert hub.create("a/y", b"y")
    assert not hub.create("a/y", b"z")
    assert list(hub.files()) == [("a/x", 10), ("a/y", 1)]
    assert hub.folders() == ["a"]
    assert (hub.size("a"), hub.size("a/x"), hub.size("b")) == (None, 10, None)
    hub.move("a/x", "b/x")
    hub.delete("a/y")
    hub.delete("a/y")
    assert list(hub.files()) == [("b/x", 10)]
    with pytest.raises(FileNotFoundError):
        hub.read("a/x")
    hub.delete_all()
    assert list(hub.files()) == []
    assert hub.folders() == []


def test_a_claim_on_the_hub_is_renewed_rarely(hub: Place) -> None:
    claim = hub.claim("claims/0")
    assert claim is not None
    assert hub.claim("claims/0") is None
    assert b'"lease_seconds": 900' in hub.read("claims/0")
    claim.release()
    assert LocalHub.commits == 2
    assert list(hub.files()) == []


def test_what_passes_is_waited_for(hub: Place) -> None:
    hub.write("x", b"0123456789")
    for error in (hub_error(503), hub_error(500), hub_error(429), httpx.ReadTimeout("slow"), ConnectionResetError()):
        for read in (hub.read, lambda n: hub.read_end(n, 30)[0], lambda n: hub.read_ranges(n, [(0, 10)])[0]):
            LocalHub.failures = [error, error]
            assert read("x") == b"0123456789"
        LocalHub.failures = [error]
        hub.write("y", b"1")
        LocalHub.failures = [error]
        assert [name for name, _ in hub.files()] == ["x", "y"]


def test_a_short_answer_is_not_the_file(hub: Place) -> None:
    hub.write("x", b"0123456789")
    LocalHub.cut = 2
    assert hub.read("x") == b"0123456789"
    LocalHub.cut = 2
    assert hub.read_ranges("x", [(0, 9)]) == [b"012345678"]
    LocalHub.cut = 1
    assert hub.read_end("x", 4) == (b"6789", 10)


def test_what_does_not_pass_is_an_error_in_time(hub: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.write("x", b"0123456789")
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.3")
    impatient = open_place(f"hf://{REPOSITORY}/cache")
    for error, times, message in (
        (hub_error(503), 100, r"reading failed, tried \d+ times in .*503 for the test; check the network"),
        (hub_error(401), 1, "tried once; .*401 for the test; check the credentials .HF_TOKEN"),
        (hub_error(403), 1, "tried once; .*403 for the test; check the credentials .HF_TOKEN"),
        (hub_error(400), 1, "tried once; .*400 for the test; check the URL"),
        (PermissionError("no"), 1, "tried once; .*PermissionError: no; check the credentials"),
        (RuntimeError("odd"), 1, "tried once; .*RuntimeError: odd; check the URL"),
    ):
        LocalHub.failures = [error] * times
        start = time.monotonic()
        with pytest.raises(StorageError, match=f"hf://{REPOSITORY}/cache/x: .*{message}"):
            impatient.read("x")
        assert time.monotonic() - start < 3
        LocalHub.failures = []


def test_created_once_though_the_answer_was_lost(hub: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LocalHub.pipe_file

    def loses_answer(self: LocalHub, path: str, value: bytes, **kwargs: Any) -> None:
        monkeypatch.setattr(LocalHub, "pipe_file", whole)
        whole(self, path, value)
        raise hub_error(504)

    monkeypatch.setattr(LocalHub, "pipe_file", loses_answer)
    assert hub.create("commit", b"mine")
    assert not hub.create("commit", b"mine")


def test_a_file_system_that_has_no_package() -> None:
    with pytest.raises(ConfigError, match=r"fsspec cannot open adl:// yet: .*pip install 'tailcache\[remote\]'"):
        open_place("adl://store/x")


def test_writing_by_renaming_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is neither the hub's nor memory: written beside, then renamed."""
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.1")
    monkeypatch.setenv("TAILCACHE_DISK_CACHE_BYTES", "0")
    place = open_place(f"local://{tmp_path}/cache")
    place.write("a/x", b"old")
    pipe = LocalFileSystem.pipe_file

    def half(self: Any, path: str, value: bytes, **kwargs: Any) -> None:
        pipe(self, path, value[: len(value) // 2])
        raise OSError("the connection is gone")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", half)
    with pytest.raises(StorageError, match="the connection is gone"):
        place.write("a/x", b"new and longer")
    with pytest.raises(StorageError, match="the connection is gone"):
        place.write("a/y", b"new and longer")
    assert place.read("a/x") == b"old"
    assert place.size("a/y") is None
