"""The settings of ``tailcache evaluate``: frozen, keyword-only, and light to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailcache.storage.errors import ConfigError
from tailcache.storage.unfinished import Unfinished

__all__ = ["EvaluateConfig"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a student on held-out text, and how close it is to a teacher; the teacher is never loaded.

    Every figure comes with a bootstrap confidence interval over documents. docs/evaluate.md says what each of them is
    and which are exact.
    """

    student: str
    """The student: a folder that `tailcache train` has saved, or a folder or hub id of any causal language model whose
    tokenizer is the corpus' own. May be given first, without the flag."""

    cache: str | Path
    """Where the cache lies: a folder, or a URL such as s3://bucket/folder."""

    teacher: str | None = None
    """Which teacher of the cache; may be left out if there is only one."""

    revision: str | None = None
    """Branch, tag or commit of a student on the hub."""

    unfinished: Unfinished = "refuse"
    """Where the teacher's capture has not finished. refuse: an error. prefix: use the rows of the shards that are
    committed so far without a gap. wait: until it has."""

    wait_minutes: float | None = None
    """With --unfinished wait: give up after this many minutes; without, wait as long as it takes."""

    split: Literal["held-out", "train"] = "held-out"
    """Which rows of the corpus: those that no student is trained on, or the others."""

    rows: int | None = None
    """Only the first so many of them; default: all."""

    bins: int = 15
    """Equal bins of probability that ECE, Full-ECE and the calibration curves are made of. The teacher's Full-ECE is
    exact for as many bins as the cache stores tokens per position."""

    tails: tuple[int, ...] = ()
    """K at which the mass off the teacher's K most likely tokens is compared; default: 1 5 10 20 50 ... up to what the
    cache stores."""

    batch_rows: int = 8
    """Rows per forward. No figure depends on it."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the body of the model under autocast, and the head's factors rounded to bfloat16; logits are never
    rounded."""

    layout: Literal["auto", "rows", "flat", "documents"] = "auto"
    """How rows become lines of a batch. rows: one line each. flat: all on one line (flash attention).
    documents: one line per document, for models that cannot keep packed documents apart."""

    attn_implementation: str | None = None
    """Attention: sdpa, eager, flash_attention_2, ... Default: what transformers chooses for the model."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run the student; auto: a GPU if there is one."""

    threads: int | None = None
    """CPU threads for torch; default: torch's own choice."""

    confidence: float = 0.95
    """Of the intervals."""

    resamples: int = 1000
    """Resamples of the documents that make the intervals; 0 leaves them out."""

    seed: int = 0
    """Another seed resamples other documents."""

    json: Path | None = None
    """Write all figures to this JSON file."""

    plots: Path | None = None
    """Write the plots to this folder, as PNG, and the table with the plots to its evaluation.html."""

    def __post_init__(self) -> None:
        for name in ("rows", "threads", "bins", "batch_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"--confidence: expected a share between 0 and 1, found {self.confidence}")
        if self.resamples < 0 or self.seed < 0:
            raise ConfigError(f"--resamples and --seed: expected 0 or more, found {self.resamples} and {self.seed}")
        if any(k < 1 for k in self.tails) or len(set(self.tails)) < len(self.tails):
            raise ConfigError(f"--tails: expected different numbers of at least 1, found {self.tails}")
