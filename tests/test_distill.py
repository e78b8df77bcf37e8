"""Training from a cache: the truth test, what must leave no trace in the loss, evaluation, saving, resuming."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from children import run_group
from loss_cases import CODEC_MAX, CODEC_MEAN, MICRO_BATCH
from places import cache_folder
from tokenizer_fixtures import build_tokenizer
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from training_fixtures import (
    LLAMA,
    logprobs_of,
    make_cache,
    make_corpus,
    objective_for,
    tiny_model,
    write_teacher,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tailcache.pipeline.capture import capture
from tailcache.pipeline.config import CaptureConfig
from tailcache.scripts.train import run
from tailcache.storage.alignment import next_tokens, target_positions
from tailcache.storage.codec import Targets
from tailcache.storage.errors import ConfigError, IncompleteError, MismatchError, NotFoundError, StudentError
from tailcache.storage.fingerprint import fingerprint
from tailcache.storage.reader import Teacher, open_cache
from tailcache.trainers import fused_head, terms
from tailcache.trainers.batches import CacheRows, Layout, RowTargets, collate
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.distill import DistillTrainer, training_arguments
from tailcache.trainers.linear_head import BUFFER_BYTES
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.objective import Objective
from tailcache.trainers.run import train
from tailcache.trainers.soundness import SOUND_TAILS

SMALL = StudentConfig(hidden_size=32, num_layers=2, num_heads=2)
KL = partial(objective_for, clm_weight=0.0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return make_cache(tmp_path_factory.mktemp("distill") / "cache", temperatures=(2.0,))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """The teacher of `tiny_model(21)` with every id stored."""
    return make_cache(tmp_path_factory.mktemp("whole") / "cache", top_k=None)


def _config(source: Teacher, out: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "student": SMALL,
        "learning_rate": 1e-2,
        "batch_rows": 4,
        "max_steps": 4,
        "eval_every": 2,
        "log_every": 1,
        "device": "cpu",
    }
    return TrainConfig(cache=cache_folder(source.corpus), out=out, **{**defaults, **settings})


@pytest.fixture(scope="module")
def hidden_states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    """Two real captures of `tiny_model(21)` with its hidden states."""
    folder = tmp_path_factory.mktemp("hidden")
    tokenizer = build_tokenizer("wordlevel")
    make_corpus(folder / "cache", tokenizer)
    tiny_model(21).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for kind in ("bf16", "int8"):
        settings: dict[str, Any] = {"name": kind, "hidden": kind, "top_k": 12, "num_samples": 4, "device": "cpu"}
        capture(CaptureConfig(cache=folder / "cache", teacher=str(folder / "model"), **settings), show_progress=False)
    cache = open_cache(folder / "cache")
    return {kind: cache.teacher(kind) for kind in ("bf16", "int8")}


def _trainer(teacher: Teacher, out: Path, objective: Objective, model: Any = None, **settings: Any) -> Any:
    layout: Layout | None = settings.pop("layout", None)
    head_mode = settings.pop("head_mode", "one-pass")
    return DistillTrainer(
        tiny_model(teacher.vocab_size, seed=5) if model is None else model,
        training_arguments(_config(teacher, out, **settings)),
        teacher=teacher,
        objective=objective,
        layout=layout,
        head_mode=head_mode,
    )


def _rows(teacher: Teacher) -> list[RowTargets]:
    dataset = CacheRows(teacher, np.arange(teacher.corpus.num_rows), optional=teacher.optional)
    return [dataset[i] for i in range(len(dataset))]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the truth test: a student that is its teacher has nothing to learn ----


def _position_kl(trainer: Any, rows: list[RowTargets], layout: Layout) -> list[float]:
    """The loss of every row by itself, from the trainer."""
    batches = [collate([row], layout=layout) for row in rows if len(row.targets)]
    with torch.no_grad():
        return [float(trainer.compute_loss(trainer.model, batch)) for batch in batches]


def _shifted(row: RowTargets) -> RowTargets:
    """The targets of each position moved to the next one."""
    return replace(row, targets=row.targets[np.roll(np.arange(len(row.targets)), 1)])


@pytest.mark.parametrize("layout", ["rows", "flat", "documents"])
def test_a_student_that_is_its_teacher_has_no_loss_unless_shifted(
    whole: Teacher, layout: Layout, tmp_path: Path
) -> None:
    trainer = _trainer(whole, tmp_path, KL(whole, "kd"), tiny_model(21), layout=layout)
    rows = _rows(whole)
    batch = collate(rows, layout=layout)
    with torch.no_grad():
        mean = float(trainer.compute_loss(trainer.model, batch))
        largest = max(_position_kl(trainer, rows, layout))
        shifted = float(trainer.compute_loss(trainer.model, collate([_shifted(r) for r in rows], layout=layout)))
        beside = {**batch, "target_index": (batch["target_index"] + 1).clamp_max(batch["input_ids"].numel() - 1)}
        moved = float(trainer.compute_loss(trainer.model, beside))
    assert abs(mean) <= CODEC_MEAN
    assert largest <= CODEC_MAX
    assert shifted > 0.1
    assert moved > 0.1
    metrics = trainer.evaluate()
    assert abs(metrics["eval_kl"]) <= CODEC_MEAN
    assert metrics["eval_top1_agreement"] == 1.0
    assert abs(metrics["eval_cross_entropy"] - metrics["eval_teacher_cross_entropy"]) < 1e-3


@pytest.mark.parametrize("module", ["trainers.batches"])
def test_an_alignment_that_is_off_by_one_fails_the_truth_test(
    whole: Teacher, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error itself, put into the one place where alignment is decided."""
    trainer = _trainer(whole, tmp_path, KL(whole, "kd"), tiny_model(21))
    rows = _rows(whole)
    monkeypatch.setattr(
        f"tailcache.{module}.target_positions", lambda supervised: np.maximum(target_positions(supervised) - 1, 0)
    )
    with torch.no_grad():
        assert float(trainer.compute_loss(trainer.model, collate(rows))) > 0.1


def test_tad_of_a_student_that_is_its_teacher(whole: Teacher, tmp_path: Path) -> None:
    """beta(X) multiplies the codec's error too; it stays near its bound."""
    trainer = _trainer(whole, tmp_path, KL(whole, "tad"), tiny_model(21))
    with torch.no_grad():
        assert abs(float(trainer.compute_loss(trainer.model, collate(_rows(whole))))) <= 10 * CODEC_MEAN


