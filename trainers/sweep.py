"""Many students from the same shards: a list of runs, one after another or several at a time, restartable.

Each run is one ``TrainConfig`` with a folder of its own. What has finished is left alone, what was killed goes on from
its last checkpoint (or begins again, if it kept none), what failed is tried again; a run that fails is reported with
its reason and does not stop the others. Before anything is trained, finished runs are compared with what is asked for:
one whose settings, corpus or teacher have changed since is refused, and said which.

One after another, runs share this process: nothing is imported or compiled twice. Several at a time, each has a process
of its own with its share of the processors and, where there are several GPUs, one of them in turn; its output is
in its log.txt. Results do not depend on it, but for the number of threads a sum is split among. Light to import: no
torch.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tailcache.storage import durable
from tailcache.storage.errors import ConfigError, IncompleteError, MismatchError
from tailcache.storage.place import open_place
from tailcache.storage.reader import Cache, open_cache
from tailcache.storage.several import BETWEEN, open_named
from tailcache.trainers.config import TrainConfig
from tailcache.trainers.processors import num_processors
from tailcache.trainers.records import FREE_SETTINGS, resolved
from tailcache.trainers.sweep_results import (
    ERROR,
    LOG,
    RunResult,
    may_be_evaluated,
    read_result,
    read_settings,
    share_done,
)
from tailcache.trainers.sweep_worker import FAILED, run_here, run_in_process

__all__ = ["SweepRun", "report_end", "run_sweep"]

LOCK = "sweep.lock"

Train = Callable[[TrainConfig], Any]

_LOOK_SECONDS = 2.0
"""Between two looks at the logs of the runs that are going on."""

# A finished run must have been made with these as they are: its length, and the rows it was measured on.
_FREE = FREE_SETTINGS - {"epochs", "max_steps", "eval_rows"}


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One student of a sweep.

    Attributes:
      name: unique in its sweep.
      config: its settings; `out` is its own folder. `resume` is set by the sweep.
      method: the row of the table it belongs to; runs of one method differ in the seed. Default: its name.
    """

    name: str
    config: TrainConfig
    method: str = ""

    @property
    def row(self) -> str:
        """Its method."""
        return self.method or self.name

    def result(self) -> RunResult:
        """What it has left in its folder so far."""
        return read_result(self.name, self.config.out)


def run_sweep(
    runs: Sequence[SweepRun],
    folder: Path,
    *,
    parallel: int = 1,
    evaluate: bool = True,
    train: Train | None = None,
    show_progress: bool = True,
) -> list[RunResult]:
    """Train what has not finished yet.

    Args:
      runs: what to train; names and folders are unique.
      folder: the sweep's own, held by a lock while it works.
      parallel: so many runs at a time, each in its own process; 1 uses this one.
      evaluate: also evaluate each finished student on the held-out rows, once (see ``evaluation``).
      train: what trains a run; default: ``run.train``. For several at a time, a function of a module.
      show_progress: a line per run, or a bar over all of them.

    Returns:
      The result of each run, in their order; some may have failed.

    Raises:
      ConfigError: runs share a name or a folder, there are none, or `torchrun` started this process.
      IncompleteError: another sweep works in the folder.
      MismatchError: a finished run was made with other settings, from another corpus or from another teacher.
    """
    _check(runs, parallel)
    durable.make_folder(folder)
    claim = open_place(folder).claim(LOCK)
    if claim is None:
        raise IncompleteError(f"{folder}: another sweep works here; wait for it, or choose another folder")
    try:
        todo = _unfinished(runs, evaluate)
        if todo and parallel > 1:
            _run_parallel(todo, parallel, evaluate, train, show_progress)
        elif todo:
            _run_here(todo, len(runs), evaluate, train, show_progress)
        return [run.result() for run in runs]
    finally:
        claim.release()


