"""Bytes, error and speed of what a cache stores, beside other tools' schemes on the same positions.

Two teachers are run over docstrings: SmolLM2-135M-Instruct (V = 49,152), and a small model with V = 151,936 that is
trained here for a few minutes on the same text (``scripts.wide_teacher``). Their float32 targets are stored as capture
would store them, at three budgets of KL error, in format version 1 for comparison, and by the schemes of
``scripts.storage_schemes``. Lists of classes, which are stored once, are counted, shared out over the positions.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.scripts.embedded import docstring_corpus, smollm2
from tailcache.scripts.measure import Bar, benchmark, report
from tailcache.scripts.storage_schemes import Scheme, atoms_kl, other_schemes
from tailcache.scripts.wide_teacher import VOCAB_SIZE, spread_tokens, train_wide
from tailcache.storage.arrays import ArraySpec
from tailcache.storage.classes import plan_classes
from tailcache.storage.codec import Targets, codec_of, learn_constants, logprob_levels, sample_places, scalar_steps
from tailcache.storage.fixed_point import float_of
from tailcache.storage.layout import Layout

__all__ = ["BenchStorage", "main"]

BUDGETS = (1e-5, 1e-4, 1e-3)
_CHUNK = 8192
_SAMPLED_IDS = 12
_SHARE, _ERROR_SHARE = 0.65, 0.1  # of the polynomial scheme's bytes and error
_SCALARS = ("tail_logit", "tail_entropy", "target_logit", "log_tail", "log_target", "log_not_target")


@dataclass(frozen=True, kw_only=True)
class BenchStorage:
    """Bytes per position by field, KL error and speed of the codec, beside other tools' schemes."""

    top_k: int = 50
    """Tokens kept."""

    num_samples: int = 64
    """Draws from the tail."""

    positions: int = 48_000
    """Tokens of the corpus, about."""

    wide_seconds: float = 240.0
    """How long the teacher with the large vocabulary is trained; 0: it is left out."""

    wide_positions: int = 24_000
    """Its positions, about."""

    repeats: int = 5
    """Timings of each step, of which the median is taken."""

    json: Path | None = None
    """Write figures and conditions to this file."""

    check: bool = False
    """Exit with status 1 where a bar is missed."""


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_storage``."""
    benchmark("bench_storage", BenchStorage, bench, __doc__, may_be_zero=("wide_seconds",))


def bench(config: BenchStorage) -> None:
    """Measure and report."""
    from tailcache.pipeline.prepare import prepare
    from tailcache.storage.reader import open_cache

    figures: dict[str, Any] = {"top_k": config.top_k, "num_samples": config.num_samples}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        prepare(docstring_corpus(Path(folder) / "cache", max_tokens=config.positions))
        corpus = open_cache(Path(folder) / "cache").corpus
        rows, counts = corpus.rows(0, corpus.num_rows), corpus.token_counts
        targets = _capture(config, str(smollm2()), rows, corpus.vocab_size, "auto", corpus.hash)
        figures["SmolLM2"] = _measure(config, targets, counts, "SmolLM2", bars)
        if config.wide_seconds > 0:
            spread = np.zeros(VOCAB_SIZE, np.int64)
            spread[spread_tokens(np.arange(len(counts)))] = counts
            tokens = spread_tokens(rows.tokens)
            loss = train_wide(Path(folder) / "wide", tokens, seconds=config.wide_seconds)
            last = max(1, min(len(rows), int(np.searchsorted(rows.offsets, config.wide_positions))))
            some = replace(rows, tokens=tokens).slice(0, last)
            targets = _capture(config, str(Path(folder) / "wide"), some, VOCAB_SIZE, "float32", corpus.hash)
            figures["wide"] = {"loss": loss, **_measure(config, targets, spread, "wide", bars)}
    report("bench_storage", figures, bars, json_path=config.json, check=config.check)


def _capture(config: BenchStorage, source: str, rows: Any, vocab_size: int, dtype: str, corpus_hash: str) -> Targets:
    from tqdm import tqdm

    from tailcache.pipeline.capture import capture_rows
    from tailcache.pipeline.draws import draw_key
    from tailcache.pipeline.load_teacher import load_teacher

    teacher = load_teacher(source, vocab_size=vocab_size, dtype=dtype)
    with tqdm(total=int(rows.supervised.sum()), unit="pos", desc=f"targets, V = {vocab_size}") as bar:
        return capture_rows(
            teacher,
            rows,
            first_target=0,
            key=draw_key(corpus_hash, 0),
            top_k=config.top_k,
            num_samples=config.num_samples,
            batch_positions=4096,
            progress=bar.update,
        )[0]


def _layout(
    targets: Targets,
    vocab_size: int,
    kl_budget: float,
    version: int,
    classes: tuple[int, int] | None = None,
    chunk: int = _CHUNK,
) -> Layout:
    """As capture would plan it for a corpus of these positions in one shard."""
    num, top_k = targets.token_ids.shape
    if version == 1:
        classes = (1, 0)
    if classes is None:
        classes = plan_classes(vocab_size=vocab_size, top_k=top_k, num_positions=num, first_positions=num)
    chunk = min(chunk, num)
    return Layout(
        vocab_size=vocab_size, top_k=top_k, num_samples=targets.num_samples,
        num_levels=len(logprob_levels(top_k, kl_budget)), num_rows=1, num_positions=num, rows_per_shard=1,
        shard_slots=-(-num // chunk) * chunk, chunk=chunk, compression_level=9, num_classes=classes[0],
        class_size=classes[1], scalar_steps=scalar_steps(kl_budget), kl_budget=kl_budget, format_version=version,
    )  # fmt: skip


def _measure(
    config: BenchStorage, targets: Targets, counts: NDArray[np.int64], name: str, bars: list[Bar]
) -> dict[str, Any]:
    head_TK, tail_T = targets.logprobs.astype(np.float64), targets.log_tail.astype(np.float64)
    others = other_schemes(targets.token_ids, head_TK, tail_T, len(counts))
    ours = {f"kl_budget {budget:g}": _stored(config, targets, counts, budget, 2) for budget in BUDGETS}
    ours["version 1"] = _stored(config, targets, counts, BUDGETS[0], 1)
    bars += _bars(name, ours, others)
    rejected = _rejected(targets, counts) if name == "SmolLM2" else {}
    return {
        "positions": len(targets),
        "vocab_size": len(counts),
        **ours,
        "rejected, bytes": rejected,
        "even steps": {f"1/{steps} nat": _even_steps(targets, 1 / steps) for steps in (32, 64)},
        "other schemes": {
            scheme: {
                "bytes": found.bytes_per_position,
                "kl_mean": float(found.kl.mean()),
                "kl_max": float(found.kl.max()),
            }
            for scheme, found in others.items()
        }
        | {f"{_SAMPLED_IDS} sampled ids": {"bytes": 3 * _SAMPLED_IDS}},
    }


def _stored(
    config: BenchStorage, targets: Targets, counts: NDArray[np.int64], kl_budget: float, version: int
) -> dict[str, Any]:
    """What one teacher's targets take, lose and cost, stored in one shard."""
    layout = _layout(targets, len(counts), kl_budget, version)
    num = len(targets)
    start = time.perf_counter()
    learned = learn_constants(layout, targets, counts)
    codec = codec_of(layout, learned)
    learning = time.perf_counter() - start
    encoded, encode_us = _timed(lambda: codec.encode(targets), num, config.repeats)
    specs = layout.fields()
    objects: dict[str, bytes] = {}
    start = time.perf_counter()
    for name, values in encoded.items():
        objects[name] = specs[name].encode(values) or b""
    compress_us = (time.perf_counter() - start) / num * 1e6
    # As the reader hands them over: what is stored column by column lies so in memory.
    held = {name: np.asfortranarray(values) if specs[name].column_major else values for name, values in encoded.items()}
    decoded = codec.decode(held)
    parts = [{name: values[first : first + _CHUNK] for name, values in held.items()} for first in range(0, num, _CHUNK)]
    decode_us = _timed(lambda: [len(codec.decode(part)) for part in parts], num, config.repeats)[1]
    error = atoms_kl(
        targets.logprobs.astype(np.float64), decoded.log_tail.astype(np.float64), _matched(targets, decoded)
    )
    error += _tail_kl(targets, decoded)
    sizes = {name: len(data) / num for name, data in objects.items()}
    tables = {name: _table_bytes(layout.constants()[name], learned[name]) / num for name in layout.learned}
    head = sum(size for name, size in sizes.items() if name != "tail_sample_codes") + tables.get("class_tokens", 0.0)
    return {
        "bytes": sizes,
        "ids": sizes["token_codes"] + sizes.get("position_class", 0.0) + tables.get("class_tokens", 0.0),
        "log-probs": sizes["logprob_gaps"],
        "scalars": sum(sizes.get(name, 0.0) for name in (*_SCALARS, "tail_entropy")) - sizes["tail_entropy"],
        "samples": sizes.get("tail_sample_codes", 0.0),
        "all but samples": head,
        "all": head + sizes.get("tail_sample_codes", 0.0),
        "constants": tables,
        "classes": [layout.num_classes, layout.class_size],
        "kl_mean": float(error.mean()),
        "kl_max": float(error.max()),
        "learn_seconds": learning,
        "encode_us": encode_us,
        "compress_us": compress_us,
        "decode_us": decode_us,
        "read_us": _read_us(layout, specs, objects, num, config.repeats),
    }


