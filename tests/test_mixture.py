"""Mixtures of teachers against the dense mixture: in float64, exactly over the draws, and through real caches.

A linear loss is linear in what each draw stands for, so its expectation over all draws is had without drawing: every id
of a teacher's tail once, standing for its own share of that tail. What ``mix`` gives each draw is a test of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from loss_cases import CODEC_MAX, FLOAT32, FLOAT64, KINDS, Tolerance, assert_close, cached, slope, teacher_logprobs
from places import cache_folder
from tokenizer_fixtures import build_tokenizer
from torch import Tensor
from training_fixtures import logprobs_of, make_corpus, objective_for, tiny_model, write_teacher

from tailcache.pipeline.capture import capture
from tailcache.pipeline.config import CaptureConfig
from tailcache.storage.errors import ConfigError, MismatchError, NotFoundError
from tailcache.storage.reader import open_cache
from tailcache.storage.several import Teachers
from tailcache.trainers import divergences as d
from tailcache.trainers.atkd import atkd, group_weights
from tailcache.trainers.atoms import bucket_atoms
from tailcache.trainers.batches import CacheRows, collate, teacher_terms
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.distill import DistillTrainer, training_arguments
from tailcache.trainers.dkd import dkd, target_atoms, without_target
from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.loader import CacheLoader
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.metrics import METRICS, of_logits
from tailcache.trainers.mixture import mix, on_common
from tailcache.trainers.mixture_metrics import metrics_of_mixture
from tailcache.trainers.mixture_weights import MixtureWeights, documents_of_targets, weights_by_row
from tailcache.trainers.objective import Objective
from tailcache.trainers.own_rows import OwnRows
from tailcache.trainers.prepared import Aids
from tailcache.trainers.run import train
from tailcache.trainers.soundness import SOUND_TAILS, Stored, check_sound
from tailcache.trainers.sweep import SweepRun, _changes
from tailcache.trainers.tad import tad
from tailcache.trainers.tails import bucket, sampled
from tailcache.trainers.terms import TeacherTerms, student_terms
from tailcache.trainers.todi import todi

T, V = 12, 29
SEGMENTS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
SPLIT, BETA = 3, 1.7


@dataclass(frozen=True)
class Problem:
    """n teachers in full, what is stored of each, their weights, and a student."""

    dense: list[Tensor]
    stored: list[TeacherTerms]
    weights: Tensor
    logits: Tensor

    @property
    def mixture(self) -> TeacherTerms:
        return mix(self.stored, self.weights.log())

    @property
    def p(self) -> Tensor:
        """[T, V] the dense mixture."""
        return sum(
            (self.weights[:, i, None] * each.exp() for i, each in enumerate(self.dense)), torch.zeros(T, V).double()
        )

    @property
    def q(self) -> list[list[float]]:
        return [reference.softmax(row) for row in self.logits.tolist()]

    def active(self, t: int) -> list[int]:
        return [i for i in range(len(self.dense)) if self.weights[t, i] > 0]

    def common(self, t: int) -> list[int]:
        """The ids that all teachers with a weight stored, most likely first by the mixture."""
        heads = [set(self.stored[i].token_ids[t].tolist()) for i in self.active(t)]
        return sorted(set.intersection(*heads), key=lambda v: -self.p[t, v].item())

    def enumerated(self) -> TeacherTerms:
        """The mixture with every id of every tail as a draw, for the expectation over real draws."""
        drawn, shares = [], []
        mixture = self.mixture
        for i, (log_p, stored) in enumerate(zip(self.dense, self.stored, strict=True)):
            tail = log_p.exp().scatter(-1, stored.token_ids, 0.0)
            alpha = torch.where(stored.log_tail > -math.inf, stored.log_tail.exp(), 0.0)
            whole = mixture.log_tail.exp()
            some = (alpha > 0) & (whole > 0)
            share = torch.where(some, self.weights[:, i] / torch.where(some, whole, 1.0), 0.0)
            drawn.append(torch.arange(V).expand(T, V))
            shares.append(tail * share[:, None])
        assert mixture.mixed is not None
        mixed = replace(mixture.mixed, sample_shares=torch.cat(shares, -1))
        return replace(mixture, tail_samples=torch.cat(drawn, -1), mixed=mixed)


def _problem(kinds: tuple[str, ...], top_ks: tuple[int, ...], *, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    n = len(kinds)
    shared = teacher_logprobs("random", T, V, seed + 50)  # so that heads overlap
    dense = [
        torch.log_softmax(teacher_logprobs(kind, T, V, seed + i) + (0.0 if kind == "peaked" else shared), -1)
        for i, kind in enumerate(kinds)
    ]
    weights = torch.rand((T, n), generator=generator, dtype=torch.float64) + 0.05
    for t in range(T // 3):  # each teacher alone, and without one of them
        weights[3 * t, torch.arange(n) != t % n] = 0.0
        if n > 2:
            weights[3 * t + 1, t % n] = 0.0
    weights /= weights.sum(-1, keepdim=True)
    order = dense[0].sort(dim=-1, descending=True).indices
    next_tokens = torch.randint(V, (T,), generator=generator)
    next_tokens[0::4], next_tokens[1::4] = order[0::4, 0], order[1::4, -1]
    next_tokens[2::4] = dense[-1][2::4].argmax(-1)
    stored = [
        cached(each, top_k, 5 if top_k < V else 0, next_tokens, seed + 9 + i)
        for i, (each, top_k) in enumerate(zip(dense, top_ks, strict=True))
    ]
    logits = 1.5 * torch.randn((T, V), generator=generator, dtype=torch.float64)
    return Problem(dense, stored, weights, logits.requires_grad_())


PROBLEMS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    **{f"{kind}-and-random": ((kind, "random"), (8, 5)) for kind in KINDS},
    "three": (("random", "zipf", "random"), (4, 9, 6)),
    "one-whole": (("random", "random"), (V, 6)),
    "all-but-one": (("random", "random"), (V - 1, V - 1)),
    "wide": (("random", "flat"), (20, 25)),
}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return _problem(*PROBLEMS[request.param])


def test_the_union_is_what_loops_over_sets_find(problem: Problem) -> None:
    mixture = problem.mixture
    mixed = mixture.mixed
    assert mixed is not None
    assert mixed.num_common >= min(each.top_k for each in problem.stored)
    for t in range(T):
        expected_common = problem.common(t)
        ids, absent = mixture.token_ids[t].tolist(), mixed.absent[t].tolist()
        present = [v for v, gone in zip(ids, absent, strict=True) if not gone]
        common = [v for v, gone in zip(ids[: mixed.num_common], absent, strict=False) if not gone]
        assert common == expected_common
        union = {v for i in problem.active(t) for v in problem.stored[i].token_ids[t].tolist()}
        assert sorted(present) == sorted(union)
        assert set(ids) == union
        for k, v in enumerate(ids):
            known = math.fsum(
                problem.weights[t, i].item() * problem.dense[i][t, v].exp().item()
                for i in problem.active(t)
                if v in problem.stored[i].token_ids[t].tolist()
            )
            found = mixture.logprobs[t, k].exp().item()
            assert found == (0.0 if absent[k] else pytest.approx(known, rel=1e-10))
        rest = math.fsum(
            problem.weights[t, i].item() * problem.stored[i].log_tail[t].exp().item() for i in problem.active(t)
        )
        assert mixture.log_tail[t].exp().item() == pytest.approx(rest, rel=1e-10)
        # Nothing twice and nothing left out.
        assert mixture.logprobs[t].exp().sum().item() + rest == pytest.approx(1.0, rel=1e-10)
    y = mixture.next_tokens[:, None]
    assert_close(mixture.log_target.exp(), problem.p.gather(-1, y)[:, 0], FLOAT64)
    assert_close(mixture.log_not_target.exp(), problem.p.scatter(-1, y, 0.0).sum(-1), FLOAT64)


def test_each_draw_stands_for_its_teachers_share_of_the_tail(problem: Problem) -> None:
    mixture = problem.mixture
    assert mixture.mixed is not None
    drawing = [i for i, each in enumerate(problem.stored) if each.has_tail]
    for t in range(T):
        shares = torch.split(mixture.mixed.sample_shares[t], 5)
        for i, share in zip(drawing, shares, strict=True):
            mass = problem.weights[t, i] * problem.stored[i].log_tail[t].exp()
            assert_close(share * mixture.log_tail[t].exp(), (mass / 5).expand(5), FLOAT64)
    assert torch.equal(mixture.tail_samples, torch.cat([problem.stored[i].tail_samples for i in drawing], -1))


def _linear(problem: Problem, name: str, teacher: TeacherTerms, tail: Any) -> Tensor:
    student = student_terms(problem.logits, teacher)
    if tail is bucket:
        teacher, student = on_common(teacher, student)
    if name == "kd":
        return d.forward_kl(teacher, student, tail)
    if name == "tad":
        return tad(teacher, student, tail, top_k=SPLIT, beta=BETA, segments_T=SEGMENTS)
    return dkd(teacher, student, tail, target_weight=0.7, non_target_weight=1.3)


def _dense(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    """Value and gradient of a loss to the dense mixture, from the equations."""
    p, q = problem.p.tolist(), problem.q
    values, gradients = [], []
    heads = [problem.common(t)[:SPLIT] for t in range(T)]
    alphas = [reference.mass(p[t], reference.others(V, heads[t])) for t in range(T)]
    betas = reference.beta_x(alphas, SEGMENTS.tolist(), BETA)
    for t in range(T):
        y = int(problem.stored[0].next_tokens[t])
        if name == "kd":
            values.append(reference.forward_kl(p[t], q[t]))
            gradients.append(reference.kl_gradient(p[t], q[t]))
        elif name == "tad":
            values.append(reference.tad(p[t], q[t], heads[t], betas[t]))
            gradients.append(reference.tad_gradient(p[t], q[t], heads[t], betas[t]))
        else:
            of_y, gradient_y = reference.tckd(p[t], q[t], y)
            others, gradient_others = reference.nckd("exact", p[t], q[t], y, list(range(V)))
            values.append(0.7 * of_y + 1.3 * others)
            gradients.append([0.7 * a + 1.3 * b for a, b in zip(gradient_y, gradient_others, strict=True)])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


@pytest.mark.parametrize("name", ["kd", "tad", "dkd"])
def test_linear_losses_have_the_gradient_of_the_dense_mixture_on_average_over_draws(
    problem: Problem, name: str
) -> None:
    teacher = problem.enumerated()
    values = _linear(problem, name, teacher, sampled)
    expected, gradient = _dense(problem, name)
    assert_close(slope(values, problem.logits), gradient, FLOAT64)
    # The value is a lower bound, off by a constant of the student's.
    assert (values <= expected + 1e-9).all()
    if name == "kd":
        assert teacher.mixed is not None
        assert (expected <= values + teacher.mixed.gap + 1e-9).all()
        other = replace(problem, logits=(2 * problem.logits.detach().flip(0)).requires_grad_())
        shifted = _dense(other, name)[0] - _linear(other, name, teacher, sampled)
        assert_close(shifted.detach(), (expected - values).detach(), FLOAT64)
        alone = torch.tensor([len(problem.active(t)) == 1 for t in range(T)])
        assert alone.any()
        assert teacher.mixed.gap[alone].max() < 1e-12


@pytest.mark.parametrize("name", ["kd", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "todi"])
def test_the_bucket_is_the_loss_on_atoms_of_which_every_mass_is_exact(problem: Problem, name: str) -> None:
    functions: dict[str, Any] = {
        "kd": d.kl,
        "reverse_kl": d.reverse_kl,
        "jsd": partial(d.jsd, mixture=0.3),
        "skew_kl": partial(d.skew_kl, skew=0.2),
        "skew_reverse_kl": partial(d.skew_reverse_kl, skew=0.2),
        "todi": todi,
    }
    weight = {"jsd": 0.3, "skew_kl": 0.2, "skew_reverse_kl": 0.2}.get(name, 0.0)
    teacher, student = on_common(problem.mixture, student_terms(problem.logits, problem.mixture))
    values = functions[name](*bucket_atoms(teacher, student))
    p, q = problem.p.tolist(), problem.q
    gradients = slope(values, problem.logits)
    for t in range(T):
        common = problem.common(t)
        rest = reference.others(V, common)
        atoms = [(p[t][v], [v]) for v in common] + ([(reference.mass(p[t], rest), rest)] if rest else [])
        value, gradient = reference.atom_loss("kl" if name == "kd" else name, atoms, q[t], weight)
        assert values[t].item() == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert_close(gradients[t], torch.tensor(gradient, dtype=torch.float64), FLOAT64)
    if name != "todi":
        dense = functions[name](problem.p.log(), torch.log_softmax(problem.logits, -1))
        assert (values <= dense + 1e-9).all()


@pytest.mark.parametrize("name", ["kd", "tad", "dkd"])
def test_the_bucket_of_a_linear_loss_is_that_of_one_teacher_who_stored_the_common_ids(
    problem: Problem, name: str
) -> None:
    values = _linear(problem, name, problem.mixture, bucket)
    gradients = slope(values, problem.logits)
    for t in range(T):
        order = problem.common(t)
        p, q, y = problem.p[t].tolist(), problem.q[t], int(problem.stored[0].next_tokens[t])
        if name == "kd":
            value, gradient = reference.atom_loss("kl", reference.atoms("bucket", p, order), q)
        elif name == "dkd":
            of_y, gradient_y = reference.tckd(p, q, y)
            others, gradient_others = reference.nckd("bucket", p, q, y, order)
            value = 0.7 * of_y + 1.3 * others
            gradient = [0.7 * a + 1.3 * b for a, b in zip(gradient_y, gradient_others, strict=True)]
        else:
            continue
        assert values[t].item() == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert_close(gradients[t], torch.tensor(gradient, dtype=torch.float64), FLOAT64)
    if name == "tad":
        assert (values <= _dense(problem, name)[0] + 1e-9).all()


def test_a_teacher_with_all_of_the_weight_is_that_teacher() -> None:
    problem = _problem(("random", "zipf"), (8, 5))
    for i in range(2):
        weights = torch.zeros(T, 2, dtype=torch.float64)
        weights[:, i] = 1.0
        alone = replace(problem, weights=weights)
        for name in ("kd", "tad", "dkd"):
            for tail in (sampled, bucket):
                found, expected = (_linear(alone, name, each, tail) for each in (alone.mixture, problem.stored[i]))
                assert_close(found, expected, FLOAT64)
                assert_close(slope(found, problem.logits), slope(expected, problem.logits), FLOAT64)


def test_with_every_id_stored_the_mixture_is_plain_targets_of_the_dense_one() -> None:
    problem = _problem(("random", "zipf", "peaked"), (V, V, V))
    mixture, dense = problem.mixture, cached(problem.p.log(), V, 0, problem.stored[0].next_tokens)
    assert mixture.mixed is None
    assert not mixture.has_tail
    assert mixture.num_samples == 0
    for name in ("token_ids", "logprobs", "log_tail", "tail_entropy", "log_target", "log_not_target"):
        assert_close(getattr(mixture, name), getattr(dense, name), FLOAT64)


def test_positions_can_be_taken_from_a_mixture_and_none_is_fine() -> None:
    problem = _problem(("random", "zipf"), (8, 5))
    values = _linear(problem, "kd", problem.mixture, sampled)
    rows = slice(3, 7)
    part = d.forward_kl(
        problem.mixture.rows(rows), student_terms(problem.logits[rows], problem.mixture.rows(rows)), sampled
    )
    assert_close(part, values[rows], FLOAT64)
    empty = mix([each.rows(slice(0, 0)) for each in problem.stored], problem.weights[:0].log())
    assert len(empty) == 0
    with pytest.raises(MismatchError, match=r"expected weights \[12 positions, 2 teachers\], found \[11, 2\]"):
        mix(problem.stored, problem.weights[1:].log())
    with pytest.raises(MismatchError, match="other next tokens"):
        mix(
            [problem.stored[0], replace(problem.stored[1], next_tokens=problem.stored[1].next_tokens + 1)],
            problem.weights,
        )


def test_a_teacher_without_draws_leaves_the_mixture_without_any() -> None:
    problem = _problem(("random", "zipf"), (8, 5))
    mute = replace(problem.stored[1], tail_samples=problem.stored[1].tail_samples[:, :0])
    mixture = mix([problem.stored[0], mute], problem.weights.log())
    assert mixture.num_samples == 0
    with pytest.raises(ConfigError, match="expected at least one stored tail sample"):
        _linear(problem, "kd", mixture, sampled)


def test_metrics_enclose_the_kl_to_the_mixture_and_name_that_to_each_teacher(problem: Problem) -> None:
    values = metrics_of_mixture(partial(of_logits, problem.logits), problem.enumerated(), problem.stored)
    assert values.shape == (T, len(METRICS) + 1 + len(problem.stored))
    log_q = torch.log_softmax(problem.logits, -1)
    dense = d.kl(problem.p.log(), log_q)
    assert (values[:, 1] <= dense + 1e-9).all()
    assert (dense <= values[:, 4] + 1e-9).all()
    assert_close(values[:, 3], -problem.p.gather(-1, problem.stored[0].next_tokens[:, None])[:, 0].log(), FLOAT64)
    for i, each in enumerate(problem.stored):
        alone = d.forward_kl(each, student_terms(problem.logits, each), sampled)
        assert_close(values[:, 5 + i], alone.detach(), FLOAT64)
    likeliest = torch.tensor([problem.common(t)[0] if problem.common(t) else -1 for t in range(T)])
    certain = likeliest == problem.p.argmax(-1)
    agrees = (problem.logits.argmax(-1) == problem.p.argmax(-1)).to(values.dtype)
    assert_close(values[certain, 2], agrees[certain], FLOAT64)
    assert certain.any()


# -- the teachers' own rows ---------------------------------------------------------------------------------------


def _hidden() -> tuple[list[LinearHead], dict[str, Tensor], Tensor, Tensor]:
    """Two heads of different widths, hidden states of both as a batch has them, log weights, the dense log mixture."""
    generator = torch.Generator().manual_seed(3)
    widths = (6, 4)
    heads = [
        LinearHead(weight=torch.randn((V, width), generator=generator), vocab_size=V, scale=0.8) for width in widths
    ]
    hidden = [torch.randn((T, width), generator=generator).bfloat16() for width in widths]
    log_w = torch.rand((T, 2), generator=generator).log_softmax(-1)
    log_w[0], log_w[1] = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    p = sum(
        (
            log_w[:, i, None].double().exp() * torch.softmax(heads[i].logits(hidden[i].float()).double(), -1)
            for i in range(2)
        ),
        torch.zeros(T, V).double(),
    )
    fields = {"hidden": hidden[0].view(torch.uint16), "1/hidden": hidden[1].view(torch.uint16)}
    return heads, fields, log_w, p.log()


def test_own_rows_of_several_teachers_are_their_mixture_and_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, fields, log_w, log_p = _hidden()
    own = OwnRows.of({"teacher": fields, "log_weights": log_w}, heads)
    assert_close(own(slice(0, T)).double(), log_p, FLOAT32)
    next_tokens = torch.arange(T) % V
    monkeypatch.setattr("tailcache.trainers.own_rows.piece_height", lambda *_: 5)
    for top_k in (4, V):
        found, expected = own.terms(top_k, next_tokens), cached(log_p, top_k, 0, next_tokens)
        assert torch.equal(found.token_ids, expected.token_ids)
        for name in ("logprobs", "log_tail", "tail_entropy", "log_target", "log_not_target"):
            assert_close(getattr(found, name).double(), getattr(expected, name), FLOAT32)


def test_every_loss_with_the_exact_tail_is_that_to_the_dense_mixture() -> None:
    heads, fields, log_w, log_p = _hidden()
    logits = torch.randn((T, V), generator=torch.Generator().manual_seed(4)).requires_grad_()
    log_q = torch.log_softmax(logits, -1)
    next_tokens = torch.arange(T) % V
    dense = cached(log_p.float(), V, 0, next_tokens)
    whole = student_terms(logits, dense)
    expected = {
        "kd": d.kl(log_p, log_q),
        "reverse_kl": d.reverse_kl(log_p, log_q),
        "jsd": d.jsd(log_p, log_q, 0.5),
        "todi": todi(log_p, log_q),
        "dkd": dkd(dense, whole, bucket, target_weight=1.0, non_target_weight=1.0),
        "tad": tad(dense, whole, bucket, top_k=SPLIT, beta=BETA, segments_T=SEGMENTS),
    }
    stored = Stored(top_k=5, vocab_size=V, num_samples=2, hidden_kind="bf16", num_teachers=2)
    for name, values in expected.items():
        own = {"top_k": SPLIT, "beta": BETA} if name == "tad" else {}
        loss = LossConfig(name=name, tail="exact", **own)  # type: ignore[arg-type]
        objective = Objective(clm_weight=1.0, losses=(loss,), stored=stored)
        assert objective.optional == ("hidden",)
        batch = {"segments": SEGMENTS, "rows": SEGMENTS, "teacher": fields, "log_weights": log_w}
        stale = cached(torch.log_softmax(torch.zeros(T, V), -1), 5, 2, next_tokens)
        prepared = objective.prepare(stale, batch, Aids(fills={}, heads=tuple(heads)))
        total, parts = prepared.from_logits(logits, torch.tensor([0.0, 1.0]))
        assert_close(parts[:, 1], values.float().detach(), FLOAT32)
        assert_close(slope(total, logits), slope(values, logits), FLOAT32)


def test_an_objective_gives_each_loss_of_a_sum_its_own_atoms() -> None:
    """`sampled` on the union and `bucket` on the common ids, in one pass over the student's logits."""
    problem = _problem(*PROBLEMS["three"])
    stored = Stored(top_k=4, vocab_size=V, num_samples=5, num_teachers=3)
    losses = (
        LossConfig(name="kd", tail="sampled"),
        LossConfig(name="reverse_kl", tail="bucket"),
        LossConfig(name="tad", tail="sampled", top_k=SPLIT, beta=BETA),
        LossConfig(name="atkd", tail="bucket", wraps="reverse_kl"),
    )
    objective = Objective(clm_weight=1.0, losses=losses, stored=stored)
    batch = {"segments": SEGMENTS, "rows": SEGMENTS, "teacher": {}, "log_weights": problem.weights.log()}
    prepared = objective.prepare(problem.mixture, batch, Aids(fills={}))
    _, parts = prepared.from_logits(problem.logits, torch.ones(5).double())
    student = student_terms(problem.logits, problem.mixture)
    common = on_common(problem.mixture, student)
    assert_close(parts[:, 1], _linear(problem, "kd", problem.mixture, sampled).detach(), FLOAT64)
    assert_close(parts[:, 2], d.reverse_kl(*bucket_atoms(*common)).detach(), FLOAT64)
    assert_close(parts[:, 3], _linear(problem, "tad", problem.mixture, sampled).detach(), FLOAT64)
    weights, hard = group_weights(problem.p.scatter(-1, problem.mixture.next_tokens[:, None], 0.0).sum(-1).log())
    others = d.reverse_kl(*bucket_atoms(*without_target(*common)))
    expected = atkd(d.reverse_kl(*target_atoms(*common)), others, weights, hard)
    assert_close(parts[:, 4], expected.detach(), FLOAT64)