def test_the_gradient_of_the_truth_is_zero_and_of_another_student_is_not(whole: Teacher, tmp_path: Path) -> None:
    norms = []
    for seed in (0, 5):
        trainer = _trainer(whole, tmp_path, KL(whole, "kd"), tiny_model(21, seed=seed))
        trainer.compute_loss(trainer.model, collate(_rows(whole))).backward()
        norms.append(math.sqrt(math.fsum(float(p.grad.square().sum()) for p in trainer.model.parameters())))
    assert norms[0] < 1e-2 * norms[1]


def test_the_truth_through_the_real_capture(tmp_path: Path) -> None:
    """prepare's store, capture's own forward and head, the trainer's forward: zero, and not when shifted."""
    tokenizer = build_tokenizer("wordlevel")
    corpus = make_corpus(tmp_path / "cache", tokenizer)
    model = tiny_model(corpus.vocab_size)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    settings: dict[str, Any] = {"cache": tmp_path / "cache", "teacher": str(tmp_path / "teacher"), "device": "cpu"}
    capture(CaptureConfig(name="whole", top_k=corpus.vocab_size, num_samples=0, **settings), show_progress=False)
    capture(CaptureConfig(name="kept", top_k=12, num_samples=16, **settings), show_progress=False)
    cache = open_cache(tmp_path / "cache")
    whole, kept = cache.teacher("whole"), cache.teacher("kept")

    trainer = _trainer(whole, tmp_path / "out", KL(whole, "kd"), tiny_model(corpus.vocab_size))
    rows = _rows(whole)
    with torch.no_grad():
        assert abs(float(trainer.compute_loss(trainer.model, collate(rows)))) <= CODEC_MEAN
        assert float(trainer.compute_loss(trainer.model, collate([_shifted(row) for row in rows]))) > 0.1
        # With samples the value is an estimate: its mean is 0 within the standard error of the draws.
        sampled = _trainer(kept, tmp_path / "out", KL(kept, "kd"), tiny_model(corpus.vocab_size))
        values = _position_kl(sampled, _rows(kept), "rows")
        assert abs(np.mean(values)) <= 5 * np.std(values) / len(values) ** 0.5
        bucket = _trainer(kept, tmp_path / "out", KL(kept, "kd", tail="bucket"), tiny_model(corpus.vocab_size))
        assert abs(float(bucket.compute_loss(bucket.model, collate(_rows(kept))))) <= CODEC_MEAN


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 2e-4), ("int8", 2e-3)])
@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(name="kd", tail="exact"),
        LossConfig(name="kd", tail="exact", temperature=3.0),
        LossConfig(name="tad", tail="exact"),
        LossConfig(name="dkd", tail="exact"),
        LossConfig(name="atkd", tail="exact", wraps="jsd"),
        LossConfig(name="reverse_kl", tail="exact"),
        LossConfig(name="jsd", tail="exact"),
        LossConfig(name="skew_reverse_kl", tail="exact"),
        LossConfig(name="todi", tail="exact"),
        LossConfig(name="hidden_cosine"),
    ],
    ids=lambda loss: f"{loss.name} at {loss.temperature:g}",
)
def test_the_truth_through_stored_hidden_states(
    hidden_states: dict[str, Teacher], kind: str, bound: float, loss: LossConfig, tmp_path: Path
) -> None:
    """Zero but for the rounding of the stored hidden state, and not when shifted."""
    teacher = hidden_states[kind]
    trainer = _trainer(teacher, tmp_path, KL(teacher, loss), tiny_model(21))
    assert trainer.why_full_logits is None
    rows = _rows(teacher)
    with torch.no_grad():
        assert abs(float(trainer.compute_loss(trainer.model, collate(rows)))) <= bound
        shifted = [_shifted(row) for row in rows]
        assert float(trainer.compute_loss(trainer.model, collate(shifted))) > 50 * bound


# ---- what must leave no trace in the loss ----


OBJECTIVES: dict[str, Callable[[Teacher], Objective]] = {
    "clm": partial(objective_for),
    "kd-sampled": lambda t: objective_for(t, "kd"),
    "kd-bucket": lambda t: objective_for(t, LossConfig(name="kd", tail="bucket", weight=2.0), clm_weight=0.5),
    "tad-sampled": lambda t: objective_for(t, "tad"),
    "tad-prior": lambda t: objective_for(t, "tad", tail="prior", top_k=5),
    "dkd": lambda t: objective_for(t, "dkd", non_target_weight=2.0),
    "reverse_kl-uniform": lambda t: objective_for(t, "reverse_kl", tail="uniform"),
    "jsd-bucket": lambda t: objective_for(t, "jsd"),
    "todi-drop": lambda t: objective_for(t, "todi", tail="drop"),
    "rs_kd": lambda t: objective_for(t, "rs_kd", num_draws=5, power=0.5),
    "kd at 2": lambda t: objective_for(t, "kd", temperature=2.0),
    "several": lambda t: objective_for(
        t, LossConfig(name="tad", top_k=3), LossConfig(name="skew_kl", weight=0.3), LossConfig(name="todi", weight=0.1)
    ),
}


def _loss_and_gradient(trainer: Any, batches: list[dict[str, Any]]) -> tuple[float, torch.Tensor]:
    """As ``Trainer`` accumulates: the shares of the micro-batches, and the sum of their gradients."""
    trainer.model.zero_grad()
    samples, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(samples)
    loss = math.fsum(float(trainer.training_step(trainer.model, batch, count)) for batch in samples)
    return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_padding_and_layout_do_not_change_the_loss(teacher: Teacher, name: str, tmp_path: Path) -> None:
    trainer = _trainer(teacher, tmp_path, OBJECTIVES[name](teacher))
    rows = _rows(teacher)[:9]
    loss, gradient = _loss_and_gradient(trainer, [collate(rows)])
    variants: dict[str, list[dict[str, Any]]] = {
        "row by row": [collate([row]) for row in rows],
        "uneven": [collate(rows[:1]), collate(rows[1:7]), collate(rows[7:])],
        "padded": [collate(rows, pad_to_multiple_of=37)],
        "flat": [collate(rows, layout="flat")],
        "documents": [collate(rows, layout="documents")],
        "another order": [collate(rows[::-1])],
    }
    for name, batches in variants.items():
        other, slope = _loss_and_gradient(trainer, batches)
        assert abs(other - loss) <= MICRO_BATCH * max(1.0, abs(loss)), name
        assert (slope - gradient).abs().max() <= MICRO_BATCH * max(1.0, float(gradient.abs().max())), name


