"""Stand between storage and the operating system: every call that changes the disk below a folder is told to a hook.

The hook may count, record, kill the process, or raise an error of the system: before a call, after it, or in the midst
of the writing of a file, half of whose bytes are then there. Nothing of storage is replaced; only ``os`` functions and
the ``open`` that ``durable`` uses.
"""

import builtins
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailcache.storage import durable

__all__ = ["CHANGING", "Call", "Hook", "Torn", "at", "die", "fail", "forked", "traced"]

CHANGING = ("open", "write", "fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir", "create")


@dataclass(frozen=True)
class Call:
    """One call that changes the disk."""

    number: int
    """From 0, of all calls below the folder."""
    name: str
    """One of ``CHANGING``; ``open`` makes or empties a file, ``create`` makes one if there is none."""
    path: str
    """Absolute."""
    to: str = ""
    """The other name, of replace, rename and link."""
    data: bytes = b""
    """Of write."""


Hook = Callable[[Call], None]


def _nothing(_: Call) -> None:
    pass


class Torn(BaseException):
    """Raised by a hook before a write: half of the data is to be written, then ``then`` is to be done."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self.then = then


@dataclass
class _Tracer:
    below: str
    before: Hook
    after: Hook
    count: int = 0
    original: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def call(self, name: str, path: str, do: Callable[[], Any], to: str = "", data: bytes = b"") -> Any:
        if not path.startswith(self.below):
            return do()
        call = Call(self.count, name, path, to, data)
        self.count += 1
        self.before(call)
        result = do()
        self.after(call)
        return result


class _File:
    """An open file whose writes are told."""

    def __init__(self, file: Any, path: str, tracer: _Tracer) -> None:
        self._file, self._path, self._tracer = file, path, tracer

    def write(self, data: bytes | memoryview) -> int:
        def half(torn: Torn) -> None:
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            torn.then()

        try:
            return int(self._tracer.call("write", self._path, lambda: self._file.write(data), data=bytes(data)))
        except Torn as torn:
            half(torn)
            raise

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _absolute(path: Any, dir_fd: int | None) -> str:
    text = os.fsdecode(path)
    return (
        text
        if os.path.isabs(text)
        else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd else os.getcwd(), text)
    )


@contextlib.contextmanager
def traced(below: Path, before: Hook = _nothing, after: Hook = _nothing) -> Iterator[_Tracer]:
    """Tell two hooks of each changing call on files below a folder; the device is not waited for."""
    tracer = _Tracer(str(below.resolve()), before, after)
    original = {
        name: getattr(os, name) for name in ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir", "open")
    }

    def opened(path: Any, mode: str = "r", *more: Any) -> Any:
        where = os.path.abspath(path)
        if "w" not in mode or not where.startswith(tracer.below):
            return builtins.open(path, mode, *more)
        return _File(tracer.call("open", where, lambda: builtins.open(path, mode, *more)), where, tracer)

    def fsync(descriptor: int) -> None:
        tracer.call("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), lambda: None)

    def os_open(path: Any, flags: int, *more: Any, **keywords: Any) -> Any:
        where = _absolute(path, keywords.get("dir_fd"))
        do: Callable[[], Any] = lambda: original["open"](path, flags, *more, **keywords)  # noqa: E731
        return tracer.call("create", where, do) if flags & os.O_CREAT else do()

    def two(name: str) -> Callable[..., None]:
        def function(source: Any, target: Any, **keywords: Any) -> None:
            do = lambda: original[name](source, target, **keywords)  # noqa: E731
            tracer.call(name, os.path.abspath(source), do, to=os.path.abspath(target))

        return function

    def one(name: str) -> Callable[..., None]:
        def function(path: Any, *more: Any, **keywords: Any) -> None:
            where = _absolute(path, keywords.get("dir_fd"))
            tracer.call(name, where, lambda: original[name](path, *more, **keywords))

        return function

    replaced = {"fsync": fsync, "open": os_open, **{name: two(name) for name in ("replace", "rename", "link")}}
    replaced |= {name: one(name) for name in ("mkdir", "unlink", "rmdir")}
    try:
        durable.open = opened  # type: ignore[attr-defined]
        for name, function in replaced.items():
            setattr(os, name, function)
        yield tracer
    finally:
        for name in replaced:
            setattr(os, name, original[name])
        del durable.open  # type: ignore[attr-defined]


def fail(code: int) -> None:
    """An error of the system."""
    raise OSError(code, os.strerror(code))


def die() -> None:
    """As the system kills a process: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def at(number: int, do: Callable[[], None], *, torn: bool = False) -> Hook:
    """A hook that does something at the call of that number; in the midst of it, where it is the writing of a file."""

    def hook(call: Call) -> None:
        if call.number == number:
            if torn and call.name == "write":
                raise Torn(do)
            do()

    return hook


def forked(work: Callable[[], None]) -> int:
    """Do something in a process of its own, and give back its exit status (negative: the signal that killed it)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, raw = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(raw)
