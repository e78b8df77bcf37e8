"""What the losses ask of the logits, from hidden states: against float64 and autograd's own operations on whole rows.

The expectation shares nothing with the code under test but the head's own ``logits``: log-softmax, and sums over
masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from fused_cases import DEVICES, HeadCase, Largest, fill_of, head_case, small_tiles, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailcache.storage.errors import MismatchError
from tailcache.trainers import fused_head as module
from tailcache.trainers import linear_head, terms
from tailcache.trainers.fused_head import fused_head
from tailcache.trainers.terms import StudentTerms, fill_masses, student_terms, terms_from_head

EVERYTHING: dict[str, Any] = {
    "num": 13, "vocab_size": 61, "padding": 3, "bias": True, "scale": -0.7, "soft_cap": 4.0,
    "fills": ("prior", "uniform", "faint", "head"), "temperatures": (4.0, 0.5),
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": EVERYTHING,
    "K = V": {"vocab_size": 9, "top_k": 9, "fills": ("prior",), "temperatures": (2.0,)},
    "K = V - 1": {"vocab_size": 9, "top_k": 8, "fills": ("prior",), "temperatures": (2.0,)},
    "V = 1": {"vocab_size": 1, "top_k": 1, "num_samples": 0, "temperatures": (2.0,)},
    "K = 1, m = 0": {"top_k": 1, "num_samples": 0, "fills": ("prior",)},
}


@pytest.fixture(autouse=True)
def several_tiles() -> Iterator[None]:
    with small_tiles():
        yield


def terms_of(case: HeadCase) -> StudentTerms:
    asked: dict[str, Any] = {"fills": case.fills, "temperatures": case.temperatures}
    return terms_from_head(fused_head(case.hidden, case.head, case.teacher, **asked), case.teacher, **asked)


def flat(student: StudentTerms) -> dict[str, Tensor]:
    """The terms by name."""
    named = {k: v for k, v in vars(student).items() if isinstance(v, Tensor)}
    named |= {f"fill {k}": v for k, v in student.fill_logprobs.items()}
    named |= {f"fill without y {k}": v for k, v in student.fill_logprobs_not_target.items()}
    for temperature, tempered in student.tempered.items():
        named |= {f"{k} at {temperature}": v for k, v in vars(tempered).items()}
    return named


def expected_terms(case: HeadCase) -> dict[str, Tensor]:
    """From log-softmax of whole rows and masks, in float64."""
    teacher = case.teacher
    logits = case.head.logits(case.hidden)
    rows, ids = torch.arange(len(teacher), device=logits.device)[:, None], teacher.token_ids
    in_head = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    in_head[rows, ids] = True
    is_target = torch.zeros_like(in_head)
    is_target[rows, teacher.next_tokens[:, None]] = True

    def mass(logprobs: Tensor, keep: Tensor) -> Tensor:
        some = keep.any(-1)
        kept = logprobs.masked_fill(~keep, -torch.inf)
        return torch.where(some, torch.logsumexp(torch.where(some[:, None], kept, 0.0), -1), -torch.inf)

    logq = logits.log_softmax(-1)
    named = {
        "logprobs": logq.gather(-1, ids),
        "log_target": logq.gather(-1, teacher.next_tokens[:, None])[:, 0],
        "log_not_target": mass(logq, ~is_target),
        "sample_logprobs": logq.gather(-1, teacher.tail_samples),
        "log_beyond": mass(logq, ~in_head),
        "log_beyond_not_target": mass(logq, ~in_head & ~is_target),
    }
    for name, fill in case.fills.items():
        for label, keep in ((f"fill {name}", ~in_head), (f"fill without y {name}", ~in_head & ~is_target)):
            weights = fill.double() * keep
            total = weights.sum(-1)
            named[label] = torch.where(total > 0, (weights * logq).sum(-1) / torch.where(total > 0, total, 1.0), 0.0)
    for temperature in case.temperatures:
        tempered = (logits / temperature).log_softmax(-1)
        named[f"logprobs at {temperature}"] = tempered.gather(-1, ids)
        named[f"log_beyond at {temperature}"] = mass(tempered, ~in_head)
    return named


def gradients(named: dict[str, Tensor], case: HeadCase) -> list[Tensor]:
    """Of a random combination of all terms that are not -inf."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64, device=case.hidden.device)
    for name in sorted(named):
        factors = torch.randn(named[name].shape, generator=generator, dtype=torch.float64).to(case.hidden.device)
        finite = named[name] > -torch.inf
        total = total + (factors * torch.where(finite, named[name], 0.0)).sum()
    leaves = [leaf for leaf in case.leaves if leaf is not None]
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", CASES)
def test_terms_and_gradients_are_those_of_whole_rows(shape: str, device: str) -> None:
    case = head_case(**CASES[shape]).on(device).trained()
    mine, expected = flat(terms_of(case)), expected_terms(case)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-12, msg=f"{name} differs")
    for actual, other in zip(gradients(mine, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", ["everything", "K = V", "V = 1"])
def test_the_rest_may_be_empty(shape: str) -> None:
    case = head_case(**{**CASES[shape], "top_k": 61 if shape == "everything" else CASES[shape]["top_k"]}).trained()
    head = fused_head(case.hidden, case.head, case.teacher, fills=case.fills, temperatures=case.temperatures)
    assert (head.log_sum_rest == -torch.inf).all()
    assert (head.largest_rest == -torch.inf).all()
    assert (head.fill_means == 0).all()
    student = terms_of(case)
    assert (student.log_beyond == -torch.inf).all()
    assert all(torch.isfinite(grad).all() for grad in gradients(flat(student), case))


def test_largest_of_the_rest_and_repeated_draws() -> None:
    case = head_case().trained()
    head = fused_head(case.hidden, case.head, case.teacher)
    logits = case.head.logits(case.hidden).detach()
    excluded = torch.cat([case.teacher.token_ids, case.teacher.next_tokens[:, None]], dim=-1)
    torch.testing.assert_close(head.largest_rest, logits.scatter(-1, excluded, -torch.inf).amax(-1))
    assert not head.largest_rest.requires_grad
    draws = case.teacher.tail_samples
    assert any(len(row.unique()) < draws.shape[1] for row in draws)
    first = slice(case.teacher.top_k, -1)
    (mine,) = torch.autograd.grad(head.gathered[:, first].sum(), case.hidden)
    torch.testing.assert_close(mine, case.head.weight.detach()[draws].sum(1))


@given(exponent=st.floats(-80, -5), seed=st.integers(0, 2**31), peak_in_head=st.booleans())
@settings(max_examples=25, deadline=None)
def test_small_masses_have_all_their_digits(exponent: float, seed: int, peak_in_head: bool) -> None:
    """The mass itself, not only its log: float32 holds a log near -70 to 4e-6, and no sum of probabilities does."""
    case = head_case(5, 40, 40, seed=seed, spread=0.0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((5, 40), generator=generator)
    peaks = case.teacher.token_ids[:, 1] if peak_in_head else case.teacher.tail_samples[:, 0]
    hidden[torch.arange(5), peaks] = -exponent
    case = case.with_leaves(hidden, torch.eye(40), None)
    mine, exact = flat(terms_of(case)), expected_terms(case.to(torch.float64))
    for name in ("log_beyond", "log_beyond_not_target", "log_not_target", "log_target", "logprobs", "sample_logprobs"):
        torch.testing.assert_close(mine[name].double().exp(), exact[name].exp(), rtol=2e-5, atol=0.0)
    if not peak_in_head:  # the log of a mass near 1, by itself
        near_one = exact["log_beyond"]
        torch.testing.assert_close(mine["log_beyond"].double(), near_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4, 3e4])
def test_logits_of_ten_thousand_are_finite_and_right(size: float) -> None:
    case = head_case(**{**EVERYTHING, "soft_cap": None, "scale": 1.0, "dtype": torch.float32})
    case = case.with_leaves(case.hidden * size, case.head.weight, case.head.bias).trained()
    mine, exact = flat(terms_of(case)), expected_terms(case.to(torch.float64))
    for name, value in mine.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=0.05)
    assert all(torch.isfinite(grad).all() for grad in gradients(mine, case))


# -- precision of 16-bit factors -------------------------------------------------------------------------------------


def assert_as_exact_as_float32(student: StudentTerms, case: HeadCase) -> None:
    """The terms of float64 computation on the same, already rounded, hidden states and head."""
    exact = expected_terms(case.to(torch.float64))
    for name, value in flat(student).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-6, atol=1e-5)


