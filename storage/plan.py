"""Cut a corpus into shards, and decide what a teacher's targets look like, before any of them is known."""

from __future__ import annotations

from collections.abc import Sequence

from tailcache.storage.classes import plan_classes
from tailcache.storage.codec import KL_BUDGET, logprob_levels, scalar_steps
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import ConfigError
from tailcache.storage.layout import Layout, check_kl_budget, check_temperatures
from tailcache.storage.limits import layout_problem

__all__ = ["plan_layout"]


def plan_layout(
    corpus: Corpus,
    *,
    top_k: int,
    num_samples: int,
    shard_positions: int,
    chunk: int = 8192,
    compression_level: int = 9,
    temperatures: Sequence[float] = (),
    kl_budget: float = KL_BUDGET,
    classes: tuple[int, int] | None = None,
) -> Layout:
    """Cut a corpus into shards.

    Args:
      corpus: the positions to be covered.
      top_k: tokens kept per position, 1 to V.
      num_samples: draws from the tail per position; must be 0 where K = V, since there is no tail.
      shard_positions: target positions per shard, on average.
      chunk: slots per inner chunk.
      compression_level: of blosc, 1 to 9.
      temperatures: further ones at which the tail's sum is stored, in this order.
      kl_budget: nats per position that rounding may cost on average.
      classes: number of classes of positions and tokens in the list of each; (1, 0) for none; by default what the
        corpus is large enough for.

    Raises:
      ConfigError: a size, a temperature or the budget is out of range.
    """
    if not 1 <= top_k <= corpus.vocab_size:
        raise ConfigError(f"top_k: expected 1 to the vocabulary size {corpus.vocab_size}, found {top_k}")
    if num_samples < 0 or (num_samples and top_k == corpus.vocab_size):
        raise ConfigError(
            f"num_samples: expected 0 or more, and 0 where top_k equals the vocabulary size; found {num_samples}"
        )
    if shard_positions < 1 or chunk < 1 or not 1 <= compression_level <= 9:
        raise ConfigError(
            "expected shard_positions >= 1, chunk >= 1 and a compression level from 1 to 9; found "
            f"{shard_positions}, {chunk} and {compression_level}"
        )
    problem = check_temperatures(temperatures)
    if problem:
        raise ConfigError(f"temperatures: {problem}")
    problem = check_kl_budget(kl_budget)
    if problem:
        raise ConfigError(problem)
    rows_per_shard = max(1, round(shard_positions * corpus.num_rows / max(1, corpus.num_targets)))
    rows_per_shard = min(rows_per_shard, corpus.num_rows)
    largest = 1
    for first in range(0, corpus.num_rows, rows_per_shard):
        last = min(first + rows_per_shard, corpus.num_rows)
        a, b = corpus.read("target_offsets", first, first + 1), corpus.read("target_offsets", last, last + 1)
        largest = max(largest, int(b[0] - a[0]))
    chunk = min(chunk, largest)
    if classes is None:
        second = min(rows_per_shard, corpus.num_rows)
        classes = plan_classes(
            vocab_size=corpus.vocab_size,
            top_k=top_k,
            num_positions=corpus.num_targets,
            first_positions=int(corpus.read("target_offsets", second, second + 1)[0]),
        )
    layout = Layout(
        vocab_size=corpus.vocab_size,
        top_k=top_k,
        num_samples=num_samples,
        num_levels=len(logprob_levels(top_k, kl_budget)),
        num_rows=corpus.num_rows,
        num_positions=corpus.num_targets,
        rows_per_shard=rows_per_shard,
        shard_slots=-(-largest // chunk) * chunk,
        chunk=chunk,
        compression_level=compression_level,
        temperatures=tuple(map(float, temperatures)),
        num_classes=classes[0],
        class_size=classes[1],
        scalar_steps=scalar_steps(kl_budget),
        kl_budget=float(kl_budget),
    )
    problem = layout_problem(layout)
    if problem:
        raise ConfigError(f"{problem}; choose a smaller chunk, shard, K or number of draws")
    return layout
