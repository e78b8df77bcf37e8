"""Load a teacher and run it up to exact float32 logits.

Any ``transformers`` causal language model: a folder, a hub id, or a GGUF file. The trunk runs in the model's dtype;
the head is applied here, to chunks of positions, with float32 results: logits rounded to bfloat16 would put an error
of 2 % into the tail mass. What a model does to its logits after the head (Gemma's soft cap, Granite's and Cohere's
scaling) is read from its configuration, and a probe at the start compares the result with the model's own logits.
A model that cannot be taken apart like this runs whole, with its head replaced by one with float32 results, in
smaller batches. A model whose logits know of later tokens is no teacher, and is refused.

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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from tailcache.pipeline.head import mask_padding, padded_width
from tailcache.storage.errors import ConfigError, TeacherError

__all__ = ["DTYPES", "Teacher", "load_teacher", "load_teacher_tokenizer", "locate", "round_weights"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Relative differences that a model's own rounding explains."""
_EXACT = 1e-4
_WHOLE_LOGIT_BYTES = 1 << 30
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken",
)  # fmt: skip
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


def load_teacher_tokenizer(source: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer that lies beside a teacher; none where there is none.

    Raises:
      ConfigError: there is one in the teacher's folder or GGUF file, but it cannot be loaded.
    """
    name, gguf = locate(source)
    folder = Path(name)
    local = folder.is_dir()
    if local and not gguf and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None  # from_pretrained would make an empty one up
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, **gguf
        )
    except Exception as error:  # the libraries raise a dozen kinds for a missing or broken tokenizer
        if local:
            raise ConfigError(
                f"teacher {source}: its tokenizer cannot be loaded, so it cannot be compared with the corpus' own: "
                f"{type(error).__name__}: {error}; repair it, or take the tokenizer's files out of the folder if "
                "the corpus was surely made with the right one"
            ) from error
        _logger.info("no tokenizer beside the teacher %s: %s", source, error)
        return None
    made_up = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    return None if made_up else tokenizer


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
    head = _head_of(model) if isinstance(model, PreTrainedModel) else None
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


def _trunk_of(model: PreTrainedModel) -> nn.Module:
    """What gives the head its input; the model itself where it is not to be found. The probe checks it."""
    find_decoder: Any = getattr(model, "get_decoder", None)
    candidates = [find_decoder() if find_decoder is not None else None, model.base_model, getattr(model, "model", None)]
    return next((c for c in candidates if isinstance(c, nn.Module) and c is not model), model)


def _is_plain(head: nn.Linear) -> bool:
    """Whether a linear layer is its weight and bias and nothing else (no packed or adapted weights)."""
    return type(head).forward is nn.Linear.forward and head.weight.dtype in _ROUNDING


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
        head = _head_of(model)
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
            if error <= _ROUNDING[self.dtype] and after_head <= (_EXACT if exact else _ROUNDING[self.dtype]):
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
        if _distance(again, own[:half]) > 10 * _ROUNDING[self.dtype]:
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
    chosen = _device(device)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model, loading = load(name, output_loading_info=True, **options)
    except Exception as error:  # the libraries raise a dozen kinds for a missing or broken model
        raise TeacherError(
            f"teacher {source}: it cannot be loaded as a causal language model: {type(error).__name__}: {error}"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    absent = sorted({*loading["missing_keys"], *(str(key[0]) for key in loading["mismatched_keys"])})
    if absent:
        raise TeacherError(
            f"teacher {source}: expected weights for the whole model, found none (or of another shape) for "
            f"{len(absent)} of them, such as {', '.join(absent[:3])}; they would be random. Is it a causal language "
            "model, and did its files arrive whole?"
        )
    if model.dtype not in _ROUNDING:
        raise TeacherError(f"teacher {source}: expected float32, bfloat16 or float16 weights, found {model.dtype}")
    nn.Module.eval(model)
    nn.Module.to(model, chosen)
    if weight_bits is not None:
        round_weights(model, bits=weight_bits, group=weight_group)
    return Teacher(model, vocab_size=vocab_size)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected auto, cpu, cuda or cuda:N on this machine ({torch.cuda.device_count()} GPUs that torch "
            f"can use), found {name!r}: {reason}"
        ) from error
    if device.type == "meta":
        raise ConfigError("device: expected auto, cpu, cuda or cuda:N, found 'meta', which holds no weights")
    return device


def model_revision(teacher: Teacher, revision: str | None) -> str | None:
    """The commit a hub model resolved to; none for local files."""
    return getattr(teacher.model.config, "_commit_hash", None) or revision
