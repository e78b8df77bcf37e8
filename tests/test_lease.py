"""Claims in a store without locks: one holder, kept alive, taken over when its process is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from typing import Any

import pytest
from s3_server import Faults

from tailcache.storage import lease
from tailcache.storage.lease import Lease
from tailcache.storage.place import Claim, Place, open_place

HOLDER = """
import sys, time
from tailcache.storage.place import open_place
claim = open_place({url!r}).claim("claims/0")
print(claim is not None, flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(lease, "_CLOCK_MARGIN", 1.0)
    if request.param == "s3":
        url: str = request.getfixturevalue("s3_url")
        return open_place(url)
    return open_place(f"memory://{uuid.uuid4().hex}")


def _held(claim: Claim | None) -> Lease:
    assert isinstance(claim, Lease)
    return claim


def _content(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place.read("claims/0"))
    return found


def _of_another_machine(place: Place) -> None:
    """What lies there, written by a process that cannot be looked for."""
    record = _content(place)
    record["process"] = {"boot": "another", "space": "x", "pid": "1", "start": "1"}
    place.write("claims/0", json.dumps(record).encode())


def test_one_of_many_at_once(place: Place) -> None:
    taken: list[Claim] = []

    def take() -> None:
        claim = place.claim("claims/0")
        if claim is not None:
            taken.append(claim)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].release()
    assert list(place.files()) == []


@pytest.mark.slow
def test_a_live_holder_outlives_many_leases(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILCACHE_LEASE_SECONDS", "1")
    claim = _held(place.claim("claims/0"))
    first = place.read("claims/0")
    deadline = time.monotonic() + 2.7
    while time.monotonic() < deadline:
        assert place.claim("claims/0") is None
        time.sleep(0.2)
    assert not claim.lost
    assert place.read("claims/0") != first
    claim.release()
    assert list(place.files()) == []


@pytest.mark.slow
def test_a_lease_that_is_not_renewed_is_taken_over_by_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILCACHE_LEASE_SECONDS", "1")
    dead = _held(place.claim("claims/0"))
    dead._stop.set()  # its process is gone: no more renewals
    dead._thread.join()
    _of_another_machine(place)
    assert place.claim("claims/0") is None
    deadline = time.monotonic() + 10
    claim = None
    while claim is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        claim = place.claim("claims/0")
    assert place.claim("claims/0") is None
    assert _content(place)["owner"] == _held(claim)._owner
    claim.release()
    assert list(place.files()) == []


@pytest.mark.slow
def test_who_was_taken_over_notices_and_leaves_the_other_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILCACHE_LEASE_SECONDS", "1")
    stopped = _held(place.claim("claims/0"))
    place.write("claims/0", json.dumps({"owner": "another", "lease_seconds": 60, "time": time.time()}).encode())
    stopped._thread.join(10)
    assert stopped.lost
    stopped.release()
    assert _content(place)["owner"] == "another"


def test_a_release_leaves_another_holder_alone(place: Place) -> None:
    claim = _held(place.claim("claims/0"))
    place.write("claims/0", json.dumps({"owner": "another", "lease_seconds": 60, "time": time.time()}).encode())
    claim.release()
    assert _content(place)["owner"] == "another"


def test_a_damaged_lease_ends_like_any_other(monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
    monkeypatch.setattr(lease, "_CLOCK_MARGIN", 0.0)
    place = open_place(s3_url)
    damaged = [b"", b"{", b"[]", b'{"lease_seconds": "x", "process": 3}', b"\xff" * 10, b"[" * 100_000]
    for i, content in enumerate(damaged):
        place.write(f"claims/{i}", content)
        assert place.claim(f"claims/{i}") is None
    monkeypatch.setenv("TAILCACHE_LEASE_SECONDS", "0.1")
    time.sleep(1.2)  # the store counts whole seconds
    for i in range(len(damaged)):
        claim = place.claim(f"claims/{i}")
        assert claim is not None
        claim.release()


def test_a_claim_ends_at_once_with_its_process_on_this_machine(s3_url: str) -> None:
    place = open_place(s3_url)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(url=s3_url)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert place.claim("claims/0") is None
        process.kill()
        process.wait()
    claim = place.claim("claims/0")
    assert claim is not None
    claim.release()


def test_the_clock_of_the_store_decides(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local clock that is a day ahead takes no claim away."""
    place = open_place(s3_url)
    claim = _held(place.claim("claims/0"))
    _of_another_machine(place)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 86_400.0)
    assert place.claim("claims/0") is None
    monkeypatch.undo()
    claim.release()


@pytest.mark.parametrize("kind", ["lost answer", "500"])
def test_a_renewal_that_fails_once_loses_nothing(
    kind: str, s3_url: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILCACHE_LEASE_SECONDS", "0.6")
    place = open_place(s3_url)
    claim = _held(place.claim("claims/0"))
    fault = faults.add(kind, methods=("PUT",))
    deadline = time.monotonic() + 10
    while fault.struck < 1 or _content(place)["beat"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not claim.lost
    claim.release()
    assert list(place.files()) == []


def test_a_release_that_fails_is_no_error(
    s3_url: str, faults: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.1")
    claim = _held(open_place(s3_url).claim("claims/0"))
    faults.add("500", times=None)
    claim.release()
    assert "could not be released, it ends with its lease" in caplog.text
