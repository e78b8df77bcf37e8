"""Feed changed records to every parser that reads a cache: each input is accepted, or refused with a named error.

The records of a sound cache are changed at random: half of the inputs have other values under a seal that is right, as
malice would write them, half other bytes, as damage would. What is accepted must keep the promises that readers rely
on: paths within the cache, sizes within the limits. Memory is limited for the whole process, so that a large allocation
is an error and no input can get away with one.

    python -m tailcache.scripts.fuzz_records --cache tests/golden/v1
"""

from __future__ import annotations

import json
import posixpath
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from numcodecs.checksum32 import CRC32C

from tailcache.scripts.record_mutations import mutate_bytes, mutate_values
from tailcache.storage.array_metadata import check_array_metadata
from tailcache.storage.arrays import ArraySpec
from tailcache.storage.chunk_bounds import blosc_problem, parse_index
from tailcache.storage.corpus import corpus_arrays
from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError, TailcacheError
from tailcache.storage.layout import commit_path
from tailcache.storage.limits import chunk_bytes, layout_problem
from tailcache.storage.records import (
    Manifest,
    parse_checksums,
    parse_commit,
    parse_complete,
    parse_corpus_manifest,
    parse_manifest,
)
from tailcache.storage.sealed import seal, unseal

__all__ = ["FuzzRecords", "Outcome", "fuzz", "main"]

_SHARES = {
    "manifest": 6,
    "commit": 6,
    "complete": 1,
    "corpus": 2,
    "checksums": 1,
    "zarr.json": 1,
    "index": 1,
    "chunk": 1,
}


@dataclass(frozen=True, kw_only=True)
class FuzzRecords:
    """Change records of a cache at random, and parse them."""

    cache: Path
    """A sound cache; its first teacher is taken."""

    inputs: int = 100_000
    """Changed manifests and commit records; other records come on top of them."""

    seed: int = 0
    """Decides all inputs."""

    memory_mib: int = 1024
    """The process may not grow by more; 0: no limit."""

    json: Path | None = None
    """Write the counts to this file."""


@dataclass(kw_only=True)
class Outcome:
    """What became of the inputs of one kind."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A parser, and what it is fed."""

    data: bytes
    parse: Callable[[bytes], object]
    """Raises a named error; what it returns is looked at."""
    reseal: Callable[[Any], bytes] | None = None
    """Bytes of changed values, with all checksums right; none where only bytes can be changed."""
    record: Any = None


def _targets(cache: Path) -> dict[str, _Target]:
    corpus, teacher = cache / "corpus", sorted((cache / "teachers").glob("*/manifest.json"))[0].parent
    read = Path.read_bytes
    manifest = parse_manifest(read(teacher / "manifest.json"), "manifest")
    corpus_manifest = parse_corpus_manifest(read(corpus / "manifest.json"), "corpus")
    arrays = corpus_arrays(corpus_manifest.vocab_size, part=corpus_manifest.parent is not None)
    spec = manifest.layout.fields()["logprob_gaps"]
    slots = manifest.layout.num_shards * manifest.layout.shard_slots
    whole_object = read(teacher / spec.object_path(0))
    checksums = read(corpus / "checksums.json")

    def sealed(path: Path, parse: Callable[[bytes], object]) -> _Target:
        data = read(path)
        return _Target(data=data, parse=parse, reseal=seal, record=unseal(data, path.name))

    def parse_listed(data: bytes) -> object:
        """The corpus' manifest says the hash of its checksums: here it says that of the changed ones."""
        return parse_checksums(data, "checksums", replace(corpus_manifest, checksums=sha256(data)), arrays)

    index = parse_index(whole_object[-spec.index_bytes :], len(whole_object), spec)
    first = int(index[0, 0])
    return {
        "manifest": sealed(teacher / "manifest.json", lambda data: parse_manifest(data, "manifest")),
        "commit": sealed(teacher / commit_path(0), lambda data: parse_commit(data, "commit", 0, manifest)),
        "complete": sealed(teacher / "complete.json", lambda data: parse_complete(data, "complete", manifest)),
        "corpus": sealed(corpus / "manifest.json", lambda data: parse_corpus_manifest(data, "corpus")),
        "checksums": _Target(data=checksums, parse=parse_listed, reseal=seal, record=unseal(checksums, "checksums")),
        "zarr.json": _Target(
            data=(metadata := read(teacher / spec.name / "zarr.json")),
            parse=lambda data: check_array_metadata(data, "zarr.json", spec, slots),
            reseal=lambda record: json.dumps(record).encode(),
            record=json.loads(metadata),
        ),
        "index": _Target(
            data=whole_object[-spec.index_bytes : -4], parse=lambda data: _index(data, len(whole_object), spec)
        ),
        "chunk": _Target(
            data=whole_object[first : first + int(index[0, 1]) - 4], parse=lambda data: _chunk(data, spec)
        ),
    }


