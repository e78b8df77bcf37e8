"""A teacher that runs beside the student: what every other tool does, and what a cache has to be as good as.

    tailcache train ... --online Qwen/Qwen2.5-3B

    live = OnlineTeacher(load_teacher("Qwen/Qwen2.5-3B", vocab_size=corpus.vocab_size))      # or from Python
    train(config, live=lambda teacher, device: live)         # or DistillTrainer(..., live=live)

For each micro-batch the teacher is run over the batch's documents, one document to a line as in a capture, and its
distributions become the targets: top-K, tail mass and entropy, the true token's probability, from the same code as a
capture's (``pipeline.head``), and for the tail `exact` the whole of them. They are held as one float32 [T, V] tensor
from the teacher's forward to the end of the student's; that tensor is made a chunk of positions at a time, and the
student's own logits are still never held as a whole.

Legend: N slots of a batch, S segments (documents' parts within a row) with a target, L longest of some, T target
positions, V vocabulary, W the same rounded up to blocks, D hidden width, K kept tokens, m draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.head import summarise_logits
from tailcache.pipeline.opened import open_teacher
from tailcache.pipeline.rows import head_chunks
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.errors import ConfigError, TeacherError
from tailcache.trainers.batches import TARGET_FIELDS
from tailcache.trainers.live import LOGPROBS
from tailcache.trainers.soundness import Stored

if TYPE_CHECKING:
    from tailcache.storage.reader import Teacher as StoredTeacher
    from tailcache.trainers.config import TrainConfig

__all__ = ["OnlineTeacher", "beside", "segment_lines"]


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """Some segments of a batch, padded on the right with token 0.

    Attributes:
      input_ids: [S, L].
      segment: [t] which of the segments each of their targets is in.
      place: [t] its place there.
      target: [t] its index among the batch's T targets.
    """

    input_ids: Tensor
    segment: Tensor
    place: Tensor
    target: Tensor


def segment_lines(batch: Mapping[str, Any], batch_positions: int) -> Iterator[_Lines]:
    """The documents of a batch, one to a line, each up to its last target.

    Args:
      batch: input_ids and position_ids [B, L] and target_index [T] of ``batches.collate``; a document begins wherever
        the position is 0, and padding continues the one before.
      batch_positions: positions of some lines at most, padding included; a longer segment comes alone.

    Yields:
      All segments that have a target, the longest first.
    """
    tokens_N, places_N = batch["input_ids"].reshape(-1), batch["position_ids"].reshape(-1)
    index_T = batch["target_index"]
    if not len(index_T):
        return
    starts_S = (places_N == 0).nonzero()[:, 0]
    segment_T = (places_N == 0).cumsum(0)[index_T] - 1
    lengths_S = torch.zeros_like(starts_S).scatter_reduce(0, segment_T, places_N[index_T] + 1, "amax")
    order = torch.argsort(lengths_S, descending=True, stable=True)
    lengths = lengths_S[order].tolist()
    rank_S = torch.empty_like(order)
    rank_S[order] = torch.arange(len(order), device=order.device)
    begin, count = 0, sum(length > 0 for length in lengths)
    while begin < count:
        end = min(count, begin + max(1, batch_positions // lengths[begin]))
        columns_L = torch.arange(lengths[begin], device=order.device)
        chosen_S1 = order[begin:end, None]
        slots_SL = (starts_S[chosen_S1] + columns_L).clamp_max(len(tokens_N) - 1)
        input_ids_SL = torch.where(columns_L < lengths_S[chosen_S1], tokens_N[slots_SL], 0)
        target = ((rank_S[segment_T] >= begin) & (rank_S[segment_T] < end)).nonzero()[:, 0]
        yield _Lines(
            input_ids=input_ids_SL,
            segment=rank_S[segment_T[target]] - begin,
            place=places_N[index_T[target]],
            target=target,
        )
        begin = end


class OnlineTeacher:
    """A ``trainers.live.LiveTeacher`` around a loaded teacher.

    Attributes:
      teacher: on the training device.
      top_k: K; what is exact does not depend on it where whole distributions are asked for.
      num_samples: m, draws from the tail, made anew for every batch; for the tail `sampled`.
    """

    def __init__(self, teacher: Teacher, *, top_k: int = 32, num_samples: int = 0, batch_positions: int = 4096) -> None:
        """Nothing is run yet.

        Args:
          teacher: of ``pipeline.load_teacher``, on the training device; call its ``probe`` before, which finds models
            that cannot be a teacher.
          top_k: tokens whose log-probs are kept beside what lies beyond them.
          num_samples: draws from the tail.
          batch_positions: positions that the teacher computes at a time at most, padding included.

        Raises:
          ConfigError: a number that makes no sense.
        """
        if not 1 <= top_k <= teacher.vocab_size or num_samples < 0 or batch_positions < 1:
            raise ConfigError(
                f"online teacher: expected 1 <= top_k <= {teacher.vocab_size}, num_samples >= 0 and batch_positions >= "
                f"1; found {top_k}, {num_samples} and {batch_positions}"
            )
        self.teacher, self.top_k = teacher, top_k
        self.num_samples = num_samples if top_k < teacher.vocab_size else 0
        self._batch_positions = teacher.batch_limit(batch_positions)

    @property
    def stored(self) -> Stored:
        """What its answers hold."""
        return Stored(
            top_k=self.top_k,
            vocab_size=self.teacher.vocab_size,
            num_samples=self.num_samples,
            hidden_kind="live",
        )

    @property
    def described(self) -> dict[str, Any]:
        """The teacher's weights and settings, for the record of a run."""
        return {
            "weights": self.teacher.weights_hash(),
            "dtype": str(self.teacher.dtype).removeprefix("torch."),
            "top_k": self.top_k,
            "num_samples": self.num_samples,
        }

    @torch.no_grad()
    def targets(self, batch: Mapping[str, Any], *, whole: bool) -> dict[str, Tensor]:
        """The targets of a batch; see ``LiveTeacher``.

        Args:
          batch: of ``batches.collate``, on the teacher's device.
          whole: give the distributions as a whole as well.

        Raises:
          TeacherError: logits that are not finite.

        Cost: the teacher's forward, its head once, and six passes over [T, V].
        """
        device, labels_T = self.teacher.device, batch["labels"]
        num, vocab_size = len(labels_T), self.teacher.vocab_size
        # Made here and filled in: what the teacher returns are inference tensors, which autograd refuses.
        fields = {name: torch.full((num,), torch.nan, device=device) for name in TARGET_FIELDS}
        fields["logprobs"] = torch.empty((num, self.top_k), device=device)
        fields["token_ids"] = torch.empty((num, self.top_k), dtype=torch.int64, device=device)
        fields["tail_samples"] = torch.empty((num, self.num_samples), dtype=torch.int64, device=device)
        if whole:
            fields[LOGPROBS] = torch.empty((num, vocab_size), device=device)
        # The student may be under autocast; a teacher has the precision it was loaded with.
        with torch.autocast(device_type=device.type, enabled=False):
            for lines in segment_lines(batch, self._batch_positions):
                hidden_SLD = self.teacher.hidden(lines.input_ids)
                hidden_tD = hidden_SLD[lines.segment, lines.place]
                del hidden_SLD
                self._fill(fields, lines.target, hidden_tD, labels_T[lines.target])
        finite = torch.isfinite(fields["logprobs"]).all() & torch.isfinite(fields["log_target"]).all()
        if not bool(finite) or bool(torch.isnan(fields["log_tail"]).any()):
            raise TeacherError(
                "online teacher: expected finite logits for every token of the vocabulary, found NaN or infinity in "
                "this batch; try another dtype or attention implementation, and check the weights"
            )
        return fields

    def _fill(self, fields: dict[str, Tensor], target_t: Tensor, hidden_tD: Tensor, labels_t: Tensor) -> None:
        """Summarise some positions, a chunk at a time."""
        matmul, summary = head_chunks(self.teacher, None)
        uniforms_t = torch.rand(len(labels_t), dtype=torch.float64, device=labels_t.device)
        for a in range(0, len(labels_t), matmul):
            logits_cW = self.teacher.logits(hidden_tD[a : a + matmul])
            for b in range(0, len(logits_cW), summary):
                piece_cW = logits_cW[b : b + summary]
                rows = slice(a + b, a + b + len(piece_cW))
                target_c = target_t[rows]
                whole_cV = piece_cW[:, : self.teacher.vocab_size].clone() if LOGPROBS in fields else None
                with torch.inference_mode():  # the logits were made in it, and are overwritten
                    found = summarise_logits(
                        piece_cW,
                        labels_t[rows],
                        uniforms_t[rows],
                        vocab_size=self.teacher.vocab_size,
                        top_k=self.top_k,
                        num_samples=self.num_samples,
                    )
                for name, values in vars(found).items():
                    if name in fields:
                        fields[name][target_c] = values
                if whole_cV is not None:
                    # The log-sum-exp, from the summary's float64 sums.
                    log_total_c1 = whole_cV.gather(-1, found.token_ids[:, :1]) - found.logprobs[:, :1]
                    fields[LOGPROBS][target_c] = whole_cV.sub_(log_total_c1)


def beside(config: TrainConfig) -> Callable[[StoredTeacher, torch.device], OnlineTeacher]:
    """What makes the teacher that a run's settings name, checked against the corpus as a capture would check it.

    Args:
      config: of the run; ``online`` is the teacher's source.

    Returns:
      The argument ``live`` of ``trainers.run.train``. K is that of the cached teacher, so that the same splits are
      allowed; draws are made only where a loss asks for them.
    """
    assert config.online is not None
    source, sampled = config.online, any(each.tail == "sampled" or each.name == "rs_kd" for each in config.divergences)

    def make(stored: StoredTeacher, device: torch.device) -> OnlineTeacher:
        sizes: dict[str, Any] = {"top_k": stored.top_k, "num_samples": stored.num_samples if sampled else 0}
        settings = CaptureConfig(cache=config.cache, teacher=source, name="online", device=str(device), **sizes)
        opened = open_teacher(settings, stored.corpus)
        return OnlineTeacher(opened.teacher, **sizes)

    return make
