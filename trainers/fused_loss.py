"""A loss straight from the student's hidden states, at the cost of cross-entropy.

Two modes of the same sum, see ``fused_loss``:

- **one-pass**: some positions at a time, the whole vocabulary. The loss of those positions, and its gradient with
  respect to their terms, is worked out as soon as their logits exist, so the gradients of the hidden states and of
  the head are made in the forward: 6 T V D operations, what a fused cross-entropy takes. The head's gradient is held
  from forward to backward.
- **recompute**: ``fused_head`` and ordinary autograd on its terms: 8 T V D operations, and nothing is held.

``chunked_loss`` is for losses that need whole rows of logits beside whole rows of the teacher's: one-pass too, with
autograd inside a piece.

Legend: T positions, c positions of a piece, V vocabulary, W rows of the head (>= V), D hidden width, E excluded ids, G
gathered ids, F fills, n temperatures, P parts of a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.trainers.fused_head import (
    SECOND_DERIVATIVE,
    check_head,
    fill_matrix,
    fill_means,
    fused_head,
    rest_masses,
    sum_factors,
)
from tailcache.trainers.linear_head import LinearHead, LogitTiles, buffer_bytes, tiles_of, vocabulary_tiles
from tailcache.trainers.products import add_product, compute_dtype, wide_dtype
from tailcache.trainers.terms import HeadTerms, StudentTerms, TeacherTerms, terms_from_head, wanted_ids

__all__ = ["LossOfLogits", "LossOfTerms", "Mode", "TiledSum", "chunked_loss", "fused_loss", "piece_height"]

Mode = Literal["one-pass", "recompute"]
LossOfTerms = Callable[[slice, TeacherTerms, StudentTerms], Tensor]
LossOfLogits = Callable[[slice, Tensor], Tensor]

BLOCK_BYTES = 64 << 20
"""Of the blocks that a sum wider than the weight is held in."""

_AGAIN = (
    "fused loss: expected one backward of a one-pass loss, found a second (retain_graph=True); its gradients were made "
    "in the forward and are given away: run the forward again, or use fused_loss with mode='recompute'"
)


def fused_loss(
    hidden_TD: Tensor,
    head: LinearHead,
    teacher: TeacherTerms,
    loss: LossOfTerms,
    coefficients_P: Tensor,
    *,
    mode: Mode = "one-pass",
    fills: Mapping[str, Tensor] | None = None,
    temperatures: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """A loss that is a function of terms, from hidden states: sum over positions and parts of coefficient * part.

    Args:
      hidden_TD: [T, D] the head's input at the target positions.
      head: the head.
      teacher: the targets of the same positions.
      loss: called with a slice of the positions and both sides' terms of them, autocast off; returns [c, P], nats per
        position. It must be a function of those terms alone: whatever else it uses is a constant (a one-pass loss
        sends no gradient there), and what all positions decide together is worked out before.
      coefficients_P: [P] constants.
      mode: see the module.
      fills: [V] weights by name; see ``student_terms``.
      temperatures: further temperatures; see ``student_terms``.

    Returns:
      The total, a scalar that can be differentiated once, with respect to hidden states, weight and bias; and the
      parts [T, P], which cannot, as the loss returned them. The total is float32 (float64 if hidden states or weight
      are).

    Raises:
      MismatchError: shapes that do not belong together.
      ConfigError: no such mode.
      RuntimeError: in the backward, if it is differentiated twice, or a one-pass loss is run backward twice.

    Cost: one-pass: 6 T V D operations, the buffer of logits, and the gradients from forward to backward. Without
    gradients, 2 T V D and the buffer. Recompute: see ``fused_head``.
    """
    fills = fills or {}
    if mode == "recompute":
        terms = fused_head(hidden_TD, head, teacher, fills=fills, temperatures=temperatures)
        with torch.autocast(device_type=hidden_TD.device.type, enabled=False):
            student = terms_from_head(terms, teacher, fills=fills, temperatures=temperatures)
            values_TP = loss(slice(0, len(teacher)), teacher, student)
            total = _total(values_TP, coefficients_P, len(teacher))
        return total.to(terms.gathered.dtype), values_TP.detach()
    if mode != "one-pass":
        raise ConfigError(f"mode: expected 'one-pass' or 'recompute', found {mode!r}")
    check_head(hidden_TD, head, teacher)
    wide = wide_dtype(compute_dtype(hidden_TD, head.weight))
    fills_FV = fill_matrix(fills, hidden_TD, head.vocab_size, wide)

    def piece(rows: slice, logits_cV: Tensor, wanted: bool) -> _Piece:
        part = teacher.rows(rows)
        reduced = _Reduced(logits_cV, part, fills_FV, temperatures)
        with torch.set_grad_enabled(wanted):
            terms = reduced.head_terms(rest_masses(fills, part, wide), wanted)
            values_cP = loss(rows, part, terms_from_head(terms, part, fills=fills, temperatures=temperatures))
            total = _total(values_cP, coefficients_P, len(part))
        return _Piece(values_cP.detach(), total.detach(), reduced.gradient(total) if wanted else None)

    return _run(hidden_TD, head, piece, buffers=1 + len(temperatures) + (head.soft_cap is not None))


def chunked_loss(
    hidden_TD: Tensor, head: LinearHead, loss: LossOfLogits, coefficients_P: Tensor, *, num_buffers: int = 8
) -> tuple[Tensor, Tensor]:
    """A loss that needs whole rows of logits, some positions at a time, with autograd inside each piece.

    Args:
      hidden_TD: [T, D] the head's input at the target positions.
      head: the head.
      loss: called with a slice of the positions and their logits [c, V] (float32 or float64), autocast off; returns
        [c, P], nats per position. It must be a function of those logits alone: whatever else it uses is a constant.
      coefficients_P: [P] constants.
      num_buffers: how many [c, V] tensors the loss is expected to hold; decides c.

    Returns:
      The total, a scalar that can be differentiated once, with respect to hidden states, weight and bias; and the
      parts [T, P], which cannot.

    Raises:
      MismatchError: shapes that do not belong together.
      RuntimeError: in the backward, if it is differentiated or run twice.

    Cost: as a one-pass ``fused_loss``, and what the loss itself takes.
    """
    if hidden_TD.dim() != 2 or hidden_TD.shape[1] != head.weight.shape[1]:
        raise MismatchError(
            f"chunked loss: expected hidden states [T, {head.weight.shape[1]}], found {list(hidden_TD.shape)}"
        )

    def piece(rows: slice, logits_cV: Tensor, wanted: bool) -> _Piece:
        with torch.set_grad_enabled(wanted):
            values_cP = loss(rows, logits_cV.requires_grad_(wanted))
            total = _total(values_cP, coefficients_P, len(logits_cV))
        gradient_cV = gradients_of(total, [logits_cV])[0] if wanted else None
        # The values may be a view of the logits, whose buffer the next piece takes.
        return _Piece(values_cP.detach().clone(), total.detach(), gradient_cV)

    return _run(hidden_TD, head, piece, buffers=num_buffers)


def _total(values_cP: Tensor, coefficients_P: Tensor, num: int) -> Tensor:
    """The sum over positions and parts; what would only fit by being broadcast is refused."""
    if coefficients_P.dim() != 1 or values_cP.shape != (num, len(coefficients_P)):
        raise MismatchError(
            f"fused loss: expected [{num} positions, {coefficients_P.numel()} parts] from the loss, one part for each "
            f"coefficient, found {list(values_cP.shape)} and coefficients {list(coefficients_P.shape)}"
        )
    return (values_cP * coefficients_P.to(values_cP.dtype)).sum()


@dataclass(frozen=True)
class _Piece:
    """The loss of some positions.

    Attributes:
      values: [c, P].
      total: scalar.
      gradient: [c, V] of the total with respect to the logits, not to be written to (it may be one number, expanded);
        None where it was not wanted.
    """

    values: Tensor
    total: Tensor
    gradient: Tensor | None


def gradients_of(total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar, zeros where it does not depend on a leaf."""
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


