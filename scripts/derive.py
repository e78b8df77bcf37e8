"""``tailcache derive``: another cache from what is stored, without the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailcache.storage.errors import ConfigError

__all__ = ["DeriveConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class DeriveConfig:
    """Make a cache from one or several others, without the teacher: tailcache derive SOURCE TARGET.

    Without any change it is a copy, byte for byte, with every checksum checked on the way; between any two places.
    With changes, all of them are made at once. Can be killed at any time: the same command continues, and ends in the
    same bytes. What was done is kept in each teacher's provenance (`tailcache info` shows it).
    """

    source: str | Path
    """Location of the cache to start from."""

    target: str | Path
    """Location of the cache to make. It may exist, with the same corpus: the teachers are added."""

    teachers: tuple[str, ...] = ()
    """Which teachers; all finished ones by default."""

    name: str | None = None
    """What to call the teacher that is made, where it is one; by default as in the source. Under another name, TARGET
    may be SOURCE itself."""

    top_k: int | None = None
    """Keep fewer tokens per position. The others join the tail: its mass, entropy and draws are made anew from what is
    stored, exact or unbiased."""

    num_samples: int | None = None
    """Keep fewer draws per position: an evenly spaced random subset."""

    rows: str | None = None
    """Keep these rows of the corpus, first:last, last not included; either may be left out."""

    split: Literal["all", "train", "held-out"] = "all"
    """Keep the rows for training, or those held out."""

    merge: tuple[str | Path, ...] = ()
    """Further caches, with other rows of the same corpus, to put together with SOURCE."""

    drop: tuple[Literal["hidden", "log_z"], ...] = ()
    """Leave out optional fields: the hidden states and the head, or the sums at further temperatures."""

    re_encode: bool = False
    """Store the same values anew, in the newest version of the format."""

    shard_positions: int | None = None
    """Target positions of a shard, on average."""

    chunk_positions: int | None = None
    """Target positions of a chunk within a shard."""

    compression_level: int | None = None
    """Of the compressor, 1 (fast) to 9 (small)."""

    seed: int = 0
    """Another seed makes other draws, where --top-k or --num-samples makes any."""

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("num_samples", 0), ("shard_positions", 1), ("chunk_positions", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')}: expected at least {least}, found {value}")
        if self.compression_level is not None and not 1 <= self.compression_level <= 9:
            raise ConfigError(f"--compression-level: expected 1 to 9, found {self.compression_level}")
        if self.seed < 0:
            raise ConfigError(f"--seed: expected 0 or more, found {self.seed}")
        self.row_range()

    def row_range(self) -> tuple[int | None, int | None] | None:
        """``rows`` as numbers.

        Raises:
          ConfigError: it is not of the form first:last.
        """
        if self.rows is None:
            return None
        first, colon, last = self.rows.partition(":")
        if not colon or not all(part == "" or part.isdecimal() for part in (first, last)):
            raise ConfigError(f"--rows: expected first:last, such as 0:1000 or 1000:, found {self.rows!r}")
        return int(first) if first else None, int(last) if last else None

    @property
    def changes(self) -> bool:
        """Something of the teachers is to be different."""
        asked = (self.top_k, self.num_samples, self.shard_positions, self.chunk_positions, self.compression_level)
        return self.re_encode or bool(self.drop) or any(value is not None for value in asked)


def run(config: DeriveConfig) -> None:
    """Derive, and say what was made.

    Raises:
      TailcacheError: it cannot be made; the message says why.
    """
    from tqdm import tqdm

    from tailcache.storage.derive import Change
    from tailcache.storage.derive_cache import derive_cache
    from tailcache.storage.place import open_place
    from tailcache.storage.reader import open_cache

    change = None
    if config.changes:
        change = Change(
            top_k=config.top_k,
            num_samples=config.num_samples,
            drop=tuple({"log_z": "log_z_tail"}.get(name, name) for name in config.drop),
            seed=config.seed,
            shard_positions=config.shard_positions,
            chunk=config.chunk_positions,
            compression_level=config.compression_level,
        )
    target = open_place(config.target)
    with (
        tqdm(unit="B", unit_scale=True, desc="copy") as copied,
        tqdm(unit="pos", unit_scale=True, desc="derive") as derived,
    ):
        made = derive_cache(
            [open_cache(location) for location in (config.source, *config.merge)],
            target,
            teachers=config.teachers,
            name=config.name,
            rows=config.row_range(),
            split=config.split,
            change=change,
            on_bytes=copied.update,
            on_positions=derived.update,
        )
    corpus = made.corpus
    print(f"{target}: corpus {corpus.hash[:12]}…, {corpus.num_rows:,} rows, {corpus.num_targets:,} target positions")
    for done, names in (("copied", made.copied), ("derived", made.derived)):
        if names:
            print(f"{done}: {', '.join(names)}")
    if made.left_out:
        print(f"left out, because their captures have not finished: {', '.join(made.left_out)}")
