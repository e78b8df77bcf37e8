"""The whole path through the installed command: prepare, capture twice, train, compare, verify, info."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizer_fixtures import build_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from tailcache.scripts.cli import main
from tailcache.storage.reader import open_cache

SENTENCES = [
    "the cat sat on the mat and the dog sat on the cat",
    "a tailcache keeps the tail of what the teacher said",
    "run the teacher once and train many students from the shards",
    "numbers that are exact are exact and the others say so",
]


def _teacher(folder: Path, tokenizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # a padded head
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    build: Any = AutoModelForCausalLM.from_config
    model = build(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = build_tokenizer()
    _teacher(folder / "teacher-a", tokenizer, seed=0)
    _teacher(folder / "teacher-b", tokenizer, seed=1)
    lines = [json.dumps({"text": SENTENCES[i % 4] + f" {i}"}) for i in range(80)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    cache = str(folder / "cache")
    commands = [
        ["prepare", "--cache", cache, "--source", str(folder / "text.jsonl"), "--tokenizer", str(folder / "teacher-a"),
         "--context-length", "64", "--held-out", "0.2"],
        ["capture", "--cache", cache, "--teacher", str(folder / "teacher-a"), "--name", "a", "--top-k", "24",
         "--num-samples", "4", "--shard-positions", "500"],
        ["capture", "--cache", cache, "--teacher", str(folder / "teacher-b"), "--name", "b", "--top-k", "24",
         "--num-samples", "4", "--shard-positions", "500"],
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 0
    return folder


@pytest.mark.slow
def test_students_learn_from_the_cache(run_folder: Path) -> None:
    finals = {}
    for loss in ("clm", "kd", "tad"):
        out = run_folder / f"student-{loss}"
        command = ["train", "--cache", str(run_folder / "cache"), "--teacher", "a", "--out", str(out), "--loss", loss]
        command += ["--student.hidden-size", "32", "--student.num-layers", "2", "--student.num-heads", "2"]
        if loss != "clm":
            command += ["--clm-weight", "0"]  # a random teacher says nothing of the text: the divergence alone
        command += ["--max-steps", "40", "--learning-rate", "1e-2", "--batch-rows", "8", "--eval-every", "20"]
        assert main(command) == 0
        curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        metric = "cross_entropy" if loss == "clm" else "kl"
        assert curve[-1][metric] < 0.7 * curve[0][metric]
        finals[loss] = curve[-1]
        record = json.loads((out / "tailcache.json").read_text())
        cache = open_cache(run_folder / "cache")
        assert record["corpus_hash"] == cache.corpus.hash
        assert record["teacher_hash"] == cache.teacher("a").hash
        AutoModelForCausalLM.from_pretrained(out)
    assert finals["clm"]["cross_entropy"] < finals["kd"]["cross_entropy"]
    assert finals["kd"]["kl"] < finals["clm"]["kl"]


@pytest.mark.slow
def test_every_loss_from_the_command(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps each, from one capture with all optional fields; the sum of several from a file."""
    cache = str(run_folder / "cache")
    capture = ["capture", "--cache", cache, "--teacher", str(run_folder / "teacher-a"), "--name", "rich"]
    assert main([*capture, "--top-k", "24", "--temperatures", "2", "--hidden", "bf16"]) == 0
    flags = {
        "kd": ["--temperature", "2"],
        "tad": ["--beta", "1", "--beta-end", "3", "--beta-schedule", "cosine", "--tail", "exact"],
        "reverse_kl": ["--tail", "exact"],
        "jsd": ["--mixture", "0.3"],
        "skew_kl": ["--skew", "0.2", "--tail", "renormalise"],
        "skew_reverse_kl": ["--head-mode", "recompute"],
        "dkd": ["--non-target-weight", "2", "--tail", "prior"],
        "atkd": ["--wraps", "reverse_kl", "--hard-ratio", "0.3"],
        "todi": ["--clm-weight", "0.5", "--divergence-weight", "0.5"],
        "rs_kd": ["--num-draws", "12"],
        "hidden_cosine": [],
    }
    small = ["--student.hidden-size", "32", "--student.num-layers", "1", "--student.num-heads", "2"]
    base = ["train", "--cache", cache, "--teacher", "rich", "--max-steps", "2", "--log-every", "1", *small]
    for loss, more in flags.items():
        out = run_folder / "losses" / loss
        assert main([*base, "--out", str(out), "--loss", loss, *more]) == 0, loss
        lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
        assert all(np.isfinite([line["loss"], line["divergence"], line["grad_norm"]]).all() for line in lines), loss
        assert json.loads((out / "tailcache.json").read_text())["config"]["loss"] == loss
    file = run_folder / "sum.yaml"
    file.write_text("train:\n  losses:\n  - {name: tad, beta: 3}\n  - {name: hidden_cosine, weight: 0.5}\n")
    out = run_folder / "losses" / "sum"
    assert main([*base, "--out", str(out), "--config", str(file)]) == 0
    [line, _] = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert line["loss"] == pytest.approx(line["clm"] + line["tad"] + 0.5 * line["hidden_cosine"], rel=1e-5)
    capsys.readouterr()
    for wrong, message in (
        (["--loss", "reverse_kl", "--tail", "sampled"], "heavy tails"),
        (["--loss", "kd", "--temperature", "3"], "--temperatures 3"),
        (["--loss", "tad", "--top-k", "25"], "this teacher's K; found K' = 25"),
    ):
        assert main([*base, "--out", str(run_folder / "losses" / "wrong"), *wrong]) == 1
        assert message in capsys.readouterr().err
    assert not (run_folder / "losses" / "wrong").exists()


