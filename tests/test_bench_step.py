"""bench_step measures all three trainings, in turns of whole epochs, and a missed bar is an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_fixtures import tiny_model
from training_fixtures import one_thread

from tailcache.pipeline.teacher import Teacher
from tailcache.scripts import bench_step
from tailcache.scripts.bench_reader import synthetic_cache
from tailcache.scripts.bench_step import BenchStep, Setting, bench

VOCAB_SIZE, ROW = 600, 63


def _load(vocab_size: int) -> Teacher:
    return Teacher(tiny_model(vocab_size=vocab_size), vocab_size=vocab_size)


def _make(config: BenchStep, cache: Path) -> None:
    sizes = {"positions": 12 * ROW, "row_positions": ROW, "vocab_size": VOCAB_SIZE}
    synthetic_cache(cache, top_k=config.top_k, num_samples=config.num_samples, **sizes)


SETTING = Setting(
    student={
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    device="cpu",
    precision="fp32",
    positions=12 * ROW,
    batch_rows=2,
    limit=1e9,
    load=_load,
    make_cache=_make,
)
SMALL: dict[str, Any] = {"rounds": 2, "online_steps": 2, "top_k": 12, "num_samples": 8}


@pytest.mark.slow
def test_every_training_is_measured_and_a_missed_bar_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_step, "MAX_WAITING", 1.0)
    file = tmp_path / "step.json"
    with one_thread():
        bench(BenchStep(memory=False, json=file, check=True, **SMALL), SETTING)
        record = json.loads(file.read_text())
        with pytest.raises(SystemExit) as stopped:
            bench(BenchStep(memory=False, check=True, **SMALL), replace(SETTING, limit=0.0))
    assert stopped.value.code == 1
    assert "missed step from the cache / cross-entropy alone" in capsys.readouterr().err
    figures = record["figures"]
    assert figures["steps"] == {"clm": 6, "cache": 6, "online": 2}
    assert figures["positions_per_step"] == 2 * ROW
    assert figures["student_parameters"] == VOCAB_SIZE * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    step = figures["step_s"]
    assert all(0 < step[role]["min"] <= step[role]["median"] for role in bench_step.ROLES)
    assert figures["cache_over_clm"]["min"] >= step["cache"]["min"] / step["clm"]["max"]
    assert figures["clm_and_teacher_over_clm"]["median"] > 1
    assert all(0 <= share["median"] < 1 for share in figures["waited"].values())
    assert figures["cache_over_clm_in_processor_time"]["min"] > 0
    assert [bar["met"] for bar in record["bars"]] == [True, True]


def test_only_the_cache_is_read_for_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(BenchStep(**SMALL), tmp_path / "cache")
    calls: list[str] = []
    with one_thread():
        for role in bench_step.ROLES:
            teacher = _load(VOCAB_SIZE) if role == "online" else None
            training = bench_step._Training(BenchStep(**SMALL), SETTING, role, tmp_path / "cache", tmp_path, teacher)
            stored = type(training.trainer.teacher).stored

            def counted(self: Any, *args: Any, role: str = role, stored: Any = stored, **kwargs: Any) -> Any:
                calls.append(role)
                return stored(self, *args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(type(training.trainer.teacher), "stored", counted)
                turn = training.turn()
            assert (turn.teacher_s > 0) == (role == "online")
    assert set(calls) == {"cache"}


def test_the_peak_is_taken_after_loading(tmp_path: Path) -> None:
    _make(BenchStep(**SMALL), tmp_path / "cache")
    with one_thread():
        for role in bench_step.ROLES:
            config = BenchStep(role=role, cache=tmp_path / "cache", **SMALL)
            assert 10 < bench_step._peak_here(config, SETTING, role, tmp_path / "cache") < 1e5


def test_the_sizes_of_the_settings() -> None:
    """The student of 10 million parameters, and those of 1.2 and 1.8 billion: by shape, without their weights."""

    def count(sizes: Any, vocab_size: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in bench_step._random(sizes, vocab_size).parameters())

    assert count(bench_step._cpu().student, 49_152) == pytest.approx(10e6, rel=0.05)
    assert count(bench_step._gpu().student, 151_936) == pytest.approx(1.2e9, rel=0.05)
    assert count(bench_step._QWEN_TEACHER, 151_936) == pytest.approx(1.8e9, rel=0.05)
    assert (bench_step._cpu().limit, bench_step._gpu().limit) == (1.10, 1.05)
