"""Matrix products with float32 sums and float32 results, whatever the inputs' type: what the head is made of.

A product of 16-bit matrices that is also rounded to 16 bits puts an error of a few percent on the mass of the tail.
On a GPU there is a product that is not rounded. On a CPU there is none, but float32 copies of bfloat16 values can be
multiplied at bfloat16 speed where the CPU has units for it; callers hand over tiles, so that the copies stay in the
cache. Autocast has no say in here: it would round the results.

Legend: M, N, P the sizes of a product [M, N] times [N, P].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_product", "compute_dtype", "product", "wide_dtype"]


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type that the factors of the head are rounded to.

    Args:
      hidden: of any float type; its device decides which autocast is asked.
      weight: of any float type.

    Returns:
      The autocast's type where it is on and neither is float64; or else the wider of the two.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and results: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def _units_of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """On a CPU, let float32 copies of bfloat16 values be multiplied as what they are; the sums stay float32.

    A setting of the process, put back at once: float32 products that another thread starts meanwhile may be rounded.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype != torch.bfloat16 or device.type != "cpu" or before == "bf16":
        yield
        return
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A times b, summed and returned in ``wide_dtype(dtype)``.

    Args:
      a: [M, N] of any float type.
      b: [N, P], on the same device.
      dtype: what the factors are meant to be in. Wider ones *may* be rounded to it, if it is bfloat16: they are where
        there are units for that. They are never rounded to float16, which gradients would underflow in. Who wants the
        same result everywhere rounds them before.

    Returns:
      [M, P], a tensor of its own.

    Cost: a copy of each factor that is not in the type of the units.
    """
    wide = wide_dtype(dtype)
    narrow = dtype != wide and (dtype == torch.bfloat16 or a.dtype == b.dtype == dtype)
    with torch.autocast(device_type=a.device.type, enabled=False):
        if narrow and a.device.type == "cuda":
            result: Tensor = torch.mm(a.to(dtype), b.to(dtype), out_dtype=wide)
            return result
        with _units_of(dtype, a.device):
            return torch.mm(a.to(wide), b.to(wide))


def add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Add ``product(a, b, dtype)`` to a sum, in place.

    Args:
      total: [M, P] of ``wide_dtype(dtype)``.
      a: [M, N]; see ``product``.
      b: [N, P].
      dtype: see ``product``.

    Cost: as ``product``, and on a GPU one more [M, P].
    """
    if a.device.type == "cuda":
        total.add_(product(a, b, dtype))
    else:
        with _units_of(dtype, a.device):
            total.addmm_(a.to(total.dtype), b.to(total.dtype))