# -- soundness ----------------------------------------------------------------------------------------------------


def test_what_a_mixture_cannot_give_is_refused_with_the_reason() -> None:
    mixed = Stored(top_k=8, vocab_size=37, num_samples=4, hidden_kind="bf16", num_teachers=2)
    for loss, tails in SOUND_TAILS.items():
        for tail in tails:
            if tail in ("drop", "renormalise", "prior", "uniform"):
                with pytest.raises(ConfigError, match="expected sampled, bucket or exact for a mixture of 2 teachers"):
                    check_sound(loss, tail, 1.0, mixed)
            elif loss != "rs_kd":
                check_sound(loss, tail, 1.0, mixed)
    with pytest.raises(ConfigError, match="take 'kd', which has the same expectation"):
        check_sound("rs_kd", "sampled", 1.0, mixed)
    with pytest.raises(ConfigError, match="has no hidden states; train from one teacher"):
        check_sound("hidden_cosine", None, 1.0, mixed)
    with pytest.raises(ConfigError, match=r"expected 1, or the tail 'exact'.*found 2"):
        check_sound("kd", "bucket", 2.0, mixed)
    check_sound("kd", "exact", 2.0, mixed)
    with pytest.raises(ConfigError, match="at least one stored tail sample"):
        check_sound("kd", "sampled", 1.0, replace(mixed, num_samples=0))
    with pytest.raises(ConfigError, match="hidden states in the cache"):
        check_sound("reverse_kl", "exact", 1.0, replace(mixed, hidden_kind="none"))
    check_sound("rs_kd", "sampled", 1.0, replace(mixed, top_k=37, num_samples=0))


