"""Building students: sizes, configurations, checkpoints; the same start for a seed; refusals that say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizer_fixtures import build_tokenizer
from training_fixtures import make_corpus, tiny_model

from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import ConfigError, MismatchError, StudentError
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.student import build_student, longest_row

TWO = (LossConfig(name="tad", beta=3.0), LossConfig(name="todi", weight=0.5))
SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("student") / "cache", build_tokenizer("wordlevel"))


def _checkpoint(folder: Path, vocab_size: int, tokenizer: Any = None, **settings: Any) -> str:
    tiny_model(vocab_size, **settings).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mamba"])
def test_a_few_sizes_make_a_student_of_any_architecture(corpus: Corpus, model_type: str | None) -> None:
    student = build_student(StudentConfig(model_type=model_type, **SIZES), corpus, seed=0)
    config = student.model.config
    assert config.model_type == (model_type or "llama")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, corpus.vocab_size)
    assert student.model.dtype == torch.float32
    assert config.pad_token_id is None
    assert config.eos_token_id == build_tokenizer("wordlevel").eos_token_id
    assert student.notes == []


def test_heads_of_a_student_made_from_sizes(corpus: Corpus) -> None:
    sizes = StudentConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, num_layers=1)
    attention: Any = build_student(sizes, corpus, seed=0).model.model.layers[0].self_attn
    assert [attention.q_proj.out_features, attention.k_proj.out_features] == [64, 32]
    with pytest.raises(StudentError, match=r"student.num_kv_heads: expected a number that divides the 4 .*found 3"):
        build_student(StudentConfig(num_kv_heads=3), corpus, seed=0)
    with pytest.raises(StudentError, match=r"student.num_kv_heads: expected an architecture with .*found 'gpt2'"):
        build_student(StudentConfig(num_kv_heads=2, model_type="gpt2"), corpus, seed=0)


def test_a_student_without_any_setting_is_a_small_llama(corpus: Corpus) -> None:
    config = build_student(StudentConfig(), corpus, seed=0).model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 256, 4)
    assert config.tie_word_embeddings is True
    assert config.max_position_embeddings == longest_row(corpus) == 24


def test_the_longest_row_is_found_across_blocks(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.diff(corpus.rows(0, corpus.num_rows).offsets)
    monkeypatch.setattr("tailcache.storage.corpus._BLOCK", 5)
    assert longest_row(corpus) == lengths.max()


def test_one_seed_one_start(corpus: Corpus) -> None:
    """Whatever the global generator is at, and it is left alone."""
    torch.manual_seed(123)
    first = build_student(StudentConfig(**SIZES), corpus, seed=7).model.state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(123)
    assert torch.equal(drawn, torch.rand(1))
    again = build_student(StudentConfig(**SIZES), corpus, seed=7).model.state_dict()
    other = build_student(StudentConfig(**SIZES), corpus, seed=8).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_configuration_as_text_file_or_folder(corpus: Corpus, tmp_path: Path) -> None:
    given = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
    text = json.dumps(given)
    (tmp_path / "config.json").write_text(json.dumps({**given, "model_type": "qwen2", "dtype": "bfloat16"}))
    for config, kind in (
        (StudentConfig(config=text), "llama"),
        (StudentConfig(config=text, model_type="mistral"), "mistral"),
        (StudentConfig(config=str(tmp_path)), "qwen2"),
        (StudentConfig(config=str(tmp_path / "config.json")), "qwen2"),
    ):
        model = build_student(config, corpus, seed=0).model
        assert (model.config.model_type, model.config.hidden_size) == (kind, 48)
        assert model.config.vocab_size == corpus.vocab_size
        assert model.dtype == torch.float32


def test_a_wide_head_is_padding_and_a_narrow_one_is_refused(corpus: Corpus) -> None:
    wide = build_student(StudentConfig(config='{"vocab_size": 64, "hidden_size": 32}'), corpus, seed=0)
    assert wide.notes == [
        "the student's head is 64 wide and the vocabulary has 21 ids: the other 43 rows are padding and take no "
        "part in the loss"
    ]
    with pytest.raises(StudentError, match=r"embeddings for at least 21 ids, the corpus' vocabulary; found 20"):
        build_student(StudentConfig(config='{"vocab_size": 20, "hidden_size": 32}'), corpus, seed=0)


def test_a_checkpoint_with_the_corpus_tokenizer(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("wordlevel")
    path = _checkpoint(tmp_path / "fits", corpus.vocab_size, tokenizer, seed=3)
    student = build_student(StudentConfig(checkpoint=path), corpus, seed=0)
    assert student.notes == []
    saved = tiny_model(corpus.vocab_size, seed=3).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in student.model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "components"),
    [
        (build_tokenizer("wordlevel", eos="<sep>"), "special_ids"),
        (build_tokenizer("wordlevel", lowercase=True), "merges"),
        (build_tokenizer("bpe"), "vocabulary, merges"),
    ],
    ids=["special ids", "normalizer", "another model"],
)
def test_a_checkpoint_with_another_tokenizer_is_refused(
    corpus: Corpus, tmp_path: Path, other: Any, components: str
) -> None:
    path = _checkpoint(tmp_path / "other", 300, other)
    with pytest.raises(
        MismatchError, match=rf"expected the corpus' tokenizer, found that .* differs in its {components};"
    ):
        build_student(StudentConfig(checkpoint=path), corpus, seed=0)


def test_a_checkpoint_without_tokenizer_is_checked_for_its_vocabulary_and_says_so(
    corpus: Corpus, tmp_path: Path
) -> None:
    path = _checkpoint(tmp_path / "bare", corpus.vocab_size)
    (note,) = build_student(StudentConfig(checkpoint=path), corpus, seed=0).notes
    assert "has no tokenizer files: only its vocabulary size is checked" in note
    narrow = _checkpoint(tmp_path / "narrow", corpus.vocab_size - 1)
    with pytest.raises(StudentError, match="found 20"):
        build_student(StudentConfig(checkpoint=narrow), corpus, seed=0)


def test_a_16_bit_checkpoint_is_trained_in_float32(corpus: Corpus, tmp_path: Path) -> None:
    tiny_model(corpus.vocab_size).bfloat16().save_pretrained(tmp_path / "half")
    student = build_student(StudentConfig(checkpoint=str(tmp_path / "half")), corpus, seed=0)
    assert student.model.dtype == torch.float32


def test_too_few_positions_are_refused(corpus: Corpus) -> None:
    config = StudentConfig(config='{"max_position_embeddings": 16, "hidden_size": 32}')
    with pytest.raises(StudentError, match=r"at least 24 positions.*found max_position_embeddings = 16"):
        build_student(config, corpus, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "nowhere/at-all/nothing"}, r"student.checkpoint: expected a .*'nowhere/at-all/nothing'"),
        ({"config": "nowhere.json"}, r"nowhere.json: expected a JSON file, a folder"),
        ({"config": "{broken"}, r"student.config: expected JSON, found an error at"),
        ({"config": '{"model_type": "gpt2"}', "model_type": "llama"}, r"says 'gpt2', the settings 'llama'"),
        ({"model_type": "no_such_model"}, r"model type 'no_such_model'"),
        ({"model_type": "t5"}, r"'t5' refuses it"),
        ({"hidden_size": 33, "num_heads": 4}, r"student: expected a configuration"),
        ({**SIZES, "attn_implementation": "no_such_kernel"}, r"'llama' refuses it"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(
    corpus: Corpus, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudentError, match=message):
        build_student(StudentConfig(**settings), corpus, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "x", "config": "{}"}, "student.config: a checkpoint has its own architecture"),
        ({"checkpoint": "x", "hidden_size": 4}, "student.hidden_size: a checkpoint"),
        ({"config": "{}", "num_layers": 4}, "student.num_layers: the configuration in student.config"),
        ({"num_heads": 0}, "student.num_heads: expected a positive number, found 0"),
    ],
)
def test_contradictory_student_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudentConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "kd", "top_k": 5}, "top_k: belongs to tad, and the loss is 'kd'; drop it"),
        ({"loss": "clm", "tail": "bucket"}, "tail: belongs to kd, tad, .*, and the loss is 'clm'; drop it"),
        ({"mixture": 0.3}, "mixture: belongs to jsd, and the loss is 'tad'; drop it"),
        ({"losses": TWO, "loss": "kd"}, "loss: losses lists the divergences with their own weights"),
        ({"losses": TWO, "beta": 3.0}, "beta: losses lists the divergences"),
        ({"losses": TWO, "divergence_weight": 0.5}, "divergence_weight: losses lists the divergences"),
        ({"losses": (LossConfig(name="kd", weight=0.0),), "clm_weight": 0.0}, "with every weight 0 there is no loss"),
        ({"batch_rows": 0}, "batch_rows: expected at least 1, found 0"),
        ({"max_steps": 0}, "max_steps: expected at least 1, found 0"),
        ({"beta": -1.0}, "beta: expected a number >= 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number >= 0, found nan"),
        ({"epochs": 0.0}, "epochs: expected a number > 0"),
        ({"loss": "clm", "clm_weight": 0.0}, "with every weight 0 there is no loss"),
        ({"clm_weight": 0.0, "divergence_weight": 0.0, "loss": "kd"}, "with every weight 0 there is no loss"),
    ],
)
def test_impossible_training_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(cache=Path("cache"), out=Path("out"), **settings)


def test_divergences_come_from_flags_or_from_a_list() -> None:
    base: dict[str, Any] = {"cache": Path("cache"), "out": Path("out")}
    assert TrainConfig(**base).divergences == (LossConfig(name="tad"),)
    assert TrainConfig(**base, loss="clm").divergences == ()
    jsd = TrainConfig(**base, loss="jsd", mixture=0.3, divergence_weight=0.5, tail="drop")
    assert jsd.divergences == (LossConfig(name="jsd", mixture=0.3, weight=0.5, tail="drop"),)
    assert TrainConfig(**base, losses=TWO).divergences == TWO
