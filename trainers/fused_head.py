"""What the losses ask of the student's logits, straight from its hidden states: no ``[T, V]`` tensor, ever.

Every loss here needs of a row of logits only a log-sum-exp over the vocabulary minus a few ids, and the logits at a
few ids (see ``terms``). So the head is applied to one tile of the vocabulary at a time, and the gradient of the logits
is a multiple of the softmax plus a few entries:

    dz = (g_sum / sum) exp(z - largest)  off the excluded ids,   + g_gathered at the gathered ids

The backward makes the logits again, tile by tile, and finishes the head's gradient tile by tile in its own type. So
between forward and backward nothing is held but a few numbers per position. That costs 8 T V D operations, where a
fused cross-entropy takes 6; ``fused_loss`` has a mode that takes 6.

Legend: T positions, v ids of a tile, V vocabulary, W rows of the head (>= V), D hidden width, E excluded ids, G
gathered ids, F fills, n temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tailcache.storage.errors import MismatchError
from tailcache.trainers.linear_head import LinearHead, LogitTiles, buffer_bytes, vocabulary_tiles
from tailcache.trainers.products import add_product, compute_dtype, product, wide_dtype
from tailcache.trainers.terms import HeadTerms, TeacherTerms, fill_masses, wanted_ids

__all__ = ["SECOND_DERIVATIVE", "check_head", "fill_matrix", "fill_means", "fused_head", "rest_masses", "sum_factors"]

SECOND_DERIVATIVE = (
    "fused head: expected one differentiation, found a second one (create_graph=True and a derivative of the "
    "gradient), which is not implemented: compute the loss from full logits with student_terms instead"
)


def check_head(hidden_TD: Tensor, head: LinearHead, teacher: TeacherTerms) -> None:
    """Refuse hidden states, a head and targets that do not belong together.

    Raises:
      MismatchError: says what was expected and found.
    """
    if hidden_TD.dim() != 2 or hidden_TD.shape != (len(teacher), head.weight.shape[1]):
        raise MismatchError(
            f"fused head: expected hidden states [{len(teacher)} positions, {head.weight.shape[1]} wide], found "
            f"{list(hidden_TD.shape)}"
        )
    if head.vocab_size != teacher.vocab_size:
        raise MismatchError(
            f"fused head: expected a head over the teacher's {teacher.vocab_size} ids, found {head.vocab_size}"
        )


def fill_matrix(fills: Mapping[str, Tensor], like: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """The fills as rows [F, V], on the device of `like`.

    Raises:
      MismatchError: a fill is not [V].
    """
    for name, fill in fills.items():
        if fill.shape != (vocab_size,):
            raise MismatchError(
                f"fused head: expected the fill {name!r} to have one weight for each of {vocab_size} ids, found "
                f"{list(fill.shape)}; a fill of each position's own needs chunked_loss"
            )
    if not fills:
        return like.new_empty((0, vocab_size), dtype=dtype)
    return torch.stack([fill.to(device=like.device, dtype=dtype) for fill in fills.values()])


def fused_head(
    hidden_TD: Tensor,
    head: LinearHead,
    teacher: TeacherTerms,
    *,
    fills: Mapping[str, Tensor] | None = None,
    temperatures: Sequence[float] = (),
) -> HeadTerms:
    """What the losses ask of the logits, without the logits; the backward makes them again.

    Works under ``torch.compile``, autocast and gradient checkpointing. Differentiable once, with respect to hidden
    states, weight and bias.

    Args:
      hidden_TD: [T, D] the head's input at the target positions.
      head: the head.
      teacher: the targets of the same positions.
      fills: [V] weights >= 0 by name, on which means of the logits are wanted.
      temperatures: further temperatures at which the sum over the rest is wanted.

    Returns:
      The terms, in float32 (float64 if hidden states or weight are). ``terms_from_head`` makes log-probs of them.

    Raises:
      MismatchError: shapes that do not belong together.

    Cost: forward 2 T V D operations, backward 6 T V D. Memory: one tile of logits, the gradients, [T, K + m].
    """
    check_head(hidden_TD, head, teacher)
    fills = fills or {}
    dtype = compute_dtype(hidden_TD, head.weight)
    wide = wide_dtype(dtype)
    excluded_TE, gathered_TG = wanted_ids(teacher)
    fills_FV = fill_matrix(fills, hidden_TD, head.vocab_size, wide)
    log_sum_Tn, largest_T, gathered, fill_sums_TF = _head_terms(
        hidden_TD,
        head.weight,
        head.bias,
        excluded_TE,
        gathered_TG,
        fills_FV,
        [1.0, *temperatures],
        head.vocab_size,
        head.scale,
        head.soft_cap or 0.0,
        dtype,
    )
    return HeadTerms(
        log_sum_rest=log_sum_Tn,
        largest_rest=largest_T,
        gathered=gathered,
        fill_means=fill_means(fill_sums_TF, rest_masses(fills, teacher, wide)),
    )


def rest_masses(fills: Mapping[str, Tensor], teacher: TeacherTerms, dtype: torch.dtype) -> Tensor:
    """[T, F] the mass of each fill over V minus the excluded ids."""
    if not fills:
        return torch.empty((len(teacher), 0), dtype=dtype, device=teacher.token_ids.device)
    return torch.stack([fill_masses(fill, teacher) for fill in fills.values()], dim=-1).to(dtype)


def fill_means(sums_TF: Tensor, masses_TF: Tensor) -> Tensor:
    """Sums over masses, 0 (with gradient 0) where there is no mass."""
    any_TF = masses_TF > 0
    return torch.where(any_TF, sums_TF / torch.where(any_TF, masses_TF, 1.0), 0.0)


class _Places:
    """Where some ids of each position lie, tile by tile: one sort instead of a search in every tile."""

    def __init__(self, ids_TX: Tensor, tiles: Sequence[slice]) -> None:
        self._width = max(1, ids_TX.shape[1])
        sorted_ids, self._order = ids_TX.flatten().sort()
        edges = torch.tensor([tile.start for tile in tiles] + [tiles[-1].stop], device=ids_TX.device)
        self._bounds = torch.searchsorted(sorted_ids, edges).tolist()
        self._ids = sorted_ids

    def of(self, index: int, tile: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The flat places in [T, X] of the ids in this tile, their rows, and their columns in the tile."""
        part = slice(self._bounds[index], self._bounds[index + 1])
        place = self._order[part]
        return place, place // self._width, self._ids[part] - tile.start


