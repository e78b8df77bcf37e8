"""Run a teacher up to exact float32 logits.

Any ``transformers`` causal language model (``load_teacher`` finds and loads it). The trunk runs in the model's dtype;
the head is applied here, to chunks of positions, with float32 results: logits rounded to bfloat16 would put an error
of 2 % into the tail mass. What a model does to its logits after the head (Gemma's soft cap, Granite's and Cohere's
scaling) is read from its configuration, and a probe at the start compares the result with the model's own logits. A
model that cannot be taken apart like this runs whole, with its head replaced by one with float32 results, in smaller
batches. A model whose logits know of later tokens is no teacher, and is refused.

Legend: B rows, L length, T positions, D hidden width, V vocabulary padded to a multiple of 64.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tailcache.pipeline.head import mask_padding, padded_width
from tailcache.pipeline.hidden import bfloat16_bits
from tailcache.storage.errors import TeacherError
from tailcache.storage.hidden import HeadKind, StoredHead

__all__ = ["ROUNDING", "Teacher", "head_of"]

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Relative differences that a model's own rounding explains."""
_HEAD_KINDS: dict[torch.dtype, HeadKind] = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
}  # fmt: skip
_EXACT = 1e-4
_WHOLE_LOGIT_BYTES = 1 << 30


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The layer that makes the logits; none where the model does not say."""
    find: Any = model.get_output_embeddings
    head: nn.Module | None = find()
    return head


@contextlib.contextmanager
def _bf16_products(enabled: bool) -> Iterator[None]:
    """On a CPU, multiply float32 copies of bfloat16 values at bfloat16 speed; the sums stay float32."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _trunk_of(model: PreTrainedModel) -> nn.Module:
    """What gives the head its input; the model itself where it is not to be found. The probe checks it."""
    find_decoder: Any = getattr(model, "get_decoder", None)
    candidates = [find_decoder() if find_decoder is not None else None, model.base_model, getattr(model, "model", None)]
    return next((c for c in candidates if isinstance(c, nn.Module) and c is not model), model)


def _is_plain(head: nn.Linear) -> bool:
    """Whether a linear layer is its weight and bias and nothing else (no packed or adapted weights)."""
    return type(head).forward is nn.Linear.forward and head.weight.dtype in ROUNDING


def _distance(ours: Tensor, own: Tensor) -> float:
    """Norm of the difference of two sets of logits, relative to how far the second are from constant."""
    centred = own - own.mean(-1, keepdim=True)
    return float((ours - own).norm() / centred.norm().clamp(min=1e-30))


