"""``Trainer``'s arguments for the settings of a run, with what can be known to be wrong refused before any training."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from tailcache.storage.errors import ConfigError
from tailcache.trainers.sharding import fsdp_settings, is_launched_sharded

if TYPE_CHECKING:
    from tailcache.trainers.config import TrainConfig

__all__ = ["rows_per_step", "training_arguments"]

_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""Its name has changed within the releases of transformers that are allowed."""


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """``Trainer``'s arguments for these settings; from then on the processes of a run know of each other.

    Raises:
      ConfigError: a GPU is asked for and there is none; rows_per_step cannot be shared out; a schedule is given
        arguments it does not take, or lacks one; a tracker's package is not installed; no such optimizer.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("device: expected a CUDA GPU, found none; use --device cpu or auto")
    on_cpu = config.device == "cpu" or not cuda
    _check_trackers(config)
    _check_optimizer(config)
    schedule = {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
    _check_schedule(config, schedule)
    optional: dict[str, Any] = {"run_name": config.run_name, "project": config.project}
    if config.distributed == "fsdp" and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_launched_sharded():
        optional |= {"fsdp": True, "fsdp_config": fsdp_settings(config)}
    elif config.gradient_checkpointing:
        optional[_CHECKPOINTING] = True
    args = TrainingArguments(
        output_dir=str(config.out),
        per_device_train_batch_size=config.batch_rows,
        per_device_eval_batch_size=config.batch_rows,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=config.schedule_settings or None,
        warmup_steps=config.warmup,
        optim=config.optimizer,
        adam_beta1=config.adam_betas[0],
        adam_beta2=config.adam_betas[1],
        adam_epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.precision == "bf16",
        use_cpu=on_cpu,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep_checkpoints,
        logging_strategy="steps",
        logging_steps=config.log_every,
        log_level="error",
        log_level_replica="error",
        report_to=list(config.report_to) or "none",
        push_to_hub=config.hub_model_id is not None,
        hub_model_id=config.hub_model_id,
        hub_private_repo=config.hub_private,
        hub_strategy=config.hub_strategy,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        **{name: value for name, value in optional.items() if value is not None},
    )
    args.gradient_accumulation_steps = _accumulation(config, args.world_size)  # only now is their number known
    return args


def rows_per_step(args: TrainingArguments) -> int:
    """Corpus rows of an optimizer step over all processes."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def _accumulation(config: TrainConfig, num_processes: int) -> int:
    """Forwards of an optimizer step, of each process.

    Raises:
      ConfigError: the rows of a step cannot be shared out evenly.
    """
    if config.rows_per_step is None:
        return config.gradient_accumulation
    rows = config.rows_per_step
    if rows % num_processes:
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n <= 2 * num_processes]
        raise ConfigError(
            f"rows_per_step: {rows} rows cannot be shared out evenly among {num_processes} processes; start "
            f"{_one_of(fitting)} processes, or take a multiple of {num_processes}"
        )
    share = rows // num_processes
    if share % config.batch_rows:
        fitting = [n for n in range(1, share + 1) if share % n == 0]
        raise ConfigError(
            f"batch_rows: rows_per_step gives {share} rows to each of {num_processes} processes, which is no multiple "
            f"of batch_rows, {config.batch_rows}; set batch_rows to {_one_of(fitting)}"
        )
    return share // config.batch_rows


def _one_of(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers[-8:]]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _check_trackers(config: TrainConfig) -> None:
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            package = name.replace("_", "-")
            raise ConfigError(
                f"report_to: expected the package of {name}, found none; `pip install {package}`, or drop it"
            )


def _check_optimizer(config: TrainConfig) -> None:
    names = [name.value for name in OptimizerNames]
    if config.optimizer not in names:
        raise ConfigError(f"optimizer: expected one of {', '.join(names)}; found {config.optimizer!r}")


def _check_schedule(config: TrainConfig, name: str) -> None:
    """Make the schedule once, for nothing: transformers would say only after the student has been built."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if name == "constant_with_warmup" and config.schedule_settings:
        raise ConfigError(f"schedule_arguments: {config.schedule} takes none, found {config.schedule_arguments}")
    try:
        get_scheduler(
            name,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=10**9,
            scheduler_specific_kwargs=config.schedule_settings,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"schedule_arguments: the schedule {config.schedule!r} cannot be made with "
            f"{config.schedule_arguments or 'no arguments'}: {error}"
        ) from error
