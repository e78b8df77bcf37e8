"""The files of one exported split: examples are gathered into row groups, and these into files of bounded size.

Parquet: ``data/SPLIT-00000.parquet``, … . Arrow: ``SPLIT/data-00000.arrow``, … with the two records that
`datasets.load_from_disk` wants beside them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tailcache.storage import durable

__all__ = ["SplitFiles"]

_ZSTD_LEVEL = 6


class SplitFiles:
    """Append examples; ``finish`` writes what is left.

    Args:
      folder: of the export; it must exist.
      name: of the split.
      kind: "parquet", or "datasets" for Arrow.
      schema: of the examples.
      file_tokens: tokens of a file at most, but for a last row group that is larger.
      group_tokens: tokens of a row group, but for an example that is longer.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        kind: Literal["parquet", "datasets"],
        schema: pa.Schema,
        file_tokens: int,
        group_tokens: int,
    ) -> None:
        self._root, self._name, self._kind, self._schema = folder, name, kind, schema
        self._file_limit, self._group_limit = file_tokens, group_tokens
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_tokens = self._file_tokens = 0
        self._files: list[Path] = []
        self._sink: Any = None
        self._writer: Any = None

    def append(self, batch: pa.RecordBatch) -> None:
        """Take some examples, cut where a row group is full."""
        ends = np.cumsum(pc.list_value_length(batch.column("input_ids")).to_numpy())
        first = taken = 0
        while first < len(ends):
            room = self._group_limit - self._waiting_tokens
            last = int(np.searchsorted(ends, taken + room, side="right"))
            if last <= first and self._waiting:
                self._write_group()
                continue
            last = max(last, first + 1)
            self._waiting.append(batch.slice(first, last - first))
            self._waiting_tokens += int(ends[last - 1]) - taken
            first, taken = last, int(ends[last - 1])

    def finish(self) -> None:
        """Write what is left, and what goes with the split as a whole."""
        self._write_group()
        self._close_file()
        if self._files and self._kind == "datasets":
            self._write_records()

    def _write_group(self) -> None:
        if not self._waiting:
            return
        if self._writer is not None and self._file_tokens + self._waiting_tokens > self._file_limit:
            self._close_file()
        table = pa.Table.from_batches(self._waiting, self._schema).combine_chunks()
        with durable.named(self._root, "writing"):
            if self._writer is None:
                self._open_file()
            if self._kind == "parquet":
                self._writer.write_table(table, row_group_size=table.num_rows)
            else:
                self._writer.write_table(table)
        self._file_tokens += self._waiting_tokens
        self._waiting, self._waiting_tokens = [], 0

    def _open_file(self) -> None:
        folder, ending = ("data", "parquet") if self._kind == "parquet" else (self._name, "arrow")
        stem = self._name if self._kind == "parquet" else "data"
        path = self._root / folder / f"{stem}-{len(self._files):05d}.{ending}"
        path.parent.mkdir(exist_ok=True)
        self._files.append(path)
        self._sink = open(path, "wb")  # noqa: SIM115 - closed by _close_file, or by __exit__
        if self._kind == "parquet":
            self._writer = pq.ParquetWriter(
                self._sink, self._schema, compression="zstd", compression_level=_ZSTD_LEVEL, use_dictionary=False
            )
        else:
            self._writer = pa.ipc.new_stream(self._sink, self._schema)

    def _close_file(self) -> None:
        if self._writer is not None:
            with durable.named(self._files[-1], "writing"):
                self._writer.close()
                self._sink.flush()
                os.fsync(self._sink.fileno())
                self._sink.close()
            self._writer, self._file_tokens = None, 0

    def _write_records(self) -> None:
        from datasets import DatasetInfo, Features

        folder = self._root / self._name
        info = DatasetInfo(features=Features.from_arrow_schema(self._schema))
        info.write_to_directory(str(folder))
        state: dict[str, Any] = {
            "_data_files": [{"filename": path.name} for path in self._files],
            "_fingerprint": durable.sha256(str(self._schema).encode())[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._name,
        }
        durable.write_file(folder / "state.json", json.dumps(state, indent=1, sort_keys=True).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of a file that an error left open."""
        if self._sink is not None and not self._sink.closed:
            self._sink.close()
