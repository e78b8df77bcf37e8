"""What a golden cache decodes to, as JSON values."""

from pathlib import Path
from typing import Any

from tailcache.storage.codec import OPTIONAL
from tailcache.storage.hidden import hidden_float32
from tailcache.storage.reader import Teacher, open_cache


def decoded(cache: Path) -> dict[str, Any]:
    """All that a reader gives for the golden cache, as JSON."""
    opened = open_cache(cache)
    corpus, teacher = opened.corpus, opened.teacher("golden")
    rows = corpus.rows(0, corpus.num_rows)
    return {
        "corpus_hash": corpus.hash,
        "teacher_hash": teacher.hash,
        "rows": {name: values.tolist() for name, values in vars(rows).items()},
        "target_offsets": corpus.target_offsets(0, corpus.num_rows).tolist(),
        "token_counts": corpus.token_counts.tolist(),
        **decoded_teacher(teacher),
    }


def decoded_teacher(teacher: Teacher) -> dict[str, Any]:
    """Its targets, optional fields only where they were captured, and what is stored once."""
    targets = teacher.rows(0, teacher.corpus.num_rows, optional=teacher.optional)
    absent = tuple(name for name in OPTIONAL if name not in teacher.optional)
    values: dict[str, Any] = {
        "targets": {name: found.tolist() for name, found in vars(targets).items() if not name.startswith(absent)},
        "mean_tail": teacher.mean_tail.tolist(),
    }
    if teacher.temperatures:
        values["temperatures"] = list(teacher.temperatures)
    if teacher.hidden_kind != "none":
        head = teacher.head()
        values["head"] = {
            "weight": head.weight.tolist(),
            "weight_kind": head.weight_kind,
            "bias": None if head.bias is None else head.bias.tolist(),
            "scale": head.scale,
            "soft_cap": head.soft_cap,
        }
        values["logits"] = head.logits(hidden_float32(targets.hidden, targets.hidden_scale)).tolist()
    return values
