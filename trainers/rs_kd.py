"""RS-KD: the teacher as a few importance-weighted draws, made from the cache at every step.

N draws per position from the K + 1 atoms (the top-K, and the tail as one) in proportion to p_k^power and alpha^power. A
draw of the tail atom is one of the stored tail draws, at random. With s the drawn ids and g the proposal

    loss = (1/N) sum_j (p / g)(s_j) (log p(s_j) - log q(s_j)),

unbiased for KL(p||q) in value and gradient, over the draws and the capture's own. power = 1 gives counts / N. The
log p of a drawn tail id is not stored; its mean over the tail is, log alpha - H(p~), and has the same expectation.

Source: Anshumann et al., "Sparse Logit Sampling" (arXiv 2503.16870).
Legend: T target positions, K kept by the teacher, m tail samples, N draws, A = K + 1 atoms. Nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tailcache.storage.errors import ConfigError
from tailcache.trainers.tails import log_mean_tail
from tailcache.trainers.terms import StudentTerms, TeacherTerms, log_sum

__all__ = ["Draws", "draw", "rs_kd"]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """N importance-weighted draws of T positions.

    Attributes:
      columns: [T, N] int64; k < K is the teacher's k-th id, K + j its j-th tail sample.
      weights: [T, N] p / proposal / N.
    """

    columns: Tensor
    weights: Tensor

    def rows(self, rows: slice | Tensor) -> Draws:
        """The draws of some of the positions."""
        return Draws(columns=self.columns[rows], weights=self.weights[rows])


def draw(teacher: TeacherTerms, num_draws: int, power: float, generator: torch.Generator) -> Draws:
    """Draw N of the K + 1 atoms per position, and a stored tail sample for each draw of the tail.

    Args:
      teacher: the cached targets, with m >= 1 tail samples (or K == V); log space.
      num_draws: N >= 1.
      power: the proposal is p^power; >= 0. 1 gives every draw the weight 1 / N, less than 1 draws rare ids more often.
      generator: on the device of the teacher's terms.

    Returns:
      The draws, weights in the teacher's dtype. Depends on the teacher and the generator only.

    Raises:
      ConfigError: a parameter is out of range, or no tail samples are stored.

    Source: arXiv 2503.16870, section 4.
    """
    if num_draws < 1:
        raise ConfigError(f"num_draws: expected at least 1, found {num_draws}")
    if not (power >= 0 and math.isfinite(power)):
        raise ConfigError(f"power: expected a finite number >= 0, found {power}; 1 draws in proportion to p")
    if teacher.has_tail and teacher.num_samples == 0:
        raise ConfigError(
            "rs_kd: expected at least one stored tail sample per position, found m = 0; draws of the tail are taken "
            "from them: capture the teacher again with tail samples"
        )
    log_p_TA = torch.cat([teacher.logprobs, teacher.log_tail[:, None]], dim=-1)
    some_TA = log_p_TA > -torch.inf
    log_power_TA = torch.where(some_TA, power * torch.where(some_TA, log_p_TA, 0.0), -torch.inf)
    log_proposal_TA = log_power_TA - log_sum(log_power_TA)[:, None]
    if len(teacher) == 0:
        atoms_TN = torch.empty((0, num_draws), dtype=torch.long, device=log_p_TA.device)
    else:
        atoms_TN = torch.multinomial(log_proposal_TA.exp(), num_draws, replacement=True, generator=generator)
    log_weight_TN = log_p_TA.gather(-1, atoms_TN) - log_proposal_TA.gather(-1, atoms_TN)
    choices = max(teacher.num_samples, 1)
    tail_TN = torch.randint(choices, atoms_TN.shape, generator=generator, device=atoms_TN.device)
    return Draws(
        columns=torch.where(atoms_TN == teacher.top_k, teacher.top_k + tail_TN, atoms_TN),
        weights=log_weight_TN.exp() / num_draws,
    )


def rs_kd(teacher: TeacherTerms, student: StudentTerms, draws: Draws) -> Tensor:
    """Sum over the draws of w (log p - log q).

    Args:
      teacher: the cached targets that were drawn from; log space.
      student: terms of the same positions; log space.
      draws: from ``draw``.

    Returns:
      [T] nats, an unbiased estimate of KL(p||q). Gradient: (sum w) q - sum w onehot(s).

    Source: arXiv 2503.16870, section 4.
    """
    tail_Tm = log_mean_tail(teacher)[:, None].expand_as(student.sample_logprobs)
    log_p = torch.cat([teacher.logprobs, tail_Tm], dim=-1).gather(-1, draws.columns)
    log_q = torch.cat([student.logprobs, student.sample_logprobs], dim=-1).gather(-1, draws.columns)
    return (draws.weights * (log_p - log_q)).sum(-1)
