"""Evaluate a student on rows of a cache: one pass, every document's sums of what the figures are made of.

    sums = document_sums(model, cache.teacher("a"), rows=cache.corpus.held_out_rows())
    evaluation = summarise(sums)          # figures with intervals over documents, see ``evaluation_figures``

The student is any causal language model of ``transformers``, on its device; the teacher is never loaded. Logits exist
for a few positions at a time. Sums are float64 and per document, so that how rows were cut into batches leaves no trace
but the rounding of the student's own forward, and intervals can be had by drawing documents with replacement. A
document that spans rows is one.

Legend: T target positions of a batch, t of a piece, C columns, D documents, V vocabulary, W width of the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from tailcache.storage.errors import ConfigError, DataError
from tailcache.trainers.batches import Batch, CacheRows, Layout, RowTargets, collate, teacher_terms
from tailcache.trainers.evaluation_columns import position_columns
from tailcache.trainers.evaluation_figures import Evaluation, summarise
from tailcache.trainers.forward import HeadSeat, check_documents_kept_apart, default_layout, target_logits
from tailcache.trainers.linear_head import LinearHead, LogitTiles, buffer_bytes, tiles_of, vocabulary_tiles
from tailcache.trainers.metrics import kl_kind
from tailcache.trainers.products import compute_dtype, wide_dtype
from tailcache.trainers.student import corpus_tokenizer, longest_row
from tailcache.trainers.student_head import find_linear_head
from tailcache.trainers.token_bytes import token_bytes

if TYPE_CHECKING:
    from tailcache.storage.reader import Teacher

__all__ = ["DocumentSums", "Precision", "document_sums", "evaluate_student", "summarise", "tail_ladder"]

Precision = Literal["fp32", "bf16"]

_LADDER = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
_BY_POSITION = (
    "positions",
    "cross_entropy",
    "teacher_cross_entropy",
    "kl",
    "top1_agreement",
    "student_tail",
    "teacher_tail",
)
_PROBE_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class DocumentSums:
    """What an evaluation measured, before any figure is made of it.

    Attributes:
      names: of the C columns: NAME, NAME[i] for the i-th of several, and either followed by @b for the positions of
        bucket b, those that have read 2^b to 2^(b+1) - 1 tokens of their document's part within the row.
      sums_DC: [D, C] float64, for each document with a target position.
      num_rows, num_bins, tail_ks, num_buckets: of which rows, and how columns are numbered.
      no_bytes: why there are no bytes per token; None where there are.
      corpus_hash, teacher, teacher_hash, top_k, vocab_size, num_samples, kl_is: of the targets.
    """

    names: tuple[str, ...]
    sums_DC: NDArray[np.float64]
    num_rows: int
    num_bins: int
    tail_ks: tuple[int, ...]
    num_buckets: int
    no_bytes: str | None
    corpus_hash: str
    teacher: str
    teacher_hash: str
    top_k: int
    vocab_size: int
    num_samples: int
    kl_is: str


def evaluate_student(
    model: nn.Module,
    teacher: Teacher,
    *,
    rows: NDArray[np.int64] | None = None,
    batch_rows: int = 8,
    num_bins: int = 15,
    tail_ks: Sequence[int] | None = None,
    layout: Layout | None = None,
    precision: Precision = "fp32",
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    show_progress: bool = True,
) -> Evaluation:
    """``document_sums`` and ``summarise`` in one; see there."""
    sums = document_sums(
        model,
        teacher,
        rows=rows,
        batch_rows=batch_rows,
        num_bins=num_bins,
        tail_ks=tail_ks,
        layout=layout,
        precision=precision,
        show_progress=show_progress,
    )
    return summarise(sums, resamples=resamples, confidence=confidence, seed=seed)


@torch.no_grad()
def document_sums(
    model: nn.Module,
    teacher: Teacher,
    *,
    rows: NDArray[np.int64] | None = None,
    batch_rows: int = 8,
    num_bins: int = 15,
    tail_ks: Sequence[int] | None = None,
    layout: Layout | None = None,
    precision: Precision = "fp32",
    show_progress: bool = True,
) -> DocumentSums:
    """Run a student over some rows and sum up what its positions add to the figures.

    Args:
      model: a causal language model of ``transformers`` on its device, checked against the corpus
        (``student.build_student``). It is run in evaluation mode and left in the mode it was in.
      teacher: an open teacher of a cache.
      rows: corpus rows, all held out or none; by default all that are.
      batch_rows: rows of a forward.
      num_bins: M, equal bins of ECE and Full-ECE.
      tail_ks: the K' at which tail masses are compared, ascending, at most the stored K; by default ``tail_ladder``.
      layout: how rows become lines; by default what the model's attention needs.
      precision: "bf16" runs the body of the model under autocast and rounds the head's factors to bfloat16, as training
        does.
      show_progress: draw a progress bar.

    Raises:
      DataError: no held-out rows, or no target position among the rows.
      ConfigError: a number that makes no sense, or rows of both sides.
      StudentError: the student lets packed documents see one another, or its forward cannot be used.

    Cost: a forward, and per position some 4 V numbers for as many positions as fit a buffer; D x C sums, where C is
    about 400.
    """
    rows = teacher.held_out_rows() if rows is None else np.unique(np.asarray(rows, dtype=np.int64))
    if not len(rows):
        raise DataError(
            f"{teacher.corpus.place}: expected held-out rows to evaluate on, found none; prepare the corpus with "
            "--held-out 0.05, or evaluate other rows (--split train)"
        )
    tail_ks = tuple(tail_ladder(teacher.top_k) if tail_ks is None else tail_ks)
    if batch_rows < 1 or num_bins < 1 or any(not 1 <= k <= teacher.top_k for k in tail_ks):
        raise ConfigError(
            f"evaluation: expected at least 1 row per batch, at least 1 bin and tail masses at K' from 1 to the stored "
            f"{teacher.top_k}; found {batch_rows}, {num_bins} and {list(tail_ks)}"
        )
    pass_ = _Pass(model, teacher, layout or default_layout(model), num_bins, tail_ks)
    check_documents_kept_apart(model, _probe_rows(teacher, rows), pass_.layout)
    names, sums_DC = _summed(pass_, rows, batch_rows, precision, show_progress=show_progress)
    return DocumentSums(
        names=names,
        sums_DC=sums_DC,
        num_rows=len(rows),
        num_bins=num_bins,
        tail_ks=tail_ks,
        num_buckets=pass_.num_buckets,
        no_bytes=pass_.bytes_of.why_not,
        corpus_hash=teacher.corpus.hash,
        teacher=teacher.name,
        teacher_hash=teacher.hash,
        top_k=teacher.top_k,
        vocab_size=teacher.vocab_size,
        num_samples=teacher.num_samples,
        kl_is=kl_kind(top_k=teacher.top_k, vocab_size=teacher.vocab_size, num_samples=teacher.num_samples),
    )


def tail_ladder(top_k: int) -> list[int]:
    """The K' at which tail masses are compared: 1 5 10 20 50 100 … up to the stored K, and that."""
    return sorted({k for k in _LADDER if k < top_k} | {top_k})


