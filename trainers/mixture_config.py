"""The settings of a mixture of teachers. Light to import.

The text under a field is what ``tailcache train --help`` prints for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tailcache.storage.errors import ConfigError

__all__ = ["Confidence", "MixtureConfig"]

Confidence = Literal["none", "target", "entropy"]


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Several teachers of one corpus, mixed position by position."""

    teachers: tuple[str, ...] = ()
    """Train on the mixture of these teachers of the cache (two or more), in place of --teacher."""

    teacher_weights: tuple[float, ...] = ()
    """The share of each of --teachers, in proportion to these numbers. Default: equal shares."""

    teacher_weights_file: Path | None = None
    """Weights by row or by target position, such as for domains, in place of --teacher-weights: an .npz file with an
    array `rows` [rows of the corpus, teachers] or `positions` [target positions, teachers]; or with whole numbers
    `rows` [rows] or `positions` [target positions], domains, and an array `weights` [domains, teachers]."""

    teacher_confidence: Confidence = "none"
    """Multiply the weights, at each position, by how sure each teacher is. target: p(y)^sharpness of the true next
    token y. entropy: exp(-sharpness x entropy of its whole distribution, in nats)."""

    teacher_sharpness: float = 1.0
    """With --teacher-confidence: 0 makes no difference, the larger the more the surest teacher decides."""

    def check_mixture(self, teacher: str | None) -> None:
        """Refuse settings that contradict one another.

        Args:
          teacher: the single teacher that is asked for, if one is.

        Raises:
          ConfigError: names the setting.
        """
        if not self.teachers:
            for each in fields(MixtureConfig):
                if getattr(self, each.name) != each.default:
                    raise ConfigError(
                        f"{each.name}: belongs to teachers, of which none are given; name them, or drop it"
                    )
            return
        num = len(self.teachers)
        if teacher is not None:
            raise ConfigError(
                f"teachers: expected teachers or teacher, found both; drop one ({teacher!r}, {self.teachers})"
            )
        if num < 2 or len(set(self.teachers)) < num:
            raise ConfigError(
                f"teachers: expected two or more different names, found {', '.join(self.teachers)}; for one use teacher"
            )
        weights = self.teacher_weights
        if weights and (len(weights) != num or not all(0 < each < math.inf for each in weights)):
            raise ConfigError(
                f"teacher_weights: expected {num} numbers above 0, one for each of {', '.join(self.teachers)}; found "
                f"{', '.join(f'{each:g}' for each in weights)}"
            )
        if weights and self.teacher_weights_file is not None:
            raise ConfigError("teacher_weights: the weights are in teacher_weights_file already; drop one of the two")
        if not 0 <= self.teacher_sharpness < math.inf:
            raise ConfigError(f"teacher_sharpness: expected a number >= 0, found {self.teacher_sharpness}")
        if self.teacher_confidence == "none" and self.teacher_sharpness != 1.0:
            raise ConfigError(
                "teacher_sharpness: belongs to teacher_confidence target or entropy; choose one, or drop it"
            )
