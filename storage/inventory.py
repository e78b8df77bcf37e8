"""What a teacher's folder holds and what each field costs, read from its records alone; finished or not.

``Teacher`` opens finished captures only. This looks at the manifest and the commit records, so that one can
say how far a capture has come; no array is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tailcache.storage.commits import MANIFEST_COPY, committed_shards, missing_shards
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import CorruptError, NotFoundError
from tailcache.storage.layout import Layout, check_name, commit_path
from tailcache.storage.limits import MAX_COMMIT, MAX_MANIFEST
from tailcache.storage.place import Place
from tailcache.storage.records import parse_commit, parse_manifest

__all__ = ["TeacherInventory", "corpus_bytes", "teacher_inventory"]


@dataclass(frozen=True, kw_only=True)
class TeacherInventory:
    """What is committed of one teacher."""

    name: str
    place: Place
    manifest: dict[str, Any]
    layout: Layout
    complete: bool
    committed_shards: int
    """How many; they may be any, in any order."""
    positions: int
    """Target positions of the committed shards."""
    field_bytes: dict[str, int]
    """Bytes of each per-position array as it lies on disk, committed shards only, as their records have it."""
    constant_bytes: dict[str, int]
    """Bytes of each array that exists once, as it lies on disk."""
    record_bytes: int
    """Bytes of metadata, manifest and commit records."""

    @property
    def bytes_per_position(self) -> dict[str, float]:
        """Bytes of each per-position array divided by the committed target positions; empty if there are none."""
        return {name: size / self.positions for name, size in self.field_bytes.items()} if self.positions else {}


def teacher_inventory(corpus: Corpus, name: str) -> TeacherInventory:
    """Take stock of one teacher, finished or not.

    Args:
      corpus: of the cache.
      name: the teacher's.

    Raises:
      NotFoundError: no teacher of that name.
      MismatchError: it was captured over another corpus.
      CorruptError, FormatError: a record is damaged, missing, or of another format.

    Cost: one small file per shard.
    """
    place = corpus.cache_place / "teachers" / check_name(name)
    try:
        data = place.read_limited("manifest.json", MAX_MANIFEST)
    except FileNotFoundError:
        raise NotFoundError(
            f"{place}: expected a teacher with a manifest, found none; its capture has not committed anything yet"
        ) from None
    manifest = parse_manifest(data, f"{place}/manifest.json")
    manifest.check_corpus(corpus.record, str(place))
    layout = manifest.layout
    complete = place.exists("complete.json")
    field_bytes = dict.fromkeys(layout.fields(), 0)
    record_bytes = len(data) + sum((place.size(file) or 0) for file in manifest.files if file.endswith("zarr.json"))
    record_bytes += sum(place.size(file) or 0 for file in ("complete.json", MANIFEST_COPY))
    committed = committed_shards(place, layout)
    positions = 0
    for shard in committed:
        raw = place.read_limited(commit_path(shard), MAX_COMMIT)
        commit = parse_commit(raw, f"{place}/{commit_path(shard)}", shard, manifest)
        for file, entry in commit.files.items():
            if (field := file.split("/")[0]) in field_bytes:
                field_bytes[field] += entry.bytes
        positions += commit.positions
        record_bytes += len(raw)
    missing = next(missing_shards(layout, committed), None) if complete else None
    if missing is not None:
        raise CorruptError(
            f"{place}/{commit_path(missing)}: missing, though the capture was complete; restore it from a copy"
        )
    return TeacherInventory(
        name=name,
        place=place,
        manifest=manifest.values,
        layout=layout,
        complete=complete,
        committed_shards=len(committed),
        positions=positions,
        field_bytes=field_bytes,
        constant_bytes={
            name: sum(
                (place.size(spec.object_path(number)) or 0)
                for number in range(spec.num_objects(layout.constant_length(name)))
            )
            for name, spec in layout.constants().items()
        },
        record_bytes=record_bytes,
    )


def corpus_bytes(corpus: Corpus) -> dict[str, int]:
    """Bytes of each array of a corpus, and of its tokenizer's files, as they lie on disk."""
    sizes: dict[str, int] = {}
    for file, size in corpus.place.files():
        folder, *rest = file.split("/")
        if folder == "tokenizer" or rest[:1] == ["c"]:
            sizes[folder] = sizes.get(folder, 0) + size
    return sizes if "tokenizer" in sizes else {**sizes, "tokenizer": 0}
