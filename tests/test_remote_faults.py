"""An object store that fails: what passes is waited for, what does not is an error in time; nothing is half there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3_server import KINDS, Faults

from tailcache.storage.errors import ConfigError, StorageError
from tailcache.storage.place import Place, open_place

DATA = bytes(range(256)) * 200
NAME = "a/data.bin"


@pytest.fixture
def place(s3_url: str, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> Place:
    """With one file, and little patience."""
    monkeypatch.setenv("TAILCACHE_TIMEOUT_SECONDS", "5")
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "20")
    place = open_place(s3_url)
    place.write(NAME, DATA)
    faults.clear()
    return place


def _move(place: Place) -> Any:
    place.move(NAME, "b/moved")
    return place.read("b/moved") == DATA, place.size(NAME)


def _claim(place: Place) -> Any:
    claim = place.claim("claims/0")
    assert claim is not None
    held = place.claim("claims/0")
    claim.release()
    return held, place.exists("claims/0")


OPERATIONS: dict[str, tuple[Callable[[Place], Any], Any]] = {
    "read": (lambda p: p.read(NAME), DATA),
    "read_ranges": (
        lambda p: p.read_ranges(NAME, [(0, 10), (50_000, 90_000), (100, 300)]),
        [DATA[:10], DATA[50_000:], DATA[100:300]],
    ),
    "read_end": (lambda p: p.read_end(NAME, 1000), (DATA[-1000:], len(DATA))),
    "size": (lambda p: p.size(NAME), len(DATA)),
    "write": (lambda p: (p.write("new", DATA), p.read("new"))[1], DATA),
    "replace": (lambda p: (p.write(NAME, DATA[::-1]), p.read(NAME))[1], DATA[::-1]),
    "create": (lambda p: (p.create("new", DATA), p.create("new", b"x"), p.read("new")), (True, False, DATA)),
    "files": (lambda p: list(p.files()), [(NAME, len(DATA))]),
    "folders": (lambda p: p.folders(), ["a"]),
    "delete": (lambda p: (p.delete(NAME), p.size(NAME))[1], None),
    "delete_all": (lambda p: (p.delete_all(), list(p.files()))[1], []),
    "move": (_move, (True, None)),
    "claim": (_claim, (None, False)),
}


QUICK = [kind for kind in KINDS if kind not in ("slow", "stalled body")]
ALL = [(operation, kind) for operation in OPERATIONS for kind in QUICK]
ALL += [(operation, kind) for operation in ("read", "read_end", "create", "files", "claim") for kind in KINDS[-2:]]


@pytest.mark.parametrize(("operation", "kind"), ALL)
def test_what_passes_is_waited_for(
    operation: str, kind: str, place: Place, faults: Faults, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if operation == "size" and kind.endswith("body"):
        return  # its answer has none
    times = 2
    if kind in ("slow", "stalled body"):
        times = 1
        monkeypatch.setenv("TAILCACHE_TIMEOUT_SECONDS", "0.12")
        place = open_place(s3_url)
    act, expected = OPERATIONS[operation]
    fault = faults.add(kind, times=times, seconds=1)
    assert act(place) == expected
    assert fault.struck == times


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_pass_is_an_error_in_time(
    kind: str, place: Place, faults: Faults, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILCACHE_TIMEOUT_SECONDS", "0.1")
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.3")
    impatient = open_place(s3_url)
    for operation in ("read", "files", "create", "size"):
        if kind in ("half body", "short body", "stalled body") and operation in ("size", "create"):
            continue  # their answers have no body
        faults.clear()
        faults.add(kind, times=None, seconds=1)
        start = time.monotonic()
        with pytest.raises(StorageError) as caught:
            OPERATIONS[operation][0](impatient)
        assert time.monotonic() - start < 4  # the patience and one more request, on a busy machine
        message = str(caught.value)
        assert s3_url in message
        assert "failed, tried" in message
        assert "the answer was: " in message
        assert "then run the same command again; what is committed stays good" in message
        assert "\n" not in message
        faults.clear()
    assert [name for name, _ in place.files()] in ([NAME], [NAME, "new"])


def test_errors_say_what_came_back(place: Place, faults: Faults, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0")
    for kind, answer in (
        ("503", "503 Service Unavailable: SlowDown: as told"),
        ("500", "500 Internal Server Error: InternalError: as told"),
        ("drop", "the connection ended without an answer"),
        ("half body", "the connection ended within the answer"),
        ("stalled body", "timed out"),
        ("short body", "expected the 51200 bytes 0 to 51200 of 51200, found 25600 bytes"),
    ):
        faults.clear()
        faults.add(kind, times=None, seconds=1.0)
        # A short limit only where it is to be reached: a busy machine reaches it too.
        monkeypatch.setenv("TAILCACHE_TIMEOUT_SECONDS", "0.5" if kind == "stalled body" else "30")
        once = open_place(s3_url)
        with pytest.raises(StorageError, match=f"reading failed, tried once; the answer was: .*{answer}"):
            once.read(NAME)


def test_a_store_that_is_not_there(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"tried \d+ times in .*connection refused"):
        open_place(s3_url).read("x")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL: expected https, found http:.*set AWS_ALLOW_HTTP=true"):
        open_place(s3_url)


def test_a_bucket_that_is_not_there(s3_url: str) -> None:
    place = open_place("s3://no-such-bucket-here/cache")
    for act in (
        lambda: place.read("x"),
        lambda: place.write("x", b""),
        lambda: place.create("x", b""),
        lambda: list(place.files()),
        lambda: place.folders(),
        lambda: place.delete("x"),
        lambda: place.claim("x"),
    ):
        start = time.monotonic()
        with pytest.raises(StorageError, match="make the bucket s3://no-such-bucket-here, or correct its name"):
            act()
        assert time.monotonic() - start < 3


def test_settings_that_are_no_numbers(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TAILCACHE_RETRY_SECONDS", "TAILCACHE_TIMEOUT_SECONDS", "TAILCACHE_DISK_CACHE_BYTES"):
        for value in ("long", "-1", "nan", "inf"):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                with pytest.raises(ConfigError, match=f"{name}: expected a number that is not negative, found"):
                    open_place(s3_url)


def test_stores_of_other_kinds_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a request; what their settings lack is said."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for url in ("s3://bucket", "s3://bucket/a/b/", "gs://bucket/a"):
        assert str(open_place(url)) == url.rstrip("/")
    with pytest.raises(ConfigError, match=r"az://container: .*Account must be specified"):
        open_place("az://container/a")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    assert str(open_place("az://container/a")) == "az://container/a"
    monkeypatch.setenv("AWS_CA_BUNDLE", "/nowhere")
    with pytest.raises(ConfigError, match=r"AWS_CA_BUNDLE: .*No such file"):
        open_place("s3://bucket/a")


@pytest.mark.parametrize("package", ["obstore", "fsspec"])
def test_a_package_that_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'tailcache\[remote\]'"):
        open_place("s3://bucket/cache" if package == "obstore" else "memory://cache")


# -- writing -----------------------------------------------------------------------------------------------------------


def test_created_once_though_the_answer_was_lost(place: Place, faults: Faults) -> None:
    faults.add("lost answer", methods=("PUT",), times=1)
    assert place.create("commit", b"mine")
    faults.add("lost answer", methods=("PUT",), times=1)
    assert not place.create("commit", b"another's")
    faults.add("503", methods=("PUT",), times=1)
    assert not place.create("commit", b"another's")
    assert place.read("commit") == b"mine"


def test_created_by_another_while_this_one_was_failing(place: Place, faults: Faults, s3_url: str) -> None:
    place.write("commit", b"another's")
    faults.add("half request", methods=("PUT",), times=2)
    assert not place.create("commit", b"mine")
    assert place.read("commit") == b"another's"


@pytest.mark.parametrize("kind", ["500", "drop", "half request", "lost answer"])
def test_a_large_file_whose_parts_fail(kind: str, place: Place, faults: Faults) -> None:
    data = os.urandom(1 << 20) * 35
    faults.add(kind, methods=("PUT", "POST"), times=3, skip=1, every=2)
    place.write("large", data)
    faults.clear()
    assert place.read("large") == data


@pytest.mark.parametrize("kind", ["503", "half body", "short body"])
def test_a_large_file_is_read_though_every_third_request_fails(
    kind: str, place: Place, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(7 << 18)
    place.write("large", data)
    monkeypatch.setattr("tailcache.storage.bucket.PIECE", 1 << 17)
    monkeypatch.setattr("tailcache.storage.object_place.PIECE", 1 << 17)
    monkeypatch.setattr("tailcache.storage.object_place._GAP", 100)
    faults.add(kind, methods=("GET",), times=None, every=3)
    assert place.read("large") == data
    assert faults.count("^GET") > 14
    ranges = [(i << 16, (i << 16) + 1000) for i in range(0, 28, 2)]
    assert place.read_ranges("large", ranges) == [data[a:b] for a, b in ranges]


def test_an_upload_in_parts_that_fails_leaves_nothing(
    place: Place, faults: Faults, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.3")
    faults.add("500", methods=("PUT",), path="partNumber=2", times=None)
    with pytest.raises(StorageError, match="large: writing failed"):
        open_place(s3_url).write("large", bytes(40 << 20))
    faults.clear()
    assert place.size("large") is None
    assert list(place.files()) == [(NAME, len(DATA))]


@pytest.mark.parametrize("size", [1 << 20, 40 << 20])
def test_killed_while_writing_leaves_nothing(size: int, place: Place, faults: Faults, s3_url: str) -> None:
    """SIGKILL when part of the body has been sent."""
    faults.add("slow", methods=("PUT",), times=None, seconds=5)
    script = (
        "import sys; from tailcache.storage.place import open_place\n"
        f"place = open_place({s3_url!r}); print('ready', flush=True); place.write('killed', bytes({size}))"
    )
    environment = {**os.environ, "TAILCACHE_TIMEOUT_SECONDS": "60"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        pattern = "^PUT .*killed" if size < 16 << 20 else "^PUT .*killed.*partNumber"
        while not faults.count(pattern):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
    faults.clear()
    # A single PUT has arrived whole and may take effect later, also as a whole; parts alone never do.
    assert place.size("killed") in ((None, size) if size < 16 << 20 else (None,))
    if place.size("killed") is not None:
        assert place.read("killed") == bytes(size)
    place.write("killed", b"again")
    assert place.read("killed") == b"again"


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_file_replaced_while_it_is_read_is_read_again(
    place: Place, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first piece of one version, the second one of another."""
    old, new = b"o" * 2000, b"n" * 2000
    place.write("file", old)
    monkeypatch.setattr("tailcache.storage.bucket.PIECE", 1000)
    faults.clear()
    faults.add("slow", methods=("GET",), skip=1, seconds=0.5)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(place.read, "file")
        while faults.count("^GET") < 2:
            time.sleep(0.01)
        place.write("file", new)
        assert reading.result() == new
    assert faults.count("^GET") == 4


def test_near_ranges_are_one_request(place: Place, faults: Faults) -> None:
    place.write("large", bytes(5 << 20))
    faults.clear()
    place.read_ranges("large", [(i * 1000, i * 1000 + 10) for i in range(1000)])
    assert faults.count("^GET") == 1
    faults.clear()
    place.read_ranges("large", [(0, 10), (4 << 20, (4 << 20) + 10)])
    assert faults.count("^GET") == 2


def test_public_buckets_need_no_credentials(place: Place, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert open_place(s3_url).size("missing") is None


def test_no_credentials_is_said(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.2")
    monkeypatch.setenv("TAILCACHE_TIMEOUT_SECONDS", "0.2")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true"):
        open_place(s3_url).read("x")


def test_a_forked_process_is_told_to_be_spawned(place: Place) -> None:
    """Its requests would wait for ever for threads that it does not have."""
    assert not place.survives_fork
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            place.read(NAME)
            os.write(write, b"read")
        except StorageError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert 'start worker processes with the method "spawn" or "forkserver"' in answer.read()
    os.waitpid(child, 0)
