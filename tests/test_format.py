"""A reader written from docs/format.md alone, on tensorstore: nothing here decodes with tailcache.

tailcache writes the caches and says what its own reader gives; every number is then read a second time by
``PageReader``, whose only knowledge is the page.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
from numpy.typing import NDArray
from storage_fixtures import Exact, corpus_next, make_corpus, make_exact, make_head

from tailcache.storage.hidden import HeadKind, HiddenKind, hidden_float32
from tailcache.storage.reader import open_cache

PAGE = Path(__file__).parent.parent / "docs" / "format.md"
GOLDEN = Path(__file__).parent / "golden"


SCALARS = ("log_tail", "tail_entropy", "log_target", "log_not_target")


class PageReader:
    """Section by section of docs/format.md."""

    def __init__(self, cache: Path, name: str) -> None:
        self.corpus, self.teacher = cache / "corpus", cache / "teachers" / name
        attributes = json.loads((self.teacher / "zarr.json").read_text())["attributes"]["tailcache"]
        assert attributes["format"] == "tailcache targets"
        assert attributes["format_version"] in (1, 2)
        self.sizes = attributes
        corpus_attributes = json.loads((self.corpus / "zarr.json").read_text())["attributes"]["tailcache"]
        assert (corpus_attributes["format"], corpus_attributes["format_version"]) == ("tailcache corpus", 1)

    @staticmethod
    def array(path: Path) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path) + "/"}}
        return tensorstore.open(spec, read=True).result()

    def of_corpus(self, name: str) -> NDArray[Any]:
        return np.asarray(self.array(self.corpus / name).read().result())

    def constant(self, name: str) -> NDArray[Any]:
        return np.asarray(self.array(self.teacher / name).read().result())

    def slots(self) -> list[int]:
        """Section 4: the slot of every target, in order."""
        offsets = self.of_corpus("target_offsets").tolist()
        per_shard, shard_slots = self.sizes["rows_per_shard"], self.sizes["shard_slots"]
        found = []
        for row in range(self.sizes["num_rows"]):
            shard = row // per_shard
            for i in range(offsets[row + 1] - offsets[row]):
                found.append(shard * shard_slots + (offsets[row] - offsets[shard * per_shard]) + i)
        return found

    def decode(self) -> dict[str, list[Any]]:
        """Section 5, one position after another, in plain Python."""
        newest = self.sizes["format_version"] == 2
        fields = ["token_codes", "logprob_gaps"]
        if self.sizes["num_samples"]:
            fields.append("tail_sample_codes")
        else:
            assert not (self.teacher / "tail_sample_codes").exists()
        if self.sizes.get("num_classes", 1) > 1:
            fields.append("position_class")
        else:
            assert not (self.teacher / "position_class").exists()
            assert not (self.teacher / "class_tokens").exists()
        scalars = self.scalars() if newest else self.scalars_of_version_1()
        stored = {name: self.stored(name) for name in fields}
        order, levels = self.constant("vocabulary_order").tolist(), self.constant("logprob_levels").tolist()
        lists = self.constant("class_tokens").tolist() if "position_class" in stored else [[]]
        size = self.sizes.get("class_size", 0)
        top_k, num_samples = self.sizes["top_k"], self.sizes["num_samples"]
        columns = list(range(num_samples))
        if newest:
            columns.sort(key=lambda j: -math.gcd(j, num_samples))
        decoded: dict[str, list[Any]] = {"token_ids": [], "logprobs": [], "tail_samples": []}
        for t in range(len(stored["token_codes"])):
            gap, code = stored["logprob_gaps"][t].tolist(), stored["token_codes"][t].tolist()
            level, place = [gap[0]], [code[0]]
            for k in range(1, top_k):
                level.append(level[-1] + gap[k])
                place.append(code[k] + place[-1] if k >= 2 and gap[k] == 0 else code[k])
            chosen = lists[stored["position_class"][t]] if "position_class" in stored else []
            weights = [np.exp(-levels[value]) for value in level]
            head = scalars["log_head"][t]
            decoded["token_ids"].append([chosen[i] if i < size else order[i - size] for i in place])
            decoded["logprobs"].append([-levels[value] + head - np.log(sum(weights)) for value in level])
            difference = [0] * num_samples
            for i, value in enumerate(stored["tail_sample_codes"][t].tolist() if num_samples else []):
                difference[columns[i]] = value
            decoded["tail_samples"].append([order[sum(difference[: j + 1])] for j in range(num_samples)])
        return {**decoded, **scalars}

    def scalars(self) -> dict[str, list[Any]]:
        """Section 5, step 1."""

        def number(n: int) -> float:
            steps: int = self.sizes["scalar_steps"]
            if abs(n) == 2**30:
                return math.copysign(math.inf, n)
            if abs(n) <= 2**20:
                return n / steps
            return math.copysign(2**20 / steps * 2 ** ((abs(n) - 2**20) / 4096), n)

        def softplus(x: float) -> float:
            return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

        of = {
            name: [number(n) for n in self.stored(name).tolist()]
            for name in ("tail_logit", "tail_entropy", "target_logit")
        }
        return {
            "log_tail": [-softplus(-x) for x in of["tail_logit"]],
            "log_head": [-softplus(x) for x in of["tail_logit"]],
            "tail_entropy": of["tail_entropy"],
            "log_target": [-softplus(-x) for x in of["target_logit"]],
            "log_not_target": [-softplus(x) for x in of["target_logit"]],
        }

    def scalars_of_version_1(self) -> dict[str, list[Any]]:
        """Section 10."""
        of = {name: self.stored(name).tolist() for name in SCALARS}
        with np.errstate(divide="ignore"):
            head = [float(np.log(-np.expm1(value))) for value in of["log_tail"]]
        return {**of, "log_head": head}

    def stored(self, name: str) -> NDArray[Any]:
        """A per-position array at all targets, in order."""
        return np.asarray(self.array(self.teacher / name)[self.slots()].read().result())

    def log_z_tail(self) -> NDArray[np.float32]:
        """Section 5, step 7: [T, n]; without the attribute there is no array."""
        if "temperatures" not in self.sizes:
            assert not (self.teacher / "log_z_tail").exists()
            return np.empty((len(self.slots()), 0), np.float32)
        return self.stored("log_z_tail")

    def bfloat16(self, bits: NDArray[np.uint16]) -> NDArray[np.float64]:
        """Step 8: the upper half of a float32."""
        halves = np.frombuffer((bits.astype("<u4") * 65536).tobytes(), "<f4")
        return halves.reshape(bits.shape).astype(np.float64)

    def hidden_states(self) -> NDArray[np.float64]:
        """Step 8: [T, D]."""
        attribute, hidden = self.sizes["hidden"], self.stored("hidden")
        if attribute["kind"] == "bf16":
            assert not (self.teacher / "hidden_scale").exists()
            return self.bfloat16(hidden)
        return self.stored("hidden_scale").astype(np.float64)[:, None] * hidden.astype(np.float64)

    def head(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Step 8: weights [V, D] and biases [V]."""
        attribute, weight = self.sizes["hidden"], self.constant("head_weight")
        bias = self.constant("head_bias") if attribute["head_bias"] else np.zeros(len(weight))
        assert attribute["head_bias"] == (self.teacher / "head_bias").exists()
        wide = self.bfloat16(weight) if attribute["head_kind"] == "bfloat16" else weight.astype(np.float64)
        return wide, bias.astype(np.float64)

    def logits(self) -> NDArray[np.float64]:
        """Step 8: [T, V]."""
        attribute, (weight, bias) = self.sizes["hidden"], self.head()
        values: NDArray[np.float64] = attribute["logit_scale"] * (bias + self.hidden_states() @ weight.T)
        cap = attribute["soft_cap"]
        return values if cap is None else cap * np.tanh(values / cap)


