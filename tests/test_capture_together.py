"""Captures of one name by several processes at once: real processes, started late, killed, over any kind of place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from capture_fixtures import config, folder_hashes, pack, random_documents, save_teacher, tiny_model, write_corpus
from children import run_child

from tailcache.pipeline.capture import capture, capture_shard
from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.opened import open_teacher
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.durable import sha256
from tailcache.storage.errors import IncompleteError
from tailcache.storage.inventory import teacher_inventory
from tailcache.storage.place import Claim, open_place
from tailcache.storage.reader import open_cache
from tailcache.storage.verify import Level, verify

LEVELS: tuple[Level, Level] = ("fast", "full")
V = 100
DOCUMENTS = random_documents(80, vocab_size=V, seed=1)

WORKERS = """
import os, random, signal, sys, time
from tailcache.pipeline import rows
from tailcache.scripts import cli
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
    printed = run_child(WORKERS, seed, processes, kills, slow, cache, "--teacher", model, *FLAGS, timeout=200)
    return [int(number) for number in printed.splitlines()[-1].split()]


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


def small(cache: Path) -> CaptureConfig:
    return config(cache, shard_positions=60)


def test_at_the_end_it_waits_for_the_others_and_takes_over_from_the_dead(corpus: Path, tmp_path: Path) -> None:
    """Another holder has a shard, and later the work at the very end; it does neither, then it is gone."""
    teacher = Teacher(tiny_model("llama", V), vocab_size=V)
    for name in ("one", "other"):
        shutil.copytree(corpus, tmp_path / name)
    capture(small(tmp_path / "one"), teacher=teacher, show_progress=False)
    place = open_place(tmp_path / "other") / "teachers" / "t"
    held = {name: place.claim(f"claims/{name}") for name in ("00000003", "finish")}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(capture, small(tmp_path / "other"), teacher=teacher, show_progress=False)
        num_shards = open_cache(tmp_path / "one").teacher("t").layout.num_shards
        others = {f"commits/{shard:08d}.json" for shard in range(num_shards)} - {"commits/00000003.json"}
        wait_until(lambda: {name for name, _ in place.files("commits")} == others)
        time.sleep(0.3)
        assert not running.done()
        assert not place.exists("complete.json")
        with pytest.raises(IncompleteError):
            open_cache(tmp_path / "other").teacher("t")
        inventory = teacher_inventory(open_cache(tmp_path / "other").corpus, "t")
        assert (inventory.committed_shards, inventory.complete) == (num_shards - 1, False)
        assert verify(tmp_path / "other") == []
        release(held["00000003"])
        wait_until(lambda: place.exists("commits/00000003.json"))
        time.sleep(0.3)
        assert not running.done()
        release(held["finish"])
        report = running.result(timeout=30)
    assert (report.other_shards, report.resumed_shards) == (0, 0)
    assert folder_hashes(tmp_path / "other" / "teachers" / "t") == folder_hashes(tmp_path / "one" / "teachers" / "t")


def test_a_shard_computed_before_there_is_a_manifest_is_kept(corpus: Path, tmp_path: Path) -> None:
    """The first shard is another's: one more is computed meanwhile, and written when the constants are there."""
    teacher = Teacher(tiny_model("llama", V), vocab_size=V)
    for name in ("one", "other"):
        shutil.copytree(corpus, tmp_path / name)
    capture(small(tmp_path / "one"), teacher=teacher, show_progress=False)
    opened = open_teacher(small(tmp_path / "other"), open_cache(tmp_path / "other").corpus, teacher)
    with opened.writer("t") as writer, ThreadPoolExecutor(1) as pool:
        assert next(writer.shards()) == 0
        running = pool.submit(capture, small(tmp_path / "other"), teacher=teacher, show_progress=False)
        wait_until(lambda: (tmp_path / "other/teachers/t/claims/00000001").exists())
        time.sleep(0.5)
        claims = {path.name for path in (tmp_path / "other/teachers/t/claims").iterdir()}
        assert claims == {"00000000", "00000001"}, "more than one shard was taken that cannot be written"
        writer.write_shard(0, *capture_shard(opened, small(tmp_path / "other"), 0))
        report = running.result(timeout=30)
    assert report.resumed_shards == 0
    assert report.other_shards == 1
    of = open_cache(tmp_path / "one").corpus
    first = of.target_offsets(*opened.layout.shard_rows(0))
    assert report.positions == of.num_targets - int(first[-1] - first[0])
    assert folder_hashes(tmp_path / "other" / "teachers" / "t") == folder_hashes(tmp_path / "one" / "teachers" / "t")


def test_the_holder_of_the_first_shard_dies_without_a_manifest(corpus: Path, tmp_path: Path) -> None:
    teacher = Teacher(tiny_model("llama", V), vocab_size=V)
    for name in ("one", "other"):
        shutil.copytree(corpus, tmp_path / name)
    capture(small(tmp_path / "one"), teacher=teacher, show_progress=False)
    place = open_place(tmp_path / "other") / "teachers" / "t"
    first = place.claim("claims/00000000")
    place.write("zarr.json", b"half of what it wrote")
    place.write("hidden/zarr.json", b"of other settings")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(capture, small(tmp_path / "other"), teacher=teacher, show_progress=False)
        wait_until(lambda: (tmp_path / "other/teachers/t/claims/00000001").exists())
        release(first)
        assert running.result(timeout=30).other_shards == 0
    assert folder_hashes(tmp_path / "other" / "teachers" / "t") == folder_hashes(tmp_path / "one" / "teachers" / "t")


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.01)


def release(claim: Claim | None) -> None:
    assert claim is not None
    claim.release()


@pytest.mark.slow
def test_a_cache_is_found_sound_at_every_moment_of_its_capture(corpus: Path, model: str, tmp_path: Path) -> None:
    """Verified again and again while two processes write and one of them finishes."""
    shutil.copytree(corpus, tmp_path / "cache")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(together, tmp_path / "cache", model, processes=2, slow=0.1)
        looks = 0
        while not running.done():
            assert verify(tmp_path / "cache", level=LEVELS[looks % 2]) == []
            looks += 1
        running.result()
    assert looks > 10
    assert verify(tmp_path / "cache") == []


@pytest.mark.slow
def test_together_in_a_store(corpus: Path, model: str, alone: dict[str, str], s3_url: str) -> None:
    place = open_place(s3_url)
    for path in sorted(p for p in corpus.rglob("*") if p.is_file()):
        place.write(path.relative_to(corpus).as_posix(), path.read_bytes())
    together(s3_url, model, processes=2, slow=0.02)
    teacher = place.uncached() / "teachers" / "t"
    assert {name: sha256(teacher.read(name)) for name, _ in teacher.files()} == alone
