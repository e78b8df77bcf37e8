"""A processor without bfloat16 is not made to compute in it unasked, and says so where it is asked."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from capture_fixtures import config, pack, random_documents, save_teacher, tiny_model, write_corpus
from gguf_fixtures import write_llama_gguf
from tokenizer_fixtures import build_tokenizer

from tailcache.pipeline import load_teacher as module
from tailcache.pipeline import precision
from tailcache.pipeline.capture import capture
from tailcache.pipeline.load_teacher import load_teacher
from tailcache.pipeline.precision import is_slow, native_dtype
from tailcache.pipeline.repair import repair_cache
from tailcache.scripts import evaluate as evaluate_module
from tailcache.scripts import slow_products
from tailcache.scripts import train as train_module
from tailcache.storage.errors import TailcacheError
from tailcache.storage.reader import open_cache
from tailcache.trainers.config import TrainConfig
from tailcache.trainers.evaluate_config import EvaluateConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")
V = 100
DOCUMENTS = random_documents(60, vocab_size=V, seed=1)


@pytest.fixture(params=[True, False], ids=["native", "slow"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A processor with or without fast products of half precision."""
    has: bool = request.param

    class Products:
        _is_mkldnn_bf16_supported = _is_mkldnn_fp16_supported = staticmethod(lambda: has)

    class Operators:
        mkldnn = Products

    class Torch:
        ops, device, dtype = Operators, torch.device, torch.dtype
        float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16

    monkeypatch.setattr(precision, "torch", Torch)
    return has


def test_what_a_device_is_made_for(native: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert is_slow(dtype, CPU) is not native
        assert not is_slow(dtype, GPU)
    assert not is_slow(torch.float32, CPU)
    assert native_dtype(CPU) == (torch.bfloat16 if native else torch.float32)
    assert native_dtype(GPU) == torch.bfloat16


def test_torch_still_has_what_is_asked() -> None:
    """Without these, every processor would be taken to be slow."""
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    assert isinstance(torch.ops.mkldnn._is_mkldnn_fp16_supported(), bool)


def test_a_gguf_file_runs_in_what_the_processor_is_made_for(tmp_path: Path, native: bool) -> None:
    tokenizer = build_tokenizer("bpe")
    path = tmp_path / "tiny.gguf"
    write_llama_gguf(path, tiny_model("llama", len(tokenizer)), tokenizer)
    found = load_teacher(str(path), vocab_size=len(tokenizer), device="cpu").dtype
    assert found == (torch.bfloat16 if native else torch.float32)
    asked = load_teacher(str(path), vocab_size=len(tokenizer), device="cpu", dtype="bfloat16").dtype
    assert asked == torch.bfloat16


def test_slow_products_are_spoken_of(tmp_path: Path, native: bool, caplog: pytest.LogCaptureFixture) -> None:
    save_teacher(tmp_path / "half", tiny_model("llama", V).to(torch.bfloat16), None)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        assert load_teacher(str(tmp_path / "half"), vocab_size=V, device="cpu").dtype == torch.bfloat16
    assert ("give --dtype float32" in caplog.text) is not native
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        load_teacher(str(tmp_path / "half"), vocab_size=V, device="cpu", dtype="float32")
    assert caplog.text == ""


def test_repair_runs_the_teacher_in_the_dtype_it_was_captured_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` may mean another dtype on the machine that mends."""
    tokenizer = build_tokenizer("bpe")
    vocab_size = len(tokenizer)
    teacher, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_llama_gguf(teacher, tiny_model("llama", vocab_size), tokenizer)
    write_corpus(cache, pack(DOCUMENTS, 3), vocab_size=vocab_size)
    monkeypatch.setattr(module, "native_dtype", lambda device: torch.bfloat16)
    capture(config(cache, teacher=str(teacher), dtype="auto"), show_progress=False)
    captured = open_cache(cache).teacher("t")
    assert captured.manifest["settings"]["dtype"] == "bfloat16"
    damaged = cache / "teachers/t/tail_entropy/c/1"
    good = damaged.read_bytes()
    damaged.unlink()
    monkeypatch.setattr(module, "native_dtype", lambda device: torch.float32)
    mended, after = repair_cache(cache, model=str(teacher))
    assert ("t", 1) in mended.shards
    assert after.faults == []
    assert damaged.read_bytes() == good


@pytest.mark.parametrize(("precision", "device", "spoken"), [("bf16", "cpu", True), ("fp32", "cpu", False)])
def test_slow_products_of_a_student_are_spoken_of(
    native: bool, caplog: pytest.LogCaptureFixture, precision: str, device: str, spoken: bool
) -> None:
    with caplog.at_level(logging.WARNING, logger=slow_products.__name__):
        slow_products.warn_of_slow_products(precision, device)
    assert ("--precision bf16" in caplog.text) is (spoken and not native)


def test_train_and_evaluate_speak_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before anything is read."""
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(slow_products, "warn_of_slow_products", lambda *settings: asked.append(settings))
    cache = tmp_path / "none"
    with pytest.raises(TailcacheError):
        train_module.run(TrainConfig(cache=cache, teacher="t", out=tmp_path, precision="bf16", device="cpu"))
    with pytest.raises(TailcacheError):
        evaluate_module.run(EvaluateConfig(student="s", cache=cache, precision="bf16", device="auto"))
    assert asked == [("bf16", "cpu"), ("bf16", "auto")]
