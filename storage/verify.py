"""Look at every file of a cache and list all that is wrong: by records and sizes alone, or byte by byte.

Checksums form a chain with sealed records at its ends: the corpus' manifest names the hash of ``checksums.json``,
which names the hash of every other file; a teacher's manifest names the metadata and constants, each commit record its
shard's objects, and ``complete.json`` all commit records. Every file of a cache is covered by exactly one of them, and
a file that none of them knows is reported too. ``full`` reads all of it, then decodes the values and checks them
against each other; ``fast`` reads the records, all metadata, and the size of everything else.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from tailcache.storage.commits import MANIFEST_COPY, committed_shards, missing_shards, shards_of, tail_sum_path
from tailcache.storage.corpus import Corpus, corpus_arrays
from tailcache.storage.durable import TEMPORARY
from tailcache.storage.errors import ConfigError, NotFoundError, StorageError, TailcacheError
from tailcache.storage.layout import Layout, commit_path
from tailcache.storage.limits import MAX_COMMIT, MAX_MANIFEST
from tailcache.storage.place import Location, Place, open_place
from tailcache.storage.reader import Teacher
from tailcache.storage.records import (
    Commit,
    Complete,
    CorpusManifest,
    Manifest,
    parse_checksums,
    parse_commit,
    parse_complete,
    parse_corpus_manifest,
    parse_manifest,
)
from tailcache.storage.sealed import MAX_BYTES
from tailcache.storage.verify_corpus import corpus_problems
from tailcache.storage.verify_metadata import corpus_metadata_problems, teacher_metadata_problems
from tailcache.storage.verify_targets import teacher_problems

__all__ = ["QUARANTINE", "Fault", "Level", "TeacherState", "Verification", "inspect", "verify"]

Level = Literal["fast", "full"]
QUARANTINE = "quarantine"
"""The folder of a cache that holds what repair has put aside; it is no part of the cache."""
_PIECE = 32 << 20
_MOST_MISSING = 100_000  # shards without a record that are listed one by one
_TOGETHER = 64  # commit records that are fetched at once
_OF_CORPUS = (
    "restore it from a copy; or prepare the same source with the same settings elsewhere and copy the file: if the "
    "content hash of the two corpora is the same, so is the file"
)
_REPAIR = "run `tailcache verify --repair --teacher …` with the teacher, or restore it from a copy"
_RECORDS = "run `tailcache verify --repair`, or restore it from a copy"
_LINK = "put what it points to in its place, or delete it"
_STRAY = "run `tailcache verify --repair` to move it to quarantine, or delete it"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    path: str
    """The file, relative to the cache."""
    problem: str
    """What was expected and what was found."""
    shard: int | None = None
    field: str | None = None
    remedy: str = ""
    """What to do about it."""
    kind: Literal["damage", "stray", "values"] = "damage"
    """damage: a file is not what was written; stray: it is none of the cache's; values: what was written is wrong."""

    @property
    def teacher(self) -> str | None:
        """Whose file it is; none for the corpus' files and strays."""
        parts = self.path.split("/")
        return parts[1] if parts[0] == "teachers" and len(parts) > 2 else None

    def __str__(self) -> str:
        place = "".join(
            [f", shard {self.shard}" if self.shard is not None else "", f", field {self.field}" if self.field else ""]
        )
        return f"{self.path}{place}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(kw_only=True)
class TeacherState:
    """How far a teacher's capture has come, as its records say."""

    name: str
    complete: bool = False
    shards: int = 0
    """Of the whole capture; 0 where no manifest can be read."""
    committed: int = 0
    positions: int = 0
    """Of committed shards whose record is good."""


