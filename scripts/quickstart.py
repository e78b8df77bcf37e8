"""The whole path on a real teacher, in a quarter of an hour on two cores and without any download but packages.

    prepare   the docstrings of Python's standard library become a corpus
    capture   SmolLM2-135M-Instruct is run over it once; then the same model with its weights rounded to 3 bits
    train     three small students from the same shards: plain language modelling, vanilla KD, and TAD
    compare   the two teachers from their caches, and the students' held-out curves

Every step can be killed: the same command goes on where it was. Results are in runs/quickstart: results.json, the
plots, the cache and the students. All figures are printed as measured, whichever loss wins.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from tailcache.pipeline.config import CaptureConfig, CompareConfig
from tailcache.scripts.embedded import docstring_corpus, smollm2
from tailcache.storage.errors import TailcacheError
from tailcache.trainers.config import StudentConfig, TrainConfig

__all__ = ["Quickstart", "main", "quickstart"]

TEACHERS = {"smollm2": None, "smollm2-3bit": 3}
LOSSES = ("clm", "kd", "tad")
TITLES = {"clm": "CLM (no teacher)", "kd": "vanilla KD", "tad": "TAD (K = 10, β = 2)"}


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Prepare, capture two teachers, train three students, compare."""

    out: Path = Path("runs/quickstart")
    """Folder for the cache, the students, results.json and the plots."""

    max_tokens: int = 48_000
    """Tokens of the corpus; all of them are captured."""

    epochs: float = 3.0
    """Passes of each student over the training rows."""

    threads: int | None = None
    """CPU threads; by default what torch chooses."""


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.quickstart``."""
    try:
        quickstart(tyro.cli(Quickstart, description=__doc__))
    except TailcacheError as error:
        raise SystemExit(f"quickstart: {error}") from error


def quickstart(config: Quickstart) -> dict[str, Any]:
    """Run all four steps and write the results."""
    start = time.perf_counter()
    seconds: dict[str, float] = {}

    def step(name: str, say: str, do: Callable[[], Any]) -> Any:
        print(f"\n== {name}: {say}", flush=True)
        begin = time.perf_counter()
        result = do()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        return result

    cache = config.out / "cache"
    step(
        "prepare", "the docstrings of Python's standard library, tokenised and packed", partial(_prepare, config, cache)
    )
    for name, bits in TEACHERS.items():
        rounded = f", its weights rounded to {bits} bits per group of 32" if bits else ""
        step("capture", f"SmolLM2-135M-Instruct{rounded}", partial(_capture, config, cache, name, bits))
    for loss in LOSSES:
        step("train", f"a student with {TITLES[loss]}", partial(_train, config, cache, loss))
    comparison = step("compare", "the teachers, from their caches", partial(_compare, config, cache))
    students = _students(config)
    results = {
        "teachers": comparison,
        "students": students,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (config.out / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    _plot_students(config, students)
    print(f"\n== students on the held-out documents (uniform guessing: {_uniform(cache):.2f} nats)\n")
    print(_student_table(students))
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\n== done in {(time.perf_counter() - start) / 60:.1f} minutes ({took})")
    plots = ", ".join(path.name for path in sorted(config.out.glob("*.png")))
    print(f"   figures: {config.out / 'results.json'}; plots: {plots}")
    return results


def _prepare(config: Quickstart, cache: Path) -> None:
    from tailcache.scripts.prepare import run

    run(docstring_corpus(cache, max_tokens=config.max_tokens))


def _capture(config: Quickstart, cache: Path, name: str, bits: int | None) -> None:
    from tailcache.scripts.capture import run
    from tailcache.storage.reader import open_cache

    try:
        positions = open_cache(cache).teacher(name).num_targets
    except TailcacheError:
        run(
            CaptureConfig(
                cache=cache,
                teacher=str(smollm2()),
                name=name,
                weight_bits=bits,
                shard_positions=24_000,
                threads=config.threads,
            )
        )
    else:
        print(f"{name}: captured already, {positions:,} positions")


def _train(config: Quickstart, cache: Path, loss: str) -> None:
    from tailcache.trainers.run import train

    train(
        TrainConfig(
            cache=cache,
            out=config.out / "students" / loss,
            teacher="smollm2",
            student=StudentConfig(hidden_size=128, num_layers=3, num_heads=4),
            loss=loss,  # type: ignore[arg-type]
            top_k=10 if loss == "tad" else None,
            batch_rows=1,
            epochs=config.epochs,
            learning_rate=3e-3,
            warmup=0.1,
            eval_every=20,
            save_every=20,
            threads=config.threads,
            resume=True,
        )
    )


def _compare(config: Quickstart, cache: Path) -> dict[str, Any]:
    from tailcache.scripts.compare import run

    out = config.out / "compare.json"
    run(CompareConfig(cache=cache, teachers=tuple(TEACHERS), json=out, plots=config.out))
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _students(config: Quickstart) -> dict[str, list[dict[str, Any]]]:
    curves = {}
    for loss in LOSSES:
        lines = (config.out / "students" / loss / "metrics.jsonl").read_text().splitlines()
        curves[loss] = [json.loads(line) for line in lines]
    return curves


def _uniform(cache: Path) -> float:
    from tailcache.storage.reader import open_cache

    return math.log(open_cache(cache).corpus.vocab_size)


def _student_table(students: dict[str, list[dict[str, Any]]]) -> str:
    header = f"{'student':<22}{'positions seen':>16}{'cross-entropy':>16}{'KL to teacher':>16}{'top-1 agreement':>18}"
    lines = [header, "-" * len(header)]
    for loss, curve in students.items():
        last = curve[-1]
        lines.append(
            f"{TITLES[loss]:<22}{last['positions_seen']:>16,}{last['cross_entropy']:>12.3f} nat{last['kl']:>12.3f} nat"
            f"{last['top1_agreement']:>17.1%}"
        )
    teacher = next(iter(students.values()))[-1]["teacher_cross_entropy"]
    lines.append(f"{'teacher':<22}{'':>16}{teacher:>12.3f} nat{0.0:>12.3f} nat{1.0:>17.1%}")
    return "\n".join(lines)


def _plot_students(config: Quickstart, students: dict[str, list[dict[str, Any]]]) -> None:
    from tailcache.pipeline.plots import plot_curves

    for metric, label in (("kl", "KL to the teacher (nats)"), ("cross_entropy", "cross-entropy (nats)")):
        plot_curves(
            {TITLES[loss]: [(p["positions_seen"], p[metric]) for p in curve] for loss, curve in students.items()},
            title=f"Students from one cache: held-out {label.split(' (')[0]}",
            xlabel="training positions seen",
            ylabel=label,
            path=config.out / f"students_{metric}.png",
        )


if __name__ == "__main__":
    main()
