"""Held-out figures of the study's students, from the teacher's whole distribution: nothing is estimated from a cache.

Everything is kept as sums over the positions of each held-out module, so that means, Full-ECE and their intervals over
modules follow for any student, and differences of students are paired. The code shares nothing with the losses or with
``tailcache evaluate``: plain logits, plain softmax, float64 sums.

Legend: C modules (one row each), B rows, L their length, t positions of a row that have a next token, V vocabulary,
D hidden width, M bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailcache.scripts.study_settings import StudySize
from tailcache.storage.errors import DataError

__all__ = ["BINS", "SUMS", "HeldOut", "full_ece", "held_out_rows", "measure", "module_sums"]

BINS = 20
"""Of Full-ECE."""

SUMS = ("positions", "cross_entropy", "kl", "reverse_kl", "top1_agreement", "student_tail", "mismatch")
"""What is summed over a module's positions: 1; -log q_y; KL(p||q); KL(q||p); whether the most likely tokens are the
same; the student's mass off the teacher's 10 most likely tokens; whether the student's most likely token is not the
next one of the text. Nats and probabilities."""

TAIL_K = 10


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The rows everything is measured on.

    Attributes:
      rows: C of [L] token ids, one per module.
      hidden: C of [L - 1, D] float32, the teacher's last hidden states at the positions that have a next token.
      teacher: from hidden states to float32 logits [t, V].
    """

    rows: list[Tensor]
    hidden: list[Tensor]
    teacher: Any

    def some(self, step: int) -> HeldOut:
        """Every so many-th row."""
        return HeldOut(rows=self.rows[::step], hidden=self.hidden[::step], teacher=self.teacher)


def held_out_rows(encoded: Sequence[tuple[str, NDArray[np.int64]]], study: StudySize) -> list[NDArray[np.int64]]:
    """The beginning of each held-out module, until there are enough tokens.

    Args:
      encoded: (module, ids) of the held-out documents.
      study: says how long a row is and how many tokens there shall be.

    Returns:
      One row of at least 2 ids per module.

    Raises:
      DataError: there are fewer than 10 modules.
    """
    rows: list[NDArray[np.int64]] = []
    seen: set[str] = set()
    for module, ids in encoded:
        if module not in seen and len(ids) >= 2 and sum(map(len, rows)) < study.held_out_tokens:
            seen.add(module)
            rows.append(ids[: study.context_length])
    if len(rows) < 10:
        raise DataError(f"held-out text: expected at least 10 modules for intervals over them, found {len(rows)}")
    return rows


@torch.inference_mode()
def measure(model: Any, held_out: HeldOut, *, calibration: bool) -> dict[str, NDArray[np.float64]]:
    """The sums of every module for a student (or the teacher's own, for a model that is the teacher).

    Args:
      model: a transformers causal language model in float32, in evaluation mode.
      held_out: the rows and the teacher.
      calibration: also sum by bin, for Full-ECE.

    Returns:
      "sums" [C, len(SUMS)]; with `calibration` also "hits" and "mass" [C, M], see ``module_sums``.

    Cost: the student's forward and head, the teacher's head, and some ten passes over [t, V] of each row.
    """
    found: list[dict[str, Tensor]] = []
    for row_L, hidden_tD in zip(held_out.rows, held_out.hidden, strict=True):
        q_logits_tV = model(input_ids=row_L[None], use_cache=False).logits[0, :-1].float()
        p_logits_tV = held_out.teacher(hidden_tD)[:, : q_logits_tV.shape[-1]]
        found.append(module_sums(p_logits_tV, q_logits_tV, row_L[1:], calibration=calibration))
    return {name: torch.stack([each[name] for each in found]).cpu().numpy() for name in found[0]}


def module_sums(p_logits_tV: Tensor, q_logits_tV: Tensor, next_t: Tensor, *, calibration: bool) -> dict[str, Tensor]:
    """What the positions of one module add up to.

    Args:
      p_logits_tV: the teacher's logits, float32 or float64.
      q_logits_tV: the student's.
      next_t: the true next tokens.
      calibration: also by bin.

    Returns:
      "sums" [len(SUMS)] float64. With `calibration`, by the bin that the student's probability of an id falls in, over
      all ids of all positions: "mass" [M], the sum of the probabilities, and "hits" [M], how many of these ids were the
      next token.
    """
    log_p_tV, log_q_tV = p_logits_tV.log_softmax(-1), q_logits_tV.log_softmax(-1)
    p_tV, q_tV = log_p_tV.exp(), log_q_tV.exp()
    log_ratio_tV = log_p_tV - log_q_tV
    best_t = log_q_tV.argmax(-1)
    head_tK = log_p_tV.topk(min(TAIL_K, log_p_tV.shape[-1])).indices
    columns = {
        "positions": torch.ones_like(best_t),
        "cross_entropy": -log_q_tV.gather(-1, next_t[:, None])[:, 0],
        "kl": (p_tV * log_ratio_tV).sum(-1),
        "reverse_kl": -(q_tV * log_ratio_tV).sum(-1),
        "top1_agreement": best_t == head_tK[:, 0],
        "student_tail": 1 - q_tV.gather(-1, head_tK).double().sum(-1),
        "mismatch": best_t != next_t,
    }
    found = {"sums": torch.stack([columns[name].double().sum() for name in SUMS])}
    if calibration:
        found["mass"], found["hits"] = _by_bin(q_tV, next_t)
    return found


def _by_bin(q_tV: Tensor, next_t: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and hits of each bin (m / M, (m + 1) / M]; the first also holds 0."""
    large = q_tV > 1 / BINS
    values = q_tV[large].double()
    bins = ((values * BINS).ceil().long() - 1).clamp(1, BINS - 1)
    mass_M = torch.zeros(BINS, dtype=torch.float64, device=q_tV.device).index_add_(0, bins, values)
    mass_M[0] = q_tV.double().sum() - mass_M.sum()
    target_t = q_tV.gather(-1, next_t[:, None])[:, 0].double()
    target_bins = ((target_t * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    hits_M = torch.bincount(target_bins, minlength=BINS).double()
    return mass_M, hits_M


def full_ece(hits_M: NDArray[np.float64], mass_M: NDArray[np.float64], positions: Any) -> Any:
    """Full-ECE: the sum over bins of |hits - mass|, over the number of positions.

    Args:
      hits_M: [..., M].
      mass_M: [..., M].
      positions: [...].

    Source: arXiv 2406.11345; docs/losses.md has the same sum.
    """
    return np.abs(hits_M - mass_M).sum(-1) / positions
