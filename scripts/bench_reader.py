"""How fast are targets read and decoded to tensors that are ready for a loss?

A cache of synthetic Zipf-like distributions (or one that is named) is read in turn, on a warm disk, by one process:

* shuffled: four epochs of ``CacheLoader``, batches of eight rows, after one that is not counted; the same with worker
  processes; and the same decoded by array operations alone, as it is where numba is not installed;
* sequential: ``Teacher.rows`` in order, one thread;
* single rows: random rows, each read and decoded by itself;
* Parquet: the same targets in natural types through ``datasets``, streamed and shuffled in a buffer of 256 rows, in its
  faster format (numpy or arrow); and by random indices, from the uncompressed copy that it makes first;
* S3: the shuffled loader over a server on this machine, which is the limit: beside it, the rate of plain downloads;
* stored fields of a shard, not decoded: directly, through zarr-python's own pipeline, and through ``zarrs``.

How busy the machine was is told by a control, fixed work on all processors, before and after each turn of the shuffled
loader, against the fastest such work in the run. Bytes are counted where they are read: an epoch uses every stored byte
of the targets and of the tokens once.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailcache.pipeline.config import CaptureConfig
from tailcache.scripts.counted_place import CountedPlace
from tailcache.scripts.measure import Bar, benchmark, control_seconds, report, spread
from tailcache.scripts.reader_baselines import parquet_random, parquet_shuffled, s3_copy, write_parquet
from tailcache.storage import compiled
from tailcache.storage.arrays import open_array, read_slice
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.place import Place, open_place
from tailcache.storage.reader import Teacher, open_cache
from tailcache.storage.rust_codecs import SWITCH
from tailcache.storage.targets import Targets, TargetsWriter, plan_layout
from tailcache.trainers.loader import CacheLoader

__all__ = ["BenchReader", "main", "synthetic_cache", "synthetic_targets"]

MIN_POSITIONS_PER_S = 2e6
MIN_OVER_PARQUET = 3.0
BATCH_ROWS = 8
EPOCHS = 4
"""Of the loader in one turn: a single one lasts a fifth of a second, and what ran before it is still in the caches."""


@dataclass(frozen=True, kw_only=True)
class BenchReader:
    """Time every way of reading a cache, and ``datasets`` on the same targets in Parquet; medians and ratios."""

    cache: Path | None = None
    """Read this cache instead of a synthetic one."""

    teacher: str | None = None
    """Which teacher of it."""

    positions: int = 400_000
    """Target positions of the synthetic cache."""

    row_positions: int = 1024
    """Positions of its rows."""

    vocab_size: int = 49_152
    """Its vocabulary."""

    top_k: int = 64
    """Tokens kept."""

    num_samples: int = 16
    """Draws from the tail."""

    repeats: int = 5
    """Turns of each way, after one that is not counted."""

    workers: int = 2
    """Processes of the loader with workers."""

    s3: bool = True
    """Also read from an S3 server on this machine, where moto is installed."""

    json: Path | None = None
    """Write figures and conditions to this file."""

    check: bool = False
    """Exit with status 1 where the bar is missed."""


def synthetic_targets(num: int, vocab_size: int, top_k: int, num_samples: int, seed: int = 0) -> Targets:
    """Targets with Zipf-like distributions, valid but meaningless."""
    generator = np.random.default_rng(seed)
    exponent = generator.uniform(0.8, 2.5, (num, 1)).astype(np.float32)
    logprobs = -exponent * np.log(np.arange(1, top_k + 1, dtype=np.float32))
    log_tail = np.log(generator.uniform(0.01, 0.3, num)).astype(np.float32)
    logprobs += (np.log1p(-np.exp(log_tail)) - np.log(np.exp(logprobs).sum(axis=1)))[:, None]
    spacing = generator.geometric(0.2, (num, top_k + num_samples)).cumsum(axis=1)
    ids = (spacing % vocab_size).astype(np.int32)
    half = np.full(num, np.log(0.5), np.float32)
    return Targets(
        token_ids=ids[:, :top_k],
        logprobs=logprobs.astype(np.float32),
        log_tail=log_tail,
        tail_entropy=np.full(num, 5.0, np.float32),
        log_target=half,
        log_not_target=half,
        tail_samples=ids[:, top_k:],
    )


def synthetic_cache(
    cache: Path, *, positions: int, row_positions: int, vocab_size: int, top_k: int, num_samples: int
) -> None:
    """A corpus of random tokens, and the teacher ``bench`` over it with ``synthetic_targets``.

    Args:
      cache: where to.
      positions: target positions, about: those of whole rows.
      row_positions: target positions of a row.
      vocab_size: V.
      top_k: tokens kept.
      num_samples: draws from the tail.
    """
    generator = np.random.default_rng(0)
    length = row_positions + 1
    start = np.zeros(length, np.bool_)
    start[0] = True
    wanted = np.ones(length, np.bool_)
    with CorpusWriter(cache, vocab_size=vocab_size) as writer:
        for _ in range(max(1, positions // row_positions)):
            writer.append(generator.integers(0, vocab_size, length), start, wanted, held_out=False)
        corpus = writer.finish(tokenizer_files={}, tokenizer={}, source={}, recipe={}, report={})
    level = CaptureConfig.compression_level  # as capture writes: levels take different times to read
    layout = plan_layout(corpus, top_k=top_k, num_samples=num_samples, shard_positions=131_072, compression_level=level)
    with TargetsWriter(corpus, "bench", layout=layout, settings={}) as targets_writer:
        for shard in range(layout.num_shards):
            offsets = corpus.target_offsets(*layout.shard_rows(shard))
            targets = synthetic_targets(int(offsets[-1] - offsets[0]), vocab_size, top_k, num_samples, shard)
            targets_writer.write_shard(shard, targets, np.ones(vocab_size))
        targets_writer.finish()


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_reader``."""
    benchmark("bench_reader", BenchReader, bench, __doc__, may_be_zero=("num_samples",))


