"""From cache rows to training batches: rows with their targets, laid out for a model, with padding.

A batch is a dict of tensors. Tokens are laid out as lines [B, L]; everything about targets has one leading
axis T, the target positions of the batch in row order, whatever the lines look like. `target_index` says
where in the flattened lines each of them is, so a loss never sees padding. What a target is about is
decided by ``storage.alignment`` alone.

There are three layouts of the same positions:

- `rows`: one line per row, padded on the right. Position ids restart at every document, and the attention
mask is left
  to transformers, which makes it block-diagonal from them.
- `flat`: all rows on one line without padding, for the flash attention kernels, which keep documents apart
only
  for a single line.
- `documents`: one line per document, padded. Right for any causal model, recurrent ones included; costs
padding.

Padding continues the position ids of its line, so that a batch without packed documents keeps plain causal
attention, and lies to the right, where no real token can see it.

Legend: N tokens of the batch without padding, B lines, L longest line, T target positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tailcache.storage.alignment import next_tokens, segment_ids, target_positions
from tailcache.storage.blocks import TargetRows, read_block
from tailcache.storage.codec import OPTIONAL
from tailcache.storage.errors import NotFoundError
from tailcache.storage.several import SeveralTargets, field_name, fields_of
from tailcache.trainers.mixture import mix
from tailcache.trainers.terms import TeacherTerms

if TYPE_CHECKING:
    from tailcache.storage.codec import Targets
    from tailcache.storage.corpus import Corpus
    from tailcache.storage.several import AnyTeacher

__all__ = [
    "Batch",
    "CacheRows",
    "Layout",
    "Lines",
    "RowTargets",
    "RowTokens",
    "block_rows_of",
    "collate",
    "collate_block",
    "lay_out",
    "teacher_terms",
    "terms_of_each",
]

Layout = Literal["rows", "flat", "documents"]
Batch = dict[str, Any]

BLOCK_POSITIONS = 16_384  # two inner chunks of the store
KEPT_BLOCKS = 2

TARGET_FIELDS = (
    "token_ids",
    "logprobs",
    "log_tail",
    "tail_entropy",
    "tail_samples",
    "log_target",
    "log_not_target",
)
_NONE = np.empty((0, 0))


@dataclass(frozen=True)
class RowTokens:
    """The tokens of one row.

    Attributes:
      tokens: [n] int64.
      document_start: [n] bool; the token is the first of its document.
    """

    tokens: NDArray[np.int64]
    document_start: NDArray[np.bool_]


@dataclass(frozen=True)
class RowTargets(RowTokens):
    """One row of the corpus and the teacher's targets for it.

    Attributes:
      supervised: [n] bool; which positions have a target.
      targets: the teacher's targets of those positions, in order.
      row: its number in the corpus.
    """

    supervised: NDArray[np.bool_]
    targets: Targets
    row: int


@dataclass(frozen=True)
class Lines:
    """Rows laid out for a model.

    Attributes:
      input_ids: [B, L] int64, padded with id 0.
      position_ids: [B, L] int64, restarting at every document.
      slots: [N] int64; where each token of the rows is in the flattened [B * L].
      segments: [N] int64; which document (part within its row) each token belongs to.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    segments: NDArray[np.int64]


def block_rows_of(corpus: Corpus) -> int:
    """Rows worth decoding together. It depends on the corpus alone."""
    return max(1, round(BLOCK_POSITIONS * corpus.num_rows / corpus.num_targets))


