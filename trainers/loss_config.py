"""The settings of a loss: its parameters, which loss has which, and what they may be. Light to import.

The text under a field is what ``tailcache train --help`` prints for it. Whether a loss can be had from a given cache
is ``soundness``'s question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from tailcache.storage.errors import ConfigError
from tailcache.trainers.schedules import Schedule, Shape

__all__ = ["Divergence", "LossConfig", "LossParameters", "Tail", "Wrapped", "parameters_of"]

Divergence = Literal[
    "kd",
    "tad",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "dkd",
    "atkd",
    "todi",
    "rs_kd",
    "hidden_cosine",
]
Tail = Literal["bucket", "sampled", "prior", "uniform", "exact", "drop", "renormalise"]
Wrapped = Literal["dkd", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "todi"]

DEFAULT_SPLIT = 10

_OWN: dict[str, tuple[str, ...]] = {
    "clm": (),
    "kd": ("tail", "temperature"),
    "tad": (
        "tail",
        "top_k",
        "top_k_end",
        "top_k_schedule",
        "beta",
        "beta_end",
        "beta_schedule",
        "min_mean_alpha",
    ),
    "reverse_kl": ("tail",),
    "jsd": ("tail", "mixture"),
    "skew_kl": ("tail", "skew"),
    "skew_reverse_kl": ("tail", "skew"),
    "dkd": ("tail", "target_weight", "non_target_weight"),
    "todi": ("tail",),
    "rs_kd": ("num_draws", "power"),
    "hidden_cosine": (),
}


def parameters_of(loss: str, wraps: str = "dkd") -> tuple[str, ...]:
    """The names of a loss's parameters; for `atkd` also those of what it wraps."""
    if loss == "atkd":
        wrapped = tuple(name for name in ("mixture", "skew") if name in _OWN[wraps])
        return ("tail", "hard_ratio", "easy_weight", "wraps", *wrapped)
    return _OWN[loss]


@dataclass(frozen=True, kw_only=True)
class LossParameters:
    """The parameters of all losses; each belongs to some of them and is refused for the others."""

    tail: Tail | None = None
    """What stands for the teacher's tail beyond the stored top-K. sampled: the stored draws, an unbiased gradient; only
    for losses linear in the teacher's tail (kd, tad, dkd, atkd). bucket: one atom, a lower bound for most. prior,
    uniform: the teacher's mean tail, or an even one; biased. exact: from stored hidden states. drop, renormalise: the
    tail ignored, or its mass given to the head; biased, to reproduce what others do. Default: sampled where it is
    sound, else bucket."""

    temperature: float = 1.0
    """kd: both distributions at this temperature, the loss times its square. Other than 1 it needs a capture with
    --temperatures or --hidden."""

    top_k: int | None = None
    """tad: the split K': the head is the teacher's K' most likely tokens, at most the K that is stored. Default: 10.
    Other losses have no split and always use every stored token."""

    top_k_end: int | None = None
    """tad: where K' ends, with --top-k-schedule."""

    top_k_schedule: Shape = "constant"
    """tad: how K' goes from --top-k to --top-k-end over all optimizer steps, in whole numbers."""

    beta: float = 2.0
    """tad: the weight of the tail: beta(X) = beta / mean tail mass over the positions of a document."""

    beta_end: float | None = None
    """tad: where beta ends, with --beta-schedule."""

    beta_schedule: Shape = "constant"
    """tad: how beta goes from --beta to --beta-end over all optimizer steps."""

    min_mean_alpha: float = 0.0
    """tad: lower bound of that mean, so that beta(X) cannot explode on documents the teacher is sure of; 0 is the
    paper."""

    mixture: float = 0.5
    """jsd: the teacher's share b of the mixture m = b p + (1 - b) q, and the weight of KL(p||m)."""

    skew: float = 0.1
    """skew_kl, skew_reverse_kl: the share of the first distribution that is mixed into the second."""

    target_weight: float = 1.0
    """dkd: weight of the true token against the rest (TCKD)."""

    non_target_weight: float = 1.0
    """dkd: weight of the rest among itself (NCKD)."""

    hard_ratio: float = 0.5
    """atkd: the share of a forward's positions that are hard: those where the teacher is least sure of the true token.
    0.5 splits at the median."""

    easy_weight: float = 0.2
    """atkd: weight of the easy positions' mean; the hard ones' is 1 minus it."""

    wraps: Wrapped = "dkd"
    """atkd: the divergence of each position; dkd is the paper's (NCKD)."""

    num_draws: int = 50
    """rs_kd: ids drawn per position and step."""

    power: float = 1.0
    """rs_kd: they are drawn in proportion to p to this power; 1 gives every draw the weight 1 / draws."""

    def check_parameters(self, loss: str) -> None:
        """Refuse parameters of other losses, and values out of range.

        Raises:
          ConfigError: names the parameter.
        """
        own = parameters_of(loss, self.wraps)
        for each in fields(LossParameters):
            if each.name not in own and getattr(self, each.name) != each.default:
                owners = ", ".join(
                    n for n in ("clm", *get_args(Divergence)) if each.name in parameters_of(n, self.wraps)
                )
                raise ConfigError(f"{each.name}: belongs to {owners}, and the loss is {loss!r}; drop it")
        self._check_ranges()
        for name in ("top_k", "beta"):
            end, shape = getattr(self, f"{name}_end"), getattr(self, f"{name}_schedule")
            if (end is None) != (shape == "constant"):
                raise ConfigError(
                    f"{name}_schedule: expected linear or cosine together with {name}_end, or neither; found "
                    f"{name}_schedule = {shape} and {name}_end = {end}"
                )

    def _check_ranges(self) -> None:
        for name in ("beta", "beta_end", "target_weight", "non_target_weight", "power"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}: expected a number >= 0, found {value}")
        for name in ("min_mean_alpha", "hard_ratio", "easy_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a number between 0 and 1, found {getattr(self, name)}")
        for name in ("top_k", "top_k_end", "num_draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: expected a number > 0, found {self.temperature}")
        if not 0 < self.mixture < 1:
            raise ConfigError(f"mixture: expected a number between 0 and 1, both excluded, found {self.mixture}")
        if not 0 <= self.skew < 1:
            raise ConfigError(f"skew: expected a number >= 0 and below 1, found {self.skew}")

    @property
    def split(self) -> Schedule:
        """The split K' of TAD over training."""
        start = DEFAULT_SPLIT if self.top_k is None else self.top_k
        return Schedule(start, start if self.top_k_end is None else self.top_k_end, self.top_k_schedule)

    @property
    def tail_weight(self) -> Schedule:
        """The beta of TAD over training."""
        return Schedule(self.beta, self.beta if self.beta_end is None else self.beta_end, self.beta_schedule)


@dataclass(frozen=True, kw_only=True)
class LossConfig(LossParameters):
    """One divergence of a weighted sum."""

    name: Divergence
    """Which."""

    weight: float = 1.0
    """Its weight."""

    def __post_init__(self) -> None:
        if self.name not in get_args(Divergence):
            also = "; the cross-entropy's weight is clm_weight" if str(self.name) == "clm" else ""
            raise ConfigError(f"name: expected one of {', '.join(get_args(Divergence))}; found {self.name!r}{also}")
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"weight: expected a number >= 0, found {self.weight}")
        self.check_parameters(self.name)
