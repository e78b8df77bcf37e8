"""Write one teacher's targets: shards in any order, by any number of processes, killed at any time.

The protocol: claim a shard, write its objects, read them back and compare, write the sum of its tails, then create its
commit record. A shard exists if and only if its commit record does. Who has the first shard also writes metadata and
constants, and then the manifest, without which no other shard can be encoded. When all shards are committed, one
process adds the sums in the order of the shards and writes the mean tail and ``complete.json``. Everything is
deterministic and nothing carries a time, so the bytes do not show how many processes there were or what stopped them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.codec import AnyCodec, Targets
from tailcache.storage.commits import (
    MANIFEST_COPY,
    commit_chain,
    commit_record,
    committed_shards,
    complete_record,
    constant_objects,
    encode_shard,
    first_constants,
    load_codec,
    mean_tail_objects,
    metadata_files,
    missing_shards,
    read_tail_sum,
    tail_sum_bytes,
    tail_sum_path,
)
from tailcache.storage.corpus import Corpus
from tailcache.storage.durable import TEMPORARY, sha256
from tailcache.storage.errors import CorruptError, MismatchError, StorageError
from tailcache.storage.hidden import HiddenLayout, StoredHead
from tailcache.storage.layout import Layout, check_name, commit_path
from tailcache.storage.limits import MAX_COMMIT, MAX_MANIFEST
from tailcache.storage.place import Claim
from tailcache.storage.plan import plan_layout
from tailcache.storage.records import Commit, Manifest, parse_commit, parse_complete, parse_manifest
from tailcache.storage.sealed import seal

__all__ = ["Targets", "TargetsWriter", "differences", "plan_layout"]

_PAUSES = (0.05, 3.0)
"""Seconds between two looks at what other processes do: at first, and at most."""


class TargetsWriter:
    """Create, continue or help with ``CACHE/teachers/NAME``.

        for shard in writer.shards():
            writer.write_shard(shard, *targets_of(shard))
        writer.finish()

    Args:
      corpus: the corpus whose positions are covered.
      name: the teacher's name, one folder.
      layout: from ``plan_layout``.
      settings: everything that decides the content (JSON values). A capture of the same name is continued only
        if all of it is equal.
      provenance: what else should be known of how it was made; deterministic JSON values.
      head: the teacher's head where the layout has hidden states, none otherwise.

    Attributes:
      place: where the teacher lies.
      layout: as given.
      committed: the committed shards, also those that others committed, as far as is known.
      positions: of the committed shards.
      positions_of_others: those that are not this writer's own work.
      bytes_written: size of the objects of the committed shards.
      complete: the capture is finished.

    Raises:
      MismatchError: a capture of this name exists with other settings, or was begun in an earlier format version.
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
        self.place = corpus.cache_place / "teachers" / check_name(name)
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
        self._manifest_seal = ""
        self._record: Manifest | None = None
        self._codec: AnyCodec | None = None
        self._claims: dict[int, Claim] = {}
        self._state = threading.Lock()  # shards are taken in one thread and written in another
        self._changed = threading.Event()
        self.committed: set[int] = set()
        self.positions = self.positions_of_others = self.bytes_written = 0
        self.complete = False
        if not self.started:
            self._expect_nothing()
        self.refresh()
        self._check_complete()

    # -- what is there already ---------------------------------------------------------------------------------

    @property
    def num_committed(self) -> int:
        """Committed shards, as far as is known."""
        return len(self.committed)

    @property
    def started(self) -> bool:
        """The manifest is there, so that any shard can be written and not only the first; looks if it was not.

        Raises:
          MismatchError, CorruptError: it is that of another capture, or damaged.
        """
        with self._state:
            if not self._manifest_seal:
                try:
                    data = self.place.read_limited("manifest.json", MAX_MANIFEST)
                except FileNotFoundError:
                    return False
                self._join(data)
            return True

    def _join(self, data: bytes) -> None:
        """Take over a manifest, if it is that of this very capture."""
        record = parse_manifest(data, f"{self.place}/manifest.json")
        stored = {key: record.values.get(key) for key in self._identity}
        version = record.layout.format_version
        if version != self.layout.format_version and not self.place.exists("complete.json"):
            versions = record.settings.get("versions")
            by = versions.get("tailcache") if isinstance(versions, dict) else ""
            by = f"tailcache {by}" if by else "the version of tailcache that wrote it"
            raise MismatchError(
                f"{self.place}: a capture of this name was begun in format version {version} and never finished; this "
                f"version continues only what has format version {self.layout.format_version}. Finish it with {by}, "
                "or delete it and capture again"
            )
        found = differences("", stored, self._identity)
        if found:
            raise MismatchError(
                f"{self.place}: a capture of this name exists, made with other settings: "
                + "; ".join(f"{field}: stored {a!r}, asked for {b!r}" for field, a, b in found[:8])
                + ". Give the new capture another --name, or use the stored settings to continue this one"
            )
        self._codec = load_codec(self.place, self.layout, record.files)
        self._record, self._manifest_seal = record, record.seal

    def _expect_nothing(self) -> None:
        if (committed_shards(self.place, self.layout) or self.place.exists("complete.json")) and not self.started:
            raise CorruptError(
                f"{self.place}/manifest.json: missing, though shards are committed; restore it from a copy"
            )

    def refresh(self) -> None:
        """Look for what others have committed meanwhile."""
        if self.started and not self.complete:
            for shard in committed_shards(self.place, self.layout):
                if shard not in self.committed:
                    self._note(shard)

    def _note(self, shard: int) -> None:
        record = self._check_commit(shard, self.place.read_limited(commit_path(shard), MAX_COMMIT))
        with self._state:
            if shard not in self.committed:
                self.committed.add(shard)
                self.positions += record.positions
                self.positions_of_others += 0 if shard in self._claims else record.positions
                self.bytes_written += record.bytes

    def _check_commit(self, shard: int, data: bytes) -> Commit:
        assert self._record is not None
        return parse_commit(data, f"{self.place}/{commit_path(shard)}", shard, self._record)

    def _check_complete(self) -> None:
        try:
            data = self.place.read_limited("complete.json", MAX_COMMIT)
        except FileNotFoundError:
            return
        assert self._record is not None, "without a manifest, this file has been refused"
        record = parse_complete(data, f"{self.place}/complete.json", self._record)
        self.refresh()  # others may have committed the last ones since
        missing = next(missing_shards(self.layout, self.committed), None)
        if missing is not None:
            raise CorruptError(
                f"{self.place}/{commit_path(missing)}: missing, though the capture was complete; restore it from a "
                "copy, or run `tailcache verify --repair` with the teacher"
            )
        if record.commits != commit_chain(self.place, self.layout.num_shards):
            raise CorruptError(
                f"{self.place}/complete.json: belongs to another manifest or other commit records; restore the right "
                "one, or run `tailcache verify --repair` with the teacher"
            )
        self.complete = True

    # -- who does what -----------------------------------------------------------------------------------------

    def shards(self, waiting: Callable[[], object] | None = None) -> Iterator[int]:
        """Claim shards one after another, those that no other process has, until all are committed.

        Each must be written with ``write_shard``, in this thread or another. At the end this waits for those that
        others have, and takes over what they do not finish. Until there is a manifest, one shard besides the first is
        all that is given out, since no more could be written.

        Args:
          waiting: called again and again while there is nothing to do; may raise.

        Yields:
          Numbers of shards.
        """
        pause = _PAUSES[0]
        while len(self.committed) < self.layout.num_shards:
            idle = True
            for shard in range(self.layout.num_shards):
                if shard in self.committed or shard in self._claims:
                    continue
                if shard and self._claims and 0 not in self._claims and not self.started:
                    break
                if self._claim(shard):
                    idle = False
                    yield shard
            self.refresh()
            waits = idle and len(self.committed) < self.layout.num_shards
            pause = self._wait(pause, waiting) if waits else _PAUSES[0]

    def _wait(self, pause: float, waiting: Callable[[], object] | None) -> float:
        """Sleep, or until this process commits a shard, and say how long to sleep the next time."""
        if waiting is not None:
            waiting()
        if self._changed.wait(pause):
            self._changed.clear()
            return _PAUSES[0]
        return min(1.5 * pause, _PAUSES[1])

    def _claim(self, shard: int) -> bool:
        if self.place.exists(commit_path(shard)):
            claim = None
        else:
            claim = self.place.claim(f"claims/{shard:08d}")
            if claim is None:
                return False
        if claim is None or self.place.exists(commit_path(shard)):  # committed between the two looks
            if claim is not None:
                claim.release()
            if self.started:
                self._note(shard)
            return False
        with self._state:
            self._claims[shard] = claim
        return True

    def _release(self, shard: int) -> None:
        with self._state:
            claim = self._claims.pop(shard)
        claim.release()

    # -- writing -----------------------------------------------------------------------------------------------

    def write_shard(self, shard: int, targets: Targets, tail_sum: NDArray[np.float64]) -> int:
        """Write and commit a shard, and let go of it. After an error it can be tried again.

        Args:
          shard: its number, from ``shards``; another is claimed first.
          targets: of all target positions of its rows.
          tail_sum: [V] the sum of those positions' normalised tail distributions.

        Returns:
          Bytes of the shard's objects.

        Raises:
          MismatchError: another process has this shard, or captures other values under this name.
          StorageError: the disk is full or failing; committed shards stay good.
        """
        first, last = self.layout.shard_rows(shard)
        offsets = self._corpus.target_offsets(first, last)
        expected = int(offsets[-1] - offsets[0])
        if len(targets) != expected:
            raise ValueError(
                f"{self.place}, shard {shard}: expected {expected} targets for rows [{first}, {last}), found "
                f"{len(targets)}"
            )
        if shard not in self._claims and not self._claim(shard):
            raise MismatchError(f"{self.place}, shard {shard}: expected one to be written, found that another has it")
        if not self.started:
            if shard:
                raise ValueError(f"{self.place}: expected shard 0 first, which the constants come from; found {shard}")
            self._create(targets)
        assert self._codec is not None
        objects = encode_shard(self.layout, self._codec, shard, targets)
        commit = commit_record(self.layout, self._manifest_seal, shard, targets, objects, tail_sum)
        if not self.place.exists(commit_path(shard)):  # or our claim ended while this process was stopped
            for name, data in objects.items():
                self._write_checked(name, data)
            self.place.write(tail_sum_path(shard), tail_sum_bytes(tail_sum))
        if (
            not self.place.create(commit_path(shard), commit)
            and self.place.read_limited(commit_path(shard), MAX_COMMIT) != commit
        ):
            raise MismatchError(
                f"{self.place}, shard {shard}: another process has committed other bytes than this one made, though "
                "its settings are the same; are the machines different? Run `tailcache verify`"
            )
        self._note(shard)
        self._release(shard)
        self._changed.set()
        return sum(map(len, objects.values()))

    def _write_checked(self, name: str, data: bytes) -> None:
        self.place.write(name, data)
        if self.place.uncached().read(name) != data:
            raise StorageError(
                f"{self.place}/{name}: read back other bytes than were written; the disk or file system is failing"
            )

    def _create(self, targets: Targets) -> None:
        """Write the metadata and constants; the manifest, last, makes the capture exist."""
        for name, _ in list(self.place.files()):  # nothing was committed; whatever is there is half-written
            if not name.startswith("claims/"):
                self.place.delete(name)
        values = first_constants(self.layout, targets, self._corpus.token_counts, self._head)
        files: dict[str, str] = {}
        for written in (metadata_files(self.layout), constant_objects(self.layout, values)):
            for name, data in written:
                self._write_checked(name, data)
                files[name] = sha256(data)
        manifest = seal({**self._identity, "provenance": self._provenance, "files": files})
        self._write_checked(MANIFEST_COPY, manifest)
        if not self.place.create("manifest.json", manifest):
            manifest = self.place.read("manifest.json")  # our claim had ended, and another made it
            self._write_checked(MANIFEST_COPY, manifest)
        with self._state:
            self._join(manifest)

    def finish(self, waiting: Callable[[], object] | None = None) -> None:
        """Write the mean tail and the record that says that the capture is whole, or wait for who is doing so.

        Args:
          waiting: as for ``shards``.

        Raises:
          ValueError: a shard is not committed.
          CorruptError: a shard's sum of tails is missing or damaged.
        """
        self.refresh()
        if len(self.committed) < self.layout.num_shards:
            raise ValueError(f"{self.place}: {self.num_committed} of {self.layout.num_shards} shards are committed")
        pause = _PAUSES[0]
        while not self.complete:
            claim = self.place.claim("claims/finish")
            if claim is None:
                pause = self._wait(pause, waiting)
                self._check_complete()
                continue
            try:
                self._check_complete()
                if not self.complete:
                    self._complete()
            finally:
                claim.release()
        if {"partial", "claims"} & set(self.place.folders()):
            self._tidy()

    def _complete(self) -> None:
        total = np.zeros(self.layout.vocab_size)
        for shard in range(self.layout.num_shards):  # in this order, whoever captured them
            commit = self._check_commit(shard, self.place.read_limited(commit_path(shard), MAX_COMMIT))
            total += read_tail_sum(self.place, shard, commit.tail_sum)
        means = dict(mean_tail_objects(self.layout, total))
        for name, data in means.items():
            self._write_checked(name, data)
        record = complete_record(
            self.layout,
            self._manifest_seal,
            num_bytes=self.bytes_written,
            commits=commit_chain(self.place, self.layout.num_shards),
            mean_tails=means,
        )
        self.place.write("complete.json", record)
        self.complete = True

    def _tidy(self) -> None:
        """Delete what only an unfinished capture needs, and what killed processes left."""
        for name, _ in list(self.place.files()):
            if name.endswith(TEMPORARY):
                self.place.delete(name)
        self.place.delete_all("partial")
        self.place.delete_all("claims")

    def close(self) -> None:
        """Let others have what this process has claimed and not committed."""
        for shard in list(self._claims):
            self._release(shard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def differences(where: str, stored: Any, asked: Any) -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ: the place, and what each has there."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        return [
            difference
            for key in sorted(stored.keys() | asked.keys())
            for difference in differences(f"{where}.{key}" if where else key, stored.get(key), asked.get(key))
        ]
    return [] if stored == asked else [(where, stored, asked)]
