"""A cache may come from anywhere: reading one runs no code, leaves its folder alone, and takes bounded memory."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tally
from forge import edit, edit_json, reseal, with_chunk, with_index
from places import cache_folder
from storage_fixtures import Exact, make_corpus, make_exact, tree

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.compiled import SWITCH
from tailcache.storage.corpus import corpus_arrays
from tailcache.storage.errors import CorruptError, FormatError, StudentError
from tailcache.storage.local_place import LocalPlace
from tailcache.storage.objects import read_array
from tailcache.storage.reader import open_cache
from tailcache.storage.verify import verify
from tailcache.trainers.student import corpus_tokenizer

ROOT = Path(__file__).parent.parent
MODULES = [
    p for folder in ("storage", "pipeline", "trainers", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))
]
PICKLES = {"pickle", "_pickle", "cPickle", "pickletools", "marshal", "shelve", "dbm", "dill", "cloudpickle", "joblib"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
CALLS_LIBRARIES = "chunk_loops.py"
LIBRARIES = {"ctypes.CDLL(None)", "ctypes.CDLL(_crc32c.__file__)", "ctypes.CDLL(blosc.__file__)"}
"""Those of imported packages and of the process itself; never what a cache names."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_runs_what_it_reads(path: Path) -> None:
    storage = path.parent.name == "storage"
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if ast.unparse(node) == "from importlib.util import find_spec":
                continue  # says whether a package is there, and loads none
            names = [node.module or "", *(alias.name for alias in node.names)]
        assert not PICKLES & {name.split(".")[0] for name in names}, f"{path}:{getattr(node, 'lineno', 0)}: a pickle"
        if storage:
            loads = {name for name in names if name.split(".")[0] in ("subprocess", "ctypes", "importlib")}
            loads -= {"importlib.metadata"}  # which says versions
            assert not loads - ({"ctypes"} if path.name == CALLS_LIBRARIES else set()), path
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            where = f"{path}:{node.lineno}: {text}"
            assert text not in RUNS_CODE, where
            assert not text.startswith("ctypes.CDLL") or not storage or ast.unparse(node) in LIBRARIES, where
            assert not text.startswith(("os.system", "os.popen", "os.exec", "os.spawn")), where
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("allow_pickle", "False") == "False", where
            assert given.get("trust_remote_code") != "True", where
            if text.endswith("torch.load"):
                assert given.get("weights_only") == "True", where


# -- hostile caches ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    """A sound cache with every field."""
    cache = tmp_path_factory.mktemp("sound")
    exact = make_exact(make_corpus(cache), shard_positions=25, chunk=8, temperatures=(2.0,), hidden="int8")
    exact.write("t")
    return exact


Damage = Callable[[Path, dict[str, ArraySpec]], None]
HUGE = (1 << 31) - 1


def more_shards(cache: Path, specs: dict[str, ArraySpec]) -> None:
    """Corpus and teacher agree on them."""
    many = 1 << 40
    edit(
        cache / "corpus" / "manifest.json",
        lambda values: values.update(num_rows=many, num_tokens=4 * many, num_targets=many),
    )
    edit(
        cache / TEACHER / "manifest.json",
        lambda values: values["layout"].update(num_rows=many, num_positions=many, rows_per_shard=1),
    )


def blosc_sizes(decoded: int | None, encoded: int | None = None) -> Callable[[bytes], bytes]:
    """The header of a chunk, with other sizes."""

    def change(payload: bytes) -> bytes:
        header = bytearray(payload[:16])
        if decoded is not None:
            header[4:8] = decoded.to_bytes(4, "little")
        if encoded is not None:
            header[12:16] = encoded.to_bytes(4, "little")
        return bytes(header) + payload[16:]

    return change


def bomb(spec: ArraySpec, size: int) -> bytes:
    """An object with a chunk of many zeros in a few bytes."""
    from numcodecs import blosc

    chunk = bytes(blosc.compress(bytes(size), b"zstd", 9, 1))
    number = spec.shard // spec.chunk
    return with_index([chunk], [(0, len(chunk) + 4)] * number)


def on_object(name: str, change: Callable[[ArraySpec, bytes], bytes]) -> Damage:
    def damage(cache: Path, specs: dict[str, ArraySpec]) -> None:
        path = cache / "teachers" / "t" / specs[name].object_path(0)
        path.write_bytes(change(specs[name], path.read_bytes()))

    return damage


