"""Long reads through the Rust codec pipeline ``zarrs``, where it is installed. It only ever reads.

It decodes the chunks of one read on all processors, while ``storage.objects`` decodes them one after another and leaves
it to its callers to read several blocks at once. So it is for reads of many chunks that one thread makes: those of
``verify``, ``compare`` and ``export``. In total it takes more processor time (``scripts/bench_reader.py`` measures
both), and training, whose readers keep all processors busy anyway, does not use it.

The environment variable ``TAILCACHE_ZARRS`` decides: "auto" (the default), "always" or "never". What is read is the
same.

It compares no chunk's checksum where it reads only part of an object, and takes an object that is not there for zeros;
so its caller reads and checks the stored bytes before, which takes a small part of the time of decoding them.

Its transpose codec is many times slower than its others. Fields that are stored by columns are therefore declared to it
as what lies in their objects: a chunk's columns below one another, without any transposition.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.array import AsyncArray
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore, StorePath

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.errors import ConfigError

__all__ = ["SWITCH", "read_chunks", "use_rust"]

SWITCH = "TAILCACHE_ZARRS"
_MIN_CHUNKS = 16  # of a read, for several processors to be worth starting
_MIN_PROCESSORS = 4
_process = os.getpid()


def use_rust(num_chunks: int) -> bool:
    """Whether a read of so many chunks is to go through ``zarrs``.

    Raises:
      ConfigError: the switch has an unknown value, or asks for what is not installed.
    """
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "always", "never"):
        raise ConfigError(f"{SWITCH}: expected auto, always or never, found {switch!r}")
    if switch == "never" or os.getpid() != _process:  # its threads do not survive a fork
        return False
    if switch == "always":
        if _pipeline() is None:
            raise ConfigError(f"{SWITCH}: expected the package zarrs, found none; pip install zarrs")
        return True
    return num_chunks >= _MIN_CHUNKS and (os.cpu_count() or 1) >= _MIN_PROCESSORS and _pipeline() is not None


def read_chunks(folder: Path, spec: ArraySpec, number: int, first: int, last: int) -> NDArray[Any]:
    """Some whole chunks of an object on a local disk.

    Args:
      folder: of the teacher.
      spec: of the array.
      number: of the object.
      first: first chunk within the object.
      last: one past the last chunk.

    Returns:
      [slots] or [slots, columns]; by columns where they are stored so.

    Raises:
      ValueError: it cannot be decoded.
    """
    per_object = spec.shard // spec.chunk
    step = spec.chunk if not spec.column_major else spec.columns or 1
    begin = number * per_object
    array = _declared(folder, spec, (number + 1) * per_object)
    try:
        values = np.asarray(array[(begin + first) * step : (begin + last) * step])
    except Exception as error:  # its errors have no common class
        raise ValueError(f"zarrs: {error}") from error
    if not spec.column_major:
        return values
    by_chunk = values.reshape(last - first, step, spec.chunk)
    return np.concatenate(list(by_chunk), axis=1).T


@lru_cache(maxsize=1)
def _pipeline() -> Any:
    try:
        from zarrs import ZarrsCodecPipeline  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return ZarrsCodecPipeline


@lru_cache(maxsize=256)
def _declared(folder: Path, spec: ArraySpec, num_chunks: int) -> zarr.Array[Any]:
    """The array as ``zarrs`` is told it is. Nothing is read for it, and no configuration of zarr-python is changed."""
    metadata = json.loads(spec.metadata(num_chunks * spec.chunk))
    if spec.column_major:
        columns = spec.columns or 1
        sharding = metadata["codecs"][0]["configuration"]
        metadata["shape"] = [num_chunks * columns, spec.chunk]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [spec.shard // spec.chunk * columns, spec.chunk]
        sharding["chunk_shape"] = [columns, spec.chunk]
        sharding["codecs"] = [codec for codec in sharding["codecs"] if codec["name"] != "transpose"]
        metadata["dimension_names"] = None
    parsed = ArrayV3Metadata.from_dict(metadata)
    store = LocalStore(folder, read_only=True)
    made = AsyncArray(metadata=parsed, store_path=StorePath(store, spec.name))
    object.__setattr__(made, "codec_pipeline", _pipeline().from_array_metadata_and_store(parsed, store))
    return zarr.Array(made)
