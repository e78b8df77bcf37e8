"""Give a new student parts of its teacher: embeddings, attention cut per head, and, if wanted, feed-forward parts.

The student is of the teacher's architecture and nowhere larger. Entries are chosen (only key-value heads are averaged,
where several become one), so a student of the teacher's sizes gets the teacher's weights; ``truncation`` says which. Of
a hidden width, the first columns are kept, everywhere alike, so that embeddings, attention and norms still speak of
the same ones.

* Embeddings: the rows of all ids that both have, with the head (weight and bias) and the norm before it. A tied student
  of an untied teacher has the input embeddings for both.
* Attention: query, key, value and output projections with their biases, norms of queries and keys, and the norms of the
  layer that stand at the attention: before it, and after it where there is one.
* Feed-forward parts, if wanted: the first of their inner dimensions, with the norms that stand at them. Otherwise these
  parts and their norms stay as the architecture initialises them.

Nothing is rescaled: a head cut from D to d dimensions has smaller products, of which the student's scale 1/sqrt(d)
makes up a part (Gemma's scale is a setting of its own and stays). The norm over fewer dimensions and Gemma's factor
sqrt(hidden width) follow the student's sizes. Training sets right what this leaves.

Legend: H, h query heads of teacher and student, G, g key-value heads, D, d dimensions of a head, W, w hidden width.

Source: Dasgupta, Cohn, Baldwin, "Don't Ignore the Tail" (arXiv 2602.20816), section 3.2, which says what is copied and
that attention is truncated per head; which heads, pairs and layers are kept is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tailcache.storage.errors import StudentError
from tailcache.trainers.architecture import head_dim_of
from tailcache.trainers.truncation import Heads, kept_dimensions, kept_heads

__all__ = ["FAMILIES", "Family", "check_family", "check_not_larger", "initialise"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the modules of an architecture are called.

    Attributes:
      output: the attention's output projection.
      fused: whether one matrix makes queries, keys and values (`qkv_proj`), and one the feed-forward's two inputs.
      head_norms: norms of queries and of keys, where the model has them.
      attention_norms: of a layer, those at the attention.
      mlp_norms: those at the feed-forward part; none where it shares the attention's.
      mlp_in: linear layers into the feed-forward part.
      mlp_out: the one out of it.
      last_norm: the norm before the head.
    """

    output: str = "o_proj"
    fused: bool = False
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_out: str = "down_proj"
    last_norm: str = "norm"


_GEMMA2 = Family(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": Family(
        output="dense",
        head_norms=("q_layernorm", "k_layernorm"),
        mlp_norms=(),
        mlp_in=("fc1",),
        mlp_out="fc2",
        last_norm="final_layernorm",
    ),
    "phi3": Family(fused=True, mlp_in=("gate_up_proj",)),
}


def check_family(model_type: str) -> Family:
    """The family of an architecture.

    Raises:
      StudentError: students are not initialised from it.
    """
    if model_type not in FAMILIES:
        raise StudentError(
            f"student.init_from: expected a model of type {', '.join(FAMILIES)}, found {model_type!r}; start from a "
            "checkpoint (student.checkpoint) or at random (student.config) instead"
        )
    return FAMILIES[model_type]


def check_not_larger(teacher: Any, student: Any, *, mlps: bool) -> None:
    """Refuse a student with sizes that cannot be cut from the teacher's.

    Args:
      teacher: its configuration.
      student: likewise.
      mlps: whether feed-forward parts are copied.

    Raises:
      StudentError: names the size.
    """
    pairs = {
        "hidden_size": (teacher.hidden_size, student.hidden_size),
        "num_heads": (teacher.num_attention_heads, student.num_attention_heads),
        "head_dim": (head_dim_of(teacher), head_dim_of(student)),
        "num_layers": (teacher.num_hidden_layers, student.num_hidden_layers),
    }
    if mlps:
        pairs["intermediate_size"] = (teacher.intermediate_size, student.intermediate_size)
    for name, (most, found) in pairs.items():
        if found > most:
            raise StudentError(
                f"student.{name}: expected at most {most}, the teacher's, of which a part is copied; found {found}"
            )


