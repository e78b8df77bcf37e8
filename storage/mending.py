"""Make damaged files of a teacher again from what is left of it: all that needs neither the model nor a guess.

Every file that is made is held against a hash in a record that is good before it is written; what was there goes to
the cache's quarantine, never away. Each step can be interrupted and done again: a file is either still damaged, or in
quarantine and missing, or made.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tailcache.storage.commits import (
    MANIFEST_COPY,
    MEAN_TAILS,
    commit_chain,
    committed_shards,
    complete_record,
    metadata_files,
)
from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError, StorageError, TailcacheError
from tailcache.storage.layout import Layout, commit_path
from tailcache.storage.limits import MAX_COMMIT, MAX_MANIFEST, largest_object
from tailcache.storage.objects import read_object
from tailcache.storage.place import Place
from tailcache.storage.records import Commit, Complete, Manifest, parse_commit, parse_complete, parse_manifest
from tailcache.storage.sealed import unseal
from tailcache.storage.verify import QUARANTINE

__all__ = ["Mended", "Mender", "put_aside"]

_CAPTURE_AGAIN = "restore it from a copy, or delete this teacher and capture it again"


@dataclass(kw_only=True)
class Mended:
    """What a repair did."""

    made: list[str] = field(default_factory=list)
    """Files that were made again, relative to the cache."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """Where what was there before, and what nobody knows, was put."""
    shards: list[tuple[str, int]] = field(default_factory=list)
    """Teacher and shard of what was captured again."""
    left: dict[str, str] = field(default_factory=dict)
    """What could not be mended: file, and why and what to do."""
    notes: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "made": self.made,
            "quarantined": self.quarantined,
            "shards": [{"teacher": teacher, "shard": shard} for teacher, shard in self.shards],
            "left": [{"path": path, "reason": reason} for path, reason in self.left.items()],
            "notes": self.notes,
        }


class Mender:
    """Mends one teacher of a cache, as far as records, metadata and the mean tail go.

    Args:
      cache: where the cache lies.
      name: of the teacher.
      damaged: its files that ``verify`` found wanting, relative to the cache.
      mended: what was done is added here.
    """

    def __init__(self, cache: Place, name: str, damaged: Iterable[str], mended: Mended) -> None:
        self._cache, self._folder, self._mended = cache, f"teachers/{name}/", mended
        self.place = cache / f"teachers/{name}"
        self.damaged = {path.removeprefix(self._folder) for path in damaged}
        """Relative to the teacher; what is made is taken out."""

    def put_aside(self, path: str) -> None:
        """Move a file, named relative to the teacher, to the quarantine; fine if it is not there."""
        put_aside(self._cache, self._folder + path, self._mended)

    def write(self, path: str, data: bytes) -> None:
        """Put a file in the place of a damaged or missing one."""
        self.put_aside(path)
        self.place.write(path, data)
        if self.place.read(path) != data:
            raise StorageError(f"{self.place}/{path}: read back other bytes than were written; the disk is failing")
        self._mended.made.append(self._folder + path)
        self.damaged.discard(path)

    def give_up(self, path: str, reason: str) -> None:
        """Say that a file cannot be mended, and why."""
        self._mended.left.setdefault(self._folder + path, reason)
        self.damaged.discard(path)

    # -- records -----------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """Mend the manifest from its copy or the copy from it; none where neither is left.

        Where both are sound but differ, the one is right that the commit records name.
        """
        good: dict[str, tuple[bytes, Manifest]] = {}
        for path in ("manifest.json", MANIFEST_COPY):
            with contextlib.suppress(FileNotFoundError, TailcacheError):
                data = self.place.read_limited(path, MAX_MANIFEST)
                good[path] = data, parse_manifest(data, path)
        if not good:
            for path in sorted(self.damaged):
                self.give_up(path, f"the teacher's manifest and its copy are both lost; {_CAPTURE_AGAIN}")
            return None
        votes = Counter(self._named_manifests()) if len(good) == 2 else Counter()
        data, manifest = max(good.values(), key=lambda each: votes[each[1].seal])
        if manifest.layout.format_version > 1:
            for path in (MANIFEST_COPY, "manifest.json"):
                if path not in good or good[path][0] != data:
                    self.write(path, data)
        return manifest

    def _named_manifests(self) -> Iterable[str]:
        for name, _ in self.place.files("commits"):
            with contextlib.suppress(TailcacheError):
                yield str(unseal(self.place.read_limited(name, MAX_COMMIT), name).get("manifest"))

    def metadata(self, manifest: Manifest) -> None:
        """Make every damaged ``zarr.json`` again from the layout."""
        for path, data in metadata_files(manifest.layout):
            if path not in self.damaged:
                continue
            if sha256(data) == manifest.files.get(path):
                self.write(path, data)
            else:
                self.give_up(path, f"the versions of packages here write it in other bytes; {_CAPTURE_AGAIN}")

    def commit(self, shard: int, manifest: Manifest) -> Commit | None:
        """A shard's commit record; none where it is damaged or missing."""
        path = commit_path(shard)
        with contextlib.suppress(FileNotFoundError, TailcacheError):
            return parse_commit(self.place.read_limited(path, MAX_COMMIT), path, shard, manifest)
        return None

    def complete(self, manifest: Manifest) -> Complete | None:
        """The record of the whole; none where it is damaged or missing."""
        with contextlib.suppress(FileNotFoundError, TailcacheError):
            return parse_complete(self.place.read_limited("complete.json", MAX_COMMIT), "complete.json", manifest)
        return None

    def was_complete(self, manifest: Manifest) -> bool:
        """The capture was finished: there is its record, or what is only written at the end and no sum any more."""
        if self.place.exists("complete.json"):
            return True
        constants = manifest.layout.constants()
        written = any(self.place.exists(constants[name].object_path(0)) for name in MEAN_TAILS if name in constants)
        return written and not any(self.place.files("partial"))

    # -- the mean tail and the record of the whole -------------------------------------------------------------

    def whole(self, manifest: Manifest) -> None:
        """Mend the mean tail and its copy, and make the record of the whole again where it is lost.

        All commit records must be good. Without the record, a mean tail is taken for good if it decodes.
        """
        layout = manifest.layout
        names = [name for name in MEAN_TAILS if name in layout.constants()]
        paths = {name: layout.constants()[name].object_path(0) for name in names}
        complete = self.complete(manifest)
        expected = None if complete is None else complete.files[paths["mean_tail"]]
        data = next((data for name in names if (data := self._mean_tail(layout, name, expected)) is not None), None)
        if data is None:
            for path in (*paths.values(), *(() if complete else ("complete.json",))):
                self.give_up(
                    path,
                    "the mean tail and its copy are both lost, and making them takes every shard's tails again; "
                    + _CAPTURE_AGAIN,
                )
            return
        for path in paths.values():
            if path in self.damaged or not self._is(path, data):
                self.write(path, data)
        if complete is None:
            committed = committed_shards(self.place, layout)
            commits = [self.commit(shard, manifest) for shard in committed]
            if len(committed) < layout.num_shards or None in commits:
                self.give_up("complete.json", "it can be made again when all commit records are good; mend these first")
                return
            record = complete_record(
                layout,
                manifest.seal,
                num_bytes=sum(commit.bytes for commit in commits if commit is not None),
                commits=commit_chain(self.place, layout.num_shards),
                mean_tails=dict.fromkeys(paths.values(), data),
            )
            self.write("complete.json", record)

    def _mean_tail(self, layout: Layout, name: str, expected: str | None) -> bytes | None:
        spec = layout.constants()[name]
        path = spec.object_path(0)
        try:
            data = self.place.read_limited(path, largest_object(spec))
            if expected is None:
                read_object(self.place, path, spec, 0, layout.vocab_size, name)
        except (FileNotFoundError, CorruptError):
            return None
        return data if expected is None or sha256(data) == expected else None

    def _is(self, path: str, data: bytes) -> bool:
        try:
            return self.place.read(path) == data
        except FileNotFoundError:
            return False


def put_aside(cache: Place, path: str, mended: Mended) -> None:
    """Move a file of a cache to its quarantine; fine if it is not there. Nothing that lies there is replaced."""
    to, number = f"{QUARANTINE}/{path}", 0
    while cache.exists(to):
        number += 1
        to = f"{QUARANTINE}/{path}.{number}"
    try:
        cache.move(path, to)
    except (FileNotFoundError, NotADirectoryError):
        return
    mended.quarantined[path] = to
