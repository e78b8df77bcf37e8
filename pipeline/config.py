"""The settings of prepare, capture and compare: frozen, keyword-only, and light to import.

The text under a field is what ``tailcache VERB --help`` prints for it. Checks that need nothing but the
settings themselves are made on construction, so that a wrong one fails before any work is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailcache.storage.errors import ConfigError
from tailcache.storage.unfinished import Unfinished

__all__ = ["CaptureConfig", "CompareConfig", "PrepareConfig"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text, chats or ready token ids into the corpus of a cache.

    The corpus is tokenised and laid out once; every teacher and every student then reads the same stored
    tokens. Nothing is dropped or cut silently: the report printed at the end, and stored with the corpus,
    counts it. The same input and settings give the same bytes.
    """

    cache: str | Path
    """Where the cache lies: a folder, or a URL such as s3://bucket/folder; the corpus is written to CACHE/corpus."""

    source: str
    """What to read: a file or folder (parquet, .jsonl, .json, .txt, .arrow, or what `datasets` saved; text
    and JSON may be .gz, .bz2, .xz or .zst), a pattern such as "data/*.jsonl", the name of a dataset on the
    hub, or `python-docstrings` (the documentation strings of Python's standard library)."""

    tokenizer: str
    """The tokenizer of teacher and students: a folder, a hub id, or a GGUF file."""

    split: str | None = None
    """Which split to read; by default `train` where there are several, and otherwise the only one."""

    subset: str | None = None
    """The configuration of a hub dataset that has several, such as "en"."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""

    tokenizer_revision: str | None = None
    """Branch, tag or commit of a hub tokenizer."""

    text_column: str | None = None
    """The column with text. Without any of the three column settings the columns text, messages and
    input_ids are looked for, and exactly one must be there."""

    messages_column: str | None = None
    """The column with chats: lists of {role, content}. Only what the assistant says is supervised."""

    input_ids_column: str | None = None
    """The column with ready token ids. Columns labels (-100: not supervised; not shifted), loss_mask,
    assistant_masks, completion_mask, attention_mask (0: padding, taken off) and position_ids (0: a document
    starts) are used if they are there."""

    mask_column: str | None = None
    """The column that says, with 1 or 0, which of the ready token ids are supervised; instead of the names
    above."""

    chat_template: Path | None = None
    """A file with the chat template (Jinja) to use instead of the tokenizer's; it is stored with the
    tokenizer."""

    text_files: Literal["line", "paragraph", "document"] = "line"
    """What one document of a .txt file is: a line, a run of lines without a blank one, or the whole file
    (which is then held in memory)."""

    context_length: int = 2048
    """Most tokens in one row."""

    packing: Literal["auto", "packed", "one-per-row"] = "auto"
    """Fill rows with one document after another, their boundaries kept, or give each document its own row.
    auto: packed for text, one-per-row for chats and for ready token ids."""

    overlong: Literal["split", "cut", "error"] = "split"
    """What becomes of a document longer than a row: continued in further rows, cut to one row's length with
    the rest counted as cut, or an error."""

    bos: Literal["auto", "always", "never"] = "auto"
    """Begin each text with the tokenizer's bos token; auto: if the tokenizer does so by itself."""

    eos: Literal["auto", "always", "never"] = "auto"
    """End each text with the tokenizer's eos token, or with `--separator`; auto: if there is one."""

    separator: str | None = None
    """The token that ends each text instead of eos, such as "<|endoftext|>"."""

    held_out: float = 0.05
    """Share of the documents kept for evaluation, from 0 to 1. Each document's own content decides, before
    packing, so no document, nor a copy of it, is on both sides."""

    seed: int = 0
    """Another seed holds out other documents."""

    max_documents: int | None = None
    """Stop after this many documents that are not empty."""

    max_tokens: int | None = None
    """Stop before the document with which the corpus would exceed this many tokens."""

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
          ConfigError: a setting out of range, or two that contradict each other.
        """
        if self.context_length < 2:
            raise ConfigError(
                f"--context-length: expected at least 2 (a position and its next token), found {self.context_length}"
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"--held-out: expected a share from 0 to below 1, found {self.held_out}")
        for name in ("max_documents", "max_tokens"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, found {limit}")
        columns = [
            flag
            for flag, column in (
                ("--text-column", self.text_column),
                ("--messages-column", self.messages_column),
                ("--input-ids-column", self.input_ids_column),
            )
            if column is not None
        ]
        if len(columns) > 1:
            raise ConfigError(f"expected one of the columns to be chosen, found {' and '.join(columns)}")
        if self.separator is not None and self.eos == "never":
            raise ConfigError("--separator and --eos never contradict each other: drop one of them")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Run a teacher once over the corpus and store what matters of its next-token distributions.

    Runs for as long as the teacher needs, and can be killed at any time: the same command continues where the last
    committed shard ended, and the finished cache has the same bytes as if it had never been interrupted.
    """

    cache: str | Path
    """Where the cache lies: a folder, or a URL such as s3://bucket/folder. It must have a corpus
    (`tailcache prepare`)."""

    teacher: str
    """Any causal language model of `transformers`: a folder, a hub id, or the path of a GGUF file."""

    name: str
    """What to call this teacher: its targets are written to CACHE/teachers/NAME."""

    top_k: int = 32
    """K, the most likely tokens kept at each position; students may train on any K' <= K. More serve losses that see
    the tail as one atom (reverse KL, ToDi, JSD); for KL and TAD more draws are the better use of the bytes."""

    num_samples: int = 64
    """Draws from the rest of the vocabulary kept at each position; they make the tail's gradient unbiased. Where that
    rest has little mass, fewer are different and each is repeated, which takes next to no bytes: best a number with
    many divisors, such as 16, 48 or 64. 0 where K is the whole vocabulary."""

    temperatures: tuple[float, ...] = ()
    """Further temperatures at which the mass beyond the top K is kept (`log_z_tail`, 4 bytes each before compression),
    such as 2 4: a student can then be trained at these temperatures exactly. Temperature 1 is always kept."""

    hidden: Literal["none", "bf16", "int8"] = "none"
    """Also keep the teacher's last hidden state at each position, and its head once: together its whole distribution,
    for losses that need it, and for those that compare hidden states. bf16 takes 2 bytes times the hidden width a
    position, and loses nothing of a teacher that runs in bfloat16; int8 takes half of that. Shards are held in memory:
    --shard-positions lowers what that takes."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model; auto is the checkpoint's own, and for GGUF bfloat16, or float32 where the processor has
    no fast products in it. Logits are always float32."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU where there is one."""

    attn_implementation: str | None = None
    """Attention that `transformers` should use: eager, sdpa, flash_attention_2, …; its own choice by default."""

    batch_positions: int = 4096
    """Positions the model computes at a time, padding included. More is faster until memory is full."""

    head_positions: int | None = None
    """Positions whose logits over the whole vocabulary exist at a time; by default 256 on a CPU, and on a GPU as
    many as make 1 GiB."""

    shard_positions: int = 131072
    """Target positions of a shard, on average: the unit of work, of commit and of repair."""

    chunk_positions: int = 8192
    """Target positions of a chunk within a shard: the unit of random access."""

    kl_budget: float = 1e-5
    """Nats per position that rounding the stored log-probabilities may cost on average, whatever the distributions. A
    cache of 1e-4 takes about 12 % fewer bytes for all but the draws, one of 1e-3 about 24 %."""

    compression_level: int = 9
    """Of the compressor, 1 (fast) to 9 (small)."""

    revision: str | None = None
    """Revision of a hub model."""

    trust_remote_code: bool = False
    """Run model code that comes with a hub model."""

    sample_seed: int = 0
    """Another seed draws the tail again, independently."""

    weight_bits: int | None = None
    """Round the teacher's linear weights to so many bits first: what would quantising this teacher cost?"""

    weight_group: int = 32
    """Neighbouring weights that share one rounding range, with --weight-bits."""

    threads: int | None = None
    """CPU threads of the model; by default what torch chooses."""

    def __post_init__(self) -> None:
        smallest = {"top_k": 1, "num_samples": 0, "batch_positions": 1, "shard_positions": 1, "chunk_positions": 1}
        for field, least in smallest.items():
            if getattr(self, field) < least:
                raise ConfigError(f"{field}: expected at least {least}, found {getattr(self, field)}")
        if not 1 <= self.compression_level <= 9:
            raise ConfigError(f"compression_level: expected 1 to 9, found {self.compression_level}")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Say what one teacher's cache holds, and how two or more teachers differ, without running any of them.

    Every figure comes with a bootstrap confidence interval over rows. The KL between teachers is given twice: a lower
    bound that is certain, and an estimate that rests on an assumption about what lies beyond the stored tokens.
    """

    cache: str | Path
    """Folder of a cache with finished teachers."""

    teachers: tuple[str, ...] = ()
    """Which of its teachers, in this order; all finished ones by default."""

    other_cache: str | Path | None = None
    """A second cache with the same corpus (the same content hash), whose teachers are compared too."""

    other_teachers: tuple[str, ...] = ()
    """Which teachers of the second cache; all finished ones by default."""

    unfinished: Unfinished = "refuse"
    """Where a teacher's capture has not finished. refuse: an error. prefix: use the shards that are committed so far
    without a gap, and of all teachers the rows that all of them have. wait: until it has."""

    wait_minutes: float | None = None
    """With --unfinished wait: give up after this many minutes; without, wait as long as it takes."""

    split: Literal["all", "held-out", "train"] = "all"
    """Which rows of the corpus."""

    confidence: float = 0.95
    """Of the intervals."""

    resamples: int = 1000
    """Resamples of the rows that make the intervals; 0 leaves them out."""

    seed: int = 0
    """Another seed resamples other rows."""

    json: Path | None = None
    """Write all figures to this JSON file."""

    plots: Path | None = None
    """Write the plots to this folder, as PNG."""

    html: Path | None = None
    """Write the table and the plots to this one HTML file."""

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ConfigError(f"--confidence: expected a share between 0 and 1, found {self.confidence}")
        if self.resamples < 0 or self.seed < 0:
            raise ConfigError(f"--resamples and --seed: expected 0 or more, found {self.resamples} and {self.seed}")
        if self.other_teachers and self.other_cache is None:
            raise ConfigError("--other-teachers: expected --other-cache, the cache that has them, beside it")
        for flag, names in (("--teachers", self.teachers), ("--other-teachers", self.other_teachers)):
            if len(set(names)) < len(names):
                raise ConfigError(f"{flag}: expected each teacher once, found {' '.join(names)}")
