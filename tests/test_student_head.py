"""Which heads can be fused: found with all that models do to their logits, and not taken for what they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_fixtures import LLAMA, tiny_model

from tailcache.trainers.linear_head import LinearHead
from tailcache.trainers.student_head import find_linear_head

V = 21


class Adapted(nn.Module):
    """A linear layer with a low-rank update beside it, as adapters wrap it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.base(hidden) + self.up(self.down(hidden))
        return result


def adapted(model: Any) -> Any:
    """The model with its head adapted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.set_output_embeddings(Adapted(model.get_output_embeddings()))
    return model


GEMMA: dict[str, Any] = {**LLAMA, "head_dim": 8, "sliding_window": 4}
MODELS: dict[str, tuple[Any, float, float | None]] = {
    "llama": (lambda: tiny_model(V), 1.0, None),
    "tied": (lambda: tiny_model(V, **LLAMA, tie_word_embeddings=True), 1.0, None),
    "padded": (lambda: tiny_model(V + 11), 1.0, None),
    "gemma2, capped": (
        lambda: tiny_model(V, model_type="gemma2", **GEMMA, final_logit_softcapping=2.0),
        1.0,
        2.0,
    ),
    "granite, scaled": (lambda: tiny_model(V, model_type="granite", **LLAMA, logits_scaling=4.0), 0.25, None),
    "cohere, scaled": (lambda: tiny_model(V, model_type="cohere", **LLAMA, logit_scale=0.125), 0.125, None),
    "phi, biased": (lambda: tiny_model(V, model_type="phi", **LLAMA), 1.0, None),
    "gpt2": (lambda: tiny_model(V, model_type="gpt2", **LLAMA), 1.0, None),
    "bf16 weights": (lambda: tiny_model(V).bfloat16(), 1.0, None),
    "float64 weights": (lambda: tiny_model(V).double(), 1.0, None),
    "mamba, without positions": (
        lambda: tiny_model(V, model_type="mamba", hidden_size=32, num_hidden_layers=2, state_size=8),
        1.0,
        None,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_linear_heads_are_found_with_what_follows_them(name: str) -> None:
    make, scale, soft_cap = MODELS[name]
    model = make().train()
    head = find_linear_head(model, V)
    assert isinstance(head, LinearHead), head
    assert head.weight is model.get_output_embeddings().weight
    assert head.bias is model.get_output_embeddings().bias
    assert (head.bias is not None) == (name == "phi, biased")
    assert (head.vocab_size, head.scale, head.soft_cap) == (V, scale, soft_cap)
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


def _with(model: Any, **config: Any) -> Any:
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def _hooked(model: Any) -> Any:
    model.get_output_embeddings().register_forward_hook(lambda module, arguments, output: 2 * output)
    return model


def _more_than_its_head(model: Any) -> Any:
    forward = model.forward

    def tilted(*arguments: Any, **settings: Any) -> Any:
        output = forward(*arguments, **settings)
        output.logits = output.logits + torch.arange(V) / V
        return output

    model.forward = tilted
    return model


def _headless(model: Any) -> Any:
    model.get_output_embeddings = lambda: None
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: adapted(tiny_model(V)), "its head is a Adapted, not a plain linear layer"),
        (lambda: _headless(tiny_model(V)), "does not say which layer"),
        (lambda: _hooked(tiny_model(V)), "replaced or hooked"),
        (lambda: _more_than_its_head(tiny_model(V)), "its logits are more than its head's"),
        (lambda: _with(tiny_model(V), logits_scaling=2.0), "its logits are more than its head's"),
        (lambda: _with(tiny_model(V), final_logit_softcapping=1.0), "its logits are more than its head's"),
    ],
    ids=["adapted", "no head", "hooked", "tilted", "scaling that is not done", "cap that is not done"],
)
def test_what_is_more_than_a_linear_layer_is_not_taken_for_one(make: Any, why: str) -> None:
    model = make()
    found = find_linear_head(model, V)
    assert isinstance(found, str)
    assert why in found
