"""How fast are shuffled rows decoded to arrays that are ready for a loss?

A cache of synthetic Zipf-like distributions (decoding does not depend on the values) is written once and read with
``Teacher.stream``, whole epochs in shuffled order, one process, warm disk. In turn with it, as the baseline: the same
rows in a fully random order, each read and decoded by itself (``Teacher.row``), on a sample of the rows. And the fields
of one shard without decoding, read directly and through zarr-python's own pipeline.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from tailcache.scripts.measure import Bar, report, spread
from tailcache.storage.arrays import open_array, read_slice
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.objects import read_object
from tailcache.storage.reader import open_cache
from tailcache.storage.targets import Targets, TargetsWriter, plan_layout

__all__ = ["BenchReader", "main", "synthetic_targets"]

MIN_POSITIONS_PER_S = 0.5e6


@dataclass(frozen=True, kw_only=True)
class BenchReader:
    """Time shuffled streaming and random single rows; medians and ratios."""

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
    """Epochs, after one that is not counted."""

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


def _synthetic_cache(config: BenchReader, cache: Path) -> None:
    generator = np.random.default_rng(0)
    length = config.row_positions + 1
    start = np.zeros(length, np.bool_)
    start[0] = True
    wanted = np.ones(length, np.bool_)
    with CorpusWriter(cache, vocab_size=config.vocab_size) as writer:
        for _ in range(max(1, config.positions // config.row_positions)):
            writer.append(generator.integers(0, config.vocab_size, length), start, wanted, held_out=False)
        corpus = writer.finish(tokenizer_files={}, tokenizer={}, source={}, recipe={}, report={})
    layout = plan_layout(
        corpus, top_k=config.top_k, num_samples=config.num_samples, shard_positions=131_072, compression_level=5
    )
    with TargetsWriter(corpus, "bench", layout=layout, settings={}) as targets_writer:
        for shard in range(layout.num_shards):
            offsets = corpus.target_offsets(*layout.shard_rows(shard))
            targets = synthetic_targets(
                int(offsets[-1] - offsets[0]), config.vocab_size, config.top_k, config.num_samples, shard
            )
            targets_writer.write_shard(shard, targets, np.ones(config.vocab_size))
        targets_writer.finish()


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_reader``."""
    bench(tyro.cli(BenchReader, description=__doc__))


def bench(config: BenchReader) -> None:
    """Measure and report."""
    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        path = config.cache or Path(folder)
        if config.cache is None:
            _synthetic_cache(config, path)
        cache = open_cache(path)
        teacher = cache.teacher(config.teacher or cache.teacher_names[0])

        def stream(epoch: int) -> float:
            start, seen = time.perf_counter(), 0
            for _, targets in teacher.stream(seed=0, epoch=epoch):
                seen += len(targets)
            return seen / (time.perf_counter() - start)

        def random_rows(epoch: int) -> float:
            rows = np.random.default_rng(epoch).permutation(cache.corpus.num_rows)[:32]
            start, seen = time.perf_counter(), 0
            for row in rows:
                cache.corpus.rows(int(row), int(row) + 1)
                seen += len(teacher.row(int(row)))
            return seen / (time.perf_counter() - start)

        def fields(direct: bool) -> float:
            """Read, without decoding, every field of the first shard: directly, or through zarr-python's pipeline."""
            offsets = cache.corpus.target_offsets(*teacher.layout.shard_rows(0))
            num = int(offsets[-1] - offsets[0])
            start = time.perf_counter()
            for name, spec in teacher.layout.fields().items():
                if direct:
                    read_object(teacher.place, spec.object_path(0), spec, 0, num, name)
                else:
                    read_slice(open_array(Path(str(teacher.place)) / name), 0, num, lambda: "bench")
            return (time.perf_counter() - start) / num * 1e6

        stream(0), random_rows(0), fields(True), fields(False)
        reads = [(fields(True), fields(False)) for _ in range(config.repeats)]
        pairs = [(stream(epoch), random_rows(epoch)) for epoch in range(1, config.repeats + 1)]
    streamed = spread([a for a, _ in pairs])
    figures = {
        "positions": teacher.num_targets,
        "top_k": teacher.top_k,
        "num_samples": teacher.num_samples,
        "vocab_size": teacher.vocab_size,
        "shuffled_positions_per_s": streamed,
        "single_rows_positions_per_s": spread([b for _, b in pairs]),
        "shuffled / single rows": spread([a / b for a, b in pairs]),
        "read_us_per_position": spread([a for a, _ in reads]),
        "zarr-python / direct read": spread([b / a for a, b in reads]),
    }
    bars = [
        Bar(
            name="shuffled positions/s, median",
            value=streamed["median"],
            limit=MIN_POSITIONS_PER_S,
            at_most=False,
        )
    ]
    report("bench_reader", figures, bars, json_path=config.json, check=config.check)


if __name__ == "__main__":
    main()
