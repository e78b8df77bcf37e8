"""What is kept of a distribution, against fifty-digit decimal arithmetic in probability space."""

from __future__ import annotations

import dataclasses
import functools
from decimal import Context, Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tailcache.pipeline.draws import draw_key, num_distinct, uniforms
from tailcache.pipeline.head import HeadSummary, mask_padding, padded_width, summarise_logits, tail_mass

Floats = NDArray[np.float32]
TEMPERATURES = (0.5, 2.0, 4.0, 10.0)
DIGITS = Context(prec=50, Emin=-(10**9), Emax=10**9)


def summarise(
    logits: Floats, targets: Any, *, top_k: int, m: int = 0, key: int = 7, numbers: Any = None, **options: Any
) -> HeadSummary:
    """The head of real logits [T, V], padded to whole blocks by what must not matter; ``numbers``: in place of ours."""
    num, vocab_size = logits.shape
    padded = torch.zeros((num, padded_width(vocab_size)))
    padded[:, :vocab_size] = torch.from_numpy(logits)
    return summarise_logits(
        mask_padding(padded, vocab_size),
        torch.as_tensor(targets),
        torch.from_numpy(uniforms(key, np.arange(num)) if numbers is None else numbers),
        vocab_size=vocab_size,
        top_k=top_k,
        num_samples=m,
        **options,
    )


def exact(logits: Floats, ids: Any, target: int, temperatures: tuple[float, ...] = ()) -> dict[str, Any]:
    """One distribution in exact probabilities; the head is the given ids."""
    with localcontext(DIGITS):
        weights = [Decimal(float(z)).exp() for z in logits]
        total = sum(weights)
        p = [w / total for w in weights]
        head = {int(i) for i in ids}
        tail = [p[i] for i in range(len(p)) if i not in head]
        alpha = sum(tail, Decimal(0))
        entropy = -sum((q / alpha * (q / alpha).ln() for q in tail if q), Decimal(0)) if tail else Decimal(0)
        not_target = sum((q for i, q in enumerate(p) if i != target), Decimal(0))
        return {
            "logprobs": [float(p[int(i)].ln()) for i in ids],
            "log_tail": float(alpha.ln()) if alpha else -np.inf,
            "tail_entropy": float(entropy),
            "log_target": float(p[target].ln()),
            "log_not_target": float(not_target.ln()) if not_target else -np.inf,
            "tail": [float(p[i] / alpha) if alpha and i not in head else 0.0 for i in range(len(p))],
            "log_z_tail": [
                float(sum((q ** (1 / Decimal(tau)) for q in tail), Decimal(0)).ln()) if alpha else -np.inf
                for tau in temperatures
            ],
        }


def check(logits: Floats, targets: NDArray[np.int64], top_k: int) -> None:
    tail_sum = torch.zeros(padded_width(logits.shape[1]), dtype=torch.float64)
    m = 3 if top_k < logits.shape[1] else 0
    summary = summarise(logits, targets, top_k=top_k, m=m, tail_sum_V=tail_sum, temperatures=TEMPERATURES)
    expected_sum = np.zeros(logits.shape[1])
    for t, row in enumerate(logits):
        ids = summary.token_ids[t].tolist()
        assert len(set(ids)) == top_k
        assert max(ids) < len(row)
        np.testing.assert_array_equal(row[ids], np.sort(row)[::-1][:top_k], err_msg="not the most likely, in order")
        expected = exact(row, ids, int(targets[t]), TEMPERATURES)
        for name in ("logprobs", "log_tail", "tail_entropy", "log_target", "log_not_target", "log_z_tail"):
            # float32 holds a log to 6e-8 of itself; logits of ±1e4 are themselves known to that and no better.
            np.testing.assert_allclose(
                getattr(summary, name)[t].numpy(), expected[name], rtol=3e-7, atol=2e-6, err_msg=f"{name}, row {t}"
            )
        expected_sum += np.array(expected["tail"])
        for drawn in summary.tail_samples[t].tolist():
            assert drawn not in ids
            assert 0 <= drawn < len(row)
    np.testing.assert_allclose(tail_sum.numpy()[: logits.shape[1]], expected_sum, atol=2e-6)
    assert not tail_sum[logits.shape[1] :].any()


