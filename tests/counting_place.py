"""A place that notes what is asked of it, and asks another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tailcache.storage.place import Claim, Place


@dataclass
class Asked:
    """What was asked of a place, and of all places below it."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    """Method and full name, in order."""
    num_bytes: int = 0
    """Bytes that were read."""

    def clear(self) -> None:
        """Forget it."""
        self.calls.clear()
        self.num_bytes = 0

    def names(self, *methods: str) -> set[str]:
        """Names that any of some methods were called with; of all methods by default."""
        return {name for method, name in self.calls if method in methods or not methods}


class CountingPlace(Place):
    """A place that counts; ``local`` is none where it is to look like a remote one."""

    def __init__(self, inner: Place, asked: Asked | None = None, *, remote: bool = False, prefix: str = "") -> None:
        self.inner, self.asked, self.remote, self._prefix = inner, asked or Asked(), remote, prefix

    def _note(self, method: str, name: str) -> None:
        self.asked.calls.append((method, self._prefix + name))

    def __str__(self) -> str:
        return str(self.inner)

    def __truediv__(self, name: str) -> CountingPlace:
        return CountingPlace(self.inner / name, self.asked, remote=self.remote, prefix=f"{self._prefix}{name}/")

    @property
    def local(self) -> Path | None:
        return None if self.remote else self.inner.local

    def read(self, name: str) -> bytes:
        self._note("read", name)
        data = self.inner.read(name)
        self.asked.num_bytes += len(data)
        return data

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        self._note("read_ranges", name)
        parts = self.inner.read_ranges(name, ranges)
        self.asked.num_bytes += sum(map(len, parts))
        return parts

    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        self._note("read_end", name)
        data, size = self.inner.read_end(name, count)
        self.asked.num_bytes += len(data)
        return data, size

    def size(self, name: str) -> int | None:
        self._note("size", name)
        return self.inner.size(name)

    def write(self, name: str, data: bytes | memoryview) -> None:
        self._note("write", name)
        self.inner.write(name, data)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        self._note("create", name)
        return self.inner.create(name, data)

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        self._note("files", below)
        return self.inner.files(below)

    def folders(self, below: str = "") -> list[str]:
        self._note("folders", below)
        return self.inner.folders(below)

    def delete(self, name: str) -> None:
        self._note("delete", name)
        self.inner.delete(name)

    def delete_all(self, below: str = "") -> None:
        self._note("delete_all", below)
        self.inner.delete_all(below)

    def move(self, name: str, to: str) -> None:
        self._note("move", name)
        self.inner.move(name, to)

    def claim(self, name: str) -> Claim | None:
        self._note("claim", name)
        return self.inner.claim(name)
