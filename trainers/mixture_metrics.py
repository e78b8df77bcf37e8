"""Held-out metrics of a student of one teacher or several: against their mixture, and against each of them.

Of one teacher they are those of ``metrics``. Of several, the names of ``metrics`` are about the mixture: ``kl`` is the
lower bound of its KL, unbiased as an estimate of that bound, and ``kl_upper`` what it can be at most (``mixture``: the
student has no part in their difference, so students of one mixture are compared by either). Without draws, ``kl`` is
that of the common ids, and there is no ``kl_upper``. ``teacher_cross_entropy`` is exact. ``top1_agreement`` is about
the id of which most is known; it is the mixture's own unless one that some teacher did not store is nearly as likely.
``kl/NAME`` is the KL from each teacher alone, as a run with that teacher reports it.

Legend: T target positions, n teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tailcache.storage.several import Teachers
from tailcache.trainers.batches import Batch, terms_of_each
from tailcache.trainers.metrics import METRICS, held_out_kl, kl_kind, position_metrics
from tailcache.trainers.terms import StudentTerms, TeacherTerms

if TYPE_CHECKING:
    from tailcache.storage.several import AnyTeacher

__all__ = ["held_out_kl_is", "held_out_names", "metrics_of_batch", "metrics_of_mixture"]

Reduce = Callable[[TeacherTerms], tuple[StudentTerms, Tensor]]


def held_out_names(teacher: AnyTeacher) -> tuple[str, ...]:
    """The names of what ``metrics_of_mixture`` returns for this teacher or these."""
    if not isinstance(teacher, Teachers):
        return METRICS
    bounded = teacher.num_samples > 0 or all(each.top_k == each.vocab_size for each in teacher.teachers)
    return (*METRICS, *(["kl_upper"] if bounded else []), *(f"kl/{each.name}" for each in teacher.teachers))


def held_out_kl_is(teacher: AnyTeacher) -> str:
    """What ``kl`` is: see ``metrics.kl_kind``; of several teachers at best a lower bound, unless it is exact."""
    num_samples = 0 if isinstance(teacher, Teachers) else teacher.num_samples
    return kl_kind(top_k=teacher.top_k, vocab_size=teacher.vocab_size, num_samples=num_samples)


def metrics_of_batch(reduce: Reduce, teacher: TeacherTerms, batch: Batch) -> Tensor:
    """``metrics_of_mixture`` for a batch of one teacher or several, whose targets or mixture are ``teacher``."""
    return metrics_of_mixture(reduce, teacher, terms_of_each(batch, teacher.vocab_size))


@torch.no_grad()
def metrics_of_mixture(reduce: Reduce, mixture: TeacherTerms, teachers: Sequence[TeacherTerms]) -> Tensor:
    """The metrics of each position.

    Args:
      reduce: ``metrics.of_hidden`` or ``of_logits`` of the student; called once for the mixture and each teacher.
      mixture: of ``mixture.mix``, or the targets of a single teacher.
      teachers: the targets of the same positions by each teacher; none for a single one.

    Returns:
      [T, 4] or [T, 5 + n] (4 + n without draws), in the order of ``held_out_names``.
    """
    values_T4 = position_metrics(*reduce(mixture), mixture)
    if not teachers:
        return values_T4
    columns = [values_T4]
    kl_T = values_T4[:, METRICS.index("kl")]
    if mixture.mixed is None:
        columns.append(kl_T[:, None])
    elif mixture.num_samples > 0:
        columns.append((kl_T + mixture.mixed.gap)[:, None])
    return torch.cat([*columns, *(held_out_kl(each, reduce(each)[0])[:, None] for each in teachers)], dim=-1)
