"""The codec of format version 1: read for ever, and written where a shard of such a cache has to be made again.

Log-probs are gaps between levels, the head's mass is exact, ids are ranks in a vocabulary order, tokens on one level
and draws are sorted and stored as differences; see ``storage.codec`` for why. What version 1 does not have: classes of
positions, draws in an order that keeps what is repeated apart, the true next token as one number, and scalars as whole
numbers; they are float32 with the last ten bits of the mantissa rounded away.

Legend: T positions, K kept tokens, m samples, V vocabulary, n further temperatures, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.errors import CorruptError
from tailcache.storage.fields import OPTIONAL, SCALARS, Targets, check_targets
from tailcache.storage.levels import round_mantissa
from tailcache.storage.pieces import Fields, Piece, arrays_of, pieces_of

__all__ = ["CodecV1", "encode_optional"]

_DECODE_POSITIONS = 1024  # so that a block's arrays stay in the processor's cache


def encode_optional(targets: Targets) -> dict[str, NDArray[Any]]:
    """The stored arrays of the optional fields that some targets have; the same in both versions."""
    encoded: dict[str, NDArray[Any]] = {}
    if targets.log_z_tail.shape[1]:
        encoded["log_z_tail"] = round_mantissa(targets.log_z_tail)
    if targets.hidden.shape[1]:
        encoded["hidden"] = targets.hidden
        if targets.hidden.dtype == np.int8:
            encoded["hidden_scale"] = targets.hidden_scale
    return encoded


class CodecV1:
    """Encode and decode the targets of one teacher.

    Args:
      order: [V] the token of each rank.
      levels: [L] the table of ``logprob_levels``.
      where: what to call them in an error.

    Raises:
      CorruptError: ``order`` is no permutation, or the levels do not increase from 0.
    """

    def __init__(self, order: NDArray[np.uint32], levels: NDArray[np.float32], where: str = "targets") -> None:
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise CorruptError(f"{where}, vocabulary_order: expected every token from 0 to {len(order) - 1} once")
        if len(levels) == 0 or levels[0] != 0 or not (np.isfinite(levels).all() and (np.diff(levels) > 0).all()):
            raise CorruptError(f"{where}, logprob_levels: expected finite numbers that increase from 0")
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

    def encode(self, targets: Targets) -> dict[str, NDArray[Any]]:
        """The stored arrays of some positions, by field.

        Raises:
          TeacherError: as ``check_targets``.
        """
        check_targets(targets)
        logprobs = targets.logprobs
        levels = np.searchsorted(self._midpoints, np.maximum(-logprobs, 0)).astype(np.int64)
        gaps = np.diff(levels, axis=1, prepend=0)
        ranks = self._rank_of_token[targets.token_ids]
        if ranks.shape[1] > 2:
            width = np.int64(len(self._token_of_rank))
            ranks[:, 1:] = np.sort(levels[:, 1:] * width + ranks[:, 1:], axis=1) % width
        codes = ranks.copy()
        codes[:, 2:] -= np.where(gaps[:, 2:] == 0, ranks[:, 1:-1], 0)
        samples = np.sort(self._rank_of_token[targets.tail_samples], axis=1)
        encoded: dict[str, NDArray[Any]] = {
            "token_codes": codes.astype(self.id_type),
            "logprob_gaps": gaps.astype(self.gap_type),
            **{name: round_mantissa(getattr(targets, name)) for name in SCALARS},
        }
        if samples.shape[1]:
            encoded["tail_sample_codes"] = np.diff(samples, axis=1, prepend=0).astype(self.id_type)
        return encoded | encode_optional(targets)

    def decode(self, held: Fields | Sequence[Piece], where: str = "targets") -> Targets:
        """The inverse of ``encode``, to its resolution; optional fields that are not given come back empty.

        Raises:
          CorruptError: a code lies outside its table (the checksums matched, so it was written so).
        """
        stored = arrays_of(held, pieces_of(held)[0].fields)
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
