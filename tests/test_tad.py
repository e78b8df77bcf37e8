"""TAD against the reference: values, eq. 6, beta(X) per segment, splits and tails, identities, extremes."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    CHOICES,
    FLOAT32,
    FLOAT64,
    KINDS,
    MICRO_BATCH,
    Case,
    Tolerance,
    assert_close,
    assert_finite,
    cached,
    extremes,
    float64,
    make_case,
    slope,
    terms,
)
from torch import Tensor

from tailcache.storage.errors import ConfigError
from tailcache.trainers.divergences import forward_kl
from tailcache.trainers.tad import log_adaptive_beta, log_student_tail, log_teacher_tail, tad, weighted_tad
from tailcache.trainers.tails import TAILS, tail_choice
from tailcache.trainers.terms import student_terms


def _tad(case: Case, logits: Tensor, choice: str, top_k: int, beta: float = 2.0) -> Tensor:
    teacher, student = terms(case, logits, choice)
    return tad(teacher, student, tail_choice(choice)[1], top_k=top_k, beta=beta, segments_T=case.segments)


def test_by_hand() -> None:
    """p = (1/2, 3/8, 1/8), q uniform, K' = 1, one position: alpha = 1/2, beta(X) = 2 / alpha = 4."""
    logprobs = float64([[0.5, 0.375, 0.125]]).log()
    y = torch.tensor([0])
    teacher = cached(logprobs, 3, 0, y)
    student = student_terms(torch.zeros((1, 3), dtype=torch.float64), teacher)
    kl1 = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    kl2 = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    value = tad(teacher, student, TAILS["sampled"], top_k=1, beta=2.0, segments_T=torch.tensor([0]))
    assert_close(value.item(), kl1 + 4 * 0.5 * kl2, FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("top_k", "stored"), [(1, 1), (1, 8), (5, 8), (8, 8), (5, 37), (36, 37), (37, 37)])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind: str, choice: str, top_k: int, stored: int, dtype: torch.dtype) -> None:
    case = make_case(kind, top_k=stored)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    value = _tad(case, logits, choice, top_k)
    gradient = slope(value, logits)
    pi = {"prior": case.prior.tolist()}.get(choice)
    kept = [reference.seen(choice, p, case.stored(t)) for t, p in enumerate(case.p)]
    beta_x = reference.beta_for_cache(kept, top_k, case.segments.tolist(), 2.0) if top_k < 37 else [1.0] * 6
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        ids, samples = case.stored(t), case.samples(t)
        expected = reference.tad_with_tail(choice, p, q, top_k, stored, beta_x[t], samples, pi)
        assert_close(value[t].item(), expected, tolerance)
        p_hat = reference.p_hat(choice, p, q, ids, samples, pi)
        expected_slope = reference.tad_gradient(p_hat, q, ids[:top_k], beta_x[t])
        assert_close(gradient[t].double(), float64(expected_slope), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_id_stored_it_is_the_dense_loss_and_equation_6(kind: str) -> None:
    case = make_case(kind, top_k=37)
    for choice in CHOICES:
        logits = case.logits.clone().requires_grad_()
        value = _tad(case, logits, choice, 10)
        gradient = slope(value, logits)
        beta_x = reference.beta_for_cache(case.p, 10, case.segments.tolist(), 2.0)
        for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
            head = reference.top_ids(p, 10)
            assert_close(value[t].item(), reference.tad(p, q, head, beta_x[t]), FLOAT64)
            assert_close(gradient[t], float64(reference.tad_gradient(p, q, head, beta_x[t])), FLOAT64)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    choice=st.sampled_from(CHOICES),
    stored=st.integers(1, 30),
    split=st.integers(1, 30),
    seed=st.integers(0, 10_000),
)
def test_at_beta_x_one_it_is_the_kl(kind: str, choice: str, stored: int, split: int, seed: int) -> None:
    """Whatever the split and the tail choice: same value, same gradient as forward KL with that choice."""
    case = make_case(kind, vocab_size=30, top_k=stored, seed=seed)
    logits = case.logits.clone().requires_grad_()
    teacher, student = terms(case, logits, choice)
    tail, zero = tail_choice(choice)[1], torch.zeros(6, dtype=torch.float64)
    value = weighted_tad(teacher, student, tail, top_k=min(split, stored), log_beta_T=zero)
    kl = forward_kl(teacher, student, tail)
    assert_close(value, kl, FLOAT64)
    assert_close(slope(value, logits), slope(kl, logits), FLOAT64)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), stored=st.integers(1, 30), split=st.integers(1, 30), seed=st.integers(0, 999))
def test_tail_masses_of_any_split_are_those_of_the_full_distributions(
    kind: str, stored: int, split: int, seed: int
) -> None:
    split = min(split, stored)
    case = make_case(kind, vocab_size=30, top_k=stored, seed=seed)
    student = student_terms(case.logits, case.teacher)
    alpha = log_teacher_tail(case.teacher, split).exp().tolist()
    alpha_s = log_student_tail(student, split).exp().tolist()
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        tail = reference.others(30, case.teacher.token_ids[t, :split].tolist())
        assert_close(alpha[t], reference.mass(p, tail), Tolerance(1e-9, 0))
        assert_close(alpha_s[t], reference.mass(q, tail), Tolerance(1e-9, 0))


