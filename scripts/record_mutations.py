"""Change records at random, as damage and as malice would: their values, their keys, their bytes.

Everything is drawn from one generator, so that a seed and a number name an input.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

__all__ = ["mutate_bytes", "mutate_values"]

_HASH = "0123456789abcdef" * 4
_NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 7, 8, 255, 256, 65_535, 65_536, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) - 1, 1 << 53,
    (1 << 63) - 1, 1 << 63, 1 << 64, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 1e-320, 1e38, 1e308, -1e308,
)  # fmt: skip
_STRINGS: tuple[Any, ...] = (
    "", ".", "..", "../..", "../../../../etc/passwd", "/etc/passwd", "c/../../x", "log_tail/c/0", "log_tail/c/00",
    "log_tail/c/-1", "log_tail/c/1", "log_tail/c/0/0", "token_codes/c/0/0", "x/c/0", "x/zarr.json", "zarr.json",
    "tokenizer/..", "tokenizer/../../x", "tokenizer//x", "tokenizer/a/b", "tokenizer/x.tmp", "C:\\x", "a\\..\\b",
    "\x00", "a\x00b", "\n", "\u202e", "\U0001f600", "é" * 300, "a" * 5000, _HASH, _HASH.upper(), _HASH + "\n",
    _HASH[:-1], "tailcache corpus", "tailcache targets", "bf16", "int8", "float32", "bfloat16", "name", "sha256",
    "files", "file:///etc/passwd", "s3://x/y", "__class__", "%s%n", "{0}", "nul", "1", "true",
)  # fmt: skip


def _others(generator: random.Random) -> Any:
    """Any JSON value, of any type and shape."""
    deep: Any = []
    for _ in range(generator.choice((3, 63, 64, 200))):
        deep = [deep] if generator.random() < 0.5 else {"a": deep}
    return generator.choice(
        (None, True, False, [], {}, [0, 2], [None] * 3, [[0], [1]], {"a": 1}, {_HASH: _HASH}, {"log_tail/c/0": _HASH},
         {"../x": {"bytes": 1, "sha256": _HASH, "chunks": _HASH}}, list(range(300)), {str(i): _HASH for i in range(50)},
         deep)
    )  # fmt: skip


def _holders(value: Any) -> list[Any]:
    """All objects and arrays of a record that have something in them."""
    found, todo = [], [value]
    while todo:
        here = todo.pop()
        if isinstance(here, dict | list):
            if here:
                found.append(here)
            todo.extend(here.values() if isinstance(here, dict) else here)
    return found


def _changed(value: Any, generator: random.Random) -> Any:
    """A value near another one, or one that has nothing to do with it."""
    kind = generator.random()
    if kind < 0.4 and type(value) in (int, float):
        return generator.choice(
            (value + 1, value - 1, -value, value * 2, value << 40 if type(value) is int else 0, 1.5)
        )
    if kind < 0.4 and isinstance(value, str) and value:
        place = generator.randrange(len(value))
        return generator.choice(
            (value[:place], value[:place] + "/" + value[place:], value.upper(), value[::-1], value * 2)
        )
    return generator.choice(
        (lambda: generator.choice(_NUMBERS), lambda: generator.choice(_STRINGS), lambda: _others(generator))
    )()


def _in_dict(holder: dict[str, Any], generator: random.Random) -> None:
    key = generator.choice(list(holder))
    other = generator.choice(list(holder))

    def rename() -> None:
        holder[str(_changed(key, generator))] = holder.pop(key)

    def exchange() -> None:
        holder[key], holder[other] = holder[other], holder[key]

    changes: tuple[Callable[[], Any], ...] = (
        lambda: holder.pop(key),
        lambda: holder.update({key: _changed(holder[key], generator)}),
        lambda: holder.update({key: _changed(holder[key], generator)}),
        lambda: holder.update({generator.choice(_STRINGS): _changed(holder[key], generator)}),
        lambda: holder.update({generator.choice(_STRINGS): copy.deepcopy(holder[other])}),
        rename,
        exchange,
    )
    generator.choice(changes)()


def _in_list(holder: list[Any], generator: random.Random) -> None:
    place = generator.randrange(len(holder))
    changes: tuple[Callable[[], Any], ...] = (
        lambda: holder.pop(place),
        lambda: holder.__setitem__(place, _changed(holder[place], generator)),
        lambda: holder.append(copy.deepcopy(holder[place])),
        lambda: holder.reverse(),
        lambda: holder.clear(),
    )
    generator.choice(changes)()


def mutate_values(record: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """A copy of a record with one to four of its values or keys changed, left out, added or exchanged."""
    changed = copy.deepcopy(record)
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        holders = _holders(changed)
        if not holders:
            break
        holder = changed if generator.random() < 0.3 and changed else generator.choice(holders)
        if isinstance(holder, dict):
            _in_dict(holder, generator)
        else:
            _in_list(holder, generator)
    changed.pop("sha256", None)  # the seal's own key
    return changed


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    """Some bytes with a few of them flipped, cut out, doubled, overwritten or moved."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 8))):
        if not changed:
            return b""
        first = generator.randrange(len(changed))
        last = min(len(changed), first + generator.choice((1, 1, 2, 4, 16, 200)))
        kind = generator.randrange(7)
        if kind == 0:
            changed[first] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[first] = generator.randrange(256)
        elif kind == 2:
            del changed[first:last]
        elif kind == 3:
            changed[first:first] = changed[first:last]
        elif kind == 4:
            changed[first:last] = generator.randbytes(last - first)
        elif kind == 5:
            del changed[first:]
        else:
            changed[first:first] = generator.choice(
                (b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"NaN", b"\\ud800", b"1e999")
            )
    return bytes(changed)
