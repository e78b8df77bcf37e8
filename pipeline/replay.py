"""Run a captured teacher again at some positions, and say whether what is stored is what it says.

The same model gives slightly different logits in batches of other shapes, so the positions are computed twice: once in
large batches of whole documents, and once each by itself, no further than it reads. How far these two are apart is the
**control**: nothing that is stored can be expected to be closer. What is stored has gone through the codec, so the live
targets go through it too, and what that changes is allowed for as well.

Legend: N positions, K kept tokens, m draws, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailcache.pipeline.config import CaptureConfig
from tailcache.pipeline.draws import draw_key
from tailcache.pipeline.opened import OpenedTeacher
from tailcache.pipeline.rows import capture_rows
from tailcache.pipeline.stored import open_stored, stored_config
from tailcache.pipeline.teacher import Teacher as LiveTeacher
from tailcache.storage.alignment import segment_ids
from tailcache.storage.codec import SCALARS, Targets
from tailcache.storage.commits import load_codec
from tailcache.storage.corpus import Corpus, Rows
from tailcache.storage.errors import ConfigError
from tailcache.storage.hidden import hidden_float32
from tailcache.storage.place import Location, Place
from tailcache.storage.reader import Teacher, open_cache
from tailcache.storage.records import parse_manifest

__all__ = ["FieldReplay", "Replay", "replay", "replay_cache"]

_FLOOR = 1e-4  # of a log, and of what is relative to it: float32 sums in another order
_NOISE = 4  # times the largest difference of the control: it was seen at N positions only
_CODING = 3  # times the largest change that coding makes: a hair's difference may be another step
_FEW = 3  # positions that may be as far off as any without showing in the mean
_DRAWS = 0.05  # share of draws that may differ beyond three times the control's

Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FieldReplay:
    """How far one field is from the live teacher; logs in nats, shares for ids and draws."""

    name: str
    mean: float
    """Difference of stored and live, on average."""
    largest: float
    control_mean: float
    """The same for live and live, in other batches."""
    control_largest: float
    tolerance: float
    """The largest that was allowed at any position: from the control and from what the codec may change."""
    mean_tolerance: float
    """What was allowed on average; far less, so that a teacher that is a little different is found out too."""
    beyond: int
    """Positions that are further off than allowed."""
    first: int | None
    """The first of them, a target's number."""

    @property
    def good(self) -> bool:
        """Nothing is further off than allowed, at any position or on average."""
        return not self.beyond and self.mean <= self.mean_tolerance


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a replay found."""

    teacher: str
    positions: int
    seed: int
    fields: tuple[FieldReplay, ...]
    notes: tuple[str, ...]
    """What differs between then and now, and need not matter."""

    @property
    def good(self) -> bool:
        """No field is further from the live teacher than allowed."""
        return all(field.good for field in self.fields)

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        fields = [{**asdict(field), "good": field.good} for field in self.fields]
        return {**asdict(self), "fields": fields, "good": self.good}


def replay_cache(
    location: Location | Place,
    model: str | None,
    *,
    name: str | None = None,
    count: int,
    seed: int = 0,
    threads: int | None = None,
    trust: bool = False,
    live: LiveTeacher | None = None,
) -> Replay:
    """Open a cache and one of its teachers, load the model, and compare; see ``replay``.

    Args:
      location: of the cache.
      model: what the teacher was captured from, as for ``tailcache capture --teacher``.
      name: which of the cache's teachers; may be left out where there is one.
      count: positions to be looked at.
      seed: another seed looks at other positions.
      threads: CPU threads of the model.
      trust: run model code that comes with a hub model.
      live: the model, where it is loaded already.

    Raises:
      ConfigError: no model, or none of several teachers is chosen.
      MismatchError: another model, or other settings than the teacher was captured with.
      Errors of ``Cache.teacher``.
    """
    cache = open_cache(location)
    names = cache.teacher_names
    if name is None and len(names) != 1:
        raise ConfigError(f"--name: expected one of the cache's teachers ({', '.join(names) or 'none'}), found none")
    teacher = cache.teacher(name or names[0])
    manifest = parse_manifest(teacher.place.read("manifest.json"), f"{teacher.place}/manifest.json")
    config = stored_config(manifest, str(cache.place), model or ("" if live else None), threads=threads, trust=trust)
    opened, notes = open_stored(manifest, cache.corpus, config, live)
    return replay(teacher, opened, config, count=count, seed=seed, notes=notes)


def replay(
    teacher: Teacher,
    opened: OpenedTeacher,
    config: CaptureConfig,
    *,
    count: int,
    seed: int = 0,
    notes: list[str] | None = None,
) -> Replay:
    """Compare stored targets with the live teacher's at random positions.

    Args:
      teacher: the stored one.
      opened: the live one, from ``open_stored``.
      config: from ``stored_config``.
      count: N, positions to be looked at; all where there are fewer.
      seed: another seed looks at other positions.
      notes: to be kept with the result.

    Raises:
      ConfigError: a count below 1.
      CorruptError: the stored targets of one of the positions are damaged.

    Cost: two forward passes over the documents the positions are in.
    """
    if count < 1:
        raise ConfigError(f"--replay: expected at least 1 position, found {count}")
    corpus, layout = teacher.corpus, opened.layout
    chosen_N = np.sort(
        np.random.default_rng(seed).choice(corpus.num_targets, min(count, corpus.num_targets), replace=False)
    )

    def live(whole: bool, batch_positions: int, head_positions: int | None) -> Targets:
        rows, numbers = _rows_of(corpus, chosen_N, whole)
        targets, _ = capture_rows(
            opened.teacher,
            rows,
            first_target=0,
            numbers=numbers,
            key=draw_key(corpus.hash, config.sample_seed),
            top_k=layout.top_k,
            num_samples=layout.num_samples,
            temperatures=layout.temperatures,
            hidden=layout.hidden,
            batch_positions=batch_positions,
            head_positions=head_positions,
        )
        return targets[np.searchsorted(numbers, chosen_N)]

    first, second = live(True, config.batch_positions, config.head_positions), live(False, 1, 3)
    codec = load_codec(teacher.place, layout, dict(teacher.manifest["files"]))
    stored = teacher.positions(chosen_N, optional=teacher.optional)
    coded: Targets = codec.decode(codec.encode(first))
    compare = _Comparison(chosen_N, layout.vocab_size)
    logs = {name: [_column(getattr(each, name)) for each in (stored, first, second, coded)] for name in SCALARS}
    for i, tau in enumerate(layout.temperatures):
        logs[f"log_z_tail at {tau:g}"] = [_column(each.log_z_tail[:, i]) for each in (stored, first, second, coded)]
    # One noise for all logs: which of them it moves most is another one at every position.
    control = compare.head_control(first, second)
    noise = max([control.max(), *(_apart(second, first).max() for _, first, second, _ in logs.values())])
    compare.head(stored, first, second, coded, noise)
    for name, values in logs.items():
        compare.numbers(name, values, noise)
    if layout.hidden is not None:
        states = [_hidden(each) for each in (stored, first, second, coded)]
        compare.numbers("hidden", states, float(_apart(states[2], states[1]).max()))
    if layout.num_samples:
        compare.draws(stored.tail_samples, first.tail_samples, second.tail_samples)
    return Replay(
        teacher=teacher.name,
        positions=len(chosen_N),
        seed=seed,
        fields=tuple(compare.fields),
        notes=tuple(notes or ()),
    )


def _rows_of(corpus: Corpus, chosen_N: NDArray[np.int64], whole: bool) -> tuple[Rows, NDArray[np.int64]]:
    """The rows of some targets, with only those targets supervised, and the numbers of these.

    Args:
      corpus: of the targets.
      chosen_N: [N] their numbers, ascending.
      whole: supervise the last target of their documents too, so that these are computed to their ends.
    """
    offsets = np.concatenate([np.empty(0, np.int64), *corpus.stream("target_offsets")])
    row_N = np.searchsorted(offsets, chosen_N, side="right") - 1
    parts, supervised, numbers = [], [], []
    for row in np.unique(row_N).tolist():
        part = corpus.rows(row, row + 1)
        targets = np.flatnonzero(part.supervised)
        wanted = np.zeros(len(targets), np.bool_)
        wanted[chosen_N[row_N == row] - offsets[row]] = True
        if whole:
            segment = segment_ids(part.document_start, part.offsets)[targets]
            last = np.append(segment[1:] != segment[:-1], True)
            wanted |= last & np.isin(segment, segment[wanted])
        mask = np.zeros(len(part.tokens), np.bool_)
        mask[targets[wanted]] = True
        parts.append(part)
        supervised.append(mask)
        numbers.append(offsets[row] + np.flatnonzero(wanted))
    rows = Rows(
        row_indices=np.concatenate([part.row_indices for part in parts]),
        offsets=np.concatenate([[0], np.cumsum([len(part.tokens) for part in parts])]),
        tokens=np.concatenate([part.tokens for part in parts]),
        document_start=np.concatenate([part.document_start for part in parts]),
        supervised=np.concatenate(supervised),
        held_out=np.concatenate([part.held_out for part in parts]),
    )
    return rows, np.concatenate(numbers)


def _column(values: NDArray[Any]) -> Float64:
    return values.astype(np.float64)[:, None]


def _hidden(targets: Targets) -> Float64:
    return hidden_float32(targets.hidden, targets.hidden_scale).astype(np.float64)


def _apart(one: Float64, other: Float64) -> Float64:
    """Magnitude of the difference; 0 where both are the same infinity, infinite where one is not a number."""
    with np.errstate(invalid="ignore"):
        apart = np.where(one == other, 0.0, np.abs(one - other))
    return np.where(np.isnan(apart), np.inf, apart)


class _Comparison:
    def __init__(self, chosen_N: NDArray[np.int64], vocab_size: int) -> None:
        self._chosen_N, self._vocab_size = chosen_N, vocab_size
        self.fields: list[FieldReplay] = []

    def _add(
        self,
        name: str,
        off: Float64,
        control: Float64,
        allowed: Float64,
        beyond_N: NDArray[np.bool_],
        mean_allowed: float = np.inf,
    ) -> None:
        where = np.flatnonzero(beyond_N)
        self.fields.append(
            FieldReplay(
                name=name,
                mean=float(off.mean()),
                largest=float(off.max()),
                control_mean=float(control.mean()),
                control_largest=float(control.max()),
                tolerance=float(allowed.max()),
                mean_tolerance=float(min(mean_allowed, allowed.max())),
                beyond=len(where),
                first=int(self._chosen_N[where[0]]) if len(where) else None,
            )
        )

    def numbers(self, name: str, values: list[Float64], noise: float) -> None:
        """Numbers whose coding changes them by about the same share of one plus their magnitude.

        Args:
          name: of the field.
          values: [N, n] each: stored, live, live again, and live through the codec.
          noise: what is known to move such numbers.
        """
        stored, first, second, coded = values
        with np.errstate(invalid="ignore"):
            size = np.where(np.isfinite(first), 1 + np.abs(first), 1.0)
        off, control, coding = _apart(stored, first), _apart(second, first), _apart(coded, first)
        allowed = size * (_CODING * (coding / size).max() + _FLOOR) + _NOISE * noise
        mean_allowed = self._mean_allowed(control, coding, noise, float(size.mean()))
        self._add(name, off, control, allowed, np.asarray((off > allowed).any(axis=1)), mean_allowed)

    def _mean_allowed(self, control: Float64, coding: Float64, noise: float, size: float) -> float:
        """A few times what is usual, and some positions as far off as any may be."""
        some = _FEW * _NOISE * noise / len(self._chosen_N)
        return float(_NOISE * control.mean() + _CODING * coding.mean() + _FLOOR * size + some)

    def head_control(self, first: Targets, second: Targets) -> Float64:
        """[N, K] how far two live heads are apart at the tokens that both have."""
        other = self._of_tokens(second, first.token_ids)
        return np.where(np.isnan(other), 0.0, _apart(other, first.logprobs.astype(np.float64)))

    def head(self, stored: Targets, first: Targets, second: Targets, coded: Targets, noise: float) -> None:
        """Log-probs of the same tokens; and tokens that only one of two heads has, beyond a tie at its end."""
        live, coding = first.logprobs.astype(np.float64), _apart(_sorted(coded.logprobs), _sorted(first.logprobs))
        other = self._of_tokens(second, first.token_ids)
        control = self.head_control(first, second)
        # What coding changes grows as probabilities fall: at most as much as at any token that is as likely or less.
        order = np.argsort(-live, axis=None, kind="stable")
        envelope = np.empty(live.size)
        envelope[order] = np.maximum.accumulate(coding.ravel()[order])
        allowed = _CODING * envelope.reshape(live.shape) + _NOISE * noise + _FLOOR * (1 + np.abs(live))
        found = self._of_tokens(stored, first.token_ids)
        missing = np.isnan(found)
        off = np.where(missing, 0.0, _apart(found, live))
        mean_allowed = self._mean_allowed(control, coding, noise, float((1 + np.abs(live)).mean()))
        self._add("logprobs", off, control, allowed, np.asarray((off > allowed).any(axis=1)), mean_allowed)
        # A token that is not in the stored head must be as unlikely as the head's last one, and so the other way round.
        last = _sorted(stored.logprobs)[:, -1:]
        above = missing & (live > last + 2 * allowed)
        strange = np.isnan(self._of_tokens(first, stored.token_ids))
        above |= strange & (stored.logprobs > live[:, -1:] + 2 * allowed[:, -1:])
        top = self._of_tokens(first, stored.token_ids[:, :1])[:, 0]
        below_first = ~(top >= live[:, 0] - 2 * allowed[:, 0])
        shares, control_shares = missing.mean(axis=1), np.isnan(other).mean(axis=1)
        wrong: NDArray[np.bool_] = np.asarray(above.any(axis=1) | below_first)
        # Any share may differ by ties at the heads' ends; what is no tie is beyond.
        self._add("token_ids", shares, control_shares, np.ones(len(shares)), wrong)

    def _of_tokens(self, targets: Targets, wanted_NK: NDArray[np.int32]) -> Float64:
        """[N, K] the log-prob that a head gives to some tokens; NaN where it does not have them."""
        base = np.arange(len(targets), dtype=np.int64)[:, None] * self._vocab_size
        keys = (targets.token_ids + base).ravel()
        order = np.argsort(keys)
        wanted = (wanted_NK + base).ravel()
        place = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
        found = np.where(
            keys[order][place] == wanted, targets.logprobs.ravel()[order][place].astype(np.float64), np.nan
        )
        return found.reshape(wanted_NK.shape)

    def draws(self, stored_Nm: NDArray[Any], first_Nm: NDArray[Any], second_Nm: NDArray[Any]) -> None:
        """Draws follow from the logits and the position: they are the same but where logits differ a little."""
        stored, first, second = (np.sort(each, axis=1) for each in (stored_Nm, first_Nm, second_Nm))
        off, control = (stored != first).mean(axis=1), (second != first).mean(axis=1)
        allowed = np.full(len(off), 3 * control.mean() + _DRAWS)
        wrong = (off > 0) & (control == 0) & (off.mean() > allowed)
        self._add("tail_samples", off, control, allowed, wrong)


def _sorted(logprobs_NK: NDArray[np.float32]) -> Float64:
    return -np.sort(-logprobs_NK.astype(np.float64), axis=1)
