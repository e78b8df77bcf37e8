"""Find out whether a model's head is a plain linear layer, so that its loss can be fused with it.

What the model does to its logits afterwards (Gemma's soft cap, Granite's and Cohere's scaling) is read from its
configuration, as the teacher's is. A probe then compares: the head's input through the head as it was understood, and
the model's own logits. Whatever else a model does shows there, and it is trained through full logits instead.

Legend: L tokens of the probe, D hidden width, W width of the head, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tailcache.trainers.forward import model_arguments
from tailcache.trainers.linear_head import LinearHead

__all__ = ["find_linear_head"]

PROBE_TOKENS = 16
# Norm of the difference, relative to the logits' spread, that the rounding of one product explains (float32: TF32).
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def find_linear_head(model: nn.Module, vocab_size: int) -> LinearHead | str:
    """The model's head as the fused losses need it.

    Args:
      model: a transformers causal language model on its device, not wrapped.
      vocab_size: V; rows of the head from V on are padding.

    Returns:
      The head, its weight and bias the model's own parameters; or, where the loss cannot be fused, why not.

    Cost: one forward of 16 tokens.
    """
    found: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if found is None:
        return "the model does not say which layer makes its logits"
    if not isinstance(found, nn.Linear) or type(found).forward is not nn.Linear.forward:
        return f"its head is a {type(found).__name__}, not a plain linear layer"
    if "forward" in found.__dict__ or found._forward_hooks:
        return "its head's forward is replaced or hooked"
    if found.weight.dtype not in ROUNDING:
        return f"its head's weight is of type {found.weight.dtype}"
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    if getattr(config, "logit_scale", None):
        scale *= config.logit_scale
    head = LinearHead(
        weight=found.weight,
        bias=found.bias,
        vocab_size=vocab_size,
        scale=scale,
        soft_cap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
    )
    distance = _distance(model, found, head)
    if distance is None:
        return "its forward does not call its head once on every token"
    if not distance <= ROUNDING[found.weight.dtype]:
        return f"its logits are more than its head's (they differ by {distance:.1e} of their spread)"
    return head


@torch.no_grad()
def _distance(model: nn.Module, found: nn.Linear, head: LinearHead) -> float | None:
    """How far the head, applied to what the model's head is given, is from the model's own logits."""
    seen: list[Tensor] = []
    ids_1L = (torch.arange(PROBE_TOKENS, device=found.weight.device) % head.vocab_size)[None]
    batch = {"input_ids": ids_1L, "position_ids": torch.arange(PROBE_TOKENS, device=ids_1L.device)[None]}
    handle = found.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    was_training = model.training
    model.eval()
    try:
        own_1LW: Tensor = model(**model_arguments(model, batch)).logits
    finally:
        handle.remove()
        model.train(was_training)
    if len(seen) != 1 or seen[0].shape[:-1] != ids_1L.shape or own_1LW.shape[:-1] != ids_1L.shape:
        return None
    wide = torch.float64 if own_1LW.dtype == torch.float64 else torch.float32
    exact = LinearHead(
        weight=head.weight.to(wide),
        bias=None if head.bias is None else head.bias.to(wide),
        vocab_size=head.vocab_size,
        scale=head.scale,
        soft_cap=head.soft_cap,
    )
    ours_LV, own_LV = exact.logits(seen[0][0].to(wide)), own_1LW[0, :, : head.vocab_size].to(wide)
    centred_LV = own_LV - own_LV.mean(-1, keepdim=True)
    return float((ours_LV - own_LV).norm() / centred_LV.norm().clamp_min(torch.finfo(wide).tiny))
