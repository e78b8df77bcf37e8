"""Read every byte of a cache, recompute every checksum and invariant, and list all that is wrong.

Checksums form a chain with sealed records at its ends: the corpus' manifest names the hash of ``checksums.json``,
which names the hash of every other file; a teacher's manifest names the metadata and constants, each commit record its
shard's objects, and ``complete.json`` all commit records. Every file of a cache is covered by exactly one of them, and
a file that none of them knows is reported too. Then the values are decoded and checked against each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailcache.storage import durable
from tailcache.storage.alignment import supervise_next
from tailcache.storage.commits import MANIFEST_COPY, commit_chain, committed_shards, tail_sum_path
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import NotFoundError, TailcacheError
from tailcache.storage.layout import Layout, commit_path
from tailcache.storage.place import open_place
from tailcache.storage.reader import Teacher
from tailcache.storage.sealed import canonical, unseal
from tailcache.storage.verify_targets import teacher_problems

__all__ = ["Fault", "verify"]

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


def verify(path: str | Path, *, progress: Callable[[int], object] | None = None) -> list[Fault]:
    """Verify a whole cache.

    Args:
      path: the cache's folder.
      progress: called with the number of bytes read, file by file.

    Returns:
      All faults found, none where the cache is good. An unfinished capture is a fault of its own kind only where
      shards it has committed are damaged; that it is unfinished is not a fault.

    Raises:
      NotFoundError: there is no cache at all.
    """
    root = Path(path)
    if not (root / "corpus").is_dir():
        raise NotFoundError(f"{root}: expected a cache with a folder 'corpus', found none")
    check = _Check(root, progress or (lambda _: None))
    check.corpus()
    teachers = root / "teachers"
    if teachers.is_dir():
        for folder in sorted(p for p in teachers.iterdir() if p.is_dir()):
            check.teacher(folder)
    check.unknown_files()
    return check.faults


class _Check:
    def __init__(self, root: Path, progress: Callable[[int], object]) -> None:
        self.root, self.progress = root, progress
        self.faults: list[Fault] = []
        self._known: set[Path] = set()
        self._corpus: Corpus | None = None

    def _fault(self, path: Path, problem: str, shard: int | None = None, field: str | None = None) -> None:
        name = str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
        self.faults.append(Fault(path=name, problem=problem, shard=shard, field=field))

    # -- bytes -------------------------------------------------------------------------------------------------

    def _digest(self, path: Path) -> str | None:
        self._known.add(path)
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while piece := file.read(_READ):
                    digest.update(piece)
                    self.progress(len(piece))
        except OSError as error:
            self._fault(path, f"cannot be read: {error.strerror}")
            return None
        return digest.hexdigest()

    def _match(self, path: Path, expected: str, shard: int | None = None, field: str | None = None) -> bool:
        if not path.is_file():
            self._known.add(path)
            self._fault(path, "missing", shard, field)
            return False
        found = self._digest(path)
        if found is not None and found != expected:
            self._fault(path, f"its checksum does not match: stored {expected}, computed {found}", shard, field)
        return found == expected

    def _record(self, path: Path, shard: int | None = None) -> dict[str, Any] | None:
        """A sealed record; none, with a fault, where it is damaged."""
        self._known.add(path)
        try:
            data = path.read_bytes()
            self.progress(len(data))
            return unseal(data, path.name)
        except FileNotFoundError:
            self._fault(path, "missing", shard)
        except (TailcacheError, OSError) as error:
            self._fault(path, str(error), shard)
        return None

    # -- the corpus --------------------------------------------------------------------------------------------

    def corpus(self) -> None:
        folder = self.root / "corpus"
        before = len(self.faults)
        manifest = self._record(folder / "manifest.json")
        checksums = self._record(folder / "checksums.json")
        if manifest is not None and checksums is not None:
            digest = durable.sha256((folder / "checksums.json").read_bytes())
            if digest != manifest.get("checksums"):
                self._fault(folder / "checksums.json", "belongs to another manifest")
        if checksums is not None:
            for name, expected in sorted(checksums["files"].items()):
                self._match(folder / name, expected, field=name.split("/")[0] if "/c/" in name else None)
        if len(self.faults) > before or manifest is None:
            return  # the values cannot be trusted, and what is damaged has been said
        try:
            self._corpus = Corpus(folder.parent)
            for problem in _corpus_problems(self._corpus):
                self._fault(folder, problem)
        except TailcacheError as error:
            self._fault(folder, str(error))

    # -- a teacher ---------------------------------------------------------------------------------------------

    def teacher(self, folder: Path) -> None:
        manifest_path = folder / "manifest.json"
        if not manifest_path.exists():
            if any((folder / "commits").glob("*.json")) or (folder / "complete.json").exists():
                self._fault(manifest_path, "missing, though shards are committed")
            else:  # a capture that was killed before its first commit: nothing is there yet
                self._known.update(p for p in folder.rglob("*") if p.is_file())
            return
        manifest = self._record(manifest_path)
        if manifest is None:
            self._known.update(p for p in folder.rglob("*") if p.is_file())
            return
        before = len(self.faults)
        seal = durable.sha256(manifest_path.read_bytes())
        if self._corpus is not None and manifest["corpus_hash"] != self._corpus.hash:
            self._fault(manifest_path, "captured over another corpus than the one beside it")
        for name, expected in sorted(manifest["files"].items()):
            self._match(folder / name, expected)
        try:
            layout = Layout.from_attributes(manifest["layout"], "layout")
        except TailcacheError as error:
            self._fault(manifest_path, str(error))
            return
        if layout.format_version > 1:
            self._match(folder / MANIFEST_COPY, seal)
        complete = self._record(folder / "complete.json") if (folder / "complete.json").exists() else None
        committed = self._commits(folder, layout, seal, finished=(folder / "complete.json").exists())
        if complete is not None:
            if complete["manifest"] != seal:
                self._fault(folder / "complete.json", "belongs to another manifest")
            for name, expected in complete["files"].items():
                self._match(folder / name, expected)
            # Killed after its last record, before it tidied up: nobody reads these any more.
            self._known.update((folder / "partial").glob("tail_sum-*.bin"))
            self._known.update((folder / "claims").glob("*"))
            if (
                len(committed) == layout.num_shards
                and commit_chain(open_place(folder), layout.num_shards) != complete["commits"]
            ):
                self._fault(folder / "complete.json", "the commit records are not those it was written over")
            if len(self.faults) == before and self._corpus is not None:
                self._values(folder)
        else:
            self._unfinished(folder, layout, committed)

    def _commits(self, folder: Path, layout: Layout, seal: str, *, finished: bool) -> list[int]:
        committed = committed_shards(open_place(folder), layout)
        for shard in sorted(set(range(layout.num_shards)) - set(committed)) if finished else ():
            self._fault(folder / commit_path(shard), "missing, though the capture was complete", shard)
        for shard in committed:
            path = folder / commit_path(shard)
            record = self._record(path, shard)
            if record is None:
                self._known.update(folder / spec.object_path(shard) for spec in layout.fields().values())
                continue
            if record["shard"] != shard or record["manifest"] != seal:
                self._fault(path, "belongs to another shard or capture", shard)
            if record["rows"] != list(layout.shard_rows(shard)):
                self._fault(path, f"expected rows {layout.shard_rows(shard)}, found {record['rows']}", shard)
            expected = {spec.object_path(shard) for spec in layout.fields().values()} if record["positions"] else set()
            if set(record["files"]) != expected:
                self._fault(path, f"expected objects {sorted(expected)}, found {sorted(record['files'])}", shard)
            for name, entry in sorted(record["files"].items()):
                self._match(folder / name, entry["sha256"], shard, name.split("/")[0])
        return committed

    def _unfinished(self, folder: Path, layout: Layout, committed: list[int]) -> None:
        """What an unfinished capture may leave: objects of shards at work, temporary files, claims, sums of tails."""
        # Before version 2 the sum was a running one, and only the last one was kept.
        for shard in committed if layout.format_version > 1 else committed[-1:]:
            path = folder / commit_path(shard)
            try:
                expected = unseal(path.read_bytes(), path.name)["tail_sum"]
                self._match(folder / tail_sum_path(shard), expected, shard)
            except TailcacheError:
                pass  # said above
        for spec in [*layout.fields().values(), *layout.constants().values()]:
            self._known.update(p for p in (folder / spec.name).rglob("*") if p.is_file())
        self._known.update(p for name in ("partial", "claims") for p in (folder / name).glob("*") if p.is_file())

    def _values(self, folder: Path) -> None:
        assert self._corpus is not None
        try:
            teacher = Teacher(self._corpus, folder.name)
            for shard, problem in teacher_problems(teacher):
                self._fault(folder, problem, shard)
        except TailcacheError as error:
            self._fault(folder, str(error))

    # -- what nobody knows -------------------------------------------------------------------------------------

    def unknown_files(self) -> None:
        corpus_damaged = self._corpus is None
        for path in sorted(p for p in self.root.rglob("*") if p.is_file() or p.is_symlink()):
            relative = path.relative_to(self.root)
            if path in self._known or path.name.endswith(durable.TEMPORARY):
                continue
            if relative.parts[0] == "teachers" and len(relative.parts) == 2 and path.suffix == ".lock":
                if path.stat().st_size:
                    self._fault(path, f"expected an empty lock file, found {path.stat().st_size} bytes")
                continue
            if any(part.endswith(durable.TEMPORARY) for part in relative.parts):
                continue
            if corpus_damaged and relative.parts[0] == "corpus":
                continue  # without its list of checksums, all of the corpus' files are unknown
            self._fault(path, "a file that no record of the cache knows")


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
