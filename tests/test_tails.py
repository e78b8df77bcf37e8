"""The tail choices: value and gradient against the reference, limits, unbiasedness, refusals."""

from __future__ import annotations

import math

import numpy as np
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
    cached,
    cast,
    make_case,
    student_logits,
    teacher_logprobs,
)
from torch import Tensor

from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.trainers.divergences import forward_kl
from tailcache.trainers.tad import weighted_tad
from tailcache.trainers.tails import TAILS, check_tail, tail_function
from tailcache.trainers.terms import StudentTerms, TeacherTerms, student_terms, weighted


def _float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 8, 36])
def test_student_terms_are_what_they_say(kind: str, top_k: int) -> None:
    case = make_case(kind, top_k=top_k)
    terms = student_terms(case.logits, case.teacher, case.next_tokens, prior_V=case.prior)
    for t, q in enumerate(case.q):
        stored = case.teacher.token_ids[t].tolist()
        beyond = reference.others(len(q), stored)
        hat = reference.restricted(case.prior.tolist(), beyond)
        assert terms.log_beyond is not None
        assert terms.prior_logprob is not None
        assert_close(terms.logprobs[t].exp().tolist(), [q[i] for i in stored], FLOAT64)
        assert_close(math.exp(terms.log_beyond[t]), reference.mass(q, beyond), FLOAT64)
        assert_close(math.exp(terms.log_target[t]), q[int(case.next_tokens[t])], FLOAT64)
        assert_close(terms.prior_logprob[t].item(), math.fsum(w * math.log(q[i]) for i, w in hat.items()), FLOAT64)
        samples = case.teacher.tail_samples[t].tolist()
        assert_close(terms.sample_logprobs[t].exp().tolist(), [q[i] for i in samples], FLOAT64)


def test_padding_rows_of_the_head_are_cut_off_before_normalising() -> None:
    case = make_case("random")
    padded = torch.cat([case.logits, torch.full((6, 3), 50.0, dtype=torch.float64)], dim=-1)
    plain = student_terms(case.logits, case.teacher, case.next_tokens)
    wide = student_terms(padded, case.teacher, case.next_tokens)
    assert torch.equal(plain.logprobs, wide.logprobs)
    assert plain.log_beyond is not None
    assert wide.log_beyond is not None
    assert torch.equal(plain.log_beyond, wide.log_beyond)


def test_a_head_narrower_than_the_vocabulary_is_refused() -> None:
    case = make_case("random")
    with pytest.raises(MismatchError, match=r"at least 37 ids\], found \[6, 36\]"):
        student_terms(case.logits[:, :36], case.teacher, case.next_tokens)


def test_half_precision_logits_are_upcast_once() -> None:
    case = make_case("random")
    teacher = cast(case.teacher, torch.float32)
    terms = student_terms(case.logits.bfloat16(), teacher, case.next_tokens)
    wide = student_terms(case.logits.bfloat16().float(), teacher, case.next_tokens)
    assert terms.logprobs.dtype == torch.float32
    assert torch.equal(terms.logprobs, wide.logprobs)


@pytest.mark.parametrize("choice", list(TAILS))
@pytest.mark.parametrize("kind", KINDS)
def test_tail_log_ratio_matches_the_reference(choice: str, kind: str) -> None:
    """alpha * R is what the choice adds to the KL: the reference KL minus its part on the stored ids."""
    case = make_case(kind)
    student = student_terms(case.logits, case.teacher, case.next_tokens, prior_V=case.prior)
    ratio = TAILS[choice](case.teacher, student)
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        stored = case.teacher.token_ids[t].tolist()
        samples = case.teacher.tail_samples[t].tolist()
        alpha = reference.mass(p, reference.others(len(p), stored))
        whole = reference.kl_with_tail(choice, p, q, stored, samples, case.prior.tolist())
        head = math.fsum(p[i] * math.log(p[i] / q[i]) for i in stored)
        if kind != "peaked":
            assert_close((alpha * ratio[t]).item(), whole - head, Tolerance(1e-9, 1e-12))
        # Where alpha is 1e-30, whole - head cancels; R itself is of order 1 and is compared through the
        # tail alone.
        beyond = reference.others(len(p), stored)
        weights = reference.tail_cross_weights(choice, p, q, stored, samples, case.prior.tolist())
        if choice == "bucket":
            expected = math.log(alpha / reference.mass(q, beyond))
        else:
            expected = math.fsum(p[i] * math.log(p[i]) for i in beyond) / alpha
            expected -= math.fsum(w / alpha * math.log(q[i]) for i, w in weights.items())
        assert_close(ratio[t].item(), expected, Tolerance(1e-9, 1e-9))


