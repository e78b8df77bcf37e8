"""The evaluation of a finished run: its student as it was saved, on the rows its curve was measured on, once."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import torch

from tailcache.storage import durable
from tailcache.storage.reader import Teacher, open_cache
from tailcache.trainers.config import StudentConfig
from tailcache.trainers.evaluation import evaluate_student
from tailcache.trainers.records import read_record
from tailcache.trainers.student import build_student
from tailcache.trainers.sweep_results import EVALUATION, may_be_evaluated

if TYPE_CHECKING:
    from tailcache.trainers.config import TrainConfig

__all__ = ["evaluate_finished"]


def evaluate_finished(config: TrainConfig) -> None:
    """Write evaluation.json beside the student, unless it is there, nothing is held out, or it cannot be evaluated.

    An evaluation is of a whole checkpoint against one teacher; what a mixture's student is like is in its curve
    (``mixture_metrics``).

    Args:
      config: the settings of a run that has finished.

    Raises:
      TailcacheError: the student that was saved cannot be evaluated.
    """
    if (config.out / EVALUATION).is_file() or not may_be_evaluated(config):
        return
    teacher = _teacher(config)
    rows = teacher.held_out_rows()[: config.eval_rows]
    if not len(rows):
        return
    gc.collect()  # the trainer, its optimizer and their memory
    cuda = torch.cuda.is_available() and config.device != "cpu"
    if cuda:
        torch.cuda.empty_cache()
    saved = StudentConfig(checkpoint=str(config.out), attn_implementation=config.student.attn_implementation)
    model: Any = build_student(saved, teacher.corpus, seed=config.seed).model
    figures = evaluate_student(
        model.to("cuda" if cuda else "cpu"),
        teacher,
        rows=rows,
        batch_rows=config.batch_rows,
        layout=None if config.layout == "auto" else config.layout,
        precision=config.precision,
    )
    text = json.dumps(figures.to_json(), indent=1, allow_nan=False) + "\n"
    durable.write_file(config.out / EVALUATION, text.encode())


def _teacher(config: TrainConfig) -> Teacher:
    """The teacher the run was trained from, as far as it was captured then."""
    record = read_record(config.out)
    return open_cache(config.cache).teacher(
        record["teacher"], unfinished="prefix", num_shards=record.get("teacher_shards")
    )
