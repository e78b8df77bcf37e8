"""ToDi against the reference: value, gradient, Jeffreys' divergence, the stop-gradient, extremes."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    ATOM_CHOICES,
    FLOAT32,
    FLOAT64,
    KINDS,
    Tolerance,
    assert_close,
    assert_finite,
    atoms,
    extremes,
    float64,
    make_case,
    slope,
)

from tailcache.trainers.divergences import kl, reverse_kl
from tailcache.trainers.todi import todi

SOUND = [choice for choice in ATOM_CHOICES if choice != "renormalise"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("top_k", [1, 8, 37])
@pytest.mark.parametrize("choice", SOUND)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind: str, choice: str, top_k: int, dtype: torch.dtype) -> None:
    case = make_case(kind, top_k=top_k)
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    value = todi(*atoms(case, logits, choice))
    gradient = slope(value, logits)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        teacher = reference.atoms(choice, p, case.stored(t), case.prior.tolist())
        expected, expected_slope = reference.atom_loss("todi", teacher, q)
        assert_close(value[t].item(), expected, tolerance)
        assert_close(gradient[t].double(), float64(expected_slope), tolerance)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    choice=st.sampled_from(SOUND),
    vocab_size=st.integers(2, 40),
    top_k=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)
def test_the_value_is_jeffreys_divergence_on_any_atoms(
    kind: str, choice: str, vocab_size: int, top_k: int, seed: int
) -> None:
    case = make_case(kind, vocab_size=vocab_size, top_k=min(top_k, vocab_size), seed=seed)
    p_q = atoms(case, case.logits, choice)
    assert_close(todi(*p_q), kl(*p_q) + reverse_kl(*p_q), FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_value_is_jeffreys_divergence_and_the_gradient_is_not(kind: str) -> None:
    case = make_case(kind)
    logits = case.logits.clone().requires_grad_()
    p_q = atoms(case, logits, "exact")
    value, both = todi(*p_q), kl(*p_q) + reverse_kl(*p_q)
    expected = [reference.jeffreys(p, q) for p, q in zip(case.p, case.q, strict=True)]
    assert_close(value.tolist(), expected, FLOAT64)
    assert (slope(value, logits) - slope(both, logits)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", SOUND)
def test_with_every_id_stored_every_choice_is_dense(kind: str, choice: str) -> None:
    case = make_case(kind, top_k=37)
    logits = case.logits.clone().requires_grad_()
    some, every = todi(*atoms(case, logits, choice)), todi(*atoms(case, logits, "exact"))
    assert_close(some, every, FLOAT64)
    assert_close(slope(some, logits), slope(every, logits), FLOAT64)


def test_a_renormalised_teacher_makes_it_infinite() -> None:
    case = make_case("random")
    assert (todi(*atoms(case, case.logits, "renormalise")) == math.inf).all()


@settings(max_examples=30, deadline=None)
@given(choice=st.sampled_from(SOUND), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 999))
def test_shifting_logits_or_dropping_rows_changes_nothing(choice: str, shift: float, seed: int) -> None:
    case = make_case("random", seed=seed)
    p, q = atoms(case, case.logits, choice)
    assert_close(todi(*atoms(case, case.logits + shift, choice)), todi(p, q), Tolerance(1e-9, 1e-9))
    keep = torch.tensor([True, False, True, True, False, True])
    assert_close(todi(p[keep], q[keep]), todi(p, q)[keep], FLOAT64)
    order = torch.randperm(p.shape[-1], generator=torch.Generator().manual_seed(seed))
    assert_close(todi(p[:, order], q[:, order]), todi(p, q), FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", SOUND)
def test_extreme_logits_have_finite_values_and_gradients(kind: str, choice: str) -> None:
    case = make_case(kind, num_positions=8)
    for logits in extremes():
        assert_finite(todi(*atoms(case, logits, choice)), logits)
