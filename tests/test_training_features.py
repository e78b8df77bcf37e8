"""What ``Trainer`` offers, through settings and through arguments of one's own: schedules, trackers, the hub."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from places import cache_folder
from training_fixtures import LLAMA, make_cache, objective_for, tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from tailcache.storage.errors import ConfigError, MismatchError, StorageError
from tailcache.storage.reader import Teacher
from tailcache.trainers.arguments import _accumulation, training_arguments
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.distill import DistillTrainer
from tailcache.trainers.run import train

TINY = StudentConfig(hidden_size=16, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return make_cache(tmp_path_factory.mktemp("features") / "cache")


def _config(teacher: Teacher, out: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"student": TINY, "batch_rows": 6, "max_steps": 8, "eval_every": 0, "log_every": 1}
    defaults |= {"learning_rate": 1e-2, "warmup": 0.0, "device": "cpu"}
    return TrainConfig(cache=cache_folder(teacher.corpus), out=out, **{**defaults, **settings})


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- learning rate and optimizer ----

# Share of the peak at step s of 8, without warm-up, by the definition of each.
RATES: dict[str, tuple[dict[str, Any], Any]] = {
    "cosine": ({}, lambda s: (1 + math.cos(math.pi * s / 8)) / 2),
    "linear": ({}, lambda s: 1 - s / 8),
    "constant": ({}, lambda s: 1.0),
    "cosine_with_restarts": ({"num_cycles": 2}, lambda s: (1 + math.cos(math.pi * (s % 4) / 4)) / 2),
    "polynomial": ({"power": 2.0, "lr_end": 0.0}, lambda s: (1 - s / 8) ** 2),
    "cosine_with_min_lr": ({"min_lr_rate": 0.25}, lambda s: 0.25 + 0.75 * (1 + math.cos(math.pi * s / 8)) / 2),
    "warmup_stable_decay": (
        {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.0},
        lambda s: min(1.0, 1 - (s - 4) / 4),
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_takes_the_course_that_was_asked_for(teacher: Teacher, name: str, tmp_path: Path) -> None:
    arguments, share = RATES[name]
    config = _config(teacher, tmp_path, schedule=name, schedule_arguments=json.dumps(arguments) if arguments else None)
    train(config)
    rates = [line["learning_rate"] for line in _lines(tmp_path / "training.jsonl")]
    assert rates == pytest.approx([1e-2 * share(step) for step in range(8)], rel=1e-6, abs=1e-12)


def test_schedules_and_optimizers_that_cannot_be_made_are_refused_first(teacher: Teacher, tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            train(_config(teacher, tmp_path / "out", **settings))

    refused(r"schedule_arguments: expected JSON text", schedule_arguments="{")
    refused(r"schedule_arguments: expected a JSON object, found list", schedule_arguments="[1]")
    refused(r"schedule_arguments: .*'cosine' cannot be made with .*power", schedule_arguments='{"power": 2}')
    refused(r"schedule_arguments: .*'warmup_stable_decay' cannot be made with no", schedule="warmup_stable_decay")
    refused(r"schedule_arguments: constant takes none", schedule="constant", schedule_arguments='{"power": 2}')
    refused(r"optimizer: expected one of adamw_torch, .*; found 'adam'", optimizer="adam")
    refused(r"adam_betas: expected two numbers", adam_betas=(0.9, 1.0))
    refused(r"batch_rows: .* set batch_rows to 1, 2, 4 or 8", rows_per_step=8)
    assert not (tmp_path / "out").exists()


def test_what_the_optimizer_is_told(teacher: Teacher, tmp_path: Path) -> None:
    config = _config(teacher, tmp_path, adam_betas=(0.8, 0.95), adam_epsilon=1e-6, max_steps=1, rows_per_step=12)
    trainer: Any = train(config)
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
    assert trainer.args.gradient_accumulation_steps == 2
    assert json.loads((tmp_path / "tailcache.json").read_text())["rows_per_step"] == 12
    other: Any = train(_config(teacher, tmp_path / "other", optimizer="adafactor", max_steps=1))
    assert "Adafactor" in type(other.optimizer.optimizer).__name__


def test_gradient_checkpointing_is_a_setting_that_changes_no_number(teacher: Teacher, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "gradient_accumulation": 2, "batch_rows": 3}
    train(_config(teacher, tmp_path / "plain", **settings))
    trainer = train(_config(teacher, tmp_path / "again", **settings, gradient_checkpointing=True))
    assert trainer is not None
    assert trainer.args.gradient_checkpointing
    for one, other in zip(*(_lines(tmp_path / name / "training.jsonl") for name in ("plain", "again")), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


# ---- trackers ----


def test_tensorboard_has_every_curve(teacher: Teacher, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(_config(teacher, tmp_path, report_to=("tensorboard",), eval_every=4, run_name="first"))
    assert list((tmp_path / "runs").iterdir())
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    curves = {"train/loss": ("training.jsonl", "loss"), "train/clm": ("training.jsonl", "clm")}
    curves |= {"eval/kl": ("metrics.jsonl", "kl"), "eval/cross_entropy": ("metrics.jsonl", "cross_entropy")}
    for tag, (file, name) in curves.items():
        expected = {line["step"]: line[name] for line in _lines(tmp_path / file)}
        found = {each.step: each.value for each in events.Scalars(tag)}
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_tracker_that_is_not_installed_is_refused_first(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report_to: expected the package of trackio.*pip install trackio"):
        training_arguments(_config(teacher, tmp_path / "out", report_to=("trackio",)))


# ---- the hub ----


class Hub:
    """Stands in for the hub: remembers what it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, role: str = "write") -> None:
        self.made: list[tuple[str, bool]] = []
        self.pushed: list[set[str]] = []
        self.fails = False
        monkeypatch.setattr(HfApi, "whoami", lambda api: {"auth": {"accessToken": {"role": role}}})
        monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **settings: self._make(name, **settings))
        monkeypatch.setattr(HfApi, "upload_folder", lambda api, **settings: self._push(**settings))

    def _make(self, name: str, *, private: bool, exist_ok: bool, **_: Any) -> Any:
        assert exist_ok
        self.made.append((name, private))
        return type("Url", (), {"repo_id": f"me/{name}"})()

    def _push(self, *, folder_path: str, repo_id: str, ignore_patterns: list[str] | None = None, **_: Any) -> Any:
        if self.fails:
            raise ConnectionError("the line is dead")
        assert repo_id == "me/student"
        self.pushed.append({path.name for path in Path(folder_path).iterdir() if path.is_file()})
        return type("Done", (), {"done": lambda self: True, "result": lambda self: None})()


