"""Several teachers as one: the weighted mixture of their cached targets, at every position.

    p = sum_i w_i p_i        w_i >= 0, sum_i w_i = 1, one set of weights for each position

Each teacher i has stored its own top-K ids H_i with p_i exactly, and of the rest its mass alpha_i, its entropy and m_i
draws. For an id that some teachers stored and others did not, p is known in part only. So the ids fall into three
kinds (teachers of weight 0 at a position do not count there):

- **common**, in every H_i: p is exact, and so is the mass a = 1 - sum of p over them, a sum of known parts;
- **partial**, in some H_i: the known part c(v) = sum over those i of w_i p_i(v), and a rest >= 0;
- all others: only a rest.

The rests together are sum_i w_i alpha_i p~_i, a mass that is exact, from which every teacher has draws of its own. A
draw of one teacher may fall on an id that another one stored; there it is the estimate of the rest. So

    sum_v p(v) f(v) = sum_{U} c(v) f(v) + sum_i w_i alpha_i / m_i sum_j f(s_ij)     U the union of all H_i, c = p on C

holds on average over the draws for every f, and a loss that is linear in p (KL, NCKD, and TAD once its head is made of
common ids, so that alpha and beta(X) are exact) has an unbiased gradient, with nothing counted twice and nothing left
out. ``mix`` writes this as ``TeacherTerms``: common ids first, most likely first, then the partial ones, then a tail
with weighted draws; every loss that is written for one teacher is then right for the mixture. Losses that are not
linear get the atoms whose masses are exact: the common ids and one for everything else (``on_common``).

**Values.** The mixture's own sum of p log p beyond the common ids is not known: it depends on how far the rests
overlap. ``mix`` takes them to be disjoint, c and each w_i alpha_i p~_i apart, which bounds that sum from below; so the
value of a linear loss is a lower bound (its gradient has no part in this). ``Mixed.gap`` is how far above it can lie:

    gap = a h(M_1 / a, ..., M_n / a) - sum_{partial v} c(v) h(w_i p_i(v) / c(v), ...)

with M_i = w_i (1 - p_i(common ids)) and h the entropy. It follows from the log-sum inequality: sum_i w_i KL(p_i || p)
is at least what it is with all ids that are not common merged. It is at most a log n, and 0 where one teacher has all
the weight.

Legend: T target positions, n teachers, K_i kept by teacher i, S the sum of K_i, U columns of the result, m draws of
all teachers. p mixture, p_i teachers, y the true next token. Log space, nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tailcache.storage.errors import MismatchError
from tailcache.trainers.terms import Mixed, StudentTerms, TeacherTerms, log_sum, weighted

__all__ = ["mix", "on_common"]


def mix(teachers: Sequence[TeacherTerms], log_weights_Tn: Tensor) -> TeacherTerms:
    """The targets of the mixture.

    Args:
      teachers: the targets of the same T positions by each of n teachers.
      log_weights_Tn: [T, n] log w_i, -inf for a teacher that takes no part in a position; exp of it sums to 1.

    Returns:
      Common ids first (see the module), at least min K_i columns for them, then the partial ones; most likely first,
      both padded to what the T positions need. ``tail_samples`` are the draws of all teachers, none if any teacher with
      a tail has none. ``log_target`` and ``log_not_target`` are exact. Where no teacher has a tail, plain targets
      without ``mixed``.

    Raises:
      MismatchError: the teachers' targets or the weights are not of the same positions and vocabulary.

    Cost: three sorts of [T, S].
    """
    first = teachers[0]
    _check(teachers, log_weights_Tn)
    log_w = log_weights_Tn.to(first.logprobs.dtype)
    union = _Union(teachers, log_w)
    has_tail = any(each.has_tail for each in teachers)
    tails_Tn = log_w + torch.stack([each.log_tail for each in teachers], dim=-1)
    log_tail_T = log_sum(tails_Tn)
    some_T1 = (log_tail_T > -torch.inf)[:, None]
    log_shares_Tn = torch.where(some_T1, tails_Tn - torch.where(some_T1, log_tail_T[:, None], 0.0), -torch.inf)
    entropies_Tn = torch.stack([each.tail_entropy for each in teachers], dim=-1)
    beyond_Tn = torch.stack([each.log_target_beyond for each in teachers], dim=-1)
    can_draw = all(each.num_samples > 0 for each in teachers if each.has_tail)
    drawing = [i for i, each in enumerate(teachers) if can_draw and each.has_tail]
    shares = [
        (log_shares_Tn[:, i, None].exp() / teachers[i].num_samples).expand_as(teachers[i].tail_samples) for i in drawing
    ]
    mixed = Mixed(
        num_common=union.num_common,
        absent=union.absent,
        sample_shares=torch.cat(shares, dim=-1) if shares else log_w[:, :0],
        log_target_beyond=log_sum(log_w + beyond_Tn),
        gap=union.gap(tails_Tn),
    )
    return TeacherTerms(
        vocab_size=first.vocab_size,
        token_ids=union.ids,
        logprobs=union.logprobs,
        log_tail=log_tail_T,
        tail_entropy=weighted(log_shares_Tn, entropies_Tn - log_shares_Tn).sum(-1),
        tail_samples=torch.cat([first.tail_samples[:, :0], *(teachers[i].tail_samples for i in drawing)], dim=-1),
        log_target=log_sum(log_w + torch.stack([each.log_target for each in teachers], dim=-1)),
        log_not_target=log_sum(log_w + torch.stack([each.log_not_target for each in teachers], dim=-1)),
        next_tokens=first.next_tokens,
        mixed=mixed if has_tail else None,
    )


def on_common(teacher: TeacherTerms, student: StudentTerms) -> tuple[TeacherTerms, StudentTerms]:
    """The same with all that is not common merged into the tail: atoms whose masses are exact for both sides.

    Args:
      teacher: of ``mix``; targets without ``mixed`` come back as they are.
      student: terms of the same positions.

    Returns:
      Both, with the common columns only. The draws are gone, and the tail's entropy: it is for `bucket`.
    """
    mixed = teacher.mixed
    if mixed is None:
        return teacher, student
    num, partial_TP = mixed.num_common, teacher.is_target[:, mixed.num_common :]

    def merged(columns_TP: Tensor, beyond_T: Tensor) -> Tensor:
        return log_sum(torch.cat([columns_TP, beyond_T[:, None]], dim=-1))

    is_common_T = teacher.is_target[:, :num].any(-1)
    return (
        replace(
            teacher,
            token_ids=teacher.token_ids[:, :num],
            logprobs=teacher.logprobs[:, :num],
            log_tail=merged(teacher.logprobs[:, num:], teacher.log_tail),
            tail_entropy=torch.zeros_like(teacher.tail_entropy),
            tail_samples=teacher.tail_samples[:, :0],
            mixed=replace(
                mixed,
                absent=mixed.absent[:, :num],
                sample_shares=mixed.sample_shares[:, :0],
                log_target_beyond=torch.where(is_common_T, -torch.inf, teacher.log_target),
            ),
        ),
        replace(
            student,
            logprobs=student.logprobs[:, :num],
            sample_logprobs=student.sample_logprobs[:, :0],
            log_beyond=merged(student.logprobs[:, num:], student.log_beyond),
            log_beyond_not_target=merged(
                student.logprobs[:, num:].masked_fill(partial_TP, -torch.inf), student.log_beyond_not_target
            ),
        ),
    )


def _check(teachers: Sequence[TeacherTerms], log_weights_Tn: Tensor) -> None:
    first = teachers[0]
    for each in teachers[1:]:
        same = each.next_tokens is first.next_tokens or torch.equal(each.next_tokens, first.next_tokens)
        if each.vocab_size != first.vocab_size or not same:
            raise MismatchError(
                f"mixture: expected targets of the same positions of one corpus, found {len(first)} positions over "
                f"{first.vocab_size} ids and {len(each)} over {each.vocab_size}, or other next tokens"
            )
    if log_weights_Tn.shape != (len(first), len(teachers)):
        raise MismatchError(
            f"mixture: expected weights [{len(first)} positions, {len(teachers)} teachers], found "
            f"{list(log_weights_Tn.shape)}"
        )


class _Union:
    """The union of all teachers' heads, sorted into common and partial ids.

    Attributes:
      ids, logprobs, absent: [T, U] as in the terms of the mixture.
      num_common: columns for common ids.
    """

    def __init__(self, teachers: Sequence[TeacherTerms], log_w: Tensor) -> None:
        sentinel = teachers[0].vocab_size
        active_Tn = log_w > -torch.inf
        ids = [
            torch.where(active_Tn[:, i, None], each.token_ids, sentinel).to(torch.int64)
            for i, each in enumerate(teachers)
        ]
        ids_TS, order_TS = torch.cat(ids, dim=-1).sort(dim=-1, stable=True)
        mass_TS = torch.cat([each.logprobs + log_w[:, i, None] for i, each in enumerate(teachers)], dim=-1)
        mass_TS = mass_TS.gather(-1, order_TS)
        present_TS = ids_TS < sentinel
        # An id stands at most n times, side by side.
        offsets = range(1, min(len(teachers), ids_TS.shape[1]))
        same = {k: _shifted(ids_TS, k, sentinel + 1) == ids_TS for k in offsets}
        after_TSn = [torch.where(same[k], _shifted(mass_TS, k, -torch.inf), -torch.inf) for k in offsets]
        total_TS = log_sum(torch.stack([mass_TS, *after_TSn], dim=-1))
        first_TS = present_TS & (_shifted(ids_TS, -1, -1) != ids_TS)
        count_TS = 1 + sum((same[k].long() for k in offsets), torch.zeros_like(ids_TS))
        common_TS = first_TS & (count_TS == active_Tn.sum(-1, keepdim=True))
        of_common_TS = common_TS.clone()
        for k in offsets:
            of_common_TS |= _shifted(same[k] & common_TS, -k, False)
        self._partial_parts = mass_TS.masked_fill(of_common_TS | ~present_TS, -torch.inf)
        self._partial = total_TS.masked_fill(common_TS | ~first_TS, -torch.inf)
        self._order, self._widths = order_TS, [each.top_k for each in teachers]

        kind_TS = torch.where(common_TS, 0, torch.where(first_TS, 1, 2)).to(torch.int8)
        likely_TS = total_TS.masked_fill(~first_TS, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        likely_TS = likely_TS.gather(-1, kind_TS.gather(-1, likely_TS).argsort(dim=-1, stable=True))
        num_common_T, num_T = common_TS.sum(-1), first_TS.sum(-1)
        num_partial_T = num_T - num_common_T
        most_common, num_partial = (int(each.max()) if len(each) else 0 for each in (num_common_T, num_partial_T))
        self.num_common = max(min(self._widths), most_common)
        columns = torch.arange(self.num_common + num_partial, device=ids_TS.device).expand(len(ids_TS), -1)
        is_partial = columns >= self.num_common
        place = torch.where(is_partial, columns - self.num_common + num_common_T[:, None], columns)
        self.absent = place >= torch.where(is_partial, num_T[:, None], num_common_T[:, None])
        source = likely_TS.gather(-1, place.masked_fill(self.absent, 0))
        self.ids = ids_TS.gather(-1, source)
        self.logprobs = total_TS.gather(-1, source).masked_fill(self.absent, -torch.inf)

    def gap(self, tails_Tn: Tensor) -> Tensor:
        """[T] see the module; ``tails_Tn`` is log (w_i alpha_i)."""
        parts = torch.full_like(self._partial_parts, -torch.inf).scatter(-1, self._order, self._partial_parts)
        off_Tn = torch.stack(
            [
                log_sum(torch.cat([part, tails_Tn[:, i, None]], dim=-1))
                for i, part in enumerate(torch.split(parts, self._widths, dim=-1))
            ],
            dim=-1,
        )
        whole_T = log_sum(off_Tn)
        known = weighted(self._partial, self._partial).sum(-1) - weighted(parts, parts).sum(-1)
        return (weighted(whole_T, whole_T) - weighted(off_Tn, off_Tn).sum(-1) - known).clamp_min(0.0)


def _shifted(values_TS: Tensor, by: int, fill: float) -> Tensor:
    """Column s + by of each column s; the fill where there is none."""
    result_TS = torch.full_like(values_TS, fill)
    if by > 0:
        result_TS[:, :-by] = values_TS[:, by:]
    else:
        result_TS[:, -by:] = values_TS[:, :by]
    return result_TS
