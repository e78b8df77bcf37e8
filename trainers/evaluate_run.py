"""From the settings of ``tailcache evaluate`` to its figures: find the teacher and the student, check that they fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tailcache.storage.errors import ConfigError, DataError
from tailcache.storage.reader import Teacher, open_cache
from tailcache.trainers.config import StudentConfig
from tailcache.trainers.evaluate_config import EvaluateConfig
from tailcache.trainers.evaluation import evaluate_student
from tailcache.trainers.evaluation_figures import Evaluation
from tailcache.trainers.run import choose_teacher
from tailcache.trainers.student import build_student

__all__ = ["EvaluatedStudent", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class EvaluatedStudent:
    """A student's figures, and what was evaluated.

    Attributes:
      name: as it was given.
      model_class, num_parameters: of the model.
      notes: what the user should know, one sentence each.
      split: of the rows.
      precision, device: that it ran in and on.
      evaluation: the figures.
    """

    name: str
    model_class: str
    num_parameters: int
    notes: tuple[str, ...]
    split: str
    precision: str
    device: str
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        record = {**vars(self), "notes": list(self.notes)}
        del record["evaluation"]
        return {"student": record, **self.evaluation.to_json()}


def evaluate(config: EvaluateConfig, *, show_progress: bool = True) -> EvaluatedStudent:
    """Evaluate the student that the settings name.

    Args:
      config: the settings; the outputs they name are not written here.
      show_progress: draw a progress bar.

    Raises:
      ConfigError: a setting does not fit the cache or the machine.
      DataError: there are no such rows.
      StudentError: the student cannot be loaded, or does not fit.
      MismatchError: its tokenizer is not the corpus' own.
      NotFoundError, IncompleteError, CorruptError: the cache or the teacher cannot be read.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    cache = open_cache(config.cache)
    teacher = choose_teacher(cache, config.teacher, unfinished=config.unfinished, wait_minutes=config.wait_minutes)
    beyond = [k for k in config.tails if k > teacher.top_k]
    if beyond:
        raise ConfigError(
            f"--tails: expected at most {teacher.top_k}, the tokens that teacher {teacher.name!r} stores per position, "
            f"found {beyond[0]}"
        )
    rows = teacher.held_out_rows() if config.split == "held-out" else teacher.train_rows()
    if not len(rows):
        other = "train" if config.split == "held-out" else "held-out"
        raise DataError(
            f"--split {config.split}: expected such rows in {teacher.corpus.place}, found none; prepare a corpus with "
            f"--held-out 0.05, or use --split {other}"
        )
    student = build_student(
        StudentConfig(
            checkpoint=config.student, revision=config.revision, attn_implementation=config.attn_implementation
        ),
        teacher.corpus,
        seed=0,
    )
    model: Any = student.model
    figures = evaluate_student(
        model.to(device),
        teacher,
        rows=rows[: config.rows],
        batch_rows=config.batch_rows,
        num_bins=config.bins,
        tail_ks=sorted(config.tails) or None,
        layout=None if config.layout == "auto" else config.layout,
        precision=config.precision,
        resamples=config.resamples,
        confidence=config.confidence,
        seed=config.seed,
        show_progress=show_progress,
    )
    return EvaluatedStudent(
        name=config.student,
        model_class=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        notes=(*student.notes, *_notes(config, teacher)),
        split=config.split,
        precision=config.precision,
        device=device.type,
        evaluation=figures,
    )


def _device(wanted: str) -> torch.device:
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError("--device: expected a CUDA GPU, found none; use --device cpu or auto")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def _notes(config: EvaluateConfig, teacher: Teacher) -> list[str]:
    notes = []
    if config.split == "train":
        notes.append("these are training rows: the figures say how well the text was learnt, not how well it is known")
    if teacher.is_prefix:
        notes.append(
            f"only rows of the first {teacher.num_shards} of {teacher.layout.num_shards} shards: the teacher's capture "
            "had not finished"
        )
    return notes
