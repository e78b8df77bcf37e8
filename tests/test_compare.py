"""compare: every figure against dense float64 loops, the bound against the truth, the intervals against theory."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compare_fixtures import (
    Dense,
    Position,
    add_teacher,
    bound_by_atoms,
    dense_kl,
    filled,
    head_of,
    make_corpus,
    make_targets,
    random_dense,
    tail_sum,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tailcache.pipeline import compare_sums
from tailcache.pipeline.compare import Comparison, compare
from tailcache.pipeline.compare_report import comparison_html, comparison_text
from tailcache.pipeline.config import CompareConfig
from tailcache.pipeline.pair_divergence import PairTerms, Prior, View, find_in_head, pair_terms
from tailcache.scripts.cli import main
from tailcache.storage.bootstrap import Resampled
from tailcache.storage.errors import ConfigError, DataError, IncompleteError, MismatchError, NotFoundError
from tailcache.storage.reader import open_cache

V = 40
EXACT = 2e-5
"""Nats: float32 rounding of the stored logs, where nothing is quantised (logs up to about 15, terms up to V)."""
CODEC = 5e-3
"""Nats, on means over 100 positions: the stored scalars are right to 1/2048 nat, quantised heads to
1e-5 nats of KL, but the cross terms of two different teachers see the quantisation of log q itself."""


def quiet(config: CompareConfig) -> Comparison:
    return compare(config, show_progress=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Position], Dense, Dense]:
    cache = tmp_path_factory.mktemp("pair") / "cache"
    corpus, positions = make_corpus(cache, vocab_size=V)
    a = random_dense(len(positions), V, seed=1)
    b = random_dense(len(positions), V, seed=2, spread=0.7, near=a)
    add_teacher(corpus, positions, "big", a, top_k=12, num_samples=16)
    add_teacher(corpus, positions, "small", b, top_k=7, num_samples=8, shard_positions=30)
    return cache, positions, a, b


# -- figures of one teacher ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["all", "held-out", "train"])
def test_teacher_figures_are_those_of_the_dense_distributions(
    pair: tuple[Path, list[Position], Dense, Dense], split: str
) -> None:
    cache, positions, a, _ = pair
    chosen = [t for t, p in enumerate(positions) if split == "all" or p.held_out == (split == "held-out")]
    found = quiet(CompareConfig(cache=cache, teachers=("big",), split=split))  # type: ignore[arg-type]
    assert found.positions == len(chosen)
    assert found.rows == len({positions[t].row for t in chosen})
    assert not found.pairs
    assert not found.divergences
    (teacher,) = found.teachers
    mean_log = math.fsum(math.log(a[t][positions[t].true_next]) for t in chosen) / len(chosen)
    entropy = math.fsum(-x * math.log(x) for t in chosen for x in a[t]) / len(chosen)
    matches = sum(int(np.argmax(a[t])) == positions[t].true_next for t in chosen) / len(chosen)
    inside = sum(positions[t].true_next in head_of(list(a[t]), 12) for t in chosen) / len(chosen)
    assert teacher.cross_entropy.value == pytest.approx(-mean_log, rel=2**-13)
    assert teacher.perplexity.value == pytest.approx(math.exp(-mean_log), rel=1e-3)
    assert teacher.entropy.value == pytest.approx(entropy, abs=CODEC)
    assert teacher.top1_accuracy.value == pytest.approx(matches)
    assert teacher.mismatch_rate.value == pytest.approx(1 - matches)
    assert teacher.target_in_head.value == pytest.approx(inside)
    assert list(teacher.tail_mass) == [1, 2, 3, 5, 7, 10, 12]
    for k, alpha in teacher.tail_mass.items():
        expected = math.fsum(math.fsum(sorted(a[t])[: V - k]) for t in chosen) / len(chosen)
        assert alpha.value == pytest.approx(expected, abs=1e-3), k


def test_tail_mass_is_a_sum_of_positive_terms() -> None:
    dense = np.full((3, 8), 1e-14)
    dense[:, 0] = 1 - 7e-14
    targets = make_targets(dense, [0, 1, 2], top_k=4, num_samples=0)
    view = View.of(targets, np.array([0, 1, 2]), Prior(np.full(8, 1 / 8, np.float32)))
    columns = compare_sums._teacher_columns(view)
    for k in (1, 2, 3, 4):
        np.testing.assert_allclose(columns[f"alpha_{k}"], (8 - k) * 1e-14, rtol=1e-4)


def test_ladder_ends_at_the_stored_k_and_has_the_published_ones() -> None:
    assert compare_sums.tail_ladder(1) == [1]
    assert compare_sums.tail_ladder(64) == [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 64]
    assert {1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000} < set(compare_sums.tail_ladder(2500))


def test_bytes_per_position_are_the_files_sizes(pair: tuple[Path, list[Position], Dense, Dense]) -> None:
    cache, positions, _, _ = pair
    found = quiet(CompareConfig(cache=cache, teachers=("small",), split="held-out", resamples=0))
    for field, size in found.teachers[0].bytes_per_position.items():
        on_disk = sum(f.stat().st_size for f in (cache / "teachers/small" / field / "c").rglob("*") if f.is_file())
        assert size == pytest.approx(on_disk / len(positions)), field
    assert len(found.teachers[0].bytes_per_position) == 6


def test_context_bins_count_what_was_read_of_the_document(pair: tuple[Path, list[Position], Dense, Dense]) -> None:
    cache, positions, a, _ = pair
    found = quiet(CompareConfig(cache=cache, teachers=("big",), resamples=0))
    by_bin: dict[int, list[float]] = {}
    for t, p in enumerate(positions):
        by_bin.setdefault(int(math.log2(p.read)), []).append(math.log(a[t][p.true_next]))
    expected = [(2.0**i, math.exp(-np.mean(v))) for i, v in sorted(by_bin.items()) if len(v) >= 30]
    assert expected
    assert [x for x, _ in found.teachers[0].perplexity_by_context] == [x for x, _ in expected]
    np.testing.assert_allclose([y for _, y in found.teachers[0].perplexity_by_context], [y for _, y in expected], 1e-3)


# -- two teachers, exact targets -------------------------------------------------------------------------------


def both(
    a: Dense, b: Dense, true_next: list[int], k_a: int, k_b: int, m_a: int = 0, m_b: int = 0
) -> tuple[PairTerms, Prior, Prior]:
    """Compare without the codec in between."""
    views, priors = [], []
    for dense, k, m in ((a, k_a, m_a), (b, k_b, m_b)):
        total = tail_sum(dense, k)
        prior = Prior((total / max(total.sum(), 1e-300)).astype(np.float32))
        targets = make_targets(dense, true_next, top_k=k, num_samples=m)
        views.append(View.of(targets, np.array(true_next), prior))
        priors.append(prior)
    return pair_terms(views[0], views[1]), priors[0], priors[1]


@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.integers(2, 24),
    spread=st.floats(0.01, 5.0),
    other_spread=st.floats(0.0, 5.0),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_bound_never_exceeds_the_true_kl(
    seed: int, vocab_size: int, spread: float, other_spread: float, data: st.DataObject
) -> None:
    k_a, k_b = (data.draw(st.integers(1, vocab_size)) for _ in range(2))
    a = random_dense(6, vocab_size, seed=seed, spread=spread)
    b = random_dense(6, vocab_size, seed=seed + 1, spread=other_spread, near=a if seed % 2 else None)
    true_next = np.random.default_rng(seed).integers(0, vocab_size, 6).tolist()
    terms, _, _ = both(a, b, true_next, k_a, k_b)
    for directed, p, q in ((terms.a_to_b, a, b), (terms.b_to_a, b, a)):
        truth = np.array([dense_kl(list(x), list(y)) for x, y in zip(p, q, strict=True)])
        assert (directed.bound_T <= truth + EXACT).all()
        assert (directed.bound_T >= -EXACT).all()
        assert np.isfinite(directed.estimate_T).all()
        assert np.isfinite(directed.prior_estimate_T).all()


@pytest.mark.parametrize(("k_a", "k_b"), [(5, 5), (12, 4), (3, 15), (1, 1)])
def test_bound_is_that_of_the_atoms(k_a: int, k_b: int) -> None:
    a, b = random_dense(200, V, seed=3), random_dense(200, V, seed=4)
    true_next = np.random.default_rng(5).integers(0, V, 200).tolist()
    terms, _, _ = both(a, b, true_next, k_a, k_b)
    for directed, p, q, k_p, k_q in ((terms.a_to_b, a, b, k_a, k_b), (terms.b_to_a, b, a, k_b, k_a)):
        expected = [
            bound_by_atoms(list(x), list(y), head_of(list(x), k_p), head_of(list(y), k_q), true_next[t])
            for t, (x, y) in enumerate(zip(p, q, strict=True))
        ]
        # Where y is nearly all of a tail it is no atom of its own, and the bound may only be lower.
        assert np.isclose(directed.bound_T, expected, atol=EXACT).mean() > 0.9
        assert (directed.bound_T <= np.array(expected) + EXACT).all()


def test_bound_where_the_true_token_is_the_whole_tail() -> None:
    a, b = random_dense(50, 6, seed=6), random_dense(50, 6, seed=7)
    true_next = [head_of(list(q), 6)[-1] for q in b]
    terms, _, _ = both(a, b, true_next, 5, 5)
    for directed, p, q in ((terms.a_to_b, a, b), (terms.b_to_a, b, a)):
        truth = np.array([dense_kl(list(x), list(y)) for x, y in zip(p, q, strict=True)])
        assert (directed.bound_T <= truth + EXACT).all()
        assert (directed.bound_T > -EXACT).all()


@pytest.mark.parametrize("m", [0, 4])
@pytest.mark.parametrize(("k_a", "k_b"), [(6, 6), (9, 4), (4, 9), (3, V), (V, 3), (V - 1, V - 1)])
def test_prior_estimate_is_that_of_the_filled_distribution(k_a: int, k_b: int, m: int) -> None:
    a, b = random_dense(120, V, seed=8), random_dense(120, V, seed=9, spread=1.0)
    true_next = np.random.default_rng(10).integers(0, V, 120).tolist()
    m_a, m_b = (0 if k == V else m for k in (k_a, k_b))
    terms, prior_a, prior_b = both(a, b, true_next, k_a, k_b, m_a, m_b)
    targets = make_targets(a, true_next, top_k=k_a, num_samples=m_a)
    expected = []
    for t, (p, q) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        head, y = head_of(p, k_a), true_next[t]
        q_hat = q if k_b >= V - 1 else filled(q, head_of(q, k_b), y, prior_b.pi_V.tolist())
        tail = [i for i in range(V) if i not in head]
        alpha = math.fsum(p[i] for i in tail)
        if m_a:
            mean_log_q = math.fsum(math.log(q_hat[i]) for i in targets.tail_samples[t]) / m_a
        elif tail:
            weights = [prior_a.pi_V[i] for i in tail]
            mean_log_q = math.fsum(w * math.log(q_hat[i]) for w, i in zip(weights, tail, strict=True)) / sum(weights)
        else:
            mean_log_q = 0.0
        negative_entropy = math.fsum(x * math.log(x) for x in p)
        expected.append(negative_entropy - math.fsum(p[i] * math.log(q_hat[i]) for i in head) - alpha * mean_log_q)
    np.testing.assert_allclose(terms.a_to_b.prior_estimate_T, expected, atol=5 * EXACT)


def test_estimates_are_exact_where_everything_is_stored() -> None:
    a, b = random_dense(60, V, seed=11), random_dense(60, V, seed=12)
    terms, _, _ = both(a, b, [0] * 60, V, V)
    for directed, p, q in ((terms.a_to_b, a, b), (terms.b_to_a, b, a)):
        truth = [dense_kl(list(x), list(y)) for x, y in zip(p, q, strict=True)]
        for values in (directed.bound_T, directed.estimate_T, directed.prior_estimate_T):
            np.testing.assert_allclose(values, truth, atol=EXACT)


@pytest.mark.parametrize(("k", "m"), [(5, 0), (5, 8), (V, 0), (V - 1, 3)])
def test_a_teacher_against_itself(k: int, m: int) -> None:
    a = random_dense(60, V, seed=13)
    terms, _, _ = both(a, a, np.random.default_rng(0).integers(0, V, 60).tolist(), k, k, m, m)
    assert terms.agree_T.all()
    np.testing.assert_allclose(terms.a_to_b.bound_T, 0, atol=1e-12)
    np.testing.assert_allclose(terms.a_to_b.estimate_T, 0, atol=1e-12)


@pytest.mark.parametrize(("k_a", "k_b"), [(10, 10), (20, 8), (8, 20)])
@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_estimate_is_near_the_truth_for_related_teachers(k_a: int, k_b: int, spread: float) -> None:
    """Teachers that share their contexts: within 30 %, or 0.003 nats; the prior estimate is off by 30 % to 7000 %."""
    vocab_size, num = 400, 400
    generator = np.random.default_rng(14)
    common = generator.standard_normal(vocab_size) * 2
    logits = common + generator.standard_normal((num, vocab_size)) * 1.5
    a = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    b = random_dense(num, vocab_size, seed=15, spread=spread, near=a)
    true_next = [int(generator.choice(vocab_size, p=p)) for p in a]
    views = []
    for dense, k in ((a, k_a), (b, k_b)):
        prior = Prior((tail_sum(dense, k) / num).astype(np.float32))
        views.append(View.of(make_targets(dense, true_next, top_k=k, num_samples=16), np.array(true_next), prior))
    beyond = Prior((tail_sum(a, k_b) / num).astype(np.float32)) if k_b < k_a else None
    terms = pair_terms(views[0], views[1], beyond)
    truth = np.mean([dense_kl(list(x), list(y)) for x, y in zip(a, b, strict=True)])
    error = abs(terms.a_to_b.estimate_T.mean() - truth)
    assert error < max(0.3 * truth, 0.003)
    assert error < 0.9 * abs(terms.a_to_b.prior_estimate_T.mean() - truth)


def test_membership_against_loops_across_table_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailcache.pipeline.pair_divergence._TABLE_ENTRIES", 3 * 50)
    generator = np.random.default_rng(16)
    head = np.stack([generator.permutation(50)[:6] for _ in range(17)]).astype(np.int32)
    queries = [generator.integers(0, 50, (17, j)).astype(np.int32) for j in (9, 0, 1)]
    for query, ranks in zip(queries, find_in_head(head, queries, 50), strict=True):
        for t, j in itertools.product(range(17), range(query.shape[1])):
            places = np.flatnonzero(head[t] == query[t, j])
            assert ranks[t, j] == (places[0] if len(places) else -1)


def test_extreme_distributions_stay_finite() -> None:
    """Probabilities down to exp(-900), below what float64 can hold in the probability space."""
    logp = np.zeros((2, 4), np.float32)
    logp[0] = [0, -900, -900.5, -901]
    logp[1] = [0, -700, -800, -900]
    ids = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.int32)
    zeros = np.zeros(1, np.float32)
    views = []
    for k, row in ((4, 0), (4, 1), (2, 1)):
        targets = make_targets(np.full((1, 4), 0.25), [0], top_k=k, num_samples=0)
        targets = type(targets)(
            token_ids=ids[row : row + 1, :k], logprobs=logp[row : row + 1, :k], tail_samples=np.zeros((1, 0), np.int32),
            log_tail=np.full(1, -np.inf if k == 4 else -800, np.float32), tail_entropy=zeros,
            log_target=np.full(1, logp[row, ids[row].tolist().index(0)]), log_not_target=zeros,
        )  # fmt: skip
        views.append(View.of(targets, np.array([0]), Prior(np.full(4, 0.0 if k == 4 else 0.25, np.float32))))
    for x, y in itertools.permutations(views, 2):
        terms = pair_terms(x, y).a_to_b
        for value in (terms.bound_T, terms.estimate_T, terms.prior_estimate_T):
            assert np.isfinite(value).all()
    full = pair_terms(views[0], views[1]).a_to_b
    assert full.bound_T[0] == pytest.approx(900)
    assert full.estimate_T[0] == pytest.approx(900)


# -- two teachers through caches -------------------------------------------------------------------------------


def test_pair_figures_through_the_cache(pair: tuple[Path, list[Position], Dense, Dense]) -> None:
    cache, positions, a, b = pair
    found = quiet(CompareConfig(cache=cache))
    assert [t.label for t in found.teachers] == ["big", "small"]
    (figures,) = found.pairs
    agree = np.mean(a.argmax(axis=1) == b.argmax(axis=1))
    assert figures.top1_agreement.value == pytest.approx(agree)
    y = [p.true_next for p in positions]
    rows = np.arange(len(y))
    difference = math.exp(-np.log(b[rows, y]).mean()) - math.exp(-np.log(a[rows, y]).mean())
    assert figures.perplexity_difference.value == pytest.approx(difference, rel=1e-2)
    assert figures.perplexity_difference.low is not None
    assert figures.perplexity_difference.low < difference < (figures.perplexity_difference.high or 0)
    assert list(figures.tail_mass_difference) == [1, 2, 3, 5]
    for directed, p, q, k_p, k_q in zip(found.divergences, (a, b), (b, a), (12, 7), (7, 12), strict=True):
        truth = np.mean([dense_kl(x, z) for x, z in zip(p.tolist(), q.tolist(), strict=True)])
        atoms = np.mean(
            [
                bound_by_atoms(x, z, head_of(x, k_p), head_of(z, k_q), y[t])
                for t, (x, z) in enumerate(zip(p.tolist(), q.tolist(), strict=True))
            ]
        )
        assert directed.kl_lower_bound.value == pytest.approx(atoms, abs=CODEC)
        assert directed.kl_lower_bound.value < truth + CODEC
        assert directed.kl_estimate.value == pytest.approx(truth, rel=0.35)


def test_whole_vocabulary_through_the_cache_is_exact(tmp_path: Path) -> None:
    corpus, positions = make_corpus(tmp_path / "c", vocab_size=V)
    a, b = (random_dense(len(positions), V, seed=s) for s in (20, 21))
    for name, dense in (("a", a), ("b", b)):
        add_teacher(corpus, positions, name, dense, top_k=V, num_samples=0)
    found = quiet(CompareConfig(cache=tmp_path / "c"))
    for directed, p, q in zip(found.divergences, (a, b), (b, a), strict=True):
        truth = np.mean([dense_kl(x, z) for x, z in zip(p.tolist(), q.tolist(), strict=True)])
        for figure in (directed.kl_lower_bound, directed.kl_estimate, directed.kl_prior_estimate):
            assert figure.value == pytest.approx(truth, abs=CODEC)


def test_two_caches_of_one_corpus_are_as_good_as_one(
    pair: tuple[Path, list[Position], Dense, Dense], tmp_path: Path
) -> None:
    cache, positions, _, b = pair
    corpus, _ = make_corpus(tmp_path / "other", vocab_size=V)
    add_teacher(corpus, positions, "small", b, top_k=7, num_samples=8, shard_positions=77)
    one = quiet(CompareConfig(cache=cache))
    two = quiet(CompareConfig(cache=cache, teachers=("big",), other_cache=tmp_path / "other"))
    assert one.pairs == two.pairs
    for left, right in zip(one.divergences, two.divergences, strict=True):
        assert left.kl_lower_bound.value == pytest.approx(right.kl_lower_bound.value, abs=1e-9)
        assert left.kl_estimate.value == pytest.approx(right.kl_estimate.value, abs=0.02)
    three = quiet(CompareConfig(cache=cache, other_cache=tmp_path / "other"))
    assert [t.label for t in three.teachers] == ["big", f"{cache}:small", f"{tmp_path / 'other'}:small"]
    assert len(three.pairs) == 3
    assert len(three.divergences) == 6


def test_caches_of_different_corpora_are_refused(
    pair: tuple[Path, list[Position], Dense, Dense], tmp_path: Path
) -> None:
    cache = pair[0]
    other, positions = make_corpus(tmp_path / "other", vocab_size=V, seed=99, tokenizer="another")
    add_teacher(other, positions, "x", random_dense(len(positions), V, seed=1), top_k=3, num_samples=2)
    with pytest.raises(MismatchError) as refusal:
        quiet(CompareConfig(cache=cache, other_cache=tmp_path / "other"))
    message = str(refusal.value)
    assert open_cache(cache).corpus.hash in message
    assert other.hash in message
    assert "tokenizer.fingerprint.all: 't' against 'another'" in message
    assert "source.seed: 0 against 99" in message


def test_the_same_cache_twice_is_refused(pair: tuple[Path, list[Position], Dense, Dense]) -> None:
    with pytest.raises(MismatchError, match="leave --other-cache out"):
        quiet(CompareConfig(cache=pair[0], other_cache=pair[0]))


def test_unfinished_teachers(tmp_path: Path) -> None:
    corpus, positions = make_corpus(tmp_path / "c", vocab_size=V)
    dense = random_dense(len(positions), V, seed=1)
    add_teacher(corpus, positions, "half", dense, top_k=4, num_samples=2, stop_after=1)
    with pytest.raises(IncompleteError, match="half"):
        quiet(CompareConfig(cache=tmp_path / "c"))
    add_teacher(corpus, positions, "whole", dense, top_k=4, num_samples=2)
    found = quiet(CompareConfig(cache=tmp_path / "c", resamples=10))
    assert found.left_out == ["half"]
    assert "half" in comparison_text(found)
    with pytest.raises(IncompleteError, match="half"):
        quiet(CompareConfig(cache=tmp_path / "c", teachers=("whole", "half")))
    with pytest.raises(NotFoundError, match="nobody"):
        quiet(CompareConfig(cache=tmp_path / "c", teachers=("nobody",)))


def test_prefixes_of_unfinished_teachers(tmp_path: Path) -> None:
    """The rows that all have, and the same figures that these rows give when the capture has finished."""
    corpus, positions = make_corpus(tmp_path / "c", vocab_size=V)
    dense = random_dense(len(positions), V, seed=1)
    add_teacher(corpus, positions, "whole", dense, top_k=4, num_samples=2)
    add_teacher(corpus, positions, "half", dense, top_k=4, num_samples=2, stop_after=1)
    found = quiet(CompareConfig(cache=tmp_path / "c", unfinished="prefix", resamples=0))
    rows = open_cache(tmp_path / "c").teacher("half", unfinished="prefix").num_rows
    assert found.prefix_rows == rows < corpus.num_rows
    assert found.positions == corpus.target_offsets(0, rows)[-1]
    assert f"only the first {rows:,} rows" in comparison_text(found)
    assert [figures.name for figures in found.teachers] == ["half", "whole"]
    assert found.teachers[0].cross_entropy == found.teachers[1].cross_entropy
    assert found.divergences[0].kl_lower_bound.value == pytest.approx(0, abs=1e-6)
    expected = [-np.log(dense[i][p.true_next]) for i, p in enumerate(positions) if p.row < rows]
    assert found.teachers[0].cross_entropy.value == pytest.approx(np.mean(expected), rel=1e-3)
    assert quiet(CompareConfig(cache=tmp_path / "c", teachers=("whole",), unfinished="wait")).prefix_rows is None
    with pytest.raises(IncompleteError, match="not finished after"):
        quiet(CompareConfig(cache=tmp_path / "c", teachers=("half",), unfinished="wait", wait_minutes=1e-3))


def test_no_teacher_and_no_such_rows(tmp_path: Path) -> None:
    corpus, positions = make_corpus(tmp_path / "c", vocab_size=V, num_rows=1)
    with pytest.raises(NotFoundError, match="tailcache capture"):
        quiet(CompareConfig(cache=tmp_path / "c"))
    add_teacher(corpus, positions, "a", random_dense(len(positions), V, seed=1), top_k=4, num_samples=2)
    with pytest.raises(DataError, match="--split train"):
        quiet(CompareConfig(cache=tmp_path / "c", split="train"))
    found = quiet(CompareConfig(cache=tmp_path / "c", split="held-out"))
    assert found.teachers[0].perplexity.low is None
    assert "at least two rows" in comparison_text(found)


def test_pieces_and_blocks_do_not_change_the_sums(
    pair: tuple[Path, list[Position], Dense, Dense], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(pair[0])
    teachers = {name: cache.teacher(name) for name in cache.teacher_names}
    whole = compare_sums.row_sums(teachers, cache.corpus, np.arange(9))
    done: list[int] = []
    monkeypatch.setattr(compare_sums, "_PIECE_ENTRIES", 1)
    monkeypatch.setattr("tailcache.storage.reader.Teacher.block_rows", 2)
    parts = compare_sums.row_sums(teachers, cache.corpus, np.arange(9), done.append)
    assert sum(done) == cache.corpus.num_targets
    np.testing.assert_allclose(parts.sums_RM, whole.sums_RM, rtol=1e-5, atol=1e-5)
    some = compare_sums.row_sums(teachers, cache.corpus, np.array([1, 4, 5]))
    np.testing.assert_allclose(some.sums_RM, whole.sums_RM[[1, 4, 5]], rtol=1e-5, atol=1e-5)


# -- intervals -------------------------------------------------------------------------------------------------


def _resampled(values: Dense, seed: int = 0, resamples: int = 400, confidence: float = 0.9) -> Resampled:
    sums = np.stack([np.ones(len(values)), values], axis=1)
    return Resampled(sums, ["n", "x"], resamples=resamples, confidence=confidence, seed=seed)


def test_intervals_cover_the_mean_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(17)
    covered = 0
    for trial in range(200):
        boot = _resampled(generator.standard_normal(60) + 3, seed=trial)
        figure = boot.figure(boot["x"] / boot["n"])
        assert figure.low is not None
        assert figure.high is not None
        covered += figure.low <= 3 <= figure.high
    assert 165 <= covered <= 195  # 0.9 of 200, give or take 3 standard deviations and the small sample's bias


def test_intervals_are_a_ratio_of_sums_with_the_width_of_theory() -> None:
    values = np.random.default_rng(18).standard_normal(400)
    boot = _resampled(values, resamples=4000, confidence=0.95)
    figure = boot.figure(boot["x"] / boot["n"])
    assert figure.value == pytest.approx(values.mean())
    assert figure.high is not None
    assert figure.low is not None
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_the_seed_decides_and_blocks_of_resamples_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(19).standard_normal(30)
    first = _resampled(values)["x"]
    np.testing.assert_array_equal(first, _resampled(values)["x"])
    assert not np.array_equal(first, _resampled(values, seed=1)["x"])
    monkeypatch.setattr("tailcache.storage.bootstrap._BLOCK_ENTRIES", 61)
    np.testing.assert_allclose(first, _resampled(values)["x"], rtol=1e-12)


def test_paired_differences_are_narrower_than_the_teachers_own(
    pair: tuple[Path, list[Position], Dense, Dense],
) -> None:
    boot = quiet(CompareConfig(cache=pair[0], resamples=200))
    again = quiet(CompareConfig(cache=pair[0], resamples=200))
    assert boot.to_json() == again.to_json()
    (figures,) = boot.pairs
    expected = boot.teachers[1].cross_entropy.value - boot.teachers[0].cross_entropy.value
    assert figures.cross_entropy_difference.value == pytest.approx(expected)


# -- settings, the verb and what it writes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"confidence": 1.0}, "--confidence"),
        ({"resamples": -1}, "--resamples"),
        ({"other_teachers": ("a",)}, "--other-cache"),
        ({"teachers": ("a", "a")}, "--teachers"),
    ],
)
def test_wrong_settings(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareConfig(cache=Path("c"), **wrong)  # type: ignore[arg-type]


def test_the_verb_writes_what_was_asked_for(
    pair: tuple[Path, list[Position], Dense, Dense], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    flags = ["--json", f"{out}/c.json", "--plots", f"{out}/plots", "--html", f"{out}/c.html", "--resamples", "50"]
    assert main(["compare", "--cache", str(pair[0]), "--teachers", "small", "big", *flags]) == 0
    printed = capsys.readouterr().out
    for word in ("perplexity", "alpha_5", "lower bound", "estimate", "top-1 agreement", "bytes per position"):
        assert word in printed
    record = json.loads((out / "c.json").read_text())
    assert [t["label"] for t in record["teachers"]] == ["small", "big"]
    assert set(record["teachers"][0]["perplexity"]) == {"value", "low", "high"}
    assert record["divergences"][0]["kl_estimate"]["low"] <= record["divergences"][0]["kl_estimate"]["high"]
    assert "assumption" in record["kl_estimate_rests_on"]
    for name in ("tail_mass", "divergence", "agreement"):
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "c.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((out / "plots").iterdir()))
    assert "http" not in page


def test_the_verb_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--cache", str(tmp_path / "none")]) == 1
    assert "tailcache prepare" in capsys.readouterr().err


def test_html_is_escaped(pair: tuple[Path, list[Position], Dense, Dense]) -> None:
    found = quiet(CompareConfig(cache=pair[0], resamples=0))
    assert "<script" not in comparison_html(found, {"<script>": b"x"})


def test_a_teacher_that_is_infinitely_wrong_gives_null_not_invalid_json(tmp_path: Path) -> None:
    corpus, positions = make_corpus(tmp_path / "c", vocab_size=V)
    dense = random_dense(len(positions), V, seed=1)
    for t, p in enumerate(positions):
        dense[t] = 1e-320 if t % 2 else dense[t]
        if t % 2:
            dense[t, (p.true_next + 1) % V] = 1.0
    add_teacher(corpus, positions, "wrong", dense, top_k=4, num_samples=0)
    record = quiet(CompareConfig(cache=tmp_path / "c", resamples=20)).to_json()
    json.dumps(record, allow_nan=False)
    assert record["teachers"][0]["cross_entropy"]["value"] > 300


def test_no_torch_is_imported(pair: tuple[Path, list[Position], Dense, Dense], tmp_path: Path) -> None:
    code = (
        "import sys; from tailcache.scripts.cli import main\n"
        f"assert main(['compare', '--cache', {str(pair[0])!r}, '--plots', {str(tmp_path)!r}]) == 0\n"
        f"assert main(['info', '--cache', {str(pair[0])!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
