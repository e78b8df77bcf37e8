"""One training run from settings to a saved student: what ``tailcache train`` does.

Check everything that can be checked first (teacher, loss, student, what is in OUT), then train. A run that was killed
is continued from its last whole checkpoint; one that has finished is left alone.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from tailcache.storage import durable
from tailcache.storage.errors import ConfigError, NotFoundError
from tailcache.storage.reader import Cache, Teacher, open_cache
from tailcache.storage.several import AnyTeacher, Teachers
from tailcache.storage.unfinished import Unfinished
from tailcache.trainers.adapters import adapted
from tailcache.trainers.arguments import rows_per_step, training_arguments
from tailcache.trainers.distill import DistillTrainer
from tailcache.trainers.hub import check_hub
from tailcache.trainers.loss_config import parameters_of
from tailcache.trainers.mixture_config import MixtureConfig
from tailcache.trainers.mixture_weights import MixtureWeights
from tailcache.trainers.objective import Objective
from tailcache.trainers.records import (
    RECORD,
    check_resumable,
    last_checkpoint,
    read_record,
    refuse_existing,
    resolved,
)
from tailcache.trainers.schedules import Schedule
from tailcache.trainers.sharding import keep_environment
from tailcache.trainers.student import Student, build_student

if TYPE_CHECKING:
    from tailcache.trainers.config import TrainConfig
    from tailcache.trainers.live import LiveTeacher

__all__ = ["choose_teacher", "train"]


def choose_teacher(
    cache: Cache,
    name: str | None,
    *,
    unfinished: Unfinished = "refuse",
    num_shards: int | None = None,
    wait_minutes: float | None = None,
) -> Teacher:
    """The teacher of that name, or the only one.

    Args:
      cache: an open cache.
      name: the teacher's.
      unfinished: what to do where its capture has not finished; waiting draws a progress bar.
      num_shards: exactly the first so many shards.
      wait_minutes: to wait at most.

    Raises:
      NotFoundError: there is none of that name, or none at all.
      ConfigError: no name is given and there are several.
      IncompleteError: its capture has not finished, or not in time.
    """
    if name is None:
        name = _only_teacher(cache)
    timeout_s = None if wait_minutes is None else 60 * wait_minutes
    with tqdm(unit="shard", desc=f"waiting for {name}", disable=unfinished != "wait", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)
            bar.refresh()

        return cache.teacher(name, unfinished=unfinished, num_shards=num_shards, timeout_s=timeout_s, progress=show)


def _only_teacher(cache: Cache) -> str:
    names = cache.teacher_names
    if not names:
        raise NotFoundError(f"{cache.place}: expected a teacher, found none; make one with `tailcache capture`")
    if len(names) > 1:
        raise ConfigError(f"teacher: {cache.place} has several teachers; choose one of {', '.join(names)}")
    return names[0]


def _open_teacher(config: TrainConfig) -> AnyTeacher:
    """The teachers to train from, or the teacher; of a prefix, what all processes read and a resumed run began with."""
    cache = open_cache(config.cache)
    if config.teachers:
        if config.unfinished == "prefix":
            raise ConfigError(
                "unfinished: expected refuse or wait with teachers, found prefix: a mixture needs every teacher's "
                "targets of every row"
            )
        unfinished, minutes = config.unfinished, config.wait_minutes
        return Teachers(
            [choose_teacher(cache, name, unfinished=unfinished, wait_minutes=minutes) for name in config.teachers]
        )
    choose = partial(choose_teacher, cache, config.teacher, wait_minutes=config.wait_minutes)
    begun = _record_so_far(config.out) if config.resume else {}
    if begun.get("teacher_shards"):
        return choose(num_shards=begun["teacher_shards"])
    teacher = choose(unfinished=config.unfinished)
    if config.unfinished == "prefix" and torch.distributed.is_available() and torch.distributed.is_initialized():
        agreed = [teacher.num_shards if teacher.is_prefix else None]
        torch.distributed.broadcast_object_list(agreed)
        if teacher.is_prefix or agreed[0] is not None:
            return choose(num_shards=agreed[0])
    return teacher


def _record_so_far(out: Path) -> dict[str, Any]:
    """The record of the run that OUT holds; empty where it holds none."""
    folder = out if (out / RECORD).is_file() else last_checkpoint(out)
    return {} if folder is None else read_record(folder)


@keep_environment()
def train(
    config: TrainConfig, *, live: Callable[[Teacher, torch.device], LiveTeacher] | None = None
) -> DistillTrainer | None:
    """Train, evaluate and save the student that the settings describe.

    Args:
      config: the settings.
      live: makes a teacher that runs beside the student and gives the targets to train on, for an opened one of the
        cache and the training device; the cache's own targets are then for evaluation alone.

    Returns:
      The trainer, after training; None if the run in OUT had finished already.

    Raises:
      ConfigError: a setting does not fit the cache, or OUT holds another run; or the settings name a teacher to run
        beside the student, and there is no ``live``.
      StudentError: the student cannot be built, or does not fit.
      MismatchError: another tokenizer; or a checkpoint made from other data or settings.
      StorageError: the student is saved but could not be pushed to the hub.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    args = training_arguments(config)  # first: from then on processes know of each other
    if config.online is not None and live is None:
        raise ConfigError(
            f"online: expected a teacher that was made from {config.online!r}, found none; only `tailcache train` of a "
            "single student makes one, from Python it is the argument `live` of train()"
        )
    teacher = _open_teacher(config)
    if live is not None and isinstance(teacher, Teachers):
        raise ConfigError("teachers: expected one teacher beside the student, found a mixture; choose one with teacher")
    beside = live(teacher, args.device) if live is not None and isinstance(teacher, Teacher) else None
    objective = Objective.from_config(config, teacher, live=None if beside is None else beside.stored)
    weights = MixtureWeights.from_config(config, teacher) if isinstance(teacher, Teachers) else None
    record = {
        "format": "tailcache student",
        "format_version": 1,
        "config": _with_mixture(_resolved(config, objective), weights),
        "corpus_hash": teacher.corpus.hash,
        "teacher": teacher.name,
        "teacher_hash": teacher.hash,
        "rows_per_step": rows_per_step(args),
        **({"teacher_shards": teacher.num_shards} if isinstance(teacher, Teacher) and teacher.is_prefix else {}),
        **({} if beside is None else {"online": beside.described}),
        "versions": {name: importlib.metadata.version(name) for name in ("tailcache", "torch", "transformers")},
    }
    checkpoint = None
    if not config.resume:
        refuse_existing(config.out)
    elif (config.out / RECORD).is_file() and _finished(config.out, record):
        if args.process_index == 0:
            print(f"{config.out}: this run has finished; nothing to do")
        return None
    else:
        checkpoint = last_checkpoint(config.out)
    restored = None if checkpoint is None else check_resumable(checkpoint, record, num_processes=args.world_size)
    if config.hub_model_id is not None and args.process_index == 0:
        check_hub(config.hub_model_id, private=config.hub_private)

    student = build_student(config.student, teacher.corpus, seed=config.seed, begun=checkpoint)
    student = adapted(student, config.student, seed=config.seed)
    record["student"] = _described(student)
    durable.make_folder(config.out)
    held_out = teacher.held_out_rows()
    layout = None if config.layout == "auto" else config.layout
    trainer = DistillTrainer(
        student.model,
        args,
        teacher=teacher,
        objective=objective,
        mixture_weights=weights,
        layout=layout,
        head_mode=config.head_mode,
        held_out_rows=held_out[: config.eval_rows],
        record=record,
        workers=config.workers,
        data_state=None if restored is None else restored.get("data") or {"step": int(restored["step"])},
        live=beside,
        merge_adapters=config.student.lora_rank is not None and config.student.lora_save == "merged",
    )
    trainer.reporter.continue_from(0 if restored is None else int(restored["step"]), fresh=restored is None)
    if restored is not None:
        trainer.positions_seen = int(restored["positions_seen"])
    if trainer.is_world_process_zero():
        for line in _introduction(config, trainer, student, checkpoint):
            print(line)

    evaluating = len(trainer.held_out) > 0
    if evaluating and checkpoint is None:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if evaluating and trainer.reporter.last_evaluated_step != trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model(str(config.out))
    if trainer.is_world_process_zero():
        print(f"saved to {config.out}; training waited for data for {trainer.reporter.waited_share:.1%} of its time")
    return trainer