def test_the_student_is_pushed_when_it_is_whole(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the corpus' tokenizer and the record beside the weights, and no pickle."""
    hub = Hub(monkeypatch)
    train(_config(teacher, tmp_path, hub_model_id="student", max_steps=1))
    assert set(hub.made) == {("student", True)}
    [files] = hub.pushed
    assert {"model.safetensors", "config.json", "tokenizer.json", "tailcache.json", "README.md"} <= files
    assert "training_args.bin" not in files
    train(_config(teacher, tmp_path / "b", hub_model_id="student", hub_private=False, max_steps=1))
    assert hub.made[-1] == ("student", False)


def test_checkpoints_are_pushed_where_that_is_asked_for(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    settings: dict[str, Any] = {"hub_model_id": "student", "hub_strategy": "every_save", "max_steps": 4}
    train(_config(teacher, tmp_path, **settings, save_every=2))
    assert len(hub.pushed) == 3  # at steps 2 and 4, and at the end
    assert "model.safetensors" in hub.pushed[0]
    with pytest.raises(ConfigError, match="hub_strategy: every_save pushes with every checkpoint and none is kept"):
        _config(teacher, tmp_path / "b", **settings)
    with pytest.raises(ConfigError, match="hub_strategy: expected a repository to push to"):
        _config(teacher, tmp_path / "b", hub_strategy="every_save", save_every=2)


def test_a_token_that_cannot_push_is_found_out_before_training(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(api: HfApi) -> Any:
        raise LocalTokenNotFoundError("no token found")

    def offline(api: HfApi) -> Any:
        raise OfflineModeIsEnabled("offline mode is enabled")

    Hub(monkeypatch, role="read")
    with pytest.raises(ConfigError, match="hub_model_id: expected a token that may write to student, found one that"):
        train(_config(teacher, tmp_path / "out", hub_model_id="student"))
    monkeypatch.setattr(HfApi, "whoami", none)
    with pytest.raises(ConfigError, match=r"cannot push to student: no token found. Log in with `hf auth login`"):
        train(_config(teacher, tmp_path / "out", hub_model_id="student"))
    monkeypatch.setattr(HfApi, "whoami", offline)
    with pytest.raises(ConfigError, match=r"hub_model_id: cannot push to student: .*offline mode is enabled"):
        train(_config(teacher, tmp_path / "out", hub_model_id="student"))
    assert not (tmp_path / "out").exists()


def test_a_student_that_cannot_be_pushed_is_saved_all_the_same(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    hub.fails = True
    with pytest.raises(StorageError, match=r"is saved in .*the line is dead\. Push it with `hf upload student "):
        train(_config(teacher, tmp_path, hub_model_id="student", max_steps=1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 21
    assert json.loads((tmp_path / "tailcache.json").read_text())["step"] == 1


# ---- arguments of one's own ----


class _Count(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def test_trainer_as_it_is(teacher: Teacher, tmp_path: Path) -> None:
    """One's own arguments, optimizer, schedule by metric, callbacks, best checkpoint; resumed by Trainer's own word."""
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "threshold": 10.0},  # nothing is ever good enough
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "kl",
        "greater_is_better": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": True,
        "report_to": "none",
        "remove_unused_columns": False,
    }

    def trainer(model: Any, **changed: Any) -> Any:
        count = _Count()
        made = DistillTrainer(
            model,
            TrainingArguments(**{**settings, **changed}),
            teacher=teacher,
            objective=objective_for(teacher, "tad"),
            callbacks=[count],
        )
        return made, count

    model = tiny_model(21, seed=5, **LLAMA)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    first, count = trainer(model, max_steps=4)
    first.optimizer = optimizer
    first.train()
    assert count.steps == 4
    assert first.optimizer.optimizer is optimizer
    kls = {line["step"]: line["kl"] for line in _lines(tmp_path / "metrics.jsonl")}
    assert first.state.best_metric == pytest.approx(min(kls.values()))
    assert first.evaluate()["eval_kl"] == pytest.approx(min(kls.values()), rel=1e-6)
    assert [line["learning_rate"] for line in first.state.log_history if "learning_rate" in line][-1] < 1e-2
    again, count = trainer(tiny_model(21, seed=6, **LLAMA), max_steps=6, load_best_model_at_end=False)
    again.optimizer = torch.optim.SGD(again.model.parameters(), lr=1e-2)
    again.train(resume_from_checkpoint=True)
    assert (count.steps, again.state.global_step) == (2, 6)


def test_checkpoints_from_before_a_setting_existed_are_continued(teacher: Teacher, tmp_path: Path) -> None:
    """What a record does not say is what is now the default, and nothing else."""
    settings: dict[str, Any] = {"save_every": 1, "schedule": "constant"}
    train(_config(teacher, tmp_path, **settings, max_steps=1))
    (tmp_path / "tailcache.json").unlink()
    path = tmp_path / "checkpoint-1" / "tailcache.json"
    record = json.loads(path.read_text())
    for name in ("adam_betas", "optimizer", "schedule_arguments"):
        del record["config"][name]
    del record["config"]["student"]["lora_rank"]
    path.write_text(json.dumps(record))
    with pytest.raises(MismatchError, match=r"optimizer: the checkpoint has adamw_torch, this run adafactor"):
        train(_config(teacher, tmp_path, **settings, max_steps=2, resume=True, optimizer="adafactor"))
    trainer = train(_config(teacher, tmp_path, **settings, max_steps=2, resume=True))
    assert trainer is not None
    assert trainer.state.global_step == 2


def test_rows_that_processes_cannot_share_are_refused_with_numbers_that_fit(teacher: Teacher, tmp_path: Path) -> None:
    config = _config(teacher, tmp_path, batch_rows=2, rows_per_step=12)
    assert [_accumulation(config, processes) for processes in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"shared out evenly among 5 processes; start 1, 2, 3, 4 or 6"):
        _accumulation(config, 5)
    with pytest.raises(ConfigError, match=r"3 rows to each of 4 processes, .*; set batch_rows to 1 or 3"):
        _accumulation(config, 4)
