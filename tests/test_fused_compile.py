"""A loss from hidden states under ``torch.compile``: values, gradients, and how many graphs there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fused_cases import HeadCase, Outcome, assert_same, evaluate, head_case, probe, small_tiles
from torch import Tensor

from tailcache.trainers.fused_loss import LossOfTerms

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def several_tiles_and_pieces() -> Iterator[None]:
    with small_tiles():
        yield


def compiled_step(case: HeadCase, way: str, num_graphs: list[int], **settings: Any) -> Callable[[HeadCase], Outcome]:
    """A training step whose forward is compiled."""

    def count(graph: Any, inputs: Any) -> Any:
        num_graphs.append(len(inputs))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: HeadCase) -> tuple[Tensor, Tensor]:
        return evaluate(part.with_leaves(torch.tanh(hidden), weight, bias), way, loss)

    loss = probe(case)
    compiled = torch.compile(forward, backend=count, **settings)

    def step(part: HeadCase) -> Outcome:
        trained = part.trained()
        total, values = compiled(*trained.leaves, part)
        total.backward()  # type: ignore[no-untyped-call]
        hidden, weight, bias = (None if leaf is None else leaf.grad for leaf in trained.leaves)
        return Outcome(total.detach(), values, hidden, weight, bias)

    return step


def eager_step(part: HeadCase, loss: LossOfTerms) -> Outcome:
    trained = part.trained()
    total, values = evaluate(trained.with_leaves(torch.tanh(trained.hidden), *trained.leaves[1:]), "dense", loss)
    total.backward()  # type: ignore[no-untyped-call]
    hidden, weight, bias = (None if leaf is None else leaf.grad for leaf in trained.leaves)
    return Outcome(total.detach(), values, hidden, weight, bias)


@pytest.mark.parametrize("autocast", [False, True])
def test_recompute_compiles_to_one_graph_for_all_lengths(autocast: bool) -> None:
    torch._dynamo.reset()
    asked: dict[str, Any] = {} if autocast else {"fills": ("prior",), "temperatures": (2.0,), "soft_cap": 3.0}
    case, num_graphs = head_case(23, bias=True, padding=2, **asked), list[int]()
    step = compiled_step(case, "recompute", num_graphs, fullgraph=True, dynamic=True)
    seen = []
    for num in (7, 12):
        part = case.rows(slice(0, num))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mine = step(part)
        assert_same(mine, eager_step(part, probe(case)), 1e-12)
        seen.append(len(num_graphs))
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the compiler's own making
@pytest.mark.parametrize("way", ["one-pass", "chunked"])
def test_one_pass_under_compile_breaks_the_graph_and_is_right(way: str) -> None:
    torch._dynamo.reset()
    case, num_graphs = head_case(23, bias=True, padding=2, fills=("prior",)), list[int]()
    step = compiled_step(case, way, num_graphs)
    for num in (7, 12):
        part = case.rows(slice(0, num))
        assert_same(step(part), eager_step(part, probe(case)), 1e-12)
    assert num_graphs
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled_step(case, way, num_graphs, fullgraph=True)(case)
