"""``tailcache evaluate``: from a saved student to tables, JSON and plots, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizer_fixtures import build_tokenizer
from training_fixtures import logprobs_of, make_corpus, tiny_model, write_teacher

from tailcache.scripts.cli import main
from tailcache.scripts.evaluate_report import evaluation_text
from tailcache.storage.errors import ConfigError
from tailcache.storage.reader import open_cache
from tailcache.trainers.evaluate_config import EvaluateConfig
from tailcache.trainers.evaluate_run import evaluate
from tailcache.trainers.evaluation import evaluate_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of two teachers and a saved student with the corpus' tokenizer."""
    made = tmp_path_factory.mktemp("evaluate")
    tokenizer = build_tokenizer("bpe")
    corpus = make_corpus(made / "cache", tokenizer, num_rows=32)
    for seed, name in enumerate(("a", "b")):
        logprobs, targets = logprobs_of(tiny_model(corpus.vocab_size, seed=seed), corpus)
        write_teacher(corpus, logprobs, targets, name=name, top_k=20, num_samples=6)
    student = tiny_model(corpus.vocab_size, seed=7)
    student.save_pretrained(made / "student")
    tokenizer.save_pretrained(made / "student")
    return made


def _given(folder: Path, *more: str) -> list[str]:
    return ["evaluate", str(folder / "student"), "--cache", str(folder / "cache"), "--resamples", "50", *more]


def test_tables_json_and_plots(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = ["--json", str(tmp_path / "out" / "a.json"), "--plots", str(tmp_path / "plots")]
    assert main(_given(folder, "--teacher", "a", *written)) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "a.json").read_text())

    teacher = open_cache(folder / "cache").teacher("a")
    expected = evaluate_student(tiny_model(teacher.vocab_size, seed=7), teacher, resamples=50, show_progress=False)
    assert record["kl"]["value"] == pytest.approx(expected.kl.value, rel=1e-9)
    assert record["kl"]["low"] == pytest.approx(expected.kl.low, rel=1e-9)
    assert record["student"]["model_class"] == "LlamaForCausalLM"
    assert record["student"]["split"] == "held-out"
    assert record["documents"] == expected.documents
    assert record["positions"] == expected.positions

    assert expected.bits_per_byte is not None
    for figure in (expected.cross_entropy, expected.teacher_cross_entropy, expected.kl, expected.bits_per_byte):
        assert f"{figure.value:,.4f}" in shown
    assert "teacher a: K = 20, 6 tail draws" in shown
    assert re.search(r"unbiased +[\d.]+ \[[\d.]+, [\d.]+\] ± [\d.]+ by the draws", shown)
    assert "not known" not in shown
    names = ["calibration", "calibration_all_tokens", "kl_by_position", "tail_mass", "tail_mass_by_position"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(
        [*(f"{name}.png" for name in names), "evaluation.html"]
    )
    html = (tmp_path / "plots" / "evaluation.html").read_text()
    for name in names:
        png = (tmp_path / "plots" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert base64.b64encode(png).decode() in html


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher", "nobody"], "expected a teacher named 'nobody', found a, b"),
        ([], "has several teachers; choose one of a, b"),
        (["--teacher", "a", "--tails", "5", "21"], "expected at most 20"),
        (["--teacher", "a", "--student", "NOWHERE"], "expected a folder or a hub id"),
    ],
    ids=["no such teacher", "several teachers", "too large a K", "no such student"],
)
def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert main(_given(folder, *(str(folder / m) if m == "NOWHERE" else m for m in more))) == 1
    assert message in capsys.readouterr().err


def test_a_student_of_another_tokenizer_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(300, seed=7).save_pretrained(tmp_path / "other")
    build_tokenizer("bpe", size=290).save_pretrained(tmp_path / "other")
    assert main(_given(folder, "--teacher", "a", "--student", str(tmp_path / "other"))) == 1
    assert "expected the corpus' tokenizer" in capsys.readouterr().err


def test_a_corpus_without_held_out_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path / "cache", build_tokenizer("bpe"), num_rows=6, held_out_every=0)
    write_teacher(corpus, *logprobs_of(tiny_model(corpus.vocab_size), corpus), name="a", top_k=20, num_samples=2)
    given = ["evaluate", str(folder / "student"), "--cache", str(tmp_path / "cache")]
    assert main(given) == 1
    assert "--split held-out: expected such rows" in capsys.readouterr().err
    assert main([*given, "--split", "train", "--resamples", "0"]) == 0
    shown = capsys.readouterr().out
    assert "these are training rows" in shown
    assert "no intervals" in shown


def test_some_rows_and_no_dependence_on_batches(folder: Path) -> None:
    def settings(**more: Any) -> EvaluateConfig:
        return EvaluateConfig(student=str(folder / "student"), cache=folder / "cache", teacher="b", **more)

    some = [evaluate(settings(rows=3, batch_rows=b), show_progress=False).evaluation for b in (1, 3)]
    whole = evaluate(settings(), show_progress=False).evaluation
    assert [e.rows for e in some] == [3, 3]
    assert whole.rows > 3
    assert some[0].kl.value == pytest.approx(some[1].kl.value, rel=1e-5)
    assert some[0].kl.value != whole.kl.value


def test_figures_that_are_not_known_are_said_so(folder: Path) -> None:
    given = EvaluateConfig(
        student=str(folder / "student"), cache=folder / "cache", teacher="a", bins=400, tails=(20, 3), resamples=0
    )
    found = evaluate(given, show_progress=False)
    assert [mass.top_k for mass in found.evaluation.tail_mass] == [3, 20]
    undecided = "teacher_full_ece" in found.evaluation.unavailable
    assert undecided == (found.evaluation.teacher_full_ece is None)
    assert ("teacher's Full-ECE: not known, since at" in evaluation_text(found)) == undecided
    assert undecided


@pytest.mark.parametrize(
    "wrong",
    [{"rows": 0}, {"bins": 0}, {"batch_rows": 0}, {"confidence": 1.0}, {"resamples": -1}, {"tails": (3, 3)}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        EvaluateConfig(student="s", cache="c", **wrong)