NARROW: dict[str, Any] = {"num": 12, "vocab_size": 200, "width": 64, "bias": True, "fills": ("prior",), "padding": 2}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_factors_lose_nothing_more(dtype: torch.dtype, device: str) -> None:
    case = head_case(**NARROW, temperatures=(2.0,)).to(dtype).on(device)
    assert_as_exact_as_float32(terms_of(case), case)


def test_a_product_rounded_to_16_bits_would_be_seen() -> None:
    case = head_case(**NARROW).to(torch.bfloat16)

    def rounded(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.mm(a, b).float()

    with mock.patch.object(linear_head, "product", rounded), pytest.raises(AssertionError, match="not close"):
        assert_as_exact_as_float32(terms_of(case), case)
    with pytest.raises(AssertionError, match="not close"):
        assert_as_exact_as_float32(
            student_terms(case.head.logits(case.hidden), case.teacher, fills=case.fills), case
        )  # fmt: skip


@pytest.mark.parametrize("hidden_type", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_means_rounded_factors(hidden_type: torch.dtype) -> None:
    """Hidden states come in float32 (after a norm) or bfloat16 (after a linear layer); the weight is float32."""
    case = head_case(**NARROW, dtype=torch.float32)
    given = case.with_leaves(case.hidden.to(hidden_type), case.head.weight, case.head.bias)
    rounded = case.with_leaves(case.hidden.bfloat16(), case.head.weight.bfloat16(), case.head.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_exact_as_float32(terms_of(given), rounded)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="not close"):
        assert_as_exact_as_float32(terms_of(given), case)


# -- the operators ---------------------------------------------------------------------------------------------------


def operator_arguments(case: HeadCase) -> tuple[Any, ...]:
    excluded, gathered = terms.wanted_ids(case.teacher)
    fills = module.fill_matrix(case.fills, case.hidden, case.head.vocab_size, torch.float64)
    head = case.head
    return (
        *case.leaves, excluded, gathered, fills, [1.0, *case.temperatures], head.vocab_size, head.scale,
        head.soft_cap or 0.0, torch.float64,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["plain", "everything"])
def test_operators_are_what_they_are_registered_as(shape: str) -> None:
    """Schema, fake tensors, autograd and tracing with dynamic shapes."""
    case = head_case(**{**CASES[shape], "fills": ("prior",) if CASES[shape] else ()})
    given = operator_arguments(case.trained())
    torch.library.opcheck(module._head_terms, given)
    plain = operator_arguments(case)
    log_sums, largest, gathered, fill_sums = module._head_terms(*plain)
    for needed in ([True, True, True], [True, False, False], [False, True, False]):
        grads = (torch.ones_like(log_sums), torch.ones_like(gathered), torch.ones_like(fill_sums))
        torch.library.opcheck(module._head_terms_backward, (*grads, log_sums, largest, *plain, needed))
    torch.library.opcheck(
        terms._masses_off, (torch.rand(61), torch.zeros((3, 2), dtype=torch.long), torch.ones(3) > 0)
    )  # fmt: skip


def test_a_second_derivative_is_refused() -> None:
    case = head_case().trained()
    total = terms_of(case).log_beyond.sum()
    (gradient,) = torch.autograd.grad(total, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"expected one differentiation, found a second one.*student_terms"):
        torch.autograd.grad(gradient.sum(), case.hidden)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    case = head_case(**EVERYTHING).trained()
    with mode():
        mine = flat(terms_of(case))
    for name, value in expected_terms(case).items():
        assert not mine[name].requires_grad
        torch.testing.assert_close(mine[name], value.detach(), rtol=1e-12, atol=1e-12)


def test_no_rows_at_all() -> None:
    case = head_case(**{**EVERYTHING, "num": 0}).trained()
    mine = flat(terms_of(case))
    assert all(len(value) == 0 for value in mine.values())
    assert all(not grad.any() for grad in gradients(mine, case))


# -- masses of fills -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prior", "uniform", "head", "faint", "slight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("row_elements", [1, 1 << 22])
def test_masses_of_fills_have_their_digits(name: str, dtype: torch.dtype, row_elements: int) -> None:
    """As sums of what is left, position by position, though worked out as differences where that is exact."""
    teacher = targets(9, 50, 4, 2)
    shared = fill_of(name, teacher).to(dtype)
    own = torch.stack([shared.roll(shift) for shift in range(9)])
    for fill in (shared, own):
        with mock.patch.object(terms, "_ROW_ELEMENTS", row_elements):
            masses = fill_masses(fill, teacher)
        for t in range(9):
            gone = {*teacher.token_ids[t].tolist(), int(teacher.next_tokens[t])}
            row = (fill if fill.dim() == 1 else fill[t]).tolist()
            left = sum(weight for i, weight in enumerate(row) if i not in gone)
            assert masses[t].item() == pytest.approx(left, rel=1e-13 if dtype == torch.float64 else 1e-7, abs=0.0)


def test_masses_of_fills_never_need_all_rows_at_once() -> None:
    """All positions have the one id that all the mass is on in their heads."""
    teacher = targets(300, 500, 4, 0)
    teacher = replace(teacher, token_ids=torch.arange(4).expand(300, 4).contiguous())
    fill = torch.zeros(500).index_fill(0, torch.tensor([2]), 1.0)
    with mock.patch.object(terms, "_ROW_ELEMENTS", 5000), Largest() as largest:
        assert not fill_masses(fill, teacher).any()
    assert largest.num_bytes <= 8 * 5000


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(11, 5), (10, 6), (11,), (1, 11, 6)], ids=str)
def test_hidden_states_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    case = head_case()
    with pytest.raises(MismatchError, match=r"expected hidden states \[11 positions, 6 wide\], found \[1"):
        fused_head(torch.ones(shape), case.head, case.teacher)


def test_another_vocabulary_is_refused() -> None:
    case = head_case(padding=3)
    with pytest.raises(MismatchError, match=r"expected a head over the teacher's 50 ids, found 53"):
        fused_head(case.hidden, replace(case.head, vocab_size=53), case.teacher)


@pytest.mark.parametrize("shape", [(49,), (11, 50), ()], ids=str)
def test_a_fill_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    case = head_case()
    with pytest.raises(MismatchError, match=r"fill 'mine' to have one weight for each of 50 ids, found .*chunked_loss"):
        fused_head(case.hidden, case.head, case.teacher, fills={"mine": torch.ones(shape)})
