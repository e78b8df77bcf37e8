"""Sweep files: which runs they mean, and how mistakes in them are answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailcache.scripts.cli import main
from tailcache.scripts.sweep_file import load_sweep, sweep_runs
from tailcache.scripts.train import TrainCommand
from tailcache.storage.errors import ConfigError
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.sweep import SweepRun

BASE = "base: {cache: c, out: o, learning_rate: 1e-3, student: {hidden_size: 64, num_layers: 2}}\n"


def _runs(tmp_path: Path, text: str, **base: Any) -> list[SweepRun]:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    file = load_sweep(path)
    values = {"cache": "c", "out": Path("o"), **base}
    student = StudentConfig(hidden_size=64, num_layers=2)
    return sweep_runs(file, TrainConfig(**{"student": student, "learning_rate": 1e-3, **values}))


def test_methods_and_seeds(tmp_path: Path) -> None:
    runs = _runs(tmp_path, "runs:\n  CLM: {loss: clm}\n  KD, bucket: {loss: kd, tail: bucket}\nseeds: [3, 1]\n")
    assert [run.name for run in runs] == ["CLM/seed-3", "CLM/seed-1", "KD, bucket/seed-3", "KD, bucket/seed-1"]
    assert [run.row for run in runs] == ["CLM", "CLM", "KD, bucket", "KD, bucket"]
    student = StudentConfig(hidden_size=64, num_layers=2)
    out = Path("o/KD, bucket/seed-1")
    assert runs[3].config == TrainConfig(
        cache="c", out=out, learning_rate=1e-3, student=student, loss="kd", tail="bucket", seed=1
    )


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    text = "grid:\n  loss: tad\n  top_k: [1, 5]\n  beta: [0.5, 2]\n"
    runs = _runs(tmp_path, text)
    assert [run.row for run in runs] == [
        "tad-top_k=1-beta=0.5",
        "tad-top_k=1-beta=2",
        "tad-top_k=5-beta=0.5",
        "tad-top_k=5-beta=2",
    ]
    assert [(run.config.loss, run.config.top_k, run.config.beta) for run in runs] == [
        ("tad", 1, 0.5),
        ("tad", 1, 2.0),
        ("tad", 5, 0.5),
        ("tad", 5, 2.0),
    ]


def test_named_values_dotted_names_and_several_grids(tmp_path: Path) -> None:
    text = """
grid:
  - student: {small: {hidden-size: 32}, deep: {num_layers: 6}}
    loss: [kd, clm]
  - student.hidden_size: [128]
    seeds: [5, 6]
runs:
  pair: {losses: [{name: kd}, {name: tad, top_k: 2}]}
