"""Named students: those that the paper on tail-aware distillation lists, as far as its table says how they are made.

Each is the architecture of its teacher's family in ``transformers`` with other sizes. What the table does not say
(key-value heads, biases, whether the head is tied, positions, rotary base) is the teacher's, as published with it; only
Qwen1.5's smaller student is tied where its teacher is not, since only then has it the parameters that are printed.

Source: Dasgupta, Cohn, Baldwin, "Don't Ignore the Tail" (arXiv 2602.20816), table 8; the configurations that came with
Qwen/Qwen1.5-1.8B, microsoft/phi-2, Qwen/Qwen2.5-3B and google/gemma-2-9b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["PRESETS", "Preset", "PresetName"]

PresetName = Literal["qwen1.5-1.2b", "qwen1.5-0.5b", "phi2-1.1b", "qwen2.5-1.2b", "gemma2-2b"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One named student.

    Attributes:
      teacher: hub id of the teacher it is made for.
      printed: its parameters as the table prints them.
      teacher_config: what decides the teacher's architecture, by the names that ``transformers`` has for it.
      sizes: what the student has otherwise.
    """

    teacher: str
    printed: str
    teacher_config: Mapping[str, Any]
    sizes: Mapping[str, Any]


def _sizes(hidden: int, layers: int, heads: int, intermediate: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        **more,
    }


_QWEN1_5_1_8B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    **_sizes(2048, 24, 16, 5504, num_key_value_heads=16),
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_PHI_2 = {
    "model_type": "phi",
    "vocab_size": 51200,
    **_sizes(2560, 32, 32, 10240, num_key_value_heads=32),
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "layer_norm_eps": 1e-5,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
_QWEN2_5_3B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    **_sizes(2048, 36, 16, 11008, num_key_value_heads=2),
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_GEMMA_2_9B = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    **_sizes(3584, 42, 16, 14336, num_key_value_heads=8, head_dim=256),
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}

PRESETS: dict[str, Preset] = {
    "qwen1.5-1.2b": Preset(
        teacher="Qwen/Qwen1.5-1.8B",
        printed="1.2B",
        teacher_config=_QWEN1_5_1_8B,
        sizes=_sizes(1536, 24, 16, 4224, num_key_value_heads=16),
    ),
    "qwen1.5-0.5b": Preset(
        teacher="Qwen/Qwen1.5-1.8B",
        printed="0.5B",
        teacher_config=_QWEN1_5_1_8B,
        sizes=_sizes(1024, 24, 16, 2816, num_key_value_heads=16, tie_word_embeddings=True),
    ),
    "phi2-1.1b": Preset(
        teacher="microsoft/phi-2",
        printed="1.1B",
        teacher_config=_PHI_2,
        sizes=_sizes(2560, 16, 32, 5120, num_key_value_heads=32),
    ),
    "qwen2.5-1.2b": Preset(
        teacher="Qwen/Qwen2.5-3B",
        printed="1.2B",
        teacher_config=_QWEN2_5_3B,
        sizes=_sizes(2048, 18, 16, 7680, num_key_value_heads=2),
    ),
    "gemma2-2b": Preset(
        teacher="google/gemma-2-9b",
        printed="2B",
        teacher_config=_GEMMA_2_9B,
        sizes=_sizes(3584, 14, 16, 4096, num_key_value_heads=8, head_dim=224),
    ),
}