@pytest.mark.parametrize("choice", list(TAILS))
@pytest.mark.parametrize("num_samples", [0, 3])
def test_with_every_id_stored_there_is_no_tail_to_choose(choice: str, num_samples: int) -> None:
    case = make_case("random", top_k=37, num_samples=num_samples)
    logits = case.logits.clone().requires_grad_()
    student = student_terms(logits, case.teacher, case.next_tokens, prior_V=case.prior)
    value = forward_kl(case.teacher, student, TAILS[choice])
    dense = [reference.forward_kl(p, q) for p, q in zip(case.p, case.q, strict=True)]
    assert_close(value.tolist(), dense, FLOAT64)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert_close(gradient, _float64(case.q) - _float64(case.p), FLOAT64)


@pytest.mark.parametrize("choice", list(TAILS))
def test_a_position_without_tail_mass_is_guarded(choice: str) -> None:
    """K < V, but one position has alpha = 0 exactly: its tail counts for nothing and breaks no gradient."""
    case = make_case("random")
    fields = {name: getattr(case.teacher, name) for name in case.teacher.__dataclass_fields__}
    fields["log_tail"] = fields["log_tail"].clone()
    fields["log_tail"][2] = -math.inf
    teacher = type(case.teacher)(**fields)
    logits = case.logits.clone().requires_grad_()
    student = student_terms(logits, teacher, case.next_tokens, prior_V=case.prior)
    for value in (
        forward_kl(teacher, student, TAILS[choice]),
        weighted_tad(teacher, student, TAILS[choice], top_k=8, log_beta_T=torch.ones(6, dtype=torch.float64)),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_the_prior_is_summed_over_the_tail_and_not_by_difference() -> None:
    """In float32, with all but 1e-9 of the prior inside the head, sum_V - sum_H would keep no digit."""
    case = make_case("zipf", top_k=8)
    prior = torch.full((37,), 1e-9 / 29, dtype=torch.float64)
    prior[case.teacher.token_ids[0]] = 0.125
    exact = student_terms(case.logits, case.teacher, case.next_tokens, prior_V=prior).prior_logprob
    single = student_terms(
        case.logits.float(), cast(case.teacher, torch.float32), case.next_tokens, prior_V=prior.float()
    ).prior_logprob
    assert exact is not None
    assert single is not None
    assert_close(single.double(), exact, FLOAT32)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.integers(2, 40),
    top_k=st.integers(1, 39),
    seed=st.integers(0, 10_000),
)
def test_bucket_is_a_lower_bound_of_the_dense_kl(kind: str, vocab_size: int, top_k: int, seed: int) -> None:
    top_k = min(top_k, vocab_size)
    case = make_case(kind, num_positions=3, vocab_size=vocab_size, top_k=top_k, num_samples=0, seed=seed)
    student = student_terms(case.logits, case.teacher, case.next_tokens)
    value = forward_kl(case.teacher, student, TAILS["bucket"])
    dense = _float64([reference.forward_kl(p, q) for p, q in zip(case.p, case.q, strict=True)])
    assert (value >= -1e-12).all()
    assert (value <= dense + 1e-12).all()