def _rate(batches: Iterable[Any], epochs: int = 1) -> float:
    start = time.perf_counter()
    seen = sum(len(batch["log_tail"]) for _ in range(epochs) for batch in batches)
    return seen / (time.perf_counter() - start)


def _steady_rate(loader: CacheLoader) -> float:
    """After an epoch that is not counted: what was measured before has other memory, and other things in the caches."""
    _rate(loader)
    return _rate(loader, EPOCHS)


@contextmanager
def _switched(name: str, value: str) -> Iterator[None]:
    """With an environment variable set."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _by_arrays(batches: CacheLoader) -> float:
    with _switched(compiled.SWITCH, "never"):
        return _steady_rate(batches)


def _sequential(teacher: Teacher) -> float:
    start, seen, step = time.perf_counter(), 0, teacher.block_rows
    for first in range(0, teacher.num_rows, step):
        seen += len(teacher.rows(first, min(first + step, teacher.num_rows)))
    return seen / (time.perf_counter() - start)


def _single_rows(teacher: Teacher, seed: int) -> float:
    rows = np.random.default_rng(seed).permutation(teacher.num_rows)[:32].tolist()
    start, seen = time.perf_counter(), 0
    for row in rows:
        teacher.corpus.rows(row, row + 1)
        seen += len(teacher.row(row))
    return seen / (time.perf_counter() - start)


def _stored(teacher: Teacher, path: Path) -> dict[str, Callable[[], float]]:
    """Ways to read, without decoding, every field of the first shard: microseconds per position."""
    last = teacher.layout.shard_rows(0)[1]
    num = int(teacher.corpus.target_offsets(0, last)[-1])

    def timed(read: Callable[[], object]) -> float:
        start = time.perf_counter()
        read()
        return (time.perf_counter() - start) / num * 1e6

    def direct(switch: str) -> float:
        with _switched(SWITCH, switch):
            return timed(lambda: teacher.stored(0, last))

    def by_zarr() -> None:
        for name in teacher.layout.fields():
            read_slice(open_array(path / "teachers" / teacher.name / name), 0, num, lambda: "bench")

    ways: dict[str, Callable[[], float]] = {"direct": lambda: direct("never"), "zarr-python": lambda: timed(by_zarr)}
    try:
        import zarrs  # type: ignore[import-untyped, unused-ignore]  # noqa: F401
    except ImportError:
        return ways
    return {**ways, "zarrs": lambda: direct("always")}


def _token_bytes(place: Place) -> int:
    """Stored bytes of what is read of the corpus with the targets."""
    wanted = ("tokens", "document_start", "supervised")
    return sum(size for file, size in (place / "corpus").files() if file.partition("/")[0] in wanted)


def _over_s3(path: Path, name: str, repeats: int, used: int) -> dict[str, Any]:
    with s3_copy(path) as url:
        if url is None:
            return {}
        place = CountedPlace(open_place(url))
        fields = place / "teachers" / name
        files = [file for file, _ in fields.files() if "/c/" in file]
        start = time.perf_counter()
        size = sum(len(fields.read(file)) for file in files)
        download = size / (time.perf_counter() - start)
        teacher = open_cache(place).teacher(name)
        loader = CacheLoader(teacher, batch_rows=BATCH_ROWS)
        _rate(loader)
        before = place.count.num_bytes
        rates = [_rate(loader) for _ in range(repeats)]
        read = (place.count.num_bytes - before) / repeats
    return {
        "s3_positions_per_s": spread(rates),
        "s3_bytes_per_s": statistics.median(rates) * read / teacher.num_targets,
        "s3_plain_download_bytes_per_s": download,
        "s3_bytes_read_per_byte_used": read / used,
    }


def bench(config: BenchReader) -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        path = config.cache or Path(folder) / "cache"
        if config.cache is None:
            synthetic_cache(
                path,
                positions=config.positions,
                row_positions=config.row_positions,
                vocab_size=config.vocab_size,
                top_k=config.top_k,
                num_samples=config.num_samples,
            )
        cache = open_cache(path)
        teacher = cache.teacher(config.teacher or cache.teacher_names[0])
        parquet = Path(folder) / "targets.parquet"
        write_parquet(teacher, parquet)
        sizes = dict(teacher.place.files())
        stored = sum(size for file, size in sizes.items() if file.partition("/")[0] in teacher.layout.fields())
        used = stored + _token_bytes(cache.place)

        plain = CacheLoader(teacher, batch_rows=BATCH_ROWS)
        workers = CacheLoader(
            open_cache(path).teacher(teacher.name),
            batch_rows=BATCH_ROWS,
            num_workers=config.workers,
            persistent_workers=True,
        )
        ways: dict[str, Callable[[int], float]] = {
            "shuffled": lambda _: _steady_rate(plain),
            "workers": lambda _: _steady_rate(workers),
            "shuffled_by_arrays": lambda _: _by_arrays(plain),
            "sequential": lambda _: _sequential(teacher),
            "single_rows": lambda seed: _single_rows(teacher, seed),
            "parquet_numpy": lambda s: parquet_shuffled(parquet, batch_rows=BATCH_ROWS, seed=s, kind="numpy"),
            "parquet_arrow": lambda s: parquet_shuffled(parquet, batch_rows=BATCH_ROWS, seed=s, kind="arrow"),
        }
        for way in ways.values():
            way(0)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        controls, beside = [], []
        for repeat in range(1, config.repeats + 1):
            for name, way in ways.items():
                controls.append(control_seconds())
                rates[name].append(way(repeat))
                if name == "shuffled":
                    controls.append(control_seconds())
                    beside.append(statistics.mean(controls[-2:]))
        workers.close()
        place = CountedPlace(open_place(path))
        counted = CacheLoader(open_cache(place).teacher(teacher.name), batch_rows=BATCH_ROWS)
        _rate(counted)
        before = place.count.num_bytes
        _rate(counted)
        read = place.count.num_bytes - before
        rates["parquet"] = [max(pair) for pair in zip(rates["parquet_numpy"], rates["parquet_arrow"], strict=True)]
        copied = parquet_random(parquet, Path(folder) / "arrow", batch_rows=BATCH_ROWS, seed=1)
        reads = {name: spread([way() for _ in range(config.repeats)]) for name, way in _stored(teacher, path).items()}
        remote = _over_s3(path, teacher.name, config.repeats, used) if config.s3 else {}
        parquet_bytes = parquet.stat().st_size
    over = [a / b for a, b in zip(rates["shuffled"], rates["parquet"], strict=True)]
    figures = {
        "positions": teacher.num_targets,
        "top_k": teacher.top_k,
        "num_samples": teacher.num_samples,
        "vocab_size": teacher.vocab_size,
        **{f"{name}_positions_per_s": spread(values) for name, values in rates.items()},
        "control during shuffled / its fastest": spread([seconds / min(controls) for seconds in beside]),
        "compiled_loops": compiled.decode_loops(0) is not None,
        "shuffled / parquet": spread(over),
        "shuffled / single rows": spread([a / b for a, b in zip(rates["shuffled"], rates["single_rows"], strict=True)]),
        "bytes_per_position": stored / teacher.num_targets,
        "bytes_read_per_byte_used": read / used,
        "parquet_bytes_per_position": parquet_bytes / teacher.num_targets,
        "arrow_copy": {
            "positions_per_s": copied[0],
            "seconds_to_make": copied[1],
            "bytes_per_position": copied[2] / teacher.num_targets,
        },
        "stored_us_per_position": reads,
        **remote,
    }
    bars = [
        Bar(
            name="shuffled positions/s, median",
            value=statistics.median(rates["shuffled"]),
            limit=MIN_POSITIONS_PER_S,
            at_most=False,
        ),
        Bar(name="shuffled / parquet, median", value=statistics.median(over), limit=MIN_OVER_PARQUET, at_most=False),
    ]
    report("bench_reader", figures, bars, json_path=config.json, check=config.check)


if __name__ == "__main__":
    main()
