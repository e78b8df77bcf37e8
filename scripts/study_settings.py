"""How large the study is: one frozen set of sizes for two cores, one for a GPU, one to try the whole path in minutes.

Everything that decides a figure is here or in ``study_arms``; what a run was made with is written into its results.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tailcache.storage.errors import ConfigError

__all__ = ["SIZES", "ModelSize", "StudySize", "Which", "size_of"]

Which = Literal["cpu", "gpu", "smoke"]


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A Llama with tied embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int

    def llama(self, vocab_size: int, context_length: int) -> dict[str, Any]:
        """Its configuration, as transformers names things; the feed-forward part is 8/3 of the width."""
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": -(-8 * self.hidden_size // 96) * 32,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": context_length,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": None,
        }


@dataclass(frozen=True, kw_only=True)
class StudySize:
    """Sizes of text, models and training.

    Attributes:
      packages: whose docstrings are read beside the standard library's; all are requirements of this package.
      vocab_size: of the tokenizer that is trained on the teacher's text.
      context_length: tokens of a row, for teacher and students.
      held_out_tokens: of the text that everything is measured on.
      teacher, student: the models.
      teacher_positions: that the teacher is trained on, of its own text.
      warm_positions: that each seed's student is trained on as a plain language model, of the teacher's text, before
        the arms begin: all arms of a seed start from it.
      student_positions: that each arm is trained on, each of them once.
      batch_rows: rows per optimizer step, of teacher and students.
      learning_rate: of AdamW, for the students; the teacher and the warm start use twice as much.
      warmup: its share of the steps, before a cosine to 0.
      top_k, num_samples: of the capture that all caches are derived from.
      points: evaluations of a learning curve, the first one before training.
      curve_share: of the held-out rows that all points but the last are measured on, as one of so many.
      seeds: of the arms.
      precision: of models in training: "bf16" is autocast.
      smollm2_tokens: that SmolLM2-135M is captured over for its tail masses; 0 leaves it out.
    """

    packages: tuple[str, ...]
    vocab_size: int
    context_length: int
    held_out_tokens: int
    teacher: ModelSize
    student: ModelSize
    teacher_positions: int
    warm_positions: int
    student_positions: int
    batch_rows: int = 8
    learning_rate: float = 2e-3
    warmup: float = 0.1
    top_k: int = 64
    num_samples: int = 64
    points: int = 6
    curve_share: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    precision: Literal["fp32", "bf16"] = "fp32"
    smollm2_tokens: int = 0

    def __post_init__(self) -> None:
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds: expected at least two different ones, for intervals; found {self.seeds}")
        if self.top_k < 32 or self.top_k >= self.vocab_size:
            raise ConfigError(f"top_k: expected 32 to below {self.vocab_size}, the vocabulary; found {self.top_k}")
        if self.points < 2:
            raise ConfigError(f"points: expected at least 2 (before and after training), found {self.points}")

    @property
    def step_positions(self) -> int:
        """Tokens of an optimizer step."""
        return self.batch_rows * self.context_length

    def record(self) -> dict[str, Any]:
        """For the results."""
        return asdict(self)


_PACKAGES = (
    "numpy",
    "torch",
    "transformers",
    "pandas",
    "sympy",
    "networkx",
    "matplotlib",
    "datasets",
    "accelerate",
    "huggingface_hub",
)

SIZES: dict[Which, StudySize] = {
    "cpu": StudySize(
        packages=_PACKAGES,
        vocab_size=4096,
        context_length=256,
        held_out_tokens=40_000,
        teacher=ModelSize(hidden_size=192, num_layers=6, num_heads=6),
        student=ModelSize(hidden_size=96, num_layers=2, num_heads=3),
        teacher_positions=3_000_000,
        warm_positions=1_000_000,
        student_positions=400_000,
        smollm2_tokens=60_000,
    ),
    "gpu": StudySize(
        packages=_PACKAGES,
        vocab_size=16_384,
        context_length=512,
        held_out_tokens=200_000,
        teacher=ModelSize(hidden_size=768, num_layers=12, num_heads=12),
        student=ModelSize(hidden_size=256, num_layers=4, num_heads=8),
        teacher_positions=60_000_000,
        warm_positions=4_000_000,
        student_positions=1_500_000,
        batch_rows=16,
        learning_rate=1e-3,
        seeds=(0, 1, 2, 3, 4),
        precision="bf16",
        smollm2_tokens=200_000,
    ),
    "smoke": StudySize(
        packages=(),
        vocab_size=512,
        context_length=64,
        held_out_tokens=3_000,
        teacher=ModelSize(hidden_size=64, num_layers=2, num_heads=2),
        student=ModelSize(hidden_size=32, num_layers=1, num_heads=1),
        teacher_positions=40_960,
        warm_positions=8_192,
        student_positions=6_000,
        points=3,
        seeds=(0, 1),
    ),
}


def size_of(which: Which) -> StudySize:
    """The sizes of that name."""
    return SIZES[which]
