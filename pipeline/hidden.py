"""Hidden states as a cache keeps them: rounded to bfloat16, or to whole numbers of one scale per position. Pure.

Legend: T positions, D hidden width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailcache.storage.hidden import HiddenKind

__all__ = ["bfloat16_bits", "encode_hidden"]


def encode_hidden(
    hidden_TD: Tensor, kind: HiddenKind
) -> tuple[NDArray[np.uint16] | NDArray[np.int8], NDArray[np.float32]]:
    """Some hidden states as they are stored.

    Args:
      hidden_TD: [T, D] what the head is multiplied with, any floating type.
      kind: bf16: rounded to bfloat16, which changes nothing where they are bfloat16; int8: rounded to multiples of
        the largest magnitude / 127, an error of at most half of that.

    Returns:
      [T, D] uint16 bits of bfloat16, or int8; and [T] float32, the scale of int8, 1 for bf16. A row that is not finite
      (also one that bfloat16 cannot hold) has a scale that is not finite; the caller checks.
    """
    if kind == "bf16":
        rounded_TD = hidden_TD.to(torch.bfloat16)
        scale_T = torch.where(torch.isfinite(rounded_TD).all(-1), 1.0, torch.nan)
        return bfloat16_bits(rounded_TD), scale_T.float().cpu().numpy()
    wide_TD = hidden_TD.float()
    scale_T = wide_TD.abs().amax(-1) / 127
    scale_T1 = scale_T[:, None]
    # So small a row that its scale is 0 is stored as zeros; where the scale is subnormal, and so coarse, the largest
    # value can be more than 127 steps.
    steps_TD = torch.where(scale_T1 > 0, wide_TD / torch.where(scale_T1 > 0, scale_T1, 1.0), 0.0)
    return steps_TD.round_().clamp_(-127, 127).to(torch.int8).cpu().numpy(), scale_T.cpu().numpy()


def bfloat16_bits(values: Tensor) -> NDArray[np.uint16]:
    """The bits of bfloat16 numbers, of the same shape; shares memory where they lie on the CPU."""
    return values.contiguous().cpu().view(torch.int16).numpy().view(np.uint16)
