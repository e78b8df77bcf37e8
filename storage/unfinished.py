"""What a reader does with a capture that has not finished; by itself, since settings need it and not zarr."""

from __future__ import annotations

from typing import Literal

__all__ = ["Unfinished"]

Unfinished = Literal["refuse", "prefix", "wait"]
"""An error, the shards that are committed so far without a gap, or wait until it has finished."""
