"""Several teachers of one corpus, read together: the targets of all of them for the same rows in one pass.

``Teachers`` has what loaders and trainers ask of one teacher. The fields of the first keep their names; those of
teacher i (from 1) are called ``i/NAME``, as they are stored (``Stored``), in a batch, and in ``named_arrays``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.blocks import Stored
from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.fields import Targets
from tailcache.storage.hidden import StoredHead
from tailcache.storage.pieces import Fields, Piece
from tailcache.storage.reader import Cache, Teacher, open_cache

__all__ = [
    "BETWEEN",
    "AnyTeacher",
    "Opening",
    "SeveralTargets",
    "Teachers",
    "field_name",
    "fields_of",
    "named_arrays",
    "open_named",
]

BETWEEN = " + "
"""What stands between the names of teachers that are read together; no name can hold it."""

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class SeveralTargets(Targets):
    """The targets of the first teacher, and beside them those of the others for the same positions."""

    further: tuple[Targets, ...]

    @staticmethod
    def beside(parts: Sequence[Targets]) -> SeveralTargets:
        """The targets of several teachers as one."""
        first = {each.name: getattr(parts[0], each.name) for each in fields(Targets)}
        return SeveralTargets(**first, further=tuple(parts[1:]))

    @property
    def parts(self) -> tuple[Targets, ...]:
        """Each teacher's."""
        return (Targets(**{each.name: getattr(self, each.name) for each in fields(Targets)}), *self.further)

    def __getitem__(self, index: slice | NDArray[np.integer] | NDArray[np.bool_]) -> SeveralTargets:
        return SeveralTargets.beside([part[index] for part in self.parts])


def field_name(teacher: int, name: str) -> str:
    """What a field of the i-th teacher is called."""
    return name if teacher == 0 else f"{teacher}/{name}"


def fields_of(values: Mapping[str, Value], teacher: int) -> dict[str, Value]:
    """The fields of the i-th teacher among those of all, under their own names."""
    prefix = "" if teacher == 0 else f"{teacher}/"
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }


def named_arrays(targets: Targets) -> dict[str, NDArray[Any]]:
    """All fields of some targets by name."""
    parts = targets.parts if isinstance(targets, SeveralTargets) else (targets,)
    return {field_name(i, name): values for i, part in enumerate(parts) for name, values in vars(part).items()}


