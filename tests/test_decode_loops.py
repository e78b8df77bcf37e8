"""Compiled decoding: the bits of array decoding, whatever is stored; the same refusals; and when it is used."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailcache.storage import compiled
from tailcache.storage.codec import Codec, Targets, logprob_levels
from tailcache.storage.compiled import SWITCH, decode_loops
from tailcache.storage.errors import ConfigError, CorruptError

pytest.importorskip("numba")

LEVELS = {16: 600, 32: 70_000}
"""How many levels there are where gaps are stored in so many bits."""


def codec_of(vocab_size: int, num_classes: int, class_size: int, gap_bits: int, seed: int = 0) -> Codec:
    generator = np.random.default_rng(seed)
    levels = np.concatenate([[0], np.cumsum(generator.uniform(0.001, 0.01, LEVELS[gap_bits] - 1))]).astype(np.float32)
    lists = [generator.permutation(vocab_size)[:class_size] for _ in range(num_classes)]
    tables = np.stack(lists).astype(np.uint32) if num_classes > 1 else None
    return Codec(generator.permutation(vocab_size).astype(np.uint32), levels, tables)


def stored_of(codec: Codec, num: int, top_k: int, num_samples: int, vocab_size: int, lists: int, seed: int) -> Any:
    """Stored fields as a writer could have made them, with many equal levels."""
    generator = np.random.default_rng(seed)
    num_levels = len(codec._minus_levels)
    gaps = generator.integers(0, max(1, num_levels // max(1, top_k)), (num, top_k))
    gaps[generator.random((num, top_k)) < 0.4] = 0
    size = codec._lists.shape[1]
    codes = generator.integers(0, max(1, (vocab_size + size) // max(1, top_k)), (num, top_k))
    stored = {
        "token_codes": codes.astype(codec.id_type),
        "logprob_gaps": np.asfortranarray(gaps.astype(codec.gap_type)),
        "tail_logit": generator.integers(-5000, 5000, num, dtype=np.int32),
        "tail_entropy": generator.integers(0, 5000, num, dtype=np.int32),
        "target_logit": generator.integers(-5000, 5000, num, dtype=np.int32),
    }
    if lists > 1:
        stored["position_class"] = generator.integers(0, lists, num).astype(np.uint8)
    if num_samples:
        draws = generator.integers(0, max(1, vocab_size // num_samples), (num, num_samples))
        stored["tail_sample_codes"] = draws.astype(codec.id_type_for(vocab_size))
    return stored


def bits(targets: Targets) -> dict[str, tuple[Any, ...]]:
    found = {each.name: getattr(targets, each.name) for each in fields(targets)}
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in found.items()}


def both_ways(codec: Codec, stored: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    found: list[Any] = []
    for switch in ("never", "always"):
        monkeypatch.setenv(SWITCH, switch)
        try:
            found.append(bits(codec.decode(stored)))
        except CorruptError as error:
            found.append(str(error))
    return found[0], found[1]


@pytest.mark.parametrize("gap_bits", [16, 32])
@pytest.mark.parametrize(("vocab_size", "lists", "size"), [(300, 1, 0), (300, 4, 32), (65_536, 2, 64), (70_000, 3, 64)])
@pytest.mark.parametrize(
    ("num", "top_k", "num_samples"), [(0, 4, 2), (1, 1, 0), (65, 2, 1), (200, 64, 16), (70, 130, 6)]
)
def test_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
    gap_bits: int,
    vocab_size: int,
    lists: int,
    size: int,
    num: int,
    top_k: int,
    num_samples: int,
) -> None:
    codec = codec_of(vocab_size, lists, size, gap_bits)
    stored = stored_of(codec, num, top_k, num_samples, vocab_size, lists, seed=num)
    arrays, loops = both_ways(codec, stored, monkeypatch)
    assert isinstance(arrays, dict)
    assert arrays == loops


def test_the_same_bits_when_rows_lie_by_columns_or_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codec_of(300, 4, 32, 16)
    stored = stored_of(codec, 150, 8, 4, 300, 4, seed=1)
    expected, _ = both_ways(codec, stored, monkeypatch)
    layouts: list[Any] = [np.asfortranarray, np.ascontiguousarray, lambda values: np.repeat(values, 2, axis=0)[::2]]
    for laid in layouts:
        again = {name: laid(values) for name, values in stored.items()}
        assert both_ways(codec, again, monkeypatch) == (expected, expected)


@pytest.mark.parametrize("steps", [1, 1024, 2048, 20_000])
def test_scalars_far_out_infinite_or_wrong_come_out_alike(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """A scalar beyond 2^20 steps is huge; one that stands for nothing is refused."""
    tables = codec_of(300, 4, 32, 16)
    codec = Codec(tables._order.astype(np.uint32), -tables._minus_levels, tables._lists.astype(np.uint32), steps)
    names = ("tail_logit", "tail_entropy", "target_logit")
    infinity, even = 1 << 30, 1 << 20
    ordinary = [0, 1, -1, 103 * steps, -103 * steps, 105 * steps, -105 * steps, infinity, -infinity]
    for extra, refused in ([], False), ([even, -even], False), ([even + 5, -even - 5], False), ([even * 7], True):
        codes = np.array([code for code in ordinary if abs(code) <= even or code % infinity == 0] + extra, np.int32)
        for name in names:
            stored = stored_of(codec, len(codes), 6, 2, 300, 4, seed=7)
            stored[name] = codes
            arrays, loops = both_ways(codec, stored, monkeypatch)
            assert arrays == loops
            assert isinstance(arrays, str) == refused
            if refused:
                assert name in arrays


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize(("columns", "num"), [(1, 1), (5, 0), (64, 128), (65, 300), (130, 129)])
def test_transposed(kind: str, columns: int, num: int) -> None:
    loops = pytest.importorskip("tailcache.storage.decode_loops")
    generator = np.random.default_rng(0)
    stored = generator.integers(0, 256, (columns, num + 7)).astype(kind)
    for part in (stored[:, :num], np.ascontiguousarray(stored[:, 7:])):
        held = np.full((num + 2, columns), 77, kind)
        loops.transpose(part, held[1:-1])
        assert (held[1:-1] == part.T).all()
        assert (held[[0, -1]] == 77).all()  # and nothing beside it


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_was_written_wrong_is_refused_alike(data: st.DataObject) -> None:
    """Any unsigned numbers at all: the loops stay inside their tables, and the outcome is that of array operations."""
    codec = codec_of(300, 4, 32, 16)
    top_k, num = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    limits = {"token_codes": 400, "logprob_gaps": 700, "tail_sample_codes": 350}
    stored = stored_of(codec, num, top_k, 3, 300, 4, seed=2)
    for name, limit in limits.items():
        values = stored[name]
        which = st.one_of(st.integers(0, limit), st.integers(0, int(np.iinfo(values.dtype).max)))
        drawn = data.draw(st.lists(which, min_size=values.size, max_size=values.size))
        stored[name] = np.array(drawn, values.dtype).reshape(values.shape)
    with pytest.MonkeyPatch.context() as monkeypatch:
        arrays, loops = both_ways(codec, stored, monkeypatch)
    assert arrays == loops


@pytest.mark.parametrize("field", ["token_codes", "logprob_gaps", "tail_sample_codes", "position_class"])
def test_a_code_outside_its_table_is_named(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    codec = codec_of(300, 4, 32, 16)
    stored = stored_of(codec, 100, 8, 4, 300, 4, seed=3)
    if field == "position_class":
        stored[field][99] = 200
    else:
        stored[field][99, -1] = 5000
    monkeypatch.setenv(SWITCH, "always")
    with pytest.raises(CorruptError, match=f"{field}: expected codes from 0 to"):
        codec.decode(stored)


@pytest.mark.parametrize(
    "field", ["token_codes", "logprob_gaps", "tail_entropy", "tail_sample_codes", "position_class"]
)
def test_fields_of_different_lengths_are_refused(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """The loops look at no array's end."""
    codec = codec_of(300, 4, 32, 16)
    stored = stored_of(codec, 100, 8, 4, 300, 4, seed=3)
    stored[field] = stored[field][:60]
    for switch in ("never", "always"):
        monkeypatch.setenv(SWITCH, switch)
        with pytest.raises((ValueError, IndexError)):
            codec.decode(stored)