def random_logits(kind: str, num: int, vocab_size: int, seed: int = 0) -> Floats:
    generator = np.random.default_rng([seed, vocab_size])
    normal = generator.normal(size=(num, vocab_size))
    if kind == "random":
        values = 3 * normal
    elif kind == "zipf":
        values = np.stack([generator.permutation(-1.2 * np.log(np.arange(1, vocab_size + 1))) for _ in range(num)])
    elif kind == "peaked":  # all but one token share 1e-30
        values = 0.1 * normal
        values[np.arange(num), generator.integers(0, vocab_size, num)] = 69.0
    elif kind == "extreme":
        values = generator.choice([-1e4, -9.99e3, 0.0, 9.99e3, 1e4], size=(num, vocab_size)) + normal
    elif kind == "ties":
        values = np.round(normal)
    else:
        assert kind == "constant"
        values = np.full((num, vocab_size), 2.5)
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", ["random", "zipf", "peaked", "extreme", "ties", "constant"])
@pytest.mark.parametrize("vocab_size", [2, 63, 64, 65, 130, 200])
def test_every_field_is_the_exact_one(kind: str, vocab_size: int) -> None:
    logits = random_logits(kind, 3, vocab_size)
    blocks = padded_width(vocab_size) // 64
    for top_k in sorted({1, 2, min(5, vocab_size), min(blocks, vocab_size), vocab_size - 1, vocab_size} - {0}):
        targets = np.array([logits[0].argmax(), logits[1].argmin(), vocab_size // 2])
        check(logits, targets, top_k)


@pytest.mark.parametrize("top_k", [1, 7, 15, 16, 17, 50])
def test_more_and_fewer_blocks_than_kept_tokens(top_k: int) -> None:
    """Up to K blocks are searched where there are more; 16 blocks here."""
    logits = random_logits("random", 2, 1000)
    logits[0, 128:192] += 40  # the whole head in one block
    logits[1, ::64] += 40  # a token of the head in each block
    check(logits, np.array([130, 3]), top_k)


@settings(max_examples=40, deadline=None)
@given(
    vocab_size=st.integers(2, 140),
    share=st.floats(0, 1),
    scale=st.floats(0.1, 30),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 1000),
)
def test_any_distribution(vocab_size: int, share: float, scale: float, shift: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = (scale * generator.normal(size=(1, vocab_size)) + shift).astype(np.float32)
    check(logits, generator.integers(0, vocab_size, 1), 1 + round(share * (vocab_size - 1)))


@pytest.mark.parametrize("gap", [1e-3, 1.0, 20.0, 69.0, 87.0, 200.0])
def test_one_minus_p_is_right_where_p_is_nearly_one_and_nearly_none(gap: float) -> None:
    """A difference 1 - p in float32 would be 0 from a gap of 17 on, and its log infinite."""
    logits = np.zeros((2, 70), np.float32)
    logits[0, 5] = gap
    logits[1, 6] = -gap
    for top_k in (1, 3, 69, 70):
        summary = summarise(logits, [5, 6], top_k=top_k)
        expected = [exact(logits[t], summary.token_ids[t], target) for t, target in enumerate((5, 6))]
        for name in ("log_target", "log_not_target"):
            found = getattr(summary, name).numpy()
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found, [e[name] for e in expected], rtol=2e-7, atol=1e-9)
    assert summarise(logits, [5, 6], top_k=1).log_tail[0] == pytest.approx(
        exact(logits[0], [5], 5)["log_tail"], rel=2e-7
    )


@pytest.mark.parametrize("gap", [20.0, 69.0, 200.0, 3000.0])
@pytest.mark.parametrize("top_k", [1, 5, 100])
def test_the_tails_sum_at_other_temperatures_is_right_wherever_the_mass_is(gap: float, top_k: int) -> None:
    """A tail of e^-gap in all; as much below the head at one temperature as above it at another."""
    logits = random_logits("random", 3, 200)
    logits[np.arange(3), [3, 64, 199]] += gap
    summary = summarise(logits, [3, 0, 1], top_k=top_k, temperatures=TEMPERATURES)
    for t, row in enumerate(logits):
        expected = exact(row, summary.token_ids[t].tolist(), 0, TEMPERATURES)["log_z_tail"]
        np.testing.assert_allclose(summary.log_z_tail[t].numpy(), expected, rtol=3e-7, atol=1e-6)
    # With the head's own sum it is the whole partition function; at tau = 1 it would be the tail's mass.
    near_one = summarise(logits, [3, 0, 1], top_k=top_k, temperatures=(1.0,))
    torch.testing.assert_close(near_one.log_z_tail[:, 0], near_one.log_tail, rtol=3e-7, atol=1e-6)


def test_temperatures_change_nothing_else_and_none_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits("zipf", 5, 500)
    plain = summarise(logits, np.arange(5), top_k=6, m=5)
    further = summarise(logits, np.arange(5), top_k=6, m=5, temperatures=TEMPERATURES)
    for field in dataclasses.fields(HeadSummary):
        if field.name != "log_z_tail":
            assert torch.equal(getattr(plain, field.name), getattr(further, field.name)), field.name
    assert plain.log_z_tail.shape == (5, 0)
    assert further.log_z_tail.shape == (5, 4)
    passes, original = 0, torch.div

    def div(*arguments: Any, **keywords: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return original(*arguments, **keywords)

    monkeypatch.setattr(torch, "div", div)
    for temperatures in ((), (2.0,), TEMPERATURES):
        passes = 0
        summarise(logits, np.arange(5), top_k=6, temperatures=temperatures)
        assert passes == len(temperatures)


def test_one_token_is_the_whole_vocabulary() -> None:
    summary = summarise(np.array([[3.0]], np.float32), [0], top_k=1)
    assert (summary.logprobs.item(), summary.log_target.item(), summary.tail_entropy.item()) == (0, 0, 0)
    assert summary.log_tail.item() == summary.log_not_target.item() == -np.inf


def not_finite(summary: HeadSummary) -> NDArray[np.bool_]:
    """[T] what capture's check asks."""
    bad = ~np.isfinite(summary.logprobs.numpy()).all(1) | ~np.isfinite(summary.log_target.numpy())
    for name in ("log_tail", "tail_entropy", "log_not_target"):
        bad |= np.isnan(getattr(summary, name).numpy())
    return np.asarray(bad)


@pytest.mark.parametrize("top_k", [1, 2, 4, 129, 130])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -3.0e38])
@pytest.mark.parametrize("where", [[0], [129], [64, 65], range(130)], ids=["first", "last", "two", "all"])
def test_logits_that_are_not_finite_show_and_spoil_no_other_row(top_k: int, bad: float, where: list[int]) -> None:
    """A finite -3e38 is a probability of 0, unless the head needs it: then it cannot be told from padding."""
    logits = random_logits("random", 3, 130)
    options: dict[str, Any] = {"top_k": top_k, "m": 0 if top_k == 130 else 4, "temperatures": (0.5, 4.0)}
    good = summarise(logits.copy(), [1, 2, 3], **options)
    logits[1, list(where)] = bad
    summary = summarise(logits, [1, 2, 3], **options)
    shows = bad != -3.0e38 or 130 - len(where) <= top_k
    assert not_finite(summary).tolist() == [False, shows, False]
    for field in dataclasses.fields(summary):
        mine, others = getattr(summary, field.name)[[0, 2]], getattr(good, field.name)[[0, 2]]
        assert torch.equal(mine, others), field.name


