"""The settings of ``tailcache train``: frozen, keyword-only, and light to import.

The text under a field is what ``tailcache train --help`` prints for it. Checks that need nothing but the
settings themselves are made on construction; those that need the cache or the student, before any training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from tailcache.storage.errors import ConfigError
from tailcache.storage.unfinished import Unfinished
from tailcache.trainers.loss_config import Divergence, LossConfig, LossParameters
from tailcache.trainers.mixture_config import MixtureConfig
from tailcache.trainers.presets import PresetName

__all__ = ["StudentConfig", "TrainConfig"]

_NUMBERS = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
_SIZES = (*_NUMBERS, "tie_embeddings")

LearningRateSchedule = Literal[
    "cosine",
    "linear",
    "constant",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
]
"""Schedules of the learning rate, as transformers names them."""
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "clearml", "swanlab", "dvclive"]
"""What can log a run, as transformers names it."""


@dataclass(frozen=True, kw_only=True)
class _Adapters:
    """Low-rank adapters on a frozen checkpoint (LoRA); what ``StudentConfig`` says of them."""

    lora_rank: int | None = None
    """Train low-rank adapters of this rank on the checkpoint and leave its own weights as they are (needs peft).
    Default: all weights are trained."""

    lora_alpha: float | None = None
    """Scale of the adapters: alpha / rank. Default: twice the rank."""

    lora_dropout: float = 0.0
    """Dropout before the adapters."""

    lora_targets: tuple[str, ...] = ()
    """Names (or ends of names) of the linear layers that get adapters. Default: all but the head."""

    lora_save: Literal["merged", "adapter"] = "merged"
    """What is saved at the end. merged: a plain checkpoint, the adapters added to the weights. adapter: the adapters
    alone, as peft reads them."""

    def _check_adapters(self, checkpoint: str | None) -> None:
        if self.lora_rank is None:
            given = [
                each.name for each in fields(_Adapters) if (getattr(self, each.name) or None) != (each.default or None)
            ]
            if given:
                raise ConfigError(f"student.{given[0]}: adapters need a rank; set student.lora_rank, such as 16")
            return
        if self.lora_rank < 1:
            raise ConfigError(f"student.lora_rank: expected a positive number, found {self.lora_rank}")
        if checkpoint is None:
            raise ConfigError(
                "student.lora_rank: adapters are trained on a checkpoint, found none; set student.checkpoint, or train "
                "all weights of the new student"
            )
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ConfigError(f"student.lora_alpha: expected a number > 0, found {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"student.lora_dropout: expected a number from 0 to below 1, found {self.lora_dropout}")


@dataclass(frozen=True, kw_only=True)
class StudentConfig(_Adapters):
    """Which student: a checkpoint, parts of a teacher, or at random: a preset, a configuration, a few sizes."""

    checkpoint: str | None = None
    """Start from this checkpoint: a folder, a GGUF file or a hub id of any causal language model. Its tokenizer must
    be the corpus' own."""

    init_from: str | None = None
    """Initialise the student with parts of this teacher: a folder, a GGUF file or a hub id of a Llama-, Mistral-,
    Qwen2-, Qwen3-, Phi-, Phi3- or Gemma-type model with the corpus' own tokenizer. The student has its architecture,
    with the sizes given here, in a preset or in student.config; sizes that are not given are the teacher's. Embeddings
    and attention are copied, cut to the student's sizes; feed-forward parts are random. See docs/students.md."""

    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint, or of the teacher to initialise from."""

    preset: PresetName | None = None
    """A student by name, those of the paper on tail-aware distillation: qwen1.5-1.2b and qwen1.5-0.5b (from
    Qwen1.5-1.8B), phi2-1.1b (from Phi-2), qwen2.5-1.2b (from Qwen2.5-3B), gemma2-2b (from Gemma2-9B). Without
    student.init_from all of it is random. `tailcache student --student.preset NAME` counts its parameters."""

    config: str | None = None
    """Initialise at random from this configuration: a JSON file, a folder with a config.json, or JSON text
    such as '{"hidden_size": 512, "num_hidden_layers": 8}'. The vocabulary size is the corpus' unless
    given. With student.init_from: what differs from the teacher's configuration."""

    model_type: str | None = None
    """The architecture, as transformers names it (llama, qwen3, gpt2, mamba, ...), if the configuration does
    not say it. Default: llama."""

    hidden_size: int | None = None
    """Width of a student made from sizes alone. Default: 256, or the teacher's with student.init_from; so with all
    sizes."""

    num_layers: int | None = None
    """Its layers. Default: 4."""

    num_heads: int | None = None
    """Its attention heads. Default: 4."""

    num_kv_heads: int | None = None
    """Its key-value heads. Default: as many as attention heads; with student.init_from as many for each as in the
    teacher."""

    head_dim: int | None = None
    """Dimensions of an attention head. Default: the hidden size over the number of heads; with student.init_from at
    most the teacher's."""

    intermediate_size: int | None = None
    """Width of its feed-forward part. Default: 8/3 of the hidden size, rounded up to a multiple of 32."""

    tie_embeddings: bool | None = None
    """Whether its head shares the input embeddings. Default: yes; with student.init_from as in the teacher."""

    layers: tuple[int, ...] | None = None
    """With student.init_from: the teacher's layers to take, ascending from 0. Default: as many as the student has,
    evenly spread, the first and the last among them."""

    copy_embeddings: bool = True
    """With student.init_from: copy the embeddings, the head and the last norm."""

    copy_attention: bool = True
    """With student.init_from: copy the attention of the layers, with the norms before (and after) it."""

    copy_mlps: bool = False
    """With student.init_from: copy the feed-forward parts too, with their norms, cut to the student's sizes."""

    freeze_embeddings: bool = False
    """Do not train the input embeddings (nor the head, where it shares them); they must come from a checkpoint or a
    teacher."""

    attn_implementation: str | None = None
    """Attention: sdpa, eager, flash_attention_2, ... Default: what transformers chooses for the model."""

    def __post_init__(self) -> None:
        self._check_adapters(self.checkpoint)
        given = [name for name in _SIZES if getattr(self, name) is not None]
        if self.checkpoint is not None:
            clashing = [n for n in ("init_from", "preset", "config", "model_type") if getattr(self, n) is not None]
            clashing += given
            if clashing:
                raise ConfigError(
                    f"student.{clashing[0]}: a checkpoint has its own architecture; drop either student.checkpoint "
                    f"or student.{clashing[0]}"
                )
        elif self.config is not None and given:
            raise ConfigError(
                f"student.{given[0]}: the configuration in student.config already says it; put the size there"
            )
        elif self.preset is not None and self.model_type is not None:
            raise ConfigError("student.model_type: a preset has its own; drop either")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"student.{name}: expected a positive number, found {value}")
        self._check_copies()

    def _check_copies(self) -> None:
        if self.init_from is None:
            changed = [n for n in ("layers", "copy_mlps") if getattr(self, n)]
            changed += [n for n in ("copy_embeddings", "copy_attention") if not getattr(self, n)]
            if changed:
                raise ConfigError(f"student.{changed[0]}: says what to copy from student.init_from, which is not given")
        if self.freeze_embeddings and self.checkpoint is None and (self.init_from is None or not self.copy_embeddings):
            raise ConfigError(
                "student.freeze_embeddings: expected embeddings from student.checkpoint or student.init_from, found "
                "random ones, which would stay random"
            )
        if self.layers is not None and self.num_layers not in (None, len(self.layers)):
            raise ConfigError(
                f"student.num_layers: expected {len(self.layers)}, as many as student.layers names, found "
                f"{self.num_layers}; drop one of them"
            )


