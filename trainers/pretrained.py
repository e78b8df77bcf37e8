"""Read a model that a student starts from: its configuration, its weights, and whether its tokenizer is the corpus'.

A folder, a GGUF file (in its folder, with or without a tokenizer beside it), or a hub id. GGUF weights are dequantised
while they are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from tailcache.storage.errors import MismatchError, StudentError
from tailcache.storage.fingerprint import differing_components, fingerprint
from tailcache.trainers.progress import quiet_progress

if TYPE_CHECKING:
    from tailcache.storage.corpus import Corpus

__all__ = ["check_tokenizer", "in_short", "load_config", "load_model"]

# Any of these makes a checkpoint one with a tokenizer; looked for by name, because transformers builds an
# empty tokenizer for a folder without any.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_FAILURES = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, StrictDataclassError)


def load_config(source: str, revision: str | None, *, where: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
      source: a folder, a GGUF file, or a hub id.
      revision: of a hub id.
      where: the setting that names it, for messages.

    Raises:
      StudentError: there is none.
    """
    try:
        found: Any = AutoConfig.from_pretrained(**_options(source, revision, where))
    except _FAILURES as error:
        raise StudentError(
            f"{where}: expected the configuration of a causal language model at {source!r}, found: {in_short(error)}"
        ) from error
    assert isinstance(found, PretrainedConfig)
    return found


def load_model(
    source: str, revision: str | None, *, where: str, whole: bool = False, dtype: Any = torch.float32, **options: Any
) -> PreTrainedModel:
    """A causal language model on the CPU.

    Args:
      source: a folder, a GGUF file, or a hub id.
      revision: of a hub id.
      where: the setting that names it, for messages.
      whole: refuse one that lacks weights, which would be random.
      dtype: of its weights; "auto": as stored.
      **options: further arguments of ``from_pretrained``.

    Raises:
      StudentError: there is none, or not all of it.
    """
    found = _options(source, revision, where)
    if "gguf_file" in found:
        options["quantization_config"] = GgufConfig(dequantize=True)
        dtype = torch.float32
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with quiet_progress():
            model, loading = load(dtype=dtype, output_loading_info=True, **found, **options)
    except _FAILURES as error:
        raise StudentError(
            f"{where}: expected a causal language model at {source!r}, found: {in_short(error)}"
        ) from error
    absent = sorted({*loading["missing_keys"], *(str(key[0]) for key in loading["mismatched_keys"])})
    if whole and absent:
        raise StudentError(
            f"{where}: expected all weights of the model at {source!r}, found none (or of another shape) for "
            f"{len(absent)} of them, such as {', '.join(absent[:3])}"
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _options(source: str, revision: str | None, where: str) -> dict[str, Any]:
    """What ``from_pretrained`` takes to find a model."""
    path = Path(source).expanduser()
    if not source.endswith(".gguf"):
        return {
            "pretrained_model_name_or_path": str(path) if path.is_dir() else source,
            "revision": revision or "main",
        }
    if not path.is_file():
        raise StudentError(f"{where}: expected a GGUF file at {path}, found none")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def check_tokenizer(source: str, revision: str | None, corpus: Corpus, notes: list[str], *, where: str) -> None:
    """Refuse a model whose tokenizer is not the corpus' own: the same ids must mean the same text.

    Args:
      source: a folder, a GGUF file, or a hub id.
      revision: of a hub id.
      corpus: whose tokenizer is expected.
      notes: where to say that there is no tokenizer to compare.
      where: the setting that names it, for messages.

    Raises:
      StudentError: there is a tokenizer that cannot be read, or nothing by that name.
      MismatchError: it differs; names the components.
    """
    options = _options(source, revision, where)
    folder = Path(options["pretrained_model_name_or_path"])
    if "gguf_file" in options and _has_tokenizer_files(folder):
        del options["gguf_file"]  # quicker to read, and what came with the file
    elif "gguf_file" not in options and not _has_tokenizer(source, revision, where):
        notes.append(
            f"{source} has no tokenizer files: only its vocabulary size is checked, not that its ids mean the same text"
        )
        return
    expected = corpus.manifest["tokenizer"].get("fingerprint", {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except _FAILURES as error:
        raise StudentError(
            f"{where}: expected a tokenizer that can be read at {source!r}, found: {in_short(error)}"
        ) from error
    differing = differing_components(expected, fingerprint(tokenizer))
    if differing:
        raise MismatchError(
            f"{where}: expected the corpus' tokenizer, found that {source!r} differs in its {', '.join(differing)}; "
            "take a model of the teacher's family, or initialise a student with student.config"
        )


def _has_tokenizer_files(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _has_tokenizer(source: str, revision: str | None, where: str) -> bool:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _has_tokenizer_files(folder)
    for name in TOKENIZER_FILES:
        try:
            found = cached_file(
                source,
                name,
                revision=revision or "main",
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError as error:
            raise StudentError(
                f"{where}: expected a folder or a hub id, found {source!r}: {in_short(error)}"
            ) from error
        if found is not None:
            return True
    return False


def in_short(error: BaseException) -> str:
    """One line of an error of transformers, which likes to list every model it knows."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:240]}…"
