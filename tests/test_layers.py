"""Imports go one way, under one name, and storage needs NumPy and zarr only: read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("storage", "pipeline", "trainers", "scripts")
ALLOWED = {
    "storage": {"storage"},
    "pipeline": {"pipeline", "storage"},
    "trainers": {"trainers", "storage"},
    "scripts": {"scripts", "pipeline", "trainers", "storage"},
}
STORAGE_PACKAGES = {"numpy", "zarr", "numcodecs"}
# Optional: only inside functions.
OPTIONAL_PACKAGES = {
    "bucket.py": {"obstore"},
    "chunk_loops.py": {"google_crc32c", "llvmlite", "numba"},  # google_crc32c comes with zarr, llvmlite with numba
    "decode_loops.py": {"numba"},
    "fsspec_place.py": {"fsspec"},
    "rust_codecs.py": {"zarrs"},
}
COMPILED = ("tailcache.storage.decode_loops", "tailcache.storage.chunk_loops")
HEAVY = {"torch", "transformers", "datasets", "accelerate", "matplotlib", "pyarrow"}
MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Names of imported modules; those in function bodies too, unless only what an import runs is asked for."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module or ""
            if node.module == "tailcache":
                yield from (f"tailcache.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


def test_there_is_something_to_look_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(FOLDERS)
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_a_module(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in FOLDERS, f"{path}: {name} would be a second copy; import tailcache.{name}"
        if parts[0] == "tailcache" and len(parts) > 1:
            assert parts[1] in ALLOWED[folder], f"{path}: {folder} may not import {name}"
        elif folder == "storage" and parts[0] != "tailcache":
            allowed = STORAGE_PACKAGES | sys.stdlib_module_names | OPTIONAL_PACKAGES.get(path.name, set())
            assert parts[0] in allowed, f"{path}: storage may not import {name}"
            assert parts[0] not in {"obstore", "fsspec", "zarrs"} or name not in imported(path, at_import_time=True), (
                path
            )
        if name.startswith(COMPILED) and path.name != "chunk_loops.py":  # they import numba as they are imported
            assert name not in imported(path, at_import_time=True), path
        assert parts[0] not in {"pickle", "dill", "cloudpickle", "joblib"}, f"{path}: no pickle"


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "scripts" / "cli.py",
        ROOT / "pipeline" / "config.py",
        ROOT / "trainers" / "config.py",
        ROOT / "trainers" / "evaluate_config.py",
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_commands_start_without_heavy_imports(path: Path) -> None:
    """Whatever these modules import when they are imported, and what that imports in turn."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in imported(module, at_import_time=True):
            assert name.split(".")[0] not in HEAVY, f"{module} imports {name}"
            candidate = ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
            if name.startswith("tailcache.") and candidate.is_file():
                todo.append(candidate)


def test_modules_stay_readable() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}
