"""What an object may claim about its chunks, looked at before anything is allocated or decompressed.

The index of an object says where each chunk lies in the file, and the header of a compressed chunk how large it will
be once decompressed. Both are only numbers in a file. Here they have to be what the layout says they must be: chunks
within the file, and exactly as many bytes as a chunk of this array has. So a small file cannot ask for a large
allocation, and a decompressor never reads or writes beyond the buffers it is given.
"""

from __future__ import annotations

import struct

import numpy as np
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray

from tailcache.storage.arrays import ArraySpec

__all__ = ["ABSENT", "CHECKSUM_BYTES", "blosc_problem", "parse_index", "zstd_problem"]

ABSENT = (1 << 64) - 1
"""Offset and length of a chunk that is not stored."""
CHECKSUM_BYTES = 4
"""Behind each chunk, and behind the index."""
BLOSC_HEADER, _SIZES = 16, struct.Struct("<III")
_crc32c = CRC32C(location="end")


def parse_index(stored: bytes, size: int, spec: ArraySpec) -> NDArray[np.uint64]:
    """Offset and length of each chunk of an object.

    Args:
      stored: the object's last ``spec.index_bytes``.
      size: bytes of the whole object.
      spec: of its array.

    Returns:
      [chunks, 2] uint64; ``ABSENT`` twice for a chunk that is not stored.

    Raises:
      ValueError: it is cut short, its checksum does not match, or chunks would not lie in the file before the index,
        each in a place of its own.
    """
    expected = spec.index_bytes
    if len(stored) != expected or size < expected:
        raise ValueError(f"expected an index of {expected} bytes, found {len(stored)}")
    try:
        index = np.frombuffer(_crc32c.decode(stored), "<u8").reshape(-1, 2)
    except RuntimeError as error:
        raise ValueError(f"the index' checksum does not match: {error}") from error
    end = np.uint64(size - expected)
    offset, length = index[:, 0], index[:, 1]
    absent = (offset == ABSENT) & (length == ABSENT)
    # Not offset + length <= end, which could wrap around.
    inside = (length <= end) & (offset <= end - np.minimum(length, end)) & (length > CHECKSUM_BYTES)
    if not (absent | inside).all():
        chunk = int(np.argmin(absent | inside))
        raise ValueError(
            f"chunk {chunk}: expected to lie within the {end} bytes before the index, found {length[chunk]} bytes at "
            f"{offset[chunk]}"
        )
    if int(length[~absent].sum()) > end:  # many chunks in one place: a bomb
        raise ValueError(
            f"expected chunks one after another in {end} bytes, found {length[~absent].sum()} bytes of them"
        )
    return index


def blosc_problem(stored: bytes | memoryview, expected: int) -> str:
    """What is wrong with the header of a blosc buffer; empty if nothing is.

    Args:
      stored: the buffer, without a checksum behind it.
      expected: bytes it must have once decompressed.
    """
    if len(stored) < BLOSC_HEADER:
        return f"expected a blosc buffer of at least {BLOSC_HEADER} bytes, found {len(stored)}"
    decoded, block, encoded = _SIZES.unpack_from(stored, 4)
    if decoded != expected:
        return f"expected a chunk of {expected} bytes, found one that would have {decoded} once decompressed"
    if encoded != len(stored):
        return f"expected a blosc buffer of {encoded} bytes, as its header says, found {len(stored)}"
    if not 1 <= block <= max(decoded, 1):
        return f"expected blosc blocks of 1 to {decoded} bytes, found {block}"
    return ""


def zstd_problem(stored: bytes | memoryview, expected: int) -> str:
    """What is wrong with the header of a Zstandard frame; empty if nothing is.

    Args:
      stored: the frame, without a checksum behind it.
      expected: bytes it must have once decompressed.
    """
    if len(stored) < 6 or bytes(stored[:4]) != b"\x28\xb5\x2f\xfd":
        return "expected a Zstandard frame, found something else"
    flags = stored[4]
    single, id_bytes = flags >> 5 & 1, (0, 1, 2, 4)[flags & 3]
    size_bytes = (single, 2, 4, 8)[flags >> 6]
    first = 5 + (1 - single) + id_bytes
    if size_bytes == 0 or len(stored) < first + size_bytes:
        return "expected a Zstandard frame that says its size, found one that does not"
    decoded = int.from_bytes(stored[first : first + size_bytes], "little") + 256 * (size_bytes == 2)
    if decoded != expected:
        return f"expected a chunk of {expected} bytes, found one that would have {decoded} once decompressed"
    return ""
