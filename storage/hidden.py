"""Hidden states and the head they are multiplied with, as they are stored: together the teacher's whole distribution.

    logits = soft_cap(scale * (hidden @ weight.T + bias)),    soft_cap(x) = cap * tanh(x / cap), x where there is none

A hidden state is D bfloat16 numbers, kept as their bits, or D whole numbers from -127 to 127 and one float32 scale: the
largest magnitude / 127. bfloat16 is exact for a teacher that runs in bfloat16. NumPy has no such type, so bits are
uint16 here, the upper half of a float32's.

Legend: T positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["HeadKind", "HiddenKind", "HiddenLayout", "StoredHead", "finite_bfloat16", "hidden_float32"]

HiddenKind = Literal["bf16", "int8"]
HeadKind = Literal["float32", "bfloat16", "float16"]
StoredHidden = NDArray[np.uint16] | NDArray[np.int8]
_VOCABULARY_BLOCK = 4096
_LARGEST = 1e38  # of a scale or a cap, so that it is a float32


@dataclass(frozen=True, kw_only=True)
class StoredHead:
    """A teacher's head: logits = soft_cap(scale * (hidden @ weight.T + bias))."""

    weight: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16]
    """[V, D] real tokens only; uint16 holds the bits of bfloat16."""
    weight_kind: HeadKind
    """What the numbers of ``weight`` are."""
    bias: NDArray[np.float32] | None
    """[V] float32, or none."""
    scale: float
    """What the product, bias included, is multiplied with; 1 for most models."""
    soft_cap: float | None
    """Logits are then cap * tanh(logits / cap); none for most models."""

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """[last - first, D] float32: the weights of some tokens, exactly."""
        part = self.weight[first:last]
        return _float32_of_bits(part) if part.dtype == np.uint16 else part.astype(np.float32, copy=False)

    def logits(self, hidden_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """[T, V] float32 logits of some hidden states, a block of the vocabulary at a time."""
        vocab_size = len(self.weight)
        logits_TV = np.empty((len(hidden_TD), vocab_size), np.float32)
        for first in range(0, vocab_size, _VOCABULARY_BLOCK):
            last = min(first + _VOCABULARY_BLOCK, vocab_size)
            np.matmul(hidden_TD, self.rows(first, last).T, out=logits_TV[:, first:last])
        if self.bias is not None:
            logits_TV += self.bias
        logits_TV *= np.float32(self.scale)
        if self.soft_cap is not None:
            logits_TV = np.tanh(logits_TV / np.float32(self.soft_cap)) * np.float32(self.soft_cap)
        return logits_TV


@dataclass(frozen=True, kw_only=True)
class HiddenLayout:
    """How one teacher's hidden states and head are stored: the attribute ``hidden`` of its group."""

    kind: HiddenKind
    """bf16: uint16 bits; int8: with one float32 scale per position."""
    width: int
    """D."""
    head_kind: HeadKind
    """Type of the head's numbers."""
    head_bias: bool
    logit_scale: float
    soft_cap: float | None

    @staticmethod
    def of(kind: HiddenKind, head: StoredHead) -> HiddenLayout:
        """For hidden states of a kind that are multiplied with this head."""
        return HiddenLayout(
            kind=kind,
            width=head.weight.shape[1],
            head_kind=head.weight_kind,
            head_bias=head.bias is not None,
            logit_scale=head.scale,
            soft_cap=head.soft_cap,
        )

    @property
    def dtype(self) -> str:
        """Stored type of hidden states."""
        return "uint16" if self.kind == "bf16" else "int8"

    @property
    def head_dtype(self) -> str:
        """Stored type of the head's weight."""
        return "uint16" if self.head_kind == "bfloat16" else self.head_kind

    def attributes(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_attributes(attributes: Any) -> HiddenLayout:
        """The inverse of ``attributes``.

        Raises:
          ValueError: what is wrong with them.
        """
        if not isinstance(attributes, dict):
            raise ValueError(f"expected an object, found {reprlib.repr(attributes)}")
        names = ("kind", "width", "head_kind", "head_bias", "logit_scale", "soft_cap")
        found: dict[str, Any] = {name: attributes.get(name) for name in names}
        width, scale, cap = found["width"], found["logit_scale"], found["soft_cap"]
        number = f"a number of magnitude below {_LARGEST:g}"
        rules = {
            "kind": (found["kind"] in get_args(HiddenKind), f"one of {', '.join(get_args(HiddenKind))}"),
            "width": (type(width) is int and 1 <= width < 1 << 31, "a whole number from 1"),
            "head_kind": (found["head_kind"] in get_args(HeadKind), f"one of {', '.join(get_args(HeadKind))}"),
            "head_bias": (type(found["head_bias"]) is bool, "true or false"),
            "logit_scale": (type(scale) in (int, float) and abs(scale) < _LARGEST, number),
            "soft_cap": (
                cap is None or (type(cap) in (int, float) and 0 < cap < _LARGEST),
                f"null, or {number}, above 0",
            ),
        }
        for name, (good, expected) in rules.items():
            if not good:
                raise ValueError(f"{name}: expected {expected}, found {reprlib.repr(found[name])}")
        return HiddenLayout(**found)


def hidden_float32(hidden_TD: StoredHidden, scale_T: NDArray[np.float32]) -> NDArray[np.float32]:
    """[T, D] float32: what stored hidden states are.

    Args:
      hidden_TD: [T, D] uint16, the bits of bfloat16, or int8.
      scale_T: [T] what int8 is multiplied with; not used for bits.
    """
    if hidden_TD.dtype == np.uint16:
        return _float32_of_bits(hidden_TD)
    return hidden_TD.astype(np.float32) * scale_T[:, None]


def finite_bfloat16(bits_TD: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """[T] no number of the row is NaN or infinite."""
    largest_T: NDArray[np.uint16] = (bits_TD & np.uint16(0x7FFF)).max(axis=1, initial=0)
    return largest_T < 0x7F80


def _float32_of_bits(bits: NDArray[Any]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
