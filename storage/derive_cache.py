"""A whole cache from one or several others: copied byte for byte where nothing changes, else derived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tailcache.storage.copy import copy_corpus, copy_teacher
from tailcache.storage.corpus import Corpus
from tailcache.storage.derive import Change, check_change, derive_corpus, derive_teacher
from tailcache.storage.derive_rows import select
from tailcache.storage.errors import ConfigError, IncompleteError, NotFoundError
from tailcache.storage.place import Place
from tailcache.storage.reader import Cache, Teacher

__all__ = ["Derived", "derive_cache"]


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What was made."""

    corpus: Corpus
    copied: list[str] = field(default_factory=list)
    """Teachers that were copied byte for byte, or were there already."""
    derived: list[str] = field(default_factory=list)
    """Names of teachers that were made."""
    left_out: list[str] = field(default_factory=list)
    """Teachers whose capture has not finished."""


def derive_cache(
    caches: Sequence[Cache],
    target: Place,
    *,
    teachers: Sequence[str] = (),
    name: str | None = None,
    rows: tuple[int | None, int | None] | None = None,
    split: str = "all",
    change: Change | None = None,
    on_bytes: Callable[[int], object] = lambda _: None,
    on_positions: Callable[[int], object] = lambda _: None,
) -> Derived:
    """Make a cache, or go on making it.

    Args:
      caches: one, or several with disjoint rows of one corpus, which are merged.
      target: the place of the new cache. It may have the corpus already, and other teachers over it.
      teachers: which; by default all that are finished, in every cache.
      name: what to call the one teacher that is derived; by default as it is called.
      rows: first and one past the last, counted in what is merged.
      split: "all", "train" or "held-out".
      change: what is to be different in the teachers; none: nothing.
      on_bytes: called with bytes copied.
      on_positions: called with positions derived.

    Raises:
      MismatchError: parts of different corpora, with rows in common or teachers of different settings; or something
        else is at the target.
      NotFoundError, IncompleteError: no such teacher in one of the caches, or its capture has not finished.
      ConfigError: what is asked for cannot be.
      CorruptError: a source is damaged.
    """
    sources, left_out = _teachers(caches, teachers)
    names = list(sources)
    if name is not None and len(names) != 1:
        raise ConfigError(
            f"--name: expected one teacher to be named, found {', '.join(names) or 'none'}; use --teachers"
        )
    selection = select([cache.corpus for cache in caches], rows=rows, split=split)
    same = selection.unchanged
    if not same or change is not None:
        for opened in sources.values():
            check_change(opened, change or Change())
    elif name not in (None, *names):
        raise ConfigError("--name: a copy keeps its teacher's name; --re-encode gives it another")
    corpus = copy_corpus(caches[0].place, target, on_bytes) if same else derive_corpus(selection, target)
    found = Derived(corpus=corpus, left_out=left_out)
    for each, opened in sources.items():
        if same and change is None:
            copy_teacher(caches[0].place, target, each, on_bytes)
            found.copied.append(each)
        else:
            derive_teacher(opened, selection, corpus, name or each, change or Change(), on_positions)
            found.derived.append(name or each)
    return found


def _teachers(caches: Sequence[Cache], wanted: Sequence[str]) -> tuple[dict[str, list[Teacher]], list[str]]:
    """The finished teachers that are in every cache, by name; and names of those of the first that are not finished."""
    finished: list[dict[str, Teacher]] = []
    unfinished: list[str] = []
    for cache in caches:
        finished.append({})
        for name in wanted or cache.teacher_names:
            try:
                finished[-1][name] = Teacher(cache.corpus, name)
            except IncompleteError:
                if wanted:
                    raise
                unfinished.append(name)
    for cache, found in zip(caches, finished, strict=True):
        missing = finished[0].keys() ^ found.keys()
        if missing:
            raise NotFoundError(
                f"{cache.place}: expected the same finished teachers as {caches[0].place}, found a difference: "
                f"{', '.join(sorted(missing))}; choose with --teachers"
            )
    return {name: [found[name] for found in finished] for name in finished[0]}, unfinished
