"""All chunks of a read, of several files of this machine, by one compiled loop.

What ``storage.objects`` does to a chunk is to read it, to compare its checksum, to look at its header, to decompress it
and to lay it out: five short calls of libraries and some forty steps of Python around them, which threads of one
process can only make in turn. This loop makes the same calls of the same libraries (the C library, numcodecs' blosc and
google-crc32c) by their address, in the same order, and no thread waits for another.

It says only whether all was well. Where the functions cannot be found, or something is wrong with a chunk,
``storage.objects`` does it itself, and says what is wrong.

Import it through ``storage.compiled``.

Legend: F files, n chunks of all of them.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from google_crc32c import _crc32c
from numba import types
from numcodecs import blosc
from numpy.typing import NDArray

from tailcache.storage.chunk_bounds import BLOSC_HEADER, CHECKSUM_BYTES
from tailcache.storage.decode_loops import compiled, transpose

__all__ = ["ITEM_BYTES", "WANTED", "are_callable", "read_chunks"]

WANTED = ("path", "begin", "end", "skip", "count", "slots", "item_bytes", "columns", "by_column", "target")
"""What is said of each file: where its path begins among all of them; its first chunk and one past the last among the
chunks of all files; slots of the first chunk that are not wanted, and how many are; slots of a chunk; bytes of a
number, and how many a slot has; whether they are stored by columns; and where the result begins."""
ITEM_BYTES = (1, 2, 4)
"""Bytes of a number that can be laid out anew."""

_uint, _int, _long = types.uintp, types.int32, types.int64
_open: Any = types.ExternalFunction("tailcache_open", _int(_uint, _int))
_pread: Any = types.ExternalFunction("tailcache_pread", _long(_int, _uint, _uint, _long))
_close: Any = types.ExternalFunction("tailcache_close", _int(_int))
_checksum: Any = types.ExternalFunction("tailcache_crc32c_value", types.uint32(_uint, _uint))
_decompress: Any = types.ExternalFunction("tailcache_blosc_decompress_ctx", _int(_uint, _uint, _uint, _int))


@lru_cache(maxsize=1)
def are_callable() -> bool:
    """Whether the functions are where they should be and do what they should; the loop can call them from then on."""
    if ctypes.sizeof(ctypes.c_long) != 8:  # the offset of ``pread``
        return False
    try:
        process = ctypes.CDLL(None)
        for name in ("open", "pread", "close"):
            _name(name, getattr(process, name))
        _name("crc32c_value", ctypes.CDLL(_crc32c.__file__).crc32c_value)
        _name("blosc_decompress_ctx", ctypes.CDLL(blosc.__file__).blosc_decompress_ctx)
    except (AttributeError, OSError):
        return False
    values = np.arange(4096, dtype=np.uint16)
    packed = np.frombuffer(blosc.compress(values, b"zstd", 5, blosc.SHUFFLE), np.uint8)
    found, checksum = np.zeros(values.nbytes, np.uint8), np.frombuffer(b"123456789", np.uint8)
    return _calls(checksum, packed, found) == 0xE3069283 and bool((found.view(np.uint16) == values).all())


def _name(name: str, function: Any) -> None:
    """Let compiled code call it; by a name of our own, so that no other library's symbols change their meaning."""
    llvm.add_symbol(f"tailcache_{name}", ctypes.cast(function, ctypes.c_void_p).value)


@compiled
def _calls(data: NDArray[np.uint8], packed: NDArray[np.uint8], out: NDArray[np.uint8]) -> int:
    """Call the libraries as the loop does."""
    source, target = np.uintp(packed.ctypes.data), np.uintp(out.ctypes.data)
    if _decompress(source, target, np.uintp(len(out)), np.int32(1)) != len(out):
        return -1
    checksum: Any = np.int64(_checksum(np.uintp(data.ctypes.data), np.uintp(len(data))))
    result: int = checksum
    return result


@compiled
def _number(data: NDArray[np.uint8], at: int) -> int:
    """A little-endian number of 32 bits."""
    number: Any = np.int64(0)
    for i in range(4):
        number |= np.int64(data[at + i]) << np.int64(8 * i)
    result: int = number
    return result


