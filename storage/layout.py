"""Where everything of one teacher lies: names, shapes and the arithmetic from rows to slots.

    CACHE/teachers/NAME/
      zarr.json               group; its attributes are ``Layout``: all that decoding needs
      vocabulary_order        [V] uint32        constant: the token of each rank
      logprob_levels          [L] float32       constant: -log p of each level
      class_tokens            [C, M] uint32     constant: the list of each class; absent where C = 1
      token_codes             [S, K] uint16/32  one slot per target position, one object per shard
      logprob_gaps            [S, K] uint16/32
      position_class          [S] uint8         absent where C = 1
      tail_logit, tail_entropy, target_logit   [S] int32
      tail_sample_codes       [S, m] uint16/32  absent where m = 0
      log_z_tail              [S, n] float32    optional
      hidden                  [S, D] uint16/int8, and for int8 hidden_scale [S] float32    optional
      head_weight, head_bias  [V, D], [V]       constants, with ``hidden``
      mean_tail               [V] float32       constant, written when the last shard is in; also as mean_tail_copy
      manifest.json           sealed: settings, provenance, checksums of metadata and constants; also manifest_copy.json
      commits/SHARD.json      sealed: a shard exists if and only if its commit record does
      complete.json           sealed: the capture is finished

A shard is ``rows_per_shard`` consecutive rows and owns ``shard_slots`` slots of every array, more than any
shard's targets need. The slots it does not need are not stored. So the slot of a target follows from its row
by arithmetic, and no index has to be read, listed or kept.

Version 1 has no classes, and float32 scalars ``log_tail``, ``tail_entropy``, ``log_target`` and ``log_not_target``.

Legend: S slots, K kept tokens, m samples, V vocabulary, L levels, C classes, M tokens of a class, n further
temperatures, D hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailcache.storage.arrays import ArraySpec
from tailcache.storage.codec import KL_BUDGET, SCALARS, Codec
from tailcache.storage.errors import ConfigError, FormatError
from tailcache.storage.hidden import HiddenLayout

__all__ = [
    "READABLE_VERSIONS",
    "TARGETS_FORMAT",
    "TARGETS_VERSION",
    "Layout",
    "check_kl_budget",
    "check_name",
    "check_temperatures",
    "commit_path",
]

TARGETS_FORMAT = "tailcache targets"
TARGETS_VERSION = 2
READABLE_VERSIONS = (1, 2)
_CONSTANT_SHARD, _CONSTANT_CHUNK = 1 << 22, 1 << 16
_GAP_BLOCK = 1 << 15  # bytes that share the compressor's tables: few ranks, whose gaps are alike
_NOISE_LEVEL = 1  # of the compressor, for what is nearly noise: more would cost time and save nothing
_SIZES = (
    "vocab_size", "top_k", "num_samples", "num_levels", "num_rows", "num_positions", "rows_per_shard", "shard_slots",
    "chunk", "compression_level",
)  # fmt: skip
_SIZES_2 = ("num_classes", "class_size", "scalar_steps")
"""Whole numbers that came with version 2."""
_SMALLEST = {"num_samples": 0, "class_size": 0}
_KL_BUDGETS = (1e-8, 1e-3)
_LARGEST_STEPS = 1 << 16
_MAX_CLASSES = 256
_TEMPERATURES = (1e-3, 1e3)  # far beyond these, logits over tau overflow float32, or masked ones count


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of one teacher's targets. These are the attributes of its zarr group."""

    vocab_size: int
    """Real token ids; padded rows of the head are not counted."""
    top_k: int
    num_samples: int
    num_levels: int
    num_rows: int
    num_positions: int
    rows_per_shard: int
    shard_slots: int
    chunk: int
    """Slots of an inner chunk."""
    compression_level: int
    temperatures: tuple[float, ...] = ()
    """Further temperatures of ``log_z_tail``, a column each; without any there is no such array."""
    hidden: HiddenLayout | None = None
    """How hidden states are stored; none where they are not."""
    num_classes: int = 1
    """C, classes of positions with lists of likely tokens of their own; 1: there are no lists."""
    class_size: int = 0
    """M, tokens in each list; 0 where there are none."""
    scalar_steps: int = 1024
    """Steps of the stored scalars to a nat."""
    kl_budget: float = KL_BUDGET
    """Nats per position that rounding may cost on average."""
    format_version: int = TARGETS_VERSION
    """Of the targets; new captures have the newest."""

    @property
    def num_shards(self) -> int:
        """Shards needed for all rows."""
        return -(-self.num_rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """First row and one past the last of a shard."""
        first = shard * self.rows_per_shard
        return first, min(first + self.rows_per_shard, self.num_rows)

    def attributes(self) -> dict[str, Any]:
        """What the group's ``zarr.json`` says under the key ``tailcache``."""
        optional: dict[str, Any] = {"temperatures": list(self.temperatures)} if self.temperatures else {}
        if self.hidden is not None:
            optional["hidden"] = self.hidden.attributes()
        sizes: dict[str, Any] = {name: getattr(self, name) for name in _SIZES}
        if self.format_version > 1:
            sizes |= {name: getattr(self, name) for name in _SIZES_2} | {"kl_budget": self.kl_budget}
        return {"format": TARGETS_FORMAT, "format_version": self.format_version, **sizes, **optional}

    @staticmethod
    def from_attributes(attributes: dict[str, Any], where: str) -> Layout:
        """The inverse of ``attributes``.

        Raises:
          FormatError: another format, an unknown version, or sizes that make no sense.
        """
        if attributes.get("format") != TARGETS_FORMAT:
            raise FormatError(f"{where}: expected {TARGETS_FORMAT!r}, found {attributes.get('format')!r}")
        version = attributes.get("format_version")
        if version not in READABLE_VERSIONS:
            known = " or ".join(map(str, READABLE_VERSIONS))
            raise FormatError(
                f"{where}: expected format version {known}, found {version!r}; install the version of tailcache that "
                "wrote it"
            )
        names = _SIZES if version == 1 else _SIZES + _SIZES_2
        for name in names:
            value = attributes.get(name)
            if type(value) is not int or not _SMALLEST.get(name, 1) <= value < 1 << 53:
                raise FormatError(f"{where}: expected a whole number for {name!r}, found {value!r}")
        temperatures = attributes.get("temperatures", [])
        is_list = isinstance(temperatures, list)
        problem = check_temperatures(temperatures) if is_list else f"expected a list, found {temperatures!r}"
        if problem:
            raise FormatError(f"{where}: 'temperatures': {problem}")
        hidden = attributes.get("hidden")
        try:
            stored = None if hidden is None else HiddenLayout.from_attributes(hidden)
        except ValueError as error:
            raise FormatError(f"{where}: 'hidden': {error}") from None
        sizes = {name: attributes[name] for name in names}
        budget = attributes.get("kl_budget", KL_BUDGET) if version > 1 else KL_BUDGET
        problem = check_kl_budget(budget) or _classes_problem(sizes)
        if problem:
            raise FormatError(f"{where}: {problem}")
        layout = Layout(
            **sizes, temperatures=tuple(map(float, temperatures)), hidden=stored, kl_budget=float(budget),
            format_version=version,
        )  # fmt: skip
        if layout.top_k > layout.vocab_size or layout.shard_slots % layout.chunk:
            raise FormatError(f"{where}: sizes that contradict each other: {layout}")
        return layout

    def fields(self) -> dict[str, ArraySpec]:
        """The arrays that have one slot per target position, by name."""
        id_type, gap_type = Codec.id_type_for(self.vocab_size), Codec.gap_type_for(self.num_levels)
        newest = self.format_version > 1

        def spec(
            name: str,
            dtype: str,
            meaning: str,
            columns: int | None = None,
            transposed: bool = False,
            level: int | None = None,
            second: str = "rank",
            **more: Any,
        ) -> ArraySpec:
            return ArraySpec(
                name=name, dtype=dtype, columns=columns, column_major=transposed, meaning=meaning, chunk=self.chunk,
                shard=self.shard_slots, level=level or self.compression_level, dimensions=("position", second), **more,
            )  # fmt: skip

        meanings = {
            "log_tail": "nats, log of the mass outside the top-K",
            "tail_entropy": "nats, entropy of the normalised distribution outside the top-K",
            "log_target": "nats, log-probability of the true next token",
            "log_not_target": "nats, log of one minus the probability of the true next token",
            "tail_logit": "log of the odds of a token outside the top-K",
            "target_logit": "log of the odds of the true next token",
        }
        specs = [
            spec(
                "token_codes",
                Codec.id_type_for(self.vocab_size, self.class_size),
                "codes of the top-K tokens; differences where the gap is 0",
                self.top_k,
            ),
            spec(
                "logprob_gaps",
                gap_type,
                "differences of the top-K log-probs' levels",
                self.top_k,
                transposed=True,
                block_bytes=_GAP_BLOCK if newest else 0,
            ),
        ]
        if newest:
            specs += [
                spec(name, "int32", f"{meanings[name]}, in steps", shuffle="bitshuffle")
                for name in ("tail_logit", "tail_entropy", "target_logit")
            ]
        else:
            specs += [spec(name, "float32", meanings[name]) for name in SCALARS]
        if self.num_classes > 1:
            specs.append(spec("position_class", "uint8", "which class' list the token codes count in"))
        if self.num_samples:
            specs.append(
                spec(
                    "tail_sample_codes", id_type, "differences of the sorted ranks of draws from the tail",
                    self.num_samples, transposed=not newest, second="draw" if newest else "rank",
                )
            )  # fmt: skip
        if self.temperatures:
            meaning = "nats, log of the sum of p^(1/tau) outside the top-K, for each of the temperatures tau"
            number = len(self.temperatures)
            specs.append(spec("log_z_tail", "float32", meaning, number, transposed=True, second="temperature"))
        if self.hidden is not None:
            of = self.hidden
            meaning = {
                "bf16": "the last hidden state, bits of bfloat16",
                "int8": "the last hidden state, divided by its scale",
            }[of.kind]
            specs.append(spec("hidden", of.dtype, meaning, of.width, level=_NOISE_LEVEL, second="feature"))
            if of.kind == "int8":
                specs.append(spec("hidden_scale", "float32", "what the last hidden state is to be multiplied with"))
        return {s.name: s for s in specs}

    def constants(self) -> dict[str, ArraySpec]:
        """The arrays that exist once per teacher, by name."""

        def spec(name: str, dtype: str, meaning: str) -> ArraySpec:
            return ArraySpec(name=name, dtype=dtype, chunk=_CONSTANT_CHUNK, shard=_CONSTANT_SHARD, meaning=meaning)

        constants = {
            "vocabulary_order": spec("vocabulary_order", "uint32", "the token id of each rank"),
            "logprob_levels": spec("logprob_levels", "float32", "nats, minus log-probability of each level"),
            "mean_tail": spec("mean_tail", "float32", "probability, mean of the normalised tails over all positions"),
        }
        if self.format_version >= 2:  # no shard can make it again, so it is there twice
            constants["mean_tail_copy"] = spec("mean_tail_copy", "float32", "the same as mean_tail, for repair")
        if self.num_classes > 1:
            rows = max(1, _CONSTANT_CHUNK // self.class_size)
            constants["class_tokens"] = ArraySpec(
                name="class_tokens", dtype="uint32", columns=self.class_size, chunk=rows,
                shard=rows * (_CONSTANT_SHARD // _CONSTANT_CHUNK), meaning="the tokens of each class",
                level=9, dimensions=("class", "place"),
            )  # fmt: skip
        if self.hidden is not None:
            rows = max(1, _CONSTANT_CHUNK // self.hidden.width)
            constants["head_weight"] = ArraySpec(
                name="head_weight",
                dtype=self.hidden.head_dtype,
                columns=self.hidden.width,
                chunk=rows,
                shard=rows * (_CONSTANT_SHARD // _CONSTANT_CHUNK),
                level=_NOISE_LEVEL,
                meaning=f"the head's weights, {self.hidden.head_kind}"
                + (" bits" * (self.hidden.head_dtype == "uint16")),
                dimensions=("token", "feature"),
            )
            if self.hidden.head_bias:
                constants["head_bias"] = spec("head_bias", "float32", "what the head adds to the logit of each token")
        return constants

    def constant_length(self, name: str) -> int:
        """Number of elements of a constant's leading axis."""
        return {"logprob_levels": self.num_levels, "class_tokens": self.num_classes}.get(name, self.vocab_size)

    @property
    def learned(self) -> tuple[str, ...]:
        """The constants that decoding needs, ``storage.codec.learn_constants``."""
        return ("vocabulary_order", "logprob_levels", *(("class_tokens",) if self.num_classes > 1 else ()))


def check_temperatures(temperatures: Sequence[Any]) -> str:
    """What is wrong with some temperatures; empty if nothing is."""
    low, high = _TEMPERATURES
    for tau in temperatures:
        if type(tau) not in (int, float) or not low <= tau <= high or tau == 1:
            return f"expected numbers from {low:g} to {high:g} and not 1, which is always stored; found {tau!r}"
    if len(set(temperatures)) < len(temperatures):
        return f"expected each temperature once, found {' '.join(f'{tau:g}' for tau in temperatures)}"
    return ""


def check_kl_budget(budget: Any) -> str:
    """What is wrong with a budget of KL error; empty if nothing is."""
    low, high = _KL_BUDGETS
    if type(budget) not in (int, float) or not low <= budget <= high:
        return f"kl_budget: expected a number of nats from {low:g} to {high:g}, found {budget!r}"
    return ""


def _classes_problem(sizes: dict[str, int]) -> str:
    """What is wrong with the sizes of version 2 by themselves; empty if nothing is."""
    num, size = sizes.get("num_classes", 1), sizes.get("class_size", 0)
    if num > _MAX_CLASSES or size > sizes["vocab_size"] or (num > 1) != (size > 0):
        return f"expected up to {_MAX_CLASSES} classes with lists of at most V tokens, found {num} with lists of {size}"
    if sizes.get("scalar_steps", 1) > _LARGEST_STEPS:
        return f"scalar_steps: expected at most {_LARGEST_STEPS}, found {sizes['scalar_steps']}"
    return ""


def commit_path(shard: int) -> str:
    """Where a shard's commit record lies, relative to the group."""
    return f"commits/{shard:08d}.json"


def check_name(name: str) -> str:
    """A teacher's name, if it can be a folder's name everywhere.

    Raises:
      ConfigError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name.endswith((".tmp", ".lock")):
        raise ConfigError(
            f"teacher name: expected 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit and "
            f"not ending in .tmp or .lock; found {name!r}"
        )
    return name
