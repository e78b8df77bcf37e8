"""The study's text: docstrings of Python's standard library and of the packages that this one requires.

Real prose about programming, tens of megabytes of it, on any machine where the study can run. It is cut into three by
module, so that no module is on two sides:

    teacher      the teacher, the tokenizer and the students' common start are trained on it
    students     the rows that are captured and distilled
    held-out     what everything is measured on

A paragraph that was met before, in any package, is left out: libraries repeat themselves, and a model that has seen a
held-out paragraph is not held out. What was read is recorded: the packages' versions, and a hash of each part.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tailcache.pipeline.docstrings import docstrings
from tailcache.storage import durable
from tailcache.storage.errors import DataError, NotFoundError

__all__ = ["END", "PARTS", "Document", "modules", "part_of", "read_part", "study_documents", "write_text"]

END = "<|end|>"
"""The token between documents."""

PARTS = {"held-out": 0.04, "students": 0.20, "teacher": 0.76}
"""The share of the modules in each part."""

PIECE = 4000
"""Characters of a document, about: longer modules become several."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A module's docstrings, or some of them in a row."""

    module: str
    text: str


def part_of(module: str) -> str:
    """The part a module is in: its name decides, so that other modules make no difference."""
    place = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") / 2**64
    for part, share in PARTS.items():
        if place < share:
            return part
        place -= share
    return part


def modules(package: str | None) -> Iterator[tuple[str, list[str]]]:
    """The modules of a package, or of the standard library, with their docstrings.

    Raises:
      NotFoundError: the package is not installed.
    """
    folder = None
    if package is not None:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise NotFoundError(f"text: expected the package {package}, a requirement of tailcache; found none")
        folder = Path(spec.origin).parent
    name, texts = "", list[str]()
    for where, text in docstrings(folder):
        module = f"{package or 'stdlib'}/{where.partition(': ')[0]}"
        if module != name and texts:
            yield name, texts
            texts = []
        name = module
        texts.append(text)
    if texts:
        yield name, texts


def study_documents(found: Iterable[tuple[str, list[str]]]) -> dict[str, list[Document]]:
    """The documents of each part: paragraphs once, modules in pieces of about ``PIECE`` characters.

    Args:
      found: modules and their docstrings.

    Returns:
      By part; within each, modules are ordered by a hash of their name, so that any beginning is a mixture.
    """
    seen: set[bytes] = set()
    parts: dict[str, list[tuple[bytes, list[Document]]]] = defaultdict(list)
    for module, texts in found:
        pieces, length = [list[str]()], 0
        for text in texts:
            for paragraph in text.split("\n\n"):
                key = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
                if key in seen or not paragraph.strip():
                    continue
                seen.add(key)
                if length > PIECE:
                    pieces.append([])
                    length = 0
                pieces[-1].append(paragraph)
                length += len(paragraph)
        documents = [Document(module=module, text="\n\n".join(piece)) for piece in pieces if piece]
        order = hashlib.sha256(f"order {module}".encode()).digest()
        if documents:
            parts[part_of(module)].append((order, documents))
    return {part: [d for _, each in sorted(parts[part], key=lambda p: p[0]) for d in each] for part in PARTS}


def write_text(folder: Path, packages: tuple[str, ...]) -> dict[str, Any]:
    """Write PART.jsonl for each part, and text.json last; found there, they are left as they are.

    Returns:
      What text.json holds: versions, and the number of documents, characters and the hash of each part.

    Raises:
      NotFoundError: a package is not installed.
      DataError: the folder holds the text of other packages or versions.
    """
    import platform

    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    record_path = folder / "text.json"
    if record_path.is_file():
        record: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
        if record["versions"] != versions:
            raise DataError(
                f"{folder}: expected the text of {versions}, found that of {record['versions']}; continue with those "
                "versions, or choose another --out"
            )
        return record
    durable.make_folder(folder)
    names = tqdm((None, *packages), desc="reading docstrings", unit="package")
    parts = study_documents(item for name in names for item in modules(name))
    record = {"versions": versions, "parts": {}}
    for part, documents in parts.items():
        if not documents:
            raise DataError(f"text: expected modules with docstrings in the part {part}, found none")
        lines = "".join(json.dumps({"module": d.module, "text": d.text}) + "\n" for d in documents)
        durable.write_file(folder / f"{part}.jsonl", lines.encode())
        record["parts"][part] = {
            "documents": len(documents),
            "modules": len({d.module for d in documents}),
            "characters": sum(len(d.text) for d in documents),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        }
    durable.write_file(record_path, (json.dumps(record, indent=1) + "\n").encode())
    return record


def read_part(folder: Path, part: str) -> list[Document]:
    """The documents of a part that ``write_text`` wrote."""
    lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Document(**json.loads(line)) for line in lines]
