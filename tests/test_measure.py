"""Benchmarks: bars that can fail, figures that are written down, and a reader bench that runs."""

from __future__ import annotations

import importlib
import json
import mmap
import zlib
from pathlib import Path

import numpy as np
import pytest

from tailcache.scripts.bench_reader import BenchReader, bench, synthetic_targets
from tailcache.scripts.measure import Bar, _packed_control, control_seconds, peak_mib, report, reset_peak, spread


def test_bars_know_which_side_is_good() -> None:
    assert Bar(name="ratio", value=1.2, limit=1.25, at_most=True).met
    assert not Bar(name="ratio", value=1.3, limit=1.25, at_most=True).met
    assert Bar(name="rate", value=6.0, limit=5.0, at_most=False).met
    assert "MISSED" in str(Bar(name="rate", value=4.0, limit=5.0, at_most=False))


def test_the_control_is_the_same_work_each_time() -> None:
    assert 0 < control_seconds() < 60
    assert _packed_control() is _packed_control()
    assert len(zlib.decompress(_packed_control())) == 24 << 18


def test_a_missed_bar_fails_the_check_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bars = [Bar(name="rate", value=4.0, limit=5.0, at_most=False)]
    report("b", {"rate": 4.0}, bars, json_path=tmp_path / "sub" / "b.json", check=False)
    record = json.loads((tmp_path / "sub" / "b.json").read_text())
    assert record["figures"] == {"rate": 4.0}
    assert record["bars"][0]["met"] is False
    assert record["conditions"]["cores"] >= 1
    with pytest.raises(SystemExit) as stopped:
        report("b", {"rate": 4.0}, bars, json_path=None, check=True)
    assert stopped.value.code == 1
    assert "rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bench_reader", ["--repeats", "0"], "--repeats: expected a number above 0, found 0"),
        ("bench_reader", ["--num-samples", "-1"], "--num-samples: expected a number of at least 0, found -1"),
        ("bench_reader", ["--cache", "nowhere"], "nowhere"),
        ("bench_capture", ["--batch-positions", "0"], "--batch-positions: expected a number above 0, found 0"),
        ("bench_fidelity", ["--top-ks", "8", "0"], "--top-ks: expected a number above 0, found 0"),
        ("bench_fidelity", ["--held-out", "nan"], "--held-out: expected a number above 0, found nan"),
        ("bench_head", ["--top-k", "-3"], "--top-k: expected a number above 0, found -3"),
        ("bench_losses", ["--rounds", "0"], "--rounds: expected a number above 0, found 0"),
        ("bench_step", ["--threads", "0"], "--threads: expected a number above 0, found 0"),
        ("bench_storage", ["--wide-seconds", "inf"], "--wide-seconds: expected a number of at least 0, found inf"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    name: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"tailcache.scripts.{name}").main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: ")
    assert message in said


def test_a_mistyped_flag_of_a_benchmark_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench_reader", "--repeat", "3"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("tailcache.scripts.bench_reader").main()
    assert stopped.value.code == 2
    assert "bench_reader: there is no flag --repeat; did you mean --repeats?" in capsys.readouterr().err


def test_what_the_quickstart_cannot_do_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["quickstart", "--out", str(tmp_path / "out"), "--max-tokens", "0"])
    with pytest.raises(SystemExit, match=r"^quickstart: --max-tokens: expected at least 1, found 0"):
        importlib.import_module("tailcache.scripts.quickstart").main()


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}


def test_peak_memory_is_of_what_came_after_the_reset() -> None:
    reset_peak()
    before = peak_mib()
    # Fresh pages from the system: the allocator may hand out some that are resident already.
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"x" * (64 << 20))
        assert peak_mib() >= before + 32


def test_synthetic_targets_are_distributions() -> None:
    targets = synthetic_targets(50, 1000, 8, 4)
    mass = np.exp(targets.logprobs.astype(np.float64)).sum(axis=1) + np.exp(targets.log_tail.astype(np.float64))
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert all(len(set(row)) == 8 for row in targets.token_ids.tolist())


@pytest.mark.slow
def test_the_reader_bench_runs(tmp_path: Path) -> None:
    out = tmp_path / "reader.json"
    bench(
        BenchReader(
            positions=3000,
            row_positions=100,
            vocab_size=500,
            top_k=8,
            num_samples=2,
            repeats=1,
            workers=1,
            s3=False,
            json=out,
        )
    )
    assert json.loads(out.read_text())["figures"]["positions"] == 3000
