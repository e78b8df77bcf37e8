"""How one shard's targets become small integers, and back. The heart of the format.

Six ideas, each measured in docs/design.md:

* **Log-probs as gaps between levels.** A fixed table of levels quantises sqrt(p) evenly (step ``h``), because
  that is where equal steps cost equal KL: an error d in sqrt(p) costs 2 d^2 nats, whatever p. With K kept
  tokens the expected error is K h^2 / 6, and h is chosen from K so that this stays below the budget. Below
  ``sqrt(p) = 2 h / max_step`` the steps would be wider than ``max_step`` nats; from there they are that wide,
  and beyond 64 nats they grow by 1/256 each, so that every finite float32 has a level and nothing is clipped.
  What is stored is the difference of neighbouring levels, never negative and mostly small.
* **The head's mass is exact.** Decoding rescales the head so that it and ``exp(log_tail)`` sum to one. A level
  only has to say how the head's mass is shared out.
* **Ids as places in a list of likely tokens**, because small numbers compress. There are C lists of M tokens, and each
  position says which one it uses; a token that is not in it has M + its rank in one order of the whole vocabulary.
* **Tokens on one level are sorted by code and stored as differences**, which costs nothing: their order is below the
  resolution. The most likely token is never reordered.
* **Draws are sorted by rank and stored as differences**, the multiples of m/2 first, then those of m/4, and so on:
  where a position's draws are repeated, all but the first few are zeros.
* **Scalars are whole multiples of a step**; a probability and what is left of 1 are one number, the log of their ratio.

Legend: T positions, K kept tokens, m samples, V vocabulary, L levels, C classes, M tokens of a class, n further
temperatures, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.classes import choose_classes, class_codes, class_costs, learn_classes
from tailcache.storage.codec_v1 import CodecV1, encode_optional
from tailcache.storage.compiled import decode_loops
from tailcache.storage.errors import CorruptError
from tailcache.storage.fields import OPTIONAL, SCALARS, Targets, check_targets
from tailcache.storage.fixed_point import fixed_of, float_of, logit_of, logs_of, softplus_table
from tailcache.storage.levels import (
    KL_BUDGET,
    MAX_STEP,
    logprob_levels,
    max_step,
    round_mantissa,
    scalar_steps,
    vocabulary_order,
)
from tailcache.storage.logarithm import natural_log
from tailcache.storage.pieces import Fields, Piece, arrays_of, pieces_of
from tailcache.storage.slabs import empty, scratch

if TYPE_CHECKING:
    from tailcache.storage.layout import Layout

__all__ = [
    "KL_BUDGET",
    "MAX_STEP",
    "OPTIONAL",
    "SCALARS",
    "AnyCodec",
    "Codec",
    "Targets",
    "codec_of",
    "learn_constants",
    "logprob_levels",
    "max_step",
    "round_mantissa",
    "sample_columns",
    "sample_places",
    "scalar_steps",
    "vocabulary_order",
]

_BLOCK = 4096  # positions decoded at a time: few calls,
_BLOCK_IDS = 1 << 18  # and so few ids that all that is done finds them in cache
_WIDE = ("token_codes", "logprob_gaps", "tail_sample_codes")
"""Fields of more than one number per position."""
_LOGITS = ("tail_logit", "tail_entropy", "target_logit")
_REQUIRED = (*_WIDE, "position_class", *_LOGITS)
"""All but the optional ones; without draws or classes, theirs are not there."""
_NO_SAMPLES, _NO_CLASSES = np.empty((0, 0), np.uint16), np.empty(0, np.uint8)
_PAD = 16
"""Rows that are a power of two apart in memory compete for the same lines of the processor's cache, and transposing
them takes nine times as long."""


class Codec:
    """Encode and decode the targets of one teacher, format version 2.

    Args:
      order: [V] the token of each rank.
      levels: [L] the table of ``logprob_levels``.
      class_tokens: [C, M] the list of each class; none: one class without a list.
      scalar_steps: steps of the scalars to a nat.

    Raises:
      CorruptError: ``order`` is no permutation, a list has a token twice or one that is not there, or the levels do not
        increase from 0.
    """

    def __init__(
        self,
        order: NDArray[np.uint32],
        levels: NDArray[np.float32],
        class_tokens: NDArray[np.uint32] | None = None,
        scalar_steps: int = 1024,
        where: str = "targets",
    ) -> None:
        size = len(order)
        if not np.array_equal(np.sort(order), np.arange(size)):
            raise CorruptError(f"{where}, vocabulary_order: expected every token from 0 to {size - 1} once")
        if len(levels) == 0 or levels[0] != 0 or not (np.isfinite(levels).all() and (np.diff(levels) > 0).all()):
            raise CorruptError(f"{where}, logprob_levels: expected finite numbers that increase from 0")
        lists = np.empty((1, 0), np.int64) if class_tokens is None else class_tokens.astype(np.int64)
        if lists.size and (lists.max() >= size or (np.diff(np.sort(lists, axis=1), axis=1) == 0).any()):
            raise CorruptError(f"{where}, class_tokens: expected tokens from 0 to {size - 1}, none twice in a class")
        self._order, self._lists = order, lists
        self._tokens = np.concatenate([order, lists.ravel()]).astype(np.int32)
        self._narrow_tokens = self._tokens.astype(np.uint16 if size <= 1 << 16 else np.int32)  # more of it in cache
        self._minus_levels = -levels.astype(np.float32)
        self._weights = np.exp(self._minus_levels)
        self._wide_weights = self._weights.astype(np.float64)  # which is what they are added up in
        self._steps = scalar_steps
        self.id_type = self.id_type_for(size, lists.shape[1])
        self.gap_type = self.gap_type_for(len(levels))
        # Sums of gaps, each checked to be below L, must not wrap around before they are checked themselves.
        self._level_type = np.dtype("uint16" if 2 * len(levels) <= 1 << 16 else "uint32")

    @staticmethod
    def id_type_for(vocab_size: int, class_size: int = 0) -> str:
        """Stored integer type of token codes."""
        return "uint16" if vocab_size + class_size <= 1 << 16 else "uint32"

    @staticmethod
    def gap_type_for(num_levels: int) -> str:
        """Stored integer type of level gaps."""
        return "uint16" if num_levels <= 1 << 16 else "uint32"

    # -- encoding ----------------------------------------------------------------------------------------------

    @cached_property
    def _rank(self) -> NDArray[np.int64]:
        rank = np.empty(len(self._order), np.int64)
        rank[self._order] = np.arange(len(rank))
        return rank

    @cached_property
    def _costs(self) -> NDArray[np.uint8]:
        return class_costs(self._rank, self._lists)

    @cached_property
    def _midpoints(self) -> NDArray[np.float32]:
        levels = -self._minus_levels.astype(np.float64)
        return (levels[1:] / 2 + levels[:-1] / 2).astype(np.float32)

    def encode(self, targets: Targets) -> dict[str, NDArray[Any]]:
        """The stored arrays of some positions, by field.

        Raises:
          TeacherError: as ``check_targets``.
        """
        check_targets(targets, complementary=True)
        levels = np.searchsorted(self._midpoints, np.maximum(-targets.logprobs, 0)).astype(np.int64)
        gaps = np.diff(levels, axis=1, prepend=0)
        log_tail = targets.log_tail.astype(np.float64)
        with np.errstate(divide="ignore"):
            tail_logit = logit_of(log_tail, np.log(-np.expm1(log_tail)))
        encoded: dict[str, NDArray[Any]] = {
            "logprob_gaps": gaps.astype(self.gap_type),
            "tail_logit": fixed_of(tail_logit, self._steps),
            "tail_entropy": fixed_of(targets.tail_entropy, self._steps),
            "target_logit": fixed_of(logit_of(targets.log_target, targets.log_not_target), self._steps),
        }
        if len(self._lists) > 1:
            chosen = choose_classes(targets.token_ids, self._costs)
            encoded["position_class"] = chosen
            codes: NDArray[Any] = np.empty(targets.token_ids.shape, np.int64)
            for c in np.unique(chosen).tolist():
                rows = chosen == c
                codes[rows] = class_codes(self._rank, self._lists, c)[targets.token_ids[rows]]
        else:
            codes = self._rank[targets.token_ids]
        if codes.shape[1] > 2:
            width = np.int64(len(self._order) + self._lists.shape[1])
            codes[:, 1:] = np.sort(levels[:, 1:] * width + codes[:, 1:], axis=1) % width
            codes[:, 2:] -= np.where(gaps[:, 2:] == 0, codes[:, 1:-1], 0)
        encoded["token_codes"] = codes.astype(self.id_type)
        if targets.num_samples:
            ranks = np.sort(self._rank[targets.tail_samples], axis=1)
            differences = np.diff(ranks, axis=1, prepend=0).astype(self.id_type_for(len(self._order)))
            encoded["tail_sample_codes"] = differences[:, sample_columns(targets.num_samples)]
        return encoded | encode_optional(targets)

    # -- decoding ----------------------------------------------------------------------------------------------

    def decode(self, stored: Fields | Sequence[Piece], where: str = "targets") -> Targets:
        """The inverse of ``encode``, to its resolution; optional fields that are not given come back empty.

        Args:
          stored: the fields, as arrays or as rows of several.
          where: what to call them in an error.

        Raises:
          CorruptError: a code lies outside its table (the checksums matched, so it was written so).

        Cost: nothing is done for one position at a time; ``bench_storage`` measures it.
        """
        pieces = pieces_of(stored)
        fields, num = pieces[0].fields, sum(piece.span.total for piece in pieces)
        num_samples = fields["tail_sample_codes"].shape[1] if "tail_sample_codes" in fields else 0
        optional: dict[str, Any] = arrays_of(stored, (*OPTIONAL, "hidden_scale"))
        out = Targets(
            token_ids=empty((num, fields["token_codes"].shape[1]), np.int32),
            logprobs=empty((num, fields["token_codes"].shape[1]), np.float32),
            tail_samples=empty((num, num_samples), np.int32),
            **{name: empty((num,), np.float32) for name in SCALARS},
            **optional,
        )
        loops = decode_loops(num)
        if loops is None or not self._decode_by_loops(loops, pieces, out):
            self._decode_by_arrays(stored, out, where)  # what the loops find wrong is found here again, and said
        return out

    def _decode_by_loops(self, loops: ModuleType, pieces: Sequence[Piece], out: Targets) -> bool:
        """All but the optional fields, read where it lies; whether it is in its tables and ordinary."""
        columns = sample_places(out.num_samples)
        tables = (self._narrow_tokens, self._minus_levels, self._wide_weights, softplus_table(self._steps), columns)
        sizes = (len(self._order), *self._lists.shape)
        out_wide = (out.token_ids, out.logprobs, out.tail_samples)
        out_scalars = (out.log_tail, out.tail_entropy, out.log_target, out.log_not_target)
        names = [name for name in _REQUIRED if name in pieces[0].fields]
        right = True
        for piece in pieces:
            fields, span = piece.fields, piece.span
            codes, gaps = fields["token_codes"], fields["logprob_gaps"]
            if codes.shape != gaps.shape or any(len(fields[name]) != len(codes) for name in names):
                return False  # which the loops do not look at
            right &= loops.decode_rows(
                (codes, gaps, fields.get("tail_sample_codes", _NO_SAMPLES)),
                fields.get("position_class", _NO_CLASSES),
                (fields["tail_logit"], fields["tail_entropy"], fields["target_logit"]),
                span.starts, span.lengths, span.places, tables, sizes, 1 / self._steps, out_wide, out_scalars,
            )  # fmt: skip
        return right

    def _decode_by_arrays(self, stored: Fields | Sequence[Piece], out: Targets, where: str) -> None:
        """The same by array operations, what is wide some positions at a time."""
        given = arrays_of(stored, _REQUIRED)
        tail_logit, entropy, target_logit = (float_of(given[name], self._steps, f"{where}, {name}") for name in _LOGITS)
        out.log_tail[:], log_head_T = logs_of(given["tail_logit"], tail_logit, self._steps)
        out.tail_entropy[:] = entropy
        out.log_target[:], out.log_not_target[:] = logs_of(given["target_logit"], target_logit, self._steps)
        lists_T = self._begin_of_lists(given.get("position_class"), len(log_head_T), where)
        step = max(1, min(_BLOCK, _BLOCK_IDS // max(out.token_ids.shape[1], out.num_samples)))
        for first in range(0, len(log_head_T), step):
            part = slice(first, first + step)
            gaps_TK = given["logprob_gaps"][part]
            share_T = self._decode_levels(gaps_TK, out.logprobs[part], where)
            shift_T = (log_head_T[part] - natural_log(share_T)).astype(np.float32)
            np.add(out.logprobs[part], shift_T[:, None], out=out.logprobs[part])
            self._decode_ids(given["token_codes"][part], gaps_TK, lists_T[part], out.token_ids[part], where)
            if out.num_samples:
                self._decode_samples(given["tail_sample_codes"][part], out.tail_samples[part], where)

    def _decode_levels(self, gaps_TK: NDArray[Any], out_TK: NDArray[np.float32], where: str) -> NDArray[np.float64]:
        """Sum the gaps rank by rank, over all positions at once; look up; give each position's sum of exponentials."""
        num, top_k = gaps_TK.shape
        name = f"{where}, logprob_gaps"
        _check(gaps_TK, len(self._minus_levels), name)
        levels_KT = _buffer("by rank", (top_k, num), self._level_type, _PAD)
        np.copyto(levels_KT, gaps_TK.T, casting="unsafe")
        for k in range(1, top_k):
            np.add(levels_KT[k], levels_KT[k - 1], out=levels_KT[k])
        _check(levels_KT, len(self._minus_levels), name)
        weights_KT = _buffer("weights", (top_k, num), np.dtype("float32"), _PAD)
        np.take(self._weights, levels_KT, out=weights_KT, mode="clip")
        share_T = np.zeros(num)  # rank by rank: a position's terms are added in one order, whatever the others are
        for k in range(top_k):
            np.add(share_T, weights_KT[k], out=share_T)
        levels_TK = _buffer("by position", (num, top_k), self._level_type)
        np.copyto(levels_TK, levels_KT.T)
        np.take(self._minus_levels, levels_TK, out=out_TK, mode="clip")
        return share_T

    def _decode_ids(
        self,
        codes_TK: NDArray[Any],
        gaps_TK: NDArray[Any],
        lists_T: NDArray[np.int32],
        out_TK: NDArray[np.int32],
        where: str,
    ) -> None:
        """Undo the differences rank by rank, over all positions at once; look up in the class' list or the order."""
        (num, top_k), kind = codes_TK.shape, codes_TK.dtype
        codes_KT = _buffer("by rank", (top_k, num), kind, _PAD)
        np.copyto(codes_KT, codes_TK.T)
        same_KT = _buffer("same", (top_k, num), kind, _PAD)  # all bits set where the level is that of the rank before
        if gaps_TK.dtype == kind:
            np.minimum(gaps_TK.T, 1, out=same_KT)  # 0 and 1; one less is all bits and none
        else:
            np.copyto(same_KT, gaps_TK.T != 0)
        np.subtract(same_KT, 1, out=same_KT)
        for k in range(2, top_k):
            before_T = np.bitwise_and(codes_KT[k - 1], same_KT[k], out=same_KT[k])
            np.add(codes_KT[k], before_T, out=codes_KT[k])
        size = self._lists.shape[1]
        _check(codes_KT, len(self._order) + size, f"{where}, token_codes")
        codes_by_position_TK = _buffer("by position", (num, top_k), kind)
        np.copyto(codes_by_position_TK, codes_KT.T)
        if size == 0:
            np.take(self._tokens, codes_by_position_TK, out=out_TK, mode="clip")
            return
        # Codes from M on count in the order, which comes first in the table; those below M in a list behind it.
        places_TK = _buffer("places", (num, top_k), np.dtype("int32"))
        np.subtract(codes_by_position_TK, size, out=places_TK, dtype=np.int32, casting="unsafe")
        in_list_TK = np.right_shift(places_TK, 31, out=_buffer("in list", (num, top_k), np.dtype("int32")))
        np.bitwise_and(in_list_TK, (lists_T + np.int32(size))[:, None], out=in_list_TK)
        np.add(places_TK, in_list_TK, out=places_TK)
        np.take(self._tokens, places_TK, out=out_TK, mode="clip")

    def _begin_of_lists(self, chosen_T: NDArray[np.uint8] | None, num: int, where: str) -> NDArray[np.int32]:
        """[T] where the list of each position's class begins in the table of tokens."""
        if chosen_T is None:
            return np.zeros(num, np.int32)
        _check(chosen_T, len(self._lists), f"{where}, position_class")
        return chosen_T.astype(np.int32) * np.int32(self._lists.shape[1]) + np.int32(len(self._order))

    def _decode_samples(self, samples_Tm: NDArray[Any], out_Tm: NDArray[np.int32], where: str) -> None:
        (num, num_samples), kind = samples_Tm.shape, samples_Tm.dtype
        places = sample_places(num_samples)
        ranks_mT = _buffer("by rank", (num_samples, num), kind, _PAD)
        ranks_mT[0] = samples_Tm[:, places[0]]
        for j in range(1, num_samples):
            np.add(ranks_mT[j - 1], samples_Tm[:, places[j]], out=ranks_mT[j])
        _check(ranks_mT, len(self._order), f"{where}, tail_sample_codes")
        ranks_Tm = _buffer("by position", (num, num_samples), kind)
        np.copyto(ranks_Tm, ranks_mT.T)
        np.take(self._tokens, ranks_Tm, out=out_Tm, mode="clip")


