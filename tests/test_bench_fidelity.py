"""The fidelity bench: sums equal to autograd through the losses, draws that are unbiased and vary as theory says."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_fixtures import save_teacher, tiny_model
from loss_cases import SIGMAS, teacher_logprobs
from tokenizer_fixtures import build_tokenizer
from torch import Tensor
from training_fixtures import make_corpus, one_thread

from tailcache.pipeline.config import CaptureConfig
from tailcache.scripts import bench_fidelity, embedded
from tailcache.scripts.bench_fidelity import BenchFidelity, bench, measure, quick
from tailcache.scripts.fidelity_gradients import Error, Pool, Problem, Scatter, Student, Weighting, pools
from tailcache.scripts.fidelity_positions import int8_rounded, rows_where, targets_of
from tailcache.scripts.fidelity_report import STORED, Entry, bars, compared, frontier
from tailcache.scripts.fidelity_schemes import (
    SCHEMES,
    Draws,
    certain,
    draw_all,
    tail_entropy,
    tails_of,
    thinned_to,
    variance,
)
from tailcache.storage.errors import ConfigError
from tailcache.trainers.divergences import forward_kl
from tailcache.trainers.tad import log_adaptive_beta, log_teacher_tail, weighted_tad
from tailcache.trainers.tails import TailFunction, bucket, prior, sampled
from tailcache.trainers.terms import TeacherTerms, student_terms

NUM, VOCAB, WIDTH, SPLIT = 24, 90, 7, 5
TOP_KS, NUM_DRAWS = (3, 8, 16), 4
SEGMENTS = torch.arange(NUM) // 9


def split_of(top_k: int) -> int:
    return min(SPLIT, top_k)


class Tiny:
    """One small problem, in float64, and what a cache of it would hold."""

    def __init__(self, kind: str = "zipf") -> None:
        generator = torch.Generator().manual_seed(5)
        self.logprobs = teacher_logprobs(kind, NUM, VOCAB)
        self.p = self.logprobs.exp()
        self.sorted, self.order = self.p.sort(dim=-1, descending=True, stable=True)
        self.tails = tails_of(self.sorted, self.order, max(TOP_KS) + 2 * NUM_DRAWS)
        self.next = torch.multinomial(self.p, 1, generator=generator)[:, 0]
        self.hidden = torch.randn((NUM, WIDTH), generator=generator, dtype=torch.float64)
        self.weight = torch.randn((VOCAB, WIDTH), generator=generator, dtype=torch.float64)
        noisy = self.logprobs + 0.3 * torch.randn((NUM, VOCAB), generator=generator, dtype=torch.float64)
        self.rounded = noisy.softmax(-1)
        self.prior = torch.rand(VOCAB, generator=generator, dtype=torch.float64) + 0.01

    def teacher(self, top_k: int, draws: Tensor | None = None) -> TeacherTerms:
        tail = self.sorted[:, top_k:]
        rest = self.logprobs.scatter(-1, self.next[:, None], -torch.inf)
        entropy = (-(tail / tail.sum(-1, keepdim=True)).log() * tail / tail.sum(-1, keepdim=True)).sum(-1)
        return TeacherTerms(
            vocab_size=VOCAB,
            token_ids=self.order[:, :top_k],
            logprobs=self.sorted[:, :top_k].log(),
            log_tail=tail.sum(-1).log(),
            tail_entropy=entropy,
            tail_samples=self.order[:, :0] if draws is None else draws,
            log_target=self.logprobs.gather(-1, self.next[:, None])[:, 0],
            log_not_target=rest.logsumexp(-1),
            next_tokens=self.next,
        )

    def renormalised(self, top_k: int) -> TeacherTerms:
        terms = self.teacher(top_k)
        log_mass = terms.logprobs.logsumexp(-1, keepdim=True)
        nothing = torch.full_like(terms.log_tail, -torch.inf)
        return replace(terms, logprobs=terms.logprobs - log_mass, log_tail=nothing)

    def log_beta(self, teacher: TeacherTerms, split: int) -> Tensor:
        return log_adaptive_beta(log_teacher_tail(teacher, split), SEGMENTS, beta=2.0)

    def problem(self) -> Problem:
        weightings = {}
        for top_k in TOP_KS:
            beta = self.log_beta(self.teacher(top_k), split_of(top_k)).exp()
            weightings["KL", top_k] = Weighting(name="KL", split=None, beta=torch.ones_like(beta))
            weightings["TAD", top_k] = Weighting(name="TAD", split=split_of(top_k), beta=beta)
        return Problem(
            tails=self.tails,
            next_T=self.next,
            next_p=self.p.gather(-1, self.next[:, None])[:, 0],
            weightings=weightings,
            renormalised_beta={k: self.log_beta(self.renormalised(k), split_of(k)).exp() for k in TOP_KS},
            mean_tail=dict.fromkeys(TOP_KS, self.prior),
            teacher=lambda rows: self.p[rows],
            rounded=lambda rows: self.rounded[rows],
        )

    def student(self) -> Student:
        logits = self.hidden @ self.weight.t()
        return Student(hidden_TD=self.hidden, probabilities=lambda rows: logits[rows].softmax(-1))

    def gradient(
        self, loss: str, teacher: TeacherTerms, tail: TailFunction, *, exact: TeacherTerms, num: int
    ) -> Tensor:
        """[V, D] of the first positions, by autograd through the library's losses."""
        weight = self.weight.clone().requires_grad_()
        rows = slice(num)
        terms = student_terms(
            (self.hidden @ weight.t())[rows], teacher.rows(rows), fills={"prior": self.prior, "exact": self.p[rows]}
        )
        if loss == "KL":
            values = forward_kl(teacher.rows(rows), terms, tail)
        else:
            split = split_of(exact.top_k)
            log_beta = self.log_beta(teacher, split)[rows]
            values = weighted_tad(teacher.rows(rows), terms, tail, top_k=split, log_beta_T=log_beta)
        (found,) = torch.autograd.grad(values.sum(), weight)
        return found

    def dense(self, loss: str, top_k: int, num: int) -> Tensor:
        """The exact gradient: everything is kept, so that no tail is needed."""
        whole = self.teacher(VOCAB)
        exact = self.teacher(top_k)
        return self.gradient(loss, whole, bucket, exact=exact, num=num)


