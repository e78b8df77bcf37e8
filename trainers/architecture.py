"""The configuration of a student whose weights are not a checkpoint's: from sizes, a preset, JSON, or a teacher's.

From the weakest to the strongest: what fits the corpus (its vocabulary, its special tokens), the teacher's
configuration (``init_from``, or the one that a preset brings along), the preset's sizes, and what the settings say.
No weights are read or made here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from tailcache.storage.errors import StudentError
from tailcache.trainers.presets import PRESETS
from tailcache.trainers.pretrained import in_short, load_config
from tailcache.trainers.truncation import kept_layers, kept_pairs

if TYPE_CHECKING:
    from tailcache.trainers.config import StudentConfig

__all__ = ["Fit", "architecture", "head_dim_of", "layers_from"]

# What a configuration calls the sizes of the settings.
_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
}
# What describes weights on disk says nothing about new ones.
_OF_WEIGHTS = (
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "quantization_config",
)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a student must fit.

    Attributes:
      vocab_size: ids of the corpus.
      context: tokens of its longest row.
      special_ids: bos_token_id and eos_token_id of its tokenizer.
    """

    vocab_size: int
    context: int
    special_ids: dict[str, int | None]


def architecture(config: StudentConfig, fit: Fit | None) -> PretrainedConfig:
    """The configuration of a student to initialise.

    Args:
      config: the settings, without a checkpoint.
      fit: the corpus; None to have the architecture alone, which then must say its vocabulary.

    Raises:
      StudentError: it cannot be had, or contradicts itself or the teacher's.
    """
    given = _given(config)
    base = _base(config)
    own_type = given.pop("model_type", None)
    if config.model_type is not None and own_type not in (None, config.model_type):
        raise StudentError(
            f"student.model_type: the configuration says {own_type!r}, the settings {config.model_type!r}; "
            "drop one of them"
        )
    model_type = config.model_type or own_type or base.get("model_type") or "llama"
    if base.get("model_type") not in (None, model_type):
        raise StudentError(
            f"student.model_type: expected {base['model_type']!r}, the architecture of the teacher it is initialised "
            f"from, found {model_type!r}"
        )
    # The padding row of an embedding gets no gradient, and tokenizers reuse a real token for padding.
    fitted: dict[str, Any] = {"pad_token_id": None}
    if fit is not None:
        fitted |= {"vocab_size": fit.vocab_size, **fit.special_ids}
    elif "vocab_size" not in given and "vocab_size" not in base:
        raise StudentError(
            "student: expected a vocabulary size, from a cache (--cache), a preset, a teacher (student.init_from) or "
            "student.config; found none"
        )
    smaller = _smaller(base, given, config) if base else {}
    try:
        if base:
            values = {**base, **fitted, "vocab_size": base["vocab_size"], **smaller}
            values.pop("model_type", None)
        else:
            values = dict(fitted)
            if config.config is None and fit is not None:
                kind = type(AutoConfig.for_model(model_type, **fitted))
                values |= _sizes(config, kind, fit.context)
            values |= given
        found: Any = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise StudentError(
            f"student: expected a configuration for the model type {model_type!r}, found: {in_short(error)}"
        ) from error
    if config.num_kv_heads is not None and found.num_attention_heads % config.num_kv_heads:
        raise StudentError(
            f"student.num_kv_heads: expected a number that divides the {found.num_attention_heads} attention heads, "
            f"found {config.num_kv_heads}"
        )
    assert isinstance(found, PretrainedConfig)
    return found


def layers_from(config: StudentConfig, teacher: PretrainedConfig, student: PretrainedConfig) -> tuple[int, ...]:
    """The teacher's layers that the student is made of, one for each of its own."""
    return kept_layers(teacher.num_hidden_layers, student.num_hidden_layers, config.layers)


