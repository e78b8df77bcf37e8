"""The teacher's own distribution over the whole vocabulary, from its stored hidden states and head.

Legend: T target positions, c of them at a time, V vocabulary, D the teacher's hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tailcache.trainers.linear_head import LinearHead, LogitTiles, vocabulary_tiles
from tailcache.trainers.products import wide_dtype

if TYPE_CHECKING:
    from tailcache.storage.reader import StoredHead

__all__ = ["hidden_states", "stored_head", "teacher_logits"]


def stored_head(stored: StoredHead, device: torch.device) -> LinearHead:
    """The teacher's head on a device, in the type it was stored in."""
    weight_VD = torch.from_numpy(stored.weight)
    if stored.weight_kind == "bfloat16":
        weight_VD = weight_VD.view(torch.bfloat16)
    return LinearHead(
        weight=weight_VD.to(device),
        bias=None if stored.bias is None else torch.from_numpy(stored.bias).to(device),
        vocab_size=len(weight_VD),
        scale=stored.scale,
        soft_cap=stored.soft_cap,
    )


def hidden_states(fields: Mapping[str, Tensor]) -> Tensor:
    """[T, D] the teacher's hidden states of a batch: bfloat16 as stored, or float32 = scale * int8."""
    hidden_TD = fields["hidden"]
    if hidden_TD.dtype == torch.uint16:
        return hidden_TD.view(torch.bfloat16)
    return hidden_TD.float() * fields["hidden_scale"][:, None]


def teacher_logits(hidden_cD: Tensor, head: LinearHead) -> Tensor:
    """[c, V] float32 logits; sums in float32, a tile of the vocabulary at a time."""
    dtype = torch.promote_types(hidden_cD.dtype, head.weight.dtype)
    tiles = LogitTiles(head.weight, head.bias, head.vocab_size, head.scale, head.soft_cap, dtype)
    logits_cV = hidden_cD.new_empty((len(hidden_cD), head.vocab_size), dtype=wide_dtype(dtype))
    for tile in vocabulary_tiles(head.vocab_size):
        logits_cV[:, tile] = tiles.tile(hidden_cD, tile)
    return logits_cV