def assert_same_as_reader(cache: Path, name: str) -> PageReader:
    page = PageReader(cache, name)
    decoded = page.decode()
    corpus = open_cache(cache).corpus
    targets = open_cache(cache).teacher(name).rows(0, corpus.num_rows)
    assert len(targets) == len(decoded["token_ids"]) == corpus.num_targets
    assert targets.token_ids.tolist() == decoded["token_ids"]
    assert targets.tail_samples.tolist() == decoded["tail_samples"]
    np.testing.assert_allclose(targets.logprobs, np.array(decoded["logprobs"]), rtol=1e-6, atol=1e-6)
    for field in SCALARS:
        np.testing.assert_allclose(getattr(targets, field), decoded[field], rtol=1e-6, atol=1e-37)
    np.testing.assert_array_equal(open_cache(cache).teacher(name).mean_tail, page.constant("mean_tail"))
    if page.sizes["format_version"] > 1:
        np.testing.assert_array_equal(page.constant("mean_tail"), page.constant("mean_tail_copy"))
    assert_optional_fields_are_the_same(cache, name, page)
    rows = corpus.rows(0, corpus.num_rows)
    for field, values in (
        ("tokens", rows.tokens),
        ("document_start", rows.document_start),
        ("supervised", rows.supervised),
        ("row_offsets", rows.offsets),
        ("held_out", rows.held_out),
        ("target_offsets", corpus.target_offsets(0, corpus.num_rows)),
        ("token_counts", corpus.token_counts),
    ):
        np.testing.assert_array_equal(page.of_corpus(field), values)
    # Section 3: what the targets are about, from the page's definition.
    tokens, starts = page.of_corpus("tokens"), page.of_corpus("document_start")
    bounds = page.of_corpus("row_offsets")
    positions = np.flatnonzero(page.of_corpus("supervised"))
    assert not starts[positions + 1].any()
    assert not set(positions + 1) & set(bounds.tolist())
    np.testing.assert_array_equal(tokens[positions + 1], corpus_next(corpus))
    return page


