"""The tail choices: the log-ratio against the reference, what is left without a tail, guards, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    CHOICES,
    FLOAT64,
    KINDS,
    Tolerance,
    assert_close,
    assert_finite,
    atoms,
    float64,
    make_case,
    slope,
    terms,
)

from tailcache.storage.errors import ConfigError
from tailcache.trainers.atoms import bucket_atoms, filled_atoms, head_atoms, split_target
from tailcache.trainers.divergences import forward_kl
from tailcache.trainers.dkd import dkd
from tailcache.trainers.tad import weighted_tad
from tailcache.trainers.tails import TAILS, TRUNCATIONS, bucket, drop, renormalise, tail_choice
from tailcache.trainers.terms import student_terms


@pytest.mark.parametrize("choice", list(TAILS))
@pytest.mark.parametrize("kind", KINDS)
def test_tail_log_ratio_matches_the_reference(choice: str, kind: str) -> None:
    """R = sum over the tail of p~ (log p - log q), with what stands for p~; of order 1 even where alpha is 1e-30."""
    case = make_case(kind)
    ratio = TAILS[choice](*terms(case, case.logits))
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        beyond = reference.others(len(p), case.stored(t))
        alpha = reference.mass(p, beyond)
        pi = case.prior.tolist()
        weights = reference.tail_cross_weights(choice, p, q, case.stored(t), case.samples(t), pi)
        if choice == "bucket":
            expected = math.log(alpha / reference.mass(q, beyond))
        else:
            expected = math.fsum(p[i] * math.log(p[i]) for i in beyond) / alpha
            expected -= math.fsum(w / alpha * math.log(q[i]) for i, w in weights.items())
        assert_close(ratio[t].item(), expected, Tolerance(1e-9, 1e-9))


@pytest.mark.parametrize("choice", list(TAILS))
@pytest.mark.parametrize("num_samples", [0, 3])
def test_with_every_id_stored_there_is_no_tail_to_choose(choice: str, num_samples: int) -> None:
    """And nothing that a tail would need is asked for."""
    case = make_case("random", top_k=37, num_samples=num_samples)
    logits = case.logits.clone().requires_grad_()
    value = forward_kl(case.teacher, student_terms(logits, case.teacher), TAILS[choice])
    dense = [reference.forward_kl(p, q) for p, q in zip(case.p, case.q, strict=True)]
    assert_close(value.tolist(), dense, FLOAT64)
    assert_close(slope(value, logits), float64(case.q) - float64(case.p), FLOAT64)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_position_without_tail_mass_is_guarded(choice: str) -> None:
    """K < V, but one position has alpha = 0 exactly: its tail counts for nothing and breaks no gradient."""
    case = make_case("random")
    logits = case.logits.clone().requires_grad_()
    teacher, student = terms(case, logits, choice)
    log_tail = teacher.log_tail.clone()
    log_tail[2] = -math.inf
    teacher, tail = replace(teacher, log_tail=log_tail), tail_choice(choice)[1]
    assert_finite(forward_kl(teacher, student, tail), logits)
    assert_finite(weighted_tad(teacher, student, tail, top_k=8, log_beta_T=float64([1.0] * 6)), logits)
    assert_finite(dkd(teacher, student, tail, target_weight=1.0, non_target_weight=1.0), logits)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    vocab_size=st.integers(2, 40),
    top_k=st.integers(1, 39),
    seed=st.integers(0, 10_000),
)
def test_bucket_is_a_lower_bound_of_the_dense_kl(kind: str, vocab_size: int, top_k: int, seed: int) -> None:
    case = make_case(kind, num_positions=3, vocab_size=vocab_size, top_k=min(top_k, vocab_size), seed=seed)
    value = forward_kl(*terms(case, case.logits), bucket)
    dense = float64([reference.forward_kl(p, q) for p, q in zip(case.p, case.q, strict=True)])
    assert (value >= -1e-12).all()
    assert (value <= dense + 1e-12).all()


def test_sampled_reports_the_stored_entropy_not_a_reconstruction() -> None:
    """Plugging the draws in as the teacher gives another, larger value; ours is the exact entropy's."""
    case = make_case("zipf", num_samples=4)
    teacher, student = terms(case, case.logits)
    ratio = TAILS["sampled"](teacher, student)
    for t, p in enumerate(case.p):
        beyond = reference.others(37, case.stored(t))
        alpha = reference.mass(p, beyond)
        cross = student.sample_logprobs[t].mean().item()
        exact = math.fsum(p[i] / alpha * math.log(p[i]) for i in beyond) - cross
        reconstructed = math.log(alpha / 4) - cross  # four draws of weight alpha / 4 each
        assert_close(ratio[t].item(), exact, Tolerance(1e-9, 1e-9))
        assert reconstructed > exact


@pytest.mark.parametrize("top_k", [1, 8, 37])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", list(TRUNCATIONS))
def test_truncated_teachers(choice: str, kind: str, top_k: int) -> None:
    """What is left of the top-K, of the true token and of the others; K = V loses nothing."""
    case = make_case(kind, top_k=top_k)
    teacher = TRUNCATIONS[choice](case.teacher)
    for t, p in enumerate(case.p):
        left, y = reference.seen(choice, p, case.stored(t)), int(case.next_tokens[t])
        assert_close(teacher.logprobs[t].exp().tolist(), [left[i] for i in case.stored(t)], FLOAT64)
        assert_close(teacher.log_target[t].exp().item(), left[y], FLOAT64)
        not_y = reference.mass(left, reference.others(37, [y]))
        assert_close(teacher.log_not_target[t].item(), math.log(not_y) if not_y else -math.inf, Tolerance(1e-9, 1e-9))
    assert (teacher.log_tail == -math.inf).all()
    assert (teacher.tail_entropy == 0).all()


