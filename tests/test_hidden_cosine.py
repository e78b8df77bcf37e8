"""Hidden-state cosine against the reference: value, gradient, scale, zeros, extremes, refusals."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import FLOAT32, FLOAT64, assert_close, assert_finite, float64, slope
from torch import Tensor

from tailcache.storage.errors import MismatchError
from tailcache.trainers.hidden_cosine import hidden_cosine


def _states(num: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn((2, num, width), generator=generator, dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize("width", [1, 2, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient(width: int, dtype: torch.dtype) -> None:
    student, teacher = _states(5, width)
    hidden = student.to(dtype, copy=True).requires_grad_()
    value = hidden_cosine(hidden, teacher.to(dtype))
    gradient = slope(value, hidden)
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    for t in range(5):
        expected, expected_slope = reference.cosine_loss(student[t].tolist(), teacher[t].tolist())
        assert_close(value[t].item(), expected, tolerance)
        assert_close(gradient[t].double(), float64(expected_slope), tolerance)


@settings(max_examples=40, deadline=None)
@given(a=st.floats(1e-3, 1e3), b=st.floats(1e-3, 1e3), seed=st.integers(0, 999))
def test_only_directions_count(a: float, b: float, seed: int) -> None:
    student, teacher = _states(4, 6, seed)
    plain = hidden_cosine(student, teacher)
    assert_close(hidden_cosine(a * student, b * teacher), plain, FLOAT64)
    assert_close(hidden_cosine(student, a * student), torch.zeros(4, dtype=torch.float64), FLOAT64)
    assert_close(hidden_cosine(student, -a * student), torch.full((4,), 2.0, dtype=torch.float64), FLOAT64)
    keep = torch.tensor([True, False, True, False])
    assert_close(hidden_cosine(student[keep], teacher[keep]), plain[keep], FLOAT64)


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_extreme_states_neither_overflow_nor_vanish(scale: float) -> None:
    student, teacher = _states(4, 6)
    hidden = (scale * student).float().requires_grad_()
    value = hidden_cosine(hidden, (scale * teacher).float())
    assert_close(value.double(), hidden_cosine(student, teacher), FLOAT32)
    assert_finite(value, hidden)


def test_a_state_of_zeros_has_no_direction_and_no_gradient() -> None:
    hidden = torch.zeros((2, 3)).requires_grad_()
    value = hidden_cosine(hidden, torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
    assert value.tolist() == [1.0, 1.0]
    assert (slope(value, hidden) == 0).all()


def test_half_precision_is_upcast() -> None:
    student, teacher = _states(4, 6)
    value = hidden_cosine(student.bfloat16(), teacher.bfloat16())
    assert value.dtype == torch.float32
    assert_close(value, hidden_cosine(student.bfloat16().float(), teacher.bfloat16().float()), FLOAT32)


def test_another_width_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"found \[2, 3\] for the student and \[2, 4\] for the teacher"):
        hidden_cosine(torch.zeros((2, 3)), torch.zeros((2, 4)))
