"""Caches made from caches: every kind of change, alone and together, read back, verified and trained on.

Legend: T positions, V vocabulary, K kept tokens, m draws.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storage_fixtures import (
    FINISH,
    Exact,
    append_rows,
    corpus_next,
    make_corpus,
    make_exact,
    make_rows,
    summarise,
    tree,
)

from tailcache.scripts.cli import main
from tailcache.storage.codec import Targets
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.errors import TailcacheError
from tailcache.storage.reader import Teacher, open_cache
from tailcache.storage.verify import verify

SETTINGS = {"seed": 1, "weights": "ab" * 32, "sampling": "systematic, thinned", "full_tail": 0.25}
LENGTHS = (9, 1, 12, 7, 2, 11, 5, 1, 8, 6, 20, 3, 14, 2, 9, 9, 30, 4, 6, 11)


@pytest.fixture(autouse=True)
def no_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _cache(folder: Path, name: str = "cache", **kwargs: Any) -> Exact:
    kwargs = {"top_k": 12, "num_samples": 6, "shard_positions": 25, "temperatures": (2.0,), **kwargs}
    exact = make_exact(make_corpus(folder / name, lengths=LENGTHS), **kwargs)
    exact.write("t", SETTINGS)
    return exact


def _derive(folder: Path, target: str, *flags: str, source: str = "cache") -> Teacher:
    assert main(["derive", str(folder / source), str(folder / target), *flags]) == 0
    assert verify(folder / target) == []
    cache = open_cache(folder / target)
    return cache.teacher(cache.teacher_names[-1])


def _all(teacher: Teacher) -> Targets:
    return teacher.rows(0, teacher.corpus.num_rows, optional=teacher.optional)


def _same(found: Targets, expected: Targets, *but: str) -> None:
    """Equal, up to the order of tokens of equal log-probability and of draws."""
    for each in fields(Targets):
        a, b = getattr(found, each.name), getattr(expected, each.name)
        if each.name in but:
            continue
        if each.name == "logprobs":
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        elif each.name in ("token_ids", "tail_samples"):
            np.testing.assert_array_equal(np.sort(a, axis=1), np.sort(b, axis=1))
        else:
            np.testing.assert_array_equal(a, b)


def _tree(folder: Path) -> dict[str, bytes]:
    """All that is part of the cache."""
    return {name: data for name, data in tree(folder).items() if not name.endswith((".tmp", ".lock"))}


# -- copies ----------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_to_the_byte(tmp_path: Path) -> None:
    _cache(tmp_path)
    _derive(tmp_path, "copy")
    assert _tree(tmp_path / "copy") == _tree(tmp_path / "cache")
    _derive(tmp_path, "copy")  # and again
    assert _tree(tmp_path / "copy") == _tree(tmp_path / "cache")


def test_a_copy_can_be_killed_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop at the n-th write, for every n: nothing half-done can be opened, and the rest is all that is done then."""
    from tailcache.storage import durable

    _cache(tmp_path)
    expected = _tree(tmp_path / "cache")
    write = durable.write_file
    budget, written = 10**9, 0

    def counted(path: Path, data: bytes | memoryview) -> None:
        nonlocal written
        if written >= budget:
            raise KeyboardInterrupt
        written += 1
        write(path, data)

    monkeypatch.setattr(durable, "write_file", counted)
    assert main(["derive", str(tmp_path / "cache"), str(tmp_path / "all")]) == 0
    total = written
    for budget in range(0, total, 7):
        target = tmp_path / f"stopped{budget}"
        written = 0
        assert main(["derive", str(tmp_path / "cache"), str(target)]) == 130
        with pytest.raises(TailcacheError):
            open_cache(target).teacher("t")
        for path in target.rglob("*"):  # what is there under its own name is whole
            if path.is_file() and path.suffix != ".tmp":
                name = str(path.relative_to(target)).replace("corpus.tmp", "corpus")
                assert path.read_bytes() == expected.get(name, b"")
        done, budget, written = written, 10**9, 0
        assert main(["derive", str(tmp_path / "cache"), str(target)]) == 0
        assert written <= total - done + 3
        assert _tree(target) == expected


def test_a_damaged_source_is_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _cache(tmp_path)
    damaged = tmp_path / "cache" / "teachers" / "t" / "tail_logit" / "c" / "1"
    data = bytearray(damaged.read_bytes())
    data[3] ^= 1
    damaged.write_bytes(data)
    assert main(["derive", str(tmp_path / "cache"), str(tmp_path / "copy")]) == 1
    assert "tail_logit/c/1" in capsys.readouterr().err
    with pytest.raises(TailcacheError):
        open_cache(tmp_path / "copy").teacher("t")