@dataclass(kw_only=True)
class Verification:
    """What was looked at, and what is wrong."""

    cache: str
    level: Level
    faults: list[Fault] = field(default_factory=list)
    teachers: list[TeacherState] = field(default_factory=list)
    files: int = 0
    """All files of the cache, but those in quarantine."""
    bytes: int = 0
    """Of these files."""
    bytes_read: int = 0

    def report(self) -> dict[str, Any]:
        """As JSON values; docs/format.md has the schema."""
        return {
            "format": "tailcache verification",
            "format_version": 1,
            "cache": self.cache,
            "level": self.level,
            "good": not self.faults,
            "counts": {
                "files": self.files,
                "bytes": self.bytes,
                "bytes_read": self.bytes_read,
                "teachers": len(self.teachers),
                "shards": sum(state.committed for state in self.teachers),
                "positions": sum(state.positions for state in self.teachers),
                "faults": len(self.faults),
            },
            "teachers": [asdict(state) for state in self.teachers],
            "faults": [{**asdict(fault), "teacher": fault.teacher} for fault in self.faults],
        }


def verify(
    location: Location | Place, *, level: Level = "full", progress: Callable[[int], object] | None = None
) -> list[Fault]:
    """All faults of a cache, none where it is good; see ``inspect``."""
    return inspect(location, level=level, progress=progress).faults


def inspect(
    location: Location | Place, *, level: Level = "full", progress: Callable[[int], object] | None = None
) -> Verification:
    """Verify a whole cache.

    Args:
      location: of the cache.
      level: fast: records, metadata and sizes; full: every byte and every value.
      progress: called with the number of bytes read, piece by piece.

    Returns:
      All faults found, and what was looked at. That a capture is unfinished is not a fault; damage in what it has
      committed is.

    Raises:
      NotFoundError: there is no cache at all.
      ConfigError: no such level.

    Cost: one listing of the cache; fast: a small file per shard; full: all bytes, and decoding them.
    """
    if level not in get_args(Level):
        raise ConfigError(f"level: expected {' or '.join(get_args(Level))}, found {level!r}")
    check = _Check(open_place(location).uncached(), level, progress or (lambda _: None))
    check.corpus()
    for name in check.place.folders("teachers"):
        check.teacher(name)
    check.unknown_files()
    return check.found


