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
      tokenizer/           the tokenizer's own files
      checksums.json       sealed: sha256 of every other file
      manifest.json        sealed: sizes, content hash, tokenizer, source, recipe, report

Rows are appended as they come and flushed a shard at a time, so memory does not grow with the corpus. All of it
is written under a temporary name; ``corpus`` appears, whole, when it is finished.

Legend: N tokens, R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from tailcache.storage import durable
from tailcache.storage.alignment import supervise_next
from tailcache.storage.arrays import ArraySpec, group_metadata, open_array, read_slice
from tailcache.storage.errors import (
    CorruptError,
    DataError,
    FormatError,
    IncompleteError,
    MismatchError,
    NotFoundError,
)
from tailcache.storage.sealed import canonical, seal, unseal

__all__ = ["CORPUS_VERSION", "Corpus", "CorpusWriter", "Rows", "corpus_arrays"]

CORPUS_VERSION = 1
_CHUNK, _SHARD = 1 << 16, 1 << 22
_BLOCK = 1 << 20  # elements read at a time where a whole array is streamed


def corpus_arrays(vocab_size: int) -> dict[str, ArraySpec]:
    """How each array of a corpus lies on disk, by name."""
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


@dataclass
class _Column:
    """One array being appended to: a buffer that is flushed whenever it fills a shard."""

    spec: ArraySpec
    group: Path
    checksums: dict[str, str]
    chunk_seals: dict[str, str]
    pieces: list[NDArray[Any]] = field(default_factory=list)
    buffered: int = 0
    written: int = 0

    def append(self, values: NDArray[Any]) -> None:
        self.pieces.append(values.astype(self.spec.dtype))
        self.buffered += len(values)
        if len(self.pieces) > 4096:  # a million one-element pieces would cost more than what they hold
            self.pieces = [np.concatenate(self.pieces)]
        while self.buffered >= self.spec.shard:
            self.flush()

    def flush(self) -> None:
        values = np.concatenate(self.pieces) if self.pieces else np.empty(0, self.spec.dtype)
        now, rest = values[: self.spec.shard], values[self.spec.shard :]
        self.pieces, self.buffered = ([rest] if len(rest) else []), len(rest)
        data = self.spec.encode(now)
        if data is not None:
            name = self.spec.object_path(self.written // self.spec.shard)
            durable.make_folder((self.group / name).parent)
            durable.write_file(self.group / name, data)
            self.checksums[name] = durable.sha256(data)
            self.chunk_seals[name] = self.spec.chunk_seal(data)
        self.written += len(now)


class CorpusWriter:
    """Append rows one at a time; nothing is visible at ``CACHE/corpus`` until ``finish``.

    Args:
      cache: the cache's folder; created if needed.
      vocab_size: number of real token ids V; every token must be below it.

    Raises:
      MismatchError: the cache has a corpus already, or another process is writing one.
      StorageError: the place cannot be written.
    """

    def __init__(self, cache: Path, *, vocab_size: int) -> None:
        self._final = Path(cache) / "corpus"
        if self._final.exists():
            raise MismatchError(
                f"{self._final}: there is a corpus already, and teachers may depend on it; choose another cache, "
                "or delete the whole cache if it is not needed any more"
            )
        if not 1 <= vocab_size <= 1 << 31:
            raise DataError(f"vocabulary size: expected 1 to 2^31, found {vocab_size}")
        self._vocab_size = vocab_size
        self._group = self._final.with_name("corpus" + durable.TEMPORARY)
        if self._group.is_dir():
            os.close(durable.lock_folder(self._group))  # whoever left it is dead
            durable.remove_tree(self._group)
        durable.make_folder(self._group)
        self._lock = durable.lock_folder(self._group)
        self._checksums: dict[str, str] = {}
        self._chunk_seals: dict[str, str] = {}
        self._columns = {
            name: _Column(spec, self._group, self._checksums, self._chunk_seals)
            for name, spec in corpus_arrays(vocab_size).items()
        }
        self._digests = {
            name: hashlib.sha256() for name in ("tokens", "document_start", "supervised", "row_lengths", "held_out")
        }
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._open = True
        self.num_rows = self.num_tokens = self.num_targets = 0
        self._append("row_offsets", np.zeros(1, np.int64))
        self._append("target_offsets", np.zeros(1, np.int64))

    def _append(self, name: str, values: NDArray[Any]) -> None:
        self._columns[name].append(values)

    def append(
        self,
        tokens: NDArray[np.integer],
        document_start: NDArray[np.bool_],
        wanted: NDArray[np.bool_],
        *,
        held_out: bool,
    ) -> None:
        """Append one row.

        Args:
          tokens: [n] token ids, n >= 1.
          document_start: [n] bool; the token is the first of its document (False at the head of a row that
            continues a document).
          wanted: [n] bool; the token is to be predicted (unshifted, as in ``labels != -100``).
          held_out: the row is for evaluation.

        Raises:
          DataError: no token, arrays of different lengths, or a token id outside the vocabulary.
        """
        where = f"row {self.num_rows}"
        tokens = np.asarray(tokens)
        document_start, wanted = np.asarray(document_start, np.bool_), np.asarray(wanted, np.bool_)
        if tokens.ndim != 1 or len(tokens) == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(
                f"{where}: expected a non-empty list of integer token ids, found {tokens.dtype} of shape {tokens.shape}"
            )
        bad = np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))
        if len(bad):
            raise DataError(
                f"{where}, token {bad[0]}: expected an id from 0 to {self._vocab_size - 1}, found {tokens[bad[0]]}; "
                "the text was tokenised with another tokenizer than the one given"
            )
        if document_start.shape != tokens.shape or wanted.shape != tokens.shape:
            raise DataError(
                f"{where}: expected one flag of each kind per token, {len(tokens)}; found document_start of shape "
                f"{document_start.shape} and wanted of shape {wanted.shape}"
            )
        supervised = supervise_next(wanted, np.array([0, len(tokens)]), document_start)
        self.num_rows += 1
        self.num_tokens += len(tokens)
        self.num_targets += int(supervised.sum())
        self._counts += np.bincount(tokens, minlength=self._vocab_size)
        for name, values in (
            ("tokens", tokens),
            ("document_start", document_start),
            ("supervised", supervised),
            ("row_offsets", np.array([self.num_tokens])),
            ("target_offsets", np.array([self.num_targets])),
            ("held_out", np.array([held_out])),
        ):
            self._append(name, values)
        self._digests["tokens"].update(tokens.astype("<u4").tobytes())
        self._digests["document_start"].update(document_start.tobytes())
        self._digests["supervised"].update(supervised.tobytes())
        self._digests["row_lengths"].update(np.array([len(tokens)], "<u8").tobytes())
        self._digests["held_out"].update(bytes([held_out]))

    def finish(
        self,
        *,
        tokenizer_files: dict[str, bytes],
        tokenizer: dict[str, Any],
        source: dict[str, Any],
        recipe: dict[str, Any],
        report: dict[str, Any],
    ) -> Corpus:
        """Write what is left, seal the manifest and give the corpus its name.

        Args:
          tokenizer_files: name -> content, stored under ``tokenizer/``.
          tokenizer: the tokenizer's fingerprint and sizes, for the manifest.
          source: where the text came from and its fingerprint.
          recipe: how it was packed.
          report: what was counted on the way.

        Raises:
          DataError: no row was appended, or no position has a target.
        """
        if self.num_targets == 0:
            raise DataError(
                f"{self._final}: expected at least one position with a target, found {self.num_rows} rows with none; "
                "is the source empty, or is nothing supervised?"
            )
        self._append("token_counts", self._counts)
        for column in self._columns.values():
            column.flush()
            self._write(f"{column.spec.name}/zarr.json", column.spec.metadata(column.written))
        attributes = {
            "format": "tailcache corpus",
            "format_version": CORPUS_VERSION,
            "vocab_size": self._vocab_size,
        }
        self._write("zarr.json", group_metadata({"tailcache": attributes}))
        for name, data in sorted(tokenizer_files.items()):
            self._write(f"tokenizer/{name}", data)
        checksums = seal({"files": self._checksums, "chunks": self._chunk_seals})
        durable.write_file(self._group / "checksums.json", checksums)
        parts = {name: digest.hexdigest() for name, digest in self._digests.items()}
        manifest = {
            **attributes,
            "num_rows": self.num_rows,
            "num_tokens": self.num_tokens,
            "num_targets": self.num_targets,
            "content": parts,
            "hash": durable.sha256(canonical({**parts, "vocab_size": self._vocab_size})),
            "tokenizer": tokenizer,
            "source": source,
            "recipe": recipe,
            "report": report,
            "checksums": durable.sha256(checksums),
        }
        durable.write_file(self._group / "manifest.json", seal(manifest))
        durable.promote_folder(self._group, self._final)
        self._close()
        return Corpus(self._final)

    def _write(self, name: str, data: bytes) -> None:
        path = self._group / name
        durable.make_folder(path.parent)
        durable.write_file(path, data)
        self._checksums[name] = durable.sha256(data)

    def abort(self) -> None:
        """Delete what was written; nothing was visible."""
        if self._open:
            try:
                durable.remove_tree(self._group)
            finally:
                self._close()

    def _close(self) -> None:
        os.close(self._lock)
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