def measured(estimate: Tensor, exact: Tensor) -> Error:
    difference = estimate - exact
    return Error(
        relative=float(difference.norm() / exact.norm()),
        cosine=float((estimate * exact).sum() / (estimate.norm() * exact.norm())),
        norm=float(difference.norm()),
    )


def assert_equal(found: Error, expected: Error) -> None:
    for name in ("relative", "cosine", "norm"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-8, abs=1e-10), name


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny()


def grown(tiny: Tiny, num: int) -> Pool:
    """Pooled in unequal chunks, and past a smaller pool, so that what is carried over is used."""
    *_, pool = pools(tiny.problem(), tiny.student(), (7, num), chunk=5)
    return pool


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("loss", ["KL", "TAD"])
@pytest.mark.parametrize("num", [10, NUM])
class TestSumsAreAutograds:
    def test_exact(self, tiny: Tiny, loss: str, top_k: int, num: int) -> None:
        exact = grown(tiny, num).exact(loss, top_k)
        torch.testing.assert_close(exact.gradient, tiny.dense(loss, top_k, num), rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("name", ["bucket", "prior", "renormalised"])
    def test_stored_tails(self, tiny: Tiny, loss: str, top_k: int, num: int, name: str) -> None:
        pool = grown(tiny, num)
        found = getattr(pool, name)(pool.exact(loss, top_k), loss, top_k)
        teacher = tiny.renormalised(top_k) if name == "renormalised" else tiny.teacher(top_k)
        tail: TailFunction = prior if name == "prior" else bucket
        estimate = tiny.gradient(loss, teacher, tail, exact=tiny.teacher(top_k), num=num)
        assert_equal(found, measured(estimate, tiny.dense(loss, top_k, num)))

    def test_draws(self, tiny: Tiny, loss: str, top_k: int, num: int) -> None:
        draws = draws_of(tiny, ("systematic",), top_k, NUM_DRAWS, 2)["systematic"]
        pool = grown(tiny, num)
        found = pool.sampled({loss: pool.exact(loss, top_k)}, top_k, draws, 1)[loss]
        teacher = tiny.teacher(top_k, draws.ids[1].long())
        estimate = tiny.gradient(loss, teacher, sampled, exact=teacher, num=num)
        expected = measured(estimate, tiny.dense(loss, top_k, num))
        # The weights of draws are kept in float32.
        assert found.relative == pytest.approx(expected.relative, rel=1e-5)
        assert found.cosine == pytest.approx(expected.cosine, rel=1e-5)


def test_sparse_sums_are_outer_products(tiny: Tiny) -> None:
    ids, weights = torch.randint(0, VOCAB, (NUM, 3)), torch.rand((NUM, 3), dtype=torch.float64)
    expected = torch.zeros((VOCAB, WIDTH), dtype=torch.float64)
    for t in range(NUM):
        for j in range(3):
            expected[ids[t, j]] += weights[t, j] * tiny.hidden[t]
    scatter = Scatter(ids)
    found = torch.zeros_like(expected).index_copy(0, scatter.rows, scatter.sums(weights, tiny.hidden))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", ["KL", "TAD"])
def test_a_tail_from_rounded_hidden_states(tiny: Tiny, loss: str) -> None:
    top_k, pool = TOP_KS[-1], grown(tiny, NUM)
    exact = pool.exact(loss, top_k)
    ids = tiny.tails.ids[:, :top_k]
    stand_in = tiny.rounded.scatter(-1, ids, 0.0)
    stand_in *= tiny.tails.mass[:, top_k, None] / stand_in.sum(-1, keepdim=True)
    beta = pool.problem.weightings[loss, top_k].beta
    error = (beta[:, None] * (tiny.p.scatter(-1, ids, 0.0) - stand_in)).t() @ tiny.hidden
    assert_equal(pool.from_hidden(exact, loss, top_k), measured(exact.gradient + error, exact.gradient))


def test_the_true_tokens_own_probability(tiny: Tiny) -> None:
    top_k, pool = TOP_KS[1], grown(tiny, NUM)
    draws = draws_of(tiny, ("systematic",), top_k, NUM_DRAWS, 1)["systematic"]
    exact = pool.exact("KL", top_k)
    stand_in = torch.zeros((NUM, VOCAB), dtype=torch.float64)
    stand_in.scatter_add_(-1, draws.ids[0].long(), draws.weights[0].double())
    beyond = ~(tiny.tails.ids[:, :top_k] == tiny.next[:, None]).any(-1)
    assert 0 < int(beyond.sum()) < NUM
    stand_in[beyond, tiny.next[beyond]] = tiny.p[beyond, tiny.next[beyond]]
    error = (tiny.p.scatter(-1, tiny.tails.ids[:, :top_k], 0.0) - stand_in).t() @ tiny.hidden
    found = pool.known_target({"KL": exact}, top_k, draws, 0)["KL"]
    assert found.norm == pytest.approx(float(error.norm()), rel=1e-5)


def test_a_sparse_stand_in_for_everything(tiny: Tiny) -> None:
    pool = grown(tiny, NUM)
    ids, weights = tiny.tails.ids[:, :6], tiny.tails.p[:, :6] * 1.1
    gradient = (tiny.student().probabilities(slice(None)) - tiny.p).t() @ tiny.hidden
    stand_in = torch.zeros_like(tiny.p).scatter(-1, ids, weights)
    assert_equal(pool.unsplit(ids, weights), measured(gradient + (tiny.p - stand_in).t() @ tiny.hidden, gradient))


def draws_of(tiny: Tiny, schemes: tuple[str, ...], top_k: int, num_draws: int, num_seeds: int) -> dict[str, Draws]:
    found = draw_all(
        tiny.p,
        tiny.sorted,
        tiny.order,
        tiny.tails,
        [(scheme, top_k, num_draws) for scheme in schemes],
        num_seeds=num_seeds,
        generator=torch.Generator().manual_seed(11),
    )
    return {scheme: found[scheme, top_k, num_draws] for scheme in schemes}


def stand_ins(draws: Draws) -> Tensor:
    """[n, T, V] float64: the weight every id ends up with."""
    num_seeds, num, num_draws = draws.ids.shape
    weights = draws.weights.double().expand(num_seeds, num, num_draws)
    return torch.zeros((num_seeds, num, VOCAB), dtype=torch.float64).scatter_add_(-1, draws.ids.long(), weights)


@pytest.mark.parametrize("kind", ["zipf", "random", "flat"])
@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_are_unbiased_and_as_far_off_as_theory_says(scheme: str, top_k: int, kind: str) -> None:
    tiny, num_seeds = Tiny(kind), 2000
    found = stand_ins(draws_of(tiny, (scheme,), top_k, 8, num_seeds)[scheme])
    expected = tiny.p.scatter(-1, tiny.tails.ids[:, :top_k], 0.0)
    assert (found[:, expected == 0] == 0).all()
    error = (found.mean(0) - expected).abs()
    # A count of mean x varies by at most x. 2,000 are compared, so one more sigma; some ids are drawn once or never.
    unit = tiny.tails.mass[:, top_k] / (thinned_to(tiny.tails, top_k, 8) if scheme == "thinned" else 8)
    sigma = (unit[:, None] * expected / num_seeds).sqrt() + unit[:, None] / num_seeds
    assert (error <= (SIGMAS + 1) * sigma + 1e-6).all()
    if scheme != "stratified":
        theory = variance(scheme, tiny.tails, top_k, 8)
        torch.testing.assert_close(found.var(0).sum(-1), theory, rtol=0.17, atol=1e-9)


@pytest.mark.parametrize("scheme", ["independent", "systematic"])
def test_knowing_one_token_takes_its_variance_away(tiny: Tiny, scheme: str) -> None:
    found = stand_ins(draws_of(tiny, (scheme,), 8, NUM_DRAWS, 4000)[scheme])
    problem = tiny.problem()
    known = problem.known(8)
    found[:, torch.arange(NUM), tiny.next] = tiny.p.gather(-1, tiny.next[:, None])[:, 0]
    theory = variance(scheme, tiny.tails, 8, NUM_DRAWS, known_T=known)
    torch.testing.assert_close(found.var(0).sum(-1), theory, rtol=0.12, atol=1e-9)


def test_systematic_counts_are_the_whole_numbers_around_what_is_due(tiny: Tiny) -> None:
    for scheme in ("systematic", "systematic by p"):
        found = stand_ins(draws_of(tiny, (scheme,), 3, 8, 50)[scheme])
        unit = tiny.tails.mass[:, 3] / 8
        due = tiny.p.scatter(-1, tiny.tails.ids[:, :3], 0.0) / unit[:, None]
        assert ((found / unit[:, None] - due).abs() < 1 + 1e-5).all()


def test_thresholds_keep_different_ids(tiny: Tiny) -> None:
    draws = draws_of(tiny, ("threshold",), 1, 8, 20)["threshold"]
    assert all(len(set(row)) == 8 for row in draws.ids.flatten(0, 1).tolist())
    kept = certain(tiny.tails, 1, 8)
    assert int(kept.max()) >= 1
    for t in range(NUM):
        assert (draws.ids[:, t, : kept[t]] == tiny.tails.ids[t, 1 : 1 + int(kept[t])]).all()


def test_thinned_draws_are_few_where_the_tail_is_light() -> None:
    peaked, flat = Tiny("peaked"), Tiny("flat")
    assert (thinned_to(peaked.tails, 3, 8) == 1).all()
    assert (thinned_to(flat.tails, 3, 8) == 8).all()
    draws = draws_of(peaked, ("thinned",), 3, 8, 3)["thinned"]
    assert (draws.ids == draws.ids[:, :, :1]).all()


def test_better_schemes_are_better(tiny: Tiny) -> None:
    def mean(scheme: str) -> float:
        return float(variance(scheme, tiny.tails, 1, 8).mean())

    assert mean("threshold") < mean("systematic") < mean("independent")


def test_tails_in_short(tiny: Tiny) -> None:
    for rank in (0, 3, 16):
        tail = tiny.sorted[:, rank:]
        torch.testing.assert_close(tiny.tails.mass[:, rank], tail.sum(-1))
        torch.testing.assert_close(tiny.tails.squares[:, rank], tail.square().sum(-1))
        entropy = -(tail / tail.sum(-1, keepdim=True)).log().mul(tail / tail.sum(-1, keepdim=True)).sum(-1)
        torch.testing.assert_close(tail_entropy(tiny.tails, rank), entropy)


def test_another_scheme_has_no_closed_form(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="stratified"):
        variance("stratified", tiny.tails, 3, 8)


def entry(what: str = STORED, top_k: int = 64, num_samples: int = 16, **values: Any) -> Entry:
    plain: dict[str, Any] = {
        "student": "untrained", "loss": "TAD", "positions": 100, "bytes": 100.0, "relative": 0.1, "spread": 0.001,
        "cosine": 0.99, "norm": 1.0,
    }  # fmt: skip
    return Entry(what=what, top_k=top_k, num_samples=num_samples, **{**plain, **values})


def test_the_frontier_is_what_nothing_cheaper_beats() -> None:
    cheap, middle = entry(bytes=50, relative=0.3), entry(bytes=80, relative=0.2)
    beaten, dear = entry(bytes=90, relative=0.25), entry(bytes=120, relative=0.1)
    assert frontier([dear, beaten, cheap, middle]) == [cheap, middle, dear]


def test_the_dense_sums_do_not_depend_on_where_positions_are_cut(tiny: Tiny) -> None:
    parts = [
        next(pools(tiny.problem(), tiny.student(), (NUM,), chunk=chunk)).exact("TAD", 8).part for chunk in (1, NUM)
    ]
    torch.testing.assert_close(parts[0], parts[1])


def test_theory_is_the_expected_squared_error(tiny: Tiny) -> None:
    """Of the pooled gradient, over 200 independent draws of all positions."""
    top_k, num_seeds = 8, 200
    config = BenchFidelity(
        top_ks=TOP_KS, num_samples=(NUM_DRAWS,), positions=(NUM,), study_top_ks=(top_k,), seeds=num_seeds
    )
    draws = {
        (scheme, top_k, NUM_DRAWS): each
        for scheme, each in draws_of(
            tiny, ("independent", "systematic", "threshold", "thinned"), top_k, NUM_DRAWS, num_seeds
        ).items()
    }
    draws["independent", 0, 50] = draw_all(
        tiny.p, tiny.sorted, tiny.order, tiny.tails, [("independent", 0, 50)], num_seeds=num_seeds,
        generator=torch.Generator().manual_seed(3),
    )["independent", 0, 50]  # fmt: skip
    sizes: dict[tuple[str, int, int], float] = defaultdict(lambda: 1.0)
    with one_thread():
        entries = list(measure("tiny", tiny.problem(), tiny.student(), draws, sizes, config))
    found = [e for e in entries if not math.isnan(e.theory)]
    assert {e.what for e in found} >= {"independent", "systematic + p(target)", "threshold", "thinned"}
    for each in found:
        assert (each.norm / each.theory) ** 2 == pytest.approx(1, abs=0.2), each
    # Deterministic tails are in the list too, once for each loss and K.
    assert sum(e.what == "prior" for e in entries) == 2 * len(TOP_KS)
    assert [e.what for e in entries if e.num_samples == 50] == ["RS-KD"]


def test_missed_bars_are_missed() -> None:
    defaults = CaptureConfig(cache=Path(), teacher="", name="")
    wanted: dict[str, Any] = {"top_k": defaults.top_k, "num_samples": defaults.num_samples}
    base = [
        entry(positions=num, norm=num**0.5, student=student, loss=loss, **wanted)
        for num in (100, 400)
        for student in ("untrained", "half-trained", "nearly converged")
        for loss in ("TAD", "KL")
    ]
    plain = [replace(e, what="renormalised (DistillKit)", relative=1.0, num_samples=0) for e in base]
    biased = [replace(e, what="bucket", relative=0.05, num_samples=0, bytes=90.0) for e in base]
    everything = [*base, *plain, *biased]
    assert all(bar.met for bar in bars(everything))

    def missed(entries: list[Entry]) -> list[str]:
        return [bar.name for bar in bars(entries) if not bar.met]

    better = replace(base[-1], top_k=7, num_samples=9, bytes=99.0, relative=0.08)
    assert len(missed([*everything, better])) == 1
    assert "(K = 7, m = 9)" in missed([*everything, better])[0]
    assert missed([*everything, replace(better, bytes=102.0)]) == []
    num_each = len(base) // 2
    flat = [replace(e, norm=float(e.positions)) for e in base]
    assert len(missed([*flat, *plain, *biased])) == num_each
    assert len(missed([*base, *[replace(e, relative=0.1) for e in plain], *biased])) == num_each
    assert len(missed([*base, *plain, *[replace(e, relative=1e-4) for e in biased]])) == num_each
    with pytest.raises(ConfigError, match="expected the defaults of capture"):
        bars([replace(e, num_samples=3) for e in base])


def test_schemes_are_compared_at_equal_bytes() -> None:
    head = entry("bucket", num_samples=0, bytes=80.0)
    plain, fewer = entry("independent", bytes=100.0, norm=2.0), entry("thinned", bytes=90.0, norm=2.2)
    _, line = compared([head, plain, fewer])
    assert line == "TAD,64,16,thinned,1.210,1.210,1.210,0.500,0.605"


def test_int8_hidden_states() -> None:
    hidden = torch.randn((5, 64))
    error = (int8_rounded(hidden) - hidden).abs()
    assert (error <= hidden.abs().amax(-1, keepdim=True) / 254 * 1.0001).all()
    assert float(error.max()) > 0


def test_rows_are_taken_apart_whole(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "cache", num_rows=8)
    rows = corpus.rows(0, 8)
    kept, others = rows_where(rows, rows.held_out), rows_where(rows, ~rows.held_out)
    assert len(kept) + len(others) == 8
    for index, row in enumerate(kept.row_indices):
        one, other = kept.slice(index, index + 1), corpus.rows(int(row), int(row) + 1)
        for name in ("tokens", "document_start", "supervised", "held_out"):
            assert (getattr(one, name) == getattr(other, name)).all()
    next_T, segments_T = targets_of(kept)
    assert len(next_T) == len(segments_T) == kept.supervised.sum()


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole bench, on a small random teacher in the place of SmolLM2."""
    tokenizer = build_tokenizer(eos="<|endoftext|>")
    model = tiny_model("llama", len(tokenizer), std=0.5, intermediate_size=64, max_position_embeddings=1024)
    folder = Path(save_teacher(tmp_path / "teacher", model, tokenizer))
    for module in (embedded, bench_fidelity):
        monkeypatch.setattr(module, "smollm2", lambda: folder)
    small = partial(replace, max_tokens=12_000)  # a document has more tokens with a small vocabulary
    monkeypatch.setattr(bench_fidelity, "quick", lambda config: small(quick(config)))
    bench(BenchFidelity(quick=True, json=tmp_path / "f.json", plot=tmp_path / "f.png"))
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert list(figures["kl_of_students"]) == ["untrained", "half-trained", "nearly converged"]
    assert figures["kl_of_students"]["untrained"] > figures["kl_of_students"]["half-trained"] > 1
    assert 0 < figures["kl_of_students"]["nearly converged"] < 0.5
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    table = [line.split(",") for line in figures["table"][1:]]
    drawn = {line[3] for line in table}
    assert drawn >= {"systematic", "thinned", "threshold", "bucket", "prior", "RS-KD", "hidden int8"}
    for line in table:
        assert float(line[7]) > 0
        assert float(line[6]) > 10
        if line[10] != "nan":
            assert float(line[10]) == pytest.approx(1, abs=0.15), line
    assert "bytes" in capsys.readouterr().out
