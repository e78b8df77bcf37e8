"""What a run shows and writes while it goes: one bar, one line per evaluation, two files of curves.

It also keeps the trainer's book: which epoch the loader is in, how many positions have been seen, how long training has
waited for data, and the record that completes a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from tailcache.trainers.records import JsonLines

if TYPE_CHECKING:
    from tailcache.trainers.distill import DistillTrainer

__all__ = ["Reporter", "evaluation_line", "quiet_progress"]


def evaluation_line(step: int, metrics: dict[str, Any], kl_is: str) -> str:
    """One evaluation for a reader, e.g. `step 200: held-out cross-entropy 4.512 (teacher 2.981), KL 1.730, ...`."""
    note = " (lower bound)" if kl_is == "lower bound" else ""
    return (
        f"step {step}, {metrics['eval_positions_seen']:,} positions seen: "
        f"held-out cross-entropy {metrics['eval_cross_entropy']:.4f} nats "
        f"(teacher {metrics['eval_teacher_cross_entropy']:.4f}), KL {metrics['eval_kl']:.4f}{note}, "
        f"top-1 agreement {metrics['eval_top1_agreement']:.1%}"
    )


@contextmanager
def quiet_progress() -> Iterator[None]:
    """No bars of transformers' own while it reads or writes weights."""
    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


class Reporter(TrainerCallback):
    """Progress, curves and records of one ``DistillTrainer``."""

    def __init__(self, trainer: DistillTrainer) -> None:
        out = Path(trainer.args.output_dir or ".")
        self.trainer = trainer
        self.evaluations = JsonLines(out / "metrics.jsonl")
        self.training = JsonLines(out / "training.jsonl")
        self.timing = JsonLines(out / "timing.jsonl")
        self.last_logged_step = 0
        self.last_evaluated_step: int | None = None
        self._bar: Any = None
        self._began = self._waited_before = 0.0
        self._positions_before, self._written_s = 0, 0.0
        self.training_s = self.waited_s = 0.0

    def continue_from(self, step: int, *, fresh: bool) -> None:
        """Forget what a killed run wrote after this step; all of it, for a fresh start."""
        self.last_logged_step = step
        if self.trainer.is_world_process_zero():
            self.evaluations.keep_until(-1 if fresh else step)
            self.training.keep_until(-1 if fresh else step)
            self.timing.keep_until(-1 if fresh else step)
        evaluated = [record["step"] for record in self.evaluations.read()]
        self.last_evaluated_step = max(evaluated, default=None)

    def data_wait(self) -> float:
        """The share of the time since the last call (or the first step) that training has waited for data."""
        loader, now = self.trainer.loader, time.perf_counter()
        waited_s = 0.0 if loader is None else loader.waited_s
        seconds, waiting = now - self._began, waited_s - self._waited_before
        self.training_s, self.waited_s = self.training_s + seconds, self.waited_s + waiting
        self._began, self._waited_before = now, waited_s
        return waiting / seconds

    def _write_timing(self, step: int, data_wait: float) -> None:
        """One line of timing.jsonl: what was done since the last, and how long it took without evaluations.

        Lines say their own positions, since a run that is resumed begins in the middle of one.
        """
        positions, self._positions_before = self._positions_before, self.trainer.positions_seen
        self.timing.append(
            {
                "step": step,
                "data_wait": data_wait,
                "seconds": self.training_s - self._written_s,
                "positions": self._positions_before - positions,
            }
        )
        self._written_s = self.training_s

    @property
    def waited_share(self) -> float:
        """The share of all the time of training up to the last line of the log that it has waited for data."""
        return self.waited_s / self.training_s if self.training_s else 0.0

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Leave the time spent here out of ``data_wait``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.last_logged_step = state.global_step
        self._began = time.perf_counter()
        self._positions_before = self.trainer.positions_seen
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm,
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to read."""
        self.trainer.begin_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step; log the last, and where a checkpoint follows, since a resumed run averages from there on."""
        self.trainer.count_step()
        control.should_log |= control.should_save or control.should_training_stop
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the training curve; the bar shows the loss."""
        if not logs or "loss" not in logs:
            return
        self.last_logged_step = state.global_step
        if state.is_world_process_zero:
            if self._bar is not None:
                self._bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
            # Apart, so that the curve of a run that was killed and resumed equals one that was not, to the byte.
            values = {name: value for name, value in logs.items() if name != "data_wait"}
            self.training.append({"step": state.global_step, **values})
            self._write_timing(state.global_step, logs.get("data_wait", 0.0))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the held-out curve, and one line for the reader."""
        if metrics is None:
            return
        self.last_evaluated_step = state.global_step
        if state.is_world_process_zero:
            plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            kl_is = self.trainer.kl_is
            self.evaluations.append({"step": state.global_step, **plain, "kl_is": kl_is})
            tqdm.write(evaluation_line(state.global_step, metrics, kl_is))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint that was just written, by all processes."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            self.trainer.write_record(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar, stop reading, and time the steps after the last line of the log."""
        if state.is_world_process_zero and state.global_step > self.last_logged_step:
            self._write_timing(state.global_step, self.data_wait())
        self.trainer.end_training()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
