"""The arithmetic that makes targets of logits, against the plain calls: ``log_softmax``, ``topk``, ``multinomial``.

Both work on the same random logits, in turn; what ``summarise_logits`` gives is more (entropy, masses, the sum of
tails), and its error of normalisation smaller.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailcache.scripts.measure import Bar, benchmark, report, spread

__all__ = ["BenchHead", "main"]


@dataclass(frozen=True, kw_only=True)
class BenchHead:
    """Time and error of the head's arithmetic on two cores."""

    top_k: int = 64
    """Tokens kept."""

    num_samples: int = 16
    """Draws from the tail."""

    repeats: int = 5
    """Pairs of timings."""

    json: Path | None = None
    """Write figures and conditions to this file."""

    check: bool = False
    """Exit with status 1 where a bar is missed."""


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_head``."""
    benchmark("bench_head", BenchHead, bench, __doc__, may_be_zero=("num_samples",))


def bench(config: BenchHead) -> None:
    """Measure and report."""
    figures = _head(config)
    ratio = figures["normalisation_error_summary"] / figures["normalisation_error_log_softmax"]
    bars = [Bar(name="error of normalisation / log_softmax's", value=ratio, limit=0.5, at_most=True)]
    report("bench_head", figures, bars, json_path=config.json, check=config.check)


def _head(config: BenchHead) -> dict[str, Any]:
    """Time of the head's arithmetic against the plain calls, in turn, and their error of normalisation."""
    import torch

    from tailcache.pipeline.head import summarise_logits

    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn((32, 49_152), generator=generator) * 3
    targets_T = torch.randint(0, 49_152, (32,), generator=generator)
    uniforms_T = torch.rand(32, generator=generator, dtype=torch.float64)
    num_samples = max(1, config.num_samples)
    scratch, tail_sum = torch.empty_like(logits_TV), torch.zeros(49_152, dtype=torch.float64)

    def ours(copy: Any) -> Any:
        return summarise_logits(
            copy,
            targets_T,
            uniforms_T,
            vocab_size=49_152,
            top_k=config.top_k,
            num_samples=num_samples,
            tail_sum_V=tail_sum,
            scratch_TV=scratch,
        )

    def plain(copy: Any) -> Any:
        logprobs = copy.log_softmax(-1)
        top = logprobs.topk(config.top_k, dim=-1)
        tail = logprobs.scatter(1, top.indices, -torch.inf).exp()
        tail.multinomial(num_samples, replacement=True)
        return logprobs

    def timed(function: Any) -> float:
        copies = [logits_TV.clone() for _ in range(8)]
        start = time.perf_counter()
        for copy in copies:
            function(copy)
        return (time.perf_counter() - start) / (8 * len(logits_TV)) * 1e6

    timed(ours), timed(plain)
    pairs = [(timed(ours), timed(plain)) for _ in range(config.repeats)]
    summary = ours(logits_TV.clone())
    sums = summary.logprobs.double().exp().sum(-1) + summary.log_tail.double().exp()
    return {
        "summary_us_per_position": spread([a for a, _ in pairs]),
        "plain / summary": spread([b / a for a, b in pairs]),
        "normalisation_error_summary": float((sums - 1).abs().mean()),
        "normalisation_error_log_softmax": float((plain(logits_TV).double().exp().sum(-1) - 1).abs().mean()),
    }


if __name__ == "__main__":
    main()
