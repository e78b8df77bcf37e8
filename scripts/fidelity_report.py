"""What the fidelity bench makes of its figures: one line each, frontiers, a comparison of schemes, bars and a plot."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tailcache.pipeline.config import CaptureConfig
from tailcache.scripts.measure import Bar
from tailcache.storage.errors import ConfigError

__all__ = [
    "BIASED",
    "FRONTIERS",
    "HEADER",
    "KNOWN",
    "LOSSES",
    "STORED",
    "Entry",
    "at_largest",
    "bars",
    "compared",
    "frontier",
    "plot",
]

LOSSES = ("TAD", "KL")
STORED = "thinned"
"""How a cache draws."""
BIASED = ("bucket", "prior")
"""What it can do without draws."""
FRONTIERS = {"draws": (STORED,), "draws or none": (STORED, *BIASED), "all draws different": ("systematic",)}
KNOWN = " + p(target)"
RENORMALISED_BARS = {"TAD": 2.0, "KL": 5.0}
"""How many times the error of the defaults that of the same K renormalised is, at least."""
BATCH = 100_000
"""Positions in a training batch: 100 rows of 1,024. (The paper of TAD has 128 of 2,048.)"""
HEADER = "student,loss,positions,what,K,m,bytes,relative error,its sd over seeds,cosine,rms error / theory"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One estimate of one gradient.

    Attributes:
      student: whose.
      loss: TAD or KL.
      positions: pooled.
      what: the scheme.
      top_k: K; 0 where there is none.
      num_samples: m; 0 where there are none.
      bytes: per position.
      relative: error, mean over seeds.
      spread: its standard deviation over seeds; 0 where nothing is drawn.
      cosine: mean over seeds.
      norm: root mean square over seeds of the absolute error.
      theory: what that should be; NaN where there is no closed form.
    """

    student: str
    loss: str
    positions: int
    what: str
    top_k: int
    num_samples: int
    bytes: float
    relative: float
    spread: float
    cosine: float
    norm: float
    theory: float = math.nan

    def __str__(self) -> str:
        return (
            f"{self.student},{self.loss},{self.positions},{self.what},{self.top_k},{self.num_samples},{self.bytes:.1f},"
            f"{self.relative:.4g},{self.spread:.2g},{self.cosine:.4f},{self.norm / self.theory:.3f}"
        )


def at_largest(entries: Sequence[Entry], student: str, loss: str, whats: Sequence[str]) -> list[Entry]:
    """Some schemes at the largest pool."""
    num = max(entry.positions for entry in entries)
    return [e for e in entries if (e.student, e.loss, e.positions) == (student, loss, num) and e.what in whats]


def frontier(entries: Sequence[Entry]) -> list[Entry]:
    """Those that no other one matches in error with as few bytes, in the order of their bytes."""
    kept: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (e.bytes, e.relative)):
        if not kept or entry.relative < kept[-1].relative:
            kept.append(entry)
    return kept


def compared(entries: Sequence[Entry]) -> Iterator[str]:
    """The sampling schemes at equal K and m against independent draws, at the largest pool.

    Yields:
      Comma-separated lines: squared error (least, median and most over the students) and bytes of the draws alone, both
      over those of independent draws, and their product: below 1 the scheme is better at equal bytes too, since the
      squared error falls as 1/m and the bytes grow as m.
    """
    num = max(entry.positions for entry in entries)
    by_key = {(e.student, e.loss, e.what, e.top_k, e.num_samples): e for e in entries if e.positions == num}
    found: dict[tuple[str, int, int, str], list[tuple[float, float]]] = {}
    for (student, loss, what, top_k, num_draws), e in by_key.items():
        base = by_key.get((student, loss, "independent", top_k, num_draws))
        if base is not None and e is not base:
            head = by_key[student, loss, "bucket", top_k, 0].bytes
            ratios = ((e.norm / base.norm) ** 2, (e.bytes - head) / (base.bytes - head))
            found.setdefault((loss, top_k, num_draws, what), []).append(ratios)
    yield "loss,K,m,scheme,squared error: least,median,most,bytes of the draws,product of the medians"
    for (loss, top_k, num_draws, what), each in sorted(found.items()):
        errors = [error for error, _ in each]
        error, size = statistics.median(errors), each[0][1]
        yield (
            f"{loss},{top_k},{num_draws},{what},{min(errors):.3f},{error:.3f},{max(errors):.3f},{size:.3f},"
            f"{error * size:.3f}"
        )


