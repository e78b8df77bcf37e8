"""A comparison for people: a table in plain text, and one HTML file with the table and the plots inside."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from tailcache.pipeline.compare import Comparison, TeacherFigures
from tailcache.pipeline.tables import aligned, number, page, percent

__all__ = ["comparison_html", "comparison_text"]

_SHOWN_TAILS = (1, 5, 10, 20, 50)
_NOTES = (
    "perplexity, cross-entropy: on the true next tokens. entropy: of the whole distribution, exact. alpha_K: mass "
    "beyond the K most likely tokens. mismatch: the most likely token is not the true next one.",
    "KL lower bound: certain for the distributions as stored; tokens in both heads, the true token, and everything "
    "else as one atom.",
    "KL estimate: what lies beyond the second teacher's stored tokens is filled from its mean tail, less the error "
    "that the same makes for the first teacher against itself. It assumes that the first's tail tells as much about "
    "the second's as about its own; the intervals do not cover that.",
)


def comparison_text(comparison: Comparison) -> str:
    """The comparison as a table for a terminal."""
    percent = f"{100 * comparison.confidence:g} %"
    intervals = (
        f"in brackets: {percent} intervals from {comparison.resamples:,} resamples of the rows"
        if comparison.resamples and comparison.rows > 1
        else "no intervals: they need at least two rows and --resamples above 0"
    )
    lines = [
        f"corpus {comparison.corpus_hash[:12]}…, rows: {comparison.split} ({comparison.rows:,} with targets), "
        f"{comparison.positions:,} positions",
        intervals,
        "",
    ]
    if comparison.prefix_rows is not None:
        lines[1:1] = [f"only the first {comparison.prefix_rows:,} rows: a capture has not finished"]
    lines += aligned(_teacher_table(comparison))
    if comparison.pairs:
        lines += [*aligned(_pair_table(comparison)), *aligned(_kl_table(comparison))]
    if comparison.left_out:
        lines += [f"left out, since their capture has not finished: {', '.join(comparison.left_out)}", ""]
    notes = _NOTES if comparison.pairs else _NOTES[:1]
    return "\n".join([*lines, *(textwrap.fill(note, 110) for note in notes)])


def comparison_html(comparison: Comparison, plots: dict[str, bytes]) -> str:
    """The comparison as one HTML page that needs no other file.

    Args:
      comparison: what was found.
      plots: PNG files by name, shown in this order.
    """
    title = "tailcache compare: " + ", ".join(t.label for t in comparison.teachers)
    return page(title, comparison_text(comparison), plots)


def _teacher_table(comparison: Comparison) -> list[list[str]]:
    teachers = comparison.teachers

    def row(name: str, cell: Callable[[TeacherFigures], str]) -> list[str]:
        return [name, *(cell(t) for t in teachers)]

    tails = sorted({k for t in teachers for k in (*_SHOWN_TAILS, t.top_k) if k in t.tail_mass})

    def tail(k: int) -> Callable[[TeacherFigures], str]:
        return lambda t: number(t.tail_mass[k], 4) if k in t.tail_mass else "-"

    fields = list(dict.fromkeys(name for t in teachers for name in t.bytes_per_position))

    def field(name: str) -> Callable[[TeacherFigures], str]:
        return lambda t: f"{t.bytes_per_position[name]:.1f}" if name in t.bytes_per_position else "-"

    return [
        row("teacher", lambda t: t.label),
        row("stored", lambda t: f"K = {t.top_k}, {t.num_samples} tail samples"),
        row("perplexity", lambda t: number(t.perplexity, 3)),
        row("cross-entropy (nats)", lambda t: number(t.cross_entropy, 4)),
        row("entropy (nats)", lambda t: number(t.entropy, 4)),
        row("top-1 = text (%)", lambda t: percent(t.top1_accuracy)),
        row("mismatch with text (%)", lambda t: percent(t.mismatch_rate)),
        row("top-1 probability", lambda t: number(t.top1_probability, 4)),
        row("text in stored top-K (%)", lambda t: percent(t.target_in_head)),
        *(row(f"alpha_{k}", tail(k)) for k in tails),
        row("bytes per position", lambda t: f"{sum(t.bytes_per_position.values()):.1f}"),
        *(row(f"  {name}", field(name)) for name in fields),
    ]


def _pair_table(comparison: Comparison) -> list[list[str]]:
    pairs = comparison.pairs
    return [
        ["second minus first", *(f"{p.first} → {p.second}" for p in pairs)],
        ["top-1 agreement (%)", *(percent(p.top1_agreement) for p in pairs)],
        ["perplexity", *(number(p.perplexity_difference, 3, sign=True) for p in pairs)],
        ["cross-entropy (nats)", *(number(p.cross_entropy_difference, 4, sign=True) for p in pairs)],
        ["entropy (nats)", *(number(p.entropy_difference, 4, sign=True) for p in pairs)],
        ["top-1 = text (%)", *(percent(p.top1_accuracy_difference, sign=True) for p in pairs)],
    ]


def _kl_table(comparison: Comparison) -> list[list[str]]:
    return [
        ["KL (nats per position)", "lower bound", "estimate"],
        *(
            [f"{d.first} ‖ {d.second}", number(d.kl_lower_bound, 4), number(d.kl_estimate, 4)]
            for d in comparison.divergences
        ),
    ]
