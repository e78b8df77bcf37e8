"""The parts of the loss of one micro-batch: each divergence of the settings, ready to be worked out for some positions.

What depends on the teacher alone (beta(X) of TAD, ATKD's groups, RS-KD's draws) is made here, once, from all positions
of the micro-batch; what is left is a function of a few positions at a time, and can run inside the fused head. Most
divergences are functions of terms; those that need whole rows of both distributions (``needs_rows``) get them from
``Rows``.

Legend: T target positions, c of them at a time, V vocabulary, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from tailcache.trainers import divergences
from tailcache.trainers.atkd import atkd, group_weights
from tailcache.trainers.atoms import bucket_atoms, filled_atoms, head_atoms, split_target
from tailcache.trainers.dkd import dkd, non_target_class_kl, target_atoms, without_target
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.mixture import on_common
from tailcache.trainers.rs_kd import Draws, draw, rs_kd
from tailcache.trainers.tad import log_adaptive_beta, log_teacher_tail, weighted_tad
from tailcache.trainers.tails import tail_choice
from tailcache.trainers.terms import StudentTerms, TeacherTerms
from tailcache.trainers.todi import todi

__all__ = ["OnAtoms", "Part", "Rows", "clm", "is_linear", "needs_rows", "on_exact_atoms", "part_of"]

OnAtoms = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Whole rows of both distributions at some positions.

    Attributes:
      logits_cV: the student's, at temperature 1; differentiable.
      teacher: the targets of the same positions.
      fills: [V] weights by tail choice, "prior" and "uniform".
      own_cV: the teacher's own log-probs, where its hidden states are stored.
    """

    logits_cV: Tensor
    teacher: TeacherTerms
    fills: Mapping[str, Tensor]
    own_cV: Tensor | None

    @cached_property
    def log_q(self) -> Tensor:
        """[c, V] the student's log-probs."""
        return torch.log_softmax(self.logits_cV, dim=-1)

    def log_p(self, tail: str) -> Tensor:
        """[c, V] the teacher's: its own, or the stored top-K with its tail mass spread as the fill says."""
        if tail == "exact":
            assert self.own_cV is not None
            return self.own_cV
        return filled_atoms(self.teacher, self.fills[tail])


Part = Callable[[slice, TeacherTerms, StudentTerms, Rows | None], Tensor]
"""Positions (of the micro-batch), both sides' terms of them, and whole rows where they are needed -> [c] nats."""


def is_linear(loss: LossConfig) -> bool:
    """Whether a divergence is linear in the teacher's tail, so that a mean of log q under it is all it needs."""
    return loss.temperature == 1.0 and (loss.name in ("kd", "tad", "dkd") or (loss.name, loss.wraps) == ("atkd", "dkd"))


def needs_rows(loss: LossConfig, tail: str | None) -> bool:
    """Whether a divergence needs whole rows: not linear in a tail that has a shape, or the teacher's own tail."""
    return tail == "exact" or (tail in ("prior", "uniform") and not is_linear(loss))


def clm(rows: slice, teacher: TeacherTerms, student: StudentTerms, whole: Rows | None) -> Tensor:
    """The cross-entropy."""
    return divergences.cross_entropy(student)


def part_of(
    loss: LossConfig,
    tail: str | None,
    teacher: TeacherTerms,
    *,
    segments_T: Tensor,
    rows_T: Tensor,
    progress: float,
    seed: tuple[int, ...],
) -> Part:
    """One divergence of a micro-batch.

    Args:
      loss: which, and its parameters; all but `hidden_cosine`, which is no function of the two distributions.
      tail: its tail choice, checked to be sound.
      teacher: the targets of the micro-batch.
      segments_T: [T] int64 segment of each position.
      rows_T: [T] int64 corpus row of each position.
      progress: of training, in [0, 1]; for the schedules.
      seed: of RS-KD's draws, another one at every step.
    """
    if loss.name == "rs_kd":
        draws = _draw_by_row(teacher, loss, rows_T, seed)
        return lambda rows, t, s, whole: rs_kd(t, s, draws.rows(rows))
    truncated, tail_function = tail_choice(tail or "")
    if loss.name == "kd":
        if loss.temperature != 1.0:
            return partial(_tempered, loss.temperature, tail or "")
        return lambda rows, t, s, whole: divergences.forward_kl(truncated(t), s, tail_function)
    if loss.name == "tad":
        top_k, beta = loss.split.whole_at(progress), loss.tail_weight.at(progress)
        log_alpha_T = log_teacher_tail(truncated(teacher), top_k)
        log_beta_T = log_adaptive_beta(log_alpha_T, segments_T, beta=beta, min_mean_alpha=loss.min_mean_alpha)
        return lambda rows, t, s, whole: weighted_tad(
            truncated(t), s, tail_function, top_k=top_k, log_beta_T=log_beta_T[rows]
        )
    if loss.name == "dkd":
        weights = {"target_weight": loss.target_weight, "non_target_weight": loss.non_target_weight}
        return lambda rows, t, s, whole: dkd(truncated(t), s, tail_function, **weights)
    if loss.name == "atkd":
        return _atkd(loss, tail or "", teacher)
    divergence = _on_atoms(loss.name, loss)
    return lambda rows, t, s, whole: divergence(*_atoms(tail or "", t, s, whole))


