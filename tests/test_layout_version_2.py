"""What version 2 added to a layout: said in the attributes, checked when read, refused where it makes no sense."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storage_fixtures import make_corpus, make_exact

from tailcache.storage.errors import ConfigError, FormatError
from tailcache.storage.layout import Layout
from tailcache.storage.reader import open_cache
from tailcache.storage.targets import plan_layout
from tailcache.storage.verify import verify


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    corpus = make_corpus(tmp_path_factory.mktemp("cache"))
    return plan_layout(corpus, top_k=5, num_samples=3, shard_positions=20, kl_budget=1e-4, classes=(3, 4))


def test_attributes_say_it(layout: Layout) -> None:
    attributes = layout.attributes()
    expected = {"format_version": 2, "num_classes": 3, "class_size": 4, "scalar_steps": 512, "kl_budget": 1e-4}
    assert expected.items() <= attributes.items()
    assert Layout.from_attributes(attributes, "here") == layout
    assert layout.learned == ("vocabulary_order", "logprob_levels", "class_tokens")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", 0), ("num_classes", 257), ("num_classes", 1), ("num_classes", 2.0), ("num_classes", None),
        ("class_size", 0), ("class_size", 38), ("class_size", -1), ("scalar_steps", 0), ("scalar_steps", 1 << 17),
        ("kl_budget", 0), ("kl_budget", 1), ("kl_budget", float("nan")), ("kl_budget", "1e-5"), ("kl_budget", True),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(layout: Layout, key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=r"^here: .*expected.*found"):
        Layout.from_attributes({**layout.attributes(), key: value}, "here")


@pytest.mark.parametrize("kl_budget", [0.0, -1.0, 1e-2, float("nan"), float("inf")])
def test_a_budget_out_of_range_is_refused(tmp_path: Path, kl_budget: float) -> None:
    with pytest.raises(ConfigError, match=r"kl_budget: expected a number of nats from 1e-08 to 0\.001, found"):
        plan_layout(make_corpus(tmp_path), top_k=5, num_samples=3, shard_positions=20, kl_budget=kl_budget)


@pytest.mark.parametrize("kl_budget", [1e-5, 1e-4, 1e-3])
def test_a_coarser_cache_is_whole_and_as_good_as_it_says(tmp_path: Path, kl_budget: float) -> None:
    corpus = make_corpus(tmp_path)
    exact = make_exact(corpus, shard_positions=20, kl_budget=kl_budget, classes=(3, 4), temperatures=(2.0,))
    exact.write("t")
    assert verify(tmp_path) == []
    found = open_cache(tmp_path).teacher("t").rows(0, corpus.num_rows)
    own = np.take_along_axis(exact.logprobs, found.token_ids.astype(np.int64), axis=1)
    tail = exact.targets.log_tail.astype(np.float64)
    kl = (np.exp(own) * (own - found.logprobs)).sum(axis=1) + np.exp(tail) * (tail - found.log_tail)
    assert kl.mean() <= kl_budget
    assert kl.max() <= 8 * kl_budget
