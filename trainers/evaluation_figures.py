"""The figures of an evaluation, with intervals, from the sums of its documents.

Intervals are percentiles over resamples of the documents: they say how much a figure depends on which documents were
held out. Each document's KL contains the noise of its teacher's tail draws, so the KL's interval contains it too;
``kl_sampling_error`` is that noise alone. All figures share the same resamples.

ECE and Full-ECE are sums of absolute values: noise never cancels in them, so that they are a little too large for few
positions, and resamples, which are noisier, lie above the value.

Legend: D documents, M bins, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.bootstrap import Figure, Resampled
from tailcache.storage.errors import MismatchError

if TYPE_CHECKING:
    from tailcache.trainers.evaluation import DocumentSums

__all__ = ["SCALARS", "CalibrationBin", "Evaluation", "PositionBucket", "TailMass", "differences", "summarise"]

Floats = NDArray[np.float64]

SCALARS = (
    "cross_entropy",
    "perplexity",
    "bits_per_byte",
    "teacher_cross_entropy",
    "teacher_perplexity",
    "teacher_bits_per_byte",
    "kl",
    "top1_agreement",
    "top5_agreement",
    "accuracy",
    "teacher_accuracy",
    "ece",
    "teacher_ece",
    "full_ece",
    "teacher_full_ece",
)
"""The figures of an ``Evaluation`` that are one number of all positions."""


@dataclass(frozen=True, kw_only=True)
class TailMass:
    """Mean probability mass off the teacher's K most likely tokens."""

    top_k: int
    student: Figure
    teacher: Figure
    difference: Figure
    """Student minus teacher, paired."""


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """One bin (low, high] of predicted probability."""

    low: float
    high: float
    count: int
    """Predictions in it."""
    confidence: float | None
    """Their mean probability; none where there are none."""
    accuracy: float | None
    """The share of them that came true."""


