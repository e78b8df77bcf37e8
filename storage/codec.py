"""How one shard's targets become small integers and rounded floats, and back. The heart of the format.

Three ideas, each measured in docs/design.md:

* **Log-probs as gaps between levels.** A fixed table of levels quantises sqrt(p) evenly (step ``h``), because
  that is where equal steps cost equal KL: an error d in sqrt(p) costs 2 d^2 nats, whatever p. With K kept
  tokens the expected error is K h^2 / 6, and h is chosen from K so that this is at most ``KL_BUDGET``. Below
  ``sqrt(p) = 2 h / MAX_STEP`` the steps would be wider than ``MAX_STEP`` nats; from there they are that wide,
  and beyond 64 nats they grow by 1/256 each, so that every finite float32 has a level and nothing is clipped.
  What is stored is the difference of neighbouring levels, never negative and mostly small.
* **The head's mass is exact.** Decoding rescales the head so that it and ``exp(log_tail)`` sum to one. A level
  only has to say how the head's mass is shared out.
* **Ids as ranks in a vocabulary order** (most frequent in the teacher's own top-K first), because small
  numbers compress. Tokens on the same level are sorted by rank and stored as differences, which costs nothing:
  their order is below the resolution. The most likely token is never reordered.

Tail samples are a set, so they are sorted by rank and stored as differences too. The four scalars, and the sums at
other temperatures where there are any, are float32 with the last ten bits of the mantissa rounded away (relative
error at most 2^-14).

Legend: T positions, K kept tokens, m samples, V vocabulary, n further temperatures, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.errors import CorruptError, TeacherError
from tailcache.storage.hidden import StoredHidden, finite_bfloat16

__all__ = [
    "KL_BUDGET",
    "OPTIONAL",
    "SCALARS",
    "Codec",
    "Targets",
    "logprob_levels",
    "round_mantissa",
    "vocabulary_order",
]

KL_BUDGET = 9.7e-6
"""Nats per position that quantising the head may cost on average, at any K and for any distribution."""
MAX_STEP = 1 / 4
"""Nats; the widest level step at probabilities above exp(-64)."""
_KEPT_MANTISSA = 13
_DECODE_POSITIONS = 1024  # so that a block's arrays stay in the processor's cache
SCALARS = ("log_tail", "tail_entropy", "log_target", "log_not_target")
OPTIONAL = {"log_z_tail": "--temperatures", "hidden": "--hidden"}
"""Fields that are captured and read only if asked for, and the setting of capture that asks."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a cache says about T target positions, decoded. All logs are natural, at temperature 1.

    The optional fields have no columns where they were not captured, or not asked for.
    """

    token_ids: NDArray[np.int32]
    """[T, K] the K most likely tokens, most likely first (equals, to the resolution, in any order)."""
    logprobs: NDArray[np.float32]
    """[T, K] nats, their log-probabilities, not increasing."""
    log_tail: NDArray[np.float32]
    """[T] nats, log of the probability of all other tokens; -inf where there are none."""
    tail_entropy: NDArray[np.float32]
    """[T] nats, entropy of the other tokens' distribution, normalised; 0 where there are none."""
    log_target: NDArray[np.float32]
    """[T] nats, log-probability of the true next token."""
    log_not_target: NDArray[np.float32]
    """[T] nats, log of one minus that probability."""
    tail_samples: NDArray[np.int32]
    """[T, m] draws from the other tokens; a token's expected count is m times its share of their mass. In no order."""
    log_z_tail: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """Optional: [T, n] log of the sum of p^(1/tau) over the other tokens, at the n temperatures tau of the layout; -inf
    where there are none. p is normalised over the whole vocabulary, at temperature 1."""
    hidden: StoredHidden = field(default_factory=lambda: np.empty((0, 0), np.uint16))
    """Optional: [T, D] the last hidden state as it is stored: uint16, the bits of bfloat16, or int8; see
    ``storage.hidden``."""
    hidden_scale: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """[T] what an int8 hidden state is to be multiplied with; 1 for any other, and where there is none."""

    def __post_init__(self) -> None:
        """Give optional fields that were left out their length: no columns, and scales of 1."""
        num = len(self)
        for name in OPTIONAL:
            values = getattr(self, name)
            if values.size == 0 and len(values) != num:
                object.__setattr__(self, name, np.empty((num, 0), values.dtype))
        if self.hidden_scale.size == 0 and num:
            object.__setattr__(self, "hidden_scale", np.ones(num, np.float32))

    def __len__(self) -> int:
        return len(self.log_tail)

    @property
    def num_samples(self) -> int:
        """m, the draws per position."""
        return int(self.tail_samples.shape[1])

    def __getitem__(self, index: slice | NDArray[np.integer] | NDArray[np.bool_]) -> Targets:
        return Targets(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def concatenate(parts: list[Targets]) -> Targets:
        """Some targets after one another; at least one part."""
        if len(parts) == 1:
            return parts[0]
        return Targets(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Targets)})


