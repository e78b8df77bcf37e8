"""Sources: every local format gives the same records, in a fixed order, a few at a time."""

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_fixtures import build_tokenizer

from tailcache.pipeline.config import PrepareConfig
from tailcache.pipeline.docstrings import docstrings, library_files
from tailcache.pipeline.documents import Columns, Document, Encoder, choose_columns
from tailcache.pipeline.files import read_file
from tailcache.pipeline.json_records import decode_json
from tailcache.pipeline.locate import open_source
from tailcache.pipeline.text import FileSource, HubSource, Record
from tailcache.storage.errors import ConfigError, DataError, NotFoundError

ROWS: list[dict[str, Any]] = [
    {"text": "the cat", "n": 1},
    {"text": "2024-01-01", "n": 2},
    {"text": None, "n": 3},
    {"text": "two\nlines é", "n": 4},
    {"text": "", "n": 5},
]
TABLE = pa.Table.from_pylist(ROWS)


def config(source: object, **settings: Any) -> PrepareConfig:
    return PrepareConfig(cache=Path("unused"), source=str(source), tokenizer="unused", **settings)


def texts(source: Any) -> list[Any]:
    return [record.fields["text"] for record in source.records(["text"])]


def write(path: Path) -> Path:
    """The rows in the format the name asks for."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if path.name.endswith(".parquet"):
        pq.write_table(TABLE, path)
    elif path.name.endswith(".stream.arrow"):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=2)
    elif path.name.endswith(".file.arrow"):
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=2)
    elif path.name.endswith(".array.json"):
        path.write_text(json.dumps(ROWS))
    elif path.name.endswith(".pretty.json"):
        path.write_text(json.dumps(ROWS, indent=2))
    elif path.name.endswith(".bom.jsonl"):
        path.write_bytes(b"\xef\xbb\xbf" + lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".bz2":
        path.write_bytes(bz2.compress(lines))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(lines))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(lines)
    else:
        path.write_bytes(lines)
    return path


NAMES = ["a.parquet", "a.stream.arrow", "a.file.arrow", "a.jsonl", "a.json", "a.array.json", "a.pretty.json"]
NAMES += ["a.bom.jsonl", "a.jsonl.gz", "a.json.bz2", "a.jsonl.xz", "a.jsonl.zst"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    source = open_source(config(write(tmp_path / name)))
    assert source.columns() == ["text", "n"]
    assert texts(source) == [row["text"] for row in ROWS]
    assert list(source.records(None))[3].fields == ROWS[3]
    assert list(source.records(None))[3].where == f"{name}, record 3"


def test_chats_keep_their_shape_in_every_columnar_format(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert [record.fields for record in open_source(config(path)).records(["messages"])] == rows


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("line", ["one", "two  ", "", "  ", "three", "", "", "four"]),
        ("paragraph", ["one\ntwo  ", "three", "four"]),
        ("document", ["one\ntwo  \n\n  \nthree\n\n\nfour\n"]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.text.gz"])
def test_what_a_document_of_a_text_file_is(tmp_path: Path, name: str, mode: Any, expected: list[str]) -> None:
    content = b"\xef\xbb\xbfone\ntwo  \r\n\n  \nthree\n\n\nfour\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert texts(open_source(config(tmp_path / name, text_files=mode))) == expected


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", ".hidden.txt", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "dataset_info.json").write_text("{}")
    source = open_source(config(tmp_path))
    assert texts(source) == ["a.jsonl", "b/10.txt", "b/2.txt"]
    assert source.notes == ["not read, of another format: c.md"]


def test_strange_names_are_only_names(tmp_path: Path) -> None:
    folder = tmp_path / "we[i]rd *"
    folder.mkdir()
    (folder / "a [1]?.txt").write_text("hello\n")
    assert texts(open_source(config(folder))) == ["hello"]


def test_a_pattern_is_a_source(tmp_path: Path) -> None:
    for name in ("2.txt", "1.txt", "other.csv"):
        (tmp_path / name).write_text(name)
    assert texts(open_source(config(tmp_path / "*.txt"))) == ["1.txt", "2.txt"]
    with pytest.raises(NotFoundError, match="no file matches"):
        open_source(config(tmp_path / "*.jsonl"))


def test_saved_datasets_and_their_splits(tmp_path: Path) -> None:
    rows = [{"text": str(index)} for index in range(10)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(open_source(config(tmp_path / "one"))) == [row["text"] for row in rows]
    both = datasets.DatasetDict({"train": data, "test": data.select([3, 1])})
    both.save_to_disk(tmp_path / "both")
    assert len(texts(open_source(config(tmp_path / "both")))) == 10
    assert open_source(config(tmp_path / "both")).notes == ["split train read; also there, not read: test"]
    assert texts(open_source(config(tmp_path / "both", split="test"))) == ["3", "1"]
    with pytest.raises(ConfigError, match="no split tests, found train, test; did you mean test"):
        open_source(config(tmp_path / "both", split="tests"))


def test_splits_by_the_words_in_names(tmp_path: Path) -> None:
    for name in ("data/train-00001.txt", "data/train-00000.txt", "data/test-00000.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert texts(open_source(config(tmp_path))) == ["data/train-00000.txt", "data/train-00001.txt"]
    assert texts(open_source(config(tmp_path, split="test"))) == ["data/test-00000.txt"]
    (tmp_path / "data" / "more.txt").write_text("more")
    assert len(texts(open_source(config(tmp_path)))) == 4, "not a folder laid out by splits: all of it"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("corpora.jsonl", r"did you mean .*corpus\.jsonl"),
        ("nothing/here.parquet", "no such file or folder"),
    ],
)
def test_a_wrong_path_is_not_looked_for_on_the_hub(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(NotFoundError, match=message):
        open_source(config(tmp_path / name))


def test_an_unknown_format_says_which_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n")
    with pytest.raises(ConfigError, match=r"cannot read a\.csv; expected \.parquet"):
        open_source(config(tmp_path / "a.csv"))
    with pytest.raises(NotFoundError, match="no file that can be read"):
        open_source(config(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 not really", "a.parquet"),
        ("a.arrow", b"ARROW1 not really", "a.arrow"),
        ("a.jsonl", b'{"text": "a"}\n{"text": b}\n{"text": "c"}\n', "a.jsonl: record 1: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "a.jsonl: record 1: not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "a.json: record 2: the array is not closed"),
        ("a.json", b'[{"text": "a"}] more', "a.json: record 1: expected the end"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "a.json: record 1: expected a comma"),
        ("a.jsonl", b'"a"\n', "a.jsonl: record 0: expected an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "a.jsonl.gz"),
        ("a.txt", b"abc\xff\n", "a.txt"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts(FileSource([(name, tmp_path / name)]))
    assert message in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3), max_size=6),
    st.sampled_from(["lines", "array", "pretty", "run together"]),
    st.integers(1, 9),
)
def test_json_comes_out_as_it_went_in_however_it_is_cut(records: list[Any], layout: str, size: int) -> None:
    if layout == "array":
        text = json.dumps(records)
    elif layout == "pretty":
        text = json.dumps(records, indent=1, ensure_ascii=False)
    else:
        text = ("\n" if layout == "lines" else "").join(json.dumps(record) for record in records)
    assert list(decode_json(text[at : at + size] for at in range(0, len(text), size))) == records


def test_json_is_decoded_as_it_comes() -> None:
    """One chunk is read ahead at most, and a fault is found where it is, not at the end of the file."""
    asked = 0

    def chunks() -> Iterator[str]:
        nonlocal asked
        for index in range(1000):
            asked += 1
            yield f'{{"n": {index}}}\n' if index != 500 else '{"n": oops}\n'

    records = decode_json(chunks())
    for index in range(500):
        assert next(records) == {"n": index}
        assert asked <= index + 2
    with pytest.raises(DataError, match="record 500: not JSON"):
        next(records)
    assert asked < 510


def test_parquet_with_one_large_row_group_stays_small(tmp_path: Path) -> None:
    """The whole table is 40 MB of one row group; reading it must not hold it."""
    rng = np.random.default_rng(0)
    table = pa.table({"text": [rng.bytes(2000).hex() for _ in range(10_000)]})
    assert table.nbytes > 30e6
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=len(table))
    total = table.nbytes
    del table
    before = pa.total_allocated_bytes()
    peak = 0
    for _ in read_file(tmp_path / "a.parquet", ["text"]):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < total / 4


def test_the_description_follows_the_content_not_the_place(tmp_path: Path) -> None:
    described = []
    for place in ("here", "there"):
        folder = tmp_path / place
        folder.mkdir()
        write(folder / "a.jsonl")
        write(folder / "b.parquet")
        source = open_source(config(folder))
        list(source.records(None))
        described.append(source.describe())
    assert described[0] == described[1]
    assert [file["name"] for file in described[0]["files"]] == ["a.jsonl", "b.parquet"]
    assert all(len(file["sha256"]) == 64 for file in described[0]["files"])
    assert str(tmp_path) not in json.dumps(described)


def test_files_a_limit_left_unread_have_no_hash(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name)
    source = open_source(config(tmp_path))
    next(source.records(None))
    assert [file["sha256"] is None for file in source.describe()["files"]] == [False, True]


def test_a_hub_dataset_is_read_at_the_commit_that_was_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Info:
        sha = "c0ffee"

    def dataset_info(self: Any, name: str, revision: str | None = None) -> Info:
        asked.append((name, revision))
        return Info()

    def splits(name: str, subset: str | None, revision: str | None = None) -> list[str]:
        return ["train", "test"]

    def load(name: str, subset: str | None, **settings: Any) -> Any:
        asked.append((name, subset, settings))
        return datasets.Dataset.from_list([{"text": "a", "other": 1}, {"text": "b", "other": 2}]).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.get_dataset_split_names", splits)
    monkeypatch.setattr("datasets.load_dataset", load)
    source = open_source(config("someone/something", subset="en", revision="main", split="test"))
    assert isinstance(source, HubSource)
    assert source.columns() == ["text", "other"]
    assert [record.fields for record in source.records(["text", "labels"])] == [{"text": "a"}, {"text": "b"}]
    assert asked[0] == ("someone/something", "main")
    assert asked[-1] == ("someone/something", "en", {"split": "test", "revision": "c0ffee", "streaming": True})
    assert source.describe() == {
        "kind": "hub",
        "name": "someone/something",
        "subset": "en",
        "split": "test",
        "revision": "c0ffee",
    }
    assert source.notes == ["split test read; also there, not read: train"]


def test_an_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(NotFoundError, match=r"someone/something: neither a local file .* no route"):
        open_source(config("someone/something"))


def test_docstrings_of_the_standard_library() -> None:
    found = dict(docstrings(Path(json.__file__).parent))
    assert found["decoder.py: JSONDecoder"].startswith("Simple JSON <https://json.org> decoder")
    assert "\n    " not in found["__init__.py: loads"].split("\n\n")[0]
    assert all(len(text) >= 20 and text == text.strip() for text in found.values())
    names = [name for name, _ in library_files()]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not any(part in name.split("/")[:-1] for name in names for part in ("test", "site-packages", "idlelib"))


# Columns


@pytest.mark.parametrize(
    ("available", "settings", "expected"),
    [
        (["text", "url"], {}, Columns("text", "text")),
        (["messages"], {}, Columns("chat", "messages")),
        (["conversations", "id"], {}, Columns("chat", "conversations")),
        (["input_ids", "attention_mask"], {}, Columns("tokens", "input_ids")),
        (["body", "text"], {"text_column": "body"}, Columns("text", "body")),
        (["text", "messages"], {"messages_column": "messages"}, Columns("chat", "messages")),
        (["ids", "keep"], {"input_ids_column": "ids", "mask_column": "keep"}, Columns("tokens", "ids", "keep")),
    ],
)
def test_columns_are_found_or_chosen(available: list[str], settings: dict[str, str], expected: Columns) -> None:
    assert choose_columns(available, config("x", **settings)) == expected


@pytest.mark.parametrize(
    ("available", "settings", "message"),
    [
        (["text", "messages"], {}, r"found text and messages; choose .* Its columns: text, messages"),
        (["content"], {}, r"found none of them; choose .* Its columns: content"),
        (["content"], {"text_column": "contents"}, r"no such column; did you mean content\? Columns: content"),
        (["text"], {"mask_column": "keep"}, "--mask-column is for ready token ids"),
        (["input_ids", "loss"], {"mask_column": "los"}, "did you mean loss"),
    ],
)
def test_columns_that_cannot_be_told_are_listed(available: list[str], settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_columns(available, config("x", **settings))


# Documents


def encode(
    columns: Columns, *rows: dict[str, Any], first: int | None = None, last: int | None = None
) -> list[Document]:
    tokenizer = build_tokenizer()
    records = [Record(f"record {index}", row) for index, row in enumerate(rows)]
    return list(Encoder(tokenizer, len(tokenizer), columns, first, last).documents(records))


def test_text_is_tokenised_plainly_with_the_ends_asked_for() -> None:
    tokenizer = build_tokenizer()
    plain = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    columns = Columns("text", "text")
    assert encode(columns, {"text": "the cat"})[0].tokens.tolist() == plain
    [document] = encode(columns, {"text": "the cat"}, first=1, last=2)
    assert document.tokens.tolist() == [1, *plain, 2]
    assert document.document_start.tolist() == [True] + [False] * (len(plain) + 1)
    assert document.wanted.all()


def test_empty_texts_give_empty_documents_in_their_place() -> None:
    documents = encode(Columns("text", "text"), {"text": ""}, {"text": "a"}, {"text": None}, {"text": " \n"}, last=2)
    assert [len(each.tokens) for each in documents] == [0, 2, 0, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"other": 1}, "record 0: expected the column text, found other"),
        ({"text": 5}, "record 0: expected text in column text, found int '5'"),
        ({"text": "ab\ud800c"}, "record 0: character 2 is half a surrogate pair"),
    ],
)
def test_what_is_not_text_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(Columns("text", "text"), row)


def test_only_a_few_documents_are_read_ahead() -> None:
    tokenizer = build_tokenizer()
    read = 0

    def records() -> Iterator[Record]:
        nonlocal read
        for index in range(10_000):
            read += 1
            yield Record(str(index), {"text": f"the cat {index}"})

    for index, _ in enumerate(Encoder(tokenizer, len(tokenizer), Columns("text", "text")).documents(records())):
        assert read <= index + 64
        if index == 1000:
            break


TOKENS = Columns("tokens", "input_ids")


def test_labels_are_unshifted_and_select() -> None:
    [document] = encode(TOKENS, {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]})
    assert document.tokens.tolist() == [5, 6, 7, 8]
    assert document.wanted.tolist() == [False, False, True, True]


@pytest.mark.parametrize("name", ["loss_mask", "assistant_masks", "assistant_mask", "completion_mask"])
def test_masks_select(name: str) -> None:
    [document] = encode(TOKENS, {"input_ids": [5, 6, 7], name: [0, 1, 1]})
    assert document.wanted.tolist() == [False, True, True]
    [document] = encode(TOKENS, {"input_ids": [5, 6, 7], name: [False, True, False]})
    assert document.wanted.tolist() == [False, True, False]


def test_masks_and_labels_must_agree_that_a_token_is_wanted() -> None:
    [document] = encode(
        TOKENS,
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0], "labels": [5, 6, 7]},
    )
    assert document.wanted.tolist() == [False, True, False]


@pytest.mark.parametrize("attention", [[1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 0]])
def test_padding_is_taken_off_and_counted(attention: list[int]) -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, -100], "attention_mask": attention}
    [document] = encode(TOKENS, row)
    kept = [index for index, flag in enumerate(attention) if flag]
    assert document.tokens.tolist() == [[5, 6, 7, 8][index] for index in kept]
    assert document.num_padding == 4 - len(kept)
    assert document.document_start.tolist() == [True] + [False] * (len(kept) - 1)


def test_position_ids_say_where_documents_start() -> None:
    [document] = encode(TOKENS, {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 0, 1, 2]})
    assert document.document_start.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 6], "labels": [5, 7]}, "record 0, token 1: expected the label to repeat the token, 6"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "look shifted by one"),
        ({"input_ids": [5, 6], "labels": [5]}, "column labels: expected one entry per token, 2, found 1"),
        ({"input_ids": [5, 6], "loss_mask": [0, 2]}, "column loss_mask: expected 0 and 1 only, found 2"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "expected padding at the ends"),
        ({"input_ids": [5, 100000]}, "record 0, token 1: expected an id from 0 to"),
        ({"input_ids": [5, -1]}, "record 0, token 1: expected an id from 0 to"),
        ({"input_ids": [5.5, 1]}, "expected a list of integers"),
        ({"input_ids": "abc"}, "expected a list of integers"),
        ({"input_ids": [[1], [2]]}, "expected a list of integers"),
    ],
)
def test_wrong_ready_ids_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(TOKENS, row)


def test_equal_contents_have_equal_hashes() -> None:
    one, two, three = encode(
        TOKENS,
        {"input_ids": [5, 6]},
        {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
    )
    assert one.content_hash == two.content_hash == three.content_hash
    assert one.source_hash == two.source_hash != three.source_hash
