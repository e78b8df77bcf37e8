"""Which tokens of a tail each sampling scheme keeps, with what weights, and how far off that is on average.

A tail is what a distribution p has beyond its K most likely ids, of mass r; p~ = p / r. A scheme replaces the tail's p
by a few ids with weights whose expectation is p, id by id, so everything linear in p is unbiased. Errors of different
positions are independent, so the expected squared error of a pooled gradient sum_t w_t e_t (x) h_t is

    sum_t w_t^2 |h_t|^2 v_t,     v_t = sum over the tail of the variance of an id's weight,

and v_t, which ``variance`` gives in closed form, is all that tells one scheme from another. It depends on how often
each id alone is drawn, not on which ids are drawn together: the order in which a systematic scheme walks through the
ids is of no consequence here.

| scheme            | what is drawn                                                       | weight of a draw        |
|-------------------|---------------------------------------------------------------------|-------------------------|
| `independent`     | m times from p~                                                     | r / m                   |
| `stratified`      | one uniform number in each m-th of the cumulative sum               | r / m                   |
| `systematic`      | one uniform u, (u + j) / m for j < m, ids in their own order        | r / m                   |
| `systematic by p` | the same, most likely ids first                                     | r / m                   |
| `threshold`       | the n ids with too large a share for certain, m - n of the others   | own p; mass / (m - n)   |
| `thinned`         | systematic with m_t <= m draws, each repeated m / m_t times         | r / m                   |

`thinned` is what capture does (``pipeline.draws``): it spends draws where the tail is heavy, m_t in proportion to r.
The repeats are zeros in the stored differences, and whoever reads the draws need not know.

Source: Madow, "On the theory of systematic sampling, II" (1949), for systematic draws; Duffield, Lund, Thorup,
"Priority sampling for estimation of arbitrary subset sums" (2007), and Fearnhead, Clifford, "On-line inference for
hidden Markov models via particle filters" (2003), for thresholds.
Legend: T positions, V vocabulary, R ranks looked at (the largest K plus the largest m), K kept, m draws, n seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailcache.pipeline.draws import num_distinct

__all__ = [
    "SCHEMES",
    "Draws",
    "Tails",
    "certain",
    "draw",
    "draw_all",
    "tails_of",
    "thinned_to",
    "variance",
]

SCHEMES = ("independent", "stratified", "systematic", "systematic by p", "threshold", "thinned")


@dataclass(frozen=True, kw_only=True)
class Tails:
    """Some distributions in short: their most likely ids, and sums over all beyond each rank. Probabilities, float64.

    Attributes:
      ids: [T, R] int64, most likely first.
      p: [T, R] their probabilities.
      mass: [T, R + 1] sum of p beyond the first 0, 1, ..., R.
      squares: [T, R + 1] sum of p^2 beyond them.
      entropy: [T, R + 1] minus the sum of p log p beyond them, nats.
    """

    ids: Tensor
    p: Tensor
    mass: Tensor
    squares: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: Tensor) -> Tails:
        """Some of the positions."""
        return Tails(**{name: values[rows] for name, values in vars(self).items()})

    @staticmethod
    def concatenate(parts: list[Tails]) -> Tails:
        """Some after one another."""
        return Tails(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What stands for the tails of T positions; as many times as there are seeds.

    Attributes:
      ids: [n, T, m] int32.
      weights: [n, T, m] or [1, T, m] float32, what stands for p.
    """

    ids: Tensor
    weights: Tensor

    def of(self, seed: int) -> tuple[Tensor, Tensor]:
        """The draws of one seed: ids [T, m] int64 and their weights [T, m]."""
        return self.ids[seed].long(), self.weights[seed % len(self.weights)]

    def rows(self, rows: Tensor) -> Draws:
        """Some of the positions."""
        return Draws(ids=self.ids[:, rows], weights=self.weights[:, rows])

    @staticmethod
    def concatenate(parts: list[Draws]) -> Draws:
        """Some positions after one another."""
        ids, weights = [part.ids for part in parts], [part.weights for part in parts]
        return Draws(ids=torch.cat(ids, dim=1), weights=torch.cat(weights, dim=1))


