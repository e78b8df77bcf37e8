"""The whole path on s3://, through a store that fails again and again: the bytes are those of a local cache."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capture_fixtures import save_teacher, tiny_model
from children import COMMAND, Child
from s3_server import Faults, S3Server
from tokenizer_fixtures import build_tokenizer

from tailcache.scripts.cli import main
from tailcache.storage.errors import IncompleteError
from tailcache.storage.place import open_place
from tailcache.storage.reader import open_cache

pytestmark = pytest.mark.slow
SENTENCES = [
    "the cat sat on the mat and the dog sat on the cat",
    "a tailcache keeps the tail of what the teacher said",
    "run the teacher once and train many students from the shards",
]
CAPTURE = ["--top-k", "12", "--num-samples", "4", "--shard-positions", "250"]
PASSING = ("500", "503", "drop", "lost answer", "half request", "half body", "short body")


def now_and_then(faults: Faults) -> None:
    """Every kind of failure that passes, at about a sixth of all requests."""
    faults.clear()
    for i, kind in enumerate(PASSING):
        faults.add(kind, times=None, skip=2 + 3 * i, every=41 + 2 * i)


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The same cache twice, in a folder and in a bucket, and what made it."""

    folder: Path
    local: str
    url: str
    faults: Faults

    def command(self, verb: str, cache: str, **more: str) -> list[str]:
        """A command line."""
        if verb == "prepare":
            source, tokenizer = str(self.folder / "text.jsonl"), str(self.folder / "teacher-a")
            line = ["--source", source, "--tokenizer", tokenizer, "--context-length", "32", "--held-out", "0.2"]
        else:
            line = ["--teacher", str(self.folder / f"teacher-{more['name']}"), "--name", more["name"], *CAPTURE]
        return [verb, "--cache", cache, *line]


