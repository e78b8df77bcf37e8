"""Where records come from: local files, a dataset on the hub, or the docstrings of the standard library.

A source yields its records in one fixed order (files sorted by name), a few at a time however large it is,
and can say afterwards what it read, by content and without absolute paths: names, sizes and sha256 of files,
or the commit of a hub dataset. The same files in another folder or on another machine are the same source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tailcache.pipeline.docstrings import docstrings, library_fingerprint
from tailcache.pipeline.files import file_columns, read_file
from tailcache.storage.errors import ConfigError, DataError

__all__ = ["DOCSTRINGS", "DocstringSource", "FileSource", "HubSource", "Record", "Source"]

DOCSTRINGS = "python-docstrings"


@dataclass(frozen=True)
class Record:
    """One record of a source: its columns, and where it stands, for messages."""

    where: str
    fields: dict[str, Any]


class Source(Protocol):
    """What prepare needs of a source."""

    notes: list[str]

    def columns(self) -> list[str]:
        """The columns of the first records."""
        ...

    def records(self, columns: Sequence[str] | None) -> Generator[Record, None, None]:
        """The records in order; formats that can skip columns read only those named."""
        ...

    def describe(self, stored: dict[str, Any] | None = None) -> dict[str, Any]:
        """What was read, as JSON: by content, without absolute paths.

        Args:
          stored: an earlier description; what it says was read is taken as read now, to compare the two.
        """
        ...


@dataclass
class FileSource:
    """Local files, read one after another.

    Attributes:
      files: (name, path) in reading order; names are relative to the folder that was given.
      split: the split they make up, or None.
      notes: what was found but is not read, for the report.
    """

    files: list[tuple[str, Path]]
    split: str | None = None
    text_files: Literal["line", "paragraph", "document"] = "line"
    notes: list[str] = field(default_factory=list)
    num_opened: int = 0

    def columns(self) -> list[str]:
        """The columns of the first file that has any."""
        return next((columns for _, path in self.files if (columns := file_columns(path))), [])

    def records(self, columns: Sequence[str] | None) -> Generator[Record, None, None]:
        """The records of all files in order."""
        self.num_opened = 0
        for name, path in self.files:
            self.num_opened += 1
            for index, fields in enumerate(read_file(path, columns, self.text_files)):
                yield Record(f"{name}, record {index}", fields)

    def describe(self, stored: dict[str, Any] | None = None) -> dict[str, Any]:
        """Name, size and sha256 of each file; no sha256 for those a limit left unread."""
        num_read = self.num_opened
        if stored is not None:
            num_read = sum(1 for file in stored.get("files", []) if file.get("sha256"))
        files: list[dict[str, Any]] = []
        for index, (name, path) in enumerate(self.files):
            try:
                with path.open("rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest() if index < num_read else None
                files.append({"name": name, "bytes": path.stat().st_size, "sha256": digest})
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error}") from error
        return {"kind": "files", "split": self.split, "files": files}


@dataclass
class DocstringSource:
    """The docstrings of Python's standard library, as the column text."""

    notes: list[str] = field(default_factory=list)

    def columns(self) -> list[str]:
        """The one column, text."""
        return ["text"]

    def records(self, columns: Sequence[str] | None) -> Generator[Record, None, None]:
        """One record per docstring."""
        for where, text in docstrings():
            yield Record(where, {"text": text})

    def describe(self, stored: dict[str, Any] | None = None) -> dict[str, Any]:
        """The Python version and a hash of its library."""
        return {"kind": DOCSTRINGS, **library_fingerprint()}


@dataclass
class HubSource:
    """A dataset on the hub, streamed at one commit.

    Attributes:
      name: the dataset, "owner/name".
      commit: the commit that was resolved; what is read is exactly that.
    """

    name: str
    subset: str | None
    split: str
    commit: str
    notes: list[str] = field(default_factory=list)

    def _open(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.name, self.subset, split=self.split, revision=self.commit, streaming=True)
        except Exception as error:  # the library raises whatever the hub or a format made it raise
            raise ConfigError(f"source {self.name}: cannot be opened: {type(error).__name__}: {error}") from error

    def columns(self) -> list[str]:
        """The declared columns, or those of the first record."""
        opened = self._open()
        return list(opened.column_names or next(iter(opened), {}))

    def records(self, columns: Sequence[str] | None) -> Generator[Record, None, None]:
        """The records as the hub orders them."""
        opened = self._open()
        if columns is not None and opened.column_names:
            opened = opened.select_columns([name for name in columns if name in opened.column_names])
        for index, fields in enumerate(opened):
            yield Record(f"{self.name}, record {index}", fields)

    def describe(self, stored: dict[str, Any] | None = None) -> dict[str, Any]:
        """Name, subset, split and commit."""
        return {
            "kind": "hub",
            "name": self.name,
            "subset": self.subset,
            "split": self.split,
            "revision": self.commit,
        }
