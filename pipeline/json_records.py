"""Decode a JSON text of any size object by object: JSON lines, an array, or objects one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from tailcache.storage.errors import DataError

__all__ = ["decode_json"]

BLANK = re.compile(r"\s*")


def decode_json(chunks: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON text: JSON lines, an array of objects, or objects one after another.

    Args:
      chunks: the text in pieces of any length.

    Yields:
      Each object, as soon as it is complete.

    Raises:
      DataError: not JSON, or something other than objects, with the number of the record.

    Cost: holds one object and one chunk; an incomplete object is tried again only once the text at hand
      has doubled, so that a long one costs no more than twice its length.
    """
    decoder = json.JSONDecoder()
    source = iter(chunks)
    pending, needed, ended = "", 0, False
    num_records, in_array, after_value = 0, False, False
    while not ended:
        text, ended = _gather(pending, source, needed)
        at, needed = 0, 0
        while (at := _after_blank(text, at)) < len(text):
            if text[at] == "[" and not in_array and num_records == 0:
                in_array, at = True, at + 1
            elif text[at] == "]" and in_array:
                _expect_nothing(text[at + 1 :], source, num_records)
                return
            elif in_array and after_value:
                if text[at] != ",":
                    raise DataError(f"record {num_records}: expected a comma or ], found {text[at : at + 40]!r}")
                at, after_value = at + 1, False
            else:
                try:
                    value, end = decoder.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    if ended or not _may_be_incomplete(error, len(text)):
                        found = text[max(at, error.pos - 20) : error.pos + 20]
                        raise DataError(f"record {num_records}: not JSON: {error.msg}, at {found!r}") from error
                    needed = 2 * (len(text) - at)
                    break
                if not isinstance(value, dict):
                    found = text[at : at + 40]
                    raise DataError(f"record {num_records}: expected an object {{...}}, found {found!r}")
                yield value
                num_records, at, after_value = num_records + 1, end, True
        pending = text[at:]
    if in_array:
        raise DataError(f"record {num_records}: the array is not closed; the file looks cut off")


def _gather(pending: str, source: Iterator[str], needed: int) -> tuple[str, bool]:
    """Text of more than `needed` characters, and whether it is the last there is."""
    parts, length = [pending], len(pending)
    while length <= needed or len(parts) == 1:
        piece = next(source, None)
        if piece is None:
            return "".join(parts), True
        parts.append(piece)
        length += len(piece)
    return "".join(parts), False


def _after_blank(text: str, at: int) -> int:
    found = BLANK.match(text, at)
    return found.end() if found else at


def _may_be_incomplete(error: json.JSONDecodeError, length: int) -> bool:
    """Whether more text could mend it: it broke off at the end (literals have up to 9 characters)."""
    return error.msg.startswith("Unterminated string") or error.pos >= length - 12


def _expect_nothing(rest: str, source: Iterator[str], num_records: int) -> None:
    for piece in (rest, *source):
        if piece.strip():
            raise DataError(f"record {num_records}: expected the end after the array, found {piece.strip()[:40]!r}")
