"""The codec: exact ids, a bounded loss in KL whatever the distribution, nothing clipped, nonsense refused.

Legend: T positions, V vocabulary, K kept tokens, L levels.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from storage_fixtures import log_softmax, summarise
from strategies import KINDS, Distributions, distributions, logits_of

from tailcache.storage.codec import (
    KL_BUDGET,
    MAX_STEP,
    SCALARS,
    Codec,
    Targets,
    logprob_levels,
    round_mantissa,
    vocabulary_order,
)
from tailcache.storage.errors import CorruptError, TeacherError

WORST_KL = 0.64 * 6 * KL_BUDGET  # docs/format.md, "What the codec loses"


def make_codec(targets: Targets, vocab_size: int) -> Codec:
    counts = np.arange(vocab_size)[::-1]
    return Codec(vocabulary_order(targets.token_ids, counts), logprob_levels(targets.token_ids.shape[1]))


def roundtrip(targets: Targets, vocab_size: int) -> Targets:
    codec = make_codec(targets, vocab_size)
    return codec.decode(codec.encode(targets))


def kl_to_decoded(
    logprobs_TV: NDArray[np.float64], decoded: Targets, tail_T: NDArray[np.float64]
) -> NDArray[np.float64]:
    """KL(exact, decoded) over the head's tokens and one atom for the tail, [T] nats."""
    exact = np.take_along_axis(logprobs_TV, decoded.token_ids.astype(np.int64), axis=1)
    terms = np.exp(exact) * (exact - decoded.logprobs.astype(np.float64))
    tail_mass = np.exp(tail_T)
    found_tail = decoded.log_tail.astype(np.float64)
    with np.errstate(invalid="ignore"):
        tail = np.where(tail_mass > 0, tail_mass * (tail_T - found_tail), 0.0)
    total: NDArray[np.float64] = terms.sum(axis=1) + tail
    return total


def exact_tail(logprobs_TV: NDArray[np.float64], ids_TK: NDArray[np.int32]) -> NDArray[np.float64]:
    masked = logprobs_TV.copy()
    np.put_along_axis(masked, ids_TK.astype(np.int64), -np.inf, axis=1)
    largest = masked.max(axis=1)
    safe = np.where(np.isfinite(largest), largest, 0)
    with np.errstate(divide="ignore"):
        result: NDArray[np.float64] = safe + np.log(np.exp(masked - safe[:, None]).sum(axis=1))
    return result


@settings(max_examples=150, deadline=None)
@given(distributions())
def test_roundtrip(case: Distributions) -> None:
    vocab_size = case.logprobs.shape[1]
    given_targets, _ = summarise(case.logprobs, case.next_tokens, case.top_k, case.num_samples)
    decoded = roundtrip(given_targets, vocab_size)

    assert (decoded.token_ids[:, 0] == given_targets.token_ids[:, 0]).all(), "the most likely token is exact"
    assert (np.sort(decoded.token_ids) == np.sort(given_targets.token_ids)).all(), "ids are exact as sets"
    assert (np.sort(decoded.tail_samples) == np.sort(given_targets.tail_samples)).all()
    assert (np.diff(decoded.logprobs, axis=1) <= 0).all()
    assert np.isfinite(decoded.logprobs).all()
    assert (decoded.logprobs <= 1e-6).all()
    for name in SCALARS:
        np.testing.assert_allclose(getattr(decoded, name), getattr(given_targets, name), rtol=2.0**-14, atol=1e-38)

    # Order: two tokens change places only where their log-probs are within one step of each other.
    exact = np.take_along_axis(case.logprobs, decoded.token_ids.astype(np.int64), axis=1)
    rises = np.diff(exact, axis=1)
    step = np.maximum(MAX_STEP, -exact[:, 1:] / 256 * 1.01)
    assert (rises <= step).all()

    mass = np.exp(decoded.logprobs.astype(np.float64)).sum(axis=1) + np.exp(decoded.log_tail.astype(np.float64))
    np.testing.assert_allclose(mass, 1, atol=1e-6)
    kl = kl_to_decoded(case.logprobs, decoded, exact_tail(case.logprobs, decoded.token_ids))
    assert (kl <= WORST_KL + 2e-6).all(), f"{kl.max()} nats; the bound plus what float32 costs"
    assert (kl >= -1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 10, 64, 300])