def assert_optional_fields_are_the_same(cache: Path, name: str, page: PageReader) -> None:
    teacher = open_cache(cache).teacher(name)
    targets = teacher.rows(0, teacher.corpus.num_rows, optional=teacher.optional)
    assert list(teacher.temperatures) == page.sizes.get("temperatures", [])
    np.testing.assert_array_equal(targets.log_z_tail, page.log_z_tail())
    if "hidden" not in page.sizes:
        assert not [p.name for p in page.teacher.iterdir() if p.name.startswith(("hidden", "head"))]
        return
    np.testing.assert_array_equal(targets.hidden, page.stored("hidden"))
    values = hidden_float32(targets.hidden, targets.hidden_scale)
    np.testing.assert_allclose(values, page.hidden_states(), rtol=1e-6)
    np.testing.assert_allclose(teacher.head().logits(values), page.logits(), atol=1e-4)


def assert_close_to_exact(exact: Exact, page: PageReader) -> None:
    decoded = page.decode()
    top_k = exact.layout.top_k
    ids = np.array(decoded["token_ids"])
    given = np.sort(exact.targets.token_ids)
    assert (np.sort(ids) == given).all()
    logprobs = np.take_along_axis(exact.logprobs, ids, axis=1)
    kl = (np.exp(logprobs) * (logprobs - np.array(decoded["logprobs"]))).sum(axis=1)
    assert np.abs(kl).max() < 1e-3
    assert ids.shape[1] == top_k
    target = exact.logprobs[np.arange(len(ids)), corpus_next(exact.corpus)]
    np.testing.assert_allclose(decoded["log_target"], target, rtol=2.0**-11, atol=2.0**-11)


