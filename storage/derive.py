"""Make a cache from caches, without a teacher: other rows, smaller K, fewer draws, fewer fields, another layout.

Everything that stays is as it was: the levels of log-probs are found again in the decoded values, so that storing them
once more loses nothing. What changes is said in ``provenance.derived``: a list with one entry for each operation,
oldest first, of ``operation``, its ``parameters``, the hashes of the ``source_teacher`` and ``source_corpus``, the
``version`` of tailcache, and whether the ``mean_tail`` is still exact.

A derived teacher is written by the same protocol as a captured one. So it can be interrupted and run again, to the same
bytes; and it is read, verified and trained on like any other.

Legend: T positions, V vocabulary, K kept tokens, m draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.codec import Targets, logprob_levels
from tailcache.storage.corpus import Corpus
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.derive_rows import Selection, Window, spans
from tailcache.storage.durable import sha256
from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.layout import Layout, check_name
from tailcache.storage.place import Place
from tailcache.storage.reader import Teacher
from tailcache.storage.relevel import on_levels
from tailcache.storage.sealed import MAX_BYTES, canonical, unseal
from tailcache.storage.shrink import shrink, shrink_key, tail_sum
from tailcache.storage.targets import TargetsWriter, plan_layout
from tailcache.storage.uniforms import uniforms

__all__ = ["Change", "check_change", "derive_corpus", "derive_teacher"]

REDRAWN = "systematic, over known tokens and stored draws"
SUBSET = "systematic subset of stored draws"
_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is to be different; none everywhere: as it was."""

    top_k: int | None = None
    num_samples: int | None = None
    drop: tuple[str, ...] = ()
    """Optional fields to leave out."""
    seed: int = 0
    """Of the draws, where K or their number changes."""
    shard_positions: int | None = None
    chunk: int | None = None
    compression_level: int | None = None


# -- the corpus ------------------------------------------------------------------------------------------------------


def derive_corpus(selection: Selection, target: Place, progress: Callable[[int], object] = lambda _: None) -> Corpus:
    """Write the corpus of a selection of rows, or find it there.

    Args:
      selection: the rows.
      target: the place of the new cache.
      progress: called with numbers of rows.

    Raises:
      MismatchError: there is another corpus at the target.
      DataError: no chosen row has a target.
    """
    parent = None if selection.whole else selection.parent
    if target.exists("corpus/manifest.json"):
        return _expect_corpus(Corpus(target), selection, parent)
    first = selection.corpora[0]
    starts = 0
    with CorpusWriter(target, vocab_size=first.vocab_size, parent=parent, parent_rows=selection.parent_row) as writer:
        for begin in range(0, len(selection), _BLOCK_ROWS):
            rows = selection.rows(begin, min(begin + _BLOCK_ROWS, len(selection)))
            wanted = np.zeros(len(rows.tokens), np.bool_)
            wanted[1:] = rows.supervised[:-1]
            starts += int(rows.document_start.sum())
            for i in range(len(rows)):
                part = slice(int(rows.offsets[i]), int(rows.offsets[i + 1]))
                writer.append(
                    rows.tokens[part],
                    rows.document_start[part],
                    wanted[part],
                    held_out=bool(rows.held_out[i]),
                )
            progress(len(rows))
        manifest = first.manifest
        report = selection.parent["report"] if parent is None else {"rows": len(selection), "documents": starts}
        return writer.finish(
            tokenizer_files=_tokenizer_files(first),
            tokenizer=manifest["tokenizer"],
            source=manifest["source"],
            recipe=manifest["recipe"],
            report=report,
        )


def _expect_corpus(found: Corpus, selection: Selection, parent: dict[str, Any] | None) -> Corpus:
    same = found.num_rows == len(selection) and found.parent == parent
    if same and parent is None:
        same = found.hash == selection.parent["hash"]
    elif same:
        parts = zip(range(0, found.num_rows, 1 << 20), found.stream("parent_rows"), strict=False)
        same = all(np.array_equal(part, selection.parent_row[first : first + len(part)]) for first, part in parts)
    if not same:
        raise MismatchError(
            f"{found.cache_place}: expected no corpus, or the one to be made ({len(selection)} rows of the corpus "
            f"{selection.parent['hash'][:12]}…), found another: {found.hash[:12]}… with {found.num_rows} rows; choose "
            "another target"
        )
    return found