def test_what_is_decoded_is_what_was_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops by themselves, against the definition: level differences, places in lists, exact head mass."""
    monkeypatch.setenv(SWITCH, "always")
    generator = np.random.default_rng(0)
    num, top_k, vocab_size = 100, 10, 300
    order = generator.permutation(vocab_size).astype(np.uint32)
    codec = Codec(order, logprob_levels(top_k), np.stack([order[:32][::-1], order[50:82]]))
    logits = generator.normal(0, 3, (num, vocab_size))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-log_p, axis=1)[:, :top_k]
    head = np.take_along_axis(log_p, ids, 1)
    tail = np.log1p(-np.exp(head).sum(1))
    p_y = np.full(num, np.log(0.5), np.float32)
    targets = Targets(
        token_ids=ids.astype(np.int32),
        logprobs=head.astype(np.float32),
        log_tail=tail.astype(np.float32),
        tail_entropy=np.ones(num, np.float32),
        log_target=p_y,
        log_not_target=p_y,
        tail_samples=np.argsort(-log_p, axis=1)[:, top_k : top_k + 4].astype(np.int32),
    )
    found = codec.decode(codec.encode(targets))
    assert (np.sort(found.token_ids, axis=1) == np.sort(ids, axis=1)).all()
    assert (np.sort(found.tail_samples, axis=1) == np.sort(targets.tail_samples, axis=1)).all()
    dense = np.full((num, vocab_size), -np.inf)
    np.put_along_axis(dense, found.token_ids.astype(np.int64), found.logprobs.astype(np.float64), 1)
    kl = (np.exp(head) * (head - np.take_along_axis(dense, ids, 1))).sum(1) + np.exp(tail) * (tail - found.log_tail)
    assert 0 < kl.mean() < 1e-5
    total = np.exp(found.logprobs.astype(np.float64)).sum(1) + np.exp(found.log_tail.astype(np.float64))
    assert np.allclose(total, 1, atol=1e-6)


def test_when_the_loops_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_num_decoded", [0])
    monkeypatch.setenv(SWITCH, "auto")
    assert decode_loops(compiled._MANY) is None
    assert decode_loops(1) is not None
    monkeypatch.setenv(SWITCH, "never")
    assert decode_loops(10**9) is None
    monkeypatch.setenv(SWITCH, "always")
    assert decode_loops(0) is not None
    monkeypatch.setenv(SWITCH, "sometimes")
    with pytest.raises(ConfigError, match=f"{SWITCH}: expected auto, always or never, found 'sometimes'"):
        decode_loops(0)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled._is_installed.cache_clear()
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)
    monkeypatch.setattr(compiled, "_num_decoded", [10**9])
    try:
        monkeypatch.setenv(SWITCH, "auto")
        assert decode_loops(1) is None
        monkeypatch.setenv(SWITCH, "always")
        with pytest.raises(ConfigError, match="expected the package numba, found none; pip install numba"):
            decode_loops(1)
    finally:
        compiled._is_installed.cache_clear()
