"""One pass over the caches: every row's sums of what compare reports. Nothing per position is kept.

Teachers are read block by block in the order they lie on disk, and worked on in pieces small enough for the
processor's cache.

Legend: T positions of a piece, R rows, M sums, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailcache.pipeline.pair_divergence import PairTerms, Prior, View, pair_terms
from tailcache.storage.alignment import next_tokens, segment_ids, target_positions
from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.errors import DataError
from tailcache.storage.reader import Teacher

__all__ = ["CONTEXT_BINS", "RowSums", "row_sums", "tail_ladder"]

Floats = NDArray[np.float64]

CONTEXT_BINS = 24
"""Bin i holds positions that have read 2^i to 2^(i+1) - 1 tokens of their document's part within the row."""
_LADDER = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70)
_PIECE_ENTRIES = 1 << 17  # of a [T, K] array worked on at a time: 1 MB of float64
_PRIOR_BLOCKS = 32


def tail_ladder(top_k: int) -> list[int]:
    """The K' at which the tail mass is reported: 1 2 3 5 7 10 15 20 30 50 70 100 … up to the stored K, and that."""
    ladder = {k * 10**e for e in range(0, 9, 2) for k in (*_LADDER, 100)}
    return sorted({k for k in ladder if k < top_k} | {top_k})


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Sums over the positions of each row."""

    names: list[str]
    sums_RM: Floats
    """[R, M] rows that have a position."""
    by_context: dict[str, Floats]
    """[CONTEXT_BINS] the same sums by the number of tokens read."""


def row_sums(
    teachers: dict[str, Teacher],
    corpus: Corpus,
    rows: NDArray[np.int64],
    progress: Callable[[int], object] | None = None,
) -> RowSums:
    """Go over some rows once.

    Args:
      teachers: by label, all over the same corpus.
      corpus: that corpus.
      rows: [R] which rows, ascending.
      progress: called with the number of positions done.

    Raises:
      DataError: these rows have no target position.
      CorruptError: stored bytes are damaged.
    """
    priors = {label: Prior(teacher.mean_tail) for label, teacher in teachers.items()}
    beyond = _priors_beyond(teachers)
    block_rows = min(teacher.block_rows for teacher in teachers.values())
    parts: list[Floats] = []
    names: list[str] = []
    context = np.zeros((0, 0))
    for block in _blocks(rows, block_rows):
        first, last = int(block[0]), int(block[-1]) + 1
        held = corpus.rows(first, last)
        stored = {label: teacher.rows(first, last) for label, teacher in teachers.items()}
        chosen_T, row_T, true_T, bin_T = _positions(held, block)
        block_sums: Floats | None = None
        for piece in _pieces(chosen_T, max(t.top_k for t in teachers.values())):
            index = chosen_T[piece]
            views = {label: View.of(_pick(stored[label], index), true_T[index], priors[label]) for label in teachers}
            columns = _columns(views, beyond)
            names = list(columns)
            values_TM = np.stack(list(columns.values()), axis=1)
            if block_sums is None:
                block_sums = np.zeros((last - first, len(names)))
            if not context.size:
                context = np.zeros((CONTEXT_BINS, len(names)))
            _add(block_sums, row_T[index], values_TM)
            _add(context, bin_T[index], values_TM)
            if progress is not None:
                progress(len(index))
        if block_sums is not None:
            parts.append(block_sums[block_sums[:, 0] > 0])
    if not parts:
        raise DataError(
            f"corpus {corpus.place}: expected rows with target positions, found none among {len(rows)} rows"
        )
    return RowSums(
        names=names, sums_RM=np.concatenate(parts), by_context={n: context[:, m] for m, n in enumerate(names)}
    )


def _columns(views: dict[str, View], beyond: dict[tuple[str, int], Prior]) -> dict[str, Floats]:
    """[T] each: what is summed, by name."""
    first = next(iter(views.values()))
    columns: dict[str, Floats] = {"positions": np.ones(len(first.tail_T))}
    for label, view in views.items():
        for name, values in _teacher_columns(view).items():
            columns[f"{label}/{name}"] = values
    for (label_a, a), (label_b, b) in itertools.combinations(views.items(), 2):
        k_a, k_b = a.targets.token_ids.shape[1], b.targets.token_ids.shape[1]
        terms: PairTerms = pair_terms(a, b, beyond.get((label_a, k_b)), beyond.get((label_b, k_a)))
        columns[f"{label_a}|{label_b}/agree"] = terms.agree_T.astype(np.float64)
        for key, directed in ((f"{label_a}>{label_b}", terms.a_to_b), (f"{label_b}>{label_a}", terms.b_to_a)):
            columns[f"{key}/bound"] = directed.bound_T
            columns[f"{key}/estimate"] = directed.estimate_T
            columns[f"{key}/prior_estimate"] = directed.prior_estimate_T
    return columns


def _teacher_columns(view: View) -> dict[str, Floats]:
    top_k = view.p_TK.shape[1]
    ladder = tail_ladder(top_k)
    # alpha_k as a sum of positive terms: the stored tail and the head's ranks beyond k.
    steps_TL = np.add.reduceat(view.p_TK, ladder[:-1], axis=1) if len(ladder) > 1 else view.p_TK[:, :0]
    alpha_TL = np.cumsum(np.concatenate([view.tail_T[:, None], steps_TL[:, ::-1]], axis=1), axis=1)[:, ::-1]
    return {
        "log_target": view.log_target_T,
        "entropy": -view.negative_entropy_T,
        "match": (view.targets.token_ids[:, 0] == view.true_next_T).astype(np.float64),
        "target_in_head": (~view.target_in_tail_T).astype(np.float64),
        "top1_probability": view.p_TK[:, 0],
        **{f"alpha_{k}": alpha_TL[:, i] for i, k in enumerate(ladder)},
    }


def _blocks(rows: NDArray[np.int64], block_rows: int) -> Iterator[NDArray[np.int64]]:
    """Ascending rows, cut where a block of neighbours that are worth reading together ends."""
    if len(rows):
        yield from np.split(rows, np.flatnonzero(np.diff(rows // block_rows)) + 1)


def _positions(
    held: Rows, chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Which of the rows' targets are in chosen rows; and, for every target, its row, true token and context bin."""
    positions_T = target_positions(held.supervised)
    row_T = np.searchsorted(held.offsets, positions_T, side="right") - 1
    segments_N = segment_ids(held.document_start, held.offsets)
    starts = np.flatnonzero(np.diff(segments_N, prepend=-1))
    read_T = positions_T - starts[segments_N[positions_T]] + 1
    bin_T = np.minimum(np.frexp(read_T.astype(np.float64))[1] - 1, CONTEXT_BINS - 1).astype(np.int64)
    wanted_R = np.isin(held.row_indices, chosen)
    return np.flatnonzero(wanted_R[row_T]), row_T, next_tokens(held.tokens, positions_T), bin_T


