"""Reading a capture that has not finished: the shards that are committed without a gap, or waiting for the end.

Shards are committed in any order, and a committed shard never changes. So the shards from the first one to the last
before the first gap are what a finished capture would give for the same rows; whoever has opened them sees these and no
others, however far the capture comes meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tailcache.storage.commits import commit_chain, committed_shards, read_tail_sum
from tailcache.storage.durable import sha256
from tailcache.storage.errors import ConfigError, CorruptError, IncompleteError
from tailcache.storage.layout import Layout, commit_path
from tailcache.storage.place import Place
from tailcache.storage.sealed import canonical

__all__ = ["prefix_hash", "prefix_mean_tail", "prefix_shards", "wait_until_finished"]

_PAUSES = (0.1, 5.0)
"""Seconds between two looks at a running capture: at first, and at most."""


def prefix_shards(place: Place, layout: Layout, num_shards: int | None = None) -> int:
    """How many shards, from the first on, are committed without a gap.

    Args:
      place: the teacher's.
      layout: the teacher's.
      num_shards: exactly so many are wanted; by default all that there are.

    Raises:
      ConfigError: a number of shards that the teacher cannot have.
      IncompleteError: not so many are committed, or none at all.

    Cost: lists the commit records; where the number is given and the capture has finished, one look.
    """
    if num_shards is not None:
        if not 1 <= num_shards <= layout.num_shards:
            raise ConfigError(f"{place}: expected 1 to {layout.num_shards} shards, found {num_shards}")
        if place.exists("complete.json"):
            return num_shards
    committed = committed_shards(place, layout)
    prefix = next((number for number, shard in enumerate(committed) if number != shard), len(committed))
    if prefix == 0 or (num_shards is not None and prefix < num_shards):
        wanted = "at least the first shard" if num_shards is None else f"the first {num_shards} shards"
        raise IncompleteError(
            f"{place}: expected {wanted} to be committed, found {prefix} without a gap, and {len(committed)} in all; "
            "wait for its capture, or run the same `tailcache capture` again"
        )
    return prefix if num_shards is None else num_shards


def prefix_hash(place: Place, manifest_seal: str, num_shards: int) -> str:
    """What identifies the first shards of a capture, whether it has finished or not: a hash over their records.

    Raises:
      CorruptError: one of them is missing.

    Cost: reads the commit records of these shards.
    """
    try:
        commits = commit_chain(place, num_shards)
    except FileNotFoundError as error:
        raise CorruptError(f"{place}: a commit record is missing ({error}); restore it from a copy") from error
    record = {"manifest": manifest_seal, "num_shards": num_shards, "commits": commits}
    return sha256(canonical(record))


def prefix_mean_tail(
    place: Place, layout: Layout, num_shards: int, tail_sum_hash: Callable[[int], str]
) -> NDArray[np.float32]:
    """[V] float32: the mean of the normalised tails of the first shards, from the sums that a running capture keeps.

    Args:
      place: the teacher's.
      layout: the teacher's.
      num_shards: how many shards.
      tail_sum_hash: of a shard, from its commit record.

    Raises:
      IncompleteError: the sums are not there any more, since the capture has finished meanwhile.
    """
    total = np.zeros(layout.vocab_size)
    if layout.format_version < 2:
        raise IncompleteError(
            f"{place}: expected a finished capture for its mean tail, found an unfinished one of format version 1, "
            "which keeps no sums by shard; finish it first"
        )
    try:
        for shard in range(num_shards):
            total += read_tail_sum(place, shard, tail_sum_hash(shard))
    except CorruptError as error:
        if place.exists("complete.json"):
            raise IncompleteError(
                f"{place}: expected the sums of the tails of its first {num_shards} shards, found none: the capture "
                "has finished meanwhile. Open the whole teacher, or choose what does not need its mean tail"
            ) from error
        raise
    return (total / total.sum() if total.sum() > 0 else total).astype(np.float32)


def wait_until_finished(
    place: Place,
    *,
    num_shards: Callable[[], int | None],
    timeout_s: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Return when a capture has finished.

    Args:
      place: the teacher's.
      num_shards: of the teacher, or none while its manifest is not there.
      timeout_s: seconds to wait at most; without, as long as it takes.
      progress: called at every look with the number of shards committed without a gap, and of all.

    Raises:
      IncompleteError: the time is over.

    Cost: a few small requests at every look, at most one look in five seconds; nothing is listed.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    pause, done = _PAUSES[0], 0
    total: int | None = None
    while not place.exists("complete.json"):
        total = num_shards() if total is None else total
        while total is not None and done < total and place.exists(commit_path(done)):
            done += 1
        if progress is not None:
            progress(done, total or 0)
        left = pause if end is None else min(pause, end - time.monotonic())
        if left <= 0:
            raise IncompleteError(
                f"{place}: its capture has not finished after {timeout_s:g} seconds: {done} of {total or 'unknown'} "
                "shards are committed without a gap. Wait longer, see whether it is still running, or run the same "
                "`tailcache capture` again to continue it"
            )
        time.sleep(left)
        pause = min(1.5 * pause, _PAUSES[1])
    if progress is not None and total is not None:
        progress(total, total)
