"""The study's document and plots, made from results.json alone.

The document is Markdown with marked places; what is between two marks is replaced, and everything else, such as what
the figures mean, is written by hand and stays:

    <!-- study: NAME -->
    ...
    <!-- end -->

A document that does not exist yet is made with every place and every plot, and no words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tailcache.pipeline.plots import plot_curves
from tailcache.scripts.study_tables import TABLES
from tailcache.storage import durable
from tailcache.storage.errors import DataError

__all__ = ["PLOTS", "filled", "write_report"]

_PLACE = re.compile(r"(<!-- study: ([a-z0-9_ ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def write_report(results: dict[str, Any], document: Path) -> list[Path]:
    """Fill the document and draw the plots beside it.

    Args:
      results: what results.json holds.
      document: the Markdown file; plots go to images/study_NAME.png beside it.

    Returns:
      The plots that were drawn; those whose arms have not finished are left out.

    Raises:
      DataError: the document has a mark of an unknown name, or no mark at all.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else _bare()
    paths = {name: document.parent / "images" / f"study_{name}.png" for name in PLOTS}
    filled(text, results, str(document), ())  # refuses wrong marks before anything is written
    drawn = [name for name, draw in PLOTS.items() if draw(results, paths[name])]
    durable.make_folder(document.parent)
    durable.write_file(document, filled(text, results, str(document), drawn).encode())
    return [paths[name] for name in drawn]


def _bare() -> str:
    """A document with every table and plot, for a study that has none of its own."""
    return "\n".join(["# The study\n", *(f"<!-- study: {name} -->\n<!-- end -->\n" for name in TABLES)])


def filled(text: str, results: dict[str, Any], where: str, drawn: Sequence[str]) -> str:
    """The document with its marked places filled: each with its table, and the plots that belong to it.

    Args:
      text: of the document.
      results: what results.json holds.
      where: the document, for messages.
      drawn: the names of the plots there are.

    Raises:
      DataError: a mark of an unknown name, a mark without an end, or no mark at all.
    """
    marks = re.findall(r"<!-- study: (.*?) -->", text)
    unknown = sorted(set(marks) - TABLES.keys())
    if unknown:
        raise DataError(f"{where}: there is no table {', '.join(unknown)}; expected some of {', '.join(TABLES)}")
    if not marks or len(_PLACE.findall(text)) != len(marks):
        raise DataError(
            f"{where}: expected places `<!-- study: NAME -->` … `<!-- end -->` on lines of their own, found "
            f"{len(marks)} beginnings and {text.count('<!-- end -->')} ends"
        )

    def content(name: str) -> str:
        plots = [f"\n![{_SHOWS[plot]}](images/study_{plot}.png)\n" for plot in _BELONGS.get(name, ()) if plot in drawn]
        return "".join([f"{TABLES[name](results)}\n", *plots])

    return _PLACE.sub(lambda place: f"{place[1]}{content(place[2])}{place[4]}", text)


_BELONGS = {"students": ("kl", "cross_entropy"), "tad": ("grid",), "worth": ("worth",), "tail_masses": ("tail_mass",)}
_SHOWS = {
    "kl": "held-out KL to the teacher against positions seen, with 95 % bands",
    "cross_entropy": "held-out cross-entropy against positions seen, with 95 % bands",
    "grid": "held-out KL of TAD minus that of KD against beta, for each K, with 95 % bands",
    "worth": "KL lost against bytes per position, with 95 % bands",
    "tail_mass": "tail mass against K, with 95 % bands",
}


# ---- plots ----


def _curves(metric: str, label: str) -> Callable[[dict[str, Any], Path], bool]:
    def draw(results: dict[str, Any], path: Path) -> bool:
        curves = {results["students"][name]["title"]: curve[metric] for name, curve in results["curves"].items()}
        if not curves:
            return False
        plot_curves(
            {title: [(p["positions"], p["value"]) for p in curve] for title, curve in curves.items()},
            bands={title: _band((p["positions"], p) for p in curve) for title, curve in curves.items()},
            title=f"Held-out {label} against positions seen (bands: 95 % intervals)",
            xlabel="training positions seen since the common start",
            ylabel=f"{label} (nats per position)",
            path=path,
        )
        return True

    return draw


def _band(points: Any) -> list[tuple[float, float, float]]:
    return [(x, p["low"], p["high"]) for x, p in points if p["low"] is not None]


def _tail_masses(results: dict[str, Any], path: Path) -> bool:
    titles = {"study": "the study's teacher", "smollm2": "SmolLM2-135M-Instruct"}
    masses = {
        titles[name]: sorted((int(k), figure) for k, figure in each["tail_mass"].items())
        for name, each in results["tails"].items()
    }
    plot_curves(
        {title: [(k, figure["value"]) for k, figure in mass] for title, mass in masses.items()},
        bands={title: _band(mass) for title, mass in masses.items()},
        title="Mass beyond the K most likely tokens (bands: 95 % intervals over rows)",
        xlabel="K",
        ylabel=r"mean tail mass $\alpha_K$ (probability)",
        xscale="log",
        path=path,
    )
    return True


def _grid(results: dict[str, Any], path: Path) -> bool:
    grid = results["questions"]["tad_against_kl"]["grid"]
    if not grid:
        return False
    lines = {f"K = {k}": [c for c in grid if c["top_k"] == k] for k in sorted({c["top_k"] for c in grid})}
    plot_curves(
        {title: [(c["beta"], c["kl"]["value"]) for c in cells] for title, cells in lines.items()},
        bands={title: _band((c["beta"], c["kl"]) for c in cells) for title, cells in lines.items()},
        title="Held-out KL of TAD minus that of KD, same cache (bands: 95 % intervals, paired)",
        xlabel="β",
        ylabel="TAD minus KD (nats per position)",
        xscale="log",
        path=path,
    )
    return True


def _worth(results: dict[str, Any], path: Path) -> bool:
    rows = results["questions"]["worth"]
    if not rows:
        return False
    titles = {"sampled": "K and m draws", "renormalise": "plain top-K, renormalised", "exact": "with hidden states"}
    lines = {title: [r for r in rows if r["tail"] == tail] for tail, title in titles.items()}
    kept = {title: each for title, each in lines.items() if each}
    plot_curves(
        {title: [(r["bytes_per_position"], r["kl"]["value"]) for r in each] for title, each in kept.items()},
        bands={title: _band((r["bytes_per_position"], r["kl"]) for r in each) for title, each in kept.items()},
        title="KL lost against the live teacher, by what is stored (bands: 95 % intervals, paired)",
        xlabel="bytes per position",
        ylabel="KL minus live KD's (nats per position)",
        xscale="log",
        path=path,
    )
    return True


PLOTS: dict[str, Callable[[dict[str, Any], Path], bool]] = {
    "kl": _curves("kl", "KL to the teacher"),
    "cross_entropy": _curves("cross_entropy", "cross-entropy"),
    "tail_mass": _tail_masses,
    "grid": _grid,
    "worth": _worth,
}
