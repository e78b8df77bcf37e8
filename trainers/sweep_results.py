"""What the runs of a sweep have left in their folders, read back from their own files.

Nothing is kept in memory from one to the other: a table made while they train, after a restart or years later comes
from the same files. Light to import: no torch.

    OUT/
      sweep.lock            while a sweep works here
      NAME/                 a run: everything `tailcache train` leaves there (see ``records``), and
        settings.json         what it was asked to be, written before it begins
        evaluation.json       what `tailcache evaluate` says of the finished student
        error.txt             why it failed, while it has: one line, then the traceback
        log.txt               what it printed, where runs go in parallel
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tailcache.storage.errors import CorruptError
from tailcache.trainers.records import RECORD, JsonLines, last_checkpoint, read_record

if TYPE_CHECKING:
    from tailcache.trainers.config import TrainConfig

__all__ = [
    "ERROR",
    "EVALUATION",
    "LOG",
    "SETTINGS",
    "RunResult",
    "may_be_evaluated",
    "read_result",
    "read_settings",
    "share_done",
]

SETTINGS, ERROR, LOG, EVALUATION = "settings.json", "error.txt", "log.txt", "evaluation.json"

_LOG_END = 4096

Status = Literal["finished", "failed", "interrupted", "not begun"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One run, as far as it has come.

    Attributes:
      name: the run's.
      folder: where it lies.
      status: `finished` has a student; `failed` may have one, which could not be evaluated; `interrupted` has begun and
        done neither: it is running, or was killed.
      error: of a failed run, one line.
      record: tailcache.json of a student that has been saved; empty otherwise.
      curve: the held-out evaluations so far, with "step", "positions_seen" and the metrics (see ``metrics``).
      evaluation: evaluation.json of such a student; empty where there is none.
      seconds: of training so far, without evaluations; None where nothing has been timed.
      positions_per_s: target positions trained on per second, over the same time.
    """

    name: str
    folder: Path
    status: Status
    error: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    curve: tuple[dict[str, Any], ...] = ()
    evaluation: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    positions_per_s: float | None = None

    @property
    def final(self) -> dict[str, Any] | None:
        """The held-out metrics of the finished student; None if it has none."""
        return self.curve[-1] if self.record and self.curve else None

    @property
    def positions_seen(self) -> int:
        """Target positions trained on: all of them for a finished run, else up to its last evaluation."""
        if "positions_seen" in self.record:
            return int(self.record["positions_seen"])
        return int(self.curve[-1]["positions_seen"]) if self.curve else 0

    @property
    def hours(self) -> float | None:
        """Of training, without evaluations and without work that a restart did again."""
        return None if self.positions_per_s is None else self.positions_seen / self.positions_per_s / 3600


def read_result(name: str, folder: Path) -> RunResult:
    """What a run has left in its folder.

    Args:
      name: the run's.
      folder: where it lies; may be missing.

    Raises:
      CorruptError: a record is not what was written.
    """
    record: dict[str, Any] = {}
    error = None
    status: Status = "not begun"
    if (folder / RECORD).is_file():
        status, record = "finished", read_record(folder)
    if (folder / ERROR).is_file():
        status = "failed"
        error = ((folder / ERROR).read_text(encoding="utf-8").splitlines() or ["no reason was left"])[0]
    elif not record and ((folder / SETTINGS).exists() or last_checkpoint(folder) is not None):
        status = "interrupted"
    timed = [line for line in JsonLines(folder / "timing.jsonl").read() if "seconds" in line]
    seconds = sum(line["seconds"] for line in timed)
    positions = sum(line["positions"] for line in timed)
    return RunResult(
        name=name,
        folder=folder,
        status=status,
        error=error,
        record=record,
        curve=tuple(JsonLines(folder / "metrics.jsonl").read()),
        evaluation=(_read_object(folder / EVALUATION) or {}) if record else {},
        seconds=seconds or None,
        positions_per_s=positions / seconds if seconds and positions else None,
    )


def may_be_evaluated(config: TrainConfig) -> bool:
    """Whether a finished run has a student of its own (no adapters alone) and one teacher to compare it with."""
    return not config.teachers and (config.out / "config.json").is_file()


def share_done(config: TrainConfig) -> float:
    """How much of a run has been trained, between 0 and 1, by the last line of its log; cheap, however long it is."""
    path = config.out / "training.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_END))
            lines = file.read().splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off, or still being written
            last = json.loads(line)
            share = last["epoch"] / config.epochs if config.max_steps is None else last["step"] / config.max_steps
            return float(min(max(share, 0.0), 1.0))
    return 0.0


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings a run was begun with; None if it was not begun by a sweep.

    Raises:
      CorruptError: the file is not what was written.
    """
    return _read_object(folder / SETTINGS)


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptError(f"{path}: expected JSON, found something else ({error})") from error
    if not isinstance(found, dict):
        raise CorruptError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
