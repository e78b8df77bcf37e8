"""Students made of a teacher: the same function at the same sizes, and cut as it says at smaller ones."""

from __future__ import annotations

import cmath
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_fixtures import write_llama_gguf
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_fixtures import build_tokenizer
from training_fixtures import LLAMA, make_cache, make_corpus, tiny_model

from tailcache.storage.corpus import Corpus
from tailcache.storage.errors import ConfigError, MismatchError, StudentError
from tailcache.storage.reader import Teacher
from tailcache.trainers.config import StudentConfig, TrainConfig
from tailcache.trainers.initialise import FAMILIES
from tailcache.trainers.run import train
from tailcache.trainers.student import build_student
from tailcache.trainers.truncation import kept_dimensions, kept_heads, kept_layers, kept_pairs

V = 21
SIZES: dict[str, Any] = {**LLAMA, "num_hidden_layers": 4}  # 4 query heads, 2 key-value heads
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
    "phi, normed": {"model_type": "phi", "qk_layernorm": True, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
    "phi3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 4},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2},
}


def _teacher(name: str, **sizes: Any) -> Any:
    """A random model, its norms and biases random too."""
    settings = {"model_type": name, **TEACHERS[name]}
    model = tiny_model(V, seed=3, **{**SIZES, **settings, **sizes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("initialise")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return make_corpus(folder / "cache", build_tokenizer("wordlevel"))


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    """Every teacher, and where it is saved with the corpus' tokenizer."""
    made = {}
    for name in TEACHERS:
        model = _teacher(name)
        model.save_pretrained(folder / name)
        if name != "qwen2":  # for which transformers would make another of it
            build_tokenizer("wordlevel").save_pretrained(folder / name)
        made[name] = model
    return made


def _student(folder: Path, name: str, corpus: Corpus, *, seed: int = 0, **settings: Any) -> Any:
    config = StudentConfig(init_from=str(folder / name), attn_implementation="eager", **settings)
    model: Any = build_student(config, corpus, seed=seed).model
    return model.eval()


def _ids(rows: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(2))


def _attention(model: Any, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """The output of one layer's attention on given states; the mask is causal, without a window."""
    body, length = model.base_model, hidden.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
    kind = {"layer_type": model.config.layer_types[layer]} if model.config.model_type == "gemma3_text" else {}
    positions = body.rotary_emb(hidden, torch.arange(length)[None], **kind)
    output, _ = body.layers[layer].self_attn(hidden, position_embeddings=positions, attention_mask=mask)
    found: torch.Tensor = output
    return found


# ---- the same sizes ----


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_a_student_of_all_parts_is_its_teacher(folder: Path, saved: dict[str, Any], corpus: Corpus, name: str) -> None:
    student = _student(folder, name, corpus, copy_mlps=True)
    teacher = saved[name]
    expected = dict(teacher.named_parameters())
    found = dict(student.named_parameters())
    assert found.keys() == expected.keys()
    assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []
    teacher.set_attn_implementation("eager")
    assert torch.equal(student(_ids()).logits, teacher(_ids()).logits)


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_attention_of_chosen_layers_is_the_same_function_and_the_rest_is_random(
    folder: Path, saved: dict[str, Any], corpus: Corpus, name: str
) -> None:
    teacher = saved[name]
    teacher.set_attn_implementation("eager")
    student = _student(folder, name, corpus, layers=(1, 2), seed=4)
    assert student.config.num_hidden_layers == 2
    hidden = torch.randn((2, 9, 32), generator=torch.Generator().manual_seed(0))
    for own, index in enumerate((1, 2)):
        assert torch.equal(_attention(student, own, hidden), _attention(teacher, index, hidden))
        if getattr(teacher.config, "layer_types", None):
            assert student.config.layer_types[own] == teacher.config.layer_types[index]
        assert torch.equal(
            student.base_model.layers[own].input_layernorm.weight,
            teacher.base_model.layers[index].input_layernorm.weight,
        )
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert torch.equal(student.get_output_embeddings().weight, teacher.get_output_embeddings().weight)
    # The feed-forward parts are those of the same configuration and seed without any teacher.
    settings = student.config.to_dict()
    plain: Any = build_student(StudentConfig(config=json.dumps(settings)), corpus, seed=4).model
    for layer, other in zip(student.base_model.layers, plain.base_model.layers, strict=True):
        ours, theirs = layer.mlp.state_dict(), other.mlp.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not torch.equal(student.get_input_embeddings().weight, plain.get_input_embeddings().weight)


@torch.no_grad()
def test_parts_can_be_left_out(folder: Path, saved: dict[str, Any], corpus: Corpus) -> None:
    teacher, name = saved["llama"], "llama"
    bare = _student(folder, name, corpus, copy_embeddings=False, copy_attention=False)
    plain: Any = build_student(StudentConfig(config=json.dumps(bare.config.to_dict())), corpus, seed=0).model
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in bare.state_dict().items())
    without = _student(folder, name, corpus, copy_embeddings=False)
    assert not torch.equal(without.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert torch.equal(without.model.norm.weight, torch.ones(32))
    assert torch.equal(without.model.layers[0].self_attn.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight)


# ---- smaller sizes ----


def _nearest(own: int, all_pairs: int, own_pairs: int, theta: float) -> int:
    """The teacher's pair whose frequency is nearest to that of the student's pair; the higher frequency of two."""
    frequency = theta ** (-own / own_pairs)
    distances = [abs(math.log(theta ** (-pair / all_pairs) / frequency)) for pair in range(all_pairs)]
    best = min(distances)
    return max(pair for pair, distance in enumerate(distances) if distance <= best + 1e-9)


def _reference_attention(
    layer: Any, hidden: torch.Tensor, *, width: int, queries: list[int], keys: list[list[int]], head_dim: int,
    own_head_dim: int, rotary: int, own_rotary: int, theta: float, output: str,
) -> list[list[float]]:  # fmt: skip
    """One row of states through a teacher's attention of which only these heads and dimensions are left; by loops.

    A rotary pair is a complex number, turned by exp(i position frequency) at the student's frequencies.
    """

    def entry(name: str, head: int, dim: int, position: int) -> float:
        linear = getattr(layer, name)
        row = head * head_dim + dim
        total = math.fsum(float(linear.weight[row, c]) * float(hidden[position, c]) for c in range(width))
        return total + (0.0 if linear.bias is None else float(linear.bias[row]))

    pairs = [_nearest(j, rotary // 2, own_rotary // 2, theta) for j in range(own_rotary // 2)]
    assert len(set(pairs)) == len(pairs)
    rest = list(range(rotary, rotary + own_head_dim - own_rotary))
    length = len(hidden)

    def turned(name: str, heads: list[int], position: int) -> list[complex]:
        found = []
        for j, pair in enumerate(pairs):
            real = math.fsum(entry(name, h, pair, position) for h in heads) / len(heads)
            imaginary = math.fsum(entry(name, h, pair + rotary // 2, position) for h in heads) / len(heads)
            found.append(complex(real, imaginary) * cmath.exp(1j * position * theta ** (-2 * j / own_rotary)))
        found += [complex(math.fsum(entry(name, h, dim, position) for h in heads) / len(heads)) for dim in rest]
        return found

    projected = getattr(layer, output)
    outputs = [[0.0 if projected.bias is None else float(projected.bias[c]) for c in range(width)] for _ in hidden]
    group = len(queries) // len(keys)
    for own, head in enumerate(queries):
        sources = keys[own // group]
        turned_keys = [turned("k_proj", sources, s) for s in range(length)]
        values = [
            [math.fsum(entry("v_proj", h, dim, s) for h in sources) / len(sources) for dim in range(own_head_dim)]
            for s in range(length)
        ]
        for t in range(length):
            query = turned("q_proj", [head], t)
            scores = [
                math.fsum((a * b.conjugate()).real for a, b in zip(query, turned_keys[s], strict=True))
                / math.sqrt(own_head_dim)
                for s in range(t + 1)
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            for dim in range(own_head_dim):
                mixed = math.fsum(w * values[s][dim] for s, w in enumerate(weights)) / math.fsum(weights)
                for c in range(width):
                    outputs[t][c] += mixed * float(projected.weight[c, head * head_dim + dim])
    return outputs


CUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # teacher, its sizes, the student's settings, what the reference is told
    "head dim halved": (
        "llama", {}, {"head_dim": 4},
        {"queries": [0, 1, 2, 3], "keys": [[0], [1]], "own_head_dim": 4, "own_rotary": 4},
    ),
    "head dim by a third, narrower": (
        "qwen2", {"hidden_size": 48}, {"hidden_size": 32},
        {"queries": [0, 1, 2, 3], "keys": [[0], [1]], "own_head_dim": 8, "own_rotary": 8, "head_dim": 12},
    ),
    "fewer heads of each group": (
        "llama", {}, {"num_heads": 2, "num_kv_heads": 2, "hidden_size": 16},
        {"queries": [0, 2], "keys": [[0], [1]], "own_head_dim": 8, "own_rotary": 8},
    ),
    "one group": (
        "llama", {}, {"num_heads": 2, "num_kv_heads": 1, "hidden_size": 16},
        {"queries": [0, 1], "keys": [[0]], "own_head_dim": 8, "own_rotary": 8},
    ),
    "key-value heads merged": (
        "llama", {"num_key_value_heads": 4}, {"num_kv_heads": 2},
        {"queries": [0, 1, 2, 3], "keys": [[0, 1], [2, 3]], "own_head_dim": 8, "own_rotary": 8},
    ),
    "partly rotary": (
        "phi", {"hidden_size": 64}, {"hidden_size": 32},
        {"queries": [0, 1, 2, 3], "keys": [[0], [1]], "own_head_dim": 8, "own_rotary": 4, "head_dim": 16,
         "rotary": 8, "output": "dense"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
@torch.no_grad()
def test_attention_cut_to_smaller_sizes(corpus: Corpus, tmp_path: Path, name: str) -> None:
    kind, sizes, settings, told = CUTS[name]
    teacher = _teacher(kind, **sizes)
    teacher.save_pretrained(tmp_path / kind)
    student = _student(tmp_path, kind, corpus, **settings).double()
    teacher = teacher.double()
    width = student.config.hidden_size
    told = {"head_dim": 8, "output": "o_proj", "rotary": told.get("head_dim", 8), **told}
    theta = float(student.config.rope_parameters["rope_theta"])
    hidden = torch.randn((1, 5, width), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer in (0, 3):
        source = teacher.base_model.layers[layer].self_attn
        expected = _reference_attention(source, hidden[0], width=width, theta=theta, **told)
        # Frequencies and cosines are float32 in the model.
        assert _attention(student, layer, hidden)[0].numpy() == pytest.approx(np.array(expected), abs=2e-5)
    embeddings = teacher.get_input_embeddings().weight[:, :width]
    assert torch.equal(student.get_input_embeddings().weight, embeddings)
    assert torch.equal(student.base_model.layers[1].input_layernorm.weight,
                       teacher.base_model.layers[1].input_layernorm.weight[:width])  # fmt: skip


@torch.no_grad()
def test_the_fused_matrices_of_phi3_are_cut_like_separate_ones(corpus: Corpus, tmp_path: Path) -> None:
    """A Phi3 is a Llama whose matrices are stacked."""
    llama = _teacher("llama", attention_bias=False, mlp_bias=False)
    phi3 = _teacher("phi3", rms_norm_eps=llama.config.rms_norm_eps)
    state = llama.state_dict()
    for index in range(4):
        at = f"model.layers.{index}"
        fused = torch.cat([state.pop(f"{at}.self_attn.{name}_proj.weight") for name in "qkv"])
        state[f"{at}.self_attn.qkv_proj.weight"] = fused
        pair = torch.cat([state.pop(f"{at}.mlp.{name}_proj.weight") for name in ("gate", "up")])
        state[f"{at}.mlp.gate_up_proj.weight"] = pair
    phi3.load_state_dict(state)
    settings: dict[str, Any] = {
        "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 6, "intermediate_size": 20, "num_layers": 3,
        "copy_mlps": True,
    }  # fmt: skip
    logits = []
    for name, model in (("llama", llama), ("phi3", phi3)):
        model.save_pretrained(tmp_path / name)
        logits.append(_student(tmp_path, name, corpus, **settings)(_ids()).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[0].abs().max()


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "phi, normed"])
@torch.no_grad()
def test_norms_of_queries_and_keys_keep_the_same_pairs(
    folder: Path, saved: dict[str, Any], corpus: Corpus, name: str
) -> None:
    head_dim = saved[name].base_model.layers[0].self_attn.head_dim
    settings = {"hidden_size": 16} if name == "phi, normed" else {}
    student = _student(folder, name, corpus, head_dim=head_dim // 2, **settings)
    q_norm = "q_layernorm" if name == "phi, normed" else "q_norm"
    kept = [0, 4, 5] if name == "phi, normed" else [0, 2, 4, 6, 8, 10, 12, 14]
    if name == "phi, normed":  # 8 dimensions, 4 of them rotary: pairs (0, 2) and (1, 3); of 4 dimensions, one pair
        kept = [0, 2, 4, 5]
    own, whole = (getattr(m.base_model.layers[1].self_attn, q_norm) for m in (student, saved[name]))
    assert all(torch.equal(value, whole.get_parameter(key)[kept]) for key, value in own.named_parameters())
    queries = student.base_model.layers[1].self_attn.q_proj.weight
    source = saved[name].base_model.layers[1].self_attn.q_proj.weight
    rows = [head * head_dim + dim for head in range(4) for dim in kept]
    assert torch.equal(queries, source[rows][:, : queries.shape[1]])
    assert student(_ids()).logits.isfinite().all()


@pytest.mark.parametrize("teacher_tied", [True, False])
@pytest.mark.parametrize("student_tied", [True, False])
@torch.no_grad()
def test_tied_and_untied_heads(
    folder: Path, saved: dict[str, Any], corpus: Corpus, teacher_tied: bool, student_tied: bool
) -> None:
    name = "llama, tied" if teacher_tied else "llama"
    config = StudentConfig(init_from=str(folder / name), tie_embeddings=student_tied)
    student = build_student(config, corpus, seed=0)
    model: Any = student.model
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    teacher = saved[name]
    assert torch.equal(embeddings, teacher.get_input_embeddings().weight)
    assert (head is embeddings) == student_tied
    if not student_tied:
        assert torch.equal(head, teacher.get_output_embeddings().weight)
    lost = "the teacher's own head is not copied" in " ".join(student.notes)
    assert lost == (student_tied and not teacher_tied)


@torch.no_grad()
def test_rows_of_ids_that_the_teacher_does_not_have_are_random(
    folder: Path, saved: dict[str, Any], corpus: Corpus
) -> None:
    config = StudentConfig(init_from=str(folder / "llama"), config='{"vocab_size": 24}')
    student = build_student(config, corpus, seed=0)
    weight: Any = student.model.get_input_embeddings().weight
    assert torch.equal(weight[:V], saved["llama"].get_input_embeddings().weight)
    assert weight[V:].std() > 0
    assert "embeddings of 21 ids; those of the other 3 are random" in " ".join(student.notes)


def test_factors_of_rotary_pairs_are_cut_with_their_pairs(corpus: Corpus, tmp_path: Path) -> None:
    factors = [1.0, 1.5, 2.0, 4.0]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": factors,
        "long_factor": [2 * f for f in factors],
    }
    sizes = {"original_max_position_embeddings": 32, "rope_parameters": rope}
    _teacher("phi3", **sizes).save_pretrained(tmp_path / "phi3")
    student = _student(tmp_path, "phi3", corpus, hidden_size=16)
    assert student.config.rope_parameters["short_factor"] == [1.0, 2.0]
    assert student.config.rope_parameters["long_factor"] == [2.0, 4.0]


def test_what_was_done_is_said(folder: Path, saved: dict[str, Any], corpus: Corpus) -> None:
    config = StudentConfig(init_from=str(folder / "llama"), hidden_size=24, num_layers=3)
    (note,) = build_student(config, corpus, seed=0).notes
    assert note == (
        f"initialised from {folder / 'llama'}: embeddings of 21 ids, 24 of 32 columns; attention of the teacher's "
        "layers 0, 2, 3; attention cut to 24 of 32 hidden columns, 6 of 8 dimensions of a head; rotary pairs turn up "
        "to 2.15 times as fast or as slow as they did; all else random"
    )


# ---- what is kept ----


def test_layers_are_spread_evenly_from_the_first_to_the_last() -> None:
    assert kept_layers(24, 24) == tuple(range(24))
    assert kept_layers(9, 3) == (0, 4, 8)
    assert kept_layers(4, 3) == (0, 2, 3)
    assert kept_layers(6, 1) == (0,)
    assert kept_layers(6, 2, (1, 5)) == (1, 5)


@given(whole=st.integers(1, 60), data=st.data())
def test_spread_layers_are_as_far_apart_as_each_other(whole: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, whole))
    kept = kept_layers(whole, num)
    assert len(kept) == num
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    assert kept[0] == 0
    assert num == 1 or kept[-1] == whole - 1


@given(half=st.integers(1, 128), data=st.data())
def test_pairs_are_those_nearest_in_frequency(half: int, data: st.DataObject) -> None:
    own = data.draw(st.integers(1, half))
    pairs = kept_pairs(2 * half, 2 * own)
    assert list(pairs) == [_nearest(j, half, own, 1e4) for j in range(own)]
    assert len(set(pairs)) == own
    dimensions = kept_dimensions(2 * half + 3, 2 * own + 1, 2 * half, 2 * own)
    assert [b - a for a, b in zip(dimensions[:own], dimensions[own : 2 * own], strict=True)] == [half] * own
    assert dimensions[2 * own :] == (2 * half,)


@given(groups=st.integers(1, 8), group=st.integers(1, 8), data=st.data())
def test_a_query_head_stays_with_its_key_value_head(groups: int, group: int, data: st.DataObject) -> None:
    own_groups = data.draw(st.integers(1, groups))
    merged = groups // own_groups
    own_group = data.draw(st.integers(1, merged * group))
    heads = kept_heads((groups * group, groups), (own_groups * own_group, own_groups))
    assert len(set(heads.queries)) == own_groups * own_group
    used = [head for each in heads.key_values for head in each]
    assert len(set(used)) == len(used)
    for own, query in enumerate(heads.queries):
        assert query // group in heads.key_values[own // own_group]
    if own_group <= group:
        assert all(len(each) == 1 for each in heads.key_values)


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, r"student.hidden_size: expected at most 32, the teacher's.*found 64"),
        ({"num_heads": 8}, r"^student.num_heads: expected at most 4.*found 8"),
        ({"head_dim": 16}, r"^student.head_dim: expected at most 8.*found 16"),
        ({"head_dim": 3}, r"^student.head_dim: expected an even number of rotary dimensions.*found 3"),
        ({"num_layers": 5}, r"student.num_layers: expected at most 4"),
        ({"layers": (0, 4)}, r"student.layers: expected ascending numbers of the teacher's layers, 0 to 3, found 0 4"),
        ({"layers": (2, 1)}, r"found 2 1"),
        ({"num_kv_heads": 4}, r"student.num_kv_heads: .*found 4 and 4; choose at most 2 key-value heads"),
        ({"num_kv_heads": 3}, r"^student.num_kv_heads: expected a number that divides the 4 attention heads, found 3"),
        ({"num_heads": 3}, r"^student.num_heads: expected a multiple of the teacher's 2 query heads.*found 3"),
        ({"intermediate_size": 64, "copy_mlps": True}, r"student.intermediate_size: expected at most 48.*found 64"),
        ({"layers": (0, 1), "config": '{"num_hidden_layers": 3}'}, r"student.layers: expected 3 of them.*found 2"),
        ({"model_type": "qwen2"}, r"student.model_type: expected 'llama'.*found 'qwen2'"),
        ({"preset": "gemma2-2b"}, r"student.preset: gemma2-2b is made from google/gemma-2-9b, .*found 'llama'"),
        ({"config": '{"vocab_size": 20}'}, r"for at least 21 ids, the corpus' vocabulary; found 20"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_student_that_is_no_part_of_its_teacher_is_refused(
    folder: Path, saved: dict[str, Any], corpus: Corpus, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudentError, match=message):
        _student(folder, "llama", corpus, **settings)


def test_another_architecture_tokenizer_or_no_model_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    tiny_model(V, model_type="gpt2", n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(StudentError, match=r"student.init_from: expected a model of type llama, .*found 'gpt2'"):
        _student(tmp_path, "gpt2", corpus)
    assert "gpt2" not in FAMILIES
    build_tokenizer("bpe").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MismatchError, match=r"student.init_from: expected the corpus' tokenizer.*vocabulary, merges"):
        _student(tmp_path, "gpt2", corpus)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudentError, match=r"student.init_from: expected the configuration of a causal language model"):
        _student(tmp_path, "empty", corpus)
    with pytest.raises(StudentError, match=r"student.init_from: expected a GGUF file at .*, found none"):
        _student(tmp_path, "none.gguf", corpus)


def test_a_teacher_that_lacks_weights_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    model = _teacher("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1.self_attn.q_proj" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(StudentError, match=r"expected all weights .*found none .*layers.1.self_attn.q_proj"):
        _student(tmp_path, "part", corpus)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "a", "init_from": "b"}, "student.init_from: a checkpoint has its own architecture"),
        ({"checkpoint": "a", "head_dim": 4}, "student.head_dim: a checkpoint has its own"),
        ({"layers": (0, 1)}, "student.layers: says what to copy from student.init_from"),
        ({"copy_embeddings": False}, "student.copy_embeddings: says what to copy"),
        ({"freeze_embeddings": True}, "student.freeze_embeddings: expected embeddings from"),
        ({"freeze_embeddings": True, "init_from": "a", "copy_embeddings": False}, "student.freeze_embeddings"),
        ({"init_from": "a", "layers": (0, 1), "num_layers": 3}, "student.num_layers: expected 2, as many as"),
        ({"preset": "phi2-1.1b", "model_type": "phi"}, "student.model_type: a preset has its own"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudentConfig(**settings)


# ---- where teachers come from, and training ----


@torch.no_grad()
def test_a_teacher_in_a_gguf_file(tmp_path: Path) -> None:
    """A student from a GGUF file is the one from the folder that the file was made of; so is a checkpoint."""
    tokenizer = build_tokenizer("bpe")
    corpus = make_corpus(tmp_path / "cache", tokenizer, num_rows=4)
    model = tiny_model(corpus.vocab_size, **LLAMA, tie_word_embeddings=False)
    for name in ("model", "gguf"):
        tokenizer.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "model")
    write_llama_gguf(tmp_path / "gguf" / "model.gguf", model, tokenizer)
    settings: dict[str, Any] = {"hidden_size": 16, "num_layers": 1}
    file = str(tmp_path / "gguf" / "model.gguf")
    students = [
        build_student(StudentConfig(init_from=source, **settings), corpus, seed=0).model.state_dict()
        for source in (str(tmp_path / "model"), file)
    ]
    assert students[0].keys() == students[1].keys()
    assert all(torch.equal(value, students[1][key]) for key, value in students[0].items())
    whole = build_student(StudentConfig(checkpoint=file), corpus, seed=0).model.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return make_cache(tmp_path_factory.mktemp("frozen") / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head_mode"), [("llama, tied", "one-pass"), ("llama, tied", "recompute"), ("llama", "one-pass")]
)
def test_frozen_embeddings_stay_and_the_rest_is_trained_also_when_resumed_without_the_teacher(
    folder: Path, saved: dict[str, Any], cached: Teacher, name: str, head_mode: Any, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(folder / name, teacher)
    out = tmp_path / "out"
    config = TrainConfig(
        cache=str(cached.corpus.cache_place),
        out=out,
        student=StudentConfig(init_from=str(teacher), freeze_embeddings=True, num_layers=2),
        learning_rate=1e-2,
        schedule="constant",
        head_mode=head_mode,
        max_steps=2,
        save_every=2,
        device="cpu",
        eval_every=0,
        log_every=1,
    )
    begun = train(config)
    assert begun is not None
    shutil.rmtree(teacher)
    trainer = train(replace(config, max_steps=4, resume=True))
    assert trainer is not None
    trained: Any = trainer._student
    assert torch.equal(trained.get_input_embeddings().weight, saved[name].get_input_embeddings().weight)
    stayed = torch.equal(trained.get_output_embeddings().weight, saved[name].get_output_embeddings().weight)
    assert stayed == (name == "llama, tied")
    before, after = (each.model.layers[0].self_attn.q_proj.weight for each in (begun._student, trained))
    assert not torch.equal(before, saved[name].model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(before, after)
    record = json.loads((out / "tailcache.json").read_text())
    notes = " ".join(record["student"]["notes"])
    assert f"initialised from {teacher}: embeddings of 21 ids" in notes
    shared = " and the head that shares them" if name == "llama, tied" else ""
    assert f"the input embeddings{shared} are frozen: 672 parameters" in notes
    losses = [json.loads(line)["loss"] for line in (out / "training.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
