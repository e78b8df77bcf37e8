"""Read the records of one local file, in order, holding a small part of it in memory at a time.

    .parquet                  column pages through a buffered reader
    .arrow                    IPC streams and IPC files, memory-mapped
    .jsonl .ndjson .json      JSON lines, one array of objects, or objects one after another
    .txt .text                a document per line, per paragraph or per file

These are the formats `datasets` reads and writes, and its declarations of columns are honoured (files it saved
come out as it would give them); its hub sets are read by `datasets` itself. Local files are not, because its
readers are not strict enough for a corpus: its parquet scanner holds a whole row group (measured on a file of one
290 MB group: 530 MB against 30 MB here); its JSON reader needs one type per column, so that a date-like text
becomes a timestamp, a column that starts with nulls cannot go on with text, and chats gain keys they do not
have; its text reader decodes compressed files in the encoding of the machine.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from tailcache.pipeline.json_records import decode_json
from tailcache.storage.errors import DataError

__all__ = ["file_columns", "file_format", "read_file", "supported_suffixes"]

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ROWS_AT_ONCE = 64
BUFFER_BYTES = 1 << 20


def file_format(path: Path) -> str | None:
    """The format of a file by its name, "parquet", "arrow", "json" or "text"; None for any other file."""
    suffix = path.suffix.lower()
    if suffix in FORMATS:
        return FORMATS[suffix]
    inner = FORMATS.get(Path(path.stem).suffix.lower())
    return inner if suffix in COMPRESSED and inner in ("json", "text") else None


def supported_suffixes() -> str:
    """The file names that can be read, for messages."""
    return f"{', '.join(FORMATS)}; JSON and text also compressed ({', '.join(COMPRESSED)})"


def file_columns(path: Path) -> list[str]:
    """The columns of a file: from its schema, or from the first record where there is none.

    Raises:
      DataError: the file is damaged or not what its name says.
    """
    format_ = file_format(path)
    if format_ == "text":
        return ["text"]
    if format_ == "json":
        return list(next(read_file(path), {}))
    with _explained(path), ExitStack() as stack:
        schema = _open_parquet(path, stack).schema_arrow if format_ == "parquet" else _open_arrow(path, stack)[0]
        return [str(name) for name in schema.names]


def read_file(
    path: Path,
    columns: Sequence[str] | None = None,
    text_files: Literal["line", "paragraph", "document"] = "line",
) -> Iterator[dict[str, Any]]:
    """The records of one file, in order.

    Args:
      path: a file of one of the `FORMATS`.
      columns: which columns to read where the format can skip the others; None reads all.
      text_files: what a document of a text file is.

    Yields:
      One dict per record; for text files, {"text": document}.

    Raises:
      DataError: the file is damaged or not what its name says.

    Cost: in memory, one record, some 64 rows, a megabyte of text or one page per column, whichever is most.
    """
    format_ = file_format(path)
    with _explained(path), ExitStack() as stack:
        if format_ == "parquet":
            file = _open_parquet(path, stack)
            batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=_present(file.schema_arrow, columns))
            yield from _rows(file.schema_arrow, batches, columns)
        elif format_ == "arrow":
            schema, batches = _open_arrow(path, stack)
            yield from _rows(schema, batches, columns)
        else:
            text = stack.enter_context(_open_text(path))
            if format_ == "json":
                yield from decode_json(iter(lambda: text.read(BUFFER_BYTES), ""))
            else:
                yield from _read_text(text, text_files)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say which file it was when a reader fails."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:  # pyarrow's are ValueErrors
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _present(schema: Any, columns: Sequence[str] | None) -> list[str] | None:
    return None if columns is None else [name for name in columns if name in schema.names]


def _open_parquet(path: Path, stack: ExitStack) -> Any:
    import pyarrow.parquet as pq

    return stack.enter_context(pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False))


def _open_arrow(path: Path, stack: ExitStack) -> tuple[Any, Iterator[Any]]:
    """The schema and the batches of an IPC stream or an IPC file; `datasets` writes either."""
    import pyarrow as pa

    mapped = stack.enter_context(pa.memory_map(str(path), "r"))
    try:
        stream = stack.enter_context(pa.ipc.open_stream(mapped))
        return stream.schema, iter(stream)
    except pa.ArrowInvalid:
        mapped.seek(0)
        file = stack.enter_context(pa.ipc.open_file(mapped))
        return file.schema, (file.get_batch(index) for index in range(file.num_record_batches))


def _rows(schema: Any, batches: Iterable[Any], columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """The rows of record batches as Python values, decoded the way `datasets` declares its columns."""
    import pyarrow as pa
    from datasets import Features

    names = _present(schema, columns)
    read = schema if names is None else pa.schema([schema.field(name) for name in names], schema.metadata)
    features = Features.from_arrow_schema(read)
    for batch in batches:
        chosen = batch if names is None else batch.select(names)
        for first in range(0, chosen.num_rows, ROWS_AT_ONCE):
            part = chosen.slice(first, ROWS_AT_ONCE)
            part.validate(full=True)
            for row in part.to_pylist():
                yield features.decode_example(row)


def _open_text(path: Path) -> IO[str]:
    """A possibly compressed file as text; a byte order mark is skipped."""
    suffix = path.suffix.lower()
    binary: Any
    if suffix == ".zst":
        import pyarrow as pa

        binary = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    else:
        binary = OPENERS.get(suffix, open)(path, "rb")
    return io.TextIOWrapper(binary, encoding="utf-8-sig")


def _read_text(text: IO[str], text_files: str) -> Iterator[dict[str, Any]]:
    """The documents of a text file; line breaks at their ends are not part of them, except of a whole file."""
    if text_files == "document":
        yield {"text": text.read()}
        return
    paragraph: list[str] = []
    for line in text:
        if text_files == "line":
            yield {"text": line.removesuffix("\n")}
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield {"text": "".join(paragraph).removesuffix("\n")}
            paragraph = []
    if paragraph:
        yield {"text": "".join(paragraph).removesuffix("\n")}
