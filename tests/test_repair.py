"""Repair: the same bytes as before whatever was damaged, for the price of the damaged shards; nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_fixtures import config, pack, random_documents, save_teacher, tiny_model, write_corpus
from faults import Killed, flip, killed_at, swap
from forge import edit
from storage_fixtures import make_corpus, make_exact, tree

from tailcache.pipeline import opened as opened_module
from tailcache.pipeline import repair as repair_module
from tailcache.pipeline.capture import capture, capture_shard
from tailcache.pipeline.repair import repair_cache
from tailcache.pipeline.teacher import Teacher
from tailcache.scripts import cli
from tailcache.storage.commits import MANIFEST_COPY
from tailcache.storage.errors import MismatchError
from tailcache.storage.mending import Mended
from tailcache.storage.place import open_place
from tailcache.storage.reader import open_cache
from tailcache.storage.targets import plan_layout
from tailcache.storage.verify import Verification, verify

V = 100
DOCUMENTS = random_documents(60, vocab_size=V, seed=1)
OPTIONS: dict[str, Any] = {"temperatures": (2.0,), "hidden": "int8"}


def live(**changes: Any) -> Teacher:
    return Teacher(tiny_model("llama", V, **changes), vocab_size=V)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished capture with every field there is."""
    cache = tmp_path_factory.mktemp("sound") / "cache"
    write_corpus(cache, pack(DOCUMENTS, 3), vocab_size=V)
    capture(config(cache, **OPTIONS), teacher=live(), show_progress=False)
    assert verify(cache) == []
    return cache


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "cache")
    return tmp_path / "cache"


def mend(cache: Path, **how: Any) -> tuple[Mended, Verification]:
    return repair_cache(cache, **{"live": live(), **how})


