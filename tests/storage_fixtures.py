"""Tiny synthetic caches whose exact distributions are known in float64.

Legend: T target positions, V vocabulary, K kept tokens, m samples, N tokens, R rows.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Corpus
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.hidden import HeadKind, HiddenKind, HiddenLayout, StoredHead
from tailcache.storage.layout import Layout
from tailcache.storage.targets import TargetsWriter, plan_layout

Float64 = NDArray[np.float64]

TOKENIZER_FILES = {"tokenizer.json": b'{"made": "for a test"}\n'}
FINISH: dict[str, Any] = {
    "tokenizer_files": TOKENIZER_FILES,
    "tokenizer": {"fingerprint": {"all": "0" * 64}, "vocab_size": 37},
    "source": {"kind": "synthetic"},
    "recipe": {"kind": "rows"},
    "report": {"documents": 3},
}
ROW_LENGTHS = (9, 1, 12, 7, 2, 11, 5, 1, 8, 6)


@dataclass(frozen=True)
class Row:
    """One row as it is given to the writer."""

    tokens: NDArray[np.int64]
    document_start: NDArray[np.bool_]
    wanted: NDArray[np.bool_]
    held_out: bool


def make_rows(vocab_size: int, lengths: tuple[int, ...] = ROW_LENGTHS, seed: int = 0) -> list[Row]:
    """Random rows with documents of random length and a few tokens that are not wanted."""
    generator = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(lengths):
        start = generator.random(length) < 0.2
        start[0] = i % 3 != 1  # every third row goes on with a document
        wanted = generator.random(length) < 0.9
        rows.append(Row(generator.integers(0, vocab_size, length), start, wanted, held_out=i % 4 == 3))
    return rows


def append_rows(writer: CorpusWriter, rows: list[Row]) -> None:
    """Append them all."""
    for row in rows:
        writer.append(row.tokens, row.document_start, row.wanted, held_out=row.held_out)


def make_corpus(cache: Path, vocab_size: int = 37, lengths: tuple[int, ...] = ROW_LENGTHS, seed: int = 0) -> Corpus:
    """Write a corpus of ``make_rows``."""
    with CorpusWriter(cache, vocab_size=vocab_size) as writer:
        append_rows(writer, make_rows(vocab_size, lengths, seed))
        return writer.finish(**FINISH)


def log_softmax(logits_TV: Float64) -> Float64:
    """In float64."""
    shifted = logits_TV - logits_TV.max(axis=1, keepdims=True)
    result: Float64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def log_sum(logprobs_TV: Float64, chosen_TV: NDArray[np.bool_]) -> Float64:
    """Log of the sum of the chosen probabilities, [T]; -inf where none is chosen."""
    masked = np.where(chosen_TV, logprobs_TV, -np.inf)
    largest = masked.max(axis=1)
    safe = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        result: Float64 = safe + np.log(np.exp(masked - safe[:, None]).sum(axis=1))
    return result


def summarise(
    logprobs_TV: Float64,
    next_T: NDArray[np.integer],
    top_k: int,
    num_samples: int,
    seed: int = 0,
    temperatures: tuple[float, ...] = (),
) -> tuple[Targets, Float64]:
    """What a capture would hand over for exact distributions: the targets, and the sum of the normalised tails."""
    num, vocab_size = logprobs_TV.shape
    generator = np.random.default_rng([seed, 77])
    ids = np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :top_k]
    in_tail = np.ones((num, vocab_size), np.bool_)
    np.put_along_axis(in_tail, ids, False, axis=1)
    log_tail = log_sum(logprobs_TV, in_tail)
    safe_tail = np.where(np.isfinite(log_tail), log_tail, 0.0)
    normalised = np.where(in_tail, logprobs_TV - safe_tail[:, None], -np.inf)
    tail = np.exp(normalised)
    entropy = -(tail * np.where(tail > 0, normalised, 0.0)).sum(axis=1)
    is_next = np.zeros((num, vocab_size), np.bool_)
    is_next[np.arange(num), next_T] = True
    samples = np.zeros((num, num_samples), np.int32)
    for t in range(num):
        if num_samples:
            samples[t] = generator.choice(vocab_size, num_samples, p=tail[t] / tail[t].sum())
    targets = Targets(
        token_ids=ids.astype(np.int32),
        logprobs=np.take_along_axis(logprobs_TV, ids, axis=1).astype(np.float32),
        log_tail=log_tail.astype(np.float32),
        tail_entropy=entropy.astype(np.float32),
        log_target=logprobs_TV[np.arange(num), next_T].astype(np.float32),
        log_not_target=np.minimum(log_sum(logprobs_TV, ~is_next), 0).astype(np.float32),
        tail_samples=samples,
        log_z_tail=np.concatenate(
            [np.empty((num, 0)), *(log_sum(logprobs_TV / tau, in_tail)[:, None] for tau in temperatures)], axis=1
        ).astype(np.float32),
    )
    return targets, tail.sum(axis=0)


def corpus_next(corpus: Corpus) -> NDArray[np.int64]:
    """[T] the true next token of every target position."""
    rows = corpus.rows(0, corpus.num_rows)
    return rows.tokens[np.flatnonzero(rows.supervised) + 1]


@dataclass(frozen=True)
class Exact:
    """A teacher of random distributions over a corpus."""

    corpus: Corpus
    layout: Layout
    logprobs: Float64
    """[T, V]"""
    targets: Targets
    shards: list[tuple[Targets, Float64]]
    """What is handed to the writer, shard by shard."""
    head: StoredHead | None = None

    def write(self, name: str, settings: dict[str, Any] | None = None) -> None:
        """Write the teacher, or go on with it."""
        chosen = settings or {"seed": 1}
        with TargetsWriter(self.corpus, name, layout=self.layout, settings=chosen, head=self.head) as writer:
            for shard in writer.shards():
                writer.write_shard(shard, *self.shards[shard])
            writer.finish()


def make_exact(
    corpus: Corpus,
    *,
    top_k: int = 5,
    num_samples: int = 3,
    shard_positions: int = 15,
    chunk: int = 8,
    seed: int = 0,
    scale: float = 3.0,
    logits_TV: Float64 | None = None,
    temperatures: tuple[float, ...] = (),
    hidden: HiddenKind | None = None,
    head: StoredHead | None = None,
    **plan: Any,
) -> Exact:
    """Random distributions for every target position of a corpus, cut into shards.

    With ``hidden`` they are exactly those of random hidden states, as they are stored, and of ``head``. Further
    settings are those of ``plan_layout``.
    """
    layout = plan_layout(
        corpus, top_k=top_k, num_samples=num_samples, shard_positions=shard_positions, chunk=chunk,
        temperatures=temperatures, **plan,
    )  # fmt: skip
    generator = np.random.default_rng([seed, 5])
    stored: dict[str, NDArray[Any]] = {}
    if hidden is not None:
        head = head or make_head(corpus.vocab_size, seed=seed)
        layout = replace(layout, hidden=HiddenLayout.of(hidden, head))
        shape = (corpus.num_targets, head.weight.shape[1])
        stored = make_hidden(hidden, generator.normal(size=shape))
        logits_TV = exact_logits(head, stored)
    if logits_TV is None:
        logits_TV = generator.normal(size=(corpus.num_targets, corpus.vocab_size)) * scale
    logprobs = log_softmax(logits_TV)
    following = corpus_next(corpus)
    offsets = corpus.target_offsets(0, corpus.num_rows)
    shards = []
    for shard in range(layout.num_shards):
        first, last = layout.shard_rows(shard)
        part = slice(int(offsets[first]), int(offsets[last]))
        targets, tail_sum = summarise(
            logprobs[part], following[part], top_k, num_samples, seed + shard, temperatures
        )  # fmt: skip
        shards.append((replace(targets, **{name: values[part] for name, values in stored.items()}), tail_sum))
    return Exact(corpus, layout, logprobs, Targets.concatenate([targets for targets, _ in shards]), shards, head)


def bits_of(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """The bits of bfloat16 numbers, by cutting float32 (which is one way to get numbers that are bfloat16)."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def make_head(
    vocab_size: int, width: int = 16, kind: HeadKind = "bfloat16", *, bias: bool = True, seed: int = 0, **more: Any
) -> StoredHead:
    """A random head, scaled and soft-capped."""
    generator = np.random.default_rng([seed, 11])
    weight = generator.normal(size=(vocab_size, width)).astype(np.float32)
    return StoredHead(
        weight=bits_of(weight) if kind == "bfloat16" else weight.astype(kind),
        weight_kind=kind,
        bias=generator.normal(size=vocab_size).astype(np.float32) if bias else None,
        **{"scale": 1.5, "soft_cap": 20.0, **more},
    )


