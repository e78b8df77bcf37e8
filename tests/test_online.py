"""A teacher beside the student: its targets, the losses and gradients from them, and the same training from a cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from places import cache_folder
from tokenizer_fixtures import build_tokenizer
from training_fixtures import logprobs_of, make_corpus, tiny_model

from tailcache.pipeline.capture import capture
from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.teacher import Teacher as RunningTeacher
from tailcache.scripts.online_teacher import OnlineTeacher, segment_lines
from tailcache.scripts.train import run
from tailcache.storage.alignment import segment_ids, target_positions
from tailcache.storage.errors import ConfigError, MismatchError, TeacherError
from tailcache.storage.reader import Teacher, open_cache
from tailcache.trainers.batches import CacheRows, Layout, collate, collate_block
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.distill import DistillTrainer, training_arguments
from tailcache.trainers.live import LOGPROBS
from tailcache.trainers.loader import CacheLoader
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.objective import Objective
from tailcache.trainers.run import train

TOP_K, BETA = 5, 2.0
FIELD_TOLERANCE = 3e-5  # logits in float32, of documents batched otherwise: 1e-6 of values up to 20
ROUNDING = {"kd": 1e-4, "reverse_kl": 1e-4, "tad": 2**-11}
"""Of a loss: those from hidden states alone differ by float32, in steps of Adam; a stored mass is right to half a
step of 1/1024 nat."""
GRADIENT_TOLERANCE = 2e-4  # relative to the largest entry: two float32 models, whose sums are in another order


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """A capture of ``tiny_model(seed=1)`` in bfloat16, whose hidden states are then stored without loss; each document
    alone in its batch, so that their rounding can be had again."""
    folder = tmp_path_factory.mktemp("online")
    corpus = make_corpus(folder / "cache")
    settings: dict[str, Any] = {
        "name": "t",
        "teacher": "object",
        "hidden": "bf16",
        "device": "cpu",
        "batch_positions": 1,
    }
    capture(
        CaptureConfig(cache=folder / "cache", top_k=12, num_samples=4, **settings),
        teacher=running(corpus.vocab_size, torch.bfloat16),
        show_progress=False,
    )
    return open_cache(folder / "cache").teacher("t")


def running(vocab_size: int, dtype: torch.dtype = torch.float32) -> RunningTeacher:
    return RunningTeacher(tiny_model(vocab_size, seed=1).to(dtype), vocab_size=vocab_size)


@pytest.fixture(scope="module")
def live(stored: Teacher) -> OnlineTeacher:
    return OnlineTeacher(running(stored.vocab_size), top_k=TOP_K, batch_positions=40)


@pytest.fixture(scope="module")
def dense(stored: Teacher) -> torch.Tensor:
    """[T, V] float64 log-probs of the live teacher at every target position of the corpus."""
    return logprobs_of(tiny_model(stored.vocab_size, seed=1), stored.corpus)[0]


def batch_of(teacher: Teacher, rows: list[int], layout: Layout) -> dict[str, Any]:
    dataset = CacheRows(teacher, np.arange(teacher.corpus.num_rows), optional=("hidden",))
    return collate([dataset[row] for row in rows], layout=layout)


def positions_of(teacher: Teacher, rows: list[int]) -> torch.Tensor:
    """Which of the corpus' target positions are those of some rows."""
    offsets = teacher.corpus.target_offsets(0, teacher.corpus.num_rows)
    return torch.from_numpy(np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows]))


def trainer_of(
    teacher: Teacher, out: Path, objective: Objective, live: OnlineTeacher | None, **settings: Any
) -> DistillTrainer:
    defaults: dict[str, Any] = {"learning_rate": 1e-2, "batch_rows": 4, "device": "cpu"}
    config = TrainConfig(cache=cache_folder(teacher.corpus), out=out, **{**defaults, **settings})
    student = tiny_model(teacher.vocab_size, seed=5)
    return DistillTrainer(student, training_arguments(config), teacher=teacher, objective=objective, live=live)


ROWS = [7, 3, 12, 1, 0, 20]
LAYOUTS: tuple[Layout, ...] = ("rows", "flat", "documents")