def _tiles(vocab_size: int, hidden: Tensor) -> list[slice]:
    """Tiles whose logits, with some tensors of their size, fit the buffer."""
    return vocabulary_tiles(vocab_size, buffer_bytes(hidden.device) // (16 * max(1, len(hidden))))


@torch.library.custom_op("tailcache::head_terms", mutates_args=())
def _head_terms(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    excluded: Tensor,
    gathered: Tensor,
    fills: Tensor,
    temperatures: Sequence[float],
    vocab_size: int,
    scale: float,
    soft_cap: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sums [T, n] and largest logits [T] of the rest, gathered logits [T, G], sums under the fills [T, F]."""
    logits = LogitTiles(weight, bias, vocab_size, scale, soft_cap or None, dtype)
    wide, num = wide_dtype(dtype), hidden.shape[0]
    tiles, factors_TD = _tiles(vocab_size, hidden), hidden.to(dtype)
    excluded_places, gathered_places = _Places(excluded, tiles), _Places(gathered, tiles)
    largest_T = hidden.new_full((num,), -torch.inf, dtype=wide)
    sums_Tn = hidden.new_zeros((num, len(temperatures)), dtype=wide)
    gathered_TG = hidden.new_zeros(gathered.shape, dtype=wide)
    fill_sums_TF = hidden.new_zeros((num, fills.shape[0]), dtype=wide)
    rates = hidden.new_tensor(temperatures, dtype=wide)
    for index, tile in enumerate(tiles):
        tile_Tv = logits.tile(factors_TD, tile)
        place, row, column = gathered_places.of(index, tile)
        gathered_TG.view(-1)[place] = tile_Tv[row, column]
        _, row, column = excluded_places.of(index, tile)
        if fills.shape[0]:
            tile_Tv[row, column] = 0.0
            fill_sums_TF.addmm_(tile_Tv, fills[:, tile].t())
        tile_Tv[row, column] = -torch.inf
        above_T = torch.maximum(largest_T, tile_Tv.amax(-1))
        offset_T = above_T.masked_fill(above_T == -torch.inf, 0.0)
        sums_Tn.mul_(((largest_T - offset_T)[:, None] / rates).exp_())
        tile_Tv.sub_(offset_T[:, None])
        for at, temperature in enumerate(temperatures[1:], start=1):
            sums_Tn[:, at] += (tile_Tv / temperature).exp_().sum(-1)
        sums_Tn[:, 0] += tile_Tv.exp_().sum(-1)
        largest_T = above_T
    return sums_Tn.log_(), largest_T, gathered_TG, fill_sums_TF


@_head_terms.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    excluded: Tensor,
    gathered: Tensor,
    fills: Tensor,
    temperatures: Sequence[float],
    vocab_size: int,
    scale: float,
    soft_cap: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num, wide = hidden.shape[0], wide_dtype(dtype)
    shapes: list[tuple[int, ...]] = [(num, len(temperatures)), (num,), tuple(gathered.shape), (num, fills.shape[0])]
    a, b, c, d = (hidden.new_empty(shape, dtype=wide) for shape in shapes)
    return a, b, c, d


@torch.library.custom_op("tailcache::head_terms_backward", mutates_args=())
def _head_terms_backward(
    grad_sums: Tensor,
    grad_gathered: Tensor,
    grad_fills: Tensor,
    log_sums: Tensor,
    largest: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    excluded: Tensor,
    gathered: Tensor,
    fills: Tensor,
    temperatures: Sequence[float],
    vocab_size: int,
    scale: float,
    soft_cap: float,
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states [T, D], weight [W, D] and bias [W]; empty where not needed."""
    logits = LogitTiles(weight, bias, vocab_size, scale, soft_cap or None, dtype)
    wide = wide_dtype(dtype)
    tiles, factors_TD = _tiles(vocab_size, hidden), hidden.to(dtype)
    excluded_places, gathered_places = _Places(excluded, tiles), _Places(gathered, tiles)
    hidden_needed, weight_needed, bias_needed = needed
    hidden_TD = hidden.new_zeros(hidden.shape if hidden_needed else (0,), dtype=wide)
    weight_WD = weight.new_zeros(weight.shape if weight_needed else (0,))
    bias_W = weight.new_zeros((weight.shape[0] if bias_needed else 0,), dtype=wide)
    offset_T1 = largest.masked_fill(largest == -torch.inf, 0.0)[:, None]
    factors_Tn = sum_factors(grad_sums, log_sums.exp(), temperatures)
    for index, tile in enumerate(tiles):
        tile_Tv = logits.tile(factors_TD, tile)
        slope_Tv = logits.slope(tile_Tv)
        _, row, column = excluded_places.of(index, tile)
        tile_Tv[row, column] = -torch.inf
        tile_Tv.sub_(offset_T1)
        further = [
            (tile_Tv / temperature).exp_().mul_(factors_Tn[:, at, None])
            for at, temperature in enumerate(temperatures[1:], start=1)
        ]
        grad_Tv = tile_Tv.exp_().mul_(factors_Tn[:, :1])
        for each in further:
            grad_Tv.add_(each)
        if fills.shape[0]:
            grad_Tv.addmm_(grad_fills, fills[:, tile])
            grad_Tv[row, column] = 0.0
        place, row, column = gathered_places.of(index, tile)
        grad_Tv.index_put_((row, column), grad_gathered.reshape(-1)[place], accumulate=True)
        if slope_Tv is not None:
            grad_Tv.mul_(slope_Tv)
        if scale != 1.0:
            grad_Tv.mul_(scale)
        if hidden_needed:
            add_product(hidden_TD, grad_Tv, logits.weight(tile), dtype)
        if weight_needed:
            weight_WD[tile] = product(grad_Tv.t(), factors_TD, dtype).to(weight.dtype)
        if bias_needed:
            bias_W[tile] = grad_Tv.sum(0)
    return hidden_TD.to(hidden.dtype), weight_WD, bias_W.to(weight.dtype if bias is None else bias.dtype)


@_head_terms_backward.register_fake
def _(
    grad_sums: Tensor,
    grad_gathered: Tensor,
    grad_fills: Tensor,
    log_sums: Tensor,
    largest: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    excluded: Tensor,
    gathered: Tensor,
    fills: Tensor,
    temperatures: Sequence[float],
    vocab_size: int,
    scale: float,
    soft_cap: float,
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_needed, weight_needed, bias_needed = needed
    return (
        hidden.new_empty(hidden.shape if hidden_needed else (0,)),
        weight.new_empty(weight.shape if weight_needed else (0,)),
        weight.new_empty((weight.shape[0] if bias_needed else 0,), dtype=weight.dtype if bias is None else bias.dtype),
    )


def sum_factors(grads_Tn: Tensor, sums_Tn: Tensor, temperatures: Sequence[float]) -> Tensor:
    """What exp((z - largest) / temperature) is multiplied by: grad / (temperature sum), 0 where nothing is summed."""
    any_Tn = sums_Tn > 0
    scaled_Tn = grads_Tn / grads_Tn.new_tensor(temperatures)
    return torch.where(any_Tn, scaled_Tn / torch.where(any_Tn, sums_Tn, 1.0), 0.0)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, excluded, gathered, fills, *settings = inputs
    log_sums, largest, _, _ = output
    ctx.mark_non_differentiable(largest)
    ctx.save_for_backward(log_sums, largest, hidden, weight, bias, excluded, gathered, fills)
    ctx.settings = settings


def _differentiate(ctx: Any, grad_sums: Tensor, _: Any, grad_gathered: Tensor, grad_fills: Tensor) -> tuple[Any, ...]:
    needed = [bool(need) for need in ctx.needs_input_grad[:3]]
    gradients = _head_terms_backward(grad_sums, grad_gathered, grad_fills, *ctx.saved_tensors, *ctx.settings, needed)
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), *[None] * 8)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(SECOND_DERIVATIVE)


_head_terms.register_autograd(_differentiate, setup_context=_keep_for_backward)
_head_terms_backward.register_autograd(_refuse)
