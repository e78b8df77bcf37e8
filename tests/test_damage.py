"""Every region of every kind of file is flipped, cut, deleted and exchanged: found, named, and never read as values.

Where a byte lies decides what could notice it: a chunk and its checksum, the index of an object and its own, the
values, keys, seal and white space of a record. So each kind of file is damaged in each of its regions.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import Tally
from places import cache_folder
from storage_fixtures import Exact, make_corpus, make_exact, speed_up, tree

from tailcache.storage.codec import Targets
from tailcache.storage.errors import TailcacheError
from tailcache.storage.layout import Layout
from tailcache.storage.objects import read_index
from tailcache.storage.place import open_place
from tailcache.storage.reader import open_cache
from tailcache.storage.verify import Fault, verify

Region = tuple[str, int, int]
"""Its name, its first byte and one past its last."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    speed_up(monkeypatch)


@pytest.fixture
def exact(tmp_path: Path) -> Exact:
    """Every field there is, two shards."""
    corpus = make_corpus(tmp_path / "cache", lengths=(9, 12, 7, 8))
    exact = make_exact(corpus, shard_positions=15, temperatures=(2.0,), hidden="int8")
    exact.write("t")
    return exact


def regions(cache: Path, name: str, layout: Layout) -> Iterator[Region]:
    """What a file is made of."""
    data = (cache / name).read_bytes()
    parts = name.split("/")
    if "c" in parts and parts[0] == "teachers":
        spec = {**layout.fields(), **layout.constants()}[parts[2]]
        place = open_place(cache) / "teachers" / parts[1]
        name = "/".join(parts[2:])
        for chunk, (offset, length) in enumerate(read_index(place, name, spec).table(spec).tolist()):
            if length < 1 << 60:
                yield f"header of chunk {chunk}", offset, offset + 16
                yield f"payload of chunk {chunk}", offset + 16, offset + length - 4
                yield f"checksum of chunk {chunk}", offset + length - 4, offset + length
        end = len(data)
        yield "index", end - spec.index_bytes, end - 4
        yield "checksum of the index", end - 4, end
    elif name.endswith(".json"):
        yield "opening", 0, 2
        first = data.index(b'"')
        yield "a key", first, data.index(b'"', first + 1) + 1
        if b'"sha256": "' in data:
            at = data.rindex(b'"sha256": "') + 11
            yield "the seal", at, at + 64
        middle = len(data) // 2
        yield "values", middle, middle + 8
        yield "the end", len(data) - 2, len(data)
    else:
        for name, first in (("start", 0), ("middle", len(data) // 2), ("end", len(data) - 1)):
            yield name, first, first + 1


def read(cache: Path) -> Targets | TailcacheError:
    """All targets, or the named error that was raised instead."""
    try:
        opened = open_cache(cache)
        teacher = opened.teacher("t")
        _ = teacher.mean_tail, teacher.head(), opened.corpus.token_counts, opened.corpus.tokenizer_dir
        return teacher.rows(0, opened.corpus.num_rows, optional=teacher.optional)
    except TailcacheError as error:
        return error


def same(found: Targets, expected: Targets) -> bool:
    return all(np.array_equal(values, vars(expected)[name]) for name, values in vars(found).items())


def check(exact: Exact, name: str, sound: Targets, what: str) -> None:
    """Verify names the file, with shard, field and remedy; a reader says what is wrong, or gives the right values."""
    cache = cache_folder(exact.corpus)
    faults = {fault.path: fault for fault in verify(cache)}
    assert name in faults, f"{name}: {what}: not found; {sorted(faults)}"
    fault: Fault = faults[name]
    assert fault.remedy, f"{name}: {what}: no remedy: {fault}"
    parts = name.split("/")
    if parts[0] == "teachers" and parts[2] in exact.layout.fields() and "c" in parts:
        assert (fault.shard, fault.field) == (int(parts[4]), parts[2]), f"{name}: {what}: {fault}"
    if parts[-2:-1] == ["commits"]:
        assert fault.shard == int(parts[-1].split(".")[0])
    found = read(cache)
    if isinstance(found, Targets):
        assert same(found, sound), f"{name}: {what}: read as other values"
    elif fault.shard is not None and fault.field is not None:
        objects = [f for f in faults.values() if f.shard is not None and f.field is not None]
        assert any(f"shard {f.shard}, field {f.field}" in str(found) for f in objects), found
    elif "c" in parts and parts[0] == "teachers":
        assert parts[2] in str(found), f"{name}: {what}: {found}"


@pytest.mark.slow
def test_every_region_of_every_file(exact: Exact, tally: Tally) -> None:
    cache = cache_folder(exact.corpus)
    files = tree(cache)
    sound = read(cache)
    assert isinstance(sound, Targets)
    assert verify(cache) == []
    counts = {"flipped": 0, "cut short, grown or emptied": 0, "deleted": 0}
    generator = np.random.default_rng(0)
    for name, data in files.items():
        path = cache / name
        for region, first, last in list(regions(cache, name, exact.layout)):
            changed = bytearray(data)
            changed[int(generator.integers(first, last))] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(changed))
            check(exact, name, sound, f"{region} flipped")
            counts["flipped"] += 1
        for shape, cut in (
            ("cut", data[:-1]),
            ("half", data[: len(data) // 2]),
            ("grown", data + b"\0"),
            ("empty", b""),
        ):
            path.write_bytes(cut)
            check(exact, name, sound, shape)
            counts["cut short, grown or emptied"] += 1
        path.unlink()
        if not name.endswith("complete.json"):  # without it, it is an unfinished capture that has lost its sums
            check(exact, name, sound, "deleted")
            counts["deleted"] += 1
        path.write_bytes(data)
    assert verify(cache) == []
    for what, number in counts.items():
        tally(f"regions or files {what}: found by verify with remedy, refused or read right", number)


@pytest.mark.slow
def test_files_that_were_exchanged(exact: Exact, tally: Tally) -> None:
    """Between shards, between fields, between kinds: each is sound, but in the wrong place."""
    cache = cache_folder(exact.corpus)
    sound = read(cache)
    assert isinstance(sound, Targets)
    folder = "teachers/t"
    fields = exact.layout.fields()
    pairs = [(f"{folder}/{spec.object_path(0)}", f"{folder}/{spec.object_path(1)}") for spec in fields.values()]
    flat = [spec for spec in fields.values() if spec.columns is None]
    pairs += [(f"{folder}/{flat[0].object_path(0)}", f"{folder}/{spec.object_path(0)}") for spec in flat[1:]]
    pairs += [(f"{folder}/{one}/zarr.json", f"{folder}/{other}/zarr.json") for one, other in pairwise(fields)]
    pairs += [(f"{folder}/commits/00000000.json", f"{folder}/commits/00000001.json")]
    pairs += [("corpus/manifest.json", f"{folder}/manifest.json"), ("corpus/checksums.json", f"{folder}/complete.json")]
    pairs += [("corpus/row_offsets/c/0", "corpus/target_offsets/c/0"), ("corpus/zarr.json", f"{folder}/zarr.json")]
    for one, other in pairs:
        a, b = (cache / one).read_bytes(), (cache / other).read_bytes()
        if a == b:
            continue
        (cache / one).write_bytes(b)
        (cache / other).write_bytes(a)
        check(exact, one, sound, f"exchanged with {other}")
        if one != "corpus/manifest.json":  # without a corpus, nothing can be said of its teachers
            check(exact, other, sound, f"exchanged with {one}")
        (cache / one).write_bytes(a)
        (cache / other).write_bytes(b)
    assert verify(cache) == []
    tally("pairs of sound files exchanged: found by verify with remedy, refused or read right", len(pairs))
    shutil.rmtree(cache)
