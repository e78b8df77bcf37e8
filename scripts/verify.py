"""``tailcache verify``: look at every file of a cache, list all that is wrong, and mend what can be mended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tailcache.storage.errors import ConfigError, CorruptError, TailcacheError

if TYPE_CHECKING:
    from tailcache.pipeline.replay import Replay
    from tailcache.storage.mending import Mended
    from tailcache.storage.verify import Verification

__all__ = ["VerifyConfig", "run"]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Look at every file of a cache, list all that is wrong, and mend it if asked to.

    Exits with status 0 only if nothing is wrong. A capture that has not finished is no fault; what it has
    committed is verified.
    """

    cache: str | Path
    """Where the cache lies: a folder, or a URL such as s3://bucket/folder."""

    level: Literal["fast", "full"] = "full"
    """fast: records, metadata and the size of everything else, in a small fraction of the time. full: every byte
    against its checksum, and every value against the others."""

    repair: bool = False
    """Put what is damaged into CACHE/quarantine and make exactly that again, in the same bytes: shards are captured
    again with --teacher and the settings in the cache, the rest comes from other records. Verifies again afterwards."""

    replay: int = 0
    """Run the teacher again at so many random positions, and compare with what is stored. What is allowed to differ
    comes from running the same positions twice in other batches. Needs --teacher."""

    seed: int = 0
    """Another seed replays other positions."""

    teacher: str | None = None
    """The model a teacher was captured from, as for `tailcache capture`; its other settings are in the cache."""

    name: str | None = None
    """Which of the cache's teachers to replay or to repair; needed where there are several."""

    trust_remote_code: bool = False
    """Run model code that comes with a hub model."""

    threads: int | None = None
    """CPU threads of the model; by default what torch chooses."""

    json: Path | None = None
    """Write what was found to this file too; docs/format.md has its keys."""

    def __post_init__(self) -> None:
        if self.replay < 0 or self.seed < 0:
            raise ConfigError(f"--replay and --seed: expected 0 or more, found {self.replay} and {self.seed}")
        if self.replay and self.teacher is None:
            raise ConfigError("--replay: expected --teacher, the model to run again, beside it")


def run(config: VerifyConfig) -> None:
    """Verify, mend and replay as asked, print what is wrong, and fail if anything is."""
    found = _inspect(config)
    report: dict[str, Any] = found.report()
    try:
        if config.repair and found.faults:
            report |= {"good": False, "found": report["faults"], "repair": (mended := _repair(config, found)).report()}
            _say_mended(mended)
            found = _inspect(config)
            report |= found.report()
        faults = len(found.faults)
        for fault in found.faults:
            print(fault)
        if config.replay:
            replayed = _replay(config)
            report["replay"] = replayed.report()
            faults += _say(replayed)
        report["good"] = not faults
    except TailcacheError as error:
        report |= {"good": False, "error": str(error)}
        raise
    finally:
        if config.json is not None:
            config.json.write_text(json.dumps(report, indent=1) + "\n")
    if faults:
        raise CorruptError(f"{config.cache}: {faults} fault{'s' * (faults > 1)}; what to do about each is said above")
    looked = f"{found.bytes_read:,} of " if config.level == "fast" else ""
    print(f"{config.cache}: no faults in {looked}{found.bytes:,} bytes of {found.files:,} files ({config.level})")


def _repair(config: VerifyConfig, found: Verification) -> Mended:
    from tqdm import tqdm

    from tailcache.pipeline.repair import repair

    with tqdm(unit="pos", unit_scale=True, desc="repair") as bar:
        return repair(
            config.cache,
            found,
            model=config.teacher,
            name=config.name,
            threads=config.threads,
            trust=config.trust_remote_code,
            progress=bar.update,
        )


def _say_mended(mended: Mended) -> None:
    """Print what a repair did, and what it could not do."""
    for path, to in mended.quarantined.items():
        print(f"put aside {path}: {to}")
    for teacher, shard in mended.shards:
        print(f"captured again: teacher {teacher}, shard {shard}")
    for path in mended.made:
        print(f"made again: {path}")
    for note in mended.notes:
        print(f"note: {note}")
    for path, reason in mended.left.items():
        print(f"not mended: {path}: {reason}")


def _inspect(config: VerifyConfig) -> Verification:
    from tqdm import tqdm

    from tailcache.storage.place import open_place
    from tailcache.storage.verify import QUARANTINE, inspect

    total = None
    if config.level == "full":
        files = open_place(config.cache).files()
        total = sum(size for name, size in files if not name.startswith(f"{QUARANTINE}/"))
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        return inspect(config.cache, level=config.level, progress=bar.update)


def _replay(config: VerifyConfig) -> Replay:
    from tailcache.pipeline.replay import replay_cache

    return replay_cache(
        config.cache,
        config.teacher,
        name=config.name,
        count=config.replay,
        seed=config.seed,
        threads=config.threads,
        trust=config.trust_remote_code,
    )


def _say(replayed: Replay) -> int:
    """Print what a replay found, and count the fields that are off."""
    print(f"replay of {replayed.teacher}: {replayed.positions} positions; stored against live, live against live:")
    for note in replayed.notes:
        print(f"  {note}")
    wrong = 0
    for field in replayed.fields:
        figures = f"mean {field.mean:.3g}, largest {field.largest:.3g}; {field.control_mean:.3g}, "
        allowed = f"{field.mean_tolerance:.3g}, {field.tolerance:.3g}"
        print(f"  {field.name:<16} {figures}{field.control_largest:.3g}; allowed {allowed}")
        if not field.good:
            wrong += 1
            where = f", the first being {field.first}" if field.beyond else ""
            print(
                f"teachers/{replayed.teacher}, field {field.name}: expected differences of at most {allowed}, found a "
                f"mean of {field.mean:.3g} and {field.beyond} of {replayed.positions} positions that are further "
                f"off{where}; is this the teacher, and is `tailcache verify` clean? If both, capture again under "
                "another name"
            )
    return wrong
