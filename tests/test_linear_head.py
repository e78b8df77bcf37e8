"""A linear head and tiles of its logits, against the whole of the logits by autograd's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_cases import head_case
from torch import Tensor

from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.trainers.linear_head import VOCABULARY_TILE, LinearHead, LogitTiles, tiles_of, vocabulary_tiles

SHAPES: list[dict[str, Any]] = [
    {},
    {"bias": True, "padding": 5},
    {"scale": 0.25, "bias": True},
    {"soft_cap": 3.0},
    {"soft_cap": 3.0, "scale": -2.0, "bias": True, "padding": 1},
]


def all_tiles(head: LinearHead, hidden: Tensor, step: int, dtype: torch.dtype) -> tuple[Tensor, LogitTiles]:
    tiles = LogitTiles(head.weight, head.bias, head.vocab_size, head.scale, head.soft_cap, dtype)
    return torch.cat([tiles.tile(hidden, ids) for ids in tiles_of(head.vocab_size, step)], dim=-1), tiles


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", [1, 7, 50, 99])
def test_tiles_are_the_logits_and_their_slope(shape: dict[str, Any], step: int) -> None:
    case = head_case(**shape)
    head = case.head
    logits, tiles = all_tiles(head, case.hidden, step, torch.float64)
    torch.testing.assert_close(logits, head.logits(case.hidden), rtol=1e-13, atol=1e-13)
    raw = case.hidden @ head.weight[: head.vocab_size].t()
    if head.bias is not None:
        raw = raw + head.bias[: head.vocab_size]
    raw = (head.scale * raw).requires_grad_()
    capped = raw if head.soft_cap is None else head.soft_cap * torch.tanh(raw / head.soft_cap)
    torch.testing.assert_close(logits, capped.detach(), rtol=1e-13, atol=1e-13)
    slope, before = tiles.slope(logits), logits.clone()
    if slope is None:
        assert head.soft_cap is None
    else:
        (expected,) = torch.autograd.grad(capped.sum(), raw)
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(logits, before)


def test_rows_of_padding_are_never_read() -> None:
    case = head_case(padding=9, bias=True)
    assert torch.isnan(case.head.weight[50:]).all()
    assert torch.isfinite(all_tiles(case.head, case.hidden, 16, torch.float64)[0]).all()
    assert case.head.logits(case.hidden).shape == (11, 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_is_rounded_to_the_type_asked_for_on_every_cpu(dtype: torch.dtype) -> None:
    case = head_case(3, 200, 64, dtype=torch.float32)
    hidden = case.hidden.to(dtype)
    logits, tiles = all_tiles(case.head, hidden, 200, dtype)
    exact = hidden.double() @ case.head.weight.to(dtype).double().t()
    assert tiles.weight(slice(2, 5)).dtype == dtype
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_tiles_cover_the_vocabulary_once() -> None:
    assert list(tiles_of(0, 4)) == []
    assert list(tiles_of(8, 4)) == [slice(0, 4), slice(4, 8)]
    assert list(tiles_of(9, 4)) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    vocab_size = 3 * VOCABULARY_TILE + 1
    for widest, width in ((None, VOCABULARY_TILE), (10**9, VOCABULARY_TILE), (1000, 1000), (1, 128)):
        tiles = vocabulary_tiles(vocab_size, widest)
        assert [i for tile in tiles for i in range(tile.start, tile.stop)] == list(range(vocab_size))
        assert max(tile.stop - tile.start for tile in tiles) == width


@pytest.mark.parametrize(
    ("weight", "bias", "vocab_size", "found"),
    [((5, 2), None, 6, r"\(5, 2\) and None"), ((5, 2), None, 0, r"\(5, 2\)"), ((5,), None, 3, r"\(5,\)"),
     ((5, 2), (4,), 4, r"\(5, 2\) and \(4,\)"), ((5, 2), (5, 1), 4, r".*and \(5, 1\)")],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(
    weight: tuple[int, ...], bias: tuple[int, ...] | None, vocab_size: int, found: str
) -> None:
    with pytest.raises(MismatchError, match=f"at least {vocab_size} rows.*found {found}"):
        LinearHead(weight=torch.ones(weight), bias=None if bias is None else torch.ones(bias), vocab_size=vocab_size)


@pytest.mark.parametrize("soft_cap", [0.0, -30.0, float("nan")])
def test_a_soft_cap_that_bounds_nothing_is_refused(soft_cap: float) -> None:
    with pytest.raises(ConfigError, match=f"soft cap above 0, found {soft_cap}; use None"):
        LinearHead(weight=torch.ones(5, 2), vocab_size=5, soft_cap=soft_cap)