class CacheRows(Dataset[RowTargets]):
    """Some rows of a cache, decoded a block at a time; for evaluation, which takes them in order."""

    def __init__(
        self,
        teacher: AnyTeacher,
        rows: NDArray[np.int64],
        *,
        kept_blocks: int = KEPT_BLOCKS,
        optional: Sequence[str] = (),
    ) -> None:
        """Make a map-style dataset; item i is the i-th of `rows`.

        Args:
          teacher: an open teacher of a cache, or several.
          rows: [R] corpus row indices, ascending.
          kept_blocks: decoded blocks held, least recently used dropped first; about 10 MB each at K = 64
            and 16 samples.
          optional: the optional fields of the cache that are wanted (``log_z_tail``, ``hidden``); the others are not
            read.
        """
        self.teacher = teacher
        self.row_indices = rows
        self.block_rows = block_rows_of(teacher.corpus)
        self.kept_blocks = kept_blocks
        self.optional = tuple(optional)
        self.num_decoded = 0
        self._blocks: OrderedDict[int, list[RowTargets]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.row_indices)

    def __getitem__(self, index: int) -> RowTargets:
        if not 0 <= index < len(self.row_indices):
            raise NotFoundError(f"cache rows: expected an index in [0, {len(self)}), found {index}")
        number, place = divmod(index, self.block_rows)
        block = self._blocks.pop(number, None)
        if block is None:
            block = self._decode(self.row_indices[number * self.block_rows : (number + 1) * self.block_rows])
        self._blocks[number] = block
        while len(self._blocks) > self.kept_blocks:
            self._blocks.popitem(last=False)
        return block[place]

    def _decode(self, chosen: NDArray[np.int64]) -> list[RowTargets]:
        self.num_decoded += 1
        block = read_block(self.teacher, chosen, optional=self.optional)
        targets = self.teacher.decode(block.stored, block.rows.row_indices)
        decoded = []
        for i in block.chosen.tolist():
            row = block.rows.slice(i, i + 1)
            decoded.append(
                RowTargets(
                    tokens=row.tokens,
                    document_start=row.document_start,
                    supervised=row.supervised,
                    targets=targets[int(block.target_offsets[i]) : int(block.target_offsets[i + 1])],
                    row=int(row.row_indices[0]),
                )
            )
        return decoded


def lay_out(rows: Sequence[RowTokens], layout: Layout, *, pad_to_multiple_of: int = 1) -> Lines:
    """Lay the tokens of some rows out as lines.

    Args:
      rows: at least one.
      layout: see the module.
      pad_to_multiple_of: lengthen the lines to a multiple of this.
    """
    tokens_N = np.concatenate([row.tokens for row in rows])
    starts_N = np.concatenate([row.document_start for row in rows])
    return _lay_out(tokens_N, starts_N, _row_offsets(rows), layout, pad_to_multiple_of)


def _row_offsets(rows: Sequence[RowTokens]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum([len(row.tokens) for row in rows])]).astype(np.int64)


def _lay_out(
    tokens_N: NDArray[np.int64],
    document_start_N: NDArray[np.bool_],
    row_offsets: NDArray[np.int64],
    layout: Layout,
    pad_to_multiple_of: int,
) -> Lines:
    segments_N = segment_ids(document_start_N, row_offsets)
    segment_starts = np.flatnonzero(np.diff(segments_N, prepend=-1)).astype(np.int64)
    line_starts = {"rows": row_offsets[:-1], "flat": row_offsets[:1], "documents": segment_starts}[layout]

    where_N = np.arange(len(tokens_N), dtype=np.int64)
    line_N = np.searchsorted(line_starts, where_N, side="right") - 1
    column_N = where_N - line_starts[line_N]
    width = max(int(column_N.max(initial=-1)) + 1, 1)
    width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    slot_N = line_N * width + column_N

    input_ids = np.zeros(len(line_starts) * width, dtype=np.int64)
    input_ids[slot_N] = tokens_N
    # Position = column - column of its document's first token; padding belongs to its line's last document.
    first_column = np.zeros(len(line_starts) * width, dtype=np.int64)
    first_column[slot_N[segment_starts]] = column_N[segment_starts]
    position_ids = np.arange(width) - np.maximum.accumulate(first_column.reshape(-1, width), axis=1)
    return Lines(input_ids.reshape(-1, width), position_ids, slot_N, segments_N)


def collate(rows: Sequence[RowTargets], *, layout: Layout = "rows", pad_to_multiple_of: int = 1) -> Batch:
    """Lay rows out as one batch, with their targets.

    Args:
      rows: at least one row with its targets.
      layout: see the module.
      pad_to_multiple_of: lengthen the lines to a multiple of this.

    Returns:
      input_ids and position_ids [B, L]; target_index [T] into the flattened [B * L]; labels [T], the true
      next tokens; segments [T], numbered from 0 per batch; rows [T], the corpus row of each position; all int64. And
      teacher: a dict of the targets' fields, leading axis T (see ``teacher_terms``), the optional ones only where
      they were read.
    """
    return _batch(
        _Flat(
            tokens=np.concatenate([row.tokens for row in rows]),
            document_start=np.concatenate([row.document_start for row in rows]),
            supervised=np.concatenate([row.supervised for row in rows]),
            offsets=_row_offsets(rows),
            row_of_target=np.repeat([row.row for row in rows], [len(row.targets) for row in rows]),
            targets=_read_fields([row.targets for row in rows]),
        ),
        layout,
        pad_to_multiple_of,
    )


