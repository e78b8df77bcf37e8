"""What a cache's bytes buy: the error of a student's gradient against bytes per position.

The gradient is that of the student's LM head, dW = sum_t g_t (x) h_t, exact from all of the teacher on one side, from
what is stored on the other; error is |difference| / |exact| (Frobenius), of sums over 512, 2,048 and 8,192 held-out
positions in random order. Losses: KL, and TAD split at K' = min(10, K) with beta = 2. Bytes are what the real codec
and the real arrays take for the fields that are needed, on the same positions, in the corpus' order.

Three students: one initialised at random; the same after some minutes of training here (cross-entropy + exact KL to
the live teacher); and, to stand for one that has nearly converged, the teacher itself with the weights of its linear
layers rounded to a few bits (its head is the teacher's own, so this is a copy being distilled back, not a small model
trained to the end). KL of each is printed.

Beside the grid of K and m stand other tools' layouts on the same positions: top-K renormalised (DistillKit:
ceil(K ceil(log2 V) / 8) + 14 bytes), top-K and a ghost token (Megatron-LM: 33 bits per id, and after zstd), RS-KD's 50
draws (3 bytes per different id; KL only, since it has no head to split at); and a copy of all the information, hidden
states in 8 bits beside the largest K (bf16 would be exact: the teacher runs in bfloat16). Their own rounding of
log-probs is not charged to them. ``fidelity_schemes`` says which sampling schemes are compared.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailcache.pipeline.config import CaptureConfig
from tailcache.scripts.embedded import docstring_corpus, smollm2
from tailcache.scripts.fidelity_gradients import Error, Pool, Problem, Student, Weighting, pools
from tailcache.scripts.fidelity_report import (
    FRONTIERS,
    HEADER,
    KNOWN,
    LOSSES,
    STORED,
    Entry,
    at_largest,
    bars,
    compared,
    frontier,
    plot,
)
from tailcache.scripts.fidelity_schemes import SCHEMES, Draws, Tails, variance
from tailcache.scripts.measure import benchmark, report
from tailcache.storage.errors import ConfigError
from tailcache.trainers.tad import log_adaptive_beta

__all__ = ["BenchFidelity", "bench", "main", "make_problem", "measure", "quick"]

SPLIT, BETA = 10, 2.0
RSKD_DRAWS = 50


@dataclass(frozen=True, kw_only=True)
class BenchFidelity:
    """Gradient error against bytes per position."""

    top_ks: tuple[int, ...] = (8, 16, 32, 64)
    """K, ids kept."""

    num_samples: tuple[int, ...] = (8, 16, 32, 64)
    """m, draws from the tail; powers of two. 0 is always measured, with a bucket and with the mean tail."""

    positions: tuple[int, ...] = (512, 2048, 8192)
    """Positions pooled."""

    study_top_ks: tuple[int, ...] = (16, 64)
    """K at which all sampling schemes are compared."""

    seeds: int = 8
    """Repetitions of all draws."""

    max_tokens: int = 40_000
    """Tokens of the corpus, about."""

    held_out: float = 0.28
    """Share of its documents that are not trained on; the positions are theirs."""

    epochs: float = 5.0
    """Passes of the trained student over the rest."""

    hidden_size: int = 192
    """Width of the students that are not the teacher."""

    num_layers: int = 4
    """Their layers."""

    weight_bits: int = 6
    """Bits of the rounded teacher's weights, in groups of 32."""

    threads: int | None = None
    """CPU threads; by default what torch chooses."""

    quick: bool = False
    """A small run, to see that it runs: three hundred positions, two seeds."""

    plot: Path | None = None
    """Draw the curves into this PNG file."""

    json: Path | None = None
    """Write figures and conditions to this file."""

    check: bool = False
    """Exit with status 1 where a bar is missed."""


