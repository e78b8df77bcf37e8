"""Caches with malice: files are changed, and then all checksums and seals made right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.checksum32 import CRC32C

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.corpus import corpus_arrays
from tailcache.storage.sealed import seal, unseal

_crc32c = CRC32C(location="end")


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a sealed record, and seal it again."""
    values = unseal(path.read_bytes(), path.name)
    change(values)
    path.write_bytes(seal(values))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file without a seal."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def chunk_seal(data: bytes, spec: ArraySpec) -> str:
    """As docs/format.md has it; for any bytes at all."""
    index = data[-(16 * (spec.shard // spec.chunk) + 4) :]
    digest = hashlib.sha256(index)
    for offset, length in np.frombuffer(index[: len(index) // 16 * 16], "<u8").reshape(-1, 2).tolist():
        if length >= 4 and offset + length <= len(data):
            digest.update(data[offset + length - 4 : offset + length])
    return digest.hexdigest()


def reseal(cache: Path, specs: dict[str, ArraySpec], name: str = "t") -> None:
    """Make every checksum and seal say what is there now.

    Args:
      cache: its folder.
      specs: of the teacher's per-position arrays, by name.
      name: the teacher's.
    """
    corpus, teacher = cache / "corpus", cache / "teachers" / name

    def list_files(values: dict[str, Any], folder: Path) -> None:
        values["files"] |= {file: _hash(folder / file) for file in values["files"] if (folder / file).is_file()}

    def list_corpus(values: dict[str, Any]) -> None:
        list_files(values, corpus)
        arrays = corpus_arrays(unseal((corpus / "manifest.json").read_bytes(), "corpus")["vocab_size"])
        for file in values["chunks"]:
            path, spec = corpus / file, arrays.get(file.split("/")[0])
            if path.is_file() and spec is not None:
                values["chunks"][file] = chunk_seal(path.read_bytes(), spec)

    edit(corpus / "checksums.json", list_corpus)
    edit(corpus / "manifest.json", lambda values: values.update(checksums=_hash(corpus / "checksums.json")))
    edit(teacher / "manifest.json", lambda values: list_files(values, teacher))
    if (teacher / "manifest_copy.json").is_file():
        (teacher / "manifest_copy.json").write_bytes((teacher / "manifest.json").read_bytes())
    manifest = _hash(teacher / "manifest.json")
    commits = sorted((teacher / "commits").glob("*.json"))
    for commit in commits:

        def change(values: dict[str, Any]) -> None:
            values["manifest"] = manifest
            for file, entry in values["files"].items():
                path, spec = teacher / file, specs.get(file.split("/")[0])
                if path.is_file() and spec is not None:
                    data = path.read_bytes()
                    entry |= {"bytes": len(data), "sha256": _hash(path), "chunks": chunk_seal(data, spec)}

        edit(commit, change)

    def finish(values: dict[str, Any]) -> None:
        list_files(values, teacher)
        values["manifest"] = manifest
        values["commits"] = hashlib.sha256(b"".join(path.read_bytes() for path in commits)).hexdigest()

    edit(teacher / "complete.json", finish)


def with_index(chunks: list[bytes], index: list[tuple[int, int]]) -> bytes:
    """An object of some chunks (without their checksums), with any index."""
    body = b"".join(bytes(_crc32c.encode(chunk)) for chunk in chunks)
    return body + bytes(_crc32c.encode(np.array(index, "<u8").tobytes()))


def with_chunk(spec: ArraySpec, data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """An object whose first chunk is changed; its checksums are right."""
    size = 16 * (spec.shard // spec.chunk) + 4
    entries = np.frombuffer(data[-size:-4], "<u8").reshape(-1, 2).tolist()
    chunks, index, offset = [], [], 0
    for number, (start, length) in enumerate(entries):
        if length == (1 << 64) - 1:
            index.append((start, length))
            continue
        payload = data[start : start + length - 4]
        payload = change(payload) if number == 0 else payload
        chunks.append(payload)
        index.append((offset, len(payload) + 4))
        offset += len(payload) + 4
    return with_index(chunks, index)