@pytest.mark.parametrize(
    ("vocab_size", "top_k", "num_samples", "classes"),
    [
        (37, 5, 3, None), (37, 5, 0, (3, 4)), (37, 37, 0, (2, 37)), (37, 1, 1, None), (37, 2, 2, (5, 1)),
        (151_936, 20, 8, (2, 30)), (262_144, 64, 16, None),
    ],
)  # fmt: skip
def test_tensorstore_reads_every_field(
    tmp_path: Path, vocab_size: int, top_k: int, num_samples: int, classes: tuple[int, int] | None
) -> None:
    corpus = make_corpus(tmp_path, vocab_size=vocab_size)
    exact = make_exact(corpus, top_k=top_k, num_samples=num_samples, shard_positions=20, classes=classes)
    exact.write("t")
    page = assert_same_as_reader(tmp_path, "t")
    assert_close_to_exact(exact, page)
    wide = vocab_size > 65_536
    for path, narrow, broad in (
        (page.corpus / "tokens", "uint16", "uint32"),
        (page.teacher / "token_codes", "uint16", "uint32"),
        (page.teacher / "tail_logit", "int32", "int32"),
        (page.teacher / "logprob_gaps", "uint16", "uint16"),
    ):
        assert page.array(path).dtype.name == (broad if wide else narrow)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize(("head_kind", "bias", "soft_cap"), [("bfloat16", True, 9.0), ("float16", False, None)])
def test_tensorstore_reads_every_optional_field(
    tmp_path: Path, kind: HiddenKind, head_kind: HeadKind, bias: bool, soft_cap: float | None
) -> None:
    """And what they say is so: the hidden states give the distributions, the sums their tails at other temperatures."""
    head = make_head(37, 700, head_kind, bias=bias, scale=0.05, soft_cap=soft_cap)
    corpus = make_corpus(tmp_path)
    exact = make_exact(corpus, shard_positions=20, temperatures=(0.5, 3.0), hidden=kind, head=head)
    exact.write("t")
    page = assert_same_as_reader(tmp_path, "t")
    assert_close_to_exact(exact, page)
    assert page.array(page.teacher / "hidden").dtype.name == {"bf16": "uint16", "int8": "int8"}[kind]
    logits = page.logits()
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    np.testing.assert_allclose(logprobs, exact.logprobs, atol=1e-9)
    decoded = page.decode()
    beyond = logprobs.copy()
    np.put_along_axis(beyond, np.array(decoded["token_ids"]), -np.inf, axis=1)
    for i, tau in enumerate(page.sizes["temperatures"]):
        log_z_tail = page.log_z_tail()[:, i].astype(np.float64)
        np.testing.assert_allclose(log_z_tail, np.logaddexp.reduce(beyond / tau, axis=1), rtol=2.0**-13, atol=1e-30)
        a = np.logaddexp.reduce(np.array(decoded["logprobs"]) / tau, axis=1)
        log_z = np.logaddexp(a, log_z_tail)
        np.testing.assert_allclose(np.exp(a - log_z) + np.exp(log_z_tail - log_z), 1, rtol=1e-12)
        np.testing.assert_allclose(log_z, np.logaddexp.reduce(logprobs / tau, axis=1), atol=0.15 / tau)


