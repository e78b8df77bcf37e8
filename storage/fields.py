"""What a cache says about target positions, decoded; and what cannot be stored.

Legend: T positions, K kept tokens, m samples, n further temperatures, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.errors import TeacherError
from tailcache.storage.hidden import StoredHidden, finite_bfloat16

__all__ = ["OPTIONAL", "SCALARS", "Targets", "check_targets"]

_BLOCK_POSITIONS = 1024
_ROUNDING = 1e-3  # of a sum of two probabilities
SCALARS = ("log_tail", "tail_entropy", "log_target", "log_not_target")
OPTIONAL = {"log_z_tail": "--temperatures", "hidden": "--hidden"}
"""Fields that are captured and read only if asked for, and the setting of capture that asks."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a cache says about T target positions, decoded. All logs are natural, at temperature 1.

    The optional fields have no columns where they were not captured, or not asked for.
    """

    token_ids: NDArray[np.int32]
    """[T, K] the K most likely tokens, most likely first (equals, to the resolution, in any order)."""
    logprobs: NDArray[np.float32]
    """[T, K] nats, their log-probabilities, not increasing."""
    log_tail: NDArray[np.float32]
    """[T] nats, log of the probability of all other tokens; -inf where there are none."""
    tail_entropy: NDArray[np.float32]
    """[T] nats, entropy of the other tokens' distribution, normalised; 0 where there are none."""
    log_target: NDArray[np.float32]
    """[T] nats, log-probability of the true next token."""
    log_not_target: NDArray[np.float32]
    """[T] nats, log of one minus that probability."""
    tail_samples: NDArray[np.int32]
    """[T, m] draws from the other tokens; a token's expected count is m times its share of their mass. In no order."""
    log_z_tail: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """Optional: [T, n] log of the sum of p^(1/tau) over the other tokens, at the n temperatures tau of the layout; -inf
    where there are none. p is normalised over the whole vocabulary, at temperature 1."""
    hidden: StoredHidden = field(default_factory=lambda: np.empty((0, 0), np.uint16))
    """Optional: [T, D] the last hidden state as it is stored: uint16, the bits of bfloat16, or int8; see
    ``storage.hidden``."""
    hidden_scale: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """[T] what an int8 hidden state is to be multiplied with; 1 for any other, and where there is none."""

    def __post_init__(self) -> None:
        """Give optional fields that were left out their length: no columns, and scales of 1."""
        num = len(self)
        for name in OPTIONAL:
            values = getattr(self, name)
            if values.size == 0 and len(values) != num:
                object.__setattr__(self, name, np.empty((num, 0), values.dtype))
        if self.hidden_scale.size == 0 and num:
            object.__setattr__(self, "hidden_scale", np.ones(num, np.float32))

    def __len__(self) -> int:
        return len(self.log_tail)

    @property
    def num_samples(self) -> int:
        """m, the draws per position."""
        return int(self.tail_samples.shape[1])

    @staticmethod
    def unread(num: int) -> Targets:
        """What stands for the targets of so many positions where they were not read: no ids, and NaN."""
        unknown = np.full(num, np.nan, np.float32)
        return Targets(
            token_ids=np.empty((num, 0), np.int32),
            logprobs=np.empty((num, 0), np.float32),
            log_tail=np.zeros(num, np.float32),
            tail_entropy=unknown,
            log_target=unknown,
            log_not_target=unknown,
            tail_samples=np.empty((num, 0), np.int32),
        )

    def __getitem__(self, index: slice | NDArray[np.integer] | NDArray[np.bool_]) -> Targets:
        return Targets(**{name: values[index] for name, values in vars(self).items()})

    @staticmethod
    def concatenate(parts: list[Targets]) -> Targets:
        """Some targets after one another; at least one part."""
        if len(parts) == 1:
            return parts[0]
        return Targets(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Targets)})


def check_targets(targets: Targets, *, complementary: bool = False) -> None:
    """Refuse what no codec can store, and what no distribution can be.

    Args:
      targets: what is to be stored.
      complementary: whether the true next token's probability and what is left of 1 have to agree.

    Raises:
      TeacherError: a log-probability is not finite or above 0, the tokens are not most likely first, the tail has all
        of the mass, or a scalar, a sum at another temperature or a hidden state is not a number.
    """
    logprobs = targets.logprobs
    head_scale = targets.log_tail
    bad = ~np.isfinite(logprobs).all(axis=1) | (logprobs[:, 1:] > logprobs[:, :-1]).any(axis=1)
    bad |= ~(head_scale < 0) | (logprobs[:, 0] > 1e-3)  # a log tail of 0 would leave nothing for the head
    for name in SCALARS[1:]:
        bad |= np.isnan(getattr(targets, name))
    if complementary:
        sums = np.exp(targets.log_target.astype(np.float64)) + np.exp(targets.log_not_target.astype(np.float64))
        bad |= ~(np.abs(sums - 1) < _ROUNDING)
    bad |= np.isnan(targets.log_z_tail).any(axis=1)
    bad |= ~(np.isfinite(targets.hidden_scale) & (targets.hidden_scale >= 0))
    for first in range(0, len(targets) if targets.hidden.dtype == np.uint16 else 0, _BLOCK_POSITIONS):
        part = slice(first, first + _BLOCK_POSITIONS)
        bad[part] |= ~finite_bfloat16(targets.hidden[part].view(np.uint16))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise TeacherError(
            f"target {row} of those to be stored: expected finite log-probabilities, at most 0, most likely "
            f"first, a log tail below 0, log_target and log_not_target of masses that sum to 1, finite hidden states "
            f"and no NaN; found {logprobs[row][:8]} … with "
            + ", ".join(f"{name} {getattr(targets, name)[row]}" for name in (*SCALARS, "log_z_tail", "hidden_scale"))
        )