@dataclass(frozen=True, kw_only=True)
class PositionBucket:
    """Positions that have read `first` to `last` tokens of their document's part within the row."""

    first: int
    last: int
    positions: int
    cross_entropy: Figure
    teacher_cross_entropy: Figure
    kl: Figure
    top1_agreement: Figure
    tail_mass: list[TailMass]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What ``summarise`` found. Nats per position unless said otherwise."""

    corpus_hash: str
    teacher: str
    teacher_hash: str
    top_k: int
    num_samples: int
    rows: int
    documents: int
    """With a target position; a document that spans rows is one."""
    positions: int
    num_bins: int
    confidence: float
    resamples: int
    seed: int
    kl_is: str
    """exact, unbiased or lower bound."""
    cross_entropy: Figure
    perplexity: Figure
    bits_per_byte: Figure | None
    teacher_cross_entropy: Figure
    teacher_perplexity: Figure
    teacher_bits_per_byte: Figure | None
    kl: Figure
    """KL(teacher‖student)."""
    kl_sampling_error: float | None
    """Standard error of the KL that is due to the teacher's tail draws; 0 where it is exact."""
    top1_agreement: Figure
    """How often student and teacher have the same most likely token."""
    top5_agreement: Figure | None
    """The mean share of the teacher's five most likely tokens that are among the student's."""
    accuracy: Figure
    """How often the student's most likely token is the true one."""
    teacher_accuracy: Figure
    ece: Figure
    teacher_ece: Figure
    full_ece: Figure
    teacher_full_ece: Figure | None
    tail_mass: list[TailMass]
    by_position: list[PositionBucket]
    calibration: dict[str, list[CalibrationBin]]
    """`student` and `teacher`: of the most likely token; `student_all` and `teacher_all`: of every token."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a figure is None, by its name."""

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not finite is null."""
        return {**_plain(self), "units": "nats per position, unless a name says otherwise"}


def summarise(sums: DocumentSums, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Evaluation:
    """Make the figures.

    Args:
      sums: of the documents.
      resamples: B; 0 for no intervals.
      confidence: of the intervals.
      seed: decides the resamples.

    Cost: 2 B D C operations for C columns.
    """
    maker = _Maker(sums, resamples=resamples, confidence=confidence, seed=seed)
    unavailable = maker.unavailable()
    figures = {name: maker.figure(values) for name, values in maker.scalars().items()}
    scalars: dict[str, Any] = {name: figures.get(name) for name in SCALARS}
    calibrated = {"student": "student_top", "teacher": "teacher_top", "student_all": "student_all"}
    if "teacher_full_ece" not in unavailable:
        calibrated["teacher_all"] = "teacher_all"
    return Evaluation(
        corpus_hash=sums.corpus_hash,
        teacher=sums.teacher,
        teacher_hash=sums.teacher_hash,
        top_k=sums.top_k,
        num_samples=sums.num_samples,
        rows=sums.num_rows,
        documents=len(sums.sums_DC),
        positions=int(maker.total("positions")),
        num_bins=sums.num_bins,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
        kl_is=sums.kl_is,
        kl_sampling_error=maker.kl_sampling_error(),
        tail_mass=maker.tail_masses(""),
        by_position=maker.by_position(),
        calibration={name: maker.calibration(columns) for name, columns in calibrated.items()},
        unavailable=unavailable,
        **scalars,
    )


def differences(
    first: DocumentSums, second: DocumentSums, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Figure]:
    """Second student minus first, paired: both figures of a resample are of the same documents.

    Args:
      first: sums of a student.
      second: sums of another one, over the same rows, against the same teacher and with the same bins.
      resamples: B; 0 for no intervals.
      confidence: of the intervals.
      seed: decides the resamples.

    Returns:
      The figures that both have, by the names of ``Evaluation``; those of the teacher alone are left out.

    Raises:
      MismatchError: other rows, another teacher or other bins.
    """
    for what in ("corpus_hash", "teacher_hash", "num_bins"):
        ours, theirs = getattr(first, what), getattr(second, what)
        if ours != theirs:
            raise MismatchError(f"differences: expected both students' {what} to agree, found {ours} and {theirs}")
    positions = [sums.sums_DC[:, sums.names.index("positions")] for sums in (first, second)]
    if not np.array_equal(positions[0], positions[1]):
        raise MismatchError(
            f"differences: expected both students on the same documents, found {len(positions[0])} and "
            f"{len(positions[1])} documents of other lengths"
        )
    maker, other = (_Maker(sums, resamples=resamples, confidence=confidence, seed=seed) for sums in (first, second))
    before, after = maker.scalars(), other.scalars()
    return {
        name: maker.figure(after[name] - values)
        for name, values in before.items()
        if name in after and not name.startswith("teacher_")
    }


class _Maker:
    """Figures from resampled sums."""

    def __init__(self, sums: DocumentSums, *, resamples: int, confidence: float, seed: int) -> None:
        self._sums = sums
        boot = Resampled(sums.sums_DC, list(sums.names), resamples=resamples, confidence=confidence, seed=seed)
        self.sum, self.figure = boot.__getitem__, boot.figure

    def scalars(self) -> dict[str, Floats]:
        """[1 + B] each: the figures of all positions that are available, by the names of ``Evaluation``."""
        unavailable = self.unavailable()
        found: dict[str, Floats] = {}
        for prefix, whose in (("", "student"), ("teacher_", "teacher")):
            cross_entropy = self.mean(f"{prefix}cross_entropy")
            found[f"{prefix}cross_entropy"] = cross_entropy
            with np.errstate(over="ignore"):  # a student can be so wrong that it is infinite
                found[f"{prefix}perplexity"] = np.exp(cross_entropy)
            if f"{prefix}bits_per_byte" not in unavailable:
                found[f"{prefix}bits_per_byte"] = self.sum(f"{prefix}cross_entropy") / (self.sum("bytes") * math.log(2))
            found[f"{prefix}accuracy"] = self._bins(f"{whose}_top_hits").sum(axis=0) / self.sum("positions")
            found[f"{prefix}ece"] = self._calibration_error(f"{whose}_top")
            if f"{prefix}full_ece" not in unavailable:
                found[f"{prefix}full_ece"] = self._calibration_error(f"{whose}_all")
        agreements = [name for name in ("top1_agreement", "top5_agreement") if name not in unavailable]
        return found | {name: self.mean(name) for name in ("kl", *agreements)}

    def unavailable(self) -> dict[str, str]:
        """Why a figure cannot be given, by its name."""
        sums = self._sums
        why: dict[str, str] = {}
        if (no_bytes := self._why_no_bytes()) is not None:
            why |= dict.fromkeys(("bits_per_byte", "teacher_bits_per_byte"), f"the corpus' tokenizer: {no_bytes}")
        if self.kl_sampling_error() is None:
            why["kl_sampling_error"] = (
                "no tail draws are stored, and the KL is a lower bound"
                if sums.num_samples == 0
                else "a single tail draw per position does not tell"
            )
        if "top5_agreement" not in sums.names:
            why["top5_agreement"] = f"only {sums.top_k} tokens per position are stored"
        if undecided := int(self.total("undecided")):
            why["teacher_full_ece"] = (
                f"at {undecided} positions a token beyond the stored {sums.top_k} may have left the lowest of "
                f"{sums.num_bins} bins; use at most {sums.top_k} bins"
            )
        return why

    def total(self, name: str) -> float:
        """The sum over all documents as they are."""
        return float(self.sum(name)[0])

    def mean(self, name: str, bucket: str = "") -> Floats:
        """[1 + B] of the positions, or those of a bucket."""
        return _ratio(self.sum(name + bucket), self.sum("positions" + bucket))

    def _why_no_bytes(self) -> str | None:
        if self._sums.no_bytes is not None:
            return self._sums.no_bytes
        if np.isnan(self.total("bytes")):
            return "the text has unknown tokens, whose bytes are lost"
        return None if self.total("bytes") > 0 else "there is no text among the target tokens"

    def kl_sampling_error(self) -> float | None:
        """Square root of the variances' sum; positions with a single draw have the average one's variance."""
        if self._sums.kl_is == "exact":
            return 0.0
        known, single = self.total("weight_known"), self.total("weight_single")
        if self._sums.num_samples == 0 or (single > 0 and known == 0):
            return None
        of_one = self.total("draw_variance") / known if known > 0 else 0.0
        return math.sqrt(self.total("kl_variance") + single * of_one) / self.total("positions")

    def _bins(self, name: str) -> Floats:
        """[M, 1 + B]."""
        return np.stack([self.sum(f"{name}[{m}]") for m in range(self._sums.num_bins)])

    def _calibration_error(self, name: str) -> Floats:
        """[1 + B] the sum over bins of |hits - mass|, per position."""
        gaps = np.abs(self._bins(f"{name}_hits") - self._bins(f"{name}_mass")).sum(axis=0)
        return _ratio(gaps, self.sum("positions"))

    def calibration(self, name: str) -> list[CalibrationBin]:
        num = self._sums.num_bins
        found = []
        for m in range(num):
            count, mass, hits = (self.total(f"{name}_{what}[{m}]") for what in ("count", "mass", "hits"))
            found.append(
                CalibrationBin(
                    low=m / num,
                    high=(m + 1) / num,
                    count=round(count),
                    confidence=mass / count if count else None,
                    accuracy=hits / count if count else None,
                )
            )
        return found

    def tail_masses(self, bucket: str) -> list[TailMass]:
        num = self.sum(f"positions{bucket}")
        found = []
        for i, top_k in enumerate(self._sums.tail_ks):
            student, teacher = (_ratio(self.sum(f"{whose}_tail[{i}]{bucket}"), num) for whose in ("student", "teacher"))
            found.append(
                TailMass(
                    top_k=top_k,
                    student=self.figure(student),
                    teacher=self.figure(teacher),
                    difference=self.figure(student - teacher),
                )
            )
        return found

    def by_position(self) -> list[PositionBucket]:
        found = []
        for b in range(self._sums.num_buckets):
            at, count = f"@{b}", round(self.total(f"positions@{b}"))
            if count:
                found.append(
                    PositionBucket(
                        first=2**b,
                        last=2 ** (b + 1) - 1,
                        positions=count,
                        cross_entropy=self.figure(self.mean("cross_entropy", at)),
                        teacher_cross_entropy=self.figure(self.mean("teacher_cross_entropy", at)),
                        kl=self.figure(self.mean("kl", at)),
                        top1_agreement=self.figure(self.mean("top1_agreement", at)),
                        tail_mass=self.tail_masses(at),
                    )
                )
        return found


def _ratio(sums: Floats, counts: Floats) -> Floats:
    """Quotients; NaN where a resample has no such position."""
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return value.to_json()
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
