"""Read every byte of a cache, recompute every checksum and invariant, and list all that is wrong.

Checksums form a chain with sealed records at its ends: the corpus' manifest names the hash of ``checksums.json``,
which names the hash of every other file; a teacher's manifest names the metadata and constants, each commit record its
shard's objects, and ``complete.json`` all commit records. Every file of a cache is covered by exactly one of them, and
a file that none of them knows is reported too. Then the values are decoded and checked against each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tailcache.storage import durable
from tailcache.storage.alignment import supervise_next
from tailcache.storage.commits import MANIFEST_COPY, commit_chain, tail_sum_path
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import NotFoundError, StorageError, TailcacheError
from tailcache.storage.layout import Layout, commit_path
from tailcache.storage.place import Location, Place, open_place
from tailcache.storage.reader import Teacher
from tailcache.storage.sealed import MAX_BYTES, canonical, unseal
from tailcache.storage.verify_targets import teacher_problems

__all__ = ["Fault", "Level", "verify"]

Level = Literal["fast", "full"]

_READ = 1 << 22
_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong."""

    path: str
    """The file, relative to the cache."""
    problem: str
    """What was expected and what was found."""
    shard: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        place = "".join(
            [f", shard {self.shard}" if self.shard is not None else "", f", field {self.field}" if self.field else ""]
        )
        return f"{self.path}{place}: {self.problem}"


def verify(
    location: Location | Place, *, level: Level = "full", progress: Callable[[int], object] | None = None
) -> list[Fault]:
    """Verify a whole cache.

    Args:
      location: the path or URL of the cache.
      level: "full" reads every byte and decodes every value; "fast" reads the records only, and compares which files
        there are, and the sizes of the shards' objects, with what the records say.
      progress: called with the number of bytes read, file by file.

    Returns:
      All faults found, none where the cache is good. An unfinished capture is a fault of its own kind only where
      shards it has committed are damaged; that it is unfinished is not a fault.

    Raises:
      NotFoundError: there is no cache at all.
      StorageError: the place cannot be listed.
    """
    place = open_place(location).uncached()
    if "corpus" not in place.folders():
        raise NotFoundError(f"{place}: expected a cache with a folder 'corpus', found none")
    check = _Check(place, level, progress or (lambda _: None))
    check.corpus()
    for name in place.folders("teachers"):
        check.teacher(name)
    check.unknown_files()
    return check.faults


