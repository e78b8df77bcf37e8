"""The settings of prepare, capture and compare: frozen, keyword-only, and light to import.

The text under a field is what ``tailcache VERB --help`` prints for it. Checks that need nothing but the
settings themselves are made on construction, so that a wrong one fails before any work is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailcache.storage.errors import ConfigError

__all__ = ["PrepareConfig"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text, chats or ready token ids into the corpus of a cache.

    The corpus is tokenised and laid out once; every teacher and every student then reads the same stored
    tokens. Nothing is dropped or cut silently: the report printed at the end, and stored with the corpus,
    counts it. The same input and settings give the same bytes.
    """

    cache: Path
    """Folder of the cache; the corpus is written to CACHE/corpus."""

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
