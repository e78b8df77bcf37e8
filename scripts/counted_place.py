"""A place that counts the bytes that are read from it, for benchmarks; nothing is written through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailcache.storage.place import Claim, Place

__all__ = ["Count", "CountedPlace"]


@dataclass
class Count:
    """Bytes read from a place and all below it."""

    num_bytes: int = 0


class CountedPlace(Place):
    """Asks another place, and counts."""

    def __init__(self, inner: Place, count: Count | None = None) -> None:
        self.inner, self.count = inner, count or Count()

    def __str__(self) -> str:
        return str(self.inner)

    def __truediv__(self, name: str) -> Place:
        return CountedPlace(self.inner / name, self.count)

    @property
    def local(self) -> Path | None:
        """As the other one says."""
        return self.inner.local

    @property
    def survives_fork(self) -> bool:
        """As the other one says."""
        return self.inner.survives_fork

    def map(self, action: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """As the other one does it."""
        return self.inner.map(action, items)

    def expect(self, name: str, sha256: str, size: int | None = None) -> None:
        """Tell the other one."""
        self.inner.expect(name, sha256, size)

    def read(self, name: str) -> bytes:
        """A whole file."""
        data = self.inner.read(name)
        self.count.num_bytes += len(data)
        return data

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """Some byte ranges of a file."""
        parts = self.inner.read_ranges(name, ranges)
        self.count.num_bytes += sum(map(len, parts))
        return parts

    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        """The last bytes of a file, and its size."""
        data, size = self.inner.read_end(name, count)
        self.count.num_bytes += len(data)
        return data, size

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        return self.inner.size(name)

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        """Names and sizes of all files below a folder."""
        return self.inner.files(below)

    def folders(self, below: str = "") -> list[str]:
        """Names of the folders directly in a folder."""
        return self.inner.folders(below)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Refused, as all that follows."""
        raise self._refusal

    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Refused."""
        raise self._refusal

    def delete(self, name: str) -> None:
        """Refused."""
        raise self._refusal

    def delete_all(self, below: str = "") -> None:
        """Refused."""
        raise self._refusal

    def move(self, name: str, to: str) -> None:
        """Refused."""
        raise self._refusal

    @property
    def _refusal(self) -> PermissionError:
        return PermissionError(f"{self}: nothing is written in a benchmark of reading")

    def claim(self, name: str) -> Claim | None:
        """Not needed to read."""
        return None
