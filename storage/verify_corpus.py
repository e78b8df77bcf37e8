"""What the decoded arrays of a corpus say about each other and about its manifest; what cannot be is a fault."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from tailcache.storage.alignment import supervise_next
from tailcache.storage.corpus import Corpus
from tailcache.storage.durable import sha256
from tailcache.storage.sealed import canonical

__all__ = ["corpus_problems"]

_BLOCK_TOKENS = 1 << 20


def corpus_problems(corpus: Corpus) -> Iterator[str]:
    """Recompute everything the manifest says of the corpus, a bounded block of rows at a time.

    Args:
      corpus: one whose files are what was written.

    Yields:
      What was expected and found.

    Raises:
      TailcacheError: something cannot be read at all.
    """
    digests = {name: hashlib.sha256() for name in ("tokens", "document_start", "supervised", "row_lengths", "held_out")}
    counts = np.zeros(corpus.vocab_size, dtype=np.int64)
    num_tokens = num_targets = 0
    for first, last in _row_blocks(corpus):
        rows = corpus.rows(first, last)
        lengths = np.diff(rows.offsets)
        if (lengths < 1).any():
            yield f"rows [{first}, {last}): expected row offsets that increase"
            return
        if rows.tokens.size and (rows.tokens.min() < 0 or rows.tokens.max() >= corpus.vocab_size):
            yield f"rows [{first}, {last}): a token id outside the vocabulary of {corpus.vocab_size}"
            return
        possible = supervise_next(np.ones(len(rows.tokens), np.bool_), rows.offsets, rows.document_start)
        if (rows.supervised & ~possible).any():
            yield f"rows [{first}, {last}): a supervised position whose next token is in another row or document"
        targets = np.add.reduceat(rows.supervised.astype(np.int64), rows.offsets[:-1])
        expected = num_targets + np.concatenate([[0], np.cumsum(targets)])
        if (corpus.target_offsets(first, last) != expected).any():
            yield f"rows [{first}, {last}): target_offsets are not the running count of supervised positions"
        digests["tokens"].update(rows.tokens.astype("<u4").tobytes())
        digests["document_start"].update(rows.document_start.tobytes())
        digests["supervised"].update(rows.supervised.tobytes())
        digests["row_lengths"].update(lengths.astype("<u8").tobytes())
        digests["held_out"].update(rows.held_out.tobytes())
        counts += np.bincount(rows.tokens, minlength=corpus.vocab_size)
        num_tokens += len(rows.tokens)
        num_targets += int(rows.supervised.sum())
    parts = {name: digest.hexdigest() for name, digest in digests.items()}
    for name, value in parts.items():
        if corpus.manifest["content"].get(name) != value:
            yield f"content hash of {name}: stored {corpus.manifest['content'].get(name)}, computed {value}"
    total = sha256(canonical({**parts, "vocab_size": corpus.vocab_size}))
    if total != corpus.hash:
        yield f"corpus hash: stored {corpus.hash}, computed {total}"
    if (num_tokens, num_targets) != (corpus.num_tokens, corpus.num_targets):
        yield (
            f"expected {corpus.num_tokens} tokens and {corpus.num_targets} targets, found {num_tokens} and "
            f"{num_targets}"
        )
    if (corpus.token_counts != counts).any():
        yield "token_counts are not the counts of the tokens"


def _row_blocks(corpus: Corpus) -> Iterator[tuple[int, int]]:
    size = max(1, _BLOCK_TOKENS * corpus.num_rows // max(1, corpus.num_tokens))
    for first in range(0, corpus.num_rows, size):
        yield first, min(first + size, corpus.num_rows)