def _pieces(chosen_T: NDArray[np.int64], top_k: int) -> Iterator[slice]:
    step = max(32, _PIECE_ENTRIES // top_k)
    for first in range(0, len(chosen_T), step):
        yield slice(first, min(first + step, len(chosen_T)))


def _pick(targets: Targets, index: NDArray[np.int64]) -> Targets:
    """Some positions; neighbours without a copy."""
    first, last = int(index[0]), int(index[-1]) + 1
    return targets[first:last] if last - first == len(index) else targets[index]


def _add(into: Floats, row_T: NDArray[np.int64], values_TM: Floats) -> None:
    """Add each position's values to its row of ``into``."""
    order = np.argsort(row_T, kind="stable")
    starts = np.flatnonzero(np.diff(row_T[order], prepend=-1))
    into[row_T[order][starts]] += np.add.reduceat(values_TM[order], starts, axis=0)


def _priors_beyond(teachers: dict[str, Teacher]) -> dict[tuple[str, int], Prior]:
    """Mean tails beyond a smaller K than the stored one, for teachers compared with one that keeps fewer tokens."""
    wanted: dict[str, set[int]] = {}
    for (label_a, a), (_, b) in itertools.permutations(teachers.items(), 2):
        if b.top_k < a.top_k:
            wanted.setdefault(label_a, set()).add(b.top_k)
    priors = {}
    for label, smaller in wanted.items():
        for k, mean_V in _mean_tails_beyond(teachers[label], sorted(smaller)).items():
            priors[label, k] = Prior(mean_V)
    return priors


def _mean_tails_beyond(teacher: Teacher, smaller: list[int]) -> dict[int, NDArray[np.float32]]:
    """[V] mean of the normalised tails beyond each k, over up to 32 blocks spread evenly over the corpus.

    The part beyond the stored K is taken from the stored mean tail.
    """
    starts = np.arange(0, teacher.num_rows, teacher.block_rows)
    starts = starts[np.unique(np.linspace(0, len(starts) - 1, _PRIOR_BLOCKS).round().astype(np.int64))]
    sums = {k: np.zeros(teacher.vocab_size) for k in smaller}
    for first in starts:
        targets = teacher.rows(int(first), min(int(first) + teacher.block_rows, teacher.num_rows))
        for piece in _pieces(np.arange(len(targets)), teacher.top_k):
            p_TK = np.exp(targets.logprobs[piece].astype(np.float64))
            tail_T = np.exp(targets.log_tail[piece].astype(np.float64))
            for k, sum_V in sums.items():
                alpha_T = p_TK[:, k:].sum(axis=1) + tail_T
                weight_T = np.where(alpha_T > 0, 1.0 / np.where(alpha_T > 0, alpha_T, 1.0), 0.0)
                ids = targets.token_ids[piece][:, k:]
                sum_V += np.bincount(ids.ravel(), (p_TK[:, k:] * weight_T[:, None]).ravel(), teacher.vocab_size)
                sum_V += float((tail_T * weight_T).sum()) * teacher.mean_tail.astype(np.float64)
    return {k: (sum_V / max(sum_V.sum(), 1e-300)).astype(np.float32) for k, sum_V in sums.items()}
