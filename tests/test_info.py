"""info: what is in a cache, from its records alone, finished or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from compare_fixtures import Position, add_teacher, make_corpus, random_dense
from places import cache_folder
from storage_fixtures import make_corpus as storage_corpus
from storage_fixtures import make_exact

from tailcache.scripts.cli import main
from tailcache.scripts.info import cache_info, info_text
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import CorruptError, IncompleteError, MismatchError, NotFoundError
from tailcache.storage.inventory import corpus_bytes, teacher_inventory

V = 40


@pytest.fixture
def built(tmp_path: Path) -> tuple[Corpus, list[Position]]:
    corpus, positions = make_corpus(tmp_path / "c", vocab_size=V)
    dense = random_dense(len(positions), V, seed=1)
    add_teacher(corpus, positions, "done", dense, top_k=5, num_samples=3)
    add_teacher(corpus, positions, "half", dense, top_k=6, num_samples=0, stop_after=1)
    return corpus, positions


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_corpus_is_counted(built: tuple[Corpus, list[Position]]) -> None:
    corpus, positions = built
    info = cache_info(cache_folder(corpus))["corpus"]
    assert info["rows"] == 9
    assert info["held_out_rows"] == 3
    assert info["target_positions"] == len(positions)
    assert info["held_out_target_positions"] == sum(p.held_out for p in positions)
    assert info["tokens"] == corpus.num_tokens
    assert info["hash"] == corpus.hash
    assert info["tokenizer"]["fingerprint"] == {"all": "t"}
    assert info["source"]["kind"] == "test"
    assert info["recipe"] == {"context_length": 20}
    for name, size in corpus_bytes(corpus).items():
        assert size == on_disk(
            cache_folder(corpus) / "corpus" / name / "c"
            if name != "tokenizer"
            else cache_folder(corpus) / "corpus" / name
        )


def test_a_finished_teacher(built: tuple[Corpus, list[Position]]) -> None:
    corpus, positions = built
    done = cache_info(cache_folder(corpus))["teachers"][0]
    assert (done["name"], done["complete"]) == ("done", True)
    assert done["shards_committed"] == done["shards"] > 1
    assert done["positions_committed"] == done["positions"] == len(positions)
    assert (done["top_k"], done["num_samples"], done["vocab_size"]) == (5, 3, V)
    assert done["settings"] == {"teacher": "done"}
    folder = cache_folder(corpus) / "teachers" / "done"
    for field, size in done["bytes"].items():
        assert size == on_disk(folder / field / "c"), field
        assert done["bytes_per_position"][field] == pytest.approx(size / len(positions))
    assert done["bytes_per_position_total"] == pytest.approx(done["bytes_total"] / len(positions))
    assert set(done["bytes"]) == {
        "token_codes", "logprob_gaps", "tail_logit", "tail_entropy", "target_logit", "tail_sample_codes",
    }  # fmt: skip
    assert done["constant_bytes"] == {
        name: on_disk(folder / name / "c")
        for name in ("vocabulary_order", "logprob_levels", "mean_tail", "mean_tail_copy")
    }
    assert done["bytes_total"] + sum(done["constant_bytes"].values()) + done["record_bytes"] == on_disk(folder)


def test_optional_fields_are_counted_and_said(tmp_path: Path) -> None:
    exact = make_exact(storage_corpus(tmp_path), temperatures=(2.0, 0.5), hidden="int8")
    exact.write("more")
    (teacher,) = cache_info(tmp_path)["teachers"]
    assert teacher["temperatures"] == [2.0, 0.5]
    assert teacher["hidden"] == {
        "kind": "int8", "width": 16, "head_kind": "bfloat16", "head_bias": True, "logit_scale": 1.5, "soft_cap": 20.0,
    }  # fmt: skip
    folder = tmp_path / "teachers" / "more"
    assert {"log_z_tail", "hidden", "hidden_scale"} < set(teacher["bytes"])
    for name in ("head_weight", "head_bias"):
        assert teacher["constant_bytes"][name] == on_disk(folder / name / "c") > 0
    assert teacher["bytes_total"] + sum(teacher["constant_bytes"].values()) + teacher["record_bytes"] == on_disk(folder)
    text = info_text(cache_info(tmp_path))
    assert "3 tail samples, temperature 2, temperature 0.5, hidden states int8 x 16, vocabulary 37" in text


def test_an_unfinished_teacher(built: tuple[Corpus, list[Position]]) -> None:
    corpus, _ = built
    half = cache_info(cache_folder(corpus))["teachers"][1]
    assert (half["name"], half["complete"], half["shards_committed"]) == ("half", False, 1)
    assert 0 < half["positions_committed"] < half["positions"]
    assert "tail_sample_codes" not in half["bytes"]
    assert half["bytes_per_position"]["tail_logit"] == half["bytes"]["tail_logit"] / half["positions_committed"]
    text = info_text(cache_info(cache_folder(corpus)))
    assert "half: NOT FINISHED" in text
    assert f"of {half['shards']} committed" in text


def test_nothing_but_records_is_read(built: tuple[Corpus, list[Position]]) -> None:
    corpus, _ = built
    before = cache_info(cache_folder(corpus))
    for file in (cache_folder(corpus) / "teachers").rglob("c/*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))
    (cache_folder(corpus) / "corpus" / "tokens/c/0").write_bytes(
        bytes((cache_folder(corpus) / "corpus" / "tokens/c/0").stat().st_size)
    )
    assert cache_info(cache_folder(corpus)) == before


def test_a_teacher_without_a_committed_shard(built: tuple[Corpus, list[Position]]) -> None:
    corpus, _ = built
    folder = cache_folder(corpus) / "teachers" / "half"
    for file in (folder / "commits").iterdir():
        file.unlink()
    half = cache_info(cache_folder(corpus))["teachers"][1]
    assert half["positions_committed"] == 0
    assert half["bytes_per_position_total"] is None
    assert "NOT FINISHED" in info_text(cache_info(cache_folder(corpus)))


def test_damaged_records(built: tuple[Corpus, list[Position]]) -> None:
    corpus, _ = built
    folder = cache_folder(corpus) / "teachers" / "done"
    commits = sorted((folder / "commits").iterdir())
    first, second = commits[0].read_bytes(), commits[1].read_bytes()
    commits[1].write_bytes(first)
    with pytest.raises(CorruptError, match="another shard"):
        teacher_inventory(corpus, "done")
    commits[1].unlink()
    with pytest.raises(CorruptError, match="missing, though"):
        teacher_inventory(corpus, "done")
    commits[1].write_bytes(second.replace(b"positions", b"positionz"))
    with pytest.raises(CorruptError, match="checksum"):
        teacher_inventory(corpus, "done")
    with pytest.raises(NotFoundError, match="nobody"):
        teacher_inventory(corpus, "nobody")


def test_a_teacher_of_another_corpus(built: tuple[Corpus, list[Position]], tmp_path: Path) -> None:
    corpus, _ = built
    other, _ = make_corpus(tmp_path / "other", vocab_size=V, seed=5)
    (cache_folder(corpus) / "teachers").rename(cache_folder(other) / "teachers")
    with pytest.raises(MismatchError, match="captured over"):
        cache_info(cache_folder(other))


def test_the_verb(built: tuple[Corpus, list[Position]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = cache_folder(built[0])
    assert main(["info", "--cache", str(cache), "--json", str(tmp_path / "new" / "i.json")]) == 0
    printed = capsys.readouterr().out
    for word in ("held out", "bytes/position", "token_codes", "tokenizer", "source", "recipe", "settings"):
        assert word in printed
    assert json.loads((tmp_path / "new" / "i.json").read_text()) == cache_info(cache)
    assert max(map(len, printed.splitlines())) < 200


def test_a_corpus_without_teachers_and_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "c")
    assert main(["info", "--cache", str(tmp_path / "c")]) == 0
    assert "tailcache capture" in capsys.readouterr().out
    assert main(["info", "--cache", str(tmp_path / "none")]) == 1
    (tmp_path / "unfinished" / "corpus.tmp").mkdir(parents=True)
    with pytest.raises(IncompleteError):
        cache_info(tmp_path / "unfinished")


def test_per_position_bytes_use_committed_positions_only(built: tuple[Corpus, list[Position]]) -> None:
    corpus, _ = built
    inventory = teacher_inventory(corpus, "half")
    first, last = inventory.layout.shard_rows(0)
    offsets = corpus.target_offsets(first, last)
    assert inventory.positions == int(offsets[-1] - offsets[0])
    assert np.isclose(
        sum(inventory.bytes_per_position.values()), sum(inventory.field_bytes.values()) / inventory.positions
    )
