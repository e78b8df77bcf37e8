"""The student's forward: logits at the target positions only, in float32, documents kept apart.

A causal language model computes logits for every slot of a batch, padding and unsupervised tokens included,
and under autocast in 16 bits. Both cost dearly here: [B, L, V] is the largest tensor of the run, and a
16-bit head is off by 2 % of the tail's mass. So while the model runs, its head (``get_output_embeddings``)
is handed only the hidden states of the target positions, in float32 with autocast off; whatever the model
does to logits after that (scaling, soft-capping) is left in place.

Whether documents packed into one row really stay apart depends on the model. transformers 5.23 derives a
block-diagonal mask from restarting position ids, for any number of rows, when it is given neither an
attention mask nor a cache; flash attention does so for a single line only; recurrent models and a few older
ones (OPT, BLOOM) not at all. ``check_documents_kept_apart`` tries it on the model at hand instead of
believing a list.

Legend: B lines, L their length, T target positions, D hidden, W width of the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailcache.storage.errors import StudentError
from tailcache.trainers.batches import Layout, RowTokens, lay_out

__all__ = ["check_documents_kept_apart", "default_layout", "target_logits"]

# Hidden states of one document, packed or alone, relative to their spread: the order of sums differs (3e-6
# in float32, more with TF32 or 16-bit weights); another document in sight moves them by more than 0.1.
APART_FLOAT32, APART_HALF = 1e-2, 5e-2
PROBE_TOKENS = 24


def target_logits(
    model: nn.Module,
    input_ids_BL: Tensor,
    position_ids_BL: Tensor,
    target_index_T: Tensor,
    *,
    unwrapped: nn.Module | None = None,
) -> Tensor:
    """The student's logits at the target positions.

    Args:
      model: a transformers causal language model, wrapped for distributed training or not.
      input_ids_BL: [B, L] int64.
      position_ids_BL: [B, L] int64, restarting at every document.
      target_index_T: [T] int64 into the flattened [B * L].
      unwrapped: the model inside its wrapper, by default `model`.

    Returns:
      [T, W] float32 (float64 for a float64 model); differentiable.

    Raises:
      StudentError: the model returned logits for other positions than asked.
    """
    return _at_targets(model, unwrapped or model, input_ids_BL, position_ids_BL, target_index_T, head=True)


def _at_targets(
    model: nn.Module,
    unwrapped: nn.Module,
    input_ids_BL: Tensor,
    position_ids_BL: Tensor,
    index_T: Tensor,
    head: bool,
) -> Tensor:
    arguments: dict[str, Any] = {"input_ids": input_ids_BL}
    for name, value in (("position_ids", position_ids_BL), ("use_cache", False)):
        if _accepts(unwrapped, name):
            arguments[name] = value
    output_embeddings = unwrapped.get_output_embeddings()  # type: ignore[operator]
    if output_embeddings is None:
        values = model(**arguments).logits
    else:
        with _only(output_embeddings, index_T, apply=head):
            values = model(**arguments).logits
    values = values.reshape(-1, values.shape[-1])
    if values.shape[0] == input_ids_BL.numel():  # never T: the last token of a row has no target
        values = values[index_T]
    if values.shape[0] != len(index_T):
        raise StudentError(
            f"{type(unwrapped).__name__}: expected logits of {len(index_T)} target positions or of all "
            f"{input_ids_BL.numel()}, found {values.shape[0]}; this model's forward cannot be used here"
        )
    result: Tensor = values if values.dtype == torch.float64 else values.float()
    return result


def _accepts(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(type(model).forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@contextmanager
def _only(head: nn.Module, index_T: Tensor, *, apply: bool) -> Iterator[None]:
    """While inside, the head sees the hidden states of these positions only, and computes in float32.

    The instance's forward is replaced rather than hooked: a pre-forward hook cannot leave autocast.
    """
    previous = head.__dict__.get("forward")
    forward: Callable[..., Tensor] = head.forward

    def at_targets(hidden: Tensor) -> Tensor:
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])[index_T.to(hidden.device)]
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            if hidden_TD.dtype != torch.float64:
                hidden_TD = hidden_TD.float()
            if not apply:
                return hidden_TD[None]
            if type(head) is nn.Linear and head.weight.dtype != hidden_TD.dtype:
                bias = None if head.bias is None else head.bias.to(hidden_TD.dtype)
                return nn.functional.linear(hidden_TD, head.weight.to(hidden_TD.dtype), bias)[None]
            weight = getattr(head, "weight", None)
            return forward(hidden_TD.to(weight.dtype) if isinstance(weight, Tensor) else hidden_TD)[None]

    head.__dict__["forward"] = at_targets
    try:
        yield
    finally:
        if previous is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = previous


def default_layout(model: nn.Module) -> Layout:
    """How to lay out packed rows for this model: one line for flash attention, a line per row otherwise."""
    implementation = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    return "flat" if "flash" in implementation else "rows"


@torch.no_grad()
def check_documents_kept_apart(model: nn.Module, rows: list[RowTokens], layout: Layout) -> None:
    """Run two documents packed and alone, beside a shorter line of padding, and compare.

    Args:
      model: the student, on its device.
      rows: some rows of the corpus; nothing is done unless one of them holds several documents.
      layout: how training will lay rows out.

    Raises:
      StudentError: the second document's hidden states depend on the first one's.

    Cost: two forwards of some 50 tokens.
    """
    packed = next((row for row in rows if row.document_start[1:].any()), None)
    if packed is None:
        return
    boundary = 1 + int(packed.document_start[1:].argmax())
    first, last = max(0, boundary - PROBE_TOKENS), boundary + PROBE_TOKENS
    following = packed.document_start[boundary + 1 : last]
    if following.any():
        last = boundary + 1 + int(following.argmax())
    pair = RowTokens(packed.tokens[first:last], packed.document_start[first:last])
    alone = RowTokens(packed.tokens[boundary:last], packed.document_start[boundary:last])
    half = max(1, len(pair.tokens) // 2)
    short = RowTokens(pair.tokens[:half], pair.document_start[:half])

    was_training = model.training
    model.eval()
    try:
        together = _hidden_of(model, [short, pair], half + boundary - first, layout)
        expected = _hidden_of(model, [alone], 0, layout)
    finally:
        model.train(was_training)
    spread = expected.std().clamp_min(torch.finfo(torch.float32).tiny)
    difference = ((together - expected).abs().max() / spread).item()
    full = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
    if not difference <= (APART_FLOAT32 if full else APART_HALF):
        raise StudentError(
            f"{type(model).__name__}: the corpus packs several documents into a row, and this model lets one "
            f"see the one before it (its hidden states differ by {difference:.2g} of their spread from those "
            "of the document alone); train it with `--layout documents`, which gives each document its own "
            "line, or prepare the corpus with one example per row"
        )


def _hidden_of(model: nn.Module, rows: list[RowTokens], first: int, layout: Layout) -> Tensor:
    """Hidden states at the head's input of the tokens from `first` (flat) on."""
    lines = lay_out(rows, layout)
    device = next(model.parameters()).device
    index = torch.from_numpy(lines.slots[first:]).to(device)
    return _at_targets(
        model,
        model,
        torch.from_numpy(lines.input_ids).to(device),
        torch.from_numpy(lines.position_ids).to(device),
        index,
        head=False,
    ).float()
