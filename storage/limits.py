"""The largest sizes that a cache may claim to have. A record beyond one is refused before anything is allocated.

A cache may come from anywhere, and its checksums only say that its records agree with each other. So each number that
decides how much memory a reader takes has an upper bound here, far above what any teacher needs and far below what
would bring a machine down. Writers keep to the same bounds.

What a reader holds at a time then is at most: one record and its parsed form; one constant; and the decoded
chunks that it was asked for.
"""

from __future__ import annotations

import numpy as np

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.layout import Layout

__all__ = [
    "MAX_ARRAY_METADATA",
    "MAX_CHUNKS",
    "MAX_CHUNK_BYTES",
    "MAX_COLUMNS",
    "MAX_COMMIT",
    "MAX_COUNT",
    "MAX_HEAD",
    "MAX_MANIFEST",
    "MAX_TEMPERATURES",
    "MAX_VOCABULARY",
    "chunk_bytes",
    "largest_object",
    "layout_problem",
    "smallest_object",
]

MAX_VOCABULARY = 1 << 24
"""Tokens, and levels of a table."""
MAX_COUNT = 1 << 48
"""Tokens, rows, positions or slots: several times all text there is."""
MAX_COLUMNS = 1 << 24
"""Of a two-dimensional array; K = V is allowed."""
MAX_CHUNK_BYTES = 1 << 30
"""Of a decoded chunk; the blosc format ends at twice that."""
MAX_CHUNKS = 1 << 20
"""In one object: an index of 16 MiB."""
MAX_HEAD = 1 << 33
"""Numbers of a stored head, V x D: eight times a vocabulary of 262,144 at a width of 4,096."""
MAX_TEMPERATURES = 64

MAX_MANIFEST = 16 << 20
"""Bytes of a manifest."""
MAX_COMMIT = 1 << 20
"""Bytes of a commit record, or of the record of a finished capture."""
MAX_ARRAY_METADATA = 1 << 20
"""Bytes of a ``zarr.json``."""

_INDEX_ENTRY, _CHECKSUM = 16, 4


def chunk_bytes(spec: ArraySpec) -> int:
    """Bytes of one decoded chunk of an array."""
    return spec.chunk * (spec.columns or 1) * np.dtype(spec.dtype).itemsize


def smallest_object(spec: ArraySpec) -> int:
    """Bytes of an object with one chunk that is nothing but the codecs' own headers."""
    return spec.shard // spec.chunk * _INDEX_ENTRY + 2 * _CHECKSUM


def largest_object(spec: ArraySpec) -> int:
    """Bytes of an object whose chunks could not be compressed at all, with room for what codecs add to such ones."""
    chunk = chunk_bytes(spec)
    return spec.shard // spec.chunk * (_INDEX_ENTRY + chunk + chunk // 64 + 1024) + _CHECKSUM


def layout_problem(layout: Layout) -> str:
    """What is wrong with the sizes of a layout, by themselves or with each other; empty if nothing is."""
    sizes = {
        "vocab_size": MAX_VOCABULARY,
        "num_levels": MAX_VOCABULARY,
        "top_k": layout.vocab_size,
        "num_samples": MAX_COLUMNS if layout.top_k < layout.vocab_size else 0,
        "num_rows": MAX_COUNT,
        "num_positions": MAX_COUNT,
        "rows_per_shard": MAX_COUNT,
        "shard_slots": min(MAX_COUNT, MAX_CHUNKS * layout.chunk),
        "chunk": layout.shard_slots,
    }
    for name, largest in sizes.items():
        if getattr(layout, name) > largest:
            return f"{name}: expected at most {largest}, found {getattr(layout, name)}"
    slots = layout.num_shards * layout.shard_slots
    if layout.shard_slots % layout.chunk:
        return f"shard_slots: expected a multiple of the chunk, {layout.chunk}, found {layout.shard_slots}"
    if not layout.num_positions <= slots <= MAX_COUNT:
        return f"expected room for {layout.num_positions} positions in at most {MAX_COUNT} slots, found {slots}"
    if len(layout.temperatures) > MAX_TEMPERATURES:
        return f"temperatures: expected at most {MAX_TEMPERATURES}, found {len(layout.temperatures)}"
    if layout.hidden is not None and layout.hidden.width * layout.vocab_size > MAX_HEAD:
        return (
            f"hidden: expected a head of at most {MAX_HEAD} numbers, found {layout.vocab_size} x {layout.hidden.width}"
        )
    for spec in (*layout.fields().values(), *layout.constants().values()):
        if chunk_bytes(spec) > MAX_CHUNK_BYTES:
            return f"{spec.name}: expected chunks of at most {MAX_CHUNK_BYTES} bytes, found {chunk_bytes(spec)}"
    return ""
