"""The table that a sweep ends in: one row per method, a mean over its seeds and an interval for each figure.

Held-out figures are those of the finished students; a method with no finished student keeps its row, with dashes. What
a figure is measured against, and what the intervals cover, is said below the table: nobody should have to guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tailcache.scripts.seed_intervals import mean_over_seeds
from tailcache.storage.bootstrap import Figure
from tailcache.trainers.sweep import SweepRun
from tailcache.trainers.sweep_results import RunResult

__all__ = ["COLUMNS", "Column", "Row", "SweepTable", "sweep_table"]

CONFIDENCE = 0.95
NONE = "\N{EN DASH}"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure of the table.

    Attributes:
      key: its name in JSON.
      title: its head, with the unit.
      value: of one finished run; None where it has none.
      shown: how a value reads.
      teacher: the same figure of the teacher, from one of its students.
    """

    key: str
    title: str
    value: Callable[[RunResult], float | None]
    shown: Callable[[float], str]
    teacher: Callable[[RunResult], float | None] = lambda _: None


def _final(name: str) -> Callable[[RunResult], float | None]:
    return lambda result: None if result.final is None else result.final.get(name)


def _evaluated(name: str) -> Callable[[RunResult], float | None]:
    return lambda result: (result.evaluation.get(name) or {}).get("value")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


COLUMNS = (
    Column(
        key="cross_entropy",
        title="held-out CE (nats)",
        value=_final("cross_entropy"),
        shown="{:.3f}".format,
        teacher=_final("teacher_cross_entropy"),
    ),
    Column(key="kl", title="KL (nats)", value=_final("kl"), shown="{:.3f}".format, teacher=lambda _: 0.0),
    Column(
        key="top1_agreement",
        title="agreement (%)",
        value=_final("top1_agreement"),
        shown=_percent,
        teacher=lambda _: 1.0,
    ),
    Column(
        key="full_ece",
        title="Full-ECE",
        value=_evaluated("full_ece"),
        shown="{:.4f}".format,
        teacher=_evaluated("teacher_full_ece"),
    ),
    Column(
        key="positions_per_s",
        title="positions/s",
        value=lambda result: result.positions_per_s,
        shown=lambda value: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}",
    ),
    Column(key="hours", title="hours", value=lambda result: result.hours, shown="{:.3g}".format),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Attributes:
      method: its name.
      results: its runs, finished or not.
      figures: by column; None where no finished run has it.
    """

    method: str
    results: tuple[RunResult, ...]
    figures: dict[str, Figure | None]

    @property
    def finished(self) -> tuple[RunResult, ...]:
        """Its runs that have a student."""
        return tuple(each for each in self.results if each.record)

    @property
    def label(self) -> str:
        """Its name, and how many of its seeds have finished if not all."""
        done, asked = len(self.finished), len(self.results)
        return self.method if done == asked else f"{self.method} ({done} of {asked} runs)"


@dataclass(frozen=True, kw_only=True)
class SweepTable:
    """The whole table.

    Attributes:
      rows: one per method, in the order of the sweep.
      teachers: the same figures of each teacher, as far as there are.
      notes: what figures and intervals are.
      failures: a line for each run that failed.
    """

    rows: tuple[Row, ...]
    teachers: dict[str, dict[str, float | None]]
    notes: tuple[str, ...]
    failures: tuple[str, ...]

    def cells(self) -> list[list[str]]:
        """All cells, the head first."""
        lines = [["method", *(column.title for column in COLUMNS)]]
        for row in self.rows:
            lines.append([row.label, *(_cell(row.figures[column.key], column) for column in COLUMNS)])
        for name, figures in self.teachers.items():
            values = [figures[column.key] for column in COLUMNS]
            shown = [NONE if v is None else column.shown(v) for v, column in zip(values, COLUMNS, strict=True)]
            lines.append([f"teacher {name}", *shown])
        return lines

    def text(self) -> str:
        """For a terminal."""
        lines = self.cells()
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        shown = [
            "  ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(pairs)
            )
            for pairs in ([*zip(line, widths, strict=True)] for line in lines)
        ]
        shown.insert(1, "-" * len(shown[0]))
        return "\n".join([*shown, "", *self.notes, *self.failures])

    def markdown(self) -> str:
        """For a document."""
        head, *lines = [[cell.replace("|", "\\|") for cell in line] for line in self.cells()]
        rule = ["---", *("---:" for _ in COLUMNS)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
        below = [*self.notes, *self.failures]
        return "\n\n".join([table, *below]) + "\n"

    def json(self) -> str:
        """For programs: every figure of every run too."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; what is not finite is null."""
        return {
            "format": "tailcache sweep",
            "format_version": 1,
            "confidence": CONFIDENCE,
            "notes": list(self.notes),
            "teachers": self.teachers,
            "rows": [
                {
                    "method": row.method,
                    "figures": {name: None if f is None else f.to_json() for name, f in row.figures.items()},
                    "runs": [_run_json(result) for result in row.results],
                }
                for row in self.rows
            ],
        }


