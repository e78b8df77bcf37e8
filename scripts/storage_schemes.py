"""The sizes and errors of other tools' published schemes for the top K of a distribution, on given positions.

| scheme       | ids                          | log-probs                                                          |
|--------------|------------------------------|--------------------------------------------------------------------|
| `polynomial` | bits of the vocabulary each  | the first bfloat16; factors of 1, t and sqrt(t) fitted to the rest |
| `bf16`       | bits of the vocabulary each  | bfloat16                                                           |
| `fp16, zstd` | 17 bits each (18 above 2^17) | float16; all of it compressed by zstd                              |

`polynomial` is DistillKit's economical setting (K = 50: 114 bytes at V = 49,152, 127 at 151,936): three float32 factors
are fitted by least squares, t going evenly from 0 to 1 over the ranks that are fitted. `bf16` is the same tool without
the fit. `fp16, zstd` is how Megatron-LM stores logits offline. RS-KD and SampledKD store 3 bytes for a sampled id.

Legend: T positions, K kept tokens, V vocabulary, P terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

__all__ = ["Scheme", "atoms_kl", "bits_of", "other_schemes"]

_CHUNK = 8192
_LEVEL = 3  # zstd's own default
Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What one scheme takes and loses."""

    bytes_per_position: float
    kl: Float64
    """[T] nats, of the top K and the rest as one atom; the rest and the sum are taken to be exact."""


def bits_of(vocab_size: int) -> int:
    """Bits of an id of a vocabulary."""
    return max(1, int(vocab_size - 1).bit_length())


def atoms_kl(head_TK: Float64, tail_T: Float64, found_TK: Float64) -> Float64:
    """KL(exact, found) of the K + 1 atoms, [T] nats.

    Args:
      head_TK: [T, K] exact log-probabilities.
      tail_T: [T] the log of what is left.
      found_TK: [T, K] what a scheme gives for the former; they and the exact tail are made to sum to 1.
    """
    exact_T = np.log(np.exp(head_TK).sum(axis=1) + np.exp(tail_T))
    found_T = np.log(np.exp(found_TK).sum(axis=1) + np.exp(tail_T))
    result: Float64 = (np.exp(head_TK) * (head_TK - found_TK)).sum(axis=1) + found_T - exact_T
    return result


def other_schemes(
    token_ids: NDArray[np.int32], head_TK: Float64, tail_T: Float64, vocab_size: int
) -> dict[str, Scheme]:
    """Every scheme on the same positions, by name.

    Args:
      token_ids: [T, K] most likely first.
      head_TK: [T, K] their log-probabilities.
      tail_T: [T] the log of the mass of all others.
      vocab_size: V.
    """
    top_k = token_ids.shape[1]
    id_bytes = bits_of(vocab_size) * top_k / 8
    schemes = {
        "bf16": Scheme(bytes_per_position=id_bytes + 2 * top_k, kl=atoms_kl(head_TK, tail_T, _bfloat16(head_TK)))
    }
    if top_k > 4:
        fitted_TK = np.concatenate([_bfloat16(head_TK[:, :1]), _fit(head_TK[:, 1:])], axis=1)
        schemes["polynomial"] = Scheme(bytes_per_position=id_bytes + 2 + 3 * 4, kl=atoms_kl(head_TK, tail_T, fitted_TK))
    halves_TK = head_TK.astype(np.float16)
    schemes["fp16, zstd"] = Scheme(
        bytes_per_position=_compressed(token_ids, halves_TK, max(17, bits_of(vocab_size))),
        kl=atoms_kl(head_TK, tail_T, halves_TK.astype(np.float64)),
    )
    return schemes


def _bfloat16(values: Float64) -> Float64:
    """Rounded to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def _fit(values_TK: Float64) -> Float64:
    """What is left of log-probs after three float32 terms were fitted to them, and rounded to bfloat16 as they are."""
    t_K = np.linspace(0, 1, values_TK.shape[1])
    terms_KP = np.stack([np.ones_like(t_K), t_K, np.sqrt(t_K)], axis=1)
    factors_PT = np.linalg.lstsq(terms_KP, values_TK.T, rcond=None)[0].astype(np.float32)
    return _bfloat16((terms_KP @ factors_PT.astype(np.float64)).T)


def _compressed(token_ids: NDArray[np.int32], halves_TK: NDArray[np.float16], bits: int) -> float:
    """Bytes per position of packed ids and float16 numbers, compressed a few thousand positions at a time."""
    zstd, size = Zstd(level=_LEVEL), 0
    shifts = np.arange(bits, dtype=np.uint32)
    for first in range(0, len(token_ids), _CHUNK):
        ids = token_ids[first : first + _CHUNK].astype(np.uint32)
        packed = np.packbits(
            ((ids[:, :, None] >> shifts) & np.uint32(1)).astype(np.uint8).reshape(len(ids), -1), axis=1
        )
        size += len(zstd.encode(packed.tobytes())) + len(zstd.encode(halves_TK[first : first + _CHUNK].tobytes()))
    return size / len(token_ids)
