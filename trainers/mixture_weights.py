"""The weights of a mixture of teachers, position by position: constant, by domain, given, or by confidence.

    w_i(t) = b_i(t) exp(g s_i(t)) / sum_k b_k(t) exp(g s_k(t))

b are base weights: one for each teacher, or from an array by corpus row or by target position, either outright or
through a label (a domain) and a table of weights for each label. s is nothing; log p_i(y), of the true next token (g =
1 then makes w the posterior of the teachers, given y); or -H(p_i), minus the entropy of the whole distribution, exact
from the cache. g is the sharpness.

A weight that depends on y makes the mixture a teacher that has seen the answer: its p(y) is above the mean of the
teachers'. Entropy does not look at y.

A corpus has no domains of its own, but its tokens and where documents begin: ``documents_of_targets`` says which
document each target position is in, and ``weights_by_row`` runs a function over the rows.

Legend: T target positions of a batch, R rows and N target positions of the corpus, n teachers, D domains.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tailcache.storage.errors import ConfigError, NotFoundError
from tailcache.storage.several import Teachers, field_name
from tailcache.trainers.batches import Batch, Layout, terms_of_each
from tailcache.trainers.mixture_config import Confidence, MixtureConfig
from tailcache.trainers.terms import TeacherTerms, weighted

if TYPE_CHECKING:
    from tailcache.storage.corpus import Corpus, Rows
    from tailcache.storage.several import AnyTeacher

__all__ = ["MixtureWeights", "documents_of_targets", "entropies", "weighted_collate", "weights_by_row"]

By = Literal["rows", "positions"]
_BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class MixtureWeights:
    """The weights of n teachers at every target position of a corpus; a pure function of a batch.

    Attributes:
      corpus: whose positions.
      constant: n base weights >= 0, not all 0; used where there is no ``values``.
      by: what ``values`` has one entry for: each row of the corpus, or each target position.
      values: [R or N, n] base weights, or [R or N] int labels.
      table: [D, n] base weights of each label.
      confidence, sharpness: see the module.

    Raises:
      ConfigError: a shape, a label or a weight that cannot be; names it.
    """

    corpus: Corpus
    constant: tuple[float, ...]
    by: By = "rows"
    values: NDArray[Any] | None = None
    table: NDArray[np.float64] | None = None
    confidence: Confidence = "none"
    sharpness: float = 1.0
    _offsets: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        num = len(self.constant)
        _check_weights("weights", np.asarray([self.constant], dtype=np.float64), (1, num))
        by_position = self.values is not None and self.by == "positions"
        corpus = self.corpus
        offsets = corpus.target_offsets(0, corpus.num_rows) if by_position else np.zeros(0, np.int64)
        object.__setattr__(self, "_offsets", offsets)
        if self.values is None:
            return
        length = self.corpus.num_rows if self.by == "rows" else self.corpus.num_targets
        if self.table is None:
            _check_weights(self.by, self.values, (length, num))
            return
        _check_weights("weights", self.table, (len(self.table), num))
        labels = self.values
        if labels.shape != (length,) or labels.dtype.kind not in "iu":
            raise ConfigError(
                f"{self.by}: expected {length} whole numbers, one domain for each; found {labels.dtype} of shape "
                f"{list(labels.shape)}"
            )
        if length and not 0 <= labels.min() <= labels.max() < len(self.table):
            raise ConfigError(
                f"{self.by}: expected domains from 0 to {len(self.table) - 1}, as weights has; found {labels.min()} to "
                f"{labels.max()}"
            )

    @classmethod
    def from_config(cls, config: MixtureConfig, teachers: Teachers) -> MixtureWeights:
        """The weights that the settings describe.

        Raises:
          NotFoundError: there is no such file.
          ConfigError: it holds something else.
        """
        num = len(teachers.teachers)
        given: dict[str, Any] = {"confidence": config.teacher_confidence, "sharpness": config.teacher_sharpness}
        if config.teacher_weights_file is not None:
            given |= _read(config.teacher_weights_file)
        constant = config.teacher_weights or (1.0,) * num
        return cls(corpus=teachers.corpus, constant=tuple(constant), **given)

    @classmethod
    def for_teacher(cls, teacher: AnyTeacher, given: MixtureWeights | None) -> MixtureWeights | None:
        """The weights that are given for several teachers, by default equal ones; None for a single teacher.

        Raises:
          ConfigError: they are for another number of teachers, or of another corpus.
        """
        num = len(teacher.teachers) if isinstance(teacher, Teachers) else 1
        if given is None:
            return cls(corpus=teacher.corpus, constant=(1.0,) * num) if num > 1 else None
        if len(given.constant) != num or given.corpus.hash != teacher.corpus.hash:
            raise ConfigError(
                f"mixture weights: expected those of {num} teachers of the corpus {teacher.corpus.hash}, found "
                f"{len(given.constant)} of {given.corpus.hash}"
            )
        return given

    @property
    def hash(self) -> str | None:
        """What identifies the arrays; None where there are none."""
        if self.values is None:
            return None
        digest = hashlib.sha256(self.by.encode())
        for array in (self.values, self.table):
            if array is not None:
                digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def __call__(self, batch: Batch) -> Batch:
        """The same batch with ``log_weights`` [T, n] float32: log w_i, -inf where a teacher takes no part.

        Args:
          batch: of ``batches.collate`` with the targets of n teachers, whole rows. One without targets, of a loader
            that was not to read them, comes back as it is.
        """
        if field_name(1, "token_ids") not in batch["teacher"]:
            return batch
        base_Tn = torch.from_numpy(self._base(batch["rows"].numpy()))
        log_w_Tn = base_Tn.log()
        if self.confidence != "none":
            unweighted = {**batch, "log_weights": log_w_Tn}
            teachers = terms_of_each(unweighted, self.corpus.vocab_size)
            scores_Tn = torch.stack([self._score(each) for each in teachers], dim=-1).double()
            # Relative to the surest teacher that takes part, which keeps its weight even where all give y nothing.
            takes_part_Tn = log_w_Tn > -torch.inf
            surest_T1 = scores_Tn.masked_fill(~takes_part_Tn, -torch.inf).amax(-1, keepdim=True)
            some_Tn = takes_part_Tn & (surest_T1 > -torch.inf)
            behind_Tn = torch.where(some_Tn, scores_Tn - torch.where(some_Tn, surest_T1, 0.0), 0.0)
            log_w_Tn = log_w_Tn + (self.sharpness * behind_Tn if self.sharpness else 0.0)
        return {**batch, "log_weights": torch.log_softmax(log_w_Tn, dim=-1).float()}

    def _score(self, teacher: TeacherTerms) -> Tensor:
        return teacher.log_target if self.confidence == "target" else -entropies(teacher)

    def _base(self, rows_T: NDArray[np.int64]) -> NDArray[np.float64]:
        if self.values is None:
            return np.tile(np.asarray(self.constant, dtype=np.float64), (len(rows_T), 1))
        where_T = rows_T if self.by == "rows" else self._positions(rows_T)
        values = self.values[where_T]
        return np.asarray(values if self.table is None else self.table[values], dtype=np.float64)

    def _positions(self, rows_T: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which target position of the corpus each one is: a row is never split, so they count up from its first."""
        starts = np.flatnonzero(np.diff(rows_T, prepend=-1))
        within_T = np.arange(len(rows_T)) - np.repeat(starts, np.diff(starts, append=len(rows_T)))
        return self._offsets[rows_T] + within_T


