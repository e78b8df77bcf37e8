"""Examples as Arrow columns, in the convention of Axolotl's distillation trainer, and further columns of our own.

One entry per token in every list. Entry ``j`` of a ``target_`` column is the teacher's distribution *after* reading
token ``j``, about token ``j + 1``: what a causal model's logits at ``j`` are about, so that logits and targets are
compared without any shift. ``labels`` are not shifted, as everywhere in `transformers`: ``labels[j + 1]`` is the token
that entry ``j`` is about, or -100 where that one is not to be predicted, and exactly there ``target_mask[j]`` is 0. The
last entry of an example never has a target. (Axolotl calls this alignment ``current``.)

Where there is no target, ids are 0, log-probabilities -1e9 (not -inf, of which 0 times would be NaN) and other numbers
0; the mask says so.

Legend: N tokens, E examples, T target positions, K kept tokens, m samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tailcache.storage.alignment import segment_ids, target_positions
from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Rows

__all__ = ["AXOLOTL_COLUMNS", "NO_LOGPROB", "ExportColumns"]

AXOLOTL_COLUMNS = ("input_ids", "attention_mask", "labels", "target_token_ids", "target_logprobs", "target_mask")
NO_LOGPROB = -1e9
"""What stands for a log-probability where there is no target."""
_IGNORED_LABEL = -100
_SCALARS = ("log_tail", "tail_entropy", "log_target", "log_not_target")


@dataclass(frozen=True, kw_only=True)
class ExportColumns:
    """Which columns there are, and how to make them."""

    unit: Literal["document", "row"]
    top_k: int
    num_samples: int
    num_temperatures: int
    extras: bool

    def schema(self) -> pa.Schema:
        """Names and types, in order."""
        ids, flags, floats = pa.list_(pa.int32()), pa.list_(pa.int8()), pa.list_(pa.float32())
        names: dict[str, pa.DataType] = {
            "input_ids": ids,
            "attention_mask": flags,
            "labels": ids,
            "target_token_ids": pa.list_(ids),
            "target_logprobs": pa.list_(floats),
            "target_mask": pa.list_(flags),
        }
        if self.unit == "row":
            names["position_ids"] = ids
        if self.extras:
            names |= dict.fromkeys(_SCALARS, floats)
            if self.num_samples:
                names["tail_samples"] = pa.list_(ids)
            if self.num_temperatures:
                names["log_z_tail"] = pa.list_(floats)
            names |= {"document_start": pa.list_(pa.bool_()), "row": pa.int64(), "offset": pa.int32()}
        return pa.schema(list(names.items()))

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes in memory, all its columns together."""
        each = 9 + 9 * self.top_k + 4 * (self.unit == "row")
        return each + self.extras * (16 + 1 + 4 * (self.num_samples + self.num_temperatures))

    def batch(self, rows: Rows, targets: Targets) -> tuple[pa.RecordBatch, NDArray[np.bool_]]:
        """The examples of some whole rows.

        Args:
          rows: rows of the corpus.
          targets: of all their target positions, with K and m as these columns have them.

        Returns:
          The examples in the corpus' order, and [E] bool: held out.
        """
        starts = rows.offsets[:-1]
        if self.unit == "document":
            segments = segment_ids(rows.document_start, rows.offsets)
            starts = np.flatnonzero(np.diff(segments, prepend=-1)) if len(segments) else starts
        offsets = np.append(starts, rows.offsets[-1]).astype(np.int32)
        row_of = np.searchsorted(rows.offsets, starts, side="right") - 1
        positions, num = target_positions(rows.supervised), len(rows.tokens)
        labels = np.full(num, _IGNORED_LABEL, np.int32)
        labels[positions + 1] = rows.tokens[positions + 1]
        columns: dict[str, pa.Array] = {
            "input_ids": _lists(offsets, rows.tokens.astype(np.int32)),
            "attention_mask": _lists(offsets, np.ones(num, np.int8)),
            "labels": _lists(offsets, labels),
            "target_token_ids": _tables(offsets, _spread(targets.token_ids, positions, num)),
            "target_logprobs": _tables(offsets, _spread(targets.logprobs, positions, num, NO_LOGPROB)),
            "target_mask": _tables(offsets, np.repeat(rows.supervised.astype(np.int8)[:, None], self.top_k, axis=1)),
        }
        if self.unit == "row":
            segments = segment_ids(rows.document_start, rows.offsets)
            first = np.flatnonzero(np.diff(segments, prepend=-1))
            columns["position_ids"] = _lists(offsets, (np.arange(num) - first[segments]).astype(np.int32))
        if self.extras:
            for name in _SCALARS:
                columns[name] = _lists(offsets, _spread(getattr(targets, name), positions, num))
            if self.num_samples:
                columns["tail_samples"] = _tables(offsets, _spread(targets.tail_samples, positions, num))
            if self.num_temperatures:
                columns["log_z_tail"] = _tables(offsets, _spread(targets.log_z_tail, positions, num))
            columns["document_start"] = _lists(offsets, rows.document_start)
            columns["row"] = pa.array(rows.row_indices[row_of])
            columns["offset"] = pa.array((starts - rows.offsets[row_of]).astype(np.int32))
        schema = self.schema()
        return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema), rows.held_out[
            row_of
        ]


def _spread(values: NDArray[Any], positions: NDArray[np.int64], num: int, missing: float = 0) -> NDArray[Any]:
    """[T, …] to [N, …]: each target at its position."""
    spread = np.full((num, *values.shape[1:]), missing, values.dtype)
    spread[positions] = values
    return spread


def _lists(offsets: NDArray[np.int32], values: NDArray[Any]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _tables(offsets: NDArray[np.int32], values: NDArray[Any]) -> pa.Array:
    """Lists of lists: each entry has all columns of its token."""
    inner = _lists(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32), values.ravel())
    return pa.ListArray.from_arrays(pa.array(offsets), inner)