def test_an_unfinished_capture_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = _cache(tmp_path)
    exact.write("u", SETTINGS)
    (tmp_path / "cache" / "teachers" / "u" / "complete.json").unlink()
    assert main(["derive", str(tmp_path / "cache"), str(tmp_path / "copy")]) == 0
    printed = capsys.readouterr().out
    assert "copied: t" in printed
    assert "not finished: u" in printed
    assert main(["derive", str(tmp_path / "cache"), str(tmp_path / "two"), "--teachers", "u"]) == 1


# -- smaller ---------------------------------------------------------------------------------------------------------


def test_storing_again_keeps_every_value(tmp_path: Path) -> None:
    exact = _cache(tmp_path, hidden="int8")
    source = open_cache(tmp_path / "cache").teacher("t")
    found = _derive(tmp_path, "again", "--shard-positions", "40", "--chunk-positions", "16", "--compression-level", "1")
    assert found.layout.num_shards < source.layout.num_shards
    assert found.layout.chunk == 16
    _same(_all(found), _all(source))
    np.testing.assert_array_equal(found.mean_tail, source.mean_tail)
    np.testing.assert_array_equal(found.head().weight, source.head().weight)
    assert found.corpus.hash == exact.corpus.hash
    [entry] = found.manifest["provenance"]["derived"]
    assert entry["operation"] == "re_encode"
    assert entry["source_teacher"] == source.hash
    assert entry["source_corpus"] == exact.corpus.hash
    assert entry["mean_tail"] == "exact"


@pytest.mark.parametrize("golden", ["v1", "v1_optional"])
def test_an_old_version_becomes_the_newest(tmp_path: Path, golden: str) -> None:
    folder = Path(__file__).parent / "golden" / golden
    source = open_cache(folder).teacher("golden")
    assert source.layout.format_version == 1
    assert main(["derive", str(folder), str(tmp_path / "new"), "--re-encode"]) == 0
    assert verify(tmp_path / "new") == []
    found = open_cache(tmp_path / "new").teacher("golden")
    assert found.layout.format_version > 1
    have, had = _all(found), _all(source)
    np.testing.assert_array_equal(np.sort(have.token_ids), np.sort(had.token_ids))
    np.testing.assert_array_equal(np.sort(have.tail_samples), np.sort(had.tail_samples))
    for name in ("logprobs", "log_tail", "tail_entropy", "log_target", "log_not_target", "log_z_tail"):
        np.testing.assert_allclose(getattr(have, name), getattr(had, name), atol=1e-3)
    np.testing.assert_array_equal(have.hidden, had.hidden)
    assert found.manifest["provenance"]["derived"][-1]["mean_tail"] == "exact"


def test_a_smaller_k_is_what_a_capture_would_have_kept(tmp_path: Path) -> None:
    exact = _cache(tmp_path)
    source = open_cache(tmp_path / "cache").teacher("t")
    found = _derive(tmp_path, "small", "--top-k", "4")
    wanted, tail_sum = summarise(exact.logprobs, corpus_next(exact.corpus), 4, 0, temperatures=(2.0,))
    have = _all(found)
    assert (found.top_k, found.num_samples) == (4, 6)
    # where the cut is among tokens of one level, either is right
    assert (np.sort(have.token_ids) == np.sort(wanted.token_ids)).all(axis=1).mean() > 0.95
    np.testing.assert_allclose(have.logprobs, _all(source).logprobs[:, :4], atol=1e-3)  # not rounded a second time
    for name in ("log_tail", "tail_entropy", "log_z_tail", "log_target", "log_not_target"):
        np.testing.assert_allclose(getattr(have, name), getattr(wanted, name), atol=0.02)
    assert not (have.tail_samples[:, :, None] == have.token_ids[:, None, :]).any()
    assert found.mean_tail.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(found.mean_tail - tail_sum / tail_sum.sum()).max() < 0.03
    assert "estimated" in found.manifest["provenance"]["derived"][-1]["mean_tail"]
    assert "known tokens" in found.manifest["settings"]["sampling"]
    other = _derive(tmp_path, "seed", "--top-k", "4", "--seed", "1")
    _same(_all(other), have, "tail_samples")
    assert (_all(other).tail_samples != have.tail_samples).any()
    assert other.hash != found.hash != source.hash