class _Reduced:
    """The reduction of some rows of logits, in place, and the way back from the gradient of its results."""

    def __init__(
        self, logits_cV: Tensor, teacher: TeacherTerms, fills_FV: Tensor, temperatures: Sequence[float]
    ) -> None:
        self._temperatures, self._fills_FV = [1.0, *temperatures], fills_FV
        self._excluded, self._gathered = wanted_ids(teacher)
        gathered_cG = logits_cV.gather(-1, self._gathered)
        fill_sums_cF = logits_cV.new_empty((len(logits_cV), 0))
        if len(fills_FV):
            logits_cV.scatter_(-1, self._excluded, 0.0)
            fill_sums_cF = logits_cV @ fills_FV.t()
        logits_cV.scatter_(-1, self._excluded, -torch.inf)
        self._largest_c = logits_cV.amax(-1)
        offset_c1 = self._largest_c.masked_fill(self._largest_c == -torch.inf, 0.0)[:, None]
        self._exponentials = [logits_cV, *(torch.empty_like(logits_cV) for _ in temperatures)]
        self._sums_cn = logits_cV.new_zeros((len(logits_cV), len(self._temperatures)))
        for tile in vocabulary_tiles(logits_cV.shape[1]):
            shifted_cv = logits_cV[:, tile].sub_(offset_c1)
            for at, temperature in enumerate(temperatures, start=1):
                further_cv = torch.div(shifted_cv, temperature, out=self._exponentials[at][:, tile])
                self._sums_cn[:, at] += further_cv.exp_().sum(-1)
            self._sums_cn[:, 0] += shifted_cv.exp_().sum(-1)
        self._leaves = [self._sums_cn.log(), gathered_cG, fill_sums_cF]

    def head_terms(self, masses_cF: Tensor, wanted: bool) -> HeadTerms:
        log_sums_cn, gathered_cG, fill_sums_cF = (leaf.requires_grad_(wanted) for leaf in self._leaves)
        return HeadTerms(
            log_sum_rest=log_sums_cn,
            largest_rest=self._largest_c,
            gathered=gathered_cG,
            fill_means=fill_means(fill_sums_cF, masses_cF),
        )

    def gradient(self, total: Tensor) -> Tensor:
        """[c, V] the gradient of the total with respect to the logits, in the logits' own memory."""
        grad_sums_cn, grad_gathered_cG, grad_fills_cF = gradients_of(total, self._leaves)
        factors_cn = sum_factors(grad_sums_cn, self._sums_cn, self._temperatures)
        gradient_cV = self._exponentials[0].mul_(factors_cn[:, :1])
        for at in range(1, len(self._temperatures)):
            gradient_cV.addcmul_(self._exponentials[at], factors_cn[:, at, None])
        if len(self._fills_FV):
            gradient_cV.addmm_(grad_fills_cF, self._fills_FV)
            gradient_cV.scatter_(-1, self._excluded, 0.0)
        return gradient_cV.scatter_add_(-1, self._gathered, grad_gathered_cG)