class Teachers:
    """At least two teachers of one corpus.

    Attributes:
      teachers: each of them.
      top_k, num_samples: the smallest of each; 0 samples only where a teacher with a tail has none.
      hidden_kind: "none" unless every teacher has hidden states.
      temperatures: none: what is stored for them is about single teachers.

    Raises:
      ConfigError: fewer than two, one twice, or one whose capture has not finished.
      MismatchError: they are of different corpora.
    """

    is_prefix = False
    temperatures: tuple[float, ...] = ()
    hidden_width = 0

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.teachers = tuple(teachers)
        names = [each.name for each in self.teachers]
        if len(names) < 2:
            raise ConfigError(f"teachers: expected at least two, found {', '.join(names) or 'none'}")
        hashes = [each.hash for each in self.teachers]
        for i, each in enumerate(self.teachers):
            if hashes[i] in hashes[:i]:
                raise ConfigError(
                    f"teachers: expected different ones, found {names[i]!r} twice; give its weights to one of them"
                )
            if each.is_prefix:
                raise ConfigError(
                    f"teachers: expected captures that have finished, found {each.name!r}, of which {each.num_shards} "
                    f"of {each.layout.num_shards} shards are committed; wait for it (--unfinished wait)"
                )
            if each.corpus.hash != self.teachers[0].corpus.hash:
                raise MismatchError(
                    f"teachers: expected one corpus, found {names[0]!r} of the corpus {self.teachers[0].corpus.hash} "
                    f"and {each.name!r} of {each.corpus.hash}; capture both over the same corpus"
                )
        first = self.teachers[0]
        self.name, self.corpus, self.place = BETWEEN.join(names), first.corpus, first.place
        self.num_rows, self.num_targets, self.vocab_size = first.num_rows, first.num_targets, first.vocab_size
        self.top_k = min(each.top_k for each in self.teachers)
        with_tail = [each.num_samples for each in self.teachers if each.top_k < each.vocab_size]
        self.num_samples = min(with_tail, default=0)
        kinds = [each.hidden_kind for each in self.teachers]
        self.hidden_kind = "none" if "none" in kinds else BETWEEN.join(kinds)

    @cached_property
    def hash(self) -> str:
        """What identifies all that can be read, in this order."""
        return hashlib.sha256(" ".join(each.hash for each in self.teachers).encode()).hexdigest()

    def train_rows(self) -> NDArray[np.int64]:
        """Indices of the rows for training, ascending."""
        return self.corpus.train_rows()

    def held_out_rows(self) -> NDArray[np.int64]:
        """Indices of the rows for evaluation, ascending."""
        return self.corpus.held_out_rows()

    def heads(self) -> tuple[StoredHead, ...]:
        """The head of each teacher; see ``Teacher.head``."""
        return tuple(each.head() for each in self.teachers)

    def stored(self, first: int, last: int, *, optional: Collection[str] = ()) -> Stored:
        """The fields of some rows by all teachers, as they are stored; see ``Teacher.stored``.

        Raises:
          MismatchError: the teachers have different numbers of targets for these rows.
        """
        parts = [each.stored(first, last, optional=optional) for each in self.teachers]
        counts = [len(part["tail_entropy"]) for part in parts]
        if len(set(counts)) > 1:
            raise MismatchError(
                f"teachers {self.name}, rows {first} to {last - 1}: expected as many targets by each, found {counts}; "
                "run `tailcache verify`"
            )
        return {field_name(i, name): values for i, part in enumerate(parts) for name, values in part.items()}

    def decode(self, stored: Fields | Sequence[Piece], rows: NDArray[np.int64] | None = None) -> SeveralTargets:
        """Decode positions that ``stored`` gave; see ``Teacher.decode``."""
        parts = []
        for i, each in enumerate(self.teachers):
            if isinstance(stored, Mapping):
                parts.append(each.decode(fields_of(stored, i), rows))
            else:
                parts.append(each.decode([Piece(fields_of(piece.fields, i), piece.span) for piece in stored], rows))
        return SeveralTargets.beside(parts)


AnyTeacher = Teacher | Teachers


def open_named(cache: Cache, name: str, *, num_shards: int | None = None) -> AnyTeacher:
    """The teacher, or the teachers, that a run recorded by the name that they have.

    Args:
      cache: where they are.
      name: of ``Teacher`` or ``Teachers``.
      num_shards: of a single teacher that was read as a prefix.

    Raises:
      NotFoundError, IncompleteError: as for ``Cache.teacher``.
    """
    names = name.split(BETWEEN)
    if len(names) == 1:
        return cache.teacher(name, unfinished="prefix", num_shards=num_shards)
    return Teachers([cache.teacher(each) for each in names])


@dataclass(frozen=True)
class Opening:
    """How another process opens the same teacher or teachers again.

    Attributes:
      places: location of the cache, name, hash and, of a prefix, number of shards, of each teacher.
      together: whether they are to be read together.
    """

    places: tuple[tuple[str, str, str, int | None], ...]
    together: bool

    @classmethod
    def of(cls, teacher: AnyTeacher) -> Opening:
        """How to open it again."""
        together = isinstance(teacher, Teachers)
        each = teacher.teachers if isinstance(teacher, Teachers) else (teacher,)
        return cls(
            tuple((str(t.corpus.cache_place), t.name, t.hash, t.num_shards if t.is_prefix else None) for t in each),
            together,
        )

    def open(self) -> AnyTeacher:
        """Open it.

        Raises:
          MismatchError: what is there is no longer the same.
        """
        found = []
        for location, name, hash_, num_shards in self.places:
            teacher = open_cache(location).teacher(name, num_shards=num_shards)
            if teacher.hash != hash_:
                raise MismatchError(
                    f"{location}, teacher {name!r}: changed since the loader was made; make a new loader"
                )
            found.append(teacher)
        return Teachers(found) if self.together else found[0]
