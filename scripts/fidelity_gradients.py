"""Gradients of a student's head, pooled over positions, from all of the teacher and from what a cache keeps of it.

The head's gradient is dW = sum_t g_t (x) h_t, [V, D], with g_t the loss' gradient at the logits: of KL q - p; of TAD,
split at K',

    q_i - p_i                                              on the teacher's top K',
    q_i - p_i + (beta(X) - 1) (q_i alpha / alpha_S - p_i)  beyond.

The student's side is always exact, so what is made of the tail beyond K changes dW by no more than

    E = sum_t beta_t (p_t - its stand-in) (x) h_t    over the ids beyond the top K,

with beta_t = 1 for KL and beta(X) for TAD. (Renormalising changes the head too, and with it alpha and beta(X).)
Dense sums are matrix products over chunks of positions. Everything else is sparse: a few ids per position, added up row
by row. So one pass over [T, V] serves all K, all numbers of draws and all schemes. Products are float32; norms
and inner products of matrices are summed in float64 over their rows.

Legend: T positions, V vocabulary, D hidden width of the student, K kept, m draws, U different ids, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tailcache.scripts.fidelity_schemes import Draws, Tails

__all__ = ["Error", "Exact", "Pool", "Problem", "Scatter", "Student", "Weighting", "pools"]

_ROWS = 512  # of a [V, D] matrix that are looked at at a time, so that they stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """A loss, as far as the tail is concerned.

    Attributes:
      name: KL or TAD.
      split: K', or None for KL.
      beta: [T] float32, beta(X); ones for KL.
    """

    name: str
    split: int | None
    beta: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The teacher's side of T positions, in the order in which they are pooled.

    Attributes:
      tails: the distributions in short, of R >= K + m ranks.
      next_T: [T] int64, the true next token.
      next_p: [T] float64, its probability.
      weightings: by (loss, K).
      renormalised_beta: by K: [T] beta(X) of TAD where the top K are taken for all there is.
      mean_tail: by K: [V] mean of the normalised tails.
      teacher: rows of the pooled order to [t, V] float32 probabilities.
      rounded: the same from rounded hidden states; none where that is left out.
    """

    tails: Tails
    next_T: Tensor
    next_p: Tensor
    weightings: Mapping[tuple[str, int], Weighting]
    renormalised_beta: Mapping[int, Tensor]
    mean_tail: Mapping[int, Tensor]
    teacher: Callable[[slice], Tensor]
    rounded: Callable[[slice], Tensor] | None = None

    @property
    def top_ks(self) -> list[int]:
        """The numbers of kept ids to be compared."""
        return sorted({k for _, k in self.weightings})

    def known(self, top_k: int) -> Tensor:
        """[T] float64: p of the true next token where it is beyond the top K, else 0."""
        return self.next_p.masked_fill((self.tails.ids[:, :top_k] == self.next_T[:, None]).any(-1), 0.0)

    def renormalised_change(self, weighting: Weighting, top_k: int, rows: slice) -> Tensor:
        """[t] float64: (beta'(X) - 1) alpha' - (beta(X) - 1) alpha, with ' for the renormalised teacher.

        TAD multiplies the student's tail beyond K' by 1 + (beta(X) - 1) alpha / alpha_S, so another alpha changes that.
        """
        assert weighting.split is not None
        p_tK = self.tails.p[rows, :top_k]
        alpha_t = p_tK[:, weighting.split :].sum(-1) / p_tK.sum(-1)
        exact_t = (weighting.beta[rows] - 1) * self.tails.mass[rows, weighting.split]
        return (self.renormalised_beta[top_k][rows] - 1) * alpha_t - exact_t


@dataclass(frozen=True, kw_only=True)
class Student:
    """The student's side of the same positions.

    Attributes:
      hidden_TD: [T, D] float32, what its head is multiplied with.
      probabilities: rows to [t, V] float32.
    """

    hidden_TD: Tensor
    probabilities: Callable[[slice], Tensor]


@dataclass(frozen=True, kw_only=True)
class Error:
    """How far an estimate of a gradient is from the exact one.

    Attributes:
      relative: |estimate - exact| / |exact|, Frobenius.
      cosine: of the two.
      norm: |estimate - exact| itself.
    """

    relative: float
    cosine: float
    norm: float


class Scatter:
    """Sums over positions into the rows of a [V, D] matrix: sum_t sum_j weight_tj h_t into row id_tj.

    Args:
      ids_Tn: [T, n] int64.

    Cost: one sort of T n ids; then each set of weights is one pass over T n rows of D.
    """

    def __init__(self, ids_Tn: Tensor) -> None:
        ids, self._order = ids_Tn.reshape(-1).sort()
        self.rows, counts = torch.unique_consecutive(ids, return_counts=True)
        self._offsets = counts.cumsum(0) - counts
        self._position = self._order // ids_Tn.shape[1]

    def sums(self, weights_Tn: Tensor, hidden_TD: Tensor) -> Tensor:
        """[U, D] sums of the rows ``rows``."""
        weights = weights_Tn.to(hidden_TD.dtype).reshape(-1)[self._order]
        return torch.nn.functional.embedding_bag(
            self._position, hidden_TD, self._offsets, mode="sum", per_sample_weights=weights
        )


