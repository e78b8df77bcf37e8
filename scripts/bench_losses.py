"""What a loss costs beyond cross-entropy, in time and memory: ``python -m tailcache.scripts.bench_losses``.

The baseline is a fused cross-entropy: chunked over positions, gradients made in the forward, the same matrix
products with float32 sums, written out here without any of this package's machinery for losses. Against it, on the
same hidden states and head, in turn: cross-entropy plus each loss through ``fused_loss``. Times are ratios to the
baseline's run of the same round, and the median over rounds is what counts. Memory is the peak above what was
there before (inputs included in "before"), gradients included.

``dense`` is what one would write without any of this: full logits, ``log_softmax``, gather, autograd. On a GPU
Liger-Kernel's fused linear JSD is measured too, where it is installed; it takes the live teacher's hidden states.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tailcache.scripts.measure import Bar, benchmark, peak_mib, report, reset_peak
from tailcache.trainers.atkd import atkd, group_weights
from tailcache.trainers.atoms import bucket_atoms
from tailcache.trainers.divergences import cross_entropy, reverse_kl
from tailcache.trainers.dkd import dkd, non_target_class_kl, target_class_kl
from tailcache.trainers.fused_loss import LossOfTerms, Mode, TiledSum, fused_loss, piece_height
from tailcache.trainers.linear_head import VOCABULARY_TILE, LinearHead, tiles_of
from tailcache.trainers.products import add_product, product
from tailcache.trainers.tad import log_adaptive_beta, log_teacher_tail, weighted_tad
from tailcache.trainers.tails import sampled
from tailcache.trainers.terms import StudentTerms, TeacherTerms
from tailcache.trainers.todi import todi

__all__ = ["BenchLosses", "Problem", "bench", "fused_cross_entropy", "main", "make_problem"]

TAD_TOP_K, TAD_BETA = 10, 2.0
LIGER = "liger fused linear jsd"
TIME_BARS = {
    "tad one-pass": 1.05,
    "tad recompute": 1.4,
    "dkd": 1.10,
    "atkd": 1.10,
    "todi bucket": 1.10,
    "reverse_kl bucket": 1.10,
}


@dataclass(frozen=True)
class Problem:
    """Hidden states and head of a student, and the targets of a teacher, for T positions."""

    hidden: Tensor
    weight: Tensor
    teacher: TeacherTerms
    segments: Tensor


def make_problem(
    positions: int, vocab_size: int, width: int, top_k: int, num_samples: int, *, device: str, dtype: torch.dtype
) -> Problem:
    """A problem of some size: random hidden states and head, targets that fall off as a power of the rank."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((positions, width), generator=generator).to(device, dtype)
    weight = (2 * width**-0.5 * torch.randn((vocab_size, width), generator=generator)).to(device, dtype)
    count = top_k + num_samples + 1
    steps = torch.randint(1, vocab_size // (count + 1), (positions, count), generator=generator)
    first = torch.randint(vocab_size, (positions, 1), generator=generator)
    ids = ((first + steps.cumsum(-1)) % vocab_size).to(device)  # distinct within a position
    next_tokens = torch.where(torch.rand(positions, generator=generator) < 0.75, 0, count - 1).to(device)
    logprobs = torch.log_softmax(-1.3 * torch.arange(1, 2 * top_k + 1, device=device).log(), -1)
    log_tail = logprobs[top_k:].logsumexp(-1)
    target = logprobs[0].where(next_tokens == 0, logprobs[-1])
    return Problem(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        teacher=TeacherTerms(
            vocab_size=vocab_size,
            token_ids=ids[:, :top_k],
            logprobs=logprobs[:top_k].expand(positions, -1),
            log_tail=log_tail.expand(positions),
            tail_entropy=torch.full((positions,), 6.0, device=device),
            tail_samples=ids[:, top_k : top_k + num_samples],
            log_target=target,
            log_not_target=torch.log1p(-target.exp()),
            next_tokens=ids.gather(-1, next_tokens[:, None])[:, 0],
        ),
        segments=torch.arange(positions, device=device) // 512,
    )


def fused_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, next_tokens_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and its gradients, some positions at a time: the baseline.

    Args:
      hidden_TD: [T, D].
      weight_VD: [V, D] of the same type.
      next_tokens_T: [T].

    Returns:
      Sum of the losses, and the gradients of it, in the types of their inputs.
    """
    (positions, width), vocab_size, dtype = hidden_TD.shape, len(weight_VD), hidden_TD.dtype
    device = hidden_TD.device
    tiles = list(tiles_of(vocab_size, VOCABULARY_TILE))
    height = piece_height(device, 4 * vocab_size, positions)
    buffer = torch.empty((height, vocab_size), device=device)
    hidden_sum = torch.zeros((positions, width), device=device)
    weight_sum = TiledSum(weight_VD, tiles, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rows in tiles_of(positions, height):
        logits_cV, hidden_cD = buffer[: rows.stop - rows.start], hidden_TD[rows]
        for tile in tiles:
            logits_cV[:, tile] = product(hidden_cD, weight_VD[tile].t(), dtype)
        targets_c1 = next_tokens_T[rows, None]
        target_logits_c = logits_cV.gather(-1, targets_c1)[:, 0]
        largest_c1 = logits_cV.amax(-1, keepdim=True)
        sums_c = torch.zeros(len(logits_cV), device=device)
        for tile in tiles:
            sums_c += logits_cV[:, tile].sub_(largest_c1).exp_().sum(-1)
        total += (largest_c1[:, 0] + sums_c.log() - target_logits_c).sum()
        logits_cV.div_(sums_c[:, None])
        logits_cV.scatter_add_(-1, targets_c1, -torch.ones_like(targets_c1, dtype=logits_cV.dtype))
        for tile, tile_sum in zip(tiles, weight_sum.tiles, strict=True):
            add_product(hidden_sum[rows], logits_cV[:, tile], weight_VD[tile], dtype)
            add_product(tile_sum, logits_cV[:, tile].t(), hidden_cD, dtype)
        del tile_sum
    del buffer
    return total, hidden_sum.to(dtype), weight_sum.rounded()


def _losses(problem: Problem, small: Problem) -> dict[str, tuple[Problem, LossOfTerms, Mode]]:
    """What is measured: name -> problem, loss and mode. Each returns [c, 2]: cross-entropy and the divergence."""
    log_beta_T = log_adaptive_beta(log_teacher_tail(small.teacher, TAD_TOP_K), small.segments, beta=TAD_BETA)
    weights_T, hard_T = group_weights(problem.teacher.log_not_target, hard_ratio=0.5, easy_weight=0.2)

    def tad(rows: slice, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
        return weighted_tad(teacher, student, sampled, top_k=TAD_TOP_K, log_beta_T=log_beta_T[rows])

    def dkd_sampled(rows: slice, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
        return dkd(teacher, student, sampled, target_weight=1.0, non_target_weight=1.0)

    def atkd_sampled(rows: slice, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
        divergence_T = non_target_class_kl(teacher, student, sampled)
        return atkd(target_class_kl(teacher, student), divergence_T, weights_T[rows], hard_T[rows])

    def with_clm(divergence: LossOfTerms) -> LossOfTerms:
        return lambda rows, teacher, student: torch.stack(
            [cross_entropy(student), divergence(rows, teacher, student)], dim=-1
        )

    return {
        "tad one-pass": (small, with_clm(tad), "one-pass"),
        "tad recompute": (small, with_clm(tad), "recompute"),
        "dkd": (problem, with_clm(dkd_sampled), "one-pass"),
        "atkd": (problem, with_clm(atkd_sampled), "one-pass"),
        "todi bucket": (problem, with_clm(lambda _, p, q: todi(*bucket_atoms(p, q))), "one-pass"),
        "reverse_kl bucket": (problem, with_clm(lambda _, p, q: reverse_kl(*bucket_atoms(p, q))), "one-pass"),
    }


def _dense_tad(problem: Problem) -> Tensor:
    """CE + TAD (K' = K) from full logits with torch's own operations."""
    teacher = problem.teacher
    logits_TV = (problem.hidden @ problem.weight.t()).float()
    logprobs_TV = torch.log_softmax(logits_TV, -1)
    log_beyond_T = logprobs_TV.scatter(-1, teacher.token_ids, -torch.inf).logsumexp(-1)
    student = StudentTerms(
        logprobs=logprobs_TV.gather(-1, teacher.token_ids),
        log_target=logprobs_TV.gather(-1, teacher.next_tokens[:, None])[:, 0],
        log_not_target=log_beyond_T,  # not used by TAD
        sample_logprobs=logprobs_TV.gather(-1, teacher.tail_samples),
        log_beyond=log_beyond_T,
        log_beyond_not_target=log_beyond_T,  # nor this
    )
    log_beta_T = log_adaptive_beta(log_teacher_tail(teacher, TAD_TOP_K), problem.segments, beta=TAD_BETA)
    divergence_T = weighted_tad(teacher, student, sampled, top_k=TAD_TOP_K, log_beta_T=log_beta_T)
    return (cross_entropy(student) + divergence_T).sum()


def _run(problem: Problem, loss: LossOfTerms, mode: Mode) -> float:
    head = LinearHead(weight=problem.weight, vocab_size=problem.teacher.vocab_size)
    coefficients = torch.ones(2, device=problem.hidden.device)
    total, _ = fused_loss(problem.hidden, head, problem.teacher, loss, coefficients, mode=mode)
    total.backward()  # type: ignore[no-untyped-call]
    return _finish(problem, total)


def _finish(problem: Problem, total: Tensor) -> float:
    problem.hidden.grad = problem.weight.grad = None
    return float(total.detach())


def _liger(problem: Problem) -> Callable[[], float] | None:
    """Liger-Kernel's fused linear JSD, with a live teacher of the student's width; None where it cannot run."""
    if problem.hidden.device.type != "cuda":
        return None
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD  # type: ignore[import-not-found]
    except ImportError:
        return None
    module: Any = LigerFusedLinearJSD(jsd_beta=0.5)
    teacher_hidden = torch.randn_like(problem.hidden).detach()
    teacher_weight = torch.randn_like(problem.weight).detach()

    def run() -> float:
        total = module(problem.hidden, problem.weight, teacher_hidden, teacher_weight, None)
        total.backward()
        return _finish(problem, total)

    return run


def _timed(run: Callable[[], float], device: str) -> float:
    """Seconds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(options: BenchLosses, name: str) -> float:
    """Peak MiB of one run above what was there before; to be called in a process of its own."""
    runs, device = _runs(options)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        runs[name]()
        return torch.cuda.max_memory_allocated() / 2**20 - before
    # What a process loads and sets up at its first loss is not the loss's memory.
    _runs(replace(options, positions=8, vocab_size=2000, width=8))[0][name]()
    gc.collect()
    reset_peak()
    before = peak_mib()
    runs[name]()
    return peak_mib() - before


@dataclass(frozen=True, kw_only=True)
class BenchLosses:
    """Time and peak memory of each loss against a fused cross-entropy on the same hidden states and head."""

    positions: int | None = None
    """T; by default 4096, and 8192 on a GPU."""

    vocab_size: int = 151_936
    """V."""

    width: int | None = None
    """D; by default 1024, and 2048 on a GPU."""

    top_k: int = 64
    """K of all losses but TAD, which has 10."""

    num_samples: int = 16
    """m."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of hidden states and head."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto: a GPU if there is one."""

    rounds: int = 3
    """Repetitions after one that is not counted."""

    threads: int = 2
    """CPU threads of torch."""

    json: Path | None = None
    """Write figures and conditions to this file."""

    check: bool = False
    """Exit with status 1 where a bar is missed."""


def _runs(options: BenchLosses) -> tuple[dict[str, Callable[[], float]], str]:
    """What can be measured, by name, and where."""
    torch.set_num_threads(options.threads)
    device = _device(options)
    positions, width = _sizes(options, device)

    def make(top_k: int) -> Problem:
        return make_problem(
            positions,
            options.vocab_size,
            width,
            top_k,
            options.num_samples,
            device=device,
            dtype=getattr(torch, options.dtype),
        )

    small = make(TAD_TOP_K)
    large = make(options.top_k)
    large = Problem(small.hidden, small.weight, large.teacher, large.segments)  # one set of inputs

    def baseline() -> float:
        with torch.no_grad():
            return float(fused_cross_entropy(small.hidden, small.weight, small.teacher.next_tokens)[0])

    runs: dict[str, Callable[[], float]] = {"cross-entropy": baseline}
    for name, (problem, loss, mode) in _losses(large, small).items():
        runs[name] = partial(_run, problem, loss, mode)
    runs["dense tad"] = partial(_finish_dense, small)
    liger = _liger(small)
    if liger is not None:
        runs[LIGER] = liger
    return runs, device


def _device(options: BenchLosses) -> str:
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sizes(options: BenchLosses, device: str) -> tuple[int, int]:
    cuda = device == "cuda"
    return options.positions or (8192 if cuda else 4096), options.width or (2048 if cuda else 1024)


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.bench_losses``."""
    benchmark("bench_losses", BenchLosses, bench, __doc__)


def bench(options: BenchLosses) -> None:
    """Measure, print, and check the bars."""
    memory = {}
    for name in _names(options):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            # at the sizes of a test there is nothing to be seen; a page stands for it
            memory[name] = max(pool.submit(_peak, options, name).result(), 4096 / 2**20)
        print(f"{name}: {memory[name]:.0f} MiB", flush=True)
    runs, device = _runs(options)
    positions, width = _sizes(options, device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(options.rounds + 1):
        for name, run in runs.items():
            if name == "dense tad" and round_number != 1:
                continue  # beyond any bar, and slow: once is enough
            elapsed = _timed(run, device)
            if round_number:  # the first round warms up
                seconds[name].append(elapsed)
            print(f"round {round_number} {name}: {elapsed:.2f} s", flush=True)

    base = seconds["cross-entropy"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, base, strict=False)) for name, times in seconds.items()
    }
    # ids (int64) and log-probs (float32, value and gradient) of the top-K and the draws
    term_mib = positions * (TAD_TOP_K + options.num_samples) * 16 / 2**20
    bars = [
        Bar(name=f"time of CE + {name} / CE", value=ratios[name], limit=limit, at_most=True)
        for name, limit in TIME_BARS.items()
    ]
    for name in ("tad one-pass", "tad recompute"):
        bars.append(
            Bar(
                name=f"peak memory of CE + {name} / (CE and the [T, K + m] tensors)",
                value=memory[name] / (memory["cross-entropy"] + term_mib / 1.05),
                limit=1.05,
                at_most=True,
            )
        )
        bars.append(
            Bar(
                name=f"peak memory, dense / CE + {name}",
                value=memory["dense tad"] / memory[name],
                limit=15.0,
                at_most=False,
            )
        )
    figures = {
        "positions": positions,
        "vocab_size": options.vocab_size,
        "width": width,
        "dtype": options.dtype,
        "device": device,
        "rounds": options.rounds,
        "seconds": {name: round(statistics.median(times), 3) for name, times in seconds.items()},
        "time_ratio": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "peak_mib": {name: round(value, 1) for name, value in memory.items()},
        "liger": "measured" if LIGER in runs else "not measured: needs a GPU and liger-kernel",
    }
    report("losses", figures, bars, json_path=options.json, check=options.check)


def _names(options: BenchLosses) -> list[str]:
    """Whose memory is measured: the baseline, both modes, the dense computation, and Liger where it can run."""
    names = ["cross-entropy", "tad one-pass", "tad recompute", "dense tad"]
    installed = _device(options) == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return names + [LIGER] * installed


def _finish_dense(problem: Problem) -> float:
    total = _dense_tad(problem)
    total.backward()  # type: ignore[no-untyped-call]
    return _finish(problem, total)


if __name__ == "__main__":
    main()
