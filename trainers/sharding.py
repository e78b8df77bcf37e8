"""Students that are shared out among processes (FSDP2), by ``Trainer`` and accelerate.

Everything about it is theirs, but for three things said here:

- **bf16.** accelerate rounds what a sharded model returns to 16 bits, and averages gradients in 16 bits. What the model
  returns here is the loss, and students are compared by it: both stay in float32. Weights are gathered in 16 bits.
- **CPUs.** accelerate shards on accelerators only; asked to do so on CPUs, it trains with DDP without a word. FSDP2
  itself works there (over gloo), so what accelerate has decided is corrected. It is slow, and meant for trying things
  out and for tests.
- **The end of a run.** accelerate keeps its wish for FSDP in the environment of the process, where the next run of the
  same process would find it; ``keep_environment`` takes it back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Trainer

    from tailcache.trainers.config import TrainConfig

__all__ = ["complete_sharding", "fsdp_settings", "is_launched_sharded", "keep_environment"]

_WISH = "ACCELERATE_USE_FSDP"


def is_launched_sharded() -> bool:
    """Whether `accelerate launch` has asked for FSDP; its file then says how."""
    return os.environ.get(_WISH, "false").lower() == "true"


def fsdp_settings(config: TrainConfig) -> dict[str, Any]:
    """``TrainingArguments.fsdp_config`` for these settings."""
    return {
        "version": 2,
        "reshard_after_forward": config.fsdp_reshard,
        "cpu_offload": config.fsdp_offload,
        "activation_checkpointing": config.gradient_checkpointing,
        "state_dict_type": "SHARDED_STATE_DICT" if config.fsdp_checkpoints == "sharded" else "FULL_STATE_DICT",
    }


def complete_sharding(trainer: Trainer) -> None:
    """Correct what accelerate makes of FSDP, see the module; called when the trainer's accelerator has been made.

    Args:
      trainer: its model has not been wrapped yet.
    """
    from accelerate import DistributedType
    from accelerate.state import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    state: Any = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and is_launched_sharded():
        plugin = FullyShardedDataParallelPlugin(**(trainer.args.fsdp_plugin_args or {}))
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin = plugin
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        policy: Any = torch.distributed.fsdp.MixedPrecisionPolicy
        plugin.mixed_precision_policy = policy(
            param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


@contextmanager
def keep_environment() -> Iterator[None]:
    """While inside, accelerate may leave its wish for FSDP; afterwards it is as it was."""
    before = os.environ.get(_WISH)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_WISH, None)
        else:
            os.environ[_WISH] = before