# -- real caches --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caches:
    """One corpus, two models over it, each stored truncated and whole, and what they said in full."""

    small: Teachers
    whole: Teachers
    log_p: list[Tensor]
    next_tokens: Tensor


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    corpus = make_corpus(tmp_path_factory.mktemp("mixture") / "cache")
    found = [logprobs_of(tiny_model(corpus.vocab_size, seed=seed), corpus) for seed in (1, 2)]
    V_all = corpus.vocab_size
    for name, (log_p, targets), top_k in zip("ab", found, (12, 7), strict=True):
        write_teacher(corpus, log_p, targets, name=name, top_k=top_k, num_samples=6)
        write_teacher(corpus, log_p, targets, name=f"whole-{name}", top_k=V_all, num_samples=0)
    cache = open_cache(cache_folder(corpus))
    pairs = [Teachers([cache.teacher(f"{prefix}{name}") for name in "ab"]) for prefix in ("", "whole-")]
    return Caches(pairs[0], pairs[1], [each for each, _ in found], torch.from_numpy(found[0][1]))


def _batch(teachers: Teachers, weights: MixtureWeights, rows: slice = slice(None)) -> dict[str, Any]:
    return weights(
        collate(
            list(map(CacheRows(teachers, np.arange(teachers.num_rows)).__getitem__, range(teachers.num_rows)))[rows]
        )
    )


