"""``tailcache student``: what a student would be, its sizes and parameters, without making its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailcache.storage.place import Location
from tailcache.trainers.config import StudentConfig

__all__ = ["ShowConfig", "as_printed", "described", "run"]


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Say what a student would be: its architecture, its sizes and the number of its parameters.

    No weights are made or read: a preset needs nothing, a student of a teacher that teacher's configuration.
    """

    cache: Location | None = None
    """The cache it would be trained on, whose vocabulary and longest row it must fit; needed for a student made from
    sizes alone."""

    student: StudentConfig = field(default_factory=StudentConfig)
    """The student, as in `tailcache train`."""

    json: Path | None = None
    """Write it to this JSON file too, with the whole configuration."""


def run(config: ShowConfig) -> None:
    """Print the student's sizes and parameters.

    Raises:
      TailcacheError: there is no such student; the message says why.
    """
    import json

    from tailcache.storage.durable import make_folder, write_file

    found = described(config)
    for line in _lines(found):
        print(line)
    if config.json is not None:
        make_folder(config.json.parent)
        write_file(config.json, json.dumps(found, indent=1, sort_keys=True).encode() + b"\n")
        print(f"wrote {config.json}")


def described(config: ShowConfig) -> dict[str, Any]:
    """The student as JSON values: class, parameters by part, whole configuration, and what the preset promised."""
    from tailcache.storage.reader import open_cache
    from tailcache.trainers.presets import PRESETS
    from tailcache.trainers.student import count_parameters, fit_of, student_config, without_weights

    fit = None if config.cache is None else fit_of(open_cache(config.cache).corpus)
    model = without_weights(student_config(config.student, fit))
    preset = None if config.student.preset is None else PRESETS[config.student.preset]
    return {
        "class": type(model).__name__,
        "parameters": count_parameters(model),
        "preset": None if preset is None else {"name": config.student.preset, "printed": preset.printed},
        "config": model.config.to_dict(),
    }


def _lines(found: dict[str, Any]) -> list[str]:
    config, parameters = found["config"], found["parameters"]
    sizes = {
        "vocabulary": "vocab_size",
        "hidden width": "hidden_size",
        "layers": "num_hidden_layers",
        "attention heads": "num_attention_heads",
        "key-value heads": "num_key_value_heads",
        "head dimensions": "head_dim",
        "feed-forward width": "intermediate_size",
    }
    if config.get("head_dim") is None and config.get("num_attention_heads"):
        config = {**config, "head_dim": config["hidden_size"] // config["num_attention_heads"]}
    lines = [found["class"]]
    lines += [f"  {name:<20}{config[key]:>16,}" for name, key in sizes.items() if isinstance(config.get(key), int)]
    lines.append(f"  {'head':<20}{'tied' if parameters['head'] == 0 else 'its own':>16}")
    lines.append(f"{'parameters':<22}{parameters['all']:>16,}")
    lines += [f"  {name:<20}{parameters[name]:>16,}" for name in parameters if name != "all"]
    if found["preset"] is not None:
        printed, rounded = found["preset"]["printed"], as_printed(parameters["all"], found["preset"]["printed"])
        lines.append(
            f"{found['preset']['name']}: the paper prints {printed}"
            + ("" if rounded == printed else f"; the sizes that it prints make {rounded} (docs/students.md)")
        )
    return lines


def as_printed(count: int, printed: str) -> str:
    """A number of parameters with as many digits as another one was printed with: 1,160,566,272 as 1.2B."""
    decimals = len(printed.removesuffix("B").partition(".")[2])
    return f"{count / 1e9:.{decimals}f}B"
