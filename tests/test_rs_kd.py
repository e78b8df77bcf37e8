"""RS-KD against the reference: weights, value, gradient, counts / N, the proposal, unbiasedness, refusals."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    FLOAT32,
    FLOAT64,
    KINDS,
    SIGMAS,
    Tolerance,
    assert_close,
    assert_finite,
    cached,
    extremes,
    float64,
    make_case,
    slope,
    student_logits,
    teacher_logprobs,
    terms,
)

from tailcache.storage.errors import ConfigError
from tailcache.trainers.divergences import forward_kl
from tailcache.trainers.rs_kd import Draws, draw, rs_kd
from tailcache.trainers.tails import sampled
from tailcache.trainers.terms import TeacherTerms, student_terms


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _drawn_ids(teacher: TeacherTerms, draws: Draws, position: int) -> list[int]:
    ids = torch.cat([teacher.token_ids[position], teacher.tail_samples[position]])
    drawn: list[int] = ids[draws.columns[position]].tolist()
    return drawn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 8, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind: str, top_k: int, power: float, dtype: torch.dtype) -> None:
    case = make_case(kind, top_k=top_k)
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    teacher, student = terms(case, logits)
    draws = draw(teacher, 6, power, _generator())
    value = rs_kd(teacher, student, draws)
    gradient = slope(value, logits)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        drawn = _drawn_ids(teacher, draws, t)
        expected, expected_slope, weights = reference.rs_kd(p, q, case.stored(t), drawn, power)
        assert_close(draws.weights[t].double().tolist(), weights, tolerance)
        assert_close(value[t].item(), expected, tolerance)
        assert_close(gradient[t].double(), float64(expected_slope), tolerance)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), top_k=st.integers(1, 37), num_draws=st.integers(1, 9), seed=st.integers(0, 999))
def test_power_one_is_counts_over_the_number_of_draws(kind: str, top_k: int, num_draws: int, seed: int) -> None:
    """The gradient is q - counts / N."""
    case = make_case(kind, top_k=top_k, seed=seed)
    logits = case.logits.clone().requires_grad_()
    teacher, student = terms(case, logits)
    draws = draw(teacher, num_draws, 1.0, _generator(seed))
    assert_close(draws.weights, torch.full_like(draws.weights, 1 / num_draws), FLOAT64)
    gradient = slope(rs_kd(teacher, student, draws), logits)
    for t, q in enumerate(case.q):
        drawn = _drawn_ids(teacher, draws, t)
        assert_close(gradient[t], float64([q_i - drawn.count(i) / num_draws for i, q_i in enumerate(q)]), FLOAT64)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [6, 23])
def test_it_is_unbiased_for_the_kl(power: float, top_k: int) -> None:
    """Value and gradient, over captures and draws of one position, reach the exact ones."""
    num, vocab_size = 4_000, 23
    logprobs = teacher_logprobs("zipf", 1, vocab_size, seed=5).expand(num, vocab_size)
    logits = student_logits(1, vocab_size, seed=6).expand(num, vocab_size).clone().requires_grad_()
    teacher = cached(logprobs, top_k, 4, torch.zeros(num, dtype=torch.long), seed=7)
    values = rs_kd(teacher, student_terms(logits, teacher), draw(teacher, 12, power, _generator(8)))
    gradients = slope(values, logits)
    p, q = logprobs[0].exp().tolist(), reference.softmax(logits[0].tolist())
    for estimate, exact in (
        (values[:, None], [reference.forward_kl(p, q)]),
        (gradients, reference.kl_gradient(p, q)),
    ):
        error = estimate.mean(0) - float64(exact)
        assert (error.abs() <= SIGMAS * estimate.std(0) / num**0.5 + 1e-12).all()
    assert values.std() > 1e-3  # or the test above would show nothing


def test_of_one_capture_its_mean_is_the_kl_with_the_sampled_tail() -> None:
    """So ``kd`` has the same expectation from the same cache, without the noise of drawing again."""
    num = 4_000
    case = make_case("zipf", num_positions=1)
    teacher = case.teacher.rows(torch.zeros(num, dtype=torch.long))
    logits = case.logits.expand(num, 37).clone().requires_grad_()
    student = student_terms(logits, teacher)
    exact = forward_kl(teacher, student, sampled)
    values = rs_kd(teacher, student, draw(teacher, 12, 0.7, _generator()))
    for estimate, expected in ((values[:, None], exact[:1]), (slope(values, logits), slope(exact, logits)[0])):
        error = estimate.mean(0) - expected
        assert (error.abs() <= SIGMAS * estimate.std(0) / num**0.5 + 1e-12).all()


def test_draws_depend_on_the_generator_and_the_teacher_alone() -> None:
    teacher = make_case("zipf").teacher
    first, again, other = (draw(teacher, 50, 1.0, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.columns, again.columns)
    assert not torch.equal(first.columns, other.columns)
    assert len(torch.unique(first.columns[first.columns >= 8])) > 1  # different stored draws of the tail


def test_rows_are_the_draws_of_some_positions() -> None:
    case = make_case("zipf")
    teacher, student = terms(case, case.logits)
    draws = draw(teacher, 5, 0.5, _generator())
    keep = torch.tensor([True, False, True, True, False, True])
    whole = rs_kd(teacher, student, draws)
    assert_close(rs_kd(teacher.rows(keep), student.rows(keep), draws.rows(keep)), whole[keep], FLOAT64)
    assert_close(
        rs_kd(teacher.rows(slice(1, 3)), student.rows(slice(1, 3)), draws.rows(slice(1, 3))), whole[1:3], FLOAT64
    )


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 999))
def test_shifting_logits_changes_nothing(shift: float, seed: int) -> None:
    case = make_case("random", seed=seed)
    draws = draw(case.teacher, 5, 1.0, _generator(seed))
    plain, shifted = (
        rs_kd(case.teacher, student_terms(z, case.teacher), draws) for z in (case.logits, case.logits + shift)
    )
    assert_close(shifted, plain, Tolerance(1e-9, 1e-10))


@pytest.mark.parametrize("top_k", [1, 8, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_have_finite_values_and_gradients(kind: str, top_k: int) -> None:
    case = make_case(kind, num_positions=8, top_k=top_k, num_samples=0 if top_k == 37 else 5)
    for logits in extremes():
        teacher, student = terms(case, logits)
        assert_finite(rs_kd(teacher, student, draw(teacher, 5, 0.5, _generator())), logits)


def test_no_positions_at_all() -> None:
    case = make_case("random")
    teacher = case.teacher.rows(torch.zeros(6, dtype=torch.bool))
    draws = draw(teacher, 3, 1.0, _generator())
    assert rs_kd(teacher, student_terms(case.logits[:0], teacher), draws).shape == (0,)


def test_what_is_impossible_is_refused_with_the_reason() -> None:
    teacher = make_case("random").teacher
    with pytest.raises(ConfigError, match="num_draws: expected at least 1, found 0"):
        draw(teacher, 0, 1.0, _generator())
    for power in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="power: expected a finite number >= 0"):
            draw(teacher, 1, power, _generator())
    with pytest.raises(ConfigError, match="m = 0; draws of the tail are taken from them"):
        draw(make_case("random", num_samples=0).teacher, 1, 1.0, _generator())
