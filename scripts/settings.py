"""A YAML file of settings as the defaults of a verb: strict about names and types.

    # run.yaml, one verb               # run.yaml, several verbs
    cache: runs/demo                   prepare:
    context_length: 1024                 cache: runs/demo
                                       capture:
                                         cache: runs/demo

Keys are the names of the fields, with - or _. An unknown key or a value of another type is an error that says
which file, which key, and what was meant. Flags on the command line are stronger than the file. A list of groups of
settings (`losses:` of train) can be given in a file only.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from tailcache.storage.errors import ConfigError

__all__ = ["complete_settings", "default_settings", "load_mapping", "load_section", "suggestion"]

Config = TypeVar("Config")


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to append to a message about a wrong name: "; did you mean x?", or nothing if no name is close."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def load_mapping(path: Path, flag: str = "--config") -> dict[str, Any]:
    """What a YAML file says, by name.

    Args:
      path: the file.
      flag: that named it, for messages.

    Raises:
      ConfigError: the file cannot be read, is not a mapping, or says something twice.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        """Plain YAML, except that a key may not be given twice: the first would be lost without a word."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(f"{flag} {path}, line {node.start_mark.line + 1}: {key} is given twice")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Strict)  # Strict is a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag} {path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{flag} {path}: expected settings by name (key: value), found {type(content).__name__}")
    return content


def load_section(path: Path, verb: str, verbs: Iterable[str]) -> dict[str, Any]:
    """The settings of one verb in a YAML file.

    Args:
      path: the file.
      verb: whose settings are wanted.
      verbs: all verbs; a file whose keys are verbs has one section each, any other is flat.

    Raises:
      ConfigError: the file cannot be read, is not a mapping, or has a key that is neither.
    """
    content = load_mapping(path)
    known = list(verbs)
    if not any(key in known and (value is None or isinstance(value, dict)) for key, value in content.items()):
        for key, value in content.items():
            if isinstance(value, dict) and (near := difflib.get_close_matches(key, known, 1, 0.75)):
                raise ConfigError(f"--config {path}: there is no verb {key!r}; did you mean {near[0]}?")
        return content
    for key in content:
        if key not in known:
            raise ConfigError(
                f"--config {path}: expected one section per verb ({', '.join(known)}), found {key!r}"
                f"{suggestion(key, known)}"
            )
    section = content.get(verb)
    if section is not None and not isinstance(section, dict):
        raise ConfigError(f"--config {path}, {verb}: expected settings by name, found {type(section).__name__}")
    return section or {}


def default_settings(config_class: type[Config], values: Mapping[str, Any], where: str, missing: Any) -> Config:
    """An instance that serves as the defaults below the flags.

    The instance is made without the class's own checks, since required fields may still be missing; they run
    when the final one, with the flags, is made.

    Args:
      config_class: a frozen dataclass.
      values: field names (with - or _) and plain YAML values.
      where: the file and section, for messages.
      missing: what to put for required fields that are not given.

    Raises:
      ConfigError: an unknown name, a name given twice, or a value that does not fit its field.
    """
    hints = typing.get_type_hints(config_class)
    fields = {each.name: each for each in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            raise ConfigError(f"{where}: there is no setting {key!r}{suggestion(name, fields)}")
        if name in given:
            raise ConfigError(f"{where}: {name} is given twice, with - and with _")
        given[name] = _fit(value, hints[name], f"{where}, {name}", missing)
    instance = object.__new__(config_class)
    for name, each in fields.items():
        if name in given:
            value = given[name]
        elif each.default is not dataclasses.MISSING:
            value = each.default
        elif each.default_factory is not dataclasses.MISSING:
            value = each.default_factory()
        elif missing is dataclasses.MISSING:
            raise ConfigError(f"{where}: expected a setting {name!r}, found {', '.join(given) or 'nothing'}")
        else:
            value = missing
        object.__setattr__(instance, name, value)
    return instance


def complete_settings(config_class: type[Config], values: Any, where: str) -> Config:
    """Settings that no flag will change or complete: the class's own checks run here.

    Args:
      config_class: a frozen dataclass.
      values: field names (with - or _) and plain YAML values.
      where: the file and section, for messages.

    Raises:
      ConfigError: as ``default_settings``; also a required setting is missing, or a check fails.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected settings by name, found {values!r}")
    try:
        return _checked(default_settings(config_class, values, where, dataclasses.MISSING))
    except ConfigError as error:
        raise error if str(error).startswith(where) else ConfigError(f"{where}, {error}") from error


def _checked(settings: Config) -> Config:
    """The same settings, made the way that checks them, inner ones first."""
    inner = {each.name: getattr(settings, each.name) for each in dataclasses.fields(settings)}  # type: ignore[arg-type]
    inner = {name: _checked(value) for name, value in inner.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(settings, **inner)  # type: ignore[type-var]


def _fit(value: Any, hint: Any, where: str, missing: Any) -> Any:
    """A YAML value as a field's type; no guessing beyond numbers written like 1e-4, which YAML reads as text."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in arguments:
            if option is not type(None):
                try:
                    return _fit(value, option, where, missing)
                except ConfigError:
                    continue
        raise _misfit(value, hint, where)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
        choices = [str(option) for option in arguments]
        meant = suggestion(str(value), choices)
        if isinstance(value, bool):
            meant = "; put it in quotes, YAML reads on, off, yes and no as true and false"
        raise ConfigError(f"{where}: expected one of {', '.join(choices)}, found {value!r}{meant}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise _misfit(value, hint, where)
        return default_settings(hint, value, where, missing)
    if origin in (tuple, list):
        return _fit_sequence(value, origin, arguments, where, missing)
    return _fit_plain(value, hint, where)


def _fit_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], where: str, missing: Any) -> Any:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list, found {value!r}")
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        if len(value) != len(arguments):
            raise ConfigError(f"{where}: expected {len(arguments)} entries, found {len(value)}")
        kinds = list(arguments)
    else:
        kinds = [arguments[0]] * len(value)
    fitted = [
        complete_settings(kind, part, f"{where}[{index}]")
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        else _fit(part, kind, f"{where}[{index}]", missing)
        for index, (part, kind) in enumerate(zip(value, kinds, strict=True))
    ]
    return tuple(fitted) if origin is tuple else fitted


def _fit_plain(value: Any, hint: Any, where: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and is_number and float(value).is_integer():
        return int(value)
    if hint in (int, float) and isinstance(value, str):
        try:
            return _fit_plain(float(value), hint, where)
        except ValueError:
            raise _misfit(value, hint, where) from None
    if hint is float and is_number:
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if hint is Any:
        return value
    raise _misfit(value, hint, where)


def _misfit(value: Any, hint: Any, where: str) -> ConfigError:
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("pathlib._local.", "").replace("pathlib.", "")
    plain = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "Path": "a path"}
    quotes = "; put it in quotes if text is meant" if hint is str else ""
    return ConfigError(f"{where}: expected {plain.get(name, name)}, found {value!r}{quotes}")