def test_dropping_the_tail_inflates_the_head() -> None:
    """The gradient is (sum_H p) q - p on the top-K: it vanishes at q = p / sum_H p, and not at q = p."""
    case = make_case("zipf")
    logits = case.logits.clone().requires_grad_()
    teacher, student = terms(case, logits, "drop")
    gradient = slope(forward_kl(teacher, student, bucket), logits)
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        kept = set(case.stored(t))
        total = reference.mass(p, case.stored(t))
        expected = [total * q_i - (p_i if i in kept else 0.0) for i, (p_i, q_i) in enumerate(zip(p, q, strict=True))]
        assert_close(gradient[t], float64(expected), FLOAT64)


def test_drop_keeps_what_normalises_at_another_temperature() -> None:
    teacher = make_case("zipf", temperatures=(2.0,)).teacher
    assert drop(teacher).log_z_tail is teacher.log_z_tail
    emptied = renormalise(teacher).log_z_tail
    assert emptied is not None
    assert (emptied == -math.inf).all()
    assert renormalise(make_case("zipf").teacher).log_z_tail is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["bucket", "drop", "renormalise", "prior", "uniform"])
def test_atoms_are_the_teacher_and_the_student_merged(kind: str, choice: str) -> None:
    case = make_case(kind)
    log_p, log_q = atoms(case, case.logits, choice)
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        pi = case.prior.tolist()
        expected = reference.atoms(choice, p, case.stored(t), pi)
        assert_close(log_p[t].exp().tolist(), [mass for mass, _ in expected], FLOAT64)
        assert_close(log_q[t].exp().tolist(), [reference.mass(q, ids) for _, ids in expected], FLOAT64)


def test_a_fill_without_mass_beyond_the_top_k_leaves_nothing_there() -> None:
    case = make_case("random")
    fill = torch.zeros((6, 37), dtype=torch.float64).scatter(-1, case.teacher.token_ids, 1.0)
    filled = filled_atoms(case.teacher, fill)
    assert_close(filled.exp().sum(-1), case.teacher.logprobs.exp().sum(-1), FLOAT64)
    assert not filled.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_distribution_split_at_the_true_token(kind: str) -> None:
    case = make_case(kind)
    logits = case.logits.clone().requires_grad_()
    for probabilities, logprobs in ((case.p, case.logprobs), (case.q, logits.log_softmax(-1))):
        binary, rest = split_target(logprobs, case.next_tokens)
        for t, (p, y) in enumerate(zip(probabilities, case.next_tokens.tolist(), strict=True)):
            not_y = reference.mass(p, reference.others(37, [y]))
            assert_close(binary[t].tolist(), [math.log(p[y]), math.log(not_y)], Tolerance(1e-9, 1e-9))
            assert_close(rest[t].exp().tolist(), reference.conditional(p, y), FLOAT64)
    assert slope(binary.sum(-1) + rest.masked_fill(rest == -math.inf, 0.0).sum(-1), logits).isfinite().all()
    sure = torch.tensor([[0.0, -math.inf]])
    binary, rest = split_target(sure, torch.tensor([0]))
    assert binary.tolist() == [[0.0, -math.inf]]
    assert rest.tolist() == [[-math.inf, -math.inf]]


def test_atoms_of_the_terms() -> None:
    case = make_case("random")
    teacher, student = terms(case, case.logits)
    log_p, log_q = bucket_atoms(teacher, student)
    assert log_p.shape == log_q.shape == (6, 9)
    assert_close(log_p.exp().sum(-1), torch.ones(6, dtype=torch.float64), FLOAT64)
    assert torch.equal(head_atoms(teacher, student)[0], log_p[:, :-1])
    assert torch.equal(head_atoms(teacher, student)[1], log_q[:, :-1])


def test_a_choice_is_what_happens_to_the_teacher_and_a_tail_function() -> None:
    teacher = make_case("random").teacher
    for name, function in TAILS.items():
        assert tail_choice(name)[0](teacher) is teacher
        assert tail_choice(name)[1] is function
    for name, truncation in TRUNCATIONS.items():
        assert tail_choice(name) == (truncation, bucket)
    with pytest.raises(
        ConfigError, match=r"one of sampled, bucket, prior, uniform, exact, drop, renormalise; found 'smooth'"
    ):
        tail_choice("smooth")


def test_the_functions_refuse_what_they_were_not_given() -> None:
    case = make_case("random", num_samples=0)
    student = student_terms(case.logits, case.teacher, fills={"uniform": torch.ones(37)})
    with pytest.raises(ConfigError, match=r"m = 0; choose another tail \('bucket'\)"):
        TAILS["sampled"](case.teacher, student)
    for name in ("prior", "exact"):
        with pytest.raises(ConfigError, match=rf"fill '{name}', found uniform; .* fills=\{{'{name}': ...\}}"):
            TAILS[name](case.teacher, student)
    with pytest.raises(ConfigError, match="found no fill"):
        TAILS["uniform"](case.teacher, student_terms(case.logits, case.teacher))
