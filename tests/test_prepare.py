"""Prepare, end to end: files in, a corpus out, the same bytes every time and nothing unaccounted for."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capture_fixtures import tiny_model
from gguf_fixtures import write_llama_gguf
from test_chat import CHATML
from tokenizer_fixtures import build_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from tailcache.pipeline import prepare as prepare_module
from tailcache.pipeline.config import PrepareConfig
from tailcache.pipeline.packing import Packer
from tailcache.pipeline.prepare import Prepared, prepare, report_lines
from tailcache.pipeline.tokenizer import ending_id, load_tokenizer, opening_id
from tailcache.storage.errors import ConfigError, DataError, MismatchError, NotFoundError
from tailcache.storage.fingerprint import fingerprint

WORDS = ["the", "cat", "sat", "on", "mat", "tail", "cache", "keeps"]


def sentences(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) + f" {index}" for index in range(number)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path) -> Any:
    """Settings for a source in the test's own folder."""

    def configure(source: object, **settings: Any) -> PrepareConfig:
        cache = settings.pop("cache", tmp_path / "cache")
        settings.setdefault("context_length", 32)
        return PrepareConfig(cache=cache, source=str(source), tokenizer=str(tokenizer_folder), **settings)

    return configure


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def every_file(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def side(prepared: Prepared, *, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and the document starts of one side, row after row."""
    rows = prepared.corpus.rows(0, prepared.corpus.num_rows)
    parts = [
        slice(int(rows.offsets[index]), int(rows.offsets[index + 1]))
        for index in range(len(rows.held_out))
        if bool(rows.held_out[index]) == held_out
    ]
    return (
        np.concatenate([rows.tokens[part] for part in parts] or [np.zeros(0, np.int64)]),
        np.concatenate([rows.document_start[part] for part in parts] or [np.zeros(0, np.bool_)]),
    )


def split_documents(tokens: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(starts)[1:])] if len(tokens) else []


def test_both_sides_together_are_the_documents_in_order(tmp_path: Path, make: Any, tokenizer_folder: Path) -> None:
    texts = sentences(200)
    prepared = prepare(make(write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]), held_out=0.2))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    train, held = (split_documents(*side(prepared, held_out=flag)) for flag in (False, True))
    assert sorted(map(tuple, train + held)) == sorted(map(tuple, expected))
    for part in (train, held):
        assert part == [each for each in expected if each in part], "in the order of the source"
    assert 20 <= len(held) <= 60
    report = prepared.report
    assert report["train"]["documents"] + report["held_out"]["documents"] == 200
    assert report["train"]["tokens"] + report["held_out"]["tokens"] == prepared.corpus.num_tokens
    assert report["train"]["target_positions"] + report["held_out"]["target_positions"] == prepared.corpus.num_targets
    assert report["held_out"]["rows"] == len(prepared.corpus.held_out_rows())
    rows = prepared.corpus.rows(0, prepared.corpus.num_rows)
    assert np.diff(rows.offsets).max() == 32


def test_the_same_input_gives_the_same_bytes_anywhere(tmp_path: Path, make: Any) -> None:
    found = []
    for place in ("one", "elsewhere/two"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        write_lines(folder / "b.jsonl", [{"text": text} for text in sentences(50)])
        pq.write_table(pa.table({"text": sentences(50, 1)}), folder / "a.parquet")
        prepare(make(folder, cache=folder / "cache", max_tokens=1000))
        found.append(every_file(folder / "cache"))
    assert found[0] == found[1]
    assert any(name.endswith("manifest.json") for name in found[0])
    assert str(tmp_path).encode() not in b"".join(found[0].values())


def test_the_same_bytes_in_another_process_with_another_hash_seed(tmp_path: Path, make: Any) -> None:
    config = make(write_lines(tmp_path / "a.jsonl", [{"text": text} for text in sentences(50)]))
    prepare(config)
    flags = ["--source", config.source, "--tokenizer", config.tokenizer, "--context-length", "32"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false", "LC_ALL": "POSIX"}
    command = [sys.executable, "-m", "tailcache.scripts.cli", "prepare", "--cache", str(tmp_path / "other"), *flags]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout
    assert "documents" in done.stderr, "a progress bar"
    assert every_file(tmp_path / "other") == every_file(config.cache)


def test_copies_of_a_document_are_on_the_same_side(tmp_path: Path, make: Any) -> None:
    texts = sentences(100) * 2
    prepared = prepare(make(write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]), held_out=0.3))
    train, held = ({tuple(each) for each in split_documents(*side(prepared, held_out=flag))} for flag in (False, True))
    assert train
    assert held
    assert not train & held


def test_formats_do_not_matter(tmp_path: Path, make: Any) -> None:
    texts = sentences(40)
    write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(texts))
    hashes = {
        prepare(make(tmp_path / name, cache=tmp_path / name[2:])).corpus.hash
        for name in ("a.jsonl", "a.parquet", "a.txt")
    }
    assert len(hashes) == 1


def test_chats_supervise_the_assistant_after_the_shift(tmp_path: Path, make: Any, tokenizer_folder: Path) -> None:
    chats = [
        [
            {"role": "user", "content": f"the cat {index}"},
            {"role": "assistant", "content": f"sat on {index}"},
        ]
        for index in range(30)
    ]
    rows = [{"messages": chat} for chat in chats]
    prepared = prepare(make(write_lines(tmp_path / "a.jsonl", rows), held_out=0.0, context_length=100))
    corpus, tokenizer = prepared.corpus, AutoTokenizer.from_pretrained(tokenizer_folder)
    assert corpus.num_rows == 30
    for index in range(30):
        row = corpus.rows(index, index + 1)
        targets = row.tokens[np.flatnonzero(row.supervised) + 1]
        assert tokenizer.decode(targets) == f"sat on {index}<|im_end|>"
    assert corpus.manifest["recipe"]["kind"] == "chat"
    assert prepared.report["train"]["next_not_supervised"] > 0
    loaded = AutoTokenizer.from_pretrained(corpus.tokenizer_dir)
    assert loaded.chat_template == tokenizer.chat_template


def test_ready_ids_keep_their_rows_and_labels(tmp_path: Path, make: Any) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [9, 10, 0], "labels": [9, 10, -100], "attention_mask": [1, 1, 0]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    prepared = prepare(make(tmp_path / "a.parquet", held_out=0.0))
    corpus = prepared.corpus
    assert corpus.rows(0, 1).tokens.tolist() == [5, 6, 7, 8]
    assert corpus.rows(0, 1).supervised.tolist() == [False, True, True, False]
    assert corpus.rows(1, 2).tokens.tolist() == [9, 10]
    assert corpus.rows(1, 2).supervised.tolist() == [True, False]
    assert prepared.report["padding_tokens"] == 1


def test_a_second_run_finds_it_done_and_another_is_refused(tmp_path: Path, make: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in sentences(50)])
    config = make(source)
    first = prepare(config)
    before = every_file(config.cache)
    second = prepare(config)
    assert (first.already_there, second.already_there) == (False, True)
    assert second.corpus.hash == first.corpus.hash
    assert "already there" in report_lines(second)[0]
    for change, message in (
        ({"context_length": 16}, r"recipe\.context_length: stored 32, asked for 16"),
        ({"seed": 3}, r"recipe\.seed: stored 0, asked for 3"),
        ({"separator": "<sep>"}, r"recipe\.last_token_id"),
        ({"source": "python-docstrings"}, r"source\.kind"),
    ):
        with pytest.raises(MismatchError, match=message):
            prepare(dataclasses.replace(config, **change))
    source.write_text(source.read_text().replace("cat", "dog", 1))
    with pytest.raises(MismatchError, match=r"source\.files: stored .*a\.jsonl"):
        prepare(config)
    assert every_file(config.cache) == before


def test_limits_stop_early_and_say_so(tmp_path: Path, make: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in ["", *sentences(50)]])
    some = prepare(make(source, max_documents=7, cache=tmp_path / "some"))
    assert some.report["train"]["documents"] + some.report["held_out"]["documents"] == 7
    assert (some.report["records"], some.report["empty_documents"]) == (8, 1)
    assert some.report["stopped_by"] == "max_documents"
    assert any("--max-documents" in note for note in some.report["notes"])
    exactly = prepare(make(source, max_documents=50, cache=tmp_path / "exactly"))
    assert exactly.report["stopped_by"] is None
    few = prepare(make(source, max_tokens=100, cache=tmp_path / "few"))
    assert 70 < few.corpus.num_tokens <= 100
    assert few.report["stopped_by"] == "max_tokens"
    with pytest.raises(DataError, match="the first one alone exceeds --max-tokens"):
        prepare(make(source, max_tokens=1, cache=tmp_path / "none"))
    assert not (tmp_path / "none" / "corpus").exists()


def test_nothing_to_store_is_an_error(tmp_path: Path, make: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": None}])
    with pytest.raises(DataError, match="no document to store, of 2 read; all of them are empty"):
        prepare(make(source))
    assert not list((tmp_path / "cache").iterdir())


def test_an_empty_side_is_reported(tmp_path: Path, make: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": "sat on"}])
    prepared = prepare(make(source, held_out=0.0001))
    assert any("no document fell on the held-out side" in note for note in prepared.report["notes"])
    assert "no document fell on the held-out side" in "\n".join(report_lines(prepared))
    other = prepare(make(source, held_out=0.9999, cache=tmp_path / "other"))
    assert any("nothing to train on" in note for note in other.report["notes"])


def test_a_bad_record_leaves_nothing_behind(tmp_path: Path, make: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": 5}])
    with pytest.raises(DataError, match=r"a\.jsonl, record 1: expected text"):
        prepare(make(source))
    assert not list((tmp_path / "cache").iterdir())


def test_settings_that_do_not_apply_are_refused(tmp_path: Path, make: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}])
    with pytest.raises(ConfigError, match="--eos: only for text; whoever made the ids decides"):
        prepare(make(source, eos="always"))
    with pytest.raises(ConfigError, match="contradict"):
        make(source, separator="<sep>", eos="never")
    for settings in ({"context_length": 1}, {"held_out": 1.0}, {"max_tokens": 0}):
        with pytest.raises(ConfigError):
            make(source, **settings)
    with pytest.raises(ConfigError, match="found --text-column and --messages-column"):
        make(source, text_column="a", messages_column="b")


def test_a_large_source_is_never_held(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the source, what was read but not yet packed stays a few documents."""
    read = packed = most = 0

    class Endless:
        notes: tuple[str, ...] = ()

        def columns(self) -> list[str]:
            return ["text"]

        def records(self, columns: Any) -> Any:
            from tailcache.pipeline.text import Record

            nonlocal read
            for index in range(3000):
                read += 1
                yield Record(str(index), {"text": f"the cat {index}"})

        def describe(self, stored: Any = None) -> dict[str, Any]:
            return {"kind": "endless"}

    class Counting(Packer):
        def add(self, document: Any) -> None:
            nonlocal packed, most
            packed += 1
            most = max(most, read - packed)
            super().add(document)

    monkeypatch.setattr(prepare_module, "open_source", lambda config: Endless())
    monkeypatch.setattr(prepare_module, "Packer", Counting)
    prepare(make("endless"))
    assert packed == 3000
    assert most < 64


# Tokenizers


def test_stored_tokenizers_are_the_same_from_a_folder_or_its_copy(tmp_path: Path, tokenizer_folder: Path) -> None:
    loaded = load_tokenizer(str(tokenizer_folder))
    for name, data in loaded.files.items():
        (tmp_path / name).write_bytes(data)
    again = load_tokenizer(str(tmp_path))
    assert again.files == loaded.files
    assert again.fingerprint == loaded.fingerprint == fingerprint(AutoTokenizer.from_pretrained(tokenizer_folder))
    assert loaded.vocab_size == len(loaded.tokenizer)
    assert b"/" + tokenizer_folder.name.encode() not in b"".join(loaded.files.values())


def test_a_chat_template_can_be_given(tmp_path: Path, tokenizer_folder: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    loaded = load_tokenizer(str(tokenizer_folder), chat_template=template)
    assert loaded.files["chat_template.jinja"] == template.read_bytes()
    with pytest.raises(ConfigError, match="--chat-template"):
        load_tokenizer(str(tokenizer_folder), chat_template=tmp_path / "none.jinja")


def test_tokenizers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such GGUF file"):
        load_tokenizer(str(tmp_path / "model.gguf"))
    with pytest.raises(NotFoundError, match="expected a folder with a tokenizer"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_gguf_file_gives_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("bpe")
    tokenizer.chat_template = CHATML
    write_llama_gguf(tmp_path / "tiny.gguf", tiny_model("llama", len(tokenizer)), tokenizer)
    loaded = load_tokenizer(str(tmp_path / "tiny.gguf"))
    assert tokenizer.get_vocab().items() <= loaded.tokenizer.get_vocab().items()
    assert loaded.tokenizer.chat_template == CHATML
    assert loaded.tokenizer("the cat sat")["input_ids"] == tokenizer("the cat sat")["input_ids"]
    for name, data in loaded.files.items():
        (tmp_path / name).write_bytes(data)
    again = load_tokenizer(str(tmp_path))
    assert again.fingerprint == loaded.fingerprint
    assert again.files == loaded.files


def test_random_tokenization_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"at random \(dropout 0\.1"):
        load_tokenizer(str(tmp_path))


def test_how_texts_begin_and_end() -> None:
    tokenizer = build_tokenizer()
    assert opening_id(tokenizer, "auto") is None
    assert opening_id(tokenizer, "always") == tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert opening_id(tokenizer, "auto") == tokenizer.bos_token_id
    assert opening_id(tokenizer, "never") is None
    assert ending_id(tokenizer, "auto", None) == tokenizer.eos_token_id
    assert ending_id(tokenizer, "never", None) is None
    assert ending_id(tokenizer, "auto", "<sep>") == tokenizer.convert_tokens_to_ids("<sep>")
    with pytest.raises(ConfigError, match="'<nope>': not a token"):
        ending_id(tokenizer, "auto", "<nope>")
    tokenizer.eos_token = tokenizer.bos_token = None
    assert ending_id(tokenizer, "auto", None) is None
    with pytest.raises(ConfigError, match="has no eos"):
        ending_id(tokenizer, "always", None)
    with pytest.raises(ConfigError, match="has no bos"):
        opening_id(tokenizer, "always")


def test_the_source_hash_chains_the_documents(tmp_path: Path, make: Any) -> None:
    texts = sentences(5)
    prepared = prepare(make(write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])))
    chain = hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in texts)).hexdigest()
    assert prepared.corpus.manifest["source"]["documents_sha256"] == chain