@torch.no_grad()
def initialise(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: Sequence[int],
    *,
    embeddings: bool = True,
    attention: bool = True,
    mlps: bool = False,
) -> list[str]:
    """Copy parts of the teacher into the student, in place.

    Args:
      student: initialised at random; of the teacher's architecture, nowhere larger (see ``check_not_larger``).
      teacher: with its weights, of any float type.
      layers: the teacher's layer for each of the student's.
      embeddings: copy embeddings, head and last norm.
      attention: copy the attention of the layers.
      mlps: copy their feed-forward parts.

    Returns:
      What was done, one sentence each.

    Raises:
      StudentError: heads or sizes that do not fit each other.
    """
    family = check_family(teacher.config.model_type)
    whole, own = _body(teacher), _body(student)
    cut = _cut(teacher, student)
    notes = []
    if embeddings:
        notes += _copy_embeddings(student, teacher)
        _copy_norm(getattr(own, family.last_norm), getattr(whole, family.last_norm), cut.width)
    for layer, index in zip(own.layers, layers, strict=True):
        source = whole.layers[index]
        if attention:
            _copy_attention(layer.self_attn, source.self_attn, family, cut)
            for name in family.attention_norms:
                _copy_norm(getattr(layer, name), getattr(source, name), cut.width)
        if mlps:
            _copy_mlp(layer.mlp, source.mlp, family, cut.width)
            for name in family.mlp_norms:
                _copy_norm(getattr(layer, name), getattr(source, name), cut.width)
    if attention or mlps:
        parts = "attention and feed-forward parts" if attention and mlps else "attention" if attention else "MLPs"
        notes.append(f"{parts} of the teacher's layers {', '.join(map(str, layers))}")
    return notes + (cut.described() if attention else [])


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How attention is cut.

    Attributes:
      width: w.
      heads: which heads.
      own_head_dim: d.
      dimensions: the d of D that queries and keys keep; values keep the first.
      sizes: (W, H, G, D) of the teacher.
      own_sizes: (w, h, g, d).
      turned: the student's rotary frequencies over those that the kept pairs had.
    """

    width: int
    heads: Heads
    own_head_dim: int
    dimensions: tuple[int, ...]
    sizes: tuple[int, int, int, int]
    own_sizes: tuple[int, int, int, int]
    turned: Tensor

    def described(self) -> list[str]:
        """The sizes that were cut, if any."""
        names = ("hidden columns", "query heads", "key-value heads", "dimensions of a head")
        cut = [
            f"{own} of {whole} {name}"
            for name, whole, own in zip(names, self.sizes, self.own_sizes, strict=True)
            if own != whole
        ]
        notes = [f"attention cut to {', '.join(cut)}"] if cut else []
        most = float(torch.maximum(self.turned, 1 / self.turned).max())
        if most > 1.0001:
            notes.append(f"rotary pairs turn up to {most:.2f} times as fast or as slow as they did")
        return notes


def _cut(teacher: PreTrainedModel, student: PreTrainedModel) -> _Cut:
    sizes, own_sizes = (_attention_sizes(model.config) for model in (teacher, student))
    frequencies, own_frequencies = _frequencies(teacher), _frequencies(student)
    rotary, own_rotary = (_rotary(model, sizes[3]) for model, sizes in ((teacher, sizes), (student, own_sizes)))
    dimensions = kept_dimensions(sizes[3], own_sizes[3], rotary, own_rotary)
    return _Cut(
        width=own_sizes[0],
        heads=kept_heads((sizes[1], sizes[2]), (own_sizes[1], own_sizes[2])),
        own_head_dim=own_sizes[3],
        dimensions=dimensions,
        sizes=sizes,
        own_sizes=own_sizes,
        turned=own_frequencies / frequencies[list(dimensions[: own_rotary // 2])],
    )


def _attention_sizes(config: Any) -> tuple[int, int, int, int]:
    key_values = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.hidden_size, config.num_attention_heads, key_values, head_dim_of(config)


def _frequencies(model: PreTrainedModel) -> Tensor:
    """[R/2] the frequencies of the rotary pairs; where kinds of layers have their own, one of them."""
    found = [buffer for name, buffer in _body(model).rotary_emb.named_buffers() if name.endswith("inv_freq")]
    first: Tensor = found[0].float().cpu()
    return first


def _rotary(model: PreTrainedModel, head_dim: int) -> int:
    """R; an odd number of dimensions has half a pair too many."""
    attention = _body(model).layers[0].self_attn
    return getattr(attention, "rotary_ndims", None) or min(2 * len(_frequencies(model)), head_dim)


def _body(model: PreTrainedModel) -> Any:
    return model.base_model


def _copy_embeddings(student: Any, teacher: Any) -> list[str]:
    source: Tensor = teacher.get_input_embeddings().weight
    target: Tensor = student.get_input_embeddings().weight
    width = target.shape[1]
    both = min(len(source), len(target))
    target[:both] = source[:both, :width].to(target.dtype)
    note = f"embeddings of {both:,} ids" + (f", {width} of {source.shape[1]} columns" * (width != source.shape[1]))
    if len(target) > both:
        note += f"; those of the other {len(target) - both:,} are random"
    notes = [note]
    head, own_head = (model.get_output_embeddings() for model in (teacher, student))
    tied, own_tied = head.weight is source, own_head.weight is target
    if own_tied and not tied:
        notes.append("the teacher's own head is not copied: the student's shares its embeddings")
    if not own_tied:
        own_head.weight[:both] = head.weight[:both, :width].to(target.dtype)
    if own_head.bias is not None and head.bias is not None:
        own_head.bias[:both] = head.bias[:both].to(target.dtype)
    return notes


def _copy_norm(target: nn.Module, source: nn.Module, width: int) -> None:
    for name, parameter in target.named_parameters():
        parameter.copy_(source.get_parameter(name)[:width])


def _copy_attention(target: Any, source: Any, family: Family, cut: _Cut) -> None:
    queries = torch.tensor(cut.heads.queries)
    dimensions = torch.tensor(cut.dimensions)
    first = torch.arange(cut.own_head_dim)
    kept = {"q": dimensions, "k": dimensions, "v": first}
    if family.fused:
        weight = torch.cat([_heads_of(part, kept[name], name, cut) for name, part in _split(source.qkv_proj, cut)])
        target.qkv_proj.weight.copy_(weight)
    else:
        for name in "qkv":
            linear, own = getattr(source, f"{name}_proj"), getattr(target, f"{name}_proj")
            own.weight.copy_(_heads_of(linear.weight, kept[name], name, cut))
            if own.bias is not None and linear.bias is not None:
                own.bias.copy_(_heads_of(linear.bias[:, None], kept[name], name, cut)[:, 0])
    linear, own = getattr(source, family.output), getattr(target, family.output)
    by_head_WHD = linear.weight.unflatten(1, (-1, cut.sizes[3]))
    own.weight.copy_(by_head_WHD[: cut.width][:, queries][:, :, first].flatten(1))
    if own.bias is not None and linear.bias is not None:
        own.bias.copy_(linear.bias[: cut.width])
    for name in family.head_norms:
        norm, own_norm = getattr(source, name, None), getattr(target, name, None)
        if norm is not None and own_norm is not None:
            for parameter, value in own_norm.named_parameters():
                value.copy_(norm.get_parameter(parameter)[dimensions])


def _split(linear: Any, cut: _Cut) -> list[tuple[str, Tensor]]:
    """The three parts of a matrix that makes queries, keys and values."""
    _, query_heads, key_value_heads, head_dim = cut.sizes
    parts = linear.weight.split([heads * head_dim for heads in (query_heads, key_value_heads, key_value_heads)])
    return list(zip("qkv", parts, strict=True))


def _heads_of(weight: Any, dimensions: Tensor, name: str, cut: _Cut) -> Tensor:
    """[h d, w] the kept heads, dimensions and columns of a projection [H D, W]; a bias is one of one column."""
    by_head_HDW: Tensor = weight.unflatten(0, (-1, cut.sizes[3]))[:, dimensions][:, :, : cut.width].float()
    if name == "q":
        return by_head_HDW[list(cut.heads.queries)].flatten(0, 1)
    merged = [by_head_HDW[list(heads)].mean(0) for heads in cut.heads.key_values]
    return torch.stack(merged).flatten(0, 1)


def _copy_mlp(target: Any, source: Any, family: Family, width: int) -> None:
    for name in family.mlp_in:
        linear, own = getattr(source, name), getattr(target, name)
        num = 2 if family.fused else 1
        inner = own.weight.shape[0] // num
        own.weight.copy_(linear.weight.unflatten(0, (num, -1))[:, :inner, :width].flatten(0, 1))
        if own.bias is not None and linear.bias is not None:
            own.bias.copy_(linear.bias[:inner])
    linear, own = getattr(source, family.mlp_out), getattr(target, family.mlp_out)
    own.weight.copy_(linear.weight[:width, : own.weight.shape[1]])
    if own.bias is not None and linear.bias is not None:
        own.bias.copy_(linear.bias[:width])
