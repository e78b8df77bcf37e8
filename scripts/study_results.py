"""From the files of all runs to results.json: every figure with its interval, and the differences behind each question.

Nothing is trained or read from a cache here, so results can be made while a study runs (of the arms that have finished)
and again afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tailcache.scripts.study_arms import BETAS, DEFAULT, SPLITS, WEIGHTS, Arm
from tailcache.scripts.study_run import START, read_run, run_path
from tailcache.scripts.study_statistics import METRICS, ArmSums, Intervals
from tailcache.storage.bootstrap import Figure
from tailcache.storage.errors import IncompleteError

__all__ = ["Runs", "figures_of", "questions_of"]

CURVES = ("clm", "kd-online", "kd", "tad-online", "tad-k10-b2", "kd-k10-renormalise", "rs-kd")
"""The arms whose learning curves are shown."""


class Runs:
    """The runs of a study that have finished, by arm."""

    def __init__(self, out: Path, chosen: tuple[Arm, ...], seeds: tuple[int, ...]) -> None:
        """Read all of them.

        Raises:
          IncompleteError: not one has finished.
        """
        self.arms = chosen
        self.sums: dict[str, ArmSums] = {}
        self.records: dict[str, list[dict[str, Any]]] = {}
        self.curves: dict[str, tuple[list[int], list[ArmSums]]] = {}
        starts = self._read(out, START, seeds)
        self.start = starts[0] if starts else None
        for arm in chosen:
            found = self._read(out, arm.name, seeds)
            if found is not None:
                self.sums[arm.name], self.records[arm.name], curve = found
                self.curves[arm.name] = curve
        if not self.sums:
            raise IncompleteError(f"{out}: expected a run that has finished, found none; run the study again")
        teacher = self._read(out, "teacher", (0,))
        self.teacher = teacher[0] if teacher else None
        first = next(iter(self.sums.values()))
        self.num_modules = first.sums.shape[1]
        self.intervals = Intervals(self.num_modules)
        self.positions = int(first.sums[0, :, 0].sum())

    def _read(self, out: Path, name: str, seeds: tuple[int, ...]) -> Any:
        """The sums, the records and the curve of an arm; None if it has no run."""
        there = [seed for seed in sorted(seeds) if run_path(out, name, seed).is_file()]
        if not there:
            return None
        arrays, records = zip(*(read_run(run_path(out, name, seed)) for seed in there), strict=True)
        stacked = {key: np.stack([each[key] for each in arrays]) for key in ("final", "hits", "mass")}
        whole = ArmSums(seeds=tuple(there), sums=stacked["final"], hits=stacked["hits"], mass=stacked["mass"])
        curve: tuple[list[int], list[ArmSums]] = ([], [])
        if "curve" in arrays[0]:
            points_PRCS = np.stack([each["curve"] for each in arrays], axis=1)
            at = [int(position) for position in arrays[0]["curve_positions"]]
            curve = at, [ArmSums(seeds=tuple(there), sums=point) for point in points_PRCS]
        return whole, list(records), curve


def figures_of(runs: Runs, *, curve_share: int) -> dict[str, Any]:
    """Each arm's figures, and the learning curves of some.

    Args:
      runs: those that have finished.
      curve_share: the curves are measured on one held-out row of so many.
    """
    students = {
        name: {
            **_row(runs, sums),
            "title": next(arm.title for arm in runs.arms if arm.name == name),
            "group": next(arm.group for arm in runs.arms if arm.name == name),
            "seeds": list(sums.seeds),
            "positions_seen": runs.records[name][0]["positions_seen"],
            "seconds": float(np.mean([each["seconds"]["all"] for each in runs.records[name]])),
        }
        for name, sums in runs.sums.items()
    }
    found: dict[str, Any] = {"students": students, "curves": {}}
    if runs.teacher is not None:
        found["teacher"] = _row(runs, runs.teacher)
    if runs.start is not None:
        found["start"] = _row(runs, runs.start)
    for name in CURVES:
        if name not in runs.curves:
            continue
        at, points = runs.curves[name]
        some = Intervals(points[0].sums.shape[1])
        if runs.start is not None:
            start = runs.start.only([s for s in runs.start.seeds if s in points[0].seeds])
            at, points = [0, *at], [ArmSums(seeds=start.seeds, sums=start.sums[:, ::curve_share]), *points]
        found["curves"][name] = {
            metric: [
                {"positions": p, **some.figure(metric, point).to_json()} for p, point in zip(at, points, strict=True)
            ]
            for metric in ("kl", "cross_entropy")
        }
    return found


def _row(runs: Runs, sums: ArmSums) -> dict[str, Any]:
    return {metric: runs.intervals.figure(metric, sums).to_json() for metric in METRICS}


def questions_of(runs: Runs, bytes_per_position: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The paired differences behind each question; those whose arms have not finished are left out.

    Args:
      runs: those that have finished.
      bytes_per_position: of each set of targets, see ``study_caches.bytes_of``.

    Returns:
      cache_against_live: cache minus live teacher, KD and TAD, every metric. tad_against_kl: held-out KL of TAD minus
      that of KD from the same cache, with single intervals and such that hold for the whole grid at once; and for the
      live teacher. weights: KD whose divergence has more weight, or all of it, minus KD; and TAD minus each of these,
      TAD without CLM where KD is without. others: the other losses minus KD, every metric. top_k: plain top-K, and
      the sampled tail at the same K, minus KD with the live teacher. tails: each tail choice at K = 10 minus the exact
      one. worth: K and m, bytes, and KL minus that of KD with the live teacher.
    """
    return {
        "cache_against_live": {
            label: {metric: _paired(runs, cached, live, metric) for metric in METRICS}
            for label, cached, live in (("KD", "kd", "kd-online"), ("TAD (K=10, β=2)", "tad-k10-b2", "tad-online"))
            if _have(runs, cached, live)
        },
        "tad_against_kl": _tad_against_kl(runs),
        "weights": [
            {
                "arm": name,
                **{metric: _paired(runs, name, "kd", metric) for metric in ("kl", "cross_entropy", "full_ece")},
                "tad_kl": _paired(runs, tad, name, "kl"),
                "tad_cross_entropy": _paired(runs, tad, name, "cross_entropy"),
            }
            for name, tad in (*((f"kd-w{w:g}", "tad-k10-b2") for w in WEIGHTS), ("kd-alone", "tad-alone"))
            if _have(runs, name, "kd") and _have(runs, name, tad)
        ],
        "others": [
            {"arm": arm.name, **{metric: _paired(runs, arm.name, "kd", metric) for metric in METRICS}}
            for arm in runs.arms
            if arm.group == "others" and _have(runs, arm.name, "kd")
        ],
        "top_k": [
            {"top_k": k, "tail": tail, "arm": name, **_against_live(runs, name)}
            for k in (10, DEFAULT[0], 64)
            for tail, name in (
                ("drop", f"kd-k{k}-drop"),
                ("renormalise", f"kd-k{k}-renormalise"),
                ("sampled", {10: "kd-k10-sampled", DEFAULT[0]: "kd", 64: "kd-k64-m64"}[k]),
            )
            if _have(runs, name, "kd-online")
        ],
        "tails": {
            tail: _paired(runs, f"kd-k10-{tail}", "kd-k10-exact", "kl")
            for tail in ("sampled", "bucket", "prior", "uniform", "drop", "renormalise")
            if _have(runs, f"kd-k10-{tail}", "kd-k10-exact")
        },
        "worth": _worth(runs, bytes_per_position),
    }