AnyCodec = Codec | CodecV1


def codec_of(layout: Layout, constants: Mapping[str, NDArray[Any]], where: str = "targets") -> AnyCodec:
    """The codec of a teacher.

    Args:
      layout: decides the version of the format.
      constants: those that ``learn_constants`` gives, by name.
      where: what to call them in an error.

    Raises:
      CorruptError: they are no tables.
    """
    order, levels = constants["vocabulary_order"], constants["logprob_levels"]
    if layout.format_version == 1:
        return CodecV1(order, levels, where)
    return Codec(order, levels, constants.get("class_tokens"), layout.scalar_steps, where)


def learn_constants(layout: Layout, targets: Targets, token_counts: NDArray[np.integer]) -> dict[str, NDArray[Any]]:
    """What decoding needs besides the layout, from the first shard's targets. The same input gives the same constants.

    Args:
      layout: decides what there is.
      targets: of the first shard.
      token_counts: [V] occurrences in the corpus.
    """
    constants: dict[str, NDArray[Any]] = {
        "vocabulary_order": vocabulary_order(targets.token_ids, token_counts),
        "logprob_levels": logprob_levels(layout.top_k, layout.kl_budget),
    }
    if layout.num_classes > 1:
        constants["class_tokens"] = learn_classes(
            targets.token_ids, layout.vocab_size, layout.num_classes, layout.class_size
        )
    return constants