def test_teachers_are_read_in_one_pass_and_alike_however_they_are_read(caches: Caches) -> None:
    teachers = caches.small
    assert (teachers.name, teachers.top_k, teachers.num_samples) == ("a + b", 7, 6)
    batches: list[list[dict[str, Tensor]]] = [
        list(CacheLoader(teachers, batch_rows=4, seed=3, num_workers=workers)) for workers in (0, 1)
    ]
    alone = [list(CacheLoader(each, batch_rows=4, seed=3)) for each in teachers.teachers]
    assert len(batches[0]) == len(alone[0]) > 2
    for together, worked, *each in zip(*batches, *alone, strict=True):
        assert together.keys() == worked.keys()
        for name, values in together.items():
            assert torch.equal(worked[name], values), name
        for name, values in each[0].items():
            assert torch.equal(together[name], values), name
        for name in ("token_ids", "logprobs", "tail_samples", "log_tail"):
            assert torch.equal(together[f"1/{name}"], each[1][name]), name


def test_a_mixture_from_a_cache_is_the_dense_one(caches: Caches) -> None:
    weights = MixtureWeights(corpus=caches.whole.corpus, constant=(3.0, 1.0))
    terms = teacher_terms(_batch(caches.whole, weights), caches.whole.vocab_size)
    found = torch.empty_like(terms.logprobs).scatter(-1, terms.token_ids, terms.logprobs).exp().double()
    dense = 0.75 * caches.log_p[0].exp() + 0.25 * caches.log_p[1].exp()
    assert (dense * (dense.log() - found.log())).sum(-1).abs().max() < CODEC_MAX
    assert torch.equal(terms.next_tokens, caches.next_tokens)
    assert_close(
        terms.log_target.double(), dense.gather(-1, caches.next_tokens[:, None])[:, 0].log(), Tolerance(1e-3, 1e-3)
    )


