"""Cut rows into segments and batch them, so that the teacher never sees two documents at once.

A segment is a document's part within one row, up to the last position that has a target. Segments of a shard are
sorted by length before they are batched, so padding is small; each remembers which targets of the shard are its own.
Running segments instead of packed rows makes document boundaries hold for every kind of attention and recurrence,
and wastes nothing on attention across documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.alignment import next_tokens, segment_ids, target_positions
from tailcache.storage.corpus import Rows

__all__ = ["Batch", "batch_segments"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some segments of one shard, padded on the right.

    Legend: B segments, L length of the longest, T targets.
    """

    input_ids: NDArray[np.int64]
    """[B, L] token ids; after its own tokens a segment is padded with its last one, so that nothing foreign is read."""
    segment: NDArray[np.int64]
    """[T] which of the B segments each target is in."""
    place: NDArray[np.int64]
    """[T] its position within the segment."""
    next_token: NDArray[np.int64]
    """[T] the true next token."""
    target: NDArray[np.int64]
    """[T] its index among the shard's targets."""

    @property
    def num_tokens(self) -> int:
        """Positions the model computes, padding included."""
        return self.input_ids.size


def batch_segments(rows: Rows, batch_positions: int) -> Iterator[Batch]:
    """Batches over all segments of some rows that have a target.

    Args:
      rows: whole rows, usually a shard's.
      batch_positions: positions of a batch at most, padding included; a longer segment is a batch of its own.

    Yields:
      Batches, longest segments first (so that a batch that does not fit in memory fails at once). Deterministic.
    """
    positions_T = target_positions(rows.supervised)
    if not len(positions_T):
        return
    next_T = next_tokens(rows.tokens, positions_T)
    segments_N = segment_ids(rows.document_start, rows.offsets)
    starts = np.flatnonzero(np.diff(segments_N, prepend=-1))
    segment_T = segments_N[positions_T]
    numbers, first_T, counts = np.unique(segment_T, return_index=True, return_counts=True)
    lengths = positions_T[first_T + counts - 1] - starts[numbers] + 1
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        longest = int(lengths[order[begin]])
        end = min(len(order), begin + max(1, batch_positions // longest))
        chosen = order[begin:end]
        input_ids = np.zeros((len(chosen), longest), dtype=np.int64)
        segment, place, target = [], [], []
        for b, s in enumerate(chosen):
            start, length = starts[numbers[s]], lengths[s]
            input_ids[b, :length] = rows.tokens[start : start + length]
            input_ids[b, length:] = input_ids[b, length - 1]
            own = np.arange(first_T[s], first_T[s] + counts[s])
            segment.append(np.full(len(own), b))
            place.append(positions_T[own] - start)
            target.append(own)
        targets = np.concatenate(target)
        yield Batch(
            input_ids=input_ids,
            segment=np.concatenate(segment),
            place=np.concatenate(place),
            next_token=next_T[targets],
            target=targets,
        )
        begin = end
