"""Students that are low-rank adapters on a frozen checkpoint (LoRA), by peft.

The checkpoint's own weights take no gradient, its head among them: the fused loss then makes none for the head, which
saves a third of its work and all of the gradient's memory. Adapters on the head itself are possible (name it among the
targets), but such a head is no longer one linear layer, and its loss is worked out from full logits.

While a run lasts, its checkpoints hold the adapters alone. At the end they are either saved as they are, or added to
the weights: ``W + alpha / rank B A``, in the weights' own type, without touching the model in memory.

Legend: r rank, D inputs and O outputs of a layer.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tailcache.storage.errors import ConfigError, StudentError

if TYPE_CHECKING:
    from tailcache.trainers.config import StudentConfig
    from tailcache.trainers.student import Student

__all__ = ["adapted", "check_mergeable", "is_plain", "merged_weights", "save_adapters", "save_merged"]

_NAME = "default"


def adapted(student: Student, config: StudentConfig, *, seed: int) -> Student:
    """The student with adapters, and all but them frozen; the student itself where none are asked for.

    Args:
      student: from a checkpoint.
      config: ``lora_rank`` and what goes with it.
      seed: decides the adapters' first weights (their product is 0).

    Raises:
      ConfigError: peft is not installed.
      StudentError: no layer is called so, or one that is cannot be adapted.
    """
    if config.lora_rank is None:
        return student
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(
            "student.lora_rank: expected peft, which makes the adapters, found none; `pip install 'tailcache[lora]'`"
        ) from error
    make: Any = LoraConfig  # whose alpha is called whole, and used as any number
    settings = make(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # by peft
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # set right by peft itself
            torch.manual_seed(seed)
            model: Any = get_peft_model(student.model, settings)
    except ValueError as error:
        raise StudentError(
            f"student.lora_targets: expected names of linear layers, found {', '.join(config.lora_targets) or 'none'}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    check_mergeable(model)
    return replace(student, model=model)


def check_mergeable(model: Any) -> None:
    """Refuse adapters that ``save_merged`` does not know: all but plain ones on linear layers.

    Raises:
      StudentError: says what it found.
    """
    if not is_plain(model):
        raise StudentError(
            "merge_adapters: expected a student with one set of plain low-rank adapters (LoRA, called 'default', no "
            f"DoRA, no biases, no further modules), found {getattr(model, 'peft_config', None)}; save the adapters "
            "alone and merge them with peft"
        )
    for name, layer in _adapted_layers(model):
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D):
            raise StudentError(
                f"student.lora_targets: expected linear layers, found that {name} is a {type(base).__name__}"
            )


def is_plain(model: Any) -> bool:
    """Whether a model has one set of low-rank adapters, and trains nothing else."""
    found = getattr(model, "peft_config", {})
    if list(found) != [_NAME] or found[_NAME].peft_type != "LORA":
        return False
    settings = found[_NAME]
    return settings.bias == "none" and not settings.use_dora and not settings.modules_to_save


def _adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that have adapters, by the names their weights have in the model's state."""
    from peft.tuners.lora import LoraLayer

    named = model.named_modules()
    return [(name.replace("_checkpoint_wrapped_module.", ""), m) for name, m in named if isinstance(m, LoraLayer)]


def merged_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same.

    Args:
      model: a ``PeftModel`` that ``check_mergeable`` accepts.
      state: all its weights by name.

    Returns:
      By the names of the model inside: W + alpha / r B A [O, D] of the adapted layers, all else as it is.
    """
    merged = {name: weight for name, weight in state.items() if ".lora_" not in name}
    for name, layer in _adapted_layers(model):
        a_rD, b_Or = (state[f"{name}.lora_{which}.{_NAME}.weight"].float() for which in "AB")
        change = layer.scaling[_NAME] * (b_Or @ a_rD)
        place = f"{name}.base_layer.weight"
        weight = merged[place]
        merged[place] = (weight.float() + (change.t() if layer.fan_in_fan_out else change)).to(weight.dtype)
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): weight for name, weight in merged.items()
    }


def save_adapters(model: Any, state: dict[str, Tensor], folder: Path, *, writes: bool) -> None:
    """Save the adapters alone, as peft does; peft itself finds none in a model whose layers are wrapped.

    Args:
      model: a ``PeftModel`` that ``is_plain``.
      state: all its weights, on the processes that write.
      folder: where to.
      writes: whether this process does.
    """
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        adapters = {k.replace(f".{_NAME}.", "."): v.contiguous() for k, v in state.items() if ".lora_" in k}
        save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        replace(model.peft_config[_NAME], inference_mode=True).save_pretrained(folder)


def save_merged(model: Any, state: dict[str, Tensor], folder: Path, *, writes: bool) -> None:
    """Save the student as a plain checkpoint.

    Args:
      model: a ``PeftModel``.
      state: all its weights, on the processes that write.
      folder: where to.
      writes: whether this process does.
    """
    if writes:
        model.get_base_model().save_pretrained(folder, state_dict=merged_weights(model, state))