def test_the_loss_of_a_trainer_is_that_to_the_dense_mixture(caches: Caches, tmp_path: Path) -> None:
    """With every id stored, and with truncated heads: a lower bound less than the gap below."""
    model = tiny_model(caches.whole.vocab_size, seed=7)
    dense = (0.5 * caches.log_p[0].exp() + 0.5 * caches.log_p[1].exp()).log()
    log_q, _ = logprobs_of(model, caches.whole.corpus)
    expected = d.kl(dense, log_q)
    for teachers, low, high in ((caches.whole, 1e-3, 1e-3), (caches.small, 0.5, 0.1)):
        trainer = DistillTrainer(
            model,
            training_arguments(_config(teachers, tmp_path)),
            teacher=teachers,
            objective=objective_for(teachers, "kd", clm_weight=0.0),  # type: ignore[arg-type]
        )
        batch = trainer._prepare_inputs(_batch(teachers, trainer.mixture_weights))  # type: ignore[arg-type]
        _, parts = trainer.compute_loss(model, batch, return_outputs=True)
        found = parts["values"][:, 1].double().mean()
        assert expected.mean() - low < found < expected.mean() + high
        metrics = trainer.held_out_metrics(trainer.held_out)
        assert {"kl_upper", *(f"kl/{each.name}" for each in teachers.teachers)} < metrics.keys()
        assert metrics["kl"] <= metrics["kl_upper"]
        assert trainer.kl_is == ("exact" if teachers is caches.whole else "lower bound")