def test_padding_has_no_mass_and_would_have_without_the_mask() -> None:
    logits = torch.full((1, 128), -4.0)
    logits[:, 100:] = 0.0  # what a padded head gives: zero weights
    u = torch.from_numpy(uniforms(1, np.arange(1)))
    sizes: dict[str, Any] = {"vocab_size": 100, "top_k": 10, "num_samples": 200}
    masked = summarise_logits(mask_padding(logits.clone(), 100), torch.tensor([3]), u, **sizes)
    phantom = summarise_logits(logits.clone(), torch.tensor([3]), u, **sizes)
    assert masked.log_target.item() == pytest.approx(-np.log(100), abs=1e-6)
    assert masked.log_tail.item() == pytest.approx(np.log(0.9), abs=1e-6)
    assert masked.tail_entropy.item() == pytest.approx(np.log(90), abs=1e-5)
    assert int(masked.token_ids.max()) < 100
    assert int(masked.tail_samples.max()) < 100
    assert phantom.log_target.item() < -7
    assert int(phantom.token_ids.min()) >= 100


def test_a_fifth_of_blocks_padding_as_in_real_heads() -> None:
    """Padding of several whole blocks (a head of 152,064 rows for 151,936 tokens has two)."""
    real = random_logits("zipf", 4, 150)
    logits = torch.zeros((4, 320))
    logits[:, :150] = torch.from_numpy(real)
    for top_k in (1, 4, 5, 149):
        u = torch.from_numpy(uniforms(1, np.arange(4)))
        summary = summarise_logits(
            mask_padding(logits.clone(), 150), torch.arange(4), u, vocab_size=150, top_k=top_k, num_samples=5
        )
        narrow = summarise(real, np.arange(4), top_k=top_k, m=5, key=1)
        for name in ("token_ids", "tail_samples"):
            assert torch.equal(getattr(summary, name), getattr(narrow, name)), name
        torch.testing.assert_close(summary.log_tail, narrow.log_tail, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("top_k", "vocab_size", "width"), [(0, 60, 64), (61, 60, 64), (5, 65, 64), (5, 60, 60)])
