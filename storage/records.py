"""The records of a cache, parsed: what is in them has the right types, is in range, and agrees with the layout.

That a record is sealed says that its bytes are those somebody wrote, not that this package did. So nothing of it is
used before it has been looked at here: numbers against the bounds of ``limits``, sizes against each other, hashes for
their form, and every path for being one that the layout itself would have produced, so that no path can leave the
cache.

    corpus/manifest.json     CorpusManifest
    corpus/checksums.json    Checksums
    manifest.json            Manifest     of a teacher
    commits/SHARD.json       Commit
    complete.json            Complete

Keys that are not known are left alone, and so are files of arrays that are not known: later versions may add both.

Raises, everywhere: ``CorruptError`` where the bytes are not what was written, or belong to another record;
``FormatError`` where they are, but make no sense.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.durable import TEMPORARY, sha256
from tailcache.storage.errors import ConfigError, CorruptError, FormatError, MismatchError
from tailcache.storage.layout import Layout, check_name
from tailcache.storage.limits import (
    MAX_COMMIT,
    MAX_COUNT,
    MAX_MANIFEST,
    MAX_VOCABULARY,
    largest_object,
    layout_problem,
    smallest_object,
)
from tailcache.storage.sealed import unseal

__all__ = [
    "CORPUS_FORMAT",
    "CORPUS_VERSION",
    "Checksums",
    "Commit",
    "Complete",
    "CorpusManifest",
    "Manifest",
    "ObjectEntry",
    "parse_checksums",
    "parse_commit",
    "parse_complete",
    "parse_corpus_manifest",
    "parse_manifest",
]

CORPUS_FORMAT = "tailcache corpus"
CORPUS_VERSION = 1
_REMEDY = "restore it from a copy, or do not use this cache"
_CONTENT = ("tokens", "document_start", "supervised", "row_lengths", "held_out")
_HASH = re.compile(r"[0-9a-f]{64}")
_ARRAY_NAME = r"[a-z][a-z0-9_]{0,63}"
_METADATA_PATH = re.compile(rf"(?:{_ARRAY_NAME}/)?zarr\.json")
_OBJECT_PATH = re.compile(rf"({_ARRAY_NAME})/c/(0|[1-9][0-9]{{0,15}})(?:/0)?")
_TOKENIZER_DEPTH = 4
_NO_TOKENIZER = (".py", ".pyc", ".so", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")
_NAME_BYTES = 255  # what file systems allow


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """Of a corpus: what it holds and where it came from."""

    vocab_size: int
    num_rows: int
    num_tokens: int
    num_targets: int
    content: Mapping[str, str]
    """Hashes of the five parts that ``hash`` is made of."""
    hash: str
    checksums: str
    """Hash of ``checksums.json``."""
    tokenizer: Mapping[str, Any]
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    parent: dict[str, Any] | None
    """Of a part of another corpus: that one's ``hash``, ``num_rows`` and ``report``."""
    values: dict[str, Any]
    """The whole record, with what is not known too."""

    def array_length(self, name: str) -> int:
        """Elements of one of the corpus' arrays."""
        return {
            "row_offsets": self.num_rows + 1,
            "target_offsets": self.num_rows + 1,
            "held_out": self.num_rows,
            "parent_rows": self.num_rows,
            "token_counts": self.vocab_size,
        }.get(name, self.num_tokens)


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """Of a corpus: hashes of all its files."""

    files: Mapping[str, str]
    """Path within ``corpus/`` -> hash."""
    chunks: Mapping[str, str]
    """Path of an object -> its chunk seal."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Of a teacher: its layout, how it was made, and hashes of the files that exist once."""

    name: str
    corpus_hash: str
    layout: Layout
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    files: Mapping[str, str]
    seal: str
    """Hash of the record's own bytes; the other records say it."""
    values: dict[str, Any]
    """The whole record, with what is not known too."""

    def check_corpus(self, corpus: CorpusManifest, where: str) -> None:
        """That it is about this corpus.

        Raises:
          MismatchError: it was captured over another one.
          FormatError: it says so, but has other sizes.
        """
        if self.corpus_hash != corpus.hash:
            raise MismatchError(
                f"{where}: captured over the corpus {self.corpus_hash[:12]}…, but the cache has {corpus.hash[:12]}…; "
                "put the teacher back beside its own corpus, or capture it again"
            )
        of = self.layout
        found = (of.vocab_size, of.num_rows, of.num_positions)
        expected = (corpus.vocab_size, corpus.num_rows, corpus.num_targets)
        if found != expected:
            raise FormatError(
                f"{where}: expected vocabulary, rows and positions of the corpus, {expected}, found {found}; {_REMEDY}"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectEntry:
    """What a commit record says of one object."""

    bytes: int
    sha256: str
    chunks: str
    """Its chunk seal."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Of one shard."""

    shard: int
    manifest: str
    rows: tuple[int, int]
    """First, and one past the last."""
    positions: int
    files: Mapping[str, ObjectEntry]
    tail_sum: str
    """Hash of a sum of normalised tails; which one depends on the format version."""
    sums: Mapping[str, float]
    values: dict[str, Any]
    """The whole record, with what is not known too."""

    @property
    def bytes(self) -> int:
        """Of all objects of the shard."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True, kw_only=True)
class Complete:
    """Of a finished capture."""

    manifest: str
    num_shards: int
    positions: int
    bytes: int
    commits: str
    """Hash of all commit records."""
    files: Mapping[str, str]
    seal: str
    """Hash of the record's own bytes: of the whole teacher."""
    values: dict[str, Any]
    """The whole record, with what is not known too."""


def parse_corpus_manifest(data: bytes, where: str) -> CorpusManifest:
    """The manifest of a corpus.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.
    """
    of = _Record(unseal(data, where, limit=MAX_MANIFEST), where)
    if of.values.get("format") != CORPUS_FORMAT:
        raise FormatError(f"{where}: expected a {CORPUS_FORMAT}, found {_short(of.values.get('format'))}")
    version = of.values.get("format_version")
    if type(version) is not int or version != CORPUS_VERSION:
        raise FormatError(
            f"{where}: expected format version {CORPUS_VERSION}, found {_short(version)}; install the version of "
            "tailcache that wrote it"
        )
    tokens = of.whole("num_tokens", 1, MAX_COUNT)
    rows = of.whole("num_rows", 1, tokens)
    tokenizer = of.mapping("tokenizer")
    if "fingerprint" in tokenizer and not _are_texts(tokenizer["fingerprint"]):
        raise of.wrong("tokenizer", "a 'fingerprint' of strings", tokenizer["fingerprint"])
    content = of.hashes("content")
    if not set(_CONTENT) <= content.keys():
        raise of.wrong("content", f"hashes of {', '.join(_CONTENT)}", sorted(content))
    return CorpusManifest(
        vocab_size=of.whole("vocab_size", 1, MAX_VOCABULARY),
        num_rows=rows,
        num_tokens=tokens,
        num_targets=of.whole("num_targets", 1, tokens - rows),  # the last token of a row has no target
        content=content,
        hash=of.hash("hash"),
        checksums=of.hash("checksums"),
        tokenizer=tokenizer,
        source=of.mapping("source"),
        recipe=of.mapping("recipe"),
        report=of.mapping("report"),
        parent=None if of.values.get("parent") is None else _parent(of.mapping("parent"), f"{where}: parent", rows),
        values=of.values,
    )


def _parent(values: dict[str, Any], where: str, rows: int) -> dict[str, Any]:
    of = _Record(values, where)
    of.hash("hash"), of.whole("num_rows", rows, MAX_COUNT), of.mapping("report")
    return values


def parse_checksums(data: bytes, where: str, manifest: CorpusManifest, specs: Mapping[str, ArraySpec]) -> Checksums:
    """The checksums of a corpus.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.
      manifest: of the corpus they must be of.
      specs: its arrays, by name.
    """
    if sha256(data) != manifest.checksums:
        raise CorruptError(f"{where}: belongs to another manifest; restore both from one copy")
    of = _Record(unseal(data, where), where)
    files, chunks = of.hashes("files"), of.hashes("chunks")
    objects: set[str] = set()
    for name, spec in specs.items():
        number = spec.num_objects(manifest.array_length(name))
        if number > len(chunks):  # before they are counted out
            raise of.wrong("chunks", f"{number} objects of {name}", f"{len(chunks)} objects in all")
        objects.update(map(spec.object_path, range(number)))
    metadata = {"zarr.json", *(f"{name}/zarr.json" for name in specs)}
    for name in files:
        if not name.startswith("tokenizer/"):
            _check_path(of, name, objects, specs)
        elif not _is_tokenizer_path(name):
            raise of.wrong("files", "paths within the tokenizer's folder", name)
    for name in chunks:
        _check_path(of, name, objects, specs, metadata=False)
    of.has_all("files", objects | metadata, files)
    of.has_all("chunks", objects, chunks)
    return Checksums(files=files, chunks=chunks)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest of a teacher.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.
    """
    of = _Record(unseal(data, where, limit=MAX_MANIFEST), where)
    layout = Layout.from_attributes(of.mapping("layout"), where)
    problem = layout_problem(layout)
    if problem:
        raise FormatError(f"{where}: sizes that make no sense: {problem}; {_REMEDY}")
    try:
        name = check_name(of.text("name"))
    except ConfigError as error:
        raise FormatError(f"{where}: {error}; {_REMEDY}") from None
    files = of.hashes("files")
    specs = {**layout.fields(), **layout.constants()}
    objects = {
        spec.object_path(number)
        for spec in layout.constants().values()
        for number in range(spec.num_objects(layout.constant_length(spec.name)))
    }
    for path in files:
        _check_path(of, path, objects, specs)
    late = {path for path in objects if path.startswith("mean_tail")}  # written when the last shard is in
    of.has_all("files", {"zarr.json", *(f"{spec}/zarr.json" for spec in specs)} | objects - late, files)
    return Manifest(
        name=name,
        corpus_hash=of.hash("corpus_hash"),
        layout=layout,
        settings=of.mapping("settings"),
        provenance=of.mapping("provenance"),
        files=files,
        seal=sha256(data),
        values=of.values,
    )


def parse_commit(data: bytes, where: str, shard: int, manifest: Manifest) -> Commit:
    """The commit record of one shard.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.
      shard: which shard it must be of.
      manifest: of the teacher it must be of.
    """
    of = _Record(unseal(data, where, limit=MAX_COMMIT), where)
    layout = manifest.layout
    if of.whole("shard", 0, MAX_COUNT) != shard or of.hash("manifest") != manifest.seal:
        raise CorruptError(f"{where}: belongs to another shard or capture; restore the right one from a copy")
    rows: Any = of.values.get("rows")
    if not _is_pair(rows) or tuple(rows) != layout.shard_rows(shard):
        raise of.wrong("rows", list(layout.shard_rows(shard)), rows)
    positions = of.whole("positions", 0, min(layout.shard_slots, layout.num_positions))
    fields = layout.fields()
    objects = {spec.object_path(shard): spec for spec in fields.values()} if positions else {}
    entries = {}
    for path, entry in of.mapping("files").items():
        found = _OBJECT_PATH.fullmatch(path)
        if found is None or int(found[2]) != shard or (found[1] in fields and path not in objects):
            raise of.wrong("files", f"paths of objects of shard {shard}", path)
        entries[path] = _object_entry(entry, f"{where}: files: {path}", objects.get(path))
    of.has_all("files", set(objects), entries)
    sums = _Record(of.mapping("sums"), f"{where}: sums")
    return Commit(
        shard=shard,
        manifest=manifest.seal,
        rows=layout.shard_rows(shard),
        positions=positions,
        files=entries,
        tail_sum=of.hash("tail_sum"),
        sums={name: sums.number(name) for name in ("log_target", "tail_mass")},
        values=of.values,
    )


def parse_complete(data: bytes, where: str, manifest: Manifest) -> Complete:
    """The record of a finished capture.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.
      manifest: of the teacher it must be of.
    """
    of = _Record(unseal(data, where, limit=MAX_COMMIT), where)
    layout = manifest.layout
    if of.hash("manifest") != manifest.seal:
        raise CorruptError(f"{where}: belongs to another manifest; restore both from one copy")
    files = of.hashes("files")
    constants = layout.constants()
    late = {spec.object_path(0) for name, spec in constants.items() if name.startswith("mean_tail")}
    for path in files:
        _check_path(of, path, late, constants, metadata=False)
    of.has_all("files", late, files)
    return Complete(
        manifest=manifest.seal,
        num_shards=of.whole("num_shards", layout.num_shards, layout.num_shards),
        positions=of.whole("positions", layout.num_positions, layout.num_positions),
        bytes=of.whole("bytes", 0, layout.num_shards * sum(map(largest_object, layout.fields().values()))),
        commits=of.hash("commits"),
        files=files,
        seal=sha256(data),
        values=of.values,
    )


class _Record:
    """Takes the values of a JSON object one by one, looking at each; errors name the record and the key."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self._where = values, where

    def wrong(self, key: str, expected: object, found: object) -> FormatError:
        return FormatError(f"{self._where}: {key!r}: expected {expected}, found {_short(found)}; {_REMEDY}")

    def whole(self, key: str, smallest: int, largest: int) -> int:
        value = self.values.get(key)
        if type(value) is not int or not smallest <= value <= largest:
            raise self.wrong(key, f"a whole number from {smallest} to {largest}", value)
        return value

    def number(self, key: str) -> float:
        value: Any = self.values.get(key)
        if type(value) not in (int, float) or not -1e300 < value < 1e300 or not math.isfinite(value):
            raise self.wrong(key, "a finite number", value)
        return float(value)

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string", value)
        return value

    def hash(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not _HASH.fullmatch(value):
            raise self.wrong(key, "a SHA-256 in lower-case hex", value)
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        return value

    def hashes(self, key: str) -> dict[str, str]:
        found = self.mapping(key)
        for name, value in found.items():
            if not isinstance(value, str) or not _HASH.fullmatch(value):
                raise self.wrong(key, f"a SHA-256 in lower-case hex for {_short(name)}", value)
        return found

    def has_all(self, key: str, expected: set[str], found: Mapping[str, Any]) -> None:
        missing = sorted(expected - found.keys())
        if missing:
            raise self.wrong(key, f"{len(expected)} files of the layout", f"none for {missing[0]}")


def _object_entry(entry: Any, where: str, spec: ArraySpec | None) -> ObjectEntry:
    if not isinstance(entry, dict):
        raise FormatError(f"{where}: expected an object, found {_short(entry)}; {_REMEDY}")
    of = _Record(entry, where)
    sizes = (0, MAX_COUNT) if spec is None else (smallest_object(spec), largest_object(spec))
    return ObjectEntry(bytes=of.whole("bytes", *sizes), sha256=of.hash("sha256"), chunks=of.hash("chunks"))


def _check_path(of: _Record, path: str, objects: set[str], known: Mapping[str, Any], *, metadata: bool = True) -> None:
    """That a path is one of the known arrays' own, or could be that of an array that a later version adds."""
    found = _OBJECT_PATH.fullmatch(path)
    if path in objects or (metadata and _METADATA_PATH.fullmatch(path)) or (found and found[1] not in known):
        return
    raise of.wrong("files", "paths that the layout gives", path)


def _is_tokenizer_path(path: str) -> bool:
    """Names that transformers chose: any printable ones, a few folders deep."""
    parts = path.split("/")[1:]
    return 1 <= len(parts) <= _TOKENIZER_DEPTH and all(
        part.isprintable()
        and part.strip(". ")
        and not set("\\:") & set(part)
        and not part.endswith((TEMPORARY, *_NO_TOKENIZER))
        and len(part.encode()) <= _NAME_BYTES
        for part in parts
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)


def _short(value: object) -> str:
    return reprlib.repr(value)
