"""Compare teachers from their caches alone: no model, no torch, one pass over what is stored.

The figures of one teacher are exact up to the codec's rounding: perplexity on the true tokens, entropy, the mass
beyond the K most likely tokens, agreement with the text. Of two teachers, agreement is exact and the KL is known from
below; its value is estimated (``pair_divergence`` says how, and what that rests on). The intervals say how much
the figures depend on which rows are in the corpus; they know nothing of the estimate's assumption.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tailcache.pipeline.compare_sums import CONTEXT_BINS, RowSums, row_sums, tail_ladder
from tailcache.pipeline.config import CompareConfig
from tailcache.storage.bootstrap import Figure, Resampled
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import DataError, IncompleteError, MismatchError, NotFoundError
from tailcache.storage.inventory import teacher_inventory
from tailcache.storage.reader import Cache, Teacher, open_cache

__all__ = ["Comparison", "DirectedFigures", "PairFigures", "TeacherFigures", "compare"]

Floats = NDArray[np.float64]
_MIN_BIN_POSITIONS = 30


@dataclass(frozen=True, kw_only=True)
class TeacherFigures:
    """One teacher on the chosen rows."""

    label: str
    cache: str
    name: str
    hash: str
    top_k: int
    num_samples: int
    perplexity: Figure
    """exp of the mean negative log-probability of the true next tokens."""
    cross_entropy: Figure
    """Nats; the mean itself."""
    entropy: Figure
    """Nats, of the whole distribution, exact."""
    top1_accuracy: Figure
    """How often the most likely token is the true next one."""
    mismatch_rate: Figure
    """One minus that."""
    top1_probability: Figure
    """Mean probability of the most likely token."""
    target_in_head: Figure
    """How often the true next token is among the stored K."""
    tail_mass: dict[int, Figure]
    """alpha_K by K: mean mass beyond the K most likely tokens."""
    bytes_per_position: dict[str, float]
    """By field, as they lie on disk; of the whole capture, whatever the rows."""
    perplexity_by_context: list[tuple[float, float]]
    """(tokens read, perplexity), in powers of two."""


@dataclass(frozen=True, kw_only=True)
class DirectedFigures:
    """KL(first‖second) in nats per position."""

    first: str
    second: str
    kl_lower_bound: Figure
    """Certain: the KL between K+1 atoms of common support."""
    kl_estimate: Figure
    """Rests on an assumption about the second teacher's tail."""
    kl_prior_estimate: Figure
    """The same without the correction by the first teacher's own tail; usually too large."""
    estimate_by_context: list[tuple[float, float]]
    """(tokens read, estimate), in powers of two."""


