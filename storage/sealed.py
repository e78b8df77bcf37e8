"""JSON records that carry their own checksum: manifests and commit records.

A sealed record has exactly one byte representation: keys sorted, one space of indentation, a newline at the
end, and a ``sha256`` over everything else. Opening one checks the hash and that the bytes are the canonical
ones, so that any flipped byte in the file, white space and the hash itself included, is found.
"""

from __future__ import annotations

import json
from typing import Any

from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError

__all__ = ["canonical", "seal", "unseal"]

_MAX_BYTES = 64 << 20


def canonical(record: Any) -> bytes:
    """The one byte representation of a JSON value (no NaN; keys sorted)."""
    text = json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def seal(record: dict[str, Any]) -> bytes:
    """Bytes of a record with the checksum of its content."""
    if "sha256" in record:
        raise ValueError("a record to be sealed may not have a key 'sha256': it is the seal's own")
    return canonical({**record, "sha256": sha256(canonical(record))})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Check a sealed record and give back its content.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.

    Raises:
      CorruptError: not JSON, not canonical, or another checksum than the one it carries.
    """
    if len(data) > _MAX_BYTES:
        raise CorruptError(f"{where}: expected a record of at most {_MAX_BYTES} bytes, found {len(data)}")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: expected a JSON record, found something else ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        raise CorruptError(f"{where}: expected a JSON object with its own 'sha256'")
    stored = record.pop("sha256")
    try:
        computed, expected_bytes = sha256(canonical(record)), seal(record)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: expected a canonical JSON record ({error})") from error
    if stored != computed:
        raise CorruptError(f"{where}: its checksum does not match: stored {stored}, computed {computed}")
    if data != expected_bytes:
        raise CorruptError(f"{where}: same content, but not the bytes that were written")
    return record
