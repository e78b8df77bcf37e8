"""An evaluation for people: a table in plain text, and its plots."""

from __future__ import annotations

import math
import textwrap

from tailcache.pipeline.plots import Points, curves_png
from tailcache.pipeline.tables import aligned, number, percent
from tailcache.storage.bootstrap import Figure
from tailcache.trainers.evaluate_run import EvaluatedStudent
from tailcache.trainers.evaluation_figures import CalibrationBin, Evaluation, PositionBucket, TailMass

__all__ = ["evaluation_plots", "evaluation_text"]

_MIN_POSITIONS = 30
_SHOWN_TAIL = 10
_NAMES = {
    "bits_per_byte": "bits per byte",
    "teacher_bits_per_byte": "teacher's bits per byte",
    "kl_sampling_error": "error of the KL by the draws",
    "top5_agreement": "top-5 agreement",
    "teacher_full_ece": "teacher's Full-ECE",
}
_NOTES = (
    "Intervals are about which documents were held out. cross-entropy, perplexity, bits per byte: of the true next "
    "tokens. top-1 = text: the most likely token is the true next one. ECE: of the most likely token's probability; "
    "Full-ECE: of every token's. Both are a little too large for few positions, and their intervals lie high.",
    "top-5 agreement: the share of the teacher's five most likely tokens that are among the student's five.",
)


def evaluation_text(student: EvaluatedStudent) -> str:
    """The evaluation as tables for a terminal."""
    e = student.evaluation
    percent_of = f"{100 * e.confidence:g} %"
    intervals = (
        f"in brackets: {percent_of} intervals from {e.resamples:,} resamples of the documents"
        if e.resamples and e.documents > 1
        else "no intervals: they need at least two documents and --resamples above 0"
    )
    lines = [
        f"student {student.name}: {student.model_class}, {student.num_parameters:,} parameters, {student.precision} on "
        f"{student.device}",
        f"teacher {e.teacher}: K = {e.top_k}, {e.num_samples} tail draws",
        f"corpus {e.corpus_hash[:12]}…, rows: {student.split} ({e.rows:,}), {e.documents:,} documents, {e.positions:,} "
        "positions",
        intervals,
        *(f"note: {note}" for note in student.notes),
        "",
        *aligned(_levels(e)),
        *aligned(_closeness(e)),
        *aligned(_tails(e.tail_mass)),
        *aligned(_by_position(e.by_position), max_columns=8),
    ]
    lines += [f"{_NAMES[name]}: not known, since {reason}" for name, reason in e.unavailable.items()]
    return "\n".join([*lines, *(textwrap.fill(note, 110) for note in _NOTES)])


def _levels(e: Evaluation) -> list[list[str]]:
    def row(name: str, student: Figure | None, teacher: Figure | None, digits: int) -> list[str]:
        return [name, *("-" if figure is None else number(figure, digits) for figure in (student, teacher))]

    return [
        ["on the text", "student", "teacher"],
        row("cross-entropy (nats)", e.cross_entropy, e.teacher_cross_entropy, 4),
        row("perplexity", e.perplexity, e.teacher_perplexity, 3),
        row("bits per byte", e.bits_per_byte, e.teacher_bits_per_byte, 4),
        ["top-1 = text (%)", percent(e.accuracy), percent(e.teacher_accuracy)],
        row(f"ECE, {e.num_bins} bins", e.ece, e.teacher_ece, 4),
        row(f"Full-ECE, {e.num_bins} bins", e.full_ece, e.teacher_full_ece, 4),
    ]


def _closeness(e: Evaluation) -> list[list[str]]:
    error = "" if e.kl_sampling_error is None or e.kl_is == "exact" else f" ± {e.kl_sampling_error:.2g} by the draws"
    return [
        ["student against teacher", ""],
        [f"KL(teacher‖student) (nats), {e.kl_is}", number(e.kl, 4) + error],
        ["top-1 agreement (%)", percent(e.top1_agreement)],
        *([["top-5 agreement (%)", percent(e.top5_agreement)]] if e.top5_agreement is not None else []),
    ]


def _tails(masses: list[TailMass]) -> list[list[str]]:
    return [
        ["mass off the teacher's top K", "student", "teacher", "student - teacher"],
        *(
            [f"K = {m.top_k}", number(m.student, 4), number(m.teacher, 4), number(m.difference, 4, sign=True)]
            for m in masses
        ),
    ]