def test_sizes_that_make_no_sense_are_refused(top_k: int, vocab_size: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"top_k {top_k}, vocab_size {vocab_size}, V {width}"):
        summarise_logits(
            torch.zeros((1, width)), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64),
            vocab_size=vocab_size, top_k=top_k, num_samples=0,
        )  # fmt: skip


# -- draws ---------------------------------------------------------------------------------------------------------


def chi_square(counts: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Pearson's statistic in standard deviations from its mean; cells below five expected are pooled."""
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


@functools.cache
def many_draws(vocab_size: int, top_k: int, kind: str) -> tuple[Floats, HeadSummary]:
    """One distribution inverted at 20,000 independent points."""
    logits = random_logits(kind, 1, vocab_size, seed=3)
    numbers = np.random.default_rng(5).random(20_000)
    many = np.repeat(logits, 20_000, axis=0)
    return logits, summarise(many, np.zeros(20_000, np.int64), top_k=top_k, m=1, numbers=numbers)


def exact_tail(logits: Floats, summary: HeadSummary) -> NDArray[np.float64]:
    """[V] the normalised tail of the first row."""
    return np.array(exact(logits[0], summary.token_ids[0].tolist(), 0)["tail"])


def counts_of(summary: HeadSummary, vocab_size: int) -> NDArray[np.int64]:
    """[T, V] how often each token was drawn at each position."""
    num, m = summary.tail_samples.shape
    counts = np.zeros((num, vocab_size), np.int64)
    np.add.at(counts, (np.arange(num).repeat(m), summary.tail_samples.flatten().numpy()), 1)
    return counts


@pytest.mark.parametrize(("vocab_size", "top_k"), [(150, 1), (150, 10), (700, 3), (70, 68)])
@pytest.mark.parametrize("kind", ["random", "zipf", "peaked", "constant"])
def test_draws_follow_the_tail(vocab_size: int, top_k: int, kind: str) -> None:
    logits, summary = many_draws(vocab_size, top_k, kind)
    ids = summary.token_ids[0].tolist()
    tail = np.array(exact(logits[0], ids, 0)["tail"])
    counts = np.bincount(summary.tail_samples.flatten().numpy(), minlength=vocab_size).astype(np.float64)
    assert counts[ids].sum() == 0
    assert abs(chi_square(counts, tail * counts.sum())) < 4.5
    if vocab_size > 100 and kind != "constant":  # the statistic sees draws that are one id off
        assert chi_square(np.roll(counts, 1), np.where(tail > 0, tail, 1e-9) * counts.sum()) > 50


def test_the_mean_of_weights_over_draws_is_unbiased() -> None:
    """E[f(x) / p(x)] over draws x ~ p is the sum of f over the tail, for any f."""
    logits, summary = many_draws(150, 10, "random")
    tail = np.array(exact(logits[0], summary.token_ids[0].tolist(), 0)["tail"])
    f = np.random.default_rng(0).random(150) * tail**0.5
    draws = summary.tail_samples.flatten().numpy()
    values = f[draws] / tail[draws]
    standard_error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - f[tail > 0].sum()) < 4 * standard_error
    assert standard_error < 0.05 * f[tail > 0].sum()


def distinct_of(logits: Floats, summary: HeadSummary, m: int) -> int:
    """How many different points the first row gets, by its exact tail."""
    log_tail = exact(logits[0], summary.token_ids[0].tolist(), 0)["log_tail"]
    return int(num_distinct(torch.tensor([np.exp(log_tail)], dtype=torch.float64), m).item())