class _Check:
    """Names are relative to the cache, with "/" between their parts."""

    def __init__(self, place: Place, level: Level, progress: Callable[[int], object]) -> None:
        self.place, self.level, self.progress = place, level, progress
        self.faults: list[Fault] = []
        self._sizes = dict(place.files())
        self._known: set[str] = set()
        self._hashes: dict[str, str | OSError] = {}
        self._corpus: Corpus | None = None

    def _fault(self, name: str, problem: str, shard: int | None = None, field: str | None = None) -> None:
        self.faults.append(Fault(path=name, problem=problem, shard=shard, field=field))

    def _know_all(self, start: str) -> None:
        self._known.update(name for name in self._sizes if name.startswith(start))

    # -- bytes -------------------------------------------------------------------------------------------------

    def _hash(self, name: str) -> str | OSError:
        """The hash of a file's bytes, or why it cannot be read."""
        digest, size = hashlib.sha256(), self._sizes[name]
        try:
            for first in range(0, size, _READ):
                [piece] = self.place.read_ranges(name, [(first, min(first + _READ, size))])
                digest.update(piece)
                self.progress(len(piece))
        except OSError as error:
            self._pass_on(error)
            return error
        return digest.hexdigest()

    def _read_ahead(self, names: Iterable[str]) -> None:
        """Hash files that are about to be matched; several at once, where that is quicker."""
        if self.level == "full":
            there = [name for name in names if name in self._sizes]
            self._hashes = dict(zip(there, self.place.map(self._hash, there), strict=True))

    def _digest(self, name: str, shard: int | None, field: str | None) -> str | None:
        found = self._hashes.pop(name, None)
        if found is None:
            found = self._hash(name)
        if isinstance(found, OSError):
            self._fault(name, f"cannot be read: {found.strerror or found}", shard, field)
            return None
        return found

    def _match(
        self, name: str, expected: str, shard: int | None = None, field: str | None = None, size: int | None = None
    ) -> None:
        """A file is there, has its size where that is on record, and its hash."""
        self._known.add(name)
        if name not in self._sizes:
            self._fault(name, "missing", shard, field)
        elif size is not None and self._sizes[name] != size:
            self._fault(name, f"expected {size} bytes, found {self._sizes[name]}", shard, field)
        elif self.level == "full":
            found = self._digest(name, shard, field)
            if found is not None and found != expected:
                self._fault(name, f"its checksum does not match: stored {expected}, computed {found}", shard, field)

    def _record(self, name: str, shard: int | None = None) -> tuple[dict[str, Any], str] | None:
        """A sealed record and the hash of its bytes; none, with a fault, where it is damaged."""
        self._known.add(name)
        try:
            data = self.place.read_limited(name, MAX_BYTES)
            self.progress(len(data))
            return unseal(data, name.rsplit("/", 1)[-1]), durable.sha256(data)
        except FileNotFoundError:
            self._fault(name, "missing", shard)
        except (TailcacheError, OSError) as error:
            self._pass_on(error)
            self._fault(name, str(error), shard)
        return None

    def _pass_on(self, error: Exception) -> None:
        """A file that a disk cannot read is damage; a store that does not answer says nothing of the file."""
        if isinstance(error, StorageError) and self.place.local is None:
            raise error

    # -- the corpus --------------------------------------------------------------------------------------------

    def corpus(self) -> None:
        before = len(self.faults)
        manifest = self._record("corpus/manifest.json")
        checksums = self._record("corpus/checksums.json")
        if manifest is not None and checksums is not None and checksums[1] != manifest[0].get("checksums"):
            self._fault("corpus/checksums.json", "belongs to another manifest")
        if checksums is not None:
            self._read_ahead(f"corpus/{name}" for name in checksums[0]["files"])
            for name, expected in sorted(checksums[0]["files"].items()):
                self._match(f"corpus/{name}", expected, field=name.split("/")[0] if "/c/" in name else None)
        if len(self.faults) > before or manifest is None:
            return  # the values cannot be trusted, and what is damaged has been said
        try:
            self._corpus = Corpus(self.place)
            for problem in _corpus_problems(self._corpus) if self.level == "full" else ():
                self._fault("corpus", problem)
        except TailcacheError as error:
            self._pass_on(error)
            self._fault("corpus", str(error))

    # -- a teacher ---------------------------------------------------------------------------------------------

    def teacher(self, name: str) -> None:
        folder = f"teachers/{name}"
        finished = f"{folder}/complete.json" in self._sizes
        if f"{folder}/manifest.json" not in self._sizes:
            if finished or any(file.startswith(f"{folder}/commits/") for file in self._sizes):
                self._fault(f"{folder}/manifest.json", "missing, though shards are committed")
            else:  # a capture that was killed before its first commit: nothing is there yet
                self._know_all(f"{folder}/")
            return
        record = self._record(f"{folder}/manifest.json")
        if record is None:
            self._know_all(f"{folder}/")
            return
        manifest, seal = record
        before = len(self.faults)
        if self._corpus is not None and manifest["corpus_hash"] != self._corpus.hash:
            self._fault(f"{folder}/manifest.json", "captured over another corpus than the one beside it")
        self._read_ahead(f"{folder}/{file}" for file in manifest["files"])
        for file, expected in sorted(manifest["files"].items()):
            self._match(f"{folder}/{file}", expected)
        try:
            layout = Layout.from_attributes(manifest["layout"], "layout")
        except TailcacheError as error:
            self._fault(f"{folder}/manifest.json", str(error))
            return
        if layout.format_version > 1:
            self._match(f"{folder}/{MANIFEST_COPY}", seal)
        complete = self._record(f"{folder}/complete.json") if finished else None
        committed = self._commits(folder, layout, seal, finished=finished)
        if complete is None:
            self._unfinished(folder, layout, committed)
            return
        if complete[0]["manifest"] != seal:
            self._fault(f"{folder}/complete.json", "belongs to another manifest")
        for file, expected in complete[0]["files"].items():
            self._match(f"{folder}/{file}", expected)
        # Killed after its last record, before it tidied up: nobody reads these any more.
        self._know_all(f"{folder}/partial/tail_sum-")
        self._know_all(f"{folder}/claims/")
        if len(committed) == layout.num_shards and (
            commit_chain(self.place / folder, layout.num_shards) != complete[0]["commits"]
        ):
            self._fault(f"{folder}/complete.json", "the commit records are not those it was written over")
        if len(self.faults) == before and self._corpus is not None and self.level == "full":
            self._values(name)

    def _commits(self, folder: str, layout: Layout, seal: str, *, finished: bool) -> list[int]:
        committed = []
        for shard in range(layout.num_shards):
            name = f"{folder}/{commit_path(shard)}"
            if name in self._sizes:
                committed.append(shard)
            elif finished:
                self._fault(name, "missing, though the capture was complete", shard)
        for shard in committed:
            name = f"{folder}/{commit_path(shard)}"
            found = self._record(name, shard)
            if found is None:
                self._known.update(f"{folder}/{spec.object_path(shard)}" for spec in layout.fields().values())
                continue
            record, _ = found
            if record["shard"] != shard or record["manifest"] != seal:
                self._fault(name, "belongs to another shard or capture", shard)
            if record["rows"] != list(layout.shard_rows(shard)):
                self._fault(name, f"expected rows {layout.shard_rows(shard)}, found {record['rows']}", shard)
            expected = {spec.object_path(shard) for spec in layout.fields().values()} if record["positions"] else set()
            if set(record["files"]) != expected:
                self._fault(name, f"expected objects {sorted(expected)}, found {sorted(record['files'])}", shard)
            self._read_ahead(f"{folder}/{file}" for file in record["files"])
            for file, entry in sorted(record["files"].items()):
                self._match(f"{folder}/{file}", entry["sha256"], shard, file.split("/")[0], entry["bytes"])
        return committed

    def _unfinished(self, folder: str, layout: Layout, committed: list[int]) -> None:
        """What an unfinished capture may leave: objects of shards at work, temporary files, claims, sums of tails."""
        # Before version 2 the sum was a running one, and only the last one was kept.
        for shard in committed if layout.format_version > 1 else committed[-1:]:
            try:
                data = self.place.read_limited(f"{folder}/{commit_path(shard)}", MAX_BYTES)
                self._match(f"{folder}/{tail_sum_path(shard)}", unseal(data, "commit")["tail_sum"], shard)
            except (TailcacheError, FileNotFoundError):
                pass  # said above
        for name in (*layout.fields(), *layout.constants(), "partial", "claims"):
            self._know_all(f"{folder}/{name}/")

    def _values(self, name: str) -> None:
        assert self._corpus is not None
        try:
            for shard, problem in teacher_problems(Teacher(self._corpus, name)):
                self._fault(f"teachers/{name}", problem, shard)
        except TailcacheError as error:
            self._pass_on(error)
            self._fault(f"teachers/{name}", str(error))

    # -- what nobody knows -------------------------------------------------------------------------------------

    def unknown_files(self) -> None:
        for name, size in self._sizes.items():
            parts = name.split("/")
            if name in self._known or any(part.endswith(durable.TEMPORARY) for part in parts):
                continue
            if parts[0] == "teachers" and len(parts) == 2 and name.endswith(".lock"):
                if size:
                    self._fault(name, f"expected an empty lock file, found {size} bytes")
                continue
            if self._corpus is None and parts[0] == "corpus":
                continue  # without its list of checksums, all of the corpus' files are unknown
            self._fault(name, "a file that no record of the cache knows")


