"""DKD against the reference: both parts, every tail choice, y among the top-K and beyond it, identities, extremes."""

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
    UNDERFLOW,
    Case,
    Tolerance,
    assert_close,
    assert_finite,
    atoms,
    cached,
    cast,
    extremes,
    float64,
    make_case,
    slope,
    student_logits,
    teacher_logprobs,
    terms,
)
from torch import Tensor

from tailcache.trainers.atoms import bucket_atoms, split_target
from tailcache.trainers.divergences import forward_kl, jsd, kl, reverse_kl, skew_kl, skew_reverse_kl
from tailcache.trainers.dkd import dkd, non_target_class_kl, target_atoms, target_class_kl, without_target
from tailcache.trainers.tails import TAILS, bucket, tail_choice
from tailcache.trainers.terms import student_terms
from tailcache.trainers.todi import todi


def _nckd(case: Case, logits: Tensor, choice: str) -> Tensor:
    teacher, student = terms(case, logits, choice)
    return non_target_class_kl(teacher, student, tail_choice(choice)[1])


def _pi(case: Case, choice: str) -> list[float] | None:
    prior: list[float] = case.prior.tolist()
    return prior if choice == "prior" else None


def test_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q uniform, y the second: p^ = (2/3, 1/3), q^ = (1/2, 1/2)."""
    y = torch.tensor([1])
    teacher = cached(float64([[0.5, 0.25, 0.25]]).log(), 3, 0, y)
    student = student_terms(torch.zeros((1, 3), dtype=torch.float64), teacher)
    target = 0.25 * math.log(0.75) + 0.75 * math.log(1.125)
    others = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert_close(target_class_kl(teacher, student).item(), target, FLOAT64)
    assert_close(non_target_class_kl(teacher, student, bucket).item(), others, FLOAT64)
    value = dkd(teacher, student, bucket, target_weight=1.0, non_target_weight=8.0)
    assert_close(value.item(), target + 8 * others, FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("student_scale", [1.5, 8.0])
@pytest.mark.parametrize("top_k", [1, 8, 36, 37])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind: str, choice: str, top_k: int, student_scale: float, dtype: torch.dtype) -> None:
    case = make_case(kind, top_k=top_k, student_scale=student_scale)
    single = UNDERFLOW if kind == "peaked" else FLOAT32
    tolerance = FLOAT64 if dtype == torch.float64 else single
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    teacher, student = terms(case, logits, choice)
    target, others = target_class_kl(teacher, student), _nckd(case, logits, choice)
    both = dkd(teacher, student, tail_choice(choice)[1], target_weight=0.5, non_target_weight=3.0)
    slopes = slope(target, logits), slope(others, logits), slope(both, logits)
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        y, stored = int(case.next_tokens[t]), case.stored(t)
        tckd, tckd_slope = reference.tckd(reference.seen(choice, p, stored), q, y)
        nckd, nckd_slope = reference.nckd(choice, p, q, y, stored, case.samples(t), _pi(case, choice))
        assert_close(target[t].item(), tckd, tolerance)
        assert_close(others[t].item(), nckd, tolerance)
        assert_close(slopes[0][t].double(), float64(tckd_slope), tolerance)
        assert_close(slopes[1][t].double(), float64(nckd_slope), tolerance)
        assert_close(both[t].item(), 0.5 * tckd + 3 * nckd, tolerance)
        assert_close(slopes[2][t].double(), 0.5 * float64(tckd_slope) + 3 * float64(nckd_slope), tolerance)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    choice=st.sampled_from(CHOICES),
    vocab_size=st.integers(2, 40),
    top_k=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)
def test_kl_is_tckd_and_nckd_weighted_by_the_uncertainty(
    kind: str, choice: str, vocab_size: int, top_k: int, seed: int
) -> None:
    """KL = TCKD + (1 - p_y) NCKD for every tail choice: of this cache where y is in the top-K, of one that stores y too
    where it is not (y is known, so the tail that is left to choose is the one without it).
    """
    case = make_case(kind, vocab_size=vocab_size, top_k=min(top_k, vocab_size), seed=seed)
    logits = case.logits.clone().requires_grad_()
    teacher, student = terms(case, logits, choice)
    tail = tail_choice(choice)[1]
    parts = target_class_kl(teacher, student) + teacher.log_not_target.exp() * non_target_class_kl(
        teacher, student, tail
    )
    whole = forward_kl(teacher, student, tail)
    known = teacher.is_target.any(-1)
    assert_close(parts[known], whole[known], Tolerance(1e-9, 1e-11))
    assert_close(slope(parts[known], logits), slope(whole[known], logits), Tolerance(1e-9, 1e-11))
    if choice in ("drop", "renormalise"):
        assert_close(parts, whole, Tolerance(1e-9, 1e-11))  # p_y is 0 beyond the top-K
        return
    for t in [t for t in range(len(case.p)) if not known[t]]:
        p, q, y = case.p[t], case.q[t], int(case.next_tokens[t])
        stored_too = [*case.stored(t), y]
        if choice == "sampled":  # draws of y are replaced by what is known of y; the others keep their weight
            beyond = [i for i in reference.others(vocab_size, stored_too)]
            alpha = reference.mass(p, [*beyond, y])
            expected = math.fsum(p[i] * math.log(p[i] / q[i]) for i in stored_too)
            expected += math.fsum(p[i] * math.log(p[i]) for i in beyond)
            drawn = [s for s in case.samples(t) if s != y]
            expected -= alpha / 5 * math.fsum(math.log(q[s]) for s in drawn)
            # What is drawn off y has the weight alpha |drawn| / m and not alpha - p_y: the difference meets log(1 - q).
            surplus = reference.mass(p, beyond) - alpha / 5 * len(drawn)
            expected -= surplus * math.log(reference.mass(q, reference.others(vocab_size, [y])))
        else:
            expected = reference.kl_with_tail(choice, p, q, stored_too, (), _pi(case, choice) or [1.0] * vocab_size)
        assert_close(parts[t].item(), expected, Tolerance(1e-9, 1e-11))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.integers(2, 40),
    top_k=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)
def test_the_conditional_terms_are_those_of_the_conditional_distributions(
    kind: str, vocab_size: int, top_k: int, seed: int
) -> None:
    case = make_case(kind, vocab_size=vocab_size, top_k=min(top_k, vocab_size), seed=seed)
    teacher, student = without_target(*terms(case, case.logits))
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        y, stored = int(case.next_tokens[t]), case.stored(t)
        p_hat, q_hat = reference.conditional(p, y), reference.conditional(q, y)
        beyond = reference.others(vocab_size, [*stored, y])
        assert_close(teacher.logprobs[t].exp().tolist(), [p_hat[i] for i in stored], FLOAT64)
        assert_close(student.logprobs[t].exp().tolist(), [q_hat[i] for i in stored], FLOAT64)
        alpha = reference.mass(p_hat, beyond)
        assert_close(teacher.log_tail[t].exp().item(), alpha, FLOAT64)
        assert_close(student.log_beyond[t].exp().item(), reference.mass(q_hat, beyond), FLOAT64)
        if alpha > 0:
            entropy = reference.entropy([p_hat[i] / alpha for i in beyond])
            assert_close(alpha * teacher.tail_entropy[t].item(), alpha * entropy, FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_with_every_id_stored_every_choice_is_dense(kind: str, choice: str) -> None:
    case = make_case(kind, top_k=37)
    logits = case.logits.clone().requires_grad_()
    value = _nckd(case, logits, choice)
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        y = int(case.next_tokens[t])
        p_hat, q_hat = reference.conditional(p, y), reference.conditional(q, y)
        assert_close(value[t].item(), reference.forward_kl(p_hat, q_hat), FLOAT64)
        expected = [b - a for a, b in zip(p_hat, q_hat, strict=True)]
        assert_close(slope(value, logits)[t], float64(expected), FLOAT64)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), top_k=st.integers(1, 37), seed=st.integers(0, 10_000))
def test_bucket_is_a_lower_bound_and_nothing_is_left_at_q_equals_p(kind: str, top_k: int, seed: int) -> None:
    case = make_case(kind, top_k=top_k, seed=seed)
    some, every = _nckd(case, case.logits, "bucket"), _nckd(case, case.logits, "exact")
    assert (some >= -1e-12).all()
    assert (some <= every + 1e-12).all()
    logits = case.logprobs.clone().requires_grad_()
    teacher, student = terms(case, logits)
    both = dkd(teacher, student, bucket, target_weight=1.0, non_target_weight=1.0)
    assert both.abs().max() < 1e-10
    assert slope(both, logits).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "todi"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_divergence_of_the_two_parts(kind: str, name: str) -> None:
    """What ATKD wraps: f on [p_y, 1 - p_y] and f on the atoms without y, bucket and dense."""
    loss = {
        "kl": kl,
        "reverse_kl": reverse_kl,
        "jsd": lambda p, q: jsd(p, q, 0.3),
        "skew_kl": lambda p, q: skew_kl(p, q, 0.3),
        "skew_reverse_kl": lambda p, q: skew_reverse_kl(p, q, 0.3),
        "todi": todi,
    }[name]
    case = make_case(kind)
    logits = case.logits.clone().requires_grad_()
    teacher, student = terms(case, logits)
    p_two, p_rest = split_target(atoms(case, logits, "exact")[0], case.next_tokens)
    q_two, q_rest = split_target(atoms(case, logits, "exact")[1], case.next_tokens)
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        y = int(case.next_tokens[t])
        not_y = reference.others(37, [y])
        two = [(p[y], [y]), (reference.mass(p, not_y), not_y)]
        expected, expected_slope = reference.atom_loss(name, two, q, 0.3)
        for value in (loss(*target_atoms(teacher, student)), loss(p_two, q_two)):
            assert_close(value[t].item(), expected, FLOAT64)
            assert_close(slope(value[t], logits)[t], float64(expected_slope), Tolerance(1e-9, 1e-10))
        p_hat, q_hat = reference.conditional(p, y), reference.conditional(q, y)
        beyond = reference.others(37, [*case.stored(t), y])
        merged = [(p_hat[i], [i]) for i in case.stored(t) if i != y] + [(reference.mass(p_hat, beyond), beyond)]
        single = [(p_hat[i], [i]) for i in not_y]
        # q^ is a softmax of the other logits: its gradient at y is 0, which the zero of q^ at y gives.
        for value, atoms_hat in (
            (loss(*bucket_atoms(*without_target(teacher, student))), merged),
            (loss(p_rest, q_rest), single),
        ):
            expected, expected_slope = reference.atom_loss(name, atoms_hat, q_hat, 0.3)
            assert_close(value[t].item(), expected, Tolerance(1e-9, 1e-10))
            assert_close(slope(value[t], logits)[t], float64(expected_slope), Tolerance(1e-9, 1e-10))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("top_k", [1, 8, 36, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_have_finite_values_and_gradients(kind: str, top_k: int, choice: str) -> None:
    case = make_case(kind, num_positions=8, top_k=top_k)
    for logits in extremes():
        teacher, student = terms(case, logits, choice)
        tail = tail_choice(choice)[1]
        assert_finite(dkd(teacher, student, tail, target_weight=1.0, non_target_weight=8.0), logits)


def test_a_student_sure_of_a_token_the_teacher_has_beyond_its_top_k() -> None:
    """q_y = 1 - 1e-20 in float32: the bucket without y is a sum, so NCKD keeps its digits."""
    logprobs = teacher_logprobs("zipf", 4, 37)
    y = logprobs.argmin(-1)
    single = cast(cached(logprobs, 8, 0, y), torch.float32)
    logits = torch.zeros((4, 37)).scatter(-1, y[:, None], 50.0).requires_grad_()
    value = non_target_class_kl(single, student_terms(logits, single), bucket)
    for t, p in enumerate(logprobs.exp().tolist()):
        q = reference.softmax(logits[t].tolist())
        expected, expected_slope = reference.nckd("bucket", p, q, int(y[t]), single.token_ids[t].tolist())
        assert_close(value[t].item(), expected, UNDERFLOW)
        assert_close(slope(value, logits)[t].double(), float64(expected_slope), UNDERFLOW)


@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_true_token_that_is_nearly_all_of_the_tail(share: float) -> None:
    """Float32 knows the rest of the tail to 1e-7 of it: an error of that size, and no infinity where it is lost."""
    p = torch.cat([torch.tensor([0.6, 0.3, 0.1 * (1 - share)]), torch.full((30,), 0.1 * share / 30)]).double()[None]
    teacher = cast(cached((p / p.sum()).log(), 2, 0, torch.tensor([2])), torch.float32)
    logits = student_logits(1, 33).float().requires_grad_()
    student = student_terms(logits, teacher)
    q = reference.softmax(logits[0].tolist())
    expected, expected_slope = reference.nckd("bucket", (p / p.sum())[0].tolist(), q, 2, [0, 1])
    value = non_target_class_kl(teacher, student, bucket)
    assert_close(value[0].item(), expected, FLOAT32)
    assert_close(slope(value, logits)[0].double(), float64(expected_slope), FLOAT32)
    for loss in (reverse_kl, todi):
        assert_finite(loss(*bucket_atoms(*without_target(teacher, student))), logits)


def test_a_teacher_sure_of_the_true_token_says_nothing_of_the_others() -> None:
    """1 - p_y = 0 exactly: dropped tail, K = 1 and y on top."""
    case = make_case("zipf", top_k=1)
    logits = case.logits.clone().requires_grad_()
    teacher, student = terms(case, logits, "drop")
    value = non_target_class_kl(teacher, student, bucket)
    sure = teacher.log_not_target == -math.inf
    assert sure.any()
    assert (value[sure] == 0).all()
    assert_finite(dkd(teacher, student, bucket, target_weight=1.0, non_target_weight=1.0), logits)


@pytest.mark.parametrize("choice", list(TAILS))
def test_masking_is_dropping_rows_and_a_batch_is_its_micro_batches(choice: str) -> None:
    case = make_case("zipf", num_positions=8)
    teacher, student = terms(case, case.logits)
    weights = {"target_weight": 1.0, "non_target_weight": 2.0}
    whole = dkd(teacher, student, TAILS[choice], **weights)
    keep = torch.tensor([True, False, True, True, False, True, False, True])
    assert_close(dkd(teacher.rows(keep), student.rows(keep), TAILS[choice], **weights), whole[keep], FLOAT64)
    micro = [dkd(teacher.rows(p), student.rows(p), TAILS[choice], **weights) for p in torch.split(torch.arange(8), 3)]
    assert (torch.cat(micro) - whole).abs().max() <= MICRO_BATCH


@settings(max_examples=40, deadline=None)
@given(choice=st.sampled_from(CHOICES), shift=st.floats(-1e3, 1e3), seed=st.integers(0, 999))
def test_shifting_logits_changes_nothing(choice: str, shift: float, seed: int) -> None:
    case = make_case("random", seed=seed)
    plain, shifted = _nckd(case, case.logits, choice), _nckd(case, case.logits + shift, choice)
    assert_close(shifted, plain, Tolerance(1e-9, 1e-9))


@pytest.mark.parametrize("choice", CHOICES)
def test_gradcheck(choice: str) -> None:
    case = make_case("random", num_positions=3, vocab_size=9, top_k=3)
    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: _nckd(case, z, choice), (logits,), eps=1e-6, atol=1e-6)


def test_no_positions_at_all() -> None:
    case = make_case("random")
    teacher = case.teacher.rows(torch.zeros(6, dtype=torch.bool))
    student = student_terms(case.logits[:0], teacher)
    assert dkd(teacher, student, TAILS["sampled"], target_weight=1.0, non_target_weight=1.0).shape == (0,)
