"""Write one teacher's targets, shard by shard, so that a crash anywhere costs one shard at most.

The protocol: write a shard's objects, read them back and compare, write its commit record. A shard exists if
and only if its commit record does. Everything is deterministic and nothing carries a time, so an interrupted
capture that is run again ends in the same bytes as one that was never interrupted.

The sum of the teacher's tail distributions is carried from shard to shard in ``partial/``, one file per commit,
and becomes ``mean_tail`` when the last shard is in.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tailcache.storage import durable
from tailcache.storage.arrays import group_metadata
from tailcache.storage.codec import Codec, Targets, logprob_levels, vocabulary_order
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import ConfigError, CorruptError, MismatchError, StorageError
from tailcache.storage.hidden import HiddenLayout, StoredHead
from tailcache.storage.layout import Layout, check_name, check_temperatures, commit_path
from tailcache.storage.local_place import LocalPlace
from tailcache.storage.objects import read_object
from tailcache.storage.place import Place
from tailcache.storage.sealed import seal, unseal

__all__ = ["Targets", "TargetsWriter", "commit_chain", "load_codec", "plan_layout"]


def plan_layout(
    corpus: Corpus,
    *,
    top_k: int,
    num_samples: int,
    shard_positions: int,
    chunk: int = 8192,
    compression_level: int = 9,
    temperatures: Sequence[float] = (),
) -> Layout:
    """Cut a corpus into shards.

    Args:
      corpus: the positions to be covered.
      top_k: tokens kept per position, 1 to V.
      num_samples: draws from the tail per position; must be 0 where K = V, since there is no tail.
      shard_positions: target positions per shard, on average.
      chunk: slots per inner chunk.
      compression_level: of blosc, 1 to 9.
      temperatures: further ones at which the tail's sum is stored, in this order.

    Raises:
      ConfigError: a size or a temperature is out of range.
    """
    if not 1 <= top_k <= corpus.vocab_size:
        raise ConfigError(f"top_k: expected 1 to the vocabulary size {corpus.vocab_size}, found {top_k}")
    if num_samples < 0 or (num_samples and top_k == corpus.vocab_size):
        raise ConfigError(
            f"num_samples: expected 0 or more, and 0 where top_k equals the vocabulary size; found {num_samples}"
        )
    if shard_positions < 1 or chunk < 1 or not 1 <= compression_level <= 9:
        raise ConfigError(
            "expected shard_positions >= 1, chunk >= 1 and a compression level from 1 to 9; found "
            f"{shard_positions}, {chunk} and {compression_level}"
        )
    problem = check_temperatures(temperatures)
    if problem:
        raise ConfigError(f"temperatures: {problem}")
    rows_per_shard = max(1, round(shard_positions * corpus.num_rows / max(1, corpus.num_targets)))
    rows_per_shard = min(rows_per_shard, corpus.num_rows)
    largest = 1
    for first in range(0, corpus.num_rows, rows_per_shard):
        last = min(first + rows_per_shard, corpus.num_rows)
        a, b = corpus.read("target_offsets", first, first + 1), corpus.read("target_offsets", last, last + 1)
        largest = max(largest, int(b[0] - a[0]))
    chunk = min(chunk, largest)
    return Layout(
        vocab_size=corpus.vocab_size,
        top_k=top_k,
        num_samples=num_samples,
        num_levels=len(logprob_levels(top_k)),
        num_rows=corpus.num_rows,
        num_positions=corpus.num_targets,
        rows_per_shard=rows_per_shard,
        shard_slots=-(-largest // chunk) * chunk,
        chunk=chunk,
        compression_level=compression_level,
        temperatures=tuple(map(float, temperatures)),
    )


class TargetsWriter:
    """Create or continue ``CACHE/teachers/NAME``.

    Args:
      corpus: the corpus whose positions are covered.
      name: the teacher's name, one folder.
      layout: from ``plan_layout``.
      settings: everything that decides the content (JSON values). A capture of the same name is continued only
        if all of it is equal.
      provenance: what else should be known of how it was made; deterministic JSON values.
      head: the teacher's head where the layout has hidden states, none otherwise.

    Raises:
      MismatchError: a capture of this name exists with other settings, or another process is writing it.
      CorruptError: what is there is damaged.
    """

    def __init__(
        self,
        corpus: Corpus,
        name: str,
        *,
        layout: Layout,
        settings: dict[str, Any],
        provenance: dict[str, Any] | None = None,
        head: StoredHead | None = None,
    ) -> None:
        given = None if head is None else HiddenLayout.of(layout.hidden.kind if layout.hidden else "bf16", head)
        if layout.hidden != given or (head is not None and len(head.weight) != layout.vocab_size):
            rows = 0 if head is None else len(head.weight)
            raise ValueError(f"expected a head as the layout has it, {layout.hidden}, found {given} of {rows} tokens")
        local = corpus.cache_place.local
        assert local is not None
        self.path = local / "teachers" / check_name(name)
        self.layout = layout
        self._corpus = corpus
        self._head = head
        self._identity = {
            "name": name,
            "corpus_hash": corpus.hash,
            "layout": layout.attributes(),
            "settings": settings,
        }
        self._provenance = provenance or {}
        durable.make_folder(self.path.parent)
        self._lock = _lock(self.path)
        try:
            self._manifest_seal, self._codec = self._resume()
            self.num_committed, self.bytes_written = self._count_commits() if self._manifest_seal else (0, 0)
            self.complete = self._check_complete()
            self._tail_sum = self._load_tail_sum()
        except BaseException:
            self.close()
            raise

    # -- what is there already ---------------------------------------------------------------------------------

    def _resume(self) -> tuple[str, Codec | None]:
        manifest_path = self.path / "manifest.json"
        if not manifest_path.is_file():
            if (self.path / commit_path(0)).exists():
                raise CorruptError(f"{manifest_path}: missing, though shards are committed; restore it from a copy")
            durable.remove_tree(self.path)  # nothing was committed; whatever is there is half-written
            durable.make_folder(self.path)
            return "", None
        durable.sweep_temporary(self.path)
        data = manifest_path.read_bytes()
        manifest = unseal(data, str(manifest_path))
        differences = list(_differences("", {k: manifest.get(k) for k in self._identity}, self._identity))
        if differences:
            raise MismatchError(
                f"{self.path}: a capture of this name exists, made with other settings: "
                + "; ".join(f"{field}: stored {a!r}, asked for {b!r}" for field, a, b in differences[:8])
                + ". Give the new capture another --name, or use the stored settings to continue this one"
            )
        return durable.sha256(data), load_codec(LocalPlace(self.path), self.layout, manifest["files"])

    def _count_commits(self) -> tuple[int, int]:
        """Committed shards, and the bytes of their objects."""
        count = size = 0
        while count < self.layout.num_shards and (self.path / commit_path(count)).is_file():
            size += sum(entry["bytes"] for entry in self._check_commit(count)["files"].values())
            count += 1
        return count, size

    def _check_commit(self, shard: int) -> dict[str, Any]:
        path = self.path / commit_path(shard)
        commit = unseal(path.read_bytes(), str(path))
        if commit["manifest"] != self._manifest_seal or commit["shard"] != shard:
            raise CorruptError(f"{path}: this commit record belongs to another capture or shard; restore the right one")
        return commit

    def _check_complete(self) -> bool:
        path = self.path / "complete.json"
        if not path.is_file():
            return False
        if self.num_committed < self.layout.num_shards:
            raise CorruptError(
                f"{self.path / commit_path(self.num_committed)}: missing, though the capture was complete; restore it "
                "from a copy, or delete the teacher and capture again"
            )
        record = unseal(path.read_bytes(), str(path))
        if record["manifest"] != self._manifest_seal or record["commits"] != commit_chain(
            self.path, self.num_committed
        ):
            raise CorruptError(f"{path}: belongs to another manifest or other commit records; restore the right one")
        return True

    def _partial(self, shard: int) -> Path:
        return self.path / "partial" / f"tail_sum-{shard:08d}.bin"

    def _load_tail_sum(self) -> NDArray[np.float64]:
        if self.num_committed == 0 or self.complete:
            return np.zeros(self.layout.vocab_size)
        path = self._partial(self.num_committed - 1)
        expected = self._check_commit(self.num_committed - 1)["tail_sum"]
        data = path.read_bytes() if path.is_file() else b""
        if durable.sha256(data) != expected:
            raise CorruptError(
                f"{path}: expected checksum {expected}, found {durable.sha256(data) if data else 'no file'}; it is "
                "needed to continue: restore it, or delete the teacher and capture again"
            )
        return np.frombuffer(data, "<f8").copy()

    # -- writing -----------------------------------------------------------------------------------------------

    def write_shard(self, shard: int, targets: Targets, tail_sum: NDArray[np.float64]) -> int:
        """Write and commit the next shard.

        Args:
          shard: its number; shards are committed in order.
          targets: of all target positions of its rows.
          tail_sum: [V] the sum of those positions' normalised tail distributions.

        Returns:
          Bytes of the shard's objects on disk.

        Raises:
          StorageError: the disk is full or failing; earlier shards stay good.
        """
        if shard != self.num_committed:
            raise ValueError(f"{self.path}: expected shard {self.num_committed} next, found {shard}")
        first, last = self.layout.shard_rows(shard)
        offsets = self._corpus.target_offsets(first, last)
        expected = int(offsets[-1] - offsets[0])
        if len(targets) != expected:
            raise ValueError(
                f"{self.path}, shard {shard}: expected {expected} targets for rows [{first}, {last}), found "
                f"{len(targets)}"
            )
        if self._codec is None:
            self._create(targets)
        assert self._codec is not None
        files: dict[str, dict[str, Any]] = {}
        specs, encoded = self.layout.fields(), self._codec.encode(targets)
        wanted = {name: spec.columns for name, spec in specs.items()}
        found = {name: values.shape[1] if values.ndim > 1 else None for name, values in encoded.items()}
        if found != wanted:
            raise ValueError(f"{self.path}, shard {shard}: expected fields and columns {wanted}, found {found}")
        for name, values in encoded.items():
            spec = specs[name]
            data = spec.encode(values)
            if data is not None:
                files[spec.object_path(shard)] = {
                    "bytes": len(data),
                    "sha256": durable.sha256(data),
                    "chunks": spec.chunk_seal(data),
                }
                self._write_checked(spec.object_path(shard), data)
        new_sum = self._tail_sum + tail_sum  # kept only once it is committed: a failed write may be tried again
        partial = new_sum.astype("<f8").tobytes()
        durable.make_folder(self._partial(shard).parent)
        durable.write_file(self._partial(shard), partial)
        commit = {
            "shard": shard,
            "manifest": self._manifest_seal,
            "rows": [first, last],
            "positions": expected,
            "files": files,
            "tail_sum": durable.sha256(partial),
            "sums": {
                "log_target": float(targets.log_target.sum(dtype=np.float64)),
                "tail_mass": float(np.exp(targets.log_tail.astype(np.float64)).sum()),
            },
        }
        durable.make_folder((self.path / commit_path(shard)).parent)
        durable.write_file(self.path / commit_path(shard), seal(commit))
        self.num_committed += 1
        self._tail_sum = new_sum
        if shard:
            durable.remove_tree(self._partial(shard - 1))
        written: int = sum(entry["bytes"] for entry in files.values())
        self.bytes_written += written
        return written

    def _write_checked(self, name: str, data: bytes) -> None:
        path = self.path / name
        durable.make_folder(path.parent)
        durable.write_file(path, data)
        if path.read_bytes() != data:
            raise StorageError(f"{path}: read back other bytes than were written; the disk or file system is failing")

    def _create(self, targets: Targets) -> None:
        """Write the metadata and constants; the manifest, last, makes the capture exist."""
        levels = logprob_levels(self.layout.top_k)
        order = vocabulary_order(targets.token_ids, self._corpus.token_counts)
        files: dict[str, str] = {}

        def write(name: str, data: bytes) -> None:
            self._write_checked(name, data)
            files[name] = durable.sha256(data)

        write("zarr.json", group_metadata({"tailcache": self.layout.attributes()}))
        slots = self.layout.num_shards * self.layout.shard_slots
        for spec in self.layout.fields().values():
            write(f"{spec.name}/zarr.json", spec.metadata(slots))
        values: dict[str, NDArray[Any]] = {"vocabulary_order": order, "logprob_levels": levels}
        if self._head is not None:
            values["head_weight"] = self._head.weight
            if self._head.bias is not None:
                values["head_bias"] = self._head.bias
        for name, spec in self.layout.constants().items():
            write(f"{name}/zarr.json", spec.metadata(self.layout.constant_length(name)))
            stored = values.get(name, np.empty(0, spec.dtype))  # the mean tail is known when all shards are in
            for number in range(spec.num_objects(len(stored))):
                data = spec.encode(stored[number * spec.shard : (number + 1) * spec.shard])
                assert data is not None
                write(spec.object_path(number), data)
        manifest = {**self._identity, "provenance": self._provenance, "files": files}
        sealed = seal(manifest)
        durable.write_file(self.path / "manifest.json", sealed)
        self._manifest_seal, self._codec = durable.sha256(sealed), Codec(order, levels)

    def finish(self) -> None:
        """Write the mean tail distribution and the record that says the capture is whole."""
        if self.num_committed != self.layout.num_shards:
            raise ValueError(f"{self.path}: {self.num_committed} of {self.layout.num_shards} shards are committed")
        if not self.complete:
            total = self._tail_sum.sum()
            mean = (self._tail_sum / total if total > 0 else self._tail_sum).astype(np.float32)
            spec = self.layout.constants()["mean_tail"]
            data = spec.encode(mean)
            assert data is not None
            self._write_checked(spec.object_path(0), data)
            record = {
                "manifest": self._manifest_seal,
                "num_shards": self.layout.num_shards,
                "positions": self.layout.num_positions,
                "bytes": self.bytes_written,
                "commits": commit_chain(self.path, self.layout.num_shards),
                "files": {spec.object_path(0): durable.sha256(data)},
            }
            durable.write_file(self.path / "complete.json", seal(record))
            self.complete = True
        durable.remove_tree(self.path / "partial")

    def close(self) -> None:
        """Let other processes write this teacher."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def commit_chain(path: Path, num_shards: int) -> str:
    """One hash over all commit records, in order."""
    digest = hashlib.sha256()
    for shard in range(num_shards):
        digest.update((path / commit_path(shard)).read_bytes())
    return digest.hexdigest()


def load_codec(place: Place, layout: Layout, checksums: dict[str, str]) -> Codec:
    """Read a teacher's vocabulary order and levels, checked against its manifest.

    Raises:
      CorruptError: either is missing or damaged.
    """
    values = []
    for name in ("vocabulary_order", "logprob_levels"):
        spec = layout.constants()[name]
        for file in (f"{name}/zarr.json", spec.object_path(0)):
            place.read_checked(file, checksums.get(file))
        length = layout.constant_length(name)
        values.append(read_object(place, spec.object_path(0), spec, 0, length, f"{place}, constant {name}"))
    return Codec(values[0], values[1])


def _lock(path: Path) -> int:
    lock_path = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StorageError(error.errno, f"{lock_path}: cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise MismatchError(
            f"{path}: another process is capturing under this name; wait for it, or choose another --name"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise StorageError(error.errno, f"{lock_path}: the file system has no locks: {error.strerror}") from error
    return descriptor


def _differences(where: str, stored: Any, asked: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        return [
            difference
            for key in sorted(stored.keys() | asked.keys())
            for difference in _differences(f"{where}.{key}" if where else key, stored.get(key), asked.get(key))
        ]
    return [] if stored == asked else [(where, stored, asked)]
