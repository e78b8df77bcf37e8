"""Adaptive teaching (ATKD): the uncertain half of a micro-batch learns the target too, the rest only the others.

    UNC  = 1 - p_y
    hard = UNC >= its median over the valid positions of the micro-batch, else easy
    L    = lambda mean_easy(D) + (1 - lambda) mean_hard(TKD + D)

In the paper D is NCKD (without the factor UNC) and TKD is TCKD, lambda = 0.2, at temperature 1 and without a
cross-entropy. Wrapping another divergence f means D = f(p^, q^) off y and TKD = f([p_y, 1 - p_y], [q_y, 1 - q_y]); the
official code does it for the reverse KL. The groups are of one micro-batch, so this is the one loss that depends on how
a batch is cut.

UNC and the groups depend on the teacher only and are exact from the cache: ``log_not_target`` is stored. They are those
of the teacher as stored, whatever a tail choice makes of it.

Source: Zhong et al., "Revisiting Knowledge Distillation for Autoregressive Language Models", ACL 2024, and its code.
Legend: T target positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tailcache.storage.errors import ConfigError

__all__ = ["atkd", "group_weights"]


def group_weights(
    teacher_log_not_target: Tensor, *, hard_ratio: float = 0.5, easy_weight: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Split positions into hard and easy, and weight them so that a plain mean is the sum of the groups' means.

    The threshold is the (1 - hard_ratio) quantile of UNC, the lower of two neighbours where it falls between them, as
    in the official code; ties with it are hard. Comparing logs compares UNC, without its rounding near 0.

    Args:
      teacher_log_not_target: [T] log UNC of the valid positions of one micro-batch, and no others.
      hard_ratio: the share of hard positions, 0 to 1; 0.5 is the paper's median, at 0 there are none.
      easy_weight: lambda, 0 to 1.

    Returns:
      weights [T], lambda T / T_easy or (1 - lambda) T / T_hard; hard [T] bool. A group without positions contributes 0.

    Raises:
      ConfigError: a parameter is out of range.

    Source: Zhong et al., ACL 2024, section 4, and its code.
    """
    if not 0 <= hard_ratio <= 1:
        raise ConfigError(f"hard_ratio: expected a share between 0 and 1, found {hard_ratio}")
    if not 0 <= easy_weight <= 1:
        raise ConfigError(f"easy_weight: expected a number between 0 and 1, found {easy_weight}")
    num = len(teacher_log_not_target)
    if num == 0 or hard_ratio == 0:
        hard_T = torch.zeros_like(teacher_log_not_target, dtype=torch.bool)
    else:
        # Rounded, because (1 - 0.9) * 10 is a little less than 1.
        rank = math.floor(round((1 - hard_ratio) * (num - 1), 6))
        hard_T = teacher_log_not_target >= teacher_log_not_target.sort().values[rank]
    num_hard = hard_T.sum().to(teacher_log_not_target.dtype)
    # The branch not taken may divide by an empty group.
    easy_share, hard_share = easy_weight * num / (num - num_hard), (1 - easy_weight) * num / num_hard
    return torch.where(hard_T, hard_share, easy_share), hard_T


def atkd(target_T: Tensor, divergence_T: Tensor, weights_T: Tensor, hard_T: Tensor) -> Tensor:
    """ATKD = w (D + [hard] TKD): its mean over a micro-batch is lambda mean_easy(D) + (1 - lambda) mean_hard(TKD + D).

    Args:
      target_T: [T] TKD: ``dkd.target_class_kl``, or another divergence on ``dkd.target_atoms``.
      divergence_T: [T] D: ``dkd.non_target_class_kl``, or another divergence on atoms of ``dkd.without_target``.
      weights_T: [T] from ``group_weights``.
      hard_T: [T] bool, from ``group_weights``.

    Returns:
      [T] nats.

    Source: Zhong et al., ACL 2024, section 4, and its code.
    """
    return weights_T * (divergence_T + torch.where(hard_T, target_T, 0.0))
