"""What a loss may look at: a few numbers per target position, for the teacher and for the student.

Every loss here is a function of ``TeacherTerms`` (from the cache) and ``StudentTerms`` (from the student's
forward), so it does not care how the student's numbers were made: ``student_terms`` makes them from full
logits. A primitive that never holds ``[T, V]`` only has to return the same dataclass.

Everything is in log space, in nats, in float32 or wider. The student's terms are about the *teacher's*
top-K ids: ``log_beyond`` is the student's mass off those ids, by a log-sum-exp over the others, never ``1 -
sum``.

Legend: T target positions, V vocabulary, K kept by the teacher, m tail samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tailcache.storage.errors import MismatchError

__all__ = ["StudentTerms", "TeacherTerms", "student_terms", "weighted"]


@dataclass(frozen=True, kw_only=True)
class TeacherTerms:
    """The cached targets of T positions, as tensors on one device.

    Attributes:
      vocab_size: V, the number of real token ids.
      token_ids: [T, K] int64, most likely first.
      logprobs: [T, K] log p of those ids.
      log_tail: [T] log of the mass off them, -inf where there is none (K == V).
      tail_entropy: [T] entropy of that tail, normalised, in nats; 0 where there is none.
      tail_samples: [T, m] int64 ids drawn from p restricted to that tail; m may be 0.
      log_target: [T] log p(y) of the true next token.
      log_not_target: [T] log(1 - p(y)).
    """

    vocab_size: int
    token_ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    tail_entropy: Tensor
    tail_samples: Tensor
    log_target: Tensor
    log_not_target: Tensor

    @property
    def top_k(self) -> int:
        """K, the ids stored per position."""
        return self.token_ids.shape[-1]

    @property
    def num_samples(self) -> int:
        """The number m of tail draws stored per position."""
        return self.tail_samples.shape[-1]

    @property
    def has_tail(self) -> bool:
        """Whether any id lies beyond the stored K."""
        return self.top_k < self.vocab_size


@dataclass(frozen=True, kw_only=True)
class StudentTerms:
    """What the losses need of the student's distribution q at T positions; differentiable.

    Attributes:
      logprobs: [T, K] log q of the teacher's top-K ids.
      log_target: [T] log q(y) of the true next token.
      sample_logprobs: [T, m] log q of the teacher's tail samples.
      log_beyond: [T] log of the student's mass off the teacher's top-K ids, -inf (a constant) where K == V;
        None if it was not asked for.
      prior_logprob: [T] mean of log q under the prior restricted to V minus the top-K and renormalised;
        None if it was not asked for, or where K == V.
    """

    logprobs: Tensor
    log_target: Tensor
    sample_logprobs: Tensor
    log_beyond: Tensor | None = None
    prior_logprob: Tensor | None = None


def student_terms(
    logits_TV: Tensor,
    teacher: TeacherTerms,
    next_tokens_T: Tensor,
    *,
    want_beyond: bool = True,
    prior_V: Tensor | None = None,
) -> StudentTerms:
    """Reduce the student's full logits to what the losses need.

    With z the logits and Z = log sum_V exp z: log q_i = z_i - Z; the mass off the head H is
    log sum_{V minus H} exp z - Z; the prior's cross term is (sum_{V minus H} pi z) / (sum_{V minus H} pi) -
    Z, both sums taken over the masked prior, because sum_V - sum_H cancels where the head holds nearly all
    of pi.

    Args:
      logits_TV: [T, W] logits at temperature 1 in any float type, W >= V. Columns from V on are padding
        rows of the head and are cut off before anything is normalised.
      teacher: the targets of the same positions.
      next_tokens_T: [T] int64 true next tokens, in [0, V).
      want_beyond: also compute ``log_beyond`` (TAD and the bucket need it).
      prior_V: [V] the teacher's mean tail distribution; also compute ``prior_logprob``.

    Returns:
      The terms, in float32, or in float64 for float64 logits.

    Raises:
      MismatchError: the logits are narrower than the vocabulary, or of another number of positions.

    Cost: one copy of [T, V] held until the backward, whatever is asked for; one more for the prior.
    """
    num_positions, width = logits_TV.shape
    vocab_size = teacher.vocab_size
    if width < vocab_size or num_positions != teacher.token_ids.shape[0]:
        raise MismatchError(
            f"student logits: expected [{teacher.token_ids.shape[0]} positions, at least {vocab_size} ids], "
            f"found {[num_positions, width]}; the student's head must cover the corpus' vocabulary"
        )
    logits_TV = logits_TV[:, :vocab_size]
    if logits_TV.dtype not in (torch.float32, torch.float64):
        logits_TV = logits_TV.float()
    # One gather for all ids, so that its backward is one scatter.
    gathered_ids = torch.cat([teacher.token_ids, teacher.tail_samples, next_tokens_T[:, None]], dim=-1)
    excluded_ids = teacher.token_ids if want_beyond and teacher.has_tail else teacher.token_ids[:, :0]
    reduce: Any = _LogSumExpExcept.apply
    log_rest_T, gathered = reduce(logits_TV, excluded_ids, gathered_ids)
    log_beyond_T = None
    if excluded_ids.shape[-1]:
        # Z in positive parts: the head's ids are distinct, and the rest is summed already.
        log_z_T = torch.logsumexp(torch.cat([gathered[:, : teacher.top_k], log_rest_T[:, None]], dim=-1), dim=-1)
        log_beyond_T = log_rest_T - log_z_T
    else:
        log_z_T = log_rest_T
        if want_beyond:
            log_beyond_T = torch.full_like(log_z_T, -torch.inf, requires_grad=False)
    logprobs, sample_logprobs, log_target = torch.split(
        gathered - log_z_T[:, None], [teacher.top_k, teacher.num_samples, 1], dim=-1
    )

    prior_logprob_T = None
    if prior_V is not None and teacher.has_tail:
        prior_TV = prior_V.to(logits_TV.dtype).expand(num_positions, vocab_size)
        prior_TV = prior_TV.scatter(-1, teacher.token_ids, 0.0)
        prior_logprob_T = (prior_TV * logits_TV).sum(-1) / prior_TV.sum(-1) - log_z_T

    return StudentTerms(
        logprobs=logprobs,
        log_target=log_target[:, 0],
        sample_logprobs=sample_logprobs,
        log_beyond=log_beyond_T,
        prior_logprob=prior_logprob_T,
    )


class _LogSumExpExcept(torch.autograd.Function):
    """Log-sum-exp over the vocabulary minus some ids, and the logits at some ids: all that a loss asks of [T, V].

    Holds one buffer of the logits' size, the exponentials, from forward to backward, and makes one more for the
    gradient; autograd's own operations would make five.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, excluded_TE: Tensor, gathered_TG: Tensor) -> tuple[Tensor, Tensor]:
        exponentials_TV = logits_TV.scatter(-1, excluded_TE, -torch.inf)
        largest_T1 = exponentials_TV.amax(-1, keepdim=True)
        sums_T1 = exponentials_TV.sub_(largest_T1).exp_().sum(-1, keepdim=True)
        ctx.save_for_backward(exponentials_TV, sums_T1, gathered_TG)
        return (largest_T1 + sums_T1.log())[:, 0], logits_TV.gather(-1, gathered_TG)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, grad_TG: Tensor) -> tuple[Tensor, None, None]:
        exponentials_TV, sums_T1, gathered_TG = ctx.saved_tensors
        gradient_TV = exponentials_TV * (grad_T[:, None] / sums_T1)
        return gradient_TV.scatter_add_(-1, gathered_TG, grad_TG), None, None


def weighted(log_weight: Tensor, value: Tensor) -> Tensor:
    """exp(log_weight) * value, and exactly 0 with gradient 0 where the weight is 0.

    The double ``where``: a value that is infinite or undefined where its weight vanishes must be replaced
    *before* the product, or 0 * inf makes the value, and then the gradient, NaN.

    Args:
      log_weight: any shape, -inf where the weight is 0; a constant.
      value: of the same shape.
    """
    positive = log_weight > -torch.inf
    return torch.where(positive, log_weight.exp() * torch.where(positive, value, 0.0), 0.0)