def test_the_worked_example_of_optional_fields() -> None:
    assert_same_as_reader(GOLDEN / "v1_optional", "golden")
    page = assert_same_as_reader(GOLDEN / "v2_optional", "golden")
    text = " ".join(PAGE.read_text().split()).replace("\N{MINUS SIGN}", "-")
    weight, bias = page.head()
    token = page.decode()["token_ids"][3][0]
    hidden, attribute = page.hidden_states()[3], page.sizes["hidden"]
    printed = [
        "log_z_tail " + " ".join(repr(value) for value in page.log_z_tail()[3].tolist()),
        "hidden " + " ".join(str(value) for value in page.stored("hidden")[3].tolist()),
        f"hidden_scale {page.stored('hidden_scale')[3].item()!r}",
        f"tail_logit {page.stored('tail_logit')[3].item()}",
        ", ".join(str(value) for value in page.constant("head_weight")[token].tolist()),
        f"`head_bias[{token}]` = {bias[token]:.6f}",
        *(f"{value:.6f}" for value in (*hidden[:3], *weight[token, :3])),
        f"`logit_scale` {attribute['logit_scale']} and `soft_cap` {attribute['soft_cap']:g}",
    ]
    product = float(hidden @ weight[token])
    scaled = attribute["logit_scale"] * (product + bias[token])
    logits = page.logits()[3]
    log_total = float(np.logaddexp.reduce(logits))
    printed.append(f"their product is {product:.6f}, with the bias {product + bias[token]:.6f}")
    printed.append(f"times {attribute['logit_scale']} it is {scaled:.6f}, capped 8 · tanh({scaled:.6f} / 8) = ")
    printed.append(f"= {logits[token]:.6f}; - the log-sum-exp of the twelve logits is {log_total:.6f}")
    printed.append(f"the log-prob of token {token} by this way {logits[token] - log_total:.6f}")
    printed.append(f"the most likely token is {token}, with log-prob {page.decode()['logprobs'][3][0]:.6f}")
    for words in printed:
        assert words in text, words


def test_large_ids_are_really_there(tmp_path: Path) -> None:
    """The last ids of a large vocabulary as token, as top-1 and as draw."""
    vocab_size = 262_144
    corpus = make_corpus(tmp_path, vocab_size=vocab_size, lengths=(6, 5))
    logits = np.zeros((corpus.num_targets, vocab_size))
    logits[:, -1], logits[:, -2] = 30.0, 20.0
    exact = make_exact(corpus, top_k=1, num_samples=4, logits_TV=logits)
    exact.write("t")
    decoded = assert_same_as_reader(tmp_path, "t").decode()
    assert np.array(decoded["token_ids"]).min() == vocab_size - 1
    assert vocab_size - 2 in np.array(decoded["tail_samples"])


def page_text() -> str:
    return " ".join(PAGE.read_text().split()).replace("\N{MINUS SIGN}", "-")


def test_golden_cache_and_the_worked_example() -> None:
    """The numbers printed on the page are those of the golden cache."""
    page = assert_same_as_reader(GOLDEN / "v2", "golden")
    assert page.slots()[3] == 3
    assert page.slots()[7] == 8
    text, decoded = page_text(), page.decode()
    assert decoded["token_ids"][3] == [2, 6, 8, 3, 9]
    assert decoded["tail_samples"][3] == [10, 10, 11, 7]
    stored = {
        "logprob_gaps": [124, 67, 0, 0, 0],
        "token_codes": [12, 2, 1, 4, 1],
        "position_class": [1],
        "tail_sample_codes": [6, 1, 0, 2],
        "tail_logit": [-1549],
        "tail_entropy": [1141],
        "target_logit": [-4185],
    }
    for name, values in stored.items():
        assert np.atleast_1d(page.stored(name)[3]).tolist() == values
        assert f"{name} {' '.join(str(value) for value in values)}" in text
    for name in (*SCALARS, "log_head"):
        assert f"`{name}` = {decoded[name][3]:.6f}" in text
    assert ", ".join(str(token) for token in page.constant("vocabulary_order")) in text
    assert "`class_tokens[1]` is " + ", ".join(str(token) for token in page.constant("class_tokens")[1]) in text
    for value in decoded["logprobs"][3][:2]:
        assert f"{value:.6f}" in text
    sizes = "V = {vocab_size}, K = {top_k}, m = {num_samples}".format(**page.sizes)
    assert sizes in text
    assert "C = {num_classes}, M = {class_size}, `scalar_steps` {scalar_steps}".format(**page.sizes) in text


