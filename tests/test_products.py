"""Products with wide sums and wide results, against float64 products of the rounded factors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fused_cases import DEVICES
from torch import Tensor

from tailcache.trainers.products import add_product, compute_dtype, product, wide_dtype

NARROW = (torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (3, 64, 130), (0, 5, 4), (4, 0, 3), (3, 5, 0)]
"""[M, N] times [N, P]; also with nothing in it."""


def factors(m: int, n: int, p: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + p)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, n), (p, n)))
    return a.to(device, dtype), b.to(device, dtype).t()


def error(actual: Tensor, a: Tensor, b: Tensor) -> float:
    """Against float64, as a share of what a float32 sum of that many terms may be off by."""
    exact = a.double() @ b.double()
    size = (a.double().abs() @ b.double().abs()).clamp_min(1.0)
    return float(((actual.double() - exact).abs() / size).max()) if exact.numel() else 0.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *NARROW], ids=str)
def test_sums_and_results_are_wide(dtype: torch.dtype, shape: tuple[int, int, int], device: str) -> None:
    a, b = factors(*shape, dtype, device)
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    for first, second in ((a, b), (a.t().contiguous().t(), b.contiguous())):
        result = product(first, second, dtype)
        assert (result.dtype, result.shape) == (wide_dtype(dtype), (shape[0], shape[2]))
        assert error(result, a, b) < bound
        total = torch.full_like(result, 3.0)
        add_product(total, first, second, dtype)
        assert error(total - 3.0, a, b) < 3 * bound


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_result_rounded_to_16_bits_would_be_seen(dtype: torch.dtype) -> None:
    a, b = factors(3, 64, 130, dtype, "cpu")
    assert error(torch.mm(a, b), a, b) > 1e-4


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_wide_factors_are_taken_to_the_accuracy_of_the_narrow_type(dtype: torch.dtype) -> None:
    """Rounded or not, as the hardware has it; never worse than rounded."""
    a, b = factors(3, 64, 130, torch.float32, "cpu")
    assert error(product(a, b, dtype), a, b) <= 2 * torch.finfo(dtype).eps
    assert product(a, b, dtype).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *NARROW], ids=str)
def test_autocast_has_no_say(dtype: torch.dtype) -> None:
    a, b = factors(3, 64, 130, dtype, "cpu")
    total = torch.zeros((3, 130), dtype=wide_dtype(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result = product(a, b, dtype)
        add_product(total, a, b, dtype)
    assert result.dtype == wide_dtype(dtype)
    assert torch.equal(result, product(a, b, dtype))
    assert error(total, a, b) < 1e-6


@pytest.mark.parametrize("precision", ["none", "ieee", "bf16"])
def test_the_setting_of_the_process_is_put_back(precision: str) -> None:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    a, b = factors(3, 64, 130, torch.bfloat16, "cpu")
    try:
        matmul.fp32_precision = precision
        expected = matmul.fp32_precision
        product(a, b, torch.bfloat16)
        assert matmul.fp32_precision == expected
        with pytest.raises(RuntimeError, match="shape"):
            product(a, b.t(), torch.bfloat16)
        assert matmul.fp32_precision == expected
    finally:
        matmul.fp32_precision = before


def test_the_type_of_the_factors() -> None:
    types = (torch.float64, torch.float32, *NARROW)
    for first, second in itertools.product(types, types):
        hidden, weight = torch.empty(1, dtype=first), torch.empty(1, dtype=second)
        assert compute_dtype(hidden, weight) == torch.promote_types(first, second)
        with torch.autocast("cpu", torch.bfloat16):
            exact = torch.float64 in (first, second)
            assert compute_dtype(hidden, weight) == (torch.float64 if exact else torch.bfloat16)