def on_values(name: str, change: Callable[[Any], Any]) -> Damage:
    """Other values in an array of the corpus or in a constant, encoded as they should be."""

    def damage(cache: Path, specs: dict[str, ArraySpec]) -> None:
        group = "corpus" if name in corpus_arrays(37) else TEACHER
        spec = corpus_arrays(37).get(name) or constants[name]
        length = {"row_offsets": 11, "target_offsets": 11}.get(name, 37)
        values = read_array(LocalPlace(cache / group), spec, length, "sound")
        data = spec.encode(np.asarray(change(values.copy()), spec.dtype))
        assert data is not None
        (cache / group / spec.object_path(0)).write_bytes(data)

    constants = {
        name: ArraySpec(name=name, dtype="uint32", chunk=1 << 16, shard=1 << 22) for name in ("vocabulary_order",)
    }
    return damage


def on_record(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda cache, _: edit(cache / name, change)


def as_bytes(name: str, data: bytes) -> Damage:
    def damage(cache: Path, specs: dict[str, ArraySpec]) -> None:
        (cache / name).write_bytes(data)

    return damage


def on_json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda cache, _: edit_json(cache / name, change)


def index_of(entries: Callable[[ArraySpec, int], list[tuple[int, int]]]) -> Callable[[ArraySpec, bytes], bytes]:
    def change(spec: ArraySpec, data: bytes) -> bytes:
        first = int.from_bytes(data[-(16 * (spec.shard // spec.chunk) + 4) :][8:16], "little")
        return with_index([data[: first - 4]], entries(spec, first))

    return change


def entries(first: tuple[int, int]) -> Callable[[ArraySpec, int], list[tuple[int, int]]]:
    return lambda spec, length: [first] + [(0, length)] * (spec.shard // spec.chunk - 1)


def encoded(spec: ArraySpec, values: Any) -> bytes:
    data = spec.encode(values)
    assert data is not None
    return data


def replaced_by(data: bytes) -> Callable[[ArraySpec, bytes], bytes]:
    return lambda spec, old: data


PICKLE = b"cos\nsystem\n(S'touch /tmp/tailcache-was-here'\ntR."
TEACHER = "teachers/t"


def set_codec(values: dict[str, Any], codec: Any) -> None:
    values["codecs"][0]["configuration"]["codecs"][-2] = codec


HOSTILE: dict[str, Damage] = {
    "a chunk says 2 GiB": on_object("tail_entropy", lambda spec, data: with_chunk(spec, data, blosc_sizes(HUGE))),
    "a chunk says one byte more": on_object("tail_entropy", lambda spec, data: with_chunk(spec, data, blosc_sizes(33))),
    "a chunk says it has more bytes than it has": on_object(
        "tail_entropy", lambda spec, data: with_chunk(spec, data, blosc_sizes(None, HUGE))
    ),
    "a chunk of 1 GiB of zeros": on_object("logprob_gaps", lambda spec, data: bomb(spec, 1 << 30)),
    "an index beyond the file": on_object("tail_entropy", index_of(entries((1 << 40, 40)))),
    "an index of huge lengths": on_object("tail_entropy", index_of(entries((0, 1 << 62)))),
    "an index that wraps around": on_object("tail_entropy", index_of(entries(((1 << 64) - 8, 40)))),
    "an index of the index": on_object("token_codes", index_of(lambda spec, n: [(n, 20)] * (spec.shard // spec.chunk))),
    "an object that is a pickle": on_object("token_codes", replaced_by(PICKLE)),
    "an empty object": on_object("tail_sample_codes", replaced_by(b"")),
    "a manifest that is a pickle": as_bytes(f"{TEACHER}/manifest.json", PICKLE),
    "a manifest with a path outside": on_record(
        f"{TEACHER}/manifest.json", lambda values: values["files"].update({"../../../outside": "0" * 64})
    ),
    "a corpus with a path outside": on_record(
        "corpus/checksums.json", lambda values: values["files"].update({"tokenizer/../../../outside": "0" * 64})
    ),
    "a corpus with an absolute path": on_record(
        "corpus/checksums.json", lambda values: values["files"].update({"/etc/passwd": "0" * 64})
    ),
    "a commit with a path outside": on_record(
        f"{TEACHER}/commits/00000000.json",
        lambda values: values["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64, "chunks": "0" * 64}}),
    ),
    "a finished record with a path outside": on_record(
        f"{TEACHER}/complete.json", lambda values: values["files"].update({"../../../x": "0" * 64})
    ),
    "a layout of huge chunks": on_record(
        f"{TEACHER}/manifest.json", lambda values: values["layout"].update(chunk=1 << 40, shard_slots=1 << 40)
    ),
    "a layout of a huge vocabulary": on_record(
        f"{TEACHER}/manifest.json", lambda values: values["layout"].update(vocab_size=1 << 31)
    ),
    "a layout of more rows than the corpus": on_record(
        f"{TEACHER}/manifest.json", lambda values: values["layout"].update(num_rows=1 << 40, rows_per_shard=1 << 39)
    ),
    "a layout of a huge head": on_record(
        f"{TEACHER}/manifest.json", lambda values: values["layout"]["hidden"].update(width=1 << 30)
    ),
    "a corpus of a huge vocabulary": on_record(
        "corpus/manifest.json", lambda values: values.update(vocab_size=1 << 40)
    ),
    "a corpus of more tokens than it has": on_record(
        "corpus/manifest.json", lambda values: values.update(num_tokens=1 << 40)
    ),
    "a codec that unpickles": on_json(
        f"{TEACHER}/tail_entropy/zarr.json",
        lambda values: set_codec(values, {"name": "numcodecs.pickle", "configuration": {}}),
    ),
    "a constant with another codec": on_json(
        f"{TEACHER}/mean_tail/zarr.json", lambda values: set_codec(values, {"name": "zstd", "configuration": {}})
    ),
    "a constant of another shape": on_json(
        f"{TEACHER}/vocabulary_order/zarr.json", lambda values: values.update(shape=[1 << 40])
    ),
    "tokens of another type": on_json("corpus/tokens/zarr.json", lambda values: values.update(data_type="string")),
    "row offsets that go back": on_values("row_offsets", lambda values: values[::-1]),
    "row offsets beyond all tokens": on_values("row_offsets", lambda values: values + (1 << 40)),
    "negative row offsets": on_values("row_offsets", lambda values: -values),
    "target offsets beyond all targets": on_values("target_offsets", lambda values: values * (1 << 40)),
    "target offsets of other rows": on_values("target_offsets", lambda values: np.roll(values, 3)),
    "negative target offsets": on_values("target_offsets", lambda values: values - (1 << 50)),
    "an order of the vocabulary with tokens that are not there": on_values(
        "vocabulary_order", lambda values: values + 1_000_000
    ),
    "an order of the vocabulary with one token everywhere": on_values("vocabulary_order", lambda values: values * 0),
    "codes beyond every table": on_object(
        "token_codes", lambda spec, data: encoded(spec, np.full((spec.shard, 5), 65_535, np.uint16))
    ),
    "levels beyond every table": on_object(
        "logprob_gaps", lambda spec, data: encoded(spec, np.full((spec.shard, 5), 65_535, np.uint16))
    ),
    "draws beyond every table": on_object(
        "tail_sample_codes", lambda spec, data: encoded(spec, np.full((spec.shard, 3), 65_535, np.uint16))
    ),
    "numbers that stand for nothing": on_object(
        "tail_entropy", lambda spec, data: encoded(spec, np.full(spec.shard, (1 << 31) - 1, np.int32))
    ),
    "more rows and shards than anybody has": more_shards,
    "values deep within each other": as_bytes(
        f"{TEACHER}/complete.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    ),
    "a record of 70 MB": as_bytes(f"{TEACHER}/complete.json", b"[" + b"0," * (35 << 20)),
    "a corpus that is a pickle": as_bytes("corpus/manifest.json", PICKLE),
}  # fmt: skip
HARMLESS = {
    "a codec that unpickles", "a constant with another codec", "a constant of another shape", "tokens of another type",
}  # fmt: skip
"""Only what is not read to decode is wrong: reading may give the right values, verifying has to say it."""


def make_hostile(made: Exact, folder: Path) -> dict[str, Path]:
    caches = {}
    for number, (name, damage) in enumerate(HOSTILE.items()):
        cache = folder / str(number)
        shutil.copytree(cache_folder(made.corpus), cache)
        specs = made.layout.fields()
        damage(cache, specs)
        with contextlib.suppress(CorruptError):  # what is no record has no seal
            reseal(cache, specs)
        caches[name] = cache
    return caches


@pytest.mark.parametrize("loops", ["auto", "always"])
def test_hostile_caches_are_refused_by_name_and_nothing_else_happens(
    made: Exact, tmp_path: Path, tally: Tally, loops: str
) -> None:
    if loops == "always":
        pytest.importorskip("numba")
    caches = make_hostile(made, tmp_path)
    sound = tmp_path / "sound"
    shutil.copytree(cache_folder(made.corpus), sound)
    before = {name: tree(cache) for name, cache in caches.items()}
    command = [sys.executable, str(Path(__file__).parent / "hostile_child.py"), str(sound), str(sound)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment[SWITCH] = loops
    done = subprocess.run(
        [*command, *map(str, caches.values())], capture_output=True, text=True, env=environment, timeout=250
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    good = results[str(sound)]
    assert good["verify"] == []
    assert good["seen"] == []
    for name, cache in caches.items():
        found = results[str(cache)]
        assert found["seen"] == [], name
        assert "UNNAMED" not in json.dumps(found), f"{name}: {found}"
        assert found["verify"], f"{name}: verify found nothing"
        values = [found[key] == good[key] for key in ("rows", "constants", "corpus")]
        assert all(isinstance(found[key], str) or found[key] == good[key] for key in ("rows", "constants", "corpus")), (
            name
        )
        assert not all(values) or name in HARMLESS, f"{name} was read as if nothing were wrong"
        assert tree(cache) == before[name], f"{name}: reading changed the cache"
    assert not (tmp_path / "outside").exists()
    tally("hostile caches with right checksums, opened, read and verified under an audit hook", len(caches))


def test_a_tokenizer_with_code_is_refused_without_asking(
    made: Exact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked whether it may run: it may not."""
    cache, mark = tmp_path / "cache", tmp_path / "was-here"
    shutil.copytree(cache_folder(made.corpus), cache)
    folder = cache / "corpus" / "tokenizer"
    settings = {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["code.Hostile", "code.Hostile"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Hostile: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))

    def add(name: str) -> None:
        edit(cache / "corpus/checksums.json", lambda values: values["files"].update({f"tokenizer/{name}": "0" * 64}))
        reseal(cache, made.layout.fields())

    with pytest.raises(CorruptError, match=r"found 'code.py' too, which no record of the corpus knows"):
        corpus_tokenizer(open_cache(cache).corpus)
    add("tokenizer_config.json")
    add("code.py")
    with pytest.raises(FormatError, match=r"paths within the tokenizer's folder, found 'tokenizer/code.py'"):
        corpus_tokenizer(open_cache(cache).corpus)
    edit(cache / "corpus/checksums.json", lambda values: values["files"].pop("tokenizer/code.py"))
    (folder / "code.py").unlink()
    reseal(cache, made.layout.fields())
    with pytest.raises(StudentError, match="expected a tokenizer that can be loaded without running code of its own"):
        corpus_tokenizer(open_cache(cache).corpus)
    assert not mark.exists()


def test_links_are_reported_and_lead_nowhere(made: Exact, tmp_path: Path) -> None:
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    shutil.copytree(cache_folder(made.corpus), cache)
    shutil.copytree(cache / TEACHER / "commits", outside)
    secret = tmp_path / "secret"
    secret.write_bytes(b"not yours")
    shutil.rmtree(cache / TEACHER / "commits")
    (cache / TEACHER / "commits").symlink_to(outside)
    (cache / "corpus/tokenizer/tokenizer.json").unlink()
    (cache / "corpus/tokenizer/tokenizer.json").symlink_to(secret)
    faults = {fault.path: fault for fault in verify(cache)}
    for name in (f"{TEACHER}/commits", "corpus/tokenizer/tokenizer.json"):
        assert name in faults
    assert "a symbolic link, which a cache never has" in str(faults[f"{TEACHER}/commits"])
    with pytest.raises(CorruptError, match=r"tokenizer/tokenizer\.json"):
        _ = open_cache(cache).corpus.tokenizer_dir
    with pytest.raises(CorruptError, match="found a symbolic link"):
        (open_cache(cache).place / TEACHER).write("commits/00000000.json", b"")
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {
        path.name: path.read_bytes() for path in (cache_folder(made.corpus) / TEACHER / "commits").iterdir()
    }