WITH_HIDDEN: dict[str, Callable[[Teacher], Objective]] = {
    "tad-exact": lambda t: objective_for(t, "tad", tail="exact"),
    "dkd-exact": lambda t: objective_for(t, "dkd", tail="exact"),
    "kd-exact at 3": lambda t: objective_for(t, "kd", tail="exact", temperature=3.0),
    "todi-exact": lambda t: objective_for(t, "todi", tail="exact"),
    "cosine": lambda t: objective_for(t, "hidden_cosine"),
    "several": lambda t: objective_for(
        t, LossConfig(name="hidden_cosine", weight=0.5), LossConfig(name="tad"), LossConfig(name="jsd", tail="exact")
    ),
}


@pytest.mark.parametrize("name", WITH_HIDDEN)
def test_losses_from_hidden_states_do_not_depend_on_the_batch_and_train(
    hidden_states: dict[str, Teacher], name: str, tmp_path: Path
) -> None:
    teacher = hidden_states["int8"]
    trainer = _trainer(teacher, tmp_path, WITH_HIDDEN[name](teacher))
    rows = _rows(teacher)[:9]
    loss, gradient = _loss_and_gradient(trainer, [collate(rows)])
    for batches in ([collate([row]) for row in rows], [collate(rows, layout="documents")], [collate(rows[::-1])]):
        other, slope = _loss_and_gradient(trainer, batches)
        assert abs(other - loss) <= MICRO_BATCH * max(1.0, abs(loss))
        assert (slope - gradient).abs().max() <= MICRO_BATCH * max(1.0, float(gradient.abs().max()))
    # Autocast rounds the factors of the head, not the teacher's.
    with torch.autocast("cpu", torch.bfloat16):
        rounded = float(trainer.compute_loss(trainer.model, collate(rows)).detach())
    assert rounded != loss
    assert rounded == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("name", ["tad-exact", "dkd-exact", "kd-exact at 3", "todi-exact"])
def test_losses_from_hidden_states_are_the_same_fused_and_from_full_logits(
    hidden_states: dict[str, Teacher], name: str, tmp_path: Path
) -> None:
    teacher = hidden_states["bf16"]
    _assert_alike(_fused_and_full(teacher, WITH_HIDDEN[name](teacher), HEADS["gemma2, capped"], tmp_path, "one-pass"))


def test_runs_with_hidden_states(hidden_states: dict[str, Teacher], tmp_path: Path) -> None:
    teacher = hidden_states["bf16"]
    losses = (LossConfig(name="hidden_cosine"), LossConfig(name="reverse_kl", tail="exact"))
    settings: dict[str, Any] = {"teacher": "bf16", "clm_weight": 0.0, "batch_rows": 18, "max_steps": 12, "warmup": 0.0}
    train(_config(teacher, tmp_path / "both", losses=losses, **settings))
    curve = _lines(tmp_path / "both" / "training.jsonl")
    for part in ("hidden_cosine", "reverse_kl"):
        assert curve[-1][part] < 0.97 * curve[0][part]


def test_atkd_alone_depends_on_the_micro_batches_and_not_on_padding_or_layout(teacher: Teacher, tmp_path: Path) -> None:
    """What is hard is decided among the positions of one micro-batch."""
    trainer = _trainer(teacher, tmp_path, objective_for(teacher, "atkd"))
    rows = _rows(teacher)[:9]
    loss, gradient = _loss_and_gradient(trainer, [collate(rows)])
    for batch in (
        collate(rows, pad_to_multiple_of=37),
        collate(rows, layout="flat"),
        collate(rows, layout="documents"),
        collate(rows[::-1]),
    ):
        other, slope = _loss_and_gradient(trainer, [batch])
        assert abs(other - loss) <= MICRO_BATCH * abs(loss)
        assert (slope - gradient).abs().max() <= MICRO_BATCH * max(1.0, float(gradient.abs().max()))
    other, _ = _loss_and_gradient(trainer, [collate([row]) for row in rows])
    assert abs(other - loss) > 1e-4
    # Cut like this, it is the mean over the micro-batches of each one's own loss, weighted by their positions.
    parts, counts = [], []
    for part in (rows[:4], rows[4:]):
        parts.append(_loss_and_gradient(trainer, [collate(part)])[0])
        counts.append(sum(len(row.targets) for row in part))
    cut, _ = _loss_and_gradient(trainer, [collate(rows[:4]), collate(rows[4:])])
    assert cut == pytest.approx(np.average(parts, weights=counts), rel=MICRO_BATCH)


# ---- the fused head and full logits ----

HEADS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model(21, seed=5),
    "padded": lambda: tiny_model(30, seed=5),
    "tied": lambda: tiny_model(21, seed=5, **LLAMA, tie_word_embeddings=True),
    "phi, biased": lambda: tiny_model(21, model_type="phi", seed=5, **LLAMA),
    "granite, scaled": lambda: tiny_model(21, model_type="granite", seed=5, **LLAMA, logits_scaling=0.5),
    "gemma2, capped": lambda: tiny_model(
        21, model_type="gemma2", seed=5, **LLAMA, head_dim=8, sliding_window=4, final_logit_softcapping=3.0
    ),
}


def _without_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailcache.trainers.distill.find_linear_head", lambda model, vocab_size: "it was not asked")


def _fused_and_full(
    teacher: Teacher, objective: Objective, make: Callable[[], Any], out: Path, head_mode: str
) -> list[tuple[float, torch.Tensor, dict[str, float]]]:
    """Loss, gradient and held-out metrics, fused and from full logits."""
    found = []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                _without_fusion(patch)
            trainer = _trainer(teacher, out, objective, make(), head_mode=head_mode)
        assert (trainer.why_full_logits is None) == fused
        batches = [collate(_rows(teacher)[:5]), collate(_rows(teacher)[5:9])]
        found.append((*_loss_and_gradient(trainer, batches), trainer.evaluate()))
    return found


