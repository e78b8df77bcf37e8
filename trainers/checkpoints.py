"""Checkpoints that any number of processes can go on from, each with the whole student or a share of it.

``Trainer`` writes three kinds: plain ones (one process, or DDP), and with FSDP whole ones and sharded ones. It reads a
checkpoint only into the kind of run that wrote it. Here every kind of run reads all of them: weights and the
optimizer's state are the same numbers, under the parameters' names in one and under their places in another.

| kind | weights | optimizer |
|---|---|---|
| plain | ``model.safetensors``, or ``adapter_model.safetensors`` | ``optimizer.pt``, by place |
| whole | the same, and ``pytorch_model_fsdp.bin`` | ``optimizer.bin``, by name |
| sharded | ``pytorch_model_fsdp_0/`` | ``optimizer_0/``, by name |

Random numbers are not carried over to another number of processes: each process has its own, and only dropout uses
them.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from transformers import Trainer

from tailcache.storage.errors import CorruptError
from tailcache.trainers.adapters import is_plain, save_adapters
from tailcache.trainers.sharding import complete_sharding

__all__ = ["Kind", "PortableTrainer", "kind_of"]

Kind = Literal["plain", "whole", "sharded"]

_WHOLE_WEIGHTS, _SHARDED_WEIGHTS = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"
_SHARDED_OPTIMIZER, _SCHEDULER = "optimizer_0", "scheduler.pt"


def kind_of(folder: Path) -> Kind:
    """Which kind of run wrote a checkpoint."""
    if (folder / _SHARDED_WEIGHTS).is_dir():
        return "sharded"
    return "whole" if (folder / _WHOLE_WEIGHTS).is_file() else "plain"


class PortableTrainer(Trainer):
    """A ``Trainer`` that goes on from a checkpoint of any kind, and can shard on CPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        """As ``Trainer`` does; then see ``sharding``."""
        super().create_accelerator_and_postprocess()
        complete_sharding(self)

    @property
    def kind(self) -> Kind:
        """Of the checkpoints this run writes."""
        if not self.is_fsdp_enabled:
            return "plain"
        return "sharded" if "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type) else "whole"

    def _is_ours(self, folder: Path) -> bool:
        """Whether a checkpoint is to be read here: sharded ones, and all of another kind than this run's."""
        legacy = self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2
        if self.is_deepspeed_enabled or legacy:
            return False
        return kind_of(folder) == "sharded" or kind_of(folder) != self.kind

    def _saved_weights(self, model: Any) -> dict[str, Any]:
        """The weights of a sharded checkpoint, each process its part: all, or of an adapted student the adapters."""
        return get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=hasattr(model, "peft_config")))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.kind != "sharded":
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # accelerate would ask peft for the adapters of a model whose layers are wrapped, and save none.
        folder, model, optimizer = Path(output_dir), self.model, self._bare_optimizer
        assert model is not None
        dcp_save({"model": self._saved_weights(model)}, checkpoint_id=folder / _SHARDED_WEIGHTS)
        dcp_save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / _SHARDED_OPTIMIZER)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), folder / _SCHEDULER)

    @property
    def _bare_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapping."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        target: Any = self.model if model is None else model
        if not self._is_ours(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif kind_of(folder) == "sharded":
            state = {"model": self._saved_weights(target)}
            _read_shards(folder / _SHARDED_WEIGHTS, state)
            set_model_state_dict(target, state["model"], options=StateDictOptions(strict=False))
        else:
            whole = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(target, dict(_whole_weights(folder)), options=whole)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_ours(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, model = Path(checkpoint), self.model
        assert model is not None
        optimizer = self._bare_optimizer
        found = kind_of(folder)
        if found == "sharded":
            state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            _read_shards(folder / _SHARDED_OPTIMIZER, state)
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
        else:
            saved = torch.load(
                folder / ("optimizer.pt" if found == "plain" else "optimizer.bin"),
                map_location="cpu",
                weights_only=True,
            )
            names = _parameter_names(model, optimizer)
            if self.kind == "plain":
                optimizer.load_state_dict(_by_place(saved, names, folder))
            else:
                named = _by_name(saved, names, folder) if found == "plain" else saved
                set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))

    def whole_state(self) -> dict[str, Tensor]:
        """All weights by name; of a shared-out model they are gathered, on the CPU of the first process alone."""
        assert self.model is not None
        if not self.is_fsdp_enabled:
            return self.model.state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered: dict[str, Any] = get_model_state_dict(self.model, options=options)
        return gathered

    def write_weights(self, folder: Path, *, final: bool) -> None:
        """Save the student; every process calls it.

        Args:
          folder: where to.
          final: not into a checkpoint, whose weights may lie in pieces beside it.
        """
        if self.is_fsdp_enabled and is_plain(self.model) and (final or self.kind == "whole"):
            save_adapters(self.model, self.whole_state(), folder, writes=self.args.should_save)
        elif self.kind != "sharded":
            super().save_model(str(folder), _internal_call=True)
        elif final:
            self._save(str(folder), state_dict=self.whole_state())
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            student: Any = self.model
            student.config.save_pretrained(folder)


def _read_shards(folder: Path, state: dict[str, Any]) -> None:
    """Read what the processes of another run have written into tensors of this one, however they are shared out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is meant
        dcp_load(state, checkpoint_id=folder)


def _whole_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a plain or whole checkpoint by the names they have in the model."""
    from safetensors.torch import load_file

    adapters = folder / "adapter_model.safetensors"
    if adapters.is_file():
        saved = load_file(adapters)
        return {re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name): saved[name] for name in saved}
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CorruptError(f"{folder}: expected the weights of a checkpoint, found no {name}")
        weights |= load_file(folder / name)
    return weights


def _parameter_names(model: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimizer's parameters in the order it numbers them."""
    names = {
        id(parameter): name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        for name, parameter in model.named_parameters()
    }
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _by_name(saved: dict[str, Any], names: list[str], folder: Path) -> dict[str, Any]:
    """The state of an optimizer, its parameters called by name instead of by place."""
    _check_number(sum(len(group["params"]) for group in saved["param_groups"]), names, folder)
    return {
        "state": {names[place]: state for place, state in saved["state"].items()},
        "param_groups": [
            {**group, "params": [names[place] for place in group["params"]]} for group in saved["param_groups"]
        ],
    }


def _by_place(saved: dict[str, Any], names: list[str], folder: Path) -> dict[str, Any]:
    """The state of an optimizer, its parameters called by place instead of by name."""
    _check_number(sum(len(group["params"]) for group in saved["param_groups"]), names, folder)
    places = {name: place for place, name in enumerate(names)}
    return {
        "state": {places[name]: state for name, state in saved["state"].items()},
        "param_groups": [
            {**group, "params": [places[name] for name in group["params"]]} for group in saved["param_groups"]
        ],
    }


def _check_number(found: int, names: list[str], folder: Path) -> None:
    if found != len(names):
        raise CorruptError(
            f"{folder}: expected the optimizer's state of {len(names)} parameters, found {found}; the student differs"
        )
