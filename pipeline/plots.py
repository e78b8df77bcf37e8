"""Plots as PNG files: curves for anyone, and the figures of a comparison.

Figures are made without pyplot, so nothing here touches a display, a backend or global state. Files are written
whole or not at all, and the same data give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tailcache.pipeline.compare import Comparison
from tailcache.storage import durable
from tailcache.storage.bootstrap import Figure
from tailcache.storage.errors import ConfigError

__all__ = ["COLOURS", "bars_png", "comparison_plots", "curves_png", "plot_comparison", "plot_curves"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's: told apart by colour-blind readers, and in grey."""
_MARKERS = "osD^vP*"
_STYLES = ("-", "--", "-.", ":")
_INCHES, _DPI = (7.2, 4.5), 120

Scale = Literal["linear", "log"]
Points = Sequence[tuple[float, float]]
Bands = Mapping[str, Sequence[tuple[float, float, float]]]


def plot_curves(
    series: Mapping[str, Points],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    path: Path,
    bands: Bands | None = None,
    xscale: Scale = "linear",
    yscale: Scale = "linear",
) -> Path:
    """Draw curves into one PNG file.

    Args:
      series: (x, y) points by name, in the order they are joined; points that are not finite leave a gap.
      title: of the plot.
      xlabel: what x is, with its unit.
      ylabel: what y is, with its unit.
      path: the file; its folder is made.
      bands: (x, low, high) by the same names, shaded.
      xscale: of the x axis.
      yscale: of the y axis.

    Returns:
      The path.

    Raises:
      ConfigError: no series has a point.
      StorageError: the file cannot be written.
    """
    _write(
        path, curves_png(series, title=title, xlabel=xlabel, ylabel=ylabel, bands=bands, xscale=xscale, yscale=yscale)
    )
    return path


def curves_png(
    series: Mapping[str, Points],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    bands: Bands | None = None,
    xscale: Scale = "linear",
    yscale: Scale = "linear",
) -> bytes:
    """The same as ``plot_curves``, as the bytes of the PNG."""
    if not any(series.values()):
        raise ConfigError(f"plot {title!r}: expected at least one point to draw, found none")

    def draw(axes: Axes) -> None:
        for i, (name, points) in enumerate(series.items()):
            colour = COLOURS[i % len(COLOURS)]
            band = (bands or {}).get(name, ())
            if band:
                x, low, high = zip(*band, strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            if points:
                axes.plot(
                    [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points],
                    color=colour, label=name, linewidth=1.8, markersize=4,
                    marker=_MARKERS[i % len(_MARKERS)] if len(points) <= 60 else None,
                    linestyle=_STYLES[(i // len(COLOURS)) % len(_STYLES)],
                )  # fmt: skip
        axes.set_xscale(xscale)
        axes.set_yscale(yscale)
        for axis, scale in ((axes.xaxis, xscale), (axes.yaxis, yscale)):
            if scale == "log":
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
                axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
                axis.set_minor_locator(NullLocator())
        axes.legend(frameon=False)

    return _render(draw, title, xlabel, ylabel)


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw all plots of a comparison into a folder.

    Returns:
      The files: ``tail_mass.png``; with two or more teachers also ``divergence.png``, ``agreement.png`` and
      ``divergence_by_context.png``.

    Raises:
      StorageError: a file cannot be written.
    """
    paths = []
    for name, png in comparison_plots(comparison).items():
        paths.append(folder / f"{name}.png")
        _write(paths[-1], png)
    return paths


def comparison_plots(comparison: Comparison) -> dict[str, bytes]:
    """The plots of a comparison by name, as the bytes of PNG files."""
    percent = f"{100 * comparison.confidence:g} %"
    where = f"{comparison.positions:,} positions, rows: {comparison.split}"
    masses = {t.label: t.tail_mass for t in comparison.teachers}
    plots = {
        "tail_mass": curves_png(
            {label: [(k, f.value) for k, f in mass.items()] for label, mass in masses.items()},
            bands={
                label: [(k, f.low, f.high) for k, f in mass.items() if f.low is not None and f.high is not None]
                for label, mass in masses.items()
            },
            title=f"Mass beyond the K most likely tokens ({where};\nband: {percent} interval over rows)",
            xlabel="K, tokens kept",
            ylabel=r"mean tail mass $\alpha_K$ (probability)",
            xscale="log",
        )
    }
    if not comparison.divergences:
        return plots
    names = [f"{d.first} ‖ {d.second}" for d in comparison.divergences]
    plots["divergence"] = bars_png(
        names,
        {
            "lower bound (certain)": [d.kl_lower_bound for d in comparison.divergences],
            "estimate (see the assumption)": [d.kl_estimate for d in comparison.divergences],
        },
        title=f"KL between teachers ({where};\nlines: {percent} intervals over rows)",
        label="KL (nats per position)",
    )
    plots["agreement"] = bars_png(
        [f"{p.first}, {p.second}" for p in comparison.pairs],
        {"same most likely token": [p.top1_agreement for p in comparison.pairs]},
        title=f"Top-1 agreement between teachers ({where};\nlines: {percent} intervals over rows)",
        label="share of positions",
        limits=(0.0, 1.0),
    )
    by_context = {n: d.estimate_by_context for n, d in zip(names, comparison.divergences, strict=True)}
    if any(by_context.values()):
        plots["divergence_by_context"] = curves_png(
            by_context,
            title=f"Estimated KL by tokens read of the document ({where})",
            xlabel="tokens read (each point: from here to the next)",
            ylabel="estimated KL (nats per position)",
            xscale="log",
        )
    return plots


def bars_png(
    names: Sequence[str],
    groups: Mapping[str, Sequence[Figure]],
    *,
    title: str,
    label: str,
    limits: tuple[float, float] | None = None,
) -> bytes:
    """Horizontal bars, grouped by name, with intervals and the figures written out, as the bytes of a PNG.

    Args:
      names: one group of bars each, from above.
      groups: the bars of each group by what they are; as many figures as names.
      title: of the plot.
      label: what the figures are, with their unit.
      limits: of the axis; by default what the figures need.
    """

    def draw(axes: Axes) -> None:
        height = 0.8 / len(groups)
        for g, (group, figures) in enumerate(groups.items()):
            places = [n + (g - (len(groups) - 1) / 2) * height for n in range(len(names))]
            values = [f.value if math.isfinite(f.value) else 0.0 for f in figures]
            axes.barh(places, values, height=0.9 * height, color=COLOURS[g], alpha=0.85, label=group)
            for place, value, figure in zip(places, values, figures, strict=True):
                low = figure.low if figure.low is not None else value
                high = figure.high if figure.high is not None else value
                axes.plot([low, high], [place, place], color="black", linewidth=1.2)
                axes.annotate(
                    f"{figure.value:.3f}", (max(high, value, 0.0), place), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=8,
                )  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        if limits is not None:
            axes.set_xlim(*limits)
        if len(groups) > 1:
            axes.figure.legend(frameon=False, loc="outside lower center", ncols=len(groups))

    rows = max(1.6, 0.42 * len(names) * len(groups))
    return _render(draw, title, label, "", inches=(_INCHES[0], 1.6 + rows))


def _render(
    draw: Callable[[Axes], None], title: str, xlabel: str, ylabel: str, inches: tuple[float, float] = _INCHES
) -> bytes:
    canvas = Canvas(figsize=inches, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=10.5)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file = io.BytesIO()
    canvas.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    durable.make_folder(path.parent)
    durable.write_file(path, data)
