"""A learned projection between hidden states of different widths, for the cosine of hidden states.

A student narrower (or wider) than its teacher is compared through a matrix from its width to the teacher's. It is
trained with the student and of no use afterwards. While training it is a submodule of the student, so that all that
holds for the student's weights holds for it: the optimizer has it, gradients are accumulated, clipped and reduced over
processes, wrappers shard it. A checkpoint to resume from keeps it in a file of its own; the weights of the student,
there and at the end, are a plain transformers checkpoint without it.

Legend: T target positions, D the student's hidden width, E the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tailcache.storage.errors import CorruptError

__all__ = [
    "PROJECTION_FILE",
    "attach_projection",
    "load_projection",
    "project",
    "save_projection",
    "without_projection",
]

_NAME = "hidden_projection"
PROJECTION_FILE = "hidden_projection.safetensors"


def attach_projection(model: nn.Module, width: int, teacher_width: int, *, seed: int) -> nn.Linear:
    """Give the student a projection to the teacher's width.

    Args:
      model: the student, not wrapped, with all its weights on one device.
      width: D, of the student's hidden states.
      teacher_width: E.
      seed: decides its start, a random matrix that keeps lengths on average; whatever the global generator is at.

    Returns:
      The submodule, [E, D] float32, trainable, on the model's device.
    """
    layer = nn.Linear(width, teacher_width, bias=False, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(std=teacher_width**-0.5, generator=generator)
    layer.to(next(model.parameters()).device)
    model.add_module(_NAME, layer)
    return layer


def project(hidden_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """[T, E] the states in the teacher's width, in float32 (or float64) whatever the autocast."""
    with torch.autocast(device_type=hidden_TD.device.type, enabled=False):
        wide_TD = hidden_TD if hidden_TD.dtype == torch.float64 else hidden_TD.float()
        return nn.functional.linear(wide_TD, weight_ED.to(wide_TD.dtype))


def without_projection(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of the student as a plain checkpoint has it."""
    return {name: value for name, value in state.items() if not name.endswith(f"{_NAME}.weight")}


def save_projection(layer: nn.Linear, folder: Path, *, writes: bool = True) -> None:
    """Write it beside a checkpoint's weights; where it is shared out among processes, all of them call this.

    Args:
      layer: the projection.
      folder: of the checkpoint.
      writes: whether this process writes.
    """
    weight = layer.weight.detach()
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    if writes:
        save_file({"weight": weight.cpu().contiguous()}, folder / PROJECTION_FILE)


def load_projection(layer: nn.Linear, folder: Path) -> None:
    """Restore it from a checkpoint.

    Raises:
      CorruptError: the file is not there, cannot be read, or holds another shape.
    """
    path = folder / PROJECTION_FILE
    try:
        weight = load_file(path)["weight"]
    except Exception as error:  # safetensors raises errors of its own for what is no such file
        raise CorruptError(
            f"{path}: expected the projection of hidden states, found none that can be read ({error}); resume from "
            "another checkpoint"
        ) from error
    if weight.shape != layer.weight.shape:
        raise CorruptError(f"{path}: expected a matrix {list(layer.weight.shape)}, found {list(weight.shape)}")
    with torch.no_grad():
        own: Any = layer.weight
        weight = weight.to(own.device)
        own.copy_(distribute_tensor(weight, own.device_mesh, own.placements) if isinstance(own, DTensor) else weight)
