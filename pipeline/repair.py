"""Mend a cache: put aside what is damaged, and make exactly that again; what a shard held from the live teacher.

A shard is captured again with the settings that the manifest has, and its objects must be those that its commit record
names, byte for byte: the same model, software and machine give the same bytes. Where the commit record itself is lost
it is made again too, and the hash of all commit records in ``complete.json`` says whether it is the original. Nothing
is written that is not what was there before, except where all records that could tell are gone; that is said then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.pipeline.capture import capture_shard
from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.opened import OpenedTeacher
from tailcache.pipeline.stored import open_stored, stored_config
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.codec import Targets
from tailcache.storage.commits import (
    MEAN_TAILS,
    commit_record,
    constant_objects,
    encode_shard,
    first_constants,
    load_codec,
    tail_sum_bytes,
    tail_sum_path,
)
from tailcache.storage.corpus import Corpus
from tailcache.storage.durable import sha256
from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.layout import commit_path
from tailcache.storage.mending import Mended, Mender, put_aside
from tailcache.storage.place import Location, Place, open_place
from tailcache.storage.records import Complete, Manifest
from tailcache.storage.verify import Level, Verification, inspect

__all__ = ["repair", "repair_cache"]

_OTHER_BYTES = (
    "captured again it has other bytes than the record says, so this machine or its software is not the one it was "
    "captured with; nothing was replaced: repair it there, or restore it from a copy"
)


def repair(
    location: Location | Place,
    found: Verification,
    *,
    model: str | None = None,
    name: str | None = None,
    threads: int | None = None,
    trust: bool = False,
    live: Teacher | None = None,
    progress: Callable[[int], object] | None = None,
) -> Mended:
    """Mend what a verification has found.

    Args:
      location: of the cache.
      found: its faults, from ``inspect``.
      model: what the damaged teacher was captured from, as for ``tailcache capture --teacher``; needed where shards
        or constants are damaged.
      name: which teacher to mend; all of them by default, and then one model must serve for all.
      threads: CPU threads of the model.
      trust: run model code that comes with a hub model.
      live: the model, where it is loaded already.
      progress: called with the number of positions captured, batch by batch.

    Returns:
      What was made, put aside, and left as it is.

    Raises:
      MismatchError: the model or its settings are not those that the teacher was captured with (says which), or another
        process is mending this teacher.
      StorageError: the disk is full or failing; run the same again.
    """
    place, mended = open_place(location).uncached(), Mended()
    for teacher, faults in _damage(found, name).items():
        _Claimed(place, teacher).do(Mender(place, teacher, faults, mended).manifest)
    if mended.made:  # what was said of the other files rested on another manifest
        found = inspect(place, level=found.level)
    for fault in found.faults:
        if fault.kind == "stray":
            put_aside(place, fault.path, mended)
        elif fault.kind == "values" or fault.teacher is None:
            mended.left[fault.path] = f"{fault.problem}; {fault.remedy}"
    corpus_is_good = not any(fault.path.split("/")[0] == "corpus" for fault in found.faults if fault.kind != "stray")
    for teacher, faults in _damage(found, name).items():
        of = _TeacherRepair(place, teacher, Mender(place, teacher, faults, mended), mended, progress)
        _Claimed(place, teacher).do(partial(of.run, corpus_is_good, partial(of.open, model, live, threads, trust)))
    return mended


def _damage(found: Verification, name: str | None) -> dict[str, set[str]]:
    """The damaged files of each teacher that is to be mended."""
    damaged: dict[str, set[str]] = {}
    for fault in found.faults:
        if fault.kind == "damage" and fault.teacher is not None and name in (None, fault.teacher):
            damaged.setdefault(fault.teacher, set()).add(fault.path)
    return dict(sorted(damaged.items()))


class _Claimed:
    """Do something to a teacher that no other process may do at the same time."""

    def __init__(self, place: Place, name: str) -> None:
        self._place, self._claims = place / f"teachers/{name}", "claims"

    def do(self, action: Callable[[], object]) -> None:
        claim = self._place.claim(f"{self._claims}/repair")
        if claim is None:
            raise MismatchError(f"{self._place}: another process is mending this teacher; wait for it")
        try:
            action()
        finally:
            claim.release()
            if self._place.exists("complete.json"):
                self._place.delete_all(self._claims)


class _TeacherRepair:
    """One teacher. All paths are relative to it."""

    def __init__(
        self, cache: Place, name: str, mender: Mender, mended: Mended, progress: Callable[[int], object] | None
    ) -> None:
        self._cache, self._name = cache, name
        self._mender, self._mended, self._progress = mender, mended, progress
        self._first: tuple[Targets, NDArray[np.float64]] | None = None
        self._opened: OpenedTeacher | None = None
        self._config: CaptureConfig | None = None

    def open(self, model: str | None, live: Teacher | None, threads: int | None, trust: bool) -> None:
        """Load the model."""
        manifest = self._manifest
        self._config = stored_config(
            manifest, str(self._cache), model or ("" if live is not None else None), threads=threads, trust=trust
        )
        self._opened, notes = open_stored(manifest, Corpus(self._cache), self._config, live)
        self._mended.notes += notes

    def run(self, corpus_is_good: bool, load: Callable[[], None]) -> None:
        """Mend what can be, records first."""
        manifest = self._mender.manifest()
        if manifest is None:
            return
        self._manifest: Manifest = manifest
        self._mender.metadata(manifest)
        self._ended = ended = self._mender.was_complete(manifest)
        if ended:  # then nobody needs the sums of tails
            self._mender.damaged -= {path for path in self._mender.damaged if path.startswith("partial/")}
        if ended and not self._mender.place.exists("complete.json"):
            self._mender.damaged |= {"complete.json", *(self._missing_commits() if corpus_is_good else ())}
        if self._wanted_shards() or self._wanted_constants():
            self._with_model(corpus_is_good, load)
        if ended and self._mender.damaged & {"complete.json", *self._mean_tails()}:
            self._mender.whole(manifest)
        for path in sorted(self._mender.damaged):
            self._mender.give_up(path, "found no way to mend it; restore it from a copy, or capture again")

    # -- what is damaged ---------------------------------------------------------------------------------------

    def _mean_tails(self) -> list[str]:
        constants = self._manifest.layout.constants()
        return [constants[name].object_path(0) for name in MEAN_TAILS if name in constants]

    def _missing_commits(self) -> set[str]:
        layout, num_rows = self._manifest.layout, Corpus(self._cache).num_rows
        if layout.num_rows != num_rows:
            raise MismatchError(
                f"teacher {self._name!r}: expected a manifest about the {num_rows} rows of the corpus, found "
                f"{layout.num_rows}; restore manifest.json from a copy"
            )
        there = {name for name, _ in self._mender.place.files("commits")}
        return {commit_path(shard) for shard in range(layout.num_shards)} - there

    def _wanted_shards(self) -> dict[int, set[str]]:
        """Damaged files of each shard: objects, commit record, sum of tails."""
        layout, wanted = self._manifest.layout, dict[int, set[str]]()
        fields = layout.fields()
        for path in self._mender.damaged:
            first, *rest = path.split("/")
            if first in ("commits", "partial"):
                wanted.setdefault(int(path.rsplit("-", 1)[-1].split("/")[-1].split(".")[0]), set()).add(path)
            elif first in fields and rest[:1] == ["c"]:
                wanted.setdefault(int(rest[1]), set()).add(path)
        return dict(sorted(wanted.items()))

    def _wanted_constants(self) -> set[str]:
        constants = self._manifest.layout.constants()
        return {
            path
            for path in self._mender.damaged
            if path.split("/")[0] in constants and "/c/" in path and path not in self._mean_tails()
        }

    # -- with the model ----------------------------------------------------------------------------------------

    def _with_model(self, corpus_is_good: bool, load: Callable[[], None]) -> None:
        wanted = {path for paths in self._wanted_shards().values() for path in paths} | self._wanted_constants()
        reason = "" if corpus_is_good else "the corpus is damaged, so its positions cannot be captured; mend it first"
        if not reason:
            try:
                load()
            except ConfigError as error:
                reason = str(error)
        if reason:
            for path in sorted(wanted):
                self._mender.give_up(path, reason)
            return
        self._constants()
        if not self._wanted_constants():
            self._shards()

    @cached_property
    def _complete(self) -> Complete | None:
        return self._mender.complete(self._manifest)

    def _capture(self, shard: int) -> tuple[Targets, NDArray[np.float64]]:
        assert self._opened is not None
        assert self._config is not None
        if shard == 0 and self._first is not None:
            captured, self._first = self._first, None
            return captured
        captured = capture_shard(self._opened, self._config, shard, self._progress)
        self._mended.shards.append((self._name, shard))
        return captured

    def _constants(self) -> None:
        """Make damaged constants again; only those that come from the first shard take capturing it."""
        assert self._opened is not None
        layout, counts = self._manifest.layout, Corpus(self._cache).token_counts
        for captured in (False, True):
            wanted = self._wanted_constants()
            if not wanted:
                return
            if captured:
                self._first = self._capture(0)
            targets = self._first[0] if self._first is not None else _no_targets(layout.top_k)
            values = first_constants(layout, targets, counts, self._opened.head)
            for path, data in constant_objects(layout, values):
                if path in wanted and sha256(data) == self._manifest.files.get(path):
                    self._mender.write(path, data)
        for path in sorted(self._wanted_constants()):
            self._mender.give_up(path, _OTHER_BYTES)

    def _shards(self) -> None:
        """Capture damaged shards again, one after another."""
        layout, manifest = self._manifest.layout, self._manifest
        codec: Any = load_codec(self._mender.place, layout, dict(manifest.files))
        uncertain: dict[int, tuple[bytes, dict[str, bytes]]] = {}
        for shard, paths in self._wanted_shards().items():
            commit = self._mender.commit(shard, manifest)
            if layout.format_version == 1 and (commit is None or any(path.startswith("partial") for path in paths)):
                for path in sorted(paths):
                    self._mender.give_up(
                        path,
                        "in format version 1 a commit record and the sum of tails depend on all shards before; restore "
                        "it from a copy, or capture again",
                    )
                continue
            targets, tail_sum = self._capture(shard)
            objects = encode_shard(layout, codec, shard, targets)
            if commit is None:
                record = commit_record(layout, manifest.seal, shard, targets, objects, tail_sum)
                if not self._ended:
                    objects[tail_sum_path(shard)] = tail_sum_bytes(tail_sum)
                uncertain[shard] = record, {path: data for path, data in objects.items() if not self._lies(path, data)}
                continue
            same = {path: sha256(data) for path, data in objects.items()} == {
                path: entry.sha256 for path, entry in commit.files.items() if path in objects
            }
            summed = tail_sum_bytes(tail_sum)
            for path in sorted(paths):
                if path == tail_sum_path(shard) and sha256(summed) == commit.tail_sum:
                    self._mender.write(path, summed)
                elif path in objects and same:
                    self._mender.write(path, objects[path])
                else:
                    self._mender.give_up(path, _OTHER_BYTES)
        self._lost_commits(uncertain)

    def _lies(self, path: str, data: bytes) -> bool:
        try:
            return self._mender.place.read(path) == data
        except FileNotFoundError:
            return False

    def _lost_commits(self, made: dict[int, tuple[bytes, dict[str, bytes]]]) -> None:
        """Write commit records that were made again, if they are the originals or nothing is left that could tell."""
        if not made:
            return
        complete = self._complete
        if complete is not None and self._chain(made) != complete.commits:
            for shard, (_, objects) in made.items():
                for path in (commit_path(shard), *objects):
                    self._mender.give_up(path, _OTHER_BYTES)
            return
        if complete is None:
            self._mended.notes.append(
                f"teacher {self._name!r}, shards {_listed(made)}: their commit records were made again, and no record "
                "is left that says whether they are the original ones"
            )
        for shard, (record, objects) in made.items():
            for path, data in objects.items():
                self._mender.write(path, data)
            self._mender.write(commit_path(shard), record)

    def _chain(self, made: dict[int, tuple[bytes, dict[str, bytes]]]) -> str:
        digest = hashlib.sha256()
        for shard in range(self._manifest.layout.num_shards):
            digest.update(made[shard][0] if shard in made else self._mender.place.read(commit_path(shard)))
        return digest.hexdigest()


def _no_targets(top_k: int) -> Targets:
    none = np.empty(0, np.float32)
    return Targets(
        token_ids=np.empty((0, top_k), np.int32),
        logprobs=np.empty((0, top_k), np.float32),
        log_tail=none,
        tail_entropy=none,
        log_target=none,
        log_not_target=none,
        tail_samples=np.empty((0, 0), np.int32),
    )


def _listed(shards: Iterable[int]) -> str:
    return ", ".join(map(str, shards))


def repair_cache(location: Location | Place, *, level: Level = "full", **how: Any) -> tuple[Mended, Verification]:
    """Verify, mend, and verify again; what was done, and what is still wrong.

    Args:
      location: of the cache.
      level: of both verifications.
      how: as for ``repair``.
    """
    found = inspect(location, level=level)
    if not found.faults:
        return Mended(), found
    mended = repair(location, found, **how)
    return mended, inspect(location, level=level)
