"""What a training run leaves beside the weights: tailcache.json, metrics.jsonl, training.jsonl, timing.jsonl.

    OUT/
      config.json, model.safetensors, tokenizer.json, ...   the student, as transformers reads it
      tailcache.json        what it was trained from (hashes) and how (the resolved settings)
      metrics.jsonl         one line per held-out evaluation
      training.jsonl        one line per `log_every` steps, at every checkpoint and at the end: loss and its parts
      timing.jsonl          for the same steps: seconds without evaluations, positions, the share of waiting for data
      checkpoint-STEP/      to resume from; complete if and only if it has a tailcache.json, written last

A run that is killed and resumed takes off the lines of steps it will do again, so the curves have one value
per step.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from tailcache.storage import durable
from tailcache.storage.errors import ConfigError, CorruptError, MismatchError, NotFoundError

__all__ = [
    "FREE_SETTINGS",
    "RECORD",
    "JsonLines",
    "check_resumable",
    "last_checkpoint",
    "read_record",
    "refuse_existing",
    "resolved",
    "write_record",
]

RECORD = "tailcache.json"

FREE_SETTINGS = {
    "cache",
    "out",
    "device",
    "threads",
    "workers",
    "head_mode",
    "eval_every",
    "eval_rows",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "resume",
    "unfinished",
    "wait_minutes",
    "epochs",
    "max_steps",
    "rows_per_step",
    "gradient_checkpointing",
    "distributed",
    "fsdp_reshard",
    "fsdp_offload",
    "fsdp_checkpoints",
    "report_to",
    "run_name",
    "project",
    "hub_model_id",
    "hub_private",
    "hub_strategy",
}
"""Settings that may differ between a run and its continuation: they change where, how often or how long, not what."""


def resolved(config: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON, defaults filled in."""
    result = _plain(config)
    assert isinstance(result, dict)
    return result


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write FOLDER/tailcache.json atomically."""
    durable.make_folder(folder)
    durable.write_file(folder / RECORD, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def read_record(folder: Path) -> dict[str, Any]:
    """Read FOLDER/tailcache.json.

    Raises:
      NotFoundError: there is none.
      CorruptError: it is not JSON.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise NotFoundError(f"{path}: expected the record of a training run, found none") from None
    except ValueError as error:
        raise CorruptError(f"{path}: expected JSON, found something else ({error})") from error
    if not isinstance(record, dict):
        raise CorruptError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


def last_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint with the highest step in OUT, or None."""
    found = [(int(m[1]), p) for p in out.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    complete = [(step, p) for step, p in found if (p / RECORD).is_file()]
    return max(complete)[1] if complete else None


def check_resumable(checkpoint: Path, expected: dict[str, Any], *, num_processes: int = 1) -> dict[str, Any]:
    """Refuse to continue a run with other data or another loss than it began with.

    Args:
      checkpoint: a complete checkpoint.
      expected: the record this run would write.
      num_processes: of this run; for the message.

    Returns:
      The checkpoint's record.

    Raises:
      MismatchError: names each field that differs, with both values.
    """
    found = read_record(checkpoint)
    differences = [
        f"{name}: the checkpoint has {found.get(name)}, this run {expected[name]}"
        for name in ("corpus_hash", "teacher", "teacher_hash")
        if found.get(name) != expected[name]
    ]
    beside, wanted = found.get("online"), expected.get("online")
    if beside != wanted:
        differences.append(f"the teacher beside the student: the checkpoint has {beside}, this run {wanted}")
    was, now = found.get("config", {}), expected["config"]
    free = FREE_SETTINGS | {"teacher"}
    if "rows_per_step" in found:  # how a step is shared among processes and forwards makes no difference
        free = free | {"batch_rows", "gradient_accumulation"}
        if found["rows_per_step"] != expected["rows_per_step"]:
            differences.append(
                f"rows per step (batch_rows x gradient_accumulation x processes): the checkpoint has "
                f"{found['rows_per_step']}, this run {expected['rows_per_step']}; "
                f"{_keeping_batch(found['rows_per_step'], num_processes)}"
            )
    was, now = _with_defaults(was), _with_defaults(now)
    for name in sorted((was.keys() | now.keys()) - free):
        if was.get(name) != now.get(name):
            differences.append(f"{name}: the checkpoint has {was.get(name)}, this run {now.get(name)}")
    if differences:
        raise MismatchError(
            f"{checkpoint}: cannot be continued by this run. "
            + "; ".join(differences)
            + ". Use the cache and settings it began with, or another --out"
        )
    return found


def _keeping_batch(rows: int, num_processes: int) -> str:
    """How to keep the rows of a step with so many processes."""
    if rows % num_processes:
        fitting = [str(n) for n in range(1, rows + 1) if rows % n == 0]
        return f"{num_processes} processes cannot share {rows} rows evenly: start one of {', '.join(fitting)} processes"
    share = rows // num_processes
    sizes = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
    return (
        f"keep them with --rows-per-step {rows}, without --gradient-accumulation, and a --batch-rows that divides "
        f"{share} ({sizes})"
    )


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a record, with those that it does not say as they are by default: it may be an older one."""
    from tailcache.trainers.config import StudentConfig, TrainConfig

    def defaults(of: Any) -> dict[str, Any]:
        found = {each.name: each.default for each in dataclasses.fields(of)}
        return {name: _plain(value) for name, value in found.items() if value is not dataclasses.MISSING}

    student = config.get("student")
    filled = defaults(TrainConfig) | config
    return filled if not isinstance(student, dict) else filled | {"student": defaults(StudentConfig) | student}


def refuse_existing(out: Path) -> None:
    """Refuse to start a run over another one's results.

    Raises:
      ConfigError: OUT holds a run.
    """
    if any((out / name).exists() for name in (RECORD, "metrics.jsonl")) or last_checkpoint(out) is not None:
        raise ConfigError(
            f"out: {out} already holds a training run; continue it with --resume, or choose another folder"
        )


class JsonLines:
    """An append-only file of JSON objects with a ``step``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one line; it is whole in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The lines so far; one that a killed process left half-written is skipped."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
        return records

    def keep_until(self, step: int) -> None:
        """Drop the lines of later steps, atomically."""
        if self.path.exists():
            kept = [record for record in self.read() if record["step"] <= step]
            durable.write_file(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())
