"""Sweeps: runs one after another and side by side, killed and begun again, failed, changed, locked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from children import FORKED
from places import cache_folder
from training_fixtures import make_cache

from tailcache.scripts.cli import main
from tailcache.scripts.sweep_table import sweep_table
from tailcache.storage.errors import ConfigError, IncompleteError, MismatchError
from tailcache.storage.place import open_place
from tailcache.storage.reader import Teacher
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.records import JsonLines, last_checkpoint
from tailcache.trainers.sweep import SweepRun, report_end, run_sweep
from tailcache.trainers.sweep_results import ERROR, SETTINGS, RunResult, may_be_evaluated, read_result, share_done

SWEEP = """
base:
  cache: {cache}
  out: {out}
  student: {{hidden_size: 24, num_layers: 1, num_heads: 2}}
  batch_rows: 4
  max_steps: 23
  eval_every: 8
  log_every: 5
  learning_rate: 1e-2
  save_every: 5
  device: cpu
  threads: 1
runs:
  tad: {{loss: tad, top_k: 3}}
  {runs}
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return make_cache(tmp_path_factory.mktemp("sweep") / "cache")


def _run(teacher: Teacher, out: Path, name: str, **settings: Any) -> SweepRun:
    defaults: dict[str, Any] = {
        "student": StudentConfig(hidden_size=24, num_layers=1, num_heads=2),
        "batch_rows": 4,
        "max_steps": 23,
        "eval_every": 8,
        "log_every": 5,
        "learning_rate": 1e-2,
        "device": "cpu",
        "threads": 1,
    }
    config = TrainConfig(cache=cache_folder(teacher.corpus), out=out / name, **{**defaults, **settings})
    return SweepRun(name=name, config=config, method=name.partition("/")[0])


def _three(teacher: Teacher, out: Path) -> list[SweepRun]:
    """The second cannot be trained: the cache has no hidden states."""
    return [
        _run(teacher, out, "kd/seed-1", loss="kd", seed=1),
        _run(teacher, out, "exact", loss="kd", tail="exact"),
        _run(teacher, out, "tad", loss="tad", top_k=3),
    ]


def _comparable(result: RunResult) -> tuple[Any, ...]:
    return result.name, result.status, result.error, result.curve, result.positions_seen


@pytest.fixture(scope="module")
def sequential(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunResult]]:
    out = tmp_path_factory.mktemp("sequential")
    return out, run_sweep(_three(teacher, out), out)


def test_results_are_read_from_the_runs_own_files(sequential: tuple[Path, list[RunResult]]) -> None:
    out, (kd, failed, tad) = sequential
    assert [each.status for each in (kd, failed, tad)] == ["finished", "failed", "finished"]
    for each in (kd, tad):
        assert [line["step"] for line in each.curve] == [0, 8, 16, 23]
        assert each.final == each.curve[-1]
        assert [line["step"] for line in JsonLines(each.folder / "training.jsonl").read()] == [5, 10, 15, 20, 23]
        timing = JsonLines(each.folder / "timing.jsonl").read()
        assert [line["step"] for line in timing] == [5, 10, 15, 20, 23]
        assert sum(line["positions"] for line in timing) == each.positions_seen == each.curve[-1]["positions_seen"]
        assert each.seconds == sum(line["seconds"] for line in timing)
        assert each.positions_per_s is not None
        assert each.hours is not None
        assert each.hours * 3600 == pytest.approx(each.seconds)
        assert each.final is not None
        assert each.evaluation["positions"] == each.final["positions"]
        assert each.evaluation["cross_entropy"]["value"] == pytest.approx(each.final["cross_entropy"], rel=1e-5)
        assert each.evaluation["kl"]["value"] == pytest.approx(each.final["kl"], rel=1e-4)
        assert each.evaluation["top1_agreement"]["value"] == pytest.approx(each.final["top1_agreement"])
    assert kd.curve[0]["cross_entropy"] != tad.curve[0]["cross_entropy"]  # another seed
    assert not (out / "sweep.lock").exists()


def test_how_far_a_run_is(tmp_path: Path) -> None:
    config = TrainConfig(cache="c", out=tmp_path, epochs=4.0)
    assert share_done(config) == 0.0
    line = json.dumps({"step": 10, "loss": 1.0, "epoch": 1.0})
    (tmp_path / "training.jsonl").write_text(f"{line}\n" * 500 + '{"step": 20, "lo')
    assert share_done(config) == 0.25
    assert share_done(replace(config, max_steps=40)) == 0.25
    assert share_done(replace(config, max_steps=5)) == 1.0
    (tmp_path / "training.jsonl").write_text("{}")
    assert share_done(config) == 0.0


def test_a_run_that_fails_says_why_and_does_not_stop_the_others(sequential: tuple[Path, list[RunResult]]) -> None:
    _, (_, failed, _) = sequential
    assert failed.error is not None
    assert "hidden" in failed.error
    assert "Traceback" in (failed.folder / ERROR).read_text()
    assert failed.final is None
    assert failed.positions_per_s is None