def _tokenizer_files(corpus: Corpus) -> dict[str, bytes]:
    folder = corpus.tokenizer_dir
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- a teacher -------------------------------------------------------------------------------------------------------


def derive_teacher(
    teachers: Sequence[Teacher],
    selection: Selection,
    corpus: Corpus,
    name: str,
    change: Change,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a teacher from one over the same corpora, or go on with it.

    Args:
      teachers: one for each corpus of the selection.
      selection: the rows.
      corpus: with exactly these rows: from ``derive_corpus``, or a copy.
      name: what to call it.
      change: what is to be different.
      progress: called with numbers of positions.

    Raises:
      MismatchError: the teachers were captured with different settings (names them), or there is another teacher of
        that name.
      ConfigError: more tokens or draws than there are, or a field to leave out that is not there.
      CorruptError: a source is damaged; names the shard and the field.
    """
    check_name(name)
    check_change(teachers, change)
    job = _Job.plan(teachers, selection, corpus, change)
    place = corpus.cache_place / "teachers" / name
    _expect_same_lineage(place, job.lineage)
    head = teachers[0].head() if job.layout.hidden is not None else None
    with TargetsWriter(
        corpus, name, layout=job.layout, settings=job.settings, provenance=job.provenance, head=head
    ) as writer:
        progress(writer.positions)
        for shard in writer.shards():
            targets, total = job.shard(shard)
            writer.write_shard(shard, targets, total)
            progress(len(targets))
        writer.finish()


def check_change(teachers: Sequence[Teacher], change: Change) -> None:
    """Refuse a change that cannot be made, before anything is written.

    Args:
      teachers: one for each corpus that rows are taken from.
      change: what is to be different.

    Raises:
      MismatchError: the teachers were captured with different settings (names them).
      ConfigError: more tokens or draws than there are, or a field to leave out that is not there.
    """
    _expect_alike(teachers)
    first = teachers[0]
    _check_sizes(first, *_sizes(first, change))
    for name in change.drop:
        if name not in first.optional:
            raise ConfigError(
                f"--drop {name}: expected a field that teacher {first.name!r} has, found "
                f"{', '.join(first.optional) or 'that it has no optional ones'}"
            )


def _expect_alike(teachers: Sequence[Teacher]) -> None:
    """The settings of all teachers are those of the first, but for what depends on their corpora."""
    first = teachers[0]
    for teacher in teachers[1:]:
        pairs = {
            "top_k": (first.top_k, teacher.top_k),
            "num_samples": (first.num_samples, teacher.num_samples),
            "temperatures": (list(first.temperatures), list(teacher.temperatures)),
            "hidden": (first.layout.hidden, teacher.layout.hidden),
        }
        for key in sorted(_settings(first).keys() | _settings(teacher).keys()):
            pairs[f"settings.{key}"] = (_settings(first).get(key), _settings(teacher).get(key))
        different = [f"{key}: {a!r} and {b!r}" for key, (a, b) in pairs.items() if a != b]
        if different:
            raise MismatchError(
                f"{first.place} and {teacher.place}: expected teachers of the same settings to merge, found "
                + "; ".join(different[:8])
            )


def _settings(teacher: Teacher) -> dict[str, Any]:
    return {key: value for key, value in teacher.manifest["settings"].items() if key != "derived"}


def _expect_same_lineage(place: Place, lineage: list[dict[str, Any]]) -> None:
    try:
        stored = unseal(place.read_limited("manifest.json", MAX_BYTES), f"{place}/manifest.json")
    except FileNotFoundError:
        return
    found = stored.get("provenance", {}).get("derived")
    if found != lineage:
        raise MismatchError(
            f"{place}: there is a teacher of this name, and it was made in another way: expected {_short(lineage)}, "
            f"found {_short(found)}; choose another --name or target"
        )


def _short(lineage: Any) -> str:
    if not isinstance(lineage, list):
        return "one that was captured, not derived"
    return "; ".join(f"{entry.get('operation')} {entry.get('parameters')}" for entry in lineage)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One teacher that is being derived."""

    teachers: Sequence[Teacher]
    selection: Selection
    corpus: Corpus
    change: Change
    layout: Layout
    settings: dict[str, Any]
    provenance: dict[str, Any]
    lineage: list[dict[str, Any]]
    optional: tuple[str, ...]
    full_tail: float | None
    exact_mean: NDArray[np.float64] | None
    """[V] the mean tail of all positions, where it is known."""

    @staticmethod
    def plan(teachers: Sequence[Teacher], selection: Selection, corpus: Corpus, change: Change) -> _Job:
        """What is to be written, of a change that has been checked."""
        first = teachers[0]
        top_k, num_samples = _sizes(first, change)
        optional = tuple(name for name in first.optional if name not in change.drop)
        source = first.layout
        per_row = source.rows_per_shard * corpus.num_targets / corpus.num_rows
        layout = plan_layout(
            corpus,
            top_k=top_k,
            num_samples=num_samples,
            shard_positions=change.shard_positions or max(1, round(per_row)),
            chunk=change.chunk or source.chunk,
            compression_level=change.compression_level or source.compression_level,
            temperatures=source.temperatures if "log_z_tail" in optional else (),
            kl_budget=source.kl_budget * top_k / source.top_k,  # the same levels: nothing is rounded again
        )
        layout = replace(layout, hidden=source.hidden if "hidden" in optional else None)
        settings = _settings(first)
        thinned = "thinned" in str(settings.get("sampling", ""))
        if top_k < first.top_k and num_samples:
            settings["sampling"] = REDRAWN + ", thinned" * thinned
        elif num_samples < first.num_samples and num_samples:
            settings["sampling"] = SUBSET + ", thinned" * thinned
        exact = selection.covers_its_corpora and top_k == first.top_k
        lineage = _lineage(teachers, selection, change, layout, exact=exact)
        settings["derived"] = sha256(canonical(lineage))
        sizes = [teacher.num_targets for teacher in teachers]
        mean = sum(n * teacher.mean_tail.astype(np.float64) for n, teacher in zip(sizes, teachers, strict=True))
        return _Job(
            teachers=teachers,
            selection=selection,
            corpus=corpus,
            change=change,
            layout=layout,
            settings=settings,
            provenance={**first.manifest["provenance"], "derived": lineage},
            lineage=lineage,
            optional=optional,
            full_tail=settings.get("full_tail") if thinned else None,
            exact_mean=np.asarray(mean) / sum(sizes) if exact else None,
        )

    def shard(self, shard: int) -> tuple[Targets, NDArray[np.float64]]:
        """The targets of a shard, and the sum of their normalised tails, exact or estimated."""
        first, last = self.layout.shard_rows(shard)
        total = np.zeros(self.layout.vocab_size)
        parts: list[Targets] = []
        counts: list[NDArray[np.int64]] = []
        where: list[NDArray[np.int64]] = []
        for window in self.selection.windows(first, last):
            teacher = self.teachers[window.source]
            stored, numbers, count = self._read(teacher, window)
            parts.append(self._shrink(teacher, stored, numbers))
            counts.append(count)
            where.append(window.where)
            if self.exact_mean is None:
                total += tail_sum(stored, self.layout.top_k, self.layout.vocab_size, teacher.mean_tail)
        targets, of_row = Targets.concatenate(parts), np.concatenate(counts)
        targets = replace(
            targets, logprobs=on_levels(targets.logprobs, logprob_levels(self.layout.top_k, self.layout.kl_budget))
        )
        order = np.argsort(np.concatenate(where))
        if (np.diff(order) != 1).any():
            ends = np.cumsum(of_row)
            targets = targets[spans((ends - of_row)[order], ends[order])]
        if self.exact_mean is not None:
            total = self.exact_mean * len(targets)
        return targets, total

    def _read(self, teacher: Teacher, window: Window) -> tuple[Targets, NDArray[np.int64], NDArray[np.int64]]:
        """The stored targets of the wanted rows, their numbers in the source, and how many each row has."""
        targets = teacher.rows(window.first, window.last, optional=self.optional)
        offsets = teacher.corpus.target_offsets(window.first, window.last)
        pick = window.wanted - window.first
        numbers = spans(offsets[pick], offsets[pick + 1])
        if len(numbers) < len(targets):
            targets = targets[numbers - offsets[0]]
        return targets, numbers, offsets[pick + 1] - offsets[pick]

    def _shrink(self, teacher: Teacher, stored: Targets, numbers: NDArray[np.int64]) -> Targets:
        if (self.layout.top_k, self.layout.num_samples) == (teacher.top_k, teacher.num_samples):
            return stored
        key = shrink_key(teacher.corpus.hash, teacher.hash, self.change.seed)
        return shrink(
            stored,
            self.layout.top_k,
            self.layout.num_samples,
            uniforms(key, numbers),
            temperatures=self.layout.temperatures,
            full_tail=self.full_tail,
        )


def _sizes(teacher: Teacher, change: Change) -> tuple[int, int]:
    """K and m of what is made."""
    top_k = teacher.top_k if change.top_k is None else change.top_k
    return top_k, teacher.num_samples if change.num_samples is None else change.num_samples


def _check_sizes(teacher: Teacher, top_k: int, num_samples: int) -> None:
    if not 1 <= top_k <= teacher.top_k:
        raise ConfigError(f"--top-k: expected 1 to {teacher.top_k}, the K of teacher {teacher.name!r}; found {top_k}")
    if num_samples < 0:
        raise ConfigError(f"--num-samples: expected 0 or more, found {num_samples}")
    whole = teacher.top_k == teacher.vocab_size
    if whole and top_k == teacher.top_k and num_samples:
        raise ConfigError("--num-samples: expected 0 where K is the whole vocabulary: there is no tail to draw from")
    if num_samples > teacher.num_samples and not whole:
        raise ConfigError(
            f"--num-samples: expected at most {teacher.num_samples}, the draws of teacher {teacher.name!r}; found "
            f"{num_samples}. More can only be drawn by the teacher itself"
        )


def _lineage(
    teachers: Sequence[Teacher], selection: Selection, change: Change, layout: Layout, *, exact: bool
) -> list[dict[str, Any]]:
    """What ``provenance.derived`` says: what it said of the first source, and an entry for each operation."""
    first = teachers[0]
    done: list[tuple[str, dict[str, Any]]] = []
    if len(teachers) > 1:
        done.append(("merge", {"sources": [_origin(teacher) for teacher in teachers]}))
    if not selection.covers_its_corpora:
        done.append(("rows", selection.described))
    if layout.top_k != first.top_k:
        done.append(("top_k", {"from": first.top_k, "to": layout.top_k, "seed": change.seed}))
    if layout.num_samples != first.num_samples:
        done.append(("num_samples", {"from": first.num_samples, "to": layout.num_samples, "seed": change.seed}))
    if change.drop:
        done.append(("drop", {"fields": sorted(change.drop)}))
    wanted = {"shard_positions": change.shard_positions, "chunk": change.chunk, "level": change.compression_level}
    if any(wanted.values()) or not done:
        done.append(("re_encode", {name: value for name, value in wanted.items() if value is not None}))
    earlier = list(first.manifest["provenance"].get("derived", []))
    was_exact = all(entry.get("mean_tail") == "exact" for teacher in teachers for entry in _earlier(teacher))
    mean = "exact" if exact and was_exact else "estimated from known tokens and stored draws"
    return earlier + [
        {
            "operation": operation,
            "parameters": parameters,
            "source_teacher": first.hash,
            "source_corpus": first.corpus.hash,
            "format_version": layout.format_version,
            "version": _version(),
            "mean_tail": mean,
        }
        for operation, parameters in done
    ]


def _earlier(teacher: Teacher) -> list[dict[str, Any]]:
    return list(teacher.manifest["provenance"].get("derived", []))


def _origin(teacher: Teacher) -> dict[str, Any]:
    return {
        "source_teacher": teacher.hash,
        "source_corpus": teacher.corpus.hash,
        "rows": teacher.corpus.num_rows,
        "derived": [entry["operation"] for entry in _earlier(teacher)],
    }


def _version() -> str:
    try:
        return version("tailcache")
    except PackageNotFoundError:
        return "unknown"