def logprob_levels(top_k: int) -> NDArray[np.float32]:
    """The levels of -log p for a given K: increasing from 0, [L] float32, nats.

    Cost: once per teacher. L is about 22,000 for K up to 64 and grows as the square root of K.
    """
    h = float(np.sqrt(6 * KL_BUDGET / top_k))
    root = 1.0 - h * np.arange(int((1 - 2 * h / MAX_STEP) / h) + 1) if 2 * h < MAX_STEP else np.ones(1)
    even = -2.0 * np.log(root)
    capped = even[-1] + MAX_STEP * np.arange(1, int((64.0 - even[-1]) / MAX_STEP) + 1)
    largest = float(np.finfo(np.float32).max)
    count = int(np.floor(np.log(largest / capped[-1]) / np.log1p(1 / 256)))
    grown = capped[-1] * (1 + 1 / 256) ** np.arange(1, count + 1)
    return np.concatenate([even, capped, grown, [largest]]).astype(np.float32)


def vocabulary_order(token_ids: NDArray[np.integer], token_counts: NDArray[np.integer]) -> NDArray[np.uint32]:
    """Order the vocabulary by how often each token is seen, so that frequent ones get small ranks.

    Args:
      token_ids: top-K ids of some positions, any shape.
      token_counts: [V] occurrences in the corpus; they order the tokens that the former do not.

    Returns:
      [V] uint32, the token of each rank.
    """
    vocab_size = len(token_counts)
    kept = np.bincount(token_ids.ravel(), minlength=vocab_size)
    return np.lexsort((np.arange(vocab_size), -token_counts, -kept)).astype(np.uint32)


def round_mantissa(values: NDArray[np.float32], kept: int = _KEPT_MANTISSA) -> NDArray[np.float32]:
    """Round float32 to fewer bits of mantissa, to nearest even; infinities and zeros stay as they are."""
    drop = 23 - kept
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    rounded = (bits + half + ((bits >> np.uint32(drop)) & np.uint32(1))) & np.uint32((0xFFFFFFFF << drop) & 0xFFFFFFFF)
    return np.where(np.isfinite(values), rounded.view(np.float32), values).astype(np.float32)


