"""The codecs: exact ids, a bounded loss in KL whatever the distribution, nothing clipped, nonsense refused.

Legend: T positions, V vocabulary, K kept tokens, m draws, L levels, C classes.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from storage_fixtures import log_softmax, summarise
from strategies import KINDS, Distributions, distributions, logits_of

from tailcache.storage.classes import learn_classes
from tailcache.storage.codec import (
    KL_BUDGET,
    SCALARS,
    AnyCodec,
    Codec,
    Targets,
    logprob_levels,
    max_step,
    round_mantissa,
    sample_columns,
    scalar_steps,
    vocabulary_order,
)
from tailcache.storage.codec_v1 import CodecV1
from tailcache.storage.errors import CorruptError, TeacherError
from tailcache.storage.fixed_point import fixed_of, float_of, logs_of

CODECS = ("v1", "v2", "v2 with classes")
BUDGETS = (1e-6, 1e-5, 1e-4, 1e-3)


def worst_kl(kl_budget: float = KL_BUDGET) -> float:
    """docs/format.md, "What the codec loses": the largest error of any single distribution, nats."""
    widest = max_step(kl_budget)
    return math.exp(widest / 2) / 2 * (1 + widest / 4) ** 2 * 6 * 0.97 * kl_budget


def make_codec(
    targets: Targets, vocab_size: int, kind: str = "v2", kl_budget: float = KL_BUDGET, num_classes: int = 4
) -> AnyCodec:
    order = vocabulary_order(targets.token_ids, np.arange(vocab_size)[::-1])
    levels = logprob_levels(targets.token_ids.shape[1], kl_budget)
    if kind == "v1":
        return CodecV1(order, levels)
    lists = None
    if kind == "v2 with classes":
        lists = learn_classes(targets.token_ids, vocab_size, num_classes, max(1, vocab_size // 3))
    return Codec(order, levels, lists, scalar_steps(kl_budget))


def roundtrip(targets: Targets, vocab_size: int, kind: str = "v2", kl_budget: float = KL_BUDGET) -> Targets:
    codec = make_codec(targets, vocab_size, kind, kl_budget)
    return codec.decode(codec.encode(targets))


def assert_scalars_close(decoded: Targets, given_targets: Targets, kind: str, kl_budget: float = KL_BUDGET) -> None:
    if kind == "v1":
        for name in SCALARS:
            np.testing.assert_allclose(getattr(decoded, name), getattr(given_targets, name), rtol=2.0**-14, atol=1e-38)
        return
    half = 0.5 / scalar_steps(kl_budget)
    huge = 2.0**-13 * math.log(2)  # half of a ratio, beyond 2^20 steps
    for name in SCALARS:
        exact = getattr(given_targets, name).astype(np.float64)
        found = getattr(decoded, name).astype(np.float64)
        assert (np.isinf(found) == np.isinf(exact)).all()
        finite = np.isfinite(exact)
        error = np.abs(found[finite] - exact[finite])
        assert (error <= half + huge * np.abs(exact[finite]) * (np.abs(exact[finite]) > 15) + 1e-6).all(), name
    # Small probabilities on either side keep their ratio: log p, and log(1 - p), where they are close to 0.
    for name in ("log_tail", "log_target", "log_not_target"):
        exact, found = (getattr(t, name).astype(np.float64) for t in (given_targets, decoded))
        near = (exact > -1) & (exact < -1e-11)  # closer to 0 what is given is no more than rounding
        assert (
            np.abs(found[near] / exact[near] - 1) <= np.expm1(1.01 * half + huge * np.abs(np.log(-exact[near])))
        ).all()


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


@settings(max_examples=200, deadline=None)
@given(distributions(), st.sampled_from(CODECS), st.sampled_from(BUDGETS))
def test_roundtrip(case: Distributions, kind: str, kl_budget: float) -> None:
    vocab_size = case.logprobs.shape[1]
    given_targets, _ = summarise(case.logprobs, case.next_tokens, case.top_k, case.num_samples)
    decoded = roundtrip(given_targets, vocab_size, kind, kl_budget)

    assert (decoded.token_ids[:, 0] == given_targets.token_ids[:, 0]).all(), "the most likely token is exact"
    assert (np.sort(decoded.token_ids) == np.sort(given_targets.token_ids)).all(), "ids are exact as sets"
    assert (np.sort(decoded.tail_samples) == np.sort(given_targets.tail_samples)).all()
    assert (np.diff(decoded.logprobs, axis=1) <= 0).all()
    assert np.isfinite(decoded.logprobs).all()
    assert (decoded.logprobs <= 1e-6).all()
    assert_scalars_close(decoded, given_targets, kind, kl_budget)

    # Order: two tokens change places only where their log-probs are within one step of each other.
    exact = np.take_along_axis(case.logprobs, decoded.token_ids.astype(np.int64), axis=1)
    rises = np.diff(exact, axis=1)
    step = np.maximum(max_step(kl_budget), -exact[:, 1:] / 256 * 1.01)
    assert (rises <= step).all()

    mass = np.exp(decoded.logprobs.astype(np.float64)).sum(axis=1) + np.exp(decoded.log_tail.astype(np.float64))
    np.testing.assert_allclose(mass, 1, atol=1e-6)
    kl = kl_to_decoded(case.logprobs, decoded, exact_tail(case.logprobs, decoded.token_ids))
    assert (kl <= worst_kl(kl_budget) + 2e-6).all(), f"{kl.max()} nats; the bound plus what float32 costs"
    assert (kl >= -1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2, 10, 64, 300])
def test_mean_kl_error(kind: str, top_k: int) -> None:
    """At most the budget on average and 8 times as much anywhere, whatever the distribution and K (300 is K = V).

    On average: where errors are spread over their steps. They are not where all p are one of two numbers, or of a few,
    and steps are wide.
    """
    logprobs = log_softmax(np.concatenate([logits_of(kind, 500, 300, seed) for seed in range(4)]))
    targets, _ = summarise(logprobs, np.zeros(len(logprobs), np.int64), top_k, 0)
    for kl_budget in (1e-5, 1e-4, 1e-3)[: 1 if kind in ("two_levels", "ties") else 3]:
        decoded = roundtrip(targets, 300, "v2", kl_budget)
        kl = kl_to_decoded(logprobs, decoded, exact_tail(logprobs, decoded.token_ids))
        assert kl.mean() <= kl_budget
        assert kl.max() <= worst_kl(kl_budget) + 2e-6 <= 8 * kl_budget
        assert np.abs(kl).max() <= 100 * KL_BUDGET if kl_budget == KL_BUDGET else 8 * kl_budget


@pytest.mark.parametrize("kl_budget", [1e-5, 1e-3])
@pytest.mark.parametrize("top_k", [1, 2, 10, 64, 128, 1000, 200_000])
def test_levels(top_k: int, kl_budget: float) -> None:
    widest = max_step(kl_budget)
    levels = logprob_levels(top_k, kl_budget).astype(np.float64)
    assert levels[0] == 0
    assert (np.diff(levels) > 0).all()
    assert levels[-1] == np.finfo(np.float32).max, "every finite float32 has a level"
    h = np.sqrt(6 * (0.97 if kl_budget <= 1e-5 else 0.85) * kl_budget / top_k)
    above = levels[levels <= 64]
    assert np.diff(above).max() <= widest + 1e-5
    roots = np.exp(-levels / 2)
    even = roots[roots >= 2 * h / widest + h]
    np.testing.assert_allclose(-np.diff(even), h, rtol=1e-3, atol=1e-7)
    beyond = levels[levels >= 64]
    assert (np.diff(beyond) / beyond[:-1]).max() <= 1 / 256 + 1e-5
    # p d^2 <= (1 + widest / 4)^2 h^2 for the largest error d of every token: what the worst-case bound rests on.
    most = (1 + widest / 4) ** 2 * h * h
    below = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2])
    for low, high, level in zip(below[:-1], below[1:], levels[:-1], strict=True):
        if level < 64:
            for edge in (low, high):
                assert np.exp(-edge) * (edge - level) ** 2 <= most + 1e-12 or 2 * h >= widest


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
    assert abs(decoded - expected) <= max(max_step(KL_BUDGET) / 2, expected / 256) * 1.001


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
    assert Codec.id_type_for(vocab_size) == Codec.id_type_for(vocab_size - 1, 1) == id_type
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


@pytest.mark.parametrize("kind", CODECS)
def test_more_than_65536_levels(kind: str) -> None:
    """A whole large vocabulary kept: the table of levels outgrows 16 bits, and so do the gaps."""
    vocab_size = 151_936
    logits = np.random.default_rng(0).normal(size=(1, vocab_size))
    logits[0, :3] = 60, -3e4, -1e30
    logprobs = log_softmax(logits)
    targets, _ = summarise(logprobs, np.zeros(1, np.int64), vocab_size, 0)
    codec = make_codec(targets, vocab_size, kind)
    assert codec.gap_type == "uint32"
    encoded = codec.encode(targets)
    assert encoded["logprob_gaps"].dtype == "uint32"
    decoded = codec.decode(encoded)
    assert (np.sort(decoded.token_ids) == np.arange(vocab_size)).all()
    assert abs(kl_to_decoded(logprobs, decoded, np.array([-np.inf]))[0]) < 1e-5


def some(num: int = 9, vocab_size: int = 50, top_k: int = 6, num_samples: int = 4, seed: int = 0) -> Targets:
    logprobs = log_softmax(np.random.default_rng(seed).normal(size=(num, vocab_size)))
    return summarise(logprobs, np.zeros(num, np.int64), top_k, num_samples)[0]


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("field", ["token_codes", "logprob_gaps", "tail_sample_codes"])
def test_codes_outside_their_tables_are_refused(field: str, kind: str) -> None:
    codec = make_codec(some(), 50, kind)
    encoded = codec.encode(some())
    broken = encoded[field].copy()
    broken[4, 2] = 60_000
    with pytest.raises(CorruptError, match=rf"shard 3, {field}: expected codes from 0 to"):
        codec.decode({**encoded, field: broken}, "shard 3")


def test_classes_and_scalars_outside_their_tables_are_refused() -> None:
    codec = make_codec(some(), 50, "v2 with classes")
    encoded = codec.encode(some())
    with pytest.raises(CorruptError, match="shard 3, position_class: expected codes from 0 to 3, found"):
        codec.decode({**encoded, "position_class": encoded["position_class"] + np.uint8(4)}, "shard 3")
    for name in ("tail_logit", "tail_entropy", "target_logit"):
        for value in (-(2**31), 2**29, 2**30 + 1):
            broken = encoded[name].copy()
            broken[3] = value
            with pytest.raises(CorruptError, match=rf"shard 3, {name}: expected codes up to \d+ in magnitude, or"):
                codec.decode({**encoded, name: broken}, "shard 3")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["v2", "v2 with classes"]), st.integers(1, 70_000), st.booleans())
def test_any_codes_decode_or_are_refused(seed: int, kind: str, largest: int, sorted_codes: bool) -> None:
    """Whatever is stored: no crash, no id outside the vocabulary, nothing but the one error."""
    generator = np.random.default_rng(seed)
    codec = make_codec(some(), 50, kind)
    encoded = {}
    for name, values in codec.encode(some()).items():
        limits = np.iinfo(values.dtype)
        random = generator.integers(0, min(largest, limits.max), values.shape, endpoint=True).astype(values.dtype)
        encoded[name] = np.where(generator.random(values.shape) < 0.1, random, values if sorted_codes else random)
    try:
        with np.errstate(all="ignore"):
            decoded = codec.decode(encoded)
            falls = np.diff(decoded.logprobs, axis=1)
    except CorruptError:
        return
    for ids in (decoded.token_ids, decoded.tail_samples):
        assert (ids >= 0).all()
        assert (ids < 50).all()
    assert not (falls > 0).any()


@pytest.mark.parametrize(
    ("table", "values", "match"),
    [
        ("order", np.zeros(50, np.uint32), "vocabulary_order: expected every token from 0 to 49 once"),
        ("order", np.arange(1, 51, dtype=np.uint32), "vocabulary_order: expected every token from 0 to 49 once"),
        ("levels", np.array([0, 2, 1], np.float32), "logprob_levels: expected finite numbers that increase from 0"),
        ("levels", np.array([0, np.nan], np.float32), "logprob_levels: expected finite numbers that increase from 0"),
        ("levels", np.empty(0, np.float32), "logprob_levels: expected finite numbers that increase from 0"),
        ("lists", np.full((2, 1), 50, np.uint32), "class_tokens: expected tokens from 0 to 49, none twice in a class"),
        ("lists", np.zeros((2, 2), np.uint32), "class_tokens: expected tokens from 0 to 49, none twice in a class"),
    ],
)
def test_tables_that_are_none_are_refused(table: str, values: NDArray[Any], match: str) -> None:
    given_tables: dict[str, Any] = {"order": np.arange(50, dtype=np.uint32), "levels": logprob_levels(6), "lists": None}
    given_tables[table] = values
    with pytest.raises(CorruptError, match=f"shard 3, {match}"):
        Codec(given_tables["order"], given_tables["levels"], given_tables["lists"], where="shard 3")


@pytest.mark.parametrize("num_samples", [1, 2, 6, 7, 16, 48, 64])
def test_draws_that_are_repeated_take_the_first_columns(num_samples: int) -> None:
    """m_t different draws, each m / m_t times: what is not zero stands in columns whose j is a multiple of m / m_t."""
    columns = sample_columns(num_samples)
    assert sorted(columns) == list(range(num_samples))
    for distinct in (d for d in range(1, num_samples + 1) if num_samples % d == 0):
        repeat = num_samples // distinct
        draws = np.repeat(np.arange(1, 2 * distinct, 2), repeat)[None].astype(np.int32) + 100
        targets = dataclasses.replace(some(1, 400, 6, 0), tail_samples=draws)
        codec = Codec(np.arange(400, dtype=np.uint32), logprob_levels(6))
        encoded = codec.encode(targets)
        assert (encoded["tail_sample_codes"][0] > 0).tolist() == (columns % repeat == 0).tolist()
        if num_samples & (num_samples - 1) == 0:
            assert (encoded["tail_sample_codes"][0, distinct:] == 0).all(), "powers of two: all zeros at the end"
        assert codec.decode(encoded).tail_samples.tolist() == draws.tolist()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30), st.sampled_from([1, 256, 1024, 65_536]))
def test_every_float32_has_a_fixed_point_code(values: list[float], steps: int) -> None:
    array = np.array(values, np.float32)
    codes = fixed_of(array, steps)
    found = float_of(codes, steps, "here")
    assert (np.isinf(found) == np.isinf(array)).all()
    finite = np.isfinite(array)
    error = np.abs(found[finite].astype(np.float64) - array[finite])
    size = np.abs(array[finite].astype(np.float64))
    most = np.where(size <= 2**20 / steps, 0.5 / steps + 2.0**-24 * size, 1.01 * 2.0**-13 * np.log(2) * size)
    assert (error <= most).all()
    clear = np.abs(array) > 1 / steps
    assert (np.signbit(found[clear]) == np.signbit(array[clear])).all()
    assert (fixed_of(found, steps) == codes).all()


@pytest.mark.parametrize("steps", [1, 256, 2048, 65_536])
def test_both_logs_of_a_logit_keep_their_relative_precision(steps: int) -> None:
    """Against float64, from 0 to where one of them is 0 in float32, on both sides, and at infinity."""
    limit = min(110 * steps, 1 << 20)
    codes = np.unique(np.linspace(0, limit, 5000).astype(np.int32))
    codes = np.concatenate([codes, -codes, [(1 << 20) + 9, -(1 << 20) - 9, 1 << 30, -(1 << 30)]]).astype(np.int32)
    logit = float_of(codes, steps, "here")
    found = logs_of(codes, logit, steps)
    exact = logit.astype(np.float64)
    for log, sign in zip(found, (1, -1), strict=True):
        with np.errstate(over="ignore"):
            expected = -np.logaddexp(0, -sign * exact)
        infinite = np.isinf(expected)
        assert (log[infinite] == expected[infinite]).all()
        error = np.abs(log[~infinite] - expected[~infinite])
        assert (error <= 4 * 2.0**-24 * np.abs(expected[~infinite]) + 2.0**-149).all()


def test_encode_keeps_no_more_memory_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the whole vocabulary is decoded by itself, not 2,048 at a time."""
    largest = 0
    empty = np.empty

    def watched(shape: object, *args: object, **kwargs: object) -> NDArray[np.generic]:
        nonlocal largest
        result: NDArray[np.generic] = empty(shape, *args, **kwargs)  # type: ignore[call-overload]
        largest = max(largest, result.nbytes)
        return result

    targets = some(20, 60_000, 60_000, 0)
    codec = make_codec(targets, 60_000)
    encoded = codec.encode(targets)
    monkeypatch.setattr(np, "empty", watched)
    decoded = codec.decode(encoded)
    assert (np.sort(decoded.token_ids) == np.arange(60_000)).all()
    assert largest <= 20 * 60_000 * 4, "nothing beside the result is larger than it"


