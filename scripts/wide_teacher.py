"""A teacher with a vocabulary of 151,936, for want of one that is on every machine: small, and trained for minutes.

It reads SmolLM2's tokens, spread over the larger vocabulary by one multiplication modulo its size, so that ids of a
text are as far apart as those of a tokenizer of that size. Raw random logits would be no distribution that anyone
stores; these follow the text. In training, the softmax runs over all tokens of the text and a few others, drawn anew at
every step and weighted so that they stand for all others: they are pushed down, which is what happens to rare tokens.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["VOCAB_SIZE", "spread_tokens", "train_wide"]

VOCAB_SIZE = 151_936
_FACTOR = 62_903  # has no common factor with the size, so that no two tokens meet
_WIDTH, _LENGTH, _ROWS, _OTHERS = 128, 128, 12, 2048


def spread_tokens(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Other ids for some tokens, any shape: the same for the same token, and different ones for different tokens."""
    assert math.gcd(_FACTOR, VOCAB_SIZE) == 1
    spread: NDArray[np.int64] = tokens * _FACTOR % VOCAB_SIZE
    return spread


def train_wide(folder: Path, tokens: NDArray[np.int64], *, seconds: float, vocab_size: int = VOCAB_SIZE) -> float:
    """Train a small Llama from random weights and save it.

    Args:
      folder: where to.
      tokens: [N] of a text, already spread.
      seconds: how long; a step is finished that has begun.
      vocab_size: of the model.

    Returns:
      The mean loss of the last twenty steps, nats.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=_WIDTH, intermediate_size=4 * _WIDTH, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    generator, start = np.random.default_rng(0), time.perf_counter()
    losses: list[float] = []
    used, targets = np.unique(tokens, return_inverse=True)
    others = np.setdiff1d(np.arange(vocab_size), used)
    num_others = min(_OTHERS, len(others))
    while not losses or time.perf_counter() - start < seconds:
        places = generator.integers(0, max(1, len(tokens) - _LENGTH - 1), _ROWS)
        inputs = torch.from_numpy(np.stack([tokens[place : place + _LENGTH] for place in places]))
        wanted = torch.from_numpy(np.stack([targets[place + 1 : place + _LENGTH + 1] for place in places]))
        ids = torch.from_numpy(np.concatenate([used, generator.choice(others, num_others, replace=False)]))
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        logits = hidden @ model.get_input_embeddings().weight[ids].t()
        if num_others:
            logits[:, len(used) :] += math.log(len(others) / num_others)
        loss: Any = torch.nn.functional.cross_entropy(logits, wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) % 20 == 0:
            print(f"wide teacher: step {len(losses)}, loss {np.mean(losses[-20:]):.2f}", flush=True)
    model.save_pretrained(folder)
    return float(np.mean(losses[-20:]))
