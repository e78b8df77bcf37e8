"""What does a training step from a cache cost? ``python -m tailcache.scripts.bench_step``.

Three trainings of the same student on the same rows, a turn of each after the other in one process, through
``transformers.Trainer`` as ``tailcache train`` runs it (data, forward, backward, clipping, optimizer):

* cache: cross-entropy + TAD from cached targets;
* clm: cross-entropy alone, by the same fused head; of the cache the corpus alone is read;
* online: cross-entropy + TAD from a teacher that runs beside the student, with its whole distributions.

A turn of the first two is an epoch, from the first read of its data to the end of its last step: no reading ahead is
left over for, or taken from, the turn of another. Ratios are of the turns of one round, and their median counts. Of
online's step, the teacher's own part is timed too: no way to train online can do without it. Peak memory is taken in
processes of their own, after models are loaded.

``--gpu`` is the setting of a real run: a student of 1.2 and a teacher of 1.8 billion random weights, in bfloat16, 2,048
tokens to a row and a vocabulary of 151,936. The cache is synthetic; nothing in a step's time depends on what it says.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tailcache.scripts.measure import Bar, benchmark, peak_mib, report, reset_peak, spread
from tailcache.trainers.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from tailcache.pipeline.teacher import Teacher
    from tailcache.trainers.distill import DistillTrainer

__all__ = ["BenchStep", "Role", "Setting", "bench", "main"]

Role = Literal["clm", "cache", "online"]
ROLES: tuple[Role, ...] = ("clm", "cache", "online")
MAX_WAITING = 0.05
NAME = "bench"


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Time steps from a cache, of cross-entropy alone, and with the teacher beside, alternating; medians and ratios."""

    gpu: bool = False
    """The setting for a GPU."""

    positions: int | None = None
    """Target positions of the corpus, about; by default 12,000, and 131,072 with --gpu."""

    batch_rows: int | None = None
    """Rows of a step; by default 1, and 4 with --gpu."""

    rounds: int = 4
    """Turns of each training, after one that is not counted."""

    online_steps: int = 3
    """Steps of an online turn."""

    top_k: int = 32
    """Tokens kept in the cache."""

    num_samples: int = 64
    """Draws kept in the cache."""

    threads: int | None = None
    """CPU threads; by default what torch chooses."""

    memory: bool = True
    """Also take the peak memory of each, in processes of their own."""

    json: Path | None = None
    """Write figures and conditions to this file."""

    check: bool = False
    """Exit with status 1 where a bar is missed."""

    role: Literal["all"] | Role = "all"
    """clm, cache, online: run only a few steps of that and print the peak memory in MiB (what --memory starts)."""

    cache: Path | None = None
    """Keep the cache in this folder, or take the one that a run before left there; by default it is temporary."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured where.

    Attributes:
      student: its architecture and sizes as ``transformers`` names them, but the vocabulary's.
      device: of the student and the teacher.
      precision: of the student.
      positions: target positions of the corpus by default.
      batch_rows: of a step by default.
      limit: what cache / clm may be.
      load: the teacher for a corpus' vocabulary.
      make_cache: writes the corpus and the targets of the teacher ``NAME`` into a folder; returns the teacher if it had
        to be loaded for that.
    """

    student: Mapping[str, Any]
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]
    positions: int
    batch_rows: int
    limit: float
    load: Callable[[int], Teacher]
    make_cache: Callable[[BenchStep, Path], Teacher | None]


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_step``."""
    benchmark("bench_step", BenchStep, lambda config: bench(config, _gpu() if config.gpu else _cpu()), __doc__)


_SMALL_STUDENT = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN = {"model_type": "qwen2", "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16}
_QWEN_STUDENT = {**_QWEN, "hidden_size": 1536, "intermediate_size": 4224, "tie_word_embeddings": False}
_QWEN_TEACHER = {**_QWEN, "hidden_size": 2048, "intermediate_size": 5504, "tie_word_embeddings": False}


def _cpu() -> Setting:
    return Setting(
        student=_SMALL_STUDENT,
        device="cpu",
        precision="fp32",
        positions=12_000,
        batch_rows=1,
        limit=1.10,
        load=_smollm2,
        make_cache=_captured,
    )


def _smollm2(vocab_size: int) -> Teacher:
    from tailcache.pipeline.load_teacher import load_teacher
    from tailcache.scripts.embedded import smollm2

    return load_teacher(str(smollm2()), vocab_size=vocab_size, device="cpu")


def _captured(config: BenchStep, cache: Path) -> Teacher:
    """The docstrings of the standard library, and a real capture."""
    from tailcache.pipeline.capture import capture
    from tailcache.pipeline.config import CaptureConfig
    from tailcache.pipeline.prepare import prepare
    from tailcache.scripts.embedded import docstring_corpus, smollm2
    from tailcache.storage.reader import open_cache

    prepare(docstring_corpus(cache, max_tokens=config.positions or 12_000))
    teacher = _smollm2(open_cache(cache).corpus.vocab_size)
    sizes: dict[str, Any] = {"top_k": config.top_k, "num_samples": config.num_samples}
    capture(CaptureConfig(cache=cache, teacher=str(smollm2()), name=NAME, device="cpu", **sizes), teacher=teacher)
    return teacher


def _gpu() -> Setting:
    return Setting(
        student=_QWEN_STUDENT,
        device="cuda",
        precision="bf16",
        positions=131_072,
        batch_rows=4,
        limit=1.05,
        load=_random_teacher,
        make_cache=_synthetic,
    )


def _random_teacher(vocab_size: int) -> Teacher:
    """1.8 billion random weights, in the sizes of Qwen1.5-1.8B."""
    import torch

    from tailcache.pipeline.teacher import Teacher

    with torch.device("cuda"):
        return Teacher(_random(_QWEN_TEACHER, vocab_size, torch.bfloat16).eval(), vocab_size=vocab_size)


def _random(sizes: Mapping[str, Any], vocab_size: int, dtype: torch.dtype | None = None) -> Any:
    """A model with random weights, which do not change from run to run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(**{"vocab_size": vocab_size, "use_cache": False, **sizes})
    build: Any = AutoModelForCausalLM.from_config
    return build(config, dtype=dtype or torch.float32)


