"""The corpus of a cache: tokens laid out once, shared by every teacher and student.

    CACHE/corpus/
      zarr.json            group; its attributes say what the arrays mean
      tokens               [N] uint16 or uint32    token ids, all rows one after another
      document_start       [N] bool                the first token of its document
      supervised           [N] bool                this position has a target (see alignment.py)
      row_offsets          [R + 1] int64           where each row's tokens start
      target_offsets       [R + 1] int64           how many targets lie before each row
      held_out             [R] bool                the row is for evaluation, never for training
      token_counts         [V] int64               how often each token occurs
      parent_rows          [R] int64               only where this is a part of another corpus: each row's place there
      tokenizer/           the tokenizer's own files
      checksums.json       sealed: sha256 of every other file
      manifest.json        sealed: sizes, content hash, tokenizer, source, recipe, report

Legend: N tokens, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.direct_reads import ChunkTable
from tailcache.storage.durable import TEMPORARY
from tailcache.storage.errors import (
    CorruptError,
    IncompleteError,
    NotFoundError,
)
from tailcache.storage.limits import MAX_ARRAY_METADATA, MAX_MANIFEST
from tailcache.storage.objects import read_index, read_object
from tailcache.storage.place import Location, Place, open_place
from tailcache.storage.recent import Recent
from tailcache.storage.records import CORPUS_VERSION, Checksums, parse_checksums, parse_corpus_manifest
from tailcache.storage.sealed import MAX_BYTES

__all__ = ["CORPUS_VERSION", "Corpus", "Rows", "corpus_arrays"]

_CHUNK, _SHARD = 1 << 16, 1 << 22
_CHUNKS_KEPT, _TABLES_KEPT = 16, 1 << 14  # decoded chunks of at most 0.5 MB, tables of 1 KB
_BLOCK = 1 << 20  # elements read at a time where a whole array is streamed


def corpus_arrays(vocab_size: int, *, part: bool = False) -> dict[str, ArraySpec]:
    """How each array of a corpus lies on disk, by name; of one that is a part of another, ``parent_rows`` too."""
    token_type = "uint16" if vocab_size <= 1 << 16 else "uint32"

    def spec(name: str, dtype: str, meaning: str) -> ArraySpec:
        return ArraySpec(name=name, dtype=dtype, chunk=_CHUNK, shard=_SHARD, meaning=meaning)

    specs = [
        spec("tokens", token_type, "token ids, all rows one after another"),
        spec("document_start", "bool", "the token is the first of its document"),
        spec(
            "supervised",
            "bool",
            "the position has a target: the next token is supervised and in the same document",
        ),
        spec("row_offsets", "int64", "index into tokens of each row's first token; one more entry than rows"),
        spec("target_offsets", "int64", "number of targets before each row; one more entry than rows"),
        spec("held_out", "bool", "the row is for evaluation, never for training"),
        spec("token_counts", "int64", "occurrences of each token id in tokens"),
    ]
    if part:
        specs.append(spec("parent_rows", "int64", "the row's place in the corpus that this is a part of; ascending"))
    return {s.name: s for s in specs}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows, flat: the tokens of row ``i`` are ``tokens[offsets[i]:offsets[i + 1]]``."""

    row_indices: NDArray[np.int64]
    """[R] which rows of the corpus these are."""
    offsets: NDArray[np.int64]
    """[R + 1] into the arrays below, from 0 to N."""
    tokens: NDArray[np.int64]
    """[N] token ids."""
    document_start: NDArray[np.bool_]
    """[N] the token is the first of its document."""
    supervised: NDArray[np.bool_]
    """[N] the position has a target."""
    held_out: NDArray[np.bool_]
    """[R] the row is for evaluation."""

    def __len__(self) -> int:
        return len(self.row_indices)

    def slice(self, first: int, last: int) -> Rows:
        """Rows ``first`` to ``last`` (half-open) of these."""
        a, b = int(self.offsets[first]), int(self.offsets[last])
        return Rows(
            row_indices=self.row_indices[first:last],
            offsets=self.offsets[first : last + 1] - a,
            tokens=self.tokens[a:b],
            document_start=self.document_start[a:b],
            supervised=self.supervised[a:b],
            held_out=self.held_out[first:last],
        )


