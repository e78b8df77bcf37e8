"""Any causal language model: its own logits in float32, loaded as asked, or an error that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_fixtures import SIZES, save_teacher, tiny_model, with_a_twist
from gguf_fixtures import write_llama_gguf
from tokenizer_fixtures import build_tokenizer
from torch import Tensor

from tailcache.pipeline import load_teacher as teacher_module
from tailcache.pipeline.load_teacher import load_teacher, load_teacher_tokenizer, locate
from tailcache.pipeline.precision import native_dtype
from tailcache.pipeline.rounding import round_weights
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.errors import ConfigError, TailcacheError, TeacherError
from tailcache.storage.fingerprint import fingerprint

ROW = torch.from_numpy(np.random.default_rng(0).integers(0, 100, 24))


@torch.no_grad()
def own_logits(model: Any, row: Tensor, vocab_size: int = 100) -> Tensor:
    logits: Tensor = model(input_ids=row[None], use_cache=False).logits[0, :, :vocab_size]
    return logits


def chunked(teacher: Teacher, row: Tensor, size: int = 7) -> Tensor:
    """The teacher's logits, a few positions at a time, without what pads the head."""
    hidden = teacher.hidden(row[None])[0]
    logits = torch.cat([teacher.logits(hidden[i : i + size]) for i in range(0, len(hidden), size)])
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    assert logits.shape[1] % 64 == 0
    assert (logits[:, teacher.vocab_size :] < -1e29).all()
    return logits[:, : teacher.vocab_size]


