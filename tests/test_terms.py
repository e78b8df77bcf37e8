"""The student's terms against the reference: what they say, what they cut off, what they refuse."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    FLOAT32,
    FLOAT64,
    KINDS,
    assert_close,
    cached,
    cast,
    extremes,
    float64,
    make_case,
    slope,
    teacher_logprobs,
    terms,
)
from torch import Tensor

from tailcache.storage.errors import MismatchError
from tailcache.trainers.terms import StudentTerms, log_sum, student_terms, weighted


@pytest.mark.parametrize("student_scale", [1.5, 12.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 8, 35, 36, 37])
def test_student_terms_are_what_they_say(kind: str, top_k: int, student_scale: float) -> None:
    case = make_case(kind, top_k=top_k, student_scale=student_scale, temperatures=(2.0,))
    _, student = terms(case, case.logits)
    for t, q in enumerate(case.q):
        y, stored = int(case.next_tokens[t]), case.stored(t)
        beyond = reference.others(len(q), stored)
        rest = [i for i in beyond if i != y]
        assert_close(student.logprobs[t].exp().tolist(), [q[i] for i in stored], FLOAT64)
        assert_close(student.sample_logprobs[t].exp().tolist(), [q[i] for i in case.samples(t)], FLOAT64)
        for log_mass, ids in (
            (student.log_target, [y]),
            (student.log_not_target, reference.others(len(q), [y])),
            (student.log_beyond, beyond),
            (student.log_beyond_not_target, rest),
        ):
            # Compared as logs, and so relatively: a sum of what is left, not one minus the others.
            expected = math.log(reference.mass(q, ids)) if ids else -math.inf
            assert_close(log_mass[t].item(), expected, FLOAT64)
        for name, fill in case.fills(torch.float64).items():
            weights = fill[t].tolist() if fill.dim() == 2 else fill.tolist()
            for means, ids in ((student.fill_logprobs, beyond), (student.fill_logprobs_not_target, rest)):
                if ids:
                    mean = math.fsum(w * math.log(q[i]) for i, w in reference.restricted(weights, ids).items())
                    assert_close(means[name][t].item(), mean, FLOAT64)
                else:
                    assert means[name][t] == 0
        q_2 = reference.softmax([z / 2 for z in case.logits[t].tolist()])
        assert_close(student.tempered[2.0].logprobs[t].exp().tolist(), [q_2[i] for i in stored], FLOAT64)
        assert_close(student.tempered[2.0].log_beyond[t].exp().item(), reference.mass(q_2, beyond), FLOAT64)


@pytest.mark.parametrize("top_k", [1, 8, 36, 37])
def test_the_gradient_of_every_term(top_k: int) -> None:
    """Of the sum of all terms, against finite differences; -inf terms are constants."""
    case = make_case("zipf", num_positions=3, top_k=top_k, temperatures=(2.0,))

    def total(logits: Tensor) -> Tensor:
        _, student = terms(case, logits)
        values = [getattr(student, each.name) for each in fields(StudentTerms)]
        tensors = [v for v in values if isinstance(v, Tensor)]
        tensors += [*student.fill_logprobs.values(), *student.fill_logprobs_not_target.values()]
        tensors += [student.tempered[2.0].logprobs, student.tempered[2.0].log_beyond]
        parts = [v.reshape(3, -1) * (1 + torch.arange(v[0].numel())) for v in tensors]
        joined = torch.cat(parts, dim=-1)
        return torch.where(joined.isfinite(), joined, 0.0).sum(-1)

    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(total, (logits,), eps=1e-6, atol=1e-5)


def test_a_student_sure_of_a_true_token_beyond_the_top_k_leaves_the_rest_its_digits() -> None:
    """q_y = 1 - 1e-20: the mass beyond the top-K and not y is 1e-22, and no difference could give it."""
    logprobs = teacher_logprobs("zipf", 3, 37)
    y = logprobs.argmin(-1)
    teacher = cast(cached(logprobs, 8, 0, y), torch.float32)
    logits = torch.zeros((3, 37)).scatter(-1, y[:, None], 50.0)
    student = student_terms(logits, teacher)
    assert_close(student.log_beyond_not_target, torch.full((3,), math.log(28) - 50), FLOAT32)
    assert_close(student.log_not_target, torch.full((3,), math.log(36) - 50), FLOAT32)


def test_extreme_logits_have_finite_terms_and_gradients() -> None:
    case = make_case("zipf", num_positions=8, temperatures=(2.0,))
    for logits in extremes():
        _, student = terms(case, logits)
        parts = [student.logprobs, student.sample_logprobs, student.tempered[2.0].logprobs]
        values = [student.log_target, student.log_not_target, student.log_beyond, student.log_beyond_not_target]
        values += [*student.fill_logprobs.values(), *student.fill_logprobs_not_target.values()]
        total = torch.stack(values + [p.sum(-1) for p in parts]).sum(0)
        assert total.isfinite().all()
        assert slope(total, logits).isfinite().all()


def test_padding_rows_of_the_head_are_cut_off_before_normalising() -> None:
    case = make_case("random")
    padded = torch.cat([case.logits, torch.full((6, 3), 50.0, dtype=torch.float64)], dim=-1)
    plain, wide = student_terms(case.logits, case.teacher), student_terms(padded, case.teacher)
    assert torch.equal(plain.logprobs, wide.logprobs)
    assert torch.equal(plain.log_beyond, wide.log_beyond)
    assert torch.equal(plain.log_not_target, wide.log_not_target)


def test_a_head_narrower_than_the_vocabulary_is_refused() -> None:
    case = make_case("random")
    with pytest.raises(MismatchError, match=r"at least 37 ids\], found \[6, 36\]"):
        student_terms(case.logits[:, :36], case.teacher)
    with pytest.raises(MismatchError, match=r"expected \[6 positions.*found \[5, 37\]"):
        student_terms(case.logits[:5], case.teacher)


def test_half_precision_logits_are_upcast_once() -> None:
    case = make_case("random")
    teacher = cast(case.teacher, torch.float32)
    narrow = student_terms(case.logits.bfloat16(), teacher)
    wide = student_terms(case.logits.bfloat16().float(), teacher)
    assert narrow.logprobs.dtype == torch.float32
    assert torch.equal(narrow.logprobs, wide.logprobs)


def test_rows_are_the_terms_of_some_positions() -> None:
    case = make_case("zipf", temperatures=(2.0,))
    teacher, student = terms(case, case.logits)
    keep = torch.tensor([4, 1, 3])
    part = student_terms(
        case.logits[keep],
        teacher.rows(keep),
        fills={name: f if f.dim() == 1 else f[keep] for name, f in case.fills(torch.float64).items()},
        temperatures=(2.0,),
    )
    kept = student.rows(keep)
    for name in ("logprobs", "log_target", "log_not_target", "sample_logprobs", "log_beyond", "log_beyond_not_target"):
        assert_close(getattr(kept, name), getattr(part, name), FLOAT64)
    assert_close(kept.tempered[2.0].logprobs, part.tempered[2.0].logprobs, FLOAT64)
    assert_close(kept.fill_logprobs["exact"], part.fill_logprobs["exact"], FLOAT64)
    assert len(teacher.rows(slice(1, 3))) == 2


def test_a_fill_is_summed_over_the_tail_and_not_by_difference() -> None:
    """In float32, with all but 1e-9 of the prior inside the head, sum_V - sum_H would keep no digit."""
    case = make_case("zipf", top_k=8)
    prior = torch.full((37,), 1e-9 / 29, dtype=torch.float64)
    prior[case.teacher.token_ids[0]] = 0.125
    exact = student_terms(case.logits, case.teacher, fills={"prior": prior})
    teacher = cast(case.teacher, torch.float32)
    single = student_terms(case.logits.float(), teacher, fills={"prior": prior.float()})
    for name in ("fill_logprobs", "fill_logprobs_not_target"):
        assert_close(getattr(single, name)["prior"].double(), getattr(exact, name)["prior"], FLOAT32)


def test_a_second_derivative_is_refused() -> None:
    case = make_case("random")
    logits = case.logits.clone().requires_grad_()
    value = student_terms(logits, case.teacher).log_target
    (gradient,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()  # type: ignore[no-untyped-call]


def test_weighted_guards_value_and_gradient() -> None:
    value = torch.tensor([2.0, math.inf, -math.inf, math.nan], requires_grad=True)
    log_weight = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    product = weighted(log_weight, value)
    assert product.tolist() == [2.0, 0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(product.sum(), value)
    assert gradient.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_weighted_by_a_mass_that_is_learnt_and_may_be_zero() -> None:
    """The student's own atoms: q log q at q = 0 is 0, with gradient 0."""
    log_q = torch.tensor([-1.0, -math.inf], requires_grad=True)
    product = weighted(log_q, log_q)
    assert_close(product.tolist(), [-math.exp(-1), 0.0], FLOAT32)
    (gradient,) = torch.autograd.grad(product.sum(), log_q)
    assert gradient.tolist() == [0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.floats(-1e4, 1e4), st.just(-math.inf)), min_size=1, max_size=6))
def test_log_sum_is_logsumexp_with_a_gradient_where_all_is_nothing(values: list[float]) -> None:
    atoms = float64([values]).requires_grad_()
    total = log_sum(atoms)
    assert_close(total, torch.logsumexp(atoms.detach(), -1), FLOAT64)
    (gradient,) = torch.autograd.grad(total.sum(), atoms)
    expected = torch.zeros_like(gradient) if max(values) == -math.inf else atoms.detach().softmax(-1)
    assert_close(gradient, expected, FLOAT64)
