"""The teacher's own distribution over the whole vocabulary, position by position, from stored hidden states.

Of several teachers it is that of their mixture: p = sum_i w_i p_i, densely, so that nothing about it is unknown. Its
targets (``terms``) are then made here as a capture of the mixture would have made them: its own top-K, tail mass and
entropy, and everything that is written for the cached targets of one teacher applies.

Legend: T target positions, c of them at a time, V vocabulary, D_i hidden width of teacher i, n teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailcache.storage.several import fields_of
from tailcache.trainers.fused_loss import piece_height
from tailcache.trainers.linear_head import LinearHead, tiles_of
from tailcache.trainers.live import LOGPROBS
from tailcache.trainers.stored_head import hidden_states, teacher_logits
from tailcache.trainers.terms import TeacherTerms, log_sum

__all__ = ["OwnRows", "own_log_p"]

_BUFFERS = 5  # tensors of the size of the rows that exist at a time


def own_log_p(batch: Mapping[str, Any], heads: Sequence[LinearHead]) -> Callable[[slice], Tensor] | None:
    """What gives the [c, V] log-probs of some positions of a batch: a live teacher did, or hidden states and heads do.

    Args:
      batch: of ``batches.collate``.
      heads: of the teachers whose hidden states it has; none where they are not wanted.
    """
    whole_TV = batch["teacher"].get(LOGPROBS)
    if whole_TV is not None:
        return lambda rows: whole_TV[rows]
    return OwnRows.of(batch, heads) if heads else None


@dataclass(frozen=True, kw_only=True)
class OwnRows:
    """Whole rows of log p, made when they are asked for.

    Attributes:
      heads: one for each teacher.
      hidden: [T, D_i] hidden states by each teacher.
      log_weights_Tn: [T, n] log w_i; None for a single teacher.
    """

    heads: Sequence[LinearHead]
    hidden: Sequence[Tensor]
    log_weights_Tn: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any], heads: Sequence[LinearHead]) -> OwnRows:
        """Those of a batch of ``batches.collate`` with hidden states."""
        hidden = [hidden_states(fields_of(batch["teacher"], i)) for i in range(len(heads))]
        return cls(heads=heads, hidden=hidden, log_weights_Tn=batch["log_weights"] if len(heads) > 1 else None)

    def __call__(self, rows: slice) -> Tensor:
        """[c, V] float32 log-probs, nats."""
        total_cV: Tensor | None = None
        for i, (head, hidden_TD) in enumerate(zip(self.heads, self.hidden, strict=True)):
            log_p_cV = torch.log_softmax(teacher_logits(hidden_TD[rows], head), dim=-1)
            if self.log_weights_Tn is not None:
                log_p_cV = log_p_cV + self.log_weights_Tn[rows, i, None]
            total_cV = log_p_cV if total_cV is None else torch.logaddexp(total_cV, log_p_cV)
        assert total_cV is not None
        return total_cV

    @torch.no_grad()
    def terms(self, top_k: int, next_tokens_T: Tensor) -> TeacherTerms:
        """The targets that a capture of this distribution would hold, without draws.

        Args:
          top_k: K.
          next_tokens_T: [T] int64, the true next tokens.

        Cost: the rows are made once, and not kept.
        """
        num, vocab_size = len(next_tokens_T), self.heads[0].vocab_size
        height = piece_height(next_tokens_T.device, vocab_size * 4 * _BUFFERS, max(1, num))
        pieces = [self._terms(rows, top_k, next_tokens_T[rows]) for rows in tiles_of(max(1, num), height)]
        names = ("token_ids", "logprobs", "log_tail", "tail_entropy", "log_target", "log_not_target")
        joined: dict[str, Any] = {name: torch.cat([piece[name] for piece in pieces]) for name in names}
        return TeacherTerms(
            vocab_size=vocab_size,
            tail_samples=joined["token_ids"][:, :0],
            next_tokens=next_tokens_T,
            **joined,
        )

    def _terms(self, rows: slice, top_k: int, next_tokens_c: Tensor) -> dict[str, Tensor]:
        log_p_cV = self(rows)
        logprobs_cK, ids_cK = log_p_cV.topk(top_k, dim=-1)
        tail_cV = log_p_cV.scatter(-1, ids_cK, -torch.inf)
        log_tail_c = log_sum(tail_cV)
        some_c1 = (log_tail_c > -torch.inf)[:, None]
        tail_cV -= torch.where(some_c1, log_tail_c[:, None], 0.0)
        return {
            "token_ids": ids_cK,
            "logprobs": logprobs_cK,
            "log_tail": log_tail_c,
            "tail_entropy": torch.special.entr(tail_cV.exp_()).sum(-1),
            "log_target": log_p_cV.gather(-1, next_tokens_c[:, None])[:, 0],
            "log_not_target": log_sum(log_p_cV.scatter(-1, next_tokens_c[:, None], -torch.inf)),
        }