"""
    runs = _runs(tmp_path, text)
    assert [run.name for run in runs] == [
        "pair/seed-0",
        "small-kd/seed-0",
        "small-clm/seed-0",
        "deep-kd/seed-0",
        "deep-clm/seed-0",
        "hidden_size=128/seed-5",
        "hidden_size=128/seed-6",
    ]
    assert [each.name for each in runs[0].config.losses] == ["kd", "tad"]
    small, deep, wide = runs[1].config.student, runs[3].config.student, runs[5].config.student
    assert (small.hidden_size, small.num_layers) == (32, 2)  # groups are merged with the base's
    assert (deep.hidden_size, deep.num_layers) == (64, 6)
    assert (wide.hidden_size, runs[5].config.seed) == (128, 5)


def test_null_takes_a_setting_back(tmp_path: Path) -> None:
    text = "runs:\n  other: {student: {checkpoint: x/y, hidden_size: null, num_layers: null}}\n"
    [run] = _runs(tmp_path, text)
    assert run.config.student == StudentConfig(checkpoint="x/y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bsae: {}\n", "expected base, runs, grid, seeds, found 'bsae'; did you mean base?"),
        ("learning_rate: 1\nruns: {a: {}}", "settings that all runs share belong under base:"),
        ("base: {learning_rat: 1}\nruns: {a: {}}", "base: there is no setting 'learning_rat'; did you mean learning_"),
        ("runs:\n  a: {topk: 5}\n", "runs, a: there is no setting 'topk'; did you mean top_k?"),
        ("runs:\n  a: {student.hiden_size: 5}\n", "runs, a, student: there is no setting 'hiden_size'; did you mean"),
        ("runs:\n  a: {top_k: five}\n", "runs, a, top_k: expected int | None, found 'five'"),
        ("runs:\n  a: {loss: tda}\n", "runs, a, loss: expected"),
        ("runs:\n  a: {loss: kd, beta: 5}\n", "runs, a, beta: belongs to tad, and the loss is 'kd'; drop it"),
        ("runs:\n  a: {student: {num_layers: 0}}\n", "runs, a, student.num_layers: expected a positive number"),
        ("runs:\n  a: {out: x}\n", "runs, a: out cannot differ between runs"),
        ("runs:\n  a: {seed: 3}\nseeds: [1]\n", "runs, a: seed is given by seeds:; drop one"),
        ("runs:\n  a/b: {}\n", "runs, a/b: 'a/b' is to be the name of a folder"),
        ("runs:\n  .a: {}\n", "no dot first"),
        ("runs:\n  a: {}\n  A: {}\n", "there are several methods of that name"),
        ("runs:\n  a: {}\n  a: {}\n", "line 2: a is given twice"),
        ("runs: [a]\n", "runs: expected methods by name"),
        ("runs: {}\n", "expected methods under runs: or grid:, found neither"),
        ("grid: {}\n", "grid: expected settings with lists of values"),
        ("grid: {top_k: []}\n", "grid, top_k: expected at least one value"),
        ("grid: {topk: [1]}\n", "grid, topk: there is no setting 'topk'; did you mean top_k?"),
        ("grid: {beta: 2}\n", "expected a list of values somewhere"),
        ("grid: {student: [{num_layers: 1}]}\n", "give groups and lists names (name: value)"),
        ("grid: {teacher: [org/a, org/b]}\n", "'org/a' cannot be part of a folder's name; write it as name: org/a"),
        ("grid: {loss: [kd, clm], beta: [1]}\n", "grid, kd-beta=1, beta: belongs to tad"),
        ("grid: {top_k: [1], seeds: [1]}\nseeds: [2]\n", "seeds are given twice"),
        ("runs: {a: {}}\nseeds: 3\n", "seeds: expected a list of different whole numbers such as [0, 1, 2], found 3"),
        ("runs: {a: {}}\nseeds: [1, 1]\n", "seeds: expected a list of different whole numbers"),
    ],
    ids=range(27),
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _runs(tmp_path, text)
    assert str(caught.value).startswith(f"--sweep {tmp_path / 'sweep.yaml'}")
    assert message in str(caught.value)


def test_flags_are_stronger_than_the_base_and_weaker_than_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(BASE + "runs:\n  a: {}\n  b: {learning_rate: 3e-3}\n")
    seen: list[TrainCommand] = []
    monkeypatch.setattr("tailcache.scripts.train.run", seen.append)
    arguments = ["--sweep", str(path), "--learning-rate", "2e-3", "--parallel", "2", "--student.num-layers", "5"]
    assert main(["train", *arguments, "--out", "elsewhere"]) == 0
    [command] = seen
    assert command.sweep == path
    assert command.parallel == 2
    first, second = sweep_runs(load_sweep(path), command.shared)
    assert (first.config.learning_rate, second.config.learning_rate) == (2e-3, 3e-3)
    assert first.config.out == Path("elsewhere/a/seed-0")
    assert first.config.student == StudentConfig(hidden_size=64, num_layers=5)
    assert type(first.config) is TrainConfig


def test_a_sweep_may_be_named_in_a_file_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(BASE + "runs:\n  a: {}\n")
    settings = tmp_path / "run.yaml"
    settings.write_text(f"train: {{sweep: {path}, weight-decay: 0.3, learning_rate: 5}}\n")
    seen: list[TrainCommand] = []
    monkeypatch.setattr("tailcache.scripts.train.run", seen.append)
    assert main(["train", "--config", str(settings)]) == 0
    assert seen[0].sweep == path
    assert (seen[0].weight_decay, seen[0].learning_rate) == (0.3, 1e-3)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (BASE + "runs: {a: {topk: 1}}", [], "there is no setting 'topk'; did you mean top_k?"),
        (BASE + "runs: {a: {loss: kd}}", ["--beta", "3", "--loss", "tad"], "runs, a, beta: belongs to tad"),
        ("runs: {a: {}}", ["--out", "x"], "--cache"),
        (BASE + "runs: {a: {}}", ["--parallel", "0"], "parallel: expected at least 1"),
    ],
    ids=["key", "combination", "missing", "parallel"],
)
def test_a_wrong_sweep_is_a_wrong_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, flags: list[str], message: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text + "\n")
    assert main(["train", "--sweep", str(path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_sweeps_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cache", "c", "--out", "o", "--parallel", "2"]) == 2
    assert "parallel: it is for a sweep; give --sweep FILE" in capsys.readouterr().err
    assert main(["train", "--cache", "c", "--out", "o", "--sweep", "nowhere.yaml"]) == 2
    assert "--sweep nowhere.yaml: cannot be read" in capsys.readouterr().err


def test_the_example_of_the_documentation_is_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parent.parent / "docs"
    path = docs / "sweep.yaml"
    assert (docs / "sweeps.md").read_text().split("```yaml\n")[1].split("```")[0] == path.read_text()
    seen: list[TrainCommand] = []
    monkeypatch.setattr("tailcache.scripts.train.run", seen.append)
    assert main(["train", "--sweep", str(path)]) == 0
    runs = sweep_runs(load_sweep(path), seen[0].shared)
    assert len(runs) == 10
    methods = ["CLM", "KD", "KD, plain top-K", "tad-top_k=5", "tad-top_k=10"]
    assert list(dict.fromkeys(run.row for run in runs)) == methods
