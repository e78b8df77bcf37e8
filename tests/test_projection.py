"""Hidden states of different widths: a projection that is trained, resumed exactly, and not in the student."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from children import run_group
from distributed_cases import TESTS, config_of
from safetensors.torch import load_file
from tokenizer_fixtures import build_tokenizer
from torch import nn
from training_fixtures import make_corpus, tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

from tailcache.pipeline.capture import capture
from tailcache.pipeline.config import CaptureConfig
from tailcache.storage.errors import CorruptError
from tailcache.storage.reader import Teacher, open_cache
from tailcache.trainers.batches import CacheRows, collate
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.distill import DistillTrainer, training_arguments
from tailcache.trainers.hidden_cosine import hidden_cosine
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.objective import Objective
from tailcache.trainers.projection import (
    PROJECTION_FILE,
    attach_projection,
    load_projection,
    project,
    save_projection,
    without_projection,
)
from tailcache.trainers.run import train

D, E = 24, 32  # student, teacher
KEY = "hidden_projection.weight"
NARROW = StudentConfig(hidden_size=D, num_layers=1, num_heads=2)
LOSSES = (LossConfig(name="hidden_cosine", weight=2.0), LossConfig(name="kd"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("projection")
    tokenizer = build_tokenizer("wordlevel")
    make_corpus(folder / "cache", tokenizer)
    tiny_model(21).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings: dict[str, Any] = {"name": "teacher", "hidden": "bf16", "top_k": 12, "num_samples": 4, "device": "cpu"}
    capture(CaptureConfig(cache=folder / "cache", teacher=str(folder / "model"), **settings), show_progress=False)
    return open_cache(folder / "cache").teacher("teacher")


def _config(teacher: Teacher, out: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "student": NARROW,
        "losses": LOSSES,
        "learning_rate": 1e-2,
        "batch_rows": 6,
        "max_steps": 6,
        "warmup": 0.0,
        "eval_every": 0,
        "log_every": 1,
        "device": "cpu",
    }
    return TrainConfig(cache=str(teacher.corpus.cache_place), out=out, **{**defaults, **settings})


def _trainer(teacher: Teacher, out: Path, model: nn.Module, **settings: Any) -> Any:
    objective = Objective.of(0.5, LOSSES, teacher)
    student: Any = model
    args = training_arguments(_config(teacher, out, **settings))
    return DistillTrainer(student, args, teacher=teacher, objective=objective)


def _rows(teacher: Teacher, num: int) -> list[Any]:
    dataset = CacheRows(teacher, np.arange(num), optional=("hidden",))
    return [dataset[i] for i in range(num)]


def _narrow(seed: int = 5) -> Any:
    return tiny_model(
        21, seed=seed, hidden_size=D, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip


def test_its_start_depends_on_the_seed_alone() -> None:
    made = []
    for seed, noise in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(noise)
        expected = torch.rand(1)
        torch.manual_seed(noise)
        made.append(attach_projection(nn.Sequential(nn.Linear(2, 2)), D, E, seed=seed).weight)
        torch.manual_seed(noise)
        assert torch.equal(torch.rand(1), expected)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert made[0].shape == (E, D)
    # Lengths are kept on average: E entries of variance 1 / E.
    assert made[0].square().sum().item() == pytest.approx(D, rel=0.15)


def test_the_product_is_float32_under_autocast_and_the_loss_is_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, target = (torch.randn(shape, generator=generator) for shape in ((3, D), (E, D), (3, E)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hidden_cosine(project(hidden.bfloat16(), weight), target)
    assert found.dtype == torch.float32
    for t in range(3):
        row = hidden.bfloat16().double()[t]
        projected = [math.fsum((weight[e].double() * row).tolist()) for e in range(E)]
        assert found[t].item() == pytest.approx(reference.cosine_loss(projected, target[t].tolist())[0], abs=1e-5)


def test_the_gradient_reaches_it_and_is_the_same_in_micro_batches(teacher: Teacher, tmp_path: Path) -> None:
    trainer = _trainer(teacher, tmp_path, _narrow())
    rows = _rows(teacher, 6)

    def gradients(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        samples, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = len(samples)
        for batch in samples:
            trainer.training_step(trainer.model, batch, count)
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    whole, cut = gradients([collate(rows)]), gradients([collate(rows[:1]), collate(rows[1:4]), collate(rows[4:])])
    assert whole[KEY].norm() > 1e-4
    for name, gradient in whole.items():
        assert (cut[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name
    trainer.create_optimizer()
    assert any(p is trainer.projection.weight for group in trainer.optimizer.param_groups for p in group["params"])


def test_its_gradient_is_that_of_the_formula(teacher: Teacher, tmp_path: Path) -> None:
    """Against the central difference of the loss in one random direction."""
    trainer = _trainer(teacher, tmp_path, _narrow().double())
    trainer.projection.double()
    batch = trainer._prepare_inputs(collate(_rows(teacher, 2)))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    weight = trainer.projection.weight
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    slope = float((weight.grad * direction).sum())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * 1e-3 * direction)
            values.append(float(trainer.compute_loss(trainer.model, batch)))
            weight.sub_(sign * 1e-3 * direction)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-3)


@pytest.mark.slow
def test_a_run_learns_it_and_saves_a_student_without_it(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    trainer = train(_config(teacher, out, max_steps=16, save_every=16))
    assert trainer is not None
    assert "a learned projection from the student's width, 24, to the teacher's, 32" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert lines[-1]["hidden_cosine"] < 0.85 * lines[0]["hidden_cosine"]
    saved = load_file(out / "model.safetensors")
    assert not any("hidden_projection" in name for name in saved)
    assert not (out / PROJECTION_FILE).exists()
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, info = load(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    trained = without_projection(trainer._student.state_dict())
    assert all(torch.equal(trained[name], value) for name, value in loaded.state_dict().items())
    record = json.loads((out / "tailcache.json").read_text())
    assert record["student"]["num_parameters"] == loaded.num_parameters()
    checkpoint = out / "checkpoint-16"
    assert not any("hidden_projection" in name for name in load_file(checkpoint / "model.safetensors"))
    assert trainer.projection is not None
    assert torch.equal(load_file(checkpoint / PROJECTION_FILE)["weight"], trainer.projection.weight)


class _Killed(Exception):
    pass


class _KillAt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise _Killed


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_projection_and_weights(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(_config(teacher, tmp_path / "whole"))
    make: Any = DistillTrainer
    with monkeypatch.context() as patch:
        patch.setattr("tailcache.trainers.run.DistillTrainer", partial(make, callbacks=[_KillAt()]))
        with pytest.raises(_Killed):
            train(_config(teacher, tmp_path / "killed", save_every=3))
    resumed = train(_config(teacher, tmp_path / "killed", save_every=3, resume=True))
    assert whole is not None
    assert resumed is not None
    expected, found = whole._student.state_dict(), resumed._student.state_dict()
    assert KEY in expected
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], value) for name, value in found.items())


BOTH = """
import json, sys
sys.path.append(sys.argv[1])
from distributed_cases import config_of
from tailcache.trainers.run import train
for settings in json.load(open(sys.argv[2])):
    train(config_of(settings))
