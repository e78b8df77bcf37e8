"""Records are believed only as far as they were looked at: types, ranges, sizes that agree, paths of the layout."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Tally

from tailcache.storage.array_metadata import check_array_metadata
from tailcache.storage.corpus import corpus_arrays
from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError, FormatError, MismatchError, TailcacheError
from tailcache.storage.layout import commit_path
from tailcache.storage.limits import MAX_CHUNK_BYTES, MAX_COUNT, MAX_VOCABULARY
from tailcache.storage.records import (
    Manifest,
    parse_checksums,
    parse_commit,
    parse_complete,
    parse_corpus_manifest,
    parse_manifest,
)
from tailcache.storage.sealed import MAX_DEPTH, MAX_VALUES, seal, unseal

GOLDEN = Path(__file__).parent / "golden"
CACHES = sorted(path for path in GOLDEN.iterdir() if path.is_dir() and path.name.startswith("v"))
HASH = "0123456789abcdef" * 4
REMEDY = "restore it from a copy"


def records(cache: Path) -> dict[str, tuple[bytes, Callable[[bytes], Any]]]:
    """Every kind of record of a golden cache, and its parser."""
    corpus, teacher = cache / "corpus", cache / "teachers" / "golden"
    of_corpus = parse_corpus_manifest((corpus / "manifest.json").read_bytes(), "corpus")
    arrays = corpus_arrays(of_corpus.vocab_size)
    of_teacher = parse_manifest((teacher / "manifest.json").read_bytes(), "teacher")

    def listed(data: bytes) -> Any:
        return parse_checksums(data, "here", replace(of_corpus, checksums=sha256(data)), arrays)

    found: dict[str, tuple[Path, Callable[[bytes], Any]]] = {
        "corpus": (corpus / "manifest.json", lambda data: parse_corpus_manifest(data, "here")),
        "checksums": (corpus / "checksums.json", listed),
        "manifest": (teacher / "manifest.json", lambda data: parse_manifest(data, "here")),
        "commit": (teacher / commit_path(0), lambda data: parse_commit(data, "here", 0, of_teacher)),
        "complete": (teacher / "complete.json", lambda data: parse_complete(data, "here", of_teacher)),
    }
    return {kind: (path.read_bytes(), parse) for kind, (path, parse) in found.items()}


@pytest.mark.parametrize("cache", CACHES, ids=lambda path: path.name)
def test_sound_records_are_accepted(cache: Path) -> None:
    for kind, (data, parse) in records(cache).items():
        parsed, values = parse(data), unseal(data, kind)
        for name, value in values.items():
            if name in vars(parsed) and isinstance(value, str | int) and name != "layout":
                assert getattr(parsed, name) == value
        assert dict.fromkeys(parsed.files if hasattr(parsed, "files") else ()) == dict.fromkeys(values.get("files", ()))
        assert getattr(parsed, "seal", sha256(data)) == sha256(data)


def test_keys_that_are_not_known_are_left_alone() -> None:
    """A later version may add keys and arrays."""
    for kind, (data, parse) in records(GOLDEN / "v1_optional").items():
        values = unseal(data, kind)
        values["of a later version"] = {"anything": [1, None, "x"]}
        if kind == "commit":
            values["files"]["later_field/c/0/0"] = {"bytes": 5, "sha256": HASH, "chunks": HASH, "more": 1}
            values["sums"]["later_sum"] = "x"
        elif kind in ("manifest", "checksums"):
            values["files"] |= {"later_array/zarr.json": HASH, "later_array/c/7": HASH}
        elif kind == "complete":
            values["files"]["later_array/c/0"] = HASH
        if kind == "manifest":
            values["layout"]["later_size"] = 3
        parse(seal(values))


def put(values: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(">")
    for key in above:
        values = values[key]
    if value is KeyError:
        del values[last]
    else:
        values[last] = value


NOT_HASHES = (None, 5, "", HASH[:-1], HASH.upper(), HASH + "\n", [HASH])
NOT_PATHS = (
    "../x", "/etc/passwd", "log_tail/c/../0", "log_tail/c/00", "log_tail/c/-1", "log_tail/c/0\n", "log_tail//c/0",
    "Log/c/0", "a\\c\\0", "log_tail/c/0/1", "c/0", "", ".", "..", "log_tail", "log_tail/c/" + "9" * 20,
    "a" * 65 + "/c/0",
)  # fmt: skip
WRONG: dict[str, list[tuple[str, Any]]] = {
    "corpus": [
        *((key, value) for key in ("hash", "checksums", "content>tokens") for value in NOT_HASHES),
        *((key, value) for key in ("vocab_size", "num_rows", "num_tokens", "num_targets")
          for value in (None, 0, -1, True, 1.0, "3", MAX_COUNT + 1, 10**400)),
        ("vocab_size", MAX_VOCABULARY + 1), ("num_rows", 20), ("num_targets", 15), ("content", {}), ("content", []),
        ("content>held_out", KeyError), ("source", None), ("recipe", []), ("report", 3), ("tokenizer", "x"),
        ("tokenizer>fingerprint", ["x"]), ("tokenizer>fingerprint", {"all": 1}), ("format", "tailcache targets"),
        ("format_version", 2), ("format_version", True), ("format_version", "1"), ("format", ["x"] * 1000),
    ],
    "checksums": [
        *((f"{key}>tokens/c/0", value) for key in ("files", "chunks") for value in (*NOT_HASHES, KeyError)),
        *((f"{key}>{path}", HASH) for key in ("files", "chunks") for path in (*NOT_PATHS, "tokens/c/1")),
        *((f"files>tokenizer/{path}", HASH) for path in
          ("", ".", "..", "../x", "a/../b", "x.tmp", "a//b", "a\\b", "a\nb", "a/b/c/d/e", "é" * 200, "C:x",
           "\u202etxt")),
        ("files", None), ("chunks", []), ("files>zarr.json", KeyError), ("files>tokens/zarr.json", KeyError),
    ],
    "manifest": [
        *((key, value) for key in ("corpus_hash", "files>log_tail/zarr.json") for value in NOT_HASHES),
        *((f"files>{path}", HASH) for path in (*NOT_PATHS, "log_tail/c/0", "tokenizer/x", "vocabulary_order/c/1")),
        ("files", []), ("files>zarr.json", KeyError), ("files>log_tail/zarr.json", KeyError),
        ("files>vocabulary_order/c/0", KeyError), ("name", None), ("name", "../x"), ("name", "a/b"), ("name", ""),
        ("settings", None), ("provenance", []), ("layout", None), ("layout>format", 1), ("layout>format_version", 99),
        *((f"layout>{key}", value) for key in
          ("vocab_size", "top_k", "num_levels", "num_rows", "num_positions", "rows_per_shard", "shard_slots", "chunk")
          for value in (None, 0, -1, 2.0, "7", True, MAX_COUNT + 1, 10**400)),
        ("layout>num_samples", -1), ("layout>num_samples", MAX_VOCABULARY + 1), ("layout>top_k", 13),
        ("layout>chunk", 3), ("layout>chunk", 16), ("layout>num_positions", 25), ("layout>shard_slots", 1 << 40),
        ("layout>temperatures", "x"), ("layout>temperatures", [1.0]), ("layout>temperatures", [{}]),
        ("layout>temperatures", [2.0 + i for i in range(65)]), ("layout>hidden", 5),
        ("layout>hidden>width", 1 << 30), ("layout>hidden>width", True), ("layout>hidden>kind", "fp4"),
        ("layout>hidden>kind", ["bf16"]), ("layout>hidden>logit_scale", 10**400), ("layout>hidden>soft_cap", 10**400),
        ("layout>hidden>soft_cap", 0), ("layout>hidden>head_bias", 1),
    ],
    "commit": [
        *((key, value) for key in ("tail_sum", "files>log_tail/c/0>sha256", "files>log_tail/c/0>chunks")
          for value in NOT_HASHES),
        *((f"files>{path}", {"bytes": 9, "sha256": HASH, "chunks": HASH}) 
          for path in (*NOT_PATHS, "log_tail/c/1", "x/c/1")),
        *(("files>log_tail/c/0>bytes", value) for value in (None, -1, 0, 5, True, 1e3, "108", 10**9, 10**400)),
        ("files", []), ("files", {}), ("files>log_tail/c/0", KeyError), ("files>log_tail/c/0", [1]), ("shard", True),
        ("shard", "0"), ("rows", [0, 3]), ("rows", [0]), ("rows", [0.0, 2.0]), ("rows", "02"), ("rows", {"0": 2}),
        ("rows", [False, 2]), ("positions", -1), ("positions", 9), ("positions", 7.0), ("positions", 0), ("sums", None),
        ("sums>log_target", None), ("sums>tail_mass", "1"), ("sums>tail_mass", 10**400), ("sums>log_target", True),
    ],
    "complete": [
        *((key, value) for key in ("commits", "files>mean_tail/c/0") for value in NOT_HASHES),
        ("num_shards", 2), ("num_shards", 3.0), ("positions", 11), ("positions", None), ("bytes", -1), ("bytes", 10**9),
        ("bytes", "1"), ("files", {}), ("files>../x", HASH), ("files>log_tail/c/0/0/0", HASH),
        ("files>zarr.json", HASH),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_makes_no_sense_is_refused_with_where_expected_found_and_remedy(kind: str) -> None:
    data, parse = records(GOLDEN / "v1_optional")[kind]
    good = unseal(data, kind)
    for path, value in WRONG[kind]:
        values = copy.deepcopy(good)
        put(values, path, value)
        with pytest.raises(FormatError, match=r"^here\b.*(expected.*found|contradict each other)") as caught:
            parse(seal(values))
        message = str(caught.value)
        assert len(message) < 1000, f"{path}: {len(message)} characters"
        assert REMEDY in message or "layout" in path or "format" in path, message


def test_records_of_another_shard_manifest_or_corpus() -> None:
    found = records(GOLDEN / "v1")
    for kind, key in (("commit", "manifest"), ("complete", "manifest")):
        data, parse = found[kind]
        with pytest.raises(CorruptError, match=rf"^here: belongs to another .*{REMEDY[:7]}"):
            parse(seal({**unseal(data, kind), key: HASH}))
    data, parse = found["commit"]
    with pytest.raises(CorruptError, match="belongs to another shard or capture"):
        parse(seal({**unseal(data, "commit"), "shard": 1}))
    corpus, manifest = found["corpus"][1](found["corpus"][0]), found["manifest"][1](found["manifest"][0])
    assert isinstance(manifest, Manifest)
    manifest.check_corpus(corpus, "here")
    with pytest.raises(MismatchError, match="here: captured over the corpus 09d6"):
        manifest.check_corpus(replace(corpus, hash=HASH), "here")
    for name in ("vocab_size", "num_rows", "num_targets"):
        with pytest.raises(FormatError, match="here: expected vocabulary, rows and positions of the corpus"):
            manifest.check_corpus(replace(corpus, **{name: getattr(corpus, name) + 1}), "here")
    arrays = corpus_arrays(corpus.vocab_size)
    with pytest.raises(CorruptError, match="here: belongs to another manifest"):
        parse_checksums(found["checksums"][0], "here", replace(corpus, checksums=HASH), arrays)


@pytest.mark.parametrize(
    "sizes",
    [
        {"chunk": 1 << 29, "shard_slots": 1 << 29, "num_positions": 12},
        {"top_k": 1 << 20, "vocab_size": 1 << 21, "chunk": 1 << 11, "shard_slots": 1 << 11},
        {"num_rows": MAX_COUNT, "rows_per_shard": 1, "shard_slots": 8},
        {"chunk": 1, "shard_slots": 1 << 21},
        {"num_samples": 1 << 23, "chunk": 1 << 8, "shard_slots": 1 << 8},
    ],
)
def test_a_layout_that_would_take_gigabytes_is_refused(sizes: dict[str, int]) -> None:
    data, parse = records(GOLDEN / "v1")["manifest"]
    values = unseal(data, "manifest")
    values["layout"] |= sizes
    with pytest.raises(
        FormatError, match=rf"here: sizes that make no sense: .*({MAX_CHUNK_BYTES}|{MAX_COUNT}|at most)"
    ):
        parse(seal(values))


def test_json_is_limited_before_it_is_built() -> None:
    parse = records(GOLDEN / "v1")["commit"][1]
    deep: Any = {}
    for _ in range(MAX_DEPTH):
        deep = {"a": deep}
    for data, message in (
        (b"[" * 1000, "CorruptError|expected"),
        (b" " * (2 << 20), "at most 1048576 bytes, found 2097152"),
        (seal(deep), f"at most {MAX_DEPTH} objects"),
        (b"9" * 5000, "something else"),
    ):
        with pytest.raises(CorruptError, match=rf"^here: .*({message})"):
            parse(data)
    with pytest.raises(CorruptError, match=f"at most {MAX_VALUES} values"):
        records(GOLDEN / "v1")["manifest"][1](b"[" + b"0," * (MAX_VALUES + 1) + b"0]")
    with pytest.raises(ValueError, match="at most"):
        seal({"a": "x" * (65 << 20)})


def test_a_zarr_json_must_be_what_the_layout_says() -> None:
    teacher = GOLDEN / "v1" / "teachers" / "golden"
    layout = parse_manifest((teacher / "manifest.json").read_bytes(), "m").layout
    spec, slots = layout.fields()["logprob_gaps"], layout.num_shards * layout.shard_slots
    data = (teacher / "logprob_gaps" / "zarr.json").read_bytes()
    check_array_metadata(data, "here", spec, slots)
    good = json.loads(data)
    sharding = "codecs>0>configuration"

    def change(path: str, value: Any) -> bytes:
        values = copy.deepcopy(good)
        *above, last = (int(key) if key.isdigit() else key for key in path.split(">"))
        holder: Any = values
        for key in above:
            holder = holder[key]
        holder[last] = value
        return json.dumps(values).encode()

    allowed: list[tuple[str, Any]] = [
        ("attributes", {"anything": 1}), ("dimension_names", None), (f"{sharding}>codecs>3", "crc32c"),
        (f"{sharding}>codecs>3", {"name": "crc32c", "configuration": {}}),
        (f"{sharding}>codecs>2>configuration>clevel", 1),
    ]  # fmt: skip
    for path, value in allowed:
        check_array_metadata(change(path, value), "here", spec, slots)
    refused: list[tuple[str, Any]] = [
        ("shape", [1 << 40, 5]), ("shape", [24]), ("data_type", "string"), ("data_type", "float16"), ("fill_value", 7),
        ("fill_value", False), ("node_type", "group"), ("zarr_format", 2), ("codecs", []), ("codecs", None),
        ("chunk_grid>configuration>chunk_shape", [1 << 40, 5]), ("chunk_key_encoding>configuration>separator", "."),
        (f"{sharding}>chunk_shape", [8, 5]), (f"{sharding}>index_location", "start"),
        (f"{sharding}>codecs>2>name", "numcodecs.pickle"), (f"{sharding}>codecs>2>name", "gzip"),
        (f"{sharding}>codecs>0", {"name": "numcodecs.delta", "configuration": {"dtype": "u2"}}),
        (f"{sharding}>index_codecs", []), ("storage_transformers", [{"name": "x"}]),
    ]  # fmt: skip
    for path, value in refused:
        with pytest.raises(FormatError, match=r"here: .*expected .*found .*restore it from a copy"):
            check_array_metadata(change(path, value), "here", spec, slots)
    for bad in (b"", b"[]", b"{", b"\xff", b" " * (2 << 20)):
        with pytest.raises(CorruptError, match=r"^here: expected"):
            check_array_metadata(bad, "here", spec, slots)


@pytest.mark.slow
def test_a_hundred_thousand_changed_records(tmp_path: Path, tally: Tally) -> None:
    """In processes of their own, which may not grow by more than 1 GiB: nothing but the named errors comes out."""
    runs = []
    for seed, cache in enumerate(("v1_optional", "v2_optional")):
        command = [sys.executable, "-m", "tailcache.scripts.fuzz_records", "--cache", str(GOLDEN / cache)]
        command += ["--inputs", "50000", "--seed", str(seed), "--json", str(tmp_path / f"{seed}.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for run in runs:
        printed = run.communicate(timeout=280)[0].decode()
        assert run.returncode == 0, printed
    kinds: dict[str, int] = {}
    for seed in range(2):
        for kind, outcome in json.loads((tmp_path / f"{seed}.json").read_text()).items():
            kinds[kind] = kinds.get(kind, 0) + outcome["inputs"]
            assert outcome["inputs"] == outcome["accepted"] + sum(outcome["refused"].values())
            assert outcome["refused"].keys() <= {error.__name__ for error in TailcacheError.__subclasses__()}
            assert 0 < outcome["accepted"] < outcome["inputs"] / 2
    assert kinds["manifest"] + kinds["commit"] >= 100_000
    tally("changed manifests and commit records, accepted or refused with a named error", 100_000)
    others = sum(kinds.values()) - kinds["manifest"] - kinds["commit"]
    tally("other changed records, zarr.json files, indices and chunk headers: the same", others)
    assert kinds.keys() == {"manifest", "commit", "complete", "corpus", "checksums", "zarr.json", "index", "chunk"}