class Exact:
    """The exact gradient of one pool, and a part of it that estimates replace.

    Args:
      gradient_VD: the exact gradient.
      part_VD: what is to be replaced: sum_t beta_t p_t (x) h_t beyond the top K.
    """

    def __init__(self, gradient_VD: Tensor, part_VD: Tensor) -> None:
        self.gradient, self.part = gradient_VD, part_VD
        self._gradient_square = float(_row_products(gradient_VD, gradient_VD).sum())
        self._squares_V = _row_products(part_VD, part_VD)
        self._products_V = _row_products(part_VD, gradient_VD)

    def sparse(self, rows_U: Tensor, sums_UD: Tensor) -> Error:
        """The error of an estimate that has the given rows in the place of the part."""
        square = float(self._squares_V.sum() - self._squares_V[rows_U].sum())
        product = float(self._products_V.sum() - self._products_V[rows_U].sum())
        for rows, sums in zip(torch.split(rows_U, _ROWS), torch.split(sums_UD, _ROWS), strict=True):
            error = self.part[rows] - sums
            square += float(_row_products(error, error).sum())
            product += float(_row_products(error, self.gradient[rows]).sum())
        return self._error(square, product)

    def dense(self, error_VD: Tensor) -> Error:
        """The error of an estimate that is the exact gradient plus the given matrix."""
        return self._error(
            float(_row_products(error_VD, error_VD).sum()), float(_row_products(error_VD, self.gradient).sum())
        )

    def _error(self, square: float, product: float) -> Error:
        exact = self._gradient_square
        estimate = max(exact + 2 * product + square, 0.0)
        cosine = (exact + product) / (exact * estimate) ** 0.5 if exact * estimate > 0 else 0.0
        return Error(relative=(square / exact) ** 0.5, cosine=cosine, norm=square**0.5)


def _row_products(first_VD: Tensor, second_VD: Tensor) -> Tensor:
    """[V] float64: the inner products of rows, each summed in the matrices' own precision."""
    blocks = zip(torch.split(first_VD, _ROWS), torch.split(second_VD, _ROWS), strict=True)
    return torch.cat([(first * second).sum(-1) for first, second in blocks]).double()


