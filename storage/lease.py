"""Claims where there are no locks: a file that says who works, for as long as it is rewritten again and again.

Who wants to work creates the file, which only one can. A thread rewrites it three times per lease, so that its age, by
the store's own clock, stays below the lease while the process lives. A file that is older belongs to a process that
died or lost its network, and may be replaced, which again only one can. On the machine it died on (Linux), a process'
lease ends at once.

    TAILCACHE_LEASE_SECONDS   how long a claim outlives its process (default 60)

A claim keeps others from doing the same work; it does not keep them from writing. A process that was stopped for longer
than its lease goes on without knowing that another took over. What is done under a claim must therefore be harmless
when it is done twice, and commits are: the same bytes under the same name, of which the first ones stay.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tailcache.storage.errors import StorageError, TailcacheError
from tailcache.storage.retry import number_from_environment

__all__ = ["Lease", "LeaseFile", "Look", "lease_seconds", "take"]

_CLOCK_MARGIN = 2.0  # stores tell the time in whole seconds
_log = logging.getLogger(__name__)


def lease_seconds() -> float:
    """How long a claim outlives its process.

    Raises:
      ConfigError: TAILCACHE_LEASE_SECONDS is not a number.
    """
    return max(0.1, number_from_environment("TAILCACHE_LEASE_SECONDS", 60))


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a lease file holds."""

    data: bytes
    version: Any
    """What ``replace`` needs in order to replace this content and no other."""
    age: float
    """Seconds since it was written, by the clock of the store."""


class LeaseFile(Protocol):
    """One file of a store. All methods raise ``StorageError`` where the store fails."""

    def create(self, data: bytes) -> Any | None:
        """Write it if it is not there; its version, or none where it was there."""

    def replace(self, data: bytes, version: Any) -> Any | None:
        """Write it if it is still of a version; its new version, or none where it is not."""

    def look(self) -> Look | None:
        """What it holds; none where it is not there."""

    def delete(self) -> None:
        """Delete it; fine if it is not there."""


def _this_process() -> dict[str, str]:
    """What tells a process from all others on all machines, where the system says so (Linux)."""
    try:
        start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "space": os.readlink("/proc/self/ns/pid"), "pid": str(os.getpid()), "start": start}
    except (OSError, IndexError):
        return {}


def _is_dead(process: Any) -> bool:
    """The process ran on this machine, where processes are numbered as for this one, and is gone."""
    here = _this_process()
    if not here or not isinstance(process, dict) or any(process.get(k) != here[k] for k in ("boot", "space")):
        return False
    pid, start = process.get("pid"), process.get("start")
    if not (isinstance(pid, str) and pid.isascii() and pid.isdigit()):
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return len(fields) > 19 and (fields[19] != start or fields[0] == "Z")


def _owner(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def take(file: LeaseFile, name: str, *, at_least: float = 0.0) -> Lease | None:
    """Take a lease, or none where another has it.

    Args:
      file: where it is kept.
      name: how to call it in messages.
      at_least: the shortest lease, in seconds, for stores that do not like to be written to often.

    Raises:
      StorageError: the store fails.
    """
    seconds = max(lease_seconds(), at_least)
    owner = uuid.uuid4().hex
    body = _body(owner, seconds)
    for _ in range(3):
        version = file.create(body(0))
        if version is not None:
            return Lease(file, name, owner, body, version, seconds)
        found = file.look()
        if found is None:
            continue  # released just now
        record = _owner(found.data)
        theirs = record.get("lease_seconds")
        limit = float(theirs) if isinstance(theirs, int | float) and 0 < theirs < 86_400 else seconds
        if found.age <= limit + _CLOCK_MARGIN and not _is_dead(record.get("process")):
            return None
        version = file.replace(body(0), found.version)
        return None if version is None else Lease(file, name, owner, body, version, seconds)
    return None


def _body(owner: str, seconds: float) -> Callable[[int], bytes]:
    process = _this_process()

    def body(beat: int) -> bytes:
        record = {"owner": owner, "beat": beat, "lease_seconds": seconds, "process": process, "time": time.time()}
        return json.dumps(record, sort_keys=True).encode()

    return body


class Lease:
    """A claim that is kept alive by a thread until it is released."""

    def __init__(
        self,
        file: LeaseFile,
        name: str,
        owner: str,
        body: Callable[[int], bytes],
        version: Any,
        seconds: float,
    ) -> None:
        self._file, self._name, self._owner, self._body = file, name, owner, body
        self._version, self._seconds = version, seconds
        self._process = os.getpid()
        self._stop = threading.Event()
        self.lost = False
        """Another process has taken over: this one was stopped, or cut off, for longer than the lease."""
        self._thread = threading.Thread(target=self._keep, name="tailcache-lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        beat = 0
        while not self._stop.wait(self._seconds / 3):
            beat += 1
            try:
                version = self._file.replace(self._body(beat), self._version)
            except TailcacheError as error:
                _log.warning("%s: the claim could not be renewed, trying again: %s", self._name, error)
                continue
            except FileNotFoundError:
                version = None
            if version is None:
                self.lost = True
                _log.warning("%s: another process has taken this claim over", self._name)
                return
            self._version = version

    def release(self) -> None:
        """Let others have it; fine if called twice. Where the store fails, it ends by itself after the lease."""
        if self._stop.is_set() or os.getpid() != self._process:
            return
        self._stop.set()
        self._thread.join()
        if self.lost:
            return
        try:
            found = self._file.look()
            if found is not None and _owner(found.data).get("owner") == self._owner:
                self._file.delete()
        except (StorageError, FileNotFoundError) as error:
            _log.warning("%s: the claim could not be released, it ends with its lease: %s", self._name, error)