def _assert_alike(found: list[tuple[float, torch.Tensor, dict[str, float]]]) -> None:
    (loss, gradient, metrics), (full_loss, full_gradient, full_metrics) = found
    assert abs(loss - full_loss) <= 1e-6 * abs(full_loss)
    assert (gradient - full_gradient).norm() <= 1e-6 * full_gradient.norm()
    assert metrics == pytest.approx(full_metrics, rel=1e-6)


@pytest.mark.parametrize("head_mode", ["one-pass", "recompute"])
@pytest.mark.parametrize("name", [*OBJECTIVES, "atkd"])
def test_every_loss_is_the_same_fused_and_from_full_logits(
    teacher: Teacher, name: str, head_mode: str, tmp_path: Path
) -> None:
    objective = objective_for(teacher, "atkd") if name == "atkd" else OBJECTIVES[name](teacher)
    _assert_alike(_fused_and_full(teacher, objective, HEADS["llama"], tmp_path, head_mode))


@pytest.mark.parametrize("loss", ["tad", "jsd-dense"])
@pytest.mark.parametrize("head", HEADS)
def test_every_linear_head_is_the_same_fused_and_from_full_logits(
    teacher: Teacher, head: str, loss: str, tmp_path: Path
) -> None:
    objective = objective_for(teacher, "tad") if loss == "tad" else objective_for(teacher, "jsd", tail="uniform")
    _assert_alike(_fused_and_full(teacher, objective, HEADS[head], tmp_path, "one-pass"))


