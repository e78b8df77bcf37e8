"""Is a ``zarr.json`` what the layout says: shape, type, chunks and codecs, and no codec that is not ours.

zarr looks up by name whatever codec a ``zarr.json`` asks for, also in packages that happen to be installed. A cache
that comes from anywhere must not choose what runs on its bytes, nor claim another shape than its records: so the file
is compared with what this package would have written, before zarr sees it.
"""

from __future__ import annotations

import functools
import json
import reprlib
from typing import Any

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.errors import FormatError
from tailcache.storage.limits import MAX_ARRAY_METADATA
from tailcache.storage.sealed import parse_json

__all__ = ["check_array_metadata"]

_DECIDING = (
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
)  # fmt: skip
_EXTENSIONS = ("chunk_grid", "chunk_key_encoding", "codecs", "index_codecs")
_OF_THE_ENCODER = ("blocksize", "checksum", "clevel", "level", "shuffle", "typesize")
"""Settings of codecs that a decoder does not need: what was encoded says them itself."""


def check_array_metadata(data: bytes, where: str, spec: ArraySpec, length: int) -> None:
    """Compare a ``zarr.json`` with what the array must be.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.
      spec: how the array lies on disk.
      length: of its leading axis.

    Raises:
      CorruptError: no JSON object, or a larger one than any array needs.
      FormatError: another array than the layout gives.
    """
    found = parse_json(data, where, limit=MAX_ARRAY_METADATA)
    expected = _expected(spec, length)
    for key in _DECIDING:
        value = _plain(key, found.get(key))
        if value != expected[key] or isinstance(value, bool) != isinstance(expected[key], bool):
            raise FormatError(
                f"{where}: {key!r}: expected {json.dumps(expected[key])}, found {reprlib.repr(found.get(key))}; "
                "restore it from a copy, or do not use this cache"
            )
    if found.get("storage_transformers", []) != []:
        raise FormatError(
            f"{where}: expected no storage transformers, found {reprlib.repr(found['storage_transformers'])}; "
            "restore it from a copy, or do not use this cache"
        )


@functools.lru_cache(maxsize=256)
def _expected(spec: ArraySpec, length: int) -> dict[str, Any]:
    written = json.loads(spec.metadata(length))
    return {key: _plain(key, written.get(key)) for key in _DECIDING}


def _plain(key: str, value: Any) -> Any:
    """A value without the freedom the zarr specification leaves: names alone, configurations left out if empty."""
    if key not in _EXTENSIONS:
        return value
    if isinstance(value, list):
        return [_plain(key, item) for item in value]
    if isinstance(value, str):
        return {"name": value, "configuration": {}}
    if not isinstance(value, dict):
        return value
    configuration = value.get("configuration", {})
    if not isinstance(configuration, dict):
        return value
    kept = {k: _plain(k, v) for k, v in configuration.items() if k not in _OF_THE_ENCODER}
    return {"name": value.get("name"), "configuration": kept}