def test_fewer_draws_are_a_subset(tmp_path: Path) -> None:
    _cache(tmp_path)
    source = open_cache(tmp_path / "cache").teacher("t")
    found = _derive(tmp_path, "few", "--num-samples", "2")
    have, had = _all(found), _all(source)
    _same(have, had, "tail_samples")
    assert have.tail_samples.shape[1] == 2
    assert (have.tail_samples[:, :, None] == had.tail_samples[:, None, :]).any(axis=2).all()
    np.testing.assert_array_equal(found.mean_tail, source.mean_tail)
    none = _derive(tmp_path, "none", "--num-samples", "0")
    assert none.num_samples == 0
    _same(_all(none), had, "tail_samples")


def test_fields_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _cache(tmp_path, hidden="bf16")
    source = open_cache(tmp_path / "cache").teacher("t")
    bare = _derive(tmp_path, "bare", "--drop", "hidden", "log_z")
    assert bare.optional == ()
    _same(_all(bare), _all(source), "hidden", "hidden_scale", "log_z_tail")
    half = _derive(tmp_path, "half", "--drop", "hidden")
    assert half.optional == ("log_z_tail",)
    assert main(["derive", str(tmp_path / "bare"), str(tmp_path / "no"), "--drop", "hidden"]) == 1
    assert "--drop hidden" in capsys.readouterr().err


def test_from_the_whole_vocabulary_any_number_can_be_drawn(tmp_path: Path) -> None:
    exact = _cache(tmp_path, top_k=37, num_samples=0, temperatures=())
    found = _derive(tmp_path, "small", "--top-k", "5", "--num-samples", "9")
    wanted, tail_sum = summarise(exact.logprobs, corpus_next(exact.corpus), 5, 0)
    have = _all(found)
    assert have.tail_samples.shape[1] == 9
    np.testing.assert_allclose(have.tail_entropy, wanted.tail_entropy, atol=0.02)
    np.testing.assert_allclose(found.mean_tail, tail_sum / tail_sum.sum(), atol=5e-3)


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_make_a_corpus_of_their_own(tmp_path: Path) -> None:
    exact = _cache(tmp_path)
    source = open_cache(tmp_path / "cache").teacher("t")
    found = _derive(tmp_path, "part", "--rows", "3:11")
    corpus = found.corpus
    assert corpus.num_rows == 8
    assert corpus.hash != exact.corpus.hash
    assert corpus.parent is not None
    assert corpus.parent["hash"] == exact.corpus.hash
    a, b = corpus.rows(0, 8), exact.corpus.rows(3, 11)
    for name in ("tokens", "document_start", "supervised", "held_out", "offsets"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    _same(_all(found), source.rows(3, 11, optional=source.optional))
    assert np.abs(found.mean_tail - source.mean_tail).max() < 0.1
    [entry] = found.manifest["provenance"]["derived"]
    assert entry["operation"] == "rows"
    assert (entry["parameters"]["first"], entry["parameters"]["last"]) == (3, 11)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_split(tmp_path: Path, split: str) -> None:
    _cache(tmp_path)
    source = open_cache(tmp_path / "cache").teacher("t")
    found = _derive(tmp_path, "part", "--split", split)
    rows = source.corpus.held_out_rows() if split == "held-out" else source.corpus.train_rows()
    assert found.corpus.num_rows == len(rows)
    offsets = source.corpus.target_offsets(0, source.corpus.num_rows)
    chosen = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])
    _same(_all(found), _all(source)[chosen])
    assert found.corpus.held_out_rows().size == (len(rows) if split == "held-out" else 0)


def test_parts_make_the_whole_again_whatever_their_order(tmp_path: Path) -> None:
    """Interleaved parts, one of them a part of a part: the corpus comes back to the byte, and every value."""
    exact = _cache(tmp_path)
    source = open_cache(tmp_path / "cache").teacher("t")
    _derive(tmp_path, "train", "--split", "train")
    _derive(tmp_path, "held", "--split", "held-out")
    _derive(tmp_path, "train1", "--rows", ":6", source="train")
    _derive(tmp_path, "train2", "--rows", "6:", source="train")
    merge = ["--merge", str(tmp_path / "held"), str(tmp_path / "train1")]
    found = _derive(tmp_path, "whole", *merge, source="train2")
    assert found.corpus.hash == exact.corpus.hash
    assert tree(tmp_path / "whole" / "corpus") == tree(tmp_path / "cache" / "corpus")
    _same(_all(found), _all(source))
    operations = [entry["operation"] for entry in found.manifest["provenance"]["derived"]]
    assert operations == ["rows", "rows", "merge"]
    assert len(found.manifest["provenance"]["derived"][-1]["parameters"]["sources"]) == 3
    partly = _derive(tmp_path, "partly", "--merge", str(tmp_path / "held"), source="train2")
    assert partly.corpus.parent == open_cache(tmp_path / "held").corpus.parent
    assert partly.corpus.num_rows == len(LENGTHS) - 6