def _synthetic(config: BenchStep, cache: Path) -> None:
    from tailcache.scripts.bench_reader import synthetic_cache

    synthetic_cache(
        cache,
        positions=config.positions or 131_072,
        row_positions=2047,
        vocab_size=151_936,
        top_k=config.top_k,
        num_samples=config.num_samples,
    )


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """Some steps of one training, in seconds.

    Attributes:
      steps: how many.
      step_s: mean time of a step, waiting for data and the start of the epoch's reading included.
      cpu_s: mean processor time of a step, over all threads of the process: other work on the machine adds little.
      waited: share of the time in which the training waited for data.
      teacher_s: mean time of a step in which the teacher ran beside it.
    """

    steps: int
    step_s: float
    cpu_s: float
    waited: float
    teacher_s: float


def bench(config: BenchStep, setting: Setting) -> None:
    """Measure and report."""
    import torch

    from tailcache.storage.reader import open_cache

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.role != "all":
        assert config.cache is not None
        print(f"peak_mib {_peak_here(config, setting, config.role, config.cache):.0f}")
        return
    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        cache = config.cache or Path(folder) / "cache"
        teacher = None if (cache / "teachers" / NAME).is_dir() else setting.make_cache(config, cache)
        teacher = teacher or setting.load(open_cache(cache).corpus.vocab_size)
        trainings = {role: _Training(config, setting, role, cache, Path(folder), teacher) for role in ROLES}
        for training in trainings.values():
            training.turn()
        rounds: list[dict[str, _Turn]] = []
        for number in range(config.rounds):
            order = ROLES if number % 2 == 0 else ROLES[::-1]
            rounds.append({role: trainings[role].turn() for role in order})
            print(f"round {number + 1}/{config.rounds}: {_line(rounds[-1])}", flush=True)
        figures = {**_described(trainings, teacher), **_figures(rounds)}
        if config.memory:
            del trainings, teacher
            figures["peak_mib"] = {role: _peak(config, role, cache) for role in ROLES}
    bars = [
        Bar(
            name="step from the cache / cross-entropy alone, median",
            value=figures["cache_over_clm"]["median"],
            limit=setting.limit,
            at_most=True,
        ),
        Bar(
            name="share of the time from the cache that waits for data, median",
            value=figures["waited"]["cache"]["median"],
            limit=MAX_WAITING,
            at_most=True,
        ),
    ]
    report("bench_step", figures, bars, json_path=config.json, check=config.check)


def _line(turns: Mapping[str, _Turn]) -> str:
    clm = turns["clm"].step_s
    return ", ".join(
        f"{role} {turns[role].step_s * 1000:.0f} ms ({turns[role].step_s / clm:.3f} of clm)" for role in ROLES
    )


def _described(trainings: Mapping[Role, _Training], teacher: Teacher) -> dict[str, Any]:
    trainer = trainings["cache"].trainer
    targets = trainer.teacher
    model: Any = trainer.model
    positions = sum(len(batch["labels"]) for batch in trainer.get_train_dataloader())
    return {
        "student_parameters": sum(p.numel() for p in model.parameters()),
        "teacher_parameters": sum(p.numel() for p in teacher.model.parameters()),
        "vocab_size": targets.vocab_size,
        "top_k": targets.top_k,
        "num_samples": targets.num_samples,
        "positions_per_step": positions / len(trainer.get_train_dataloader()),
    }


def _figures(rounds: list[dict[str, _Turn]]) -> dict[str, Any]:
    def ratio(of: Callable[[dict[str, _Turn]], float]) -> dict[str, float]:
        return spread([of(turns) for turns in rounds])

    return {
        "steps": {role: rounds[0][role].steps for role in ROLES},
        "step_s": {role: ratio(lambda turns, role=role: turns[role].step_s) for role in ROLES},  # type: ignore[misc]
        "waited": {role: ratio(lambda turns, role=role: turns[role].waited) for role in ROLES},  # type: ignore[misc]
        "cache_over_clm": ratio(lambda turns: turns["cache"].step_s / turns["clm"].step_s),
        "cache_over_clm_in_processor_time": ratio(lambda turns: turns["cache"].cpu_s / turns["clm"].cpu_s),
        "online_over_clm": ratio(lambda turns: turns["online"].step_s / turns["clm"].step_s),
        "online_over_cache": ratio(lambda turns: turns["online"].step_s / turns["cache"].step_s),
        "clm_and_teacher_over_clm": ratio(lambda turns: 1 + turns["online"].teacher_s / turns["clm"].step_s),
    }