@pytest.mark.parametrize(("vocab_size", "top_k"), [(150, 1), (150, 10), (150, 60), (700, 3), (70, 68)])
@pytest.mark.parametrize("kind", ["random", "zipf", "peaked", "constant"])
def test_counts_are_off_by_less_than_one_repeat(vocab_size: int, top_k: int, kind: str) -> None:
    """|count - m p| < m/m_t for every token at every position, whatever m, and a count is a multiple of m/m_t."""
    logits = random_logits(kind, 1, vocab_size, seed=4)
    for m in (1, 2, 7, 12, 16, 100):
        summary = summarise(np.repeat(logits, 50, axis=0), np.zeros(50, np.int64), top_k=top_k, m=m, key=m)
        distinct = distinct_of(logits, summary, m)
        repeats = m // distinct
        expected = m * exact_tail(logits, summary)
        counts = counts_of(summary, vocab_size)
        assert (counts % repeats == 0).all()
        assert np.abs(counts - expected).max() < repeats * (1 + 1e-6)  # sums are float32, 64 terms at a time
        assert counts[:, expected < repeats * (1 - 1e-6)].max(initial=0) <= repeats


def test_fewer_different_draws_where_the_tail_is_light() -> None:
    """From one id (a tail of 1e-30) to all 16, growing with the tail's mass."""
    logits = np.zeros((12, 400), np.float32)
    logits[:, 0] = np.log(399) + np.array([69.0, 6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.0])
    summary = summarise(logits, np.zeros(12, np.int64), top_k=1, m=16)
    found = [len(set(row)) for row in summary.tail_samples.tolist()]
    assert found == [1, 1, 1, 1, 2, 2, 4, 8, 8, 16, 16, 16]  # 399 tokens of equal mass: different points differ
    mass = summary.log_tail.double().exp()
    assert found == num_distinct(mass, 16).tolist()
    assert float(mass[9]) < 0.25  # 64 r = 11.7, of which the next divisor is 16


