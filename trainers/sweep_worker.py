"""One run of a sweep, in this process or in one of its own.

A run that fails leaves its reason in error.txt and nothing else happens to the others; one that is killed leaves its
checkpoints. A process of its own writes what it prints to log.txt, dies with the sweep that began it, and holds a lock
on its folder as long as it lives. Light to import: torch waits until the process knows its threads and its GPU.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailcache.storage import durable
from tailcache.storage.errors import IncompleteError, TailcacheError
from tailcache.storage.place import open_place
from tailcache.trainers.records import resolved
from tailcache.trainers.sweep_results import ERROR, LOG, SETTINGS

if TYPE_CHECKING:
    from tailcache.trainers.config import TrainConfig

    Train = Callable[[TrainConfig], Any]

__all__ = ["run_here", "run_in_process"]

FAILED = 70
"""Exit status of a process whose run has failed and said why; 1 is Python's for an end nobody foresaw."""


def run_here(config: TrainConfig, *, evaluate: bool, train: Train | None = None) -> bool:
    """Train one student, or go on where it was, and evaluate it; a failure is written down, not raised.

    Args:
      config: with `resume`.
      evaluate: also leave evaluation.json.
      train: what trains; ``run.train`` where none is given.

    Returns:
      Whether it has finished.
    """
    durable.make_folder(config.out)
    try:
        with _alone(config.out):
            (config.out / ERROR).unlink(missing_ok=True)
            text = json.dumps(resolved(config), indent=2, sort_keys=True) + "\n"
            durable.write_file(config.out / SETTINGS, text.encode())
            (train or _train())(config)
            if evaluate:
                from tailcache.trainers.sweep_evaluation import evaluate_finished

                evaluate_finished(config)
            (config.out / ERROR).unlink(missing_ok=True)  # of another process that has found this one here
    except Exception as error:
        _write_error(config.out, error)
        return False
    return True


def _train() -> Train:
    from tailcache.trainers.run import train

    return train


def run_in_process(config: TrainConfig, gpu: str | None, evaluate: bool, train: Train | None) -> None:
    """What a process that was spawned for one run does.

    Args:
      config: the run's settings, with `resume` and `threads`.
      gpu: the one GPU it may see, as CUDA_VISIBLE_DEVICES says it; None leaves the environment as it is.
      evaluate: as for `run_here`.
      train: likewise.
    """
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep hears it too, and ends its processes
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if config.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    durable.make_folder(config.out)
    log = os.open(config.out / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    done = run_here(config, evaluate=evaluate, train=train)
    sys.stdout.flush()
    sys.exit(0 if done else FAILED)


def _die_with_parent() -> None:
    """A sweep that is killed leaves no run behind that would train against its successor."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder of a run."""
    claim = open_place(folder).claim("run.lock")
    if claim is None:
        raise IncompleteError(f"{folder}: another process trains here; wait for it, or end it")
    try:
        yield
    finally:
        claim.release()


def _write_error(folder: Path, error: Exception) -> None:
    """The reason of a failure: one line, then the traceback."""
    said = str(error) if isinstance(error, TailcacheError) else f"{type(error).__name__}: {error}"
    line = " ".join(said.split()) or type(error).__name__
    trace = "".join(traceback.format_exception(error))
    durable.write_file(folder / ERROR, f"{line}\n\n{trace}".encode())
    print(f"failed: {line}\n(the traceback is in {folder / ERROR})", file=sys.stderr)
