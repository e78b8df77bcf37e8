"""Classes of positions, each with its own list of likely tokens, learned from the first shard.

What tokens a teacher finds likely depends on the kind of place: after "in the" it is nouns, inside a number digits.
Positions are sorted into C classes so that a token's place in its class' list of M tokens is a much smaller number than
its place in one list for all: a mixture of unigram models, fitted by hard expectation maximisation. The lists are all a
reader needs, and all a writer needs to choose a class for a further position: that for which the places are small.

Legend: T positions, K kept tokens, V vocabulary, C classes, M tokens of a class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["choose_classes", "class_codes", "class_costs", "learn_classes", "plan_classes"]

MAX_CLASSES = 256
_SAMPLE = 32_768  # positions that the classes are fitted to; the lists are counted over all of them
_ROUNDS = 8
_PRIOR = 200.0  # occurrences that the overall frequencies count for in every class
_BLOCK = 256
_PER_ENTRY = 40  # kept tokens per entry of the lists, from which on a longer list takes more bytes than it saves
_SHORT, _LONG, _LONG_FROM = 512, 1024, 150_000


def plan_classes(*, vocab_size: int, top_k: int, num_positions: int, first_positions: int) -> tuple[int, int]:
    """How many classes, and tokens in each, pay for themselves.

    Args:
      vocab_size: V.
      top_k: K.
      num_positions: of the whole corpus: the lists are stored once.
      first_positions: of the first shard, from which they are learned.

    Returns:
      C and M; 1 and 0 where the corpus or the vocabulary is too small.
    """
    size = min(_LONG if num_positions >= _LONG_FROM else _SHORT, vocab_size // 4)
    if size < 32 or top_k * num_positions < 16 * _PER_ENTRY * size:
        return 1, 0
    if vocab_size <= 1 << 16 < vocab_size + size and vocab_size <= (1 << 16) - 64:
        size = (1 << 16) - vocab_size  # codes of 16 bits
    wanted = min(top_k * num_positions / _PER_ENTRY / size, first_positions / 256, MAX_CLASSES)
    return (1 << round(np.log2(wanted)), size) if wanted >= 4 else (1, 0)


def learn_classes(
    token_ids: NDArray[np.int32], vocab_size: int, num_classes: int, class_size: int
) -> NDArray[np.uint32]:
    """Fit classes to some positions. The same input gives the same lists.

    Args:
      token_ids: [T, K] the most likely tokens of some positions, most likely first.
      vocab_size: V.
      num_classes: C.
      class_size: M, at most V.

    Returns:
      [C, M] uint32, each class' most frequent tokens, most frequent first.

    Cost: K x C x min(T, 32,768) x 8 additions, and [V', C] float32, V' being the tokens that occur.
    """
    counts = np.bincount(token_ids.ravel(), minlength=vocab_size).astype(np.float64)
    seen = np.flatnonzero(counts)
    place = np.zeros(vocab_size, np.int64)
    place[seen] = np.arange(len(seen))
    overall = (counts[seen] / max(1.0, counts.sum())).astype(np.float32)
    spread = np.unique(np.linspace(0, len(token_ids) - 1, min(_SAMPLE, len(token_ids))).astype(np.int64))
    sample = place[token_ids[spread]]
    # To begin with, a class each for the most frequent first tokens; positions with another one have to wait.
    first = np.bincount(sample[:, 0], minlength=len(seen)) if len(sample) else np.zeros(len(seen), np.int64)
    label = np.full(len(seen), -1)
    leaders = np.argsort(-first, kind="stable")[:num_classes]
    label[leaders] = np.arange(len(leaders))
    chosen = label[sample[:, 0]]
    bits = _bits(sample[chosen >= 0], chosen[chosen >= 0], overall, num_classes)
    for _ in range(_ROUNDS):
        chosen = _cheapest(sample, bits)
        bits = _bits(sample, chosen, overall, num_classes)
    every = place[token_ids]
    bits = _bits(every, _cheapest(every, bits), overall, num_classes)
    lists = np.empty((num_classes, class_size), np.uint32)
    others = np.setdiff1d(np.arange(vocab_size), seen, assume_unique=True)
    for c in range(num_classes):
        likely = seen[np.argsort(bits[:, c], kind="stable")]
        lists[c] = np.concatenate([likely, others])[:class_size]
    return lists


def _bits(
    places: NDArray[np.int64], chosen: NDArray[np.int64], overall: NDArray[np.float32], num_classes: int
) -> NDArray[np.float32]:
    """[V', C] minus the binary logs of each token's share of each class, smoothed by its overall share."""
    keys = (places * num_classes + chosen[:, None]).ravel()
    counts = np.bincount(keys, minlength=len(overall) * num_classes).reshape(len(overall), num_classes)
    total = counts.sum(axis=0)
    share = (counts.astype(np.float32) + _PRIOR * overall[:, None]) / (total + _PRIOR).astype(np.float32)
    result: NDArray[np.float32] = -np.log2(share)
    return result


def _cheapest(places: NDArray[np.int64], bits: NDArray[Any]) -> NDArray[np.int64]:
    """[T] the class with the smallest sum over a position's tokens; the first of equals."""
    chosen = np.empty(len(places), np.int64)
    wide = np.float32 if bits.dtype == np.float32 else np.uint32
    for first in range(0, len(places), _BLOCK):
        part = places[first : first + _BLOCK]
        total = np.zeros((len(part), bits.shape[1]), wide)
        for k in range(part.shape[1]):
            total += bits[part[:, k]]
        chosen[first : first + _BLOCK] = total.argmin(axis=1)
    return chosen


def class_codes(order_rank: NDArray[np.int64], class_tokens: NDArray[np.integer], c: int) -> NDArray[np.int64]:
    """[V] the code of each token in class c: its place in the class' list, or M + its rank in the vocabulary order."""
    codes: NDArray[np.int64] = order_rank + class_tokens.shape[1]
    codes[class_tokens[c]] = np.arange(class_tokens.shape[1])
    return codes


def class_costs(order_rank: NDArray[np.int64], class_tokens: NDArray[np.integer]) -> NDArray[np.uint8]:
    """[V, C] about how many eighths of a bit each token takes in each class."""
    costs = np.empty((len(order_rank), len(class_tokens)), np.uint8)
    for c in range(len(class_tokens)):
        costs[:, c] = np.rint(8 * np.log2(32.0 + class_codes(order_rank, class_tokens, c)))
    return costs


def choose_classes(token_ids: NDArray[np.int32], costs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[T] the class in which the codes of a position's tokens take the fewest bytes, about."""
    return _cheapest(token_ids.astype(np.int64), costs).astype(np.uint8)
