"""The schemes that bench_storage compares with are right; the bench runs, measures everything and checks its bars."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from numcodecs.zstd import Zstd

from tailcache.scripts import bench_storage
from tailcache.scripts.bench_storage import BenchStorage
from tailcache.scripts.measure import Bar
from tailcache.scripts.storage_schemes import atoms_kl, bits_of, other_schemes
from tailcache.scripts.wide_teacher import VOCAB_SIZE, spread_tokens, train_wide
from tailcache.storage.codec import Targets


def some(num: int, vocab_size: int, top_k: int) -> Targets:
    """Random distributions."""
    from storage_fixtures import log_softmax, summarise

    generator = np.random.default_rng(0)
    logprobs = log_softmax(generator.normal(size=(num, vocab_size)) * 2)
    return summarise(logprobs, generator.integers(0, vocab_size, num), top_k, 4)[0]


def test_sizes_of_other_schemes() -> None:
    """The bytes that DistillKit states, and what arithmetic says of the others."""
    assert (bits_of(49_152), bits_of(151_936), bits_of(65_536), bits_of(65_537), bits_of(2)) == (16, 18, 16, 17, 1)
    targets = some(40, 400, 50)
    head, tail = targets.logprobs.astype(np.float64), targets.log_tail.astype(np.float64)
    small, large = (other_schemes(targets.token_ids, head, tail, size) for size in (49_152, 151_936))
    assert (small["polynomial"].bytes_per_position, large["polynomial"].bytes_per_position) == (114, 126.5)
    assert (small["bf16"].bytes_per_position, large["bf16"].bytes_per_position) == (200, 212.5)
    halves = head.astype(np.float16)
    bits = ((targets.token_ids[:, :, None] >> np.arange(17)) & 1).astype(np.uint8).reshape(40, -1)
    packed = np.packbits(bits, axis=1).tobytes()
    size = len(Zstd(level=3).encode(packed)) + len(Zstd(level=3).encode(halves.tobytes()))
    assert small["fp16, zstd"].bytes_per_position == size / 40


def test_errors_of_other_schemes() -> None:
    """By the definition, with distributions that three terms fit, and that they do not."""
    targets = some(40, 400, 50)
    head, tail = targets.logprobs.astype(np.float64), targets.log_tail.astype(np.float64)
    found = other_schemes(targets.token_ids, head, tail, 400)
    exact = np.concatenate([head, tail[:, None]], axis=1)
    halves = np.concatenate([head.astype(np.float16).astype(np.float64), tail[:, None]], axis=1)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    halves -= np.log(np.exp(halves).sum(axis=1, keepdims=True))
    expected = (np.exp(exact) * (exact - halves)).sum(axis=1)
    np.testing.assert_allclose(found["fp16, zstd"].kl, expected, atol=1e-10)
    assert (atoms_kl(head, tail, head) == 0).all()
    assert 0 < found["fp16, zstd"].kl.mean() < found["bf16"].kl.mean() < 2e-5 < found["polynomial"].kl.mean()
    t = np.linspace(0, 1, 49)
    line = np.concatenate([[-1.0], -2 - 0.5 * t - 3 * np.sqrt(t)])[None].repeat(40, axis=0)
    rest = np.full(40, -5.0)
    fitted = other_schemes(targets.token_ids, line, rest, 400)
    assert fitted["polynomial"].kl.mean() < 2 * fitted["bf16"].kl.mean() + 1e-9, "what is left is rounding"


def test_no_two_tokens_meet_in_the_large_vocabulary() -> None:
    spread = spread_tokens(np.arange(49_152))
    assert len(np.unique(spread)) == 49_152
    assert spread.min() >= 0
    assert spread.max() < VOCAB_SIZE
    gaps = np.diff(np.sort(spread))
    assert gaps.max() < 20, "even"


def test_what_is_stored_is_measured_and_judged(tmp_path: Path) -> None:
    """Without a teacher: one measurement, its parts and its bars."""
    targets = some(600, 400, 50)
    bars: list[Bar] = []
    counts = np.arange(400, dtype=np.int64)
    figures = bench_storage._measure(BenchStorage(repeats=1), targets, counts, "random", bars)
    for name in ("kl_budget 1e-05", "kl_budget 0.0001", "kl_budget 0.001", "version 1"):
        found = figures[name]
        assert math.isclose(found["all"], found["all but samples"] + found["samples"])
        assert math.isclose(found["all but samples"], found["ids"] + found["log-probs"] + found["scalars"])
        assert set(found["bytes"]) >= {"token_codes", "logprob_gaps", "tail_sample_codes"}
    assert figures["kl_budget 1e-05"]["kl_mean"] <= 1e-5 < figures["kl_budget 0.0001"]["kl_mean"]
    assert figures["kl_budget 0.001"]["all"] < figures["kl_budget 1e-05"]["all"] < figures["version 1"]["all"]
    assert len(bars) == 6
    assert json.loads(json.dumps(figures)) == figures


def test_a_wide_teacher_learns_and_can_be_loaded(tmp_path: Path) -> None:
    """A text of five tokens in a circle: what follows what is soon learned."""
    from transformers import LlamaForCausalLM

    loss = train_wide(tmp_path / "wide", np.tile([7, 900, 33, 512, 4], 200), seconds=3, vocab_size=1000)
    assert loss < math.log(1000)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "wide").config.vocab_size == 1000
