"""The verb ``prepare``: text, chats or token ids become the corpus of a cache."""

from __future__ import annotations

from tailcache.pipeline.config import PrepareConfig

__all__ = ["run"]


def run(config: PrepareConfig) -> None:
    """Prepare the corpus and print what was counted.

    Raises:
      TailcacheError: the source, the tokenizer, a record or the cache is not usable; the message says which.
    """
    from tailcache.pipeline.prepare import prepare, report_lines

    print("\n".join(report_lines(prepare(config))))