def test_the_worked_example_of_version_1() -> None:
    page = assert_same_as_reader(GOLDEN / "v1", "golden")
    text, decoded = page_text(), page.decode()
    assert decoded["token_ids"][3] == [2, 6, 3, 9, 8]
    assert decoded["tail_samples"][3] == [10, 5]
    stored = {"logprob_gaps": [124, 67, 0, 0, 0], "token_codes": [8, 2, 1, 1, 1], "tail_sample_codes": [6, 5]}
    for name, values in stored.items():
        assert page.stored(name)[3].tolist() == values
        assert f"{name} {' '.join(str(value) for value in values)}" in text
    for name in SCALARS:
        assert f"{name} {decoded[name][3]!r}" in text
    for value in decoded["logprobs"][3][:2]:
        assert f"{value:.6f}" in text


STANDARD_CODECS = {"transpose", "bytes", "blosc", "crc32c", "sharding_indexed"}


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, []),
        ({"classes": (2, 8)}, []),
        (
            {"temperatures": (2.0,), "hidden": "int8"},
            ["log_z_tail", "hidden", "hidden_scale", "head_weight", "head_bias"],
        ),
    ],
    ids=["plain", "classes", "all fields"],
)
def test_metadata_uses_standard_names_only(tmp_path: Path, options: dict[str, Any], more: list[str]) -> None:
    make_exact(make_corpus(tmp_path), **options).write("t")
    paths = sorted(tmp_path.rglob("zarr.json"))
    assert len(paths) == 2 + 7 + (5 if "classes" in options else 4) + (7 if "classes" in options else 6) + len(more)
    assert {path.parent.name for path in paths} >= set(more)
    transposed = []
    for path in paths:
        metadata = json.loads(path.read_text())
        assert metadata["zarr_format"] == 3
        if metadata["node_type"] == "group":
            continue
        assert metadata["chunk_grid"]["name"] == "regular"
        assert metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        assert not metadata.get("storage_transformers")
        types = {"bool", "uint8", "uint16", "uint32", "int32", "int64", "float32", *(["int8"] if more else [])}
        assert metadata["data_type"] in types
        (sharding,) = metadata["codecs"]
        assert sharding["name"] == "sharding_indexed"
        inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        index = [codec["name"] for codec in sharding["configuration"]["index_codecs"]]
        assert {*inner, *index} <= STANDARD_CODECS
        assert inner[-3:] == ["bytes", "blosc", "crc32c"]
        assert index == ["bytes", "crc32c"]
        assert sharding["configuration"]["index_location"] == "end"
        if inner[0] == "transpose":
            transposed.append(path.parent.name)
    assert sorted(transposed) == ["log_z_tail"] * bool(more) + ["logprob_gaps"]


