"""One capture is killed fifty times, by SIGKILL, alone and beside another process: it ends in the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from capture_fixtures import folder_hashes, pack, random_documents, save_teacher, tiny_model, write_corpus
from children import run_child
from conftest import Tally

from tailcache.storage.verify import verify

V, KILLS = 100, 50
FLAGS = ["--name", "t", "--top-k", "8", "--num-samples", "4", "--device", "cpu", "--batch-positions", "64"]
FLAGS += ["--shard-positions", "24", "--chunk-positions", "8"]

STORM = """
import os, random, signal, sys, time
from pathlib import Path
from tailcache.scripts import cli
seed, processes, kills, cache, *flags = sys.argv[1:]
generator, running, counts = random.Random(int(seed)), set(), []
commits = Path(cache) / "teachers" / "t" / "commits"
count = lambda: len(list(commits.glob("*.json"))) if commits.is_dir() else 0
def start():
    child = os.fork()
    if child == 0:
        os._exit(cli.main(["capture", "--cache", cache, *flags]))
    running.add(child)
for _ in range(int(processes)):
    start()
while running:
    if len(counts) == int(kills):
        child, status = os.wait()
        running.discard(child)
        assert status == 0, status
        continue
    before, patience = count(), time.monotonic() + 2
    while len(counts) % 5 == 4 and count() == before and time.monotonic() < patience:
        time.sleep(0.001)  # one time in five, until a shard has been committed
    time.sleep(generator.random() * (0.03 if len(counts) % 5 == 4 else 0.12))
    victim = generator.choice(sorted(running))
    os.kill(victim, signal.SIGKILL)
    _, status = os.waitpid(victim, 0)
    running.discard(victim)
    if os.WIFSIGNALED(status):
        counts.append(count())
    else:
        sys.exit(f"finished, or failed, after {len(counts)} kills: {status}")
    start()
print("committed", *counts)
"""


def storm(cache: Path, model: str, *, processes: int, kills: int, seed: int = 0) -> list[int]:
    """Capture, killing processes at random; gives the number of committed shards after each kill."""
    printed = run_child(STORM, seed, processes, kills, cache, "--teacher", model, *FLAGS, timeout=250)
    return [int(number) for number in printed.splitlines()[-1].split()[1:]]


@pytest.mark.slow
def test_fifty_kills_over_one_capture(tmp_path: Path, tally: Tally) -> None:
    model = save_teacher(tmp_path / "model", tiny_model("llama", V))
    write_corpus(tmp_path / "whole", pack(random_documents(240, vocab_size=V, seed=1), 2), vocab_size=V)
    for processes in (1, 2):
        shutil.copytree(tmp_path / "whole", tmp_path / f"killed{processes}")
    assert storm(tmp_path / "whole", model, processes=1, kills=0) == []
    expected = folder_hashes(tmp_path / "whole" / "teachers" / "t")
    for processes in (1, 2):
        cache = tmp_path / f"killed{processes}"
        committed = storm(cache, model, processes=processes, kills=KILLS)
        assert len(committed) == KILLS
        assert committed == sorted(committed), "a committed shard is gone"
        assert len(set(committed)) >= 8, f"hardly any kill fell within the capture: {committed}"
        assert folder_hashes(cache / "teachers" / "t") == expected
        assert verify(cache) == []
        tally(f"SIGKILLs in one capture by {'one process' if processes == 1 else 'two processes at a time'}", KILLS)