def test_teachers_captured_over_parts_are_merged(tmp_path: Path) -> None:
    """Rows of a corpus without teachers go to several machines, and what they captured comes together."""
    corpus = make_corpus(tmp_path / "cache", lengths=LENGTHS)
    logits = np.random.default_rng(0).normal(size=(corpus.num_targets, 37)) * 3
    for name, rows in (("a", "0:9"), ("b", "9:")):
        assert main(["derive", str(tmp_path / "cache"), str(tmp_path / name), "--rows", rows]) == 0
    cut = int(corpus.target_offsets(9, 9)[0])
    parts = {"a": logits[:cut], "b": logits[cut:]}
    for name, part in parts.items():
        make_exact(open_cache(tmp_path / name).corpus, logits_TV=part, shard_positions=30).write("t", SETTINGS)
    found = _derive(tmp_path, "whole", "--merge", str(tmp_path / "a"), source="b")
    assert found.corpus.hash == corpus.hash
    whole = make_exact(corpus, logits_TV=logits)
    np.testing.assert_allclose(_all(found).log_tail, whole.targets.log_tail, atol=1e-3)
    total = sum(tail_sum for _, tail_sum in whole.shards)
    np.testing.assert_allclose(found.mean_tail, total / np.sum(total), rtol=1e-5)
    assert found.manifest["provenance"]["derived"][-1]["mean_tail"] == "exact"


def test_what_does_not_belong_together_is_not_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _cache(tmp_path)
    _derive(tmp_path, "a", "--rows", "0:10")
    _derive(tmp_path, "b", "--rows", "9:")
    with CorpusWriter(tmp_path / "other", vocab_size=37) as writer:
        append_rows(writer, make_rows(37, seed=9))
        make_exact(writer.finish(**FINISH), top_k=12, num_samples=6, temperatures=(2.0,)).write("t", SETTINGS)
    _derive(tmp_path, "c", "--rows", "10:", "--top-k", "5")
    make_exact(_part(tmp_path, "d"), top_k=12, num_samples=6, temperatures=(2.0,)).write("t", {**SETTINGS, "seed": 2})
    make_exact(_part(tmp_path, "e"), top_k=12, num_samples=6, temperatures=(2.0,)).write("u", SETTINGS)
    for other, words in (
        ("b", ("row 9", "both")),
        ("other", ("parts of one corpus",)),
        ("c", ("top_k: 12 and 5",)),
        ("d", ("settings.seed: 1 and 2",)),
        ("e", ("t, u",)),
    ):
        capsys.readouterr()
        command = ["derive", str(tmp_path / "a"), str(tmp_path / "no"), "--merge", str(tmp_path / other)]
        assert main(command) == 1, other
        error = capsys.readouterr().err
        assert all(word in error for word in words), error


