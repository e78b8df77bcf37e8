"""From records to documents: token ids, where documents begin, and which tokens are to be predicted.

Three kinds of record: text, chats, and ready token ids. Texts are tokenised in batches of bounded size, so
that a tokenizer can use several threads while only a few documents are in memory.

Legend: n tokens of a document.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tailcache.pipeline.chat import chat_tokens, normalise_messages
from tailcache.pipeline.config import PrepareConfig
from tailcache.pipeline.text import Record
from tailcache.storage.errors import ConfigError, DataError

__all__ = ["Columns", "Document", "Encoder", "choose_columns"]

Kind = Literal["text", "chat", "tokens"]
CHAT_COLUMNS = ("messages", "conversations")
MASK_COLUMNS = ("loss_mask", "assistant_masks", "assistant_mask", "completion_mask")
IGNORED_LABEL = -100
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Columns:
    """What the records are and which column has it.

    Attributes:
      kind: "text", "chat" or "tokens".
      main: the column with the text, the messages or the ids.
      mask: the column that was named as the mask of ready ids; None looks for the usual names.
    """

    kind: Kind
    main: str
    mask: str | None = None

    def names(self) -> list[str]:
        """Every column that is read where it is there."""
        if self.kind == "text":
            return [self.main]
        if self.kind == "chat":
            return [self.main, "tools"]
        masks = MASK_COLUMNS if self.mask is None else (self.mask,)
        return [self.main, "labels", "attention_mask", "position_ids", *masks]


@dataclass(frozen=True)
class Document:
    """One document, tokenised.

    Attributes:
      where: its place in the source, for messages.
      content_hash: sha256 of the content; equal contents are on the same side of the held-out split.
      source_hash: sha256 of all that was read for it.
      tokens: [n] int64; empty for a document without content.
      document_start: [n] bool; first token of a document (ready ids may hold several).
      wanted: [n] bool; the token is to be predicted; no shift has been made.
      num_padding: tokens taken off because attention_mask said so.
    """

    where: str
    content_hash: bytes
    source_hash: bytes
    tokens: NDArray[np.int64]
    document_start: NDArray[np.bool_]
    wanted: NDArray[np.bool_]
    num_padding: int = 0


def choose_columns(available: Sequence[str], config: PrepareConfig) -> Columns:
    """Decide what the records are, from the settings or from the names of the columns.

    Raises:
      ConfigError: a column that is not there (with a suggestion), none or several that could be meant.
    """
    columns = ", ".join(available) or "none"
    chosen: tuple[tuple[Kind, str, str | None], ...] = (
        ("text", "--text-column", config.text_column),
        ("chat", "--messages-column", config.messages_column),
        ("tokens", "--input-ids-column", config.input_ids_column),
    )
    found: list[Columns] = []
    for kind, flag, name in chosen:
        if name is not None:
            _require_column(name, flag, available)
            found = [Columns(kind, name, config.mask_column)]
            break
    else:
        if "text" in available:
            found.append(Columns("text", "text", config.mask_column))
        found += [Columns("chat", name, config.mask_column) for name in CHAT_COLUMNS if name in available]
        if "input_ids" in available:
            found.append(Columns("tokens", "input_ids", config.mask_column))
    if len(found) != 1:
        which = f"found {' and '.join(each.main for each in found)}" if found else "found none of them"
        raise ConfigError(
            f"source {config.source}: expected one of the columns text, messages or input_ids, {which}; "
            f"choose with --text-column, --messages-column or --input-ids-column. Its columns: {columns}"
        )
    if config.mask_column is not None:
        if found[0].kind != "tokens":
            raise ConfigError(f"--mask-column is for ready token ids; column {found[0].main} is {found[0].kind}")
        _require_column(config.mask_column, "--mask-column", available)
    return found[0]


def _require_column(name: str, flag: str, available: Sequence[str]) -> None:
    if name not in available:
        near = difflib.get_close_matches(name, available, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{flag} {name}: there is no such column{hint} Columns: {', '.join(available) or 'none'}")


@dataclass(frozen=True)
class Encoder:
    """Turns records into documents.

    Attributes:
      tokenizer: a transformers tokenizer.
      vocab_size: ids must be below it.
      columns: what to read.
      first_id: put before each text, or None.
      last_id: put after each text, or None.
    """

    tokenizer: Any
    vocab_size: int
    columns: Columns
    first_id: int | None = None
    last_id: int | None = None

    def documents(self, records: Iterable[Record]) -> Generator[Document, None, None]:
        """One document per record, in order; one without tokens for a record that is empty.

        Raises:
          DataError: a record that is not what its column should hold, with its place.
        """
        if self.columns.kind != "text":
            encode = self._chat if self.columns.kind == "chat" else self._ready
            for record in records:
                yield encode(record)
            return
        batch: list[tuple[str, str]] = []
        num_characters = 0
        for record in records:
            text = self._text_of(record)
            batch.append((record.where, text))
            num_characters += len(text)
            if len(batch) >= BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
                yield from self._texts(batch)
                batch, num_characters = [], 0
        if batch:
            yield from self._texts(batch)

    def _value(self, record: Record) -> Any:
        if self.columns.main not in record.fields:
            columns = ", ".join(record.fields) or "none"
            raise DataError(f"{record.where}: expected the column {self.columns.main}, found {columns}")
        return record.fields[self.columns.main]

    def _text_of(self, record: Record) -> str:
        value = self._value(record)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise DataError(
                f"{record.where}: expected text in column {self.columns.main}, found {type(value).__name__} "
                f"{str(value)[:40]!r}"
            )
        return value

    def _texts(self, batch: Sequence[tuple[str, str]]) -> Iterator[Document]:
        hashes = [_hash_text(text, where) for where, text in batch]
        encoded = self.tokenizer(
            [text for _, text in batch], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        before = [] if self.first_id is None else [self.first_id]
        after = [] if self.last_id is None else [self.last_id]
        for (where, text), content_hash, ids in zip(batch, hashes, encoded, strict=True):
            tokens = [*before, *ids, *after] if ids and text.strip() else []
            yield _whole(where, content_hash, np.asarray(tokens, dtype=np.int64))

    def _chat(self, record: Record) -> Document:
        value = self._value(record)
        messages = normalise_messages([] if value is None else value, record.where)
        tools = record.fields.get("tools")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise DataError(f"{record.where}: column tools is not JSON: {error}") from error
        content_hash = _hash_text(json.dumps([messages, tools], sort_keys=True, default=str), record.where)
        if not messages:
            return _whole(record.where, content_hash, np.zeros(0, dtype=np.int64))
        tokens, wanted = chat_tokens(self.tokenizer, messages, tools or None, record.where)
        return _whole(record.where, content_hash, tokens, wanted)

    def _ready(self, record: Record) -> Document:
        where = record.where
        tokens = _integers(self._value(record), f"{where}, column {self.columns.main}", None)
        names = MASK_COLUMNS if self.columns.mask is None else (self.columns.mask,)
        masks = [
            _flags(record.fields[name], f"{where}, column {name}", len(tokens))
            for name in names
            if record.fields.get(name) is not None
        ]
        if self.columns.mask is not None and not masks and len(tokens):
            raise DataError(f"{where}: expected the column {self.columns.mask}, found none")
        wanted = np.logical_and.reduce(masks) if masks else np.ones(len(tokens), dtype=np.bool_)
        if (labels := record.fields.get("labels")) is not None:
            wanted = wanted & _labelled(labels, tokens, where)
        start = np.zeros(len(tokens), dtype=np.bool_)
        start[:1] = True
        if (positions := record.fields.get("position_ids")) is not None:
            start = _integers(positions, f"{where}, column position_ids", len(tokens)) == 0
        kept = np.ones(len(tokens), dtype=np.bool_)
        if (attention := record.fields.get("attention_mask")) is not None:
            kept = _flags(attention, f"{where}, column attention_mask", len(tokens))
            present = np.flatnonzero(kept)
            if len(present) and present[-1] - present[0] + 1 != len(present):
                raise DataError(f"{where}, column attention_mask: expected padding at the ends, found a gap")
        num_padding = int(len(kept) - kept.sum())
        tokens, wanted, start = tokens[kept], wanted[kept], start[kept]
        start[:1] = True
        outside = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
        if len(outside):
            raise DataError(
                f"{where}, token {outside[0]}: expected an id from 0 to {self.vocab_size - 1}, found "
                f"{tokens[outside[0]]}; is this the tokenizer the ids were made with?"
            )
        content_hash = hashlib.sha256(tokens.astype("<i8").tobytes()).digest()
        source_hash = hashlib.sha256(content_hash + np.packbits([wanted, start]).tobytes()).digest()
        return Document(where, content_hash, source_hash, tokens, start, wanted, num_padding)


def _whole(
    where: str, content_hash: bytes, tokens: NDArray[np.int64], wanted: NDArray[np.bool_] | None = None
) -> Document:
    start = np.zeros(len(tokens), dtype=np.bool_)
    start[:1] = True
    if wanted is None:
        wanted = np.ones(len(tokens), dtype=np.bool_)
    return Document(where, content_hash, content_hash, tokens, start, wanted)


def _hash_text(text: str, where: str) -> bytes:
    try:
        return hashlib.sha256(text.encode("utf-8")).digest()
    except UnicodeEncodeError as error:
        found = text[error.start : error.end]
        raise DataError(f"{where}: character {error.start} is half a surrogate pair ({found!r}), not text") from error


def _integers(value: Any, where: str, length: int | None) -> NDArray[np.int64]:
    """A list of integers, of a given length if one is given; an empty one for null."""
    values = np.asarray([] if value is None else value)
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise DataError(f"{where}: expected a list of integers, found {str(value)[:40]}")
    if length is not None and len(values) != length:
        raise DataError(f"{where}: expected one entry per token, {length}, found {len(values)}")
    return values.astype(np.int64)


def _flags(value: Any, where: str, length: int) -> NDArray[np.bool_]:
    values = np.asarray(value)
    if values.dtype.kind == "b" and values.shape == (length,):
        return values
    numbers = _integers(value, where, length)
    if not np.isin(numbers, (0, 1)).all():
        raise DataError(f"{where}: expected 0 and 1 only, found {numbers[~np.isin(numbers, (0, 1))][0]}")
    return numbers.astype(np.bool_)


def _labelled(value: Any, tokens: NDArray[np.int64], where: str) -> NDArray[np.bool_]:
    """Which tokens labels ask for: those that repeat the token; -100 asks for nothing."""
    labels = _integers(value, f"{where}, column labels", len(tokens))
    wanted: NDArray[np.bool_] = labels != IGNORED_LABEL
    wrong = np.flatnonzero(wanted & (labels != tokens))
    if len(wrong):
        at = int(wrong[0])
        shifted = "; they look shifted by one already, give them unshifted" if _looks_shifted(labels, tokens) else ""
        raise DataError(
            f"{where}, token {at}: expected the label to repeat the token, {tokens[at]}, or {IGNORED_LABEL}, "
            f"found {labels[at]}{shifted}"
        )
    return wanted


def _looks_shifted(labels: NDArray[np.int64], tokens: NDArray[np.int64]) -> bool:
    known = labels[:-1] != IGNORED_LABEL
    return bool(known.any() and (labels[:-1] == tokens[1:])[known].all())
