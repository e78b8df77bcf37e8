"""The numbers that stored codes stand for: levels of log-probabilities, ranks of tokens, rounded floats.

Legend: K kept tokens, V vocabulary, L levels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["KL_BUDGET", "MAX_STEP", "logprob_levels", "max_step", "round_mantissa", "scalar_steps", "vocabulary_order"]

KL_BUDGET = 1e-5
"""Nats per position that storing a distribution may cost on average, at any K and for any distribution; the default."""
MAX_STEP = 1 / 4
"""Nats; the widest level step at probabilities above exp(-64), at the default budget and below it."""
_MARGIN, _COARSE_MARGIN = 0.97, 0.85
"""Of the budget, what errors that are spread evenly over their steps would cost. The rest is for float32; and, where
steps are so wide that a distribution's tokens share few of them, for errors that are not."""
_KEPT_MANTISSA = 13


def max_step(kl_budget: float) -> float:
    """Nats; the widest level step at probabilities above exp(-64): 1/4, and twice as wide for ten times the budget.

    Never more than 1, so that a token's log-probability is never off by more than 1/2.
    """
    return min(1.0, MAX_STEP * math.pow(2.0, max(0.0, math.log10(kl_budget / KL_BUDGET))))


def scalar_steps(kl_budget: float) -> int:
    """Steps of the stored scalars to a nat: 1024, and half as many for ten times the default budget."""
    return int(1 << (10 - round(max(0.0, math.log10(kl_budget / KL_BUDGET)))))


def _step(top_k: int, kl_budget: float) -> float:
    """h, the step of sqrt(p)."""
    margin = _MARGIN if kl_budget <= KL_BUDGET else _COARSE_MARGIN
    return math.sqrt(6 * margin * kl_budget / top_k)


def logprob_levels(top_k: int, kl_budget: float = KL_BUDGET) -> NDArray[np.float32]:
    """The levels of -log p for a given K: increasing from 0, [L] float32, nats.

    Cost: once per teacher. At the default budget, L is about 22,000 for K up to 64 and grows as the square root of K.
    """
    h, widest = _step(top_k, kl_budget), max_step(kl_budget)
    root = 1.0 - h * np.arange(int((1 - 2 * h / widest) / h) + 1) if 2 * h < widest else np.ones(1)
    even = -2.0 * np.log(root)
    capped = even[-1] + widest * np.arange(1, int((64.0 - even[-1]) / widest) + 1)
    largest = float(np.finfo(np.float32).max)
    count = int(np.floor(np.log(largest / capped[-1]) / np.log1p(1 / 256)))
    grown = capped[-1] * (1 + 1 / 256) ** np.arange(1, count + 1)
    return np.concatenate([even, capped, grown, [largest]]).astype(np.float32)


def vocabulary_order(token_ids: NDArray[np.integer], token_counts: NDArray[np.integer]) -> NDArray[np.uint32]:
    """Order the vocabulary by how often each token is seen, so that frequent ones get small ranks.

    Args:
      token_ids: top-K ids of some positions, any shape.
      token_counts: [V] occurrences in the corpus; they order the tokens that the former do not.

    Returns:
      [V] uint32, the token of each rank.
    """
    vocab_size = len(token_counts)
    kept = np.bincount(token_ids.ravel(), minlength=vocab_size)
    return np.lexsort((np.arange(vocab_size), -token_counts, -kept)).astype(np.uint32)


def round_mantissa(values: NDArray[np.float32], kept: int = _KEPT_MANTISSA) -> NDArray[np.float32]:
    """Round float32 to fewer bits of mantissa, to nearest even; infinities and zeros stay as they are."""
    drop = 23 - kept
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    rounded = (bits + half + ((bits >> np.uint32(drop)) & np.uint32(1))) & np.uint32((0xFFFFFFFF << drop) & 0xFFFFFFFF)
    return np.where(np.isfinite(values), rounded.view(np.float32), values).astype(np.float32)
