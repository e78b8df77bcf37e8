"""What each target position adds to the figures of an evaluation: pure functions of a few rows of logits.

Everything is a sum over positions, so that a figure of any set of documents, and of any resample of them, follows from
their sums alone. The student's distribution is dense here, so its calibration and its tail are exact. The teacher's
are as exact as what is stored: of its top-K, its tail mass and p_y all are known, and that is enough for ECE, and for
Full-ECE wherever no id beyond the top-K can have left the lowest bin.

Bins are the M equal ones (m / M, (m + 1) / M], 0 in the first. At most M ids of a position have more than 1 / M.

Legend: t positions, V vocabulary, W width of the logits (>= V), K stored ids, m draws, M bins, n tail masses. p
teacher, q student, y the true next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tailcache.trainers.divergences import cross_entropy, forward_kl
from tailcache.trainers.tails import bucket, sampled
from tailcache.trainers.terms import StudentTerms, TeacherTerms, student_terms

__all__ = ["TOP", "bins_of", "draw_variance", "position_columns"]

TOP = 5
"""Of the second agreement."""

Terms = TypeVar("Terms", TeacherTerms, StudentTerms)


@torch.no_grad()
def position_columns(
    logits_tW: Tensor, teacher: TeacherTerms, *, num_bins: int, tail_ks: Sequence[int], systematic: bool
) -> dict[str, Tensor]:
    """What is summed over positions, by name.

    Args:
      logits_tW: [t, W] the student's logits at temperature 1; columns from V on are padding.
      teacher: the targets of the same positions.
      num_bins: M.
      tail_ks: the n K' <= K beyond which masses are wanted.
      systematic: whether the draws are a systematic sample, see ``draw_variance``.

    Returns:
      [t] or [t, ...] float64 each:
      ``positions``: 1. ``cross_entropy``, ``teacher_cross_entropy``, ``kl`` (as ``metrics`` has it): nats.
      ``kl_variance``: of it, nats squared, where a position's draws are several; with ``draw_variance``, alpha^2 times
      that of one draw there, ``weight_known``, alpha^2 there, and ``weight_single``, alpha^2 where there is one draw.
      ``top1_agreement``; ``top5_agreement``, the share of the teacher's 5 most likely ids among the student's, absent
      where K < 5.
      ``student_tail``, ``teacher_tail`` [t, n]: the masses off the teacher's K' most likely ids.
      For ``student`` and ``teacher``, [t, M]: ``_top_count``, ``_top_mass``, ``_top_hits``, by bin of the most likely
      id's probability; ``_all_count``, ``_all_mass``, ``_all_hits``, by bin of every id's probability.
      ``undecided``: 1 where the teacher's latter are not known.

    Cost: three tensors of [t, V].
    """
    short = student_terms(logits_tW, teacher)
    q_tV = torch.softmax(logits_tW[:, : teacher.vocab_size].to(short.log_target.dtype), dim=-1)
    top_q, top_ids = q_tV.topk(min(TOP, teacher.vocab_size))
    student, stored = _wide(short), _wide(teacher)
    p_tK = stored.logprobs.exp()
    exact_or_sampled = not teacher.has_tail or teacher.num_samples > 0
    columns = {
        "positions": torch.ones_like(p_tK[:, 0]),
        "cross_entropy": cross_entropy(student),
        "teacher_cross_entropy": -stored.log_target,
        "kl": forward_kl(stored, student, sampled if exact_or_sampled else bucket),
        **_of_draws(stored, student, systematic=systematic),
        "top1_agreement": (top_ids[:, 0] == teacher.token_ids[:, 0]).double(),
        "student_tail": _masses_beyond(student.logprobs.exp(), student.log_beyond.exp(), tail_ks),
        "teacher_tail": _masses_beyond(p_tK, stored.log_tail.exp(), tail_ks),
    }
    if teacher.top_k >= top_ids.shape[1]:
        common = (top_ids[:, :, None] == teacher.token_ids[:, None, : top_ids.shape[1]]).any(-1)
        columns["top5_agreement"] = common.double().mean(-1)
    target = teacher.next_tokens
    columns |= _by_top("student", top_q[:, 0].double(), top_ids[:, 0] == target, num_bins)
    columns |= _by_top("teacher", p_tK[:, 0], teacher.token_ids[:, 0] == target, num_bins)
    q_target_t = q_tV.gather(-1, target[:, None])[:, 0]
    columns |= _by_all("student", q_tV, q_target_t, num_bins, teacher.vocab_size)
    # Where the true id is among the stored ones it lies in the bin of its probability there, which is rounded apart.
    in_head_t, stored_t = teacher.is_target.any(-1), (p_tK * teacher.is_target).sum(-1)
    p_target_t = torch.where(in_head_t, stored_t, stored.log_target.exp())
    columns |= _by_all("teacher", p_tK, p_target_t, num_bins, teacher.vocab_size, beyond_t=stored.log_tail.exp())
    # An id beyond the top-K has at most the mass of the K-th, and at most that of the tail.
    most_t = torch.minimum(p_tK[:, -1], stored.log_tail.exp())
    may_exceed = teacher.has_tail and teacher.top_k < num_bins
    columns["undecided"] = (most_t > 1 / num_bins).double() if may_exceed else torch.zeros_like(most_t)
    return columns


def bins_of(p: Tensor, num_bins: int) -> Tensor:
    """The bin of each probability: m for p in (m / M, (m + 1) / M], 0 for 0; int64 of the same shape."""
    bins = (p.double() * num_bins).ceil().long() - 1
    return torch.where(p > 1 / num_bins, bins.clamp(min(1, num_bins - 1), num_bins - 1), 0)


def draw_variance(values_tm: Tensor, ids_tm: Tensor, *, systematic: bool) -> tuple[Tensor, Tensor]:
    """Estimated variance of a single one of each position's draws, and how many different draws there are.

    The mean of independent draws has the sample variance over their number. That of a systematic sample (even points
    under the tail's distribution function, ids ascending) has less, how much less cannot be known from the sample
    itself; half of the mean square of successive differences is the usual estimate, and mostly too large rather than
    too small. Draws that stand for several (all of a position are repeated equally often) count once.

    Args:
      values_tm: [t, m] float64, what is averaged, by draw; m >= 1.
      ids_tm: [t, m] the ids drawn.
      systematic: how they were drawn.

    Returns:
      [t] float64 variance, 0 where a position has a single draw and nothing is known; [t] float64 number of draws.

    Source: Wolter, "Introduction to Variance Estimation", chapter 8, estimator v_2, without the finite-population
    correction.
    """
    num = values_tm.shape[1]
    sorted_ids, order = ids_tm.sort(dim=-1, stable=True)
    number_t = num / _common_repeats(sorted_ids) if systematic else torch.full_like(values_tm[:, 0], num)
    if systematic:
        squares_t = values_tm.gather(-1, order).diff(dim=-1).square().sum(-1) / 2
    else:
        squares_t = (values_tm - values_tm.mean(-1, keepdim=True)).square().sum(-1)
    return squares_t / (number_t - 1).clamp_min(1), number_t


def _common_repeats(sorted_tm: Tensor) -> Tensor:
    """[t] how often every draw is repeated at least: the greatest common divisor of the runs of equal ids."""
    num = sorted_tm.shape[1]
    is_last_tm = torch.ones_like(sorted_tm, dtype=torch.bool)
    is_last_tm[:, :-1] = sorted_tm[:, 1:] != sorted_tm[:, :-1]
    repeats_t = torch.full_like(sorted_tm[:, 0], num)
    # A divisor of all runs divides every place where one ends.
    for place in range(num - 1):
        shorter_t = torch.gcd(repeats_t, torch.full_like(repeats_t, place + 1))
        repeats_t = torch.where(is_last_tm[:, place], shorter_t, repeats_t)
    return repeats_t


def _of_draws(teacher: TeacherTerms, student: StudentTerms, *, systematic: bool) -> dict[str, Tensor]:
    """What the variance of the KL that is due to the draws is made of, see ``position_columns``."""
    names = ("kl_variance", "draw_variance", "weight_known", "weight_single")
    if not teacher.has_tail or teacher.num_samples == 0:
        return dict.fromkeys(names, torch.zeros_like(teacher.log_tail))
    variance_t, number_t = draw_variance(student.sample_logprobs, teacher.tail_samples, systematic=systematic)
    weight_t, single_t = (2 * teacher.log_tail).exp(), number_t < 2
    parts = (weight_t * variance_t / number_t, weight_t * variance_t, weight_t * ~single_t, weight_t * single_t)
    return dict(zip(names, parts, strict=True))


def _masses_beyond(head_tK: Tensor, beyond_t: Tensor, tail_ks: Sequence[int]) -> Tensor:
    """[t, n] the mass off the first K' ids, by sums of what is off them."""
    reverse_tK = head_tK.flip(-1).cumsum(-1).flip(-1) + beyond_t[:, None]
    masses_tK = torch.cat([reverse_tK, beyond_t[:, None]], dim=-1)
    return masses_tK[:, list(tail_ks)]


def _by_top(whose: str, confidence_t: Tensor, hit_t: Tensor, num_bins: int) -> dict[str, Tensor]:
    one_tM = torch.nn.functional.one_hot(bins_of(confidence_t, num_bins), num_bins).double()
    return {
        f"{whose}_top_count": one_tM,
        f"{whose}_top_mass": one_tM * confidence_t[:, None],
        f"{whose}_top_hits": one_tM * hit_t[:, None],
    }


def _by_all(
    whose: str, p_tA: Tensor, target_t: Tensor, num_bins: int, vocab_size: int, *, beyond_t: Tensor | None = None
) -> dict[str, Tensor]:
    """Ids, mass and hits by bin; ids that are not among A lie in the lowest, their mass is `beyond_t`."""
    above_tA = p_tA > 1 / num_bins
    row, column = above_tA.nonzero(as_tuple=True)
    p = p_tA[row, column].double()
    place = row * num_bins + bins_of(p_tA[row, column], num_bins)
    mass_tM = p.new_zeros((len(p_tA), num_bins))
    count_tM = torch.zeros_like(mass_tM)
    mass_tM.view(-1).index_add_(0, place, p)
    count_tM.view(-1).index_add_(0, place, torch.ones_like(p))
    mass_tM[:, 0] += p_tA.masked_fill(above_tA, 0.0).sum(-1).double()
    if beyond_t is not None:
        mass_tM[:, 0] += beyond_t
    count_tM[:, 0] += vocab_size - count_tM.sum(-1)
    hits_tM = torch.nn.functional.one_hot(bins_of(target_t, num_bins), num_bins).double()
    return {f"{whose}_all_count": count_tM, f"{whose}_all_mass": mass_tM, f"{whose}_all_hits": hits_tM}


def _wide(terms: Terms) -> Terms:
    """The same terms in float64."""
    values = {each.name: getattr(terms, each.name) for each in fields(terms)}
    wide: dict[str, Any] = {n: v.double() for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return replace(terms, **wide)
