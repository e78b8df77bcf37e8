"""Prepare a corpus: read, tokenise, split off the held-out documents, pack, count, store.

One pass over the source with a few documents and one row per side in memory. Everything stored follows from
the content of the source and the settings, and from nothing else: no times, no paths, no names of machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from tailcache.pipeline.chat import has_generation_markers
from tailcache.pipeline.config import PrepareConfig
from tailcache.pipeline.documents import Columns, Document, Encoder, choose_columns
from tailcache.pipeline.locate import open_source
from tailcache.pipeline.packing import Packer, PackingCounts, is_held_out
from tailcache.pipeline.text import Source
from tailcache.pipeline.tokenizer import LoadedTokenizer, ending_id, load_tokenizer, opening_id
from tailcache.storage.corpus import Corpus
from tailcache.storage.corpus_writer import CorpusWriter, has_corpus
from tailcache.storage.errors import ConfigError, DataError, MismatchError
from tailcache.storage.place import open_place

__all__ = ["Prepared", "prepare", "report_lines"]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` gives back.

    Attributes:
      corpus: the finished corpus.
      report: what was counted, as stored with it.
      already_there: the same corpus had been prepared before; nothing was written.
    """

    corpus: Corpus
    report: dict[str, Any]
    already_there: bool = False


@dataclass
class _Reading:
    """What is counted while documents are read, before they are packed."""

    records: int = 0
    empty: int = 0
    padding: int = 0
    documents: int = 0
    tokens: int = 0
    stopped_by: str | None = None
    chain: Any = field(default_factory=hashlib.sha256)


def prepare(config: PrepareConfig) -> Prepared:
    """Turn a source into the corpus of a cache.

    Args:
      config: the settings.

    Returns:
      The corpus and its report. If the cache already has a corpus of exactly this source, tokenizer and recipe,
      that one.

    Raises:
      ConfigError, NotFoundError: a setting, or the source or tokenizer it names.
      DataError: a record that cannot be used, or nothing to store.
      MismatchError: the cache already has another corpus.
      StorageError: the cache cannot be written.
    """
    source = open_source(config)
    columns = choose_columns(source.columns(), config)
    loaded = load_tokenizer(config.tokenizer, revision=config.tokenizer_revision, chat_template=config.chat_template)
    encoder, recipe = _plan(config, columns, loaded)
    if has_corpus(open_place(config.cache)):
        return _already_there(config, loaded, source, recipe)
    reading = _Reading()
    with CorpusWriter(config.cache, vocab_size=loaded.vocab_size) as writer:
        train, held_out = (
            Packer(writer, config.context_length, recipe["packing"] == "one-per-row", config.overlong, side)
            for side in (False, True)
        )
        for document in _read(encoder, source, config, reading):
            side = is_held_out(document.content_hash, config.held_out, config.seed)
            (held_out if side else train).add(document)
        train.finish()
        held_out.finish()
        if reading.documents == 0:
            raise DataError(
                f"source {config.source}: no document to store, of {reading.records} read; "
                + ("the first one alone exceeds --max-tokens" if reading.stopped_by else "all of them are empty")
            )
        report = _report(recipe, source, reading, train.counts, held_out.counts)
        corpus = writer.finish(
            tokenizer_files=loaded.files,
            tokenizer=_tokenizer_entry(loaded),
            source={
                **source.describe(),
                "documents": reading.documents,
                "documents_sha256": reading.chain.hexdigest(),
            },
            recipe=recipe,
            report=report,
        )
    return Prepared(corpus, report)


def report_lines(prepared: Prepared) -> list[str]:
    """The report as lines of text, for a terminal."""
    corpus, report = prepared.corpus, prepared.report
    train, held = report["train"], report["held_out"]
    total = {name: train[name] + held[name] for name in train}
    lines = [
        f"corpus {corpus.place}{' (already there, nothing to do)' if prepared.already_there else ''}",
        f"  documents          {total['documents']:>12,}   of {report['records']:,} records read, "
        f"{report['empty_documents']:,} empty",
        f"  rows               {total['rows']:>12,}   of at most {report['context_length']:,} tokens, "
        f"{report['packing']}",
        f"  tokens             {total['tokens']:>12,}   vocabulary {corpus.vocab_size:,}",
        f"  target positions   {total['target_positions']:>12,}   positions whose next token is supervised",
        f"    without target   {total['tokens'] - total['target_positions']:>12,}   "
        f"{total['at_document_end']:,} at the end of a document, {total['at_row_end']:,} at the end of a row "
        f"inside one, {total['next_not_supervised']:,} before a token that is not supervised",
        f"  held out           {held['documents']:>12,}   documents in {held['rows']:,} rows, "
        f"{held['target_positions']:,} target positions",
        f"  split over rows    {total['split_documents']:>12,}   documents longer than what was left of a row",
        f"  cut                {total['cut_tokens']:>12,}   tokens, of {total['cut_documents']:,} documents",
    ]
    if report["padding_tokens"]:
        lines.append(f"  padding            {report['padding_tokens']:>12,}   tokens taken off")
    lines += [f"  note: {note}" for note in report["notes"]]
    return lines


