"""A sweep file: which students to train from one cache, in a few lines of YAML.

    base:                      # settings of `tailcache train` that all runs share; flags are stronger
      cache: runs/demo
      out: runs/sweep          # each run's folder lies in it
      learning_rate: 1e-3
      student: {hidden_size: 128, num_layers: 3}
    runs:                      # methods by name: what each sets differently
      CLM: {loss: clm}
      KD, bucket: {loss: kd, tail: bucket}
    grid:                      # every combination of these; or a list of such grids
      loss: tad                # one value: for all of them
      top_k: [1, 5, 10]        # several: a method each, tad-top_k=1 and so on
      student:                 # values with names of their own
        small: {hidden_size: 128}
        large: {hidden_size: 256}
    seeds: [0, 1, 2]           # each method with each of these; grids may have their own

Names inside a group may be written with a dot (student.hidden_size: [128, 256]); groups are merged with the base's, and
null takes a setting of the base back. A run lies in OUT/METHOD/seed-N. Everything is checked before anything is
trained: unknown names, values of another type, combinations `tailcache train` would refuse.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tailcache.scripts.settings import complete_settings, default_settings, load_mapping, suggestion
from tailcache.storage.errors import ConfigError
from tailcache.trainers.config import TrainConfig
from tailcache.trainers.records import resolved
from tailcache.trainers.sweep import SweepRun

__all__ = ["SweepFile", "load_sweep", "sweep_runs"]

_KEYS = ("base", "runs", "grid", "seeds")
_OWN = {"out": "each run has a folder of its own in base.out", "resume": "a sweep always goes on where it was"}
_UNSAFE = set('/\\:*?"<>|\n\t\0')


@dataclass(frozen=True, kw_only=True)
class _Method:
    """One row of the table: what it sets, where the file says so, and its seeds."""

    name: str
    overrides: dict[str, Any]
    where: str
    seeds: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A sweep file, read.

    Attributes:
      base: settings for all runs, groups nested.
      methods: what differs.
    """

    base: dict[str, Any]
    methods: tuple[_Method, ...]


def load_sweep(path: Path) -> SweepFile:
    """Read a sweep file; names and types are checked, combinations are not yet.

    Args:
      path: the file.

    Raises:
      ConfigError: says which file, which key, what was expected, and what may have been meant.
    """
    where = f"--sweep {path}"
    content = load_mapping(path, "--sweep")
    for key in content:
        if key not in _KEYS:
            meant = suggestion(key, _KEYS)
            if not meant and not isinstance(content[key], dict):
                meant = "; settings that all runs share belong under base:"
            raise ConfigError(f"{where}: expected {', '.join(_KEYS)}, found {key!r}{meant}")
    base = _nested(content.get("base"), f"{where}, base", own=False)
    seeds = None if content.get("seeds") is None else _seeds(content["seeds"], f"{where}, seeds")
    methods = [*_named(content.get("runs"), where, seeds), *_grids(content.get("grid"), where, seeds)]
    if not methods:
        raise ConfigError(f"{where}: expected methods under runs: or grid:, found neither")
    names = [method.name.casefold() for method in methods]
    for method in methods:
        if names.count(method.name.casefold()) > 1:
            raise ConfigError(f"{method.where}: there are several methods of that name ({method.name})")
    return SweepFile(base=base, methods=tuple(methods))


def sweep_runs(file: SweepFile, base: TrainConfig) -> list[SweepRun]:
    """The runs of a sweep.

    Args:
      file: the sweep file.
      base: its base below the flags, complete; `out` is the folder of the sweep.

    Raises:
      ConfigError: settings of a run do not go together; names the run.
    """
    shared = resolved(base)
    runs = []
    for method in file.methods:
        config = complete_settings(TrainConfig, _merge(shared, method.overrides), method.where)
        for seed in (config.seed,) if method.seeds is None else method.seeds:
            name = f"{method.name}/seed-{seed}"
            runs.append(SweepRun(name=name, method=method.name, config=replace(config, seed=seed, out=base.out / name)))
    return runs


# ---- what the file says ----


def _named(runs: Any, where: str, seeds: tuple[int, ...] | None) -> Iterator[_Method]:
    """The methods under ``runs:``."""
    if runs is None:
        return
    if not isinstance(runs, Mapping):
        raise ConfigError(f"{where}, runs: expected methods by name (name: settings), found {runs!r}")
    for key, settings in runs.items():
        name = str(key)
        here = f"{where}, runs, {name}"
        _check_name(name, here)
        overrides = _nested(settings, here, own=True)
        if "seed" in overrides and seeds is not None:
            raise ConfigError(f"{here}: seed is given by seeds:; drop one of them")
        yield _Method(name=name, overrides=overrides, where=here, seeds=seeds)