def piece_height(device: torch.device, row_bytes: int, most: int) -> int:
    """Positions whose whole rows of logits exist at a time."""
    return max(1, min(most, buffer_bytes(device) // row_bytes))


def _run(
    hidden_TD: Tensor, head: LinearHead, piece: Callable[[slice, Tensor, bool], _Piece], buffers: int
) -> tuple[Tensor, Tensor]:
    """Apply ``_OnePass``; a compiled caller breaks its graph here, since the loss is called inside."""
    dtype = compute_dtype(hidden_TD, head.weight)
    disable: Any = torch.compiler.disable
    total, values_TP = disable(_OnePass.apply)(
        hidden_TD, head.weight, head.bias, head, piece, buffers, dtype, torch.is_grad_enabled()
    )
    return total, values_TP


class _OnePass(torch.autograd.Function):
    """Loss and gradients of some positions at a time; the backward only hands the gradients over."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: LinearHead,
        piece: Callable[[slice, Tensor, bool], _Piece],
        buffers: int,
        dtype: torch.dtype,
        recording: bool,
    ) -> tuple[Tensor, Tensor]:
        hidden_needed, weight_needed, bias_needed = (recording and need for need in ctx.needs_input_grad[:3])
        wanted = hidden_needed or weight_needed or bias_needed
        wide, device, num = wide_dtype(dtype), hidden_TD.device, len(hidden_TD)
        logits = LogitTiles(weight, bias, head.vocab_size, head.scale, head.soft_cap, dtype)
        tiles, factors_TD = vocabulary_tiles(head.vocab_size), hidden_TD.to(dtype)
        weight_sums = TiledSum(weight, tiles, wide) if weight_needed else None
        hidden_sum = torch.zeros_like(hidden_TD, dtype=wide) if hidden_needed else None
        bias_sum = torch.zeros(len(weight), dtype=wide, device=device) if bias_needed else None
        total, values = torch.zeros((), dtype=torch.float64, device=device), []
        height = piece_height(device, head.vocab_size * wide.itemsize * buffers, num)
        buffer = torch.empty((height, head.vocab_size), dtype=wide, device=device)
        with torch.autocast(device_type=device.type, enabled=False):
            for rows in tiles_of(num, height):
                hidden_cD, logits_cV = factors_TD[rows], buffer[: rows.stop - rows.start]
                for tile in tiles:
                    logits_cV[:, tile] = logits.tile(hidden_cD, tile)
                slope_cV = logits.slope(logits_cV) if wanted else None
                done = piece(rows, logits_cV.detach(), wanted)
                values.append(done.values)
                total += done.total
                if done.gradient is None:
                    continue
                gradient_cV = done.gradient if slope_cV is None else slope_cV.mul_(done.gradient)
                for index, tile in enumerate(tiles):
                    if hidden_sum is not None:
                        add_product(hidden_sum[rows], gradient_cV[:, tile], logits.weight(tile), dtype)
                    if weight_sums is not None:
                        add_product(weight_sums.tiles[index], gradient_cV[:, tile].t(), hidden_cD, dtype)
                if bias_sum is not None:
                    bias_sum[: head.vocab_size] += gradient_cV.sum(0)
        del buffer
        if not values:
            values.append(
                piece(slice(0, 0), torch.empty((0, head.vocab_size), dtype=wide, device=device), False).values
            )
        values_TP = torch.cat(values)
        ctx.mark_non_differentiable(values_TP)
        # These are with respect to h W^T + b: the scale is still to come, and so is what comes from above. Both are
        # applied in the wide type, but for a narrow weight, whose sums would be as much again.
        ctx.gradients = [hidden_sum, None if weight_sums is None else weight_sums.rounded(), bias_sum]
        ctx.dtypes = [hidden_TD.dtype, weight.dtype, None if bias is None else bias.dtype]
        ctx.scale = head.scale
        return total.to(wide), values_TP

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(_AGAIN)
        given, ctx.gradients = ctx.gradients, None
        with torch.no_grad():
            factor = grad * ctx.scale
            gradients = [
                None if each is None else _multiplied(each, factor).to(dtype)
                for each, dtype in zip(given, ctx.dtypes, strict=True)
            ]
        if torch.is_grad_enabled():  # create_graph=True: a second derivative may follow
            refuse: Any = _RefuseSecond.apply
            tie = torch.zeros((), device=grad.device, requires_grad=True)
            gradients = [None if each is None else refuse(each, tie) for each in gradients]
        return (*gradients, *[None] * 5)


def _multiplied(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient times a scalar of the wide type, in place; the scalar is not rounded to a narrow gradient's type."""
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    for rows in vocabulary_tiles(len(gradient)):
        gradient[rows] = (gradient[rows].to(factor.dtype) * factor).to(gradient.dtype)
    return gradient


class _RefuseSecond(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, tie: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(SECOND_DERIVATIVE)


class TiledSum:
    """A sum of the weight's shape, wider than the weight, rounded at the end without a second copy of all of it.

    The tiles lie in blocks, and each block is freed as soon as it has been rounded. Blocks are large because memory
    allocators give only large pieces back to the system at once.

    Attributes:
      tiles: one sum for each tile, zeros at first.
    """

    def __init__(self, weight: Tensor, tiles: Sequence[slice], dtype: torch.dtype) -> None:
        """Start with zeros.

        Args:
          weight: [W, D]; whose type the sum is rounded to.
          tiles: of its rows; what none of them covers is padding.
          dtype: of the sum.
        """
        self._like = weight
        self._whole = torch.zeros_like(weight) if weight.dtype == dtype else None
        per_block = max(1, BLOCK_BYTES // max(1, (tiles[0].stop - tiles[0].start) * weight.shape[1] * dtype.itemsize))
        self._places = [
            slice(tiles[start].start, tiles[min(start + per_block, len(tiles)) - 1].stop)
            for start in range(0, len(tiles), per_block)
        ]
        self._blocks = [
            torch.zeros((place.stop - place.start, weight.shape[1]), dtype=dtype, device=weight.device)
            if self._whole is None
            else self._whole[place]
            for place in self._places
        ]
        self.tiles = [
            self._blocks[at // per_block][tile.start - self._places[at // per_block].start :][: tile.stop - tile.start]
            for at, tile in enumerate(tiles)
        ]

    def rounded(self) -> Tensor:
        """[W, D] in the weight's type, the padding 0; the sums are given up."""
        self.tiles.clear()
        if self._whole is not None:
            return self._whole
        whole = torch.empty_like(self._like)
        whole[self._places[-1].stop :] = 0
        for place in reversed(self._places):
            whole[place] = self._blocks.pop()
        return whole
