"""Load a teacher and run it up to exact float32 logits.

Any ``transformers`` causal language model: a folder, a hub id, or a GGUF file. The trunk runs in the model's dtype;
the head is applied here, to chunks of positions, with float32 results: logits rounded to bfloat16 would put an error
of 2 % into the tail mass. What a model does to its logits after the head (Gemma's soft cap, Granite's and Cohere's
scaling) is read from its configuration, and a probe at the start compares the result with the model's own logits.
A model that cannot be taken apart like this runs whole, with its head replaced by one with float32 results.

Legend: B rows, L length, T positions, D hidden width, V vocabulary padded to a multiple of 64.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tailcache.pipeline.head import mask_padding, padded_width
from tailcache.storage.errors import ConfigError, TeacherError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

__all__ = ["DTYPES", "Teacher", "load_teacher", "load_teacher_tokenizer", "locate", "round_weights"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
_logger = logging.getLogger(__name__)


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """Split a teacher's source into what ``from_pretrained`` takes: a name, and ``gguf_file`` where it is one.

    Raises:
      ConfigError: a path that does not exist, or a folder without a model.
    """
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        if not path.is_file():
            raise ConfigError(f"teacher: expected a GGUF file at {path}, found none")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it holds {', '.join(found)}: name that file" if found else ""
            raise ConfigError(f"teacher: expected a folder with config.json, found none in {path}{hint}")
        return str(path), {}
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ConfigError(f"teacher: expected a folder or a GGUF file, found nothing at {path}")
    return source, {}


def load_teacher_tokenizer(source: str, revision: str | None = None) -> Any | None:
    """The tokenizer that lies beside a teacher; none where there is none."""
    name, gguf = locate(source)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, **gguf)
    except (OSError, ValueError, KeyError) as error:
        _logger.info("no tokenizer beside the teacher %s: %s", source, error)
        return None


def round_weights(model: nn.Module, *, bits: int, group: int) -> int:
    """Round the weights of every linear layer but the head to few bits, in place: what quantising would do.

    Each group of neighbouring input weights is rounded to the nearest of 2^bits even steps between its smallest and
    its largest (asymmetric round-to-nearest).

    Returns:
      How many weights were rounded.

    Raises:
      ConfigError: bits or group out of range, or a layer's width is not a multiple of the group.
    """
    if not 1 <= bits <= 16 or group < 2:
        raise ConfigError(f"expected 1 to 16 bits and groups of at least 2 weights, found {bits} and {group}")
    head = _head_of(model) if isinstance(model, PreTrainedModel) else None
    rounded = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        if layer.in_features % group:
            raise ConfigError(
                f"layer {name}: expected an input width that is a multiple of the group {group}, found "
                f"{layer.in_features}; choose another --weight-group"
            )
        with torch.no_grad():
            weight = layer.weight.float().view(layer.out_features, -1, group)
            low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
            step = (high - low) / (2**bits - 1)
            steps = torch.where(step > 0, ((weight - low) / torch.where(step > 0, step, 1.0)).round(), 0.0)
            layer.weight.copy_((low + steps * step).view_as(layer.weight))
        rounded += layer.weight.numel()
    return rounded


def _head_of(model: PreTrainedModel) -> nn.Module | None:
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
        head = _head_of(model)
        weight = getattr(head, "weight", None)
        config = model.config.get_text_config()
        self.head_width = int(weight.shape[0]) if weight is not None else int(config.vocab_size)
        if self.head_width < vocab_size:
            raise TeacherError(
                f"teacher: expected a head of at least {vocab_size} rows, one per token of the corpus' vocabulary, "
                f"found {self.head_width}; prepare the corpus with this teacher's own tokenizer"
            )
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._soft_cap = getattr(config, "final_logit_softcapping", None)
        scale = 1.0
        if getattr(config, "logits_scaling", None):
            scale /= config.logits_scaling
        if getattr(config, "logit_scale", None):
            scale *= config.logit_scale
        self._scale = scale
        find_decoder: Any = getattr(model, "get_decoder", None)
        decoder = find_decoder() if find_decoder is not None else None
        self._trunk = decoder if isinstance(decoder, nn.Module) and decoder is not model else model.base_model
        self.split = isinstance(head, nn.Linear) and self._trunk is not model
        if self.split:
            assert isinstance(head, nn.Linear)
            self._prepare_head(head)

    def _prepare_head(self, head: nn.Linear) -> None:
        """Lay the head out once for float32 results: a transposed, padded weight."""
        weight = head.weight.detach()
        width = max(padded_width(self.vocab_size), padded_width(self.head_width))
        self.width = width
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
        return self.model(input_ids=input_ids_BL, use_cache=False).logits  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Float32 logits of some positions, [T, V], contiguous, padding masked."""
        if not self.split:
            width = padded_width(max(self.vocab_size, hidden_TD.shape[-1]))
            logits = nn.functional.pad(hidden_TD.float(), (0, width - hidden_TD.shape[-1]))
            return mask_padding(logits.contiguous(), self.vocab_size)
        if self._out_dtype:
            logits = torch.mm(hidden_TD, self._weight_DV, out_dtype=torch.float32)
        else:
            with _bf16_products(self._bf16):
                logits = torch.mm(hidden_TD.float(), self._weight_DV)
        if self._bias_V is not None:
            logits += self._bias_V
        if self._scale != 1.0:
            logits *= self._scale
        if self._soft_cap:
            logits.div_(self._soft_cap).tanh_().mul_(self._soft_cap)
        return mask_padding(logits, self.vocab_size)

    @torch.inference_mode()
    def probe(self, input_ids: Tensor) -> str:
        """Compare the split head with the model's own logits on one short row; fall back to the whole model.

        Returns:
          One line that says which way the logits are computed.

        Raises:
          TeacherError: the model's own logits are not finite.
        """
        row = input_ids[None, :64].to(self.device)
        own = self.model(input_ids=row, use_cache=False).logits[0, :, : self.vocab_size].float()
        if not torch.isfinite(own).all():
            raise TeacherError(
                "teacher: expected finite logits on the first row of the corpus, found NaN or infinity; try "
                "--dtype float32, and check that the weights loaded"
            )
        if self.split:
            ours = self.logits(self.hidden(row)[0])[:, : self.vocab_size]
            centred = own - own.mean(-1, keepdim=True)
            error = float((ours - own).norm() / centred.norm().clamp(min=1e-30))
            if error <= _PROBE_TOLERANCE[self.dtype]:
                return f"head applied in chunks with float32 results (probe: {error:.1e} from the model's own logits)"
            self.split = False
            self._weight_DV = torch.empty(0)
        return "this model's logits are more than its head: the whole model runs, and its logits are used as they are"

    def weights_hash(self) -> str:
        """Hash of all parameters and buffers that are saved, by name, dtype, shape and bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            for start in range(0, flat.numel(), 1 << 26):
                digest.update(flat[start : start + (1 << 26)].cpu().numpy().data)
        return digest.hexdigest()


def load_teacher(
    source: str,
    *,
    vocab_size: int,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    weight_bits: int | None = None,
    weight_group: int = 32,
    trust_remote_code: bool = False,
) -> Teacher:
    """Load a teacher for capture.

    Args:
      source: a folder, a hub id, or the path of a GGUF file.
      vocab_size: real tokens of the corpus.
      revision: of a hub model.
      dtype: of the trunk: float32, bfloat16, float16, or auto (what the checkpoint has; bfloat16 for GGUF).
      device: cpu, cuda, cuda:1, …, or auto (cuda where there is one).
      attn_implementation: what ``transformers`` should use: eager, sdpa, flash_attention_2, …
      weight_bits: round the linear layers' weights to so many bits, to see what quantising the teacher costs.
      weight_group: weights that share their rounding range.
      trust_remote_code: run code from the hub.

    Raises:
      ConfigError: an unknown dtype or device, or no model there.
      TeacherError: the model is no causal language model, or its head is too narrow.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected auto or one of {', '.join(DTYPES)}; found {dtype!r}")
    name, gguf = locate(source)
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "trust_remote_code": trust_remote_code, **gguf}
    if gguf:
        from transformers import GgufConfig

        # Dequantised once at loading: a dense model whose dtype is ours to choose, on any device.
        options["quantization_config"] = GgufConfig(dequantize=True)
        options["dtype"] = DTYPES.get(dtype, torch.bfloat16)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if revision is not None:
        options["revision"] = revision
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TeacherError(f"teacher {source}: it cannot be loaded as a causal language model: {error}") from error
    nn.Module.eval(model)
    nn.Module.to(model, chosen)
    if model.dtype not in _PROBE_TOLERANCE:
        raise TeacherError(f"teacher {source}: expected float32, bfloat16 or float16 weights, found {model.dtype}")
    if weight_bits is not None:
        round_weights(model, bits=weight_bits, group=weight_group)
    return Teacher(model, vocab_size=vocab_size)


def model_revision(source: str, revision: str | None) -> str | None:
    """The commit a hub model resolved to; none for local files."""
    name, gguf = locate(source)
    if gguf or Path(name).is_dir():
        return None
    config = AutoConfig.from_pretrained(name, revision=revision)
    return getattr(config, "_commit_hash", None) or revision
