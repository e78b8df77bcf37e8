"""Hypothesis strategies for next-token distributions.

Legend: T positions, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from storage_fixtures import log_softmax

KINDS = ("normal", "zipf", "peaked", "uniform", "two_levels", "wide", "ties")


def logits_of(kind: str, num: int, vocab_size: int, seed: int) -> NDArray[np.float64]:
    """[T, V] logits of a named shape."""
    generator = np.random.default_rng([seed, KINDS.index(kind)])
    normal = generator.normal(size=(num, vocab_size))
    if kind == "normal":
        return normal * float(generator.choice([0.1, 1.0, 3.0, 10.0]))
    if kind == "zipf":
        ranks = np.stack([generator.permutation(vocab_size) for _ in range(num)]).astype(np.float64) + 1.0
        steepness: NDArray[np.float64] = -generator.uniform(0.8, 2.5, (num, 1))
        scaled: NDArray[np.float64] = steepness * np.log(ranks)
        return scaled
    if kind == "peaked":  # all but about 1e-30 to 1e-3 of the mass on one token
        normal[np.arange(num), generator.integers(0, vocab_size, num)] += generator.uniform(7, 70, num)
        return normal
    if kind == "uniform":
        return np.zeros((num, vocab_size))
    if kind == "two_levels":
        return np.where(generator.random((num, vocab_size)) < 0.3, 2.0, -3.0)
    if kind == "wide":
        return generator.uniform(-1e4, 1e4, (num, vocab_size))
    return np.round(normal * 2) / 2


@dataclass(frozen=True)
class Distributions:
    """Some distributions, exact in float64."""

    kind: str
    top_k: int
    num_samples: int
    logprobs: NDArray[np.float64]
    """[T, V]"""
    next_tokens: NDArray[np.int64]
    """[T]"""

    def __repr__(self) -> str:
        num, vocab_size = self.logprobs.shape
        return f"Distributions({self.kind}, T={num}, V={vocab_size}, K={self.top_k}, m={self.num_samples})"


@st.composite
def distributions(draw: st.DrawFn, max_vocab: int = 400) -> Distributions:
    """Distributions of one kind, with K from 1 to V and m from 0 to 6 (0 where K = V)."""
    kind = draw(st.sampled_from(KINDS))
    vocab_size = draw(st.integers(2, max_vocab))
    top_k = draw(st.one_of(st.sampled_from([1, 2, vocab_size]), st.integers(1, vocab_size)))
    num = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    next_tokens = np.random.default_rng([seed, 99]).integers(0, vocab_size, num)
    num_samples = 0 if top_k == vocab_size or kind == "wide" else draw(st.integers(0, 6))
    return Distributions(kind, top_k, num_samples, log_softmax(logits_of(kind, num, vocab_size, seed)), next_tokens)
