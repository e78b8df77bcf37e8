"""Read every byte of a cache, recompute every checksum and invariant, and list all that is wrong.

Checksums form a chain with sealed records at its ends: the corpus' manifest names the hash of ``checksums.json``,
which names the hash of every other file; a teacher's manifest names the metadata and constants, each commit record its
shard's objects, and ``complete.json`` all commit records. Every file of a cache is covered by exactly one of them, and
a file that none of them knows is reported too. Then the values are decoded and checked against each other.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage import durable
from tailcache.storage.alignment import next_tokens, supervise_next, target_positions
from tailcache.storage.codec import SCALARS, Targets
from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.errors import NotFoundError, TailcacheError
from tailcache.storage.layout import Layout, commit_path
from tailcache.storage.reader import Teacher
from tailcache.storage.sealed import canonical, unseal
from tailcache.storage.targets import commit_chain

__all__ = ["Fault", "verify"]

_READ = 1 << 22
_BLOCK_TOKENS = 1 << 20
_BLOCK_POSITIONS = 1 << 15
_RELATIVE = 2.0**-12  # four times the codec's rounding of a scalar
_LEVEL_SLACK = 0.26  # nats; half of the widest step up and down


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
            self._corpus = Corpus(folder)
            for problem in _corpus_problems(self._corpus):
                self._fault(folder, problem)
        except TailcacheError as error:
            self._fault(folder, str(error))

    # -- a teacher ---------------------------------------------------------------------------------------------

    def teacher(self, folder: Path) -> None:
        manifest_path = folder / "manifest.json"
        if not manifest_path.exists():
            if (folder / commit_path(0)).exists() or (folder / "complete.json").exists():
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
        complete = self._record(folder / "complete.json") if (folder / "complete.json").exists() else None
        committed = self._commits(folder, layout, seal, finished=(folder / "complete.json").exists())
        if complete is not None:
            if complete["manifest"] != seal:
                self._fault(folder / "complete.json", "belongs to another manifest")
            for name, expected in complete["files"].items():
                self._match(folder / name, expected)
            # Killed after its last record, before it tidied up: nobody reads these any more.
            self._known.update((folder / "partial").glob("tail_sum-*.bin"))
            if committed == layout.num_shards and commit_chain(folder, committed) != complete["commits"]:
                self._fault(folder / "complete.json", "the commit records are not those it was written over")
            if len(self.faults) == before and self._corpus is not None:
                self._values(folder)
        else:
            self._unfinished(folder, layout, committed)

    def _commits(self, folder: Path, layout: Layout, seal: str, *, finished: bool) -> int:
        committed = 0
        for shard in range(layout.num_shards):
            path = folder / commit_path(shard)
            if not path.exists():
                if not finished:
                    break
                self._fault(path, "missing, though the capture was complete", shard)
                continue
            committed += 1
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

    def _unfinished(self, folder: Path, layout: Layout, committed: int) -> None:
        """What an unfinished capture may leave: objects of the shard at work, temporary files, the running sum."""
        if committed:
            path = folder / commit_path(committed - 1)
            try:
                expected = unseal(path.read_bytes(), path.name)["tail_sum"]
                self._match(folder / "partial" / f"tail_sum-{committed - 1:08d}.bin", expected)
            except TailcacheError:
                pass  # said above
        for spec in [*layout.fields().values(), *layout.constants().values()]:
            self._known.update(p for p in (folder / spec.name).rglob("*") if p.is_file())
        self._known.update(p for p in (folder / "partial").glob("*") if p.is_file())

    def _values(self, folder: Path) -> None:
        assert self._corpus is not None
        try:
            teacher = Teacher(self._corpus, folder.name)
            for shard, problem in _teacher_problems(teacher):
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


def _teacher_problems(teacher: Teacher) -> Iterator[tuple[int | None, str]]:
    """Decode every target and check the fields against each other and against the corpus."""
    layout, corpus = teacher.layout, teacher.corpus
    mean = teacher.mean_tail
    if (mean < 0).any() or (layout.top_k < layout.vocab_size and abs(float(mean.sum(dtype=np.float64)) - 1) > 1e-3):
        yield None, f"mean_tail: expected probabilities that sum to 1, found {mean.sum()}"
    total = 0
    step = max(1, _BLOCK_POSITIONS * corpus.num_rows // max(1, corpus.num_targets))
    for shard in range(layout.num_shards):
        first, last = layout.shard_rows(shard)
        found = 0
        sums = {"log_target": 0.0, "tail_mass": 0.0}
        for a in range(first, last, step):
            b = min(a + step, last)
            rows, targets = corpus.rows(a, b), teacher.rows(a, b, optional=teacher.optional)
            found += len(targets)
            sums["log_target"] += float(targets.log_target.sum(dtype=np.float64))
            sums["tail_mass"] += float(np.exp(targets.log_tail.astype(np.float64)).sum())
            for problem in itertools.chain(
                _target_problems(targets, rows, layout), _tempered_problems(targets, layout)
            ):
                yield shard, f"rows [{a}, {b}): {problem}"
        record = teacher.commit(shard)
        if record["positions"] != found:
            yield shard, f"expected {record['positions']} positions, found {found}"
        for name, value in sums.items():
            if abs(value - record["sums"][name]) > 1e-3 * (1 + abs(value)):
                yield shard, f"sum of {name}: stored {record['sums'][name]}, computed {value}"
        total += found
    if total != teacher.num_targets:
        yield None, f"expected {teacher.num_targets} positions, found {total}"


def _target_problems(targets: Targets, rows: Rows, layout: Layout) -> Iterator[str]:
    if len(targets) == 0:
        return
    in_order = np.sort(targets.token_ids, axis=1)
    if (np.diff(in_order, axis=1) == 0).any():
        yield "a token twice in one top-K"
    if (np.diff(targets.logprobs, axis=1) > 0).any():
        yield "log-probabilities that are not most likely first"
    if targets.num_samples and _any_member(targets.tail_samples, in_order, layout.vocab_size):
        yield "a tail sample that is one of the top-K"
    for name in SCALARS:
        values = getattr(targets, name)
        if np.isnan(values).any() or (name != "tail_entropy" and (values > 0).any()):
            yield f"{name}: expected logs of probabilities, found {values[np.isnan(values) | (values > 0)][:3]}"
    tail = layout.vocab_size - layout.top_k
    largest = np.log(tail) if tail else 0.0
    if (targets.tail_entropy < -1e-3).any() or (targets.tail_entropy > largest * (1 + _RELATIVE) + 1e-3).any():
        yield f"tail_entropy: expected 0 to log({tail}) nats, found up to {targets.tail_entropy.max()}"
    if np.isneginf(targets.log_tail).any() != (tail == 0):
        yield "log_tail: expected -inf exactly where the top-K is the whole vocabulary"
    mass = np.exp(targets.log_target.astype(np.float64)) + np.exp(targets.log_not_target.astype(np.float64))
    if (np.abs(mass - 1) > _RELATIVE).any():
        yield f"log_target and log_not_target: expected masses that sum to 1, found {mass[np.argmax(np.abs(mass - 1))]}"
    target = next_tokens(rows.tokens, target_positions(rows.supervised))
    hits = targets.token_ids == target[:, None]
    inside = hits.any(axis=1)
    stored = targets.logprobs[inside][hits[inside]]
    exact = targets.log_target[inside]
    off = np.abs(stored - exact) > _LEVEL_SLACK + np.maximum(0, -exact - 64) / 128 + _RELATIVE * np.abs(exact)
    if off.any():
        yield "log_target: not the top-K's own value where the true next token is one of them; misaligned?"
    last = targets.logprobs[~inside][:, -1]
    outside = targets.log_target[~inside] > last + _LEVEL_SLACK + np.maximum(0, -last - 64) / 128 + _RELATIVE * np.abs(
        last
    )
    if outside.any():
        yield "log_target: more likely than the top-K though the true next token is not one of them; misaligned?"


def _tempered_problems(targets: Targets, layout: Layout) -> Iterator[str]:
    """``log_z_tail`` against what the other fields leave possible.

    With s = 1/tau, log sum p~^s / (1 - s) is the tail's Renyi entropy of order s. It falls as s grows, from log N of
    the N tokens at s = 0 through the stored entropy at s = 1 to -log of the largest p~ at infinity.
    """
    tail = layout.vocab_size - layout.top_k
    if tail == 0 or len(targets) == 0:
        if np.isfinite(targets.log_z_tail).any():
            yield "log_z_tail: expected -inf where the top-K is the whole vocabulary"
        return
    log_tail, entropy = targets.log_tail.astype(np.float64), targets.tail_entropy.astype(np.float64)
    last = targets.logprobs[:, -1].astype(np.float64)
    last_slack = _LEVEL_SLACK + np.maximum(0, -last - 64) / 128  # the last stored log-prob is a level's
    for i, tau in enumerate(layout.temperatures):
        stored = targets.log_z_tail[:, i].astype(np.float64)
        renyi = (stored - log_tail / tau) / (1 - 1 / tau)
        slack = 1e-3 + _RELATIVE * ((np.abs(stored) + np.abs(log_tail) / tau) / abs(1 - 1 / tau) + entropy)
        low = entropy if tau > 1 else np.maximum(0, log_tail - last - last_slack)
        high = np.full(len(stored), np.log(tail)) if tau > 1 else entropy
        off = ~((renyi >= low - slack) & (renyi <= high + slack))
        if off.any():
            t = int(np.argmax(off))
            yield (
                f"log_z_tail at temperature {tau:g}: expected the Renyi entropy of order {1 / tau:g} to be from "
                f"{low[t]} to {high[t]} nats, found {renyi[t]}"
            )


def _any_member(samples: NDArray[np.int32], sorted_ids: NDArray[np.int32], vocab_size: int) -> bool:
    base = np.arange(len(sorted_ids), dtype=np.int64)[:, None] * vocab_size
    keys = (sorted_ids + base).ravel()
    wanted = (samples + base).ravel()
    place = np.searchsorted(keys, wanted)
    return bool((keys[np.minimum(place, len(keys) - 1)] == wanted).any())
