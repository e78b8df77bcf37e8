"""JSON records that carry their own checksum: manifests and commit records.

A sealed record has exactly one byte representation: keys sorted, one space of indentation, a newline at the
end, and a ``sha256`` over everything else. Opening one checks the hash and that the bytes are the canonical
ones, so that any flipped byte in the file, white space and the hash itself included, is found.

A record may come from anywhere: how large it is, how many values it may hold and how deep they may lie is limited
before anything is built from it.
"""

from __future__ import annotations

import json
from typing import Any

from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "canonical", "parse_json", "seal", "unseal"]

MAX_BYTES = 64 << 20
"""Of any record."""
MAX_VALUES = 2 << 20
"""Values of a record, as counted by the characters that may separate or open them: some 600 MB as Python objects."""
MAX_DEPTH = 64
"""Objects and arrays within each other."""


def canonical(record: Any) -> bytes:
    """The one byte representation of a JSON value (no NaN; keys sorted)."""
    text = json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def seal(record: dict[str, Any]) -> bytes:
    """Bytes of a record with the checksum of its content."""
    if "sha256" in record:
        raise ValueError("a record to be sealed may not have a key 'sha256': it is the seal's own")
    data = _with_seal(record, body := canonical(record), sha256(body))
    if len(data) > MAX_BYTES:
        raise ValueError(f"a record to be sealed may have at most {MAX_BYTES} bytes, found {len(data)}")
    return data


def parse_json(data: bytes, where: str, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """A JSON object of bounded size, number of values and depth.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.
      limit: bytes at most.

    Raises:
      CorruptError: it is larger, or no JSON object.
    """
    if len(data) > limit:
        raise CorruptError(f"{where}: expected a record of at most {limit} bytes, found {len(data)}")
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > MAX_VALUES:
        raise CorruptError(f"{where}: expected a record of at most {MAX_VALUES} values, found {values}")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: expected a JSON record, found something else ({error})") from error
    if not isinstance(record, dict):
        raise CorruptError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if _depth_exceeds(record, MAX_DEPTH):
        raise CorruptError(f"{where}: expected at most {MAX_DEPTH} objects and arrays within each other, found more")
    return record


def unseal(data: bytes, where: str, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Check a sealed record and give back its content.

    Args:
      data: the file's bytes.
      where: how to call the file in an error.
      limit: bytes at most.

    Raises:
      CorruptError: too large, not JSON, not canonical, or another checksum than the one it carries.
    """
    record = parse_json(data, where, limit=limit)
    if not isinstance(record.get("sha256"), str):
        raise CorruptError(f"{where}: expected a JSON object with its own 'sha256'")
    stored = record.pop("sha256")
    try:
        body = canonical(record)
    except ValueError as error:
        raise CorruptError(f"{where}: expected a canonical JSON record ({error})") from error
    computed = sha256(body)
    if stored != computed:
        raise CorruptError(f"{where}: its checksum does not match: stored {stored[:64]!r}, computed {computed!r}")
    if data != _with_seal(record, body, stored):
        raise CorruptError(f"{where}: same content, but not the bytes that were written")
    return record


def _with_seal(record: dict[str, Any], body: bytes, digest: str) -> bytes:
    """The canonical bytes of a record and its seal, from those without it: encoding is what takes the time."""
    line = f' "sha256": "{digest}"'.encode()
    behind = [key for key in record if key > "sha256"]
    if behind:  # only keys of the record itself stand behind exactly one space
        mark = b"\n " + json.dumps(min(behind), ensure_ascii=False).encode() + b":"
        return body.replace(mark, b"\n" + line + b"," + mark, 1)
    return body[:-3] + b",\n" + line + body[-3:] if record else b"{\n" + line + b"\n}\n"


def _depth_exceeds(record: dict[str, Any], limit: int) -> bool:
    level: list[Any] = [record]
    for _ in range(limit):
        level = [
            value
            for holder in level
            for value in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(value, dict | list)
        ]
        if not level:
            return False
    return True
