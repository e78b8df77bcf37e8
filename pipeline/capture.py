"""The first stage's main loop: teacher over corpus, shard by shard, computing and writing at the same time.

The teacher fills a shard's records in memory; a writer thread encodes, compresses, writes and commits the shard while
the teacher is at the next one. At most two finished shards wait, so memory is bounded and the teacher only waits for a
disk that is slower than itself. A failure in either stops both; what is committed stays good.

Any number of processes may run the same capture at once: each claims the next shard that no other has, and at the end
waits for the others' shards, or takes over those of a process that died.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tailcache.pipeline.background import WriterThread
from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.draws import draw_key
from tailcache.pipeline.opened import OpenedTeacher, open_teacher
from tailcache.pipeline.rows import capture_rows
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.errors import TeacherError
from tailcache.storage.reader import open_cache
from tailcache.storage.targets import Targets, TargetsWriter

__all__ = ["CaptureReport", "capture", "capture_rows", "capture_shard"]


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """What one run of capture did."""

    positions: int
    """Target positions captured by this run: not those that were committed before, or by others."""
    resumed_shards: int
    """Shards that were committed before."""
    other_shards: int
    """Shards that other processes captured meanwhile."""
    num_shards: int
    seconds: float
    bytes_per_position: float
    """Of all per-position arrays on disk, over all committed shards."""
    logits: str
    """How the teacher's logits were computed."""


def capture(config: CaptureConfig, *, teacher: Teacher | None = None, show_progress: bool = True) -> CaptureReport:
    """Capture a teacher over a corpus, continue to, or help another process that does.

    Args:
      config: what to capture; see ``CaptureConfig``.
      teacher: one that is loaded already, instead of ``config.teacher``.
      show_progress: draw a progress bar.

    Raises:
      MismatchError: the tokenizer does not match, or a capture of this name has other settings (says which).
      TeacherError: logits or hidden states that are not finite, a head that is too narrow, one that is not all there
        is to the logits where hidden states are to be kept, or a device whose memory is too small.
      StorageError: the disk is full or failing; committed shards stay good, and the same command continues.
    """
    opened = open_teacher(config, open_cache(config.cache).corpus, teacher)
    with opened.writer(config.name) as writer:
        resumed = writer.num_committed
        start = time.perf_counter()
        taken = _run(config, opened, writer, show_progress)
        return CaptureReport(
            positions=writer.positions - writer.positions_of_others,
            resumed_shards=resumed,
            other_shards=opened.layout.num_shards - resumed - taken,
            num_shards=opened.layout.num_shards,
            seconds=time.perf_counter() - start,
            bytes_per_position=writer.bytes_written / opened.layout.num_positions,
            logits=opened.logits,
        )


def capture_shard(
    opened: OpenedTeacher, config: CaptureConfig, shard: int, progress: Callable[[int], object] | None = None
) -> tuple[Targets, NDArray[np.float64]]:
    """The targets of a shard, and the [V] sum of their normalised tails; errors of ``capture_rows``."""
    corpus, layout = opened.corpus, opened.layout
    first, last = layout.shard_rows(shard)
    try:
        return capture_rows(
            opened.teacher,
            corpus.rows(first, last),
            first_target=int(corpus.target_offsets(first, first)[0]),
            key=draw_key(corpus.hash, config.sample_seed),
            top_k=layout.top_k,
            num_samples=layout.num_samples,
            temperatures=layout.temperatures,
            hidden=layout.hidden,
            batch_positions=config.batch_positions,
            head_positions=config.head_positions,
            progress=progress,
        )
    except torch.OutOfMemoryError as error:
        raise TeacherError(
            f"the device ran out of memory with batches of {config.batch_positions} positions: "
            f"{str(error).splitlines()[0]}; lower --batch-positions (under another --name if shards are committed)"
        ) from error


def _run(config: CaptureConfig, opened: OpenedTeacher, writer: TargetsWriter, show: bool) -> int:
    """Capture until all is there; how many shards this process captured."""
    computed = taken = 0
    ready = False  # the constants are there, or on their way to the writer
    held: list[tuple[int, Targets, NDArray[np.float64]]] = []
    with tqdm(
        total=writer.layout.num_positions,
        initial=writer.positions,
        unit="pos",
        unit_scale=True,
        desc=f"capture {config.name}",
        disable=not show,
        smoothing=0.1,
    ) as bar:

        def committed() -> None:
            writer.refresh()
            size = writer.bytes_written / max(1, writer.positions)
            bar.set_postfix_str(f"{size:.1f} B/pos, shards {writer.num_committed}/{writer.layout.num_shards}")

        background = WriterThread(writer, committed)

        def advanced(positions: int) -> None:
            nonlocal computed
            computed += positions
            bar.update(writer.positions_of_others + computed - bar.n)
            background.check()  # a full disk stops the teacher at its next batch, not at its next shard

        def hand_over() -> None:
            """Give the writer what is computed, unless the constants it needs are still another process' work."""
            nonlocal ready
            ready = ready or (bool(held) and (held[0][0] == 0 or writer.started))
            while held and ready:
                background.put(*held.pop(0))

        def waiting() -> None:
            advanced(0)
            hand_over()

        try:
            for shard in writer.shards(waiting):
                hand_over()
                held.insert(0 if shard == 0 else len(held), (shard, *capture_shard(opened, config, shard, advanced)))
                hand_over()
                taken += 1
        finally:
            background.join()
        background.check()
        writer.finish(waiting)
        advanced(0)
    return taken
