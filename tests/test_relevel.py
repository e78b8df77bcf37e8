"""Decoded log-probs find their levels again.

Legend: T positions, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_fixtures import log_softmax, summarise
from strategies import Distributions, distributions, logits_of

from tailcache.storage.codec import Codec, logprob_levels, vocabulary_order
from tailcache.storage.relevel import on_levels


@given(distributions(max_vocab=300), st.data())
@settings(deadline=None, max_examples=80)
def test_storing_again_changes_nothing(made: Distributions, data: st.DataObject) -> None:
    targets, _ = summarise(made.logprobs, made.next_tokens, made.top_k, 0)
    if (targets.log_tail >= 0).any() or (targets.log_tail > -1e-6).any():
        return  # no head to speak of
    levels = logprob_levels(made.top_k)
    codec = Codec(vocabulary_order(targets.token_ids, np.zeros(made.logprobs.shape[1], np.int64)), levels)
    once = codec.decode(codec.encode(targets))
    again = codec.encode(replace(once, logprobs=on_levels(once.logprobs, levels)))
    twice = codec.decode(again)
    np.testing.assert_array_equal(twice.token_ids, once.token_ids)
    np.testing.assert_allclose(twice.logprobs, once.logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "zipf", "peaked"])
def test_without_it_some_would_move(kind: str) -> None:
    """Many positions: every level is found, and plain rounding would miss some of them."""
    logits = np.random.default_rng(0).normal(size=(3000, 500)) * 4
    logprobs = log_softmax(logits if kind == "normal" else logits_of(kind, 3000, 500, seed=1))
    targets, _ = summarise(logprobs, np.zeros(3000, np.int64), 32, 0)
    levels = logprob_levels(32)
    codec = Codec(np.arange(500, dtype=np.uint32), levels)
    stored = codec.encode(targets)
    once = codec.decode(stored)
    again = codec.encode(replace(once, logprobs=on_levels(once.logprobs, levels)))
    for name, values in stored.items():
        np.testing.assert_array_equal(again[name], values)
    if kind == "normal":
        assert (codec.encode(once)["logprob_gaps"] != stored["logprob_gaps"]).any()


def test_what_came_from_other_levels_stays_as_it_is() -> None:
    logprobs = log_softmax(np.random.default_rng(0).normal(size=(50, 90))).astype(np.float32)
    kept = -np.sort(-logprobs, axis=1)[:, :20]
    found = on_levels(kept, logprob_levels(20))
    assert (found == kept).all(axis=1).mean() > 0.9
