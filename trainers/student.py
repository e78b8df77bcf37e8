"""Build the student, and refuse one that cannot read this corpus.

From a checkpoint, from a configuration, or from a few sizes; any architecture ``AutoModelForCausalLM``
knows. A student initialised at random depends on its configuration and the seed alone, so students trained
with different losses start from the same weights. Weights are float32; lower precision is autocast's
business.

The student reads the corpus' stored ids, so its vocabulary must cover them and, for a checkpoint, its
tokenizer must be the corpus' own: the same ids must mean the same text. Rows of its head beyond the
vocabulary are padding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from tailcache.storage.errors import MismatchError, StudentError
from tailcache.storage.fingerprint import differing_components, fingerprint
from tailcache.trainers.progress import quiet_progress

if TYPE_CHECKING:
    from tailcache.storage.corpus import Corpus
    from tailcache.trainers.config import StudentConfig

__all__ = ["Student", "build_student", "corpus_tokenizer", "longest_row"]

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


@dataclass
class Student:
    """A student ready to train.

    Attributes:
      model: in float32, on the CPU.
      notes: what the user should know about how it was made, one sentence each.
    """

    model: PreTrainedModel
    notes: list[str] = field(default_factory=list)


def build_student(config: StudentConfig, corpus: Corpus, *, seed: int) -> Student:
    """Make the student that the settings describe and check that it fits the corpus.

    Args:
      config: the settings.
      corpus: the corpus it will be trained on.
      seed: decides the weights of a student initialised at random.

    Raises:
      StudentError: it cannot be built, its vocabulary does not cover the corpus, or its positions are too
        few.
      MismatchError: its tokenizer is not the corpus' own; names the components that differ.
    """
    notes: list[str] = []
    extra = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    if config.checkpoint is not None:
        _check_tokenizer(config.checkpoint, config.revision, corpus, notes)
        model = _loaded(config.checkpoint, config.revision, extra)
    else:
        model = _initialised(_architecture(config, corpus), extra, seed)
    _check_fit(model, corpus, notes)
    return Student(model, notes)


def _loaded(checkpoint: str, revision: str | None, extra: dict[str, Any]) -> PreTrainedModel:
    try:
        with quiet_progress():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint, revision=revision or "main", dtype=torch.float32, **extra
            )
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        raise StudentError(
            f"student.checkpoint: expected a causal language model at {checkpoint!r}, found: {_in_short(error)}"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def _initialised(architecture: PretrainedConfig, extra: dict[str, Any], seed: int) -> PreTrainedModel:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            build: Any = AutoModelForCausalLM.from_config
            model = build(architecture, dtype=torch.float32, **extra)
    except (OSError, ValueError, ImportError, AttributeError, TypeError, RuntimeError) as error:
        raise StudentError(
            f"student: expected a configuration that gives a causal language model, found that "
            f"{architecture.model_type!r} refuses it: {_in_short(error)}"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def _architecture(config: StudentConfig, corpus: Corpus) -> PretrainedConfig:
    """The configuration of a student to initialise at random, fitted to the corpus."""
    given = _given(config)
    model_type = given.pop("model_type", None)
    if config.model_type is not None and model_type not in (None, config.model_type):
        raise StudentError(
            f"student.model_type: the configuration says {model_type!r}, the settings {config.model_type!r}; "
            "drop one of them"
        )
    model_type = config.model_type or model_type or "llama"
    tokenizer = corpus_tokenizer(corpus)
    fitted: dict[str, Any] = {
        "vocab_size": corpus.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # The padding row of an embedding gets no gradient, and tokenizers reuse a real token for padding.
        "pad_token_id": None,
    }
    try:
        if config.config is None:
            fitted.update(_sizes(config, type(AutoConfig.for_model(model_type, **fitted)), longest_row(corpus)))
        return AutoConfig.for_model(model_type, **{**fitted, **given})
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise StudentError(
            f"student: expected a configuration for the model type {model_type!r}, found: {_in_short(error)}"
        ) from error


def _sizes(config: StudentConfig, kind: type[PretrainedConfig], context: int) -> dict[str, Any]:
    hidden, heads = config.hidden_size or 256, config.num_heads or 4
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": config.num_layers or 4,
        "num_attention_heads": heads,
        "intermediate_size": config.intermediate_size or -(-hidden * 8 // 3 // 32) * 32,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": True if config.tie_embeddings is None else config.tie_embeddings,
        "max_position_embeddings": context,
    }
    probe = kind()
    return {name: value for name, value in sizes.items() if hasattr(probe, name)}


def corpus_tokenizer(corpus: Corpus) -> Any:
    """The tokenizer that the cache brought along; it may bring code too, which is never run.

    Raises:
      StudentError: it cannot be loaded, or not without running code.
      CorruptError: its files are not those that were written.
    """
    try:
        return AutoTokenizer.from_pretrained(corpus.tokenizer_dir, trust_remote_code=False)
    except Exception as error:  # the libraries raise a dozen kinds for a broken tokenizer
        raise StudentError(
            f"{corpus.tokenizer_dir}: expected a tokenizer that can be loaded without running code of its own, found: "
            f"{_in_short(error)}"
        ) from error


def _given(config: StudentConfig) -> dict[str, Any]:
    """The configuration in the settings: JSON text, a JSON file, or a folder with a config.json."""
    if config.config is None:
        return {}
    text = config.config
    where = "student.config"
    if not text.lstrip().startswith("{"):
        path = Path(text)
        path = path / "config.json" if path.is_dir() else path
        where = f"student.config, {path}"
        try:
            text = path.read_text()
        except OSError as error:
            raise StudentError(
                f"{where}: expected a JSON file, a folder with a config.json, or JSON text starting with '{{'; "
                f"found: {error.strerror}"
            ) from error
    try:
        given = json.loads(text)
    except ValueError as error:
        raise StudentError(f"{where}: expected JSON, found an error at {error}") from error
    if not isinstance(given, dict):
        raise StudentError(f"{where}: expected a JSON object, found {type(given).__name__}")
    # What describes weights on disk says nothing about new ones.
    for name in ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"):
        given.pop(name, None)
    return given


def _check_tokenizer(checkpoint: str, revision: str | None, corpus: Corpus, notes: list[str]) -> None:
    if not _has_tokenizer(checkpoint, revision):
        notes.append(
            f"{checkpoint} has no tokenizer files: only its vocabulary size is checked, not that its ids mean the "
            "same text"
        )
        return
    expected = corpus.manifest["tokenizer"].get("fingerprint", {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision or "main")
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise StudentError(
            f"student.checkpoint: expected a tokenizer that can be read at {checkpoint!r}, found: {_in_short(error)}"
        ) from error
    differing = differing_components(expected, fingerprint(tokenizer))
    if differing:
        raise MismatchError(
            f"student.checkpoint: expected the corpus' tokenizer, found that {checkpoint!r} differs in its "
            f"{', '.join(differing)}; take a student of the teacher's family, or initialise one with student.config"
        )


def _has_tokenizer(checkpoint: str, revision: str | None) -> bool:
    folder = Path(checkpoint)
    if folder.is_dir():
        return any((folder / name).is_file() for name in TOKENIZER_FILES)
    for name in TOKENIZER_FILES:
        try:
            found = cached_file(
                checkpoint,
                name,
                revision=revision or "main",
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except OSError as error:
            raise StudentError(
                f"student.checkpoint: expected a folder or a hub id, found {checkpoint!r}: {_in_short(error)}"
            ) from error
        if found is not None:
            return True
    return False


def _check_fit(model: PreTrainedModel, corpus: Corpus, notes: list[str]) -> None:
    """The student must have an embedding and a logit for every id, and a position for every token of a row."""
    untyped: Any = model
    widths = {"input embeddings": untyped.get_input_embeddings(), "head": untyped.get_output_embeddings()}
    for name, module in widths.items():
        width = model.config.get_text_config().vocab_size if module is None else module.weight.shape[0]
        if width < corpus.vocab_size:
            raise StudentError(
                f"student: expected {name} for at least {corpus.vocab_size} ids, the corpus' vocabulary; found {width}"
            )
        if name == "head" and width > corpus.vocab_size:
            notes.append(
                f"the student's head is {width} wide and the vocabulary has {corpus.vocab_size} ids: the other "
                f"{width - corpus.vocab_size} rows are padding and take no part in the loss"
            )
    positions, longest = getattr(model.config.get_text_config(), "max_position_embeddings", None), longest_row(corpus)
    if isinstance(positions, int) and positions < longest:
        raise StudentError(
            f"student: expected at least {longest} positions, the corpus' longest row; found "
            f"max_position_embeddings = {positions}; prepare the corpus with a smaller context length"
        )


def longest_row(corpus: Corpus) -> int:
    """Tokens of the corpus' longest row."""
    longest, previous = 1, None
    for offsets in corpus.stream("row_offsets"):
        joined = offsets if previous is None else np.concatenate([[previous], offsets])
        longest = max(longest, int(np.diff(joined).max(initial=0)))
        previous = offsets[-1]
    return longest


def _in_short(error: BaseException) -> str:
    """One line of an error of transformers, which likes to list every model it knows."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:240]}…"
