"""Inputs for the tests of the losses: teachers of several shapes, what a cache stores of them, tolerances.

TOLERANCES, each with its reason (nats unless said otherwise):

FLOAT64 (rtol 1e-10, atol 1e-12): the same mathematics in another order; float64 has 2e-16, sums of up to 200
  terms and logs near 70 lose three digits, differences near 0 two more.
FLOAT32 (rtol 3e-5, atol 3e-5): float32 has 6e-8; log q near -70 carries 4e-6, times weights up to 5.
UNDERFLOW (rtol 1e-4, atol 1e-4): float32 losses that divide by 1 - p_y = 1e-30: both logs are near -70 and carry
  4e-6 each, which the exponential makes 1e-5 of every weight.
SLOPE (0.1): of the log-log slope of the error of averaged captures around -1/2; measured, it is off by 0.004.
MICRO_BATCH (1e-6): what is left is the order of a float32 sum.
BOUNDARY (1e-4): logits of a document packed or alone, relative to their spread. Attention summed in another
  order gives 3e-6 in float32; seeing another document gives more than 0.1.
CODEC_MEAN (1e-5), CODEC_MAX (1e-3): what the codec promises of the KL error of stored log-probs.
SIGMAS (5): estimators; |mean - exact| <= 5 standard errors fails once in 2 million, and seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import reference
import torch
from torch import Tensor

from tailcache.trainers.atoms import bucket_atoms, filled_atoms, head_atoms
from tailcache.trainers.tails import TAILS, TRUNCATIONS, renormalise, tail_choice
from tailcache.trainers.terms import StudentTerms, TeacherTerms, student_terms


class Tolerance(NamedTuple):
    """Relative to the expected value, and absolute."""

    rtol: float
    atol: float


FLOAT64 = Tolerance(1e-10, 1e-12)
FLOAT32 = Tolerance(3e-5, 3e-5)
UNDERFLOW = Tolerance(1e-4, 1e-4)
SLOPE = 0.1
MICRO_BATCH = 1e-6
BOUNDARY = 1e-4
CODEC_MEAN = 1e-5
CODEC_MAX = 1e-3
SIGMAS = 5.0


def assert_close(
    actual: Tensor | Sequence[float] | float, expected: Tensor | Sequence[float] | float, tolerance: Tolerance
) -> None:
    """Equal within the tolerance, shape and dtype included."""
    torch.testing.assert_close(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol)


def teacher_logprobs(kind: str, num_positions: int, vocab_size: int, seed: int = 0) -> Tensor:
    """[T, V] float64 log p of a named shape."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_positions, vocab_size)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "random":
        logits = 2 * normal
    elif kind == "zipf":
        ranks = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(num_positions)])
        logits = -1.2 * (ranks + 1).double().log() + 0.1 * normal
    elif kind == "flat":
        logits = 1e-3 * normal
    elif kind == "peaked":  # one-hot to 1e-30: everything but one id has e^-70
        logits = 0.5 * normal - 70.0
        logits[torch.arange(num_positions), torch.arange(num_positions) % vocab_size] = 0.0
    else:
        raise AssertionError(kind)
    return torch.log_softmax(logits, dim=-1)


KINDS = ("random", "zipf", "flat", "peaked")