@pytest.mark.parametrize("min_mean_alpha", [0.0, 0.05, 1.0])
def test_beta_x_is_per_segment_over_its_positions(min_mean_alpha: float) -> None:
    alphas = [0.5, 0.1, 1e-6, 0.25, 0.25, 3e-5, 0.9]
    segments = [4, 4, 0, 1, 1, 0, 4]
    expected = reference.beta_x(alphas, segments, 2.0, min_mean_alpha)
    value = log_adaptive_beta(float64(alphas).log(), torch.tensor(segments), beta=2.0, min_mean_alpha=min_mean_alpha)
    assert_close(value.exp().tolist(), expected, FLOAT64)


def test_beta_x_of_a_segment_does_not_depend_on_its_neighbours_or_its_micro_batch() -> None:
    case = make_case("zipf", num_positions=8)
    whole = _tad(case, case.logits, "sampled", 5)
    for segment in range(3):
        part = case.segments == segment
        teacher = case.teacher.rows(part)
        student = student_terms(case.logits[part], teacher)
        alone = tad(teacher, student, TAILS["sampled"], top_k=5, beta=2.0, segments_T=case.segments[part])
        assert (alone - whole[part]).abs().max() <= MICRO_BATCH


def test_a_tail_far_below_float32_keeps_its_weight() -> None:
    """alpha = e^-200 underflows float32, but beta(X) alpha = beta where all positions are alike."""
    log_alpha = torch.full((3,), -200.0)
    log_beta = log_adaptive_beta(log_alpha, torch.zeros(3, dtype=torch.long), beta=2.0)
    assert_close((log_beta + log_alpha).exp(), torch.full((3,), 2.0), FLOAT32)


def test_beta_zero_leaves_the_head() -> None:
    case = make_case("random", top_k=8)
    student = student_terms(case.logits, case.teacher)
    value = tad(case.teacher, student, TAILS["sampled"], top_k=8, beta=0.0, segments_T=case.segments)
    assert_close(value, forward_kl(case.teacher, student, TAILS["bucket"]), FLOAT64)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "stored"), [(1, 1), (5, 8), (8, 8), (5, 37), (37, 37)])
def test_extreme_logits_have_finite_values_and_gradients(kind: str, choice: str, top_k: int, stored: int) -> None:
    case = make_case(kind, num_positions=8, top_k=stored)
    for logits in extremes():
        assert_finite(_tad(case, logits, choice, top_k), logits)


def test_no_gradient_flows_through_the_teacher() -> None:
    case = make_case("random")
    logits = case.logits.clone().requires_grad_()
    assert not log_teacher_tail(case.teacher, 5).requires_grad
    assert _tad(case, logits, "sampled", 5).requires_grad


@pytest.mark.parametrize("choice", CHOICES)
def test_gradcheck(choice: str) -> None:
    case = make_case("random", num_positions=3, vocab_size=9, top_k=5)
    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: _tad(case, z, choice, 2), (logits,), eps=1e-6, atol=1e-6)


def test_masked_positions_are_rows_dropped_before_the_mean() -> None:
    """beta(X) is over the valid positions of a segment: the terms of the others are not there."""
    case = make_case("zipf", num_positions=8)
    valid = torch.tensor([True, False, True, True, False, True, True, False])
    teacher, student = terms(case, case.logits)
    value = tad(
        teacher.rows(valid), student.rows(valid), TAILS["sampled"], top_k=5, beta=2.0, segments_T=case.segments[valid]
    )
    kept = [t for t in range(8) if valid[t]]
    beta_x = reference.beta_for_cache([case.p[t] for t in kept], 5, case.segments[valid].tolist(), 2.0)
    for row, t in enumerate(kept):
        expected = reference.tad_with_tail("sampled", case.p[t], case.q[t], 5, 8, beta_x[row], case.samples(t))
        assert_close(value[row].item(), expected, FLOAT64)


@settings(max_examples=40, deadline=None)
@given(choice=st.sampled_from(CHOICES), shift=st.floats(-1e3, 1e3), split=st.integers(1, 8), seed=st.integers(0, 999))
def test_shifting_logits_changes_nothing(choice: str, shift: float, split: int, seed: int) -> None:
    case = make_case("random", seed=seed)
    plain, shifted = _tad(case, case.logits, choice, split), _tad(case, case.logits + shift, choice, split)
    assert_close(shifted, plain, Tolerance(1e-9, 1e-10))


def test_no_positions_at_all() -> None:
    case = make_case("random")
    none = torch.zeros(6, dtype=torch.bool)
    teacher = case.teacher.rows(none)
    student = student_terms(case.logits[none], teacher)
    value = tad(teacher, student, TAILS["sampled"], top_k=3, beta=2.0, segments_T=case.segments[none])
    assert value.shape == (0,)


def test_what_is_impossible_is_refused_with_the_reason() -> None:
    case = make_case("random", top_k=8)
    student = student_terms(case.logits, case.teacher)
    for top_k in (0, -1, 9):
        with pytest.raises(ConfigError, match=rf"1 <= K' <= 8.*found K' = {top_k}"):
            tad(case.teacher, student, TAILS["bucket"], top_k=top_k, beta=2.0, segments_T=case.segments)
    for beta in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="beta: expected"):
            tad(case.teacher, student, TAILS["bucket"], top_k=3, beta=beta, segments_T=case.segments)
    with pytest.raises(ConfigError, match="min_mean_alpha"):
        log_adaptive_beta(torch.zeros(2), torch.zeros(2, dtype=torch.long), beta=1.0, min_mean_alpha=1.5)