def tails_of(sorted_TV: Tensor, order_TV: Tensor, num_ranks: int) -> Tails:
    """Summarise distributions.

    Args:
      sorted_TV: [T, V] probabilities, largest first.
      order_TV: [T, V] int64, whose they are.
      num_ranks: R, at most V.

    Cost: the far tail is summed apart, so that the mass beyond a rank is never one minus something.
    """
    head_TR, far = sorted_TV[:, :num_ranks].double(), sorted_TV[:, num_ranks:].double()

    def beyond(values_TR: Tensor, far_T: Tensor) -> Tensor:
        both = torch.cat([values_TR, far_T[:, None]], dim=-1)
        return both.flip(-1).cumsum(-1).flip(-1)

    return Tails(
        ids=order_TV[:, :num_ranks].clone(),
        p=head_TR,
        mass=beyond(head_TR, far.sum(-1)),
        squares=beyond(head_TR.square(), far.square().sum(-1)),
        entropy=beyond(-torch.xlogy(head_TR, head_TR), -torch.xlogy(far, far).sum(-1)),
    )


def tail_entropy(tails: Tails, top_k: int) -> Tensor:
    """[T] float64, nats: the entropy of the normalised tail."""
    mass_T = tails.mass[:, top_k]
    return tails.entropy[:, top_k] / mass_T + mass_T.log()


def certain(tails: Tails, top_k: int, num_draws: int) -> Tensor:
    """[T] int64: how many of the tail's most likely ids `threshold` keeps for certain, 0 to m - 1.

    The smallest n for which m - n draws from the rest would take no id more than once.
    """
    left = num_draws - torch.arange(num_draws)
    first = slice(top_k, top_k + num_draws)
    return (left * tails.p[:, first] <= tails.mass[:, first]).long().argmax(-1)


def thinned_to(tails: Tails, top_k: int, num_draws: int) -> Tensor:
    """[T] int64: m_t, the different draws that `thinned` makes, as capture does."""
    return num_distinct(tails.mass[:, top_k], num_draws)


def draw(
    scheme: str,
    tails: Tails,
    *,
    top_k: int,
    num_draws: int,
    num_seeds: int,
    cumulative_TV: Tensor,
    sorted_cumulative_TV: Tensor,
    order_TV: Tensor,
    generator: torch.Generator,
) -> Draws:
    """Draw from the tails of some positions, once for each seed.

    Args:
      scheme: one of ``SCHEMES``.
      tails: of the same positions.
      top_k: K.
      num_draws: m.
      num_seeds: independent repetitions.
      cumulative_TV: [T, V] float64, cumulative sum of p over the ids in their own order, the top K left out.
      sorted_cumulative_TV: [T, V] float64, the same over all ids, most likely first.
      order_TV: [T, V] int64, which ids those are.
      generator: of the uniform numbers.
    """
    num = len(tails)
    slot_m = torch.arange(num_draws, dtype=torch.float64)
    wide = num_draws if scheme in ("independent", "stratified") else 1
    uniform_nTm = torch.rand((num_seeds, num, wide), generator=generator, dtype=torch.float64)
    weights_Tm = (tails.mass[:, top_k] / num_draws)[:, None].expand(-1, num_draws)
    if scheme == "independent":
        points = uniform_nTm
    elif scheme == "thinned":
        distinct_T1 = thinned_to(tails, top_k, num_draws).double()[:, None]
        points = (uniform_nTm + (slot_m * distinct_T1 / num_draws).floor()) / distinct_T1
    elif scheme == "threshold":
        certain_T1 = certain(tails, top_k, num_draws)[:, None]
        points = ((uniform_nTm + slot_m - certain_T1) / (num_draws - certain_T1)).clamp(min=0)
        low = sorted_cumulative_TV.gather(-1, certain_T1 + top_k - 1)
        found = order_TV.gather(-1, _invert(sorted_cumulative_TV, points, low).flatten(1)).view(num, num_seeds, -1)
        is_certain_Tm = slot_m < certain_T1
        first = slice(top_k, top_k + num_draws)
        ids = torch.where(is_certain_Tm[:, None], tails.ids[:, None, first], found)
        rest_T1 = tails.mass.gather(-1, certain_T1 + top_k) / (num_draws - certain_T1)
        weights_Tm = torch.where(is_certain_Tm, tails.p[:, first], rest_T1)
        return Draws(ids=ids.transpose(0, 1).int(), weights=weights_Tm.float()[None])
    else:
        points = (uniform_nTm + slot_m) / num_draws
    if scheme == "systematic by p":
        low = sorted_cumulative_TV[:, top_k - 1 : top_k]
        ids = order_TV.gather(-1, _invert(sorted_cumulative_TV, points, low).flatten(1)).view(num, num_seeds, -1)
    else:
        ids = _invert(cumulative_TV, points, torch.zeros((num, 1), dtype=torch.float64))
    return Draws(ids=ids.transpose(0, 1).int(), weights=weights_Tm.float()[None])


