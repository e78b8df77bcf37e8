"""A corpus that is everywhere: the documentation strings of Python's standard library.

English prose about programming, a few megabytes of it, on any machine that can run this package: for a first
run without a download. Which text it is depends on the Python version, so that is recorded with it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailcache.storage.errors import DataError

__all__ = ["EXCLUDED_FOLDERS", "MIN_CHARACTERS", "docstrings", "library_files", "library_fingerprint"]

EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "_pyrepl",
        "dist-packages",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
MIN_CHARACTERS = 20


def library_files(folder: Path | None = None) -> list[tuple[str, Path]]:
    """The modules of the standard library, (relative name, path), sorted by name."""
    root = folder if folder is not None else Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not EXCLUDED_FOLDERS.intersection(relative.parts[:-1]) and not relative.name.startswith("_sysconfigdata"):
            found.append((relative.as_posix(), path))
    if not found:
        raise DataError(f"python-docstrings: expected Python's standard library in {root}, found no .py files there")
    return sorted(found)


def docstrings(folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """The docstrings of the standard library: in file order, and in each file in the order they are written.

    Args:
      folder: a folder of Python files to read instead.

    Yields:
      (where, text): "json/decoder.py: JSONDecoder.decode" and the docstring without its indentation.
      Docstrings shorter than `MIN_CHARACTERS` and files that do not parse as this Python are left out.
    """
    for name, path in library_files(folder):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
        for qualified, text in _documented(tree, ""):
            if len(text) >= MIN_CHARACTERS:
                yield (f"{name}: {qualified}" if qualified else name), text


def library_fingerprint(folder: Path | None = None) -> dict[str, Any]:
    """The Python version and a sha256 over the names and bytes of the files read."""
    total = hashlib.sha256()
    for name, path in library_files(folder):
        total.update(hashlib.sha256(name.encode("utf-8")).digest())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return {"python": platform.python_version(), "files_sha256": total.hexdigest()}


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """The docstrings at and below a module, class or function, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        raw = ast.get_docstring(node, clean=False)
        if raw is not None:
            yield prefix, inspect.cleandoc(raw).strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{prefix}.{child.name}" if prefix else child.name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _documented(child, prefix)
