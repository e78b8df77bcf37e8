"""The table of a sweep: means and intervals over seeds, what is missing, and every form it is written in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailcache.scripts.seed_intervals import mean_over_seeds, t_quantile
from tailcache.scripts.sweep_report import write_report
from tailcache.scripts.sweep_table import NONE, SweepTable, sweep_table
from tailcache.trainers.config import TrainConfig
from tailcache.trainers.sweep import SweepRun
from tailcache.trainers.sweep_results import RunResult


def _curve(kl: float) -> tuple[dict[str, Any], ...]:
    def line(step: int, value: float) -> dict[str, Any]:
        return {
            "step": step,
            "positions_seen": 100 * step,
            "cross_entropy": 2 + value,
            "kl": value,
            "top1_agreement": 0.5,
            "teacher_cross_entropy": 1.25,
            "positions": 640,
            "kl_is": "unbiased",
        }

    return line(0, 2 * kl), line(10, kl)


def _pair(method: str, seed: int, status: Any = "finished", kl: float = 1.0, **own: Any) -> tuple[SweepRun, RunResult]:
    name = f"{method}/seed-{seed}"
    run = SweepRun(name=name, method=method, config=TrainConfig(cache="c", out=Path(name), seed=seed))
    values: dict[str, Any] = {"error": "it broke"} if status == "failed" else {}
    if status == "finished":
        record = {"teacher": "a", "corpus_hash": "h", "positions_seen": 1000, "config": {"seed": seed}}
        values = {"record": record, "curve": _curve(kl), "seconds": 4.0, "positions_per_s": 250.0}
    return run, RunResult(name=name, folder=Path(name), status=status, **{**values, **own})


def _table(*pairs: tuple[SweepRun, RunResult]) -> SweepTable:
    return sweep_table([run for run, _ in pairs], [result for _, result in pairs])


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [(1, 0.95, 12.706205), (2, 0.95, 4.302653), (4, 0.99, 4.604095), (9, 0.9, 1.833113), (30, 0.95, 2.042272)],
)
def test_quantiles_of_t_are_those_of_the_tables(freedom: int, confidence: float, expected: float) -> None:
    assert t_quantile(freedom, confidence) == pytest.approx(expected, abs=1e-6)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 3))
    figures = [mean_over_seeds(values.tolist(), 0.9) for values in draws]
    held = sum(f.low is not None and f.high is not None and f.low <= 3.0 <= f.high for f in figures)
    assert held / 2000 == pytest.approx(0.9, abs=0.02)
    assert mean_over_seeds([2.0]).low is None


def test_a_row_is_the_mean_over_seeds() -> None:
    table = _table(_pair("tad", 0, kl=1.0), _pair("clm", 0, kl=4.0), _pair("tad", 1, kl=2.0), _pair("tad", 2, kl=3.0))
    tad, clm = table.rows
    assert (tad.method, clm.method) == ("tad", "clm")
    kl = tad.figures["kl"]
    assert kl is not None
    assert kl.value == 2.0
    assert kl.high == pytest.approx(2.0 + 4.302653 * 1.0 / math.sqrt(3), abs=1e-5)
    hours = clm.figures["hours"]
    assert hours is not None
    assert hours.value == pytest.approx(1000 / 250 / 3600)
    text = table.text()
    assert "2.000 ± 2.484" in text
    assert "95 % t interval over 1 to 3 seeds" in text
    assert "unbiased" in text
    teacher = next(line for line in text.splitlines() if line.startswith("teacher a"))
    assert teacher.split() == ["teacher", "a", "1.250", "0.000", "100.0", NONE, NONE, NONE]


def test_full_ece_comes_from_the_evaluation() -> None:
    evaluation = {"full_ece": {"value": 0.125}, "teacher_full_ece": {"value": 0.0625}}
    table = _table(_pair("tad", 0, evaluation=evaluation))
    figure = table.rows[0].figures["full_ece"]
    assert figure is not None
    assert figure.value == 0.125
    assert table.teachers["a"]["full_ece"] == 0.0625
    assert _table(_pair("tad", 0)).rows[0].figures["full_ece"] is None


def test_what_has_not_finished_is_said() -> None:
    table = _table(_pair("kd", 0), _pair("kd", 1, "interrupted", curve=_curve(9.0)), _pair("odd", 0, "failed"))
    kd, odd = table.rows
    assert kd.label == "kd (1 of 2 runs)"
    assert kd.figures["kl"] is not None
    assert kd.figures["kl"].value == 1.0  # of the finished run alone
    assert all(figure is None for figure in odd.figures.values())
    assert table.failures == ("failed: odd/seed-0: it broke",)
    assert "One seed per method: no intervals" in table.text()
    assert "| odd (0 of 1 runs) | – | – |" in table.markdown()  # noqa: RUF001


def test_runs_that_cannot_be_compared_are_said() -> None:
    other = {"teacher": "b", "corpus_hash": "other", "positions_seen": 1, "config": {}}
    text = _table(_pair("kd", 0), _pair("tad", 0, record=other)).text()
    assert "Held-out positions differ between runs" in text
    assert "each student's to the teacher it was trained from" in text


def test_every_form_says_the_same(tmp_path: Path) -> None:
    table = _table(_pair("a|b", 0, kl=1.0), _pair("a|b", 1, kl=2.0), _pair("<c>", 0, "failed"))
    files = {path.name: path for path in write_report(table, tmp_path)}
    stored = json.loads(files["sweep.json"].read_text())
    assert stored["rows"][0]["figures"]["kl"]["value"] == 1.5
    assert [run["seed"] for run in stored["rows"][0]["runs"]] == [0, 1]
    assert [run["status"] for run in stored["rows"][1]["runs"]] == ["failed"]
    assert stored["rows"][0]["runs"][1]["curve"][0]["kl"] == 4.0
    head, rule, first, *_ = files["sweep.md"].read_text().splitlines()
    assert head.count("|") == rule.count("|") == first.replace("\\|", "").count("|")
    assert "1.500 ± 6.353" in first
    page = files["sweep.html"].read_text()
    assert "1.500 ± 6.353" in page
    assert "&lt;c&gt;" in page
    assert 'src="http' not in page
    plots = {name for name in files if name.endswith(".png")}
    assert plots == {f"sweep_{name}.png" for name in ("cross_entropy", "kl", "cross_entropy_bars", "kl_bars")}
    assert page.count("data:image/png;base64,") == len(plots)
    assert all(files[name].read_bytes().startswith(b"\x89PNG") for name in plots)
    before = {name: path.read_bytes() for name, path in files.items()}
    write_report(table, tmp_path)
    assert {name: path.read_bytes() for name, path in files.items()} == before


def test_a_table_without_any_result_can_be_written(tmp_path: Path) -> None:
    files = write_report(_table(_pair("kd", 0, "failed")), tmp_path)
    assert not any(path.suffix == ".png" for path in files)
