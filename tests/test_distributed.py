"""Two real processes over gloo: DDP and FSDP2 train as one process does, and each goes on from the other's checkpoints.

All runs here have steps of 8 rows, of a corpus with 18 to train on: epochs end in a step of 2 rows, which one process
of two gets none of in its second forward. Trajectories are compared to 1e-5; they agree to 2e-7.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import config_of, kill, launch
from places import cache_folder
from training_fixtures import LLAMA, logprobs_of, make_cache, tiny_model, write_teacher
from transformers import AutoModelForCausalLM

from tailcache.storage.errors import ConfigError, CorruptError, MismatchError
from tailcache.storage.reader import Teacher
from tailcache.trainers.checkpoints import kind_of
from tailcache.trainers.run import train

pytestmark = pytest.mark.slow

STEPS, HALF = 5, 2
TIED = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
UNTIED = {**TIED, "tie_embeddings": False}
TWO = {"batch_rows": 2, "rows_per_step": 8}
CURVES = {
    "training.jsonl": ("loss", "clm", "divergence", "grad_norm", "learning_rate", "positions_seen"),
    "metrics.jsonl": ("cross_entropy", "kl", "top1_agreement", "positions", "positions_seen"),
}
WHOLE: dict[str, Any] = {"distributed": "fsdp"}
RS_KD: dict[str, Any] = {"loss": "rs_kd", "student": UNTIED}
BF16: dict[str, Any] = {"precision": "bf16"}
MIXTURE: dict[str, Any] = {"teacher": None, "teachers": ("teacher", "other"), "teacher_weights": (3.0, 1.0)}
SHARDED: dict[str, Any] = {"distributed": "fsdp", "fsdp_checkpoints": "sharded"}

# Runs of one process.
ALONE: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {},
    "adapters": {},
    "frozen": {},
    "bf16": BF16,
    "rs_kd": RS_KD,
    "mixture": MIXTURE,
}

# Runs of two processes from the first step on, and the run of one process that each must equal.
STRAIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp, recompute, checkpointing": ("tied", {"gradient_checkpointing": True, "head_mode": "recompute"}),
    "ddp, rs_kd": ("rs_kd", RS_KD),
    "ddp, two teachers": ("mixture", MIXTURE),
    "fsdp, from accelerate's file": ("tied", {"from_file": True, "batch_rows": 4}),
    "fsdp, recompute, checkpointing": (
        "untied",
        {**SHARDED, "student": UNTIED, "head_mode": "recompute", "gradient_checkpointing": True},
    ),
    "fsdp, bf16": ("bf16", {**WHOLE, **BF16}),
    "fsdp, frozen and tied embeddings": ("frozen", WHOLE),
    "ddp, adapters": ("adapters", {}),
    "fsdp, adapters, checkpointing": ("adapters", {**WHOLE, "gradient_checkpointing": True}),
    "sharded, adapters, checkpointing": ("adapters", {**SHARDED, "gradient_checkpointing": True}),
}
# Runs of two processes that go on from a checkpoint of one process.
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "one to ddp": ("tied", {}),
    "one to fsdp": ("tied", WHOLE),
    "one to sharded": ("untied", {**SHARDED, "student": UNTIED}),
    "one to fsdp, adapters": ("adapters", WHOLE),
}
# Runs of one process that go on from a checkpoint of two.
BACK = [name for name in STRAIGHT if name != "fsdp, bf16"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    made = make_cache(tmp_path_factory.mktemp("distributed") / "cache")
    other = logprobs_of(tiny_model(made.vocab_size, seed=1), made.corpus)
    write_teacher(made.corpus, *other, name="other", top_k=11, num_samples=4)
    return made


class Runs:
    """All the runs of this module in one folder: those of one process, and one launch of two processes."""

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self.folder = folder
        sizes = {**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": True}
        tiny_model(21, seed=5, **sizes).save_pretrained(folder / "checkpoint")
        checkpoint = {"checkpoint": str(folder / "checkpoint")}
        self.students: dict[str, Any] = {
            "adapters": {**checkpoint, "lora_rank": 4},
            "frozen": {**checkpoint, "freeze_embeddings": True},
            "untied": UNTIED,
        }
        self.base: dict[str, Any] = {
            "cache": str(cache_folder(teacher.corpus)),
            "teacher": "teacher",
            "learning_rate": 1e-2,
            "schedule": "linear",
            "warmup": 0.0,
            "max_steps": STEPS,
            "eval_every": STEPS,
            "log_every": 1,
            "save_every": HALF,
            "keep_checkpoints": STEPS,
            "device": "cpu",
        }

    def settings(self, name: str, like: str, **settings: Any) -> dict[str, Any]:
        student = self.students.get(like, TIED)
        return {**self.base, "out": str(self.folder / name), "student": student, **settings}

    def halfway(self, source: str, name: str) -> None:
        """A run that was stopped after a checkpoint and left nothing else behind."""
        shutil.copytree(self.folder / source / f"checkpoint-{HALF}", self.folder / name / f"checkpoint-{HALF}")

    def curve(self, name: str, file: str = "training.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / file).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(teacher, tmp_path_factory.mktemp("runs"))
    for like, settings in ALONE.items():
        train(config_of(runs.settings(like, like, **{"batch_rows": 8, **settings})))
    cases = [runs.settings(name, like, **{**TWO, **settings}) for name, (like, settings) in STRAIGHT.items()]
    for name, (like, settings) in RESUMED.items():
        runs.halfway(like, name)
        cases.append(runs.settings(name, like, **{**TWO, **settings}, resume=True))
    # The last one never ends: it is killed.
    cases.append(runs.settings("killed", "tied", **TWO, schedule="constant", max_steps=10_000, eval_every=0))
    process = launch(cases, runs.folder)
    try:
        deadline = time.monotonic() + 300
        while not (runs.folder / "killed" / "checkpoint-4" / "tailcache.json").is_file():
            assert process.poll() is None, (runs.folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (runs.folder / "log").read_text()[-3000:]
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            kill(runs.folder)
        process.wait(60)
    return runs


def _equal(runs: Runs, name: str, like: str, *, rel: float = 1e-5, since: int = 0) -> None:
    """The curves of a run are those of another one from a step on."""
    for file, fields in CURVES.items():
        one = [line for line in runs.curve(like, file) if line["step"] > since]
        other = [line for line in runs.curve(name, file) if line["step"] > since]
        assert [line["step"] for line in other] == [line["step"] for line in one]
        for a, b in zip(one, other, strict=True):
            assert [b[each] for each in fields] == pytest.approx([a[each] for each in fields], rel=rel)


@pytest.mark.parametrize("name", STRAIGHT)
def test_two_processes_train_as_one(runs: Runs, name: str) -> None:
    like, settings = STRAIGHT[name]
    if "bf16" in name:
        # Gathered weights are rounded to 16 bits, those of norms too, which autocast alone leaves as they are.
        for one, two in zip(runs.curve(like), runs.curve(name), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-2)
            assert float(torch.tensor(two["loss"]).bfloat16()) != two["loss"]  # the loss itself is not
    else:
        _equal(runs, name, like)
    record = json.loads((runs.folder / name / "tailcache.json").read_text())
    assert record["rows_per_step"] == 8
    expected = settings.get("fsdp_checkpoints", "whole") if "distributed" in settings else "plain"
    expected = "sharded" if "from_file" in settings else expected
    assert kind_of(runs.folder / name / f"checkpoint-{HALF}") == expected


@pytest.mark.parametrize("name", STRAIGHT)
def test_what_two_processes_save_is_a_plain_checkpoint(runs: Runs, name: str) -> None:
    one, two = (
        AutoModelForCausalLM.from_pretrained(runs.folder / folder).state_dict() for folder in (STRAIGHT[name][0], name)
    )
    assert one.keys() == two.keys()
    for weight in one:
        # Adam divides by the root of a mean square: where that is near 0 it magnifies what gradients differ by.
        torch.testing.assert_close(two[weight], one[weight], rtol=1e-3, atol=1e-1 if "bf16" in name else 1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_go_on_from_one(runs: Runs, name: str) -> None:
    _equal(runs, name, RESUMED[name][0], since=HALF)


@pytest.mark.parametrize("name", BACK)
def test_one_process_goes_on_from_two(runs: Runs, name: str) -> None:
    """Weights, the optimizer's state, the schedule and the place in the data, from every kind of checkpoint."""
    like = STRAIGHT[name][0]
    runs.halfway(name, f"back from {name}")
    own = {"batch_rows": 4, "rows_per_step": 8, "resume": True, **ALONE[like]}
    train(config_of(runs.settings(f"back from {name}", like, **own)))
    _equal(runs, f"back from {name}", like, since=HALF)


