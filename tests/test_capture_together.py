"""Captures of one name by several processes at once: real processes, started late, killed, over any kind of place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from capture_fixtures import folder_hashes, pack, random_documents, save_teacher, tiny_model, write_corpus

from tailcache.storage.verify import verify

V = 100
DOCUMENTS = random_documents(80, vocab_size=V, seed=1)

WORKERS = """
import os, random, signal, sys, time
import torch, transformers
import tailcache.pipeline.capture
import transformers.models.llama.modeling_llama
from tailcache.pipeline import rows
from tailcache.scripts import cli
torch.set_num_threads(1)
seed, processes, kills, slow, cache, *flags = sys.argv[1:]
generator, left, running, done = random.Random(int(seed)), int(kills), {}, 0
batch_segments = rows.batch_segments
def slowly(*arguments):
    for batch in batch_segments(*arguments):
        time.sleep(float(slow))
        yield batch
rows.batch_segments = slowly
def start():
    child = os.fork()
    if child == 0:
        os._exit(cli.main(["capture", "--cache", cache, *flags]))
    running[child] = True
for number in range(int(processes)):
    start()
    time.sleep(0.1 * number)
while running:
    if left:
        time.sleep(generator.random() * 0.35)
        victim = generator.choice(sorted(running))
        os.kill(victim, signal.SIGKILL)
    child, status = os.wait()
    del running[child]
    if os.WIFSIGNALED(status):
        left -= 1
        start()
    elif status:
        sys.exit(f"a process failed: {status}")
    else:
        done += 1
        if left and not running:
            start()
print(int(kills) - left, done)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("model"), tiny_model("llama", V))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("corpus") / "cache"
    write_corpus(cache, pack(DOCUMENTS, 2), vocab_size=V)
    return cache


FLAGS = ["--name", "t", "--top-k", "8", "--num-samples", "4", "--device", "cpu", "--batch-positions", "64"]
FLAGS += ["--shard-positions", "30", "--chunk-positions", "16", "--temperatures", "2", "0.5", "--hidden", "int8"]


@pytest.fixture(scope="module")
def alone(corpus: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes, never interrupted."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    shutil.copytree(corpus, cache)
    together(cache, model, processes=1)
    return folder_hashes(cache / "teachers" / "t")


def together(
    cache: Path | str, model: str, *, processes: int, kills: int = 0, slow: float = 0.0, seed: int = 0
) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, *map(str, (seed, processes, kills, slow, cache)), "--teacher", model, *FLAGS],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [int(number) for number in done.stdout.splitlines()[-1].split()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_make_what_one_makes_alone(
    corpus: Path, model: str, alone: dict[str, str], tmp_path: Path, processes: int
) -> None:
    shutil.copytree(corpus, tmp_path / "cache")
    together(tmp_path / "cache", model, processes=processes, slow=0.05)
    assert folder_hashes(tmp_path / "cache" / "teachers" / "t") == alone
    assert verify(tmp_path / "cache") == []


@pytest.mark.slow
def test_killed_at_random_they_still_do(corpus: Path, model: str, alone: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "cache")
    kills, done = together(tmp_path / "cache", model, processes=3, kills=20, slow=0.03, seed=4)
    assert kills == 20
    assert done >= 1
    assert folder_hashes(tmp_path / "cache" / "teachers" / "t") == alone
    assert verify(tmp_path / "cache") == []
