"""Build the student, and refuse one that cannot read this corpus.

From a checkpoint, from a teacher (see ``initialise``), or at random from a preset, a configuration or a few sizes (see
``architecture``); any architecture ``AutoModelForCausalLM`` knows. What is random depends on the configuration and the
seed alone, so students trained with different losses start from the same weights. Weights are float32; lower
precision is autocast's business.

The student reads the corpus' stored ids, so its vocabulary must cover them and the tokenizer of a checkpoint, or of the
teacher to initialise from, must be the corpus' own: the same ids must mean the same text. Rows of its head beyond the
vocabulary are padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from tailcache.storage.errors import StudentError
from tailcache.trainers.architecture import Fit, architecture, layers_from
from tailcache.trainers.initialise import check_family, check_not_larger, initialise
from tailcache.trainers.presets import PRESETS
from tailcache.trainers.pretrained import check_tokenizer, in_short, load_config, load_model
from tailcache.trainers.records import read_record

if TYPE_CHECKING:
    from tailcache.storage.corpus import Corpus
    from tailcache.trainers.config import StudentConfig

__all__ = [
    "Student",
    "build_student",
    "corpus_tokenizer",
    "count_parameters",
    "fit_of",
    "longest_row",
    "student_config",
    "without_weights",
]


@dataclass
class Student:
    """A student ready to train.

    Attributes:
      model: in float32, on the CPU.
      notes: what the user should know about how it was made, one sentence each.
    """

    model: PreTrainedModel
    notes: list[str] = field(default_factory=list)


def build_student(config: StudentConfig, corpus: Corpus, *, seed: int, begun: Path | None = None) -> Student:
    """Make the student that the settings describe and check that it fits the corpus.

    Args:
      config: the settings.
      corpus: the corpus it will be trained on.
      seed: decides the weights that are initialised at random.
      begun: a checkpoint of this very run, whose weights will be restored: the teacher that the student was initialised
        from is not read again.

    Raises:
      StudentError: it cannot be built, its vocabulary does not cover the corpus, or its positions are too
        few.
      MismatchError: its tokenizer, or that of the teacher it is initialised from, is not the corpus' own; names the
        components that differ.
    """
    notes: list[str] = []
    extra: dict[str, Any] = (
        {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    )
    if begun is not None and config.init_from is not None and (begun / "config.json").is_file():
        model = _initialised(load_config(str(begun), None, where="student"), extra, seed)
        _check_fit(model, corpus, [])
        if config.freeze_embeddings:
            _freeze_embeddings(model)
        return Student(model, read_record(begun).get("student", {}).get("notes", []))
    if config.checkpoint is not None:
        where = "student.checkpoint"
        check_tokenizer(config.checkpoint, config.revision, corpus, notes, where=where)
        model = load_model(config.checkpoint, config.revision, where=where, **extra)
    else:
        if config.init_from is not None:
            check_tokenizer(config.init_from, config.revision, corpus, notes, where="student.init_from")
        model = _initialised(student_config(config, fit_of(corpus)), extra, seed)
        _check_fit(model, corpus, [])  # before a teacher is read
        if config.init_from is not None:
            notes += _from_teacher(model, config, config.init_from)
        elif config.preset is not None:
            teacher = PRESETS[config.preset].teacher
            notes.append(f"all weights are random; student.init_from initialises this student from {teacher}")
    _check_fit(model, corpus, notes)
    if config.freeze_embeddings:
        notes.append(_freeze_embeddings(model))
    return Student(model, notes)


def student_config(config: StudentConfig, fit: Fit | None) -> PretrainedConfig:
    """The configuration of a student; of one initialised from a teacher, checked against the teacher's.

    Args:
      config: the settings.
      fit: the corpus it must fit; None for the architecture alone.

    Raises:
      StudentError: it cannot be had, or the teacher has no such parts to copy.
    """
    if config.checkpoint is not None:
        return load_config(config.checkpoint, config.revision, where="student.checkpoint")
    if config.init_from is not None:
        teacher = load_config(config.init_from, config.revision, where="student.init_from")
        check_family(teacher.model_type)
        found = architecture(config, fit)
        check_not_larger(teacher, found, mlps=config.copy_mlps)
        return found
    return architecture(config, fit)


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: its parameters have shapes and no values.

    Raises:
      StudentError: the configuration is refused by its model.
    """
    with torch.device("meta"):
        return _initialised(config, {}, 0)


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """How many parameters a model has: all of them, and by part; a tied head has none of its own."""
    untyped: Any = model
    embeddings, head = untyped.get_input_embeddings(), untyped.get_output_embeddings()
    parts = {"embeddings": 0 if embeddings is None else embeddings.weight.numel(), "head": 0}
    if head is not None:
        tied = embeddings is not None and head.weight is embeddings.weight
        parts["head"] = sum(p.numel() for name, p in head.named_parameters() if not (tied and name == "weight"))
    whole = sum(p.numel() for p in model.parameters())
    return {"all": whole, **parts, "layers": whole - sum(parts.values())}


def fit_of(corpus: Corpus) -> Fit:
    """What a corpus asks of a student.

    Raises:
      StudentError: its tokenizer cannot be loaded.
    """
    tokenizer = corpus_tokenizer(corpus)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return Fit(vocab_size=corpus.vocab_size, context=longest_row(corpus), special_ids=special)


def _from_teacher(model: PreTrainedModel, config: StudentConfig, source: str) -> list[str]:
    """Copy what the settings say; the teacher's weights are let go of afterwards."""
    teacher = load_model(source, config.revision, where="student.init_from", whole=True, dtype="auto")
    done = initialise(
        model,
        teacher,
        layers_from(config, teacher.config, model.config),
        embeddings=config.copy_embeddings,
        attention=config.copy_attention,
        mlps=config.copy_mlps,
    )
    return [f"initialised from {source}: {'; '.join(done) or 'nothing'}; all else random"]


def _freeze_embeddings(model: PreTrainedModel) -> str:
    untyped: Any = model
    weight = untyped.get_input_embeddings().weight
    weight.requires_grad_(False)
    head = untyped.get_output_embeddings()
    shared = " and the head that shares them" if head is not None and head.weight is weight else ""
    return f"the input embeddings{shared} are frozen: {weight.numel():,} parameters"


def _initialised(architecture: PretrainedConfig, extra: dict[str, Any], seed: int) -> PreTrainedModel:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            build: Any = AutoModelForCausalLM.from_config
            model = build(architecture, dtype=torch.float32, **extra)
    except (OSError, ValueError, ImportError, AttributeError, TypeError, RuntimeError) as error:
        raise StudentError(
            f"student: expected a configuration that gives a causal language model, found that "
            f"{architecture.model_type!r} refuses it: {in_short(error)}"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


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
            f"{in_short(error)}"
        ) from error


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