class _Training:
    """One of the three; ``turn`` trains for some steps."""

    def __init__(
        self, config: BenchStep, setting: Setting, role: Role, cache: Path, out: Path, teacher: Teacher | None
    ) -> None:
        from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

        self.trainer = self._trainer(config, setting, role, cache, out, teacher)
        self.began = self.ended = self.steps = 0.0
        measured, now = self, partial(_now, setting.device)

        class Clock(TrainerCallback):
            """The reporter, which begins and ends the reading, comes before it in every event but the first."""

            def on_train_begin(
                self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
            ) -> None:
                measured.began = now()

            def on_train_end(
                self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
            ) -> None:
                measured.ended, measured.steps = now(), state.global_step

        self.trainer.add_callback(Clock())

    def _trainer(
        self, config: BenchStep, setting: Setting, role: Role, cache: Path, out: Path, teacher: Teacher | None
    ) -> DistillTrainer:
        import numpy as np

        from tailcache.storage.reader import open_cache
        from tailcache.trainers.distill import DistillTrainer, training_arguments
        from tailcache.trainers.objective import Objective

        stored = open_cache(cache).teacher(NAME)
        settings = TrainConfig(
            cache=cache,
            out=out / role,
            loss="clm" if role == "clm" else "tad",
            top_k=None if role == "clm" else min(10, stored.top_k),
            batch_rows=config.batch_rows or setting.batch_rows,
            max_steps=config.online_steps if role == "online" else None,
            precision=setting.precision,
            device=setting.device,
            eval_every=0,
            log_every=1_000_000,
        )
        self.live = _timed(setting, teacher, stored.top_k) if role == "online" and teacher is not None else None
        arguments = training_arguments(settings)
        arguments.disable_tqdm = True
        return DistillTrainer(
            _random(setting.student, stored.vocab_size),
            arguments,
            teacher=stored,
            objective=Objective.from_config(settings, stored, live=None if self.live is None else self.live.stored),
            held_out_rows=np.empty(0, np.int64),
            live=self.live,
        )

    def turn(self) -> _Turn:
        """Train once through the rows, or for the steps of an online turn."""
        before, cpu = 0.0 if self.live is None else self.live.seconds, time.process_time()
        self.trainer.train()
        seconds = self.ended - self.began
        assert self.trainer.loader is not None
        return _Turn(
            steps=int(self.steps),
            step_s=seconds / self.steps,
            cpu_s=(time.process_time() - cpu) / self.steps,
            waited=self.trainer.loader.waited_s / seconds,
            teacher_s=0.0 if self.live is None else (self.live.seconds - before) / self.steps,
        )


def _timed(setting: Setting, teacher: Teacher, top_k: int) -> Any:
    """An ``OnlineTeacher`` that counts the seconds it takes."""
    from tailcache.scripts.online_teacher import OnlineTeacher

    class Timed(OnlineTeacher):
        """Its ``seconds`` grow with every batch."""

        seconds = 0.0

        def targets(self, batch: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
            """As ``OnlineTeacher`` gives them."""
            began = _now(setting.device)
            found = super().targets(batch, whole=whole)
            self.seconds += _now(setting.device) - began
            return found

    return Timed(teacher, top_k=top_k, batch_positions=16_384 if setting.device == "cuda" else 4096)


def _now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_here(config: BenchStep, setting: Setting, role: Role, cache: Path) -> float:
    """Peak MiB of a few steps, everything loaded before; of the GPU where that is what trains."""
    import torch

    from tailcache.storage.reader import open_cache

    vocab_size = open_cache(cache).corpus.vocab_size
    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        teacher = setting.load(vocab_size) if role == "online" else None
        training = _Training(config, setting, role, cache, Path(folder), teacher)
        training.trainer.args.max_steps = 2
        reset_peak()  # loading a model takes more than running it
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        training.turn()
        return torch.cuda.max_memory_allocated() / 2**20 if setting.device == "cuda" else peak_mib()


def _peak(config: BenchStep, role: Role, cache: Path) -> float:
    options = ["--role", role, "--cache", str(cache), *(["--gpu"] if config.gpu else [])]
    if config.batch_rows is not None:
        options += ["--batch-rows", str(config.batch_rows)]
    if config.threads is not None:
        options += ["--threads", str(config.threads)]
    command = [sys.executable, "-m", "tailcache.scripts.bench_step", *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak = float(output.rsplit("peak_mib", 1)[1])
    print(f"peak memory of {role}: {peak:.0f} MiB", flush=True)
    return peak


if __name__ == "__main__":
    main()