@pytest.mark.slow
def test_the_exact_tail_of_real_captures_is_the_dense_mixture(tmp_path: Path) -> None:
    """Hidden states as bf16 of one teacher and int8 of another; the truth from the models themselves."""
    tokenizer = build_tokenizer("wordlevel")
    corpus = make_corpus(tmp_path / "cache", tokenizer, num_rows=12)
    log_p = []
    for kind, seed in (("bf16", 1), ("int8", 2)):
        model = tiny_model(corpus.vocab_size, seed=seed)
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        settings: dict[str, Any] = {"hidden": kind, "top_k": 6, "num_samples": 4, "device": "cpu"}
        capture(
            CaptureConfig(cache=tmp_path / "cache", teacher=str(tmp_path / kind), name=kind, **settings),
            show_progress=False,
        )
        log_p.append(logprobs_of(model, corpus)[0])
    cache = open_cache(tmp_path / "cache")
    teachers = Teachers([cache.teacher("bf16"), cache.teacher("int8")])
    dense = (0.25 * log_p[0].exp() + 0.75 * log_p[1].exp()).log()
    student = tiny_model(corpus.vocab_size, seed=7)
    log_q, _ = logprobs_of(student, corpus)
    for name, function in (("kd", d.kl), ("reverse_kl", d.reverse_kl)):
        trainer = DistillTrainer(
            student,
            training_arguments(_config(teachers, tmp_path / "out")),
            teacher=teachers,
            objective=objective_for(teachers, name, clm_weight=0.0, tail="exact"),  # type: ignore[arg-type]
            mixture_weights=MixtureWeights(corpus=corpus, constant=(1.0, 3.0)),
        )
        batches = list(trainer.get_train_dataloader())
        parts = [
            trainer.compute_loss(student, trainer._prepare_inputs(batch), return_outputs=True)[1]["values"][:, 1]
            for batch in batches
        ]
        rows = np.concatenate([batch["rows"].unique_consecutive().numpy() for batch in batches])
        offsets = corpus.target_offsets(0, corpus.num_rows)
        where = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
        expected = function(dense[where], log_q[where])
        assert_close(torch.cat(parts).double(), expected, Tolerance(0.1, 0.05))
        assert abs(torch.cat(parts).double().mean() / expected.mean() - 1) < 0.01


