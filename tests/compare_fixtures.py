"""Tiny caches from dense float64 distributions, and the figures computed from those in plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Corpus
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.targets import TargetsWriter, plan_layout

Dense = NDArray[np.float64]


@dataclass(frozen=True)
class Position:
    """One target position, found by walking the rows."""

    row: int
    held_out: bool
    read: int
    true_next: int


def make_corpus(
    cache: Path, *, vocab_size: int = 40, num_rows: int = 9, length: int = 20, seed: int = 0, tokenizer: str = "t"
) -> tuple[Corpus, list[Position]]:
    """Rows of random tokens, each with up to three documents, some tokens not wanted, every third row held out."""
    generator = np.random.default_rng(seed)
    positions = []
    with CorpusWriter(cache, vocab_size=vocab_size) as writer:
        for row in range(num_rows):
            size = int(generator.integers(length // 2, length + 1))
            tokens = generator.integers(0, vocab_size, size)
            start = np.zeros(size, bool)
            start[0] = row % 2 == 0
            start[generator.integers(1, size, 2)] = True
            wanted = generator.random(size) < 0.9
            held_out = row % 3 == 0
            writer.append(tokens, start, wanted, held_out=held_out)
            begin = 0
            for t in range(size - 1):
                begin = t if start[t] else begin
                if wanted[t + 1] and not start[t + 1]:
                    positions.append(Position(row, held_out, t - begin + 1, int(tokens[t + 1])))
        corpus = writer.finish(
            tokenizer_files={"tokenizer.json": b"{}"},
            tokenizer={"fingerprint": {"all": tokenizer}, "vocab_size": vocab_size},
            source={"kind": "test", "seed": seed},
            recipe={"context_length": length},
            report={},
        )
    return corpus, positions


def random_dense(num: int, vocab_size: int, *, seed: int, spread: float = 2.0, near: Dense | None = None) -> Dense:
    """[num, vocab_size] float64 distributions; ``near``: perturb these by ``spread`` instead."""
    noise = np.random.default_rng(seed).standard_normal((num, vocab_size)) * spread
    logits = noise if near is None else np.log(near) + noise
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def head_of(p: Sequence[float], k: int) -> list[int]:
    return sorted(range(len(p)), key=lambda i: (-p[i], i))[:k]


def make_targets(dense: Dense, true_next: Sequence[int], *, top_k: int, num_samples: int, seed: int = 0) -> Targets:
    """What a capture would store of dense distributions, position by position."""
    generator = np.random.default_rng(seed)
    num, vocab_size = dense.shape
    ids = np.empty((num, top_k), np.int32)
    logprobs = np.empty((num, top_k), np.float32)
    samples = np.empty((num, num_samples), np.int32)
    scalars = np.empty((4, num), np.float32)
    for t in range(num):
        p = dense[t]
        ids[t] = head_of(list(p), top_k)
        logprobs[t] = [math.log(p[i]) for i in ids[t]]
        tail = [i for i in range(vocab_size) if i not in set(ids[t].tolist())]
        mass = math.fsum(p[i] for i in tail)
        inner = [p[i] / mass for i in tail] if tail else []
        entropy = -math.fsum(x * math.log(x) for x in inner if x > 0)
        y = true_next[t]
        others = math.fsum(p[i] for i in range(vocab_size) if i != y)
        scalars[:, t] = math.log(mass) if tail else -math.inf, entropy, math.log(p[y]), math.log(others)
        if num_samples:
            samples[t] = generator.choice(tail, num_samples, p=np.array(inner) / sum(inner))
    return Targets(
        token_ids=ids,
        logprobs=logprobs,
        tail_samples=samples,
        log_tail=scalars[0],
        tail_entropy=scalars[1],
        log_target=scalars[2],
        log_not_target=scalars[3],
    )


def tail_sum(dense: Dense, top_k: int) -> Dense:
    """[V] the sum of the normalised tails."""
    total = np.zeros(dense.shape[1])
    for p in dense:
        tail = p.copy()
        tail[head_of(list(p), top_k)] = 0.0
        if tail.sum() > 0:
            total += tail / tail.sum()
    return total


def add_teacher(
    corpus: Corpus,
    positions: Sequence[Position],
    name: str,
    dense: Dense,
    *,
    top_k: int,
    num_samples: int,
    shard_positions: int = 50,
    stop_after: int | None = None,
) -> Targets:
    """Write a teacher; ``stop_after``: only so many shards, unfinished."""
    targets = make_targets(dense, [p.true_next for p in positions], top_k=top_k, num_samples=num_samples)
    layout = plan_layout(corpus, top_k=top_k, num_samples=num_samples, shard_positions=shard_positions, chunk=32)
    with TargetsWriter(corpus, name, layout=layout, settings={"teacher": name}) as writer:
        for shard in range(layout.num_shards if stop_after is None else stop_after):
            first, last = layout.shard_rows(shard)
            offsets = corpus.target_offsets(first, last)
            piece = slice(int(offsets[0]), int(offsets[-1]))
            writer.write_shard(shard, targets[piece], tail_sum(dense[piece], top_k))
        if stop_after is None:
            writer.finish()
    return targets


def dense_kl(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def bound_by_atoms(p: Sequence[float], q: Sequence[float], head_p: list[int], head_q: list[int], y: int) -> float:
    """KL between the common tokens, y, and the rest, in probability space."""
    atoms = [i for i in head_p if i in head_q]
    if y not in atoms:
        atoms.append(y)
    rest = [i for i in range(len(p)) if i not in atoms]
    pairs = [(p[i], q[i]) for i in atoms] + [(math.fsum(p[i] for i in rest), math.fsum(q[i] for i in rest))]
    return math.fsum(a * math.log(a / b) for a, b in pairs if a > 0)


def filled(q: Sequence[float], head: list[int], y: int, mean_tail: Sequence[float]) -> list[float]:
    """A distribution whose tail is replaced by the mean tail, y apart."""
    known = set(head) | {y}
    left = math.fsum(q[i] for i in range(len(q)) if i not in known)
    mass = math.fsum(mean_tail[i] for i in range(len(q)) if i not in known)
    return [q[i] if i in known else left * mean_tail[i] / mass for i in range(len(q))]
