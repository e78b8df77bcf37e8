"""Two distributions as aligned lists of atoms, for the losses that are not linear in the teacher's tail.

Such a loss is a function of ``(log_p_TA, log_q_TA)`` and does not care what an atom is:

| atoms               | A     | tail choice                     | what the loss becomes                            |
| ------------------- | ----- | ------------------------------- | ------------------------------------------------ |
| ``bucket_atoms``    | K + 1 | `bucket`                        | a lower bound, for every f-divergence            |
|                     |       | `renormalise` (teacher changed) | exact for that teacher: p is 0 on the last atom  |
| ``head_atoms``      | K     | `drop`                          | a sum over the top-K alone; bounds nothing       |
| ``filled_atoms``    | V     | `prior`, `uniform`              | the loss to a made-up teacher; biased            |
| log-softmax of both | V     | `exact`                         | the dense loss                                   |

An atom may have p = 0, or p = q = 0 (the last one where K == V): -inf, which the losses guard.

Legend: T target positions, V vocabulary, K kept by the teacher, A atoms. p teacher, q student, H the top-K ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailcache.trainers.terms import StudentTerms, TeacherTerms, log_sum

__all__ = ["bucket_atoms", "filled_atoms", "head_atoms", "split_target"]


def bucket_atoms(teacher: TeacherTerms, student: StudentTerms) -> tuple[Tensor, Tensor]:
    """The top-K and one atom for everything else.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.

    Returns:
      log p and log q, [T, K + 1] each; the second is differentiable.

    Source: merging atoms lowers every f-divergence (data processing inequality).
    """
    return (
        torch.cat([teacher.logprobs, teacher.log_tail[:, None]], dim=-1),
        torch.cat([student.logprobs, student.log_beyond[:, None]], dim=-1),
    )


def head_atoms(teacher: TeacherTerms, student: StudentTerms) -> tuple[Tensor, Tensor]:
    """The top-K alone: neither p nor q sums to 1.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.

    Returns:
      log p and log q, [T, K] each; the second is differentiable.
    """
    return teacher.logprobs, student.logprobs


def filled_atoms(teacher: TeacherTerms, fill: Tensor) -> Tensor:
    """The whole vocabulary, with the teacher's tail mass spread over V minus the top-K as a fill says.

    Args:
      teacher: the cached targets; log space.
      fill: [V] or [T, V] weights >= 0, in the dtype wanted.

    Returns:
      log p, [T, V]: as stored on the top-K, log alpha + log of the fill's share beyond; -inf where the fill is 0.

    Cost: three passes over [T, V].
    """
    rest_TV = fill.expand(len(teacher), teacher.vocab_size).scatter(-1, teacher.token_ids, 0.0)
    mass_T1 = rest_TV.sum(-1, keepdim=True)
    some_T1 = mass_T1 > 0
    share_TV = torch.where(some_T1, rest_TV / torch.where(some_T1, mass_T1, 1.0), 0.0)
    return (share_TV.log() + teacher.log_tail[:, None]).scatter(-1, teacher.token_ids, teacher.logprobs)


def split_target(log_p_TV: Tensor, next_tokens_T: Tensor) -> tuple[Tensor, Tensor]:
    """Split a dense distribution at the true token y: [p_y, 1 - p_y], and p / (1 - p_y) off y.

    Args:
      log_p_TV: [T, V] log-probs.
      next_tokens_T: [T] int64, y.

    Returns:
      [T, 2] and [T, V] log-probs; -inf at y in the second. Differentiable; 1 - p_y is a sum, not a difference.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, eqs. 1-3.
    """
    target_T1 = next_tokens_T[:, None]
    others_TV = log_p_TV.scatter(-1, target_T1, -torch.inf)
    log_not_T = log_sum(others_TV)
    some_T = log_not_T > -torch.inf
    binary_T2 = torch.stack([log_p_TV.gather(-1, target_T1)[:, 0], log_not_T], dim=-1)
    return binary_T2, others_TV - torch.where(some_T, log_not_T, 0.0)[:, None]
