"""ToDi: forward KL where the student is too low, reverse KL where it is too high, id by id.

Legend: T target positions, A atoms. p teacher, q student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailcache.trainers.terms import weighted

__all__ = ["todi"]


def todi(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of w p log(p/q) + (1 - w) q log(q/p), w = sigmoid(log p - log q) = p / (p + q) without gradient.

    The value is KL(p||q) + KL(q||p), Jeffreys' divergence, term by term; only the stop-gradient tells them apart.

    Args:
      log_p: [T, A] log space, the teacher.
      log_q: [T, A] log space, the student.

    Returns:
      [T] nats, infinite where one of p and q is 0 and the other is not. Gradient: q (r - sum q r), with
      r = (1 - w)(log(q / p) + 1) - w p / q. No factor for a temperature.

    Source: Jung et al., "ToDi" (arXiv 2505.16297), eqs. 7-9. The paper's whole loss is (1 - r) CLM + r ToDi, r = 0.5.
    """
    some = (log_p > -torch.inf) | (log_q > -torch.inf)
    log_ratio = torch.where(some, log_p, 0.0) - torch.where(some, log_q, 0.0)
    w = torch.sigmoid(log_ratio.detach())
    return (w * weighted(log_p, log_ratio) - (1 - w) * weighted(log_q, log_ratio)).sum(-1)
