"""Open the teacher of a capture that exists, with the settings that its manifest has: for replay and repair."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.load_teacher import DTYPES
from tailcache.pipeline.opened import OpenedTeacher, open_teacher
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import ConfigError, FormatError, MismatchError
from tailcache.storage.place import Location
from tailcache.storage.records import Manifest
from tailcache.storage.targets import differences

__all__ = ["open_stored", "stored_config"]


def stored_config(
    manifest: Manifest, cache: Location, teacher: str | None, *, threads: int | None = None, trust: bool = False
) -> CaptureConfig:
    """The settings a capture was made with, for another run on this machine.

    Args:
      manifest: of the capture.
      cache: where it lies.
      teacher: the model, as for ``tailcache capture``.
      threads: CPU threads of the model.
      trust: run model code that comes with a hub model. What the manifest says of this is not followed: it may be
        anybody's.

    Raises:
      ConfigError: no teacher is given, or this is no capture, but was derived from one.
      FormatError: the manifest's settings make no sense.
    """
    config = manifest.provenance.get("config")
    if not isinstance(config, dict):
        raise ConfigError(
            f"teacher {manifest.name!r}: expected a capture whose settings are known, found one that was derived or "
            "written by other means; derive it again from its source, or restore it from a copy"
        )
    if teacher is None:
        raise ConfigError(f"teacher {manifest.name!r}: expected the model it was captured from, found no --teacher")
    known = {field.name for field in fields(CaptureConfig)} - {"cache", "teacher", "threads", "trust_remote_code"}
    values: dict[str, Any] = {name: value for name, value in config.items() if name in known}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if config.get("dtype") == "auto" and manifest.settings.get("dtype") in DTYPES:
        values["dtype"] = manifest.settings["dtype"]  # what it was then; on this machine it might be another
    try:
        return CaptureConfig(cache=cache, teacher=teacher, threads=threads, trust_remote_code=trust, **values)
    except (TypeError, ConfigError) as error:
        raise FormatError(
            f"teacher {manifest.name!r}: its manifest has settings that make no sense: {error}"
        ) from error


def open_stored(
    manifest: Manifest, corpus: Corpus, config: CaptureConfig, teacher: Teacher | None = None
) -> tuple[OpenedTeacher, list[str]]:
    """Load the teacher of a capture and check that it is the one.

    Args:
      manifest: of the capture.
      corpus: that was captured over.
      config: from ``stored_config``.
      teacher: one that is loaded already.

    Returns:
      The teacher, with the layout that is stored; and what differs and need not matter: versions of packages.

    Raises:
      MismatchError: weights, device or another setting differ; says which.
      Errors of ``open_teacher``.
    """
    opened = open_teacher(config, corpus, teacher)
    found = differences("settings", dict(manifest.settings), opened.settings)
    told = [f"{field}: then {stored}, now {now}" for field, stored, now in found if ".versions." in field]
    serious = [f"{field}: stored {a!r}, found {b!r}" for field, a, b in found if ".versions." not in field]
    if serious:
        raise MismatchError(
            f"teacher {manifest.name!r}: expected what it was captured with, found other settings: "
            f"{'; '.join(serious[:8])}. Give the same model, device and settings"
        )
    if manifest.layout.hidden != opened.layout.hidden:
        raise MismatchError(
            f"teacher {manifest.name!r}: expected a head as the manifest has it, {manifest.layout.hidden}, found "
            f"{opened.layout.hidden}"
        )
    return replace(opened, layout=manifest.layout), told