def _resolved(config: TrainConfig, objective: Objective) -> dict[str, Any]:
    """The settings with defaults filled in, those of the losses with what this teacher makes of them."""
    record = resolved(config)
    losses = [resolved(each) | {"top_k": each.split.start if each.name == "tad" else None} for each in objective.losses]
    if config.losses:
        return {**record, "losses": losses}
    filled = {name: value for name, value in losses[0].items() if name in record} if losses else {}
    return {**record, **filled, "loss": config.loss_name}


def _with_mixture(record: dict[str, Any], weights: MixtureWeights | None) -> dict[str, Any]:
    """The settings of a mixture as what they come to: numbers, and a file by what is in it; none for one teacher."""
    if weights is None:
        return {name: value for name, value in record.items() if name not in {f.name for f in fields(MixtureConfig)}}
    constant = None if weights.hash else list(weights.constant)
    return {**record, "teacher_weights": constant, "teacher_weights_file": weights.hash}


def _loss_line(trainer: DistillTrainer) -> str:
    """The loss in words, e.g. `cross-entropy + TAD from teacher 'a', K' = 10 of 64, beta 2, tail sampled`."""
    objective = trainer.objective
    parts = [f"{_weight(objective.clm_weight)}cross-entropy"] if objective.clm_weight else []
    for each in objective.losses:
        details = [f"{_weight(each.weight)}{each.name}"]
        if each.name == "tad":
            details.append(f"K' = {_course(each.split)} of {trainer.teacher.top_k}")
            details.append(f"beta {_course(each.tail_weight)}")
        own = [f"{name} {getattr(each, name)}" for name in parameters_of(each.name, each.wraps) if name in _SAID]
        parts.append(", ".join([*details, *own, *([f"tail {each.tail}"] if each.tail else [])]))
    line = " + ".join(parts)
    return f"{line}; {_teacher_line(trainer)}" if objective.losses else line