def _have(runs: Runs, *names: str) -> bool:
    have = [set(runs.sums[name].seeds) for name in names if name in runs.sums]
    return len(have) == len(names) and bool(set.intersection(*have))


def _paired(runs: Runs, first: str, second: str, metric: str, comparisons: int = 1) -> dict[str, float | None]:
    found: Figure = runs.intervals.difference(metric, runs.sums[first], runs.sums[second], comparisons=comparisons)
    return found.to_json()


def _against_live(runs: Runs, name: str) -> dict[str, Any]:
    return {
        metric: _paired(runs, name, "kd-online", metric)
        for metric in ("kl", "cross_entropy", "full_ece", "student_tail")
    }


def _tad_against_kl(runs: Runs) -> dict[str, Any]:
    names = {(k, beta): f"tad-k{k}-b{beta:g}" for k in SPLITS for beta in BETAS}
    there = {key: name for key, name in names.items() if _have(runs, name, "kd")}
    found: dict[str, Any] = {
        "grid": [
            {
                "top_k": k,
                "beta": beta,
                "kl": _paired(runs, name, "kd", "kl"),
                "kl_simultaneous": _paired(runs, name, "kd", "kl", comparisons=len(there)),
                "cross_entropy": _paired(runs, name, "kd", "cross_entropy"),
                "full_ece": _paired(runs, name, "kd", "full_ece"),
            }
            for (k, beta), name in there.items()
        ]
    }
    if _have(runs, "tad-online", "kd-online"):
        found["live"] = {m: _paired(runs, "tad-online", "kd-online", m) for m in METRICS}
    return found


def _worth(runs: Runs, bytes_per_position: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    found = []
    for arm in runs.arms:
        tail = (arm.loss or {}).get("tail")
        if (arm.loss or {}).get("name") != "kd" or arm.online or tail not in ("sampled", "renormalise", "exact"):
            continue
        if arm.group == "weights" or not _have(runs, arm.name, "kd-online"):
            continue
        size = bytes_per_position[arm.cache.name]
        needed = {"sampled": size["targets"], "renormalise": size["top_k"], "exact": size["targets"] + size["hidden"]}
        found.append(
            {
                "arm": arm.name,
                "top_k": arm.cache.top_k,
                "num_samples": arm.cache.num_samples if tail == "sampled" else 0,
                "tail": tail,
                "bytes_per_position": needed[tail],
                "kl": _paired(runs, arm.name, "kd-online", "kl"),
            }
        )
    return sorted(found, key=lambda each: (each["tail"], each["bytes_per_position"]))
