"""Open a teacher for a capture: load it, check that it fits the corpus, and say all that decides its values."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.draws import FULL_TAIL, SAMPLING
from tailcache.pipeline.load_teacher import load_teacher, load_teacher_tokenizer, model_revision
from tailcache.pipeline.rows import head_chunks
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.fingerprint import differing_components, fingerprint
from tailcache.storage.hidden import HiddenLayout, StoredHead
from tailcache.storage.layout import Layout
from tailcache.storage.targets import TargetsWriter, plan_layout

__all__ = ["OpenedTeacher", "open_teacher"]

_OPTIONAL: dict[str, Any] = {"temperatures": (), "hidden": "none"}


@dataclass(frozen=True, kw_only=True)
class OpenedTeacher:
    """A teacher that fits a corpus, and what its capture says of itself."""

    teacher: Teacher
    corpus: Corpus
    layout: Layout
    settings: dict[str, Any]
    """All that decides the values."""
    provenance: dict[str, Any]
    logits: str
    """How the teacher's logits are computed."""
    head: StoredHead | None
    """Where hidden states are kept."""

    def writer(self, name: str) -> TargetsWriter:
        """Create the capture of that name, or continue it; errors of ``TargetsWriter``."""
        return TargetsWriter(
            self.corpus, name, layout=self.layout, settings=self.settings, provenance=self.provenance, head=self.head
        )


def open_teacher(config: CaptureConfig, corpus: Corpus, teacher: Teacher | None = None) -> OpenedTeacher:
    """Load a teacher and check it against the corpus.

    Args:
      config: of the capture.
      corpus: to be captured over.
      teacher: one that is loaded already, instead of ``config.teacher``.

    Raises:
      ConfigError: a setting is out of range, there is no such teacher, or rows are too long for it.
      MismatchError: the tokenizer is not the corpus' own.
      TeacherError: the head is too narrow, or not all there is to the logits where hidden states are to be kept.
    """
    if config.threads is not None:
        if config.threads < 1:
            raise ConfigError(f"threads: expected at least 1, found {config.threads}")
        torch.set_num_threads(config.threads)
    layout = plan_layout(
        corpus,
        top_k=config.top_k,
        num_samples=config.num_samples,
        temperatures=config.temperatures,
        kl_budget=config.kl_budget,
        shard_positions=config.shard_positions,
        chunk=config.chunk_positions,
        compression_level=config.compression_level,
    )
    tokenizer_note, revision = "teacher given as an object: its tokenizer was not checked", None
    if teacher is None:
        tokenizer_note = _check_tokenizer(config, corpus)
        teacher = load_teacher(
            config.teacher,
            vocab_size=corpus.vocab_size,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device,
            attn_implementation=config.attn_implementation,
            weight_bits=config.weight_bits,
            weight_group=config.weight_group,
            trust_remote_code=config.trust_remote_code,
        )
        revision = model_revision(teacher, config.revision)
    _check_lengths(teacher, corpus)
    logits_note = teacher.probe(torch.from_numpy(corpus.rows(0, 1).tokens))
    head = None
    if config.hidden != "none":
        head = teacher.stored_head()
        layout = replace(layout, hidden=HiddenLayout.of(config.hidden, head))
    path = Path(config.teacher).expanduser()
    provenance = {
        "teacher": path.resolve().name if path.exists() else config.teacher,
        "revision": revision,
        "logits": logits_note.split(" (")[0],
        "tokenizer": tokenizer_note,
        "config": _resolved(config),
    }
    return OpenedTeacher(
        teacher=teacher,
        corpus=corpus,
        layout=layout,
        settings=_settings(config, teacher),
        provenance=provenance,
        logits=logits_note,
        head=head,
    )


def _check_tokenizer(config: CaptureConfig, corpus: Corpus) -> str:
    """Compare the tokenizer beside the teacher with the corpus' own."""
    tokenizer = load_teacher_tokenizer(config.teacher, config.revision, trust_remote_code=config.trust_remote_code)
    if tokenizer is None:
        return "no tokenizer lies beside the teacher: only the size of its vocabulary was checked"
    expected = corpus.manifest["tokenizer"].get("fingerprint", {})
    different = differing_components(expected, fingerprint(tokenizer)) if expected else []
    if different:
        raise MismatchError(
            f"teacher {config.teacher}: its tokenizer does not match the corpus {corpus.place}: expected the same "
            f"{', '.join(different)}, found others; prepare a corpus with this teacher's tokenizer"
        )
    return "same tokenizer as the corpus"


def _check_lengths(teacher: Teacher, corpus: Corpus) -> None:
    limit = teacher.max_length
    if limit is None:
        return
    previous = 0
    first = 0
    for offsets in corpus.stream("row_offsets"):
        lengths = np.diff(offsets, prepend=previous)
        if len(lengths) and lengths.max() > limit:
            row = first + int(np.argmax(lengths)) - 1
            raise ConfigError(
                f"row {row}: expected at most {limit} tokens, the longest this teacher was made for, found "
                f"{lengths.max()}; prepare the corpus with --context-length {limit}"
            )
        previous, first = int(offsets[-1]), first + len(offsets)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("tailcache", "torch", "transformers", "numpy", "zarr", "numcodecs"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _settings(config: CaptureConfig, teacher: Teacher) -> dict[str, Any]:
    """Everything that decides the stored values; a capture is continued only if all of it is equal."""
    chunk, summary = head_chunks(teacher, config.head_positions)
    device = torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else teacher.device.type
    return {
        "weights": teacher.weights_hash(),
        "model": _model_config(teacher),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "attn_implementation": getattr(teacher.model.config, "_attn_implementation", None),
        "weight_bits": config.weight_bits,
        "weight_group": config.weight_group if config.weight_bits is not None else None,
        "head_width": teacher.head_width,
        "split_head": teacher.split,
        "device": device,
        "batch_positions": config.batch_positions,
        "head_chunk": [chunk, summary],
        "sampling": SAMPLING,
        "full_tail": FULL_TAIL,
        "sample_seed": config.sample_seed,
        "versions": _versions(),
    }


def _model_config(teacher: Teacher) -> dict[str, Any]:
    """The model's own configuration: equal weights under other rotary settings or windows are another teacher."""
    values: dict[str, Any] = json.loads(teacher.model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "use_cache"):
        values.pop(name, None)
    return values


def _resolved(config: CaptureConfig) -> dict[str, Any]:
    """The settings as JSON values; places on this machine are left out, so that the bytes do not depend on them.

    Optional fields are named only where they are captured: without them, a cache has the bytes it had before they were
    known.
    """
    places = ("cache", "teacher", "threads")
    off = {name for name, default in _OPTIONAL.items() if getattr(config, name) == default}
    values = {name: value for name, value in vars(config).items() if name not in places and name not in off}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {n: value if isinstance(value, int | float | list | None) else str(value) for n, value in values.items()}