@dataclass(kw_only=True)
class Pool:
    """The sums over the first ``num`` positions, and the errors that follow from them.

    Attributes:
      problem: the teacher's side.
      student: the student's.
      num: positions so far.
      sums: dense sums by name, [V, D] each.
      student_head: [T, R'] q at the teacher's most likely ids, filled up to ``num``.
      student_mass: by K: [T] q beyond the teacher's top K.
      rounded_head: [T, R'] the rounded teacher's p at the same ids.
      rounded_mass: [T] its mass beyond the largest K.
    """

    problem: Problem
    student: Student
    num: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    student_head: Tensor = field(default_factory=lambda: torch.empty(0))
    student_mass: dict[int, Tensor] = field(default_factory=dict)
    rounded_head: Tensor = field(default_factory=lambda: torch.empty(0))
    rounded_mass: Tensor = field(default_factory=lambda: torch.empty(0))
    _wide: dict[str, Tensor] = field(default_factory=dict)

    def grow(self, num: int) -> None:
        """Add the positions up to ``num``."""
        problem, rows = self.problem, slice(self.num, num)
        largest = problem.top_ks[-1]
        ids_tK = problem.tails.ids[rows, :largest]
        hidden_tD = self.student.hidden_TD[rows]
        mass_tR = problem.tails.mass[rows].to(hidden_tD.dtype)
        p_tV, q_tV = problem.teacher(rows), self.student.probabilities(rows)
        weightings = {_name("", w): w for w in problem.weightings.values()}.values()

        head_tK, beyond_t = q_tV.gather(-1, ids_tK), q_tV.scatter(-1, ids_tK, 0.0).sum(-1)
        self.student_head = torch.cat([self.student_head, head_tK])
        mass = {}
        for top_k in {*problem.top_ks, *(w.split for w in weightings if w.split is not None)}:
            mass[top_k] = head_tK[:, top_k:].sum(-1) + beyond_t
            self.student_mass[top_k] = torch.cat([self.student_mass.get(top_k, beyond_t[:0]), mass[top_k]])

        difference_tV = q_tV - p_tV
        for weighting in weightings:
            gradient_tV = difference_tV
            if weighting.split is not None:
                ratio_t = mass_tR[:, weighting.split] / mass[weighting.split]
                more_tV = (ratio_t[:, None] * q_tV).sub_(p_tV).mul_(weighting.beta[rows, None] - 1)
                gradient_tV = more_tV.scatter_(-1, ids_tK[:, : weighting.split], 0.0).add_(difference_tV)
            self._product(gradient_tV, {_name("g", weighting): torch.ones_like(weighting.beta[rows])}, hidden_tD)
        self._product(p_tV, {_name("p", w): w.beta[rows] for w in weightings}, hidden_tD)

        scales = {}
        for (_, top_k), weighting in problem.weightings.items():
            scales[_name("bucket", weighting, top_k)] = weighting.beta[rows] * mass_tR[:, top_k] / mass[top_k]
            if weighting.split is not None:
                change_t = (
                    problem.renormalised_change(weighting, top_k, rows).to(hidden_tD.dtype) / mass[weighting.split]
                )
                scales[_name("renormalised", weighting, top_k)] = change_t
        self._product(q_tV, scales, hidden_tD)

        if problem.rounded is not None:
            rounded_tV = problem.rounded(rows)
            head_tK, beyond_t = rounded_tV.gather(-1, ids_tK), rounded_tV.scatter(-1, ids_tK, 0.0).sum(-1)
            self.rounded_head = torch.cat([self.rounded_head, head_tK])
            self.rounded_mass = torch.cat([self.rounded_mass, beyond_t])
            scales = {
                _name("hidden", w): w.beta[rows] * mass_tR[:, largest] / beyond_t
                for (_, top_k), w in problem.weightings.items()
                if top_k == largest
            }
            self._product(rounded_tV, scales, hidden_tD)
        self.num = num

    def _product(self, values_tV: Tensor, scales: Mapping[str, Tensor], hidden_tD: Tensor) -> None:
        """Add values^T (scale * hidden) to the sum of each name; one wide product for all of them."""
        width = hidden_tD.shape[1]
        wide_tN = torch.cat([scale_t[:, None] * hidden_tD for scale_t in scales.values()], dim=-1)
        key = " | ".join(scales)
        if key not in self._wide:
            self._wide[key] = wide_tN.new_zeros((values_tV.shape[1], wide_tN.shape[1]))
            for index, name in enumerate(scales):
                self.sums[name] = self._wide[key][:, index * width : (index + 1) * width]
        self._wide[key].addmm_(values_tV.t(), wide_tN)

    def exact(self, loss: str, top_k: int) -> Exact:
        """The exact gradient, and its part beyond the top K."""
        weighting = self.problem.weightings[loss, top_k]
        return Exact(self.sums[_name("g", weighting)], self._tail(weighting, top_k))

    def _tail(self, weighting: Weighting, top_k: int) -> Tensor:
        return self._without_head(_name("p", weighting), top_k, weighting.beta, self.problem.tails.p)

    def _without_head(self, name: str, top_k: int, weight_T: Tensor, head_TR: Tensor) -> Tensor:
        """A dense sum without what the top K of each position put into it."""
        weights = weight_T[: self.num, None] * head_TR[: self.num, :top_k]
        return self._add(self.sums[name].clone(), slice(0, top_k), -weights)

    def _add(self, matrix_VD: Tensor, ranks: slice, weights_Tn: Tensor) -> Tensor:
        """Add weights at the ids of some ranks, in place."""
        if weights_Tn.shape[1]:
            scatter = Scatter(self.problem.tails.ids[: self.num, ranks])
            matrix_VD.index_add_(0, scatter.rows, scatter.sums(weights_Tn, self._hidden))
        return matrix_VD

    @property
    def _hidden(self) -> Tensor:
        return self.student.hidden_TD[: self.num]

    def sampled(self, exacts: Mapping[str, Exact], top_k: int, draws: Draws, seed: int) -> dict[str, Error]:
        """Errors by loss with draws in the place of the tail."""
        ids_Tm, weights_Tm = draws.of(seed)
        return self._sparse(exacts, top_k, ids_Tm[: self.num], weights_Tm[: self.num])

    def known_target(self, exacts: Mapping[str, Exact], top_k: int, draws: Draws, seed: int) -> dict[str, Error]:
        """The same with the exact p of the true next token, where it is beyond the top K, in the place of its draws."""
        ids_Tm, weights_Tm = (values[: self.num] for values in draws.of(seed))
        next_T1 = self.problem.next_T[: self.num, None]
        known_T = self.problem.known(top_k)[: self.num].to(weights_Tm.dtype)
        ids = torch.cat([ids_Tm, next_T1], dim=-1)
        weights = torch.cat([weights_Tm.masked_fill(ids_Tm == next_T1, 0.0), known_T[:, None]], dim=-1)
        return self._sparse(exacts, top_k, ids, weights)

    def _sparse(self, exacts: Mapping[str, Exact], top_k: int, ids_Tn: Tensor, weights_Tn: Tensor) -> dict[str, Error]:
        scatter = Scatter(ids_Tn)
        found = {}
        for loss, exact in exacts.items():
            beta_T = self.problem.weightings[loss, top_k].beta[: self.num]
            found[loss] = exact.sparse(scatter.rows, scatter.sums(beta_T[:, None] * weights_Tn, self._hidden))
        return found

    def bucket(self, exact: Exact, loss: str, top_k: int) -> Error:
        """One atom for the tail, shared out as the student's own."""
        weighting = self.problem.weightings[loss, top_k]
        mass_T = self.problem.tails.mass[: self.num, top_k].to(self._hidden.dtype)
        scale_T = weighting.beta[: self.num] * mass_T / self.student_mass[top_k]
        return exact.dense(
            exact.part - self._without_head(_name("bucket", weighting, top_k), top_k, scale_T, self.student_head)
        )

    def prior(self, exact: Exact, loss: str, top_k: int) -> Error:
        """The mean tail in the place of each tail."""
        tails, prior_V = self.problem.tails, self.problem.mean_tail[top_k]
        taken_TK = prior_V[tails.ids[: self.num, :top_k]]
        scale_T = self.problem.weightings[loss, top_k].beta[: self.num] * tails.mass[: self.num, top_k]
        scale_T = (scale_T / (prior_V.sum() - taken_TK.sum(-1))).to(prior_V.dtype)
        fill_VD = torch.outer(prior_V, scale_T @ self._hidden.to(prior_V.dtype)).to(self._hidden.dtype)
        self._add(fill_VD, slice(0, top_k), -scale_T[:, None] * taken_TK)
        return exact.dense(exact.part - fill_VD)

    def renormalised(self, exact: Exact, loss: str, top_k: int) -> Error:
        """The top K, divided by their mass, taken for all there is."""
        tails, num = self.problem.tails, self.num
        weighting = self.problem.weightings[loss, top_k]
        p_TK = tails.p[:num, :top_k]
        share_TK = p_TK / p_TK.sum(-1, keepdim=True)
        if weighting.split is None:
            return exact.dense(self._add(exact.part.clone(), slice(0, top_k), p_TK - share_TK))
        split = weighting.split
        # The student's tail has another weight too, since alpha and beta(X) are those of the renormalised teacher.
        beta_T = self.problem.renormalised_beta[top_k][:num]
        change_T = self.problem.renormalised_change(weighting, top_k, slice(num)) / self.student_mass[split]
        error_VD = self._tail(weighting, split)
        error_VD += self._without_head(_name("renormalised", weighting, top_k), split, change_T, self.student_head)
        self._add(error_VD, slice(0, split), (p_TK - share_TK)[:, :split])
        self._add(error_VD, slice(split, top_k), -beta_T[:, None] * share_TK[:, split:])
        return exact.dense(error_VD)

    def from_hidden(self, exact: Exact, loss: str, top_k: int) -> Error:
        """The rounded teacher's tail, scaled to the stored mass, in the place of the tail; top_k is the largest K."""
        weighting = self.problem.weightings[loss, top_k]
        mass_T = self.problem.tails.mass[: self.num, top_k].to(self._hidden.dtype)
        scale_T = weighting.beta[: self.num] * mass_T / self.rounded_mass
        return exact.dense(
            exact.part - self._without_head(_name("hidden", weighting), top_k, scale_T, self.rounded_head)
        )

    def unsplit(self, ids_Tn: Tensor, weights_Tn: Tensor) -> Error:
        """The error for KL of a sparse stand-in for the whole distribution, not for its tail alone."""
        weighting = self.problem.weightings["KL", self.problem.top_ks[-1]]
        exact = Exact(self.sums[_name("g", weighting)], self.sums[_name("p", weighting)])
        scatter = Scatter(ids_Tn[: self.num])
        return exact.sparse(scatter.rows, scatter.sums(weights_Tn[: self.num], self._hidden))


def _name(kind: str, weighting: Weighting, top_k: int | None = None) -> str:
    return f"{kind} {weighting.name} {weighting.split} {top_k}"


def pools(problem: Problem, student: Student, sizes: tuple[int, ...], *, chunk: int = 512) -> Iterator[Pool]:
    """Accumulate over positions, and hand the sums over at each size.

    Args:
      problem: the teacher's side.
      student: the student's.
      sizes: numbers of positions, increasing.
      chunk: positions whose [t, V] exist at a time.

    Yields:
      The same pool, grown; it is to be used before the next one is asked for.
    """
    pool = Pool(problem=problem, student=student)
    for size in sizes:
        while pool.num < size:
            pool.grow(min(size, pool.num + chunk))
        yield pool
