"""Small real caches for the tests of training: a tiny tokenizer, packed rows, a random model's distributions.

The teacher's log-probs are computed for each document alone, so that they know nothing of packing. They are
written with the storage's own writers and read back through its reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from places import cache_folder
from tokenizer_fixtures import build_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tailcache.storage.alignment import next_tokens, segment_ids, target_positions
from tailcache.storage.codec import Targets
from tailcache.storage.corpus import Corpus
from tailcache.storage.corpus_writer import CorpusWriter
from tailcache.storage.fingerprint import fingerprint
from tailcache.storage.reader import Teacher, open_cache
from tailcache.storage.targets import TargetsWriter, plan_layout
from tailcache.trainers.batches import TARGET_FIELDS
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.objective import Objective

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and on a busy machine wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiny_model(vocab_size: int, *, model_type: str = "llama", seed: int = 0, std: float = 0.25, **sizes: Any) -> Any:
    """A random causal language model with weights large enough for distributions that are far from uniform."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab_size,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **(sizes or LLAMA),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any = AutoModelForCausalLM.from_config
        model = build(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def make_corpus(
    cache: Path,
    tokenizer: Any = None,
    *,
    num_rows: int = 24,
    context: int = 24,
    packed: bool = True,
    held_out_every: int = 4,
    seed: int = 0,
) -> Corpus:
    """Rows of different lengths; packed ones hold several documents, some of which go on in the next row."""
    tokenizer = tokenizer or build_tokenizer("wordlevel")
    vocab_size = len(tokenizer)
    generator = np.random.default_rng(seed)
    saved = cache.parent / (cache.name + "-tokenizer")
    tokenizer.save_pretrained(saved)
    with CorpusWriter(cache, vocab_size=vocab_size) as writer:
        for row in range(num_rows):
            length = context if row % 3 else int(generator.integers(2, context))
            tokens = generator.integers(0, vocab_size, length)
            starts = np.zeros(length, dtype=bool)
            starts[0] = not packed or row % 2 == 0  # otherwise it continues the row before
            if packed:
                starts |= generator.random(length) < 0.15
            wanted = generator.random(length) < 0.9
            writer.append(tokens, starts, wanted, held_out=held_out_every > 0 and row % held_out_every == 1)
        return writer.finish(
            tokenizer_files={p.name: p.read_bytes() for p in sorted(saved.iterdir())},
            tokenizer={"fingerprint": fingerprint(tokenizer), "vocab_size": vocab_size},
            source={"name": "test"},
            recipe={"packing": packed},
            report={},
        )


@torch.no_grad()
def logprobs_of(model: Any, corpus: Corpus) -> tuple[Tensor, NDArray[np.int64]]:
    """[T, V] float64 log-probs of all target positions, one document at a time, and [T] the true next tokens."""
    rows = corpus.rows(0, corpus.num_rows)
    segments = segment_ids(rows.document_start, rows.offsets)
    logits = torch.zeros((len(rows.tokens), corpus.vocab_size))
    for segment in range(int(segments[-1]) + 1):
        where = np.flatnonzero(segments == segment)
        ids = torch.from_numpy(rows.tokens[where])[None]
        logits[torch.from_numpy(where)] = model(input_ids=ids, use_cache=False).logits[0, :, : corpus.vocab_size]
    positions = target_positions(rows.supervised)
    return torch.log_softmax(logits[torch.from_numpy(positions)].double(), -1), next_tokens(rows.tokens, positions)


def write_teacher(
    corpus: Corpus,
    logprobs_TV: Tensor,
    next_tokens_T: NDArray[np.int64],
    *,
    name: str,
    top_k: int,
    num_samples: int,
    temperatures: tuple[float, ...] = (),
) -> Teacher:
    """Store distributions as a teacher of the corpus, in several shards."""
    from loss_cases import cached

    terms = cached(logprobs_TV, top_k, num_samples, torch.from_numpy(next_tokens_T), temperatures=temperatures)
    tail = logprobs_TV.exp().scatter(-1, terms.token_ids, 0.0)
    tail = tail / tail.sum(-1, keepdim=True).clamp_min(1e-300)
    wanted = [*TARGET_FIELDS, *(["log_z_tail"] if temperatures else [])]
    arrays = {
        field: getattr(terms, field).numpy().astype(np.int32 if "ids" in field or "samples" in field else np.float32)
        for field in wanted
    }
    targets = Targets(**arrays)
    layout = plan_layout(corpus, top_k=top_k, num_samples=num_samples, shard_positions=200, temperatures=temperatures)
    with TargetsWriter(corpus, name, layout=layout, settings={"name": name}) as writer:
        for shard in range(layout.num_shards):
            offsets = corpus.target_offsets(*layout.shard_rows(shard))
            part = slice(int(offsets[0]), int(offsets[-1]))
            writer.write_shard(shard, targets[part], tail[part].sum(0).numpy())
        writer.finish()
    return open_cache(cache_folder(corpus)).teacher(name)


def make_cache(
    cache: Path,
    *,
    top_k: int | None = 12,
    num_samples: int = 6,
    name: str = "teacher",
    seed: int = 0,
    temperatures: tuple[float, ...] = (),
    **corpus: Any,
) -> Teacher:
    """A corpus and one random teacher over it; `top_k` None stores the whole vocabulary."""
    made = make_corpus(cache, **corpus)
    model = tiny_model(made.vocab_size, seed=seed)
    logprobs, targets = logprobs_of(model, made)
    whole = top_k is None
    return write_teacher(
        made,
        logprobs,
        targets,
        name=name,
        top_k=made.vocab_size if whole else int(top_k or 0),
        num_samples=0 if whole else num_samples,
        temperatures=temperatures,
    )


def objective_for(teacher: Teacher, *losses: str | LossConfig, clm_weight: float = 1.0, **parameters: Any) -> Objective:
    """An objective from names (all with the same parameters) or ready settings; "clm" adds nothing."""
    configs = [
        each if isinstance(each, LossConfig) else LossConfig(name=each, **parameters)  # type: ignore[arg-type]
        for each in losses
        if each != "clm"
    ]
    return Objective.of(clm_weight, configs, teacher)
