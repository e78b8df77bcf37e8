"""The study's tables in Markdown, each a function of results.json.

Every figure has its interval in brackets. A difference whose interval does not contain 0 is in bold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["TABLES", "shown"]

_ALONE = " (one seed)"


def shown(
    figure: dict[str, float | None] | None, digits: int = 4, *, difference: bool = False, scale: float = 1
) -> str:
    """A figure with its interval, such as `1.234 [1.200, 1.268]`; bold for a difference that is not 0.

    Args:
      figure: value, low and high as ``Figure.to_json`` gives them; none for one that could not be had.
      digits: after the point.
      difference: show signs, and mark what is not 0.
      scale: to multiply with, 100 for percent.
    """
    if figure is None or figure["value"] is None:
        return "-"
    sign = "+" if difference else ""
    text = f"{scale * figure['value']:{sign}.{digits}f}"
    low, high = figure["low"], figure["high"]
    if low is None or high is None:
        return f"{text}{_ALONE}"
    text += f" [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"
    return f"**{text}**" if difference and (low > 0 or high < 0) else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "*Not run yet.*"
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _setup(results: dict[str, Any]) -> str:
    settings, text, where = results["settings"], results["text"], results["conditions"]
    parts = text["parts"]
    runs = [each["seconds"] * len(each["seeds"]) for each in results["students"].values()]
    at_a_time = f", {results['sessions'][-1]['parallel']} at a time" if results["sessions"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in text["versions"].items())
    teacher, student = (
        f"{m['num_layers']} layers of width {m['hidden_size']}" for m in (settings["teacher"], settings["student"])
    )
    rows = [
        ("size", results["size"]),
        (
            "text",
            f"docstrings of {versions}: {parts['teacher']['characters'] / 1e6:.1f} MB for the teacher, "
            f"{parts['students']['characters'] / 1e6:.1f} MB for the students",
        ),
        ("vocabulary", f"{settings['vocab_size']:,} (byte-level BPE, trained here)"),
        ("teacher", f"Llama, {teacher}, {settings['teacher_positions']:,} positions"),
        ("students", f"Llama, {student}, {settings['warm_positions']:,} positions before they part"),
        ("each arm", f"{_most_positions(results):,} positions, each once, rows of {settings['context_length']}"),
        ("held out", f"{results['held_out']['positions']:,} positions of {results['held_out']['modules']:,} modules"),
        ("seeds", ", ".join(str(seed) for seed in settings["seeds"])),
        ("machine", f"{where['processor']}, {where['cores']} cores, PyTorch {where.get('torch', '?')}"),
        ("time of the students", f"{sum(runs) / 60:.0f} minutes, measuring included{at_a_time}"),
    ]
    return _table(("", ""), rows)


def _most_positions(results: dict[str, Any]) -> int:
    return max(int(each["positions_seen"]) for each in results["students"].values())


def _students(results: dict[str, Any]) -> str:
    header = ("student", "seeds", "KL to the teacher", "cross-entropy", "Full-ECE, %", "top-1 agreement, %", "minutes")
    rows = []
    special = [("the teacher", results.get("teacher")), ("before the arms part", results.get("start"))]
    for title, figures in special:
        if figures is not None:
            rows.append((title, "", *(text.removesuffix(_ALONE) for text in _figures(figures)), ""))
    for each in results["students"].values():
        rows.append((each["title"], str(len(each["seeds"])), *_figures(each), f"{each['seconds'] / 60:.1f}"))
    return _table(header, rows)


def _figures(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        shown(row["kl"]),
        shown(row["cross_entropy"]),
        shown(row["full_ece"], 2, scale=100),
        shown(row["top1_agreement"], 1, scale=100),
    )


def _live(results: dict[str, Any]) -> str:
    header = ("from the cache minus live teacher", "KL", "cross-entropy", "Full-ECE, points", "top-1 agreement, points")
    rows = [(loss, *_differences(each)) for loss, each in results["questions"]["cache_against_live"].items()]
    return _table(header, rows)


def _differences(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        shown(row["kl"], difference=True),
        shown(row["cross_entropy"], difference=True),
        shown(row["full_ece"], 2, difference=True, scale=100),
        shown(row["top1_agreement"], 2, difference=True, scale=100),
    )


def _tad(results: dict[str, Any]) -> str:
    found = results["questions"]["tad_against_kl"]
    header = ("K", "β", "KL: TAD minus KD", "the same, all cells at once", "cross-entropy", "Full-ECE, points")
    rows = [
        (
            str(cell["top_k"]),
            f"{cell['beta']:g}",
            shown(cell["kl"], difference=True),
            shown(cell["kl_simultaneous"], difference=True),
            shown(cell["cross_entropy"], difference=True),
            shown(cell["full_ece"], 2, difference=True, scale=100),
        )
        for cell in found["grid"]
    ]
    if "live" in found:
        live = found["live"]
        rows.append(
            (
                "10, live teacher",
                "2",
                shown(live["kl"], difference=True),
                "",
                shown(live["cross_entropy"], difference=True),
                shown(live["full_ece"], 2, difference=True, scale=100),
            )
        )
    return _table(header, rows)


def _weights(results: dict[str, Any]) -> str:
    header = (
        "",
        "KL minus that of KD",
        "cross-entropy",
        "Full-ECE, points",
        "KL: TAD (K=10, β=2) minus this",
        "cross-entropy: TAD minus this",
    )
    rows = [
        (
            results["students"][each["arm"]]["title"],
            shown(each["kl"], difference=True),
            shown(each["cross_entropy"], difference=True),
            shown(each["full_ece"], 2, difference=True, scale=100),
            shown(each["tad_kl"], difference=True),
            shown(each["tad_cross_entropy"], difference=True),
        )
        for each in results["questions"]["weights"]
    ]
    return _table(header, rows)


def _others(results: dict[str, Any]) -> str:
    header = ("minus KD from the cache", "KL", "cross-entropy", "Full-ECE, points", "top-1 agreement, points")
    return _table(
        header,
        [(results["students"][each["arm"]]["title"], *_differences(each)) for each in results["questions"]["others"]],
    )


def _top_k(results: dict[str, Any]) -> str:
    header = ("K", "tail", "KL", "cross-entropy", "Full-ECE, points", "student's mass off the teacher's top 10, points")
    rows = [
        (
            str(each["top_k"]),
            f"`{each['tail']}`",
            shown(each["kl"], difference=True),
            shown(each["cross_entropy"], difference=True),
            shown(each["full_ece"], 2, difference=True, scale=100),
            shown(each["student_tail"], 2, difference=True, scale=100),
        )
        for each in results["questions"]["top_k"]
    ]
    return _table(header, rows)


def _tails(results: dict[str, Any]) -> str:
    rows = [(f"`{tail}`", shown(kl, difference=True)) for tail, kl in results["questions"]["tails"].items()]
    return _table(("tail beyond K = 10", "KL minus that of `exact`"), rows)


def _worth(results: dict[str, Any]) -> str:
    rows = [
        (
            str(each["top_k"]),
            str(each["num_samples"]) if each["tail"] == "sampled" else f"`{each['tail']}`",
            f"{each['bytes_per_position']:.1f}",
            shown(each["kl"], difference=True),
        )
        for each in results["questions"]["worth"]
    ]
    return _table(("K", "m", "bytes per position", "KL minus that of KD with the live teacher"), rows)


def _tail_masses(results: dict[str, Any]) -> str:
    titles = {"study": "the study's teacher", "smollm2": "SmolLM2-135M-Instruct"}
    masses = [each["tail_mass"] for each in results["tails"].values()]
    ks = [k for k in ("1", "5", "10", "20", "32", "64") if any(k in mass for mass in masses)]
    header = ("teacher", "positions", "mismatch with the text, %", *(f"mass beyond K = {k}, %" for k in ks))
    rows = [
        (
            titles[name],
            f"{each['positions']:,}",
            shown(each["mismatch_rate"], 1, scale=100),
            *(shown(each["tail_mass"].get(k), 1, scale=100) for k in ks),
        )
        for name, each in results["tails"].items()
    ]
    return _table(header, rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "setup": _setup,
    "students": _students,
    "live": _live,
    "tad": _tad,
    "weights": _weights,
    "others": _others,
    "top_k": _top_k,
    "tails": _tails,
    "worth": _worth,
    "tail_masses": _tail_masses,
}