"""


@pytest.mark.slow
def test_two_processes_train_it_as_one_does(teacher: Teacher, tmp_path: Path) -> None:
    """DDP from the first step on; FSDP2 from a checkpoint of one process on."""
    shared = {
        "cache": str(teacher.corpus.cache_place),
        "student": {"hidden_size": D, "num_layers": 1, "num_heads": 2},
        "loss": "hidden_cosine",
        "learning_rate": 1e-2,
        "warmup": 0.0,
        "max_steps": 4,
        "save_every": 2,
        "eval_every": 0,
        "log_every": 1,
        "device": "cpu",
    }
    train(config_of({**shared, "out": str(tmp_path / "one"), "batch_rows": 8}))
    shutil.copytree(tmp_path / "one" / "checkpoint-2", tmp_path / "fsdp" / "checkpoint-2")
    two = {**shared, "batch_rows": 2, "rows_per_step": 8}
    cases: list[dict[str, Any]] = [
        {**two, "out": str(tmp_path / "ddp")},
        {**two, "out": str(tmp_path / "fsdp"), "distributed": "fsdp", "resume": True},
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_group(BOTH, TESTS, tmp_path / "cases.json", size=2)

    def curve(name: str) -> list[tuple[float, float]]:
        lines = [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        return [(line["divergence"], line["grad_norm"]) for line in lines]

    def projection(name: str) -> torch.Tensor:
        return load_file(tmp_path / name / "checkpoint-4" / PROJECTION_FILE)["weight"]

    assert len(curve("one")) == 4
    start = attach_projection(nn.Sequential(nn.Linear(2, 2)), D, E, seed=0).weight
    assert (projection("one") - start).abs().max() > 1e-2
    for name, since in (("ddp", 0), ("fsdp", 2)):
        for found, expected in zip(curve(name), curve("one")[since:], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        assert (projection(name) - projection("one")).abs().max() < 1e-4
        load: Any = AutoModelForCausalLM.from_pretrained
        _, info = load(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


def test_a_checkpoint_without_it_or_of_another_width_is_refused(tmp_path: Path) -> None:
    layer = attach_projection(nn.Sequential(nn.Linear(2, 2)), D, E, seed=0)
    with pytest.raises(CorruptError, match=r"hidden_projection.safetensors: expected the projection of hidden states"):
        load_projection(layer, tmp_path)
    save_projection(attach_projection(nn.Sequential(nn.Linear(2, 2)), 3, E, seed=0), tmp_path)
    with pytest.raises(CorruptError, match=r"expected a matrix \[32, 24\], found \[32, 3\]"):
        load_projection(layer, tmp_path)


def test_a_student_of_the_teachers_width_has_none(teacher: Teacher, tmp_path: Path) -> None:
    assert _trainer(teacher, tmp_path, tiny_model(21, seed=5)).projection is None