def _part(folder: Path, name: str) -> Any:
    """The other rows, without their teacher."""
    _derive(folder, name, "--rows", "10:")
    cache = open_cache(folder / name)
    for path in sorted((folder / name / "teachers").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    return cache.corpus


# -- together --------------------------------------------------------------------------------------------------------


def test_several_changes_at_once_are_the_same_as_one_after_another(tmp_path: Path) -> None:
    _cache(tmp_path)
    at_once = _derive(tmp_path, "once", "--rows", "2:15", "--split", "train", "--top-k", "5", "--drop", "log_z")
    _derive(tmp_path, "one", "--rows", "2:15")
    _derive(tmp_path, "two", "--split", "train", source="one")
    _derive(tmp_path, "three", "--top-k", "5", source="two")
    stepwise = _derive(tmp_path, "four", "--drop", "log_z", source="three")
    assert at_once.corpus.hash == stepwise.corpus.hash
    _same(_all(at_once), _all(stepwise), "tail_samples", "token_ids")
    kinds = [[e["operation"] for e in t.manifest["provenance"]["derived"]] for t in (at_once, stepwise)]
    assert kinds == [["rows", "top_k", "drop"], ["rows", "rows", "top_k", "drop"]]


def test_it_goes_on_where_it_stopped_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailcache.storage import durable

    _cache(tmp_path)
    flags = ["--split", "train", "--top-k", "5", "--num-samples", "3"]
    _derive(tmp_path, "whole", *flags)
    expected = _tree(tmp_path / "whole")
    write = durable.write_file
    budget = written = 0

    def counted(path: Path, data: bytes | memoryview) -> None:
        nonlocal written
        written += 1
        if written > budget:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(durable, "write_file", counted)
    runs = 0
    while not (tmp_path / "stopped" / "teachers" / "t" / "complete.json").exists():
        budget, written, runs = 30 + 3 * runs, 0, runs + 1
        status = main(["derive", str(tmp_path / "cache"), str(tmp_path / "stopped"), *flags])
        assert status in (0, 130)
    assert runs >= 3
    monkeypatch.undo()
    assert main(["derive", str(tmp_path / "cache"), str(tmp_path / "stopped"), *flags]) == 0
    assert _tree(tmp_path / "stopped") == expected


def test_under_another_name_beside_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _cache(tmp_path)
    found = _derive(tmp_path, "cache", "--top-k", "5", "--name", "t-small")
    assert found.name == "t-small"
    capsys.readouterr()
    for flags, words in (
        (["--top-k", "6", "--name", "t-small"], "made in another way"),
        (["--top-k", "6"], "captured, not derived"),
        (["--name", "u"], "keeps its teacher's name"),
    ):
        command = ["derive", str(tmp_path / "cache"), str(tmp_path / "cache"), "--teachers", "t", *flags]
        assert main(command) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-k", "13"], "expected 1 to 12"),
        (["--num-samples", "7"], "at most 6"),
        (["--rows", "5:4"], "first < last"),
        (["--rows", "0:99"], "within [0, 20]"),
        (["--rows", "1:2", "--split", "held-out"], "none of 20"),
        (["--teachers", "nobody"], "nobody"),
        (["--drop", "hidden"], "--drop hidden"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    _cache(tmp_path)
    assert main(["derive", str(tmp_path / "cache"), str(tmp_path / "no"), *flags]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()  # not even the corpus, which may be large


@pytest.mark.parametrize("wrong", [["--rows", "3"], ["--rows", "a:b"], ["--top-k", "0"], ["--seed", "-1"]])
def test_wrong_settings(tmp_path: Path, wrong: list[str]) -> None:
    assert main(["derive", str(tmp_path), str(tmp_path / "x"), *wrong]) == 2


def test_info_shows_the_lineage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _cache(tmp_path)
    _derive(tmp_path, "part", "--rows", "3:11", "--top-k", "5")
    capsys.readouterr()
    assert main(["info", "--cache", str(tmp_path / "part")]) == 0
    printed = capsys.readouterr().out
    source = open_cache(tmp_path / "cache").teacher("t")
    for words in ("rows", "top_k", "from 12", "of the 20 of corpus", source.hash[:12], source.corpus.hash[:12]):
        assert words in printed


# -- elsewhere -------------------------------------------------------------------------------------------------------


def test_to_a_store_and_back(tmp_path: Path, s3_url: str, faults: Any) -> None:
    """Copied to a store whose answers fail now and then, made smaller there, and copied back."""
    _cache(tmp_path)
    faults.add("503", times=3)
    assert main(["derive", str(tmp_path / "cache"), f"{s3_url}/copy"]) == 0
    assert main(["derive", f"{s3_url}/copy", f"{s3_url}/small", "--top-k", "5", "--split", "train"]) == 0
    assert main(["derive", f"{s3_url}/copy", str(tmp_path / "back")]) == 0
    assert _tree(tmp_path / "back") == _tree(tmp_path / "cache")
    local = _derive(tmp_path, "local", "--top-k", "5", "--split", "train")
    assert main(["derive", f"{s3_url}/small", str(tmp_path / "small")]) == 0
    assert _tree(tmp_path / "small") == _tree(tmp_path / "local")
    assert open_cache(f"{s3_url}/small").teacher("t").hash == local.hash


@pytest.mark.slow
def test_a_derived_cache_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the rows at half of the K, like any other cache; and a student learns from it."""
    from training_fixtures import make_cache

    make_cache(tmp_path / "cache")
    names = open_cache(tmp_path / "cache").teacher_names
    small = ["--top-k", "3", "--rows", "0:12", "--teachers", names[0]]
    assert main(["derive", str(tmp_path / "cache"), str(tmp_path / "small"), *small]) == 0
    train = ["train", "--cache", str(tmp_path / "small"), "--teacher", names[0], "--out", str(tmp_path / "student")]
    train += [
        "--loss",
        "tad",
        "--top-k",
        "2",
        "--max-steps",
        "3",
        "--student.hidden-size",
        "16",
        "--student.num-layers",
        "1",
    ]
    assert main([*train, "--student.num-heads", "2"]) == 0
