"""What a disk may hold after the power is cut: everything that was flushed, and any part of what was not.

A model of a file system that promises no more than POSIX does. The bytes of a file are on the device once the file
was flushed; a name (made, moved, linked or deleted) is once its folder was flushed. What was not flushed may be there
or not, each part for itself, in any order; unflushed bytes may be missing, cut short or zeros. Only the renaming of a
file within one folder is atomic.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from syscalls import Call


@dataclass(eq=False)
class File:
    """A file, by whatever names."""

    data: bytes = b""
    synced: bytes | None = b""
    """What is on the device; none where nobody knows."""


@dataclass
class _Change:
    """A change of a folder's names that is not yet on the device."""

    order: int
    folder: Folder
    put: dict[str, Node]
    drop: tuple[str, ...] = ()


@dataclass(eq=False)
class Folder:
    """A folder: the names that are on the device, those that processes see, and what lies between."""

    synced: dict[str, Node] = field(default_factory=dict)
    live: dict[str, Node] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)


Node = File | Folder
State = dict[str, bytes]
_CONTENTS = ("whole", "half", "empty", "zeros")


class Disk:
    """Follows the calls of a process, and says what could be left of them.

    Args:
      root: the folder that is watched; it exists, with what is in it, on the device.
    """

    def __init__(self, root: str) -> None:
        self._root, self._tree, self._order = root, Folder(), itertools.count()
        self._load(root, self._tree)

    def _load(self, path: str, folder: Folder) -> None:
        for entry in os.scandir(path):
            if entry.is_dir():
                node: Node = Folder()
                assert isinstance(node, Folder)
                self._load(entry.path, node)
            else:
                with open(entry.path, "rb") as file:
                    data = file.read()
                node = File(data, data)
            folder.synced[entry.name] = folder.live[entry.name] = node

    def _find(self, path: str) -> tuple[Folder, str]:
        *above, name = os.path.relpath(path, self._root).split(os.sep)
        folder = self._tree
        for part in above:
            found = folder.live[part]
            assert isinstance(found, Folder)
            folder = found
        return folder, name

    def _node(self, path: str) -> Node:
        if path == self._root:
            return self._tree
        folder, name = self._find(path)
        return folder.live[name]

    def _change(self, folder: Folder, put: dict[str, Node], *drop: str) -> None:
        for name in drop:
            folder.live.pop(name, None)
        folder.live.update(put)
        folder.pending.append(_Change(next(self._order), folder, put, drop))

    def saw(self, call: Call) -> None:
        """A call that has succeeded."""
        if call.name == "fsync":
            node = self._node(call.path)
            if isinstance(node, File):
                node.synced = node.data
            else:
                node.synced, node.pending = dict(node.live), []
            return
        folder, name = self._find(call.path)
        if call.name == "write":
            file = folder.live[name]
            assert isinstance(file, File)
            file.data, file.synced = file.data + call.data, None
        elif call.name == "open" and name in folder.live:
            file = folder.live[name]
            assert isinstance(file, File)
            file.data, file.synced = b"", None
        elif call.name in ("open", "mkdir") or (call.name == "create" and name not in folder.live):
            self._change(folder, {name: Folder() if call.name == "mkdir" else File()})
        elif call.name in ("unlink", "rmdir"):
            self._change(folder, {}, name)
        elif call.name in ("replace", "rename", "link"):
            target, new = self._find(call.to)
            node = folder.live[name]
            if target is folder:
                self._change(folder, {new: node}, *(() if call.name == "link" else (name,)))
            else:
                self._change(target, {new: node})
                if call.name != "link":
                    self._change(folder, {}, name)

    # -- after the power came back ---------------------------------------------------------------------------------

    def _changes(self) -> list[_Change]:
        found: list[_Change] = []
        seen: set[int] = set()
        todo: list[Folder] = [self._tree]
        while todo:
            folder = todo.pop()
            if id(folder) in seen:
                continue
            seen.add(id(folder))
            found += folder.pending
            nodes = [*folder.synced.values(), *folder.live.values()]
            nodes += [node for change in folder.pending for node in change.put.values()]
            todo += [node for node in nodes if isinstance(node, Folder)]
        return sorted(found, key=lambda change: change.order)

    def _state(self, kept: set[int], content: str) -> State:
        state: State = {}

        def walk(folder: Folder, path: str) -> None:
            names = dict(folder.synced)
            for change in folder.pending:
                if change.order in kept:
                    for name in change.drop:
                        names.pop(name, None)
                    names.update(change.put)
            if not names:
                state[path + "/"] = b""  # an empty folder
            for name, node in names.items():
                where = f"{path}/{name}" if path else name
                if isinstance(node, Folder):
                    walk(node, where)
                else:
                    state[where] = node.synced if node.synced is not None else _torn(node.data, content)

        walk(self._tree, "")
        state.pop("/", None)
        return state

    def states(self, generator: random.Random, most: int = 12) -> Iterator[State]:
        """Different contents of the device that are possible now: all of them where they are few, else a choice.

        Args:
          generator: chooses.
          most: of unflushed changes of names that are tried in all combinations are ``log2(most)``.
        """
        orders = [change.order for change in self._changes()]
        if 1 << len(orders) <= most:
            chosen = [set(part) for size in range(len(orders) + 1) for part in itertools.combinations(orders, size)]
        else:
            chosen = [
                set(),
                set(orders),
                *({order} for order in orders[-4:]),
                *(set(orders) - {o} for o in orders[-4:]),
            ]
            chosen += [{order for order in orders if generator.random() < 0.5} for _ in range(4)]
        unsynced = any(isinstance(node, File) and node.synced is None for node in self._files(self._tree))
        for kept in chosen:
            for content in _CONTENTS if unsynced else _CONTENTS[:1]:
                yield self._state(kept, content)

    def _files(self, folder: Folder) -> Iterator[Node]:
        nodes = [*folder.live.values(), *(node for change in folder.pending for node in change.put.values())]
        for node in nodes:
            if isinstance(node, Folder):
                yield from self._files(node)
            else:
                yield node


def _torn(data: bytes, content: str) -> bytes:
    return {"whole": data, "half": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data))}[content]