@pytest.mark.parametrize("kind", sorted(set(SIZES) - {"bert"}))
def test_logits_of_every_family_are_the_models_own(kind: str) -> None:
    model = tiny_model(kind)
    teacher = Teacher(model, vocab_size=100)
    note = teacher.probe(ROW)
    assert teacher.split, note
    own = own_logits(model, ROW)
    torch.testing.assert_close(chunked(teacher, ROW), own, rtol=1e-5, atol=1e-5)
    assert float(own.std()) > 0.1, "a comparison of nothing with nothing"


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    torch.testing.assert_close(chunked(Teacher(model, vocab_size=100), ROW), own_logits(model, ROW))


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2", "phi", "recurrent_gemma"])
def test_what_follows_the_head_is_needed(kind: str) -> None:
    """The comparison above would not pass with the product of the head alone."""
    model = tiny_model(kind)
    with torch.no_grad():
        bare = Teacher(model, vocab_size=100).hidden(ROW[None])[0] @ model.get_output_embeddings().weight.t()
    assert float((bare - own_logits(model, ROW)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
def test_bfloat16_weights_give_float32_logits(kind: str) -> None:
    model = tiny_model(kind, vocab_size=500, std=0.5).to(torch.bfloat16)
    teacher = Teacher(model, vocab_size=500)
    assert "float32 results" in teacher.probe(ROW)
    head = model.get_output_embeddings()
    hidden = teacher.hidden(ROW[None])[0]
    assert hidden.dtype == torch.bfloat16
    exact = hidden.double() @ head.weight.detach().double().t()
    if head.bias is not None:
        exact = exact + head.bias.detach().double()
    if kind == "gemma2":
        exact = 5.0 * torch.tanh(exact / 5.0)
    ours = (chunked(teacher, ROW).double() - exact).abs().max()
    rounded = (own_logits(model, ROW, 500).double() - exact).abs().max()
    assert float(ours) < 1e-4
    assert float(rounded) > 50 * float(ours), "the model's own logits are rounded to bfloat16"


def test_float16_weights_give_float32_logits() -> None:
    model = tiny_model("llama").to(torch.float16)
    teacher = Teacher(model, vocab_size=100)
    teacher.probe(ROW)
    exact = teacher.hidden(ROW[None])[0].double() @ model.lm_head.weight.detach().double().t()
    assert float((chunked(teacher, ROW).double() - exact).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_more_runs_whole_and_says_so(dtype: torch.dtype) -> None:
    """Also where the difference is far below what bfloat16 rounding would hide."""
    model = with_a_twist(tiny_model("llama", std=0.5).to(dtype), strength=5e-3)
    teacher = Teacher(model, vocab_size=100)
    assert "the whole model runs" in teacher.probe(ROW)
    assert not teacher.split
    head_input: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: head_input.append(inputs[0]))
    own_logits(model, ROW)
    handle.remove()
    product = head_input[0][0].double() @ model.lm_head.weight.detach().double().t()
    exact = product + 5e-3 * product.sin()
    assert float((chunked(teacher, ROW).double() - exact).abs().max()) < 1e-4, "rounded on the way"
    assert own_logits(model, ROW).dtype == dtype, "the model was left changed"
    assert teacher.batch_limit(1 << 40) * teacher.width * 4 <= 1 << 30


def test_a_split_model_takes_any_batch() -> None:
    assert Teacher(tiny_model(), vocab_size=100).batch_limit(1 << 40) == 1 << 40


def test_a_head_that_is_no_plain_linear_layer() -> None:
    """Adapted or packed heads: the weight alone is not what they compute."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny_model("llama")
    head = Doubled(32, 100, bias=False)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    teacher = Teacher(model, vocab_size=100)
    assert "the whole model runs" in teacher.probe(ROW)
    torch.testing.assert_close(chunked(teacher, ROW), own_logits(model, ROW))


def test_a_model_that_attends_in_both_directions_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"depend on earlier tokens alone.*bert attends in both directions"):
        Teacher(tiny_model("bert"), vocab_size=100).probe(ROW)
    causal = tiny_model("bert", is_decoder=True)
    teacher = Teacher(causal, vocab_size=100)
    teacher.probe(ROW)
    torch.testing.assert_close(chunked(teacher, ROW), own_logits(causal, ROW))


def test_a_row_of_one_token_can_be_probed() -> None:
    teacher = Teacher(tiny_model(), vocab_size=100)
    assert "in chunks" in teacher.probe(ROW[:1])


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_padded_heads_are_masked(kind: str) -> None:
    """152,064 rows for 151,936 tokens, in small; the further rows would otherwise hold mass."""
    model = tiny_model(kind, vocab_size=152)
    teacher = Teacher(model, vocab_size=100)
    teacher.probe(ROW)
    assert (teacher.head_width, teacher.width) == (152, 192)
    logits = chunked(teacher, ROW)
    torch.testing.assert_close(logits, own_logits(model, ROW), rtol=1e-5, atol=1e-5)
    dense = own_logits(model, ROW, 152)
    assert float((dense.logsumexp(-1) - logits.logsumexp(-1)).abs().max()) > 0.01


def test_a_head_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(TeacherError, match=r"at least 101 rows.*found 100.*own tokenizer"):
        Teacher(tiny_model(), vocab_size=101)
    Teacher(tiny_model(), vocab_size=100)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_at_once(bad: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(ROW[3])] = bad
    # Attention multiplies what it masks by 0, and 0 times NaN is NaN: earlier tokens of the document suffer too.
    with pytest.raises(TeacherError, match=r"row 0, token [0-3]: expected finite.*--dtype float32"):
        Teacher(model, vocab_size=100).probe(ROW)


# -- weights -------------------------------------------------------------------------------------------------------


def test_the_hash_changes_with_any_weight_and_with_nothing_else(tmp_path: Path) -> None:
    model = tiny_model("phi")
    before = Teacher(model, vocab_size=100).weights_hash()
    assert before == Teacher(tiny_model("phi"), vocab_size=100).weights_hash()
    save_teacher(tmp_path / "a", model)
    assert load_teacher(str(tmp_path / "a"), vocab_size=100, device="cpu").weights_hash() == before
    for name, parameter in model.named_parameters():
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] = torch.nextafter(parameter.view(-1)[-1], torch.tensor(9.0))
        assert Teacher(model, vocab_size=100).weights_hash() != before, name
        with torch.no_grad():
            parameter.copy_(old)
    assert Teacher(model, vocab_size=100).weights_hash() == before
    assert Teacher(model.to(torch.bfloat16), vocab_size=100).weights_hash() != before


@pytest.mark.parametrize(
    ("kind", "bits", "dtype"), [("llama", 3, "float32"), ("llama", 3, "bfloat16"), ("gpt2", 1, "float32")]
)
def test_rounding_leaves_few_values_per_group(tmp_path: Path, kind: str, bits: int, dtype: str) -> None:
    model = tiny_model(kind, intermediate_size=64) if kind == "llama" else tiny_model(kind)
    folder = save_teacher(tmp_path / "model", model)
    plain = load_teacher(folder, vocab_size=100, dtype=dtype, device="cpu")
    rough = load_teacher(folder, vocab_size=100, dtype=dtype, device="cpu", weight_bits=bits, weight_group=32)
    assert plain.weights_hash() != rough.weights_hash()
    matrices = 0
    for (name, before), (_, after) in zip(plain.model.named_parameters(), rough.model.named_parameters(), strict=True):
        if before.ndim < 2 or "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
            assert torch.equal(before, after), name
            continue
        matrices += 1
        inputs_last = [w.detach().t() if kind == "gpt2" else w.detach() for w in (before, after)]
        groups = [w.reshape(w.shape[0], -1, 32).float() for w in inputs_last]
        spread = groups[0].amax(-1) - groups[0].amin(-1)
        assert max(len(group.unique()) for group in groups[1].flatten(0, 1)) <= 2**bits, name
        step = spread / (2**bits - 1)
        slack = 1.01 if dtype == "float32" else 1.1
        assert ((groups[0] - groups[1]).abs().amax(-1) <= slack * step / 2 + 1e-6).all(), name
        assert not torch.equal(before, after), name
    assert matrices == (14 if kind == "llama" else 8)


def test_rounding_that_cannot_be_done() -> None:
    with pytest.raises(ConfigError, match=r"layer .*multiple of the group 32, found 48.*--weight-group"):
        round_weights(tiny_model("llama"), bits=3, group=32)
    for bits, group in ((0, 32), (17, 32), (3, 1)):
        with pytest.raises(ConfigError, match=f"found {bits} and {group}"):
            round_weights(tiny_model("llama"), bits=bits, group=group)
    with pytest.raises(ConfigError, match=r"weight_bits: expected .* linear layers.*experts"):
        round_weights(tiny_model("mixtral"), bits=3, group=16)


def test_a_constant_group_stays() -> None:
    layer = torch.nn.Linear(32, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.3)
    assert round_weights(torch.nn.Sequential(layer), bits=3, group=32) == 64
    assert torch.equal(layer.weight, torch.full((2, 32), 0.3))


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = build_tokenizer("bpe")
    path = tmp_path_factory.mktemp("teacher") / "tiny"
    save_teacher(path, tiny_model("llama", len(tokenizer)).to(torch.bfloat16), tokenizer)
    return path


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def load(source: Path | str, **options: Any) -> Teacher:
    return load_teacher(
        str(source), vocab_size=options.pop("vocab_size", 100), device=options.pop("device", "cpu"), **options
    )


def test_dtypes(folder: Path) -> None:
    assert load(folder).dtype == torch.bfloat16
    for name in ("float32", "float16"):
        assert load(folder, dtype=name).dtype == getattr(torch, name)


def test_attention_implementations(folder: Path) -> None:
    for name in ("eager", "sdpa"):
        assert load(folder, attn_implementation=name).model.config._attn_implementation == name


def test_loading_keeps_the_console_clean(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder)
    load_teacher_tokenizer(str(folder))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_settings_that_name_nothing_are_errors_that_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], type[TailcacheError], str]] = [
        (str(folder), {"dtype": "int8"}, ConfigError, r"dtype: expected auto or one of float32.*'int8'"),
        (str(folder), {"device": "gpu"}, ConfigError, r"device: expected auto, cpu, cuda.*'gpu'"),
        (str(folder), {"device": "cuda:77"}, ConfigError, r"device: .*found 'cuda:77'"),
        (str(folder), {"device": "meta"}, ConfigError, r"device: .*'meta'"),
        (str(folder), {"attn_implementation": "telepathy"}, TeacherError, r"cannot be loaded.*telepathy"),
        (str(tmp_path / "none"), {}, ConfigError, r"expected a folder or a GGUF file, found nothing at .*none"),
        (str(tmp_path / "none.gguf"), {}, ConfigError, r"expected a GGUF file at .*none.gguf, found none"),
        (str(tmp_path), {}, ConfigError, r"expected a folder with config.json, found none in"),
        ("./models/none", {}, ConfigError, r"found nothing at"),
    ]
    for source, options, error, message in cases:
        with pytest.raises(error, match=message):
            load(source, **options)


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(ConfigError, match=r"it holds model-q4.gguf: name that file"):
        locate(str(tmp_path))


def test_a_damaged_or_other_checkpoint(folder: Path, tmp_path: Path) -> None:
    cut = copy(folder, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(TeacherError, match="cannot be loaded as a causal language model"):
        load(cut)
    strange = copy(folder, tmp_path / "strange")
    (strange / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(TeacherError, match=r"cannot be loaded.*no_such_model"):
        load(strange)
    broken = copy(folder, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="cannot be loaded"):
        load(broken)
    truncated = copy(folder, tmp_path / "gguf")
    (truncated / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(TeacherError, match="cannot be loaded"):
        load(truncated / "bad.gguf")


def test_a_checkpoint_without_its_head_is_no_teacher(tmp_path: Path) -> None:
    """Transformers would make up a random head, another one each time, with no more than a warning."""
    tiny_model("llama").model.save_pretrained(tmp_path / "trunk")
    with pytest.raises(TeacherError, match=r"lm_head.weight; they would be random"):
        load(tmp_path / "trunk")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert load(tmp_path / "tied").split


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_the_tokenizer_beside_a_teacher(folder: Path, tmp_path: Path) -> None:
    assert fingerprint(load_teacher_tokenizer(str(folder))) == fingerprint(build_tokenizer("bpe"))
    broken = copy(folder, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="its tokenizer cannot be loaded"):
        load_teacher_tokenizer(str(broken))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba"])
def test_no_tokenizer_is_made_up_where_there_is_none(tmp_path: Path, kind: str) -> None:
    """Transformers makes an empty one from the model's type alone; it would be said not to match."""
    assert load_teacher_tokenizer(save_teacher(tmp_path / "bare", tiny_model(kind))) is None


def test_an_invented_tokenizer_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a hub model without tokenizer files gives one; here the look at the folder is taken away."""
    bare = save_teacher(tmp_path / "bare", tiny_model("gpt2"))
    monkeypatch.setattr(teacher_module, "_TOKENIZER_FILES", ("config.json",))
    assert load_teacher_tokenizer(bare) is None


# -- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gguf_file_gives_the_model_and_the_tokenizer_it_was_made_from(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("bpe")
    vocab_size = len(tokenizer)
    model = tiny_model("llama", vocab_size)
    path = tmp_path / "tiny.gguf"
    write_llama_gguf(path, model, tokenizer)
    teacher = load(path, dtype="float32", vocab_size=vocab_size)
    teacher.probe(ROW)
    torch.testing.assert_close(chunked(teacher, ROW), own_logits(model, ROW, vocab_size), rtol=1e-4, atol=1e-4)
    assert load(path, vocab_size=vocab_size).dtype == native_dtype(torch.device("cpu"))
    found = load_teacher_tokenizer(str(path))
    assert found is not None
    assert found("the cat sat")["input_ids"] == tokenizer("the cat sat")["input_ids"]


@pytest.mark.slow
def test_smollm2_from_its_package(smollm2_folder: Path) -> None:
    teacher = load(smollm2_folder, vocab_size=49152)
    assert (teacher.dtype, teacher.head_width, teacher.split) == (native_dtype(teacher.device), 49152, True)
    tokenizer = load_teacher_tokenizer(str(smollm2_folder))
    assert tokenizer is not None
    row = torch.tensor(tokenizer("The capital of France is Paris. The capital of Germany is")["input_ids"])
    assert "in chunks" in teacher.probe(row)
    best = int(chunked(teacher, row)[-1].argmax())
    assert tokenizer.decode([best]).strip() == "Berlin"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_gives_float32_logits(folder: Path, dtype: str) -> None:
    teacher = load(folder, dtype=dtype, device="cuda")
    row = ROW.cuda()
    teacher.probe(row)
    assert teacher.split
    hidden = teacher.hidden(row[None])[0]
    exact = hidden.double() @ teacher.model.lm_head.weight.detach().double().t()
    assert float((chunked(teacher, row).double() - exact[:, :100]).abs().max()) < 1e-3


def test_the_configuration_on_disk_is_not_changed_by_loading(folder: Path) -> None:
    before = json.loads((folder / "config.json").read_text())
    load(folder, dtype="float32", weight_bits=3, weight_group=16)
    assert json.loads((folder / "config.json").read_text()) == before
