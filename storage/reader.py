"""Open a cache and read it: ``open_cache(path)`` gives the corpus and the teachers. NumPy in, NumPy out.

Opening reads a few small records; nothing is listed but the names of the teachers, and the commit records of a capture
that has not finished. A shard's commit record is read
when the shard is first touched; its objects must have the sizes and the chunk checksums written there, and every chunk
that is decoded must match its checksum. A damaged, missing or misplaced object is an error that names the shard and the
field; it is never read as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.blocks import Stored
from tailcache.storage.codec import OPTIONAL, Targets
from tailcache.storage.commits import load_codec
from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.direct_reads import ChunkTable, Stretch
from tailcache.storage.errors import ConfigError, CorruptError, IncompleteError, NotFoundError
from tailcache.storage.hidden import StoredHead
from tailcache.storage.layout import check_name, commit_path
from tailcache.storage.limits import MAX_ARRAY_METADATA, MAX_COMMIT, MAX_MANIFEST, largest_object
from tailcache.storage.objects import read_array, read_index, read_objects
from tailcache.storage.pieces import Fields, Piece
from tailcache.storage.place import Location, Place, open_place
from tailcache.storage.prefix import prefix_hash, prefix_mean_tail, prefix_shards, wait_until_finished
from tailcache.storage.recent import Recent
from tailcache.storage.records import Commit, Complete, ObjectEntry, parse_commit, parse_complete, parse_manifest
from tailcache.storage.stream import stream_rows
from tailcache.storage.unfinished import Unfinished

__all__ = ["Cache", "StoredHead", "Teacher", "open_cache"]

_TABLE_MEMORY = 64 << 20  # bytes of objects' tables of chunks that are kept


def open_cache(location: Location | Place) -> Cache:
    """Open a cache for reading.

    Args:
      location: the cache's folder, or a URL such as s3://bucket/folder.

    Raises:
      NotFoundError: no cache there.
      FormatError: another format, or a version this code does not know.
      CorruptError: its manifest is damaged.
    """
    place = open_place(location)
    return Cache(place=place, corpus=Corpus(place))


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A corpus and the teachers that were run over it."""

    place: Place
    corpus: Corpus

    @property
    def teacher_names(self) -> list[str]:
        """Names of all teachers, also those whose capture has not finished."""
        teachers = self.place / "teachers"
        return [name for name in teachers.folders() if teachers.exists(f"{name}/manifest.json")]

    def teacher(
        self,
        name: str,
        *,
        unfinished: Unfinished = "refuse",
        num_shards: int | None = None,
        timeout_s: float | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Teacher:
        """Open one teacher.

        Args:
          name: the teacher's.
          unfinished: where its capture has not finished: "refuse" is an error; "prefix" opens the shards that are
            committed without a gap, and goes on seeing these and no others; "wait" returns when it has finished.
          num_shards: open the first so many shards as a prefix, whether the capture has finished or not.
          timeout_s: seconds to wait at most; without, as long as it takes.
          progress: called while waiting, with the number of shards committed without a gap, and of all (0 while that
            is not known).

        Raises:
          NotFoundError: no teacher of that name.
          IncompleteError: its capture has not finished, or not within the time; or there is no prefix yet.
          MismatchError: it was captured over another corpus.
          CorruptError: a record is damaged.
        """
        if unfinished == "wait" and num_shards is None:
            place = self.place / "teachers" / check_name(name)

            def total() -> int | None:
                try:
                    return Teacher(self.corpus, name, unfinished="prefix").layout.num_shards
                except IncompleteError:
                    return None

            wait_until_finished(place, num_shards=total, timeout_s=timeout_s, progress=progress)
        return Teacher(self.corpus, name, unfinished=unfinished, num_shards=num_shards)


class Teacher:
    """The targets of one teacher: of a whole capture, or of its first shards.

    Attributes:
      top_k, num_samples, vocab_size: its sizes: K, m and V.
      num_shards, num_rows, num_targets: how many can be read; all of the corpus' where ``is_prefix`` is false.
      is_prefix: only the first shards can be read; what is committed later is not seen.
      temperatures: of the columns of ``log_z_tail``; empty where that was not captured.
      hidden_kind, hidden_width: of ``hidden``: "bf16" or "int8", and D; "none" and 0 where that was not captured.
      optional: the optional fields that were captured; reading takes those that it is asked for.
    """

    def __init__(
        self, corpus: Corpus, name: str, *, unfinished: Unfinished = "refuse", num_shards: int | None = None
    ) -> None:
        self.name = check_name(name)
        self.corpus = corpus
        self.place = corpus.cache_place / "teachers" / name
        data = self._manifest_bytes()
        self.record = parse_manifest(data, f"{self.place}/manifest.json")
        self.manifest, self.layout = self.record.values, self.record.layout
        self.record.check_corpus(corpus.record, str(self.place))
        self.complete = None if num_shards is not None else self._complete_record()
        self.is_prefix = self.complete is None
        if self.is_prefix and num_shards is None and unfinished != "prefix":
            raise IncompleteError(
                f"{self.place}: its capture has not finished; run the same `tailcache capture` again to continue it. "
                "`--unfinished prefix` reads what is committed so far, `--unfinished wait` waits for the rest"
            )
        self.num_shards, self.num_targets = self.layout.num_shards, self.layout.num_positions
        if self.is_prefix:
            self.num_shards = prefix_shards(self.place, self.layout, num_shards)
        self.num_rows = self.layout.shard_rows(self.num_shards - 1)[1]
        if self.num_rows < corpus.num_rows:
            self.num_targets = int(corpus.read("target_offsets", self.num_rows, self.num_rows + 1)[0])
        self.top_k, self.num_samples = self.layout.top_k, self.layout.num_samples
        self.vocab_size = self.layout.vocab_size
        self.temperatures = self.layout.temperatures
        hidden = self.layout.hidden
        self.hidden_kind = "none" if hidden is None else hidden.kind
        self.hidden_width = 0 if hidden is None else hidden.width
        self._fields = self.layout.fields()
        self.optional = tuple(name for name in OPTIONAL if name in self._fields)
        table_bytes = 1000 + next(iter(self._fields.values())).index_bytes
        self._tables: Recent[tuple[int, str], ChunkTable] = Recent(max(64, _TABLE_MEMORY // table_bytes))

    def _complete_record(self) -> Complete | None:
        try:
            data = self.place.read_limited("complete.json", MAX_COMMIT)
        except FileNotFoundError:
            return None
        return parse_complete(data, f"{self.place}/complete.json", self.record)

    @cached_property
    def hash(self) -> str:
        """What identifies all that can be read: of a whole capture, the hash of its last record.

        Cost: nothing more for a whole capture; for a prefix, its commit records are read.
        """
        if self.complete is not None:
            return self.complete.seal
        return prefix_hash(self.place, self.record.seal, self.num_shards)

    def _manifest_bytes(self) -> bytes:
        try:
            return self.place.read_limited("manifest.json", MAX_MANIFEST)
        except FileNotFoundError:
            pass
        if self.place.exists("complete.json") or any(self.place.files("commits")):
            raise CorruptError(f"{self.place}/manifest.json: missing; restore it from a copy")
        if any(self.place.files()):
            raise IncompleteError(
                f"{self.place}: its capture stopped before the first shard; run the same `tailcache capture` again"
            )
        cache = self.corpus.cache_place
        known = ", ".join(Cache(place=cache, corpus=self.corpus).teacher_names) or "none"
        raise NotFoundError(f"{cache}: expected a teacher named {self.name!r}, found {known}")

    # -- lazily read constants ---------------------------------------------------------------------------------

    @cached_property
    def _codec(self) -> Any:
        for name in self._fields:
            self.place.read_checked(f"{name}/zarr.json", self.record.files[f"{name}/zarr.json"], MAX_ARRAY_METADATA)
        return load_codec(self.place, self.layout, self.record.files)

    @cached_property
    def mean_tail(self) -> NDArray[np.float32]:
        """[V] float32, probability: the mean of the normalised tails over all positions; sums to 1.

        All zeros where the tail is empty everywhere (K = V). Of a prefix, the mean over its own positions, which is
        there for as long as the capture has not finished.

        Raises:
          IncompleteError: of a prefix whose capture has finished meanwhile.
        """
        if self.is_prefix:
            return prefix_mean_tail(self.place, self.layout, self.num_shards, lambda shard: self.commit(shard).tail_sum)
        mean: NDArray[np.float32] = self._constant("mean_tail")
        return mean

    def head(self) -> StoredHead:
        """The teacher's head, for its whole distribution: ``head.logits(hidden_float32(hidden, hidden_scale))``.

        Raises:
          ConfigError: hidden states were not captured.
          CorruptError: a file of it is missing or damaged.

        Cost: reads and checks all of it at every call, V x D numbers; keep it rather than asking twice.
        """
        hidden = self.layout.hidden
        if hidden is None:
            raise ConfigError(
                f"teacher {self.name!r}: expected a stored head, found none; capture this teacher again with "
                f"{OPTIONAL['hidden']}"
            )
        return StoredHead(
            weight=self._constant("head_weight"),
            weight_kind=hidden.head_kind,
            bias=self._constant("head_bias") if hidden.head_bias else None,
            scale=hidden.logit_scale,
            soft_cap=hidden.soft_cap,
        )

    def _constant(self, name: str) -> NDArray[Any]:
        """A constant of any number of objects, each against its hash; one object at a time beside the result."""
        spec, length = self.layout.constants()[name], self.layout.constant_length(name)
        known = {**self.record.files, **(self.complete.files if self.complete else {})}
        self.place.read_checked(f"{name}/zarr.json", known[f"{name}/zarr.json"], MAX_ARRAY_METADATA)
        for file in map(spec.object_path, range(spec.num_objects(length))):
            self.place.read_checked(file, known[file], largest_object(spec))
        return read_array(self.place, spec, length, f"teacher {self.name!r}, {name}")

    def _shard_start(self, shard: int) -> int:
        """The first target position of a shard."""
        row, _ = self.layout.shard_rows(shard)
        return int(self.corpus.read("target_offsets", row, row + 1)[0])

    # -- reading -----------------------------------------------------------------------------------------------

    def commit(self, shard: int) -> Commit:
        """The commit record of a shard, checked."""
        name = commit_path(shard)
        try:
            data = self.place.read_limited(name, MAX_COMMIT)
        except FileNotFoundError:
            raise CorruptError(
                f"{self.place}/{name}: missing, though the shard was committed; restore it from a copy"
            ) from None
        return parse_commit(data, f"{self.place}/{name}", shard, self.record)

    def _beyond(self, expected: str, found: str) -> IncompleteError:
        return IncompleteError(
            f"teacher {self.name!r}: expected {expected}, those of the first {self.num_shards} of "
            f"{self.layout.num_shards} shards, which were committed without a gap when it was opened; found {found}. "
            "Open it again when more are committed"
        )

    def train_rows(self) -> NDArray[np.int64]:
        """Indices of the rows for training that can be read, ascending."""
        rows = self.corpus.train_rows()
        return rows[: np.searchsorted(rows, self.num_rows)]

    def held_out_rows(self) -> NDArray[np.int64]:
        """Indices of the rows for evaluation that can be read, ascending."""
        rows = self.corpus.held_out_rows()
        return rows[: np.searchsorted(rows, self.num_rows)]

    def _wanted(self, optional: Collection[str]) -> list[str]:
        """The fields to be read: all that every cache has, and the optional ones that are asked for."""
        for name in optional:
            if name not in OPTIONAL:
                raise ConfigError(
                    f"teacher {self.name!r}: expected optional fields among {', '.join(OPTIONAL)}, found {name!r}"
                )
            if name not in self._fields:
                raise ConfigError(
                    f"teacher {self.name!r}: expected the optional field {name}, found that it was not stored; capture "
                    f"this teacher again with {OPTIONAL[name]}"
                )
        also = {*optional, "hidden_scale"} if "hidden" in optional else set(optional)
        return [name for name in self._fields if name not in (*OPTIONAL, "hidden_scale") or name in also]

    def _touch(self, shard: int, names: list[str]) -> dict[str, ChunkTable]:
        """The tables of a shard's objects; before one is first used, it is the one that was committed."""
        tables = {name: self._tables.get((shard, name)) for name in names}
        if any(table is None for table in tables.values()):
            files = self.commit(shard).files
            missing = [name for name in names if tables[name] is None]
            found = self.place.map(
                lambda name: self._committed(shard, name, files.get(self._fields[name].object_path(shard))), missing
            )
            for name, table in zip(missing, found, strict=True):
                self._tables.put((shard, name), table)
                tables[name] = table
        return {name: table for name, table in tables.items() if table is not None}

    def _committed(self, shard: int, name: str, entry: ObjectEntry | None) -> ChunkTable:
        spec = self._fields[name]
        file = spec.object_path(shard)
        if entry is None:  # a shard without targets has no objects
            return np.empty((0, 2), np.uint64)
        where = f"teacher {self.name!r}, shard {shard}, field {name}"
        self.place.expect(file, entry.sha256, entry.bytes)
        try:
            index = read_index(self.place, file, spec)
        except FileNotFoundError:
            index = None
        if index is None or index.size != entry.bytes:
            raise CorruptError(
                f"{where}: expected {self.place}/{file} to have {entry.bytes} bytes, found "
                f"{'no file' if index is None else index.size}; restore it from a copy or capture again"
            )
        try:
            if index.seal != entry.chunks:
                raise ValueError(f"its chunks' checksums give {index.seal}, not {entry.chunks}")
            return index.table(spec)
        except ValueError as error:
            raise CorruptError(
                f"{where}: {self.place}/{file} is not the object that was committed ({error}); restore it from a copy "
                "or capture again"
            ) from error

    def _stored(self, shard: int, first: int, last: int, names: list[str]) -> Stored:
        """Slots ``first`` to ``last`` (within the shard) of some fields, as they are stored."""
        if not 0 <= first <= last <= self.layout.shard_slots:
            raise CorruptError(
                f"teacher {self.name!r}, shard {shard}: expected targets within [0, {self.layout.shard_slots}), found "
                f"[{first}, {last}) by the corpus' target_offsets; run `tailcache verify`"
            )
        tables = self._touch(shard, names)
        stretches = []
        for name in names:
            spec, where = self._fields[name], f"teacher {self.name!r}, shard {shard}, field {name}"
            stretches.append(Stretch(spec.object_path(shard), spec, first, last, where, tables[name]))
        return dict(zip(names, read_objects(self.place, stretches), strict=True))

    def _slots(self, shard: int, first: int, last: int, names: list[str]) -> Targets:
        """Decode slots ``first`` to ``last`` (within the shard) of some fields."""
        targets: Targets = self._codec.decode(
            self._stored(shard, first, last, names), f"teacher {self.name!r}, shard {shard}"
        )
        return targets

    def _parts(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """The slots of some rows: shard, first slot and one past the last."""
        if self.num_rows < last <= self.corpus.num_rows:
            raise self._beyond(f"rows within [0, {self.num_rows})", f"[{first}, {last})")
        offsets = self.corpus.target_offsets(first, last)
        per_shard = self.layout.rows_per_shard
        parts = []
        for shard in range(first // per_shard, -(-last // per_shard)):
            shard_first, shard_last = self.layout.shard_rows(shard)
            a, b = max(first, shard_first), min(last, shard_last)
            start = self._shard_start(shard)
            parts.append((shard, int(offsets[a - first]) - start, int(offsets[b - first]) - start))
        return parts or [(0, 0, 0)]

    def stored(self, first: int, last: int, *, optional: Collection[str] = ()) -> Stored:
        """The fields of rows ``first`` to ``last`` as they are stored, for ``decode``: half the memory of targets.

        Args:
          first: first row.
          last: one past the last row.
          optional: as for ``rows``.

        Returns:
          By field, arrays with one leading axis; those stored by columns may be laid out so. They may share memory,
          which is kept while any of them is.

        Raises:
          ConfigError, NotFoundError, CorruptError: as for ``rows``.
        """
        names = self._wanted(optional)
        parts = [self._stored(*part, names) for part in self._parts(first, last)]
        if len(parts) == 1:
            return parts[0]
        return {name: _concatenate([part[name] for part in parts]) for name in names}

    def decode(self, stored: Fields | Sequence[Piece], rows: NDArray[np.int64] | None = None) -> Targets:
        """Decode positions that ``stored`` gave, any of them in any order.

        Args:
          stored: their fields.
          rows: the corpus rows that they are of, so that an error can name the shard.

        Raises:
          CorruptError: a code lies outside its table.
        """
        try:
            targets: Targets = self._codec.decode(stored, f"teacher {self.name!r}")
        except CorruptError:
            for row in [] if rows is None else rows.tolist():
                self.row(row)
            raise
        return targets

    def rows(self, first: int, last: int, *, optional: Collection[str] = ()) -> Targets:
        """The targets of all target positions of rows ``first`` to ``last`` (half-open), in order.

        Args:
          first: first row.
          last: one past the last row.
          optional: which optional fields to read (``OPTIONAL`` of ``storage.codec``); the others come back empty.

        Raises:
          ConfigError: an optional field is asked for that was not captured.
          NotFoundError: outside the corpus.
          IncompleteError: beyond the shards that were committed when this was opened.
          CorruptError: stored bytes are missing or damaged (names the shard and the field).
        """
        names = self._wanted(optional)
        return Targets.concatenate([self._slots(*part, names) for part in self._parts(first, last)])

    def row(self, row: int, *, optional: Collection[str] = ()) -> Targets:
        """The targets of one row, with some optional fields."""
        return self.rows(row, row + 1, optional=optional)

    def positions(self, indices: NDArray[np.integer], *, optional: Collection[str] = ()) -> Targets:
        """The targets of any target positions, in the order asked for.

        Args:
          indices: [n] target positions, counted over the whole corpus from 0; repeats are fine.
          optional: as for ``rows``.

        Raises:
          ConfigError: an optional field is asked for that was not captured.
          NotFoundError: an index is out of range.
          IncompleteError, CorruptError: as for ``rows``.
        """
        names = self._wanted(optional)
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size == 0:
            return self._slots(0, 0, 0, names)
        if wanted.min() >= 0 and self.num_targets <= wanted.max() < self.layout.num_positions:
            raise self._beyond(f"target positions within [0, {self.num_targets})", str(wanted.max()))
        if wanted.min() < 0 or wanted.max() >= self.num_targets:
            raise NotFoundError(
                f"teacher {self.name!r}: expected target positions within [0, {self.num_targets}), found "
                f"{wanted.min()} to {wanted.max()}"
            )
        shards = self.corpus.rows_of_targets(wanted) // self.layout.rows_per_shard
        touched, inverse = np.unique(shards, return_inverse=True)
        slots = wanted - np.array([self._shard_start(int(shard)) for shard in touched])[inverse]
        groups = shards * (self.layout.shard_slots // self.layout.chunk) + slots // self.layout.chunk
        order = np.argsort(groups, kind="stable")
        parts = []
        for run in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            shard, first = int(shards[run[0]]), int(slots[run].min())
            parts.append(self._slots(shard, first, int(slots[run].max()) + 1, names)[slots[run] - first])
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return Targets.concatenate(parts)[inverse]

    def stream(
        self,
        *,
        seed: int,
        epoch: int = 0,
        rows: NDArray[np.int64] | None = None,
        window_blocks: int = 8,
        optional: Collection[str] = (),
    ) -> Iterator[tuple[Rows, Targets]]:
        """Visit rows once each, in a shuffled order that the seed and the epoch determine.

        Args:
          seed: decides the order.
          epoch: another epoch, another order.
          rows: which rows; all that can be read by default.
          window_blocks: blocks of about four chunks that are held decoded and mixed; more mix better and take
            more memory (about 20 MB each at K = 64 and 16 samples).
          optional: as for ``rows``.

        Yields:
          One row at a time: the row, and the targets of its target positions.
        """
        chosen = np.arange(self.num_rows) if rows is None else np.unique(np.asarray(rows, dtype=np.int64))
        return stream_rows(self, chosen, seed=seed, epoch=epoch, window_blocks=window_blocks, optional=optional)

    @property
    def block_rows(self) -> int:
        """Rows that are worth reading together: about four inner chunks of targets."""
        return max(1, round(4 * self.layout.chunk * self.layout.num_rows / self.layout.num_positions))


def _concatenate(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """After one another, laid out as they are."""
    if parts[0].ndim > 1 and parts[0].flags.f_contiguous:
        return np.concatenate([part.T for part in parts], axis=1).T
    return np.concatenate(parts)
