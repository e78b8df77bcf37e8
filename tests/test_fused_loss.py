"""A loss from hidden states, in every mode, against the same loss from full logits by autograd's own operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fused_cases import (
    DEVICES,
    FUSED,
    RELATIVE,
    HeadCase,
    Largest,
    Outcome,
    assert_same,
    evaluate,
    head_case,
    outcome,
    probe,
    small_tiles,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.trainers.fused_loss import LossOfTerms, chunked_loss, fused_loss
from tailcache.trainers.terms import StudentTerms, TeacherTerms

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "padded": {"padding": 6, "bias": True},
    "scaled": {"scale": 0.3, "bias": True},
    "capped": {"soft_cap": 2.5},
    "fills": {"fills": ("prior", "uniform", "head", "faint", "slight")},
    "tempered": {"temperatures": (2.0, 0.5)},
    "everything": {
        "num": 23, "vocab_size": 71, "padding": 3, "bias": True, "scale": -0.7, "soft_cap": 4.0,
        "fills": ("prior", "faint"), "temperatures": (4.0, 1.0),
    },
    "K = V": {"vocab_size": 9, "top_k": 9},
    "K = V - 1": {"vocab_size": 9, "top_k": 8, "fills": ("uniform",)},
    "K = 1": {"top_k": 1},
    "m = 0": {"num_samples": 0},
    "D = 1": {"width": 1},
    "T = 1": {"num": 1},
    "T = 0": {"num": 0, "bias": True, "fills": ("prior",), "temperatures": (2.0,)},
    "V = 1": {"vocab_size": 1, "top_k": 1, "num_samples": 0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def several_tiles_and_pieces() -> Iterator[None]:
    with small_tiles():
        yield


# -- fused = unfused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("shape", CASES)
def test_fused_is_unfused(shape: str, way: str, dtype: torch.dtype, device: str) -> None:
    case = head_case(dtype=dtype, **CASES[shape]).on(device)
    assert_same(outcome(case, way), outcome(case, "dense"), RELATIVE[dtype])


@st.composite
def head_cases(draw: st.DrawFn) -> HeadCase:
    vocab_size = draw(st.integers(1, 70))
    top_k = draw(st.one_of(st.sampled_from([1, vocab_size]), st.integers(1, vocab_size)))
    return head_case(
        num=draw(st.integers(0, 13)),
        vocab_size=vocab_size,
        width=draw(st.integers(1, 9)),
        top_k=top_k,
        num_samples=draw(st.integers(0, 5)) if top_k < vocab_size else 0,
        padding=draw(st.sampled_from([0, 1, 20])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.125, -1.5])),
        soft_cap=draw(st.sampled_from([None, 1.0, 30.0])),
        fills=draw(st.lists(st.sampled_from(["prior", "uniform", "head", "faint", "slight"]), unique=True)),
        temperatures=draw(st.lists(st.sampled_from([0.5, 2.0, 10.0]), unique=True)),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        seed=draw(st.integers(0, 2**31)),
        spread=draw(st.sampled_from([0.1, 2.0])),
    )


@given(case=head_cases(), tile=st.integers(1, 80), buffer_bytes=st.integers(1, 1 << 15))
@settings(max_examples=30, deadline=None)
def test_fused_is_unfused_whatever_the_shapes(case: HeadCase, tile: int, buffer_bytes: int) -> None:
    expected = outcome(case, "dense")
    with small_tiles(tile, buffer_bytes):
        for way in FUSED:
            assert_same(outcome(case, way), expected, RELATIVE[case.hidden.dtype])


@pytest.mark.parametrize("way", FUSED)
def test_padding_rows_neither_matter_nor_learn(way: str) -> None:
    """They are NaN here; what is not a token gets a gradient of exactly 0."""
    result = outcome(head_case(padding=6, bias=True), way)
    assert result.weight is not None
    assert result.bias is not None
    assert torch.equal(result.weight[50:], torch.zeros(6, 6, dtype=torch.float64))
    assert torch.equal(result.bias[50:], torch.zeros(6, dtype=torch.float64))
    assert (result.weight[:50] != 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", FUSED)
def test_bf16_gradients_are_those_of_float64_rounded(way: str, device: str) -> None:
    case = head_case(40, 300, 64, dtype=torch.float64, bias=True, padding=4)
    rounded = case.to(torch.bfloat16).on(device)
    exact = outcome(rounded.to(torch.float64), "dense")
    mine = outcome(rounded, way)
    torch.testing.assert_close(mine.values.double(), exact.values, rtol=2e-6, atol=2e-5)
    for name in ("hidden", "weight", "bias"):
        actual, expected = getattr(mine, name), getattr(exact, name)
        assert actual.dtype == torch.bfloat16
        assert float((actual.double() - expected).norm() / expected.norm()) < 2**-8


@pytest.mark.parametrize("way", FUSED)
def test_the_incoming_gradient_is_not_rounded(way: str) -> None:
    """A third in bfloat16 is 0.3340: all gradients would be off by as much."""
    case = head_case(40, 300, 64, dtype=torch.float64).to(torch.bfloat16)
    exact = outcome(case.to(torch.float64), "dense")
    trained = case.trained()
    (evaluate(trained, way, probe(case))[0] / 3).backward()  # type: ignore[no-untyped-call]
    for leaf, expected in zip(trained.leaves, exact[2:], strict=True):
        if leaf is not None and leaf.grad is not None:
            assert expected is not None
            ratio = float((leaf.grad.double() * expected).sum() / (expected * expected).sum())
            assert ratio == pytest.approx(1 / 3, rel=2e-4)


@pytest.mark.parametrize("way", FUSED)
def test_small_gradients_of_float16_survive_a_scaled_loss(way: str) -> None:
    """Gradients below float16's range are what the scaling of a loss is for."""
    case = head_case(40, 300, 64, dtype=torch.float64).to(torch.float16)
    exact = outcome(case.to(torch.float64), "dense")
    trained = case.trained(True, False, False)
    total, _ = evaluate(trained, way, lambda *given: probe(case)(*given) * 1e-6)
    (total * 1e6).backward()  # type: ignore[no-untyped-call]
    assert trained.hidden.grad is not None
    assert exact.hidden is not None
    error = (trained.hidden.grad.double() - exact.hidden).norm() / exact.hidden.norm()
    assert float(error) < 2**-9


