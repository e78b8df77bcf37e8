"""Inputs for the tests of the fused head: a head, hidden states, targets, and a loss that depends on every term.

The unfused way is ``student_terms`` on full logits and ordinary autograd; every fused way must give the same values
and gradients. RELATIVE is the bound, as a share of the largest entry (or of 1, the size of the loss's weights, where
everything is smaller): float32 has 6e-8 and sums here are of some hundred terms, float64 has 1e-16.

Legend: T positions, V vocabulary, W rows of the head (>= V), D hidden width, K kept, m draws, P parts of the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tailcache.trainers import fused_head as fused_head_module
from tailcache.trainers import linear_head, terms
from tailcache.trainers.fused_loss import LossOfTerms, chunked_loss, fused_loss
from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.products import wide_dtype
from tailcache.trainers.terms import StudentTerms, TeacherTerms, student_terms, weighted

FUSED = ("one-pass", "recompute", "chunked")
RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-12}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@dataclass(frozen=True, kw_only=True)
class HeadCase:
    """Everything that a fused loss takes.

    Attributes:
      hidden: [T, D].
      head: its padding rows, if any, are NaN.
      teacher: the targets.
      fills: [V] weights by name.
      temperatures: further temperatures.
      coefficients: [3] float64.
    """

    hidden: Tensor
    head: LinearHead
    teacher: TeacherTerms
    fills: Mapping[str, Tensor]
    temperatures: tuple[float, ...]
    coefficients: Tensor

    def __repr__(self) -> str:
        (num, width), teacher, head = self.hidden.shape, self.teacher, self.head
        return (
            f"HeadCase(T={num}, V={head.vocab_size}, W={len(head.weight)}, D={width}, K={teacher.top_k}, "
            f"m={teacher.num_samples}, bias={head.bias is not None}, scale={head.scale}, soft_cap={head.soft_cap}, "
            f"fills={list(self.fills)}, temperatures={self.temperatures}, {self.hidden.dtype})"
        )

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What can be differentiated: hidden states, weight and bias."""
        return self.hidden, self.head.weight, self.head.bias

    def with_leaves(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadCase:
        """The same case from other hidden states, weight and bias."""
        return replace(self, hidden=hidden, head=replace(self.head, weight=weight, bias=bias))

    def trained(self, *needed: bool) -> HeadCase:
        """Copies of the leaves that require gradients, all of them unless said otherwise."""
        wanted = needed or (True, True, True)
        copies = [
            None if leaf is None else leaf.detach().clone().requires_grad_(want)
            for leaf, want in zip(self.leaves, wanted, strict=True)
        ]
        assert copies[0] is not None
        assert copies[1] is not None
        return self.with_leaves(copies[0], copies[1], copies[2])

    def to(self, dtype: torch.dtype) -> HeadCase:
        """Hidden states and head in another type, targets and fills in its wide one."""
        wide = wide_dtype(dtype)
        return self._mapped(lambda leaf: leaf.to(dtype), lambda other: other.to(wide))

    def on(self, device: str) -> HeadCase:
        """All of it on another device."""
        return self._mapped(lambda leaf: leaf.to(device), lambda other: other.to(device))

    def rows(self, rows: slice) -> HeadCase:
        """Some of the positions, with memory of their own."""
        part = replace(self, hidden=self.hidden[rows], teacher=self.teacher.rows(rows))
        return part._mapped(lambda leaf: leaf, lambda other: other.clone())

    def _mapped(self, leaf: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> HeadCase:
        def each(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return other(value)
            return value.to(other(value.new_empty(0).double()).device, copy=True)

        bias = self.head.bias
        teacher = replace(self.teacher, **{name: each(value) for name, value in vars(self.teacher).items()})
        case = self.with_leaves(leaf(self.hidden), leaf(self.head.weight), None if bias is None else leaf(bias))
        fills = {name: other(fill) for name, fill in self.fills.items()}
        return replace(case, teacher=teacher, fills=fills, coefficients=other(self.coefficients))


def targets(
    num: int, vocab_size: int, top_k: int, num_samples: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> TeacherTerms:
    """Targets of T positions: the true token in the head and beyond it in turn, draws repeated.

    What the teacher thinks of its ids plays no part in the head; it is a random distribution over them.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand((num, vocab_size), generator=generator).argsort(-1)
    logprobs = torch.randn((num, vocab_size), generator=generator, dtype=torch.float64).log_softmax(-1)
    target_rank = torch.arange(num) % (2 * top_k) % vocab_size
    next_tokens = order.gather(-1, target_rank[:, None])[:, 0]
    beyond = order[:, top_k:] if top_k < vocab_size else order[:, :1]
    picks = torch.randint(0, max(1, min(3, beyond.shape[1])), (num, num_samples), generator=generator)
    log_target = logprobs.gather(-1, next_tokens[:, None])[:, 0]
    tail = logprobs.gather(-1, order[:, top_k:])
    return TeacherTerms(
        vocab_size=vocab_size,
        token_ids=order[:, :top_k].contiguous(),
        logprobs=logprobs.gather(-1, order[:, :top_k]).to(dtype),
        log_tail=torch.logsumexp(tail, -1).to(dtype)
        if top_k < vocab_size
        else torch.full((num,), -torch.inf).to(dtype),
        tail_entropy=torch.ones(num, dtype=dtype),
        tail_samples=beyond.gather(-1, picks),
        log_target=log_target.to(dtype),
        log_not_target=torch.log1p(-log_target.exp()).to(dtype),
        next_tokens=next_tokens,
    )


def head_case(
    num: int = 11,
    vocab_size: int = 50,
    width: int = 6,
    top_k: int = 4,
    num_samples: int = 3,
    *,
    padding: int = 0,
    bias: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    fills: Sequence[str] = (),
    temperatures: Sequence[float] = (),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    spread: float = 2.0,
) -> HeadCase:
    """A random head and hidden states, whose logits are about normal with the spread given."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher = targets(num, vocab_size, top_k, num_samples, seed=seed, dtype=dtype)
    weight = normal(vocab_size + padding, width) * spread / width**0.5
    bias_W = normal(vocab_size + padding) if bias else None
    weight[vocab_size:] = torch.nan
    if bias_W is not None:
        bias_W[vocab_size:] = torch.nan
    return HeadCase(
        hidden=normal(num, width).to(dtype),
        head=LinearHead(
            weight=weight.to(dtype),
            bias=None if bias_W is None else bias_W.to(dtype),
            vocab_size=vocab_size,
            scale=scale,
            soft_cap=soft_cap,
        ),
        teacher=teacher,
        fills={name: fill_of(name, teacher).to(dtype) for name in fills},
        temperatures=tuple(temperatures),
        coefficients=torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64),
    )


def fill_of(name: str, teacher: TeacherTerms) -> Tensor:
    """[V] float64 weights: `prior`, `uniform`; on the first position's head but for 0, 1e-14 or 1e-5."""
    vocab_size = teacher.vocab_size
    if name == "uniform":
        return torch.ones(vocab_size, dtype=torch.float64)
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float64)
    if name == "prior":
        return 1 / ranks.roll(3)
    kept = teacher.token_ids[0] if len(teacher) else torch.arange(1)
    on_head = torch.zeros(vocab_size, dtype=torch.float64).scatter(0, kept, 1.0)
    if name == "head":
        return on_head
    if name in ("faint", "slight"):
        return on_head + {"faint": 1e-14, "slight": 1e-5}[name] / ranks
    raise AssertionError(name)


def probe(case: HeadCase, seed: int = 7) -> LossOfTerms:
    """A loss of three parts that depends, with random weights, on every term there is; 0 stands for -inf."""
    generator = torch.Generator().manual_seed(seed)
    num, top_k, num_samples = len(case.teacher), case.teacher.top_k, case.teacher.num_samples

    def factors(*shape: int) -> Tensor:
        return torch.randn((num, *shape), generator=generator, dtype=torch.float64).to(case.hidden.device)

    names = [
        "target",
        "not_target",
        "beyond",
        "rest",
        *(f"{each} {name}" for name in case.fills for each in ("with", "less")),
    ]
    by_name = {name: factors() for name in names}
    tempered_Tn = factors(len(case.temperatures))
    head_TK, samples_Tm = factors(top_k), factors(num_samples)

    def loss(rows: slice, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
        assert len(teacher) == len(student.logprobs) == len(student.log_target)

        def part(name: str, term: Tensor) -> Tensor:
            return by_name[name][rows].to(term.dtype) * torch.where(term > -torch.inf, term, 0.0)

        kept = (head_TK[rows].to(student.logprobs.dtype) * student.logprobs).sum(-1)
        drawn = (samples_Tm[rows].to(student.logprobs.dtype) * student.sample_logprobs).sum(-1)
        first = kept + part("beyond", student.log_beyond) - weighted(teacher.log_tail, student.log_beyond)
        second = drawn + part("target", student.log_target) + part("not_target", student.log_not_target)
        second = second + part("rest", student.log_beyond_not_target)
        for name in case.fills:
            second = second + part(f"with {name}", student.fill_logprobs[name])
            second = second + part(f"less {name}", student.fill_logprobs_not_target[name])
        third = student.log_beyond.exp() ** 2 + (student.logprobs.exp() * student.logprobs).sum(-1)
        for index, tempered in enumerate(student.tempered.values()):
            factor = tempered_Tn[rows, index].to(tempered.log_beyond.dtype)
            third = third + factor * torch.where(tempered.log_beyond > -torch.inf, tempered.log_beyond, 0.0)
            third = third + tempered.logprobs.exp().square().sum(-1)
        return torch.stack([first, second, third], dim=-1)

    return loss


class Outcome(NamedTuple):
    """Values and gradients of one way to compute a loss; gradients are None where none were made."""

    total: Tensor
    values: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def evaluate(case: HeadCase, way: str, loss: LossOfTerms) -> tuple[Tensor, Tensor]:
    """The total and the parts, by `dense` (unfused), `chunked` or a mode of ``fused_loss``."""
    hidden, head, teacher = case.hidden, case.head, case.teacher
    wanted: dict[str, Any] = {"fills": case.fills, "temperatures": case.temperatures}

    def of_logits(rows: slice, logits: Tensor) -> Tensor:
        part = teacher.rows(rows)
        return loss(rows, part, student_terms(logits, part, **wanted))

    if way == "dense":
        values = of_logits(slice(0, len(teacher)), head.logits(hidden))
        return (values * case.coefficients.to(values)).sum(), values.detach()
    if way == "chunked":
        return chunked_loss(hidden, head, of_logits, case.coefficients)
    return fused_loss(hidden, head, teacher, loss, case.coefficients, mode=way, **wanted)  # type: ignore[arg-type]


def outcome(case: HeadCase, way: str, *, needed: Sequence[bool] = (), loss: LossOfTerms | None = None) -> Outcome:
    """Values and gradients of the probe (or another loss)."""
    trained = case.trained(*needed)
    total, values = evaluate(trained, way, loss or probe(case))
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    hidden, weight, bias = (None if leaf is None else leaf.grad for leaf in trained.leaves)
    return Outcome(total.detach(), values, hidden, weight, bias)


def assert_same(actual: Outcome, expected: Outcome, relative: float) -> None:
    """Equal within a share of each tensor's largest entry (the total: of the sum of its parts), or of 1; same types."""
    for name, mine, other in zip(Outcome._fields, actual, expected, strict=True):
        assert (mine is None) == (other is None), f"{name}: {mine} against {other}"
        if mine is None or other is None:
            continue
        assert (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device), name
        assert torch.isfinite(mine).all(), name
        if mine.numel():
            # A total may cancel: what it may be off by goes with what it is a sum of.
            size = float(expected.values.abs().sum() if name == "total" else other.abs().max())
            error, size = float((mine - other).abs().max()), max(1.0, size)
            assert error <= relative * size, f"{name}: off by {error:.3g} where {size:.3g} is the largest"


@contextlib.contextmanager
def small_tiles(tile: int = 16, buffer_bytes: int = 1 << 12) -> Iterator[None]:
    """Tiles of the vocabulary and pieces of the positions small enough for several of each."""
    with (
        mock.patch.object(linear_head, "VOCABULARY_TILE", tile),
        mock.patch.dict(linear_head.BUFFER_BYTES, {"cpu": buffer_bytes, "cuda": buffer_bytes}),
    ):
        yield


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest memory that any operation made, also inside the package's own operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0
        self._inside: dict[Any, Callable[..., Any]] = {
            torch.ops.tailcache.head_terms.default: fused_head_module._head_terms._init_fn,
            torch.ops.tailcache.head_terms_backward.default: fused_head_module._head_terms_backward._init_fn,
            torch.ops.tailcache.masses_off.default: terms._masses_off._init_fn,
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._inside:
            with self:
                return self._inside[func](*args, **kwargs)
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        result = func(*args, **kwargs)
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.num_bytes = max(self.num_bytes, each.untyped_storage().nbytes())
        return result
