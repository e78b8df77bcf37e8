"""Round a teacher's weights to few bits, as quantising would: what would that cost?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tailcache.pipeline.teacher import head_of
from tailcache.storage.errors import ConfigError

__all__ = ["round_weights"]


def round_weights(model: nn.Module, *, bits: int, group: int) -> int:
    """Round the weights of every linear layer but the head to few bits, in place: what quantising would do.

    Each group of neighbouring input weights is rounded to the nearest of 2^bits even steps between its smallest and
    its largest (asymmetric round-to-nearest).

    Returns:
      How many weights were rounded.

    Raises:
      ConfigError: bits or group out of range, a layer's width is not a multiple of the group, or most of the
        model's weights are not in linear layers, so that it would stay nearly as it was.
    """
    if not 1 <= bits <= 16 or group < 2:
        raise ConfigError(f"expected 1 to 16 bits and groups of at least 2 weights, found {bits} and {group}")
    head = head_of(model) if isinstance(model, PreTrainedModel) else None
    rounded: set[Tensor] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | Conv1D) or layer is head:
            continue
        weight_OI = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
        outputs, inputs = weight_OI.shape
        if inputs % group:
            raise ConfigError(
                f"layer {name}: expected an input width that is a multiple of the group {group}, found "
                f"{inputs}; choose another --weight-group"
            )
        with torch.no_grad():
            weight = weight_OI.float().reshape(outputs, -1, group)
            low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
            step = (high - low) / (2**bits - 1)
            steps = torch.where(step > 0, ((weight - low) / torch.where(step > 0, step, 1.0)).round(), 0.0)
            weight_OI.copy_((low + steps * step).view_as(weight_OI))
        rounded.add(layer.weight)
    embedding = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    kept = [*embedding, *(head.parameters() if head is not None else [])]
    others = {p for p in model.parameters() if p.ndim > 1 and p not in rounded} - set(kept)
    num_rounded, num_others = sum(p.numel() for p in rounded), sum(p.numel() for p in others)
    if num_others >= num_rounded:
        raise ConfigError(
            f"weight_bits: expected a model that keeps most of its weights in linear layers, found {num_rounded:,} "
            f"such weights and {num_others:,} in others (fused experts, for example); this model cannot be rounded so"
        )
    return num_rounded
