"""What two caches say about KL(A‖B) at each position: a lower bound that is certain, and an estimate that is not.

A cache holds A's head (the K most likely tokens), the mass and the entropy of A's tail, draws from that tail, and
the probability of the true next token y wherever it lies. Nothing else of A's tail is known token by token.

**Bound.** Merging tokens into atoms never raises a KL. The atoms are: each token in both heads; y, where it is not
one of those; everything else together. Both teachers know the mass of every atom, as a sum of positive terms. y is
left inside "everything else" where it is nearly the whole of a tail, because only there would its neighbours' mass
be a difference of two rounded numbers. What the bound bounds is the KL of the distributions as stored.

**Prior estimate.** KL(A‖B) = sum p log p − sum p log q. The first sum is exact. In the second, log q is known for
tokens in B's head and for y. For any other token it is taken from B's mean tail distribution π, scaled to the mass
that B has left: q(i) = (α_B − q(y)) π(i) / (sum of π over B's tail without y), where y counts only if it lies in
B's tail. Tokens of A's tail are represented by A's stored draws or, where none were stored, by A's own mean tail.

**Estimate.** A tail is not like its average, so the prior estimate is too large, by 0.3 nats at K = 64 on real text
even where B *is* A. That much can be measured: the same estimate of KL(A‖A), whose truth is 0, through the same
draws (where A keeps fewer tokens than B, the same is measured on B). Taking it off gives the estimate. It rests on
A's tail telling as much about B's as about A's own, beyond what the averages tell. Against dense KLs at K = 64:
SmolLM2 and itself with weights at 3 bits, 2,005 positions, 1.825 for 1.799 and, the other way round, 1.995 for 1.984
(prior estimate 2.107 and 2.388); SmolLM2 and a tenth of the way to that, 0.019 for 0.016 (prior estimate 0.318). Where
B knows nothing of the context it is too small: 2.89 for 3.18 against a unigram model. Where both heads are the
whole vocabulary it is exact.

Legend: T positions, V vocabulary, K kept tokens (of A or of B), m draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.codec import Targets

__all__ = ["DirectedTerms", "PairTerms", "Prior", "View", "find_in_head", "pair_terms"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ranks = NDArray[np.int16] | NDArray[np.int32]

_TABLE_ENTRIES = 1 << 21  # of the look-up table of ranks: 4 MB, so that it stays in the processor's cache
_SMALLEST = float(np.finfo(np.float64).tiny)
_ROUNDING = 2.0**-13  # of the log of a stored scalar, with a factor of two to spare
_RESOLVED = 1 / 16  # share of a tail that must be left beside y for y to be an atom of its own
_CANCELLED = 1e-6  # where less than this of pi lies in a tail, it is summed directly


class Prior:
    """A teacher's mean tail distribution, ready to be restricted to tails.

    Args:
      mean_tail_V: [V] probability; all zeros where no tail exists.
    """

    def __init__(self, mean_tail_V: NDArray[np.float32]) -> None:
        # A token whose mean probability underflowed is taken to have the smallest that float32 can hold.
        self.pi_V: Floats = np.maximum(mean_tail_V.astype(np.float64), float(np.finfo(np.float32).tiny))
        self.log_pi_V: Floats = np.log(self.pi_V)
        self.total = float(self.pi_V.sum())

    def sum_outside(self, values_V: Floats, excluded_TJ: NDArray[np.int32], also_T: NDArray[np.int64]) -> Floats:
        """Sum some positive or negative values, all of one sign, over all tokens but some.

        Args:
          values_V: [V] what to sum.
          excluded_TJ: [T, J] token ids, no id twice in a row.
          also_T: [T] one more id to exclude, or -1.

        Returns:
          [T] the sums: the whole minus the excluded where that loses nothing, else summed directly.
        """
        if excluded_TJ.shape[1] == len(values_V):
            return np.zeros(len(excluded_TJ))
        total = float(values_V.sum())
        outside_T: Floats = total - np.take(values_V, excluded_TJ).sum(axis=1)
        outside_T -= np.where(also_T >= 0, np.take(values_V, np.maximum(also_T, 0)), 0.0)
        for t in np.flatnonzero(np.abs(outside_T) < _CANCELLED * abs(total)):
            rest_V = values_V.copy()
            rest_V[excluded_TJ[t]] = 0.0
            if also_T[t] >= 0:
                rest_V[also_T[t]] = 0.0
            outside_T[t] = rest_V.sum()
        return outside_T


@dataclass(frozen=True, kw_only=True)
class View:
    """One teacher's targets at T positions, in float64, with what every comparison needs of them."""

    targets: Targets
    true_next_T: NDArray[np.int64]
    logp_TK: Floats
    p_TK: Floats
    tail_T: Floats
    """[T] mass of the tail."""
    target_rank_T: NDArray[np.int64]
    """[T] where the true next token stands in the head; -1 outside."""
    log_target_T: Floats
    negative_entropy_T: Floats
    """[T] sum of p log p over the whole vocabulary, exact."""
    prior: Prior

    @staticmethod
    def of(targets: Targets, true_next_T: NDArray[np.int64], prior: Prior) -> View:
        """Prepare some targets; ``true_next_T`` [T] is the true next token of each."""
        logp_TK = targets.logprobs.astype(np.float64)
        p_TK = np.exp(logp_TK)
        log_tail_T = targets.log_tail.astype(np.float64)
        tail_T = np.exp(log_tail_T)
        is_true_TK = targets.token_ids == true_next_T[:, None]
        rank_T = np.where(is_true_TK.any(axis=1), is_true_TK.argmax(axis=1), -1)
        tail_part_T = tail_T * (np.where(tail_T > 0, log_tail_T, 0.0) - targets.tail_entropy)
        return View(
            targets=targets,
            true_next_T=true_next_T,
            logp_TK=logp_TK,
            p_TK=p_TK,
            tail_T=tail_T,
            target_rank_T=rank_T,
            log_target_T=targets.log_target.astype(np.float64),
            negative_entropy_T=np.einsum("tk,tk->t", p_TK, logp_TK) + tail_part_T,
            prior=prior,
        )

    @cached_property
    def filled(self) -> _Filled:
        """The distributions with their tails filled in."""
        return _Filled(self)

    @property
    def target_in_tail_T(self) -> Bools:
        """[T] the true next token lies outside the head."""
        return self.target_rank_T < 0

    def head_only(self, k: int, prior: Prior) -> View:
        """The same distributions with only the k most likely tokens known; ``prior``: the mean tail beyond k."""
        tail_T = self.p_TK[:, k:].sum(axis=1) + self.tail_T
        targets = replace(self.targets, token_ids=self.targets.token_ids[:, :k], logprobs=self.targets.logprobs[:, :k])
        rank_T = np.where(self.target_rank_T < k, self.target_rank_T, -1)
        return replace(
            self,
            targets=targets,
            logp_TK=self.logp_TK[:, :k],
            p_TK=self.p_TK[:, :k],
            tail_T=tail_T,
            target_rank_T=rank_T,
            prior=prior,
        )