class Corpus:
    """A finished corpus, opened for reading. Opening reads the manifest and nothing else.

    Args:
      cache: where the cache lies; its corpus is in the folder ``corpus``.

    Attributes:
      cache_place: of the whole cache.
      place: of the corpus.
      parent: of a part of another corpus, that one's ``hash``, ``num_rows`` and ``report``; none of a whole one.

    Raises:
      NotFoundError: there is none.
      FormatError: another format, or a version this code does not know.
      CorruptError: the manifest is damaged.
      StorageError: the place cannot be read.
    """

    def __init__(self, cache: Location | Place) -> None:
        self.cache_place = open_place(cache)
        self.place = self.cache_place / "corpus"
        where = f"{self.place}/manifest.json"
        try:
            data = self.place.read_limited("manifest.json", MAX_MANIFEST)
        except FileNotFoundError as error:
            found = self.cache_place.folders()
            if "corpus" in found and self.place.local is not None:
                raise CorruptError(f"{where}: missing; restore it from a copy") from error
            if "corpus" in found or "corpus" + TEMPORARY in found:
                raise IncompleteError(
                    f"{self.cache_place}: its corpus was never finished; run the same `tailcache prepare` again"
                ) from error
            raise NotFoundError(
                f"{self.cache_place}: expected a cache with a folder 'corpus', found none; make one with "
                "`tailcache prepare`"
            ) from error
        self.record = parse_corpus_manifest(data, where)
        self.manifest = self.record.values
        self.num_rows, self.num_tokens = self.record.num_rows, self.record.num_tokens
        self.num_targets, self.vocab_size = self.record.num_targets, self.record.vocab_size
        self.hash = self.record.hash
        self.parent = self.record.parent
        self._specs = corpus_arrays(self.vocab_size, part=self.parent is not None)
        self._recent: Recent[tuple[str, int], NDArray[Any]] = Recent(_CHUNKS_KEPT)
        self._tables: Recent[str, ChunkTable] = Recent(_TABLES_KEPT)
        self._arrays_checked: set[str] = set()

    @cached_property
    def _checksums(self) -> Checksums:
        data = self.place.read_checked("checksums.json", self.record.checksums, MAX_BYTES)
        return parse_checksums(data, f"{self.place}/checksums.json", self.record, self._specs)

    @cached_property
    def tokenizer_dir(self) -> Path:
        """A folder on this machine with the tokenizer's files and no others, each as it was written.

        Raises:
          CorruptError: a file is missing, damaged, or one that no record knows.
        """
        known = {n.removeprefix("tokenizer/"): d for n, d in self._checksums.files.items() if n[:10] == "tokenizer/"}
        folder = self.place.local_copy("tokenizer", known)
        if self.place.local is not None:
            found = {name.removeprefix("tokenizer/") for name, _ in self.place.files("tokenizer")}
            for name in sorted(found - known.keys()):
                raise CorruptError(
                    f"{self.place}/tokenizer: expected {len(known)} files, found {name!r} too, which no record of the "
                    "corpus knows; delete it"
                )
        return folder

    def read(self, name: str, first: int, last: int) -> NDArray[Any]:
        """``array[first:last]`` of one array, checked against its checksums on the way.

        Raises:
          CorruptError: an object is missing or damaged.
        """
        spec, length = self._specs[name], self.record.array_length(name)
        if not 0 <= first <= last <= length:
            raise CorruptError(
                f"{self.place}/{name}: expected elements within [0, {length}), found [{first}, {last}); run `tailcache "
                "verify`"
            )
        chunk = first // spec.chunk
        if not first < last <= (chunk + 1) * spec.chunk:
            return self._decode(spec, first, last)
        # Neighbouring reads mostly fall into one chunk, which would be decoded again for each.
        recent = self._recent.get((name, chunk))
        if recent is None:
            recent = self._decode(spec, chunk * spec.chunk, min((chunk + 1) * spec.chunk, length))
            self._recent.put((name, chunk), recent)
        return recent[first - chunk * spec.chunk : last - chunk * spec.chunk].copy()

    def _table(self, spec: ArraySpec, shard: int) -> ChunkTable:
        """Where an object's chunks lie; before it is first read, they and its metadata are those that were written."""
        file = spec.object_path(shard)
        table = self._tables.get(file)
        if table is not None:
            return table
        metadata = f"{spec.name}/zarr.json"
        if spec.name not in self._arrays_checked:
            self.place.read_checked(metadata, self._checksums.files[metadata], MAX_ARRAY_METADATA)
            self._arrays_checked.add(spec.name)
        self.place.expect(file, self._checksums.files[file])
        try:
            index = read_index(self.place, file, spec)
        except FileNotFoundError:
            raise CorruptError(
                f"{self.place}/{file}: missing; run `tailcache verify`, then restore it from a copy"
            ) from None
        expected = self._checksums.chunks[file]
        try:
            if index.seal != expected:
                raise ValueError(f"its chunks' checksums give {index.seal}, not {expected}")
            table = index.table(spec)
        except ValueError as error:
            raise CorruptError(
                f"{self.place}/{file}: not the object that was written there ({error}); run `tailcache verify`, then "
                "restore it from a copy"
            ) from error
        self._tables.put(file, table)
        return table

    def _decode(self, spec: ArraySpec, first: int, last: int) -> NDArray[Any]:
        where = f"corpus {self.place}, {spec.name}[{first}:{last}]"
        parts = [np.empty(0, spec.dtype)]
        for shard in range(first // spec.shard, -(-last // spec.shard)):
            begin = shard * spec.shard
            a, b = max(first, begin) - begin, min(last, begin + spec.shard) - begin
            table = self._table(spec, shard)
            parts.append(read_object(self.place, spec.object_path(shard), spec, a, b, where, table))
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def stream(self, name: str) -> Iterator[NDArray[Any]]:
        """A whole array, in pieces of bounded size."""
        length = self.record.array_length(name)
        for first in range(0, length, _BLOCK):
            yield self.read(name, first, min(first + _BLOCK, length))

    def _check_rows(self, first: int, last: int) -> None:
        if not 0 <= first <= last <= self.num_rows:
            raise NotFoundError(
                f"corpus {self.place}: expected rows within [0, {self.num_rows}), found [{first}, {last})"
            )

    def rows(self, first: int, last: int) -> Rows:
        """Rows ``first`` to ``last`` (half-open).

        Raises:
          NotFoundError: outside the corpus.
          CorruptError: stored bytes are damaged.
        """
        self._check_rows(first, last)
        offsets = self._offsets("row_offsets", first, last, self.num_tokens)
        a, b = int(offsets[0]), int(offsets[-1])
        return Rows(
            row_indices=np.arange(first, last, dtype=np.int64),
            offsets=offsets - a,
            tokens=self.read("tokens", a, b).astype(np.int64),
            document_start=self.read("document_start", a, b),
            supervised=self.read("supervised", a, b),
            held_out=self.read("held_out", first, last),
        )

    def target_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """[last - first + 1] int64: the number of targets before each of these rows, and after the last."""
        self._check_rows(first, last)
        return self._offsets("target_offsets", first, last, self.num_targets)

    def _offsets(self, name: str, first: int, last: int, most: int) -> NDArray[np.int64]:
        """Offsets that can be relied on: what they lead to is read without asking again."""
        offsets = self.read(name, first, last + 1)
        if offsets[0] < 0 or offsets[-1] > most or (offsets[1:] < offsets[:-1]).any():
            raise CorruptError(
                f"{self.place}/{name}: expected offsets from 0 to {most} that do not decrease, found others in rows "
                f"[{first}, {last}); run `tailcache verify`, then restore the corpus from a copy"
            )
        return offsets

    def rows_of_targets(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which row each of some target positions is in.

        Args:
          positions: [n] counted over the whole corpus, within [0, num_targets), in any order.

        Returns:
          [n] int64.

        Cost: reads the chunks of ``target_offsets`` that hold them, and of the others one per halving, not all.
        """
        wanted, inverse = np.unique(positions, return_inverse=True)
        rows, step = np.empty(len(wanted), np.int64), self._specs["target_offsets"].chunk
        parts = [(0, len(wanted), 0, -(-(self.num_rows + 1) // step))]
        while parts:
            a, b, low, high = parts.pop()  # wanted[a:b] are in the chunks from low to high
            if a == b:
                continue
            if high - low == 1:
                offsets = self.read("target_offsets", low * step, min(high * step, self.num_rows + 1))
                rows[a:b] = low * step + np.searchsorted(offsets, wanted[a:b], side="right") - 1
                continue
            middle = (low + high) // 2
            first = self.read("target_offsets", middle * step, middle * step + 1)[0]
            split = a + int(np.searchsorted(wanted[a:b], first))
            parts += [(a, split, low, middle), (split, b, middle, high)]
        return rows[inverse]

    @cached_property
    def _held_out_all(self) -> NDArray[np.bool_]:
        return np.concatenate(list(self.stream("held_out")))

    def held_out_rows(self) -> NDArray[np.int64]:
        """Indices of the rows for evaluation, ascending."""
        return np.flatnonzero(self._held_out_all)

    def train_rows(self) -> NDArray[np.int64]:
        """Indices of the rows for training, ascending."""
        return np.flatnonzero(~self._held_out_all)

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """[V] int64: occurrences of each token id."""
        return np.concatenate(list(self.stream("token_counts")))
