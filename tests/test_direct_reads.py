"""The compiled loop over chunks reads what zarr-python reads, and leaves whatever is wrong to the steps it replaces."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting_place import CountingPlace
from forge import with_chunk, with_index
from numpy.typing import NDArray
from storage_fixtures import Exact, make_corpus, make_exact, make_head

from tailcache.storage import compiled, direct_reads
from tailcache.storage.arrays import open_array, read_slice
from tailcache.storage.chunk_bounds import parse_index
from tailcache.storage.compiled import SWITCH
from tailcache.storage.direct_reads import Stretch, read_directly
from tailcache.storage.errors import CorruptError, StorageError
from tailcache.storage.hidden import HiddenKind
from tailcache.storage.local_place import LocalPlace
from tailcache.storage.objects import read_objects

pytest.importorskip("numba")
from tailcache.storage import chunk_loops

SHAPES: list[tuple[int, int, int, int, HiddenKind | None]] = [
    (37, 5, 3, 4, "int8"),
    (37, 1, 1, 1, None),
    (70_000, 7, 0, 5, "bf16"),
    (300, 70, 16, 7, None),
]
"""V, K, m, slots of a chunk and the kind of hidden states."""


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """By loops, however little is read."""
    monkeypatch.setenv(SWITCH, "always")


@pytest.fixture(params=SHAPES, ids=str)
def exact(request: pytest.FixtureRequest, tmp_path: Path) -> Exact:
    """A teacher with fields of every kind."""
    vocab_size, top_k, num_samples, chunk, hidden = request.param
    head = make_head(vocab_size) if hidden else None
    made = make_exact(
        make_corpus(tmp_path, vocab_size=vocab_size),
        top_k=top_k, num_samples=num_samples, chunk=chunk, hidden=hidden, head=head,
        temperatures=(2.0,) if hidden else (),
    )  # fmt: skip
    made.write("t")
    return made


@pytest.fixture
def small(tmp_path: Path) -> Exact:
    """One shape, for what is done to every byte."""
    made = make_exact(make_corpus(tmp_path), chunk=4)
    made.write("t")
    return made


def folder_of(exact: Exact) -> Path:
    """Of the teacher."""
    local = exact.corpus.cache_place.local
    assert local is not None
    return local / "teachers" / "t"


def stretches_of(exact: Exact, shard: int, first: int, last: int) -> list[Stretch]:
    """Of every field."""
    folder, found = folder_of(exact), []
    for name, spec in exact.layout.fields().items():
        data = (folder / spec.object_path(shard)).read_bytes()
        table = parse_index(data[-spec.index_bytes :], len(data), spec)
        found.append(Stretch(spec.object_path(shard), spec, first, last, f"shard {shard}, {name}", table))
    return found


def test_equals_zarr(exact: Exact) -> None:
    folder = folder_of(exact)
    arrays = [open_array(folder / name) for name in exact.layout.fields()]
    for shard in range(exact.layout.num_shards):
        base, num = shard * exact.layout.shard_slots, len(exact.shards[shard][0])
        slow = [read_slice(array, base, base + num, lambda: "here") for array in arrays]
        for first in range(num):
            for last in range(first + 1, num + 1, 2):
                found = read_directly(folder, stretches_of(exact, shard, first, last))
                assert found is not None
                for fast, whole in zip(found, slow, strict=True):
                    assert fast.dtype == whole.dtype
                    assert fast.flags.c_contiguous
                    np.testing.assert_array_equal(fast, whole[first:last])


def test_files_of_any_name_are_found(exact: Exact) -> None:
    folder = folder_of(exact)
    strange = folder.with_name(os.fsdecode(b"\xff\xfe t\xc3\xbc"))
    stretches = stretches_of(exact, 0, 0, 3)
    folder.rename(strange)
    assert read_directly(strange, stretches) is not None


def test_threads_read_at_once(small: Exact) -> None:
    folder, last = folder_of(small), len(small.shards[0][0])
    stretches = stretches_of(small, 0, 1, last)
    [expected, found] = [read_directly(folder, stretches) for _ in range(2)]
    assert expected is not None
    assert found is not None
    with ThreadPoolExecutor(4) as pool:
        for values in pool.map(lambda _: read_directly(folder, stretches), range(200)):
            assert values is not None
            for one, other in zip(values, expected, strict=True):
                np.testing.assert_array_equal(one, other)


def both(exact: Exact, stretches: list[Stretch]) -> None:
    """What is not read directly is an error, or what it would have been without loops."""
    folder = folder_of(exact)
    assert read_directly(folder, stretches) is None
    with pytest.raises(CorruptError, match=r"shard 0, .* cannot be decoded"):
        read_objects(LocalPlace(folder), stretches)


def test_every_flipped_byte_is_left_to_the_steps_that_name_it(small: Exact) -> None:
    """Of every field's object, but for its index: that was checked when its table was made."""
    num = len(small.shards[0][0])
    for stretch in stretches_of(small, 0, 0, num):
        path = folder_of(small) / stretch.name
        data = path.read_bytes()
        for offset in range(len(data) - stretch.spec.index_bytes):
            damaged = bytearray(data)
            damaged[offset] ^= 1 << offset % 8
            path.write_bytes(damaged)
            both(small, [stretch])
        for cut in range(0, len(data) - stretch.spec.index_bytes, 7):
            path.write_bytes(data[:cut])
            both(small, [stretch])
        path.write_bytes(data)
        assert read_directly(folder_of(small), [stretch]) is not None