@dataclass(frozen=True, kw_only=True)
class _Places:
    """What is read and what is written; here so that the help begins with it."""

    cache: str | Path
    """Where the cache lies: a folder, or a URL such as s3://bucket/folder."""

    out: Path
    """Folder of the trained student: a plain transformers checkpoint with the corpus' tokenizer, plus
    tailcache.json (what it was trained from and how), metrics.jsonl (the held-out curve), training.jsonl and
    timing.jsonl."""

    teacher: str | None = None
    """Which teacher of the cache; may be left out if there is only one."""

    unfinished: Unfinished = "refuse"
    """Where a teacher's capture has not finished. refuse: an error. prefix: use the shards that are committed so far
    without a gap, and only these for as long as the run lasts, also where it is resumed. wait: until it has."""

    wait_minutes: float | None = None
    """With --unfinished wait: give up after this many minutes; without, wait as long as it takes."""

    student: StudentConfig = field(default_factory=StudentConfig)
    """The student."""

    loss: Literal["clm"] | Divergence | None = None
    """clm: plain language modelling, no teacher. All others are CLM plus a divergence from the teacher. kd: KL(p||q).
    tad: the tail-aware divergence. reverse_kl: KL(q||p). jsd: generalised Jensen-Shannon. skew_kl, skew_reverse_kl:
    DistiLLM's. dkd: decoupled (TCKD and NCKD). atkd: hard and easy positions apart. todi: token-wise mix of forward
    and reverse KL. rs_kd: KL from draws of the stored distribution. hidden_cosine: 1 - cosine of the hidden states.
    Default: tad. A weighted sum of several is a list `losses:` in a file of settings (--config)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LossParameters, MixtureConfig, _Places):
    """Train a student from the targets in a cache; the teacher is never loaded.

    The loss per target position is clm_weight * CLM + divergence_weight * DIV, summed over the positions of
    the accumulated batch and divided by their number over all devices: neither gradient accumulation nor
    padding changes it (but for atkd, whose hard positions are those of a forward). Students with the same seed get the
    same initialisation and see the same rows in the same order, whatever their loss.
    """

    losses: tuple[LossConfig, ...] = ()
    """In a file of settings only: a list of divergences, each with a name, a weight and its parameters, in place of
    `loss`."""

    clm_weight: float = 1.0
    """Weight of the cross-entropy with the true next token."""

    divergence_weight: float = 1.0
    """Weight of the divergence from the teacher."""

    learning_rate: float = 1e-4
    """Peak learning rate."""

    schedule: LearningRateSchedule = "cosine"
    """How the learning rate falls after the warm-up."""

    schedule_arguments: str | None = None
    """Arguments of the schedule as JSON text, e.g. '{"min_lr_rate": 0.1}' for cosine_with_min_lr or
    '{"num_decay_steps": 500}' for warmup_stable_decay."""

    optimizer: str = "adamw_torch"
    """Optimizer, as transformers names it: adamw_torch, adamw_torch_fused, adafactor, ..."""

    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two averages."""

    adam_epsilon: float = 1e-8
    """Added to the denominator of Adam's step."""

    warmup: float = 0.02
    """Steps of linear warm-up; a number below 1 is a share of all steps."""

    weight_decay: float = 0.1
    """Weight decay (not on biases and norms)."""

    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this; 0 turns it off."""

    batch_rows: int = 8
    """Corpus rows per device and forward."""

    gradient_accumulation: int = 1
    """Forwards per optimizer step."""

    rows_per_step: int | None = None
    """Corpus rows of an optimizer step over all devices: decides gradient_accumulation in its place, whatever the
    number of devices. A run that is resumed with another number of them needs it (or an equal product)."""

    gradient_checkpointing: bool = False
    """Keep only the inputs of the student's layers for the backward and work out the rest again: less memory, about a
    third more time."""

    distributed: Literal["ddp", "fsdp"] = "ddp"
    """With several processes (torchrun). ddp: each holds the whole student. fsdp: weights, gradients and the
    optimizer's state are shared out (FSDP2). `accelerate launch` with a file of its own says it itself."""

    fsdp_reshard: bool = True
    """With fsdp: free a layer's gathered weights between forward and backward."""

    fsdp_offload: bool = False
    """With fsdp on GPUs: keep weights, gradients and the optimizer's state in the memory of the CPU while unused."""

    fsdp_checkpoints: Literal["whole", "sharded"] = "whole"
    """With fsdp, of the checkpoints to resume from. whole: one file that the first process gathers. sharded: each
    process writes its part. Either can be resumed with any number of processes, with and without fsdp."""

    epochs: float = 1.0
    """Passes over the training rows."""

    max_steps: int | None = None
    """Stop after this many optimizer steps instead (repeating the rows if need be)."""

    online: str | None = None
    """Run this teacher beside the student (a folder, a hub id or a GGUF file, as for capture) and train on its own
    distributions, by default as a whole (--tail exact), instead of the cache's targets. These then serve evaluation
    alone. Every step costs the teacher's forward: it is there to see what a cache loses."""

    seed: int = 0
    """Decides initialisation, row order and dropout."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the body of the model under autocast, and the head's factors rounded to bfloat16; the head's sums, its
    results (logits are never rounded), losses and weights stay in float32."""

    head_mode: Literal["one-pass", "recompute"] = "one-pass"
    """How the head is fused with the loss. one-pass: its gradient is made in the forward, at the cost of cross-entropy.
    recompute: holds no gradient of the head between forward and backward, and takes a third longer. Losses that need
    whole rows of the teacher's distribution (--tail exact; prior or uniform for other than kd, tad, dkd and atkd) are
    always one-pass."""

    layout: Literal["auto", "rows", "flat", "documents"] = "auto"
    """How rows become lines of a batch. rows: one line each. flat: all on one line (flash attention).
    documents: one line per document, for models that cannot keep packed documents apart."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""

    threads: int | None = None
    """CPU threads for torch; default: torch's own choice."""

    workers: int = 0
    """Processes that read the cache; 0: threads of the training process do, which is enough unless its own work leaves
    them no processor."""

    eval_every: int = 100
    """Optimizer steps between held-out evaluations (one before the first step and one after the last are
    always made); 0: only those two."""

    eval_rows: int | None = None
    """Evaluate on the first so many held-out rows; default: all."""

    save_every: int | None = None
    """Optimizer steps between checkpoints to resume from; default: none are kept."""

    keep_checkpoints: int = 2
    """How many of them to keep."""

    log_every: int = 10
    """Optimizer steps between lines of training.jsonl; checkpoints and the last step have one too."""

    report_to: tuple[Tracker, ...] = ()
    """Log the curves to these too; each has its package. tensorboard writes to OUT/runs."""

    run_name: str | None = None
    """The run's name there. Default: OUT."""

    project: str | None = None
    """The project the run belongs to, for those that have projects."""

    hub_model_id: str | None = None
    """Push the trained student to this repository of the hub (NAME or OWNER/NAME)."""

    hub_private: bool = True
    """Whether the repository is private, if it has to be made."""

    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "end"
    """When to push: at the end only; also with every checkpoint; and then the last checkpoint, or all, as well."""

    resume: bool = False
    """Continue from the last checkpoint in OUT (or start, if there is none)."""

    def __post_init__(self) -> None:
        self.check_mixture(self.teacher)
        if self.losses:
            given = "loss" if self.loss is not None else "divergence_weight" if self.divergence_weight != 1.0 else None
            parameters = [each for each in fields(LossParameters) if getattr(self, each.name) != each.default]
            given = given or next((each.name for each in parameters), None)
            if given is not None:
                raise ConfigError(
                    f"{given}: losses lists the divergences with their own weights and parameters; put it there, or "
                    "drop losses"
                )
        else:
            self.check_parameters(self.loss_name)
        for name in ("batch_rows", "gradient_accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("max_steps", "save_every", "threads", "eval_rows", "rows_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}")
        not_negative = (
            "clm_weight",
            "divergence_weight",
            "learning_rate",
            "warmup",
            "weight_decay",
            "max_grad_norm",
            "adam_epsilon",
            "eval_every",
            "seed",
            "workers",
        )
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected a number >= 0, found {getattr(self, name)}")
        self._check_training()
        if not self.epochs > 0:
            raise ConfigError(f"epochs: expected a number > 0, found {self.epochs}")
        if self.clm_weight == 0 and not any(each.weight > 0 for each in self.divergences):
            raise ConfigError("clm_weight: with every weight 0 there is no loss; set one above 0")

    def _check_training(self) -> None:
        if self.rows_per_step is not None and self.gradient_accumulation != 1:
            raise ConfigError(
                "rows_per_step: it decides gradient_accumulation, found both; drop one of them (rows_per_step keeps "
                "the batch when the number of devices changes)"
            )
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas: expected two numbers from 0 to below 1, found {self.adam_betas}")
        if self.hub_model_id is None and self.hub_strategy != "end":
            raise ConfigError("hub_strategy: expected a repository to push to; set hub_model_id, or drop hub_strategy")
        if self.hub_strategy != "end" and self.save_every is None:
            raise ConfigError(
                f"hub_strategy: {self.hub_strategy} pushes with every checkpoint and none is kept; set save_every"
            )
        _ = self.schedule_settings

    @property
    def schedule_settings(self) -> dict[str, object]:
        """The schedule's arguments by name.

        Raises:
          ConfigError: ``schedule_arguments`` is not a JSON object.
        """
        try:
            found = json.loads(self.schedule_arguments or "{}")
        except ValueError as error:
            raise ConfigError(f"schedule_arguments: expected JSON text, found an error at {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"schedule_arguments: expected a JSON object, found {type(found).__name__}")
        return found

    @property
    def loss_name(self) -> str:
        """What ``loss`` is, where there is no list."""
        return self.loss or "tad"

    @property
    def divergences(self) -> tuple[LossConfig, ...]:
        """The divergences that are summed; none for plain language modelling."""
        if self.losses or self.loss == "clm":
            return self.losses
        parameters = {each.name: getattr(self, each.name) for each in fields(LossParameters)}
        return (LossConfig(name=self.loss or "tad", weight=self.divergence_weight, **parameters),)