@pytest.fixture(scope="module")
def caches(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caches]:
    folder = tmp_path_factory.mktemp("remote")
    tokenizer = build_tokenizer()
    for seed, name in enumerate("ab"):
        model = tiny_model(vocab_size=len(tokenizer) + 3, seed=seed)
        save_teacher(folder / f"teacher-{name}", model, tokenizer)
    lines = [json.dumps({"text": SENTENCES[i % 3] + f" {i}"}) for i in range(90)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment(folder).items():
            patch.setenv(name, value)
        patch.setenv("TAILCACHE_RETRY_SECONDS", "30")
        patch.setenv("TAILCACHE_LEASE_SECONDS", "5")
        url = f"s3://{s3_server.new_bucket()}/some/cache"
        made = Caches(folder=folder, local=str(folder / "cache"), url=url, faults=s3_server.faults)
        now_and_then(made.faults)
        assert main(made.command("prepare", made.local)) == 0
        _killed_while_uploading(made)
        assert main(made.command("prepare", made.url)) == 0
        for name in "ab":
            assert main(made.command("capture", made.local, name=name)) == 0
        _killed_while_capturing(made)
        _two_at_once(made)
        assert all(fault.struck > 3 for fault in made.faults.active)
        made.faults.clear()
        yield made
    s3_server.faults.clear()


def _killed_while_uploading(caches: Caches) -> None:
    """Prepare in the bucket, killed when some files are there: there is no corpus then."""
    place = open_place(caches.url)
    slow = caches.faults.add("slow", methods=("PUT",), path="/corpus/tokens/c/", seconds=1)
    caches.faults.active.insert(0, caches.faults.active.pop())
    process = Child(COMMAND, *caches.command("prepare", caches.url))
    deadline = time.monotonic() + 120
    while not slow.struck:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    caches.faults.active.remove(slow)
    assert len(list(place.files("corpus"))) > 3
    assert not place.exists("corpus/manifest.json")
    with pytest.raises(IncompleteError, match="run the same `tailcache prepare` again"):
        open_cache(caches.url)


def _two_at_once(caches: Caches) -> None:
    """Two processes capture teacher b in the bucket; both end well."""
    processes = [Child(COMMAND, *caches.command("capture", caches.url, name="b")) for _ in range(2)]
    assert [process.wait(180) for process in processes] == [0, 0]


def _killed_while_capturing(caches: Caches) -> None:
    """Capture teacher a in the bucket, killed when two shards are committed, and again to the end."""
    place = open_place(caches.url) / "teachers" / "a"
    process = Child(COMMAND, *caches.command("capture", caches.url, name="a"))
    deadline = time.monotonic() + 120
    while len(list(place.files("commits"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main(caches.command("capture", caches.url, name="a")) == 0


def _contents(location: str) -> dict[str, bytes]:
    place = open_place(location)
    return {name: place.uncached().read(name) for name, _ in place.files()}


def test_the_bytes_are_those_of_a_local_cache(caches: Caches) -> None:
    local, remote = _contents(caches.local), _contents(caches.url)
    assert len([name for name in remote if "/commits/" in name]) >= 6
    assert sorted(remote) == sorted(local)
    assert [name for name in local if local[name] != remote[name]] == []


def test_the_same_bytes_on_a_file_system_of_fsspec(caches: Caches) -> None:
    url = "memory://some/cache"
    for line in (caches.command("prepare", url), caches.command("capture", url, name="a"), ["verify", "--cache", url]):
        assert main(line) == 0
    expected = {name: data for name, data in _contents(caches.local).items() if not name.startswith("teachers/b/")}
    assert _contents(url) == expected


def test_readers_see_the_same_values(caches: Caches) -> None:
    now_and_then(caches.faults)
    local, remote = open_cache(caches.local), open_cache(caches.url)
    assert local.teacher_names == remote.teacher_names == ["a", "b"]
    a, b = local.teacher("a"), remote.teacher("a")
    assert (a.hash, a.num_targets) == (b.hash, b.num_targets)
    one, other = a.rows(0, a.corpus.num_rows), b.rows(0, b.corpus.num_rows)
    for name in ("token_ids", "logprobs", "log_tail", "tail_samples", "log_target"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.array_equal(a.mean_tail, b.mean_tail)
    tokenizers = [{p.name: p.read_bytes() for p in cache.corpus.tokenizer_dir.iterdir()} for cache in (local, remote)]
    assert tokenizers[0] == tokenizers[1]
    assert tokenizers[0]


def test_what_was_read_once_is_read_from_the_disk(caches: Caches) -> None:
    caches.faults.clear()
    first = open_cache(caches.url).teacher("a")
    first.rows(0, first.corpus.num_rows)
    caches.faults.clear()
    again = open_cache(caches.url).teacher("a")
    again.rows(0, again.corpus.num_rows)
    assert caches.faults.count("GET .*/c/") == 0  # no array data; records are read where they lie


def test_a_student_learns_the_same(caches: Caches) -> None:
    """From the first to the last step, with requests failing all the time."""
    now_and_then(caches.faults)
    curves = []
    for where, cache in (("local", caches.local), ("s3", caches.url)):
        out = caches.folder / f"student-{where}"
        line = ["train", "--cache", cache, "--teacher", "a", "--out", str(out), "--loss", "tad", "--max-steps", "8"]
        line += ["--student.hidden-size", "32", "--student.num-layers", "1", "--student.num-heads", "2"]
        workers = "1" if cache == caches.url else "0"  # a process of its own reads the bucket
        assert main([*line, "--batch-rows", "8", "--eval-every", "4", "--workers", workers]) == 0
        curves.append([json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()])
    for one, other in zip(*curves, strict=True):
        assert one["kl"] == other["kl"]


def test_compare_verify_and_info(caches: Caches, capsys: pytest.CaptureFixture[str]) -> None:
    now_and_then(caches.faults)
    printed: dict[str, list[Any]] = {}
    for cache in (caches.local, caches.url):
        out = caches.folder / "compare.json"
        assert main(["compare", "--cache", cache, "--teachers", "a", "b", "--json", str(out)]) == 0
        capsys.readouterr()
        assert main(["info", "--cache", cache]) == 0
        info = capsys.readouterr().out.replace(cache, "CACHE")
        assert main(["verify", "--cache", cache]) == 0
        printed[cache] = [json.loads(out.read_text()), info]
    assert json.dumps(printed[caches.local]).replace(caches.local, "") == json.dumps(printed[caches.url]).replace(
        caches.url, ""
    )


def test_verify_finds_damage_in_the_bucket_and_not_in_copies(
    caches: Caches, capsys: pytest.CaptureFixture[str]
) -> None:
    place = open_place(caches.url)
    teacher = open_cache(caches.url).teacher("a")
    teacher.rows(0, teacher.corpus.num_rows)  # now there are copies
    name = next(name for name, _ in place.files("teachers/a/tail_logit/c"))
    whole = place.read(name)
    place.write(name, whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    try:
        assert main(["verify", "--cache", caches.url]) == 1
        assert "field tail_logit" in capsys.readouterr().out
    finally:
        place.write(name, whole)


def test_a_store_that_goes_down_meanwhile_is_no_damage(
    caches: Caches, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.3")
    for skip in (5, 40, 90):
        caches.faults.clear()
        caches.faults.add("503", times=None, skip=skip)
        assert main(["verify", "--cache", caches.url]) == 1
        error = capsys.readouterr().err
        assert "reading failed, tried" in error
        assert "SlowDown" in error
    caches.faults.clear()


def test_a_store_that_stays_down_is_an_error_that_says_so(
    caches: Caches, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILCACHE_RETRY_SECONDS", "0.3")
    caches.faults.clear()
    caches.faults.add("503", times=None)
    for line in (
        ["info", "--cache", caches.url],
        ["verify", "--cache", caches.url],
        ["train", "--cache", caches.url, "--teacher", "a", "--out", str(caches.folder / "never")],
        caches.command("capture", caches.url, name="a"),
    ):
        start = time.monotonic()
        assert main(line) == 1
        assert time.monotonic() - start < 60
        error = capsys.readouterr().err
        assert "SlowDown" in error
        assert "TAILCACHE_RETRY_SECONDS" in error
        assert "Traceback" not in error
    caches.faults.clear()
    assert not os.path.exists(caches.folder / "never")