def _grids(grids: Any, where: str, seeds: tuple[int, ...] | None) -> Iterator[_Method]:
    """The methods under ``grid:``, one grid or several."""
    if grids is None:
        return
    listed = isinstance(grids, list)
    for index, grid in enumerate(grids if listed else [grids]):
        yield from _grid(grid, f"{where}, grid[{index}]" if listed else f"{where}, grid", seeds)


def _grid(grid: Any, where: str, seeds: tuple[int, ...] | None) -> Iterator[_Method]:
    if not isinstance(grid, Mapping) or not grid:
        raise ConfigError(f"{where}: expected settings with lists of values (name: [a, b]), found {grid!r}")
    axes = dict(grid)
    own = [axes.pop(key) for key in ("seeds", "seed") if key in axes]
    if own:
        if seeds is not None or len(own) > 1:
            raise ConfigError(f"{where}: seeds are given twice; drop one of them")
        seeds = _seeds(own[0], f"{where}, seeds")
    last = [str(axis).rpartition(".")[2] for axis in axes]
    choices = []
    for axis, short in zip(axes, last, strict=True):
        title = str(axis) if last.count(short) > 1 else short.replace("-", "_")
        choices.append(_choices(str(axis), title, axes[axis], f"{where}, {axis}"))
    for chosen in itertools.product(*choices):
        overrides: dict[str, Any] = {}
        for _, settings in chosen:
            overrides = _merge(overrides, settings)
        name = "-".join(label for label, _ in chosen if label)
        if not name:
            raise ConfigError(
                f"{where}: expected a list of values somewhere, found one method only; put it under runs:"
            )
        _check_name(name, where)
        yield _Method(name=name, overrides=overrides, where=f"{where}, {name}", seeds=seeds)


def _choices(axis: str, title: str, values: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """What an axis may be: the part of the name it gives, and the settings."""

    def settings(value: Any) -> dict[str, Any]:
        return _nested({axis: value}, where, own=True)

    if isinstance(values, Mapping):
        return [(str(label), settings(value)) for label, value in values.items()]
    if not isinstance(values, list):
        return [(_label(values) if axis == "loss" else "", settings(values))]
    if not values:
        raise ConfigError(f"{where}: expected at least one value, found none")
    choices = []
    for value in values:
        if isinstance(value, dict | list):
            raise ConfigError(f"{where}: give groups and lists names (name: value) instead of a list; found {value!r}")
        label = _label(value)
        if set(label) & _UNSAFE:
            raise ConfigError(f"{where}: {label!r} cannot be part of a folder's name; write it as name: {label}")
        choices.append((label if axis == "loss" else f"{title}={label}", settings(value)))
    return choices


def _label(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
    if not whole or not values or len(set(values)) < len(values):
        raise ConfigError(f"{where}: expected a list of different whole numbers such as [0, 1, 2], found {values!r}")
    return tuple(values)


def _check_name(name: str, where: str) -> None:
    if not name.strip() or name != name.strip() or name.startswith(".") or set(name) & _UNSAFE or len(name) > 120:
        raise ConfigError(
            f"{where}: {name!r} is to be the name of a folder: expected at most 120 characters, no dot first, no space "
            f"at the ends, and none of {' '.join(sorted(_UNSAFE - set(chr(0) + chr(9) + chr(10))))}"
        )


def _nested(settings: Any, where: str, *, own: bool) -> dict[str, Any]:
    """Settings with groups nested and names as Python has them, checked for names and types.

    Args:
      settings: names (with - or _, groups nested or with dots) and values; None is none.
      where: for messages.
      own: of one run, so that settings which only a whole sweep has are refused.
    """
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: expected settings by name, found {settings!r}")
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = str(key).replace("-", "_").split(".")
        if own and not groups and name in _OWN:
            raise ConfigError(f"{where}: {name} cannot differ between runs: {_OWN[name]}")
        inner: Any = {part.replace("-", "_"): v for part, v in value.items()} if isinstance(value, Mapping) else value
        for part in reversed([*groups, name]):
            inner = {part: inner}
        nested = _merge(nested, inner)
    default_settings(TrainConfig, nested, where, None)
    return nested


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over others, groups setting by setting."""
    merged = dict(below)
    for name, value in above.items():
        inner: Any = merged.get(name)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        merged[name] = _merge(inner, value) if both else value
    return merged