def head_dim_of(config: Any) -> int:
    """Dimensions of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _base(config: StudentConfig) -> dict[str, Any]:
    """The teacher's configuration, changed by a preset's sizes where there is one; empty without a teacher."""
    preset = None if config.preset is None else PRESETS[config.preset]
    if config.init_from is not None:
        base = load_config(config.init_from, config.revision, where="student.init_from").to_dict()
        if preset is not None and base["model_type"] != preset.teacher_config["model_type"]:
            raise StudentError(
                f"student.preset: {config.preset} is made from {preset.teacher}, of type "
                f"{preset.teacher_config['model_type']!r}; found {base['model_type']!r} at {config.init_from!r}"
            )
        return {name: value for name, value in base.items() if name not in _OF_WEIGHTS}
    if preset is None:
        return {}
    published: Any = AutoConfig.for_model(**preset.teacher_config)
    return {name: value for name, value in published.to_dict().items() if name not in _OF_WEIGHTS}


def _smaller(base: dict[str, Any], given: dict[str, Any], config: StudentConfig) -> dict[str, Any]:
    """What changes in a teacher's configuration, for the sizes given; the rest follows from these."""
    preset = {} if config.preset is None else dict(PRESETS[config.preset].sizes)
    said = {_NAMES[name]: getattr(config, name) for name in _NAMES if getattr(config, name) is not None}
    sizes = {**preset, **said, **given}
    heads = sizes.get("num_attention_heads", base["num_attention_heads"])
    if heads != base["num_attention_heads"] and "num_key_value_heads" not in sizes and "num_key_value_heads" in base:
        group = base["num_attention_heads"] // (base["num_key_value_heads"] or base["num_attention_heads"])
        if heads % group:
            raise StudentError(
                f"student.num_heads: expected a multiple of the teacher's {group} query heads for each key-value head, "
                f"or a choice of student.num_kv_heads; found {heads}"
            )
        sizes["num_key_value_heads"] = heads // group
    teacher_dim = int(base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"])
    hidden = sizes.get("hidden_size", base["hidden_size"])
    if "head_dim" not in sizes:
        changed = hidden != base["hidden_size"] or heads != base["num_attention_heads"]
        head_dim = min(teacher_dim, max(2, hidden // heads // 2 * 2)) if changed else teacher_dim
        # Some families have no such setting and divide; they read it all the same where it is there.
        if base.get("head_dim") is not None or head_dim != hidden // heads:
            sizes["head_dim"] = head_dim
    layers = config.layers
    if layers is not None:
        if given.get("num_hidden_layers") not in (None, len(layers)):
            raise StudentError(
                f"student.layers: expected {given['num_hidden_layers']} of them, the num_hidden_layers of "
                f"student.config, found {len(layers)}"
            )
        sizes["num_hidden_layers"] = len(layers)
    if base.get("layer_types") is not None and "layer_types" not in sizes:
        num_layers = sizes.get("num_hidden_layers", base["num_hidden_layers"])
        if config.init_from is None:
            sizes["layer_types"] = None  # nothing is taken from any layer: the family's own pattern
        else:
            kept = kept_layers(base["num_hidden_layers"], num_layers, layers)
            sizes["layer_types"] = [base["layer_types"][layer] for layer in kept]
    own_dim = int(sizes.get("head_dim") or hidden // heads)
    if "rope_parameters" not in sizes and own_dim != teacher_dim:
        sizes["rope_parameters"] = _fewer_factors(base.get("rope_parameters"), teacher_dim, own_dim)
    return sizes


def _fewer_factors(rope: Any, head_dim: int, own_head_dim: int) -> Any:
    """Rotary parameters for a smaller head: those that are lists, one factor for each pair, lose the pairs dropped."""
    lists = [name for name in ("short_factor", "long_factor") if isinstance((rope or {}).get(name), list)]
    if not lists:
        return rope
    share = rope.get("partial_rotary_factor") or 1.0
    pairs = kept_pairs(int(head_dim * share), int(own_head_dim * share))
    return {**rope, **{name: [rope[name][pair] for pair in pairs] for name in lists}}


def _sizes(config: StudentConfig, kind: type[PretrainedConfig], context: int) -> dict[str, Any]:
    hidden, heads = config.hidden_size or 256, config.num_heads or 4
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": config.num_layers or 4,
        "num_attention_heads": heads,
        "intermediate_size": config.intermediate_size or -(-hidden * 8 // 3 // 32) * 32,
        "num_key_value_heads": config.num_kv_heads or heads,
        "head_dim": config.head_dim or hidden // heads,
        "tie_word_embeddings": True if config.tie_embeddings is None else config.tie_embeddings,
        "max_position_embeddings": context,
    }
    probe = kind()
    if config.num_kv_heads is not None and not hasattr(probe, "num_key_value_heads"):
        raise StudentError(
            f"student.num_kv_heads: expected an architecture with key-value heads, found {kind.model_type!r}"
        )
    wanted = {"head_dim"} if config.head_dim is not None else set()
    return {name: value for name, value in sizes.items() if name in wanted or hasattr(probe, name)}


def _given(config: StudentConfig) -> dict[str, Any]:
    """The configuration in the settings: JSON text, a JSON file, or a folder with a config.json."""
    if config.config is None:
        return {}
    text = config.config
    where = "student.config"
    if not text.lstrip().startswith("{"):
        path = Path(text)
        path = path / "config.json" if path.is_dir() else path
        where = f"student.config, {path}"
        try:
            text = path.read_text()
        except OSError as error:
            raise StudentError(
                f"{where}: expected a JSON file, a folder with a config.json, or JSON text starting with '{{'; "
                f"found: {error.strerror}"
            ) from error
    try:
        given = json.loads(text)
    except ValueError as error:
        raise StudentError(f"{where}: expected JSON, found an error at {error}") from error
    if not isinstance(given, dict):
        raise StudentError(f"{where}: expected a JSON object, found {type(given).__name__}")
    return {name: value for name, value in given.items() if name not in _OF_WEIGHTS}