@dataclass(frozen=True, kw_only=True)
class PairFigures:
    """Two teachers on the same rows; differences are second minus first, paired row by row."""

    first: str
    second: str
    top1_agreement: Figure
    perplexity_difference: Figure
    cross_entropy_difference: Figure
    entropy_difference: Figure
    top1_accuracy_difference: Figure
    tail_mass_difference: dict[int, Figure]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything ``compare`` found."""

    corpus_hash: str
    split: str
    prefix_rows: int | None
    """Only the first so many rows of the corpus, since some teacher's capture has not finished; none if all are."""
    rows: int
    """Rows that have a target position."""
    positions: int
    confidence: float
    resamples: int
    seed: int
    teachers: list[TeacherFigures]
    pairs: list[PairFigures]
    """Unordered."""
    divergences: list[DirectedFigures]
    """Ordered pairs."""
    left_out: list[str]
    """Teachers that were not named and whose capture has not finished."""

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not finite is null."""
        record: dict[str, Any] = _to_json(self)
        record["units"] = "nats per position, unless a name says otherwise"
        record["kl_estimate_rests_on"] = (
            "tokens beyond the second teacher's stored top-K are filled from its mean tail, less the error the same "
            "makes for KL(first‖first); intervals do not cover this assumption"
        )
        return record


def compare(config: CompareConfig, *, show_progress: bool = True) -> Comparison:
    """Compare teachers.

    Args:
      config: the settings; the outputs they name are not written here.
      show_progress: draw a progress bar.

    Raises:
      NotFoundError: no such cache or teacher.
      IncompleteError: a named teacher's capture has not finished, or no teacher's has; see ``config.unfinished``.
      MismatchError: the two caches hold different corpora.
      DataError: no target position in the chosen rows.
      CorruptError: stored bytes are damaged.
    """
    cache = open_cache(config.cache)
    choose = partial(_choose, config=config, show_progress=show_progress)
    chosen, left_out = choose(cache, config.teachers)
    sources = [(config.cache, teacher) for teacher in chosen]
    if config.other_cache is not None:
        other = open_cache(config.other_cache)
        _check_same_corpus(cache.corpus, other.corpus)
        chosen, also_left_out = choose(other, config.other_teachers)
        sources += [(config.other_cache, teacher) for teacher in chosen]
        left_out += also_left_out
    teachers = _label(sources)
    corpus = cache.corpus
    prefix = min(teacher.num_rows for _, teacher in teachers.values())
    rows = _rows(corpus, config.split, prefix)
    total = _count_targets(corpus, rows)
    with tqdm(
        total=total, unit="pos", unit_scale=True, desc="compare", disable=not show_progress, dynamic_ncols=True
    ) as bar:
        sums = row_sums({label: teacher for label, (_, teacher) in teachers.items()}, corpus, rows, bar.update)
    boot = Resampled(
        sums.sums_RM, sums.names, resamples=config.resamples, confidence=config.confidence, seed=config.seed
    )
    return Comparison(
        corpus_hash=corpus.hash,
        split=config.split,
        prefix_rows=None if prefix == corpus.num_rows else prefix,
        rows=len(sums.sums_RM),
        positions=round(float(boot["positions"][0])),
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
        teachers=[_teacher_figures(label, path, t, boot, sums) for label, (path, t) in teachers.items()],
        pairs=[
            _pair_figures(a, b, min(teachers[a][1].top_k, teachers[b][1].top_k), boot)
            for a, b in itertools.combinations(teachers, 2)
        ],
        divergences=[_directed_figures(a, b, boot, sums) for a, b in itertools.permutations(teachers, 2)],
        left_out=left_out,
    )


# -- what to compare --------------------------------------------------------------------------------------------


def _choose(
    cache: Cache, names: tuple[str, ...], config: CompareConfig, *, show_progress: bool
) -> tuple[list[Teacher], list[str]]:
    """The named teachers, or all that can be read and the names of those that cannot."""
    if names:
        return [_open(cache, name, config, show_progress=show_progress) for name in names], []
    finished, unfinished = [], []
    for name in cache.teacher_names:
        try:
            finished.append(_open(cache, name, config, show_progress=show_progress))
        except IncompleteError:
            unfinished.append(name)
    if unfinished and not finished:
        raise IncompleteError(
            f"{cache.place}: expected a finished teacher, found only unfinished ones ({', '.join(unfinished)}); run "
            "the same `tailcache capture` again to continue"
        )
    if not finished:
        raise NotFoundError(f"{cache.place}: expected a teacher, found none; make one with `tailcache capture`")
    return finished, unfinished


def _open(cache: Cache, name: str, config: CompareConfig, *, show_progress: bool) -> Teacher:
    hidden = not show_progress or config.unfinished != "wait"
    with tqdm(unit="shard", desc=f"waiting for {name}", disable=hidden, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)
            bar.refresh()

        timeout_s = None if config.wait_minutes is None else 60 * config.wait_minutes
        return cache.teacher(name, unfinished=config.unfinished, timeout_s=timeout_s, progress=show)


def _label(sources: list[tuple[str | Path, Teacher]]) -> dict[str, tuple[str | Path, Teacher]]:
    """Name teachers: by their own name where that tells them apart, else with their cache."""
    counts = [teacher.name for _, teacher in sources]
    labels: dict[str, tuple[str | Path, Teacher]] = {}
    for path, teacher in sources:
        label = teacher.name if counts.count(teacher.name) == 1 else f"{path}:{teacher.name}"
        if label in labels:
            raise MismatchError(f"{path}: expected another cache than --cache, found the same; leave --other-cache out")
        labels[label] = (path, teacher)
    return labels


def _check_same_corpus(corpus: Corpus, other: Corpus) -> None:
    if corpus.hash == other.hash:
        return
    a, b = corpus.manifest, other.manifest
    differing = []
    for part in ("tokenizer", "source", "recipe"):
        ours, theirs = _flat(a.get(part, {}), part), _flat(b.get(part, {}), part)
        unequal = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        differing += [f"{name}: {ours.get(name)!r} against {theirs.get(name)!r}" for name in unequal[:3]]
    for size in ("vocab_size", "num_rows", "num_tokens", "num_targets"):
        if a[size] != b[size]:
            differing.append(f"{size}: {a[size]} against {b[size]}")
    raise MismatchError(
        f"{other.cache_place}: expected the corpus of {corpus.cache_place}, {corpus.hash}, found {other.hash}; "
        "positions of different corpora cannot be compared. They differ in "
        f"{'; '.join(differing) or 'their tokens'}. Capture both teachers over one corpus"
    )


def _flat(record: Any, prefix: str) -> dict[str, Any]:
    """A nested record as one level of dotted names."""
    if not isinstance(record, dict):
        return {prefix: record}
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}.{name}")
    return flat


def _rows(corpus: Corpus, split: Literal["all", "held-out", "train"], num_rows: int) -> NDArray[np.int64]:
    """Those of the first so many rows that are on that side."""
    if split == "all":
        return np.arange(num_rows)
    rows = corpus.held_out_rows() if split == "held-out" else corpus.train_rows()
    rows = rows[: np.searchsorted(rows, num_rows)]
    if not len(rows):
        raise DataError(f"--split {split}: expected such rows in {corpus.place}, found none; use --split all")
    return rows


def _count_targets(corpus: Corpus, rows: NDArray[np.int64]) -> int:
    if len(rows) == corpus.num_rows:
        return corpus.num_targets
    offsets = np.concatenate(list(corpus.stream("target_offsets")))
    return int((offsets[rows + 1] - offsets[rows]).sum())


# -- figures ----------------------------------------------------------------------------------------------------


def _teacher_figures(label: str, path: str | Path, teacher: Teacher, boot: Resampled, sums: RowSums) -> TeacherFigures:
    num = boot["positions"]

    def mean(name: str) -> Floats:
        return boot[f"{label}/{name}"] / num

    inventory = teacher_inventory(teacher.corpus, teacher.name)
    return TeacherFigures(
        label=label,
        cache=str(path),
        name=teacher.name,
        hash=teacher.hash,
        top_k=teacher.top_k,
        num_samples=teacher.num_samples,
        perplexity=boot.figure(_exp(-mean("log_target"))),
        cross_entropy=boot.figure(-mean("log_target")),
        entropy=boot.figure(mean("entropy")),
        top1_accuracy=boot.figure(mean("match")),
        mismatch_rate=boot.figure(1 - mean("match")),
        top1_probability=boot.figure(mean("top1_probability")),
        target_in_head=boot.figure(mean("target_in_head")),
        tail_mass={k: boot.figure(mean(f"alpha_{k}")) for k in tail_ladder(teacher.top_k)},
        bytes_per_position=inventory.bytes_per_position,
        perplexity_by_context=_by_context(sums, f"{label}/log_target", lambda mean: float(_exp(-mean))),
    )


def _pair_figures(first: str, second: str, top_k: int, boot: Resampled) -> PairFigures:
    num = boot["positions"]

    def difference(name: str) -> Floats:
        return (boot[f"{second}/{name}"] - boot[f"{first}/{name}"]) / num

    perplexity = _exp(-boot[f"{second}/log_target"] / num) - _exp(-boot[f"{first}/log_target"] / num)
    ladder = [k for k in tail_ladder(top_k) if k < top_k]  # both have these; the stored K itself only if it is equal
    return PairFigures(
        first=first,
        second=second,
        top1_agreement=boot.figure(boot[f"{first}|{second}/agree"] / num),
        perplexity_difference=boot.figure(perplexity),
        cross_entropy_difference=boot.figure(-difference("log_target")),
        entropy_difference=boot.figure(difference("entropy")),
        top1_accuracy_difference=boot.figure(difference("match")),
        tail_mass_difference={k: boot.figure(difference(f"alpha_{k}")) for k in ladder},
    )


def _directed_figures(first: str, second: str, boot: Resampled, sums: RowSums) -> DirectedFigures:
    num, key = boot["positions"], f"{first}>{second}"
    return DirectedFigures(
        first=first,
        second=second,
        kl_lower_bound=boot.figure(boot[f"{key}/bound"] / num),
        kl_estimate=boot.figure(boot[f"{key}/estimate"] / num),
        kl_prior_estimate=boot.figure(boot[f"{key}/prior_estimate"] / num),
        estimate_by_context=_by_context(sums, f"{key}/estimate", float),
    )


def _by_context(sums: RowSums, name: str, function: Any) -> list[tuple[float, float]]:
    """(tokens read, figure) for bins with enough positions."""
    counts, values = sums.by_context["positions"], sums.by_context[name]
    return [
        (float(2**i), function(values[i] / counts[i])) for i in range(CONTEXT_BINS) if counts[i] >= _MIN_BIN_POSITIONS
    ]


def _exp(values: Floats) -> Floats:
    with np.errstate(over="ignore"):  # a teacher can be so wrong that its perplexity is infinite
        return np.exp(values)


def _to_json(value: Any) -> Any:
    if isinstance(value, Figure):
        return value.to_json()
    if hasattr(value, "__dataclass_fields__"):
        return {name: _to_json(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