def test_mean_kl_error(kind: str, top_k: int) -> None:
    """At most 1e-5 nats on average and 1e-3 anywhere, whatever the distribution and K (300 is K = V)."""
    logprobs = log_softmax(np.concatenate([logits_of(kind, 500, 300, seed) for seed in range(4)]))
    targets, _ = summarise(logprobs, np.zeros(len(logprobs), np.int64), top_k, 0)
    decoded = roundtrip(targets, 300)
    kl = kl_to_decoded(logprobs, decoded, exact_tail(logprobs, decoded.token_ids))
    assert kl.mean() <= 1e-5
    assert kl.max() <= WORST_KL + 2e-6 < 1e-3
    assert np.abs(kl).max() <= 1e-3


@pytest.mark.parametrize("top_k", [1, 2, 10, 64, 128, 1000, 200_000])
def test_levels(top_k: int) -> None:
    levels = logprob_levels(top_k).astype(np.float64)
    assert levels[0] == 0
    assert (np.diff(levels) > 0).all()
    assert levels[-1] == np.finfo(np.float32).max, "every finite float32 has a level"
    h = np.sqrt(6 * KL_BUDGET / top_k)
    above = levels[levels <= 64]
    assert np.diff(above).max() <= MAX_STEP + 1e-5
    roots = np.exp(-levels / 2)
    even = roots[roots >= 2 * h / MAX_STEP + h]
    np.testing.assert_allclose(-np.diff(even), h, rtol=1e-3, atol=1e-7)
    beyond = levels[levels >= 64]
    assert (np.diff(beyond) / beyond[:-1]).max() <= 1 / 256 + 1e-5
    # p d^2 <= 1.12 h^2 for the largest error d of every token: what the worst-case bound rests on.
    below = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2])
    for low, high, level in zip(below[:-1], below[1:], levels[:-1], strict=True):
        if level < 64:
            for edge in (low, high):
                assert np.exp(-edge) * (edge - level) ** 2 <= 1.12 * h * h + 1e-12


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=0))
@settings(max_examples=200, deadline=None)
def test_every_finite_float32_encodes(value: float) -> None:
    """No log-prob is clipped: the level nearest to it comes back, to half of a step."""
    logprobs = np.array([[-1e-3, value]], np.float32)
    logprobs.sort(axis=1)
    targets = dataclasses.replace(
        summarise(log_softmax(np.zeros((1, 4))), np.zeros(1, np.int64), 2, 0)[0], logprobs=logprobs[:, ::-1].copy()
    )
    levels = logprob_levels(2)
    codec = Codec(np.arange(4, dtype=np.uint32), levels)
    gaps = codec.encode(targets)["logprob_gaps"].astype(np.int64).sum(axis=1)
    decoded = float(levels[gaps[0]])
    expected = -float(logprobs[0, 0])
    assert abs(decoded - expected) <= max(MAX_STEP / 2, expected / 256) * 1.001


def test_order_of_frequency() -> None:
    ids = np.array([[3, 1], [3, 2], [3, 1]])
    counts = np.array([5, 0, 0, 0, 9, 5])
    assert vocabulary_order(ids, counts).tolist() == [3, 1, 2, 4, 0, 5]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_round_mantissa(values: list[float]) -> None:
    array = np.array(values, np.float32)
    rounded = round_mantissa(array)
    assert (rounded.view(np.uint32) & 0x3FF == 0)[np.isfinite(array)].all()
    normal = np.isfinite(rounded) & (np.abs(array) > 1e-37)
    error = np.abs(rounded[normal].astype(np.float64) - array[normal].astype(np.float64))
    assert (error <= 2.0**-14 * np.abs(array[normal].astype(np.float64))).all()
    assert (round_mantissa(rounded) == rounded).all()
    assert (np.signbit(rounded) == np.signbit(array)).all()
    assert (np.isfinite(rounded) | (np.abs(array) > 3.402e38)).all()


