"""Students that are adapters: what is trained, what is skipped, what is saved, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from places import cache_folder
from training_fixtures import LLAMA, make_cache, objective_for, tiny_model
from transformers import AutoModelForCausalLM

from tailcache.storage.errors import ConfigError, MismatchError, StudentError
from tailcache.storage.reader import Teacher
from tailcache.trainers import fused_head, fused_loss
from tailcache.trainers.adapters import merged_weights
from tailcache.trainers.batches import CacheRows, collate
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.distill import DistillTrainer, training_arguments
from tailcache.trainers.run import train

# peft asks transformers for something by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # its layers hold their weights transposed
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return make_cache(tmp_path_factory.mktemp("adapters") / "cache")


def _checkpoint(folder: Path, name: str = "llama") -> Path:
    model = tiny_model(21, seed=5, model_type="gpt2" if name == "gpt2" else "llama", **MODELS[name])
    model.save_pretrained(folder)
    return folder


def _config(teacher: Teacher, out: Path, checkpoint: Path, **settings: Any) -> TrainConfig:
    student = {"checkpoint": str(checkpoint), "lora_rank": 4, **settings.pop("student", {})}
    defaults: dict[str, Any] = {"learning_rate": 1e-2, "batch_rows": 6, "max_steps": 3, "eval_every": 0}
    return TrainConfig(
        cache=cache_folder(teacher.corpus),
        out=out,
        student=StudentConfig(**student),
        **{**defaults, "log_every": 1, "device": "cpu", **settings},
    )


def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(18)[None] % 21
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_student_is_the_one_that_was_trained(teacher: Teacher, name: str, tmp_path: Path) -> None:
    """A plain checkpoint with the names of the one it came from; peft's own merging gives the same weights."""
    checkpoint = _checkpoint(tmp_path / "checkpoint", name)
    trainer = train(_config(teacher, tmp_path / "out", checkpoint, student={"lora_alpha": 3.0}))
    assert trainer is not None
    model: Any = trainer.model
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.testing.assert_close(_logits(merged), _logits(model), rtol=1e-5, atol=1e-4)
    assert (_logits(merged) - _logits(before)).abs().max() > 0.1
    by_peft = model.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert found.keys() == before.state_dict().keys() == by_peft.keys()
    for weight in found:
        torch.testing.assert_close(found[weight], by_peft[weight], rtol=1e-6, atol=1e-7)
    # The head, the embeddings and the norms are the checkpoint's.
    same = [weight for weight, value in before.state_dict().items() if torch.equal(value, found[weight])]
    assert {each for each in same if "norm" not in each and "bias" not in each and "ln" not in each} == {
        each for each in found if "embed" in each or "lm_head" in each or "wte" in each or "wpe" in each
    }
    record = json.loads((tmp_path / "out" / "tailcache.json").read_text())["student"]
    counted = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert record["num_trained"] < record["num_parameters"]
    assert counted == 0  # they have just been merged away


