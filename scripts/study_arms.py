"""What is compared: every arm is a loss, the targets it learns from, and what it is there to show.

All arms of a seed start from the same weights and read the same rows in the same order. Cross-entropy and divergence
have weight 1 each, but where a paper says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["BETAS", "SPLITS", "WEIGHTS", "Arm", "CacheRecipe", "arms", "cache_name", "recipes_of"]

SPLITS = (1, 5, 10, 20)
BETAS = (0.5, 1.0, 2.0, 5.0, 10.0)
WEIGHTS = (2.0, 4.0, 8.0)
"""Of the divergence, where that of the cross-entropy stays 1."""
DEFAULT = (32, 64)
"""K and m of `tailcache capture`'s own defaults, from which an arm learns unless it says otherwise."""


@dataclass(frozen=True, kw_only=True)
class CacheRecipe:
    """One set of stored targets: K, m, and whether the hidden states are kept."""

    top_k: int
    num_samples: int
    hidden: bool = False

    @property
    def name(self) -> str:
        """Its name in the cache."""
        return f"k{self.top_k}m{self.num_samples}{'h' if self.hidden else ''}"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train a student.

    Attributes:
      name: unique; names its files.
      title: for tables.
      group: what it belongs to: "reference", "online", "cache", "tails", "truncation", "bytes", "grid", "weights" or
        "others".
      loss: settings of ``LossConfig``; none for plain language modelling.
      cache: the targets it learns from; for an online arm only the rows are read from there.
      online: whether the teacher runs beside the student, and gives its whole distributions.
      clm_weight: of the cross-entropy.
    """

    name: str
    title: str
    group: str
    loss: dict[str, Any] | None
    cache: CacheRecipe = field(default_factory=lambda: CacheRecipe(top_k=DEFAULT[0], num_samples=DEFAULT[1]))
    online: bool = False
    clm_weight: float = 1.0


def cache_name(arm: Arm) -> str:
    """The teacher in the cache that an arm reads."""
    return arm.cache.name


def arms(*, full_k: int = 64, full_m: int = 64) -> tuple[Arm, ...]:
    """All of them.

    Args:
      full_k: K of the capture.
      full_m: its m.
    """
    with_hidden = CacheRecipe(top_k=full_k, num_samples=full_m, hidden=True)
    found = [
        Arm(name="clm", title="CLM (no teacher)", group="reference", loss=None),
        Arm(
            name="kd-online",
            title="KD, live teacher",
            group="online",
            loss={"name": "kd", "tail": "exact"},
            online=True,
        ),
        Arm(
            name="tad-online",
            title="TAD (K=10, β=2), live teacher",
            group="online",
            loss={"name": "tad", "top_k": 10, "beta": 2.0, "tail": "exact"},
            online=True,
        ),
        Arm(name="kd", title="KD, cache", group="cache", loss={"name": "kd", "tail": "sampled"}),
        Arm(name="rs-kd", title="RS-KD (50 draws), cache", group="others", loss={"name": "rs_kd", "num_draws": 50}),
        Arm(
            name="reverse-kl",
            title="reverse KL, cache with hidden states",
            group="others",
            loss={"name": "reverse_kl", "tail": "exact"},
            cache=with_hidden,
        ),
        Arm(
            name="todi",
            title="ToDi, cache with hidden states",
            group="others",
            loss={"name": "todi", "tail": "exact"},
            cache=with_hidden,
        ),
        Arm(
            name="atkd",
            title="ATKD (no CLM, as published), cache",
            group="others",
            loss={"name": "atkd", "tail": "sampled"},
            clm_weight=0.0,
        ),
    ]
    found += [_tad(k, beta) for k in SPLITS for beta in BETAS]
    found += _weights()
    found += _tails()
    found += _truncations(full_k, full_m)
    found += _bytes(full_k, full_m)
    return tuple(found)


def _tad(split: int, beta: float) -> Arm:
    return Arm(
        name=f"tad-k{split}-b{beta:g}",
        title=f"TAD (K={split}, β={beta:g}), cache",
        group="grid",
        loss={"name": "tad", "top_k": split, "beta": beta, "tail": "sampled"},
    )


def _weights() -> list[Arm]:
    """What TAD is to be told from: its larger terms also give the divergence more weight beside the cross-entropy."""
    kd: dict[str, Any] = {"name": "kd", "tail": "sampled"}
    heavier = [
        Arm(name=f"kd-w{w:g}", title=f"KD, weight {w:g}, cache", group="weights", loss={**kd, "weight": w})
        for w in WEIGHTS
    ]
    tad = {"name": "tad", "top_k": 10, "beta": 2.0, "tail": "sampled"}
    return [
        *heavier,
        Arm(name="kd-alone", title="KD without CLM, cache", group="weights", loss=kd, clm_weight=0.0),
        Arm(name="tad-alone", title="TAD (K=10, β=2) without CLM, cache", group="weights", loss=tad, clm_weight=0.0),
    ]


def _tails() -> list[Arm]:
    """Every choice of what stands beyond the stored K, where K is small enough for it to matter."""
    small = CacheRecipe(top_k=10, num_samples=64)
    stored = {"exact": CacheRecipe(top_k=10, num_samples=64, hidden=True)}
    return [
        Arm(
            name=f"kd-k10-{tail}",
            title=f"KD, K=10, tail `{tail}`",
            group="tails",
            loss={"name": "kd", "tail": tail},
            cache=stored.get(tail, small),
        )
        for tail in ("sampled", "bucket", "prior", "uniform", "exact", "drop", "renormalise")
    ]


def _truncations(full_k: int, full_m: int) -> list[Arm]:
    """Plain top-K at more than one K; the `sampled` ones beside them are in the other groups."""
    return [
        Arm(
            name=f"kd-k{k}-{tail}",
            title=f"KD, K={k}, tail `{tail}`",
            group="truncation",
            loss={"name": "kd", "tail": tail},
            cache=CacheRecipe(top_k=k, num_samples=m, hidden=k == full_k),
        )
        for k, m in (DEFAULT, (full_k, full_m))
        for tail in ("drop", "renormalise")
    ]


def _bytes(full_k: int, full_m: int) -> list[Arm]:
    """K and m against bytes; (10, 64) and the default are in the other groups."""
    pairs = ((1, 64), (5, 16), (10, 4), (10, 16), (DEFAULT[0], 16), (full_k, 16), (full_k, full_m))
    return [
        Arm(
            name=f"kd-k{k}-m{m}",
            title=f"KD, K={k}, m={m}",
            group="bytes",
            loss={"name": "kd", "tail": "sampled"},
            cache=CacheRecipe(top_k=k, num_samples=m, hidden=(k, m) == (full_k, full_m)),
        )
        for k, m in pairs
    ]


def recipes_of(chosen: tuple[Arm, ...]) -> tuple[CacheRecipe, ...]:
    """The sets of targets that some arms need, each once."""
    return tuple(dict.fromkeys(arm.cache for arm in chosen))