def student_logits(num_positions: int, vocab_size: int, seed: int = 1, scale: float = 1.5) -> Tensor:
    """[T, V] float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn((num_positions, vocab_size), generator=generator, dtype=torch.float64)


def cached(
    logprobs_TV: Tensor,
    top_k: int,
    num_samples: int,
    next_tokens_T: Tensor,
    seed: int = 2,
    temperatures: tuple[float, ...] = (),
) -> TeacherTerms:
    """What a cache stores of these distributions, without a codec, in their dtype."""
    num_positions, vocab_size = logprobs_TV.shape
    values, ids = logprobs_TV.sort(dim=-1, descending=True, stable=True)
    tail = values[:, top_k:]
    if top_k < vocab_size:
        log_tail = torch.logsumexp(tail, -1)
        normalised = tail - log_tail[:, None]
        tail_entropy = -(normalised.exp() * normalised).sum(-1)
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(normalised.exp(), max(num_samples, 1), replacement=True, generator=generator)
        samples = ids[:, top_k:].gather(-1, draws)[:, :num_samples]
        log_z_tail = [torch.logsumexp(tail / temperature, -1) for temperature in temperatures]
    else:
        log_tail = logprobs_TV.new_full((num_positions,), -math.inf)
        tail_entropy = logprobs_TV.new_zeros(num_positions)
        samples = torch.zeros((num_positions, num_samples), dtype=torch.long)
        log_z_tail = [log_tail for _ in temperatures]
    rest = logprobs_TV.scatter(-1, next_tokens_T[:, None], -math.inf)
    return TeacherTerms(
        vocab_size=vocab_size,
        token_ids=ids[:, :top_k].contiguous(),
        logprobs=values[:, :top_k].contiguous(),
        log_tail=log_tail,
        tail_entropy=tail_entropy,
        tail_samples=samples,
        log_target=logprobs_TV.gather(-1, next_tokens_T[:, None])[:, 0],
        log_not_target=torch.logsumexp(rest, -1),
        next_tokens=next_tokens_T,
        temperatures=temperatures,
        log_z_tail=torch.stack(log_z_tail, dim=-1) if temperatures else None,
    )


def cast(teacher: TeacherTerms, dtype: torch.dtype) -> TeacherTerms:
    """The same terms in another float type."""
    fields: dict[str, Any] = {name: getattr(teacher, name) for name in TeacherTerms.__dataclass_fields__}
    changed: dict[str, Any] = {
        k: v.to(dtype) for k, v in fields.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    return replace(teacher, **changed)


def select(teacher: TeacherTerms, keep: Tensor) -> TeacherTerms:
    """Some of the positions, by mask or index."""
    return teacher.rows(keep)


@dataclass(frozen=True)
class Case:
    """One problem: distributions in full, what is cached of them, the student's logits."""

    p: list[list[float]]
    q: list[list[float]]
    logits: Tensor
    logprobs: Tensor
    teacher: TeacherTerms
    next_tokens: Tensor
    prior: Tensor
    segments: Tensor

    def stored(self, position: int) -> list[int]:
        """The stored ids of a position, most likely first."""
        ids: list[int] = self.teacher.token_ids[position].tolist()
        return ids

    def samples(self, position: int) -> list[int]:
        """The tail draws of a position."""
        ids: list[int] = self.teacher.tail_samples[position].tolist()
        return ids

    def fills(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every fill there is."""
        fills = {"prior": self.prior, "uniform": torch.ones_like(self.prior), "exact": self.logprobs.exp()}
        return {name: fill.to(dtype) for name, fill in fills.items()}


def make_case(
    kind: str,
    *,
    num_positions: int = 6,
    vocab_size: int = 37,
    top_k: int = 8,
    num_samples: int = 5,
    seed: int = 0,
    temperatures: tuple[float, ...] = (),
    student_scale: float = 1.5,
) -> Case:
    """A float64 problem of a named shape with three segments.

    The true token is the likeliest one, any one, and the first beyond the stored ones, in turn.
    """
    logprobs = teacher_logprobs(kind, num_positions, vocab_size, seed)
    logits = student_logits(num_positions, vocab_size, seed + 1, student_scale)
    generator = torch.Generator().manual_seed(seed + 2)
    next_tokens = torch.randint(vocab_size, (num_positions,), generator=generator)
    order = logprobs.sort(dim=-1, descending=True, stable=True).indices
    next_tokens[0::3] = order[0::3, 0]
    next_tokens[2::3] = order[2::3, min(top_k, vocab_size - 1)]
    prior = torch.rand(vocab_size, generator=generator, dtype=torch.float64) + 0.01
    return Case(
        p=logprobs.exp().tolist(),
        q=[reference.softmax(row) for row in logits.tolist()],
        logits=logits,
        logprobs=logprobs,
        teacher=cached(logprobs, top_k, num_samples, next_tokens, seed + 3, temperatures),
        next_tokens=next_tokens,
        prior=prior / prior.sum(),
        segments=torch.tensor([0, 0, 2, 2, 2, 1, 1, 1])[torch.arange(num_positions) % 8].sort().values,
    )


CHOICES = (*TAILS, *TRUNCATIONS)
"""Every tail choice."""

ATOM_CHOICES = tuple(choice for choice in CHOICES if choice != "sampled")
"""Those that a loss which is not linear in the tail can take."""


def terms(case: Case, logits: Tensor, choice: str = "sampled") -> tuple[TeacherTerms, StudentTerms]:
    """The teacher as a tail choice sees it, and the student with every fill and temperature, in the logits' dtype."""
    teacher = tail_choice(choice)[0](cast(case.teacher, logits.dtype))
    fills = case.fills(logits.dtype)
    return teacher, student_terms(logits, teacher, fills=fills, temperatures=case.teacher.temperatures)


def atoms(case: Case, logits: Tensor, choice: str) -> tuple[Tensor, Tensor]:
    """The atoms that a tail choice gives a loss which is not linear in the tail, in the logits' dtype."""
    teacher, student = terms(case, logits)
    if choice == "exact":
        return case.logprobs.to(logits.dtype), torch.log_softmax(logits, -1)
    if choice in ("prior", "uniform"):
        return filled_atoms(teacher, case.fills(logits.dtype)[choice]), torch.log_softmax(logits, -1)
    if choice == "drop":
        return head_atoms(teacher, student)
    return bucket_atoms(renormalise(teacher) if choice == "renormalise" else teacher, student)


def slope(values: Tensor, logits: Tensor) -> Tensor:
    """The gradient of the sum of some losses with respect to the logits; the graph is kept."""
    (gradient,) = torch.autograd.grad(values.sum(), logits, retain_graph=True)
    return gradient


def float64(values: object) -> Tensor:
    """Numbers as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def extremes(num_positions: int = 8, vocab_size: int = 37) -> list[Tensor]:
    """[T, V] float32 logits of +-1e4: random signs, one-hot, all alike."""
    signs = torch.randint(0, 2, (num_positions, vocab_size), generator=torch.Generator().manual_seed(3)) * 2 - 1
    return [
        (1e4 * signs.float()).requires_grad_(),
        (torch.eye(vocab_size)[:num_positions] * 2e4 - 1e4).requires_grad_(),
        torch.full((num_positions, vocab_size), -1e4).requires_grad_(),
    ]


def assert_finite(values: Tensor, logits: Tensor) -> None:
    """Finite values and gradients."""
    assert values.isfinite().all()
    assert slope(values, logits).isfinite().all()
