"""The study: does the tail matter, and is a cache as good as the teacher itself? One command, which can be killed.

    text        docstrings of Python's standard library and of required packages, cut into three by module
    tokenizer   byte-level BPE, trained on the teacher's text
    teacher     a language model trained here on the teacher's text, so that its whole distribution can be afforded
    start       one student per seed, trained as a plain language model: where all arms of that seed begin
    cache       one capture; smaller K and fewer draws derived from it
    tails       tail masses of this teacher and of SmolLM2-135M
    runs        every arm and seed, in parallel processes, each measured against the teacher's whole distribution
    report      results.json, plots, and the tables in the document

The same command goes on where it was killed, whatever the step. `--report` makes results and document of what is there.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from tailcache.scripts.measure import conditions
from tailcache.scripts.study_arms import Arm, arms, recipes_of
from tailcache.scripts.study_settings import StudySize, Which, size_of
from tailcache.storage import durable
from tailcache.storage.errors import ConfigError, TailcacheError

__all__ = ["Study", "main", "study"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Train a teacher and some forty kinds of students on real text, and compare them with intervals."""

    size: Which = "cpu"
    """cpu: two hours on two cores. gpu: a larger vocabulary, teacher, students and text. smoke: the whole path in
    minutes, whose figures say nothing."""

    out: Path | None = None
    """Folder for everything; default: runs/study-SIZE."""

    document: Path | None = None
    """A Markdown file whose marked places are filled with the tables, and beside which go images/study_*.png and
    a copy of results.json; default: OUT/study.md, which is made where there is none. docs/study.md is such a file."""

    parallel: int = 2
    """Students that are trained at a time, each in its own process with its share of the processors."""

    arms: tuple[str, ...] = ()
    """Only these arms, by name; all by default."""

    device: str = "auto"
    """cpu or cuda; auto: a GPU if there is one, and never for --size cpu or smoke."""

    report: bool = False
    """Train nothing: make the report of the runs that have finished."""

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise ConfigError(f"parallel: expected at least 1, found {self.parallel}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device: expected auto, cpu or cuda, found {self.device!r}")

    @property
    def folder(self) -> Path:
        """``out``, or its default."""
        return self.out or Path(f"runs/study-{self.size}")

    def chosen(self) -> tuple[Arm, ...]:
        """The arms.

        Raises:
          ConfigError: there is none of a name.
        """
        size = size_of(self.size)
        every = arms(full_k=size.top_k, full_m=size.num_samples)
        unknown = set(self.arms) - {arm.name for arm in every}
        if unknown:
            raise ConfigError(
                f"arms: there is no {', '.join(sorted(unknown))}; expected some of {', '.join(a.name for a in every)}"
            )
        return tuple(arm for arm in every if not self.arms or arm.name in self.arms)


def main() -> None:
    """Entry point of ``python -m tailcache.scripts.study``."""
    try:
        study(tyro.cli(Study, description=__doc__))
    except TailcacheError as error:
        raise SystemExit(f"study: {error}") from error


def study(config: Study) -> dict[str, Any]:
    """Run what has not been done yet, then write the report.

    Returns:
      What results.json holds.
    """
    size, chosen, out = size_of(config.size), config.chosen(), config.folder
    if not config.report:
        began = time.perf_counter()
        device = _device(config)
        durable.make_folder(out)
        _expect_size(out, size)
        seconds = _prepare(out, size, chosen, device)
        seconds["runs"] = _train(out, size, chosen, device, config.parallel)
        seconds["all"] = time.perf_counter() - began
        _note_seconds(out, seconds, config)
    return _report(config, out, size, chosen)


def _device(config: Study) -> str:
    import torch

    if config.device != "auto":
        return config.device
    return "cuda" if config.size == "gpu" and torch.cuda.is_available() else "cpu"


def _expect_size(out: Path, size: StudySize) -> None:
    """Refuse to mix two studies in one folder."""
    path, asked = out / "size.json", json.loads(json.dumps(size.record()))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in asked if asked[name] != found.get(name) and name != "seeds")
        if differing:
            raise ConfigError(
                f"{out}: holds a study with another {', '.join(differing)}; choose another --out, or delete the folder"
            )
    durable.write_file(path, (json.dumps(asked, indent=1) + "\n").encode())


def _prepare(out: Path, size: StudySize, chosen: tuple[Arm, ...], device: str) -> dict[str, float]:
    """Everything that the runs share; seconds by step."""
    import numpy as np
    import torch

    from tailcache.scripts.study_caches import make_caches, tail_masses
    from tailcache.scripts.study_measure import held_out_rows
    from tailcache.scripts.study_models import encode, language_model, train_tokenizer
    from tailcache.scripts.study_text import read_part, write_text

    seconds: dict[str, float] = {}
    threads = torch.get_num_threads()

    def step(name: str) -> float:
        print(f"\n== {name}", flush=True)
        return time.perf_counter()

    def done(name: str, began: float) -> None:
        seconds[name] = time.perf_counter() - began

    began = step("text")
    write_text(out / "text", size.packages)
    documents = read_part(out / "text", "teacher")
    tokenizer = train_tokenizer(documents, size.vocab_size, out / "tokenizer")
    if not (out / "held_out.npz").is_file():
        held = read_part(out / "text", "held-out")
        rows = held_out_rows(list(zip((d.module for d in held), encode(tokenizer, held), strict=True)), size)
        _write_rows(out / "held_out.npz", rows)
    done("text", began)

    began = step("teacher and starts")
    models = [("teacher", size.teacher, size.teacher_positions, 0, out / "teacher")]
    starts = [
        (f"start of seed {s}", size.student, size.warm_positions, s, out / "start" / f"seed-{s}") for s in size.seeds
    ]
    if any(not (folder / "config.json").is_file() for *_, folder in (*models, *starts)):
        tokens = np.concatenate(encode(tokenizer, documents))
        for name, sizes, positions, seed, folder in (*models, *starts):
            durable.make_folder(folder.parent)
            language_model(
                name, sizes, tokens, tokenizer, folder, study=size, positions=positions, seed=seed, device=device
            )
    done("teacher and starts", began)

    began = step("cache")
    make_caches(out, size, recipes_of(chosen), device=device, threads=threads)
    done("cache", began)
    began = step("tails")
    tail_masses(out, size, device=device, threads=threads)
    done("tails", began)
    return seconds


