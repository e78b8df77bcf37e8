"""Some rows through the teacher: batches of segments, logits in chunks, and what is kept of each distribution.

Legend: T positions, V vocabulary, K kept tokens, m draws, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tailcache.pipeline.draws import uniforms
from tailcache.pipeline.head import HeadSummary, summarise_logits
from tailcache.pipeline.hidden import encode_hidden
from tailcache.pipeline.segments import batch_segments
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.codec import SCALARS, Targets
from tailcache.storage.corpus import Rows
from tailcache.storage.errors import ConfigError, TeacherError
from tailcache.storage.hidden import HiddenKind, HiddenLayout

__all__ = ["capture_rows", "head_chunks"]

_CPU_HEAD_POSITIONS, _CPU_CACHE_BYTES = 256, 12 << 20
_GPU_LOGIT_BYTES = 1 << 30


@dataclass
class _Records:
    """One shard's records while they are filled in, in the order batches come."""

    targets: Targets
    tail_sum: NDArray[np.float64]

    @staticmethod
    def empty(
        num: int, top_k: int, num_samples: int, num_temperatures: int, vocab_size: int, hidden: HiddenLayout | None
    ) -> _Records:
        floats: dict[str, Any] = {name: np.full(num, np.nan, np.float32) for name in SCALARS}
        if hidden is not None:
            floats["hidden"] = np.zeros((num, hidden.width), hidden.dtype)
            floats["hidden_scale"] = np.full(num, np.nan, np.float32)
        # What is not filled stays NaN, and is found out.
        targets = Targets(
            token_ids=np.zeros((num, top_k), np.int32),
            logprobs=np.full((num, top_k), np.nan, np.float32),
            tail_samples=np.zeros((num, num_samples), np.int32),
            log_z_tail=np.full((num, num_temperatures), np.nan, np.float32),
            **floats,
        )
        return _Records(targets, np.zeros(vocab_size))

    def fill(self, where: NDArray[np.int64], summary: HeadSummary) -> None:
        for name, values in vars(summary).items():
            getattr(self.targets, name)[where] = values.cpu().numpy()

    def fill_hidden(self, where: NDArray[np.int64], hidden_TD: torch.Tensor, kind: HiddenKind) -> None:
        self.targets.hidden[where], self.targets.hidden_scale[where] = encode_hidden(hidden_TD, kind)


def head_chunks(teacher: Teacher, head_positions: int | None) -> tuple[int, int]:
    """Positions per head matmul, and per summary of its logits.

    Raises:
      ConfigError: fewer than one.
    """
    if head_positions is not None and head_positions < 1:
        raise ConfigError(f"head_positions: expected at least 1, found {head_positions}")
    row_bytes = 4 * teacher.vocab_size
    if teacher.device.type == "cpu":
        return head_positions or _CPU_HEAD_POSITIONS, max(1, _CPU_CACHE_BYTES // (2 * row_bytes))
    chunk = head_positions or max(1, _GPU_LOGIT_BYTES // row_bytes)
    return chunk, chunk


@torch.inference_mode()
def capture_rows(
    teacher: Teacher,
    rows: Rows,
    *,
    first_target: int,
    key: int,
    top_k: int,
    num_samples: int,
    temperatures: tuple[float, ...] = (),
    hidden: HiddenLayout | None = None,
    batch_positions: int,
    head_positions: int | None = None,
    numbers: NDArray[np.int64] | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Targets, NDArray[np.float64]]:
    """The teacher's targets for all target positions of some rows.

    Args:
      teacher: from ``load_teacher``.
      rows: whole rows, usually a shard's.
      first_target: index, over the whole corpus, of the rows' first target; with ``key`` it seeds the draws.
      key: from ``draw_key``.
      top_k: tokens kept.
      num_samples: draws from the tail.
      temperatures: further ones at which the tail is summed.
      hidden: how to keep the hidden states; none: not at all.
      batch_positions: positions of a batch at most.
      head_positions: positions whose logits exist at a time.
      numbers: [T] index, over the whole corpus, of each target, where rows do not follow one another; instead of
        ``first_target``.
      progress: called with the number of positions done, batch by batch.

    Returns:
      The targets in the corpus' order, and the [V] sum of their normalised tails.

    Raises:
      TeacherError: logits or hidden states that are not finite (names the row and the token).
    """
    num = int(rows.supervised.sum())
    records = _Records.empty(num, top_k, num_samples, len(temperatures), teacher.vocab_size, hidden)
    matmul, summary = head_chunks(teacher, head_positions)
    device = teacher.device
    tail_sum_V: torch.Tensor | None = None
    scratch: torch.Tensor | None = None
    for batch in batch_segments(rows, teacher.batch_limit(batch_positions)):
        hidden_BLD = teacher.hidden(torch.from_numpy(batch.input_ids).to(device))
        hidden_TD = hidden_BLD[torch.from_numpy(batch.segment).to(device), torch.from_numpy(batch.place).to(device)]
        if hidden is not None:
            records.fill_hidden(batch.target, hidden_TD, hidden.kind)
        next_T = torch.from_numpy(batch.next_token).to(device)
        number = batch.target + first_target if numbers is None else numbers[batch.target]
        uniforms_T = torch.from_numpy(uniforms(key, number)).to(device)
        for a in range(0, len(next_T), matmul):
            logits_TV = teacher.logits(hidden_TD[a : a + matmul])
            if tail_sum_V is None:
                tail_sum_V = torch.zeros(logits_TV.shape[1], dtype=torch.float64, device=device)
                scratch = torch.empty((min(summary, matmul), logits_TV.shape[1]), device=device)
            for b in range(0, len(logits_TV), summary):
                piece_TV = logits_TV[b : b + summary]
                chunk = slice(a + b, a + b + len(piece_TV))
                assert scratch is not None
                records.fill(
                    batch.target[chunk],
                    summarise_logits(
                        piece_TV,
                        next_T[chunk],
                        uniforms_T[chunk],
                        vocab_size=teacher.vocab_size,
                        top_k=top_k,
                        num_samples=num_samples,
                        temperatures=temperatures,
                        tail_sum_V=tail_sum_V,
                        scratch_TV=scratch[: len(piece_TV)],
                    ),
                )
        if progress is not None:
            progress(len(next_T))
    _check_finite(records.targets, rows)
    if tail_sum_V is not None:
        records.tail_sum += tail_sum_V[: teacher.vocab_size].cpu().numpy()
    return records.targets, records.tail_sum


def _check_finite(targets: Targets, rows: Rows) -> None:
    good = np.isfinite(targets.logprobs).all(axis=1) & np.isfinite(targets.log_target)
    good &= ~(np.isnan(targets.log_tail) | np.isnan(targets.tail_entropy) | np.isnan(targets.log_not_target))
    good &= ~np.isnan(targets.log_z_tail).any(axis=1)
    _fail_where(~good, rows, "logits for every token of the vocabulary")
    _fail_where(~np.isfinite(targets.hidden_scale), rows, "hidden states (within bfloat16's range for --hidden bf16)")


def _fail_where(bad: NDArray[np.bool_], rows: Rows, expected: str) -> None:
    if not bad.any():
        return
    position = int(np.flatnonzero(rows.supervised)[np.flatnonzero(bad)[0]])
    row = int(np.searchsorted(rows.offsets, position, side="right")) - 1
    raise TeacherError(
        f"row {rows.row_indices[row]}, token {position - rows.offsets[row]}: expected finite {expected}, found NaN, "
        f"infinity or values below -1e30 ({int(bad.sum())} such positions in this shard); try --dtype float32 or "
        "another --attn-implementation, and check the weights. Committed shards stay good"
    )