@pytest.mark.parametrize("limit", [1, 40, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_target_is_in_one_line_with_its_own_document_alone(stored: Teacher, layout: Layout, limit: int) -> None:
    batch = batch_of(stored, ROWS, layout)
    # Typed out again from the corpus: what each target has read of its own document.
    expected = []
    for row in ROWS:
        own = stored.corpus.rows(row, row + 1)
        segments = segment_ids(own.document_start, own.offsets)
        for position in target_positions(own.supervised).tolist():
            first = int(np.flatnonzero(segments == segments[position])[0])
            expected.append(own.tokens[first : position + 1].tolist())
    found: dict[int, list[int]] = {}
    for lines in segment_lines(batch, limit):
        assert len(lines.input_ids) == 1 or lines.input_ids.numel() <= limit
        for segment, place, target in zip(
            *(x.tolist() for x in (lines.segment, lines.place, lines.target)), strict=True
        ):
            assert target not in found
            found[target] = lines.input_ids[segment, : place + 1].tolist()
    assert [found[target] for target in range(len(expected))] == expected
    assert len(found) == len(expected) == len(batch["labels"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_targets_are_those_of_the_dense_distributions(
    stored: Teacher, live: OnlineTeacher, dense: torch.Tensor, layout: Layout
) -> None:
    batch = batch_of(stored, ROWS, layout)
    fields = live.targets(batch, whole=True)
    expected_TV = dense[positions_of(stored, ROWS)]
    torch.testing.assert_close(fields[LOGPROBS].double(), expected_TV, rtol=0, atol=FIELD_TOLERANCE)
    head = expected_TV.topk(TOP_K)
    assert torch.equal(fields["token_ids"], head.indices)
    tail = expected_TV.scatter(-1, head.indices, -torch.inf)
    log_tail = tail.logsumexp(-1)
    normal = tail - log_tail[:, None]
    others = expected_TV.scatter(-1, batch["labels"][:, None], -torch.inf)
    for name, values in {
        "logprobs": head.values,
        "log_tail": log_tail,
        "tail_entropy": -(normal.exp() * normal.masked_fill(normal == -torch.inf, 0.0)).sum(-1),
        "log_target": expected_TV.gather(-1, batch["labels"][:, None])[:, 0],
        "log_not_target": others.logsumexp(-1),
    }.items():
        torch.testing.assert_close(fields[name].double(), values, rtol=FIELD_TOLERANCE, atol=FIELD_TOLERANCE)
    assert LOGPROBS not in live.targets(batch, whole=False)
    assert not any(values.is_inference() for values in fields.values())


def test_autocast_of_the_student_leaves_the_teacher_alone(stored: Teacher, live: OnlineTeacher) -> None:
    batch = batch_of(stored, ROWS, "rows")
    plain = live.targets(batch, whole=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = live.targets(batch, whole=True)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_fresh_draws_have_the_tail_as_their_mean(stored: Teacher, dense: torch.Tensor) -> None:
    batch = batch_of(stored, ROWS[:2], "rows")
    drawing = OnlineTeacher(running(stored.vocab_size), top_k=TOP_K, num_samples=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        rounds = [drawing.targets(batch, whole=False)["tail_samples"] for _ in range(200)]
    assert not torch.equal(rounds[0], rounds[1])
    p_TV = dense[positions_of(stored, ROWS[:2])].exp()
    tail_TV = p_TV.scatter(-1, p_TV.topk(TOP_K).indices, 0.0)
    counts_TV = torch.zeros_like(p_TV).scatter_add(-1, torch.cat(rounds, 1), torch.ones(len(p_TV), 3200).double())
    # A round's share of a token is off by at most 1, and so has a standard deviation of at most a half.
    expected_TV = tail_TV / tail_TV.sum(-1, keepdim=True)
    assert float((counts_TV / 3200 - expected_TV).abs().max()) < 5 * 0.5 / 200**0.5


# ---- losses and gradients ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["kd", "tad"])
def test_loss_and_gradient_are_the_dense_ones(
    stored: Teacher, live: OnlineTeacher, dense: torch.Tensor, tmp_path: Path, name: Any, layout: Layout
) -> None:
    split: dict[str, Any] = {"top_k": 3, "beta": BETA} if name == "tad" else {}
    objective = Objective.of(1.0, [LossConfig(name=name, **split)], stored, live=live.stored)
    assert objective.losses[0].tail == "exact"
    trainer = trainer_of(stored, tmp_path, objective, live, layout=layout)
    batch = batch_of(stored, ROWS, layout)
    model: Any = trainer.model
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    chosen = positions_of(stored, ROWS)
    student = tiny_model(stored.vocab_size, seed=5).double()
    logits_TV = student_logits(student, stored)[chosen]
    q = [reference.softmax(row) for row in logits_TV.tolist()]
    p = dense[chosen].exp().tolist()
    labels = batch["labels"].tolist()
    head = [reference.top_ids(row, 3) for row in p]
    alphas = [reference.mass(row, reference.others(len(row), ids)) for row, ids in zip(p, head, strict=True)]
    betas = reference.beta_x(alphas, batch["segments"].tolist(), BETA)
    total, gradient = 0.0, []
    for p_t, q_t, y, ids, beta_x in zip(p, q, labels, head, betas, strict=True):
        value = reference.forward_kl(p_t, q_t) if name == "kd" else reference.tad(p_t, q_t, ids, beta_x)
        slope = reference.kl_gradient(p_t, q_t) if name == "kd" else reference.tad_gradient(p_t, q_t, ids, beta_x)
        total += value + reference.cross_entropy(q_t, y)
        both = zip(slope, reference.cross_entropy_gradient(q_t, y), strict=True)
        gradient.append([(a + b) / len(labels) for a, b in both])
    assert float(loss.detach()) == pytest.approx(total / len(labels), rel=1e-5)
    (logits_TV * torch.tensor(gradient, dtype=torch.float64)).sum().backward()  # type: ignore[no-untyped-call]
    for key, parameter in student.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[key].double(), parameter.grad, rtol=0, atol=GRADIENT_TOLERANCE * scale)


def student_logits(model: Any, teacher: Teacher) -> torch.Tensor:
    """[T, V] the logits of all target positions, each document run alone, differentiable."""
    rows = teacher.corpus.rows(0, teacher.corpus.num_rows)
    segments = segment_ids(rows.document_start, rows.offsets)
    parts = []
    for segment in range(int(segments[-1]) + 1):
        ids = torch.from_numpy(rows.tokens[segments == segment])[None]
        parts.append(model(input_ids=ids, use_cache=False).logits[0, :, : teacher.vocab_size])
    return torch.cat(parts)[torch.from_numpy(target_positions(rows.supervised))]


@pytest.mark.parametrize("name", ["kd", "tad", "reverse_kl"])
def test_training_online_is_training_from_stored_hidden_states(stored: Teacher, tmp_path: Path, name: Any) -> None:
    """A teacher in bfloat16, whose hidden states a cache keeps without loss."""
    beside = OnlineTeacher(running(stored.vocab_size, torch.bfloat16), top_k=12, batch_positions=1)
    curves, weights = [], []
    for each in (None, beside):
        # Split where the cache was: the mass off fewer ids follows from log-probs, which are stored to 1e-2.
        loss = LossConfig(name=name, tail="exact", top_k=12 if name == "tad" else None)
        objective = Objective.of(1.0, [loss], stored, live=None if each is None else each.stored)
        trainer = trainer_of(
            stored, tmp_path / str(each is None), objective, each, max_steps=3, log_every=1, gradient_accumulation=2
        )
        trainer.train()
        curves.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        weights.append(torch.cat([p.detach().flatten() for p in trainer._student.parameters()]))
    assert curves[0] == pytest.approx(curves[1], rel=ROUNDING[name])
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < ROUNDING[name]


def test_a_whole_run_says_what_ran_beside_it_and_is_not_continued_by_another(
    stored: Teacher, live: OnlineTeacher, tmp_path: Path
) -> None:
    config = TrainConfig(
        cache=cache_folder(stored.corpus),
        out=tmp_path / "run",
        student=StudentConfig(hidden_size=16, num_layers=1, num_heads=2),
        loss="tad",
        top_k=3,
        max_steps=2,
        save_every=1,
        batch_rows=4,
        device="cpu",
    )
    trainer = train(config, live=lambda teacher, device: live)
    assert trainer is not None
    assert trainer.objective.losses[0].tail == "exact"
    # Evaluation is against the cache, so that runs can be compared.
    assert trainer.kl_is == "unbiased"
    assert train(replace(config, resume=True), live=lambda teacher, device: live) is None
    with pytest.raises(MismatchError, match="beside the student"):
        train(replace(config, resume=True, tail="exact"))


# ---- reading the corpus alone ----


@pytest.mark.parametrize("workers", [0, 1])
def test_the_order_of_rows_is_the_same_without_targets(stored: Teacher, workers: int) -> None:
    settings: dict[str, Any] = {"batch_rows": 3, "seed": 4, "collate": collate_block}
    whole = list(CacheLoader(stored, **settings))
    bare = list(CacheLoader(stored, targets=False, num_workers=workers, **settings))
    assert len(whole) == len(bare) > 1
    for a, b in zip(whole, bare, strict=True):
        for name in ("input_ids", "position_ids", "target_index", "labels", "segments", "rows"):
            assert torch.equal(a[name], b[name])
        assert b["teacher"]["token_ids"].shape == (len(b["labels"]), 0)
        assert torch.isnan(b["teacher"]["log_target"]).all()


def test_plain_language_modelling_reads_no_teacher(
    stored: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for weight in (1e-300, 0.0):  # with a divergence that counts for nothing, and without any
        added = [LossConfig(name="kd", tail="bucket", weight=weight)] if weight else []
        if not added:
            monkeypatch.setattr(Teacher, "stored", property(lambda self: pytest.fail("targets were read")))
        trainer = trainer_of(stored, tmp_path / str(len(added)), Objective.of(1.0, added, stored), None, max_steps=3)
        trainer.held_out = CacheRows(stored, np.empty(0, np.int64))
        trainer.train()
        losses.append(trainer.state.log_history[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("loss", "tail", "message"),
    [
        ("hidden_cosine", None, "gives distributions only"),
        ("kd", "prior", "mean tail"),
        ("kd", "sampled", "m = 0"),
    ],
)
def test_what_a_live_teacher_cannot_give_is_refused(
    stored: Teacher, live: OnlineTeacher, loss: Any, tail: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Objective.of(1.0, [LossConfig(name=loss, tail=tail)], stored, live=live.stored)


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 10**6}, {"num_samples": -1}, {"batch_positions": 0}])
def test_numbers_that_make_no_sense_are_refused(stored: Teacher, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="expected 1 <= top_k"):
        OnlineTeacher(running(stored.vocab_size), **settings)


def test_a_teacher_that_is_not_finite_is_refused(stored: Teacher) -> None:
    model = tiny_model(stored.vocab_size, seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    broken = RunningTeacher(model, vocab_size=stored.vocab_size)
    with pytest.raises(TeacherError, match="finite logits"):
        OnlineTeacher(broken, top_k=3).targets(batch_of(stored, ROWS, "rows"), whole=False)


def test_a_batch_without_targets_has_none(stored: Teacher, live: OnlineTeacher) -> None:
    batch = batch_of(stored, ROWS[:1], "rows")
    nothing = {**batch, "labels": batch["labels"][:0], "target_index": batch["target_index"][:0]}
    fields = live.targets(nothing, whole=True)
    assert {len(values) for values in fields.values()} == {0}


# ---- the command ----


def test_the_command_runs_the_teacher_it_is_told_to(stored: Teacher, tmp_path: Path) -> None:
    tiny_model(stored.vocab_size, seed=1).save_pretrained(tmp_path / "model")
    config = TrainConfig(
        cache=cache_folder(stored.corpus),
        out=tmp_path / "run",
        student=StudentConfig(hidden_size=16, num_layers=1, num_heads=2),
        online=str(tmp_path / "model"),
        loss="kd",
        max_steps=1,
        device="cpu",
    )
    with pytest.raises(ConfigError, match="argument `live`"):
        train(config)
    run(config)
    record = json.loads((tmp_path / "run" / "tailcache.json").read_text())
    assert record["config"]["tail"] == "exact"
    assert record["config"]["online"] == str(tmp_path / "model")
    assert record["online"] == {
        "weights": running(stored.vocab_size).weights_hash(),
        "dtype": "float32",
        "top_k": stored.top_k,
        "num_samples": 0,
    }


def test_a_teacher_of_another_tokenizer_is_refused(stored: Teacher, tmp_path: Path) -> None:
    tiny_model(stored.vocab_size, seed=1).save_pretrained(tmp_path / "model")
    build_tokenizer("wordlevel", eos="<other>").save_pretrained(tmp_path / "model")
    config = TrainConfig(cache=cache_folder(stored.corpus), out=tmp_path / "run", online=str(tmp_path / "model"))
    with pytest.raises(MismatchError, match="tokenizer"):
        run(config)
