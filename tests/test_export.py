"""Exports, read as their readers read them: `datasets`, Axolotl's collator, plain PyTorch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from storage_fixtures import Exact, log_sum, make_corpus, make_exact

from tailcache.pipeline.export import export
from tailcache.pipeline.export_columns import AXOLOTL_COLUMNS, ExportColumns
from tailcache.pipeline.export_config import ExportConfig
from tailcache.pipeline.export_files import SplitFiles
from tailcache.scripts.cli import main
from tailcache.storage.errors import ConfigError, CorruptError, MismatchError
from tailcache.storage.place import open_place
from tailcache.storage.reader import Teacher, open_cache

SETTINGS = {"seed": 1, "weights": "ab" * 32, "sampling": "systematic", "dtype": "float32"}


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    datasets.disable_progress_bars()


def _cache(folder: Path, **kwargs: Any) -> Exact:
    exact = make_exact(make_corpus(folder / "cache"), **kwargs)
    exact.write("t", SETTINGS)
    return exact


def _export(folder: Path, name: str = "out", **settings: Any) -> Path:
    config = ExportConfig(cache=str(folder / "cache"), teacher="t", out=str(folder / name), **settings)
    export(config, show_progress=False)
    return folder / name


def _documents(teacher: Teacher, *, held_out: bool) -> list[dict[str, Any]]:
    """What each document of a split should look like to Axolotl, by walking the corpus a token at a time."""
    documents: list[dict[str, Any]] = []
    for row in range(teacher.corpus.num_rows):
        rows, targets = teacher.corpus.rows(row, row + 1), teacher.row(row)
        if bool(rows.held_out[0]) != held_out:
            continue
        taken = 0
        for place, token in enumerate(rows.tokens.tolist()):
            if place == 0 or rows.document_start[place]:
                documents.append({"row": row, "offset": place, "input_ids": [], "labels": [], "targets": []})
            document = documents[-1]
            wanted = bool(document["input_ids"]) and bool(rows.supervised[place - 1])
            document["input_ids"].append(token)
            document["labels"].append(token if wanted else -100)
            document["targets"].append(targets[taken : taken + 1] if rows.supervised[place] else None)
            taken += bool(rows.supervised[place])
    return documents


def test_each_document_is_an_example_in_axolotls_convention(tmp_path: Path) -> None:
    _cache(tmp_path)
    out = str(_export(tmp_path, license="cc-by-4.0", language=("en",)))
    teacher = open_cache(tmp_path / "cache").teacher("t")
    for split, held_out in (("train", False), ("test", True)):
        expected = _documents(teacher, held_out=held_out)
        plain = datasets.load_dataset(out, split=split)
        loaded = datasets.load_dataset(out, "axolotl", split=split)
        assert loaded.column_names == list(AXOLOTL_COLUMNS)
        assert len(loaded) == len(plain) == len(expected) > 3
        for example, extra, document in zip(loaded, plain, expected, strict=True):
            num = len(document["input_ids"])
            assert example["input_ids"] == document["input_ids"]
            assert example["labels"] == document["labels"]
            assert example["attention_mask"] == [1] * num
            assert (extra["row"], extra["offset"]) == (document["row"], document["offset"])
            assert {len(example[name]) for name in AXOLOTL_COLUMNS} == {num}
            for j, targets in enumerate(document["targets"]):
                has_label = j + 1 < num and example["labels"][j + 1] != -100
                assert example["target_mask"][j] == [int(has_label)] * 5
                assert has_label == (targets is not None)
                if targets is None:
                    assert example["target_logprobs"][j] == [-1e9] * 5
                    continue
                assert example["target_token_ids"][j] == targets.token_ids[0].tolist()
                assert example["target_logprobs"][j] == targets.logprobs[0].tolist()
                for name in ("log_tail", "tail_entropy", "log_target", "log_not_target"):
                    assert extra[name][j] == float(getattr(targets, name)[0])
                assert extra["tail_samples"][j] == targets.tail_samples[0].tolist()


def test_the_entry_at_j_is_about_the_token_at_j_plus_1(tmp_path: Path) -> None:
    """A teacher that knows the text: its most likely token at j is the next one, which a shift would break."""
    corpus = make_corpus(tmp_path / "cache")
    rows = corpus.rows(0, corpus.num_rows)
    logits = np.random.default_rng(0).normal(size=(corpus.num_targets, corpus.vocab_size))
    logits[np.arange(corpus.num_targets), rows.tokens[np.flatnonzero(rows.supervised) + 1]] += 20
    make_exact(corpus, logits_TV=logits).write("t", SETTINGS)
    seen = 0
    for unit in ("document", "row"):
        for example in datasets.load_dataset(str(_export(tmp_path, unit, unit=unit)), split="train"):
            for j in range(len(example["input_ids"]) - 1):
                if example["target_mask"][j][0]:
                    assert example["target_token_ids"][j][0] == example["input_ids"][j + 1] == example["labels"][j + 1]
                    seen += 1
            assert example["target_mask"][-1] == [0] * 5
    assert seen > 60


def test_rows_keep_their_documents_apart_by_position_ids(tmp_path: Path) -> None:
    exact = _cache(tmp_path)
    loaded = datasets.load_dataset(str(_export(tmp_path, unit="row")))
    corpus = exact.corpus
    assert len(loaded["train"]) + len(loaded["test"]) == corpus.num_rows
    for split in loaded.values():
        for example in split:
            rows = corpus.rows(example["row"], example["row"] + 1)
            assert example["input_ids"] == rows.tokens.tolist()
            assert example["document_start"] == rows.document_start.tolist()
            place = -1
            for i, position in enumerate(example["position_ids"]):
                place = 0 if rows.document_start[i] else place + 1
                assert position == place


def test_a_datasets_folder_says_the_same(tmp_path: Path) -> None:
    _cache(tmp_path, temperatures=(2.0,))
    parquet = datasets.load_dataset(str(_export(tmp_path, "parquet")))
    arrow = datasets.load_from_disk(str(_export(tmp_path, "arrow", format="datasets")))
    again = datasets.load_dataset(str(tmp_path / "arrow"))
    for split in ("train", "test"):
        assert arrow[split].features == parquet[split].features
        assert arrow[split].to_list() == parquet[split].to_list() == again[split].to_list()
    streamed = datasets.load_dataset(str(tmp_path / "parquet"), split="train", streaming=True)
    assert list(streamed) == parquet["train"].to_list()


def test_a_smaller_k_is_exact(tmp_path: Path) -> None:
    exact = _cache(tmp_path, top_k=12, num_samples=4, temperatures=(2.0, 0.5))
    loaded = datasets.load_dataset(str(_export(tmp_path, top_k=3)))
    every = sorted((e for split in loaded.values() for e in split), key=lambda e: (e["row"], e["offset"]))
    have = {
        name: np.array([v for e in every for v, m in zip(e[name], e["target_mask"], strict=True) if m[0]])
        for name in ("target_token_ids", "log_tail", "tail_entropy", "tail_samples", "log_z_tail")
    }
    ids = np.argsort(-exact.logprobs, axis=1, kind="stable")[:, :3]
    in_tail = np.ones(exact.logprobs.shape, np.bool_)
    np.put_along_axis(in_tail, ids, False, axis=1)
    log_tail = log_sum(exact.logprobs, in_tail)
    share = np.where(in_tail, np.exp(exact.logprobs - log_tail[:, None]), 0)
    np.testing.assert_array_equal(np.sort(have["target_token_ids"]), np.sort(ids))
    np.testing.assert_allclose(have["log_tail"], log_tail, atol=2e-2)
    np.testing.assert_allclose(have["tail_entropy"], -(share * np.log(np.where(share > 0, share, 1))).sum(1), atol=2e-2)
    for i, tau in enumerate((2.0, 0.5)):
        np.testing.assert_allclose(have["log_z_tail"][:, i], log_sum(exact.logprobs / tau, in_tail), atol=2e-2)
    assert in_tail[np.arange(len(ids))[:, None], have["tail_samples"]].all()


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path: Path) -> None:
    exact = _cache(tmp_path)
    out = _export(tmp_path, license="cc-by-4.0", language=("en",))
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["language"] == ["en"]
    assert header["size_categories"] == ["n<1K"]
    teacher = open_cache(tmp_path / "cache").teacher("t")
    for text in (exact.corpus.hash, teacher.hash, SETTINGS["weights"], "0" * 64, "perplexity", "j + 1"):
        assert str(text) in card
    held_out = np.repeat(exact.corpus.rows(0, 10).held_out, np.diff(exact.corpus.target_offsets(0, 10)))
    stored = teacher.rows(0, 10)
    perplexity = float(np.exp(-stored.log_target[~held_out].mean(dtype=np.float64)))
    assert f"| {(~held_out).sum()} | {perplexity:.4g} |" in card
    for name in datasets.load_dataset(str(out), split="train").column_names:
        assert f"| `{name}` |" in card
    unknown = (_export(tmp_path, "other") / "README.md").read_text()
    assert yaml.safe_load(unknown.split("---")[1])["license"] == "unknown"
    assert "Licence: not stated" in unknown


@pytest.mark.parametrize("settings", [{}, {"format": "datasets"}, {"extras": False}, {"unit": "row"}])
def test_the_cards_snippets_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    exact = _cache(tmp_path)
    out = _export(tmp_path, **settings)
    card = (out / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2
    names: dict[str, Any] = {}
    for snippet in snippets:
        assert "path/to/this/folder" in snippet
        exec(snippet.replace("path/to/this/folder", str(out)), names)
    assert len(names["example"]["input_ids"]) > 0
    total = num = 0.0
    for batch in names["loader"]:
        # a student that is the teacher, by looking its rows up: KL 0 to the codec's resolution
        logits = torch.zeros(*batch["input_ids"].shape, 37, dtype=torch.float64)
        for i, ids in enumerate(batch["target_token_ids"].tolist()):
            for j, row in enumerate(ids):
                if batch["target_mask"][i, j, 0]:
                    near = np.abs(exact.targets.logprobs - batch["target_logprobs"][i, j].numpy()).max(axis=1) < 0.1
                    same = (np.sort(exact.targets.token_ids, axis=1) == np.sort(row)).all(axis=1)
                    [t] = np.flatnonzero(same & near)
                    logits[i, j] = torch.from_numpy(exact.logprobs[t])
        total += float(names["distillation_loss"](logits, batch))
        num += 1
        shifted = names["distillation_loss"](torch.roll(logits, 1, dims=1), batch)
        assert float(shifted) > 0.2
    assert abs(total / num) < 1e-3
    if "sample_packing" in card:
        [config] = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)]
        assert config["kd_prepared_targets_alignment"] == "current"
        assert "type" not in config["datasets"][0]
        name = config["datasets"][0].get("name")
        loaded = datasets.load_dataset(str(out), name, split=config["datasets"][0]["split"])
        assert loaded.column_names[:6] == list(AXOLOTL_COLUMNS)


def test_axolotls_way_to_a_batch(tmp_path: Path) -> None:
    """Documents one after another, as sample packing has them, then tensors."""
    _cache(tmp_path)
    loaded = datasets.load_dataset(str(_export(tmp_path)), "axolotl", split="train")
    packed: dict[str, list[Any]] = {name: [] for name in AXOLOTL_COLUMNS}
    position_ids: list[int] = []
    for example in loaded:
        position_ids += range(len(example["input_ids"]))
        for name in AXOLOTL_COLUMNS:
            packed[name] += example[name]
    ids = torch.tensor([packed["target_token_ids"]], dtype=torch.long)
    logprobs = torch.tensor([packed["target_logprobs"]], dtype=torch.float)
    mask = torch.tensor([packed["target_mask"]], dtype=torch.int)
    assert ids.shape == logprobs.shape == mask.shape == (1, len(position_ids), 5)
    labels = torch.tensor([packed["labels"]])
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert torch.equal(mask[..., 0] > 0, shifted != -100)
    assert torch.isfinite(logprobs).all()
    assert (logprobs.exp()[mask > 0] > 0).all()


def test_files_and_row_groups_are_of_bounded_size(tmp_path: Path) -> None:
    exact = _cache(tmp_path)
    columns = ExportColumns(unit="document", top_k=5, num_samples=3, num_temperatures=0, extras=True)
    teacher = open_cache(tmp_path / "cache").teacher("t")
    batch, _ = columns.batch(exact.corpus.rows(0, 10), teacher.rows(0, 10))
    for kind in ("parquet", "datasets"):
        folder = tmp_path / kind
        folder.mkdir()
        with SplitFiles(folder, "train", kind, columns.schema(), 20, 10) as files:
            files.append(batch)
            files.append(batch)
            files.finish()
    whole = [name for _ in range(2) for name in batch.column("input_ids").to_pylist()]
    shards = sorted((tmp_path / "parquet" / "data").iterdir())
    assert len(shards) >= 6
    read: list[list[int]] = []
    for shard in shards:
        file = pq.ParquetFile(shard)
        groups = [file.read_row_group(i).column("input_ids").to_pylist() for i in range(file.num_row_groups)]
        assert all(sum(map(len, group)) <= 10 or len(group) == 1 for group in groups)
        assert sum(len(ids) for group in groups for ids in group) <= 20 or len(groups) == 1
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        read += [ids for group in groups for ids in group]
    assert read == whole
    assert datasets.load_from_disk(str(tmp_path / "datasets" / "train"))["input_ids"] == whole


def test_it_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    _cache(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "left").write_text("by a process that died")
    first = {p.name: p.read_bytes() for p in _export(tmp_path).rglob("*") if p.is_file()}
    assert sorted(first) == ["README.md", "test-00000.parquet", "train-00000.parquet"]
    assert first == {p.name: p.read_bytes() for p in _export(tmp_path, "again").rglob("*") if p.is_file()}
    with pytest.raises(MismatchError, match="expected no files there yet"):
        _export(tmp_path)
    damaged = tmp_path / "cache" / "teachers" / "t" / "tail_logit" / "c" / "1"
    os.truncate(damaged, 3)
    with pytest.raises(CorruptError, match="shard 1"):
        _export(tmp_path, "third")
    assert not list(tmp_path.glob("third*"))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    _cache(tmp_path)
    with pytest.raises(ConfigError, match="at most 5"):
        _export(tmp_path, top_k=6)
    for wrong in ({"license": "Apache 2"}, {"language": ("English",)}, {"top_k": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            _export(tmp_path, **wrong)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _cache(tmp_path)
    cache, out = str(tmp_path / "cache"), str(tmp_path / "out")
    assert main(["export", cache, "--teacher", "t", "--out", out, "--top-k", "2", "--license", "mit"]) == 0
    printed = capsys.readouterr().out
    assert "train:" in printed
    assert "test:" in printed
    assert "licence" not in printed
    assert main(["export", "--cache", cache, "--teacher", "nobody", "--out", out + "2"]) == 1
    assert "nobody" in capsys.readouterr().err


def test_to_a_store(tmp_path: Path, s3_url: str) -> None:
    """The card comes last, so that nobody takes half an export for a whole one; what is there is the same."""
    _cache(tmp_path)
    here = _export(tmp_path)
    export(ExportConfig(cache=str(tmp_path / "cache"), teacher="t", out=f"{s3_url}/out"), show_progress=False)
    place = open_place(f"{s3_url}/out")
    expected = {p.relative_to(here).as_posix(): p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert {name: place.read(name) for name, _ in place.files()} == expected
    with pytest.raises(MismatchError, match="expected no files there yet"):
        export(ExportConfig(cache=str(tmp_path / "cache"), teacher="t", out=f"{s3_url}/out"), show_progress=False)
