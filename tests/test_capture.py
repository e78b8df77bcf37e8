"""Capture from end to end: the right distributions at the right positions, and the same bytes whatever happens."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_fixtures import (
    Part,
    config,
    document_logits,
    folder_hashes,
    make_rows,
    pack,
    random_documents,
    save_teacher,
    tiny_model,
    with_a_twist,
    write_corpus,
)
from children import run_child
from faults import failing_at
from numpy.typing import NDArray
from tokenizer_fixtures import build_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from tailcache.pipeline import capture as capture_module
from tailcache.pipeline.capture import capture, capture_rows
from tailcache.pipeline.teacher import Teacher
from tailcache.scripts import cli
from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Rows
from tailcache.storage.errors import (
    ConfigError,
    IncompleteError,
    MismatchError,
    StorageError,
    TeacherError,
)
from tailcache.storage.reader import open_cache
from tailcache.storage.targets import TargetsWriter
from tailcache.storage.verify import verify

V = 100
DOCUMENTS = random_documents(60, vocab_size=V, seed=1)
FLOATS = ("logprobs", "log_tail", "tail_entropy", "log_target", "log_not_target")


def run(cache: Path, teacher: Teacher, **changes: Any) -> Any:
    return capture(config(cache, **changes), teacher=teacher, show_progress=False)


def rows_targets(teacher: Teacher, rows: Rows, **changes: Any) -> tuple[Targets, NDArray[np.float64]]:
    settings: dict[str, Any] = {
        "first_target": 0, "key": 5, "top_k": 8, "num_samples": 4, "batch_positions": 64, **changes,
    }  # fmt: skip
    return capture_rows(teacher, rows, **settings)


def assert_close(ours: Targets, others: Targets, atol: float = 2e-5) -> None:
    """Equal up to the noise of float32 sums; draws and ids may differ where two numbers are that close."""
    assert len(ours) == len(others)
    for name in FLOATS:
        np.testing.assert_allclose(getattr(ours, name), getattr(others, name), atol=atol, rtol=1e-5, err_msg=name)
    assert (ours.token_ids != others.token_ids).mean() < 0.001
    assert (ours.tail_samples != others.tail_samples).mean() < 0.005


def assert_is(
    targets: Targets,
    logits: NDArray[np.float64],
    next_tokens: NDArray[np.int64],
    *,
    atol: float,
    mean_kl: float = 1e-8,
    max_kl: float = 1e-7,
) -> None:
    """The targets are those of dense distributions [T, V].

    Args:
      targets: as captured, or as read back.
      logits: of each position, from the document alone.
      next_tokens: of each position.
      atol: nats, for everything but the head's own log-probs.
      mean_kl: nats, from the dense head and tail to the stored ones.
      max_kl: of any position.
    """
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    every = np.arange(len(logprobs))
    ids = targets.token_ids.astype(np.int64)
    k = ids.shape[1]
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "a token twice"
    own = np.take_along_axis(logprobs, ids, axis=1)
    np.testing.assert_allclose(-np.sort(-own, axis=1), -np.sort(-logprobs, axis=1)[:, :k], atol=atol)
    tail = np.exp(logprobs)
    np.put_along_axis(tail, ids, 0.0, axis=1)
    alpha = tail.sum(axis=1)
    np.testing.assert_allclose(np.exp(targets.log_tail), alpha, atol=atol)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = (np.exp(own) * (own - targets.logprobs)).sum(axis=1)
        kl += np.where(alpha > 0, alpha * (np.log(alpha) - targets.log_tail), 0.0)
        shares = tail / alpha[:, None]
        entropy = -np.where(shares > 0, shares * np.log(shares), 0.0).sum(axis=1)
    assert kl.mean() <= mean_kl
    assert kl.max() <= max_kl
    assert kl.min() >= -1e-5
    np.testing.assert_allclose(targets.tail_entropy, np.nan_to_num(entropy), atol=atol)
    log_target = logprobs[every, next_tokens]
    np.testing.assert_allclose(targets.log_target, log_target, atol=atol)
    np.testing.assert_allclose(np.exp(targets.log_not_target), 1 - np.exp(log_target), atol=atol)
    for draws in targets.tail_samples.T:
        assert (tail[every, draws] > 0).all(), "drawn from the head"


CODED: dict[str, float] = {"atol": 2e-3, "mean_kl": 1e-5, "max_kl": 1e-3}
"""What storing may cost: the bound on the head, and half a step, 1/2048 nat, of the scalars."""


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(tiny_model("llama", V), vocab_size=V)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("corpus") / "cache"
    write_corpus(cache, pack(DOCUMENTS, 3), vocab_size=V, held_out_every=4)
    return cache


@pytest.fixture
def cache(corpus: Path, tmp_path: Path) -> Path:
    """A fresh cache with the corpus of three documents to a row, and no teacher."""
    shutil.copytree(corpus, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory, teacher: Teacher) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("uninterrupted") / "cache"
    shutil.copytree(corpus, cache)
    report = run(cache, teacher)
    assert report.num_shards >= 8
    return folder_hashes(cache / "teachers" / "t")


# -- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_holds_the_teachers_distributions(cache: Path, dtype: torch.dtype) -> None:
    model = tiny_model("llama", V).to(dtype)
    run(cache, Teacher(model, vocab_size=V))
    found = open_cache(cache).teacher("t")
    exact = torch.nn.Linear(32, V, bias=False)
    exact.weight = torch.nn.Parameter(model.lm_head.weight.detach().double())
    model.lm_head.forward = lambda hidden: exact(hidden.double())  # the same trunk, a float64 head
    logits = document_logits(model, DOCUMENTS, V)
    next_tokens = np.concatenate([d[1:] for d in DOCUMENTS])
    # The trunk rounds to its own type, and differently in batches of other shapes.
    bounds = CODED if dtype == torch.float32 else {"atol": 0.15, "mean_kl": 1e-3, "max_kl": 0.02}
    assert_is(found.rows(0, 20), logits, next_tokens, **bounds)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    tail = np.exp(logprobs)
    np.put_along_axis(tail, np.argsort(-logprobs, axis=1)[:, :8], 0.0, axis=1)
    mean = (tail / tail.sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(found.mean_tail, mean, atol=2e-6 if dtype == torch.float32 else 1e-3)
    assert found.mean_tail.sum() == pytest.approx(1, abs=1e-5)
    assert verify(cache) == []


@pytest.mark.parametrize("top_k", [1, V - 1, V])
def test_the_smallest_and_the_largest_head(cache: Path, teacher: Teacher, top_k: int) -> None:
    run(cache, teacher, top_k=top_k, num_samples=0)
    targets = open_cache(cache).teacher("t").rows(0, 20)
    next_tokens = np.concatenate([d[1:] for d in DOCUMENTS])
    assert_is(targets, document_logits(teacher.model, DOCUMENTS, V), next_tokens, **CODED)
    assert targets.tail_samples.shape[1] == 0
    if top_k == V:
        assert (targets.log_tail == -np.inf).all()
        assert not targets.tail_entropy.any()


def test_what_a_capture_says_of_itself(cache: Path, teacher: Teacher) -> None:
    report = run(cache, teacher)
    found = open_cache(cache)
    assert report.positions == found.corpus.num_targets == sum(len(d) - 1 for d in DOCUMENTS)
    assert (report.resumed_shards, report.logits.split(" (")[0]) == (0, "head applied in chunks with float32 results")
    manifest = found.teacher("t").manifest
    settings = manifest["settings"]
    assert (settings["dtype"], settings["device"], settings["head_width"]) == ("float32", "cpu", V)
    assert settings["weights"] == teacher.weights_hash()
    assert (settings["sampling"], settings["full_tail"]) == ("systematic, thinned", 0.25)
    assert settings["model"]["model_type"] == "llama"
    assert {"torch", "transformers", "tailcache"} <= settings["versions"].keys()
    assert manifest["provenance"]["config"]["top_k"] == 8
    text = json.dumps(manifest)
    assert str(cache) not in text, "a place on this machine would make the bytes differ elsewhere"
    assert str(cache.parent) not in text


@pytest.mark.parametrize(("vocab_size", "kind"), [(151_936, "llama"), (262_144, "llama")])
def test_large_vocabularies(tmp_path: Path, vocab_size: int, kind: str) -> None:
    """Ids beyond 16 and 17 bits, with a head that is padded as Qwen's is."""
    documents = random_documents(6, vocab_size=vocab_size, seed=2, shortest=6, longest=8)
    documents[0][:] = vocab_size - 1
    write_corpus(tmp_path / "c", pack(documents, 2), vocab_size=vocab_size)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(kind, vocab_size + 128, std=1.0, num_hidden_layers=1, **sizes)
    with torch.no_grad():
        model.lm_head.weight[vocab_size - 40 : vocab_size] *= 2.0  # so that the head holds the largest ids
    run(tmp_path / "c", Teacher(model, vocab_size=vocab_size), top_k=5, num_samples=3, batch_positions=16)
    targets = open_cache(tmp_path / "c").teacher("t").rows(0, 3)
    next_tokens = np.concatenate([d[1:] for d in documents])
    assert_is(targets, document_logits(model, documents, vocab_size), next_tokens, **CODED)
    assert int(targets.token_ids.max()) > vocab_size - 40
    assert (targets.tail_samples > 131_072).any()
    assert verify(tmp_path / "c") == []