def _shown(masses: list[TailMass]) -> TailMass:
    """The tail mass at K = 10, or the next below."""
    return max((m for m in masses if m.top_k <= _SHOWN_TAIL), key=lambda m: m.top_k, default=masses[0])


def _by_position(buckets: list[PositionBucket]) -> list[list[str]]:
    k = _shown(buckets[0].tail_mass).top_k
    heads = ("positions", "cross-entropy", "teacher's", "KL", "top-1 agr. (%)", f"mass off top {k}", "teacher's")
    rows = []
    for b in buckets:
        mass = _shown(b.tail_mass)
        plain = (b.cross_entropy, b.teacher_cross_entropy, b.kl)
        rows.append(
            [
                f"{b.first:,} to {b.last:,}" if b.last > b.first else f"{b.first}",
                f"{b.positions:,}",
                *(f"{figure.value:.4f}" for figure in plain),
                f"{100 * b.top1_agreement.value:.1f}",
                f"{mass.student.value:.4f}",
                f"{mass.teacher.value:.4f}",
            ]
        )
    return [["tokens read", *heads], *rows]


def evaluation_plots(student: EvaluatedStudent) -> dict[str, bytes]:
    """The plots by name, as the bytes of PNG files."""
    e = student.evaluation
    where = f"{e.positions:,} positions, rows: {student.split}"
    band = f"band: {100 * e.confidence:g} % interval over documents"
    calibration = e.calibration
    plots = {
        "calibration": curves_png(
            {
                "as likely as it says": [(0.0, 0.0), (1.0, 1.0)],
                "student": _curve(calibration["student"]),
                "teacher": _curve(calibration["teacher"]),
            },
            title=f"Calibration of the most likely token ({where})",
            xlabel="its probability, mean of the bin",
            ylabel="share that came true",
        ),
        "calibration_all_tokens": curves_png(
            {
                "as likely as it says": [(0.0, 0.0), (1.0, 1.0)],
                "student": _curve(calibration["student_all"]),
                **({"teacher": _curve(calibration["teacher_all"])} if "teacher_all" in calibration else {}),
            },
            title=f"Calibration of every token's probability ({where})",
            xlabel="probability, mean of the bin",
            ylabel="share that came true",
        ),
        "tail_mass": curves_png(
            {
                "student": [(m.top_k, m.student.value) for m in e.tail_mass],
                "teacher": [(m.top_k, m.teacher.value) for m in e.tail_mass],
            },
            bands={
                "student": _band([(m.top_k, m.student) for m in e.tail_mass]),
                "teacher": _band([(m.top_k, m.teacher) for m in e.tail_mass]),
            },
            title=f"Mass off the teacher's K most likely tokens ({where};\n{band})",
            xlabel="K",
            ylabel="mean mass (probability)",
            xscale="log",
        ),
    }
    buckets = [b for b in e.by_position if b.positions >= _MIN_POSITIONS] or e.by_position
    label = "tokens read of the document (each point: from here to the next)"
    plots["kl_by_position"] = curves_png(
        {"student": [(b.first, b.kl.value) for b in buckets]},
        bands={"student": _band([(b.first, b.kl) for b in buckets])},
        title=f"KL(teacher‖student) by position ({where};\n{band})",
        xlabel=label,
        ylabel="KL (nats per position)",
        xscale="log",
    )
    shown = [(b.first, _shown(b.tail_mass)) for b in buckets]
    plots["tail_mass_by_position"] = curves_png(
        {
            "student": [(x, m.student.value) for x, m in shown],
            "teacher": [(x, m.teacher.value) for x, m in shown],
        },
        bands={
            "student": _band([(x, m.student) for x, m in shown]),
            "teacher": _band([(x, m.teacher) for x, m in shown]),
        },
        title=f"Mass off the teacher's {shown[0][1].top_k} most likely tokens by position ({where};\n{band})",
        xlabel=label,
        ylabel="mean mass (probability)",
        xscale="log",
    )
    return plots


def _curve(bins: list[CalibrationBin]) -> Points:
    return [(b.confidence, b.accuracy) for b in bins if b.confidence is not None and b.accuracy is not None]


def _band(points: list[tuple[float, Figure]]) -> list[tuple[float, float, float]]:
    return [(x, f.low, f.high) for x, f in points if f.low is not None and f.high is not None and math.isfinite(f.high)]
