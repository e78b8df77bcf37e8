"""A place in memory: thousands of states of a disk are looked at without writing any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tailcache.storage.place import Claim, Place


class _Held:
    def __init__(self, held: set[str], name: str) -> None:
        self._held, self._name = held, name

    def release(self) -> None:
        self._held.discard(self._name)


class MemoryPlace(Place):
    """Files by name; a name that ends in "/" is an empty folder."""

    def __init__(self, content: dict[str, bytes], prefix: str = "", held: set[str] | None = None) -> None:
        self.content, self._prefix = content, prefix
        self._held: set[str] = set() if held is None else held

    def __str__(self) -> str:
        return f"memory:/{self._prefix}".rstrip("/")

    def __truediv__(self, name: str) -> Place:
        return MemoryPlace(self.content, f"{self._prefix}{name}/", self._held)

    def read(self, name: str) -> bytes:
        try:
            return self.content[self._prefix + name]
        except KeyError:
            raise FileNotFoundError(f"{self}/{name}") from None

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        data = self.read(name)
        return [data[first:last] for first, last in ranges]

    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        data = self.read(name)
        return data[max(0, len(data) - count) :], len(data)

    def size(self, name: str) -> int | None:
        found = self.content.get(self._prefix + name)
        return None if found is None else len(found)

    def write(self, name: str, data: bytes | memoryview) -> None:
        self.content[self._prefix + name] = bytes(data)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        if self._prefix + name in self.content:
            return False
        self.write(name, data)
        return True

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        top = self._prefix + (f"{below}/" if below else "")
        for name in sorted(self.content):
            if name.startswith(top) and not name.endswith("/"):
                yield name.removeprefix(self._prefix), len(self.content[name])

    def folders(self, below: str = "") -> list[str]:
        top = self._prefix + (f"{below}/" if below else "")
        inside = (name.removeprefix(top) for name in self.content if name.startswith(top))
        return sorted({name.split("/")[0] for name in inside if "/" in name})

    def delete(self, name: str) -> None:
        self.content.pop(self._prefix + name, None)

    def delete_all(self, below: str = "") -> None:
        top = self._prefix + (f"{below}/" if below else "")
        for name in [name for name in self.content if name.startswith(top)]:
            del self.content[name]

    def move(self, name: str, to: str) -> None:
        self.content[self._prefix + to] = self.read(name)
        self.delete(name)

    def claim(self, name: str) -> Claim | None:
        key = self._prefix + name
        if key in self._held:
            return None
        self._held.add(key)
        return _Held(self._held, key)