# -- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["dense", *FUSED])
@pytest.mark.parametrize("shape", ["everything", "K = V", "K = V - 1", "fills", "tempered"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand_are_finite(size: float, shape: str, way: str) -> None:
    given = {**CASES[shape], "soft_cap": None, "scale": 1.0, "temperatures": ()}
    case = head_case(dtype=torch.float32, **given)
    case = case.with_leaves(case.hidden * size, case.head.weight, case.head.bias)
    logits = case.head.logits(case.hidden)
    assert float(logits.abs().max()) > 1e4
    for result in outcome(case, way):
        assert result is None or torch.isfinite(result).all()


@pytest.mark.parametrize("way", FUSED)
def test_one_id_with_all_but_1e_minus_30(way: str) -> None:
    """The largest of the others decides their sum, whether the peak is excluded or not."""
    case = head_case(8, 40, 40, top_k=3, bias=True, spread=0.0)
    weight = torch.eye(40, dtype=torch.float64)
    hidden = torch.zeros(8, 40, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    assert case.head.bias is not None
    bias = 0.5 * torch.randn(40, generator=generator, dtype=torch.float64)
    peaks = torch.cat([case.teacher.token_ids[:4, 0], case.teacher.tail_samples[4:, 0]])
    hidden[torch.arange(8), peaks] = 69.0  # e^-69 is 1e-30
    case = case.with_leaves(hidden, weight, bias)
    for dtype in RELATIVE:
        assert_same(outcome(case.to(dtype), way), outcome(case.to(dtype), "dense"), RELATIVE[dtype])


# -- how it is used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("needed", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1)], ids=str)
def test_only_what_is_trained_gets_a_gradient(needed: tuple[int, int, int], way: str) -> None:
    case = head_case(bias=True, padding=2, scale=0.5)
    whole = outcome(case, "dense")
    mine = outcome(case, way, needed=[bool(n) for n in needed])
    expected = (grad if need else None for grad, need in zip(whole[2:], needed, strict=True))
    assert_same(mine, Outcome(whole.total, whole.values, *expected), 1e-12)


@pytest.mark.parametrize("way", FUSED)
def test_a_frozen_head_costs_no_gradient_of_its_size(way: str) -> None:
    case = head_case(num=3, vocab_size=60, width=40, bias=True)
    for needed, fits in (((True, False, True), True), ((False, True, False), False)):
        trained = case.trained(*needed)
        with Largest() as largest:
            evaluate(trained, way, probe(case))[0].backward()  # type: ignore[no-untyped-call]
        assert (largest.num_bytes < case.head.weight.nbytes) == fits


@pytest.mark.parametrize("way", FUSED)
def test_a_loss_may_be_wider_than_the_terms(way: str) -> None:
    """As one that takes float64 targets; the total, and what comes back from it, are in the head's type."""
    case = head_case(dtype=torch.float32)
    expected = outcome(case, "dense")
    mine = outcome(case, way, loss=lambda *given: probe(case)(*given).double())
    assert mine.values.dtype == torch.float64
    assert_same(mine._replace(values=mine.values.float()), expected, 1e-6)


@pytest.mark.parametrize("way", FUSED)
def test_micro_batches_add_up(way: str) -> None:
    case = head_case(23, bias=True, fills=("prior",), temperatures=(2.0,), padding=2)
    whole, loss = outcome(case, way), probe(case)
    trained, values = case.trained(), []
    for start, stop in ((0, 5), (5, 6), (6, 23)):

        def shifted(rows: slice, teacher: TeacherTerms, student: StudentTerms, start: int = start) -> Tensor:
            return loss(slice(start + rows.start, start + rows.stop), teacher, student)

        total, part = evaluate(trained.rows(slice(start, stop)), way, shifted)
        total.backward()  # type: ignore[no-untyped-call]
        values.append(part)
    hidden, weight, bias = (None if leaf is None else leaf.grad for leaf in trained.leaves)
    assert_same(Outcome(whole.total, torch.cat(values), hidden, weight, bias), whole, 1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("way", FUSED)
def test_under_gradient_checkpointing(way: str, use_reentrant: bool) -> None:
    case = head_case(bias=True)
    loss = probe(case)

    def step(trained: HeadCase, wrap: Callable[..., Tensor]) -> list[Tensor]:
        mix = torch.eye(6, dtype=torch.float64, requires_grad=True)

        def forward(hidden: Tensor) -> Tensor:
            states = torch.tanh(hidden @ mix)
            return evaluate(trained.with_leaves(states, trained.head.weight, trained.head.bias), way, loss)[0]

        wrap(forward, trained.hidden).backward()  # type: ignore[no-untyped-call]
        leaves = [mix, *(leaf for leaf in trained.leaves if leaf is not None)]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    plain = step(case.trained(), lambda forward, hidden: forward(hidden))
    saved = step(case.trained(), lambda forward, hidden: checkpoint(forward, hidden, use_reentrant=use_reentrant))
    assert len(plain) == len(saved) == 4
    for mine, expected in zip(saved, plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("way", FUSED)
def test_autocast_rounds_the_factors_and_nothing_else(way: str) -> None:
    case = head_case(12, 200, 64, bias=True, dtype=torch.float32)
    rounded = case.with_leaves(case.hidden.bfloat16().float(), case.head.weight.bfloat16().float(), case.head.bias)
    exact = outcome(rounded.to(torch.float64), "dense")
    seen = []

    def loss(rows: slice, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
        values = probe(case)(rows, teacher, student)
        seen.append(torch.is_autocast_enabled("cpu"))
        assert values.dtype == (values @ torch.eye(3)).dtype == torch.float32
        return values

    for inside in (False, True):
        trained = case.trained()
        with torch.autocast("cpu", torch.bfloat16):
            total, values = evaluate(trained, way, loss)
            if inside:
                total.backward()  # type: ignore[no-untyped-call]
        if not inside:
            total.backward()  # type: ignore[no-untyped-call]
        assert values.dtype == total.dtype == torch.float32
        torch.testing.assert_close(values.double(), exact.values, rtol=2e-6, atol=2e-5)
        for leaf, expected in zip(trained.leaves, exact[2:], strict=True):
            assert leaf is not None
            assert leaf.grad is not None
            assert expected is not None
            assert leaf.grad.dtype == torch.float32
            assert float((leaf.grad.double() - expected).norm() / expected.norm()) < 2**-8
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("way", FUSED)
def test_autocast_leaves_float64_alone(way: str) -> None:
    case = head_case(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        mine = outcome(case, way)
    assert_same(mine, outcome(case, way), 0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", FUSED)
def test_evaluation_makes_no_gradients(way: str, mode: Callable[[], Any]) -> None:
    """Nothing is differentiated, inside the loss either, and nothing of the weight's size exists."""
    case = head_case(num=3, vocab_size=60, width=40, fills=("prior",))
    expected = outcome(case, "dense")
    enabled = []

    def loss(rows: slice, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
        enabled.append(torch.is_grad_enabled() or student.logprobs.requires_grad)
        return probe(case)(rows, teacher, student)

    trained = case.trained()
    with mode(), Largest() as largest:
        total, values = evaluate(trained, way, loss)
    assert enabled
    assert not any(enabled)
    assert not total.requires_grad
    assert largest.num_bytes < case.head.weight.nbytes
    torch.testing.assert_close(values, expected.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, expected.total, rtol=1e-12, atol=1e-12)


CONSTANT_LOSSES: dict[str, LossOfTerms] = {
    "of nothing": lambda rows, teacher, student: torch.ones((len(teacher), 3), dtype=torch.float64),
    "of the teacher": lambda rows, teacher, student: teacher.logprobs[:, :3],
    "of one term": lambda rows, teacher, student: student.log_target[:, None].expand(-1, 3),
    "detached": lambda rows, teacher, student: student.logprobs[:, :3].detach(),
}


@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("name", CONSTANT_LOSSES)
def test_losses_that_ignore_terms(name: str, way: str) -> None:
    case, loss = head_case(bias=True), CONSTANT_LOSSES[name]
    mine, expected = outcome(case, way, loss=loss), outcome(case, "dense", loss=loss)
    if name != "of one term":
        assert expected.hidden is None
        zeros = (torch.zeros_like(leaf) for leaf in case.leaves if leaf is not None)
        mine = Outcome(mine.total, mine.values, *(z if g is None else g for z, g in zip(zeros, mine[2:], strict=True)))
        expected = Outcome(*expected[:2], *(torch.zeros_like(leaf) for leaf in case.leaves if leaf is not None))
    assert_same(mine, expected, 1e-12)


@pytest.mark.parametrize("way", FUSED)
def test_coefficients_of_zero(way: str) -> None:
    """The parts are reported all the same."""
    case = head_case(bias=True)
    object.__setattr__(case, "coefficients", torch.zeros(3))
    mine = outcome(case, way)
    assert float(mine.total) == 0.0
    assert (mine.values != 0).all()
    assert all(grad is not None and not grad.any() for grad in mine[2:])


@pytest.mark.parametrize("shape", [{}, {"scale": 0.5}, {"soft_cap": 3.0}, {"soft_cap": 3.0, "scale": 2.0}], ids=str)
def test_a_chunked_loss_may_return_a_view_and_have_an_expanded_gradient(shape: dict[str, Any]) -> None:
    """The buffer of the logits is used again for the next piece; a sum's gradient is one number, spread out."""
    case = head_case(**shape)
    losses: list[Callable[[slice, Tensor], Tensor]] = [
        lambda rows, logits: logits[:, :3],
        lambda rows, logits: logits.sum(-1, keepdim=True).expand(-1, 3),
    ]
    for loss in losses:
        trained, dense = case.trained(), case.trained()
        expected = loss(slice(0, 11), dense.head.logits(dense.hidden))
        total, values = chunked_loss(trained.hidden, trained.head, loss, case.coefficients)
        total.backward()  # type: ignore[no-untyped-call]
        (expected * case.coefficients).sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(values, expected.detach(), rtol=1e-12, atol=1e-12)
        for mine, other in zip(trained.leaves[:2], dense.leaves[:2], strict=True):
            assert mine is not None
            assert other is not None
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_the_loss_is_called_with_consecutive_pieces() -> None:
    case, pieces = head_case(23), []

    def loss(rows: slice, teacher: TeacherTerms, student: StudentTerms) -> Tensor:
        assert torch.equal(teacher.next_tokens, case.teacher.next_tokens[rows])
        pieces.append(rows)
        return student.logprobs[:, :3]

    with small_tiles(buffer_bytes=8 * 50 * 5):
        evaluate(case.trained(), "one-pass", loss)
    assert pieces == [slice(0, 5), slice(5, 10), slice(10, 15), slice(15, 20), slice(20, 23)]


# -- differentiated once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", FUSED)
def test_a_second_derivative_is_refused_and_the_parts_have_none(way: str) -> None:
    trained = head_case(bias=True).trained()
    total, values = evaluate(trained, way, probe(trained))
    assert not values.requires_grad
    (gradient,) = torch.autograd.grad(total, [trained.hidden], create_graph=True)
    assert torch.isfinite(gradient).all()
    with pytest.raises(RuntimeError, match=r"expected one differentiation.*compute the loss from full logits"):
        gradient.square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("way", ["one-pass", "chunked"])
def test_a_second_backward_of_one_pass_is_refused(way: str) -> None:
    trained = head_case().trained()
    total, _ = evaluate(trained, way, probe(trained))
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"one backward of a one-pass loss.*use fused_loss with mode='recompute'"):
        total.backward()  # type: ignore[no-untyped-call]


def test_a_second_backward_of_recompute_adds_the_same_again() -> None:
    trained = head_case(bias=True, padding=2).trained()
    once = outcome(head_case(bias=True, padding=2), "recompute")
    total, _ = evaluate(trained, "recompute", probe(trained))
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    total.backward()  # type: ignore[no-untyped-call]
    for leaf, expected in zip(trained.leaves, once[2:], strict=True):
        assert leaf is not None
        assert expected is not None
        torch.testing.assert_close(leaf.grad, 2 * expected)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", FUSED)
def test_no_tensor_has_all_the_logits(way: str) -> None:
    """Neither forward nor backward, with everything asked for; the limit is the buffer or a tile."""
    case = head_case(
        200,
        3000,
        2,
        bias=True,
        soft_cap=3.0,
        fills=("prior", "head", "faint"),
        temperatures=(2.0,),
        dtype=torch.float32,
    )
    all_bytes, trained = 4 * 200 * 3000, case.trained()
    with small_tiles(tile=256, buffer_bytes=all_bytes // 4), Largest() as largest:
        total, _ = evaluate(trained, way, probe(case))
        total.backward()  # type: ignore[no-untyped-call]
    assert 0 < largest.num_bytes <= all_bytes // 4
    with Largest() as dense:
        evaluate(trained, "dense", probe(case))
    assert dense.num_bytes >= all_bytes


@pytest.mark.parametrize("autocast", [False, True])
def test_recompute_holds_nothing_of_the_weights_size(autocast: bool) -> None:
    """Between forward and backward there are the weight itself and a few numbers per position."""
    case = head_case(9, 400, 32, dtype=torch.float32).trained()
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        evaluate(case, "recompute", probe(case))
    others = [t.untyped_storage() for t in held if t.untyped_storage().data_ptr() != case.head.weight.data_ptr()]
    assert 0 < sum(storage.nbytes() for storage in others) < case.head.weight.nbytes / 4


# -- refusals --------------------------------------------------------------------------------------------------------


def test_an_unknown_mode_is_refused() -> None:
    case = head_case()
    with pytest.raises(ConfigError, match="mode: expected 'one-pass' or 'recompute', found 'fast'"):
        fused_loss(case.hidden, case.head, case.teacher, probe(case), case.coefficients, mode="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("cut", [lambda h: h[:, :-1], lambda h: h[:, 0], lambda h: h[None]], ids=["D", "1d", "3d"])
def test_hidden_states_of_another_shape_are_refused(cut: Callable[[Tensor], Tensor], way: str) -> None:
    case = head_case()
    wrong = case.with_leaves(cut(case.hidden), case.head.weight, None)
    with pytest.raises(MismatchError, match=r"expected hidden states \[.*6.*\], found \["):
        evaluate(wrong, way, probe(case))


@pytest.mark.parametrize("way", FUSED)
@pytest.mark.parametrize("returned", [(11,), (11, 1), (11, 4), (10, 3), (1, 3), (11, 3, 1)], ids=str)
def test_a_loss_that_returns_another_shape_is_refused(returned: tuple[int, ...], way: str) -> None:
    """Or it would be broadcast against the coefficients, and count some positions or parts several times."""
    case = head_case()
    with small_tiles(buffer_bytes=1 << 20), pytest.raises(MismatchError, match=r"expected \[11 .*, 3 .*\].*, found \["):
        evaluate(case, way, lambda rows, teacher, student: torch.ones(returned, dtype=torch.float64))
