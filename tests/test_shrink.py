"""Smaller K and fewer draws from what is stored, against exact float64 distributions.

Legend: T positions, V vocabulary, K kept tokens, m samples, S seeds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from storage_fixtures import log_softmax, summarise
from strategies import Distributions, distributions

from tailcache.storage.codec import Targets
from tailcache.storage.shrink import shrink, shrink_key, tail_sum
from tailcache.storage.uniforms import uniforms

Float64 = NDArray[np.float64]


def _uniforms(num: int, seed: int = 0) -> Float64:
    return uniforms(shrink_key("corpus", "teacher", seed), np.arange(num))


@given(distributions(max_vocab=60), st.data())
@settings(deadline=None, max_examples=60)
def test_what_is_known_is_exact(made: Distributions, data: st.DataObject) -> None:
    """Every K' of every K: the same numbers as if the teacher had been captured with K' at once."""
    smaller = data.draw(st.integers(1, made.top_k))
    temperatures = (2.0, 0.5)
    stored, _ = summarise(made.logprobs, made.next_tokens, made.top_k, made.num_samples, temperatures=temperatures)
    wanted, _ = summarise(made.logprobs, made.next_tokens, smaller, 0, temperatures=temperatures)
    num_samples = made.num_samples if made.num_samples else 3 * (made.top_k == len(made.logprobs[0]) > smaller)
    if made.kind == "wide":
        num_samples = 0
    found = shrink(stored, smaller, num_samples, _uniforms(len(stored)), temperatures=temperatures)
    assert found.tail_samples.shape == (len(stored), num_samples)
    np.testing.assert_array_equal(found.token_ids, wanted.token_ids)
    np.testing.assert_array_equal(found.logprobs, wanted.logprobs)
    for name in ("log_tail", "tail_entropy", "log_z_tail", "log_target", "log_not_target"):
        atol = 2e-3 if made.kind == "wide" else 3e-6  # float32 of logs of -10,000
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=3e-6, atol=atol)
    assert not (found.tail_samples[:, :, None] == found.token_ids[:, None, :]).any()


def test_nothing_is_subtracted() -> None:
    """A tail of 1e-30 beside a head of one keeps its digits, at every K'."""
    logprobs = log_softmax(np.array([[0.0, -69.0, -70.0, -71.0, -72.0, -73.0]]))
    stored, _ = summarise(logprobs, np.array([0]), 4, 0)
    for smaller in (1, 2, 3):
        found = shrink(stored, smaller, 0, _uniforms(1))
        assert found.log_tail[0] == pytest.approx(np.logaddexp.reduce(logprobs[0, smaller:]), rel=1e-6)


def _counts(draws_Tm: NDArray[np.int32], vocab_size: int) -> Float64:
    counts = np.zeros((len(draws_Tm), vocab_size))
    np.add.at(counts, (np.arange(len(draws_Tm))[:, None], draws_Tm), 1 / draws_Tm.shape[1])
    return counts


@pytest.mark.parametrize(
    ("smaller", "fewer", "full_tail"), [(8, 4, None), (3, 8, None), (3, 8, 0.25), (3, 6, 0.25), (1, 3, None)]
)
def test_what_is_linear_in_the_draws_is_unbiased(smaller: int, fewer: int, full_tail: float | None) -> None:
    """The mean over many seeds nears the exact tail as 1/sqrt(seeds), and has no bias that would remain.

    All draws are of one distribution: position s is its s-th capture, with its own numbers for both steps.
    """
    vocab_size, top_k, num, seeds = 24, 8, 8, 16384
    logprobs_V = log_softmax(np.random.default_rng(3).normal(size=(1, vocab_size)) * 1.5)
    stored = _systematic(logprobs_V, top_k, num, uniforms(17, np.arange(seeds)))
    found = shrink(stored, smaller, fewer, _uniforms(seeds, seed=5), full_tail=full_tail)
    exact_V = np.exp(logprobs_V[0])
    exact_V[found.token_ids[0]] = 0
    exact_V /= exact_V.sum()
    counts_SV = _counts(found.tail_samples, vocab_size)
    deviation = counts_SV.std(axis=0)
    error_V = np.abs(counts_SV.mean(axis=0) - exact_V)
    assert (error_V <= 4.5 * deviation / np.sqrt(seeds) + 1e-7).all()  # the head's log-probs are float32
    sizes = np.array([16, 64, 256, 1024])
    errors = [
        np.sqrt(((counts_SV.reshape(-1, size, vocab_size).mean(axis=1) - exact_V) ** 2).sum(axis=1).mean())
        for size in sizes
    ]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.08)
    # any linear estimate of a position's tail, and the sum that makes the mean tail
    np.testing.assert_allclose(tail_sum(stored, smaller, vocab_size) / seeds, exact_V, atol=5e-3)


def _systematic(logprobs_1V: Float64, top_k: int, num: int, u_T: Float64) -> Targets:
    """One distribution, captured once for each uniform number."""
    targets, _ = summarise(logprobs_1V, np.zeros(1, np.int64), top_k, 0)
    tail_V = np.exp(logprobs_1V[0])
    tail_V[targets.token_ids[0]] = 0
    upper_V = np.cumsum(tail_V) / tail_V.sum()
    points_Tm = (u_T[:, None] + np.arange(num)) / num
    samples = np.searchsorted(upper_V, np.minimum(points_Tm, 1 - 1e-12), side="right").astype(np.int32)
    return replace(targets[np.zeros(len(u_T), np.int64)], tail_samples=samples)


