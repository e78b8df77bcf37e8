"""The baseline of bench_losses is a right cross-entropy; the bench runs, measures everything and checks its bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from children import FORKED
from loss_cases import FLOAT32, assert_close

from tailcache.scripts import bench_losses
from tailcache.scripts.bench_losses import BenchLosses, bench, fused_cross_entropy, make_problem


def test_the_baseline_is_cross_entropy() -> None:
    problem = make_problem(29, 500, 16, 10, 4, device="cpu", dtype=torch.float32)
    expected = torch.nn.functional.cross_entropy(
        problem.hidden @ problem.weight.t(), problem.teacher.next_tokens, reduction="sum"
    )
    expected.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        total, hidden, weight = fused_cross_entropy(problem.hidden, problem.weight, problem.teacher.next_tokens)
    assert_close(total.item(), expected.item(), FLOAT32)
    assert problem.hidden.grad is not None
    assert problem.weight.grad is not None
    assert_close(hidden, problem.hidden.grad, FLOAT32)
    assert_close(weight, problem.weight.grad, FLOAT32)


def test_the_ids_of_a_problem_are_distinct() -> None:
    teacher = make_problem(50, 700, 8, 10, 6, device="cpu", dtype=torch.float32).teacher
    ids = torch.cat([teacher.token_ids, teacher.tail_samples], dim=-1)
    assert all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    assert (teacher.is_target.any(-1)).any()
    assert not (teacher.is_target.any(-1)).all()


@pytest.mark.slow
def test_every_loss_is_measured_and_a_missed_bar_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setitem(bench_losses.TIME_BARS, "tad one-pass", 0.0)
    monkeypatch.setattr(bench_losses, "get_context", lambda _: FORKED)  # processes whose peaks nothing is said of
    file = tmp_path / "losses.json"
    with pytest.raises(SystemExit) as stopped:
        bench(BenchLosses(positions=64, vocab_size=3000, width=16, rounds=1, device="cpu", json=file, check=True))
    torch.set_num_threads(threads)
    assert stopped.value.code == 1
    assert "losses: missed time of CE + tad one-pass / CE" in capsys.readouterr().err
    record = json.loads(file.read_text())
    assert set(record["figures"]["time_ratio"]) == {"cross-entropy", "dense tad", *bench_losses.TIME_BARS}
    assert record["figures"]["time_ratio"]["cross-entropy"] == 1.0
    assert len(record["bars"]) == len(bench_losses.TIME_BARS) + 4