def test_what_encode_refuses() -> None:
    targets = some(4, num_samples=0)
    codec = make_codec(targets, 50)
    swapped = targets.logprobs.copy()
    swapped[2, [3, 4]] = swapped[2, [4, 3]]
    with pytest.raises(TeacherError, match="target 2 of those to be stored: expected finite log-prob"):
        codec.encode(dataclasses.replace(targets, logprobs=swapped))
    contradicting = targets.log_not_target.copy()
    contradicting[3] = -5
    with pytest.raises(TeacherError, match=r"target 3 of those to be stored: .* of masses that sum to 1"):
        codec.encode(dataclasses.replace(targets, log_not_target=contradicting))


def test_targets_index_and_concatenate() -> None:
    targets, _ = summarise(log_softmax(np.random.default_rng(0).normal(size=(9, 50))), np.zeros(9, np.int64), 6, 4)
    assert len(targets) == 9
    assert targets.num_samples == 4
    both = Targets.concatenate([targets[:4], targets[4:]])
    for field in dataclasses.fields(Targets):
        assert (getattr(both, field.name) == getattr(targets, field.name)).all()
    assert (targets[np.array([3, 3, 0])].token_ids == targets.token_ids[[3, 3, 0]]).all()
    assert len(targets[targets.log_tail < -99]) == 0
