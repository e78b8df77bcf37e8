"""A cache of any number of shards that exists only as far as it is read: all of its shards are alike."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from tailcache.storage.arrays import group_metadata
from tailcache.storage.corpus import CORPUS_VERSION, Corpus, corpus_arrays
from tailcache.storage.durable import sha256
from tailcache.storage.layout import commit_path
from tailcache.storage.local_place import LocalPlace
from tailcache.storage.place import Claim, Place
from tailcache.storage.sealed import seal, unseal

VOCAB_SIZE = 37


class MemoryPlace(Place):
    """Files in a dictionary; of those that are not in it, some may be made when they are asked for."""

    def __init__(self, files: dict[str, bytes], prefix: str = "") -> None:
        self.contents, self._prefix = files, prefix

    def made(self, name: str) -> bytes | None:
        """A file that is not in the dictionary; none where there is none."""
        return None

    def _get(self, name: str) -> bytes:
        full = self._prefix + name
        data = self.contents.get(full)
        data = self.made(full) if data is None else data
        if data is None:
            raise FileNotFoundError(full)
        return data

    def __str__(self) -> str:
        return "memory:/" + self._prefix.rstrip("/")

    def __truediv__(self, name: str) -> MemoryPlace:
        below = type(self).__new__(type(self))
        below.__dict__.update(self.__dict__)
        below._prefix = f"{self._prefix}{name}/"
        return below

    def read(self, name: str) -> bytes:
        return self._get(name)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        data = self._get(name)
        return [data[first:last] for first, last in ranges]

    def read_end(self, name: str, count: int) -> tuple[bytes, int]:
        data = self._get(name)
        return data[max(0, len(data) - count) :], len(data)

    def size(self, name: str) -> int | None:
        try:
            return len(self._get(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes | memoryview) -> None:
        self.contents[self._prefix + name] = bytes(data)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        if self.exists(name):
            return False
        self.write(name, data)
        return True

    def files(self, below: str = "") -> Iterator[tuple[str, int]]:
        raise AssertionError("nothing may list")

    def folders(self, below: str = "") -> list[str]:
        raise AssertionError("nothing may list")

    def delete(self, name: str) -> None:
        self.contents.pop(self._prefix + name, None)

    def delete_all(self, below: str = "") -> None:
        raise NotImplementedError

    def move(self, name: str, to: str) -> None:
        self.write(to, self._get(name))
        self.delete(name)

    def claim(self, name: str) -> Claim | None:
        raise NotImplementedError


class SyntheticCache(MemoryPlace):
    """A corpus of equal rows, one shard each, and the teacher ``t`` over it.

    Args:
      example: a cache with a corpus of one row and its teacher ``t``, in a folder.
      num_shards: how many rows and shards.
    """

    def __init__(self, example: LocalPlace, num_shards: int) -> None:
        super().__init__({})
        one = Corpus(example)
        row = one.rows(0, 1)
        num_targets = int(row.supervised.sum())
        values = {
            "tokens": np.tile(row.tokens, num_shards),
            "document_start": np.tile(row.document_start, num_shards),
            "supervised": np.tile(row.supervised, num_shards),
            "row_offsets": np.arange(num_shards + 1) * len(row.tokens),
            "target_offsets": np.arange(num_shards + 1) * num_targets,
            "held_out": np.zeros(num_shards, np.bool_),
            "token_counts": np.bincount(row.tokens, minlength=VOCAB_SIZE) * num_shards,
        }
        files: dict[str, bytes] = {"zarr.json": group_metadata({})}
        seals = {}
        for name, spec in corpus_arrays(VOCAB_SIZE).items():
            files[f"{name}/zarr.json"] = spec.metadata(len(values[name]))
            for number in range(spec.num_objects(len(values[name]))):
                part = values[name][number * spec.shard : (number + 1) * spec.shard].astype(spec.dtype)
                data = spec.encode(part)
                assert data is not None
                files[spec.object_path(number)], seals[spec.object_path(number)] = data, spec.chunk_seal(data)
        checksums = seal({"files": {name: sha256(data) for name, data in files.items()}, "chunks": seals})
        manifest = {
            **{name: value for name, value in one.manifest.items() if name != "sha256"},
            "format_version": CORPUS_VERSION,
            "num_rows": num_shards,
            "num_tokens": len(values["tokens"]),
            "num_targets": num_targets * num_shards,
            "checksums": sha256(checksums),
        }
        files |= {"checksums.json": checksums, "manifest.json": seal(manifest)}
        self.contents = {f"corpus/{name}": data for name, data in files.items()}

        teacher = example / "teachers" / "t"
        self._shard = {name: teacher.read(name) for name, _ in teacher.files() if "/c/" in name}
        self._constants = {
            name: data for name, data in self._shard.items() if name.startswith(("voc", "logprob_l", "m"))
        }
        stored = unseal(teacher.read("manifest.json"), "manifest")
        layout = {**stored["layout"], "num_rows": num_shards, "num_positions": num_targets * num_shards}
        sealed = seal({**stored, "layout": layout})
        complete = unseal(teacher.read("complete.json"), "complete")
        complete |= {"manifest": sha256(sealed), "num_shards": num_shards, "positions": num_targets * num_shards}
        self._commit = unseal(teacher.read(commit_path(0)), "commit") | {"manifest": sha256(sealed)}
        of_teacher = {name: teacher.read(name) for name, _ in teacher.files() if name.endswith("zarr.json")}
        of_teacher |= self._constants | {"manifest.json": sealed, "complete.json": seal(complete)}
        self.contents |= {f"teachers/t/{name}": data for name, data in of_teacher.items()}

    def made(self, name: str) -> bytes | None:
        name = name.removeprefix("teachers/t/")
        commit = re.fullmatch(r"commits/(\d{8})\.json", name)
        if commit:
            number = int(commit[1])
            files = {re.sub(r"/c/0", f"/c/{number}", file): entry for file, entry in self._commit["files"].items()}
            return seal(self._commit | {"shard": number, "rows": [number, number + 1], "files": files})
        found = re.fullmatch(r"(\w+)/c/\d+(/0)?", name)
        return self._shard.get(f"{found[1]}/c/0{found[2] or ''}") if found else None
