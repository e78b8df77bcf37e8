"""What the decoded targets of a teacher say about each other and about the corpus; what cannot be is a fault."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.alignment import next_tokens, target_positions
from tailcache.storage.codec import SCALARS, Targets, max_step
from tailcache.storage.corpus import Rows
from tailcache.storage.hidden import StoredHead, finite_bfloat16, hidden_float32
from tailcache.storage.layout import Layout
from tailcache.storage.reader import Teacher

__all__ = ["teacher_problems"]

_BLOCK_POSITIONS = 1 << 15
_BLOCK_TOKENS = 1 << 12
_PRODUCTS = 32  # positions of a block whose whole distribution is computed
_RELATIVE = 2.0**-12  # four times the codec's rounding of a scalar
_ROUNDING = 1e-3  # nats; of logits in float32
_UNDERFLOW = 1e-37  # a scale of int8 so small that float32 loses it


def teacher_problems(teacher: Teacher) -> Iterator[tuple[int | None, str]]:
    """Decode every target and check the fields against each other and against the corpus.

    Args:
      teacher: a finished one, whose files are what was written.

    Yields:
      The shard, or none where it is not one shard's, and what was expected and found.

    Raises:
      TailcacheError: something cannot be read at all.
    """
    layout, corpus = teacher.layout, teacher.corpus
    mean = teacher.mean_tail
    if (mean < 0).any() or (layout.top_k < layout.vocab_size and abs(float(mean.sum(dtype=np.float64)) - 1) > 1e-3):
        yield None, f"mean_tail: expected probabilities that sum to 1, found {mean.sum()}"
    head = teacher.head() if layout.hidden is not None else None
    total = 0
    step = max(1, _BLOCK_POSITIONS * corpus.num_rows // max(1, corpus.num_targets))
    for shard in range(layout.num_shards):
        first, last = layout.shard_rows(shard)
        found = 0
        sums = {"log_target": 0.0, "tail_mass": 0.0}
        for a in range(first, last, step):
            b = min(a + step, last)
            rows, targets = corpus.rows(a, b), teacher.rows(a, b, optional=teacher.optional)
            found += len(targets)
            sums["log_target"] += float(targets.log_target.sum(dtype=np.float64))
            sums["tail_mass"] += float(np.exp(targets.log_tail.astype(np.float64)).sum())
            for problem in itertools.chain(
                _target_problems(targets, rows, layout),
                _tempered_problems(targets, layout),
                _hidden_problems(targets, head, _level_slack(layout)) if head is not None else (),
            ):
                yield shard, f"rows [{a}, {b}): {problem}"
        record = teacher.commit(shard)
        if record.positions != found:
            yield shard, f"expected {record.positions} positions, found {found}"
        for name, value in sums.items():
            if abs(value - record.sums[name]) > (1e-3 + _scalar_error(layout)) * (1 + abs(value)):
                yield shard, f"sum of {name}: stored {record.sums[name]}, computed {value}"
        total += found
    if total != teacher.num_targets:
        yield None, f"expected {teacher.num_targets} positions, found {total}"


def _target_problems(targets: Targets, rows: Rows, layout: Layout) -> Iterator[str]:
    if len(targets) == 0:
        return
    in_order = np.sort(targets.token_ids, axis=1)
    if (np.diff(in_order, axis=1) == 0).any():
        yield "a token twice in one top-K"
    if (np.diff(targets.logprobs, axis=1) > 0).any():
        yield "log-probabilities that are not most likely first"
    if targets.num_samples and _any_member(targets.tail_samples, in_order, layout.vocab_size):
        yield "a tail sample that is one of the top-K"
    for name in SCALARS:
        values = getattr(targets, name)
        if np.isnan(values).any() or (name != "tail_entropy" and (values > 0).any()):
            yield f"{name}: expected logs of probabilities, found {values[np.isnan(values) | (values > 0)][:3]}"
    tail = layout.vocab_size - layout.top_k
    largest = np.log(tail) if tail else 0.0
    if (targets.tail_entropy < -2e-3).any() or (targets.tail_entropy > largest * (1 + _RELATIVE) + 2e-3).any():
        yield f"tail_entropy: expected 0 to log({tail}) nats, found up to {targets.tail_entropy.max()}"
    if np.isneginf(targets.log_tail).any() != (tail == 0):
        yield "log_tail: expected -inf exactly where the top-K is the whole vocabulary"
    mass = np.exp(targets.log_target.astype(np.float64)) + np.exp(targets.log_not_target.astype(np.float64))
    if (np.abs(mass - 1) > _RELATIVE).any():
        yield f"log_target and log_not_target: expected masses that sum to 1, found {mass[np.argmax(np.abs(mass - 1))]}"
    target = next_tokens(rows.tokens, target_positions(rows.supervised))
    hits = targets.token_ids == target[:, None]
    inside = hits.any(axis=1)
    stored = targets.logprobs[inside][hits[inside]]
    exact = targets.log_target[inside]
    slack = _level_slack(layout) + _scalar_error(layout)
    off = np.abs(stored - exact) > slack + np.maximum(0, -exact - 64) / 128 + _RELATIVE * np.abs(exact)
    if off.any():
        yield "log_target: not the top-K's own value where the true next token is one of them; misaligned?"
    last = targets.logprobs[~inside][:, -1]
    outside = targets.log_target[~inside] > last + slack + np.maximum(0, -last - 64) / 128 + _RELATIVE * np.abs(last)
    if outside.any():
        yield "log_target: more likely than the top-K though the true next token is not one of them; misaligned?"


def _tempered_problems(targets: Targets, layout: Layout) -> Iterator[str]:
    """``log_z_tail`` against what the other fields leave possible.

    With s = 1/tau, log sum p~^s / (1 - s) is the tail's Renyi entropy of order s. It falls as s grows, from log N of
    the N tokens at s = 0 through the stored entropy at s = 1 to -log of the largest p~ at infinity.
    """
    tail = layout.vocab_size - layout.top_k
    if tail == 0 or len(targets) == 0:
        if np.isfinite(targets.log_z_tail).any():
            yield "log_z_tail: expected -inf where the top-K is the whole vocabulary"
        return
    log_tail, entropy = targets.log_tail.astype(np.float64), targets.tail_entropy.astype(np.float64)
    last = targets.logprobs[:, -1].astype(np.float64)
    # The last stored log-prob is a level's.
    last_slack = _level_slack(layout) + _scalar_error(layout) + np.maximum(0, -last - 64) / 128
    for i, tau in enumerate(layout.temperatures):
        stored = targets.log_z_tail[:, i].astype(np.float64)
        renyi = (stored - log_tail / tau) / (1 - 1 / tau)
        rounding = _scalar_error(layout) * (1 + 1 / abs(tau - 1))  # of the log of the tail's mass, and of the entropy
        slack = 1e-3 + rounding + _RELATIVE * ((np.abs(stored) + np.abs(log_tail) / tau) / abs(1 - 1 / tau) + entropy)
        low = entropy if tau > 1 else np.maximum(0, log_tail - last - last_slack)
        high = np.full(len(stored), np.log(tail)) if tau > 1 else entropy
        off = ~np.isfinite(stored) | ~((renyi >= low - slack) & (renyi <= high + slack))
        if off.any():
            t = int(np.argmax(off))
            yield (
                f"log_z_tail at temperature {tau:g}: expected the Renyi entropy of order {1 / tau:g} to be from "
                f"{low[t]} to {high[t]} nats, found {renyi[t]}"
            )


def _hidden_problems(targets: Targets, head: StoredHead, level_slack: float) -> Iterator[str]:
    """Hidden states by themselves at every position, and times the head against the top-K at some: all takes hours.

    Rounding a hidden state by e moves a token's logit by at most |e| . |w|, w being its weights; soft caps: by less.
    """
    if len(targets) == 0:
        return
    hidden, scale = targets.hidden, targets.hidden_scale
    good = np.isfinite(scale) & (scale >= 0)
    if hidden.dtype == np.uint16:
        good &= finite_bfloat16(hidden.view(np.uint16))
    else:
        largest = np.maximum(hidden.max(axis=1), -hidden.min(axis=1).astype(np.int16))
        good &= (largest == 127) | ((largest == 0) & (scale < _UNDERFLOW))
    if not good.all():
        t = int(np.argmin(good))
        yield f"hidden: expected finite numbers, of int8 the largest being 127; found {hidden[t]} times {scale[t]}"
        return
    some = targets[np.unique(np.linspace(0, len(targets) - 1, _PRODUCTS).astype(np.int64))]
    hidden_TD = hidden_float32(some.hidden, some.hidden_scale)
    steps_T1 = some.hidden_scale[:, None] / 2 if hidden.dtype == np.int8 else np.float32(0)
    error_TD = steps_T1 + np.abs(hidden_TD) / 256  # half a step of int8; of bfloat16, 1/256 of the number
    logits_TV = head.logits(hidden_TD).astype(np.float64)
    error_TV = np.empty_like(logits_TV)
    for first in range(0, len(head.weight), _BLOCK_TOKENS):
        weight_bD = np.abs(head.rows(first, min(first + _BLOCK_TOKENS, len(head.weight))))
        error_TV[:, first : first + len(weight_bD)] = abs(head.scale) * (error_TD @ weight_bD.T)
    every, first_T, best_T = np.arange(len(some)), some.token_ids[:, 0], logits_TV.argmax(axis=1)
    lead_T = logits_TV[every, best_T] - logits_TV[every, first_T]
    if (lead_T > error_TV[every, best_T] + error_TV[every, first_T] + _ROUNDING).any():
        t = int(np.argmax(lead_T))
        yield (
            f"hidden: times the head, expected token {first_T[t]} to be the most likely one, as stored; found "
            f"{best_T[t]}, by {lead_T[t]:.3g} nats; misaligned?"
        )
        return
    largest_T = logits_TV.max(axis=1)
    log_total_T = largest_T + np.log(np.exp(logits_TV - largest_T[:, None]).sum(axis=1))
    off_T = np.abs(logits_TV[every, first_T] - log_total_T - some.logprobs[:, 0])
    if (off_T > error_TV[every, first_T] + error_TV.max(axis=1) + level_slack + _ROUNDING).any():
        t = int(np.argmax(off_T))
        yield (
            f"hidden: times the head, expected log-probability {some.logprobs[t, 0]} for token {first_T[t]}, found "
            f"{logits_TV[t, first_T[t]] - log_total_T[t]}; misaligned?"
        )


def _level_slack(layout: Layout) -> float:
    """Nats; half of the widest step up and down."""
    return max_step(layout.kl_budget) + 0.01


def _scalar_error(layout: Layout) -> float:
    """Nats; half of a step."""
    return 0.5 / layout.scalar_steps


def _any_member(samples: NDArray[np.int32], sorted_ids: NDArray[np.int32], vocab_size: int) -> bool:
    base = np.arange(len(sorted_ids), dtype=np.int64)[:, None] * vocab_size
    keys = (sorted_ids + base).ravel()
    wanted = (samples + base).ravel()
    place = np.searchsorted(keys, wanted)
    return bool((keys[np.minimum(place, len(keys) - 1)] == wanted).any())