def weighted_collate(
    collate: Callable[..., Batch], layout: Layout, weights: MixtureWeights | None
) -> Callable[[Any], Batch]:
    """What makes a batch in a layout, and then the weights of several teachers."""
    made = partial(collate, layout=layout)
    return made if weights is None else lambda rows: weights(made(rows))


def entropies(teacher: TeacherTerms) -> Tensor:
    """[T] the entropy of a teacher's whole distribution, nats: of its top-K, and what is stored of its tail."""
    tail_T = weighted(teacher.log_tail, teacher.log_tail - teacher.tail_entropy)
    return -(weighted(teacher.logprobs, teacher.logprobs).sum(-1) + tail_T)


def documents_of_targets(corpus: Corpus) -> NDArray[np.int64]:
    """[N] which document each target position of a corpus is in, counted over the corpus from 0.

    Documents are numbered as they begin in the corpus' rows; one that goes on in the next row keeps its number.

    Cost: reads the corpus once; 8 bytes for each target position.
    """
    found, begun = [np.empty(0, np.int64)], 0
    current = {False: 0, True: 0}  # a document goes on in the next row of its side, training or held out
    for rows in _blocks(corpus, "documents"):
        for i, side in enumerate(rows.held_out.tolist()):
            row = rows.slice(i, i + 1)
            since = np.cumsum(row.document_start)
            found.append(np.where(since > 0, begun + since - 1, current[side])[row.supervised])
            if since[-1]:
                begun += int(since[-1])
                current[side] = begun - 1
    return np.concatenate(found)


def weights_by_row(corpus: Corpus, function: Callable[[Rows], Sequence[float] | int]) -> NDArray[Any]:
    """What a function says of each row of a corpus: [R, n] weights, or [R] labels, for the array `rows`.

    Args:
      corpus: an open corpus.
      function: called with one row at a time; its tokens are ``rows.tokens``.
    """
    found = [function(rows.slice(i, i + 1)) for rows in _blocks(corpus, "weights of rows") for i in range(len(rows))]
    return np.asarray(found)


def _blocks(corpus: Corpus, what: str) -> Any:
    for first in tqdm(range(0, corpus.num_rows, _BLOCK_ROWS), desc=what, leave=False, delay=1):
        yield corpus.rows(first, min(first + _BLOCK_ROWS, corpus.num_rows))


def _check_weights(name: str, weights: NDArray[Any], shape: tuple[int, int]) -> None:
    if weights.shape != shape or weights.dtype.kind not in "fiu":
        raise ConfigError(
            f"{name}: expected weights {list(shape)}, one column for each teacher; found {weights.dtype} of shape "
            f"{list(weights.shape)}"
        )
    bad = ~(np.isfinite(weights).all(axis=1) & (weights >= 0).all(axis=1) & (weights.sum(axis=1) > 0))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ConfigError(
            f"{name}: expected finite weights >= 0 that are not all 0, found {weights[first].tolist()} at {first}"
        )


def _read(path: Path) -> dict[str, Any]:
    """``by``, ``values`` and ``table`` of a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise NotFoundError(f"teacher_weights_file: {path} does not exist") from None
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise ConfigError(f"teacher_weights_file: {path}: expected an .npz file of NumPy arrays ({error})") from error
    by = [name for name in ("rows", "positions") if name in arrays]
    if len(by) != 1 or arrays.keys() - {*by, "weights"} or (arrays[by[0]].ndim == 1) != ("weights" in arrays):
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ConfigError(
            f"teacher_weights_file: {path}: expected an array rows or positions with one column for each teacher, or "
            f"one of them with whole numbers and an array weights; found {found or 'no array'}"
        )
    return {"by": by[0], "values": arrays[by[0]], "table": arrays.get("weights")}