def test_damage_of_one_field_is_named(small: Exact) -> None:
    stretches = stretches_of(small, 0, 0, len(small.shards[0][0]))
    path = folder_of(small) / stretches[2].name
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert read_directly(folder_of(small), stretches) is None
    with pytest.raises(CorruptError, match=f"{stretches[2].where}: .* checksum"):
        read_objects(LocalPlace(folder_of(small)), stretches)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        lambda path: path.write_bytes(b""),
    ],
    ids=["nothing", "folder", "pipe", "device", "loop of links", "empty"],
)
def test_what_is_no_file_is_left_to_the_steps_that_name_it(small: Exact, make: Callable[[Path], Any]) -> None:
    stretches = stretches_of(small, 0, 0, 3)
    path = folder_of(small) / stretches[0].name
    path.unlink()
    make(path)
    assert read_directly(folder_of(small), stretches) is None
    with pytest.raises((CorruptError, StorageError), match=stretches[0].name):
        read_objects(LocalPlace(folder_of(small)), stretches)


@pytest.mark.parametrize(
    "entry", [(1 << 63, 40), ((1 << 64) - 1, (1 << 64) - 1), (1 << 40, 40), (0, 1 << 40), (0, 1 << 63), (0, 19), (0, 0)]
)
def test_a_table_that_points_elsewhere_is_refused(small: Exact, entry: tuple[int, int]) -> None:
    """Reading knows only tables that were checked; still, no number in one leads out of a buffer."""
    stretch = stretches_of(small, 0, 0, 3)[0]
    assert stretch.table is not None
    table = np.array(stretch.table)
    table[0] = entry
    assert read_directly(folder_of(small), [replace(stretch, table=table)]) is None
    assert read_directly(folder_of(small), [replace(stretch, table=table[:0])]) is None


@pytest.mark.parametrize("at", range(1, 16))
@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0xFF])
def test_a_header_that_lies_under_a_right_checksum_is_refused_or_read_as_the_steps_do(
    small: Exact, at: int, value: int
) -> None:
    folder, num = folder_of(small), len(small.shards[0][0])
    for stretch in stretches_of(small, 0, 0, num):
        path = folder / stretch.name
        sound = path.read_bytes()

        def lie(chunk: bytes) -> bytes:
            return chunk[:at] + bytes([value]) + chunk[at + 1 :]

        data = with_chunk(stretch.spec, sound, lie)
        path.write_bytes(data)
        told = replace(stretch, table=parse_index(data[-stretch.spec.index_bytes :], len(data), stretch.spec))
        found = read_directly(folder, [told])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SWITCH, "never")
            expected = outcome(folder, told)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            np.testing.assert_array_equal(found[0], expected)
        path.write_bytes(sound)


def outcome(folder: Path, stretch: Stretch) -> NDArray[Any] | None:
    """Of the steps; none for an error."""
    try:
        return read_objects(LocalPlace(folder), [stretch])[0]
    except CorruptError:
        return None


def test_chunks_that_are_not_in_order_are_read(small: Exact) -> None:
    folder, num = folder_of(small), len(small.shards[0][0])
    for stretch in stretches_of(small, 0, 0, num):
        path = folder / stretch.name
        sound = path.read_bytes()
        expected = read_directly(folder, [stretch])
        assert stretch.table is not None
        assert expected is not None
        entries = stretch.table.tolist()
        stored = [(number, offset, length) for number, (offset, length) in enumerate(entries) if offset < 1 << 63]
        chunks, index, offset = [], list(map(tuple, entries)), 0
        for number, begin, length in reversed(stored):
            chunks.append(sound[begin : begin + length - 4])
            index[number] = (offset, length)
            offset += length
        data = with_index(chunks, index)
        assert data != sound or len(stored) == 1
        path.write_bytes(data)
        table = parse_index(data[-stretch.spec.index_bytes :], len(data), stretch.spec)
        found = read_directly(folder, [replace(stretch, table=table)])
        assert found is not None
        np.testing.assert_array_equal(found[0], expected[0])


