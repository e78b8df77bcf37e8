"""The files of a capture that are not read at random: metadata, commit records, tail sums, the record of the whole.

Everything here is a pure function of what it is given, so that a file that was lost or damaged can be made again and
compared with the hash on record. Who writes what, and when, is in ``targets``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.arrays import group_metadata
from tailcache.storage.codec import AnyCodec, Targets, codec_of, learn_constants
from tailcache.storage.durable import sha256
from tailcache.storage.errors import CorruptError
from tailcache.storage.hidden import StoredHead
from tailcache.storage.layout import Layout, commit_path
from tailcache.storage.objects import read_object
from tailcache.storage.place import Place
from tailcache.storage.sealed import seal

__all__ = [
    "MANIFEST_COPY",
    "MEAN_TAILS",
    "commit_chain",
    "commit_record",
    "committed_shards",
    "complete_record",
    "constant_objects",
    "encode_shard",
    "first_constants",
    "load_codec",
    "mean_tail_objects",
    "metadata_files",
    "missing_shards",
    "read_tail_sum",
    "shards_of",
    "tail_sum_bytes",
    "tail_sum_path",
]

MANIFEST_COPY = "manifest_copy.json"
"""The same bytes as ``manifest.json``, for repair; not there before format version 2."""
MEAN_TAILS = ("mean_tail", "mean_tail_copy")
"""The constants that are known when all shards are; the second is not there before format version 2."""


def tail_sum_path(shard: int) -> str:
    """Where the sum of a shard's tails lies until the capture is finished, relative to the group."""
    return f"partial/tail_sum-{shard:08d}.bin"


def committed_shards(place: Place, layout: Layout) -> list[int]:
    """The shards that have a commit record, in order.

    Cost: lists the folder of the records, so this is for writing and for taking stock, not for reading.
    """
    return sorted(shard for shard in shards_of(name for name, _ in place.files("commits")) if shard < layout.num_shards)


def shards_of(names: Iterable[str]) -> Iterator[int]:
    """The shards whose commit records are among some names, relative to the group."""
    for name in names:
        found = re.fullmatch(r"commits/(\d{8,16})\.json", name)
        if found and commit_path(int(found[1])) == name:
            yield int(found[1])


def missing_shards(layout: Layout, committed: Iterable[int]) -> Iterator[int]:
    """The shards that are not among the committed ones, in order; one at a time, for a layout may claim any number."""
    have = set(committed)
    return (shard for shard in range(layout.num_shards) if shard not in have)


def metadata_files(layout: Layout) -> Iterator[tuple[str, bytes]]:
    """Every ``zarr.json`` of a teacher: name and content."""
    yield "zarr.json", group_metadata({"tailcache": layout.attributes()})
    slots = layout.num_shards * layout.shard_slots
    for spec in layout.fields().values():
        yield f"{spec.name}/zarr.json", spec.metadata(slots)
    for name, spec in layout.constants().items():
        yield f"{name}/zarr.json", spec.metadata(layout.constant_length(name))


def first_constants(
    layout: Layout, targets: Targets, token_counts: NDArray[np.int64], head: StoredHead | None
) -> dict[str, NDArray[Any]]:
    """The values of all constants but the mean tail, by name.

    Args:
      layout: the teacher's.
      targets: of the first shard: they decide the order of the vocabulary, and the classes of positions.
      token_counts: [V] occurrences of each token in the corpus.
      head: the teacher's, where hidden states are stored.
    """
    values = learn_constants(layout, targets, token_counts)
    if head is not None:
        values["head_weight"] = head.weight
        if head.bias is not None:
            values["head_bias"] = head.bias
    return values


def constant_objects(layout: Layout, values: dict[str, NDArray[Any]]) -> Iterator[tuple[str, bytes]]:
    """The objects of some constants: name and content."""
    for name, stored in values.items():
        spec = layout.constants()[name]
        for number in range(spec.num_objects(len(stored))):
            data = spec.encode(stored[number * spec.shard : (number + 1) * spec.shard])
            assert data is not None
            yield spec.object_path(number), data


def mean_tail_objects(layout: Layout, tail_sum: NDArray[np.float64]) -> Iterator[tuple[str, bytes]]:
    """The objects of the mean tail, and of its second copy: name and content.

    Args:
      layout: the teacher's.
      tail_sum: [V] the sum of all positions' normalised tails.
    """
    total = tail_sum.sum()
    mean = (tail_sum / total if total > 0 else tail_sum).astype(np.float32)
    yield from constant_objects(layout, {name: mean for name in MEAN_TAILS if name in layout.constants()})


