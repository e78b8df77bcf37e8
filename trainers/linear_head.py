"""A linear head, and tiles of its logits: what the model's own head does, piece by piece.

Logits are ``soft_cap * tanh(scale * (h W^T + b) / soft_cap)``. Factors are rounded to the type asked for (that of the
autocast, or their own); sums and all that follows are float32 (float64 for float64).

Legend: T positions, V vocabulary, v ids of a tile, W rows of the head (>= V), D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.trainers.products import product, wide_dtype

__all__ = [
    "BUFFER_BYTES",
    "VOCABULARY_TILE",
    "LinearHead",
    "LogitTiles",
    "buffer_bytes",
    "tiles_of",
    "vocabulary_tiles",
]

BUFFER_BYTES = {"cpu": 160 << 20}
"""Of the largest buffer of logits, by device; 512 MiB for any other."""
VOCABULARY_TILE = 4096
"""Ids whose logits are made at a time, so that copies of the weight stay in the cache."""


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """A linear layer that makes logits, and what the model does to them afterwards.

    Attributes:
      weight: [W, D]; rows from V on are padding and take no part.
      bias: [W], or None.
      vocab_size: V <= W.
      scale: factor of the product (1 / logits_scaling, or logit_scale).
      soft_cap: bound of the soft cap cap * tanh(z / cap), or None.

    Raises:
      MismatchError: the weight is not a matrix of at least V rows, or the bias has not one entry for each row.
      ConfigError: the soft cap is not above 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    vocab_size: int
    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0] if self.weight.dim() == 2 else 0
        if not 0 < self.vocab_size <= rows or (self.bias is not None and self.bias.shape != (rows,)):
            raise MismatchError(
                f"head: expected a weight of at least {self.vocab_size} rows, one per token, and a bias of as many, "
                f"found {tuple(self.weight.shape)} and {None if self.bias is None else tuple(self.bias.shape)}"
            )
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ConfigError(f"head: expected a soft cap above 0, found {self.soft_cap}; use None for none")

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """All of [T, V] at once from [T, D], in the type of both, by autograd's own operations.

        What the rest of this module avoids; and 16-bit factors make logits rounded to 16 bits.
        """
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        logits = self.scale * torch.nn.functional.linear(hidden_TD, self.weight[: self.vocab_size], bias)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def buffer_bytes(device: torch.device) -> int:
    """The most that one buffer of logits may take on a device."""
    return BUFFER_BYTES.get(device.type, 512 << 20)


def tiles_of(size: int, step: int) -> Iterator[slice]:
    """Cut 0 to `size` into slices of `step`, the last one shorter."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def vocabulary_tiles(vocab_size: int, widest: int | None = None) -> list[slice]:
    """Cut the vocabulary into tiles of ``VOCABULARY_TILE`` ids, or of `widest` if that is less (but not below 128)."""
    return list(tiles_of(vocab_size, VOCABULARY_TILE if widest is None else min(VOCABULARY_TILE, max(128, widest))))


class LogitTiles:
    """Makes tiles of logits, and what carries gradients of logits back. No autograd inside.

    Args:
      weight: [W, D].
      bias: [W], or None.
      vocab_size: V <= W; rows from there on are never read.
      scale: see ``LinearHead``.
      soft_cap: see ``LinearHead``.
      dtype: what the weight is rounded to, a tile at a time.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        vocab_size: int,
        scale: float,
        soft_cap: float | None,
        dtype: torch.dtype,
    ) -> None:
        self._weight_VD = weight[:vocab_size]
        self._bias_V = None if bias is None else bias[:vocab_size].to(wide_dtype(dtype))
        self._scale, self._soft_cap, self._dtype = scale, soft_cap, dtype

    def weight(self, ids: slice) -> Tensor:
        """[v, D] the rows of some ids, rounded."""
        return self._weight_VD[ids].to(self._dtype)

    def tile(self, hidden: Tensor, ids: slice) -> Tensor:
        """The logits of some ids: [T, v] in the wide type from [T, D] hidden states that are rounded already."""
        logits = product(hidden, self.weight(ids).t(), self._dtype)
        if self._bias_V is not None:
            logits.add_(self._bias_V[ids])
        if self._scale != 1.0:
            logits.mul_(self._scale)
        if self._soft_cap is not None:
            logits.div_(self._soft_cap).tanh_().mul_(self._soft_cap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """The soft cap's derivative at these logits, a tensor of its own; None where there is no cap."""
        return None if self._soft_cap is None else torch.div(logits, self._soft_cap).square_().neg_().add_(1.0)