def _plan(config: PrepareConfig, columns: Columns, loaded: LoadedTokenizer) -> tuple[Encoder, dict[str, Any]]:
    """The encoder, and the recipe as it is stored: every setting that decides the bytes, resolved."""
    first = last = None
    template_hash = None
    markers = None
    if columns.kind == "text":
        first = opening_id(loaded.tokenizer, config.bos)
        last = ending_id(loaded.tokenizer, config.eos, config.separator)
    elif config.separator is not None or (config.bos, config.eos) != ("auto", "auto"):
        flag = "--separator" if config.separator is not None else "--bos" if config.bos != "auto" else "--eos"
        raise ConfigError(
            f"{flag}: only for text; {'the chat template' if columns.kind == 'chat' else 'whoever made the ids'} "
            "decides how these records begin and end"
        )
    if columns.kind == "chat":
        markers = has_generation_markers(loaded.tokenizer)
        template = loaded.tokenizer.get_chat_template()
        template_hash = hashlib.sha256(template.encode("utf-8")).hexdigest()
    packing = config.packing
    if packing == "auto":
        packing = "packed" if columns.kind == "text" else "one-per-row"
    recipe = {
        "kind": columns.kind,
        "column": columns.main,
        "mask_column": columns.mask,
        "text_files": config.text_files,
        "context_length": config.context_length,
        "packing": packing,
        "overlong": config.overlong,
        "first_token_id": first,
        "last_token_id": last,
        "chat_template_sha256": template_hash,
        "chat_template_marks_assistant": markers,
        "held_out": config.held_out,
        "seed": config.seed,
        "max_documents": config.max_documents,
        "max_tokens": config.max_tokens,
    }
    return Encoder(loaded.tokenizer, loaded.vocab_size, columns, first, last), recipe


def _read(encoder: Encoder, source: Source, config: PrepareConfig, reading: _Reading) -> Iterator[Document]:
    """The documents to pack, counted, up to the limits."""
    records = source.records(encoder.columns.names())
    bar = tqdm(desc="prepare", unit=" documents", mininterval=0.5, dynamic_ncols=True)
    with closing(records), closing(encoder.documents(records)) as documents, bar:
        for document in documents:
            num_tokens = len(document.tokens)
            if config.overlong == "cut":
                num_tokens = min(num_tokens, config.context_length)
            if num_tokens and reading.documents == config.max_documents:
                reading.stopped_by = "max_documents"
                return
            if config.max_tokens is not None and reading.tokens + num_tokens > config.max_tokens:
                reading.stopped_by = "max_tokens"
                return
            reading.records += 1
            reading.padding += document.num_padding
            reading.chain.update(document.source_hash)
            bar.update()
            if num_tokens == 0:
                reading.empty += 1
                continue
            reading.documents += 1
            reading.tokens += num_tokens
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(
                f"{reading.tokens:,} tokens, {reading.tokens / max(elapsed, 1e-9):,.0f}/s", refresh=False
            )
            yield document


def _report(
    recipe: dict[str, Any], source: Source, reading: _Reading, train: PackingCounts, held_out: PackingCounts
) -> dict[str, Any]:
    """Everything counted, as JSON, with a note on all that deserves attention."""
    notes = list(source.notes)
    if reading.stopped_by is not None:
        flag = reading.stopped_by.replace("_", "-")
        notes.append(f"stopped by --{flag} after {reading.documents:,} documents; the rest was not read")
    if recipe["held_out"] > 0 and held_out.documents == 0:
        notes.append(
            f"no document fell on the held-out side ({reading.documents:,} documents at a share of "
            f"{recipe['held_out']}); raise --held-out or try another --seed"
        )
    if train.documents == 0:
        notes.append("every document fell on the held-out side: nothing to train on; lower --held-out")
    if without := train.rows_without_target + held_out.rows_without_target:
        notes.append(f"rows in which no position has a target: {without:,}")
    return {
        "records": reading.records,
        "empty_documents": reading.empty,
        "padding_tokens": reading.padding,
        "stopped_by": reading.stopped_by,
        "context_length": recipe["context_length"],
        "packing": recipe["packing"],
        "train": train.as_dict(),
        "held_out": held_out.as_dict(),
        "notes": notes,
    }


def _tokenizer_entry(loaded: LoadedTokenizer) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    return {
        "fingerprint": loaded.fingerprint,
        "vocab_size": loaded.vocab_size,
        "num_tokens": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _already_there(config: PrepareConfig, loaded: LoadedTokenizer, source: Source, recipe: dict[str, Any]) -> Prepared:
    """The corpus that is there, if it is the one that was asked for.

    Raises:
      MismatchError: it is another one; says in which fields.
    """
    corpus = Corpus(config.cache)
    stored = corpus.manifest
    found_source = {key: value for key, value in stored["source"].items() if not key.startswith("documents")}
    pairs = [
        ("tokenizer", stored["tokenizer"]["fingerprint"], loaded.fingerprint),
        ("source", found_source, source.describe(found_source)),
        ("recipe", stored["recipe"], recipe),
    ]
    differing = [
        f"{part}.{name}: {_difference(old.get(name), new.get(name))}"
        for part, old, new in pairs
        for name in [*old, *(name for name in new if name not in old)]
        if old.get(name) != new.get(name)
    ]
    if differing:
        shown = "; ".join(differing[:5])
        raise MismatchError(
            f"{corpus.place}: there is a corpus already, and it is another one ({shown}). Prepare into another "
            "--cache, or delete this one if nothing depends on it"
        )
    return Prepared(corpus, stored["report"], already_there=True)


def _difference(stored: Any, asked: Any) -> str:
    """The first place where two descriptions differ; lists of files are compared file by file."""
    if isinstance(stored, list) and isinstance(asked, list):
        for old, new in zip(stored, asked, strict=False):
            if old != new:
                return f"stored {old}, found {new}"
        return f"stored {len(stored)} entries, found {len(asked)}"
    return f"stored {stored!r}, asked for {asked!r}"
