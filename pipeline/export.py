"""From a cache to files that other tools read: Parquet or Arrow, a split each for training and evaluation, and a card.

Rows are read a block at a time and written a row group at a time, so memory does not grow with the cache. Everything is
staged in a folder beside the final name (for a store: in a temporary one) and gets that name when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from tailcache.pipeline.export_card import CardFacts, SplitFacts, dataset_card
from tailcache.pipeline.export_columns import ExportColumns
from tailcache.pipeline.export_config import ExportConfig
from tailcache.pipeline.export_files import SplitFiles
from tailcache.storage import durable
from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.local_place import LocalPlace
from tailcache.storage.place import Place, open_place
from tailcache.storage.reader import Teacher, open_cache
from tailcache.storage.shrink import shrink, shrink_key
from tailcache.storage.uniforms import uniforms

__all__ = ["ExportReport", "export"]

_BLOCK_TOKENS = 1 << 14  # read at a time
_GROUP_BYTES = 32 << 20  # of a row group before compression, which is what a streaming reader holds


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote."""

    out: str
    files: dict[str, int]
    """Bytes of each, by its name within the folder."""
    splits: dict[str, SplitFacts]


def export(config: ExportConfig, *, show_progress: bool = True) -> ExportReport:
    """Write one teacher's targets for other tools.

    Args:
      config: what to write; see ``ExportConfig``.
      show_progress: draw a progress bar.

    Raises:
      NotFoundError, IncompleteError: no such cache or teacher, or its capture has not finished.
      ConfigError: K' above the teacher's K.
      MismatchError: there is something at ``out`` already.
      CorruptError: stored bytes are damaged; names the shard and the field.
      StorageError: the disk is full or failing; nothing is visible at ``out``.

    Cost: one pass over the cache; memory of a few row groups.
    """
    cache = open_cache(config.cache)
    teacher = cache.teacher(config.teacher)
    top_k = teacher.top_k if config.top_k is None else config.top_k
    if top_k > teacher.top_k:
        raise ConfigError(f"--top-k: expected at most {teacher.top_k}, this teacher's K; found {top_k}")
    columns = ExportColumns(
        unit=config.unit,
        top_k=top_k,
        num_samples=teacher.num_samples,
        num_temperatures=len(teacher.temperatures),
        extras=config.extras,
    )
    place = open_place(config.out)
    with _staged(place) as folder:
        splits = _write_splits(config, teacher, columns, folder, show_progress)
        facts = CardFacts(
            config=config,
            teacher=teacher.name,
            teacher_hash=teacher.hash,
            manifest=teacher.manifest,
            corpus_hash=cache.corpus.hash,
            corpus_manifest=cache.corpus.manifest,
            columns=columns,
            source_top_k=teacher.top_k,
            temperatures=teacher.temperatures,
            splits=splits,
            data_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        )
        durable.write_file(folder / "README.md", dataset_card(facts).encode())
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return ExportReport(out=str(place), files=files, splits=splits)


@contextlib.contextmanager
def _staged(place: Place) -> Iterator[Path]:
    """A local folder whose files get to the place when the block ends well, the card last."""
    if next(place.files(), None) is not None:
        raise MismatchError(f"{place}: expected no files there yet, found some; choose another --out or empty it")
    final = place.local
    if final is None:
        with tempfile.TemporaryDirectory(prefix="tailcache-export-") as scratch:
            yield Path(scratch)
            _upload(Path(scratch), place)
        return
    folder = final.with_name(final.name + durable.TEMPORARY)
    claim = LocalPlace(final.parent).claim(f"{final.name}.claim{durable.TEMPORARY}")
    if claim is None:
        raise MismatchError(f"{place}: another process is writing there; wait for it, or choose another --out")
    try:
        durable.remove_tree(folder)  # whoever left it is dead
        durable.make_folder(folder)
        try:
            yield folder
            durable.promote_folder(folder, final)
        except BaseException:
            durable.remove_tree(folder)
            raise
    finally:
        claim.release()


def _upload(folder: Path, place: Place) -> None:
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    for name in sorted(names, key=lambda name: (name == "README.md", name)):
        with open(folder / name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                place.write(name, view)
            finally:
                view.release()


def _write_splits(
    config: ExportConfig, teacher: Teacher, columns: ExportColumns, folder: Path, show_progress: bool
) -> dict[str, SplitFacts]:
    corpus = teacher.corpus
    limits = max(1, (config.shard_megabytes << 20) // columns.bytes_per_token)
    group = max(1, min(_GROUP_BYTES // columns.bytes_per_token, limits))
    with contextlib.ExitStack() as stack:
        splits = {
            name: stack.enter_context(SplitFiles(folder, name, config.format, columns.schema(), limits, group))
            for name in ("train", "test")
        }
        facts = {name: SplitFacts() for name in splits}
        bar = stack.enter_context(
            tqdm(total=corpus.num_targets, unit="pos", unit_scale=True, desc="export", disable=not show_progress)
        )
        for rows, stored in _blocks(teacher):
            targets = _chosen(config, teacher, columns, rows, stored)
            batch, held_out_E = columns.batch(rows, targets)
            held_out_T = np.repeat(rows.held_out, np.diff(rows.offsets))[rows.supervised]
            for name, of_E, of_T in (("train", ~held_out_E, ~held_out_T), ("test", held_out_E, held_out_T)):
                if of_E.any():
                    part = batch if of_E.all() else batch.filter(pa.array(of_E))
                    splits[name].append(part)
                    facts[name].add(part, targets[of_T])
            bar.update(len(targets))
        for split in splits.values():
            split.finish()
    found = {name: split for name, split in facts.items() if split.examples}
    if config.format == "datasets":
        durable.write_file(folder / "dataset_dict.json", json.dumps({"splits": list(found)}).encode() + b"\n")
    return found


def _blocks(teacher: Teacher) -> Iterator[tuple[Rows, Targets]]:
    corpus = teacher.corpus
    step = max(1, _BLOCK_TOKENS * corpus.num_rows // max(1, corpus.num_tokens))
    for first in range(0, corpus.num_rows, step):
        last = min(first + step, corpus.num_rows)
        optional = ("log_z_tail",) if teacher.temperatures else ()
        yield corpus.rows(first, last), teacher.rows(first, last, optional=optional)


def _chosen(config: ExportConfig, teacher: Teacher, columns: ExportColumns, rows: Rows, stored: Targets) -> Targets:
    """What of the stored targets is written: all, or those of a smaller K."""
    if columns.top_k == teacher.top_k:
        return stored
    corpus: Corpus = teacher.corpus
    start = int(corpus.target_offsets(int(rows.row_indices[0]), int(rows.row_indices[0]))[0])
    key = shrink_key(corpus.hash, teacher.hash, config.seed)
    return shrink(
        stored,
        columns.top_k,
        columns.num_samples,
        uniforms(key, np.arange(start, start + len(stored))),
        temperatures=teacher.temperatures,
        full_tail=teacher.manifest["settings"].get("full_tail"),
    )
