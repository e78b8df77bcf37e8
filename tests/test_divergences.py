"""Cross-entropy and KL against the reference: constants, values and gradients, identities, extremes."""

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
    MICRO_BATCH,
    Tolerance,
    assert_close,
    cached,
    cast,
    make_case,
    select,
    teacher_logprobs,
)
from torch import Tensor

from tailcache.trainers.divergences import cross_entropy, forward_kl
from tailcache.trainers.tails import TAILS
from tailcache.trainers.terms import TeacherTerms, student_terms

CHOICES = list(TAILS)


def _float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _kl(logits: Tensor, teacher: TeacherTerms, next_tokens: Tensor, choice: str, prior: Tensor | None) -> Tensor:
    student = student_terms(logits, teacher, next_tokens, prior_V=prior)
    return forward_kl(teacher, student, TAILS[choice])


def test_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q uniform: KL = log 3 - 1.5 log 2; kept alone, p_1 = 1/2 gives the two-atom KL."""
    logprobs = _float64([[0.5, 0.25, 0.25]]).log()
    logits, y = torch.zeros((1, 3), dtype=torch.float64), torch.tensor([1])
    for choice in CHOICES:
        dense = _kl(logits, cached(logprobs, 3, 0, y), y, choice, None)
        assert_close(dense.item(), math.log(3) - 1.5 * math.log(2), FLOAT64)
    bucket = _kl(logits, cached(logprobs, 1, 0, y), y, "bucket", None)
    assert_close(bucket.item(), 0.5 * math.log(1.5) + 0.5 * math.log(0.75), FLOAT64)
    # The tail is uniform here, so any two draws tell everything and the sampled value is the dense one.
    sampled = _kl(logits, cached(logprobs, 1, 2, y), y, "sampled", None)
    assert_close(sampled.item(), math.log(3) - 1.5 * math.log(2), FLOAT64)
    student = student_terms(logits, cached(logprobs, 1, 0, y), y)
    assert_close(cross_entropy(student).item(), math.log(3), FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_cross_entropy_value_and_gradient(kind: str) -> None:
    case = make_case(kind)
    logits = case.logits.clone().requires_grad_()
    value = cross_entropy(student_terms(logits, case.teacher, case.next_tokens))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    targets = case.next_tokens.tolist()
    expected = [reference.cross_entropy(q, y) for q, y in zip(case.q, targets, strict=True)]
    assert_close(value.tolist(), expected, FLOAT64)
    slope = [reference.cross_entropy_gradient(q, y) for q, y in zip(case.q, targets, strict=True)]
    assert_close(gradient, _float64(slope), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("top_k", [1, 8, 37])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_kl_value_and_gradient(kind: str, choice: str, top_k: int, dtype: torch.dtype) -> None:
    case = make_case(kind, top_k=top_k)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    value = _kl(logits, cast(case.teacher, dtype), case.next_tokens, choice, case.prior.to(dtype))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        stored, samples = case.teacher.token_ids[t].tolist(), case.teacher.tail_samples[t].tolist()
        expected = reference.kl_with_tail(choice, p, q, stored, samples, case.prior.tolist())
        assert_close(value[t].item(), expected, tolerance)
        weights = reference.tail_cross_weights(choice, p, q, stored, samples, case.prior.tolist())
        slope = reference.kl_gradient(reference.with_tail_weights(p, stored, weights), q)
        assert_close(gradient[t].double(), _float64(slope), tolerance)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.integers(2, 50),
    top_k=st.integers(1, 50),
    choice=st.sampled_from(["bucket", "sampled"]),
    seed=st.integers(0, 10_000),
)
def test_kl_of_a_distribution_with_itself_is_zero(
    kind: str, vocab_size: int, top_k: int, choice: str, seed: int
) -> None:
    """Zero for the bucket and with every id stored; for samples only on average (their cross term varies)."""
    top_k = min(top_k, vocab_size)
    logprobs = teacher_logprobs(kind, 4, vocab_size, seed)
    y = torch.zeros(4, dtype=torch.long)
    logits = logprobs.clone().requires_grad_()
    value = _kl(logits, cached(logprobs, top_k, 3, y), y, choice, None)
    if choice == "bucket" or top_k == vocab_size:
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.abs().max() < 1e-12
        assert gradient.abs().max() < 1e-12
    assert value.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    choice=st.sampled_from(CHOICES),
    shift=st.floats(-1e3, 1e3),
    top_k=st.integers(1, 37),
    seed=st.integers(0, 10_000),
)
def test_shifting_logits_or_renaming_ids_changes_nothing(choice: str, shift: float, top_k: int, seed: int) -> None:
    case = make_case("random", top_k=top_k, seed=seed)
    plain = _kl(case.logits, case.teacher, case.next_tokens, choice, case.prior)
    shifted = _kl(case.logits + shift, case.teacher, case.next_tokens, choice, case.prior)
    assert_close(shifted, plain, Tolerance(1e-9, 1e-10))

    order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))  # new id -> old id
    new_id = torch.argsort(order)
    fields = {name: getattr(case.teacher, name) for name in TeacherTerms.__dataclass_fields__}
    fields["token_ids"], fields["tail_samples"] = new_id[fields["token_ids"]], new_id[fields["tail_samples"]]
    renamed = _kl(case.logits[:, order], TeacherTerms(**fields), new_id[case.next_tokens], choice, case.prior[order])
    assert_close(renamed, plain, FLOAT64)


@pytest.mark.parametrize("choice", CHOICES)
def test_masking_is_dropping_rows_and_a_batch_is_its_micro_batches(choice: str) -> None:
    case = make_case("zipf", num_positions=8)
    whole = _kl(case.logits, case.teacher, case.next_tokens, choice, case.prior)
    keep = torch.tensor([True, False, True, True, False, True, False, True])
    kept = _kl(case.logits[keep], select(case.teacher, keep), case.next_tokens[keep], choice, case.prior)
    assert_close(kept, whole[keep], FLOAT64)
    micro = torch.cat(
        [
            _kl(case.logits[part], select(case.teacher, part), case.next_tokens[part], choice, case.prior)
            for part in torch.split(torch.arange(8), 3)
        ]
    )
    assert (micro - whole).abs().max() <= MICRO_BATCH


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_have_finite_values_and_gradients(kind: str, choice: str) -> None:
    """Logits of +-1e4 in float32, teacher one-hot to 1e-30 included: nothing overflows, nothing is NaN."""
    case = make_case(kind, num_positions=8)
    signs = torch.randint(0, 2, case.logits.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for extreme in (1e4 * signs.float(), torch.eye(37)[:8] * 2e4 - 1e4, torch.full((8, 37), -1e4)):
        logits = extreme.clone().requires_grad_()
        teacher = cast(case.teacher, torch.float32)
        value = _kl(logits, teacher, case.next_tokens, choice, case.prior.float())
        clm = cross_entropy(student_terms(logits, teacher, case.next_tokens))
        (gradient,) = torch.autograd.grad((value + clm).sum(), logits)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_a_teacher_of_extreme_logits() -> None:
    """log p = -2e4 underflows to p = 0 in float32 and stays harmless."""
    logprobs = torch.log_softmax(torch.eye(37, dtype=torch.float64)[:4] * 2e4 - 1e4, dim=-1)
    y = torch.arange(4)
    teacher = cast(cached(logprobs, 5, 3, y), torch.float32)
    logits = torch.randn((4, 37), generator=torch.Generator().manual_seed(0)).requires_grad_()
    for choice in CHOICES:
        value = _kl(logits, teacher, y, choice, torch.full((37,), 1 / 37))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert_close(value, -torch.log_softmax(logits, -1)[torch.arange(4), y], FLOAT32)
        assert_close(gradient, torch.softmax(logits, -1) - torch.eye(37)[:4], FLOAT32)


def test_no_positions_at_all() -> None:
    case = make_case("random")
    none = torch.zeros(6, dtype=torch.bool)
    logits = case.logits[none].requires_grad_()
    for choice in CHOICES:
        value = _kl(logits, select(case.teacher, none), case.next_tokens[none], choice, case.prior)
        assert value.shape == (0,)
        value.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("choice", CHOICES)
def test_gradcheck(choice: str) -> None:
    case = make_case("random", num_positions=2, vocab_size=9, top_k=3)
    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: _kl(z, case.teacher, case.next_tokens, choice, case.prior), (logits,), eps=1e-6, atol=1e-6
    )
