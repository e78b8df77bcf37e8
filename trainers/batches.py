"""From cache rows to training batches: rows with their targets, a cheap shuffled order, padding.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tailcache.storage.alignment import next_tokens, segment_ids, target_positions
from tailcache.storage.errors import MismatchError, NotFoundError
from tailcache.storage.order import shuffled_rows
from tailcache.trainers.terms import TeacherTerms

if TYPE_CHECKING:
    from tailcache.storage.codec import Targets
    from tailcache.storage.corpus import Corpus
    from tailcache.storage.reader import Teacher

__all__ = [
    "Batch",
    "CacheRows",
    "Layout",
    "Lines",
    "RowTargets",
    "RowTokens",
    "ShuffledRows",
    "block_rows_of",
    "collate",
    "lay_out",
    "teacher_terms",
]

Layout = Literal["rows", "flat", "documents"]
Batch = dict[str, Any]

BLOCK_POSITIONS = 16_384  # two inner chunks of the store
WINDOW_BLOCKS = 8
MAX_GAP_ROWS = 8  # rows read and dropped rather than starting another read

TARGET_FIELDS = (
    "token_ids",
    "logprobs",
    "log_tail",
    "tail_entropy",
    "tail_samples",
    "log_target",
    "log_not_target",
)
OPTIONAL_FIELDS = ("log_z_tail", "hidden")


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
    """Rows worth decoding together. It depends on the corpus alone, so that every teacher gives one order of rows."""
    return max(1, round(BLOCK_POSITIONS * corpus.num_rows / corpus.num_targets))


class CacheRows(Dataset[RowTargets]):
    """Some rows of a cache, decoded a block at a time and kept while a shuffle window needs them."""

    def __init__(
        self,
        teacher: Teacher,
        rows: NDArray[np.int64],
        *,
        kept_blocks: int = WINDOW_BLOCKS + 1,
        optional: Sequence[str] = (),
    ) -> None:
        """Make a map-style dataset; item i is the i-th of `rows`.

        Args:
          teacher: an open teacher of a cache.
          rows: [R] corpus row indices, ascending.
          kept_blocks: decoded blocks held, least recently used dropped first; about 10 MB each at K = 64
            and 16 samples. One more than a shuffle window has, so that each block is decoded once per epoch.
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

    def _decode(self, block: NDArray[np.int64]) -> list[RowTargets]:
        """Rows in ascending order; what lies between two of them is read along unless it is much."""
        self.num_decoded += 1
        decoded = []
        for run in np.split(block, np.flatnonzero(np.diff(block) > MAX_GAP_ROWS) + 1):
            first, last = int(run[0]), int(run[-1]) + 1
            rows = self.teacher.corpus.rows(first, last)
            targets = self.teacher.rows(first, last, optional=self.optional)
            before = np.concatenate([[0], np.cumsum(rows.supervised)])[rows.offsets]
            if len(targets) != before[-1]:
                raise MismatchError(
                    f"teacher {self.teacher.name!r}, rows {first} to {last - 1}: expected {before[-1]} targets, one "
                    f"per supervised position of the corpus, found {len(targets)}; run `tailcache verify`"
                )
            for i in (run - first).tolist():
                row = rows.slice(i, i + 1)
                decoded.append(
                    RowTargets(
                        tokens=row.tokens,
                        document_start=row.document_start,
                        supervised=row.supervised,
                        targets=targets[int(before[i]) : int(before[i + 1])],
                        row=first + i,
                    )
                )
        return decoded


class ShuffledRows(Sampler[int]):
    """The order of one epoch, ``storage.order.shuffled_rows``: a seed and the epoch's number decide it.

    Losses, batch sizes, teachers and restarts do not change it, so students trained with one seed see the
    same rows in the same order.
    """

    def __init__(self, dataset: CacheRows, *, seed: int, window_blocks: int = WINDOW_BLOCKS) -> None:
        """Order the rows of a dataset.

        Args:
          dataset: what to order; its blocks are the order's blocks.
          seed: of the run.
          window_blocks: blocks mixed with one another.
        """
        self.dataset = dataset
        self.seed = seed
        self.window_blocks = window_blocks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        order = shuffled_rows(
            np.arange(len(self.dataset), dtype=np.int64),
            seed=self.seed,
            epoch=self.epoch,
            block_rows=self.dataset.block_rows,
            window_blocks=self.window_blocks,
        )
        return iter(order.tolist())


def lay_out(rows: Sequence[RowTokens], layout: Layout, *, pad_to_multiple_of: int = 1) -> Lines:
    """Lay the tokens of some rows out as lines.

    Args:
      rows: at least one.
      layout: see the module.
      pad_to_multiple_of: lengthen the lines to a multiple of this.
    """
    row_offsets = np.concatenate([[0], np.cumsum([len(row.tokens) for row in rows])]).astype(np.int64)
    tokens_N = np.concatenate([row.tokens for row in rows])
    segments_N = segment_ids(np.concatenate([row.document_start for row in rows]), row_offsets)
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
    lines = lay_out(rows, layout, pad_to_multiple_of=pad_to_multiple_of)
    tokens_N = np.concatenate([row.tokens for row in rows])
    positions_T = target_positions(np.concatenate([row.supervised for row in rows]))
    read = [
        name for name in OPTIONAL_FIELDS if all(getattr(row.targets, name, np.zeros((1, 0))).shape[1] for row in rows)
    ]
    scales = ["hidden_scale"] if "hidden" in read else []
    return {
        "input_ids": torch.from_numpy(lines.input_ids),
        "position_ids": torch.from_numpy(lines.position_ids),
        "target_index": torch.from_numpy(lines.slots[positions_T]),
        "labels": torch.from_numpy(next_tokens(tokens_N, positions_T)),
        "segments": torch.from_numpy(lines.segments[positions_T]),
        "rows": torch.from_numpy(np.repeat([row.row for row in rows], [len(row.targets) for row in rows])),
        "teacher": {
            name: torch.from_numpy(np.concatenate([getattr(row.targets, name) for row in rows]))
            for name in [*TARGET_FIELDS, *read, *scales]
        },
    }


def teacher_terms(batch: Batch, vocab_size: int, temperatures: Sequence[float] = ()) -> TeacherTerms:
    """The targets of a batch as the terms that losses take: ids widened to int64.

    Args:
      batch: of ``collate``, on any device.
      vocab_size: V.
      temperatures: what the columns of ``log_z_tail`` are about, where it was read.
    """
    fields: dict[str, Tensor] = batch["teacher"]
    wanted = {name: fields[name] for name in (*TARGET_FIELDS, "log_z_tail") if name in fields}
    return TeacherTerms(
        vocab_size=vocab_size,
        next_tokens=batch["labels"],
        temperatures=tuple(temperatures) if "log_z_tail" in wanted else (),
        **{name: value if value.is_floating_point() else value.long() for name, value in wanted.items()},
    )