def _comparable_files(folder: Path) -> dict[str, bytes]:
    """What a run must leave whatever happened to it on the way."""
    names = ("metrics.jsonl", "training.jsonl", "model.safetensors", "evaluation.json", "config.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
def test_killed_side_by_side_and_begun_again_equals_undisturbed_one_after_another(
    teacher: Teacher, tmp_path: Path, sequential: tuple[Path, list[RunResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        SWEEP.format(cache=cache_folder(teacher.corpus), out=tmp_path / "out", runs="kd: {loss: kd, seed: 1}")
    )
    folders = [tmp_path / "out" / name for name in ("kd/seed-1", "tad/seed-0")]
    command = [sys.executable, "-m", "tailcache.scripts.cli", "train", "--sweep", str(sweep)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([*command, "--parallel", "2"], env=environment, stderr=subprocess.PIPE) as process:
        while last_checkpoint(folders[1]) is None:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            time.sleep(0.002)
        process.kill()
    statuses = [read_result("", folder).status for folder in folders]
    assert "interrupted" in statuses
    for folder in folders:  # the processes of the runs die with the sweep's
        deadline = time.monotonic() + 60
        while (claim := open_place(folder).claim("run.lock")) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        claim.release()

    shared = {"student": StudentConfig(hidden_size=24, num_layers=1, num_heads=2), "save_every": 5}
    runs = [
        _run(teacher, tmp_path / "out", "kd/seed-1", loss="kd", seed=1, **shared),
        _run(teacher, tmp_path / "out", "tad/seed-0", loss="tad", top_k=3, **shared),
    ]
    run_sweep(runs[:1], tmp_path / "out")
    monkeypatch.setattr("multiprocessing.get_context", lambda _: FORKED)  # as above, but for the time of its imports
    results = run_sweep(runs, tmp_path / "out", parallel=2)  # the other one, in its own process
    undisturbed = [each for each in sequential[1] if each.status == "finished"]
    assert [each.status for each in results] == ["finished", "finished"]
    for result, expected in zip(results, undisturbed, strict=True):
        assert _comparable_files(result.folder) == _comparable_files(expected.folder)
        assert result.evaluation == expected.evaluation
    assert "held-out cross-entropy" in (folders[1] / "log.txt").read_text()
    tables = [sweep_table(runs, results), sweep_table(runs, undisturbed)]
    figures = [[cell for line in table.cells() for cell in line[:5]] for table in tables]  # without what time decides
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("exitcode", "message"),
    [
        (-9, "its process was killed by SIGKILL (out of memory?)"),
        (-11, "its process was killed by SIGSEGV;"),
        (1, "its process exited with 1"),
    ],
)
def test_a_process_that_dies_without_a_word_is_a_failure(
    teacher: Teacher, tmp_path: Path, exitcode: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(teacher, tmp_path, "kd")
    report_end(run, exitcode)
    result = run.result()
    assert result.status == "failed"
    assert result.error is not None
    assert message in result.error
    assert str(tmp_path / "kd" / "log.txt") in result.error
    assert f"kd: failed: {result.error}" in capsys.readouterr().out


def test_a_student_that_cannot_be_evaluated_has_failed_but_keeps_its_figures(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(teacher, tmp_path, "kd", loss="kd", max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("tailcache.trainers.sweep_evaluation.evaluate_student", lambda *_, **__: 1 / 0)
        [result] = run_sweep([run], tmp_path)
    assert result.status == "failed"
    assert result.error == "ZeroDivisionError: division by zero"
    assert result.final is not None
    [again] = run_sweep([run], tmp_path, show_progress=False)
    assert again.status == "finished"
    assert again.evaluation["full_ece"]["value"] > 0
    assert again.curve == result.curve


def test_what_has_finished_is_left_alone_and_what_failed_is_tried_again(
    teacher: Teacher, sequential: tuple[Path, list[RunResult]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = sequential
    weights = out / "tad" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    (before[1].folder / ERROR).unlink()
    again = run_sweep(_three(teacher, out), out)
    assert [_comparable(each) for each in again] == [_comparable(each) for each in before]
    assert weights.stat().st_mtime_ns == written
    shown = capsys.readouterr().out
    assert "run 3 of 3: exact" in shown
    assert "tad" not in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-2}, "tad: learning_rate was 0.01, and now is 0.02"),
        ({"max_steps": 4}, "tad: max_steps was 23, and now is 4"),
        ({"eval_rows": 1}, "tad: eval_rows was None, and now is 1"),
        ({"student": StudentConfig(hidden_size=16)}, "tad: student.hidden_size was 24, and now is 16"),
    ],
    ids=["rate", "length", "held-out", "student"],
)
def test_changed_settings_of_a_finished_run_are_refused_by_name(
    teacher: Teacher, sequential: tuple[Path, list[RunResult]], changes: dict[str, Any], message: str
) -> None:
    out, _ = sequential
    runs = [_run(teacher, out, "new", loss="clm"), _run(teacher, out, "tad", **{"loss": "tad", "top_k": 3, **changes})]
    with pytest.raises(MismatchError, match=message):
        run_sweep(runs, out)
    assert not (out / "new").exists()


def test_settings_that_are_younger_than_a_run_had_their_defaults(
    teacher: Teacher, tmp_path: Path, sequential: tuple[Path, list[RunResult]]
) -> None:
    run = _run(teacher, tmp_path, "tad", loss="tad", top_k=3)
    shutil.copytree(sequential[0] / "tad", run.config.out)
    path = run.config.out / SETTINGS
    settings = json.loads(path.read_text())
    del settings["weight_decay"], settings["student"]["model_type"]
    path.write_text(json.dumps(settings))
    assert run_sweep([run], tmp_path)[0].status == "finished"
    with pytest.raises(MismatchError, match=r"weight_decay was 0\.1, and now is 0\.2"):
        run_sweep([replace(run, config=replace(run.config, weight_decay=0.2))], tmp_path)


def test_the_command_ends_with_a_table_and_names_what_failed(
    teacher: Teacher, tmp_path: Path, sequential: tuple[Path, list[RunResult]], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sequential[0] / "tad", tmp_path / "tad" / "seed-0")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        SWEEP.format(cache=cache_folder(teacher.corpus), out=tmp_path, runs="exact: {loss: kd, tail: exact}")
    )
    assert main(["train", "--sweep", str(sweep)]) == 1
    shown = capsys.readouterr()
    assert "1 of 2 runs have not finished: exact/seed-0 (" in shown.err
    assert "exact (0 of 1 runs)" in shown.out
    assert "failed: exact/seed-0:" in shown.out
    figures = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["figures"]["kl"] is None for row in figures] == [False, True]


def test_another_way_to_train(teacher: Teacher, tmp_path: Path) -> None:
    seen: list[TrainConfig] = []
    [result] = run_sweep([_run(teacher, tmp_path, "kd")], tmp_path, train=seen.append, evaluate=False)
    assert result.status == "interrupted"  # nothing was trained
    assert [(each.out, each.resume) for each in seen] == [(tmp_path / "kd", True)]


def test_what_cannot_be_evaluated_is_finished_without(teacher: Teacher, tmp_path: Path) -> None:
    mixture = _run(teacher, tmp_path, "mixture", teachers=("a", "b"))
    adapters = _run(teacher, tmp_path, "adapters")
    plain = _run(teacher, tmp_path, "plain")
    for run in (mixture, plain):
        run.config.out.mkdir()
        (run.config.out / "config.json").touch()
    assert [may_be_evaluated(run.config) for run in (mixture, adapters, plain)] == [False, False, True]


def test_settings_that_change_nothing_may_differ(teacher: Teacher, sequential: tuple[Path, list[RunResult]]) -> None:
    out, _ = sequential
    [result] = run_sweep([_run(teacher, out, "tad", loss="tad", top_k=3, eval_every=1, threads=None)], out)
    assert result.status == "finished"


def test_another_corpus_behind_a_finished_run_is_refused(
    tmp_path: Path, sequential: tuple[Path, list[RunResult]]
) -> None:
    out, _ = sequential
    other = make_cache(tmp_path / "other", num_rows=8)
    with pytest.raises(MismatchError, match="tad: its corpus was"):
        run_sweep([_run(other, out, "tad", loss="tad", top_k=3)], out)


def test_two_sweeps_do_not_share_a_folder(teacher: Teacher, tmp_path: Path) -> None:
    claim = open_place(tmp_path).claim("sweep.lock")
    assert claim is not None
    with pytest.raises(IncompleteError, match="another sweep works here"):
        run_sweep([_run(teacher, tmp_path, "kd", loss="kd")], tmp_path)
    claim.release()


def test_a_folder_somebody_trains_in_is_left_alone(teacher: Teacher, tmp_path: Path) -> None:
    claim = open_place(tmp_path / "kd").claim("run.lock")
    assert claim is not None
    [result] = run_sweep([_run(teacher, tmp_path, "kd", loss="kd")], tmp_path)
    claim.release()
    assert result.error is not None
    assert "another process trains here" in result.error
    assert not (tmp_path / "kd" / SETTINGS).exists()


def test_runs_must_be_told_apart(teacher: Teacher, tmp_path: Path) -> None:
    run = _run(teacher, tmp_path, "kd")
    with pytest.raises(ConfigError, match="one name per run"):
        run_sweep([run, run], tmp_path)
    with pytest.raises(ConfigError, match="one folder per run"):
        run_sweep([run, replace(run, name="other")], tmp_path)
    pushed = [_run(teacher, tmp_path, name, hub_model_id="me/student") for name in ("a", "b")]
    with pytest.raises(ConfigError, match="one hub_model_id per run, found several runs with me/student"):
        run_sweep(pushed, tmp_path)
    with pytest.raises(ConfigError, match="at least one run"):
        run_sweep([], tmp_path)
    with pytest.raises(ConfigError, match="parallel: expected at least 1"):
        run_sweep([run], tmp_path, parallel=0)


def test_json_of_the_settings(teacher: Teacher, sequential: tuple[Path, list[RunResult]]) -> None:
    settings = json.loads((sequential[0] / "tad" / SETTINGS).read_text())
    assert settings["top_k"] == 3
    assert settings["student"]["hidden_size"] == 24
