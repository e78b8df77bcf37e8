"""Whether compiled loops read chunks and decode positions: where numba is installed and there is much to do.

Importing numba and loading what it compiled takes as long as decoding a million positions without it (compiling, once
per machine, some seconds), so a process that reads little does without.

The environment variable ``TAILCACHE_NUMBA`` decides: "auto" (the default), "always" or "never". What is decoded is the
same, to the bit.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

from tailcache.storage.errors import ConfigError

__all__ = ["SWITCH", "chunk_loops", "decode_loops"]

SWITCH = "TAILCACHE_NUMBA"
_MANY = 262_144
"""Positions a process decodes before it starts to use the loops."""
_num_decoded = [0]


def decode_loops(num_positions: int) -> ModuleType | None:
    """The module of compiled loops, if so many further positions are to be decoded by it.

    Raises:
      ConfigError: the switch has an unknown value, or asks for what is not installed.
    """
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "always", "never"):
        raise ConfigError(f"{SWITCH}: expected auto, always or never, found {switch!r}")
    if switch == "never":
        return None
    if switch == "always":
        if not _is_installed():
            raise ConfigError(f"{SWITCH}: expected the package numba, found none; pip install numba")
        return _loops()
    _num_decoded[0] += num_positions
    return _loops() if _num_decoded[0] > _MANY and _is_installed() else None


def chunk_loops() -> ModuleType | None:
    """The module of loops over stored chunks, where positions are decoded by loops and all that it calls is found.

    Raises:
      ConfigError: as ``decode_loops``.
    """
    return None if decode_loops(0) is None else _chunk_loops()


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    return find_spec("numba") is not None


def _loops() -> ModuleType:
    from tailcache.storage import decode_loops as loops

    return loops


@lru_cache(maxsize=1)
def _chunk_loops() -> ModuleType | None:
    try:
        from tailcache.storage import chunk_loops as loops
    except ImportError:  # google-crc32c without its compiled part
        return None
    return loops if loops.are_callable() else None