def test_the_first_draws_would_be_biased_and_a_subset_is_not() -> None:
    """Draws are stored sorted: taking the first of them would take the small ids."""
    logprobs_V = log_softmax(np.random.default_rng(1).normal(size=(1, 30)))
    stored = _systematic(logprobs_V, 4, 8, uniforms(3, np.arange(4000)))
    exact_V = np.exp(logprobs_V[0])
    exact_V[stored.token_ids[0]] = 0
    exact_V /= exact_V.sum()
    found = shrink(stored, 4, 2, _uniforms(4000))
    assert np.abs(_counts(found.tail_samples, 30).mean(axis=0) - exact_V).max() < 0.02
    assert np.abs(_counts(stored.tail_samples[:, :2], 30).mean(axis=0) - exact_V).max() > 0.1


def test_a_subset_is_spread_evenly_and_every_draw_has_its_turn() -> None:
    draws = np.arange(12, dtype=np.int32) + 100
    stored = _of(draws, 3000)
    found = shrink(stored, 2, 4, _uniforms(3000)).tail_samples - 100
    assert (np.diff(found, axis=1) == 3).all()
    assert set(found[:, 0].tolist()) == {0, 1, 2}
    uneven = shrink(stored, 2, 5, _uniforms(3000)).tail_samples - 100
    assert np.isin(np.diff(uneven, axis=1), (2, 3)).all()
    np.testing.assert_allclose(np.bincount(uneven.ravel()) / uneven.size, 1 / 12, atol=0.01)


def _of(draws: NDArray[np.int32], num: int) -> Targets:
    one = np.float32
    return Targets(
        token_ids=np.tile(np.arange(2, dtype=np.int32), (num, 1)),
        logprobs=np.full((num, 2), np.log(0.4), one),
        log_tail=np.full(num, np.log(0.2), one),
        tail_entropy=np.full(num, 1.0, one),
        log_target=np.full(num, np.log(0.4), one),
        log_not_target=np.full(num, np.log(0.6), one),
        tail_samples=np.tile(draws, (num, 1)),
    )


def test_known_tokens_get_what_is_due_to_within_one_draw() -> None:
    """Systematic: the count of a known token is off its expectation by less than one."""
    logprobs = log_softmax(np.random.default_rng(0).normal(size=(200, 40)) * 2)
    stored, _ = summarise(logprobs, np.zeros(200, np.int64), 12, 6)
    found = shrink(stored, 4, 6, _uniforms(200))
    mass = np.exp(logprobs)
    np.put_along_axis(mass, found.token_ids.astype(np.int64), 0, axis=1)
    mass /= mass.sum(axis=1, keepdims=True)
    counts = _counts(found.tail_samples, 40) * 6
    known = np.take_along_axis(counts - 6 * mass, stored.token_ids[:, 4:].astype(np.int64), axis=1)
    assert (np.abs(known) < 1 + 1e-5).all()


def test_the_same_seed_makes_the_same_draws_and_blocks_do_not_matter() -> None:
    logprobs = log_softmax(np.random.default_rng(0).normal(size=(5000, 20)))
    stored, _ = summarise(logprobs[:50], np.zeros(50, np.int64), 6, 4)
    stored = stored[np.arange(5000) % 50]
    u_T = _uniforms(5000)
    whole = shrink(stored, 3, 4, u_T, full_tail=0.25)
    parts = [shrink(stored[a : a + 7], 3, 4, u_T[a : a + 7], full_tail=0.25) for a in range(0, 5000, 7)]
    for name, values in vars(Targets.concatenate(parts)).items():
        np.testing.assert_array_equal(values, getattr(whole, name))
    other = shrink(stored, 3, 4, _uniforms(5000, seed=1), full_tail=0.25)
    assert (other.tail_samples != whole.tail_samples).any()
    assert shrink_key("c", "t", 0) != shrink_key("c", "u", 0) != shrink_key("d", "t", 0)


def test_what_stays_is_given_back_as_it_is() -> None:
    stored, _ = summarise(log_softmax(np.random.default_rng(0).normal(size=(9, 20))), np.zeros(9, np.int64), 6, 4)
    assert shrink(stored, 6, 4, _uniforms(9)) is stored
    assert len(shrink(stored[:0], 3, 4, _uniforms(0))) == 0


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"top_k": 7}, {"temperatures": (2.0,)}, {"without": True}])
def test_what_cannot_be_made_is_refused(wrong: dict[str, Any]) -> None:
    stored, _ = summarise(log_softmax(np.random.default_rng(0).normal(size=(9, 20))), np.zeros(9, np.int64), 6, 4)
    if wrong.pop("without", False):
        stored = replace(stored, tail_samples=stored.tail_samples[:, :0])
    with pytest.raises(ValueError, match="expected"):
        shrink(stored, wrong.pop("top_k", 3), 4, _uniforms(9), **wrong)


def test_the_sum_of_tails_without_draws_uses_the_mean_tail() -> None:
    logprobs = log_softmax(np.random.default_rng(0).normal(size=(40, 20)))
    stored, total = summarise(logprobs, np.zeros(40, np.int64), 6, 0)
    found = tail_sum(stored, 3, 20, total / total.sum())
    assert found.sum() == pytest.approx(40)
    assert tail_sum(stored, 3, 20).sum() < 40
    everything, _ = summarise(logprobs, np.zeros(40, np.int64), 20, 0)
    _, exact = summarise(logprobs, np.zeros(40, np.int64), 3, 0)
    np.testing.assert_allclose(tail_sum(everything, 3, 20), exact, atol=1e-5)
