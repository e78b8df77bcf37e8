"""Which precision a device computes quickly in: bfloat16 on a GPU or a recent processor, not on every processor.

A processor without instructions for it multiplies bfloat16 matrices many times slower than float32 ones, and torch does
not say so: a capture of hours would take weeks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["is_slow", "native_dtype"]


def native_dtype(device: torch.device) -> torch.dtype:
    """What a teacher runs in where nothing else decides: bfloat16 where the device is made for it, else float32."""
    return torch.float32 if is_slow(torch.bfloat16, device) else torch.bfloat16


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has no fast products of this type, as far as torch says. A GPU is taken to have them."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if device.type != "cpu" or dtype not in names:
        return False
    supported: Callable[[], bool] | None = getattr(torch.ops.mkldnn, names[dtype], None)
    return supported is None or not supported()