def make_hidden(kind: HiddenKind, values_TD: Float64) -> dict[str, NDArray[Any]]:
    """Some hidden states as they are stored: the fields of ``Targets``."""
    if kind == "bf16":
        return {"hidden": bits_of(values_TD)}
    scale = (np.abs(values_TD).max(axis=1) / 127).astype(np.float32)
    return {"hidden": np.round(values_TD / scale[:, None]).astype(np.int8), "hidden_scale": scale}


def exact_logits(head: StoredHead, stored: dict[str, NDArray[Any]]) -> Float64:
    """[T, V] in float64, typed from the definition: soft cap of the scale times the product and the bias."""

    def widen(values: NDArray[Any]) -> Float64:
        if values.dtype != np.uint16:
            return values.astype(np.float64)
        bits = np.zeros((*values.shape, 2), np.uint16)
        bits[..., 1] = values  # little-endian: the upper half of a float32
        return bits.view("<f4")[..., 0].astype(np.float64)

    hidden_TD = widen(stored["hidden"])
    if "hidden_scale" in stored:
        hidden_TD = hidden_TD * stored["hidden_scale"].astype(np.float64)[:, None]
    logits: Float64 = hidden_TD @ widen(head.weight).T
    logits = head.scale * (logits + (0.0 if head.bias is None else head.bias.astype(np.float64)))
    return logits if head.soft_cap is None else head.soft_cap * np.tanh(logits / head.soft_cap)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


_ENCODED: dict[tuple[ArraySpec, bytes, int], bytes | None] = {}
_METADATA: dict[tuple[ArraySpec, int], bytes] = {}
_encode, _metadata = ArraySpec.encode, ArraySpec.metadata


def speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that write one cache a hundred times: encode the same values once, and do not wait for the device."""

    def encode(spec: ArraySpec, values: NDArray[Any]) -> bytes | None:
        key = (spec, values.tobytes(), len(values))
        if key not in _ENCODED:
            _ENCODED[key] = _encode(spec, values)
        return _ENCODED[key]

    def metadata(spec: ArraySpec, length: int) -> bytes:
        if (spec, length) not in _METADATA:
            _METADATA[spec, length] = _metadata(spec, length)
        return _METADATA[spec, length]

    monkeypatch.setattr(ArraySpec, "encode", encode)
    monkeypatch.setattr(ArraySpec, "metadata", metadata)
    monkeypatch.setattr(os, "fsync", lambda _: None)
