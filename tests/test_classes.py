"""Classes of positions: found where they are, the same every time, never at the cost of a token.

Legend: T positions, K kept tokens, V vocabulary, C classes, M tokens of a class.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from tailcache.storage.classes import choose_classes, class_codes, class_costs, learn_classes, plan_classes

V, TOPICS = 1200, 4


def topical(num: int, seed: int, top_k: int = 10) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """[T, K] ids, most from the position's own topic, and the topics; frequent tokens are the same everywhere."""
    generator = np.random.default_rng(seed)
    topic = generator.integers(0, TOPICS, num)
    own = 100 + 275 * topic[:, None] + generator.permuted(np.tile(np.arange(275), (num, 1)), axis=1)[:, : top_k - 2]
    common = generator.permuted(np.tile(np.arange(100), (num, 1)), axis=1)[:, :2]
    ids = np.concatenate([own[:, :1], common, own[:, 1:]], axis=1)
    return ids.astype(np.int32), topic


def rank(ids: NDArray[np.int32]) -> NDArray[np.int64]:
    order = np.argsort(-np.bincount(ids.ravel(), minlength=V), kind="stable")
    ranks = np.empty(V, np.int64)
    ranks[order] = np.arange(V)
    return ranks


def test_topics_are_found_and_codes_get_smaller() -> None:
    ids, _ = topical(4000, 0)
    lists = learn_classes(ids, V, 8, 300)
    assert lists.shape == (8, 300)
    assert lists.dtype == np.uint32
    assert all(len(set(row)) == 300 for row in lists.tolist())
    others, topic = topical(1000, 1)
    ranks = rank(ids)
    chosen = choose_classes(others, class_costs(ranks, lists))
    assert chosen.dtype == np.uint8
    for one in range(TOPICS):  # positions of a topic are in classes in which there are nearly no others
        classes = np.unique(chosen[topic == one])
        assert np.isin(chosen, classes)[topic != one].mean() < 0.05
    codes = np.stack(
        [class_codes(ranks, lists.astype(np.int64), c)[row] for c, row in zip(chosen, others, strict=True)]
    )
    assert np.log2(1.0 + codes).mean() < np.log2(1.0 + ranks[others]).mean() - 1, (
        "a bit for each of two halvings, less ..."
    )


def test_every_token_has_a_code_of_its_own_in_every_class() -> None:
    ids, _ = topical(500, 0)
    lists = learn_classes(ids, V, 3, 50).astype(np.int64)
    for c in range(3):
        codes = class_codes(rank(ids), lists, c)
        assert len(set(codes.tolist())) == V
        assert codes.min() == 0
        assert codes.max() < V + 50


@pytest.mark.parametrize("num", [1, 5, 300])
def test_the_same_positions_give_the_same_lists(num: int) -> None:
    """Also with fewer positions, first tokens or tokens than there are classes or places."""
    ids, _ = topical(num, 3)
    lists = learn_classes(ids, V, 16, 200)
    np.testing.assert_array_equal(lists, learn_classes(ids.copy(order="F"), V, 16, 200))
    assert all(len(set(row)) == 200 for row in lists.tolist())
    assert lists.max() < V


@pytest.mark.parametrize(
    ("num_positions", "vocab_size", "top_k", "expected"),
    [
        (1_000, 49_152, 50, (1, 0)),
        (47_000, 49_152, 50, (128, 512)),
        (200_000, 49_152, 50, (256, 1024)),
        (10**9, 49_152, 50, (256, 1024)),
        (10**9, 49_152, 1, (256, 1024)),
        (10**9, 100, 50, (1, 0)),
        (10**9, 65_024, 50, (256, 512)),  # as many as leave codes 16 bits
        (10**9, 65_536, 50, (256, 1024)),
        (10**9, 151_936, 50, (256, 1024)),
    ],
)
def test_classes_are_planned_by_what_they_cost(
    num_positions: int, vocab_size: int, top_k: int, expected: tuple[int, int]
) -> None:
    first = min(num_positions, 131_072)
    found = plan_classes(vocab_size=vocab_size, top_k=top_k, num_positions=num_positions, first_positions=first)
    assert found == expected


def test_a_small_first_shard_has_few_classes() -> None:
    found = plan_classes(vocab_size=49_152, top_k=50, num_positions=10**6, first_positions=4096)
    assert found == (16, 1024)
