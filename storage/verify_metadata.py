"""Do ``zarr.json`` files say what the records say? Readers here follow the records, other readers these files."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tailcache.storage.array_metadata import check_array_metadata
from tailcache.storage.arrays import ArraySpec
from tailcache.storage.errors import CorruptError, FormatError
from tailcache.storage.layout import Layout
from tailcache.storage.limits import MAX_ARRAY_METADATA
from tailcache.storage.place import Place
from tailcache.storage.records import CorpusManifest
from tailcache.storage.sealed import parse_json

__all__ = ["corpus_metadata_problems", "teacher_metadata_problems"]

_NAMES = ("format", "format_version", "vocab_size")


def corpus_metadata_problems(
    place: Place, manifest: CorpusManifest, arrays: Mapping[str, ArraySpec]
) -> Iterator[tuple[str, str | None, str]]:
    """What is wrong with the metadata of a corpus.

    Args:
      place: of the corpus.
      manifest: its manifest.
      arrays: its arrays, by name.

    Yields:
      The file, the array if it is one's, and what was expected and found.

    Raises:
      StorageError: the place fails.
    """
    expected = {name: manifest.values[name] for name in _NAMES}
    yield from _problems(place, expected, ((spec, manifest.array_length(name)) for name, spec in arrays.items()))


def teacher_metadata_problems(place: Place, layout: Layout) -> Iterator[tuple[str, str | None, str]]:
    """What is wrong with the metadata of a teacher: as ``corpus_metadata_problems``."""
    slots = layout.num_shards * layout.shard_slots
    arrays = [(spec, slots) for spec in layout.fields().values()]
    arrays += [(spec, layout.constant_length(name)) for name, spec in layout.constants().items()]
    yield from _problems(place, layout.attributes(), arrays)


def _problems(
    place: Place, expected: dict[str, Any], arrays: Iterable[tuple[ArraySpec, int]]
) -> Iterator[tuple[str, str | None, str]]:
    try:
        group = parse_json(place.read_limited("zarr.json", MAX_ARRAY_METADATA), "zarr.json")
        attributes = group.get("attributes")
        found = attributes.get("tailcache") if isinstance(attributes, dict) else None
        for name, value in expected.items():
            stored = found.get(name) if isinstance(found, dict) else None
            if stored != value:
                yield "zarr.json", None, f"attribute {name!r}: expected {value!r}, found {reprlib.repr(stored)}"
    except (CorruptError, FileNotFoundError) as error:
        yield "zarr.json", None, str(error)
    for spec, length in arrays:
        name = f"{spec.name}/zarr.json"
        try:
            check_array_metadata(place.read_limited(name, MAX_ARRAY_METADATA), name, spec, length)
        except (CorruptError, FormatError, FileNotFoundError) as error:
            yield name, spec.name, str(error)
