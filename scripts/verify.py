"""``tailcache verify``: read every byte of a cache and list all that is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tailcache.storage.errors import CorruptError

__all__ = ["VerifyConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read every byte of a cache, recompute every checksum and invariant, and list all faults.

    Exits with status 0 only if nothing is wrong. A capture that has not finished is no fault; what it has
    committed is verified.
    """

    cache: str | Path
    """Where the cache lies: a folder, or a URL such as s3://bucket/folder."""

    json: Path | None = None
    """Write the faults to this file too, as a list of objects with path, shard, field and problem."""


def run(config: VerifyConfig) -> None:
    """Verify, print the faults, and fail if there are any."""
    from tqdm import tqdm

    from tailcache.storage.place import open_place
    from tailcache.storage.verify import verify

    size = sum(size for _, size in open_place(config.cache).files())
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar:
        faults = verify(config.cache, progress=bar.update)
    if config.json is not None:
        config.json.write_text(json.dumps([asdict(fault) for fault in faults], indent=1) + "\n")
    for fault in faults:
        print(fault)
    if faults:
        raise CorruptError(
            f"{config.cache}: {len(faults)} faults; restore the files named above from a copy, or delete the damaged "
            "teacher and capture it again"
        )
    print(f"{config.cache}: no faults in {size:,} bytes")