def _tad_at_three(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    log_beta = torch.full_like(teacher.log_tail, math.log(3.0))
    return weighted_tad(teacher, student, TAILS["sampled"], top_k=4, log_beta_T=log_beta)


def _kl(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    return forward_kl(teacher, student, TAILS["sampled"])


@pytest.mark.parametrize("loss", ["kl", "tad"])
@pytest.mark.parametrize("num_samples", [1, 16])
def test_the_sampled_tail_is_unbiased(loss: str, num_samples: int) -> None:
    """Value and gradient, averaged over independent captures of one position, reach the exact ones."""
    num_captures, vocab_size, top_k = 4_000, 23, 6
    logprobs = teacher_logprobs("zipf", 1, vocab_size, seed=5).expand(num_captures, vocab_size)
    logits = student_logits(1, vocab_size, seed=6).expand(num_captures, vocab_size).clone().requires_grad_()
    next_tokens = torch.zeros(num_captures, dtype=torch.long)
    teacher = cached(logprobs, top_k, num_samples, next_tokens, seed=7)
    student = student_terms(logits, teacher, next_tokens)
    values = (_kl if loss == "kl" else _tad_at_three)(teacher, student)
    (gradients,) = torch.autograd.grad(values.sum(), logits)

    p, q = logprobs[0].exp().tolist(), reference.softmax(logits[0].tolist())
    if loss == "kl":
        exact_value, exact_gradient = reference.forward_kl(p, q), reference.kl_gradient(p, q)
    else:
        head = reference.top_ids(p, 4)
        exact_value, exact_gradient = reference.tad(p, q, head, 3.0), reference.tad_gradient(p, q, head, 3.0)
    for estimate, exact in ((values[:, None], [exact_value]), (gradients, exact_gradient)):
        error = estimate.mean(0) - _float64(exact)
        standard_error = estimate.std(0) / num_captures**0.5
        assert (error.abs() <= SIGMAS * standard_error + 1e-12).all()
    assert values.std() > 1e-3  # or the test above would show nothing


def test_sampled_and_prior_report_the_stored_entropy_not_a_reconstruction() -> None:
    """Plugging the draws in as the teacher gives another, larger value; ours is the exact entropy's."""
    case = make_case("zipf", num_samples=4)
    student = student_terms(case.logits, case.teacher, case.next_tokens)
    ratio = TAILS["sampled"](case.teacher, student)
    for t, p in enumerate(case.p):
        beyond = reference.others(37, case.teacher.token_ids[t].tolist())
        alpha = reference.mass(p, beyond)
        cross = student.sample_logprobs[t].mean().item()
        exact = math.fsum(p[i] / alpha * math.log(p[i]) for i in beyond) - cross
        reconstructed = math.log(alpha / 4) - cross  # four draws of weight alpha / 4 each
        assert_close(ratio[t].item(), exact, Tolerance(1e-9, 1e-9))
        assert reconstructed > exact


def test_weighted_guards_value_and_gradient() -> None:
    value = torch.tensor([2.0, math.inf, -math.inf, math.nan], requires_grad=True)
    log_weight = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    product = weighted(log_weight, value)
    assert product.tolist() == [2.0, 0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(product.sum(), value)
    assert gradient.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_second_derivative_is_refused() -> None:
    case = make_case("random")
    logits = case.logits.clone().requires_grad_()
    value = forward_kl(case.teacher, student_terms(logits, case.teacher, case.next_tokens), TAILS["sampled"])
    (gradient,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()  # type: ignore[no-untyped-call]


def test_unknown_and_impossible_tails_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"one of sampled, bucket, prior; found 'smooth'"):
        tail_function("smooth")
    pi = np.full(37, 1 / 37, dtype=np.float32)
    check_tail("sampled", top_k=8, vocab_size=37, num_samples=1, mean_tail_V=None)
    check_tail("bucket", top_k=8, vocab_size=37, num_samples=0, mean_tail_V=None)
    check_tail("prior", top_k=8, vocab_size=37, num_samples=0, mean_tail_V=pi)
    check_tail("sampled", top_k=37, vocab_size=37, num_samples=0, mean_tail_V=None)
    with pytest.raises(ConfigError, match=r"m = 0; choose the tail 'bucket'"):
        check_tail("sampled", top_k=8, vocab_size=37, num_samples=0, mean_tail_V=pi)
    with pytest.raises(ConfigError, match="mean tail distribution, found none"):
        check_tail("prior", top_k=8, vocab_size=37, num_samples=4, mean_tail_V=None)
    pi[8:] = 0
    with pytest.raises(ConfigError, match="more than K = 8 ids, found mass on 8 of 37"):
        check_tail("prior", top_k=8, vocab_size=37, num_samples=4, mean_tail_V=pi)


def test_the_functions_refuse_what_they_were_not_given() -> None:
    case = make_case("random", num_samples=0)
    student = student_terms(case.logits, case.teacher, case.next_tokens, want_beyond=False)
    with pytest.raises(ConfigError, match="m = 0"):
        TAILS["sampled"](case.teacher, student)
    with pytest.raises(ConfigError, match="prior_V="):
        TAILS["prior"](case.teacher, student)
    with pytest.raises(ConfigError, match="want_beyond=True"):
        TAILS["bucket"](case.teacher, student)