def _config(source: Teachers, out: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "student": StudentConfig(hidden_size=24, num_layers=1, num_heads=2),
        "learning_rate": 1e-2,
        "batch_rows": 4,
        "max_steps": 4,
        "eval_every": 2,
        "log_every": 1,
        "device": "cpu",
    }
    return TrainConfig(cache=cache_folder(source.corpus), out=out, **{**defaults, **settings})


@pytest.mark.slow
def test_a_run_names_its_mixture_and_continues_only_as_itself(
    caches: Caches, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "teachers": ("a", "b"),
        "teacher_weights": (3.0, 1.0),
        "teacher_confidence": "entropy",
        "save_every": 2,
        "schedule": "constant",
        "warmup": 0.0,
        "loss": "tad",
        "top_k": 3,
    }
    whole = train(_config(caches.small, tmp_path / "whole", **settings))
    assert "mixture of teachers 'a' (0.75), 'b' (0.25), times exp(-1 entropy)" in capsys.readouterr().out
    train(_config(caches.small, tmp_path / "out", **{**settings, "max_steps": 2}))
    again = train(_config(caches.small, tmp_path / "out", **settings, resume=True, workers=1))
    assert whole is not None
    assert again is not None
    assert again.model is not None
    assert whole.model is not None
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "out" / "tailcache.json").read_text())
    assert record["teacher"] == "a + b"
    assert record["config"]["teacher_weights"] == [3.0, 1.0]
    assert train(_config(caches.small, tmp_path / "out", **settings, resume=True)) is None
    for other in ({"teacher_weights": (1.0, 1.0)}, {"teachers": ("b", "a")}, {"teacher_confidence": "none"}):
        with pytest.raises(MismatchError, match="cannot be continued"):
            train(_config(caches.small, tmp_path / "out", **{**settings, **other}, resume=True))
    plain = train(_config(caches.small, tmp_path / "clm", **{**settings, "loss": "clm", "top_k": None, "max_steps": 1}))
    assert plain is not None  # no targets are read, and so no weights made
    run = SweepRun(name="out", config=_config(caches.small, tmp_path / "out", **settings))
    assert list(_changes(run.config, record, open_cache(cache_folder(caches.small.corpus)))) == [
        f"{tmp_path / 'out'} holds a run that no sweep has begun"
    ]


def test_teachers_that_do_not_belong_together_are_refused(caches: Caches, tmp_path: Path) -> None:
    a, b = caches.small.teachers
    with pytest.raises(ConfigError, match="expected at least two, found a"):
        Teachers([a])
    with pytest.raises(ConfigError, match="found 'a' twice"):
        Teachers([a, b, a])
    other = make_corpus(tmp_path / "cache", seed=9)
    log_p, targets = logprobs_of(tiny_model(other.vocab_size), other)
    with pytest.raises(MismatchError, match="expected one corpus"):
        Teachers([a, write_teacher(other, log_p, targets, name="c", top_k=5, num_samples=2)])
    with pytest.raises(ConfigError, match=r"unfinished: expected refuse or wait"):
        train(_config(caches.small, tmp_path / "out", teachers=("a", "b"), unfinished="prefix"))


# -- weights ------------------------------------------------------------------------------------------------------


def _weights(batch: dict[str, Any]) -> Tensor:
    found: Tensor = batch["log_weights"].exp().double()
    return found


def test_weights_by_row_position_and_domain(caches: Caches, tmp_path: Path) -> None:
    corpus = caches.small.corpus
    generator = np.random.default_rng(0)
    rows = generator.random((corpus.num_rows, 2)) + 0.1
    rows[3] = [0.0, 2.0]
    positions = generator.integers(0, 3, corpus.num_targets).astype(np.uint8)
    table = np.array([[1.0, 0.0], [1.0, 3.0], [0.0, 1.0]])
    some = slice(2, 9)  # not from the beginning, so that positions have to be counted
    offsets = corpus.target_offsets(0, corpus.num_rows)
    row_of = np.repeat(np.arange(corpus.num_rows), np.diff(offsets))[offsets[2] : offsets[9]]
    by_row = MixtureWeights(corpus=corpus, constant=(1.0, 1.0), by="rows", values=rows)
    expected = rows / rows.sum(1, keepdims=True)
    assert_close(_weights(_batch(caches.small, by_row, some)), torch.from_numpy(expected[row_of]), FLOAT32)
    np.savez(tmp_path / "weights.npz", positions=positions, weights=table)
    config = _config(caches.small, tmp_path, teachers=("a", "b"), teacher_weights_file=tmp_path / "weights.npz")
    by_domain = MixtureWeights.from_config(config, caches.small)
    expected = (table / table.sum(1, keepdims=True))[positions[offsets[2] : offsets[9]]]
    assert_close(_weights(_batch(caches.small, by_domain, some)), torch.from_numpy(expected), FLOAT32)
    assert by_domain.hash != by_row.hash
    np.savez(tmp_path / "weights.npz", positions=positions, weights=2 * table)
    assert MixtureWeights.from_config(config, caches.small).hash != by_domain.hash