def _summed(
    pass_: _Pass, rows: NDArray[np.int64], batch_rows: int, precision: Precision, *, show_progress: bool
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The names of the columns, and every document's sums of them."""
    dataset, documents = CacheRows(pass_.teacher, rows), _Documents(pass_.teacher, rows)
    found: list[NDArray[np.int64]] = []
    sums: list[NDArray[np.float64]] = []
    names: tuple[str, ...] = ()
    with _evaluating(pass_.model), tqdm(total=len(rows), unit="row", desc="evaluate", disable=not show_progress) as bar:
        for start in range(0, len(rows), batch_rows):
            chosen = [dataset[i] for i in range(start, min(start + batch_rows, len(rows)))]
            batch = collate(chosen, layout=pass_.layout)
            document_T = documents.of(chosen)[batch["segments"].numpy()]
            if len(document_T):
                device = next(pass_.model.parameters()).device
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    names, values_TC = pass_.columns(_to(batch, device))
                first_of = np.flatnonzero(np.diff(document_T, prepend=-1))
                found.append(document_T[first_of])
                sums.append(np.add.reduceat(values_TC, first_of, axis=0))
            bar.update(len(chosen))
    if not sums:
        raise DataError(
            f"{pass_.teacher.corpus.place}: expected target positions to evaluate on, found none in {len(rows)} rows"
        )
    numbers, place = np.unique(np.concatenate(found), return_inverse=True)
    sums_DC = np.zeros((len(numbers), len(names)))
    np.add.at(sums_DC, place, np.concatenate(sums))
    return names, sums_DC


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {n: _to(v, device) if isinstance(v, dict) else v.to(device) for n, v in batch.items()}


def _probe_rows(teacher: Teacher, rows: NDArray[np.int64]) -> list[Any]:
    """The first of the rows, up to one that packs several documents."""
    found: list[Any] = []
    for row in rows[:_PROBE_ROWS].tolist():
        found.append(teacher.corpus.rows(row, row + 1))
        if found[-1].document_start[1:].any():
            break
    return found


class _Documents:
    """Numbers documents, across the rows that they span."""

    def __init__(self, teacher: Teacher, rows: NDArray[np.int64]) -> None:
        held_out = teacher.held_out_rows()
        split = held_out if np.isin(rows, held_out).any() else teacher.train_rows()
        place = np.searchsorted(split, rows)
        outside = rows[split[np.minimum(place, len(split) - 1)] != rows] if len(split) else rows
        if len(outside):
            raise ConfigError(
                f"evaluation: expected rows of one side of the corpus, held out or for training, among the first "
                f"{teacher.num_rows}; found row {outside[0]} beside row {rows[0]}"
            )
        # Rows of the two sides are written in turns: a row goes on with the one before it of its own side.
        follows = np.diff(place, prepend=-2) == 1
        self._follows = dict(zip(rows.tolist(), follows.tolist(), strict=True))
        self._next = 0

    def of(self, rows: Sequence[RowTargets]) -> NDArray[np.int64]:
        """The document of each segment of these rows, which follow those of the call before."""
        numbers = []
        for row in rows:
            first = self._next - (self._follows[row.row] and not row.document_start[0])
            numbers.append(first + np.arange(1 + int(row.document_start[1:].sum())))
            self._next = int(numbers[-1][-1]) + 1
        return np.concatenate(numbers)


class _Pass:
    """How the positions of a batch are measured."""

    def __init__(
        self, model: nn.Module, teacher: Teacher, layout: Layout, num_bins: int, tail_ks: tuple[int, ...]
    ) -> None:
        self.model, self.teacher, self.layout = model, teacher, layout
        self.num_bins, self.tail_ks = num_bins, tail_ks
        self.num_buckets = max(1, longest_row(teacher.corpus).bit_length())
        self.bytes_of = token_bytes(corpus_tokenizer(teacher.corpus), teacher.vocab_size)
        self.systematic = "systematic" in str(teacher.manifest.get("settings", {}).get("sampling", ""))
        found = find_linear_head(model, teacher.vocab_size)
        self.head = None if isinstance(found, str) else found
        self.seat = None if self.head is None else HeadSeat(model)

    def columns(self, batch: Batch) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """The columns of a batch's positions: their names, and [T, C] float64."""
        terms = teacher_terms(batch, self.teacher.vocab_size)
        at = batch["target_index"]
        read_T = batch["position_ids"].reshape(-1)[at] + 1
        bytes_T = self.bytes_of.of(batch["input_ids"].reshape(-1)[at], batch["labels"], first_T=read_T == 1)
        bucket_T = read_T.double().log2().floor().long()
        if self.seat is None:
            values_TX, head = target_logits(self.model, batch), None
        else:
            (values_TX,) = self.seat.run(self.model, batch, lambda hidden_TD: (hidden_TD,))
            head = self.head
        parts: list[NDArray[np.float64]] = []
        names: list[str] = []
        height = max(1, buffer_bytes(at.device) // (16 * self.teacher.vocab_size))
        for piece in tiles_of(len(at), height):
            logits_tW = values_TX[piece] if head is None else _logits(values_TX[piece], head)
            columns = position_columns(
                logits_tW,
                terms.rows(piece),
                num_bins=self.num_bins,
                tail_ks=self.tail_ks,
                systematic=self.systematic,
            )
            if bytes_T is not None:
                columns["bytes"] = bytes_T[piece].double()
            names, values_tC = _flat(columns, bucket_T[piece], self.num_buckets)
            parts.append(values_tC.cpu().numpy())
        return tuple(names), np.concatenate(parts)


def _flat(columns: dict[str, Tensor], bucket_t: Tensor, num_buckets: int) -> tuple[list[str], Tensor]:
    """Columns as a matrix, those that are wanted by position once more for each bucket."""
    in_bucket_tB = torch.nn.functional.one_hot(bucket_t, num_buckets).double()
    names: list[str] = []
    values: list[Tensor] = []
    for name, value in columns.items():
        value_tn = value.reshape(len(value), -1)
        each = [name] if value.dim() == 1 else [f"{name}[{i}]" for i in range(value_tn.shape[1])]
        names += each
        values.append(value_tn)
        if name in _BY_POSITION:
            names += [f"{one}@{bucket}" for one in each for bucket in range(num_buckets)]
            values.append((value_tn[:, :, None] * in_bucket_tB[:, None, :]).flatten(1))
    return names, torch.cat(values, dim=1)


def _logits(hidden_tD: Tensor, head: LinearHead) -> Tensor:
    """[t, V] float32 logits (float64 of float64), a tile of the vocabulary at a time; never rounded to 16 bits."""
    dtype = compute_dtype(hidden_tD, head.weight)
    tiles = LogitTiles(head.weight, head.bias, head.vocab_size, head.scale, head.soft_cap, dtype)
    factors_tD = hidden_tD.to(dtype)
    logits_tV = hidden_tD.new_empty((len(hidden_tD), head.vocab_size), dtype=wide_dtype(dtype))
    for tile in vocabulary_tiles(head.vocab_size):
        logits_tV[:, tile] = tiles.tile(factors_tD, tile)
    return logits_tV
