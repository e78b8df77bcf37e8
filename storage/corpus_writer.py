"""Write the corpus of a cache: rows are appended as they come and flushed a shard at a time.

So memory does not grow with the corpus. All of it is written under a temporary name, on this machine; ``corpus``
appears, whole, when it is finished.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tailcache.storage import durable
from tailcache.storage.alignment import supervise_next
from tailcache.storage.arrays import ArraySpec, group_metadata
from tailcache.storage.corpus import CORPUS_VERSION, Corpus, corpus_arrays
from tailcache.storage.errors import DataError, MismatchError
from tailcache.storage.place import Location, Place, open_place
from tailcache.storage.sealed import canonical, seal

__all__ = ["CorpusWriter", "has_corpus"]

_CLAIM = "corpus.claim" + durable.TEMPORARY


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


def has_corpus(cache: Place) -> bool:
    """A cache has a corpus; one whose upload was interrupted has none yet."""
    return "corpus" in cache.folders() if cache.local is not None else cache.exists("corpus/manifest.json")


class CorpusWriter:
    """Append rows one at a time; nothing is visible at ``CACHE/corpus`` until ``finish``.

    Args:
      cache: where the cache lies; made if needed. A remote one is staged in a temporary folder on this machine.
      vocab_size: number of real token ids V; every token must be below it.
      parent: where this is a part of another corpus, that one's ``hash``, ``num_rows`` and ``report``.
      parent_rows: with ``parent``, the place there of each row that will be appended.

    Raises:
      MismatchError: the cache has a corpus already, or another process is writing one.
      StorageError: the place cannot be written.
    """

    def __init__(
        self,
        cache: Location | Place,
        *,
        vocab_size: int,
        parent: dict[str, Any] | None = None,
        parent_rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._cache = open_place(cache)
        self._final = self._cache / "corpus"
        if has_corpus(self._cache):
            raise MismatchError(
                f"{self._final}: there is a corpus already, and teachers may depend on it; choose another cache, "
                "or delete the whole cache if it is not needed any more"
            )
        if not 1 <= vocab_size <= 1 << 31:
            raise DataError(f"vocabulary size: expected 1 to 2^31, found {vocab_size}")
        self._vocab_size, self._parent = vocab_size, parent
        claim = self._cache.claim(_CLAIM)
        if claim is None:
            raise MismatchError(
                f"{self._cache}: another process is writing there; wait for it, or choose another cache"
            )
        self._claim = claim
        try:
            self._group = self._stage()
        except BaseException:
            claim.release()
            raise
        self._checksums: dict[str, str] = {}
        self._chunk_seals: dict[str, str] = {}
        self._columns = {
            name: _Column(spec, self._group, self._checksums, self._chunk_seals)
            for name, spec in corpus_arrays(vocab_size, part=parent is not None).items()
        }
        self._digests = {
            name: hashlib.sha256() for name in ("tokens", "document_start", "supervised", "row_lengths", "held_out")
        }
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._open = True
        self.num_rows = self.num_tokens = self.num_targets = 0
        self._append("row_offsets", np.zeros(1, np.int64))
        self._append("target_offsets", np.zeros(1, np.int64))
        if parent is not None:
            assert parent_rows is not None
            self._append("parent_rows", parent_rows)

    def _stage(self) -> Path:
        """An empty folder on this machine."""
        if self._cache.local is None:
            return Path(tempfile.mkdtemp(prefix="tailcache-corpus-"))
        folder = self._cache.local / ("corpus" + durable.TEMPORARY)
        durable.remove_tree(folder)  # whoever left it is dead
        durable.make_folder(folder)
        return folder

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
            **({} if self._parent is None else {"parent": self._parent}),
        }
        durable.write_file(self._group / "manifest.json", seal(manifest))
        if self._final.local is not None:
            durable.promote_folder(self._group, self._final.local)
        else:
            self._upload()
            durable.remove_tree(self._group)
        self._close()
        return Corpus(self._cache)

    def _upload(self) -> None:
        """Give a remote cache its corpus: the manifest last, so that there is none before it is whole.

        Raises:
          MismatchError: another process was first.
        """
        if has_corpus(self._cache):
            raise MismatchError(f"{self._final}: another process has written a corpus there; choose another cache")
        self._final.delete_all()  # what an upload that was interrupted left
        last = "manifest.json"
        for path in sorted(p for p in self._group.rglob("*") if p.is_file()):
            name = path.relative_to(self._group).as_posix()
            if name != last:
                self._final.write(name, path.read_bytes())
        if not self._final.create(last, (self._group / last).read_bytes()):
            raise MismatchError(f"{self._final}: another process has written a corpus there; choose another cache")

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
        self._claim.release()
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
