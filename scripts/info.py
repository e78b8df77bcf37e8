"""``tailcache info``: what a cache holds and what each field costs, from its records alone."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailcache.storage.corpus import Corpus
    from tailcache.storage.inventory import TeacherInventory

__all__ = ["InfoConfig", "cache_info", "info_text", "run"]


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Say what a cache holds: the corpus, each teacher with its settings, and the bytes of every field.

    Reads the records only, so it is quick whatever the size, and works while a capture is running. It does not check
    the data: `tailcache verify` does.
    """

    cache: str | Path
    """Where the cache lies: a folder, or a URL such as s3://bucket/folder."""

    json: Path | None = None
    """Write all of it to this JSON file."""


def run(config: InfoConfig) -> None:
    """Print what the cache holds.

    Raises:
      TailcacheError: no cache there, or a record is damaged; the message says which.
    """
    import json

    from tailcache.storage.durable import make_folder, write_file

    info = cache_info(config.cache)
    print(info_text(info))
    if config.json is not None:
        make_folder(config.json.parent)
        write_file(config.json, json.dumps(info, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        print(f"\nwrote {config.json}")


def cache_info(path: str | Path) -> dict[str, Any]:
    """What a cache holds, as JSON values.

    Raises:
      NotFoundError: no cache there.
      IncompleteError: its corpus was never finished.
      CorruptError, FormatError, MismatchError: a record is damaged, of another format, or does not belong here.
    """
    from tailcache.storage.inventory import teacher_inventory
    from tailcache.storage.reader import open_cache

    cache = open_cache(path)
    return {
        "cache": str(path),
        "corpus": _corpus_info(cache.corpus),
        "teachers": [_teacher_info(teacher_inventory(cache.corpus, name)) for name in cache.teacher_names],
    }


def _corpus_info(corpus: Corpus) -> dict[str, Any]:
    import numpy as np

    from tailcache.storage.inventory import corpus_bytes

    held_out = corpus.held_out_rows()
    offsets = np.concatenate(list(corpus.stream("target_offsets")))
    sizes = corpus_bytes(corpus)
    return {
        "hash": corpus.hash,
        "rows": corpus.num_rows,
        "tokens": corpus.num_tokens,
        "target_positions": corpus.num_targets,
        "held_out_rows": len(held_out),
        "held_out_target_positions": int((offsets[held_out + 1] - offsets[held_out]).sum()),
        "vocab_size": corpus.vocab_size,
        "tokenizer": corpus.manifest["tokenizer"],
        "source": corpus.manifest["source"],
        "recipe": corpus.manifest["recipe"],
        "parent": None if corpus.parent is None else {n: corpus.parent[n] for n in ("hash", "num_rows")},
        "report": corpus.manifest["report"],
        "bytes": sizes,
        "bytes_total": sum(sizes.values()),
    }


def _teacher_info(inventory: TeacherInventory) -> dict[str, Any]:
    layout, per_position = inventory.layout, inventory.bytes_per_position
    return {
        "name": inventory.name,
        "complete": inventory.complete,
        "shards_committed": inventory.committed_shards,
        "shards": layout.num_shards,
        "positions_committed": inventory.positions,
        "positions": layout.num_positions,
        "top_k": layout.top_k,
        "num_samples": layout.num_samples,
        "temperatures": list(layout.temperatures),
        "hidden": None if layout.hidden is None else layout.hidden.attributes(),
        "vocab_size": layout.vocab_size,
        "rows_per_shard": layout.rows_per_shard,
        "chunk_positions": layout.chunk,
        "settings": inventory.manifest["settings"],
        "provenance": inventory.manifest["provenance"],
        "bytes": inventory.field_bytes,
        "bytes_total": sum(inventory.field_bytes.values()),
        "bytes_per_position": per_position,
        "bytes_per_position_total": sum(per_position.values()) if per_position else None,
        "constant_bytes": inventory.constant_bytes,
        "record_bytes": inventory.record_bytes,
    }


def info_text(info: dict[str, Any]) -> str:
    """What ``cache_info`` found, for a terminal."""
    corpus = info["corpus"]
    tokenizer = corpus["tokenizer"]
    lines = [
        f"cache {info['cache']}",
        "",
        f"corpus {corpus['hash']}",
        f"  rows              {corpus['rows']:>14,}   {corpus['held_out_rows']:,} of them held out" + _part_of(corpus),
        f"  tokens            {corpus['tokens']:>14,}   vocabulary {corpus['vocab_size']:,}",
        f"  target positions  {corpus['target_positions']:>14,}   {corpus['held_out_target_positions']:,} held out",
        f"  bytes             {corpus['bytes_total']:>14,}   tokens {corpus['bytes'].get('tokens', 0):,}, tokenizer "
        f"files {corpus['bytes']['tokenizer']:,}",
        f"  tokenizer         {_short(tokenizer)}",
        f"  source            {_short(corpus['source'])}",
        f"  recipe            {_short(corpus['recipe'])}",
    ]
    if not info["teachers"]:
        lines += ["", "no teacher yet: `tailcache capture` adds one"]
    for teacher in info["teachers"]:
        lines += ["", *_teacher_lines(teacher)]
    return "\n".join(lines)


def _part_of(corpus: dict[str, Any]) -> str:
    parent = corpus["parent"]
    return "" if parent is None else f"; of the {parent['num_rows']:,} of corpus {_cut(parent['hash'])}"


def _lineage_lines(provenance: dict[str, Any]) -> list[str]:
    """What a derived teacher was made of, oldest first."""
    lines = []
    for entry in provenance.get("derived", []):
        what = ", ".join(f"{name} {_cut(value)}" for name, value in _flat(entry.get("parameters", {}), ""))
        lines.append(
            f"  derived           {entry.get('operation')}: {what or 'no change of values'}; of teacher "
            f"{_cut(entry.get('source_teacher'))} over corpus {_cut(entry.get('source_corpus'))}; mean tail "
            f"{entry.get('mean_tail')}"
        )
    return lines


def _teacher_lines(teacher: dict[str, Any]) -> list[str]:
    hidden = teacher["hidden"]
    state = "complete" if teacher["complete"] else "NOT FINISHED: run the same `tailcache capture` again to continue"
    lines = [
        f"teacher {teacher['name']}: {state}",
        f"  shards            {teacher['shards_committed']:>14,}   of {teacher['shards']:,} committed",
        f"  positions         {teacher['positions_committed']:>14,}   of {teacher['positions']:,}",
        f"  kept              K = {teacher['top_k']}, {teacher['num_samples']} tail samples"
        + "".join(f", temperature {tau:g}" for tau in teacher["temperatures"])
        + ("" if hidden is None else f", hidden states {hidden['kind']} x {hidden['width']:,}")
        + f", vocabulary {teacher['vocab_size']:,}",
        f"  settings          {_short(teacher['settings'])}",
        f"  provenance        {_short({n: v for n, v in teacher['provenance'].items() if n != 'derived'})}",
        *_lineage_lines(teacher["provenance"]),
        f"  {'field':<22}{'bytes':>16}{'bytes/position':>16}",
    ]
    for name, size in teacher["bytes"].items():
        each = teacher["bytes_per_position"].get(name)
        lines.append(f"    {name:<20}{size:>16,}{'-' if each is None else f'{each:.2f}':>16}")
    total = teacher["bytes_per_position_total"]
    lines += [
        f"    {'all':<20}{teacher['bytes_total']:>16,}{'-' if total is None else f'{total:.2f}':>16}",
        f"  apart from these  {sum(teacher['constant_bytes'].values()):>14,}   bytes stored once ("
        + ", ".join(f"{name} {size:,}" for name, size in teacher["constant_bytes"].items())
        + f"), and {teacher['record_bytes']:,} of records",
    ]
    return lines


def _short(record: Any) -> str:
    """A record in a few lines: nested names joined by dots, hashes cut, what is not set left out."""
    text = ", ".join(f"{name} {_cut(value)}" for name, value in _flat(record, "") if value is not None)
    indent = " " * 20
    lines = textwrap.fill(
        text, 112, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines.lstrip()


def _flat(record: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(record, dict):
        return [item for name, value in record.items() for item in _flat(value, f"{prefix}.{name}" if prefix else name)]
    return [(prefix, record)]


def _cut(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"[{len(value)} entries]"
    text = str(value)
    is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] + "…" if is_hash else text