# -- documents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"),
        ("gpt2", "sdpa"), ("mamba", None), ("opt", "sdpa"), ("recurrent_gemma", None),
    ],
)  # fmt: skip
def test_a_documents_targets_are_the_same_packed_and_alone(kind: str, attention: str | None) -> None:
    """Every field, the draws too; mistral and gemma2 have a sliding window shorter than the documents."""
    model = tiny_model(kind, V, attn_implementation=attention)
    if attention is not None:
        assert model.config._attn_implementation == attention
    teacher = Teacher(model, vocab_size=V)
    teacher.probe(torch.from_numpy(DOCUMENTS[0]))
    assert teacher.split
    documents = random_documents(12, vocab_size=V, seed=3, shortest=6)
    packed, packed_tail = rows_targets(teacher, make_rows(pack(documents, 3)))
    alone, alone_tail = rows_targets(teacher, make_rows(pack(documents, 1)))
    assert_close(packed, alone)
    np.testing.assert_allclose(packed_tail, alone_tail, atol=1e-4)
    begin = 0
    for document in documents:
        single, _ = rows_targets(teacher, make_rows([[Part(document)]]), first_target=begin)
        assert_close(packed[begin : begin + len(single)], single)
        begin += len(single)
    assert begin == len(packed)
    logits = document_logits(model, documents, V)
    assert_is(packed, logits, np.concatenate([d[1:] for d in documents]), atol=1e-4)
    # And it would show: without boundaries, nearly all positions but those of each row's first document change.
    joined = make_rows([[Part(np.concatenate([p.tokens for p in row]))] for row in pack(documents, 3)])
    boundaries = make_rows(pack(documents, 3))
    mixed, _ = rows_targets(teacher, joined)
    same_position = boundaries.supervised[joined.supervised]
    first = np.zeros(len(packed), dtype=bool)
    begin = 0
    for number, document in enumerate(documents):
        first[begin : begin + len(document) - 1] = number % 3 == 0
        begin += len(document) - 1
    change = np.abs(mixed[same_position].log_target - packed.log_target)
    assert (change[~first] > 1e-3).mean() > 0.2
    np.testing.assert_allclose(change[first], 0, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_alone_agree_from_cache_to_cache(tmp_path: Path, attention: str) -> None:
    teacher = Teacher(tiny_model("mistral", V, attn_implementation=attention), vocab_size=V)
    found = []
    for per_row in (1, 3):
        cache = tmp_path / str(per_row)
        write_corpus(cache, pack(DOCUMENTS, per_row), vocab_size=V)
        run(cache, teacher, top_k=20)
        opened = open_cache(cache)
        found.append(opened.teacher("t").rows(0, opened.corpus.num_rows))
    for name in FLOATS:
        # Two steps of the codec at the least likely token kept.
        np.testing.assert_allclose(getattr(found[0], name), getattr(found[1], name), atol=0.05, err_msg=name)
    assert (np.sort(found[0].token_ids, axis=1) == np.sort(found[1].token_ids, axis=1)).mean() > 0.999


def lookup_teacher(following: NDArray[np.int64]) -> Teacher:
    """A model that knows one thing: which token follows which. Its layers add nothing."""
    size = len(following)
    model = tiny_model("llama", size, hidden_size=size, num_attention_heads=4, num_key_value_heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[torch.from_numpy(following), torch.arange(size)] = 2.0
    return Teacher(model, vocab_size=size)


def test_the_target_at_a_position_is_about_the_next_token(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    following = generator.permutation(32)
    documents = []
    for start in generator.integers(0, 32, 30):
        tokens = [int(start)]
        while len(tokens) < 12:
            tokens.append(int(following[tokens[-1]]))
        documents.append(np.array(tokens))
    rows = [[Part(d, wanted=generator.random(len(d)) < 0.6) for d in documents[i : i + 2]] for i in range(0, 30, 2)]
    rows[4] = [Part(documents[8], starts=False), rows[4][1]]  # a continued document
    corpus = write_corpus(tmp_path / "c", rows, vocab_size=32)
    run(tmp_path / "c", lookup_teacher(following))
    found = open_cache(tmp_path / "c").teacher("t")
    stored = corpus.rows(0, corpus.num_rows)
    count = 0
    for r, parts in enumerate(rows):
        targets = found.row(r)
        at = [  # the position before each wanted token, but never across a document's start
            (part, i - 1) for part in parts for i in range(1, len(part.tokens)) if part.wanted is None or part.wanted[i]
        ]
        assert len(targets) == len(at)
        for (part, i), best, logprob, log_target in zip(
            at, targets.token_ids[:, 0], targets.logprobs[:, 0], targets.log_target, strict=True
        ):
            assert best == following[part.tokens[i]] == part.tokens[i + 1]
            assert logprob == pytest.approx(log_target, abs=0.01)
            assert log_target > -0.2
        count += len(at)
    assert count == int(stored.supervised.sum()) == corpus.num_targets < stored.tokens.size - 30
    # An alignment that is off by one would show: hardly a token is its own successor.
    assert (following == np.arange(32)).mean() < 0.1


def test_rows_and_shards_without_a_target(tmp_path: Path, teacher: Teacher) -> None:
    silent = [Part([1, 2, 3], wanted=[True, False, False])]
    rows: list[list[Part]] = [silent, [Part([5])], *pack(DOCUMENTS[:4], 1), silent, silent, silent]
    write_corpus(tmp_path / "c", rows, vocab_size=V)
    report = run(tmp_path / "c", teacher, shard_positions=1)
    found = open_cache(tmp_path / "c").teacher("t")
    assert report.num_shards >= 7
    assert [len(found.row(r)) for r in range(9)] == [0, 0, *(len(d) - 1 for d in DOCUMENTS[:4]), 0, 0, 0]
    logits = document_logits(teacher.model, DOCUMENTS[:4], V)
    assert_is(found.rows(0, 9), logits, np.concatenate([d[1:] for d in DOCUMENTS[:4]]), **CODED)
    assert verify(tmp_path / "c") == []


# -- sizes that must not matter ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"batch_positions": 1}, {"batch_positions": 10_000}, {"head_positions": 1}, {"head_positions": 7}]
)
def test_batches_and_chunks_change_nothing(teacher: Teacher, changes: dict[str, int]) -> None:
    rows = make_rows(pack(DOCUMENTS, 3))
    plain, plain_tail = rows_targets(teacher, rows)
    other, other_tail = rows_targets(teacher, rows, **changes)
    assert_close(plain, other)
    np.testing.assert_allclose(plain_tail, other_tail, atol=1e-4)


def test_draws_belong_to_the_position_in_the_corpus(teacher: Teacher) -> None:
    rows = make_rows(pack(DOCUMENTS, 3))
    whole, _ = rows_targets(teacher, rows, first_target=100)
    offsets = np.concatenate([[0], np.cumsum([rows.slice(r, r + 1).supervised.sum() for r in range(len(rows))])])
    for r in (0, 7, 19):
        part, _ = rows_targets(teacher, rows.slice(r, r + 1), first_target=100 + int(offsets[r]))
        assert_close(whole[int(offsets[r]) : int(offsets[r + 1])], part)
    elsewhere, _ = rows_targets(teacher, rows, first_target=101)
    assert (elsewhere.tail_samples != whole.tail_samples).mean() > 0.5
    seed, _ = rows_targets(teacher, rows, first_target=100, key=6)
    assert (seed.tail_samples != whole.tail_samples).mean() > 0.5


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest tensor any operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("head_positions", [None, 16])
def test_logits_never_exist_for_a_whole_batch(head_positions: int | None) -> None:
    vocab_size = 12_000
    documents = random_documents(40, vocab_size=vocab_size, shortest=50, longest=50, seed=4)
    teacher = Teacher(tiny_model("llama", vocab_size), vocab_size=vocab_size)
    rows = make_rows(pack(documents, 2))
    with Largest() as largest:
        rows_targets(teacher, rows, batch_positions=2000, head_positions=head_positions)
    batch = 40 * 49
    limit = (head_positions or 256) * teacher.width
    assert limit / 2 < largest.elements <= limit < batch * vocab_size / 2


def test_a_model_that_cannot_be_split_is_captured_too(cache: Path) -> None:
    teacher = Teacher(with_a_twist(tiny_model("llama", V), 0.05), vocab_size=V)
    report = run(cache, teacher)
    assert "the whole model runs" in report.logits
    targets = open_cache(cache).teacher("t").rows(0, 20)
    next_tokens = np.concatenate([d[1:] for d in DOCUMENTS])
    assert_is(targets, document_logits(teacher.model, DOCUMENTS, V), next_tokens, **CODED)


# -- going on where it stopped -------------------------------------------------------------------------------------

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from tailcache.pipeline import rows
from tailcache.scripts import cli
batch_segments = rows.batch_segments
def slowly(*arguments):
    for batch in batch_segments(*arguments):
        time.sleep(0.04)
        yield batch
rows.batch_segments = slowly
seed, most, cache, *flags = sys.argv[1:]
commits = Path(cache) / "teachers" / "t" / "commits"
generator, kills, committed = random.Random(int(seed)), 0, []
count = lambda: len(list(commits.glob("*.json"))) if commits.is_dir() else 0
while True:
    before, child = count(), os.fork()
    if child == 0:
        os._exit(cli.main(["capture", "--cache", cache, *flags]))
    done, status = 0, 0
    if kills < int(most):
        while done == 0 and count() == before and kills % 3:
            time.sleep(0.001)
            done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(generator.random() * (0.06 if kills % 3 else 0.4))
        if done == 0:
            done, status = os.waitpid(child, os.WNOHANG)
        if done == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            committed.append(count())
            continue
    else:
        os.waitpid(child, 0) if done == 0 else None
    break
print(kills, *committed)
"""


def killed(cache: Path, folder: str, *, seed: int, most: int) -> list[int]:
    flags = ["--teacher", folder, "--name", "t", "--top-k", "8", "--num-samples", "4", "--device", "cpu"]
    flags += ["--batch-positions", "64", "--shard-positions", "30", "--chunk-positions", "16"]
    flags += ["--temperatures", "2", "0.5", "--hidden", "int8"]  # every field there is
    printed = run_child(KILLER, seed, most, cache, *flags, timeout=120)
    return [int(number) for number in printed.splitlines()[-1].split()]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_in_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """Real processes, real SIGKILL: at random moments before, within and between shards."""
    folder = save_teacher(tmp_path / "model", tiny_model("llama", V))
    hashes = []
    for name, most in (("whole", 0), ("killed", 7)):
        shutil.copytree(corpus, tmp_path / name)
        kills, *committed = killed(tmp_path / name, folder, seed=3, most=most)
        hashes.append(folder_hashes(tmp_path / name / "teachers" / "t"))
        assert kills == most
        assert committed == sorted(committed)
    assert len(set(committed)) >= 3, f"hardly any kill fell within the capture: {committed}"
    assert hashes[0] == hashes[1]
    assert verify(tmp_path / "killed") == []


class Stop(Exception):
    """Raised in the midst of things."""


@contextlib.contextmanager
def stopping(teacher: Teacher, monkeypatch: pytest.MonkeyPatch, batch: int, error: BaseException) -> Iterator[None]:
    """The teacher fails at its n-th batch."""
    original, count = teacher.hidden, 0

    def hidden(input_ids: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == batch:
            raise error
        return original(input_ids)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "hidden", hidden)
        yield


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), MemoryError()])
def test_whatever_stops_the_teacher_what_was_done_is_committed(
    cache: Path, teacher: Teacher, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with stopping(teacher, monkeypatch, 15, error), pytest.raises(type(error)):
        run(cache, teacher)
    committed = len(list((cache / "teachers" / "t" / "commits").iterdir()))
    assert 1 <= committed < 8
    with pytest.raises(IncompleteError, match="run the same `tailcache capture` again"):
        open_cache(cache).teacher("t")
    assert run(cache, teacher).resumed_shards == committed
    assert folder_hashes(cache / "teachers" / "t") == uninterrupted


def test_a_device_without_memory_says_which_setting_to_lower(
    cache: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nand more")
    with (
        stopping(teacher, monkeypatch, 15, error),
        pytest.raises(TeacherError, match=r"batches of 64 positions: CUDA out of memory.*lower --batch-positions"),
    ):
        run(cache, teacher)


def test_a_finished_capture_is_left_as_it_is(
    cache: Path, teacher: Teacher, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cache, teacher)
    with stopping(teacher, monkeypatch, 2, Stop()):  # the probe is the only forward pass
        report = run(cache, teacher)
    assert (report.positions, report.resumed_shards) == (0, report.num_shards)
    assert folder_hashes(cache / "teachers" / "t") == uninterrupted


def changed(**changes: Any) -> Teacher:
    return Teacher(tiny_model("llama", V, **changes), vocab_size=V)


def one_weight() -> Teacher:
    model = tiny_model("llama", V)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-4
    return Teacher(model, vocab_size=V)


DIFFERENT: list[tuple[Any, dict[str, Any], str]] = [
    (one_weight, {}, r"settings\.weights"),
    (lambda: changed(rms_norm_eps=1e-4), {}, r"settings\.model\.rms_norm_eps: stored 1e-06, asked for 0\.0001"),
    (lambda: changed(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {}, r"rope_theta: stored 10000"),
    (lambda: changed(attn_implementation="eager"), {}, r"settings\.attn_implementation: stored 'sdpa'.*'eager'"),
    (
        lambda: Teacher(tiny_model("llama", V).to(torch.bfloat16), vocab_size=V),
        {},
        r"settings\.dtype: stored 'float32'",
    ),
    (changed, {"top_k": 9}, r"layout\.top_k: stored 8, asked for 9"),
    (changed, {"num_samples": 3}, r"layout\.num_samples: stored 4, asked for 3"),
    (changed, {"batch_positions": 32}, r"settings\.batch_positions: stored 64, asked for 32"),
    (changed, {"head_positions": 8}, r"settings\.head_chunk"),
    (changed, {"sample_seed": 1}, r"settings\.sample_seed: stored 0, asked for 1"),
    (changed, {"shard_positions": 90}, r"layout\.rows_per_shard"),
    (changed, {"chunk_positions": 16}, r"layout\.chunk"),
    (changed, {"compression_level": 1}, r"layout\.compression_level"),
    (changed, {"weight_bits": 3}, r"settings\.weight_bits: stored None, asked for 3"),
]


def test_other_settings_under_the_same_name_are_refused(
    cache: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopping(teacher, monkeypatch, 15, Stop()), pytest.raises(Stop):
        run(cache, teacher)
    before = folder_hashes(cache / "teachers" / "t")
    for other, changes, message in DIFFERENT:
        with pytest.raises(MismatchError, match=message) as caught:
            run(cache, other(), **changes)
        assert "another --name" in str(caught.value)
        assert folder_hashes(cache / "teachers" / "t") == before, message
    run(cache, teacher)
    with pytest.raises(MismatchError, match=r"layout\.top_k"):  # also when it is finished
        run(cache, teacher, top_k=9)


def test_another_corpus_is_refused(cache: Path, tmp_path: Path, teacher: Teacher) -> None:
    run(cache, teacher)
    other = tmp_path / "other"
    write_corpus(other, pack([*DOCUMENTS[:-1], (DOCUMENTS[-1] + 1) % V], 3), vocab_size=V, held_out_every=4)
    shutil.copytree(cache / "teachers", other / "teachers")
    with pytest.raises(MismatchError, match=r"corpus_hash: stored"):
        run(other, teacher)


def test_a_second_teacher_lies_beside_the_first(cache: Path, teacher: Teacher, uninterrupted: dict[str, str]) -> None:
    run(cache, teacher)
    run(cache, one_weight(), name="other", top_k=3)
    assert open_cache(cache).teacher_names == ["other", "t"]
    assert folder_hashes(cache / "teachers" / "t") == uninterrupted


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_name_the_row_and_leave_the_rest_good(
    cache: Path, uninterrupted: dict[str, str], bad: float
) -> None:
    """One token's embedding is broken; it occurs first in a late row."""
    rows = open_cache(cache).corpus.rows(0, 20)
    early = set(rows.slice(0, 12).tokens.tolist())
    # Not the last token of its document: that one is never read.
    candidates = [
        t
        for row in range(12, 20)
        for t in rows.slice(row, row + 1).tokens[:-1][rows.slice(row, row + 1).supervised[:-1]]
    ]
    token = next(int(t) for t in candidates if t not in early)
    teacher = changed()
    weight = teacher.model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    kept = weight.detach()[token].clone()
    with torch.no_grad():
        weight[token] = bad
    with pytest.raises(TeacherError, match=r"row \d+, token \d+: expected finite logits.*--dtype float32") as caught:
        run(cache, teacher)
    row = int(str(caught.value).split("row ")[1].split(",")[0])
    assert token in rows.slice(row, row + 1).tokens
    committed = len(list((cache / "teachers" / "t" / "commits").iterdir()))
    assert committed >= 3
    assert [f for f in verify(cache) if "not finished" not in str(f)] == []
    with torch.no_grad():
        weight[token] = kept
    with pytest.raises(MismatchError, match=r"settings\.weights"):  # mended, it is another teacher
        run(cache, teacher)


def test_logits_that_were_not_finite_by_accident(
    cache: Path, teacher: Teacher, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the machine, not of the weights: the same command goes on."""
    original, count = teacher.logits, 0

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        result = original(hidden)
        if count == 12:
            result[len(result) // 2] = torch.nan
        return result

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "logits", logits)
        with pytest.raises(TeacherError, match="1 such positions"):
            run(cache, teacher)
    assert run(cache, teacher).resumed_shards >= 3
    assert folder_hashes(cache / "teachers" / "t") == uninterrupted


@pytest.mark.parametrize(("share", "least"), [(0.0, 0), (0.1, 0), (0.35, 1), (0.7, 4), (0.97, 8), (1.0, 10)])
def test_a_full_disk_stops_it_and_the_same_command_goes_on(
    cache: Path, tmp_path: Path, corpus: Path, teacher: Teacher, uninterrupted: dict[str, str], share: float, least: int
) -> None:
    shutil.copytree(corpus, tmp_path / "count")
    with failing_at(-1) as counter:
        run(tmp_path / "count", teacher)
    with failing_at(round(share * (counter.count - 1))), pytest.raises(StorageError, match="No space left") as caught:
        run(cache, teacher)
    assert caught.value.errno == 28
    assert "free some space and run the same command again" in str(caught.value)
    report = run(cache, teacher)
    assert report.resumed_shards >= least
    assert folder_hashes(cache / "teachers" / "t") == uninterrupted


def test_a_writer_that_fails_stops_the_teacher_at_its_next_batch(
    cache: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    batches_after = 0

    def write_shard(*_: Any) -> None:
        failed.set()
        raise StorageError(28, "no space")

    original = teacher.hidden

    def hidden(input_ids: torch.Tensor) -> torch.Tensor:
        nonlocal batches_after
        batches_after += failed.is_set()
        if failed.is_set():
            time.sleep(0.02)  # the writer thread has time to say so
        return original(input_ids)

    monkeypatch.setattr(TargetsWriter, "write_shard", write_shard)
    monkeypatch.setattr(teacher, "hidden", hidden)
    start = time.perf_counter()
    with pytest.raises(StorageError, match="no space"):
        run(cache, teacher, batch_positions=1, shard_positions=120)
    assert batches_after <= 3
    assert time.perf_counter() - start < 20
    assert not [t for t in threading.enumerate() if t.name == "tailcache-writer"]


def test_an_error_of_the_teacher_is_not_hidden_by_one_of_the_writer(
    cache: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_shard(*_: Any) -> None:
        time.sleep(0.3)
        raise StorageError(28, "no space")

    monkeypatch.setattr(TargetsWriter, "write_shard", write_shard)
    with stopping(teacher, monkeypatch, 9, Stop()), pytest.raises((Stop, StorageError)):
        run(cache, teacher)
    assert not [t for t in threading.enumerate() if t.name == "tailcache-writer"]


def test_a_slow_disk_holds_the_teacher_back(
    cache: Path, teacher: Teacher, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed and not yet written: at most two that wait and one that is being written, besides the current one."""
    computed, written, waiting = 0, 0, []
    original_write, original_rows = TargetsWriter.write_shard, capture_rows

    def write_shard(self: TargetsWriter, *arguments: Any) -> int:
        nonlocal written
        time.sleep(0.08)
        result = original_write(self, *arguments)
        written += 1
        return result

    def rows(*arguments: Any, **keywords: Any) -> Any:
        nonlocal computed
        waiting.append(computed - written)
        result = original_rows(*arguments, **keywords)
        computed += 1
        return result

    monkeypatch.setattr(TargetsWriter, "write_shard", write_shard)
    monkeypatch.setattr(capture_module, "capture_rows", rows)
    run(cache, teacher)
    assert computed == written >= 8
    assert max(waiting) == 3
    assert folder_hashes(cache / "teachers" / "t") == uninterrupted


def test_rows_longer_than_the_teacher_was_made_for(tmp_path: Path, teacher: Teacher) -> None:
    documents = random_documents(5, vocab_size=V, longest=20)
    long = np.arange(65) % V
    write_corpus(tmp_path / "c", [[Part(d)] for d in [*documents, long]], vocab_size=V)
    with pytest.raises(ConfigError, match=r"row 5: expected at most 64 tokens.*found 65.*--context-length 64"):
        run(tmp_path / "c", teacher)
    write_corpus(tmp_path / "d", [[Part(d)] for d in [*documents, long[:-1]]], vocab_size=V)
    run(tmp_path / "d", teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_positions": 0}, "head_positions: expected at least 1, found 0"),
        ({"head_positions": -5}, "head_positions: expected at least 1, found -5"),
        ({"threads": 0}, "threads: expected at least 1, found 0"),
        ({"top_k": V + 1}, "top_k: expected 1 to the vocabulary size 100, found 101"),
        ({"top_k": V}, "num_samples: expected 0 or more, and 0 where top_k equals the vocabulary"),
        ({"name": "../x"}, "teacher name: expected"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"num_samples": -1}, "num_samples: expected at least 0"),
        ({"batch_positions": 0}, "batch_positions: expected at least 1"),
    ],
)
def test_settings_out_of_range(cache: Path, teacher: Teacher, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(cache, teacher, **changes)
    assert not (cache / "teachers" / "t").exists()


# -- tokenizers and the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache whose corpus knows its tokenizer, and a teacher with the same one."""
    root = tmp_path_factory.mktemp("tokenized")
    tokenizer = build_tokenizer("bpe")
    documents = random_documents(30, vocab_size=len(tokenizer), seed=5)
    write_corpus(root / "cache", pack(documents, 3), vocab_size=len(tokenizer), tokenizer=tokenizer)
    return root / "cache", save_teacher(root / "model", tiny_model("llama", len(tokenizer)), tokenizer)


def test_a_teacher_with_another_tokenizer_is_refused(tokenized: tuple[Path, str], tmp_path: Path) -> None:
    cache = tokenized[0]
    vocab_size = open_cache(cache).corpus.vocab_size
    others = [
        (build_tokenizer("wordlevel"), "vocabulary"),
        (build_tokenizer("bpe", lowercase=True), "merges"),
        (build_tokenizer("bpe", eos="<sep>"), "special_ids"),
    ]
    for number, (tokenizer, component) in enumerate(others):
        other = save_teacher(tmp_path / str(number), tiny_model("llama", vocab_size), tokenizer)
        with pytest.raises(MismatchError, match=rf"tokenizer does not match.*{component}.*this teacher's tokenizer"):
            capture(config(cache, other), show_progress=False)
    assert not (cache / "teachers").exists() or not list((cache / "teachers").iterdir())


def test_a_teacher_without_a_tokenizer_is_taken_at_its_word(tokenized: tuple[Path, str], tmp_path: Path) -> None:
    cache, _ = tokenized
    shutil.copytree(cache / "corpus", tmp_path / "cache" / "corpus")
    bare = save_teacher(tmp_path / "bare", tiny_model("llama", open_cache(cache).corpus.vocab_size))
    capture(config(tmp_path / "cache", bare), show_progress=False)
    provenance = open_cache(tmp_path / "cache").teacher("t").manifest["provenance"]
    assert "only the size of its vocabulary was checked" in provenance["tokenizer"]
    assert provenance["teacher"] == "bare"


def test_a_teacher_with_a_narrow_head_is_refused(tokenized: tuple[Path, str], tmp_path: Path) -> None:
    cache, _ = tokenized
    vocab_size = open_cache(cache).corpus.vocab_size
    narrow = save_teacher(tmp_path / "narrow", tiny_model("llama", vocab_size - 1))
    with pytest.raises(TeacherError, match=f"at least {vocab_size} rows.*found {vocab_size - 1}"):
        capture(config(cache, narrow), show_progress=False)


def flags(where: Path, folder: str, **changes: Any) -> list[str]:
    settings = {
        "cache": where, "teacher": folder, "name": "t", "top-k": 8, "num-samples": 4, "shard-positions": 60,
        "device": "cpu", **changes,
    }  # fmt: skip
    return ["capture", *(str(part) for name, value in settings.items() for part in (f"--{name}", value))]


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tokenized: tuple[Path, str], tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tokenized[1]
    shutil.copytree(tokenized[0] / "corpus", cache / "corpus")
    command = [sys.executable, "-m", "tailcache.scripts.cli", *flags(cache, folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    teacher = open_cache(cache).teacher("t")
    assert f"captured t: {teacher.num_targets} positions" in done.stdout
    assert "bytes/position" in done.stdout
    assert "head applied in chunks with float32 results" in done.stdout
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert lines
    assert all(line.startswith("capture t:") for line in lines), "something else than the bar was printed"
    assert "pos/s" in lines[-1]
    assert "B/pos, shards" in lines[-1]


def test_the_commands_exit_status(
    tokenized: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, folder = tmp_path / "cache", tokenized[1]
    shutil.copytree(tokenized[0] / "corpus", cache / "corpus")

    def attempt(**changes: Any) -> tuple[int, str]:
        status = cli.main(flags(cache, folder, **changes))
        return status, capsys.readouterr().err

    assert attempt()[0] == 0
    assert attempt()[0] == 0  # nothing left to do
    status, message = attempt(**{"top-k": 9})
    assert status == 1
    assert "layout.top_k: stored 8, asked for 9" in message
    assert "Traceback" not in message
    status, message = attempt(device="gpu", name="u")
    assert status == 1
    assert "device: expected auto" in message
    status, message = attempt(teacher=str(tmp_path / "none"), name="u")
    assert status == 1
    assert "found nothing at" in message
    status, message = attempt(cache=str(tmp_path / "none"))
    assert status == 1
    assert "tailcache prepare" in message
    assert attempt(**{"top-k": "many"})[0] == 2
    status, message = attempt(**{"top-kk": 3})
    assert status == 2
    assert "--top-k" in message


def test_rounding_weights_is_another_teacher_with_its_own_name(tokenized: tuple[Path, str], tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tokenized[1]
    shutil.copytree(tokenized[0] / "corpus", cache / "corpus")
    capture(config(cache, folder), show_progress=False)
    rounded = config(cache, folder, name="rounded", weight_bits=3, weight_group=16)
    capture(rounded, show_progress=False)
    opened = open_cache(cache)
    settings = [opened.teacher(name).manifest["settings"] for name in ("t", "rounded")]
    assert [s["weight_bits"] for s in settings] == [None, 3]
    a, b = (opened.teacher(name).rows(0, 10).log_target for name in ("t", "rounded"))
    assert 0.01 < np.abs(a - b).mean() < 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_stores_what_the_cpu_stores(tokenized: tuple[Path, str], tmp_path: Path, dtype: str) -> None:
    cache, folder = tmp_path / "cache", tokenized[1]
    shutil.copytree(tokenized[0] / "corpus", cache / "corpus")
    for device in ("cpu", "cuda"):
        capture(config(cache, folder, name=device, dtype=dtype, device=device), show_progress=False)
    opened = open_cache(cache)
    a, b = (opened.teacher(name).rows(0, 10) for name in ("cpu", "cuda"))
    for name in ("log_tail", "tail_entropy", "log_target"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=0.001 if dtype == "float32" else 0.1)