def _teacher_line(trainer: DistillTrainer) -> str:
    """E.g. `teacher 'a'`, or `mixture of teachers 'a' (0.7), 'b' (0.3), times p(y)^1`."""
    teacher, weights = trainer.teacher, trainer.mixture_weights
    if not isinstance(teacher, Teachers) or weights is None:
        return f"teacher {teacher.name!r}"
    shares = [
        f"{each.name!r}" if weights.values is not None else f"{each.name!r} ({share / sum(weights.constant):.3g})"
        for each, share in zip(teacher.teachers, weights.constant, strict=True)
    ]
    by = f", weights by {weights.by.rstrip('s')}" if weights.values is not None else ""
    surer = {
        "none": "",
        "target": f", times p(y)^{weights.sharpness:g}",
        "entropy": f", times exp(-{weights.sharpness:g} entropy)",
    }
    return f"mixture of teachers {', '.join(shares)}{by}{surer[weights.confidence]}"


_SAID = (
    "temperature",
    "mixture",
    "skew",
    "target_weight",
    "non_target_weight",
    "hard_ratio",
    "easy_weight",
    "wraps",
    "num_draws",
    "power",
)


def _weight(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g} "


def _course(schedule: Schedule) -> str:
    if schedule.shape == "constant":
        return f"{schedule.start:g}"
    return f"{schedule.start:g} to {schedule.end:g} ({schedule.shape})"


def _finished(out: Path, record: dict[str, Any]) -> bool:
    """Whether OUT holds this very run, finished; refuses another one's."""
    found = check_resumable(out, record)
    length = ("epochs", "max_steps")
    return all(found["config"].get(name) == record["config"][name] for name in length)


def _described(student: Student) -> dict[str, Any]:
    model = student.model
    return {
        "class": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "notes": student.notes,
    }


def _introduction(config: TrainConfig, trainer: DistillTrainer, student: Student, checkpoint: Path | None) -> list[str]:
    """What is about to happen, in a few lines."""
    corpus = trainer.teacher.corpus
    counts = trainer.record["student"]
    part = "" if counts["num_trained"] == counts["num_parameters"] else f", {counts['num_trained']:,} of them trained"
    lines = [
        f"student: {type(student.model).__name__}, {counts['num_parameters']:,} parameters{part}, {config.precision}",
        f"loss: {_loss_line(trainer)}",
        f"batch: {_batch_line(trainer)}",
        f"data: {len(trainer.train_rows):,} rows for training and {len(trainer.held_out):,} held out, of "
        f"{corpus.num_targets:,} target positions in all",
        *(f"note: {note}" for note in student.notes),
        *_prefix_note(trainer.teacher),
    ]
    if trainer.projection is not None:
        lines.append(
            f"note: hidden states are compared through a learned projection from the student's width, "
            f"{trainer.projection.in_features}, to the teacher's, {trainer.projection.out_features}"
        )
    if trainer.why_full_logits is not None:
        lines.append(
            "note: the loss is worked out from full logits, which takes more memory and time: "
            f"{trainer.why_full_logits}"
        )
    if len(trainer.held_out) == 0:
        lines.append("note: the corpus has no held-out rows, so nothing is evaluated")
    if checkpoint is not None:
        lines.append(f"continuing from {checkpoint} (step {read_record(checkpoint)['step']})")
    return lines


def _batch_line(trainer: DistillTrainer) -> str:
    """Rows of an optimizer step, and how they come about."""
    args = trainer.args
    shared = {"plain": "", "whole": ", shared out (FSDP)", "sharded": ", shared out (FSDP)"}[trainer.kind]
    return (
        f"{rows_per_step(args)} rows per optimizer step = {args.per_device_train_batch_size} rows x "
        f"{args.gradient_accumulation_steps} forwards x {args.world_size} processes{shared}"
    )


def _prefix_note(teacher: AnyTeacher) -> list[str]:
    if isinstance(teacher, Teachers) or not teacher.is_prefix:
        return []
    return [
        f"note: the first {teacher.num_shards} of {teacher.layout.num_shards} shards of the teacher, "
        f"{teacher.num_targets:,} target positions: its capture had not finished"
    ]
