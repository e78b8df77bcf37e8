"""Find and load a teacher: a folder, a hub id, or a GGUF file; whole, causal, and with the tokenizer beside it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tailcache.pipeline.precision import is_slow, native_dtype
from tailcache.pipeline.rounding import round_weights
from tailcache.pipeline.teacher import ROUNDING, Teacher
from tailcache.storage.errors import ConfigError, TeacherError

__all__ = ["DTYPES", "load_teacher", "load_teacher_tokenizer", "locate", "model_revision"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
      dtype: of the trunk: float32, bfloat16, float16, or auto (what the checkpoint has; for GGUF, whose weights are
        decoded anyway, bfloat16 where the device is made for it and float32 where not).
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
    chosen = _device(device)
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "trust_remote_code": trust_remote_code, **gguf}
    if gguf:
        from transformers import GgufConfig

        # Dequantised once at loading: a dense model whose dtype is ours to choose, on any device.
        options["quantization_config"] = GgufConfig(dequantize=True)
        options["dtype"] = DTYPES.get(dtype) or native_dtype(chosen)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if revision is not None:
        options["revision"] = revision
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
    if model.dtype not in ROUNDING:
        raise TeacherError(f"teacher {source}: expected float32, bfloat16 or float16 weights, found {model.dtype}")
    if is_slow(model.dtype, chosen):
        _logger.warning(
            "teacher %s: this processor has no fast products in %s and will take many times as long as in float32; "
            "give --dtype float32, or a GPU",
            source,
            str(model.dtype).removeprefix("torch."),
        )
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