def test_adapters_alone_are_saved_as_peft_reads_them_and_checkpoints_hold_no_more(
    teacher: Teacher, tmp_path: Path
) -> None:
    """Stopped after a step and continued: the same adapters as of a run that was not."""
    checkpoint = _checkpoint(tmp_path / "checkpoint")
    alone: dict[str, Any] = {
        "student": {"lora_save": "adapter", "lora_targets": ("q_proj", "v_proj")},
        "schedule": "constant",
    }
    trainer = train(_config(teacher, tmp_path / "straight", checkpoint, **alone))
    assert trainer is not None
    assert trainer.model is not None
    settings = {**alone, "save_every": 2}
    train(_config(teacher, tmp_path / "out", checkpoint, **settings, max_steps=2))
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "model.safetensors").exists()
    train(_config(teacher, tmp_path / "out", checkpoint, **settings, max_steps=3, resume=True))
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "out")
    torch.testing.assert_close(_logits(read), _logits(trainer.model), rtol=1e-5, atol=1e-5)
    names = {name.split(".")[-4] for name, _ in trainer.model.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(MismatchError, match="lora_rank"):
        train(_config(teacher, tmp_path / "out", checkpoint, student={"lora_rank": 8, **alone["student"]}, resume=True))


@pytest.mark.parametrize("head_mode", ["one-pass", "recompute"])
def test_a_frozen_head_costs_no_gradient_and_the_adapters_have_that_of_full_logits(
    teacher: Teacher, head_mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss stays fused; nothing of the head's shape is summed up; the rest is as autograd has it."""
    summed: list[tuple[int, ...]] = []
    needs: list[list[bool]] = []
    made, backward = fused_loss.TiledSum, fused_head._head_terms_backward

    def made_and_noted(weight: torch.Tensor, *rest: Any) -> Any:
        summed.append(tuple(weight.shape))
        return made(weight, *rest)

    def run_and_noted(*arguments: Any) -> Any:
        needs.append(arguments[-1])
        return backward(*arguments)

    monkeypatch.setattr(fused_loss, "TiledSum", made_and_noted)
    monkeypatch.setattr(fused_head, "_head_terms_backward", run_and_noted)
    gradients = []
    for fused in (True, False):
        torch.manual_seed(0)
        model: Any = get_peft_model(tiny_model(21, seed=5), LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr("tailcache.trainers.distill.find_linear_head", lambda model, vocab_size: "not asked")
            args = training_arguments(_config(teacher, tmp_path, tmp_path))
            objective = objective_for(teacher, "tad")
            trainer = DistillTrainer(model, args, teacher=teacher, objective=objective, head_mode=head_mode)
        assert (trainer.why_full_logits is None) == fused
        rows = CacheRows(teacher, teacher.train_rows()[:6])
        trainer.compute_loss(model, collate([rows[i] for i in range(6)])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert all(p.grad is None for p in model.get_output_embeddings().parameters())
    assert summed == []
    assert needs == ([[True, False, False]] if head_mode == "recompute" else [])
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
    # The same measurement sees the gradient of a head that is trained.
    whole = DistillTrainer(tiny_model(21, seed=5), args, teacher=teacher, objective=objective, head_mode=head_mode)
    model = whole.model
    whole.compute_loss(model, collate([rows[i] for i in range(6)])).backward()
    assert summed == ([(21, 32)] if head_mode == "one-pass" else [])
    assert needs[-1:] == ([[True, True, False]] if head_mode == "recompute" else [])


def test_an_adapted_head_is_trained_through_full_logits(teacher: Teacher, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint")
    student = {"lora_targets": ("lm_head", "q_proj")}
    trainer = train(_config(teacher, tmp_path / "out", checkpoint, student=student, max_steps=1))
    assert trainer is not None
    assert trainer.why_full_logits is not None
    assert "not a plain linear layer" in trainer.why_full_logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(merged), _logits(trainer.model), rtol=1e-5, atol=1e-4)


def test_merging_is_the_formula() -> None:
    """W + alpha / r B A, against products in float64."""
    model: Any = get_peft_model(tiny_model(21), LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    state = model.state_dict()
    merged = merged_weights(model, state)
    place = "model.layers.1.self_attn.q_proj"
    own = {key.rsplit(f"{place}.", 1)[1]: value.double() for key, value in state.items() if place in key}
    a, b = own["lora_A.default.weight"], own["lora_B.default.weight"]
    expected = own["base_layer.weight"] + 5 / 2 * (b @ a)
    torch.testing.assert_close(merged[f"{place}.weight"].double(), expected, rtol=0, atol=1e-6)
    assert merged.keys() == tiny_model(21).state_dict().keys()


def test_what_cannot_be_adapted_is_refused_before_training(teacher: Teacher, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"lora_rank: adapters are trained on a checkpoint"):
        StudentConfig(hidden_size=32, lora_rank=4)
    with pytest.raises(ConfigError, match=r"student.lora_alpha: adapters need a rank"):
        StudentConfig(checkpoint="x", lora_alpha=4.0)
    for wrong in ({"lora_rank": 0}, {"lora_rank": 4, "lora_alpha": 0.0}, {"lora_rank": 4, "lora_dropout": 1.0}):
        with pytest.raises(ConfigError, match=f"student.{list(wrong)[-1]}: expected"):
            StudentConfig(checkpoint="x", **wrong)
    with pytest.raises(StudentError, match=r"lora_targets: expected names of linear layers, found q_prj"):
        train(_config(teacher, tmp_path / "out", checkpoint, student={"lora_targets": ("q_prj",)}))
    with pytest.raises(StudentError, match=r"expected linear layers, found that .*embed_tokens is a Embedding"):
        train(_config(teacher, tmp_path / "out", checkpoint, student={"lora_targets": ("embed_tokens",)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ConfigError, match=r"expected peft.*pip install 'tailcache\[lora\]'"):
            train(_config(teacher, tmp_path / "out", checkpoint))
    assert not (tmp_path / "out").exists()
    unusual: Any = get_peft_model(tiny_model(21), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    args = training_arguments(_config(teacher, tmp_path / "out", checkpoint))
    with pytest.raises(StudentError, match="merge_adapters: expected a student with one set of plain"):
        DistillTrainer(
            unusual,
            args,
            teacher=teacher,
            objective=objective_for(teacher, "tad"),
            merge_adapters=True,
        )