class Codec:
    """Encode and decode the targets of one teacher.

    Args:
      order: [V] the token of each rank.
      levels: [L] the table of ``logprob_levels``.
    """

    def __init__(self, order: NDArray[np.uint32], levels: NDArray[np.float32]) -> None:
        self._token_of_rank = order.astype(np.int32)
        self._rank_of_token = np.empty(len(order), dtype=np.int64)
        self._rank_of_token[order] = np.arange(len(order))
        self._minus_levels = -levels.astype(np.float32)
        self._midpoints = (levels[1:].astype(np.float64) / 2 + levels[:-1].astype(np.float64) / 2).astype(np.float32)
        self.id_type = self.id_type_for(len(order))
        self.gap_type = self.gap_type_for(len(levels))

    @staticmethod
    def id_type_for(vocab_size: int) -> str:
        """Stored integer type of token codes."""
        return "uint16" if vocab_size <= 1 << 16 else "uint32"

    @staticmethod
    def gap_type_for(num_levels: int) -> str:
        """Stored integer type of level gaps."""
        return "uint16" if num_levels <= 1 << 16 else "uint32"

    def encode(self, targets: Targets) -> dict[str, NDArray[np.generic]]:
        """The stored arrays of some positions, by field.

        Raises:
          TeacherError: a log-probability is not finite or above 0, the tokens are not most likely first, the tail
            has all of the mass, or a scalar, a sum at another temperature or a hidden state is not a number.
        """
        logprobs = targets.logprobs
        head_scale = targets.log_tail
        bad = ~np.isfinite(logprobs).all(axis=1) | (logprobs[:, 1:] > logprobs[:, :-1]).any(axis=1)
        bad |= ~(head_scale < 0) | (logprobs[:, 0] > 1e-3)  # a log tail of 0 would leave nothing for the head
        for name in SCALARS[1:]:
            bad |= np.isnan(getattr(targets, name))
        bad |= np.isnan(targets.log_z_tail).any(axis=1)
        bad |= ~(np.isfinite(targets.hidden_scale) & (targets.hidden_scale >= 0))
        for first in range(0, len(targets) if targets.hidden.dtype == np.uint16 else 0, _DECODE_POSITIONS):
            part = slice(first, first + _DECODE_POSITIONS)
            bad[part] |= ~finite_bfloat16(targets.hidden[part].view(np.uint16))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise TeacherError(
                f"target {row} of those to be stored: expected finite log-probabilities, at most 0, most likely "
                f"first, a log tail below 0, finite hidden states and no NaN; found {logprobs[row][:8]} … with "
                + ", ".join(
                    f"{name} {getattr(targets, name)[row]}" for name in (*SCALARS, "log_z_tail", "hidden_scale")
                )
            )
        levels = np.searchsorted(self._midpoints, np.maximum(-logprobs, 0)).astype(np.int64)
        gaps = np.diff(levels, axis=1, prepend=0)
        ranks = self._rank_of_token[targets.token_ids]
        if ranks.shape[1] > 2:
            width = np.int64(len(self._token_of_rank))
            ranks[:, 1:] = np.sort(levels[:, 1:] * width + ranks[:, 1:], axis=1) % width
        codes = ranks.copy()
        codes[:, 2:] -= np.where(gaps[:, 2:] == 0, ranks[:, 1:-1], 0)
        samples = np.sort(self._rank_of_token[targets.tail_samples], axis=1)
        encoded: dict[str, NDArray[np.generic]] = {
            "token_codes": codes.astype(self.id_type),
            "logprob_gaps": gaps.astype(self.gap_type),
            **{name: round_mantissa(getattr(targets, name)) for name in SCALARS},
        }
        if samples.shape[1]:
            encoded["tail_sample_codes"] = np.diff(samples, axis=1, prepend=0).astype(self.id_type)
        if targets.log_z_tail.shape[1]:
            encoded["log_z_tail"] = round_mantissa(targets.log_z_tail)
        if targets.hidden.shape[1]:
            encoded["hidden"] = targets.hidden
            if targets.hidden.dtype == np.int8:
                encoded["hidden_scale"] = targets.hidden_scale
        return encoded

    def decode(self, stored: dict[str, NDArray[np.generic]], where: str = "targets") -> Targets:
        """The inverse of ``encode``, to its resolution; optional fields that are not given come back empty.

        Raises:
          CorruptError: a code lies outside its table (the checksums matched, so it was written so).
        """
        scalars: dict[str, Any] = {name: stored[name].astype(np.float32, copy=False) for name in SCALARS}
        num, top_k = stored["token_codes"].shape
        samples = stored.get("tail_sample_codes")
        token_ids = np.empty((num, top_k), np.int32)
        logprobs = np.empty((num, top_k), np.float32)
        tail_samples = np.empty((num, 0 if samples is None else samples.shape[1]), np.int32)
        head_mass = -np.expm1(scalars["log_tail"].astype(np.float64))
        for first in range(0, num, _DECODE_POSITIONS):
            part = slice(first, min(first + _DECODE_POSITIONS, num))
            gaps_TK = np.ascontiguousarray(stored["logprob_gaps"][part])
            self._decode_logprobs(gaps_TK, head_mass[part], logprobs[part], where)
            self._decode_ids(gaps_TK, stored["token_codes"][part], token_ids[part], where)
            if samples is not None:
                ranks_Tm = np.cumsum(np.ascontiguousarray(samples[part]), axis=1, dtype=np.intp)
                self._check(ranks_Tm[:, -1], len(self._token_of_rank), f"{where}, tail_sample_codes")
                np.take(self._token_of_rank, ranks_Tm, out=tail_samples[part], mode="clip")
        optional: dict[str, Any] = {name: stored[name] for name in (*OPTIONAL, "hidden_scale") if name in stored}
        return Targets(token_ids=token_ids, logprobs=logprobs, tail_samples=tail_samples, **scalars, **optional)

    def _decode_logprobs(
        self, gaps_TK: NDArray[Any], head_mass_T: NDArray[np.float64], out_TK: NDArray[np.float32], where: str
    ) -> None:
        levels_TK = np.cumsum(gaps_TK, axis=1, dtype=np.intp)
        self._check(levels_TK[:, -1], len(self._minus_levels), f"{where}, logprob_gaps")
        np.take(self._minus_levels, levels_TK, out=out_TK, mode="clip")
        share_T = np.exp(out_TK).sum(axis=1, dtype=np.float64)
        with np.errstate(divide="ignore"):
            out_TK += (np.log(head_mass_T) - np.log(share_T)).astype(np.float32)[:, None]

    def _decode_ids(self, gaps_TK: NDArray[Any], codes_TK: NDArray[Any], out_TK: NDArray[np.int32], where: str) -> None:
        """A code counts from the start of its run of equal levels: subtract what had been summed up before it."""
        largest = len(self._token_of_rank) * codes_TK.shape[1]
        sums_TK: NDArray[Any] = np.cumsum(codes_TK, axis=1, dtype=np.int32 if largest < 1 << 31 else np.int64)
        before_TK = sums_TK - codes_TK.astype(sums_TK.dtype)
        before_TK[:, 2:] *= gaps_TK[:, 2:] != 0
        sums_TK -= np.maximum.accumulate(before_TK, axis=1)
        self._check(sums_TK, len(self._token_of_rank), f"{where}, token_codes")
        np.take(self._token_of_rank, sums_TK, out=out_TK, mode="clip")

    @staticmethod
    def _check(codes: NDArray[np.signedinteger[Any]], size: int, where: str) -> None:
        if codes.size and (int(codes.max()) >= size or int(codes.min()) < 0):
            raise CorruptError(
                f"{where}: expected codes from 0 to {size - 1}, found {codes.min()} to {codes.max()}; "
                "run `tailcache verify`"
            )
