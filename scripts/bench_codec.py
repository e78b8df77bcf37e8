"""What the codec costs and what it loses, on a real teacher's distributions, against the plainer choices.

The teacher is run over docstrings; its float32 targets are encoded as they would be stored, and decoded. Beside the
stored form stand what was rejected: gaps in even steps, ranks by corpus counts, ranks without differences inside equal
levels; and, for the arithmetic before it, ``log_softmax`` + ``topk`` + ``multinomial`` in the place of
``summarise_logits``.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from tailcache.scripts.embedded import docstring_corpus, smollm2
from tailcache.scripts.measure import Bar, report, spread
from tailcache.storage.arrays import ArraySpec
from tailcache.storage.codec import Codec, Targets, logprob_levels, vocabulary_order

__all__ = ["BenchCodec", "main"]

CHUNK, LEVEL = 8192, 9


@dataclass(frozen=True, kw_only=True)
class BenchCodec:
    """Bytes per position, KL error and speed of the codec, beside what was rejected."""

    top_k: int = 64
    """Tokens kept."""

    num_samples: int = 16
    """Draws from the tail."""

    positions: int = 24_000
    """Tokens of the corpus, about."""

    repeats: int = 5
    """Pairs of timings of the head's arithmetic."""

    json: Path | None = None
    """Write figures and conditions to this file."""

    check: bool = False
    """Exit with status 1 where a bar is missed."""


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_codec``."""
    bench(tyro.cli(BenchCodec, description=__doc__))


def bench(config: BenchCodec) -> None:
    """Measure and report."""
    from tailcache.pipeline.capture import capture_rows
    from tailcache.pipeline.draws import draw_key
    from tailcache.pipeline.load_teacher import load_teacher
    from tailcache.pipeline.prepare import prepare
    from tailcache.storage.reader import open_cache

    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        prepare(docstring_corpus(Path(folder), max_tokens=config.positions))
        corpus = open_cache(folder).corpus
        teacher = load_teacher(str(smollm2()), vocab_size=corpus.vocab_size, dtype="bfloat16")
        targets, _ = capture_rows(
            teacher,
            corpus.rows(0, corpus.num_rows),
            first_target=0,
            key=draw_key(corpus.hash, 0),
            top_k=config.top_k,
            num_samples=config.num_samples,
            batch_positions=4096,
        )
        counts = corpus.token_counts
    levels = logprob_levels(config.top_k)
    codec = Codec(vocabulary_order(targets.token_ids, counts), levels)
    start = time.perf_counter()
    encoded = codec.encode(targets)
    middle = time.perf_counter()
    decoded = codec.decode(encoded)
    end = time.perf_counter()
    error = _kl(targets, decoded)
    stored = {name: _bytes(name, values) for name, values in encoded.items()}
    total = sum(stored.values())
    ranks = Codec(vocabulary_order(np.empty(0, np.int64), counts), levels).encode(targets)["token_codes"]
    plain = codec.encode(_without_ties(targets))["token_codes"]
    figures: dict[str, Any] = {
        "positions": len(targets),
        "top_k": config.top_k,
        "num_samples": config.num_samples,
        "bytes_per_position": {**stored, "all": total},
        "kl_error_nats": {"mean": float(error.mean()), "max": float(error.max())},
        "encode_us_per_position": (middle - start) / len(targets) * 1e6,
        "decode_us_per_position": (end - middle) / len(targets) * 1e6,
        "rejected": {
            "even steps of 1/32 nat": _even_steps(targets, 1 / 32),
            "even steps of 1/64 nat": _even_steps(targets, 1 / 64),
            "all in chunks of 4,096, bytes": sum(_bytes(n, v, chunk=4096) for n, v in encoded.items()),
            "all in chunks of 16,384, bytes": sum(_bytes(n, v, chunk=16_384) for n, v in encoded.items()),
            "all at compression level 5, bytes": sum(_bytes(n, v, level=5) for n, v in encoded.items()),
            "ids ranked by corpus counts, bytes": _bytes("token_codes", ranks),
            "ids without differences inside a level, bytes": _bytes("token_codes", plain),
        },
        "head": _head(config),
    }
    bars = [
        Bar(name="mean KL error (nats)", value=float(error.mean()), limit=1e-5, at_most=True),
        Bar(name="largest KL error (nats)", value=float(error.max()), limit=1e-3, at_most=True),
    ]
    if (config.top_k, config.num_samples) in ((64, 16), (50, 0)):
        limit = 140.0 if config.num_samples else 95.0
        bars.append(Bar(name="bytes per position", value=total, limit=limit, at_most=True))
    report("bench_codec", figures, bars, json_path=config.json, check=config.check)


def _bytes(name: str, values: NDArray[Any], *, chunk: int = CHUNK, level: int = LEVEL) -> float:
    """Bytes per position of one field, as one shard object."""
    columns = values.shape[1] if values.ndim > 1 else None
    spec = ArraySpec(
        name=name,
        dtype=str(values.dtype),
        columns=columns,
        chunk=chunk,
        shard=-(-len(values) // chunk) * chunk,
        column_major=name in ("logprob_gaps", "tail_sample_codes"),
        level=level,
    )
    return len(spec.encode(values) or b"") / len(values)


def _normalised(targets: Targets) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Head and tail log-probs in float64 that sum to one."""
    head, tail = targets.logprobs.astype(np.float64), targets.log_tail.astype(np.float64)
    log_sum = np.log(np.exp(head).sum(axis=1) + np.exp(tail))
    return head - log_sum[:, None], tail - log_sum


def _kl(targets: Targets, decoded: Targets) -> NDArray[np.float64]:
    """KL of the K + 1 atoms, original against decoded, matched by token id."""
    head, tail = _normalised(targets)
    a, b = np.argsort(targets.token_ids, axis=1), np.argsort(decoded.token_ids, axis=1)
    head = np.take_along_axis(head, a, axis=1)
    other = np.take_along_axis(decoded.logprobs.astype(np.float64), b, axis=1)
    result: NDArray[np.float64] = (np.exp(head) * (head - other)).sum(axis=1)
    return result + np.exp(tail) * (tail - decoded.log_tail)


def _even_steps(targets: Targets, step: float) -> dict[str, float]:
    """Gaps of log-probs rounded to even steps, the head rescaled in the same way."""
    head, tail = _normalised(targets)
    rounded = np.round(-head / step).astype(np.int64)
    other = -rounded * step
    other += (np.log(-np.expm1(tail)) - np.log(np.exp(other).sum(axis=1)))[:, None]
    error = (np.exp(head) * (head - other)).sum(axis=1)
    gaps = np.diff(rounded, axis=1, prepend=0).astype(np.uint16)
    return {"bytes": _bytes("logprob_gaps", gaps), "kl_mean": float(error.mean()), "kl_max": float(error.max())}


def _without_ties(targets: Targets) -> Targets:
    """The same ids with log-probs so far apart that no two share a level."""
    apart = -np.arange(targets.token_ids.shape[1], dtype=np.float32)[None, :].repeat(len(targets), axis=0)
    fields = {name: getattr(targets, name) for name in targets.__dataclass_fields__}
    return Targets(**{**fields, "logprobs": apart - 0.5})


def _head(config: BenchCodec) -> dict[str, Any]:
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
