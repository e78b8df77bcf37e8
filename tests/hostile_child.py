"""Open and read a cache from anywhere, in a process that reports whatever else it is made to do.

    python hostile_child.py GOOD HOSTILE

A good cache is read first, so that everything is imported. Then an audit hook watches: code that is compiled or run,
modules that are imported, processes, sockets, pickles, and files opened outside of the cache or for writing. Memory is
limited. The last line printed is a JSON object: what reading, verifying and loading came to, and what the hook saw.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tailcache.storage import objects
from tailcache.storage.errors import TailcacheError
from tailcache.storage.inventory import teacher_inventory
from tailcache.storage.reader import open_cache
from tailcache.storage.verify import verify

FORBIDDEN = (
    "compile", "exec", "import", "pickle.", "marshal.", "subprocess.", "os.system", "os.exec", "os.fork", "os.spawn",
    "os.posix_spawn", "os.startfile", "socket.", "ctypes.", "code.", "urllib.", "ftplib.", "http.", "pty.", "mmap.",
    "os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate",
    "shutil.", "sqlite3.",
)  # fmt: skip
MEMORY = 768 << 20
seen: list[str] = []
watching = False
inside = ""


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what a cache must not cause."""
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if isinstance(path, int) or (not writes and os.path.realpath(os.fsdecode(path)).startswith(inside)):
            return
        seen.append(f"open {path!r} {mode} {flags}")
    elif event.startswith(FORBIDDEN):
        seen.append(f"{event} {str(arguments)[:200]}")


def read(cache: Path) -> dict[str, Any]:
    """Everything a reader does with a cache, and what came of it."""
    outcome: dict[str, Any] = {}

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            outcome[name] = work()
        except TailcacheError as error:
            outcome[name] = f"{type(error).__name__}: {error}"
        except BaseException as error:
            outcome[name] = f"UNNAMED {type(error).__name__}: {error}"

    def rows() -> list[float]:
        teacher = open_cache(cache).teacher("t")
        found = teacher.rows(0, teacher.corpus.num_rows, optional=teacher.optional)
        teacher.positions(found.token_ids[:0, 0])
        return [float(value) for value in (found.log_tail.sum(), found.token_ids.sum(), found.logprobs.sum())]

    def constants() -> list[float]:
        teacher = open_cache(cache).teacher("t")
        head = teacher.head() if teacher.hidden_kind != "none" else None
        return [float(teacher.mean_tail.sum()), 0.0 if head is None else float(head.weight.sum())]

    def corpus() -> list[float]:
        found = open_cache(cache).corpus
        return [float(found.rows(0, found.num_rows).tokens.sum()), float(found.token_counts.sum())]

    def info() -> list[int]:
        found = teacher_inventory(open_cache(cache).corpus, "t")
        return [found.committed_shards, found.positions, sum(found.field_bytes.values())]

    attempt("rows", rows)
    attempt("info", info)
    attempt("constants", constants)
    attempt("corpus", corpus)
    attempt("verify", lambda: [str(fault) for fault in verify(cache)])
    return outcome


def main(good: str, hostile: list[str]) -> None:
    """Read one after the other."""
    global watching, inside
    read(Path(good))
    with mock.patch.object(objects, "read_directly", return_value=None):
        read(Path(good))  # as what cannot be read directly will be
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.addaudithook(hook)
    results = {}
    for name in hostile:
        seen.clear()
        inside = os.path.realpath(name)
        watching = True
        outcome = read(Path(name))
        watching = False
        results[name] = {**outcome, "seen": list(seen)}
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