def test_a_head_that_is_not_linear_is_trained_through_full_logits_and_said_so(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_student_head import adapted

    model = adapted(tiny_model(21, seed=5))
    trainer = _trainer(teacher, tmp_path / "a", objective_for(teacher, "tad"), model)
    assert trainer.why_full_logits == "its head is a Adapted, not a plain linear layer"
    loss, _ = _loss_and_gradient(trainer, [collate(_rows(teacher)[:5])])
    assert math.isfinite(loss)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_output_embeddings().parameters())
    # The adapter's product put into the weight is the same model with a linear head.
    plain, head = tiny_model(21, seed=5), model.get_output_embeddings()
    plain.get_output_embeddings().weight.data = (head.base.weight + head.up.weight @ head.down.weight).detach()
    fused = _trainer(teacher, tmp_path / "b", objective_for(teacher, "tad"), plain)
    assert fused.why_full_logits is None
    assert _loss_and_gradient(fused, [collate(_rows(teacher)[:5])])[0] == pytest.approx(loss, rel=1e-6)

    _without_fusion(monkeypatch)
    train(_config(teacher, tmp_path / "said", max_steps=1))
    said = "note: the loss is worked out from full logits, which takes more memory and time: it was not asked"
    assert said in capsys.readouterr().out.splitlines()


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tailcache":  # an operation of our own: look inside
            [ours] = [vars(m)[f"_{func._opname}"] for m in (fused_head, terms) if f"_{func._opname}" in vars(m)]
            with self:
                result = ours._init_fn(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
        return result


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """A vocabulary much wider than the model."""
    return make_cache(tmp_path_factory.mktemp("wide") / "cache", tokenizer=build_tokenizer(), temperatures=(2.0,))


@pytest.mark.parametrize("head_mode", ["one-pass", "recompute"])
@pytest.mark.parametrize("name", ["clm", "tad-sampled", "tad-prior", "dkd", "reverse_kl-uniform", "kd at 2", "several"])
def test_logits_never_exist_as_a_whole(
    wide: Teacher, name: str, head_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in training nor in evaluation; and full logits are seen by the same measurement."""
    monkeypatch.setitem(BUFFER_BYTES, "cpu", 40_000)
    monkeypatch.setattr("tailcache.trainers.linear_head.VOCABULARY_TILE", 64)
    sizes = {**LLAMA, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    make = partial(tiny_model, wide.vocab_size, seed=5, **sizes)
    batch = collate(_rows(wide))
    whole = len(batch["labels"]) * wide.vocab_size
    largest = []
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                _without_fusion(patch)
            trainer = _trainer(wide, tmp_path, OBJECTIVES[name](wide), make(), head_mode=head_mode)
        with LargestTensor() as training:
            trainer.compute_loss(trainer.model, batch).backward()
        with LargestTensor() as evaluation:
            trainer._metrics(trainer.model, batch)
        largest.append((training.largest, evaluation.largest))
    assert max(largest[0]) < 0.4 * whole
    assert min(largest[1]) >= whole


def _close(found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> None:
    assert abs(found[0] - expected[0]) <= MICRO_BATCH * abs(expected[0])
    assert (found[1] - expected[1]).abs().max() <= MICRO_BATCH * float(expected[1].abs().max())


@pytest.mark.parametrize("head_mode", ["one-pass", "recompute"])
@pytest.mark.parametrize("loss", ["tad", "reverse_kl"])
def test_gradient_checkpointing_changes_nothing(teacher: Teacher, head_mode: str, loss: str, tmp_path: Path) -> None:
    batches = [collate(_rows(teacher)[:5]), collate(_rows(teacher)[5:9]), collate(_rows(teacher)[9:11])]
    objective = objective_for(teacher, loss)
    plain = _loss_and_gradient(_trainer(teacher, tmp_path, objective, head_mode=head_mode), batches)
    trainer = _trainer(teacher, tmp_path, objective, tiny_model(21, seed=5), head_mode=head_mode)
    enable = getattr(trainer.model, "activation_checkpointing_enable", None)  # its name in later transformers
    (enable or trainer.model.gradient_checkpointing_enable)()
    _close(_loss_and_gradient(trainer, batches), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_mode", "backend"), [("one-pass", "eager"), ("recompute", "aot_eager")], ids=["one-pass", "recompute"]
)
def test_compilation_changes_nothing_and_happens_once(
    teacher: Teacher, head_mode: str, backend: str, tmp_path: Path
) -> None:
    """Derivatives are compiled too where the loss is part of the graph; one-pass breaks it."""
    make = partial(tiny_model, 21, seed=5, **{**LLAMA, "num_hidden_layers": 1})
    rows = _rows(teacher)
    batches = [collate(rows[start : start + size]) for start, size in ((0, 4), (4, 5), (9, 3), (12, 4), (16, 5))]
    objective = objective_for(teacher, "tad")
    plain = _loss_and_gradient(_trainer(teacher, tmp_path, objective, make(), head_mode=head_mode), batches)
    torch._dynamo.reset()
    trainer = _trainer(teacher, tmp_path, objective, make(), head_mode=head_mode)
    counter = CompileCounterWithBackend(backend)
    compiled: Any = torch.compile(trainer.model, backend=counter, dynamic=True)
    trainer.model.zero_grad()
    samples, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    total, counts = 0.0, []
    for batch in samples:
        part = trainer.compute_loss(compiled, batch, num_items_in_batch=count)
        part.backward()
        total += float(part.detach())
        counts.append(counter.frame_count)
    _close((total, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])), plain)
    assert 0 < counts[0] <= counts[2] == counts[-1]


@pytest.mark.parametrize("name", ["clm", "kd-sampled", "kd-bucket", "tad-sampled", "tad-prior"])
def test_the_loss_is_the_mean_of_the_reference_over_positions(teacher: Teacher, name: str, tmp_path: Path) -> None:
    """From the stored targets and the student's logits to the number that is trained on, in plain Python."""
    objective = OBJECTIVES[name](teacher)
    each = next(iter(objective.losses), LossConfig(name="kd"))
    trainer = _trainer(teacher, tmp_path, objective)
    rows = _rows(teacher)[:5]
    batch = collate(rows)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        logits = trainer.target_logits(trainer.model, batch)
    assert float(loss) == pytest.approx(float((outputs["values"].mean(0) * torch.tensor(objective.weights)).sum()))
    targets = Targets.concatenate([row.targets for row in rows])
    wanted = np.concatenate([next_tokens(row.tokens, target_positions(row.supervised)) for row in rows])
    q = [reference.softmax(z) for z in logits.double().tolist()]
    top_k = int(each.split.start)
    alphas = [
        math.fsum(math.exp(x) for x in [*row[top_k:], tail])
        for row, tail in zip(targets.logprobs.tolist(), targets.log_tail.tolist(), strict=True)
    ]
    beta = reference.beta_x(alphas, batch["segments"].tolist(), each.beta)
    total = 0.0
    for t, q_t in enumerate(q):
        total += objective.clm_weight * reference.cross_entropy(q_t, int(wanted[t]))
        if name == "clm":
            continue
        ids, logp = targets.token_ids[t].tolist(), targets.logprobs[t].tolist()
        beyond = reference.others(21, ids)
        alpha = math.exp(targets.log_tail[t])
        if each.tail == "bucket":
            ratio = math.log(alpha / reference.mass(q_t, beyond))
        else:
            samples = targets.tail_samples[t].tolist()
            prior = reference.restricted(teacher.mean_tail.tolist(), beyond)
            weights = [1 / len(samples)] * len(samples) if each.tail == "sampled" else list(prior.values())
            where = samples if each.tail == "sampled" else list(prior)
            cross = math.fsum(w * math.log(q_t[i]) for w, i in zip(weights, where, strict=True))
            ratio = math.log(alpha) - float(targets.tail_entropy[t]) - cross
        per_rank = [math.exp(x) * (x - math.log(q_t[i])) for i, x in zip(ids, logp, strict=True)]
        divergence = math.fsum(per_rank) + alpha * ratio
        if each.name == "tad":
            off_head = reference.others(21, ids[:top_k])
            between = alphas[t] * math.log(alphas[t] / reference.mass(q_t, off_head))
            tail_part = math.fsum(per_rank[top_k:]) + alpha * ratio - between  # = alpha KL2
            divergence = math.fsum(per_rank[:top_k]) + between + beta[t] * tail_part
        total += each.weight * divergence
    assert abs(float(loss) - total / len(q)) < 1e-5 * max(1.0, total / len(q))


def test_a_micro_batch_without_any_target_adds_nothing(teacher: Teacher, tmp_path: Path) -> None:
    trainer = _trainer(teacher, tmp_path, objective_for(teacher, "tad"))
    row = _rows(teacher)[0]
    silent = replace(row, supervised=np.zeros_like(row.supervised), targets=row.targets[:0])
    loss, gradient = _loss_and_gradient(trainer, [collate(_rows(teacher)[1:3])])
    both, slope = _loss_and_gradient(trainer, [collate(_rows(teacher)[1:3]), collate([silent])])
    assert both == pytest.approx(loss, abs=MICRO_BATCH)
    assert (slope - gradient).abs().max() <= MICRO_BATCH


def test_accumulated_steps_of_a_real_run_are_those_of_large_batches(teacher: Teacher, tmp_path: Path) -> None:
    """The whole path of ``Trainer``: same logged losses, parts and norms, and nearly the same weights after."""
    runs = []
    for rows, steps in ((6, 1), (2, 3), (1, 6)):
        settings = {"batch_rows": rows, "gradient_accumulation": steps, "max_steps": 5, "learning_rate": 1e-3}
        out = tmp_path / f"{rows}"
        trainer = train(_config(teacher, out, **settings))
        assert trainer is not None
        curve = _lines(out / "training.jsonl")
        runs.append([[line[k] for k in ("loss", "clm", "divergence", "grad_norm")] for line in curve])
        assert all(abs(line["loss"] - line["clm"] - line["divergence"]) < 1e-5 for line in curve)
        assert curve[-1]["positions_seen"] == trainer.positions_seen
    for run_ in runs[1:]:
        np.testing.assert_allclose(run_, runs[0], rtol=1e-4)


# ---- a whole run ----


def test_the_cache_cannot_replace_a_students_own_files(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}')
    (tokenizer / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(teacher.corpus, "tokenizer_dir", tokenizer)
    trainer = _trainer(teacher, tmp_path / "run", objective_for(teacher, "clm"))
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved/tokenizer.json").read_text() == "{}"
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())


@pytest.mark.parametrize("loss", ["clm", "kd", "tad"])
def test_a_run_leaves_a_plain_checkpoint_and_says_where_it_came_from(
    teacher: Teacher, loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    config = _config(teacher, out, loss=loss, max_steps=24, save_every=2, gradient_accumulation=2, keep_checkpoints=1)
    run(config)
    printed = capsys.readouterr()
    assert "{" not in printed.out + printed.err  # no dictionaries on the console
    assert len([line for line in printed.out.splitlines() if line.startswith("step ")]) == 13

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.use_cache is True
    assert fingerprint(tokenizer) == teacher.corpus.manifest["tokenizer"]["fingerprint"]
    assert not (out / "training_args.bin").exists()
    for folder, step in ((out, 24), (out / "checkpoint-24", 24)):
        record = json.loads((folder / "tailcache.json").read_text())
        assert record["corpus_hash"] == teacher.corpus.hash
        assert (record["teacher"], record["teacher_hash"]) == (teacher.name, teacher.hash)
        assert record["config"]["loss"] == loss
        assert record["config"]["top_k"] == (10 if loss == "tad" else None)
        assert record["config"]["student"]["hidden_size"] == 32
        assert (record["step"], record["positions_seen"]) == (step, _lines(out / "metrics.jsonl")[-1]["positions_seen"])
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-24"]

    curve = _lines(out / "metrics.jsonl")
    assert [line["step"] for line in curve] == list(range(0, 25, 2))
    assert curve[0]["positions_seen"] == 0
    assert all(a["positions_seen"] < b["positions_seen"] for a, b in itertools.pairwise(curve))
    held_out = teacher.corpus.held_out_rows()
    assert curve[0]["positions"] == sum(len(teacher.row(int(r))) for r in held_out)
    training = _lines(out / "training.jsonl")
    assert ("divergence" in training[0]) == (loss != "clm")
    assert training[-1]["loss"] < training[0]["loss"] - 0.05


def test_students_of_one_seed_begin_alike_whatever_their_loss(teacher: Teacher, tmp_path: Path) -> None:
    starts = []
    for loss, seed in (("clm", 0), ("kd", 0), ("tad", 0), ("clm", 1)):
        out = tmp_path / f"{loss}{seed}"
        train(_config(teacher, out, loss=loss, seed=seed, max_steps=1))
        starts.append(_lines(out / "metrics.jsonl")[0])
    assert starts[0] == starts[1] == starts[2] != starts[3]


def test_evaluation_is_the_metrics_of_the_held_out_positions(teacher: Teacher, tmp_path: Path) -> None:
    """Against log-probs made one document at a time."""
    model = tiny_model(21, seed=5)
    trainer = _trainer(teacher, tmp_path, KL(teacher, "kd"), model, batch_rows=4)
    logprobs, targets = logprobs_of(model, teacher.corpus)
    rows = teacher.corpus.held_out_rows().tolist()
    offsets = teacher.corpus.target_offsets(0, teacher.corpus.num_rows)
    held = np.concatenate([np.arange(offsets[r], offsets[r + 1]) for r in rows])
    metrics = trainer.evaluate()
    assert metrics["eval_positions"] == len(held)
    expected = -logprobs[held, targets[held]].mean()
    assert metrics["eval_cross_entropy"] == pytest.approx(float(expected), abs=1e-5)
    agreement = np.mean(logprobs[held].argmax(-1).numpy() == teacher.positions(held).token_ids[:, 0])
    assert metrics["eval_top1_agreement"] == pytest.approx(agreement)
    dense, _ = logprobs_of(tiny_model(21), teacher.corpus)
    kl = (dense[held].exp() * (dense[held] - logprobs[held])).sum(-1)
    assert metrics["eval_kl"] == pytest.approx(float(kl.mean()), abs=0.1 * float(kl.mean()))


def test_bf16_autocast_trains_and_scores_like_float32(teacher: Teacher, tmp_path: Path) -> None:
    curves = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        train(_config(teacher, out, precision=precision, max_steps=2))
        curves.append(_lines(out / "metrics.jsonl"))
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    for exact, half in zip(*curves, strict=True):
        assert half["cross_entropy"] == pytest.approx(exact["cross_entropy"], abs=0.05)
    assert curves[0] != curves[1]


def test_no_held_out_rows_no_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_cache(tmp_path / "cache", held_out_every=0, num_rows=6)
    assert train(_config(teacher, tmp_path / "out", max_steps=2)) is not None
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert "nothing is evaluated" in capsys.readouterr().out


# ---- every loss, and schedules ----

MOVING: dict[str, Any] = {
    "loss": "tad",
    "beta": 1.0,
    "beta_end": 3.0,
    "beta_schedule": "cosine",
    "top_k": 2,
    "top_k_end": 10,
    "top_k_schedule": "linear",
}


@pytest.mark.parametrize("loss", [name for name in SOUND_TAILS if name not in ("clm", "hidden_cosine")])
def test_every_loss_trains(teacher: Teacher, loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its divergence alone falls, on the rows it is trained on."""
    settings: dict[str, Any] = {"loss": loss, "clm_weight": 0.0, "max_steps": 12, "batch_rows": 18, "warmup": 0.0}
    train(_config(teacher, tmp_path, **settings))
    curve = _lines(tmp_path / "training.jsonl")
    assert all(math.isfinite(line[name]) for line in curve for name in ("loss", "clm", "divergence", "grad_norm"))
    assert all(line["loss"] == pytest.approx(line["divergence"], rel=1e-5) for line in curve)
    assert curve[-1]["divergence"] < 0.97 * curve[0]["divergence"]
    assert f"loss: {loss}" in capsys.readouterr().out


def test_parts_of_a_sum_are_logged_by_name(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = (LossConfig(name="tad", weight=0.5, beta=3.0), LossConfig(name="kd", temperature=2.0))
    train(_config(teacher, tmp_path, losses=losses, clm_weight=0.2, max_steps=2))
    for line in _lines(tmp_path / "training.jsonl"):
        assert line["loss"] == pytest.approx(0.2 * line["clm"] + 0.5 * line["tad"] + line["kd"], rel=1e-5)
        assert (line["tad_beta"], line["tad_top_k"]) == (3.0, 10)
        assert "divergence" not in line
    record = json.loads((tmp_path / "tailcache.json").read_text())
    assert [(each["name"], each["tail"], each["top_k"]) for each in record["config"]["losses"]] == [
        ("tad", "sampled", 10),
        ("kd", "bucket", None),
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == (
        "loss: 0.2 cross-entropy + 0.5 tad, K' = 10 of 12, beta 3, tail sampled + kd, temperature 2.0, tail bucket; "
        "teacher 'teacher'"
    )
    with pytest.raises(MismatchError, match="losses: the checkpoint has"):
        train(_config(teacher, tmp_path, losses=losses[:1], clm_weight=0.2, max_steps=2, resume=True))


def test_schedules_move_with_the_steps_and_are_logged(teacher: Teacher, tmp_path: Path) -> None:
    """The values of a line are those of its step: done steps / all steps."""
    train(_config(teacher, tmp_path / "moving", **MOVING, max_steps=4))
    lines = _lines(tmp_path / "moving" / "training.jsonl")
    assert [line["top_k"] for line in lines] == [2, 4, 6, 8]
    expected = [1 + 2 * (1 - math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [line["beta"] for line in lines] == pytest.approx(expected)
    fixed = {"loss": "tad", "beta": 1.0, "top_k": 2}
    train(_config(teacher, tmp_path / "fixed", **fixed, max_steps=4))
    others = _lines(tmp_path / "fixed" / "training.jsonl")
    assert [line["top_k"] for line in others] == [2] * 4
    assert others[0]["loss"] == lines[0]["loss"]
    assert others[1]["loss"] != lines[1]["loss"]


# ---- resuming ----


class _Killed(Exception):
    pass


class _KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise _Killed


def _kill_runs_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make: Any = DistillTrainer
    monkeypatch.setattr("tailcache.trainers.run.DistillTrainer", partial(make, callbacks=[_KillAt(step)]))


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {**MOVING, "head_mode": "recompute"},
        {"loss": "rs_kd"},
        {"losses": (LossConfig(name="atkd"), LossConfig(name="jsd", tail="prior", weight=0.5)), "log_every": 4},
    ],
    ids=["tad", "schedules", "rs_kd", "several"],
)
def test_a_killed_run_continues_to_the_same_weights_and_curves(
    teacher: Teacher, loss: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the second epoch, after a checkpoint and two further steps."""
    settings: dict[str, Any] = {"batch_rows": 2, "gradient_accumulation": 2, "max_steps": 13, "save_every": 3, **loss}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(_config(teacher, straight, **settings))
    with monkeypatch.context() as patch:
        _kill_runs_at(8, patch)
        with pytest.raises(_Killed):
            train(_config(teacher, killed, **settings))
    (killed / "checkpoint-9").mkdir()  # one more, half-written: no tailcache.json
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "cross_ent')
    train(_config(teacher, killed, **settings, resume=True))
    for name in ("metrics.jsonl", "training.jsonl"):
        assert _lines(killed / name) == _lines(straight / name)
    one, other = (AutoModelForCausalLM.from_pretrained(out).state_dict() for out in (straight, killed))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    assert train(_config(teacher, killed, **settings, resume=True)) is None  # it has finished


def test_training_on_a_prefix_of_a_capture(
    teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on a prefix keeps to it: also when it is resumed, and the capture has got on and finished meanwhile."""
    source = cache_folder(teacher.corpus)
    shutil.copytree(source, tmp_path / "cache")
    folder = tmp_path / "cache" / "teachers" / teacher.name
    last = [folder / "complete.json", *sorted((folder / "commits").iterdir())[1:]]
    for path in last:
        path.unlink()
    cache = open_cache(tmp_path / "cache")
    prefix = cache.teacher(teacher.name, unfinished="prefix")
    assert prefix.num_rows < teacher.num_rows
    settings: dict[str, Any] = {"unfinished": "prefix", "batch_rows": 2, "max_steps": 4, "save_every": 2}
    settings |= {"schedule": "constant", "warmup": 0.0}
    with pytest.raises(IncompleteError, match="--unfinished"):
        train(_config(prefix, tmp_path / "refused"))
    trainer = train(_config(prefix, tmp_path / "whole", **settings, workers=1))
    assert trainer is not None
    assert trainer.train_rows.max() < prefix.num_rows
    assert len(trainer.held_out) == len(prefix.held_out_rows()) < len(teacher.corpus.held_out_rows())
    assert f"note: the first {prefix.num_shards} of" in capsys.readouterr().out
    train(_config(prefix, tmp_path / "out", **{**settings, "max_steps": 2}))
    for path in last:
        shutil.copyfile(source / path.relative_to(tmp_path / "cache"), path)
    resumed = train(_config(prefix, tmp_path / "out", **settings, resume=True))
    assert resumed is not None
    assert resumed.teacher.is_prefix
    assert resumed.teacher.hash == prefix.hash
    assert trainer.model is not None
    assert resumed.model is not None
    found = resumed.model.state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


AGREE = """
import os, sys
from pathlib import Path
import torch
from tailcache.trainers.config import TrainConfig
from tailcache.trainers.run import _open_teacher
torch.distributed.init_process_group("gloo")
cache = os.path.join(sys.argv[1], os.environ["RANK"])
teacher = _open_teacher(TrainConfig(cache=cache, out=Path(cache) / "out", unfinished="prefix"))
print(teacher.num_shards, teacher.hash)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_all_processes_train_on_one_prefix(teacher: Teacher, tmp_path: Path) -> None:
    """Also where one of them looks later than the first, and sees more."""
    for rank in range(2):
        shutil.copytree(cache_folder(teacher.corpus), tmp_path / str(rank))
    early = tmp_path / "0" / "teachers" / teacher.name
    for path in (early / "complete.json", *sorted((early / "commits").iterdir())[1:]):
        path.unlink()
    first, second = run_group(AGREE, tmp_path, size=2)
    assert first == second
    assert first.startswith("1 ")


def test_resume_without_a_checkpoint_begins_again(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _kill_runs_at(3, patch)
        with pytest.raises(_Killed):
            train(_config(teacher, tmp_path / "out"))
    trainer = train(_config(teacher, tmp_path / "out", resume=True))
    assert trainer is not None
    assert [line["step"] for line in _lines(tmp_path / "out" / "metrics.jsonl")] == [0, 2, 4]


def test_a_run_is_not_started_over_another_and_not_continued_as_another(teacher: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(_config(teacher, out, save_every=2))
    with pytest.raises(ConfigError, match="already holds a training run; continue it with --resume"):
        train(_config(teacher, out))
    with pytest.raises(MismatchError, match=r"beta: the checkpoint has 2\.0, this run 3\.0"):
        train(_config(teacher, out, resume=True, beta=3.0))
    with pytest.raises(MismatchError, match=r"student: the checkpoint has .*'num_layers': 2.*'num_layers': 3"):
        train(_config(teacher, out, resume=True, student=replace(SMALL, num_layers=3)))
    record = json.loads((out / "tailcache.json").read_text())
    for name in ("corpus_hash", "teacher_hash"):
        (out / "tailcache.json").write_text(json.dumps({**record, name: "f00"}))
        with pytest.raises(MismatchError, match=f"{name}: the checkpoint has f00, this run"):
            train(_config(teacher, out, resume=True))
    (out / "tailcache.json").unlink()
    checkpoint = out / "checkpoint-4" / "tailcache.json"
    checkpoint.write_text(json.dumps({**record, "teacher_hash": "f00"}))
    with pytest.raises(MismatchError, match=r"checkpoint-4: cannot be continued by this run\. teacher_hash"):
        train(_config(teacher, out, resume=True))


def test_a_finished_run_can_be_prolonged(teacher: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(_config(teacher, out, save_every=2, schedule="constant", warmup=0.0))
    trainer = train(_config(teacher, out, save_every=2, schedule="constant", warmup=0.0, max_steps=6, resume=True))
    assert trainer is not None
    assert trainer.state.global_step == 6
    assert [line["step"] for line in _lines(out / "metrics.jsonl")] == [0, 2, 4, 6]


# ---- several processes ----

TWO_PROCESSES = """
import json, sys
from pathlib import Path
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.run import train

settings = json.loads(sys.argv[3])
train(TrainConfig(
    cache=Path(sys.argv[1]), out=Path(sys.argv[2]), student=StudentConfig(**settings.pop("student")), **settings
))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "tied"),
    [({"loss": "tad", "head_mode": "recompute"}, True), ({"loss": "rs_kd"}, False)],
    ids=["tied, recompute", "untied, one-pass"],
)
def test_two_processes_train_like_one(teacher: Teacher, loss: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """DDP over gloo: the positions of both are counted, their gradients averaged back to the sum."""
    settings: dict[str, Any] = {"max_steps": 3, "eval_every": 3, "log_every": 1, "learning_rate": 1e-3, "device": "cpu"}
    settings |= {**loss, "student": replace(SMALL, tie_embeddings=tied)}
    train(_config(teacher, tmp_path / "one", batch_rows=6, **settings))
    text = json.dumps({**settings, "batch_rows": 3, "student": asdict(settings["student"])})
    run_group(TWO_PROCESSES, cache_folder(teacher.corpus), tmp_path / "two", text, size=2)
    for name, fields in (
        ("training.jsonl", ("loss", "clm", "divergence", "grad_norm", "positions_seen")),
        ("metrics.jsonl", ("cross_entropy", "kl", "top1_agreement", "positions", "positions_seen")),
    ):
        one, two = (_lines(tmp_path / out / name) for out in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            assert [b[k] for k in fields] == pytest.approx([a[k] for k in fields], rel=1e-4)


SHARDED = """
import sys
import torch
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_distill import LLAMA, _rows, _trainer, collate, objective_for, tiny_model
from pathlib import Path
from tailcache.storage.reader import open_cache

init_process_group("gloo")
teacher = open_cache(sys.argv[1]).teacher("teacher")
batch = collate(_rows(teacher)[:6])
for tied in (True, False):
    gradients, metrics = [], []
    for sharded in (False, True):
        model = tiny_model(21, seed=5, **LLAMA, tie_word_embeddings=tied)
        trainer = _trainer(teacher, Path(sys.argv[2]), objective_for(teacher, "tad"), model)
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        trainer.compute_loss(model, batch).backward()
        gradients.append([p.grad.full_tensor() if sharded else p.grad for p in model.parameters()])
        metrics.append(trainer._metrics(model, batch))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*metrics)
"""


@pytest.mark.slow
def test_a_sharded_model_has_the_same_gradient(teacher: Teacher, tmp_path: Path) -> None:
    """FSDP2: the head's weight is whole only inside the model's forward, and that is where the loss is worked out."""
    run_group(SHARDED, cache_folder(teacher.corpus), tmp_path / "out", size=2)


# ---- refusals before any training ----


def test_what_the_cache_cannot_give_is_refused_first(tmp_path: Path) -> None:
    teacher = make_cache(tmp_path / "cache")
    corpus = teacher.corpus
    logprobs, targets = logprobs_of(tiny_model(21), corpus)
    write_teacher(corpus, logprobs, targets, name="no-samples", top_k=4, num_samples=0)
    choose = partial(_config, teacher, tmp_path / "out")
    with pytest.raises(ConfigError, match="has several teachers; choose one of no-samples, teacher"):
        train(choose())
    with pytest.raises(NotFoundError, match="'nobody'"):
        train(choose(teacher="nobody"))
    with pytest.raises(ConfigError, match=r"m = 0; choose another tail \('bucket'\)"):
        train(choose(teacher="no-samples", loss="kd"))
    with pytest.raises(ConfigError, match=r"1 <= K' <= 4.*found K' = 10"):
        train(choose(teacher="no-samples", tail="bucket"))
    with pytest.raises(NotFoundError):
        train(replace(choose(), cache=tmp_path / "nowhere"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="expected a CUDA GPU, found none"):
            train(choose(teacher="teacher", device="cuda"))
    assert not (tmp_path / "out").exists()
    train(choose(teacher="no-samples", tail="bucket", top_k=3, max_steps=1))
    train(_config(teacher, tmp_path / "prior", teacher="no-samples", tail="prior", top_k=4, max_steps=1))
    assert _lines(tmp_path / "prior" / "metrics.jsonl")[0]["kl_is"] == "lower bound"


def test_a_student_that_leaks_between_documents_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    mamba = StudentConfig(model_type="mamba", config='{"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}')
    settings: dict[str, Any] = {"student": mamba, "max_steps": 1, "teacher": teacher.name}
    with pytest.raises(StudentError, match=r"MambaForCausalLM: .*--layout documents"):
        train(_config(teacher, tmp_path / "leaks", **settings))
    trainer = train(_config(teacher, tmp_path / "documents", layout="documents", **settings))
    assert trainer is not None
    assert trainer.state.global_step == 1
