"""The settings of ``tailcache train``: frozen, keyword-only, and light to import.

The text under a field is what ``tailcache train --help`` prints for it. Checks that need nothing but the
settings themselves are made on construction; those that need the cache or the student, before any training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tailcache.storage.errors import ConfigError

__all__ = ["StudentConfig", "TrainConfig"]

_SIZES = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "tie_embeddings")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Which student: a checkpoint, a configuration to initialise at random, or a few sizes."""

    checkpoint: str | None = None
    """Start from this checkpoint: a folder or a hub id of any causal language model. Its tokenizer must be
    the corpus' own."""

    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""

    config: str | None = None
    """Initialise at random from this configuration: a JSON file, a folder with a config.json, or JSON text
    such as '{"hidden_size": 512, "num_hidden_layers": 8}'. The vocabulary size is the corpus' unless
    given."""

    model_type: str | None = None
    """The architecture, as transformers names it (llama, qwen3, gpt2, mamba, ...), if the configuration does
    not say it. Default: llama."""

    hidden_size: int | None = None
    """Width of a student made from sizes alone. Default: 256."""

    num_layers: int | None = None
    """Its layers. Default: 4."""

    num_heads: int | None = None
    """Its attention heads. Default: 4."""

    intermediate_size: int | None = None
    """Width of its feed-forward part. Default: 8/3 of the hidden size, rounded up to a multiple of 32."""

    tie_embeddings: bool | None = None
    """Whether its head shares the input embeddings. Default: yes."""

    attn_implementation: str | None = None
    """Attention: sdpa, eager, flash_attention_2, ... Default: what transformers chooses for the model."""

    def __post_init__(self) -> None:
        given = [name for name in _SIZES if getattr(self, name) is not None]
        if self.checkpoint is not None:
            clashing = [n for n in ("config", "model_type") if getattr(self, n) is not None] + given
            if clashing:
                raise ConfigError(
                    f"student.{clashing[0]}: a checkpoint has its own architecture; drop either student.checkpoint "
                    f"or student.{clashing[0]}"
                )
        elif self.config is not None and given:
            raise ConfigError(
                f"student.{given[0]}: the configuration in student.config already says it; put the size there"
            )
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"student.{name}: expected a positive number, found {value}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a student from the targets in a cache; the teacher is never loaded.

    The loss per target position is clm_weight * CLM + divergence_weight * DIV, summed over the positions of
    the accumulated batch and divided by their number over all devices: neither gradient accumulation nor
    padding changes it. Students with the same seed get the same initialisation and see the same rows in the
    same order, whatever their loss.
    """

    cache: Path
    """Folder of the cache."""

    out: Path
    """Folder of the trained student: a plain transformers checkpoint with the corpus' tokenizer, plus
    tailcache.json (what it was trained from and how), metrics.jsonl (the held-out curve) and
    training.jsonl."""

    teacher: str | None = None
    """Which teacher of the cache; may be left out if there is only one."""

    student: StudentConfig = field(default_factory=StudentConfig)
    """The student."""

    loss: Literal["clm", "kd", "tad"] = "tad"
    """clm: plain language modelling, no teacher. kd: CLM + KL(p||q). tad: CLM + tail-aware divergence."""

    tail: Literal["sampled", "bucket", "prior"] = "sampled"
    """What stands for the teacher's tail beyond the stored top-K. sampled: the stored draws, an unbiased
    gradient. bucket: one atom, a lower bound. prior: the teacher's mean tail; deterministic, biased."""

    top_k: int | None = None
    """TAD's split K': the head is the teacher's K' most likely tokens, at most the K that is stored.
    Default: 10. KL has no split and always uses every stored token."""

    beta: float = 2.0
    """TAD's weight of the tail: beta(X) = beta / mean tail mass over the positions of a document."""

    min_mean_alpha: float = 0.0
    """Lower bound of that mean, so that beta(X) cannot explode on documents the teacher is sure of; 0 is the
    paper."""

    clm_weight: float = 1.0
    """Weight of the cross-entropy with the true next token."""

    divergence_weight: float = 1.0
    """Weight of the divergence from the teacher (kd, tad)."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""

    warmup: float = 0.02
    """Steps of linear warm-up; a number below 1 is a share of all steps."""

    weight_decay: float = 0.1
    """AdamW's weight decay (not on biases and norms)."""

    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this; 0 turns it off."""

    batch_rows: int = 8
    """Corpus rows per device and forward."""

    gradient_accumulation: int = 1
    """Forwards per optimizer step."""

    epochs: float = 1.0
    """Passes over the training rows."""

    max_steps: int | None = None
    """Stop after this many optimizer steps instead (repeating the rows if need be)."""

    seed: int = 0
    """Decides initialisation, row order and dropout."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the body of the model under autocast; weights, head and losses stay in float32."""

    layout: Literal["auto", "rows", "flat", "documents"] = "auto"
    """How rows become lines of a batch. rows: one line each. flat: all on one line (flash attention).
    documents: one line per document, for models that cannot keep packed documents apart."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""

    threads: int | None = None
    """CPU threads for torch; default: torch's own choice."""

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
    """Optimizer steps between lines of training.jsonl."""

    resume: bool = False
    """Continue from the last checkpoint in OUT (or start, if there is none)."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.loss != "tad":
            raise ConfigError(
                f"top_k: the split K' is TAD's, and the loss is {self.loss!r}, which uses every stored token; drop it"
            )
        for name in ("batch_rows", "gradient_accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("max_steps", "save_every", "threads", "eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}")
        not_negative = (
            "beta",
            "min_mean_alpha",
            "clm_weight",
            "divergence_weight",
            "learning_rate",
            "warmup",
            "weight_decay",
            "max_grad_norm",
            "eval_every",
            "seed",
        )
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected a number >= 0, found {getattr(self, name)}")
        if not self.epochs > 0:
            raise ConfigError(f"epochs: expected a number > 0, found {self.epochs}")
        if self.clm_weight == 0 and (self.loss == "clm" or self.divergence_weight == 0):
            raise ConfigError("clm_weight: with every weight 0 there is no loss; set one above 0")
