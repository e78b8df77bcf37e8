"""Tiny random teachers, corpora of given documents, and the distributions a teacher should have been stored with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tailcache.pipeline.config import CaptureConfig
from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.fingerprint import fingerprint

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {k: v for k, v in _COMMON.items() if k != "head_dim"},
    "qwen2": {k: v for k, v in _COMMON.items() if k != "head_dim"},
    "granite": {k: v for k, v in _COMMON.items() if k != "head_dim"} | {"logits_scaling": 7.0},
    "cohere": {k: v for k, v in _COMMON.items() if k != "head_dim"} | {"logit_scale": 0.3},
    "gemma2": _COMMON | {"final_logit_softcapping": 5.0, "sliding_window": 8},
    "mistral": _COMMON | {"sliding_window": 4},
    "phi": {k: v for k, v in _COMMON.items() if k not in ("head_dim", "num_key_value_heads")},
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "recurrent_gemma": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "lru_width": 32,
        "logits_soft_cap": 5.0, "attention_window_size": 16,
    },
    "mixtral": {k: v for k, v in _COMMON.items() if k != "head_dim"} | {"num_local_experts": 4},
    "bert": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}  # fmt: skip


def tiny_model(kind: str = "llama", vocab_size: int = 100, *, seed: int = 0, std: float = 0.25, **changes: Any) -> Any:
    """A random causal language model, float32, whose distributions are far from uniform."""
    attention = changes.pop("attn_implementation", None)
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab_size,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **SIZES[kind], **changes},
    )
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config, **({"attn_implementation": attention} if attention else {}))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=std)
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias)
    return model.eval()


def with_a_twist(model: Any, strength: float = 1e-3) -> Any:
    """The model, with its logits changed after the head in a way that only its code knows."""
    original = model.forward

    def forward(**inputs: Any) -> Any:
        output = original(**inputs)
        output.logits = output.logits + strength * output.logits.sin()
        return output

    model.forward = forward
    return model


def save_teacher(folder: Path, model: Any, tokenizer: Any = None) -> str:
    """Write a model, and a tokenizer beside it; returns the folder as ``--teacher`` takes it."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Part:
    """A document's part within one row."""

    tokens: Sequence[int] | NDArray[np.int64]
    starts: bool = True
    """The document's first token is its first."""
    wanted: Sequence[bool] | NDArray[np.bool_] | None = None
    """Tokens to be predicted; all of them by default."""


def write_corpus(
    cache: Path, rows: Sequence[Sequence[Part]], *, vocab_size: int, tokenizer: Any = None, held_out_every: int = 0
) -> Corpus:
    """A corpus whose rows are given part by part."""
    with CorpusWriter(cache, vocab_size=vocab_size) as writer:
        for number, parts in enumerate(rows):
            tokens = np.concatenate([np.asarray(part.tokens, dtype=np.int64) for part in parts])
            starts = np.zeros(len(tokens), dtype=bool)
            wanted = np.ones(len(tokens), dtype=bool)
            begin = 0
            for part in parts:
                end = begin + len(part.tokens)
                starts[begin] = part.starts
                if part.wanted is not None:
                    wanted[begin:end] = part.wanted
                begin = end
            held_out = bool(held_out_every) and number % held_out_every == 1
            writer.append(tokens, starts, wanted, held_out=held_out)
        described: dict[str, Any] = {"vocab_size": vocab_size}
        if tokenizer is not None:
            described["fingerprint"] = fingerprint(tokenizer)
        return writer.finish(tokenizer_files={}, tokenizer=described, source={}, recipe={}, report={})


def random_documents(
    number: int, *, vocab_size: int, longest: int = 20, shortest: int = 2, seed: int = 0
) -> list[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest + 1, number)
    return [generator.integers(0, vocab_size, length) for length in lengths]


def pack(documents: Sequence[NDArray[np.int64]], per_row: int) -> list[list[Part]]:
    """Some documents to a row, one after another."""
    return [[Part(d) for d in documents[i : i + per_row]] for i in range(0, len(documents), per_row)]


def config(cache: Path, teacher: str = "object", **changes: Any) -> CaptureConfig:
    """Settings of a small capture of several shards."""
    settings: dict[str, Any] = {
        "cache": cache, "teacher": teacher, "name": "t", "top_k": 8, "num_samples": 4, "device": "cpu",
        "batch_positions": 64, "shard_positions": 60, "chunk_positions": 32,
    }  # fmt: skip
    return CaptureConfig(**{**settings, **changes})


@torch.no_grad()
def document_logits(model: Any, documents: Sequence[NDArray[np.int64]], vocab_size: int) -> NDArray[np.float64]:
    """[T, V] the model's own logits at every position but the last of each document, each document run alone."""
    parts = []
    for tokens in documents:
        ids = torch.from_numpy(np.asarray(tokens))[None]
        parts.append(model(input_ids=ids, use_cache=False).logits[0, :-1, :vocab_size].double())
    stacked: Tensor = torch.cat(parts)
    return stacked.numpy()


def folder_hashes(folder: Path) -> dict[str, str]:
    """The bytes of every file below a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_rows(rows: Sequence[Sequence[Part]]) -> Rows:
    """The same rows in memory, without a corpus; alignment typed out here, not asked of the package."""
    tokens: list[int] = []
    starts: list[bool] = []
    supervised: list[bool] = []
    offsets = [0]
    for parts in rows:
        flat: list[tuple[int, bool, bool]] = []
        for part in parts:
            wanted = [True] * len(part.tokens) if part.wanted is None else list(part.wanted)
            flat += [(int(t), part.starts and i == 0, bool(wanted[i])) for i, t in enumerate(part.tokens)]
        for i, (token, start, _) in enumerate(flat):
            tokens.append(token)
            starts.append(start)
            supervised.append(i + 1 < len(flat) and flat[i + 1][2] and not flat[i + 1][1])
        offsets.append(len(tokens))
    return Rows(
        row_indices=np.arange(len(rows)),
        offsets=np.array(offsets),
        tokens=np.array(tokens, dtype=np.int64),
        document_start=np.array(starts, dtype=bool),
        supervised=np.array(supervised, dtype=bool),
        held_out=np.zeros(len(rows), dtype=bool),
    )
