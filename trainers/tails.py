"""What the teacher's distribution is taken to be beyond the stored K: one named function per choice.

Ranks up to K are stored, so that part of any loss is exact. Beyond them the cache knows the mass alpha
(exactly), the entropy of the normalised tail p~ (exactly), m draws from it, and the teacher's mean tail pi.
A choice turns these into one number per position, the **tail log-ratio**

    R = sum over the tail of p~ (log p - log q),

so that the tail beyond K adds ``alpha * R`` to KL(p||q), whatever the loss does with it. All three equal
the dense loss when K == V, because there is no tail then (R is 0 and has weight 0).

| name      | R                                          | good for                                        |
|-----------|--------------------------------------------|-------------------------------------------------|
| `bucket`  | log alpha - log alpha_S                    | one atom for the tail: a lower bound of the KL  |
| `sampled` | log alpha - H(p~) - mean_j log q(s_j)      | unbiased value and gradient                     |
| `prior`   | log alpha - H(p~) - sum pi^ log q          | deterministic; a bias that no data removes      |

The value of `sampled` and `prior` uses the stored entropy, never a reconstructed teacher: plugging one in
as if it were the teacher inflates TAD's value several times.

Legend: T target positions, K kept by the teacher, m tail samples, V vocabulary. Nats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailcache.storage.errors import ConfigError
from tailcache.trainers.terms import StudentTerms, TeacherTerms

__all__ = ["TAILS", "TailFunction", "bucket", "check_tail", "prior", "sampled", "tail_function"]

TailFunction = Callable[[TeacherTerms, StudentTerms], Tensor]


def bucket(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """One extra atom of mass alpha: R = log(alpha / alpha_S), as if the tails had one shape.

    KL with it is the KL of the K + 1 atoms, a lower bound of the dense KL (log-sum inequality). For TAD
    split at K' < K, the tail is ranks K'+1 to K and this one atom; at K' = K its second term is 0.

    Args:
      teacher: the cached targets.
      student: terms with ``log_beyond``.

    Returns:
      [T] nats.

    Raises:
      ConfigError: the student's terms were made without ``log_beyond``.

    Source: the "ghost token" of offline distillation; KL1 of TAD (arXiv 2602.20816), eq. 2.
    """
    if student.log_beyond is None:
        raise ConfigError(
            "tail 'bucket': expected the student's mass beyond the top-K, found none; "
            "make the student's terms with want_beyond=True"
        )
    exists_T = teacher.log_tail > -torch.inf
    return torch.where(exists_T, teacher.log_tail, 0.0) - torch.where(exists_T, student.log_beyond, 0.0)


def sampled(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """The stored draws s_j ~ p~ stand for the tail: R = log alpha - H(p~) - (1/m) sum_j log q(s_j).

    The KL is linear in p~, and E log q(s_j) = sum p~ log q, so value and gradient are unbiased; sum p~ log p
    = log alpha - H(p~) is exact. Repeated draws count as often as they occur.

    Args:
      teacher: targets with m >= 1 tail samples (or K == V, where none are needed).
      student: terms with ``sample_logprobs``.

    Returns:
      [T] nats.

    Raises:
      ConfigError: no samples are stored and the tail is not empty.

    Source: docs/design.md, "Losses see terms, not logits"; unbiased because the KL is linear in p~.
    """
    if not teacher.has_tail:
        return torch.zeros_like(teacher.log_tail)
    if teacher.num_samples == 0:
        raise ConfigError(_NO_SAMPLES)
    return _log_teacher_mean(teacher) - student.sample_logprobs.mean(-1)


def prior(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """The teacher's mean tail stands for this tail: R = log alpha - H(p~) - sum pi^ log q.

    pi^ is pi restricted to V minus the top-K and renormalised. Biased by the difference between pi^ and p~,
    and the value can therefore be negative; deterministic.

    Args:
      teacher: the cached targets.
      student: terms with ``prior_logprob``.

    Returns:
      [T] nats.

    Raises:
      ConfigError: the student's terms were made without a prior and the tail is not empty.

    Source: docs/design.md, "Losses see terms, not logits".
    """
    if not teacher.has_tail:
        return torch.zeros_like(teacher.log_tail)
    if student.prior_logprob is None:
        raise ConfigError(_NO_PRIOR)
    return _log_teacher_mean(teacher) - student.prior_logprob


def _log_teacher_mean(teacher: TeacherTerms) -> Tensor:
    """Sum over the tail of p~ log p = log alpha - H(p~), exact; 0 where alpha is 0. [T] nats."""
    exists_T = teacher.log_tail > -torch.inf
    return torch.where(exists_T, teacher.log_tail, 0.0) - torch.where(exists_T, teacher.tail_entropy, 0.0)


TAILS: dict[str, TailFunction] = {"sampled": sampled, "bucket": bucket, "prior": prior}

_NO_SAMPLES = (
    "tail 'sampled': expected at least one stored tail sample per position, found m = 0; "
    "choose the tail 'bucket' or 'prior', or capture the teacher again with tail samples"
)
_NO_PRIOR = (
    "tail 'prior': expected the teacher's mean tail distribution, found none; "
    "choose the tail 'bucket' or 'sampled', or make the student's terms with prior_V="
)


def tail_function(name: str) -> TailFunction:
    """The tail choice of that name.

    Raises:
      ConfigError: there is none; names those there are.
    """
    try:
        return TAILS[name]
    except KeyError:
        raise ConfigError(f"tail: expected one of {', '.join(TAILS)}; found {name!r}") from None


def check_tail(
    name: str, *, top_k: int, vocab_size: int, num_samples: int, mean_tail_V: NDArray[np.floating] | None
) -> None:
    """Refuse, before any training, a tail that what is stored cannot give.

    Args:
      name: the tail choice.
      top_k: K stored.
      vocab_size: V.
      num_samples: m stored.
      mean_tail_V: [V] the teacher's mean tail pi, or None if none is stored.

    Raises:
      ConfigError: says what is missing and what to choose instead.
    """
    tail_function(name)
    if top_k >= vocab_size:
        return
    if name == "sampled" and num_samples == 0:
        raise ConfigError(_NO_SAMPLES)
    if name == "prior":
        if mean_tail_V is None:
            raise ConfigError(_NO_PRIOR)
        # Any K of them may be in a position's head; one more must be left to carry the tail.
        num_ids = int(np.count_nonzero(mean_tail_V))
        if not num_ids > top_k or not np.isfinite(mean_tail_V).all() or (mean_tail_V < 0).any():
            raise ConfigError(
                f"tail 'prior': expected a mean tail distribution with mass on more than K = {top_k} ids, "
                f"found mass on {num_ids} of {vocab_size}; choose the tail 'bucket' or 'sampled'"
            )