@pytest.mark.parametrize(("top_k", "distinct"), [(4, 8), (60, 4), (100, 2), (120, 1)])
def test_thinned_draws_are_unbiased_and_vary_as_little_as_their_number_lets_them(top_k: int, distinct: int) -> None:
    """Over many seeds: the mean count is m p for every token, its variance the least of any multiple of m/m_t."""
    logits, m, seeds = random_logits("zipf", 1, 150, seed=5), 8, 4000
    counts = [
        counts_of(summarise(np.repeat(logits, 400, axis=0), np.zeros(400, np.int64), top_k=top_k, m=m, key=key), 150)
        for key in range(seeds // 400)
    ]
    found = np.concatenate(counts).astype(np.float64)
    summary = summarise(logits, [0], top_k=top_k)
    tail = exact_tail(logits, summary)
    assert distinct_of(logits, summary, m) == distinct
    due = distinct * tail  # a count is m/m_t times the integer below m_t p, or with this probability the next one
    share = due - np.floor(due)
    least = (m / distinct) ** 2 * share * (1 - share)
    error = (found.mean(axis=0) - m * tail) / np.sqrt(np.maximum(least, 1e-12) / seeds)
    assert np.abs(error[due * seeds > 20]).max() < 4.5
    often = due * seeds > 150
    np.testing.assert_allclose(found[:, often].var(axis=0), least[often], rtol=0.4)
    assert found.var(axis=0).sum() == pytest.approx(least.sum(), rel=0.02)
    f = np.random.default_rng(0).normal(size=(150, 300))  # 300 sums over the tail
    estimates = found @ f / m
    assert (np.abs(estimates.mean(axis=0) - tail @ f) < 5 * estimates.std(axis=0) / np.sqrt(seeds)).all()
    independent = (tail @ f**2 - (tail @ f) ** 2) / distinct
    # Of as many independent draws; a single one is both.
    assert least.sum() < (0.85 if distinct > 4 else 1 + 1e-6) * m**2 / distinct * (tail * (1 - tail)).sum()
    assert estimates.var(axis=0).mean() < (0.9 if distinct > 4 else 1.05) * independent.mean()


@pytest.mark.parametrize(("vocab_size", "top_k", "m"), [(128, 120, 16), (128, 124, 32), (192, 176, 12), (100, 95, 20)])
def test_how_many_differ_does_not_depend_on_the_batch_even_at_a_threshold(vocab_size: int, top_k: int, m: int) -> None:
    """Equal logits, so that m r / FULL_TAIL is a whole number but for rounding, which has to be the same everywhere."""
    logits = np.repeat(random_logits("constant", 1, vocab_size), 200, axis=0)
    logits += np.linspace(-9, 9, 200, dtype=np.float32)[:, None]  # same distributions, other roundings
    whole = summarise(logits, np.zeros(200, np.int64), top_k=top_k, m=m)
    for size in (1, 3, 64, 199):
        for start in range(0, 200, size):
            rows = slice(start, start + size)
            numbers = uniforms(7, np.arange(200)[rows])
            part = summarise(logits[rows], np.zeros(len(numbers), np.int64), top_k=top_k, m=m, numbers=numbers)
            assert torch.equal(part.tail_samples, whole.tail_samples[rows])


def test_the_tails_mass_has_the_same_bits_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    log_head, log_tail = 8 * torch.rand((2, 4099), generator=generator, dtype=torch.float64)
    whole = tail_mass(log_head, log_tail)
    for size in (1, 3, 8, 13, 64):
        parts = [tail_mass(a, b) for a, b in zip(log_head.split(size), log_tail.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(whole, log_tail.exp() / (log_head.exp() + log_tail.exp()), rtol=1e-14, atol=0)
    far = torch.tensor([2000.0], dtype=torch.float64)
    assert (tail_mass(far, -far).item(), tail_mass(-far, far).item()) == (0, 1)


def test_draws_of_two_positions_are_independent() -> None:
    """Any two of their draws: their joint counts are the products of their own."""
    logits = np.repeat(random_logits("constant", 1, 66), 8000, axis=0)
    draws = summarise(logits, np.zeros(8000, np.int64), top_k=2, m=4, key=draw_key("corpus", 0)).tail_samples.numpy()
    cells = (np.sort(draws, axis=1) - 2) // 4  # 16 tokens to a draw, so four cells of four
    for distance in (1, 2, 64):
        for i, j in ((0, 0), (0, 3), (3, 1)):
            joint = np.bincount(4 * (cells[:-distance, i] % 4) + cells[distance:, j] % 4, minlength=16)
            assert abs(chi_square(joint.astype(np.float64), np.full(16, joint.sum() / 16))) < 4.5


def test_draws_do_not_depend_on_chunks_or_order() -> None:
    logits = random_logits("random", 37, 500)
    targets = np.arange(37)
    whole = summarise(logits, targets, top_k=6, m=5)
    u = torch.from_numpy(uniforms(7, np.arange(37)))
    generator = np.random.default_rng(0)
    for size in (1, 4, 36):
        order = generator.permutation(37)
        for start in range(0, 37, size):
            rows = order[start : start + size]
            padded = torch.zeros((len(rows), 512))
            padded[:, :500] = torch.from_numpy(logits[rows])
            part = summarise_logits(
                mask_padding(padded, 500), torch.from_numpy(targets[rows]), u[rows], vocab_size=500, top_k=6,
                num_samples=5, scratch_TV=torch.empty((len(rows), 512)),
            )  # fmt: skip
            for name in ("token_ids", "tail_samples"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


def test_the_first_and_the_last_number_draw_tokens_that_have_mass() -> None:
    """Tokens of no mass lie before, between and after the only two that have some."""
    logits = np.full((4, 200), -300.0, np.float32)
    logits[:, 0] = 5.0  # the head
    logits[:, [70, 190]] = [1.0, 0.0]
    numbers = [0.0, 2.0**-53, 1 - 2.0**-53, float(np.nextafter(1 / (1 + np.exp(-1.0)), 2))]
    padded = torch.full((4, 256), 0.0)
    padded[:, :200] = torch.from_numpy(logits)
    u: Tensor = torch.tensor(numbers, dtype=torch.float64)
    summary = summarise_logits(
        mask_padding(padded, 200), torch.zeros(4, dtype=torch.int64), u, vocab_size=200, top_k=1, num_samples=1
    )
    assert summary.tail_samples[:, 0].tolist()[:3] == [70, 70, 190]
    assert summary.tail_samples[3, 0] in (70, 190)


def test_another_seed_draws_independently() -> None:
    logits = np.repeat(random_logits("constant", 1, 130), 6000, axis=0)
    draws = [
        summarise(logits, np.zeros(6000, np.int64), top_k=2, m=1, key=draw_key("corpus", seed)).tail_samples.numpy()
        for seed in (0, 1)
    ]
    same = float((draws[0] == draws[1]).mean())
    assert abs(same - 1 / 128) < 5 * np.sqrt(1 / 128 / draws[0].size)
