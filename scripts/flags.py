"""Settings from flags: tyro parses them; this says how the help reads and what a mistyped flag may have meant."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

from tailcache.scripts.settings import suggestion
from tailcache.storage.place import Location

__all__ = ["flag_names", "parse_flags"]

Config = TypeVar("Config")


def parse_flags(
    config_class: type[Config], flags: Sequence[str], *, prog: str, description: str, default: Config | None
) -> Config:
    """The settings that flags give.

    Args:
      config_class: a dataclass of settings, a docstring under each field.
      flags: the command line after the verb.
      prog: what the help calls the program.
      description: what the help says above the settings.
      default: stands in for the class's own defaults.

    Raises:
      SystemExit: 0 after printing the help, 2 after saying what is wrong.
    """
    import tyro

    _flow_help(config_class)
    settings: dict[str, Any] = {} if default is None else {"default": default}
    try:
        parsed: Config = tyro.cli(config_class, args=list(flags), prog=prog, description=description, **settings)
        return parsed
    except SystemExit as stop:
        if stop.code:
            known = list(flag_names(config_class))
            for flag in flags:
                name = flag.partition("=")[0].replace("_", "-")
                if name.removeprefix("--").replace("-", "_") in _only_in_file(config_class):
                    print(
                        f"{prog}: {name} is a list of groups of settings, which flags cannot say; put it in a file: "
                        "--config FILE",
                        file=sys.stderr,
                    )
                elif name.startswith("--") and name not in known and name != "--help":
                    print(f"{prog}: there is no flag {name}{suggestion(name, known)}", file=sys.stderr)
        raise


def flag_names(config_class: type, prefix: str = "--") -> Iterator[str]:
    """Every flag of a dataclass of settings, nested ones as --outer.inner."""
    hints = typing.get_type_hints(config_class)
    for each in dataclasses.fields(config_class):
        name = each.name.replace("_", "-")
        if each.name in _only_in_file(config_class):
            continue
        if dataclasses.is_dataclass(hints[each.name]):
            yield from flag_names(hints[each.name], f"{prefix}{name}.")
        else:
            yield prefix + name
            yield f"{prefix}no-{name}"


def _only_in_file(config_class: type) -> set[str]:
    """The settings that are lists of groups of settings: a file can say them, flags cannot."""
    hints = typing.get_type_hints(config_class)
    return {name for name, hint in hints.items() if any(map(dataclasses.is_dataclass, typing.get_args(hint)))}


def _flow_help(config_class: type) -> None:
    """Let the help flow: tyro keeps the line breaks of indented docstrings, which then break lines mid-sentence.

    Settings that only a file can say are taken out of the help, and out of the flags.
    """
    import tyro

    for owner in filter(dataclasses.is_dataclass, config_class.__mro__):
        hints = typing.get_type_hints(owner, include_extras=True)
        in_file = _only_in_file(owner)
        for name, text in _field_docstrings(owner):
            hint = hints[name]
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                _flow_help(hint)
            elif name in in_file:
                owner.__annotations__[name] = Annotated[hint, tyro.conf.Fixed, tyro.conf.Suppress]
            elif hint in (Location, Location | None):  # a location is any text; what it means is found out later
                text_only = str if hint == Location else str | None
                told = tyro.conf.arg(help=" ".join(text.split()), metavar="PATH|URL")
                owner.__annotations__[name] = Annotated[text_only, told]
            elif typing.get_origin(hint) is not Annotated:
                owner.__annotations__[name] = Annotated[hint, tyro.conf.arg(help=" ".join(text.split()))]


def _field_docstrings(config_class: type) -> Iterator[tuple[str, str]]:
    """The string that stands under each field of a class."""
    try:
        source = textwrap.dedent(inspect.getsource(config_class))
    except (OSError, TypeError):  # no source at hand: tyro's own reading has to do
        return
    [definition] = ast.parse(source).body
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value.value if isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                yield field.target.id, text
