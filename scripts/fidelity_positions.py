"""Real positions to measure fidelity on: a teacher over held-out text, students, and what it costs to store.

The text is the standard library's docstrings; the teacher SmolLM2-135M-Instruct. Held-out documents are measured, the
others train the one student that is trained here. Everything is computed as capture does it (bfloat16 trunk, float32
logits, every document alone), and bytes are those of the real codec and the real array specifications.

Legend: N all target positions, T measured ones, t those of a chunk, V vocabulary, D hidden width, K kept, m draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numcodecs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tailcache.pipeline.segments import batch_segments
from tailcache.pipeline.teacher import Teacher
from tailcache.scripts.fidelity_schemes import Draws, Tails, certain, draw_all, tail_entropy, tails_of
from tailcache.storage.alignment import next_tokens, segment_ids, target_positions
from tailcache.storage.arrays import ArraySpec
from tailcache.storage.codec import Codec, Targets, logprob_levels, vocabulary_order
from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.targets import plan_layout

__all__ = [
    "Bytes",
    "TeacherSide",
    "int8_rounded",
    "mean_kl",
    "megatron_bytes",
    "probabilities",
    "rows_where",
    "run_trunk",
    "seen_elsewhere",
    "small_student",
    "targets_of",
    "teacher_side",
    "train",
]

_CHUNK = 128  # positions whose distributions are sorted at a time


@dataclass(frozen=True, kw_only=True)
class TeacherSide:
    """What is known of the teacher at T positions.

    Attributes:
      tails: its distributions in short.
      next_p: [T] float64, its probability of the true next token.
      draws: by (scheme, K, m).
    """

    tails: Tails
    next_p: Tensor
    draws: dict[tuple[str, int, int], Draws]


def rows_where(rows: Rows, wanted: NDArray[np.bool_]) -> Rows:
    """Some of the rows."""
    lengths = np.diff(rows.offsets)
    tokens = np.repeat(wanted, lengths)
    return Rows(
        row_indices=rows.row_indices[wanted],
        offsets=np.concatenate([[0], np.cumsum(lengths[wanted])]),
        tokens=rows.tokens[tokens],
        document_start=rows.document_start[tokens],
        supervised=rows.supervised[tokens],
        held_out=rows.held_out[wanted],
    )


def targets_of(rows: Rows) -> tuple[Tensor, Tensor]:
    """The target positions of some rows: [N] int64 true next tokens, and [N] int64 the segments they are in."""
    positions = target_positions(rows.supervised)
    segments_N = segment_ids(rows.document_start, rows.offsets)
    return torch.from_numpy(next_tokens(rows.tokens, positions)), torch.from_numpy(segments_N[positions])


def run_trunk(model: Teacher, rows: Rows) -> Tensor:
    """[N, D] float32: hidden states at all target positions, every document run alone."""
    found: Tensor | None = None
    for batch in batch_segments(rows, 4096):
        hidden_BLD = model.hidden(torch.from_numpy(batch.input_ids))
        hidden_tD = hidden_BLD[torch.from_numpy(batch.segment), torch.from_numpy(batch.place)].float()
        if found is None:
            found = hidden_tD.new_zeros((int(rows.supervised.sum()), hidden_tD.shape[1]))
        found[torch.from_numpy(batch.target)] = hidden_tD
    assert found is not None
    return found


def probabilities(model: Teacher, hidden_TD: Tensor) -> Callable[[slice], Tensor]:
    """From rows to [t, V] float32 probabilities."""

    def of(rows: slice) -> Tensor:
        with torch.inference_mode():
            return model.logits(hidden_TD[rows])[:, : model.vocab_size].softmax(-1)

    return of


def int8_rounded(hidden_TD: Tensor) -> Tensor:
    """Hidden states as 8-bit integers with one scale per position, and back."""
    codes_TD, scale_T1 = int8_codes(hidden_TD)
    return codes_TD * scale_T1


def teacher_side(
    p: Callable[[slice], Tensor],
    next_T: Tensor,
    *,
    num_ranks: int,
    wanted: list[tuple[str, int, int]],
    num_seeds: int,
    seed: int,
) -> TeacherSide:
    """Sort every distribution, summarise it and draw from its tails.

    Args:
      p: rows to [t, V] probabilities.
      next_T: [T] the true next tokens.
      num_ranks: R, ids kept in the summary.
      wanted: (scheme, K, m) to draw.
      num_seeds: independent repetitions of the draws.
      seed: of the first uniform number.
    """
    generator = torch.Generator().manual_seed(seed)
    tails, next_p, draws = [], [], []
    for first in range(0, len(next_T), _CHUNK):
        rows = slice(first, min(first + _CHUNK, len(next_T)))
        p_tV = p(rows)
        sorted_tV, order_tV = p_tV.sort(dim=-1, descending=True)
        part = tails_of(sorted_tV, order_tV, num_ranks)
        tails.append(part)
        next_p.append(p_tV.gather(-1, next_T[rows, None])[:, 0].double())
        draws.append(draw_all(p_tV, sorted_tV, order_tV, part, wanted, num_seeds=num_seeds, generator=generator))
    return TeacherSide(
        tails=Tails.concatenate(tails),
        next_p=torch.cat(next_p),
        draws={key: Draws.concatenate([part[key] for part in draws]) for key in wanted},
    )


def seen_elsewhere(p: Callable[[slice], Tensor], num: int, top_ks: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """What a cache knows from other positions than those that are measured.

    Args:
      p: rows to [t, V] probabilities of ``num`` other positions.
      num: how many.
      top_ks: K for which the mean tail is wanted.

    Returns:
      [num, largest K] their top-K ids, and by K [V] float64 the mean of their normalised tails.
    """
    ids, sums = [], {top_k: torch.zeros(0, dtype=torch.float64) for top_k in top_ks}
    for first in range(0, num, _CHUNK):
        p_tV = p(slice(first, min(first + _CHUNK, num)))
        ids.append(p_tV.topk(max(top_ks)).indices)
        for top_k in top_ks:
            tail_tV = p_tV.scatter(-1, ids[-1][:, :top_k], 0.0)
            sum_V = (tail_tV.sum(-1).reciprocal() @ tail_tV).double()
            sums[top_k] = sums[top_k] + sum_V if len(sums[top_k]) else sum_V
    return torch.cat(ids), {top_k: sum_V / num for top_k, sum_V in sums.items()}


def mean_kl(p: Callable[[slice], Tensor], q: Callable[[slice], Tensor], num: int) -> float:
    """Mean KL(p || q) in nats over ``num`` positions."""
    total = 0.0
    for first in range(0, num, 4 * _CHUNK):
        rows = slice(first, min(first + 4 * _CHUNK, num))
        p_tV, q_tV = p(rows), q(rows)
        total += float((torch.xlogy(p_tV, p_tV) - torch.xlogy(p_tV, q_tV)).sum(dtype=torch.float64))
    return total / num


def small_student(vocab_size: int, *, hidden_size: int, num_layers: int, seed: int) -> Any:
    """A randomly initialised Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Any = AutoModelForCausalLM.from_config
        return build(config, dtype=torch.float32).eval()