def on_exact_atoms(part: Part) -> Part:
    """Of a mixture of teachers: the same divergence, of the atoms whose masses are exact on both sides."""
    return lambda rows, t, s, whole: part(rows, *on_common(t, s), whole)


def _on_atoms(name: str, loss: LossConfig) -> OnAtoms:
    """A divergence that is a function of atoms, with its parameters."""
    if name == "jsd":
        return partial(divergences.jsd, mixture=loss.mixture)
    if name == "skew_kl":
        return partial(divergences.skew_kl, skew=loss.skew)
    if name == "skew_reverse_kl":
        return partial(divergences.skew_reverse_kl, skew=loss.skew)
    return {"reverse_kl": divergences.reverse_kl, "todi": todi}[name]


def _atoms(tail: str, teacher: TeacherTerms, student: StudentTerms, whole: Rows | None) -> tuple[Tensor, Tensor]:
    if tail in ("exact", "prior", "uniform"):
        assert whole is not None
        return whole.log_p(tail), whole.log_q
    truncated, _ = tail_choice(tail)
    return (head_atoms if tail == "drop" else bucket_atoms)(truncated(teacher), student)


def _tempered(
    temperature: float, tail: str, rows: slice, teacher: TeacherTerms, student: StudentTerms, whole: Rows | None
) -> Tensor:
    if tail == "exact":
        assert whole is not None
        log_p, log_q = whole.log_p(tail) / temperature, whole.logits_cV / temperature
        return temperature**2 * divergences.kl(torch.log_softmax(log_p, -1), torch.log_softmax(log_q, -1))
    truncated, _ = tail_choice(tail)
    return divergences.tempered_kl(truncated(teacher), student, temperature, bucket=tail == "bucket")


def _atkd(loss: LossConfig, tail: str, teacher: TeacherTerms) -> Part:
    """ATKD; the groups and the true token's part are exact and of the stored teacher, the tail choice is D's."""
    weights_T, hard_T = group_weights(teacher.log_not_target, hard_ratio=loss.hard_ratio, easy_weight=loss.easy_weight)
    truncated, tail_function = tail_choice(tail)
    on_atoms: OnAtoms = divergences.kl if loss.wraps == "dkd" else _on_atoms(loss.wraps, loss)

    def part(rows: slice, t: TeacherTerms, s: StudentTerms, whole: Rows | None) -> Tensor:
        if loss.wraps == "dkd":
            divergence_c = non_target_class_kl(truncated(t), s, tail_function)
        elif needs_rows(loss, tail):
            assert whole is not None
            divergence_c = on_atoms(*_dense_without_target(tail, t, s, whole))
        else:
            divergence_c = on_atoms(*(head_atoms if tail == "drop" else bucket_atoms)(*without_target(truncated(t), s)))
        return atkd(on_atoms(*target_atoms(t, s)), divergence_c, weights_T[rows], hard_T[rows])

    return part


def _dense_without_target(
    tail: str, teacher: TeacherTerms, student: StudentTerms, whole: Rows
) -> tuple[Tensor, Tensor]:
    """[c, V] log p^ and log q^ off the true token y; where y is beyond the top-K, its share is taken out exactly.

    Where rounding leaves the teacher nothing beyond the top-K but y, those ids are dropped on both sides, as
    ``without_target`` drops their atom: a reverse KL to a mass that is only not known would be infinite.
    """
    _, log_q_cV = split_target(whole.log_q, teacher.next_tokens)
    if tail == "exact":
        return split_target(whole.log_p(tail), teacher.next_tokens)[1], log_q_cV
    conditional, _ = without_target(teacher, student)
    fill_cV = whole.fills[tail].expand(len(teacher), -1).scatter(-1, teacher.next_tokens[:, None], 0.0)
    log_p_cV = filled_atoms(conditional, fill_cV)
    lost_cV = (conditional.log_tail == -torch.inf)[:, None].expand_as(log_p_cV).scatter(-1, teacher.token_ids, False)
    return log_p_cV, log_q_cV.masked_fill(lost_cV, -torch.inf)


def _draw_by_row(teacher: TeacherTerms, loss: LossConfig, rows_T: Tensor, seed: tuple[int, ...]) -> Draws:
    """RS-KD's draws, each corpus row's from a generator of its own: however rows are cut into batches, the same."""
    rows, counts = torch.unique_consecutive(rows_T, return_counts=True)
    drawn, start = [draw(teacher.rows(slice(0, 0)), loss.num_draws, loss.power, torch.Generator(rows_T.device))], 0
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        [state] = np.random.SeedSequence([*seed, row]).generate_state(1, np.uint64).tolist()
        generator = torch.Generator(rows_T.device).manual_seed(state >> 1)
        drawn.append(draw(teacher.rows(slice(start, start + count)), loss.num_draws, loss.power, generator))
        start += count
    return Draws(
        columns=torch.cat([each.columns for each in drawn]), weights=torch.cat([each.weights for each in drawn])
    )