def _invert(cumulative_TV: Tensor, points_nTm: Tensor, low_T1: Tensor) -> Tensor:
    """[T, n, m] int64: the first index whose cumulative sum exceeds low + point * (total - low)."""
    total_T1 = cumulative_TV[:, -1:].contiguous()
    flat = points_nTm.transpose(0, 1).flatten(1)
    found = torch.searchsorted(cumulative_TV, low_T1 + flat * (total_T1 - low_T1), right=True)
    found = torch.minimum(found, torch.searchsorted(cumulative_TV, total_T1))
    return found.view(len(cumulative_TV), len(points_nTm), -1)


def draw_all(
    p_TV: Tensor,
    sorted_TV: Tensor,
    order_TV: Tensor,
    tails: Tails,
    wanted: list[tuple[str, int, int]],
    *,
    num_seeds: int,
    generator: torch.Generator,
) -> dict[tuple[str, int, int], Draws]:
    """All draws that are wanted of some positions.

    Args:
      p_TV: [T, V] probabilities.
      sorted_TV: [T, V] the same, largest first.
      order_TV: [T, V] int64, whose they are.
      tails: their summary.
      wanted: (scheme, K, m).
      num_seeds: independent repetitions of each.
      generator: of the uniform numbers.
    """
    found = {}
    sorted_cumulative_TV = sorted_TV.cumsum(-1, dtype=torch.float64)
    for top_k in sorted({k for _, k, _ in wanted}):
        cumulative_TV = p_TV.scatter(-1, tails.ids[:, :top_k], 0.0).cumsum(-1, dtype=torch.float64)
        for key in wanted:
            if key[1] == top_k:
                found[key] = draw(
                    key[0],
                    tails,
                    top_k=top_k,
                    num_draws=key[2],
                    num_seeds=num_seeds,
                    cumulative_TV=cumulative_TV,
                    sorted_cumulative_TV=sorted_cumulative_TV,
                    order_TV=order_TV,
                    generator=generator,
                )
    return found


def variance(scheme: str, tails: Tails, top_k: int, num_draws: int, *, known_T: Tensor | None = None) -> Tensor:
    """[T] float64: v_t, the sum of the variances of what stands for each p of the tail.

    For `independent` r^2 (1 - sum p~^2) / m. A systematic count of an id is one of the two whole numbers around
    m p~, so it varies by f (1 - f) with f the fraction of m p~; no count that is a whole number and right on average
    varies less. With a threshold t, a kept id stands for t, with probability p / t: p (t - p).

    Args:
      scheme: one of ``SCHEMES`` but `stratified`, which lies between independent and systematic.
      tails: the distributions in short.
      top_k: K.
      num_draws: m.
      known_T: [T] p of an id whose exact p replaces its draws, 0 where there is none beyond the top K.

    Raises:
      ValueError: another scheme.
    """
    mass_T, squares_T = tails.mass[:, top_k], tails.squares[:, top_k]
    if scheme == "independent":
        own_T = 0.0 if known_T is None else known_T * (mass_T - known_T)
        return (mass_T.square() - squares_T - own_T) / num_draws
    if scheme == "threshold":
        first_T1 = top_k + certain(tails, top_k, num_draws)[:, None]
        rest_T1 = tails.mass.gather(-1, first_T1)
        unit_T1 = rest_T1 / (num_draws + top_k - first_T1)
        return (unit_T1 * rest_T1 - tails.squares.gather(-1, first_T1))[:, 0]
    if scheme not in ("systematic", "systematic by p", "thinned"):
        raise ValueError(f"scheme: expected one with a closed form, found {scheme!r}")
    draws_T = thinned_to(tails, top_k, num_draws).double() if scheme == "thinned" else torch.tensor(float(num_draws))
    unit_T = mass_T / draws_T

    def spread_of(share: Tensor) -> Tensor:
        fraction = share - share.floor()
        return fraction * (1 - fraction)

    # Only the m most likely can be due more than one draw; for the others f is m p~ itself.
    share_Tm = tails.p[:, top_k : top_k + num_draws] / unit_T[:, None]
    near_T = spread_of(share_Tm).sum(-1)
    far_T = tails.mass[:, top_k + num_draws] / unit_T - tails.squares[:, top_k + num_draws] / unit_T.square()
    own_T = 0.0 if known_T is None else spread_of(known_T / unit_T)
    return unit_T.square() * (near_T + far_T - own_T)
