"""The first stage's main loop: teacher over corpus, shard by shard, computing and writing at the same time.

The teacher fills a shard's records in memory; a writer thread encodes, compresses, writes and commits the shard while
the teacher is at the next one. At most two finished shards wait, so memory is bounded and the teacher only waits for a
disk that is slower than itself. A failure in either stops both; what is committed stays good.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.draws import FULL_TAIL, SAMPLING, draw_key, uniforms
from tailcache.pipeline.head import HeadSummary, summarise_logits
from tailcache.pipeline.hidden import encode_hidden
from tailcache.pipeline.load_teacher import load_teacher, load_teacher_tokenizer, model_revision
from tailcache.pipeline.segments import batch_segments
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.codec import SCALARS
from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.errors import ConfigError, MismatchError, TeacherError
from tailcache.storage.fingerprint import differing_components, fingerprint
from tailcache.storage.hidden import HiddenKind, HiddenLayout
from tailcache.storage.layout import Layout
from tailcache.storage.reader import open_cache
from tailcache.storage.targets import Targets, TargetsWriter, plan_layout

__all__ = ["CaptureReport", "capture", "capture_rows"]

_WAITING_SHARDS = 2
_CPU_HEAD_POSITIONS, _CPU_CACHE_BYTES = 256, 12 << 20
_GPU_LOGIT_BYTES = 1 << 30
_OPTIONAL: dict[str, Any] = {"temperatures": (), "hidden": "none"}


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """What one run of capture did."""

    positions: int
    """Target positions captured by this run (not those an earlier run had committed)."""
    resumed_shards: int
    num_shards: int
    seconds: float
    bytes_per_position: float
    """Of all per-position arrays on disk, over all committed shards."""
    logits: str
    """How the teacher's logits were computed."""


@dataclass
class _Records:
    """One shard's records while they are filled in, in the order batches come."""

    targets: Targets
    tail_sum: NDArray[np.float64]

    @staticmethod
    def empty(
        num: int, top_k: int, num_samples: int, num_temperatures: int, vocab_size: int, hidden: HiddenLayout | None
    ) -> _Records:
        floats: dict[str, Any] = {name: np.full(num, np.nan, np.float32) for name in SCALARS}
        if hidden is not None:
            floats["hidden"] = np.zeros((num, hidden.width), hidden.dtype)
            floats["hidden_scale"] = np.full(num, np.nan, np.float32)
        # What is not filled stays NaN, and is found out.
        targets = Targets(
            token_ids=np.zeros((num, top_k), np.int32),
            logprobs=np.full((num, top_k), np.nan, np.float32),
            tail_samples=np.zeros((num, num_samples), np.int32),
            log_z_tail=np.full((num, num_temperatures), np.nan, np.float32),
            **floats,
        )
        return _Records(targets, np.zeros(vocab_size))

    def fill(self, where: NDArray[np.int64], summary: HeadSummary) -> None:
        for name, values in vars(summary).items():
            getattr(self.targets, name)[where] = values.cpu().numpy()

    def fill_hidden(self, where: NDArray[np.int64], hidden_TD: torch.Tensor, kind: HiddenKind) -> None:
        self.targets.hidden[where], self.targets.hidden_scale[where] = encode_hidden(hidden_TD, kind)


