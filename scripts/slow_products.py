"""A word where a processor is asked for what it is not made for."""

from __future__ import annotations

import logging

__all__ = ["warn_of_slow_products"]


def warn_of_slow_products(precision: str, device: str) -> None:
    """Say what torch does not: that a processor takes many times as long in bfloat16 as in float32.

    Args:
      precision: "fp32" or "bf16".
      device: "auto", or as torch names it.
    """
    import torch

    from tailcache.pipeline.precision import is_slow

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if precision == "bf16" and on_cpu and is_slow(torch.bfloat16, torch.device("cpu")):
        logging.getLogger(__name__).warning(
            "--precision bf16: this processor has no fast products in bfloat16 and will take many times as long as in "
            "float32; leave the flag out, or use a GPU"
        )