class Corpus:
    """A finished corpus, opened for reading. Opening reads the manifest and nothing else.

    Args:
      path: the folder ``CACHE/corpus``.

    Raises:
      NotFoundError: there is none.
      FormatError: another format, or a version this code does not know.
      CorruptError: the manifest is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            data = (self.path / "manifest.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.path.is_dir():
                raise CorruptError(f"{self.path / 'manifest.json'}: missing; restore it from a copy") from error
            if self.path.with_name("corpus" + durable.TEMPORARY).is_dir():
                raise IncompleteError(
                    f"{self.path.parent}: its corpus was never finished; run the same `tailcache prepare` again"
                ) from error
            raise NotFoundError(
                f"{self.path.parent}: expected a cache with a folder 'corpus', found none; make one with "
                "`tailcache prepare`"
            ) from error
        self.manifest = unseal(data, str(self.path / "manifest.json"))
        if self.manifest.get("format") != "tailcache corpus":
            raise FormatError(f"{self.path}: expected a tailcache corpus, found {self.manifest.get('format')!r}")
        if self.manifest.get("format_version") != CORPUS_VERSION:
            raise FormatError(
                f"{self.path}: expected format version {CORPUS_VERSION}, found "
                f"{self.manifest.get('format_version')!r}; install the version of tailcache that wrote it"
            )
        self.num_rows: int = self.manifest["num_rows"]
        self.num_tokens: int = self.manifest["num_tokens"]
        self.num_targets: int = self.manifest["num_targets"]
        self.vocab_size: int = self.manifest["vocab_size"]
        self.hash: str = self.manifest["hash"]
        self.tokenizer_dir = self.path / "tokenizer"
        self._specs = corpus_arrays(self.vocab_size)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._recent: dict[str, tuple[int, NDArray[Any]]] = {}
        self._present: set[tuple[str, int]] = set()

    @cached_property
    def _checksums(self) -> dict[str, dict[str, str]]:
        path = self.path / "checksums.json"
        return unseal(durable.read_checked(path, self.manifest["checksums"]), str(path))

    def read(self, name: str, first: int, last: int) -> NDArray[Any]:
        """``array[first:last]`` of one array, checked against its checksums on the way.

        Raises:
          CorruptError: an object is missing or damaged.
        """
        if name not in self._arrays:
            durable.read_checked(self.path / name / "zarr.json", self._checksums["files"].get(f"{name}/zarr.json"))
            self._arrays[name] = open_array(self.path / name)
        spec = self._specs[name]
        if last > self._arrays[name].shape[0]:
            raise CorruptError(
                f"{self.path / name}: expected at least {last} elements, found {self._arrays[name].shape[0]}; "
                "run `tailcache verify`"
            )
        for shard in range(first // spec.shard, -(-last // spec.shard)):
            if (name, shard) not in self._present:
                file = spec.object_path(shard)
                if not (self.path / file).is_file():
                    raise CorruptError(
                        f"{self.path / file}: missing; run `tailcache verify`, then restore it from a copy"
                    )
                expected = self._checksums["chunks"].get(file)
                if expected is not None and spec.chunk_seal(self.path / file) != expected:
                    raise CorruptError(
                        f"{self.path / file}: not the object that was written there; run `tailcache verify`, then "
                        "restore it from a copy"
                    )
                self._present.add((name, shard))
        chunk = first // spec.chunk
        if not first < last <= (chunk + 1) * spec.chunk:
            return self._decode(name, first, last)
        # Neighbouring reads mostly fall into one chunk; zarr would decode it again for each.
        recent = self._recent.get(name)
        if recent is None or recent[0] != chunk:
            end = min((chunk + 1) * spec.chunk, self._arrays[name].shape[0])
            recent = self._recent[name] = (chunk, self._decode(name, chunk * spec.chunk, end))
        return recent[1][first - chunk * spec.chunk : last - chunk * spec.chunk].copy()

    def _decode(self, name: str, first: int, last: int) -> NDArray[Any]:
        return read_slice(self._arrays[name], first, last, lambda: f"corpus {self.path}, {name}[{first}:{last}]")

    def stream(self, name: str) -> Iterator[NDArray[Any]]:
        """A whole array, in pieces of bounded size."""
        length = {
            "row_offsets": self.num_rows + 1,
            "target_offsets": self.num_rows + 1,
            "held_out": self.num_rows,
            "token_counts": self.vocab_size,
        }.get(name, self.num_tokens)
        for first in range(0, length, _BLOCK):
            yield self.read(name, first, min(first + _BLOCK, length))

    def _check_rows(self, first: int, last: int) -> None:
        if not 0 <= first <= last <= self.num_rows:
            raise NotFoundError(
                f"corpus {self.path}: expected rows within [0, {self.num_rows}), found [{first}, {last})"
            )

    def rows(self, first: int, last: int) -> Rows:
        """Rows ``first`` to ``last`` (half-open).

        Raises:
          NotFoundError: outside the corpus.
          CorruptError: stored bytes are damaged.
        """
        self._check_rows(first, last)
        offsets = self.read("row_offsets", first, last + 1)
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
        return self.read("target_offsets", first, last + 1)

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