def _write_rows(path: Path, rows: Sequence[Any]) -> None:
    import io

    import numpy as np

    written = io.BytesIO()
    np.savez(written, tokens=np.concatenate(rows), lengths=np.asarray([len(row) for row in rows]))
    durable.write_file(path, written.getvalue())


def _read_rows(path: Path) -> list[Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as stored:
        return np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])


def _train(out: Path, size: StudySize, chosen: tuple[Arm, ...], device: str, parallel: int) -> float:
    """Train what has not been trained, in processes of their own; the seconds it took.

    Raises:
      ConfigError: runs have failed; names them and their reasons.
    """
    import torch

    from tailcache.scripts.study_run import run_path

    began = time.perf_counter()
    tasks = [(arm, s) for arm in chosen for s in size.seeds if not run_path(out, arm.name, s).is_file()]
    print(f"\n== runs: {len(tasks)} of {len(chosen) * len(size.seeds)} to do, {parallel} at a time", flush=True)
    context = multiprocessing.get_context("spawn")
    waiting, finished = context.SimpleQueue(), context.SimpleQueue()
    for task in [*tasks, *([None] * parallel)]:
        waiting.put(task)
    threads = max(1, torch.get_num_threads() // parallel)
    workers = [
        context.Process(target=_worker, args=(out, size, device, threads, waiting, finished), daemon=True)
        for _ in range(min(parallel, max(1, len(tasks))))
    ]
    for worker in workers:
        worker.start()
    failed: list[str] = []
    running = len(workers)
    with tqdm(total=len(tasks), desc="runs", unit="run", smoothing=0.1) as bar:
        while running:
            while finished.empty():
                dead = [w for w in workers if w.exitcode not in (None, 0)]
                if dead:
                    raise ConfigError(
                        f"runs: a process ended with {dead[0].exitcode}, perhaps for want of memory; run the same "
                        "command again, which goes on with what is left, with --parallel 1 if need be"
                    )
                time.sleep(0.2)
            name, error = finished.get()
            if name is None:
                running -= 1
                failed += [error] if error else []
                continue
            bar.set_postfix_str(name)
            bar.update(1)
            if error:
                failed.append(f"{name}: {error}")
    for worker in workers:
        worker.join()
    if failed:
        raise ConfigError(f"runs: {len(failed)} failed; the others are kept. " + "; ".join(failed[:5]))
    return time.perf_counter() - began


def _worker(out: Path, size: StudySize, device: str, threads: int, waiting: Any, finished: Any) -> None:
    """Do runs until there are no more, or the study's own process has ended."""
    import torch

    from tailcache.scripts.study_run import Bench

    torch.set_num_threads(threads)
    try:
        bench = Bench(out, size, _read_rows(out / "held_out.npz"), device=device)
        bench.measure_teacher()
        for seed in size.seeds:
            bench.measure_start(seed)
    except Exception as error:  # reported by the study's own process
        traceback.print_exc()
        finished.put((None, f"the teacher: {type(error).__name__}: {error}"))
        return
    parent = multiprocessing.parent_process()
    while (task := waiting.get()) is not None and (parent is None or parent.is_alive()):
        arm, seed = task
        name, said = f"{arm.name}, seed {seed}", ""
        try:
            bench.run(arm, seed)
        except Exception as error:  # one run must not stop the others
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        finished.put((name, said))
    finished.put((None, ""))


def _note_seconds(out: Path, seconds: dict[str, float], config: Study) -> None:
    """One line for each time the command was run, since a killed study is made by several."""
    line = json.dumps({"seconds": seconds, "parallel": config.parallel, "conditions": conditions()})
    with (out / "sessions.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _report(config: Study, out: Path, size: StudySize, chosen: tuple[Arm, ...]) -> dict[str, Any]:
    from tailcache.scripts.study_caches import bytes_of, tail_masses
    from tailcache.scripts.study_report import write_report
    from tailcache.scripts.study_results import Runs, figures_of, questions_of

    runs = Runs(out, chosen, size.seeds)
    sizes = bytes_of(out, recipes_of(chosen))
    sessions = out / "sessions.jsonl"
    results = {
        "size": config.size,
        "settings": size.record(),
        "text": json.loads((out / "text" / "text.json").read_text(encoding="utf-8")),
        "held_out": {"modules": runs.num_modules, "positions": runs.positions},
        "conditions": conditions(),
        "sessions": [json.loads(line) for line in sessions.read_text().splitlines()] if sessions.is_file() else [],
        "confidence": runs.intervals.confidence,
        "bytes_per_position": sizes,
        **figures_of(runs, curve_share=size.curve_share),
        "questions": questions_of(runs, sizes),
        "tails": tail_masses(out, size, device="cpu", threads=1),
    }
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    durable.write_file(out / "results.json", text.encode() + b"\n")
    document = config.document or out / "study.md"
    write_report(results, document)
    if config.document is not None:
        durable.write_file(document.with_suffix(".json"), text.encode() + b"\n")
    print(f"\nwrote {out / 'results.json'} and {document}")
    return results


if __name__ == "__main__":
    main()