def bars(entries: Sequence[Entry]) -> list[Bar]:
    """What has to hold of the defaults of ``tailcache capture``, for each student and each loss.

    * On the frontier: of all settings with draws and at most their bytes (and 1 %), none has a lower error at the
      largest pool, but for 2 % or, if that is more, twice the spread over seeds. Settings without draws are apart,
      because their error does not fall with the number of positions:
    * draws overtake the best of those, at no more bytes, at no more positions than ``BATCH``. The error of draws falls
      as one over the square root, so they do at (error with draws / error without)^2 times the largest pool.
    * The top K alone, renormalised, are so many times worse.
    * The error per position falls with the slope -1/2 between the smallest and the largest pool.
    """
    defaults = CaptureConfig(cache=Path(), teacher="", name="")
    wanted = (defaults.top_k, defaults.num_samples)
    found = []

    def bar(text: str, value: float, limit: float, at_most: bool = True) -> None:
        found.append(Bar(name=f"{student}, {loss}: {text}", value=value, limit=limit, at_most=at_most))

    for student, loss in itertools.product(dict.fromkeys(entry.student for entry in entries), LOSSES):
        drawn = {(e.top_k, e.num_samples): e for e in at_largest(entries, student, loss, [STORED])}
        if wanted not in drawn:
            raise ConfigError(
                f"top_ks, num_samples: expected the defaults of capture, K = {wanted[0]} and m = {wanted[1]}, among "
                "them; found others only, and the bars are about the defaults"
            )
        own = drawn[wanted]
        best = min((e for e in drawn.values() if e.bytes <= 1.01 * own.bytes), key=lambda e: e.relative)
        spread = math.hypot(own.spread / own.relative, best.spread / best.relative)
        bar(
            f"error of the defaults / the least at their bytes or fewer (K = {best.top_k}, m = {best.num_samples})",
            own.relative / best.relative,
            max(1.02, 1 + 2 * spread),
        )
        without = at_largest(entries, student, loss, BIASED)
        biased = min((e for e in without if e.bytes <= 1.01 * own.bytes), key=lambda e: e.relative)
        bar(
            f"positions from which the defaults have less error than K = {biased.top_k} and {biased.what}",
            own.positions * (own.relative / biased.relative) ** 2,
            BATCH,
        )
        plain = at_largest(entries, student, loss, ["renormalised (DistillKit)"])
        renormalised = next(e for e in plain if e.top_k == own.top_k)
        bar(
            f"error of the top {own.top_k} renormalised / of the defaults",
            renormalised.relative / own.relative,
            RENORMALISED_BARS[loss],
            at_most=False,
        )
        key = (student, loss, STORED, *wanted)
        pooled = [e for e in entries if (e.student, e.loss, e.what, e.top_k, e.num_samples) == key]
        bar("|slope + 1/2| of the error per position", abs(_slope(pooled) + 0.5), 0.1)
    return found


def _slope(entries: Sequence[Entry]) -> float:
    """Of log(absolute error / positions) against log positions, by least squares."""
    x = [math.log(e.positions) for e in entries]
    y = [math.log(e.norm / e.positions) for e in entries]
    return statistics.linear_regression(x, y).slope


def _line(axes: Any, entries: Sequence[Entry], what: str, label: str, style: str, colour: str, top_k: int = 0) -> None:
    """Draw one scheme; of one K, if it is given."""
    points = sorted((e.bytes, e.relative) for e in entries if e.what == what and top_k in (0, e.top_k))
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.6, markersize=5)


def plot(entries: Sequence[Entry], kl: dict[str, float]) -> bytes:
    """Rate-distortion curves at the largest pool as a PNG: a row of panels per loss, a panel per student."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tailcache.pipeline.plots import COLOURS

    num = max(entry.positions for entry in entries)
    figure = Figure(figsize=(13.5, 8.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(LOSSES), len(kl), squeeze=False, sharex=True)
    top_ks = sorted({e.top_k for e in entries if e.what == STORED})
    for (row, loss), (column, student) in itertools.product(enumerate(LOSSES), enumerate(kl)):
        here = [e for e in entries if (e.student, e.loss, e.positions) == (student, loss, num)]
        axes = panels[row][column]

        line = partial(_line, axes, here)
        for index, top_k in enumerate(top_ks):
            line(STORED, f"K = {top_k}, draws as stored", "o-", COLOURS[index], top_k)
        middle = top_ks[len(top_ks) // 2]
        line("systematic", f"K = {middle}, all draws different", "o--", COLOURS[len(top_ks) // 2], middle)
        line("prior", "top K + mean tail", "s:", COLOURS[4])
        line("bucket", "top K + bucket", "v:", COLOURS[5])
        line("ghost token (Megatron-LM zstd)", "ghost token (Megatron-LM zstd)", "<--", "#777777")
        line("renormalised (DistillKit)", "renormalised (DistillKit)", "x--", COLOURS[6])
        line("RS-KD", "RS-KD, 50 draws", "*", "#aa0000")
        line("hidden int8", f"K = {top_ks[-1]} + hidden int8", "P", "#555500")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([20, 50, 100, 200, 400], ["20", "50", "100", "200", "400"])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.set_title(f"{loss}: {student} (KL {kl[student]:.2f})", fontsize=10)
        if row == len(LOSSES) - 1:
            axes.set_xlabel("bytes per position")
        if column == 0:
            axes.set_ylabel(f"relative error of dW, {num:,} positions")
    handles, labels = panels[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