def encode_shard(layout: Layout, codec: AnyCodec, shard: int, targets: Targets) -> dict[str, bytes]:
    """A shard's objects: content by name; none where the shard has no targets.

    Raises:
      TeacherError: numbers that cannot be those of distributions.
      ValueError: other fields or columns than the layout has.
    """
    specs, encoded = layout.fields(), codec.encode(targets)
    wanted = {name: spec.columns for name, spec in specs.items()}
    found = {name: values.shape[1] if values.ndim > 1 else None for name, values in encoded.items()}
    if found != wanted:
        raise ValueError(f"shard {shard}: expected fields and columns {wanted}, found {found}")
    objects = {specs[name].object_path(shard): specs[name].encode(values) for name, values in encoded.items()}
    return {name: data for name, data in objects.items() if data is not None}


def commit_record(
    layout: Layout,
    manifest_seal: str,
    shard: int,
    targets: Targets,
    objects: dict[str, bytes],
    tail_sum: NDArray[np.float64],
) -> bytes:
    """The bytes of a shard's commit record.

    Args:
      layout: the teacher's.
      manifest_seal: hash of its manifest.
      shard: number.
      targets: as they were captured.
      objects: from ``encode_shard``.
      tail_sum: [V] the sum of the shard's normalised tails.
    """
    specs = layout.fields()
    files = {
        name: {"bytes": len(data), "sha256": sha256(data), "chunks": specs[name.split("/")[0]].chunk_seal(data)}
        for name, data in objects.items()
    }
    return seal(
        {
            "shard": shard,
            "manifest": manifest_seal,
            "rows": list(layout.shard_rows(shard)),
            "positions": len(targets),
            "files": files,
            "tail_sum": sha256(tail_sum_bytes(tail_sum)),
            "sums": {
                "log_target": float(targets.log_target.sum(dtype=np.float64)),
                "tail_mass": float(np.exp(targets.log_tail.astype(np.float64)).sum()),
            },
        }
    )


def tail_sum_bytes(tail_sum: NDArray[np.float64]) -> bytes:
    """[V] float64 as they lie on disk."""
    return tail_sum.astype("<f8").tobytes()


def read_tail_sum(place: Place, shard: int, expected: str) -> NDArray[np.float64]:
    """[V] float64: the sum of a shard's tails.

    Args:
      place: the teacher's.
      shard: number.
      expected: its hash, from the commit record.

    Raises:
      CorruptError: it is missing or damaged.
    """
    try:
        data = place.read(tail_sum_path(shard))
    except FileNotFoundError:
        data = b""
    if sha256(data) != expected:
        raise CorruptError(
            f"{place}/{tail_sum_path(shard)}: expected checksum {expected}, found "
            f"{sha256(data) if data else 'no file'}; it is needed to finish this capture: restore it from a copy, or "
            "run `tailcache verify --repair` with the teacher"
        )
    return np.frombuffer(data, "<f8")


def commit_chain(place: Place, num_shards: int) -> str:
    """One hash over all commit records, in order."""
    digest = hashlib.sha256()
    for shard in range(num_shards):
        digest.update(place.read(commit_path(shard)))
    return digest.hexdigest()


def complete_record(
    layout: Layout, manifest_seal: str, *, num_bytes: int, commits: str, mean_tails: dict[str, bytes]
) -> bytes:
    """The bytes of the record that says that a capture is whole.

    Args:
      layout: the teacher's.
      manifest_seal: hash of its manifest.
      num_bytes: of all objects of all shards.
      commits: from ``commit_chain``.
      mean_tails: from ``mean_tail_objects``.
    """
    return seal(
        {
            "manifest": manifest_seal,
            "num_shards": layout.num_shards,
            "positions": layout.num_positions,
            "bytes": num_bytes,
            "commits": commits,
            "files": {name: sha256(data) for name, data in mean_tails.items()},
        }
    )


def load_codec(place: Place, layout: Layout, checksums: Mapping[str, str]) -> AnyCodec:
    """Read what decoding needs of a teacher's constants, checked against its manifest.

    Raises:
      CorruptError: one is missing or damaged, or is no table.
    """
    values = {}
    for name in layout.learned:
        spec = layout.constants()[name]
        for file in (f"{name}/zarr.json", spec.object_path(0)):
            place.read_checked(file, checksums.get(file))
        length = layout.constant_length(name)
        values[name] = read_object(place, spec.object_path(0), spec, 0, length, f"{place}, constant {name}")
    return codec_of(layout, values, str(place))