@dataclass(frozen=True, kw_only=True)
class DirectedTerms:
    """What is known of KL(A‖B), position by position, nats."""

    bound_T: Floats
    prior_estimate_T: Floats
    estimate_T: Floats


@dataclass(frozen=True, kw_only=True)
class PairTerms:
    """What two caches say about two teachers, position by position."""

    agree_T: Bools
    """[T] the most likely token is the same."""
    a_to_b: DirectedTerms
    b_to_a: DirectedTerms


def find_in_head(head_TK: NDArray[np.int32], queries_TJ: list[NDArray[np.int32]], vocab_size: int) -> list[Ranks]:
    """Where tokens stand in each position's head.

    Args:
      head_TK: [T, K] token ids, no id twice in a row.
      queries_TJ: arrays [T, J] of token ids, J of any size.
      vocab_size: V.

    Returns:
      For each query array, [T, J]: the column of ``head_TK``, or -1.

    Cost: a few array accesses per id, in a table of some rows by V that is written, read and wiped.
    """
    num, width = head_TK.shape
    step = max(1, _TABLE_ENTRIES // vocab_size)
    kind = np.int16 if width < 1 << 15 else np.int32
    table = np.full(min(step, num) * vocab_size, -1, dtype=kind)
    found: list[Ranks] = [np.empty(q.shape, dtype=kind) for q in queries_TJ]
    base_T1 = (np.arange(min(step, num)) * vocab_size)[:, None]
    ranks_K = np.arange(width, dtype=kind)
    for first in range(0, num, step):
        rows = slice(first, min(first + step, num))
        base = base_T1[: rows.stop - first]
        keys = head_TK[rows] + base
        table[keys] = ranks_K
        for query, out in zip(queries_TJ, found, strict=True):
            np.take(table, query[rows] + base, out=out[rows], mode="clip")
        table[keys] = -1
    return found


def pair_terms(a: View, b: View, a_beyond: Prior | None = None, b_beyond: Prior | None = None) -> PairTerms:
    """Compare two teachers at the same T positions.

    Args:
      a: one teacher.
      b: the other; same positions, same vocabulary, any K.
      a_beyond: where A keeps more tokens than B, A's mean tail beyond B's K; A's own is used otherwise.
      b_beyond: the same the other way round.

    Returns:
      Agreement, bounds and estimates, both ways.
    """
    vocab_size = len(a.prior.pi_V)
    a_in_b, a_draws_in_b = find_in_head(b.targets.token_ids, [a.targets.token_ids, a.targets.tail_samples], vocab_size)
    b_in_a, b_draws_in_a = find_in_head(a.targets.token_ids, [b.targets.token_ids, b.targets.tail_samples], vocab_size)
    return PairTerms(
        agree_T=a.targets.token_ids[:, 0] == b.targets.token_ids[:, 0],
        a_to_b=_directed(a, b, a_in_b, b_in_a, a_draws_in_b, a_beyond),
        b_to_a=_directed(b, a, b_in_a, a_in_b, b_draws_in_a, b_beyond),
    )


def _directed(
    a: View, b: View, a_in_b_TK: Ranks, b_in_a_TK: Ranks, draws_in_b_Tm: Ranks, beyond: Prior | None
) -> DirectedTerms:
    shared_TK = a_in_b_TK >= 0
    log_q_TK = b.filled.log_q(a.targets.token_ids, a_in_b_TK)
    terms_TK = a.p_TK * (a.logp_TK - log_q_TK)
    on_shared_T: Floats = np.einsum("tk,tk->t", terms_TK, shared_TK)
    prior_estimate_T = terms_TK.sum(axis=1) + _on_tail(a, b, b_in_a_TK, draws_in_b_Tm)
    return DirectedTerms(
        bound_T=on_shared_T + _on_other_atoms(a, b, ~shared_TK, b_in_a_TK < 0),
        prior_estimate_T=prior_estimate_T,
        estimate_T=prior_estimate_T - _self_estimate(a, b, ~shared_TK, draws_in_b_Tm, beyond),
    )


def _gather(values_TK: Floats, ranks_TJ: Ranks) -> Floats:
    """[T, J] the values at some ranks of each row; an arbitrary one where the rank is -1."""
    num, width = values_TK.shape
    flat_TJ = ranks_TJ + (np.arange(num) * width)[:, None]
    # Rank -1 of a row is the last of the row before it (and of the first row, the last of all).
    gathered_TJ: Floats = np.take(values_TK.reshape(-1), flat_TJ, mode="wrap")
    return gathered_TJ


def _on_other_atoms(a: View, b: View, only_a_TK: Bools, only_b_TK: Bools) -> Floats:
    """[T] the part of the bound on y, where it is not in both heads, and on everything else."""
    p_y_T, a_left_T = _tail_without_target(a)
    _, b_left_T = _tail_without_target(b)
    own_T = a.target_in_tail_T | b.target_in_tail_T
    own_T &= (a_left_T > _RESOLVED * a.tail_T) | ~a.target_in_tail_T
    own_T &= (b_left_T > _RESOLVED * b.tail_T) | ~b.target_in_tail_T
    p_rest_T = _rest(a, only_a_TK, own_T, a_left_T)
    q_rest_T = _rest(b, only_b_TK, own_T, b_left_T)
    log_p_y_T = np.where(own_T, _log_target(a), 0.0)
    log_q_y_T = np.where(own_T, _log_target(b), 0.0)
    on_target_T = np.where(own_T, p_y_T * (log_p_y_T - log_q_y_T), 0.0)
    # An atom whose q underflows is taken to have the smallest float64, which can only lower the bound.
    ratio_T = np.log(np.maximum(p_rest_T, _SMALLEST)) - np.log(np.maximum(q_rest_T, _SMALLEST))
    return on_target_T + np.where(p_rest_T > 0, p_rest_T * ratio_T, 0.0)


def _log_target(view: View) -> Floats:
    """[T] log-probability of y as the distribution's own parts have it: from the head if it is there."""
    in_head_T = np.take_along_axis(view.logp_TK, np.maximum(view.target_rank_T, 0)[:, None], axis=1)[:, 0]
    return np.where(view.target_in_tail_T, view.log_target_T, in_head_T)


def _tail_without_target(view: View) -> tuple[Floats, Floats]:
    """[T] the probability of y, and what is left of the tail without y if it lies there."""
    p_y_T = np.exp(_log_target(view))
    return p_y_T, view.tail_T - np.where(view.target_in_tail_T, p_y_T, 0.0)


def _rest(view: View, only_TK: Bools, own_T: Bools, left_T: Floats) -> Floats:
    """[T] mass of tokens that are not in both heads; without y where that is an atom of its own."""
    only_TK = only_TK.copy()
    t = np.flatnonzero(own_T & ~view.target_in_tail_T)
    only_TK[t, view.target_rank_T[t]] = False
    rest_T: Floats = np.einsum("tk,tk->t", view.p_TK, only_TK) + np.where(own_T, left_T, view.tail_T)
    return rest_T


class _Filled:
    """A teacher's log-probabilities of all tokens: exact in its head and for y, from its mean tail otherwise."""

    def __init__(self, b: View) -> None:
        self._b = b
        _, left_T = _tail_without_target(b)
        magnitude_T = 1.0 + np.abs(np.log(np.maximum(b.tail_T, _SMALLEST))) + np.abs(b.log_target_T)
        left_T = np.maximum(left_T, _ROUNDING * magnitude_T * b.tail_T)  # no smaller than rounding can tell
        self.y_T = np.where(b.target_in_tail_T, b.true_next_T, -1)
        outside_T = b.prior.sum_outside(b.prior.pi_V, b.targets.token_ids, self.y_T)
        self.scale_T: Floats = np.log(np.maximum(left_T, _SMALLEST)) - np.log(np.maximum(outside_T, _SMALLEST))

    def log_q(self, ids_TJ: NDArray[np.int32], ranks_TJ: Ranks | None) -> Floats:
        """Log-probability of any tokens.

        Args:
          ids_TJ: [T, J] token ids.
          ranks_TJ: [T, J] where they stand in B's head, -1 outside; none where all lie outside.
        """
        b = self._b
        log_q_TJ: Floats = np.take(b.prior.log_pi_V, ids_TJ)
        log_q_TJ += self.scale_T[:, None]
        np.copyto(log_q_TJ, b.log_target_T[:, None], where=ids_TJ == self.y_T[:, None])
        if ranks_TJ is not None:
            np.copyto(log_q_TJ, _gather(b.logp_TK, ranks_TJ), where=ranks_TJ >= 0)
        return log_q_TJ


def _on_tail(a: View, b: View, b_in_a_TK: Ranks | None, draws_in_b_Tm: Ranks | None) -> Floats:
    """[T] the prior estimate's sum over A's tail; ranks as for ``log_q``, none where nothing of one is in the other."""
    if a.targets.tail_samples.shape[1]:
        mean_log_q_T = b.filled.log_q(a.targets.tail_samples, draws_in_b_Tm).mean(axis=1)
    else:
        mean_log_q_T = _mean_log_q_of_average(a, b, b_in_a_TK)
    has_tail_T = a.tail_T > 0
    on_tail_T = a.tail_T * (np.where(has_tail_T, a.targets.log_tail, 0.0) - a.targets.tail_entropy - mean_log_q_T)
    part_T: Floats = np.where(has_tail_T, on_tail_T, 0.0)
    return part_T


def _mean_log_q_of_average(a: View, b: View, b_in_a_TK: Ranks | None) -> Floats:
    """[T] the mean of log q over A's tail where that is A's mean tail: no draws were stored."""
    pi_V, log_pi_b_V, scale_T = a.prior.pi_V, b.prior.log_pi_V, b.filled.scale_T
    none_T = np.full(len(a.tail_T), -1)
    mass_T = a.prior.sum_outside(pi_V, a.targets.token_ids, none_T)
    total_T = a.prior.sum_outside(pi_V * log_pi_b_V, a.targets.token_ids, none_T) + scale_T * mass_T
    t, k = np.nonzero(b_in_a_TK < 0) if b_in_a_TK is not None else (np.zeros(0, np.int64),) * 2
    ids = b.targets.token_ids[t, k]
    gain = np.take(pi_V, ids) * (b.logp_TK[t, k] - scale_T[t] - np.take(log_pi_b_V, ids))
    total_T += np.bincount(t, gain, minlength=len(total_T))
    t = np.flatnonzero(a.target_in_tail_T & b.target_in_tail_T)
    y = a.true_next_T[t]
    total_T[t] += pi_V[y] * (b.log_target_T[t] - scale_T[t] - log_pi_b_V[y])
    return np.where(mass_T > 0, total_T / np.maximum(mass_T, _SMALLEST), 0.0)


def _self_estimate(a: View, b: View, only_a_TK: Bools, draws_in_b_Tm: Ranks, beyond: Prior | None) -> Floats:
    """[T] what the prior estimate would say of KL(A‖A), whose truth is 0, with only as many tokens known as B keeps."""
    k_a, k_b = a.targets.token_ids.shape[1], b.targets.token_ids.shape[1]
    if k_b < k_a and beyond is not None:
        known = a.head_only(k_b, beyond)
        log_q_TK = known.filled.log_q(a.targets.token_ids[:, k_b:], None)
        on_head_T: Floats = np.einsum("tk,tk->t", a.p_TK[:, k_b:], a.logp_TK[:, k_b:] - log_q_TK)
        return on_head_T + _on_tail(a, known, None, None)
    if k_b <= k_a:
        return _on_tail(a, a, None, None)
    # B keeps more tokens, so nothing of A's tells what is beyond them. What B's own tail is off by, for its mass, is
    # charged to the mass that A has there.
    outside_T: Floats = np.einsum("tk,tk->t", a.p_TK, only_a_TK)
    if draws_in_b_Tm.shape[1]:
        outside_T += a.tail_T * (draws_in_b_Tm < 0).mean(axis=1)
    else:
        outside_T += np.where(b.tail_T > 0, a.tail_T, 0.0)
    scaled_T: Floats = _on_tail(b, b, None, None) * outside_T / np.maximum(b.tail_T, _SMALLEST)
    return scaled_T