def open_files(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [link for link in links if link.startswith(str(folder))]


def test_no_descriptor_is_left_open(small: Exact) -> None:
    folder, stretches = folder_of(small), stretches_of(small, 0, 0, 3)
    with (folder / stretches[0].name).open():
        assert len(open_files(folder)) == 1
    assert read_directly(folder, stretches) is not None
    path = folder / stretches[1].name
    path.write_bytes(path.read_bytes()[:30])
    assert read_directly(folder, stretches) is None
    assert open_files(folder) == []


def test_large_reads_are_left_to_the_steps(small: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, num = folder_of(small), len(small.shards[0][0])
    stretches = stretches_of(small, 0, 0, num)
    expected = read_directly(folder, stretches)
    assert expected is not None
    monkeypatch.setattr(direct_reads, "_MAX_BYTES", 64)
    assert read_directly(folder, stretches) is None
    for one, other in zip(read_objects(LocalPlace(folder), stretches), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert read_directly(folder, []) is None
    assert read_objects(LocalPlace(folder), []) == []


def test_a_place_that_looks_on_is_asked(small: Exact) -> None:
    """What counts or delays reads sees all of them."""
    folder, stretches = folder_of(small), stretches_of(small, 0, 0, 3)
    place = CountingPlace(LocalPlace(folder))
    assert place.local is not None
    read_objects(place, stretches)
    assert place.asked.names("read_ranges") == {stretch.name for stretch in stretches}


@pytest.mark.parametrize("missing", ["library", "function"])
def test_without_the_libraries_functions_the_steps_are_taken(
    small: Exact, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    original, num = ctypes.CDLL, len(small.shards[0][0])

    class Library:
        def __init__(self, name: str | None) -> None:
            if missing == "library" and name is not None:
                raise OSError(f"{name}: cannot open shared object file")
            self._library = original(name)

        def __getattr__(self, name: str) -> Any:
            if missing == "function" and name == "crc32c_value":
                raise AttributeError(name)
            return getattr(self._library, name)

    folder, stretches = folder_of(small), stretches_of(small, 0, 0, num)
    assert read_directly(folder, stretches) is not None
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", Library)
        forget()
        assert read_directly(folder, stretches) is None
        for values, stretch in zip(read_objects(LocalPlace(folder), stretches), stretches, strict=True):
            array = open_array(folder / stretch.spec.name)
            np.testing.assert_array_equal(values, read_slice(array, 0, num, lambda: "here"))
    forget()
    assert read_directly(folder, stretches) is not None


OTHER_FUNCTION = """
import ctypes, sys
original = ctypes.CDLL
class Library:
    def __init__(self, name):
        self.library = original(name)
    def __getattr__(self, name):
        return original(None).labs if name == "crc32c_value" else getattr(self.library, name)
ctypes.CDLL = Library
from tailcache.storage.compiled import chunk_loops, decode_loops
from tailcache.storage.reader import open_cache
teacher = open_cache(sys.argv[1]).teacher("t")
print(decode_loops(0) is not None, chunk_loops(), len(teacher.rows(0, teacher.num_rows)))
"""


def test_a_function_that_does_something_else_is_not_called(small: Exact) -> None:
    found = subprocess.run(
        [sys.executable, "-c", OTHER_FUNCTION, str(small.corpus.cache_place)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["True", "None", str(small.corpus.num_targets)]


def forget() -> None:
    """What was found out about the libraries."""
    compiled._chunk_loops.cache_clear()
    chunk_loops.are_callable.cache_clear()


CHILD = """
import os, sys
from tailcache.storage.reader import open_cache
teacher = open_cache(sys.argv[1]).teacher("t")
before = teacher.rows(0, teacher.num_rows)
child = os.fork()
after = teacher.rows(0, teacher.num_rows)
if child == 0:
    os._exit(0 if (after.token_ids == before.token_ids).all() else 1)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_reads_on(small: Exact) -> None:
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(small.corpus.cache_place)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.strip() == "0"
