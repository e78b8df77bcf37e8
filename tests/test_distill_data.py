"""Training on the loader: other workers, other numbers of processes and older checkpoints see the same rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from children import run_group
from test_distill import SMALL, TWO_PROCESSES, _config, _lines
from training_fixtures import make_cache

from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.reader import Teacher
from tailcache.trainers.distill import DistillTrainer
from tailcache.trainers.run import train

LASTING: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "save_every": 1, "log_every": 1, "eval_every": 0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """17 rows for training: with four in a step, one is left for the last."""
    return make_cache(tmp_path_factory.mktemp("data") / "cache", num_rows=23)


def rows_seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Fills with the corpus rows of each optimizer step, as training goes on."""
    seen: list[list[int]] = []
    original = DistillTrainer.get_batch_samples

    def watched(self: DistillTrainer, *arguments: Any) -> Any:
        samples, count = original(self, *arguments)
        seen.append(sorted({row for batch in samples for row in batch["rows"].tolist()}))
        return samples, count

    monkeypatch.setattr(DistillTrainer, "get_batch_samples", watched)
    return seen


def test_an_epoch_has_every_row_with_targets_once(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = rows_seen(monkeypatch)
    train(_config(teacher, tmp_path / "out", batch_rows=2, gradient_accumulation=2, epochs=2, max_steps=None))
    corpus = teacher.corpus
    expected = [row for row in corpus.train_rows().tolist() if corpus.rows(row, row + 1).supervised.any()]
    assert len(seen) == 10
    for epoch in (seen[:5], seen[5:]):
        assert sorted(row for step in epoch for row in step) == expected
    assert seen[:5] != seen[5:]


def test_workers_change_nothing(teacher: Teacher, tmp_path: Path) -> None:
    for workers in (0, 2):
        train(_config(teacher, tmp_path / f"{workers}", batch_rows=4, max_steps=7, workers=workers, **LASTING))
    assert _lines(tmp_path / "0" / "training.jsonl") == _lines(tmp_path / "2" / "training.jsonl")


def test_waiting_for_data_is_reported(teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = train(_config(teacher, tmp_path / "out", max_steps=3, **LASTING))
    assert trainer is not None
    timing = _lines(tmp_path / "out" / "timing.jsonl")
    assert [line["step"] for line in timing] == [1, 2, 3]
    assert all(0 <= line["data_wait"] < 1 for line in timing)
    assert 0 < trainer.reporter.waited_share < 1
    assert "training waited for data for" in capsys.readouterr().out
    assert all("data_wait" not in line for line in _lines(tmp_path / "out" / "training.jsonl"))


def test_a_checkpoint_without_a_place_in_the_data_goes_on_in_the_order_it_began_with(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 1 of the order, as training had it before checkpoints said where they are."""
    settings: dict[str, Any] = {"batch_rows": 2, "gradient_accumulation": 2, **LASTING}
    out = tmp_path / "out"
    train(_config(teacher, out, **settings, max_steps=7))
    for folder in (out, out / "checkpoint-7"):
        record = json.loads((folder / "tailcache.json").read_text())
        del record["data"], record["rows_per_step"]
        (folder / "tailcache.json").write_text(json.dumps(record))
    from tailcache.storage.order import shuffled_rows
    from tailcache.trainers.batches import block_rows_of

    seen = rows_seen(monkeypatch)
    train(_config(teacher, out, **settings, max_steps=10, resume=True))
    corpus, rows = teacher.corpus, teacher.corpus.train_rows()
    order = rows[
        shuffled_rows(rows * 0 + range(len(rows)), seed=0, epoch=1, block_rows=block_rows_of(corpus), window_blocks=8)
    ]
    expected = [order[8:12], order[12:16], order[16:]]
    targets = {row for row in rows.tolist() if corpus.rows(row, row + 1).supervised.any()}
    assert seen == [sorted(set(step.tolist()) & targets) for step in expected]


def test_another_number_of_rows_per_step_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(_config(teacher, out, batch_rows=4, max_steps=2, **LASTING))
    with pytest.raises(MismatchError, match=r"rows per step \(batch_rows x .*\): the checkpoint has 4, this run 2"):
        train(_config(teacher, out, batch_rows=2, max_steps=3, resume=True, **LASTING))
    trainer = train(_config(teacher, out, batch_rows=2, gradient_accumulation=2, max_steps=3, resume=True, **LASTING))
    assert trainer is not None
    assert trainer.state.global_step == 3


def test_held_out_rows_are_not_trained_on(teacher: Teacher, tmp_path: Path) -> None:
    trainer = train(_config(teacher, tmp_path / "out", max_steps=1))
    assert trainer is not None
    trainer.train_rows = teacher.corpus.held_out_rows()
    with pytest.raises(ConfigError, match="expected rows of the train split"):
        trainer.get_train_dataloader()


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(teacher: Teacher, tmp_path: Path) -> None:
    """Stopped in the middle of the second epoch; the first ended with a row for one process and none for the other."""
    settings: dict[str, Any] = {**LASTING, "device": "cpu", "learning_rate": 1e-3}
    train(_config(teacher, tmp_path / "one", batch_rows=4, max_steps=10, **settings))
    text = json.dumps({**settings, "batch_rows": 2, "max_steps": 7, "student": asdict(SMALL)})
    run_group(TWO_PROCESSES, teacher.corpus.cache_place, tmp_path / "two", text, size=2)
    train(_config(teacher, tmp_path / "two", batch_rows=4, max_steps=10, resume=True, **settings))
    one, two = (_lines(tmp_path / out / "training.jsonl") for out in ("one", "two"))
    assert [line["step"] for line in two] == list(range(1, 11))
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "clm", "divergence", "grad_norm", "positions_seen"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