def _rejected(targets: Targets, counts: NDArray[np.int64]) -> dict[str, float]:
    """Bytes per position of parts of what is stored at the default budget, had something been decided otherwise."""
    num, budget = len(targets), BUDGETS[0]

    def fields(layout: Layout, part: slice = slice(None), learned_from: slice = slice(None)) -> dict[str, Any]:
        learned = learn_constants(layout, targets[learned_from], counts)
        return codec_of(layout, learned).encode(targets[part])

    def size(spec: ArraySpec, values: NDArray[Any]) -> float:
        return len(spec.encode(values) or b"") / len(values)

    found, usual = {}, _layout(targets, len(counts), budget, 2)
    specs, encoded = usual.fields(), fields(usual)
    for classes in ((1, 0), (8, 1024), (32, 512), (64, 512), (128, 512), (128, 1024)):
        if 2 * classes[1] <= len(counts):
            layout = _layout(targets, len(counts), budget, 2, classes)
            ids = {n: v for n, v in fields(layout).items() if n in ("token_codes", "position_class")}
            total = sum(size(layout.fields()[name], values) for name, values in ids.items())
            tables = 0.0
            if classes[0] > 1:
                lists = learn_constants(layout, targets, counts)["class_tokens"]
                tables = _table_bytes(layout.constants()["class_tokens"], lists) / num
            found[f"ids, {classes[0]} classes of {classes[1]}"] = total + tables
    half = slice(0, num // 2), slice(num // 2, num)
    for name, layout in (("one order", _layout(targets, len(counts), budget, 2, (1, 0))), ("classes", usual)):
        ids = {n: v for n, v in fields(layout, half[1], half[0]).items() if n in ("token_codes", "position_class")}
        total = sum(size(layout.fields()[field], values) for field, values in ids.items())
        found[f"ids of the second half, {name} of the first"] = total
    found["ids, stored rank by rank"] = size(replace(specs["token_codes"], column_major=True), encoded["token_codes"])
    found["ids, stored position by position"] = size(specs["token_codes"], encoded["token_codes"])
    found["gaps, not in blocks"] = size(replace(specs["logprob_gaps"], block_bytes=0), encoded["logprob_gaps"])
    found["scalars, float32 in the same steps"] = 0.0
    for name in ("tail_logit", "tail_entropy", "target_logit"):
        values = float_of(encoded[name], usual.scalar_steps, name)
        kinds = [replace(specs[name], dtype="float32", shuffle=shuffle) for shuffle in ("shuffle", "bitshuffle")]
        found["scalars, float32 in the same steps"] += min(size(spec, values) for spec in kinds)
    if targets.num_samples:
        own_order = encoded["tail_sample_codes"][:, sample_places(targets.num_samples)]
        found["draws, in their own order"] = size(specs["tail_sample_codes"], own_order)
    for chunk in (4096, 16_384):
        layout = _layout(targets, len(counts), budget, 2, chunk=chunk)
        found[f"all, chunks of {chunk}"] = sum(size(layout.fields()[n], values) for n, values in encoded.items())
    return found


def _timed(function: Callable[[], Any], num: int, repeats: int) -> tuple[Any, float]:
    """A result, and the median of its times in microseconds a position."""
    result, times = function(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append((time.perf_counter() - start) / num * 1e6)
    return result, statistics.median(times)


def _read_us(layout: Layout, specs: dict[str, ArraySpec], objects: dict[str, bytes], num: int, repeats: int) -> float:
    """Decompressing all fields of the shard, from files in memory; without decoding."""
    from tailcache.storage.local_place import LocalPlace
    from tailcache.storage.objects import read_object

    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        place = LocalPlace(Path(folder))
        for name, data in objects.items():
            path = Path(folder) / specs[name].object_path(0)
            path.parent.mkdir(parents=True)
            path.write_bytes(data)
        return _timed(
            lambda: [read_object(place, specs[name].object_path(0), specs[name], 0, num, name) for name in objects],
            num,
            repeats,
        )[1]


def _table_bytes(spec: ArraySpec, values: NDArray[Any]) -> int:
    return len(spec.encode(values) or b"")


def _matched(targets: Targets, decoded: Targets) -> NDArray[np.float64]:
    """[T, K] decoded log-probabilities in the order of the original ids."""
    theirs = np.argsort(decoded.token_ids, axis=1)
    place = np.argsort(np.argsort(targets.token_ids, axis=1), axis=1)
    sorted_TK = np.take_along_axis(decoded.logprobs.astype(np.float64), theirs, axis=1)
    found: NDArray[np.float64] = np.take_along_axis(sorted_TK, place, axis=1)
    return found


def _tail_kl(targets: Targets, decoded: Targets) -> NDArray[np.float64]:
    """[T] what is missing of the KL of K + 1 atoms if both sides' tails are taken to be the decoded one."""
    head_TK = targets.logprobs.astype(np.float64)
    exact, found = targets.log_tail.astype(np.float64), decoded.log_tail.astype(np.float64)
    own = np.log(np.exp(head_TK).sum(axis=1) + np.exp(exact))
    mixed = np.log(np.exp(head_TK).sum(axis=1) + np.exp(found))
    missing: NDArray[np.float64] = np.exp(exact) * (exact - found) - own + mixed
    return missing


def _even_steps(targets: Targets, step: float) -> dict[str, float]:
    """Gaps of log-probs rounded to even steps, the head rescaled in the same way."""
    head = targets.logprobs.astype(np.float64)
    rounded = np.round(-head / step).astype(np.int64)
    shift: NDArray[np.float64] = np.log(-np.expm1(targets.log_tail.astype(np.float64)))
    shift -= np.log(np.exp(-rounded * step).sum(axis=1))
    error = atoms_kl(head, targets.log_tail.astype(np.float64), shift[:, None] - rounded * step)
    gaps = np.diff(rounded, axis=1, prepend=0).astype(np.uint16)
    chunk = min(_CHUNK, len(gaps))
    spec = ArraySpec(
        name="gaps", dtype="uint16", columns=gaps.shape[1], chunk=chunk, shard=-(-len(gaps) // chunk) * chunk,
        column_major=True, level=9, block_bytes=1 << 15,
    )  # fmt: skip
    return {
        "bytes": len(spec.encode(gaps) or b"") / len(gaps),
        "kl_mean": float(error.mean()),
        "kl_max": float(error.max()),
    }


def _bars(name: str, ours: dict[str, dict[str, Any]], others: dict[str, Scheme]) -> list[Bar]:
    """The promises: of each budget, and against the polynomial scheme."""
    bars = []
    for budget in BUDGETS:
        mean = ours[f"kl_budget {budget:g}"]["kl_mean"]
        bars.append(Bar(name=f"{name}, budget {budget:g}: mean KL error", value=mean, limit=budget, at_most=True))
    largest = ours[f"kl_budget {BUDGETS[0]:g}"]["kl_max"]
    bars.append(Bar(name=f"{name}: largest KL error at the default", value=largest, limit=1e-3, at_most=True))
    if "polynomial" in others:
        fit, found = others["polynomial"], ours[f"kl_budget {BUDGETS[1]:g}"]
        size, error = _SHARE * fit.bytes_per_position, _ERROR_SHARE * float(fit.kl.mean())
        at = f"{name}, budget {BUDGETS[1]:g}"
        bars.append(Bar(name=f"{at}: bytes but samples", value=found["all but samples"], limit=size, at_most=True))
        bars.append(Bar(name=f"{at}: KL error against polynomial", value=found["kl_mean"], limit=error, at_most=True))
    return bars


if __name__ == "__main__":
    main()
