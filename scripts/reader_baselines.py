"""What reading a cache is measured against: the same targets in Parquet, read by ``datasets``; and an S3 server.

In Parquet a dataset row is a corpus row, and a field is one flat list of numbers: of the layouts that ``datasets``
reads (a row per position with lists of K, nested lists, flat lists) that is the fastest by far.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tailcache.storage.place import open_place
from tailcache.storage.reader import Teacher

__all__ = ["FIELDS", "parquet_random", "parquet_shuffled", "s3_copy", "write_parquet"]

FIELDS = ("token_ids", "logprobs", "log_tail", "tail_entropy", "log_target", "log_not_target", "tail_samples")
_GROUP_ROWS = 64
_SERVER = """
import logging, sys
logging.disable()
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def write_parquet(teacher: Teacher, file: Path) -> None:
    """Write a teacher's decoded targets, a row for each corpus row, zstd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for first in range(0, teacher.num_rows, _GROUP_ROWS):
        last = min(first + _GROUP_ROWS, teacher.num_rows)
        targets = teacher.rows(first, last)
        offsets = teacher.corpus.target_offsets(first, last)
        offsets = offsets - offsets[0]
        columns = {}
        for name in FIELDS:
            values = getattr(targets, name)
            width = 1 if values.ndim == 1 else values.shape[1]
            columns[name] = pa.ListArray.from_arrays((offsets * width).astype(np.int32), pa.array(values.ravel()))
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _positions(batch: Any, kind: str) -> int:
    """How many positions a batch has, with every field of it turned into an array."""
    if kind == "arrow":
        arrays = {name: batch.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in FIELDS}
        return len(arrays["log_tail"])
    return sum(len(row) for row in batch["log_tail"])


def parquet_shuffled(file: Path, *, batch_rows: int, seed: int, kind: str) -> float:
    """Positions per second of a shuffled pass over the Parquet file, streamed through a buffer of rows.

    Args:
      file: of ``write_parquet``.
      batch_rows: rows of a batch.
      seed: of the order.
      kind: the format that ``datasets`` is asked for: "numpy" or "arrow".
    """
    import datasets

    found: Any = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    batches = found.shuffle(seed=seed, buffer_size=256).with_format(kind).iter(batch_size=batch_rows)
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += _positions(batch, kind)
    return seen / (time.perf_counter() - start)


def parquet_random(file: Path, folder: Path, *, batch_rows: int, seed: int) -> tuple[float, float, int]:
    """The same by random indices, from the uncompressed copy that ``datasets`` makes first.

    Args:
      file: of ``write_parquet``.
      folder: for the copy.
      batch_rows: rows of a batch.
      seed: of the order.

    Returns:
      Positions per second of a pass, seconds to make the copy, and its bytes.
    """
    import datasets

    start = time.perf_counter()
    datasets.disable_progress_bars()
    found: Any = datasets.Dataset.from_parquet(str(file), cache_dir=str(folder))
    prepared = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    order = np.random.default_rng(seed).permutation(len(found))
    rows = found.with_format("numpy")
    start, seen = time.perf_counter(), 0
    for i in range(0, len(order), batch_rows):
        seen += _positions(rows[order[i : i + batch_rows].tolist()], "numpy")
    return seen / (time.perf_counter() - start), prepared, size


@contextmanager
def s3_copy(cache: Path) -> Iterator[str | None]:
    """A copy of a cache on an S3 server of this machine (moto, in its own process); none where moto is not installed.

    Yields:
      Its URL. Meanwhile the environment names the server, and turns the disk cache off.
    """
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("obstore") is None:
        yield None
        return
    before = dict(os.environ)
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            os.environ |= {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
                "NO_PROXY": "127.0.0.1",
                "TAILCACHE_DISK_CACHE_BYTES": "0",
            }
            request = urllib.request.Request(f"{endpoint}/bench", method="PUT")
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()
            place = open_place("s3://bench/cache")
            for path in sorted(p for p in cache.rglob("*") if p.is_file()):
                place.write(path.relative_to(cache).as_posix(), path.read_bytes())
            yield "s3://bench/cache"
        finally:
            os.environ.clear()
            os.environ.update(before)
            server.kill()