def without_quarantine(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(cache).items() if not name.startswith("quarantine/")}


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "flip":
        flip(path, len(data) // 2)
    elif kind == "cut":
        path.write_bytes(data[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


KINDS = ("flip", "cut", "delete", "empty")


@pytest.mark.slow
def test_every_file_of_a_teacher_is_mended(cache: Path, sound: Path) -> None:
    good = tree(sound)
    folder = cache / "teachers" / "t"
    teacher = live()
    shards = [name for name in tree(folder) if "/c/" in name and not name.startswith(("head_", "vocab", "logprob_lev"))]
    others = [name for name in tree(folder) if name not in shards]
    chosen = others + [name for name in shards if "/c/1" in name or "/c/0" in name]
    for number, name in enumerate(chosen):
        kind = KINDS[number % len(KINDS)]
        damaged = (folder / name).read_bytes()
        damage(folder / name, kind)
        mended, after = mend(cache, live=teacher)
        assert after.faults == [], f"{kind} {name}: {mended.left}"
        assert f"teachers/t/{name}" in mended.made
        assert without_quarantine(cache) == good, f"{kind} {name}"
        assert len(mended.shards) <= 1
        assert len(mended.quarantined) == (kind != "delete")
        for to in mended.quarantined.values():
            assert len((cache / to).read_bytes()) in (0, len(damaged) - 1, len(damaged))
        shutil.rmtree(cache / "quarantine", ignore_errors=True)
    assert len(chosen) > 50


def positions_run(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each batch the teacher computes from now on."""
    counted: list[int] = []
    original = teacher.hidden

    def hidden(input_ids: torch.Tensor) -> torch.Tensor:
        counted.append(input_ids.numel())
        return original(input_ids)

    monkeypatch.setattr(teacher, "hidden", hidden)
    return counted


def test_much_damage_at_once_costs_the_damaged_shards_alone(
    cache: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / "teachers" / "t"
    num_shards = open_cache(sound).teacher("t").layout.num_shards
    assert num_shards >= 8
    flip(folder / "token_codes/c/2/0", 40)
    (folder / "tail_entropy/c/2").unlink()
    flip(folder / "hidden/c/5/0", 100)
    flip(folder / "commits/00000005.json", 50)
    (folder / "commits/00000007.json").unlink()
    flip(folder / "manifest.json", 20)
    flip(folder / "target_logit/zarr.json", 20)
    (folder / "mean_tail/c/0").write_bytes(b"nonsense")
    (folder / "stray").write_bytes(b"what is this")
    teacher = live()
    counted = positions_run(teacher, monkeypatch)
    mended, after = mend(cache, live=teacher)
    assert after.faults == []
    assert mended.left == {}
    assert without_quarantine(cache) == tree(sound)
    assert mended.shards == [("t", shard) for shard in (2, 5, 7)]
    assert (cache / mended.quarantined["teachers/t/stray"]).read_bytes() == b"what is this"
    assert (cache / "quarantine/teachers/t/mean_tail/c/0").read_bytes() == b"nonsense"
    corpus = open_cache(sound).corpus
    layout = open_cache(sound).teacher("t").layout
    tokens = sum(corpus.rows(*layout.shard_rows(shard)).tokens.size for shard in (2, 5, 7))
    probe = 2 * corpus.rows(0, 1).tokens.size
    assert sum(counted) <= 1.5 * tokens + probe < corpus.num_tokens / 1.5


def test_what_needs_no_teacher_is_mended_without_one(cache: Path, sound: Path) -> None:
    folder = cache / "teachers" / "t"
    flip(folder / "manifest_copy.json", 20)
    (folder / "complete.json").unlink()
    (folder / "zarr.json").unlink()
    flip(folder / "mean_tail_copy/c/0", 9)
    (cache / "teachers" / "note").write_bytes(b"x")
    mended, after = repair_cache(cache)
    assert after.faults == []
    assert without_quarantine(cache) == tree(sound)
    assert mended.shards == []
    flip(folder / "target_logit/c/3", 9)
    mended, after = repair_cache(cache)
    assert [fault.path for fault in after.faults] == ["teachers/t/target_logit/c/3"]
    assert "found no --teacher" in mended.left["teachers/t/target_logit/c/3"]
    assert mend(cache)[1].faults == []


def test_everything_that_can_be_made_again_is_lost(cache: Path, sound: Path) -> None:
    """Only the manifest, a mean tail and the record of the whole are left."""
    folder = cache / "teachers" / "t"
    for path in list(folder.iterdir()):
        if path.is_dir() and path.name != "mean_tail":
            shutil.rmtree(path)
    (folder / "manifest.json").unlink()
    mended, after = mend(cache)
    assert after.faults == []
    assert tree(cache) == tree(sound)
    assert len(mended.shards) == open_cache(sound).teacher("t").layout.num_shards
    assert mended.notes == []


def test_without_the_record_of_the_whole_lost_commits_are_made_and_it_is_said(cache: Path, sound: Path) -> None:
    folder = cache / "teachers" / "t"
    (folder / "complete.json").unlink()
    (folder / "commits/00000003.json").unlink()
    flip(folder / "tail_entropy/c/3", 9)
    mended, after = mend(cache)
    assert after.faults == []
    assert without_quarantine(cache) == tree(sound)
    assert any("shards 3: their commit records were made again, and no record is left" in note for note in mended.notes)


def test_a_manifest_that_claims_countless_shards_is_not_counted_through(cache: Path) -> None:
    """Were their names listed, the machine would run out of memory."""
    teacher = cache / "teachers" / "t"
    for path in (teacher / "manifest.json", teacher / MANIFEST_COPY):
        edit(path, lambda values: values["layout"].update(num_rows=1 << 40, num_positions=1 << 40, rows_per_shard=1))
    (teacher / "complete.json").unlink()
    with pytest.raises(MismatchError, match=r"about the .* rows of the corpus, found 1099511627776"):
        mend(cache)


@pytest.mark.parametrize("exchange", ["objects", "commits", "fields"])
def test_exchanged_files(cache: Path, sound: Path, exchange: str) -> None:
    folder = cache / "teachers" / "t"
    one, other = {
        "objects": ("token_codes/c/1/0", "token_codes/c/4/0"),
        "commits": ("commits/00000001.json", "commits/00000004.json"),
        "fields": ("log_z_tail/c/1/0", "tail_entropy/c/4"),
    }[exchange]
    swap(folder / one, folder / other)
    mended, after = mend(cache)
    assert after.faults == []
    assert mended.shards == [("t", 1), ("t", 4)]
    assert without_quarantine(cache) == tree(sound)


def test_another_teachers_manifest_in_the_place_of_its_own(cache: Path, sound: Path) -> None:
    """The commit records say which of the two is right; nothing is captured again."""
    capture(config(cache, name="u", top_k=3), teacher=live(), show_progress=False)
    good = tree(cache)
    shutil.copyfile(cache / "teachers/u/manifest.json", cache / "teachers/t/manifest.json")
    mended, after = repair_cache(cache)
    assert after.faults == []
    assert mended.shards == []
    assert mended.made == ["teachers/t/manifest.json"]
    assert without_quarantine(cache) == good


def test_two_teachers_of_one_cache(cache: Path) -> None:
    other = live(seed=1)
    capture(config(cache, name="u", top_k=3), teacher=other, show_progress=False)
    good = tree(cache)
    flip(cache / "teachers/t/tail_entropy/c/1", 9)
    flip(cache / "teachers/u/tail_entropy/c/2", 9)
    with pytest.raises(MismatchError, match=r"teacher 'u'.*settings\.weights: stored .*, found"):
        mend(cache)
    mended, after = mend(cache, live=other, name="u")
    assert {fault.path for fault in after.faults} <= {"teachers/t/tail_entropy/c/1"}
    assert ("u", 2) in mended.shards
    mend(cache, name="t")
    assert without_quarantine(cache) == good


def test_another_model_is_refused_and_nothing_is_touched(cache: Path) -> None:
    flip(cache / "teachers/t/tail_entropy/c/1", 9)
    before = tree(cache)
    with pytest.raises(MismatchError, match=r"settings\.weights: stored .*Give the same model, device and settings"):
        mend(cache, live=live(seed=1))
    with pytest.raises(MismatchError, match=r"settings\.dtype: stored 'float32', found 'bfloat16'"):
        mend(cache, live=Teacher(tiny_model("llama", V).to(torch.bfloat16), vocab_size=V))
    assert tree(cache) == before


@pytest.mark.parametrize("commit", ["sound", "lost"])
def test_a_machine_that_computes_other_bytes_replaces_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    """As another processor may, with the same weights and versions."""
    original = capture_shard

    def elsewhere(*arguments: Any) -> Any:
        targets, tail_sum = original(*arguments)
        return dataclasses.replace(targets, tail_entropy=targets.tail_entropy * np.float32(1.01)), tail_sum

    flip(cache / "teachers/t/tail_entropy/c/1", 9)
    if commit == "lost":
        (cache / "teachers/t/commits/00000001.json").unlink()
    before = tree(cache)
    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "capture_shard", elsewhere)
        mended, after = mend(cache)
    assert after.faults
    assert any("captured again it has other bytes" in reason for reason in mended.left.values())
    assert tree(cache) == before
    assert mend(cache)[1].faults == []


def test_what_cannot_be_mended_is_said_with_the_remedy(cache: Path) -> None:
    folder = cache / "teachers" / "t"
    flip(folder / "mean_tail/c/0", 9)
    flip(folder / "mean_tail_copy/c/0", 9)
    mended, after = mend(cache)
    assert {fault.path.split("/")[2] for fault in after.faults} == {"mean_tail", "mean_tail_copy"}
    assert all("both lost" in reason and "capture it again" in reason for reason in mended.left.values())
    flip(folder / "manifest.json", 9)
    flip(folder / "manifest_copy.json", 9)
    mended, _ = mend(cache)
    assert any("manifest and its copy are both lost" in reason for reason in mended.left.values())


def test_a_damaged_corpus_is_not_captured_over(cache: Path, sound: Path) -> None:
    flip(cache / "corpus/tokens/c/0", 60)
    flip(cache / "teachers/t/tail_entropy/c/1", 9)
    mended, after = mend(cache)
    assert {fault.path for fault in after.faults} == {"corpus/tokens/c/0", "teachers/t/tail_entropy/c/1"}
    assert "prepare the same source" in mended.left["corpus/tokens/c/0"]
    assert "the corpus is damaged" in mended.left["teachers/t/tail_entropy/c/1"]
    assert mended.shards == []
    shutil.copyfile(sound / "corpus/tokens/c/0", cache / "corpus/tokens/c/0")
    assert mend(cache)[1].faults == []
    assert without_quarantine(cache) == tree(sound)


def test_a_teacher_that_was_not_captured(tmp_path: Path) -> None:
    exact = make_exact(make_corpus(tmp_path), shard_positions=15)
    exact.write("t")
    flip(tmp_path / "teachers/t/tail_entropy/c/1", 9)
    mended, after = repair_cache(tmp_path, model="nowhere")
    assert [fault.path for fault in after.faults] == ["teachers/t/tail_entropy/c/1"]
    assert "derive it again from its source" in mended.left["teachers/t/tail_entropy/c/1"]


class Stop(Exception):
    """Raised in the midst of things."""


def interrupted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that stopped after some shards."""
    teacher, count = live(), 0
    original = teacher.hidden

    def hidden(input_ids: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > 12:
            raise Stop
        return original(input_ids)

    monkeypatch.setattr(teacher, "hidden", hidden)
    with pytest.raises(Stop):
        capture(config(cache, **OPTIONS), teacher=teacher, show_progress=False)


def test_an_unfinished_capture_is_mended_and_goes_on(cache: Path, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / "teachers" / "t"
    shutil.rmtree(folder)
    interrupted(cache, monkeypatch)
    committed = sorted((folder / "commits").iterdir())
    assert len(committed) >= 4
    flip(folder / "partial/tail_sum-00000001.bin", 9)
    (folder / "partial/tail_sum-00000002.bin").unlink()
    flip(folder / "target_logit/c/0", 9)
    flip(folder / "vocabulary_order/c/0", 9)
    (folder / "commits/00000002.json").write_bytes(b"{}")
    mended, after = mend(cache)
    assert after.faults == []
    assert mended.shards == [("t", 0), ("t", 1), ("t", 2)]
    capture(config(cache, **OPTIONS), teacher=live(), show_progress=False)
    assert without_quarantine(cache) == tree(sound)


def test_shards_of_version_1_are_mended_where_their_record_is_sound(
    tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "old"
    shutil.copytree(sound / "corpus", cache / "corpus")
    original = plan_layout
    with monkeypatch.context() as patch:
        patch.setattr(
            opened_module, "plan_layout", lambda *a, **k: dataclasses.replace(original(*a, **k), format_version=1)
        )
        capture(config(cache), teacher=live(), show_progress=False)
    folder = cache / "teachers" / "t"
    (folder / "manifest_copy.json").unlink()
    assert not (folder / "mean_tail_copy").exists()
    assert verify(cache) == []
    good = tree(cache)
    flip(folder / "log_tail/c/1", 9)
    flip(folder / "vocabulary_order/c/0", 9)
    (folder / "token_codes/zarr.json").unlink()
    mended, after = mend(cache)
    assert after.faults == []
    assert without_quarantine(cache) == good
    flip(folder / "commits/00000002.json", 9)
    flip(folder / "mean_tail/c/0", 9)
    mended, after = mend(cache)
    assert len(after.faults) == 2
    assert "in format version 1" in mended.left["teachers/t/commits/00000002.json"]
    assert "both lost" in mended.left["teachers/t/mean_tail/c/0"]
    flip(folder / "manifest.json", 9)
    mended, _ = mend(cache)
    assert "manifest" in mended.left["teachers/t/manifest.json"]


@pytest.mark.slow
def test_killed_at_every_change_of_the_disk_it_can_be_run_again(cache: Path, sound: Path) -> None:
    folder = cache / "teachers" / "t"
    teacher, good = live(), tree(sound)

    def hurt() -> None:
        flip(folder / "token_codes/c/2/0", 40)
        flip(folder / "commits/00000005.json", 50)
        flip(folder / "tail_entropy/c/5", 9)
        (folder / "complete.json").write_bytes(b"")
        flip(folder / "manifest.json", 20)
        flip(folder / "mean_tail_copy/c/0", 9)

    hurt()
    with killed_at(-1, "after") as counter:
        mend(cache, live=teacher)
    assert without_quarantine(cache) == good
    for number in range(0, counter.count, 2):
        hurt()
        with pytest.raises(Killed), killed_at(number, "half"):
            mend(cache, live=teacher)
        mended, after = mend(cache, live=teacher)
        assert after.faults == [], counter.names[number]
        left = {name: data for name, data in without_quarantine(cache).items() if not name.endswith(".tmp")}
        assert left == good, counter.names[number]
        assert mended.left == {}


def test_the_command(cache: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_teacher(tmp_path / "model", tiny_model("llama", V))
    flip(cache / "teachers/t/tail_entropy/c/1", 9)
    (cache / "note").write_bytes(b"x")
    out = tmp_path / "report.json"
    command = ["verify", "--cache", str(cache), "--repair", "--json", str(out)]
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    assert "put aside note: quarantine/note" in printed
    assert "not mended: teachers/t/tail_entropy/c/1: teacher 't': expected the model" in printed
    report = json.loads(out.read_text())
    assert (report["good"], len(report["faults"]), len(report["found"])) == (False, 1, 2)
    assert cli.main([*command, "--teacher", folder]) == 0
    printed = capsys.readouterr().out
    assert "captured again: teacher t, shard 1" in printed
    assert "made again: teachers/t/tail_entropy/c/1" in printed
    assert "no faults" in printed
    report = json.loads(out.read_text())
    assert report["good"]
    assert report["repair"]["shards"] == [{"teacher": "t", "shard": 1}]
    assert report["repair"]["quarantined"] == {"teachers/t/tail_entropy/c/1": "quarantine/teachers/t/tail_entropy/c/1"}
    assert without_quarantine(cache) == tree(sound)
    assert cli.main([*command, "--teacher", folder]) == 0  # nothing left to do
    assert "repair" not in json.loads(out.read_text())
    other = save_teacher(tmp_path / "other", tiny_model("llama", V, seed=1))
    flip(cache / "teachers/t/tail_entropy/c/1", 9)
    assert cli.main([*command, "--teacher", other]) == 1
    assert "settings.weights" in capsys.readouterr().err
    assert "settings.weights" in json.loads(out.read_text())["error"]


def test_versions_of_packages_may_differ_as_long_as_the_bytes_do_not(cache: Path, sound: Path) -> None:
    """They are told; the hashes decide."""
    folder = cache / "teachers" / "t"
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened_module, "_versions", lambda: {"torch": "0.1"})
        capture(config(cache, **OPTIONS), teacher=live(), show_progress=False)
    good = tree(cache)
    assert good.keys() == tree(sound).keys()
    flip(folder / "tail_entropy/c/1", 9)
    mended, after = mend(cache)
    assert after.faults == []
    assert without_quarantine(cache) == good
    assert any(note.startswith("settings.versions.torch: then 0.1, now") for note in mended.notes)


@pytest.mark.slow
def test_in_a_store(cache: Path, sound: Path, s3_url: str) -> None:
    """Repair where the cache lies, quarantine included."""
    place = open_place(s3_url)
    for name, data in tree(cache).items():
        place.write(name, data)
    damaged = bytearray(place.read("teachers/t/token_codes/c/2/0"))
    damaged[40] ^= 1
    place.write("teachers/t/token_codes/c/2/0", bytes(damaged))
    place.delete("teachers/t/commits/00000005.json")
    place.delete("teachers/t/manifest.json")
    mended, after = repair_cache(s3_url, live=live())
    assert after.faults == []
    assert mended.shards == [("t", 2), ("t", 5)]
    found = {name: place.read(name) for name, _ in place.files()}
    assert found.pop("quarantine/teachers/t/token_codes/c/2/0") == bytes(damaged)
    assert found == tree(sound)
