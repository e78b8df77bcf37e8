"""Byte ranges: many small ones read as few large ones."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["cut_range", "merge_ranges"]

Data = TypeVar("Data", bytes, memoryview)


def merge_ranges(ranges: Sequence[tuple[int, int]], gap: int, largest: int) -> list[tuple[int, int]]:
    """Few ranges that cover many.

    Args:
      ranges: (first, one past the last), in any order; empty ones are left out.
      gap: bytes between two ranges up to which they become one.
      largest: bytes of a range from which it does not grow further, and beyond which it is cut into pieces.

    Returns:
      Disjoint ranges in ascending order, none larger than ``largest``, which hold each of ``ranges``.
    """
    merged: list[list[int]] = []
    for first, last in sorted((a, b) for a, b in ranges if b > a):
        if merged and first - merged[-1][1] <= gap and (first <= merged[-1][1] or last - merged[-1][0] <= largest):
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return [(a, min(a + largest, last)) for first, last in merged for a in range(first, last, largest)]


def cut_range(merged: Sequence[tuple[int, int]], pieces: Sequence[Data], first: int, last: int) -> bytes | Data:
    """One of the ranges that were merged.

    Args:
      merged: what ``merge_ranges`` gave.
      pieces: the bytes of each, shorter where the file ended.
      first: the first byte.
      last: one past the last.
    """
    number = max(0, bisect.bisect_right(merged, (first, math.inf)) - 1)
    parts = []
    while number < len(merged) and merged[number][0] < last:
        begin = merged[number][0]
        parts.append(pieces[number][max(0, first - begin) : max(0, last - begin)])
        number += 1
    return parts[0] if len(parts) == 1 else b"".join(parts)
