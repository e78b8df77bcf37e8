"""The baseline of bench_losses is a right cross-entropy; the bench runs, measures everything and checks its bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loss_cases import FLOAT32, assert_close

from tailcache.scripts import bench_losses
from tailcache.scripts.bench_losses import BenchLosses, fused_cross_entropy, main, make_problem


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


def test_every_loss_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    file = tmp_path / "losses.json"
    main(BenchLosses(positions=64, vocab_size=3000, width=16, rounds=1, device="cpu", json=file))
    record = json.loads(file.read_text())
    assert set(record["figures"]["time_ratio"]) == {"cross-entropy", "dense tad", *bench_losses.TIME_BARS}
    assert record["figures"]["time_ratio"]["cross-entropy"] == 1.0
    assert len(record["bars"]) == len(bench_losses.TIME_BARS) + 4

    monkeypatch.setitem(bench_losses.TIME_BARS, "tad one-pass", 0.0)
    with pytest.raises(SystemExit):
        main(BenchLosses(positions=64, vocab_size=3000, width=16, rounds=1, device="cpu", check=True))
    torch.set_num_threads(threads)