def _head_chunks(teacher: Teacher, head_positions: int | None) -> tuple[int, int]:
    """Positions per head matmul, and per summary of its logits."""
    if head_positions is not None and head_positions < 1:
        raise ConfigError(f"head_positions: expected at least 1, found {head_positions}")
    row_bytes = 4 * teacher.vocab_size
    if teacher.device.type == "cpu":
        return head_positions or _CPU_HEAD_POSITIONS, max(1, _CPU_CACHE_BYTES // (2 * row_bytes))
    chunk = head_positions or max(1, _GPU_LOGIT_BYTES // row_bytes)
    return chunk, chunk


@torch.inference_mode()
def capture_rows(
    teacher: Teacher,
    rows: Rows,
    *,
    first_target: int,
    key: int,
    top_k: int,
    num_samples: int,
    temperatures: tuple[float, ...] = (),
    hidden: HiddenLayout | None = None,
    batch_positions: int,
    head_positions: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Targets, NDArray[np.float64]]:
    """The teacher's targets for all target positions of some rows.

    Args:
      teacher: from ``load_teacher``.
      rows: whole rows, usually a shard's.
      first_target: index, over the whole corpus, of the rows' first target; with ``key`` it seeds the draws.
      key: from ``draw_key``.
      top_k: tokens kept.
      num_samples: draws from the tail.
      temperatures: further ones at which the tail is summed.
      hidden: how to keep the hidden states; none: not at all.
      batch_positions: positions of a batch at most.
      head_positions: positions whose logits exist at a time.
      progress: called with the number of positions done, batch by batch.

    Returns:
      The targets in the corpus' order, and the [V] sum of their normalised tails.

    Raises:
      TeacherError: logits or hidden states that are not finite (names the row and the token).
    """
    num = int(rows.supervised.sum())
    records = _Records.empty(num, top_k, num_samples, len(temperatures), teacher.vocab_size, hidden)
    matmul, summary = _head_chunks(teacher, head_positions)
    device = teacher.device
    tail_sum_V: torch.Tensor | None = None
    scratch: torch.Tensor | None = None
    for batch in batch_segments(rows, teacher.batch_limit(batch_positions)):
        hidden_BLD = teacher.hidden(torch.from_numpy(batch.input_ids).to(device))
        hidden_TD = hidden_BLD[torch.from_numpy(batch.segment).to(device), torch.from_numpy(batch.place).to(device)]
        if hidden is not None:
            records.fill_hidden(batch.target, hidden_TD, hidden.kind)
        next_T = torch.from_numpy(batch.next_token).to(device)
        uniforms_T = torch.from_numpy(uniforms(key, batch.target + first_target)).to(device)
        for a in range(0, len(next_T), matmul):
            logits_TV = teacher.logits(hidden_TD[a : a + matmul])
            if tail_sum_V is None:
                tail_sum_V = torch.zeros(logits_TV.shape[1], dtype=torch.float64, device=device)
                scratch = torch.empty((min(summary, matmul), logits_TV.shape[1]), device=device)
            for b in range(0, len(logits_TV), summary):
                piece_TV = logits_TV[b : b + summary]
                chunk = slice(a + b, a + b + len(piece_TV))
                assert scratch is not None
                records.fill(
                    batch.target[chunk],
                    summarise_logits(
                        piece_TV,
                        next_T[chunk],
                        uniforms_T[chunk],
                        vocab_size=teacher.vocab_size,
                        top_k=top_k,
                        num_samples=num_samples,
                        temperatures=temperatures,
                        tail_sum_V=tail_sum_V,
                        scratch_TV=scratch[: len(piece_TV)],
                    ),
                )
        if progress is not None:
            progress(len(next_T))
    _check_finite(records.targets, rows)
    if tail_sum_V is not None:
        records.tail_sum += tail_sum_V[: teacher.vocab_size].cpu().numpy()
    return records.targets, records.tail_sum


def _check_finite(targets: Targets, rows: Rows) -> None:
    good = np.isfinite(targets.logprobs).all(axis=1) & np.isfinite(targets.log_target)
    good &= ~(np.isnan(targets.log_tail) | np.isnan(targets.tail_entropy) | np.isnan(targets.log_not_target))
    good &= ~np.isnan(targets.log_z_tail).any(axis=1)
    _fail_where(~good, rows, "logits for every token of the vocabulary")
    _fail_where(~np.isfinite(targets.hidden_scale), rows, "hidden states (within bfloat16's range for --hidden bf16)")


def _fail_where(bad: NDArray[np.bool_], rows: Rows, expected: str) -> None:
    if not bad.any():
        return
    position = int(np.flatnonzero(rows.supervised)[np.flatnonzero(bad)[0]])
    row = int(np.searchsorted(rows.offsets, position, side="right")) - 1
    raise TeacherError(
        f"row {rows.row_indices[row]}, token {position - rows.offsets[row]}: expected finite {expected}, found NaN, "
        f"infinity or values below -1e30 ({int(bad.sum())} such positions in this shard); try --dtype float32 or "
        "another --attn-implementation, and check the weights. Committed shards stay good"
    )


class _WriterThread:
    """Writes and commits shards in the background; its failure surfaces at the next call."""

    def __init__(self, writer: TargetsWriter, committed: Callable[[], None]) -> None:
        self._writer, self._committed = writer, committed
        self._queue: queue.Queue[tuple[int, Targets, NDArray[np.float64]] | None] = queue.Queue(_WAITING_SHARDS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tailcache-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._writer.write_shard(*item)
                    self._committed()
                except BaseException as error:
                    self._error = error

    def put(self, shard: int, targets: Targets, tail_sum: NDArray[np.float64]) -> None:
        self.check()
        self._queue.put((shard, targets, tail_sum))

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Let the queue drain; does not raise, so that it can be called while another error is on its way."""
        self._queue.put(None)
        self._thread.join()


def _check_tokenizer(config: CaptureConfig, corpus: Corpus) -> str:
    """Compare the tokenizer beside the teacher with the corpus' own."""
    tokenizer = load_teacher_tokenizer(config.teacher, config.revision, trust_remote_code=config.trust_remote_code)
    if tokenizer is None:
        return "no tokenizer lies beside the teacher: only the size of its vocabulary was checked"
    expected = corpus.manifest["tokenizer"].get("fingerprint", {})
    different = differing_components(expected, fingerprint(tokenizer)) if expected else []
    if different:
        raise MismatchError(
            f"teacher {config.teacher}: its tokenizer does not match the corpus {corpus.place}: expected the same "
            f"{', '.join(different)}, found others; prepare a corpus with this teacher's tokenizer"
        )
    return "same tokenizer as the corpus"


def _check_lengths(teacher: Teacher, corpus: Corpus) -> None:
    limit = teacher.max_length
    if limit is None:
        return
    previous = 0
    first = 0
    for offsets in corpus.stream("row_offsets"):
        lengths = np.diff(offsets, prepend=previous)
        if len(lengths) and lengths.max() > limit:
            row = first + int(np.argmax(lengths)) - 1
            raise ConfigError(
                f"row {row}: expected at most {limit} tokens, the longest this teacher was made for, found "
                f"{lengths.max()}; prepare the corpus with --context-length {limit}"
            )
        previous, first = int(offsets[-1]), first + len(offsets)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("tailcache", "torch", "transformers", "numpy", "zarr", "numcodecs"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _settings(config: CaptureConfig, teacher: Teacher) -> dict[str, Any]:
    """Everything that decides the stored values; a capture is continued only if all of it is equal."""
    chunk, summary = _head_chunks(teacher, config.head_positions)
    device = torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else teacher.device.type
    return {
        "weights": teacher.weights_hash(),
        "model": _model_config(teacher),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "attn_implementation": getattr(teacher.model.config, "_attn_implementation", None),
        "weight_bits": config.weight_bits,
        "weight_group": config.weight_group if config.weight_bits is not None else None,
        "head_width": teacher.head_width,
        "split_head": teacher.split,
        "device": device,
        "batch_positions": config.batch_positions,
        "head_chunk": [chunk, summary],
        "sampling": SAMPLING,
        "full_tail": FULL_TAIL,
        "sample_seed": config.sample_seed,
        "versions": _versions(),
    }


def _model_config(teacher: Teacher) -> dict[str, Any]:
    """The model's own configuration: equal weights under other rotary settings or windows are another teacher."""
    values: dict[str, Any] = json.loads(teacher.model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "use_cache"):
        values.pop(name, None)
    return values


def capture(config: CaptureConfig, *, teacher: Teacher | None = None, show_progress: bool = True) -> CaptureReport:
    """Capture a teacher over a corpus, or continue to.

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
    if config.threads is not None:
        if config.threads < 1:
            raise ConfigError(f"threads: expected at least 1, found {config.threads}")
        torch.set_num_threads(config.threads)
    corpus = open_cache(config.cache).corpus
    layout = plan_layout(
        corpus,
        top_k=config.top_k,
        num_samples=config.num_samples,
        temperatures=config.temperatures,
        shard_positions=config.shard_positions,
        chunk=config.chunk_positions,
        compression_level=config.compression_level,
    )
    tokenizer_note, revision = "teacher given as an object: its tokenizer was not checked", None
    if teacher is None:
        tokenizer_note = _check_tokenizer(config, corpus)
        teacher = load_teacher(
            config.teacher,
            vocab_size=corpus.vocab_size,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device,
            attn_implementation=config.attn_implementation,
            weight_bits=config.weight_bits,
            weight_group=config.weight_group,
            trust_remote_code=config.trust_remote_code,
        )
        revision = model_revision(teacher, config.revision)
    _check_lengths(teacher, corpus)
    logits_note = teacher.probe(torch.from_numpy(corpus.rows(0, 1).tokens))
    head = None
    if config.hidden != "none":
        head = teacher.stored_head()
        layout = replace(layout, hidden=HiddenLayout.of(config.hidden, head))
    path = Path(config.teacher).expanduser()
    provenance = {
        "teacher": path.resolve().name if path.exists() else config.teacher,
        "revision": revision,
        "logits": logits_note.split(" (")[0],
        "tokenizer": tokenizer_note,
        "config": _resolved(config),
    }
    settings = _settings(config, teacher)
    with TargetsWriter(
        corpus, config.name, layout=layout, settings=settings, provenance=provenance, head=head
    ) as writer:
        resumed = writer.num_committed
        start = time.perf_counter()
        positions = _run(config, corpus, layout, teacher, writer, show_progress)
        writer.finish()
        return CaptureReport(
            positions=positions,
            resumed_shards=resumed,
            num_shards=layout.num_shards,
            seconds=time.perf_counter() - start,
            bytes_per_position=writer.bytes_written / layout.num_positions,
            logits=logits_note,
        )


def _resolved(config: CaptureConfig) -> dict[str, Any]:
    """The settings as JSON values; places on this machine are left out, so that the bytes do not depend on them.

    Optional fields are named only where they are captured: without them, a cache has the bytes it had before they were
    known.
    """
    places = ("cache", "teacher", "threads")
    off = {name for name, default in _OPTIONAL.items() if getattr(config, name) == default}
    values = {name: value for name, value in vars(config).items() if name not in places and name not in off}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {n: value if isinstance(value, int | float | list | None) else str(value) for n, value in values.items()}


def _run(
    config: CaptureConfig, corpus: Corpus, layout: Layout, teacher: Teacher, writer: TargetsWriter, show: bool
) -> int:
    key = draw_key(corpus.hash, config.sample_seed)
    done_before = 0
    if writer.num_committed:
        row = layout.shard_rows(writer.num_committed - 1)[1]
        done_before = int(corpus.target_offsets(row, row)[0])
    with tqdm(
        total=layout.num_positions,
        initial=done_before,
        unit="pos",
        unit_scale=True,
        desc=f"capture {config.name}",
        disable=not show,
        smoothing=0.1,
    ) as bar:

        def committed() -> None:
            row = layout.shard_rows(writer.num_committed - 1)[1]
            covered = max(1, int(corpus.target_offsets(row, row)[0]))
            bar.set_postfix_str(
                f"{writer.bytes_written / covered:.1f} B/pos, shards {writer.num_committed}/{layout.num_shards}"
            )

        background = _WriterThread(writer, committed)

        def advanced(positions: int) -> None:
            bar.update(positions)
            background.check()  # a full disk stops the teacher at its next batch, not at its next shard

        try:
            for shard in _pending(writer, layout):
                first, last = layout.shard_rows(shard)
                targets, tail_sum = capture_rows(
                    teacher,
                    corpus.rows(first, last),
                    first_target=int(corpus.target_offsets(first, first)[0]),
                    key=key,
                    top_k=layout.top_k,
                    num_samples=layout.num_samples,
                    temperatures=layout.temperatures,
                    hidden=layout.hidden,
                    batch_positions=config.batch_positions,
                    head_positions=config.head_positions,
                    progress=advanced,
                )
                background.put(shard, targets, tail_sum)
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"the device ran out of memory with batches of {config.batch_positions} positions: "
                f"{str(error).splitlines()[0]}; lower --batch-positions (under another --name if shards are committed)"
            ) from error
        finally:
            background.join()
        background.check()
    return layout.num_positions - done_before


def _pending(writer: TargetsWriter, layout: Layout) -> Iterator[int]:
    yield from range(writer.num_committed, layout.num_shards)