def train(
    model: Any,
    rows: Rows,
    teacher: Callable[[Tensor], Tensor],
    *,
    epochs: float,
    batch_positions: int = 1024,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> int:
    """Train a student: cross-entropy plus exact KL from the live teacher.

    Args:
      model: a causal language model with tied embeddings; changed in place.
      rows: to train on.
      teacher: indices of their target positions to [t, V] probabilities.
      epochs: passes over the training positions.
      batch_positions: positions per step, padding included.
      learning_rate: the largest, of AdamW; a tenth of the steps to get there, then a cosine to 0.
      seed: of the order of batches.

    Returns:
      How many positions it was trained on, counted as often as they were seen.
    """
    batches = list(batch_segments(rows, batch_positions))
    num_steps = max(1, round(epochs * len(batches)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    warmup = max(1, num_steps // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    random = np.random.default_rng(seed)
    order = np.concatenate([random.permutation(len(batches)) for _ in range(math.ceil(epochs))])[:num_steps]
    weight_VD, seen = model.get_output_embeddings().weight, 0
    for number in order:
        batch = batches[number]
        index_t = torch.from_numpy(batch.target)
        seen += len(index_t)
        hidden_BLD = model.model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).last_hidden_state
        hidden_tD = hidden_BLD[torch.from_numpy(batch.segment), torch.from_numpy(batch.place)]
        with torch.no_grad():
            # d(CE + KL)/dz = 2 q - p - onehot: written out, since autograd would hold several [t, V] more.
            gradient_tV = (hidden_tD @ weight_VD.t()).softmax(-1).mul_(2).sub_(teacher(index_t))
            gradient_tV[torch.arange(len(index_t)), torch.from_numpy(batch.next_token)] -= 1
            gradient_tV /= len(index_t)
            head_VD, below_tD = gradient_tV.t() @ hidden_tD, gradient_tV @ weight_VD
        optimizer.zero_grad()
        hidden_tD.backward(below_tD)
        weight_VD.grad = head_VD if weight_VD.grad is None else weight_VD.grad.add_(head_VD)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return seen


def int8_codes(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states as 8-bit integers, [T, D], and one scale per position, [T, 1]."""
    scale_T1 = hidden_TD.abs().amax(-1, keepdim=True) / 127
    return (hidden_TD / scale_T1).round().to(torch.int8), scale_T1


class Bytes:
    """Bytes per position, by the real codec, of T consecutive positions as one shard.

    Args:
      corpus: gives the array specifications and token counts.
      tails: of the positions, in the corpus' order.
      next_T: [T] true next tokens.
      next_p: [T] their probabilities.
      seen_ids: top-K ids of *other* positions; they order the vocabulary, as a first shard does for those after it.
    """

    def __init__(self, corpus: Corpus, tails: Tails, next_T: Tensor, next_p: Tensor, seen_ids: NDArray[Any]) -> None:
        self._corpus, self._tails = corpus, tails
        self._order = vocabulary_order(seen_ids, corpus.token_counts)
        others = tails.p.masked_fill(tails.ids == next_T[:, None], 0.0).sum(-1) + tails.mass[:, -1]
        beyond = ~(tails.ids == next_T[:, None]).any(-1)
        self._log_target = next_p.log().float().numpy()
        self._log_not_target = torch.where(beyond, torch.log1p(-next_p), others.log()).float().numpy()
        self._heads: dict[int, float] = {}

    def _encode(self, top_k: int, draws_Tm: NDArray[np.int32]) -> dict[str, tuple[Any, NDArray[Any]]]:
        """Specification and stored values of every field."""
        num = len(self._tails)
        targets = Targets(
            token_ids=self._tails.ids[:, :top_k].numpy().astype(np.int32),
            logprobs=self._tails.p[:, :top_k].log().float().numpy(),
            log_tail=self._tails.mass[:, top_k].log().float().numpy(),
            tail_entropy=tail_entropy(self._tails, top_k).float().numpy(),
            log_target=self._log_target,
            log_not_target=self._log_not_target,
            tail_samples=draws_Tm,
        )
        # Without classes, which a cache of this size would have: with them ids take fewer bytes than are counted here.
        layout = plan_layout(
            self._corpus, top_k=top_k, num_samples=draws_Tm.shape[1], shard_positions=num, classes=(1, 0)
        )
        specs = layout.fields()
        encoded = Codec(self._order, logprob_levels(top_k)).encode(targets)
        shard = -(-num // layout.chunk) * layout.chunk
        return {name: (replace(specs[name], shard=shard), values) for name, values in encoded.items()}

    def head(self, top_k: int) -> float:
        """All fields but the draws."""
        if top_k not in self._heads:
            fields = self._encode(top_k, np.empty((len(self._tails), 0), np.int32))
            self._heads[top_k] = sum(len(spec.encode(values) or b"") for spec, values in fields.values())
        return self._heads[top_k] / len(self._tails)

    def draws(self, top_k: int, draws: Draws) -> float:
        """The draws of the first seed."""
        spec, values = self._encode(top_k, draws.ids[0].numpy())["tail_sample_codes"]
        return len(spec.encode(values) or b"") / len(self._tails)

    def hidden_int8(self, hidden_TD: Tensor) -> float:
        """Hidden states of the positions in 8 bits, and their scales; the head, once per cache, is not counted."""
        codes_TD, scale_T1 = int8_codes(hidden_TD)
        arrays = {"hidden": codes_TD.numpy(), "hidden_scale": scale_T1[:, 0].numpy()}
        total, num = 0, len(hidden_TD)
        for name, values in arrays.items():
            columns = values.shape[1] if values.ndim > 1 else None
            spec = ArraySpec(name=name, dtype=str(values.dtype), columns=columns, chunk=num, shard=num, level=9)
            total += len(spec.encode(values) or b"")
        return total / num

    def threshold_draws(self, top_k: int, draws: Draws) -> float:
        """The draws of `threshold`: the ids, how many are certain, and the levels of the certain ones' log-probs.

        The certain ones are the next ranks of the head, so they are coded as the head is; the others as draws are.
        """
        num_draws = draws.ids.shape[-1]
        certain_T1 = certain(self._tails, top_k, num_draws).numpy()[:, None]
        is_certain_Tm = np.arange(num_draws) < certain_T1
        nothing = np.empty((len(self._tails), 0), np.int32)
        gap_spec, gaps_TK = self._encode(top_k + num_draws, nothing)["logprob_gaps"]
        spec, _ = self._encode(top_k, draws.ids[0].numpy())["tail_sample_codes"]
        rank_of = np.empty(len(self._order), np.int64)
        rank_of[self._order] = np.arange(len(self._order))
        ranks_Tm = rank_of[draws.ids[0].numpy()]
        rest_Tm = np.sort(np.where(is_certain_Tm, 0, ranks_Tm), axis=1)  # zeros first, in the place of the certain ones
        codes_Tm = np.where(is_certain_Tm, ranks_Tm, np.diff(rest_Tm, axis=1, prepend=0))
        arrays = [
            (spec, codes_Tm.astype(spec.dtype)),
            (
                replace(gap_spec, columns=num_draws),
                np.where(is_certain_Tm, gaps_TK[:, top_k:], 0).astype(gap_spec.dtype),
            ),
            (replace(spec, dtype="uint8", columns=1), certain_T1.astype(np.uint8)),
        ]
        return sum(len(spec.encode(values) or b"") for spec, values in arrays) / len(self._tails)


def megatron_bytes(tails: Tails, top_k: int) -> tuple[float, float]:
    """Bytes per position of 17-bit ids and 16-bit log-probs, packed; and after zstd."""
    ids = ((tails.ids[:, :top_k].numpy()[:, :, None] >> np.arange(17)) & 1).astype(np.uint8)
    packed = np.packbits(ids.reshape(len(tails), -1), axis=1).tobytes()
    values = tails.p[:, :top_k].log().numpy().astype(np.float16).tobytes()
    raw = math.ceil(33 * top_k / 8)
    compress = numcodecs.Zstd(level=9)
    return float(raw), (len(compress.encode(packed)) + len(compress.encode(values))) / len(tails)