class Teacher:
    """A causal language model, ready to give float32 logits at chosen positions.

    Args:
      model: in evaluation mode, on its device.
      vocab_size: real tokens; the head may be wider, and its further rows are masked.

    Raises:
      TeacherError: the head is narrower than the vocabulary.
    """

    def __init__(self, model: PreTrainedModel, *, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        head = head_of(model)
        weight = getattr(head, "weight", None)
        config = model.config.get_text_config()
        self.head_width = int(weight.shape[0]) if weight is not None else int(config.vocab_size)
        if self.head_width < vocab_size:
            raise TeacherError(
                f"teacher: expected a head of at least {vocab_size} rows, one per token of the corpus' vocabulary, "
                f"found {self.head_width}; prepare the corpus with this teacher's own tokenizer"
            )
        self.width = padded_width(self.head_width)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        soft_cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        self._soft_cap: float | None = soft_cap
        scale = 1.0
        if getattr(config, "logits_scaling", None):
            scale /= config.logits_scaling
        if getattr(config, "logit_scale", None):
            scale *= config.logit_scale
        self._scale = scale
        self._trunk = _trunk_of(model)
        self._head = head if isinstance(head, nn.Linear) and _is_plain(head) else None
        self.split = self._head is not None and self._trunk is not model
        if self._head is not None:
            self._prepare_head(self._head)

    def _prepare_head(self, head: nn.Linear) -> None:
        """Lay the head out once for float32 results: a transposed, padded weight."""
        weight = head.weight.detach()
        width = self.width
        self._out_dtype = self.device.type == "cuda" and weight.dtype in (torch.bfloat16, torch.float16)
        self._bf16 = self.device.type == "cpu" and weight.dtype == torch.bfloat16
        if not self._out_dtype:
            weight = weight.float()
        if width > self.head_width:
            weight = nn.functional.pad(weight, (0, 0, 0, width - self.head_width))
        self._weight_DV = weight.t()
        self._bias_V: Tensor | None = None
        if head.bias is not None:
            self._bias_V = nn.functional.pad(head.bias.detach().float(), (0, width - self.head_width))

    @torch.inference_mode()
    def hidden(self, input_ids_BL: Tensor) -> Tensor:
        """Run the trunk over rows that start at position 0, padded on the right.

        Every row is one document (or a document's part within a row of the corpus), so nothing can leak between
        documents whatever the model's kind of attention or recurrence; padding comes after all that is read.

        Returns:
          [B, L, D] hidden states in the model's dtype; where the model cannot be split, [B, L, V] logits.
        """
        if self.split:
            return self._trunk(input_ids=input_ids_BL, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        return self._run_whole(input_ids_BL)[0]

    def _run_whole(self, input_ids_BL: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's own logits [B, L, V], the head's product kept in float32, and what the head was given."""
        seen: list[Tensor] = []
        head = self._head
        if head is None:
            return self.model(input_ids=input_ids_BL, use_cache=False).logits, seen

        def exact_head(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            product = self._product(hidden.reshape(-1, hidden.shape[-1]))
            return product[:, : self.head_width].view(*hidden.shape[:-1], -1)

        head.forward = exact_head  # type: ignore[method-assign, assignment]
        try:
            return self.model(input_ids=input_ids_BL, use_cache=False).logits, seen
        finally:
            del head.forward

    def batch_limit(self, batch_positions: int) -> int:
        """Positions a batch may have: fewer where the whole model runs, since it makes all their logits at once."""
        return batch_positions if self.split else max(1, min(batch_positions, _WHOLE_LOGIT_BYTES // (4 * self.width)))

    def _product(self, hidden_TD: Tensor) -> Tensor:
        """Hidden states times the head, [T, padded V] float32, before anything else is done to logits."""
        if self._out_dtype:
            product = torch.mm(hidden_TD, self._weight_DV, out_dtype=torch.float32)
        else:
            with _bf16_products(self._bf16):
                product = torch.mm(hidden_TD.float(), self._weight_DV)
        if self._bias_V is not None:
            product += self._bias_V
        return product

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Float32 logits of some positions, [T, V], contiguous, padding masked."""
        if not self.split:
            logits = hidden_TD[:, : self.width].float()
            logits = nn.functional.pad(logits, (0, self.width - logits.shape[-1]))
            return mask_padding(logits.contiguous(), self.vocab_size)
        logits = self._product(hidden_TD)
        if self._scale != 1.0:
            logits *= self._scale
        if self._soft_cap:
            logits.div_(self._soft_cap).tanh_().mul_(self._soft_cap)
        return mask_padding(logits, self.vocab_size)

    def stored_head(self) -> StoredHead:
        """The head as a cache keeps it beside hidden states: real tokens only, in the weights' own type.

        Raises:
          TeacherError: the logits are more than a head's product (``probe`` has found that), so that hidden states and
            head would not give them.
        """
        if self._head is None or not self.split:
            raise TeacherError(
                "hidden: expected a teacher whose logits are its last hidden state times a linear head, scaled and "
                f"soft-capped as its configuration says; found that those of this {self.model.config.model_type} are "
                "more than that, so hidden states would not give its distributions; capture it with --hidden none"
            )
        weight_VD = self._head.weight.detach()[: self.vocab_size]
        bias_V = None if self._head.bias is None else self._head.bias.detach()[: self.vocab_size]
        kind: HeadKind = _HEAD_KINDS[weight_VD.dtype]
        return StoredHead(
            weight=bfloat16_bits(weight_VD) if kind == "bfloat16" else weight_VD.contiguous().cpu().numpy(),
            weight_kind=kind,
            bias=None if bias_V is None else bias_V.float().cpu().numpy(),
            scale=float(self._scale),
            soft_cap=float(self._soft_cap) if self._soft_cap else None,
        )

    @torch.inference_mode()
    def probe(self, input_ids: Tensor) -> str:
        """Compare the split head with the model's own logits on one short row; fall back to the whole model.

        Args:
          input_ids: [L] the corpus' first row.

        Returns:
          One line that says which way the logits are computed.

        Raises:
          TeacherError: the model's own logits are not finite, fewer than the vocabulary, or know of later tokens.
        """
        row = input_ids[None, :64].to(self.device)
        own_BLV, seen = self._run_whole(row)
        if own_BLV.shape[-1] < self.vocab_size:
            raise TeacherError(
                f"teacher: expected logits for {self.vocab_size} tokens, the corpus' vocabulary, found "
                f"{own_BLV.shape[-1]}; prepare the corpus with this teacher's own tokenizer"
            )
        own = own_BLV[0, :, : self.vocab_size].float()
        bad = ~torch.isfinite(own).all(-1)
        if bad.any():
            raise TeacherError(
                f"row 0, token {int(bad.nonzero()[0, 0])}: expected finite logits for every token of the vocabulary, "
                "found NaN or infinity; try --dtype float32 or another --attn-implementation, and check that the "
                "weights loaded"
            )
        self._check_causal(row, own)
        if self.split:
            hidden = self.hidden(row)[0]
            error = _distance(self.logits(hidden)[:, : self.vocab_size], own)
            # The trunk may round differently from run to run; what follows the head may not differ at all.
            same_input = len(seen) == 1 and seen[0].shape[:-1] == row.shape
            after_head = (
                _distance(self.logits(seen[0][0].to(hidden.dtype))[:, : self.vocab_size], own) if same_input else 0.0
            )
            exact = same_input and own_BLV.dtype == torch.float32
            if error <= ROUNDING[self.dtype] and after_head <= (_EXACT if exact else ROUNDING[self.dtype]):
                return f"head applied in chunks with float32 results (probe: {error:.1e} from the model's own logits)"
            self.split = False
        rounded = "" if own_BLV.dtype == torch.float32 else f" (rounded to {own_BLV.dtype} by the model itself)"
        return f"this model's logits are more than its head: the whole model runs, and its logits are kept{rounded}"

    def _check_causal(self, row: Tensor, own: Tensor) -> None:
        half = row.shape[1] // 2
        if half == 0:
            return
        changed = row.clone()
        changed[:, half:] = (changed[:, half:] + 1) % self.vocab_size
        again = self._run_whole(changed)[0][0, :half, : self.vocab_size].float()
        if _distance(again, own[:half]) > 10 * ROUNDING[self.dtype]:
            raise TeacherError(
                f"teacher: expected logits that depend on earlier tokens alone, but those of row 0, tokens 0 to "
                f"{half - 1} change with the tokens after them; this {self.model.config.model_type} attends in both "
                "directions: choose a causal language model"
            )

    def weights_hash(self) -> str:
        """Hash of all parameters and buffers that are saved, by name, dtype, shape and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            for start in range(0, flat.numel(), 1 << 26):
                digest.update(flat[start : start + (1 << 26)].cpu().numpy().data)
        return digest.hexdigest()
