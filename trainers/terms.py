"""What a loss may look at: a few numbers per target position, for the teacher and for the student.

Every loss is a function of ``TeacherTerms`` (from the cache) and ``StudentTerms`` (from the student's forward), so
it does not care how the student's numbers were made. ``student_terms`` makes them from full logits;
``fused_head`` makes them from hidden states and never holds ``[T, V]``. Both go through ``HeadTerms``, which is
all that anything here ever asks of a row of logits:

    log sum over V minus E of exp z,   the logits at some ids,   the mean of z over V minus E under some fills

with E the teacher's top-K ids and the true next token.

Everything is in log space, in nats, in float32 or wider. The student's terms are about the *teacher's* top-K ids:
``log_beyond`` is the student's mass off those ids, a sum over the others, never ``1 - sum``; so is
``log_not_target``, its mass off the true token.

Legend: T target positions, V vocabulary, K kept by the teacher, m tail samples, E = K + 1 excluded ids, G = K + m
+ 1 gathered ids, F fills, n temperatures. p teacher, q student, z the student's logits, H the top-K ids, y the true
next token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tailcache.storage.errors import MismatchError

__all__ = [
    "HeadTerms",
    "Mixed",
    "StudentTerms",
    "TeacherTerms",
    "Tempered",
    "fill_masses",
    "log_sum",
    "student_terms",
    "terms_from_head",
    "weighted",
]

Rows = slice | Tensor
Terms = TypeVar("Terms", "TeacherTerms", "Mixed", "Tempered", "StudentTerms")


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """What the targets of a mixture of teachers have beyond those of one; see ``mixture``.

    Attributes:
      num_common: how many of the K columns, the first, are for ids that every teacher stored; their log-probs are
        exact. Those of the other columns are the part of p that is known: its rest is in the tail.
      absent: [T, K] bool; columns that hold no id. Their log-prob is -inf, their id is one of another column.
      sample_shares: [T, m] what each draw stands for of the tail; sums to 1 where there is one.
      log_target_beyond: [T] log of the part of p(y) that is in the tail.
      gap: [T] how far the tail's sum of p log p may lie above what ``tail_entropy`` makes of it, nats.
    """

    num_common: int
    absent: Tensor
    sample_shares: Tensor
    log_target_beyond: Tensor
    gap: Tensor

    def rows(self, rows: Rows) -> Mixed:
        """The same of some of the positions."""
        return _rows(self, rows)


@dataclass(frozen=True, kw_only=True)
class TeacherTerms:
    """The cached targets of T positions, as tensors on one device.

    Attributes:
      vocab_size: V, the number of real token ids.
      token_ids: [T, K] int64, most likely first.
      logprobs: [T, K] log p of those ids.
      log_tail: [T] log of the mass off them, -inf where there is none (K == V).
      tail_entropy: [T] entropy of that tail, normalised, in nats; 0 where there is none.
      tail_samples: [T, m] int64 ids drawn in proportion to p restricted to that tail; m may be 0.
      log_target: [T] log p(y) of the true next token.
      log_not_target: [T] log(1 - p(y)).
      next_tokens: [T] int64, y itself.
      temperatures: the n temperatures that ``log_z_tail`` is about.
      log_z_tail: [T, n] log of the sum of p^(1 / temperature) over the ids off the top-K; None if not stored.
      mixed: what is different where these are the targets of a mixture; None for one teacher, and where every id of
        every teacher is stored.
    """

    vocab_size: int
    token_ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    tail_entropy: Tensor
    tail_samples: Tensor
    log_target: Tensor
    log_not_target: Tensor
    next_tokens: Tensor
    temperatures: tuple[float, ...] = ()
    log_z_tail: Tensor | None = None
    mixed: Mixed | None = None

    def __len__(self) -> int:
        return self.token_ids.shape[0]

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
        return self.mixed is not None or self.top_k < self.vocab_size

    @property
    def is_target(self) -> Tensor:
        """[T, K] bool: which of the top-K ids is the true next token."""
        is_target = self.token_ids == self.next_tokens[:, None]
        return is_target if self.mixed is None else is_target & ~self.mixed.absent

    @property
    def best_column(self) -> Tensor:
        """[T] int64: the column of the most likely id; of a mixture, of those whose known part is the largest."""
        if self.mixed is None:
            return torch.zeros_like(self.next_tokens)
        return self.logprobs.argmax(-1)

    @property
    def num_beyond(self) -> int | Tensor:
        """How many ids the tail is spread over at most: those off the top-K, and any whose rest is in the tail."""
        if self.mixed is None:
            return self.vocab_size - self.top_k
        if self.mixed.num_common < self.top_k:
            return self.vocab_size
        return self.vocab_size - (~self.mixed.absent).sum(-1)

    @property
    def log_target_beyond(self) -> Tensor:
        """[T] log of the part of p(y) that is in the tail: all of it where y is off the top-K, else nothing."""
        if self.mixed is not None:
            return self.mixed.log_target_beyond
        return torch.where(self.is_target.any(-1), -torch.inf, self.log_target)

    def rows(self, rows: Rows) -> TeacherTerms:
        """The terms of some of the positions."""
        return _rows(self, rows)


@dataclass(frozen=True, kw_only=True)
class Tempered:
    """The student's distribution at another temperature, softmax(z / temperature); differentiable.

    Attributes:
      logprobs: [T, K] its log-probs of the teacher's top-K ids.
      log_beyond: [T] log of its mass off them, -inf where K == V.
    """

    logprobs: Tensor
    log_beyond: Tensor

    def rows(self, rows: Rows) -> Tempered:
        """The terms of some of the positions."""
        return _rows(self, rows)


@dataclass(frozen=True, kw_only=True)
class StudentTerms:
    """What the losses need of the student's distribution q at T positions; differentiable.

    Attributes:
      logprobs: [T, K] log q of the teacher's top-K ids.
      log_target: [T] log q(y) of the true next token.
      log_not_target: [T] log(1 - q(y)), a sum over the other ids.
      sample_logprobs: [T, m] log q of the teacher's tail samples.
      log_beyond: [T] log of the student's mass off the teacher's top-K ids, -inf (a constant) where K == V.
      log_beyond_not_target: the same without y, which may be nearly all of it; -inf where no id is left.
      fill_logprobs: for each fill asked for, [T] the mean of log q under the fill restricted to V minus the top-K and
        renormalised; 0 where it has no mass there.
      fill_logprobs_not_target: the same over V minus the top-K and minus y.
      tempered: for each further temperature asked for, the student at it.
    """

    logprobs: Tensor
    log_target: Tensor
    log_not_target: Tensor
    sample_logprobs: Tensor
    log_beyond: Tensor
    log_beyond_not_target: Tensor
    fill_logprobs: Mapping[str, Tensor] = field(default_factory=dict)
    fill_logprobs_not_target: Mapping[str, Tensor] = field(default_factory=dict)
    tempered: Mapping[float, Tempered] = field(default_factory=dict)

    def rows(self, rows: Rows) -> StudentTerms:
        """The terms of some of the positions."""
        return _rows(self, rows)


def _rows(terms: Terms, rows: Rows) -> Terms:
    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows]
        if isinstance(value, Tempered | Mixed):
            return value.rows(rows)
        return {name: part(each) for name, each in value.items()} if isinstance(value, Mapping) else value

    changed: dict[str, Any] = {each.name: part(getattr(terms, each.name)) for each in fields(terms)}
    return replace(terms, **changed)


@dataclass(frozen=True, kw_only=True)
class HeadTerms:
    """What is asked of T rows of logits z; differentiable but for ``largest_rest``.

    The sums are given relative to the largest logit of the rest, so that logits of 1e4 cost no digits.

    Attributes:
      log_sum_rest: [T, n] log of the sum over V minus E of exp((z - largest_rest) / temperature), the first
        temperature being 1; -inf where E is all of V.
      largest_rest: [T] the largest z in V minus E, a constant; -inf where E is all of V.
      gathered: [T, G] z at the top-K ids, the tail samples and the true next token, in this order.
      fill_means: [T, F] the mean of z over V minus E under each fill; 0 where it has no mass there.
    """

    log_sum_rest: Tensor
    largest_rest: Tensor
    gathered: Tensor
    fill_means: Tensor


def wanted_ids(teacher: TeacherTerms) -> tuple[Tensor, Tensor]:
    """The excluded ids [T, K + 1] (the last may repeat one before) and the gathered ids [T, K + m + 1]."""
    target_T1 = teacher.next_tokens[:, None]
    return (
        torch.cat([teacher.token_ids, target_T1], dim=-1),
        torch.cat([teacher.token_ids, teacher.tail_samples, target_T1], dim=-1),
    )


def fill_masses(fill: Tensor, teacher: TeacherTerms) -> Tensor:
    """[T] float64, a fill's mass over V minus the top-K and minus the true next token; a constant.

    Args:
      fill: [V] or [T, V] weights >= 0.
      teacher: says which ids.

    Cost: K + 1 gathers per position; the whole row only where nearly all mass is on the excluded ids, since the
    difference would have no digits left there. Rows are then looked at a few at a time.
    """
    excluded_TE, _ = wanted_ids(teacher)
    mass_T: Tensor = _masses_off(fill, excluded_TE, teacher.is_target.any(-1))
    return mass_T


_ROW_ELEMENTS = 1 << 22
"""Weights looked at together where whole rows are."""


@torch.library.custom_op("tailcache::masses_off", mutates_args=())
def _masses_off(fill: Tensor, excluded_TE: Tensor, repeated_T: Tensor) -> Tensor:
    """The mass off the excluded ids, the last of which may repeat one before; one operator for ``torch.compile``."""
    wide = fill.double()
    total_T = wide.sum(-1).expand(len(excluded_TE))
    taken_TE = wide[excluded_TE] if fill.dim() == 1 else wide.gather(-1, excluded_TE)
    mass_T = total_T - taken_TE[:, :-1].sum(-1) - torch.where(repeated_T, 0.0, taken_TE[:, -1])
    # The difference is off by some 1e-16 of the total: how many digits it must keep is the fill's to say.
    lost_U = (mass_T < total_T * (1e-2 if fill.dtype == torch.float64 else 1e-8)).nonzero()[:, 0]
    for rows_u in torch.split(lost_U, max(1, _ROW_ELEMENTS // fill.shape[-1])):
        rest_uV = wide.repeat(len(rows_u), 1) if fill.dim() == 1 else wide[rows_u]
        mass_T[rows_u] = rest_uV.scatter_(-1, excluded_TE[rows_u], 0.0).sum(-1)
    return mass_T


@_masses_off.register_fake
def _(fill: Tensor, excluded_TE: Tensor, repeated_T: Tensor) -> Tensor:
    return fill.new_empty((excluded_TE.shape[0],), dtype=torch.float64)


def terms_from_head(
    head: HeadTerms,
    teacher: TeacherTerms,
    *,
    fills: Mapping[str, Tensor] | None = None,
    temperatures: Sequence[float] = (),
) -> StudentTerms:
    """Normalise: from logits at a few ids and the sums over the rest to log-probs.

    Args:
      head: of the same positions.
      teacher: its ids were excluded and gathered.
      fills: the weights that ``head.fill_means`` is about, in its order; [V] or [T, V] each.
      temperatures: the further temperatures that ``head.log_sum_rest`` has columns for.

    Returns:
      The terms, in the dtype of ``head``.
    """
    num_kept = teacher.top_k
    # Relative to the largest logit of all: subtracting it first keeps the digits of near-certain distributions.
    largest_T = torch.maximum(head.gathered.detach().amax(-1), head.largest_rest)
    shifted = head.gathered - largest_T[:, None]
    head_TK, sample_Tm, target_T1 = torch.split(shifted, [num_kept, teacher.num_samples, 1], dim=-1)
    if teacher.mixed is not None:
        head_TK = head_TK.masked_fill(teacher.mixed.absent, -torch.inf)
    target_T = target_T1[:, 0]
    rest_T = head.log_sum_rest[:, 0] + (head.largest_rest - largest_T)
    in_head_T = teacher.is_target.any(-1)
    target_beyond_T = torch.where(in_head_T, -torch.inf, target_T)
    beyond_T = log_sum(torch.stack([rest_T, target_beyond_T], dim=-1))
    others_TK = head_TK.masked_fill(teacher.is_target, -torch.inf)
    not_target_T = log_sum(torch.cat([others_TK, rest_T[:, None]], dim=-1))
    log_z_T = torch.logaddexp(target_T, not_target_T)

    fill_logprobs, fill_not_target = {}, {}
    for index, (name, fill) in enumerate((fills or {}).items()):
        mass_T = fill_masses(fill, teacher)
        target_share_T = (
            fill[teacher.next_tokens] if fill.dim() == 1 else fill.gather(-1, teacher.next_tokens[:, None])[:, 0]
        )
        share_T = torch.where(in_head_T, 0.0, target_share_T.double())
        whole_T = mass_T + share_T
        weight_T = torch.where(whole_T > 0, share_T / torch.where(whole_T > 0, whole_T, 1.0), 0.0).to(log_z_T.dtype)
        mean_T = head.fill_means[:, index] - largest_T
        fill_not_target[name] = torch.where(mass_T > 0, mean_T - log_z_T, 0.0)
        both_T = torch.where(mass_T > 0, (1 - weight_T) * mean_T, 0.0) + weight_T * target_T - log_z_T
        fill_logprobs[name] = torch.where(whole_T > 0, both_T, 0.0)

    tempered = {}
    for index, temperature in enumerate(temperatures, start=1):
        rest_at_T = head.log_sum_rest[:, index] + (head.largest_rest - largest_T) / temperature
        beyond_at_T = log_sum(torch.stack([rest_at_T, target_beyond_T / temperature], dim=-1))
        head_at_TK = head_TK / temperature
        log_z_at_T = log_sum(torch.cat([head_at_TK, beyond_at_T[:, None]], dim=-1))
        tempered[temperature] = Tempered(logprobs=head_at_TK - log_z_at_T[:, None], log_beyond=beyond_at_T - log_z_at_T)

    return StudentTerms(
        logprobs=head_TK - log_z_T[:, None],
        log_target=target_T - log_z_T,
        log_not_target=not_target_T - log_z_T,
        sample_logprobs=sample_Tm - log_z_T[:, None],
        log_beyond=beyond_T - log_z_T,
        log_beyond_not_target=rest_T - log_z_T,
        fill_logprobs=fill_logprobs,
        fill_logprobs_not_target=fill_not_target,
        tempered=tempered,
    )


def student_terms(
    logits_TV: Tensor,
    teacher: TeacherTerms,
    *,
    fills: Mapping[str, Tensor] | None = None,
    temperatures: Sequence[float] = (),
) -> StudentTerms:
    """Reduce the student's full logits to what the losses need.

    Args:
      logits_TV: [T, W] logits at temperature 1 in any float type, W >= V. Columns from V on are padding rows of the
        head and are cut off before anything is normalised.
      teacher: the targets of the same positions.
      fills: weights >= 0 by name, [V] for one that all positions share (the teacher's mean tail), [T, V] for one of
        their own; their means of log q beyond the top-K are wanted.
      temperatures: further temperatures at which the student is wanted.

    Returns:
      The terms, in float32, or in float64 for float64 logits.

    Raises:
      MismatchError: the logits are narrower than the vocabulary, or of another number of positions.

    Cost: one copy of [T, V] held until the backward; one more for each fill and each temperature.
    """
    num_positions, width = logits_TV.shape
    vocab_size = teacher.vocab_size
    if width < vocab_size or num_positions != len(teacher):
        raise MismatchError(
            f"student logits: expected [{len(teacher)} positions, at least {vocab_size} ids], found "
            f"{[num_positions, width]}; the student's head must cover the corpus' vocabulary"
        )
    logits_TV = logits_TV[:, :vocab_size]
    if logits_TV.dtype not in (torch.float32, torch.float64):
        logits_TV = logits_TV.float()
    fills = fills or {}
    excluded_TE, gathered_TG = wanted_ids(teacher)
    reduce: Any = _LogSumExpExcept.apply
    # The gather's backward rides on the first sum's, so that there is one scatter.
    sums_T, largest_T, gathered = reduce(logits_TV, excluded_TE, gathered_TG, 1.0)
    sums = [sums_T, *(reduce(logits_TV, excluded_TE, gathered_TG[:, :0], tau)[0] for tau in temperatures)]
    means = []
    for fill in fills.values():
        rest_TV = fill.to(logits_TV.dtype).expand(num_positions, vocab_size).scatter(-1, excluded_TE, 0.0)
        mass_T = rest_TV.sum(-1)
        means.append(torch.where(mass_T > 0, (rest_TV * logits_TV).sum(-1) / torch.where(mass_T > 0, mass_T, 1.0), 0.0))
    head = HeadTerms(
        log_sum_rest=torch.stack(sums, dim=-1),
        largest_rest=largest_T,
        gathered=gathered,
        fill_means=torch.stack(means, dim=-1) if means else gathered[:, :0],
    )
    return terms_from_head(head, teacher, fills=fills, temperatures=temperatures)


class _LogSumExpExcept(torch.autograd.Function):
    """Log of the sum of exp((z - largest) / temperature) over V minus some ids, and z at some ids.

    Holds one buffer of the logits' size, the exponentials, from forward to backward, and makes one more for the
    gradient; autograd's own operations would make five.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, excluded_TE: Tensor, gathered_TG: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        exponentials_TV = logits_TV.scatter(-1, excluded_TE, -torch.inf)
        largest_T = exponentials_TV.amax(-1)
        exponentials_TV.sub_(largest_T.masked_fill(largest_T == -torch.inf, 0.0)[:, None])
        if temperature != 1.0:
            exponentials_TV.div_(temperature)
        sums_T = exponentials_TV.exp_().sum(-1)
        ctx.temperature = temperature
        ctx.save_for_backward(exponentials_TV, sums_T, gathered_TG)
        ctx.mark_non_differentiable(largest_T)
        return sums_T.log(), largest_T, logits_TV.gather(-1, gathered_TG)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, _: Tensor, grad_TG: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials_TV, sums_T, gathered_TG = ctx.saved_tensors
        scale_T = torch.where(sums_T > 0, grad_T / (ctx.temperature * torch.where(sums_T > 0, sums_T, 1.0)), 0.0)
        return (exponentials_TV * scale_T[:, None]).scatter_add_(-1, gathered_TG, grad_TG), None, None, None


def log_sum(values_TA: Tensor) -> Tensor:
    """Log-sum-exp over the last axis; -inf, with gradient 0, where all are -inf.

    ``torch.logsumexp`` gives NaN gradients there.
    """
    largest_T1 = values_TA.detach().amax(-1, keepdim=True)
    any_T1 = largest_T1 > -torch.inf
    sums_T = (values_TA - torch.where(any_T1, largest_T1, 0.0)).exp().sum(-1)
    any_T = any_T1[..., 0]
    return torch.where(
        any_T, torch.where(any_T, sums_T, 1.0).log() + torch.where(any_T, largest_T1[..., 0], 0.0), -torch.inf
    )


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
