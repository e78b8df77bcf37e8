"""A saved student is a plain checkpoint: the evaluation harness runs on it as it is, and finds what the model says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import FLOAT32, assert_close
from tokenizer_fixtures import build_tokenizer
from training_fixtures import logprobs_of, make_corpus, one_thread, tiny_model, write_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from tailcache.scripts.cli import main

QUESTIONS = [
    {"question": "the cat sat on", "choices": ["the mat", "a tail"], "label": 0},
    {"question": "a tailcache keeps", "choices": ["done", "the tail", "café"], "label": 1},
    {"question": "naïve café, 12 €", "choices": ["— done", "the cat"], "label": 0},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@torch.no_grad()
def _log_likelihood(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    """log p(choice | question), with a space between them."""
    whole = tokenizer(f"{question} {choice}")["input_ids"]
    start = len(tokenizer(question)["input_ids"])
    logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
    return sum(float(logprobs[t - 1, whole[t]]) for t in range(start, len(whole)))


@pytest.mark.slow
def test_the_harness_runs_on_a_trained_student(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("bpe")
    corpus = make_corpus(tmp_path / "cache", tokenizer, num_rows=8)
    write_teacher(corpus, *logprobs_of(tiny_model(corpus.vocab_size), corpus), name="a", top_k=8, num_samples=2)
    out = tmp_path / "student"
    sizes = ["--student.hidden-size", "32", "--student.num-layers", "1", "--student.num-heads", "2"]
    with one_thread():
        where = ["--cache", str(tmp_path / "cache"), "--out", str(out)]
        assert main(["train", *where, "--loss", "kd", "--max-steps", "2", "--device", "cpu", *sizes]) == 0

    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "tiny_choice.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))
    arguments = ["--model", "hf", "--model_args", f"pretrained={out},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", "tiny_choice", "--include_path", str(tasks), "--batch_size", "1"]
    arguments += ["--output_path", str(tmp_path / "results"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments],
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]

    model: Any = AutoModelForCausalLM.from_pretrained(out)
    saved: Any = AutoTokenizer.from_pretrained(out)
    [samples] = (tmp_path / "results").rglob("samples_tiny_choice_*.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [record["doc"]["question"] for record in records] == [each["question"] for each in QUESTIONS]
    right = 0
    for record, each in zip(records, QUESTIONS, strict=True):
        expected = [_log_likelihood(model, saved, str(each["question"]), choice) for choice in each["choices"]]  # type: ignore[attr-defined]
        assert_close([float(response[0]) for response in record["filtered_resps"]], expected, FLOAT32)
        right += max(range(len(expected)), key=expected.__getitem__) == each["label"]
    [results] = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / 3)
