"""The command ``tailcache VERB``: finds the verb, reads its settings, runs it, and turns errors into messages.

Nothing heavy is imported before the settings are known to be right: ``--help`` costs a tenth of a second.

Exit status: 0 done; 1 the work could not be done, with the reason on stderr; 2 the command line or the file of
settings is wrong; 130 interrupted. An error nobody foresaw keeps its traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailcache.scripts.flags import parse_flags
from tailcache.scripts.settings import default_settings, load_section, suggestion
from tailcache.scripts.train import with_sweep
from tailcache.storage.errors import ConfigError, TailcacheError

__all__ = ["VERBS", "Verb", "main"]


@dataclass(frozen=True)
class Verb:
    """One verb of the command.

    Attributes:
      summary: one line for the list of verbs.
      config: "module:Class" of its settings; the module is light to import.
      module: the module with ``run(config)``; imported when the settings are known to be right.
      positional: settings that may also be given without their flags, first and in this order.
    """

    summary: str
    config: str
    module: str
    positional: tuple[str, ...] = ("cache",)


VERBS = {
    "prepare": Verb(
        "turn text, chats or token ids into a corpus",
        "tailcache.pipeline.config:PrepareConfig",
        "tailcache.scripts.prepare",
    ),
    "capture": Verb(
        "run a teacher over the corpus once and keep its targets",
        "tailcache.pipeline.config:CaptureConfig",
        "tailcache.scripts.capture",
    ),
    "train": Verb(
        "train a student from a cache, or many of them in a sweep",
        "tailcache.scripts.train:TrainCommand",
        "tailcache.scripts.train",
    ),
    "evaluate": Verb(
        "measure a student on held-out text and against a teacher",
        "tailcache.trainers.evaluate_config:EvaluateConfig",
        "tailcache.scripts.evaluate",
        ("student",),
    ),
    "student": Verb(
        "say what a student would be: its sizes and parameters",
        "tailcache.scripts.student:ShowConfig",
        "tailcache.scripts.student",
    ),
    "compare": Verb(
        "compare teachers from their caches alone",
        "tailcache.pipeline.config:CompareConfig",
        "tailcache.scripts.compare",
    ),
    "export": Verb(
        "write a teacher's targets as Parquet or a datasets folder",
        "tailcache.pipeline.export_config:ExportConfig",
        "tailcache.scripts.export",
    ),
    "derive": Verb(
        "make a smaller, partial, merged or copied cache, without the teacher",
        "tailcache.scripts.derive:DeriveConfig",
        "tailcache.scripts.derive",
        ("source", "target"),
    ),
    "verify": Verb(
        "read every byte of a cache and list all faults",
        "tailcache.scripts.verify:VerifyConfig",
        "tailcache.scripts.verify",
    ),
    "info": Verb(
        "say what a cache holds and what each field costs",
        "tailcache.scripts.info:InfoConfig",
        "tailcache.scripts.info",
    ),
}

USAGE = """usage: tailcache VERB [--config FILE] [settings]

Run the teacher once; distil any number of students from its cached next-token distributions.

verbs:
{verbs}

tailcache VERB --help explains a verb and each of its settings. The cache (the student
for evaluate) may come first, without its flag.
--config FILE reads settings from YAML (one verb's settings, or a section per verb); flags are stronger.
--version prints the version.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: the command line without the program's name; default: that of the process.

    Returns:
      The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(given: list[str]) -> int:
    """`main`, without the care for a closed pipe."""
    if not given:
        print(_usage(), file=sys.stderr, end="")
        return 2
    name, *rest = given
    if name in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0
    if name == "--version":
        print(f"tailcache {importlib.metadata.version('tailcache')}")
        return 0
    if name not in VERBS:
        what = "flag" if name.startswith("-") else "verb"
        print(f"tailcache: there is no {what} {name!r}{suggestion(name, VERBS)}\n\n{_usage()}", file=sys.stderr, end="")
        return 2
    try:
        config = _parse(name, rest)
    except ConfigError as error:
        print(f"tailcache {name}: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro has printed its help (0) or what is wrong (2)
        return stop.code if isinstance(stop.code, int) else 2
    try:
        importlib.import_module(VERBS[name].module).run(config)
    except TailcacheError as error:
        print(f"tailcache {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tailcache {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _usage() -> str:
    return USAGE.format(verbs="\n".join(f"  {name:<9}{verb.summary}" for name, verb in VERBS.items()))


def _parse(name: str, rest: Sequence[str]) -> Any:
    """The settings of a verb: its defaults, below them the file's, below them the flags.

    Raises:
      ConfigError: the file is wrong, or a setting is out of range.
      SystemExit: after printing help or a complaint about the flags.
    """
    module, _, class_name = VERBS[name].config.partition(":")
    config_class = getattr(importlib.import_module(module), class_name)
    flags, file = _split_config(_flagged(rest, VERBS[name].positional))
    values = load_section(file, name, VERBS) if file is not None else {}
    if name == "train":
        values = with_sweep(values, flags, f"--config {file}")
    default = None
    if values or file is not None:
        import tyro

        default = default_settings(config_class, values, f"--config {file}", tyro.MISSING)
    description = (
        f"{inspect.cleandoc(config_class.__doc__ or '')}\n\n"
        "--config FILE reads these settings from a YAML file; flags are stronger than the file."
    )
    return parse_flags(config_class, flags, prog=f"tailcache {name}", description=description, default=default)


def _flagged(rest: Sequence[str], positional: tuple[str, ...]) -> list[str]:
    """Give what stands before the first flag its flags."""
    given = list(itertools.takewhile(lambda argument: not argument.startswith("-"), rest))
    named = [part for name, value in zip(positional, given, strict=False) for part in (f"--{name}", value)]
    return [*named, *rest[min(len(given), len(positional)) :]]


def _split_config(rest: Sequence[str]) -> tuple[list[str], Path | None]:
    """Take ``--config FILE`` out of the flags.

    Raises:
      ConfigError: it names no file, or is given twice.
    """
    flags: list[str] = []
    files: list[str] = []
    remaining = iter(rest)
    for argument in remaining:
        if argument == "--config":
            files.append(next(remaining, ""))
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        else:
            flags.append(argument)
    if len(files) > 1:
        raise ConfigError(f"--config: expected one file, found {', '.join(files)}")
    if files and (not files[0] or files[0].startswith("--")):
        raise ConfigError("--config: expected the name of a YAML file after it")
    return flags, Path(files[0]).expanduser() if files else None


if __name__ == "__main__":
    sys.exit(main())