class _Check:
    def __init__(self, place: Place, level: Level, progress: Callable[[int], object]) -> None:
        self.place, self._progress = place, progress
        if "corpus" not in place.folders():
            raise NotFoundError(f"{place}: expected a cache with a folder 'corpus', found none")
        self._full = level == "full"
        self._sizes = {name: size for name, size in place.files() if not name.startswith(f"{QUARANTINE}/")}
        self.found = Verification(
            cache=str(place), level=level, files=len(self._sizes), bytes=sum(self._sizes.values())
        )
        self._known: set[str] = set()
        self._hashes: dict[str, str | OSError] = {}
        self._fetched: dict[str, bytes | Exception] = {}
        self._corpus_record: CorpusManifest | None = None
        self._corpus: Corpus | None = None

    def _fault(self, path: str, problem: str, remedy: str, **more: Any) -> None:
        self.found.faults.append(Fault(path=path, problem=problem, remedy=remedy, **more))

    def _count(self, size: int) -> None:
        self.found.bytes_read += size
        self._progress(size)

    # -- bytes -------------------------------------------------------------------------------------------------

    def _hash(self, path: str) -> str | OSError:
        """The hash of a file's bytes, or why it cannot be read."""
        digest, size = hashlib.sha256(), self._sizes[path]
        try:
            for first in range(0, size, _PIECE):
                (piece,) = self.place.read_ranges(path, [(first, min(first + _PIECE, size))])
                digest.update(piece)
                self._count(len(piece))
        except OSError as error:
            self._pass_on(error)
            return error
        return digest.hexdigest()

    def _read_ahead(self, paths: Iterable[str]) -> None:
        """Hash files that are about to be matched; several at once, where that is quicker."""
        there = [path for path in paths if path in self._sizes and (self._full or path.endswith(".json"))]
        self._hashes = dict(zip(there, self.place.map(self._hash, there), strict=True))

    def _pass_on(self, error: Exception) -> None:
        """A file that a disk cannot read is damage; a store that does not answer says nothing of the file."""
        if isinstance(error, StorageError) and self.place.local is None:
            raise error

    def _match(self, path: str, expected: str, remedy: str, *, size: int | None = None, **where: Any) -> None:
        """Hold a file against its hash, or in a fast verification against what can be told without reading it."""
        self._known.add(path)
        found = self._sizes.get(path)
        if found is None:
            found = self._came_later(path)
        if found is None:
            self._fault(path, "missing", remedy, **where)
        elif size is not None and found != size:
            self._fault(path, f"expected {size} bytes, found {found}", remedy, **where)
        elif self._full or path.endswith(".json"):
            computed = self._hashes.pop(path, None) or self._hash(path)
            if isinstance(computed, OSError):
                self._fault(path, f"cannot be read: {computed.strerror or computed}", remedy, **where)
            elif computed != expected:
                problem = f"its checksum does not match: stored {expected}, computed {computed}"
                self._fault(path, problem, remedy, **where)
        elif not found:
            self._fault(path, "expected an object, found an empty file", remedy, **where)

    def _came_later(self, path: str) -> int | None:
        """The size of a file that was not listed: a capture that is at work may have written it since."""
        size = self.place.size(path)
        if size is not None:
            self._sizes[path] = size
        return size

    def _record(self, path: str, limit: int, remedy: str, shard: int | None = None) -> bytes | None:
        """The bytes of a record; none, with a fault, where it cannot be read."""
        self._known.add(path)
        found = self._fetched.pop(path, None) or self._fetch(path, limit)
        if isinstance(found, FileNotFoundError):
            self._fault(path, "missing", remedy, shard=shard)
        elif isinstance(found, Exception):
            self._fault(path, str(found), remedy, shard=shard)
        else:
            self._count(len(found))
            return found
        return None

    def _fetch(self, path: str, limit: int = MAX_COMMIT) -> bytes | Exception:
        try:
            return self.place.read_limited(path, limit)
        except (TailcacheError, OSError) as error:
            self._pass_on(error)
            return error

    def _metadata(self, folder: str, problems: Iterable[tuple[str, str | None, str]], remedy: str) -> None:
        """What files of metadata say, where they are what was written: else that has been said."""
        said = {fault.path for fault in self.found.faults}
        for name, of, problem in problems:
            if folder + name not in said:
                self._fault(folder + name, problem, remedy, field=of)

    # -- the corpus --------------------------------------------------------------------------------------------

    def corpus(self) -> None:
        before = len(self.found.faults)
        record = self._record("corpus/manifest.json", MAX_MANIFEST, _OF_CORPUS)
        listed = self._record("corpus/checksums.json", MAX_BYTES, _OF_CORPUS)
        try:
            if record is not None:
                self._corpus_record = parse_corpus_manifest(record, "corpus/manifest.json")
        except TailcacheError as error:
            self._fault("corpus/manifest.json", str(error), _OF_CORPUS)
        if self._corpus_record is None or listed is None:
            return
        try:
            arrays = corpus_arrays(self._corpus_record.vocab_size, part=self._corpus_record.parent is not None)
            checksums = parse_checksums(listed, "corpus/checksums.json", self._corpus_record, arrays)
        except TailcacheError as error:
            self._fault("corpus/checksums.json", str(error), _OF_CORPUS)
            return
        self._read_ahead(f"corpus/{name}" for name in checksums.files)
        for name, expected in sorted(checksums.files.items()):
            of = name.split("/")[0] if "/c/" in name else None
            self._match(f"corpus/{name}", expected, _OF_CORPUS, field=of)
        place = self.place / "corpus"
        self._metadata("corpus/", corpus_metadata_problems(place, self._corpus_record, arrays), _OF_CORPUS)
        if len(self.found.faults) > before:
            return  # the values cannot be trusted, and what is damaged has been said
        try:
            self._corpus = Corpus(self.place)
            for problem in corpus_problems(self._corpus) if self._full else ():
                self._fault("corpus", problem, _OF_CORPUS, kind="values")
        except TailcacheError as error:
            self._pass_on(error)
            self._fault("corpus", str(error), _OF_CORPUS)

    # -- a teacher ---------------------------------------------------------------------------------------------

    def teacher(self, name: str) -> None:
        folder, before = f"teachers/{name}/", len(self.found.faults)
        state = TeacherState(name=name, complete=folder + "complete.json" in self._sizes)
        self.found.teachers.append(state)
        manifest = self._manifest(folder)
        if manifest is None:
            self._known.update(path for path in self._sizes if path.startswith(folder))
            return
        layout = manifest.layout
        state.shards = layout.num_shards
        try:
            if self._corpus_record is not None:
                manifest.check_corpus(self._corpus_record, name)
        except TailcacheError as error:
            self._fault(folder + "manifest.json", str(error), "put the teacher back beside its own corpus")
        self._read_ahead(folder + file for file in manifest.files)
        for file, expected in sorted(manifest.files.items()):
            self._match(folder + file, expected, _REPAIR)
        self._metadata(folder, teacher_metadata_problems(self.place / folder.rstrip("/"), layout), _REPAIR)
        complete = self._complete(folder, manifest) if state.complete else None
        self._commits(folder, manifest, state, complete)
        if state.complete:
            # Killed after its last record, before it tidied up: nobody reads these any more.
            self._know_below(folder, ("partial", "claims"))
        else:
            self._know_below(folder, ("partial", "claims", *layout.fields(), *layout.constants()))
        if complete is not None and self._full and self._corpus is not None and len(self.found.faults) == before:
            self._values(name)

    def _manifest(self, folder: str) -> Manifest | None:
        """The manifest, or its copy where it is damaged."""
        path, copy = folder + "manifest.json", folder + MANIFEST_COPY
        begun = {folder + "complete.json", folder + MANIFEST_COPY} & self._sizes.keys()
        begun |= {name for name in self._sizes if name.startswith(folder + "commits/")}
        if path not in self._sizes and not any(not name.endswith(MANIFEST_COPY) for name in begun):
            return None  # a capture that was killed before it had a manifest: nothing is there yet
        good: dict[str, bytes] = {}
        found = None
        for candidate in (path, copy):
            if candidate == copy and found is not None and found.layout.format_version < 2:
                break
            if candidate == copy and found is None and copy not in self._sizes:
                break  # of version 1, or gone too; that the manifest is damaged has been said
            data = self._record(candidate, MAX_MANIFEST, _RECORDS)
            if data is None:
                continue
            try:
                parsed = parse_manifest(data, candidate)
            except TailcacheError as error:
                self._fault(candidate, str(error), _RECORDS)
                continue
            good[candidate] = data
            found = found or parsed
        if len(good) == 2 and good[path] != good[copy]:
            self._fault(copy, "expected the same bytes as in manifest.json, found others", _RECORDS)
        return found

    def _complete(self, folder: str, manifest: Manifest) -> Complete | None:
        path = folder + "complete.json"
        data = self._record(path, MAX_COMMIT, _RECORDS)
        if data is None:
            return None
        try:
            complete = parse_complete(data, path, manifest)
        except TailcacheError as error:
            self._fault(path, str(error), _RECORDS)
            self._know_below(folder, ("mean_tail", "mean_tail_copy"))
            return None
        late = _RECORDS if manifest.layout.format_version > 1 else "restore it from a copy, or capture again"
        for file, expected in sorted(complete.files.items()):
            self._match(folder + file, expected, late)
        return complete

    def _commits(self, folder: str, manifest: Manifest, state: TeacherState, complete: Complete | None) -> None:
        layout = manifest.layout
        committed = self._committed(folder, layout, state)
        state.committed = len(committed)
        for shard in self._missing(layout, committed) if state.complete else ():
            path = folder + commit_path(shard)
            self._fault(path, "missing, though the capture was complete", _REPAIR, shard=shard)
            self._know_objects(folder, layout, shard)
        chain, good = hashlib.sha256(), 0
        # Before version 2 the sum was a running one, and only the last one was kept.
        summed = set(committed if layout.format_version > 1 else committed[-1:]) if not state.complete else set()
        for number, shard in enumerate(committed):
            if number % _TOGETHER == 0:
                paths = [folder + commit_path(each) for each in committed[number : number + _TOGETHER]]
                self._fetched = dict(zip(paths, self.place.map(self._fetch, paths), strict=True))
            path = folder + commit_path(shard)
            data = self._record(path, MAX_COMMIT, _REPAIR, shard)
            if data is None:
                self._know_objects(folder, layout, shard)
                continue
            chain.update(data)
            try:
                commit = parse_commit(data, path, shard, manifest)
            except TailcacheError as error:
                self._fault(path, str(error), _REPAIR, shard=shard)
                self._know_objects(folder, layout, shard)
                continue
            good += 1
            state.positions += commit.positions
            self._objects(folder, commit)
            if shard in summed:
                before = len(self.found.faults)
                self._match(folder + tail_sum_path(shard), commit.tail_sum, _REPAIR, shard=shard)
                if len(self.found.faults) > before and self.place.exists(folder + "complete.json"):
                    del self.found.faults[before:]  # the capture was finished meanwhile: nobody needs the sum
        if complete is not None and good == layout.num_shards and chain.hexdigest() != complete.commits:
            problem = "the commit records are not those it was written over"
            self._fault(folder + "complete.json", problem, _REPAIR)

    def _committed(self, folder: str, layout: Layout, state: TeacherState) -> list[int]:
        """The shards whose commit record was there when the files were listed, or came before ``complete.json``."""
        names = (name.removeprefix(folder) for name in self._sizes if name.startswith(folder))
        here = [shard for shard in shards_of(names) if shard < layout.num_shards]
        late = set(self._missing(layout, here)) if state.complete else set()
        if len(late) > _TOGETHER:  # rather one listing than a question for each
            late &= set(committed_shards(self.place / folder.rstrip("/"), layout))
        return sorted([*here, *(shard for shard in late if self._came_later(folder + commit_path(shard)))])

    @staticmethod
    def _missing(layout: Layout, committed: Iterable[int]) -> Iterable[int]:
        """Shards without a record; not all of them where a layout claims more than anybody could look at."""
        return itertools.islice(missing_shards(layout, committed), _MOST_MISSING)

    def _objects(self, folder: str, commit: Commit) -> None:
        self._read_ahead(folder + name for name in commit.files)
        for name, entry in sorted(commit.files.items()):
            self._match(
                folder + name, entry.sha256, _REPAIR, size=entry.bytes, shard=commit.shard, field=name.split("/")[0]
            )

    def _know_objects(self, folder: str, layout: Layout, shard: int) -> None:
        self._known.update(folder + spec.object_path(shard) for spec in layout.fields().values())

    def _know_below(self, folder: str, names: Iterable[str]) -> None:
        prefixes = tuple(f"{folder}{name}/" for name in names)
        self._known.update(path for path in self._sizes if path.startswith(prefixes))

    def _values(self, name: str) -> None:
        assert self._corpus is not None
        remedy = "the files are what was written, so the values were wrong then: capture again under another name"
        try:
            for shard, problem in teacher_problems(Teacher(self._corpus, name)):
                self._fault(f"teachers/{name}", problem, remedy, shard=shard, kind="values")
        except TailcacheError as error:
            self._pass_on(error)
            self._fault(f"teachers/{name}", str(error), remedy, kind="values")

    # -- what nobody knows -------------------------------------------------------------------------------------

    def unknown_files(self) -> None:
        for path, size in self._sizes.items():
            parts = path.split("/")
            if self.place.local is not None and (self.place.local / path).is_symlink():
                self._fault(path, "a symbolic link, which a cache never has", _LINK, kind="stray")
                continue
            if path in self._known or any(part.endswith(TEMPORARY) for part in parts):
                continue
            if parts[0] == "teachers" and len(parts) == 2 and path.endswith(".lock"):
                if size:  # of version 1
                    self._fault(path, f"expected an empty lock file, found {size} bytes", _STRAY, kind="stray")
                continue
            if self._corpus is None and parts[0] == "corpus":
                continue  # without its list of checksums, all of the corpus' files are unknown
            self._fault(path, "a file that no record of the cache knows", _STRAY, kind="stray")