def collate_block(block: TargetRows, *, layout: Layout = "rows", pad_to_multiple_of: int = 1) -> Batch:
    """The same batch of rows that lie in arrays already; nothing is done row by row.

    Args:
      block: at least one row with its targets.
      layout: see the module.
      pad_to_multiple_of: lengthen the lines to a multiple of this.
    """
    rows, targets = block.rows, block.targets
    return _batch(
        _Flat(
            tokens=rows.tokens,
            document_start=rows.document_start,
            supervised=rows.supervised,
            offsets=rows.offsets,
            row_of_target=np.repeat(rows.row_indices, np.diff(block.target_offsets)),
            targets=_read_fields([targets]),
        ),
        layout,
        pad_to_multiple_of,
    )


@dataclass(frozen=True, kw_only=True)
class _Flat:
    """Rows one after another: N tokens, T target positions."""

    tokens: NDArray[np.int64]
    document_start: NDArray[np.bool_]
    supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    row_of_target: NDArray[np.int64]
    targets: dict[str, NDArray[Any]]


def _read_fields(pieces: Sequence[Targets]) -> dict[str, NDArray[Any]]:
    """The fields of some targets one after another, the optional ones where all have them; by teacher if several."""
    optional = [name for name in OPTIONAL if all(getattr(piece, name, _NONE).shape[1] for piece in pieces)]
    read = [*TARGET_FIELDS, *optional, *(["hidden_scale"] if "hidden" in optional else [])]

    def joined(name: str) -> NDArray[Any]:
        values: list[NDArray[Any]] = [getattr(piece, name) for piece in pieces]
        return values[0] if len(values) == 1 else np.concatenate(values)

    result = {name: joined(name) for name in read}
    further = [piece.further for piece in pieces if isinstance(piece, SeveralTargets)]
    for i, each in enumerate(zip(*further, strict=True), start=1):
        result |= {field_name(i, name): values for name, values in _read_fields(each).items()}
    return result


def _batch(flat: _Flat, layout: Layout, pad_to_multiple_of: int) -> Batch:
    lines = _lay_out(flat.tokens, flat.document_start, flat.offsets, layout, pad_to_multiple_of)
    positions_T = target_positions(flat.supervised)
    return {
        "input_ids": torch.from_numpy(lines.input_ids),
        "position_ids": torch.from_numpy(lines.position_ids),
        "target_index": torch.from_numpy(lines.slots[positions_T]),
        "labels": torch.from_numpy(next_tokens(flat.tokens, positions_T)),
        "segments": torch.from_numpy(lines.segments[positions_T]),
        "rows": torch.from_numpy(flat.row_of_target),
        "teacher": {name: torch.from_numpy(values) for name, values in flat.targets.items()},
    }


def teacher_terms(batch: Batch, vocab_size: int, temperatures: Sequence[float] = ()) -> TeacherTerms:
    """The targets of a batch as the terms that losses take: ids widened to int64.

    Args:
      batch: of ``collate``, on any device. With ``log_weights`` [T, n] (see ``mixture_weights``), of n teachers, whose
        mixture these are the targets of.
      vocab_size: V.
      temperatures: what the columns of ``log_z_tail`` are about, where it was read; of a single teacher.
    """
    if "log_weights" in batch:
        return mix(terms_of_each(batch, vocab_size), batch["log_weights"])
    return _terms(batch["teacher"], batch["labels"], vocab_size, temperatures)


def terms_of_each(batch: Batch, vocab_size: int) -> list[TeacherTerms]:
    """The targets of each of the n teachers of a batch with ``log_weights`` [T, n]; none of a single teacher's."""
    num_teachers = batch["log_weights"].shape[1] if "log_weights" in batch else 0
    return [_terms(fields_of(batch["teacher"], i), batch["labels"], vocab_size) for i in range(num_teachers)]


def _terms(
    fields: dict[str, Tensor], next_tokens: Tensor, vocab_size: int, temperatures: Sequence[float] = ()
) -> TeacherTerms:
    wanted: dict[str, Any] = {name: fields[name] for name in (*TARGET_FIELDS, "log_z_tail") if name in fields}
    return TeacherTerms(
        vocab_size=vocab_size,
        next_tokens=next_tokens,
        temperatures=tuple(temperatures) if "log_z_tail" in wanted else (),
        **{name: value if value.is_floating_point() else value.long() for name, value in wanted.items()},
    )