def test_compare_says_what_a_dense_computation_says(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_folder / "compare.json"
    command = ["compare", "--cache", str(run_folder / "cache"), "--teachers", "a", "b"]
    assert main([*command, "--json", str(out), "--plots", str(run_folder / "plots")]) == 0
    assert json.loads(out.read_text())
    assert list((run_folder / "plots").glob("*.png"))
    teacher = open_cache(run_folder / "cache").teacher("a")
    targets = teacher.rows(0, teacher.corpus.num_rows)
    perplexity = float(np.exp(-targets.log_target.mean(dtype=np.float64)))
    assert f"{perplexity:.1f}"[:3] in capsys.readouterr().out


def test_info_and_verify(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = str(run_folder / "cache")
    assert main(["info", "--cache", cache]) == 0
    printed = capsys.readouterr().out
    for field in ("token_codes", "logprob_gaps", "tail_sample_codes", "target_logit"):
        assert field in printed
    assert main(["verify", "--cache", cache]) == 0


def test_a_capture_that_is_run_again_changes_nothing(run_folder: Path) -> None:
    folder = run_folder / "cache" / "teachers" / "a"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    command = ["capture", "--cache", str(run_folder / "cache"), "--teacher", str(run_folder / "teacher-a")]
    command += ["--name", "a", "--top-k", "24", "--num-samples", "4", "--shard-positions", "500"]
    assert main(command) == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_wrong_input_is_refused_with_a_reason(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(run_folder / "cache")
    base = ["capture", "--cache", cache, "--teacher", str(run_folder / "teacher-a"), "--name", "a"]
    assert main([*base, "--top-k", "12", "--num-samples", "4", "--shard-positions", "500"]) == 1
    assert "top_k" in capsys.readouterr().err
    assert main(["train", "--cache", cache, "--teacher", "c", "--out", str(tmp_path / "s")]) == 1
    assert "'c'" in capsys.readouterr().err
    assert main(["info", "--cache", str(tmp_path / "nowhere")]) == 1
    damaged = tmp_path / "damaged"
    shutil.copytree(run_folder / "cache", damaged)
    file = damaged / "teachers" / "a" / "token_codes" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["verify", "--cache", str(damaged)]) == 1
    assert "token_codes" in capsys.readouterr().out
