"""ATKD against the reference: the groups, their weights, empty groups, the wrapped divergences, refusals."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    CHOICES,
    FLOAT64,
    KINDS,
    Case,
    Tolerance,
    assert_close,
    assert_finite,
    cast,
    extremes,
    float64,
    make_case,
    slope,
    terms,
)
from torch import Tensor

from tailcache.storage.errors import ConfigError
from tailcache.trainers.atkd import atkd, group_weights
from tailcache.trainers.atoms import bucket_atoms
from tailcache.trainers.divergences import reverse_kl
from tailcache.trainers.dkd import non_target_class_kl, target_atoms, target_class_kl, without_target
from tailcache.trainers.tails import TAILS, tail_choice


def _atkd(case: Case, logits: Tensor, choice: str) -> Tensor:
    weights, hard = group_weights(cast(case.teacher, logits.dtype).log_not_target)
    teacher, student = terms(case, logits, choice)
    others = non_target_class_kl(teacher, student, tail_choice(choice)[1])
    return atkd(target_class_kl(teacher, student), others, weights, hard)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_positions", [1, 2, 7, 8])
def test_the_mean_is_the_papers_sum_of_group_means(num_positions: int, kind: str, choice: str) -> None:
    case = make_case(kind, num_positions=num_positions)
    logits = case.logits.clone().requires_grad_()
    mean = _atkd(case, logits, choice).mean()
    targets, others, uncertainty, slopes = [], [], [], []
    for t, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        y, stored = int(case.next_tokens[t]), case.stored(t)
        pi = case.prior.tolist() if choice == "prior" else None
        targets.append(reference.tckd(reference.seen(choice, p, stored), q, y))
        others.append(reference.nckd(choice, p, q, y, stored, case.samples(t), pi))
        uncertainty.append(reference.mass(p, reference.others(len(p), [y])))
    expected = reference.atkd(uncertainty, [value for value, _ in targets], [value for value, _ in others], 0.2)
    assert_close(mean.item(), expected, FLOAT64)
    easy, hard = reference.atkd_groups(uncertainty)
    for t in range(num_positions):
        weight = 0.8 / len(hard) if t in hard else 0.2 / len(easy)
        slopes.append(weight * (float64(others[t][1]) + (t in hard) * float64(targets[t][1])))
    assert_close(slope(mean, logits), torch.stack(slopes), FLOAT64)


@settings(max_examples=100, deadline=None)
@given(
    uncertainty=st.lists(st.sampled_from([1e-30, 0.1, 0.2, 0.5, 0.999]), max_size=12),
    easy_weight=st.floats(0, 1),
)
def test_groups_with_ties_and_empty_groups(uncertainty: list[float], easy_weight: float) -> None:
    """Hard is UNC >= the lower median; a group without positions contributes nothing and divides by nothing."""
    weights, hard = group_weights(float64(uncertainty).log(), easy_weight=easy_weight)
    assert weights.shape == hard.shape == (len(uncertainty),)
    assert weights.isfinite().all()
    if not uncertainty:
        return
    easy_ids, hard_ids = reference.atkd_groups(uncertainty)
    assert hard.nonzero()[:, 0].tolist() == hard_ids
    divergence, target = torch.rand(2, len(uncertainty), dtype=torch.float64)
    expected = reference.atkd(uncertainty, target.tolist(), divergence.tolist(), easy_weight)
    assert_close(atkd(target, divergence, weights, hard).mean().item(), expected, FLOAT64)
    total = (easy_weight if easy_ids else 0.0) + (1 - easy_weight)
    assert_close(weights.mean().item(), total, FLOAT64)


@pytest.mark.parametrize("hard_ratio", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("num", [1, 2, 11, 101])
def test_the_hard_ratio_is_a_quantile(hard_ratio: float, num: int) -> None:
    """Of distinct uncertainties: those from the lower (1 - ratio) quantile upwards; 0 is none, 1 is all."""
    uncertainty = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, hard = group_weights(uncertainty.log(), hard_ratio=hard_ratio)
    expected = num - math.floor(round((1 - hard_ratio) * (num - 1), 6)) if hard_ratio else 0
    assert int(hard.sum()) == expected
    if 0 < expected < num:
        assert uncertainty[hard].min() > uncertainty[~hard].max()


def test_an_uncertainty_that_rounds_to_zero_is_still_ranked() -> None:
    """1 - p_y of 1e-30 and 1e-20 are one number next to 1 and two logs."""
    _, hard = group_weights(torch.tensor([-69.0, -46.0, -69.5]), hard_ratio=0.5)
    assert hard.tolist() == [True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_it_wraps_the_reverse_kl(kind: str) -> None:
    """As the official code does: both parts with p and q exchanged, the groups by the teacher all the same."""
    case = make_case(kind, top_k=37)
    logits = case.logits.clone().requires_grad_()
    teacher, student = terms(case, logits)
    weights, hard = group_weights(teacher.log_not_target)
    value = atkd(
        reverse_kl(*target_atoms(teacher, student)),
        reverse_kl(*bucket_atoms(*without_target(teacher, student))),
        weights,
        hard,
    )
    targets, others, uncertainty = [], [], []
    for p, q, y in zip(case.p, case.q, case.next_tokens.tolist(), strict=True):
        targets.append(reference.tckd(q, p, y)[0])
        others.append(reference.nckd("exact", q, p, y, list(range(37)))[0])
        uncertainty.append(reference.mass(p, reference.others(37, [y])))
    assert_close(value.mean().item(), reference.atkd(uncertainty, targets, others, 0.2), Tolerance(1e-9, 1e-10))
    assert slope(value, logits).isfinite().all()


def test_masked_positions_are_rows_dropped_before_the_median() -> None:
    case = make_case("random", num_positions=8)
    teacher, student = terms(case, case.logits)
    keep = torch.tensor([True, False, True, True, False, True, False, True])
    weights, hard = group_weights(teacher.log_not_target[keep])
    kept = teacher.rows(keep)
    alone, alone_hard = group_weights(kept.log_not_target)
    assert torch.equal(hard, alone_hard)
    assert torch.equal(weights, alone)
    others = non_target_class_kl(kept, student.rows(keep), TAILS["sampled"])
    value = atkd(target_class_kl(kept, student.rows(keep)), others, alone, alone_hard)
    others = non_target_class_kl(teacher, student, TAILS["sampled"])[keep]
    assert_close(value, atkd(target_class_kl(teacher, student)[keep], others, weights, hard), FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_extreme_logits_have_finite_values_and_gradients(kind: str, choice: str) -> None:
    case = make_case(kind, num_positions=8)
    for logits in extremes():
        assert_finite(_atkd(case, logits, choice), logits)


def test_parameters_out_of_range_are_refused() -> None:
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="hard_ratio: expected a share between 0 and 1"):
            group_weights(torch.zeros(2), hard_ratio=ratio)
        with pytest.raises(ConfigError, match="easy_weight: expected a number between 0 and 1"):
            group_weights(torch.zeros(2), easy_weight=ratio)