def sweep_table(runs: Sequence[SweepRun], results: Sequence[RunResult]) -> SweepTable:
    """Make the table.

    Args:
      runs: of the sweep.
      results: of each, in the same order, see ``run_sweep`` or ``SweepRun.result``.
    """
    by_method: dict[str, list[RunResult]] = {}
    for run, result in zip(runs, results, strict=True):
        by_method.setdefault(run.row, []).append(result)
    rows = []
    for method, own in by_method.items():
        figures: dict[str, Figure | None] = {}
        for column in COLUMNS:
            values = [value for value in map(column.value, own) if value is not None and math.isfinite(value)]
            figures[column.key] = mean_over_seeds(values, CONFIDENCE) if values else None
        rows.append(Row(method=method, results=tuple(own), figures=figures))
    teachers: dict[str, dict[str, float | None]] = {}
    for result in results:
        name = result.record.get("teacher")
        if result.final is not None and isinstance(name, str) and name not in teachers:
            teachers[name] = {column.key: column.teacher(result) for column in COLUMNS}
    return SweepTable(
        rows=tuple(rows),
        teachers=teachers,
        notes=tuple(_notes(rows, results)),
        failures=tuple(f"failed: {each.name}: {each.error}" for each in results if each.status == "failed"),
    )


def _notes(rows: Sequence[Row], results: Sequence[RunResult]) -> list[str]:
    finished = [result for result in results if result.final is not None]
    notes = []
    counts = {len(row.finished) for row in rows if row.finished}
    if counts and max(counts) > 1:
        seeds = f"{max(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        notes.append(
            f"± is the half-width of a {100 * CONFIDENCE:g} % t interval over {seeds} seeds: what the seed decides "
            "(initialisation, order, dropout), not which text was held out."
        )
    elif counts:
        notes.append("One seed per method: no intervals, and small differences mean nothing.")
    kinds = sorted({str(result.final["kl_is"]) for result in finished if result.final and "kl_is" in result.final})
    teachers = sorted({str(result.record.get("teacher")) for result in finished})
    if kinds:
        own = ", each student's to the teacher it was trained from" if len(teachers) > 1 else ""
        notes.append(f"KL: KL(teacher‖student) on the held-out positions{own}; {' or '.join(kinds)}.")
    sizes = sorted({int(result.final["positions"]) for result in finished if result.final})
    if sizes:
        shown = " or ".join(f"{size:,}" for size in sizes)
        notes.append(
            f"Held out: {shown} positions. positions/s and hours are of training one student, without evaluations."
        )
    if len({result.record.get("corpus_hash") for result in finished}) > 1 or len(sizes) > 1:
        notes.append("Held-out positions differ between runs: their figures cannot be compared.")
    return notes


def _cell(figure: Figure | None, column: Column) -> str:
    if figure is None:
        return NONE
    if figure.low is None or figure.high is None:
        return column.shown(figure.value)
    return f"{column.shown(figure.value)} ± {column.shown((figure.high - figure.low) / 2)}"


def _run_json(result: RunResult) -> dict[str, Any]:
    """One run."""
    config = result.record.get("config", {})
    figures = {column.key: column.value(result) for column in COLUMNS}
    return {
        "name": result.name,
        "status": result.status,
        "error": result.error,
        "seed": config.get("seed"),
        "teacher": result.record.get("teacher"),
        "corpus_hash": result.record.get("corpus_hash"),
        "num_parameters": result.record.get("student", {}).get("num_parameters"),
        "positions_seen": result.positions_seen,
        "kl_is": None if result.final is None else result.final.get("kl_is"),
        "figures": {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()},
        "curve": [
            {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}
            for line in result.curve
        ],
    }
