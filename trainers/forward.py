"""The student's forward at the target positions only, documents kept apart.

A causal language model computes logits for every slot of a batch, padding and unsupervised tokens included, and under
autocast in 16 bits. Both cost dearly here: [B, L, V] is the largest tensor of the run, and a 16-bit head is off by 2 %
of the tail's mass. So while the model runs, another function sits at its head's place (``get_output_embeddings``) and
is handed the hidden states of the target positions alone: either the head itself in float32 (``target_logits``;
whatever the model does to logits after that, scaling, soft-capping, is left in place), or the fused loss
(``HeadSeat``), whose result becomes the result of the model's forward. It runs inside the forward because wrappers
count on that: DDP looks for the parameters that take part, FSDP has gathered the head's weight, autocast is on.

Whether documents packed into one row really stay apart depends on the model. transformers 5.23 derives a
block-diagonal mask from restarting position ids, for any number of rows, when it is given neither an
attention mask nor a cache; flash attention does so for a single line only; recurrent models and a few older
ones (OPT, BLOOM) not at all. ``check_documents_kept_apart`` tries it on the model at hand instead of
believing a list.

Legend: B lines, L their length, T target positions, D hidden, W width of the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailcache.storage.errors import StudentError
from tailcache.trainers.batches import Layout, RowTokens, lay_out

__all__ = ["HeadSeat", "check_documents_kept_apart", "default_layout", "model_arguments", "target_logits"]

# Hidden states of one document, packed or alone, relative to their spread: the order of sums differs (3e-6
# in float32, more with TF32 or 16-bit weights); another document in sight moves them by more than 0.1.
APART_FLOAT32, APART_HALF = 1e-2, 5e-2
PROBE_TOKENS = 24


class HeadSeat:
    """The place of a model's head, where something else can sit while the model runs.

    One per model for the whole of training: a compiled model sees the same callable every time.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the head; nothing is changed until ``run``.

        Args:
          model: a transformers causal language model, not wrapped, with output embeddings.
        """
        self.model = model
        self.head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._index_T: Tensor | None = None
        self._work: Callable[[Tensor], tuple[Tensor, ...]] | None = None
        self._results: list[tuple[Tensor, ...]] = []
        self._stand_in = torch.compiler.disable(self._sit)  # type: ignore[no-untyped-call]

    def _sit(self, hidden: Tensor) -> Tensor:
        assert self._work is not None
        assert self._index_T is not None
        index_T = self._index_T.to(hidden.device)
        self._results.append(self._work(hidden.reshape(-1, hidden.shape[-1])[index_T]))
        # What the model does to logits is done to this, and thrown away.
        return hidden.new_zeros((*hidden.shape[:-1], 1))

    def _give_results(self, module: nn.Module, arguments: Any, output: Any) -> tuple[Tensor, ...]:
        if len(self._results) != 1:
            raise StudentError(
                f"{type(self.model).__name__}: expected its forward to call its head once, found "
                f"{len(self._results)} calls; this model's forward cannot be used here"
            )
        return self._results[0]

    def run(
        self, wrapped: nn.Module, batch: Mapping[str, Any], work: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Run the model with `work` in its head's place.

        Args:
          wrapped: the model, or what it was wrapped into for distributed training.
          batch: input_ids, position_ids [B, L] and target_index [T] of ``batches.collate``.
          work: called with the head's input at the target positions, [T, D], in the type the head would get, with
            autocast as the model runs under.

        Returns:
          What `work` returned, as the result of the wrapped model's forward.

        Raises:
          StudentError: the model does not call its head exactly once.
        """
        self._index_T, self._work = batch["target_index"], work
        # Before the hooks of wrappers, which look into the result.
        handle = self.model.register_forward_hook(self._give_results, prepend=True)
        with _in_place_of(self.head, self._stand_in):
            try:
                result: tuple[Tensor, ...] = wrapped(**model_arguments(self.model, batch))
            finally:
                handle.remove()
                self._index_T, self._work, self._results = None, None, []
        return result


def model_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's forward is called with: ids, positions where it takes them, and no cache."""
    arguments: dict[str, Any] = {"input_ids": batch["input_ids"]}
    parameters = inspect.signature(type(model).forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_any or "position_ids" in parameters:
        arguments["position_ids"] = batch["position_ids"]
    if takes_any or "use_cache" in parameters:
        arguments["use_cache"] = False
    return arguments


@contextmanager
def _in_place_of(head: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While inside, the head computes `forward`.

    The instance's forward is replaced rather than hooked: a pre-forward hook cannot leave autocast.
    """
    previous = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = previous


def target_logits(wrapped: nn.Module, batch: Mapping[str, Any], *, model: nn.Module | None = None) -> Tensor:
    """The student's logits at the target positions, all of them at once: for heads that are not a linear layer.

    Args:
      wrapped: a transformers causal language model, wrapped for distributed training or not.
      batch: input_ids, position_ids [B, L] and target_index [T] of ``batches.collate``.
      model: the model inside its wrapper, by default `wrapped`.

    Returns:
      [T, W] float32 (float64 for a float64 model); differentiable.

    Raises:
      StudentError: the model returned logits for other positions than asked.
    """
    model = wrapped if model is None else model
    arguments, index_T = model_arguments(model, batch), batch["target_index"]
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        values = wrapped(**arguments).logits
    else:
        with _in_place_of(head, _at_targets(head, index_T)):
            values = wrapped(**arguments).logits
    values = values.reshape(-1, values.shape[-1])
    if values.shape[0] == batch["input_ids"].numel():  # never T: the last token of a row has no target
        values = values[index_T]
    if values.shape[0] != len(index_T):
        raise StudentError(
            f"{type(model).__name__}: expected logits of {len(index_T)} target positions or of all "
            f"{batch['input_ids'].numel()}, found {values.shape[0]}; this model's forward cannot be used here"
        )
    result: Tensor = values if values.dtype == torch.float64 else values.float()
    return result


def _at_targets(head: nn.Module, index_T: Tensor) -> Callable[[Tensor], Tensor]:
    """The head's own forward, in float32 and on these positions only."""
    forward: Callable[..., Tensor] = head.forward

    def at_targets(hidden: Tensor) -> Tensor:
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])[index_T.to(hidden.device)]
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            if hidden_TD.dtype != torch.float64:
                hidden_TD = hidden_TD.float()
            if type(head) is nn.Linear and head.weight.dtype != hidden_TD.dtype:
                bias = None if head.bias is None else head.bias.to(hidden_TD.dtype)
                return nn.functional.linear(hidden_TD, head.weight.to(hidden_TD.dtype), bias)[None]
            weight = getattr(head, "weight", None)
            return forward(hidden_TD.to(weight.dtype) if isinstance(weight, Tensor) else hidden_TD)[None]

    return at_targets


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
    """Hidden states at the head's input of the tokens from `first` (flat) on; logits where the head is not known."""
    lines = lay_out(rows, layout)
    device = next(model.parameters()).device
    batch = {
        "input_ids": torch.from_numpy(lines.input_ids).to(device),
        "position_ids": torch.from_numpy(lines.position_ids).to(device),
        "target_index": torch.from_numpy(lines.slots[first:]).to(device),
    }
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        return target_logits(model, batch).float()
    (hidden_TD,) = HeadSeat(model).run(model, batch, lambda hidden_TD: (hidden_TD,))
    return hidden_TD.float()
