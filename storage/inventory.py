"""What a teacher's folder holds and what each field costs, read from its records alone; finished or not.

``Teacher`` opens finished captures only. This looks at the manifest and the commit records, so that one can
say how far a capture has come; no array is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailcache.storage.corpus import Corpus
from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError, MismatchError, NotFoundError
from tailcache.storage.layout import Layout, check_name, commit_path
from tailcache.storage.sealed import unseal

__all__ = ["TeacherInventory", "corpus_bytes", "teacher_inventory"]


@dataclass(frozen=True, kw_only=True)
class TeacherInventory:
    """What is committed of one teacher."""

    name: str
    path: Path
    manifest: dict[str, Any]
    layout: Layout
    complete: bool
    committed_shards: int
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
    path = corpus.path.parent / "teachers" / check_name(name)
    if not (path / "manifest.json").is_file():
        raise NotFoundError(
            f"{path}: expected a teacher with a manifest, found none; its capture has not committed anything yet"
        )
    data = (path / "manifest.json").read_bytes()
    manifest, seal = unseal(data, str(path / "manifest.json")), sha256(data)
    if manifest["corpus_hash"] != corpus.hash:
        raise MismatchError(
            f"{path}: captured over the corpus {manifest['corpus_hash'][:12]}…, but the cache has "
            f"{corpus.hash[:12]}…; put the teacher back beside its own corpus, or capture it again"
        )
    layout = Layout.from_attributes(manifest["layout"], str(path / "manifest.json"))
    complete = (path / "complete.json").is_file()
    field_bytes = dict.fromkeys(layout.fields(), 0)
    record_bytes = len(data) + sum(_size(path / file) for file in manifest["files"] if file.endswith("zarr.json"))
    record_bytes += _size(path / "complete.json")
    committed = positions = 0
    while committed < layout.num_shards and (path / commit_path(committed)).is_file():
        raw = (path / commit_path(committed)).read_bytes()
        commit = unseal(raw, str(path / commit_path(committed)))
        if commit["shard"] != committed or commit["manifest"] != seal:
            raise CorruptError(
                f"{path / commit_path(committed)}: belongs to another shard or capture; restore the right one from "
                "a copy"
            )
        for file, entry in commit["files"].items():
            field_bytes[file.split("/")[0]] += entry["bytes"]
        positions += commit["positions"]
        record_bytes += len(raw)
        committed += 1
    if complete and committed < layout.num_shards:
        raise CorruptError(
            f"{path / commit_path(committed)}: missing, though the capture was complete; restore it from a copy"
        )
    return TeacherInventory(
        name=name,
        path=path,
        manifest=manifest,
        layout=layout,
        complete=complete,
        committed_shards=committed,
        positions=positions,
        field_bytes=field_bytes,
        constant_bytes={
            name: sum(
                _size(path / spec.object_path(number))
                for number in range(spec.num_objects(layout.constant_length(name)))
            )
            for name, spec in layout.constants().items()
        },
        record_bytes=record_bytes,
    )


def corpus_bytes(corpus: Corpus) -> dict[str, int]:
    """Bytes of each array of a corpus, and of its tokenizer's files, as they lie on disk."""
    sizes = {}
    for spec in sorted(corpus.path.glob("*/zarr.json")):
        folder = spec.parent
        sizes[folder.name] = sum(_size(file) for file in (folder / "c").rglob("*") if file.is_file())
    sizes["tokenizer"] = sum(_size(file) for file in corpus.tokenizer_dir.rglob("*") if file.is_file())
    return sizes


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
