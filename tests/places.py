"""Where the caches of the tests lie: all on the local disk, unless a test says otherwise."""

from __future__ import annotations

from pathlib import Path

from tailcache.storage.corpus import Corpus

__all__ = ["cache_folder"]


def cache_folder(corpus: Corpus) -> Path:
    """The folder of the cache that a corpus belongs to."""
    folder = corpus.cache_place.local
    assert folder is not None
    return folder