@pytest.mark.parametrize("confidence", ["target", "entropy"])
def test_weights_by_confidence_are_their_formula(caches: Caches, confidence: Any) -> None:
    corpus = caches.small.corpus
    weights = MixtureWeights(corpus=corpus, constant=(2.0, 1.0), confidence=confidence, sharpness=1.5)
    found = _weights(_batch(caches.small, weights))
    p = [each.exp() for each in caches.log_p]
    if confidence == "target":
        score = [each.gather(-1, caches.next_tokens[:, None])[:, 0] ** 1.5 for each in p]
    else:
        score = [torch.exp(-1.5 * torch.special.entr(each).sum(-1)) for each in p]
    expected = torch.stack([2.0 * score[0], score[1]], -1)
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True), rtol=0.0, atol=2e-3)
    sharp = MixtureWeights(corpus=corpus, constant=(1.0, 1.0), confidence=confidence, sharpness=1e6)
    assert_close(_weights(_batch(caches.small, sharp)).amax(-1), torch.ones(len(expected)).double(), FLOAT32)
    even = MixtureWeights(corpus=corpus, constant=(1.0, 1.0), confidence=confidence, sharpness=0.0)
    assert_close(_weights(_batch(caches.small, even)), torch.full((len(expected), 2), 0.5).double(), FLOAT32)


def test_documents_of_targets_are_counted_by_side_and_over_rows(caches: Caches) -> None:
    corpus = caches.small.corpus
    found = documents_of_targets(corpus)
    rows = corpus.rows(0, corpus.num_rows)
    begun, current, expected = -1, {False: 0, True: 0}, []
    for i in range(corpus.num_rows):
        row = rows.slice(i, i + 1)
        side = bool(row.held_out[0])
        for start, wanted in zip(row.document_start, row.supervised, strict=True):
            if start:
                begun += 1
                current[side] = begun
            if wanted:
                expected.append(current[side])
    assert found.tolist() == expected
    assert len(found) == corpus.num_targets
    lengths = weights_by_row(corpus, lambda row: len(row.tokens))
    assert lengths.tolist() == np.diff(rows.offsets).tolist()


def test_weights_that_cannot_be_are_refused(caches: Caches, tmp_path: Path) -> None:
    corpus = caches.small.corpus
    three = MixtureWeights(corpus=corpus, constant=(1.0, 1.0, 1.0))
    for teacher, num in ((caches.small, 2), (caches.small.teachers[0], 1)):
        with pytest.raises(ConfigError, match=f"expected those of {num} teachers .*, found 3"):
            MixtureWeights.for_teacher(teacher, three)
    even: dict[str, Any] = {"corpus": corpus, "constant": (1.0, 1.0)}
    num = corpus.num_rows
    for values, message in (
        (np.ones((num, 3)), rf"rows: expected weights \[{num}, 2\], one column for each teacher; found float64"),
        (np.full((num, 2), -1.0), "expected finite weights >= 0 that are not all 0, found .* at 0"),
        (np.zeros((num, 2)), "that are not all 0"),
        (np.full((num, 2), np.nan), "expected finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            MixtureWeights(**even, values=values)
    with pytest.raises(ConfigError, match="expected domains from 0 to 1, as weights has; found 0 to 2"):
        MixtureWeights(**even, values=np.arange(num) % 3, table=np.ones((2, 2)))
    with pytest.raises(ConfigError, match=f"expected {num} whole numbers, one domain for each"):
        MixtureWeights(**even, values=np.zeros(num), table=np.ones((2, 2)))
    config = partial(_config, caches.small, tmp_path, teachers=("a", "b"))
    with pytest.raises(NotFoundError, match=r"none\.npz does not exist"):
        MixtureWeights.from_config(config(teacher_weights_file=tmp_path / "none.npz"), caches.small)
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("rows")
    for name in ("one.npy", "text.npz"):
        with pytest.raises(ConfigError, match=r"expected an \.npz file of NumPy arrays"):
            MixtureWeights.from_config(config(teacher_weights_file=tmp_path / name), caches.small)
    np.savez(tmp_path / "both.npz", rows=np.ones((num, 2)), positions=np.ones((corpus.num_targets, 2)))
    with pytest.raises(ConfigError, match="expected an array rows or positions"):
        MixtureWeights.from_config(config(teacher_weights_file=tmp_path / "both.npz"), caches.small)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_weights": (1.0, 2.0)}, "teacher_weights: belongs to teachers, of which none are given"),
        ({"teachers": ("a",)}, "expected two or more different names, found a"),
        ({"teachers": ("a", "a")}, "expected two or more different names, found a, a"),
        ({"teachers": ("a", "b"), "teacher": "a"}, "expected teachers or teacher, found both"),
        ({"teachers": ("a", "b"), "teacher_weights": (1.0,)}, "expected 2 numbers above 0"),
        ({"teachers": ("a", "b"), "teacher_weights": (1.0, 0.0)}, "expected 2 numbers above 0"),
        (
            {"teachers": ("a", "b"), "teacher_weights": (1.0, 1.0), "teacher_weights_file": Path("w.npz")},
            "the weights are in teacher_weights_file already",
        ),
        ({"teachers": ("a", "b"), "teacher_sharpness": 2.0}, "belongs to teacher_confidence"),
        (
            {"teachers": ("a", "b"), "teacher_confidence": "target", "teacher_sharpness": -1.0},
            "teacher_sharpness: expected a number >= 0",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_one_another(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(cache="c", out=Path("o"), **settings)
