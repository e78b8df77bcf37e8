"""The off-by-one, alone: which positions have a target, and which token that target is about.

A corpus is a flat array of tokens cut into rows, and rows into documents. **Target position** ``t`` means:
the teacher's distribution after reading the tokens ``<= t`` of its own document within the row, about token
``t + 1``. A position therefore has a target only if token ``t + 1`` exists in the same row, belongs to the
same document and is supervised. The last token of a row or of a document has none.

Capture, training and comparison all ask this module and nothing else, so that a student's logits, a
teacher's targets and the label they are about cannot drift apart.

Legend: N tokens, R rows, T target positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.errors import DataError

__all__ = ["next_tokens", "segment_ids", "supervise_next", "target_positions"]


def supervise_next(
    token_wanted_N: NDArray[np.bool_], row_offsets: NDArray[np.int64], document_start_N: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Turn "this token is to be learnt" into "this position has a target", the shift done once, here.

    Args:
      token_wanted_N: [N] bool; token i is to be predicted (for labels in the Hugging Face convention:
        ``labels != -100``, before any shift).
      row_offsets: [R + 1] int64, where each row starts, from 0 to N.
      document_start_N: [N] bool; token i is the first of its document. The first token of a row that
        continues a long document is not a start.

    Returns:
      [N] bool; position t has a target: token t + 1 is wanted, in the same row and in the same document.
    """
    if not len(token_wanted_N) == len(document_start_N) == int(row_offsets[-1]):
        raise DataError(
            f"alignment: expected one flag per token, {int(row_offsets[-1])} of each; found "
            f"{len(token_wanted_N)} supervision flags and {len(document_start_N)} document flags"
        )
    supervised_N = np.zeros(len(token_wanted_N), dtype=np.bool_)
    supervised_N[:-1] = token_wanted_N[1:] & ~document_start_N[1:]
    last_of_row = row_offsets[1:][np.diff(row_offsets) > 0] - 1
    supervised_N[last_of_row] = False
    return supervised_N


def target_positions(supervised_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The positions that have a target, ascending: [T] int64 indices into the flat tokens."""
    return np.flatnonzero(supervised_N).astype(np.int64, copy=False)


def next_tokens(tokens_N: NDArray[np.integer], positions_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """The true next token of each target position: [T] int64 token ids."""
    return tokens_N[positions_T + 1].astype(np.int64)


def segment_ids(document_start_N: NDArray[np.bool_], row_offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the segments (a document's part within one row) from 0, in order: [N] int64.

    A segment is what attention may not cross, and what "sequence" means in a loss: a document that spans
    two rows is two segments.
    """
    starts_N = document_start_N.copy()
    starts_N[row_offsets[:-1][np.diff(row_offsets) > 0]] = True
    return np.cumsum(starts_N, dtype=np.int64) - 1