def canonical(record: Any) -> bytes:
    """Section 7."""
    return (json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def chunk_seal(data: bytes, num_chunks: int) -> str:
    index = data[-(16 * num_chunks + 4) :]
    hashed = index
    for i in range(num_chunks):
        offset, length = (int.from_bytes(index[16 * i + 8 * j : 16 * i + 8 * j + 8], "little") for j in (0, 1))
        if length != 2**64 - 1:
            hashed += data[offset + length - 4 : offset + length]
    return sha256(hashed)


@pytest.mark.parametrize("options", [{}, {"temperatures": (2.0,), "hidden": "bf16"}], ids=["plain", "all fields"])
def test_sealed_records_follow_the_page(tmp_path: Path, options: dict[str, Any]) -> None:
    make_exact(make_corpus(tmp_path), shard_positions=20, **options).write("t")
    corpus, teacher = tmp_path / "corpus", tmp_path / "teachers" / "t"
    commits = sorted((teacher / "commits").iterdir())
    records = {}
    for path in [
        corpus / "manifest.json",
        corpus / "checksums.json",
        teacher / "manifest.json",
        teacher / "manifest_copy.json",
        teacher / "complete.json",
        *commits,
    ]:
        data = path.read_bytes()
        record = json.loads(data)
        assert data == canonical(record)
        seal = record.pop("sha256")
        assert seal == sha256(canonical(record))
        records[path] = record
    assert [path.name for path in commits] == [f"{i:08d}.json" for i in range(len(commits))]

    checksums, corpus_manifest = records[corpus / "checksums.json"], records[corpus / "manifest.json"]
    files = {str(p.relative_to(corpus)): p.read_bytes() for p in corpus.rglob("*") if p.is_file()}
    for sealed in ("manifest.json", "checksums.json"):
        files.pop(sealed)
    assert checksums["files"] == {name: sha256(data) for name, data in files.items()}
    assert checksums["chunks"] == {name: chunk_seal(data, 64) for name, data in files.items() if "/c/" in name}
    assert corpus_manifest["checksums"] == sha256((corpus / "checksums.json").read_bytes())
    page = PageReader(tmp_path, "t")
    content = {
        "tokens": sha256(page.of_corpus("tokens").astype("<u4").tobytes()),
        "document_start": sha256(page.of_corpus("document_start").astype("u1").tobytes()),
        "supervised": sha256(page.of_corpus("supervised").astype("u1").tobytes()),
        "held_out": sha256(page.of_corpus("held_out").astype("u1").tobytes()),
        "row_lengths": sha256(np.diff(page.of_corpus("row_offsets")).astype("<u8").tobytes()),
    }
    assert corpus_manifest["content"] == content
    assert corpus_manifest["hash"] == sha256(canonical({**content, "vocab_size": 37}))

    assert (teacher / "manifest_copy.json").read_bytes() == (teacher / "manifest.json").read_bytes()
    manifest, complete = records[teacher / "manifest.json"], records[teacher / "complete.json"]
    assert set(manifest) == {"name", "corpus_hash", "layout", "settings", "provenance", "files"}
    assert manifest["corpus_hash"] == corpus_manifest["hash"]
    assert manifest["layout"] == page.sizes
    seal = sha256((teacher / "manifest.json").read_bytes())
    covered = dict(manifest["files"])
    sizes = 0
    for shard, path in enumerate(commits):
        record = records[path]
        assert set(record) == {"shard", "manifest", "rows", "positions", "files", "tail_sum", "sums"}
        assert (record["shard"], record["manifest"]) == (shard, seal)
        for name, entry in record["files"].items():
            data = (teacher / name).read_bytes()
            num_chunks = page.sizes["shard_slots"] // page.sizes["chunk"]
            assert entry == {"bytes": len(data), "sha256": sha256(data), "chunks": chunk_seal(data, num_chunks)}
            covered[name] = entry["sha256"]
            sizes += len(data)
    assert set(complete) == {"manifest", "num_shards", "positions", "bytes", "commits", "files"}
    assert complete["bytes"] == sizes
    assert complete["commits"] == sha256(b"".join(path.read_bytes() for path in commits))
    covered.update(complete["files"])
    others = {str(p.relative_to(teacher)): p for p in teacher.rglob("*") if p.is_file() and p not in records}
    assert covered == {name: sha256(path.read_bytes()) for name, path in others.items()}


def test_leftover_slots_are_not_stored(tmp_path: Path) -> None:
    """A chunk wholly behind an object's last value is absent from the index; a chunk of zeros is not."""
    corpus = make_corpus(tmp_path, lengths=(30, 3, 3))
    exact = make_exact(corpus, top_k=2, num_samples=0, shard_positions=1, chunk=4)
    exact.write("t")
    last = tmp_path / "teachers" / "t" / "tail_logit" / "c" / "2"
    num_chunks = exact.layout.shard_slots // 4
    assert num_chunks > 3
    index = np.frombuffer(last.read_bytes()[-(16 * num_chunks + 4) : -4], "<u8").reshape(-1, 2)
    stored = index[:, 0] != 2**64 - 1
    assert stored.tolist() == [True] + [False] * (num_chunks - 1)
    targets = exact.shards[0][0]
    spec = exact.layout.fields()["tail_entropy"]
    data = spec.encode(np.zeros(len(targets), np.int32))
    assert data is not None
    index = np.frombuffer(data[-(16 * num_chunks + 4) : -4], "<u8").reshape(-1, 2)
    assert (index[:, 0] != 2**64 - 1).sum() == -(-len(targets) // 4)
