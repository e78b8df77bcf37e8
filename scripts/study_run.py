"""One student of the study: trained from the targets of its arm, measured along the way, left as one file.

The file is written whole or not at all, so a study that was killed goes on with the runs that have none. A run is about
a minute of work; it is not worth a checkpoint.

Legend: P points of the curve after training has begun, C modules, C' those of the curve, S sums, M bins.
"""

from __future__ import annotations

import gc
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tailcache.pipeline.load_teacher import load_teacher
from tailcache.pipeline.teacher import Teacher
from tailcache.scripts.online_teacher import OnlineTeacher
from tailcache.scripts.study_arms import Arm, cache_name
from tailcache.scripts.study_measure import HeldOut, measure
from tailcache.scripts.study_settings import StudySize
from tailcache.storage import durable
from tailcache.storage.reader import open_cache
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.distill import DistillTrainer, training_arguments
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.objective import Objective
from tailcache.trainers.student import build_student

__all__ = ["Bench", "curve_steps", "read_run", "run_path", "write_run"]

START = "start"
"""The name, in place of an arm's, of what a seed's common start measures."""


def run_path(out: Path, arm: str, seed: int) -> Path:
    """Where a run's figures are."""
    return out / "runs" / f"{arm}.seed-{seed}.npz"


def write_run(path: Path, arrays: dict[str, NDArray[Any]], record: dict[str, Any]) -> None:
    """Write figures and a record of how they were made, whole or not at all."""
    written = io.BytesIO()
    np.savez_compressed(written, record=np.frombuffer(json.dumps(record).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    durable.make_folder(path.parent)
    durable.write_file(path, written.getvalue())


def read_run(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What ``write_run`` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "record"}
        return arrays, json.loads(stored["record"].tobytes())


def curve_steps(num_steps: int, points: int) -> list[int]:
    """The optimizer steps after which a student is measured, the last one included; the start is measured apart."""
    return sorted({max(1, round(num_steps * (i + 1) / (points - 1))) for i in range(points - 1)})


class _Measuring(TrainerCallback):
    """Measures the student after some steps; the time is kept apart from training's."""

    def __init__(self, steps: list[int], held_out: HeldOut) -> None:
        self.steps, self.held_out = steps, held_out
        self.found: list[NDArray[np.float64]] = []
        self.seconds = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in self.steps[:-1]:
            began = time.perf_counter()
            model = kwargs["model"]
            nn.Module.eval(model)
            self.found.append(measure(model, self.held_out, calibration=False)["sums"])
            nn.Module.train(model)
            self.seconds += time.perf_counter() - began


class Bench:
    """What all runs of a process share: the teacher, and the held-out rows with its hidden states."""

    def __init__(self, out: Path, study: StudySize, rows: list[NDArray[np.int64]], *, device: str) -> None:
        """Load the teacher and run it over the held-out rows.

        Args:
          out: the study's folder.
          study: its sizes.
          rows: the held-out rows.
          device: "cpu" or "cuda".
        """
        self.out, self.study, self.device = out, study, device
        self.teacher: Teacher = load_teacher(
            str(out / "teacher"), vocab_size=study.vocab_size, dtype="float32", device=device
        )
        tensors = [torch.from_numpy(row).to(device) for row in rows]
        self.teacher.probe(tensors[0])
        with torch.inference_mode():
            hidden = [self.teacher.hidden(row_L[None])[0, :-1].float() for row_L in tensors]
        self.held_out = HeldOut(rows=tensors, hidden=hidden, teacher=self.teacher.logits)

    def start_folder(self, seed: int) -> Path:
        """The checkpoint that all arms of a seed start from."""
        return self.out / "start" / f"seed-{seed}"

    def measure_start(self, seed: int) -> None:
        """Measure a seed's common start, if it has not been."""
        path = run_path(self.out, START, seed)
        if path.is_file():
            return
        load: Any = LlamaForCausalLM.from_pretrained
        model = load(str(self.start_folder(seed)), dtype=torch.float32).to(self.device)
        nn.Module.eval(model)
        found = measure(model, self.held_out, calibration=True)
        write_run(path, {"final": found["sums"], "hits": found["hits"], "mass": found["mass"]}, {"seed": seed})

    def measure_teacher(self) -> None:
        """Measure the teacher itself as if it were a student, if it has not been."""
        path = run_path(self.out, "teacher", 0)
        if not path.is_file():
            found = measure(self.teacher.model, self.held_out, calibration=True)
            write_run(path, {"final": found["sums"], "hits": found["hits"], "mass": found["mass"]}, {})

    def run(self, arm: Arm, seed: int) -> None:
        """Train and measure one student, if that has not been done.

        Args:
          arm: how it is trained.
          seed: decides its start and the order of the rows.
        """
        path = run_path(self.out, arm.name, seed)
        if path.is_file():
            return
        began = time.perf_counter()
        trainer, config = self._trainer(arm, seed)
        num_steps = -(-len(trainer.train_rows) // self.study.batch_rows)
        steps = curve_steps(num_steps, self.study.points)
        measuring = _Measuring(steps, self.held_out.some(self.study.curve_share))
        trainer.add_callback(measuring)
        trainer.train()
        trained_s = time.perf_counter() - began - measuring.seconds
        model: Any = trainer.model
        nn.Module.eval(model)
        last = measure(model, self.held_out, calibration=True)
        curve = np.stack([*measuring.found, last["sums"][:: self.study.curve_share]])
        record = {
            "arm": arm.name,
            "seed": seed,
            "loss": arm.loss,
            "clm_weight": arm.clm_weight,
            "cache": cache_name(arm),
            "online": arm.online,
            "learning_rate": config.learning_rate,
            "steps": num_steps,
            "positions_seen": trainer.positions_seen,
            "seconds": {
                "training": trained_s,
                "measuring": measuring.seconds,
                "all": time.perf_counter() - began,
            },
            "threads": torch.get_num_threads(),
        }
        at = np.asarray([round(step * trainer.positions_seen / num_steps) for step in steps])
        arrays = {"curve": curve, "curve_positions": at, "final": last["sums"]}
        write_run(path, {**arrays, "hits": last["hits"], "mass": last["mass"]}, record)
        del trainer, model
        gc.collect()

    def _trainer(self, arm: Arm, seed: int) -> tuple[DistillTrainer, TrainConfig]:
        study = self.study
        config = TrainConfig(
            cache=self.out / "cache",
            out=self.out / "logs" / f"{arm.name}.seed-{seed}",
            teacher=cache_name(arm),
            student=StudentConfig(checkpoint=str(self.start_folder(seed))),
            loss="clm" if arm.loss is None else None,
            losses=() if arm.loss is None else (LossConfig(**arm.loss),),
            clm_weight=arm.clm_weight,
            learning_rate=study.learning_rate,
            warmup=study.warmup,
            batch_rows=study.batch_rows,
            epochs=1.0,
            eval_every=0,
            seed=seed,
            precision=study.precision,
            device="cpu" if self.device == "cpu" else "cuda",
        )
        live = OnlineTeacher(self.teacher) if arm.online else None
        teacher = open_cache(config.cache).teacher(cache_name(arm))
        objective = Objective.from_config(config, teacher, live=None if live is None else live.stored)
        arguments = training_arguments(config)
        arguments.disable_tqdm = True
        trainer = DistillTrainer(
            build_student(config.student, teacher.corpus, seed=seed).model,
            arguments,
            teacher=teacher,
            objective=objective,
            live=live,
        )
        trainer.reporter.continue_from(0, fresh=True)
        return trainer, config