@pytest.mark.parametrize(
    ("vocab_size", "id_type"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (262_144, "uint32")]
)
def test_id_types(vocab_size: int, id_type: str) -> None:
    assert Codec.id_type_for(vocab_size) == id_type
    generator = np.random.default_rng(0)
    logprobs = log_softmax(generator.normal(size=(3, vocab_size)))
    top_k = min(20, vocab_size - 1)
    targets, _ = summarise(logprobs, np.full(3, vocab_size - 1), top_k, 8)
    targets.tail_samples[:, 0] = np.argmin(logprobs, axis=1)
    codec = Codec(np.arange(vocab_size, dtype=np.uint32)[::-1].copy(), logprob_levels(top_k))
    encoded = codec.encode(targets)
    assert encoded["token_codes"].dtype == encoded["tail_sample_codes"].dtype == id_type
    decoded = codec.decode(encoded)
    assert (np.sort(decoded.token_ids) == np.sort(targets.token_ids)).all()
    assert (np.sort(decoded.tail_samples) == np.sort(targets.tail_samples)).all()


def test_more_than_65536_levels() -> None:
    """A whole large vocabulary kept: the table of levels outgrows 16 bits, and so do the gaps."""
    vocab_size = 151_936
    logits = np.random.default_rng(0).normal(size=(1, vocab_size))
    logits[0, :3] = 60, -3e4, -1e30
    logprobs = log_softmax(logits)
    targets, _ = summarise(logprobs, np.zeros(1, np.int64), vocab_size, 0)
    codec = make_codec(targets, vocab_size)
    assert codec.gap_type == "uint32"
    encoded = codec.encode(targets)
    assert encoded["logprob_gaps"].dtype == "uint32"
    decoded = codec.decode(encoded)
    assert (np.sort(decoded.token_ids) == np.arange(vocab_size)).all()
    assert abs(kl_to_decoded(logprobs, decoded, np.array([-np.inf]))[0]) < 1e-5


@pytest.mark.parametrize("field", ["token_codes", "logprob_gaps", "tail_sample_codes"])
def test_codes_outside_their_tables_are_refused(field: str) -> None:
    targets, _ = summarise(log_softmax(np.random.default_rng(0).normal(size=(9, 50))), np.zeros(9, np.int64), 6, 4)
    codec = make_codec(targets, 50)
    encoded = codec.encode(targets)
    broken = encoded[field].copy()
    broken[4, 2] = 60_000
    with pytest.raises(CorruptError, match=rf"shard 3, {field}: expected codes from 0 to"):
        codec.decode({**encoded, field: broken}, "shard 3")


def test_what_encode_refuses() -> None:
    targets, _ = summarise(log_softmax(np.random.default_rng(0).normal(size=(4, 50))), np.zeros(4, np.int64), 6, 0)
    codec = make_codec(targets, 50)
    swapped = targets.logprobs.copy()
    swapped[2, [3, 4]] = swapped[2, [4, 3]]
    with pytest.raises(TeacherError, match="target 2 of those to be stored: expected finite log-prob"):
        codec.encode(dataclasses.replace(targets, logprobs=swapped))


def test_targets_index_and_concatenate() -> None:
    targets, _ = summarise(log_softmax(np.random.default_rng(0).normal(size=(9, 50))), np.zeros(9, np.int64), 6, 4)
    assert len(targets) == 9
    assert targets.num_samples == 4
    both = Targets.concatenate([targets[:4], targets[4:]])
    for field in dataclasses.fields(Targets):
        assert (getattr(both, field.name) == getattr(targets, field.name)).all()
    assert (targets[np.array([3, 3, 0])].token_ids == targets.token_ids[[3, 3, 0]]).all()
    assert len(targets[targets.log_tail < -99]) == 0
