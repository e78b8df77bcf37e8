"""What the teacher's distribution is taken to be beyond the stored K: one named function per choice.

Ranks up to K are stored, so that part of any loss is exact. Beyond them the cache knows the mass alpha and the
entropy of the normalised tail p~ (both exactly), m draws from it, and the teacher's mean tail; with stored hidden
states it knows p~ itself. A **tail function** turns these into one number per position, the tail log-ratio

    R = sum over the tail of p~ (log p - log q),

so that the tail adds ``alpha R`` to KL(p||q), whatever a loss does with it. All equal the dense loss when K == V,
because there is no tail then (R has weight 0).

| name      | R                                      | what it is                                                  |
|-----------|----------------------------------------|-------------------------------------------------------------|
| `bucket`  | log alpha - log alpha_S                | one atom for the tail: a lower bound of the KL              |
| `sampled` | log alpha - H(p~) - mean_j log q(s_j)  | unbiased value and gradient                                 |
| `prior`   | log alpha - H(p~) - sum pi^ log q      | pi^ the teacher's mean tail off the top-K; a lasting bias   |
| `uniform` | log alpha - H(p~) - mean log q         | pi^ even off the top-K; a lasting bias                      |
| `exact`   | log alpha - H(p~) - sum p~ log q       | p~ from the stored hidden state: the dense loss             |

Two more choices change the *teacher* instead, to be what tools without a tail train on: `drop` forgets the tail,
`renormalise` also divides the rest by its mass. What is left has no tail, so any tail function does; ``tail_choice``
pairs them with `bucket`, which asks for nothing.

All but `bucket` report the stored entropy, never a reconstructed teacher: plugging one in as if it were the teacher
inflates the value. Which choice is sound for which loss is in ``soundness``.

Legend: T target positions, K kept by the teacher, m tail samples. p teacher, q student, p~ = p / alpha beyond the
top-K, alpha_S the student's mass off the teacher's top-K. Nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tailcache.storage.errors import ConfigError
from tailcache.trainers.terms import StudentTerms, TeacherTerms, log_sum

__all__ = [
    "TAILS",
    "TRUNCATIONS",
    "TailFunction",
    "Truncation",
    "bucket",
    "drop",
    "exact",
    "prior",
    "renormalise",
    "sampled",
    "tail_choice",
    "uniform",
]

TailFunction = Callable[[TeacherTerms, StudentTerms], Tensor]
Truncation = Callable[[TeacherTerms], TeacherTerms]


def bucket(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """One extra atom of mass alpha: R = log(alpha / alpha_S), as if the tails had one shape.

    KL with it is the KL of the K + 1 atoms, a lower bound of the dense KL (log-sum inequality). For TAD
    split at K' < K, the tail is ranks K'+1 to K and this one atom; at K' = K its second term is 0.

    Args:
      teacher: the cached targets; log space.
      student: terms of the same positions; log space.

    Returns:
      [T] nats; 0 where the teacher has no mass off its top-K.

    Source: the "ghost token" of offline distillation; KL1 of TAD (arXiv 2602.20816), eq. 2.
    """
    exists_T = teacher.log_tail > -torch.inf
    return torch.where(exists_T, teacher.log_tail, 0.0) - torch.where(exists_T, student.log_beyond, 0.0)


def sampled(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """The stored draws s_j stand for the tail: R = log alpha - H(p~) - (1/m) sum_j log q(s_j).

    KL is linear in p~, and each id is drawn m p~ times on average, so value and gradient are unbiased; sum p~ log p =
    log alpha - H(p~) is exact. Repeated draws count as often as they occur. Of a mixture of teachers, each draw counts
    with its teacher's share of the tail.

    Args:
      teacher: targets with m >= 1 tail samples (or K == V, where none are needed); log space.
      student: terms of the same positions; log space.

    Returns:
      [T] nats.

    Raises:
      ConfigError: no samples are stored and the tail is not empty.

    Source: docs/losses.md, "The tail"; unbiased because the KL is linear in p~.
    """
    if not teacher.has_tail:
        return torch.zeros_like(teacher.log_tail)
    if teacher.num_samples == 0:
        raise ConfigError(
            "tail 'sampled': expected at least one stored tail sample per position, found m = 0; "
            "choose another tail ('bucket'), or capture the teacher again with tail samples"
        )
    if teacher.mixed is None:
        return log_mean_tail(teacher) - student.sample_logprobs.mean(-1)
    shares_Tm = teacher.mixed.sample_shares
    some_Tm = shares_Tm > 0
    return log_mean_tail(teacher) - (shares_Tm * torch.where(some_Tm, student.sample_logprobs, 0.0)).sum(-1)


def prior(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """The teacher's mean tail stands for this tail: R = log alpha - H(p~) - sum pi^ log q.

    pi^ is the mean tail restricted to V minus the top-K and renormalised. Biased by the difference between pi^ and
    p~, so that the value can be negative; deterministic.

    Args:
      teacher: the cached targets; log space.
      student: terms with the fill "prior" (or K == V); log space.

    Returns:
      [T] nats.

    Raises:
      ConfigError: the student's terms were made without that fill and the tail is not empty.

    Source: docs/losses.md, "The tail".
    """
    return _filled("prior", teacher, student)


def uniform(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """An even tail: R = log alpha - H(p~) - the mean of log q over V minus the top-K.

    Args:
      teacher: the cached targets; log space.
      student: terms with the fill "uniform" (or K == V); log space.

    Returns:
      [T] nats. Biased, as `prior` is, and more so.

    Raises:
      ConfigError: the student's terms were made without that fill and the tail is not empty.

    Source: docs/losses.md, "The tail".
    """
    return _filled("uniform", teacher, student)


def exact(teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    """The teacher's own tail, from its stored hidden state: R = log alpha - H(p~) - sum p~ log q.

    Exact up to the rounding of the stored hidden state (bf16 or int8).

    Args:
      teacher: the cached targets; log space.
      student: terms with the fill "exact", the teacher's [T, V] probabilities (or K == V); log space.

    Returns:
      [T] nats.

    Raises:
      ConfigError: the student's terms were made without that fill and the tail is not empty.

    Source: the definition of R.
    """
    return _filled("exact", teacher, student)


def _filled(name: str, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
    if not teacher.has_tail:
        return torch.zeros_like(teacher.log_tail)
    if name not in student.fill_logprobs:
        raise ConfigError(
            f"tail {name!r}: expected the student's mean log-prob under the fill {name!r}, found "
            f"{', '.join(student.fill_logprobs) or 'no fill'}; make the student's terms with fills={{{name!r}: ...}}"
        )
    return log_mean_tail(teacher) - student.fill_logprobs[name]


def log_mean_tail(teacher: TeacherTerms) -> Tensor:
    """Sum over the tail of p~ log p = log alpha - H(p~), exact; 0 where alpha is 0. [T] nats."""
    exists_T = teacher.log_tail > -torch.inf
    return torch.where(exists_T, teacher.log_tail, 0.0) - torch.where(exists_T, teacher.tail_entropy, 0.0)


def drop(teacher: TeacherTerms) -> TeacherTerms:
    """Forget the tail: p_k for the top-K, 0 beyond, and no longer a distribution.

    The gradient of KL becomes (sum_H p) q - p on the top-K: the student learns a head inflated by 1 / sum_H p and no
    tail. Provided to reproduce it. ``log_z_tail`` stays: it is what normalises the top-K at another temperature.

    Args:
      teacher: the cached targets; log space.

    Returns:
      Targets whose tail is empty; p_y is 0 where y is off the top-K, and "not y" is the rest of the top-K.

    Source: docs/losses.md, "The tail"; arXiv 2503.16870, section 3, on why it is biased.
    """
    return _truncated(teacher, torch.zeros_like(teacher.log_tail))


def renormalise(teacher: TeacherTerms) -> TeacherTerms:
    """Forget the tail and divide by the mass of the top-K: p_k / sum_H p, 0 beyond.

    Biased as `drop` is; the student's tail is pushed to 0. Provided to reproduce it. Any divergence that is infinite
    where p is 0 and q is not (reverse KL) is infinite.

    Args:
      teacher: the cached targets; log space.

    Returns:
      Targets whose tail is empty, at every temperature; p_y is 0 where y is off the top-K.

    Source: docs/losses.md, "The tail".
    """
    renormalised = _truncated(teacher, log_sum(teacher.logprobs))
    empty = None if teacher.log_z_tail is None else torch.full_like(teacher.log_z_tail, -torch.inf)
    return replace(renormalised, log_z_tail=empty)


def _truncated(teacher: TeacherTerms, log_mass_T: Tensor) -> TeacherTerms:
    head_TK = teacher.logprobs - log_mass_T[:, None]
    return replace(
        teacher,
        logprobs=head_TK,
        log_tail=torch.full_like(teacher.log_tail, -torch.inf),
        tail_entropy=torch.zeros_like(teacher.tail_entropy),
        log_target=log_sum(head_TK.masked_fill(~teacher.is_target, -torch.inf)),
        log_not_target=log_sum(head_TK.masked_fill(teacher.is_target, -torch.inf)),
    )


TAILS: dict[str, TailFunction] = {
    "sampled": sampled,
    "bucket": bucket,
    "prior": prior,
    "uniform": uniform,
    "exact": exact,
}
TRUNCATIONS: dict[str, Truncation] = {"drop": drop, "renormalise": renormalise}


def tail_choice(name: str) -> tuple[Truncation, TailFunction]:
    """What a tail choice does to the teacher (mostly nothing), and its tail function.

    Raises:
      ConfigError: there is none of that name; names those there are.
    """
    if name in TRUNCATIONS:
        return TRUNCATIONS[name], bucket
    if name in TAILS:
        return _as_stored, TAILS[name]
    raise ConfigError(f"tail: expected one of {', '.join([*TAILS, *TRUNCATIONS])}; found {name!r}")


def _as_stored(teacher: TeacherTerms) -> TeacherTerms:
    return teacher