def _index(data: bytes, size: int, spec: ArraySpec) -> object:
    """An index whose checksum is right."""
    stored = bytes(CRC32C(location="end").encode(data)) if data else b""
    try:
        return parse_index(stored, size, spec)
    except ValueError as error:
        raise CorruptError(str(error)) from error


def _chunk(data: bytes, spec: ArraySpec) -> None:
    problem = blosc_problem(data, chunk_bytes(spec))
    if problem:
        raise CorruptError(problem)


def _check_promises(parsed: object) -> None:
    """What readers rely on where a record was accepted."""
    paths = [*getattr(parsed, "files", ()), *getattr(parsed, "chunks", ())]
    for path in paths:
        if posixpath.normpath(path) != path or path.startswith(("/", "..")) or not path.isprintable() or "\\" in path:
            raise AssertionError(f"accepted a path that may lead anywhere: {path!r}")
    if isinstance(parsed, Manifest) and layout_problem(parsed.layout):
        raise AssertionError(f"accepted a layout out of bounds: {layout_problem(parsed.layout)}")


def fuzz(cache: Path, inputs: int, seed: int) -> dict[str, Outcome]:
    """Change and parse.

    Args:
      cache: a sound one.
      inputs: changed manifests and commit records, half of each; others are added in their shares.
      seed: decides all inputs.

    Returns:
      What became of the inputs of each kind.

    Raises:
      AssertionError: an input was neither accepted nor refused with a named error, or accepted against a promise;
        names the kind and the number of the input, and has the error as its cause.
    """
    outcomes = {}
    for kind, target in _targets(cache).items():
        outcome = outcomes[kind] = Outcome()
        target.parse(target.data)
        for number in range(inputs * _SHARES[kind] // (_SHARES["manifest"] + _SHARES["commit"])):
            generator = random.Random(f"{seed} {kind} {number}")
            if target.reseal is not None and number % 2 == 0:
                data = _resealed(target, generator)
            else:
                data = mutate_bytes(target.data, generator)
            start = time.perf_counter()
            try:
                _check_promises(target.parse(data))
                outcome.accepted += 1
            except TailcacheError as error:
                outcome.refused[type(error).__name__] += 1
            except BaseException as error:
                raise AssertionError(f"{kind}, input {number} of seed {seed}: {data[:2000]!r}") from error
            outcome.slowest_ms = max(outcome.slowest_ms, 1e3 * (time.perf_counter() - start))
            outcome.inputs += 1
    return outcomes


def _resealed(target: _Target, generator: random.Random) -> bytes:
    assert target.reseal is not None
    while True:
        try:
            return target.reseal(mutate_values(target.record, generator))
        except (ValueError, RecursionError):  # no JSON record can say it
            continue


def main(config: FuzzRecords) -> dict[str, Outcome]:
    """Fuzz with limited memory, and print the counts."""
    targets_warm = fuzz(config.cache, 0, config.seed)  # everything is imported before memory is limited
    if config.memory_mib and sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (config.memory_mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes = fuzz(config.cache, config.inputs, config.seed)
    assert targets_warm.keys() == outcomes.keys()
    print(f"{'record':12} {'inputs':>8} {'accepted':>9} {'refused':>8} {'slowest ms':>11}  refused with")
    for kind, outcome in outcomes.items():
        errors = ", ".join(f"{name} {count}" for name, count in sorted(outcome.refused.items()))
        refused = sum(outcome.refused.values())
        print(f"{kind:12} {outcome.inputs:8} {outcome.accepted:9} {refused:8} {outcome.slowest_ms:11.1f}  {errors}")
    print(f"{'all':12} {sum(outcome.inputs for outcome in outcomes.values()):8}")
    if config.json is not None:
        record = {kind: vars(outcome) for kind, outcome in outcomes.items()}
        config.json.write_text(json.dumps(record, indent=1) + "\n")
    return outcomes


if __name__ == "__main__":
    main(tyro.cli(FuzzRecords))
