"""``tailcache train``: a student from the targets in a cache, or many of them from one sweep file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tailcache.scripts.settings import default_settings
from tailcache.storage.errors import ConfigError
from tailcache.trainers.config import TrainConfig

__all__ = ["TrainCommand", "run", "with_sweep"]


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig):
    """Train a student from the targets in a cache; the teacher is never loaded.

    The loss per target position is clm_weight * CLM + divergence_weight * DIV, summed over the positions of
    the accumulated batch and divided by their number over all devices: neither gradient accumulation nor
    padding changes it (but for atkd, whose hard positions are those of a forward). Students with the same seed get the
    same initialisation and see the same rows in the same order, whatever their loss.

    With --sweep FILE, many students: OUT is then the folder of the sweep, and the other settings are what all of them
    share.
    """

    sweep: Path | None = None
    """Train every student of this YAML file (base, runs, grid, seeds: see docs/sweeps.md) and end with one table. The
    same command again goes on where it was."""

    parallel: int = 1
    """With --sweep: so many students at a time, each in its own process with its share of the processors, or one of the
    GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel < 1:
            raise ConfigError(f"parallel: expected at least 1, found {self.parallel}")
        if self.sweep is None and self.parallel != 1:
            raise ConfigError("parallel: it is for a sweep; give --sweep FILE, or drop it")
        if self.sweep is not None:
            from tailcache.scripts.sweep_file import load_sweep, sweep_runs

            sweep_runs(load_sweep(self.sweep), self.shared)  # what is wrong in the file is said before any work

    @property
    def shared(self) -> TrainConfig:
        """The settings without those of the sweep."""
        return TrainConfig(**{each.name: getattr(self, each.name) for each in fields(TrainConfig)})


def with_sweep(values: dict[str, Any], flags: Sequence[str], where: str) -> dict[str, Any]:
    """Settings of a file, below those that a sweep file names as its base.

    Args:
      values: of a file of settings; may be empty.
      flags: of the command line, of which --sweep may be one.
      where: the file, for messages.

    Raises:
      ConfigError: one of the files is wrong.
    """
    given = [after for flag, after in itertools.pairwise(flags) if flag == "--sweep"]
    given += [flag.partition("=")[2] for flag in flags if flag.startswith("--sweep=")]
    path = given[-1] if given else values.get("sweep")
    if not path or not isinstance(path, str) or path.startswith("--"):
        return values
    from tailcache.scripts.sweep_file import load_sweep

    default_settings(TrainCommand, values, where, None)
    return {**{key.replace("-", "_"): value for key, value in values.items()}, **load_sweep(Path(path)).base}


def run(config: TrainConfig) -> None:
    """Train one student, or those of a sweep; the heavy imports wait until here.

    Args:
      config: the settings.

    Raises:
      TailcacheError: says where, what was expected, what was found and what to do.
    """
    if isinstance(config, TrainCommand) and config.sweep is not None:
        from tailcache.scripts.sweep import sweep

        sweep(config)
        return
    from tailcache.scripts.slow_products import warn_of_slow_products
    from tailcache.trainers.run import train

    settings = config.shared if isinstance(config, TrainCommand) else config
    warn_of_slow_products(settings.precision, settings.device)
    if settings.online is None:
        train(settings)
        return
    from tailcache.scripts.online_teacher import beside

    train(settings, live=beside(settings))