def _corpus_problems(corpus: Corpus) -> Iterator[str]:
    """Recompute everything the manifest says of the corpus, a bounded block of rows at a time."""
    digests = {name: hashlib.sha256() for name in ("tokens", "document_start", "supervised", "row_lengths", "held_out")}
    counts = np.zeros(corpus.vocab_size, dtype=np.int64)
    num_tokens = num_targets = 0
    for first, last in _row_blocks(corpus):
        rows = corpus.rows(first, last)
        lengths = np.diff(rows.offsets)
        if (lengths < 1).any():
            yield f"rows [{first}, {last}): expected row offsets that increase"
            return
        if rows.tokens.size and (rows.tokens.min() < 0 or rows.tokens.max() >= corpus.vocab_size):
            yield f"rows [{first}, {last}): a token id outside the vocabulary of {corpus.vocab_size}"
            return
        possible = supervise_next(np.ones(len(rows.tokens), np.bool_), rows.offsets, rows.document_start)
        if (rows.supervised & ~possible).any():
            yield f"rows [{first}, {last}): a supervised position whose next token is in another row or document"
        targets = np.add.reduceat(rows.supervised.astype(np.int64), rows.offsets[:-1])
        expected = num_targets + np.concatenate([[0], np.cumsum(targets)])
        if (corpus.target_offsets(first, last) != expected).any():
            yield f"rows [{first}, {last}): target_offsets are not the running count of supervised positions"
        digests["tokens"].update(rows.tokens.astype("<u4").tobytes())
        digests["document_start"].update(rows.document_start.tobytes())
        digests["supervised"].update(rows.supervised.tobytes())
        digests["row_lengths"].update(lengths.astype("<u8").tobytes())
        digests["held_out"].update(rows.held_out.tobytes())
        counts += np.bincount(rows.tokens, minlength=corpus.vocab_size)
        num_tokens += len(rows.tokens)
        num_targets += int(rows.supervised.sum())
    parts = {name: digest.hexdigest() for name, digest in digests.items()}
    for name, value in parts.items():
        if corpus.manifest["content"].get(name) != value:
            yield f"content hash of {name}: stored {corpus.manifest['content'].get(name)}, computed {value}"
    total = durable.sha256(canonical({**parts, "vocab_size": corpus.vocab_size}))
    if total != corpus.hash:
        yield f"corpus hash: stored {corpus.hash}, computed {total}"
    if (num_tokens, num_targets) != (corpus.num_tokens, corpus.num_targets):
        yield (
            f"expected {corpus.num_tokens} tokens and {corpus.num_targets} targets, found {num_tokens} and "
            f"{num_targets}"
        )
    if (corpus.token_counts != counts).any():
        yield "token_counts are not the counts of the tokens"


def _row_blocks(corpus: Corpus) -> Iterator[tuple[int, int]]:
    size = max(1, _BLOCK_TOKENS * corpus.num_rows // max(1, corpus.num_tokens))
    for first in range(0, corpus.num_rows, size):
        yield first, min(first + size, corpus.num_rows)
