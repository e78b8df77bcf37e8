"""Places that are reached by URL: ``s3://``, ``gs://`` and ``az://`` through obstore, the others through fsspec."""

from __future__ import annotations

import re

from tailcache.storage.errors import ConfigError
from tailcache.storage.place import Place

__all__ = ["open_remote"]

_OBJECT_STORES = ("s3", "gs", "az")


def open_remote(url: str) -> Place:
    """The place that a URL means, read through the disk cache; nothing is asked of it yet.

    Args:
      url: ``s3://bucket/folder``, ``gs://bucket/folder``, ``az://container/folder``,
        ``hf://datasets/owner/name/folder``, or another one that fsspec knows.

    Raises:
      ConfigError: a URL of an unknown kind, one whose package is not installed, or settings that cannot be understood.
    """
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*?)/*", url)
    if found is None or "?" in url or "#" in url:
        raise ConfigError(f"expected a URL such as s3://bucket/folder, without ? and #, found {url!r}")
    kind, path = found[1].lower(), found[2]
    if any(part in (".", "..", "") for part in path.split("/")[1:]):
        raise ConfigError(f"expected a URL whose parts are names, found {url!r}")
    place: Place
    if kind in _OBJECT_STORES:
        if not path or path.startswith("/"):
            raise ConfigError(f"expected {kind}://BUCKET/FOLDER, found {url!r}")
        from tailcache.storage.object_place import open_object_store

        place = open_object_store(kind, path)
    else:
        from tailcache.storage.fsspec_place import open_file_system

        place = open_file_system(kind, path)
    from tailcache.storage.disk_cache import through_disk_cache

    return through_disk_cache(place)