def quick(config: BenchFidelity) -> BenchFidelity:
    """The same settings, made small; the defaults of capture are still among them."""
    defaults = CaptureConfig(cache=Path(), teacher="", name="")
    return replace(
        config, top_ks=(8, defaults.top_k), num_samples=(defaults.num_samples,), positions=(64, 256),
        study_top_ks=(defaults.top_k,), seeds=2, max_tokens=3_000,
        held_out=0.4, epochs=0.5, hidden_size=32, num_layers=1,
    )  # fmt: skip


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_fidelity``."""
    benchmark("bench_fidelity", BenchFidelity, bench, __doc__, may_be_zero=("epochs",))


def bench(config: BenchFidelity) -> None:
    """Measure and report."""
    from tailcache.pipeline.prepare import prepare
    from tailcache.storage.reader import open_cache

    if config.quick:
        config = quick(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="tailcache-bench-") as folder:
        prepare(replace(docstring_corpus(Path(folder), max_tokens=config.max_tokens), held_out=config.held_out))
        entries, kl, noise = _measure_all(config, open_cache(folder).corpus)
    if config.plot is not None:
        config.plot.parent.mkdir(parents=True, exist_ok=True)
        config.plot.write_bytes(plot(entries, kl))
    figures: dict[str, Any] = {
        "kl_of_students": kl,
        "variance of the draws / of the labels, TAD": noise,
        "table": [HEADER, *map(str, entries)],
        "frontier": {
            f"{student}, {loss}, {name}": [
                f"K = {e.top_k}, m = {e.num_samples} ({e.what}): {e.bytes:.1f} B, {e.relative:.4g}"
                for e in frontier(at_largest(entries, student, loss, whats))
            ]
            for student, loss in itertools.product(kl, LOSSES)
            for name, whats in FRONTIERS.items()
        },
        "schemes": list(compared(entries)),
    }
    report("bench_fidelity", figures, bars(entries), json_path=config.json, check=config.check)


def _wanted(config: BenchFidelity) -> list[tuple[str, int, int]]:
    """(scheme, K, m) to draw."""
    everywhere = (STORED, "systematic")
    return [
        (scheme, top_k, num_draws)
        for scheme in SCHEMES
        for top_k, num_draws in itertools.product(config.top_ks, config.num_samples)
        if scheme in everywhere or top_k in config.study_top_ks
    ]


def _measure_all(config: BenchFidelity, corpus: Any) -> tuple[list[Entry], dict[str, float], dict[str, float]]:
    """All entries, the KL of each student, and how the draws' variance compares with that of the labels."""
    from tailcache.pipeline.load_teacher import load_teacher
    from tailcache.pipeline.teacher import Teacher
    from tailcache.scripts import fidelity_positions as real

    def say(text: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {text}", file=sys.stderr, flush=True)

    start, num, vocab_size = time.perf_counter(), config.positions[-1], corpus.vocab_size
    rows = corpus.rows(0, corpus.num_rows)
    held_out, others = real.rows_where(rows, rows.held_out), real.rows_where(rows, ~rows.held_out)
    next_T, segments_T = (values[:num] for values in real.targets_of(held_out))
    if len(next_T) < num:
        raise ConfigError(
            f"max_tokens: expected at least {num} held-out positions, found {len(next_T)}; raise --max-tokens or "
            "--held-out"
        )
    teacher = load_teacher(str(smollm2()), vocab_size=vocab_size)
    hidden_TD, others_ND = real.run_trunk(teacher, held_out)[:num], real.run_trunk(teacher, others)
    say(f"teacher run over {num} positions to be measured and {len(others_ND)} others")
    side = real.teacher_side(
        real.probabilities(teacher, hidden_TD),
        next_T,
        num_ranks=max(config.top_ks) + max(config.num_samples),
        wanted=[*_wanted(config), ("independent", 0, RSKD_DRAWS)],
        num_seeds=config.seeds,
        seed=0,
    )
    say("distributions sorted and drawn from")
    some = min(num, len(others_ND))
    seen_ids, mean_tail = real.seen_elsewhere(real.probabilities(teacher, others_ND), some, config.top_ks)
    storage = real.Bytes(corpus, side.tails, next_T, side.next_p, seen_ids.numpy())
    hidden = storage.hidden_int8(hidden_TD)
    sizes = _sizes(side.draws, side.tails, storage, hidden, vocab_size, config)
    say("bytes counted")
    # Pools are of positions from everywhere, as a training batch is, not of the first documents.
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    hidden_TD = hidden_TD[order]
    problem = make_problem(
        side.tails,
        next_T,
        side.next_p,
        segments_T,
        mean_tail,
        order,
        top_ks=config.top_ks,
        teacher=real.probabilities(teacher, hidden_TD),
        rounded=real.probabilities(teacher, real.int8_rounded(hidden_TD)),
    )
    draws = {key: each.rows(order) for key, each in side.draws.items()}
    entries: list[Entry] = []
    kl: dict[str, float] = {}

    def add(name: str, model: Teacher) -> None:
        student_TD = real.run_trunk(model, held_out)[:num][order]
        student = Student(hidden_TD=student_TD, probabilities=real.probabilities(model, student_TD))
        kl[name] = real.mean_kl(problem.teacher, student.probabilities, num)
        entries.extend(measure(name, problem, student, draws, sizes, config))
        say(f"{name}: KL {kl[name]:.3f}, measured")

    small = real.small_student(vocab_size, hidden_size=config.hidden_size, num_layers=config.num_layers, seed=1)
    add("untrained", Teacher(small, vocab_size=vocab_size))
    seen_by_student = real.train(
        small, others, lambda index: real.probabilities(teacher, others_ND[index])(slice(None)), epochs=config.epochs
    )
    say(f"student trained on {seen_by_student} positions")
    add("half-trained", Teacher(small, vocab_size=vocab_size))
    rounded = load_teacher(str(smollm2()), vocab_size=vocab_size, weight_bits=config.weight_bits)
    add("nearly converged", rounded)
    return entries, kl, _noise(problem, config)


def make_problem(
    tails: Tails,
    next_T: Tensor,
    next_p: Tensor,
    segments_T: Tensor,
    mean_tail: dict[int, Tensor],
    order: Tensor,
    *,
    top_ks: Sequence[int],
    teacher: Any,
    rounded: Any,
) -> Problem:
    """Weigh the positions as the losses do, and put them into the order in which they are pooled.

    Args:
      tails: in the corpus' order, as all that follows.
      next_T: [T] true next tokens.
      next_p: [T] their probabilities.
      segments_T: [T] which document each position belongs to, for beta(X).
      mean_tail: by K.
      order: [T] the pooled order.
      top_ks: K to be compared.
      teacher: rows of the pooled order to probabilities.
      rounded: the same from rounded hidden states.
    """
    weightings, renormalised = {}, {}
    for top_k in top_ks:
        split = min(SPLIT, top_k)
        log_beta_T = log_adaptive_beta(tails.mass[:, split].log(), segments_T, beta=BETA)
        beta_T = log_beta_T.exp().float()[order]
        weightings["TAD", top_k] = Weighting(name="TAD", split=split, beta=beta_T)
        weightings["KL", top_k] = Weighting(name="KL", split=None, beta=torch.ones_like(beta_T))
        p_TK = tails.p[:, :top_k]
        log_alpha_T = (p_TK[:, split:].sum(-1) / p_TK.sum(-1)).log()
        renormalised[top_k] = log_adaptive_beta(log_alpha_T, segments_T, beta=BETA).exp()[order]
    return Problem(
        tails=tails.rows(order),
        next_T=next_T[order],
        next_p=next_p[order],
        weightings=weightings,
        renormalised_beta=renormalised,
        mean_tail=mean_tail,
        teacher=teacher,
        rounded=rounded,
    )


def _sizes(
    draws: dict[tuple[str, int, int], Draws],
    tails: Tails,
    storage: Any,
    hidden: float,
    vocab_size: int,
    config: BenchFidelity,
) -> dict[tuple[str, int, int], float]:
    """Bytes per position by (what, K, m)."""
    from tailcache.scripts.fidelity_positions import megatron_bytes

    sizes = {}
    for top_k in config.top_ks:
        head = storage.head(top_k)
        for what in ("bucket", "prior"):
            sizes[what, top_k, 0] = head
        id_bits = math.ceil(math.log2(vocab_size))
        sizes["renormalised (DistillKit)", top_k, 0] = float(math.ceil(top_k * id_bits / 8) + 14)
        raw, packed = megatron_bytes(tails, top_k)
        sizes["ghost token (Megatron-LM)", top_k, 0] = raw
        sizes["ghost token (Megatron-LM zstd)", top_k, 0] = packed
        sizes["hidden int8", top_k, 0] = head + hidden
    for (scheme, top_k, num_draws), each in draws.items():
        if scheme == "threshold":
            sizes[scheme, top_k, num_draws] = storage.head(top_k) + storage.threshold_draws(top_k, each)
        elif top_k:
            sizes[scheme, top_k, num_draws] = storage.head(top_k) + storage.draws(top_k, each)
            sizes[scheme + KNOWN, top_k, num_draws] = sizes[scheme, top_k, num_draws]
        else:
            different = [len(set(row)) for row in each.ids[0].tolist()]
            sizes["RS-KD", 0, num_draws] = 3 * statistics.fmean(different)
    return sizes


def measure(
    name: str,
    problem: Problem,
    student: Student,
    draws: dict[tuple[str, int, int], Draws],
    sizes: dict[tuple[str, int, int], float],
    config: BenchFidelity,
) -> Iterator[Entry]:
    """All entries of one student.

    Args:
      name: the student's.
      problem: the teacher's side, in the pooled order.
      student: in the same order.
      draws: by (scheme, K, m), in the same order.
      sizes: bytes per position by (what, K, m).
      config: which K, m, pools and seeds.
    """
    norms_T = student.hidden_TD.double().square().sum(-1)

    def entry(what: str, loss: str, top_k: int, num_draws: int, pool: Pool, errors: Sequence[Error]) -> Entry:
        relative = [error.relative for error in errors]
        return Entry(
            student=name,
            loss=loss,
            positions=pool.num,
            what=what,
            top_k=top_k,
            num_samples=num_draws,
            bytes=sizes[what, top_k, num_draws],
            relative=statistics.fmean(relative),
            spread=statistics.stdev(relative) if len(relative) > 1 else 0.0,
            cosine=statistics.fmean(error.cosine for error in errors),
            norm=math.sqrt(statistics.fmean(error.norm**2 for error in errors)),
            theory=_theory(what, loss, top_k, num_draws, pool, norms_T),
        )

    for pool in pools(problem, student, config.positions):
        last = pool.num == config.positions[-1]
        for top_k in config.top_ks:
            exacts = {loss: pool.exact(loss, top_k) for loss in LOSSES}
            for loss, exact in exacts.items():
                bucket = [pool.bucket(exact, loss, top_k)]
                for what in ("bucket", "ghost token (Megatron-LM)", "ghost token (Megatron-LM zstd)"):
                    yield entry(what, loss, top_k, 0, pool, bucket)
                yield entry("prior", loss, top_k, 0, pool, [pool.prior(exact, loss, top_k)])
                renormalised = [pool.renormalised(exact, loss, top_k)]
                yield entry("renormalised (DistillKit)", loss, top_k, 0, pool, renormalised)
                if top_k == max(config.top_ks):
                    yield entry("hidden int8", loss, top_k, 0, pool, [pool.from_hidden(exact, loss, top_k)])
            for scheme, num_draws in itertools.product(SCHEMES, config.num_samples):
                key = (scheme, top_k, num_draws)
                if key not in draws or not (last or scheme == STORED):
                    continue
                ways = {scheme: pool.sampled}
                if top_k in config.study_top_ks and scheme in ("independent", "systematic"):
                    ways[scheme + KNOWN] = pool.known_target
                for what, way in ways.items():
                    errors = [way(exacts, top_k, draws[key], seed) for seed in range(config.seeds)]
                    for loss in LOSSES:
                        yield entry(what, loss, top_k, num_draws, pool, [error[loss] for error in errors])
        rskd = draws["independent", 0, RSKD_DRAWS]
        unsplit = [pool.unsplit(*rskd.of(seed)) for seed in range(config.seeds)]
        yield entry("RS-KD", "KL", 0, RSKD_DRAWS, pool, unsplit)


def _theory(what: str, loss: str, top_k: int, num_draws: int, pool: Pool, norms_T: Tensor) -> float:
    """Square root of the expected squared error, sum_t beta_t^2 |h_t|^2 v_t; NaN where there is no closed form."""
    scheme = what.removesuffix(KNOWN)
    if scheme not in SCHEMES or scheme == "stratified":
        return math.nan
    known_T = pool.problem.known(top_k) if what.endswith(KNOWN) else None
    variance_T = variance(scheme, pool.problem.tails, top_k, num_draws, known_T=known_T)
    beta_T = pool.problem.weightings[loss, top_k].beta.double()
    return math.sqrt(float((beta_T.square() * norms_T * variance_T)[: pool.num].sum()))


def _noise(problem: Problem, config: BenchFidelity) -> dict[str, float]:
    """By setting: mean of beta(X)^2 v_t for systematic draws, over the mean of 1 - sum p^2, the variance of a label."""
    labels = float((1 - problem.tails.squares[:, 0]).mean())
    found = {}
    for top_k, num_draws in itertools.product(config.top_ks, config.num_samples):
        beta_T = problem.weightings["TAD", top_k].beta.double()
        draws_T = variance("systematic", problem.tails, top_k, num_draws)
        found[f"K = {top_k}, m = {num_draws}"] = float((beta_T.square() * draws_T).mean()) / labels
    return found


if __name__ == "__main__":
    main()
