"""The settings of export: frozen, keyword-only, and light to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailcache.storage.errors import ConfigError

__all__ = ["ExportConfig"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write one teacher's targets as Parquet files or a `datasets` folder, with a dataset card.

    The columns are those that Axolotl's distillation trainer reads (input_ids, attention_mask, labels,
    target_token_ids, target_logprobs, target_mask), and further ones that say what is known of the tail. The folder
    appears, whole, when it is finished; its README.md says what is in it and how to load it.
    """

    cache: str | Path
    """Location of the cache: a folder, or a URL such as s3://bucket/folder."""

    teacher: str
    """Which of its teachers."""

    out: str | Path
    """Where to write: a folder that is not there yet or empty, or a URL."""

    format: Literal["parquet", "datasets"] = "parquet"
    """parquet: for `load_dataset`, Axolotl and anything that reads Parquet, compressed. datasets: Arrow files as
    `save_to_disk` writes them, which `load_from_disk` maps into memory; larger."""

    unit: Literal["document", "row"] = "document"
    """What one example is. document: a document (its part within one row of the corpus), which is what the teacher
    saw at a time, so that nothing has to be masked. row: a row of the corpus as it is packed; attention must then not
    cross from one document to the next (column position_ids)."""

    top_k: int | None = None
    """Tokens per position, at most the teacher's K, which is the default. The others join the tail."""

    extras: bool = True
    """Also write the columns that only tailcache has: the mass, entropy and draws of the tail, the log-probability of
    the true next token, and where in the corpus an example stands."""

    license: str = "unknown"
    """Licence of the data, for the dataset card, such as apache-2.0 or cc-by-4.0. Both the text's and the teacher's
    licence bear on it."""

    language: tuple[str, ...] = ()
    """Languages of the text, for the dataset card, such as en."""

    shard_megabytes: int = 500
    """Size of a file at most, before compression."""

    seed: int = 0
    """Another seed makes other draws, where --top-k is below the teacher's K."""

    def __post_init__(self) -> None:
        for name in ("top_k", "shard_megabytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        if self.seed < 0:
            raise ConfigError(f"--seed: expected 0 or more, found {self.seed}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ConfigError(
                f"--license: expected an identifier in lower case, such as apache-2.0, cc-by-4.0 or other, found "
                f"{self.license!r}"
            )
        for language in self.language:
            if not re.fullmatch(r"[a-z]{2,8}(-[A-Za-z0-9]{1,8})*", language):
                raise ConfigError(f"--language: expected codes such as en or pt-BR, found {language!r}")