def test_processes_that_are_killed_are_continued_by_one(runs: Runs) -> None:
    """SIGKILL to both in the middle of a step: the curve goes on from the last checkpoint as if nothing had been."""
    done = max(int(path.name.split("-")[1]) for path in (runs.folder / "killed").glob("checkpoint-*"))
    settings = {"schedule": "constant", "max_steps": done + 3, "eval_every": 0, "rows_per_step": 8}
    train(config_of(runs.settings("killed", "tied", **settings, batch_rows=4, resume=True)))
    train(config_of(runs.settings("not killed", "tied", **{**settings, "save_every": None}, batch_rows=8)))
    _equal(runs, "killed", "not killed")


def test_another_number_of_rows_per_step_is_refused_and_the_way_out_said(runs: Runs) -> None:
    for name in ("few", "wrong"):
        runs.halfway("ddp, recompute, checkpointing", name)
    with pytest.raises(MismatchError, match=r"8, this run 2; keep them with --rows-per-step 8.* \(1, 2, 4, 8\)"):
        train(config_of(runs.settings("few", "tied", batch_rows=2, resume=True)))
    with pytest.raises(ConfigError, match=r"gives 8 rows to each of 1 processes.*set batch_rows to 1, 2, 4 or 8"):
        train(config_of(runs.settings("few", "tied", batch_rows=3, rows_per_step=8, resume=True)))
    with pytest.raises(ConfigError, match="rows_per_step: it decides gradient_accumulation"):
        config_of(runs.settings("few", "tied", rows_per_step=8, gradient_accumulation=2))
    (runs.folder / "wrong" / f"checkpoint-{HALF}" / "model.safetensors").unlink()
    (runs.folder / "wrong" / f"checkpoint-{HALF}" / "pytorch_model_fsdp.bin").touch()
    with pytest.raises(CorruptError, match=r"expected the weights of a checkpoint, found no model\.safetensors"):
        train(config_of(runs.settings("wrong", "tied", batch_rows=8, resume=True)))
