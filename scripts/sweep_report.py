"""Everything a sweep leaves for readers: the table as Markdown and JSON, plots, and one HTML page with all of it.

    OUT/sweep.md, sweep.json, sweep.html
    OUT/sweep_cross_entropy.png, sweep_kl.png           held-out curves against positions seen
    OUT/sweep_cross_entropy_bars.png, sweep_kl_bars.png, sweep_full_ece_bars.png     where the students ended

Bands and lines are intervals over seeds.

All of it is made from the runs' own files, so it can be made again at any time, also while runs are going on.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailcache.pipeline.plots import bars_png, curves_png
from tailcache.scripts.seed_intervals import mean_over_seeds
from tailcache.scripts.sweep_table import CONFIDENCE, Row, SweepTable
from tailcache.storage import durable
from tailcache.storage.bootstrap import Figure

__all__ = ["sweep_html", "sweep_plots", "write_report"]

_CURVES = {"cross_entropy": "cross-entropy (nats)", "kl": "KL to the teacher (nats)"}
_BARS = {**_CURVES, "full_ece": "Full-ECE"}

Band = list[tuple[float, float, float]]


def write_report(table: SweepTable, folder: Path) -> list[Path]:
    """Write all files of a report.

    Args:
      table: of the sweep.
      folder: the sweep's.

    Returns:
      The files.

    Raises:
      StorageError: a file cannot be written.
    """
    plots = sweep_plots(table)
    files = {
        "sweep.md": table.markdown().encode(),
        "sweep.json": table.json().encode(),
        "sweep.html": sweep_html(table, plots, title=f"tailcache sweep: {folder.name}").encode(),
        **{f"sweep_{name}.png": png for name, png in plots.items()},
    }
    durable.make_folder(folder)
    for name, data in files.items():
        durable.write_file(folder / name, data)
    return [folder / name for name in files]


def sweep_plots(table: SweepTable) -> dict[str, bytes]:
    """The plots by name, as the bytes of PNG files; those that have something to show."""
    plots = {}
    over = f"band: {100 * CONFIDENCE:g} % interval over seeds"
    for metric, label in _CURVES.items():
        curves = {row.method: _mean_curve(row, metric) for row in table.rows}
        drawn = {method: curve for method, curve in curves.items() if curve[0]}
        if drawn:
            banded = any(band for _, band in drawn.values())
            plots[metric] = curves_png(
                {method: points for method, (points, _) in drawn.items()},
                bands={method: band for method, (_, band) in drawn.items()},
                title=f"Held-out {label.split(' (')[0]}" + (f" ({over})" if banded else ""),
                xlabel="training positions seen",
                ylabel=label,
            )
    for metric, label in _BARS.items():
        figures = {row.method: row.figures[metric] for row in table.rows}
        bars: dict[str, Figure] = {method: figure for method, figure in figures.items() if figure is not None}
        if bars:
            lines = any(figure.low is not None for figure in bars.values())
            plots[f"{metric}_bars"] = bars_png(
                list(bars),
                {"held out": list(bars.values())},
                title=f"Held-out {label.split(' (')[0]} after training"
                + (f"\n(lines: {100 * CONFIDENCE:g} % intervals over seeds)" if lines else ""),
                label=label,
            )
    return plots


def _mean_curve(row: Row, metric: str) -> tuple[list[tuple[float, float]], Band]:
    """The mean over a method's runs at each evaluation that all of them have made, and its interval.

    Runs of different seeds see rows of different lengths: x is the mean of their positions.
    """
    curves: Sequence[Any] = [{line["step"]: line for line in result.curve} for result in row.results if result.curve]
    if not curves:
        return [], []
    points, band = [], []
    for step in sorted(set.intersection(*(set(curve) for curve in curves))):
        values = [curve[step][metric] for curve in curves]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            continue
        x = sum(curve[step]["positions_seen"] for curve in curves) / len(curves)
        mean = mean_over_seeds(values, CONFIDENCE)
        points.append((x, mean.value))
        if mean.low is not None and mean.high is not None:
            band.append((x, mean.low, mean.high))
    return points, band


def sweep_html(table: SweepTable, plots: dict[str, bytes], *, title: str) -> str:
    """One page that needs no other file.

    Args:
      table: of the sweep.
      plots: PNG files by name, shown in this order.
      title: of the page.
    """
    head, *lines = table.cells()
    images = "\n".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in plots.items()
    )
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    below = "\n".join(f"<p>{html.escape(note)}</p>" for note in (*table.notes, *table.failures))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        "<style>body{font:15px system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.3em .8em;text-align:right;"
        "border-bottom:1px solid #ddd;white-space:nowrap}td:first-child,th:first-child{text-align:left}"
        "img{max-width:100%;display:block;margin:1em 0}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n<table><thead><tr>"
        f"{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr></thead>\n<tbody>{body}</tbody></table>\n"
        f"{below}\n{images}\n</body></html>\n"
    )
