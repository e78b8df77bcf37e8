"""A teacher that runs beside the student, as a trainer sees it: it gives a batch its targets, in place of a cache.

Training never needs one; it is what a cache is measured against, and the way to distributions that were not stored.
Who runs it (``scripts.online_teacher``) is not known here.

Legend: T target positions, V vocabulary, K kept tokens, m draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from tailcache.trainers.soundness import Stored

__all__ = ["LOGPROBS", "LiveTeacher"]

LOGPROBS = "whole_logprobs"
"""The name under which a live teacher gives its distributions as a whole."""


class LiveTeacher(Protocol):
    """What a trainer asks of a teacher that runs beside the student."""

    @property
    def stored(self) -> Stored:
        """What its answers hold; ``hidden_kind`` is "live", which says that distributions can be had as a whole."""

    @property
    def described(self) -> dict[str, Any]:
        """What identifies it and its answers, for the record of a run."""

    def targets(self, batch: Mapping[str, Any], *, whole: bool) -> dict[str, Tensor]:
        """The targets of a batch.

        Args:
          batch: of ``batches.collate``, on the training device.
          whole: give whole distributions as well.

        Returns:
          The fields of ``batches.TARGET_FIELDS``, [T, ...], on the training device; and with ``whole``, under
          ``LOGPROBS``, [T, V] float32 log-probs.
        """