def sample_columns(num_samples: int) -> NDArray[np.intp]:
    """[m] which of the sorted draws' differences each column holds: of the j with the largest gcd(j, m) first.

    So where a position has m_t different draws, m_t a divisor of m, and each is repeated m / m_t times, what is not
    zero stands in the first columns: at j = 0, m / m_t, 2 m / m_t, ....
    """
    order = sorted(range(num_samples), key=lambda j: (-math.gcd(j, num_samples), j))
    return np.array(order, np.intp)


@lru_cache(maxsize=16)
def sample_places(num_samples: int) -> NDArray[np.intp]:
    """[m] the column of each of the sorted draws' differences: the inverse of ``sample_columns``; not to be written."""
    places = np.argsort(sample_columns(num_samples))
    places.flags.writeable = False
    return places


def _buffer(name: str, shape: tuple[int, int], kind: np.dtype[Any], pad: int = 0) -> NDArray[Any]:
    """An array with anything in it, in memory of this thread's that the next call with the same name uses again.

    With ``pad`` unused elements behind each row, of which see ``_PAD``.
    """
    rows, columns = shape[0], shape[1] + pad
    size = rows * columns * kind.itemsize
    values: NDArray[Any] = scratch(name, size)[:size].view(kind).reshape(rows, columns)[:, : shape[1]]
    return values


def _check(codes: NDArray[Any], size: int, where: str) -> None:
    if codes.size and int(codes.max()) >= size:
        raise CorruptError(
            f"{where}: expected codes from 0 to {size - 1}, found {codes.min()} to {codes.max()}; "
            "run `tailcache verify`"
        )
