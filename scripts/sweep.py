"""``tailcache train --sweep FILE``: train every student of a sweep file, then show and write the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tailcache.scripts.sweep_file import load_sweep, sweep_runs
from tailcache.scripts.sweep_report import write_report
from tailcache.scripts.sweep_table import SweepTable, sweep_table
from tailcache.storage.errors import ConfigError, IncompleteError
from tailcache.trainers.sweep import SweepRun, run_sweep

if TYPE_CHECKING:
    from tailcache.scripts.train import TrainCommand

__all__ = ["report", "sweep"]


def sweep(config: TrainCommand) -> SweepTable:
    """Train what has not finished yet, and report.

    Args:
      config: the settings that all runs share, the sweep file, and how many runs at a time.

    Returns:
      The table, where every run has finished.

    Raises:
      ConfigError: the sweep file is wrong.
      IncompleteError: another sweep works in OUT, or runs failed; the report has been written nevertheless.
      MismatchError: a finished run was made with other settings.
    """
    from tailcache.scripts.train import run as train_one

    if config.sweep is None:
        raise ConfigError("sweep: expected a sweep file, found none")
    runs = sweep_runs(load_sweep(config.sweep), config.shared)
    results = run_sweep(runs, config.out, parallel=config.parallel, train=train_one)
    table, files = report(runs, config.out)
    print(f"\n{table.text()}\n\nwritten to {config.out}: {', '.join(path.name for path in files)}")
    bad = [f"{each.name} ({each.error or each.status})" for each in results if each.status != "finished"]
    if bad:
        raise IncompleteError(
            f"{config.out}: {len(bad)} of {len(runs)} runs have not finished: {'; '.join(bad)}. The same command tries "
            "them again, and leaves alone what has finished"
        )
    return table


def report(runs: Sequence[SweepRun], folder: Path) -> tuple[SweepTable, list[Path]]:
    """The table of what the runs have left so far, and the files that were written.

    Args:
      runs: of the sweep.
      folder: the sweep's.
    """
    table = sweep_table(runs, [run.result() for run in runs])
    return table, write_report(table, folder)