@compiled
def _is_sound(stored: NDArray[np.uint8], length: int, expected: int) -> bool:
    """Whether a chunk matches its checksum, and has a header that says what it should (``blosc_problem``).

    Args:
      stored: begins with the chunk.
      length: its bytes, without the checksum behind it; at least those of a header.
      expected: its bytes once decompressed.
    """
    if np.int64(_checksum(np.uintp(stored.ctypes.data), np.uintp(length))) != _number(stored, length):
        return False
    decoded, block, encoded = _number(stored, 4), _number(stored, 8), _number(stored, 12)
    return decoded == expected and encoded == length and 1 <= block <= expected


@compiled
def _lay_out(
    chunk: NDArray[np.uint8], slots: int, columns: int, item_bytes: int, skip: int, out: NDArray[np.uint8]
) -> None:
    """Some slots of a chunk that is stored by columns, by rows."""
    if item_bytes == 1:
        transpose(chunk.reshape(columns, slots)[:, skip : skip + len(out) // columns], out.reshape(-1, columns))
    elif item_bytes == 2:
        pairs, out_pairs = chunk.view(np.uint16).reshape(columns, slots), out.view(np.uint16)
        transpose(pairs[:, skip : skip + len(out_pairs) // columns], out_pairs.reshape(-1, columns))
    else:
        fours, out_fours = chunk.view(np.uint32).reshape(columns, slots), out.view(np.uint32)
        transpose(fours[:, skip : skip + len(out_fours) // columns], out_fours.reshape(-1, columns))


@compiled
def _read_file(
    descriptor: int,
    chunks_n: NDArray[np.int64],
    wanted: NDArray[np.int64],
    stored: NDArray[np.uint8],
    decoded: NDArray[np.uint8],
    out: NDArray[np.uint8],
) -> bool:
    skip, count, slots = wanted[3], wanted[4], wanted[5]
    item_bytes, columns, by_column, done = wanted[6], wanted[7], wanted[8] != 0, wanted[9]
    width = item_bytes * columns
    size, end = slots * width, done + count * width
    if size > len(decoded) or end > len(out):
        return False
    for i in range(wanted[1], wanted[2]):
        offset, length = chunks_n[i, 0], chunks_n[i, 1] - CHECKSUM_BYTES
        if offset < 0 or not BLOSC_HEADER <= length <= len(stored) - CHECKSUM_BYTES:
            return False
        whole = np.uintp(length + CHECKSUM_BYTES)
        if _pread(descriptor, np.uintp(stored.ctypes.data), whole, offset) != length + CHECKSUM_BYTES:
            return False
        if not _is_sound(stored, length, size):
            return False
        num = min((slots - skip) * width, end - done)
        direct = num == size and not by_column
        target = out.ctypes.data + done if direct else decoded.ctypes.data
        if _decompress(np.uintp(stored.ctypes.data), np.uintp(target), np.uintp(size), np.int32(1)) != size:
            return False
        if by_column:
            _lay_out(decoded[:size], slots, columns, item_bytes, skip, out[done : done + num])
        elif not direct:
            out[done : done + num] = decoded[skip * width : skip * width + num]
        done, skip = done + num, 0
    complete: bool = done == end
    return complete


@compiled
def read_chunks(
    paths: NDArray[np.uint8],
    chunks_n: NDArray[np.int64],
    wanted_F: NDArray[np.int64],
    flags: int,
    stored: NDArray[np.uint8],
    decoded: NDArray[np.uint8],
    out: NDArray[np.uint8],
) -> bool:
    """Read and decode neighbouring chunks of each of some files.

    Args:
      paths: of the files, each with a zero behind it.
      chunks_n: [n, 2] offset and length of each chunk in its file, its checksum included.
      wanted_F: [F, 10] of each file, what ``WANTED`` says.
      flags: to open a file with.
      stored: memory for a chunk as it is stored.
      decoded: memory for a chunk once decompressed.
      out: result: the slots of one file after those of another, by rows.

    Returns:
      Whether all were read, were sound and were as many as are wanted. If not, the results are of no use.
    """
    for f in range(len(wanted_F)):
        descriptor = _open(np.uintp(paths.ctypes.data + wanted_F[f, 0]), np.int32(flags))
        if descriptor < 0:
            return False
        right = _read_file(descriptor, chunks_n, wanted_F[f], stored, decoded, out)
        _close(descriptor)
        if not right:
            return False
    return True