def _check(runs: Sequence[SweepRun], parallel: int) -> None:
    if not runs:
        raise ConfigError("sweep: expected at least one run, found none")
    if parallel < 1:
        raise ConfigError(f"parallel: expected at least 1, found {parallel}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "sweep: torchrun started several processes, and a sweep starts its own; run it without torchrun, with "
            "--parallel N"
        )
    for what, values in (
        ("name", [run.name for run in runs]),
        ("folder", [os.path.abspath(run.config.out) for run in runs]),
        ("hub_model_id", [run.config.hub_model_id for run in runs if run.config.hub_model_id is not None]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError(f"sweep: expected one {what} per run, found several runs with {twice[0]}")


# ---- what there is to do ----


def _unfinished(runs: Sequence[SweepRun], evaluate: bool) -> list[SweepRun]:
    """The runs to train; refuses finished ones that are not what is asked for now.

    Raises:
      MismatchError: names every run and setting that differs.
    """
    caches: dict[str, Cache] = {}
    todo, differences = [], []
    for run in runs:
        result = run.result()
        wanted = evaluate and bool(result.curve) and may_be_evaluated(run.config)
        if result.status != "finished" or (wanted and not result.evaluation):
            todo.append(run)
        if not result.record:
            continue
        where = str(run.config.cache)
        if where not in caches:
            caches[where] = open_cache(where)
        differences += [f"{run.name}: {each}" for each in _changes(run.config, result.record, caches[where])]
    if differences:
        raise MismatchError(
            f"sweep: {len(differences)} differences from runs that have finished. "
            + "; ".join(differences)
            + ". Put the settings back, or choose another name or folder for what is new"
        )
    return todo


def _changes(config: TrainConfig, record: Mapping[str, Any], cache: Cache) -> Iterator[str]:
    """What is not as it was when a finished run was made."""
    if record.get("corpus_hash") != cache.corpus.hash:
        yield f"its corpus was {record.get('corpus_hash')}, and {cache.place} has {cache.corpus.hash}"
    elif isinstance(name := record.get("teacher"), str):
        if missing := [each for each in name.split(BETWEEN) if each not in cache.teacher_names]:
            yield f"its teacher {missing[0]} is not in {cache.place}"
        else:
            found = open_named(cache, name, num_shards=record.get("teacher_shards")).hash
            if found != record.get("teacher_hash"):
                yield f"its teacher {name} was {record.get('teacher_hash')}, and {cache.place} has {found}"
    was, now = read_settings(config.out), resolved(config)
    if was is None:
        yield f"{config.out} holds a run that no sweep has begun"
        return
    was, now = _flat(was), _flat(now)
    defaults = _flat(resolved(TrainConfig(cache="", out=Path())))
    for name in sorted(name for name in now if name.partition(".")[0] not in _FREE):
        then = was.get(name, defaults.get(name))  # settings that are younger than the run had their defaults
        if then != now[name]:
            yield f"{name} was {then}, and now is {now[name]}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings with the names of groups before those in them, as flags have them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _ready(run: SweepRun, threads: int | None) -> TrainConfig:
    chosen = run.config.threads if run.config.threads is not None else threads
    return replace(run.config, resume=True, threads=chosen)


# ---- one after another ----


def _run_here(todo: Sequence[SweepRun], total: int, evaluate: bool, train: Train | None, show_progress: bool) -> None:
    import torch

    threads = torch.get_num_threads()
    began = time.monotonic()
    failed = 0
    for index, run in enumerate(todo):
        if show_progress:
            left = ""
            if index:
                seconds = (time.monotonic() - began) / index * (len(todo) - index)
                left = f", about {_clock(seconds)} left"
            bad = f", {failed} failed" if failed else ""
            print(f"\n== run {total - len(todo) + index + 1} of {total}: {run.name}{bad}{left}", flush=True)
        try:
            failed += not run_here(_ready(run, None), evaluate=evaluate, train=train)
        finally:
            torch.set_num_threads(threads)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if show_progress:
        print(f"\n== {len(todo)} runs in {_clock(time.monotonic() - began)}, {failed} failed", flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


# ---- several at a time ----


def _run_parallel(
    todo: Sequence[SweepRun], parallel: int, evaluate: bool, train: Train | None, show_progress: bool
) -> None:
    slots = min(parallel, len(todo))
    threads = max(1, num_processors() // slots)
    gpus = _gpus()
    spawn = multiprocessing.get_context("spawn")
    waiting, running = list(reversed(todo)), dict[int, tuple[SweepRun, Any]]()
    ended: list[SweepRun] = []
    with _Bar(todo, show_progress) as bar:
        try:
            while waiting or running:
                for slot in sorted(set(range(slots)) - running.keys())[: len(waiting)]:
                    run = waiting.pop()
                    gpu = gpus[slot % len(gpus)] if gpus else None
                    work = (_ready(run, threads), gpu, evaluate, train)
                    process = spawn.Process(target=run_in_process, args=work, name=run.name)
                    process.start()
                    running[slot] = (run, process)
                bar.show([run for run, _ in running.values()], ended)
                stopped = wait([process.sentinel for _, process in running.values()], _LOOK_SECONDS)
                for slot, (run, process) in list(running.items()):
                    if process.sentinel in stopped:
                        process.join()
                        del running[slot]
                        ended.append(run)
                        report_end(run, process.exitcode)
            bar.show([], ended)
        finally:
            for _, process in running.values():
                process.kill()
                process.join()


class _Bar:
    """One bar over all runs, moved by what each of those that are running has written to its log."""

    def __init__(self, todo: Sequence[SweepRun], shown: bool) -> None:
        self._todo = todo
        self._bar = tqdm(
            total=len(todo),
            initial=sum(share_done(run.config) for run in todo),  # before a restart: no part of the speed
            desc="sweep",
            disable=not shown,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, running: Sequence[SweepRun], ended: Sequence[SweepRun]) -> None:
        """Move it to where the runs are."""
        over = {run.name for run in ended}
        shares = {run.name: 1.0 if run.name in over else share_done(run.config) for run in self._todo}
        self._bar.n = sum(shares.values())
        now = "".join(f"; {run.name} {shares[run.name]:.0%}" for run in running)
        self._bar.set_postfix_str(f"{len(ended)} of {len(self._todo)} runs done{now}")


def report_end(run: SweepRun, exitcode: int | None) -> None:
    """One line for a run whose process has ended; one that died without a word gets its reason written down.

    Args:
      run: whose it was.
      exitcode: of the process; negative for the signal that killed it.
    """
    if exitcode not in (0, FAILED):
        why = f"exited with {exitcode}"
        if exitcode is not None and exitcode < 0:
            why = f"was killed by {signal.Signals(-exitcode).name}"
            why += " (out of memory?)" if exitcode == -signal.SIGKILL else ""
        text = f"its process {why}; {run.config.out / LOG} has what it said\n"
        durable.make_folder(run.config.out)
        durable.write_file(run.config.out / ERROR, text.encode())
    result = run.result()
    said = f"{run.name}: {result.status}"
    if result.final is not None:
        said += (
            f", held-out cross-entropy {result.final['cross_entropy']:.4f} nats, KL {result.final['kl']:.4f}, "
            f"{result.positions_seen:,} positions"
        )
    tqdm.write(said if result.error is None else f"{said}: {result.error}", file=sys.stdout)


def _gpus() -> list[str]:
    """The GPUs to share out, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
