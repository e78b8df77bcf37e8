"""Optional fields from the teacher to the reader: the right values at the right positions, and nothing without them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_fixtures import (
    config,
    document_logits,
    folder_hashes,
    pack,
    random_documents,
    save_teacher,
    tiny_model,
    with_a_twist,
    write_corpus,
)
from faults import failing_at
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tailcache.pipeline.capture import capture
from tailcache.pipeline.hidden import encode_hidden
from tailcache.pipeline.teacher import Teacher
from tailcache.scripts import cli
from tailcache.storage.codec import Targets
from tailcache.storage.errors import ConfigError, MismatchError, StorageError, TeacherError
from tailcache.storage.hidden import HiddenKind, hidden_float32
from tailcache.storage.reader import open_cache
from tailcache.storage.verify import verify

V = 100
DOCUMENTS = random_documents(40, vocab_size=V, seed=1)
TEMPERATURES = (2.0, 0.5, 10.0)


def run(cache: Path, teacher: Teacher, **changes: Any) -> Any:
    return capture(config(cache, **changes), teacher=teacher, show_progress=False)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(tiny_model("llama", V), vocab_size=V)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "cache", pack(DOCUMENTS, 3), vocab_size=V)
    return tmp_path / "cache"


# -- other temperatures --------------------------------------------------------------------------------------------


def test_the_partition_function_at_other_temperatures(cache: Path, teacher: Teacher) -> None:
    """Stored tail and stored head give log sum p^(1/tau) over the vocabulary, and both parts of it."""
    run(cache, teacher, temperatures=TEMPERATURES)
    found = open_cache(cache).teacher("t")
    assert found.temperatures == TEMPERATURES
    assert found.manifest["layout"]["temperatures"] == list(TEMPERATURES)
    assert found.manifest["provenance"]["config"]["temperatures"] == list(TEMPERATURES)
    targets = found.rows(0, found.corpus.num_rows, optional=["log_z_tail"])
    logits = document_logits(teacher.model, DOCUMENTS, V)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    beyond = logprobs.copy()
    np.put_along_axis(beyond, targets.token_ids.astype(np.int64), -np.inf, axis=1)
    assert targets.log_z_tail.shape == (len(logits), 3)
    for i, tau in enumerate(TEMPERATURES):
        tail = np.logaddexp.reduce(beyond / tau, axis=1)
        np.testing.assert_allclose(targets.log_z_tail[:, i], tail, rtol=2.0**-13, atol=1e-4)
        head = np.logaddexp.reduce(targets.logprobs.astype(np.float64) / tau, axis=1)
        whole = np.logaddexp(head, targets.log_z_tail[:, i])
        expected = np.logaddexp.reduce(logprobs / tau, axis=1)
        # The head's log-probs are off by up to an eighth of a nat, divided by tau; on average hardly at all.
        assert np.abs(whole - expected).max() < 0.15 / tau
        assert np.abs(whole - expected).mean() < 0.01 / tau
    assert verify(cache) == []


def test_without_options_nothing_is_stored_or_said(cache: Path, teacher: Teacher) -> None:
    run(cache, teacher)
    found = open_cache(cache).teacher("t")
    assert (found.temperatures, found.optional) == ((), ())
    folder = cache / "teachers" / "t"
    assert set(found.manifest["layout"]) == {
        "format", "format_version", "vocab_size", "top_k", "num_samples", "num_levels", "num_rows", "num_positions",
        "rows_per_shard", "shard_slots", "chunk", "compression_level", "num_classes", "class_size", "scalar_steps",
        "kl_budget",
    }  # fmt: skip
    assert not {"temperatures", "hidden"} & set(found.manifest["provenance"]["config"])
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "token_codes", "logprob_gaps", "tail_logit", "tail_entropy", "target_logit", "tail_sample_codes",
        "vocabulary_order", "logprob_levels", "mean_tail", "mean_tail_copy", "commits",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"'t'.*log_z_tail, found that it was not stored.*--temperatures"):
        found.rows(0, 1, optional=["log_z_tail"])


def test_the_other_fields_are_the_same_with_options(cache: Path, teacher: Teacher) -> None:
    for name, options in (("plain", {}), ("more", {"temperatures": TEMPERATURES, "hidden": "bf16"})):
        run(cache, teacher, name=name, **options)
    for path in sorted((cache / "teachers" / "plain").rglob("c/*")):
        if path.is_file():
            twin = cache / "teachers" / "more" / path.relative_to(cache / "teachers" / "plain")
            assert twin.read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("temperatures", "message"),
    [
        ((2.0, 0.0), "temperatures: expected numbers from 0.001 to 1000 and not 1, .* found 0"),
        ((-2.0,), "found -2"),
        ((1.0,), "not 1, which is always stored; found 1"),
        ((float("nan"),), "found nan"),
        ((float("inf"),), "found inf"),
        ((2.0, 4.0, 2.0), "expected each temperature once, found 2 4 2"),
    ],
)
def test_temperatures_that_make_no_sense(
    cache: Path, teacher: Teacher, temperatures: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(cache, teacher, temperatures=temperatures)
    assert not (cache / "teachers" / "t").exists()


def test_other_temperatures_under_the_same_name_are_refused(cache: Path, teacher: Teacher) -> None:
    run(cache, teacher, temperatures=(2.0, 4.0))
    for other, asked in (((4.0, 2.0), r"\[4.0, 2.0\]"), ((), "None")):
        with pytest.raises(MismatchError, match=rf"layout.temperatures: stored \[2.0, 4.0\], asked for {asked}"):
            run(cache, teacher, temperatures=other)
    run(cache, teacher, temperatures=(2.0, 4.0))


def test_no_tail_no_sum(cache: Path, teacher: Teacher) -> None:
    run(cache, teacher, top_k=V, num_samples=0, temperatures=(3.0,))
    targets = open_cache(cache).teacher("t").rows(0, 5, optional=["log_z_tail"])
    assert (targets.log_z_tail == -np.inf).all()
    assert verify(cache) == []


# -- hidden states -------------------------------------------------------------------------------------------------


def seen_by_head(model: Any) -> NDArray[np.float64]:
    """[T, D] what the model's own head is given at every position but the last of each document, each run alone."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, :-1]))
    try:
        document_logits(model, DOCUMENTS, V)
    finally:
        hook.remove()
    stacked: NDArray[np.float64] = torch.cat(seen).double().numpy()
    return stacked


def everything(cache: Path) -> tuple[Targets, NDArray[np.float64]]:
    """All targets with their hidden states, and those times the head, as log-probs."""
    found = open_cache(cache).teacher("t")
    targets = found.rows(0, found.corpus.num_rows, optional=["hidden"])
    logits = found.head().logits(hidden_float32(targets.hidden, targets.hidden_scale)).astype(np.float64)
    return targets, logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_are_what_the_head_is_multiplied_with(cache: Path, kind: HiddenKind, dtype: torch.dtype) -> None:
    model = tiny_model("llama", V).to(dtype)
    run(cache, Teacher(model, vocab_size=V), hidden=kind)
    found = open_cache(cache).teacher("t")
    assert (found.hidden_kind, found.hidden_width) == (kind, 32)
    assert found.head().weight_kind == str(dtype).removeprefix("torch.")
    targets, logprobs = everything(cache)
    hidden = hidden_float32(targets.hidden, targets.hidden_scale)
    expected = seen_by_head(model)
    step = np.abs(expected).max(axis=1, keepdims=True) / 127 / 2 if kind == "int8" else np.abs(expected) / 256
    noise = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]  # batches of other shapes
    assert (np.abs(hidden - expected) <= step * 1.001 + noise).all()
    if kind == "bf16" and dtype == torch.bfloat16:  # nothing is lost: these are the distributions that were stored
        ids = targets.token_ids.astype(np.int64)
        own = np.take_along_axis(logprobs, ids, axis=1)
        np.testing.assert_allclose(np.take_along_axis(logprobs, ids[:, :1], axis=1)[:, 0], logprobs.max(axis=1))
        assert np.abs(own - targets.logprobs).max() < 0.14  # half of the codec's widest step
        tail = np.exp(logprobs)
        np.put_along_axis(tail, ids, 0.0, axis=1)
        np.testing.assert_allclose(np.log(tail.sum(axis=1)), targets.log_tail, atol=2.0**-11 + 1e-5)
    assert verify(cache) == []


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2", "phi", "gptj", "gpt2", "mamba"])
def test_the_head_is_stored_with_all_that_is_done_to_logits(cache: Path, kind: str) -> None:
    """Scales, soft caps and biases, in their order: the models' own logits come out."""
    model = tiny_model(kind, V + 28)  # a padded head, of which real tokens are kept
    run(cache, Teacher(model, vocab_size=V), hidden="bf16")
    found = open_cache(cache).teacher("t")
    head = found.head()
    assert head.weight.shape == (V, 32)
    assert (head.scale != 1, head.soft_cap is not None, head.bias is not None) == (
        kind in ("granite", "cohere"), kind == "gemma2", kind in ("phi", "gptj"),
    )  # fmt: skip
    own = document_logits(model, DOCUMENTS, V)
    np.testing.assert_allclose(head.logits(seen_by_head(model).astype(np.float32)), own, atol=1e-4)
    _, logprobs = everything(cache)
    own -= np.logaddexp.reduce(own, axis=1, keepdims=True)
    kl = (np.exp(own) * (own - logprobs)).sum(axis=1)
    assert kl.max() < 1e-3  # rounding to bfloat16
    assert verify(cache) == []


def test_a_teacher_that_is_more_than_its_head_is_refused(cache: Path) -> None:
    teacher = Teacher(with_a_twist(tiny_model("llama", V), 0.05), vocab_size=V)
    with pytest.raises(TeacherError, match=r"hidden: expected .* linear head.*llama are more than that.*--hidden none"):
        run(cache, teacher, hidden="int8")
    assert not (cache / "teachers" / "t").exists()
    run(cache, teacher)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.4e38])
def test_hidden_states_that_are_not_finite_name_the_row(
    cache: Path, kind: HiddenKind, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feature the head does not look at: the logits are fine. 3.4e38 is finite in float32, not in bfloat16."""
    model = tiny_model("llama", V)
    with torch.no_grad():
        model.lm_head.weight[:, 5] = 0
    teacher = Teacher(model, vocab_size=V)
    original, whole = teacher.hidden, teacher.logits
    token = int(DOCUMENTS[20][0])

    def hidden(input_ids: torch.Tensor) -> torch.Tensor:
        result = original(input_ids)
        result[:, :, 5] = torch.where(input_ids == token, torch.tensor(bad), result[:, :, 5])
        return result

    def logits(hidden_TD: torch.Tensor) -> torch.Tensor:
        return whole(torch.cat([hidden_TD[:, :5], torch.zeros_like(hidden_TD[:, :1]), hidden_TD[:, 6:]], dim=1))

    monkeypatch.setattr(teacher, "hidden", hidden)
    monkeypatch.setattr(teacher, "logits", logits)
    if kind == "int8" and np.isfinite(bad):
        run(cache, teacher, hidden=kind)
        return
    with pytest.raises(TeacherError, match=r"row \d+, token \d+: expected finite hidden states") as caught:
        run(cache, teacher, hidden=kind)
    row, place = (int(word.strip(",:")) for word in str(caught.value).split()[1:4:2])
    assert open_cache(cache).corpus.rows(row, row + 1).tokens[place] == token


@settings(max_examples=60, deadline=None)
@example(1, -42.0, torch.float32, 0)  # a subnormal scale: the largest value is 135 steps of it
@given(
    st.integers(1, 40),
    st.floats(-44, 38),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 1000),
)
def test_rounding_hidden_states(width: int, magnitude: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn((5, width), generator=generator).clamp(-3, 3) * 10.0**magnitude).to(dtype)
    values[1] = 0
    values[2, 0] *= 100
    values = torch.where(torch.isfinite(values), values, 0)
    exact = values.double().numpy()
    bits, ones = encode_hidden(values, "bf16")
    assert bits.dtype == np.uint16
    found = hidden_float32(bits, ones)
    finite = np.isfinite(found).all(axis=1)
    np.testing.assert_array_equal(np.isfinite(ones), finite)
    assert (np.abs(found - exact) <= np.abs(exact) / 256 + 1e-40)[finite].all()
    if dtype == torch.bfloat16:
        np.testing.assert_array_equal(found, exact)
    steps, scale = encode_hidden(values, "int8")
    assert steps.dtype == np.int8
    assert np.isfinite(scale).all()
    found = hidden_float32(steps, scale)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(found - exact) <= largest / 254 * 1.01 + 1e-43).all()
    assert not found[1].any()


@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "bf16"), (np.inf, "bf16"), (np.nan, "int8"), (-np.inf, "int8")])
def test_rounding_what_is_not_finite_shows(bad: float, kind: HiddenKind) -> None:
    values = torch.ones((3, 4))
    values[1, 2] = bad
    assert np.isfinite(encode_hidden(values, kind)[1]).tolist() == [True, False, True]


# -- going on where it stopped -------------------------------------------------------------------------------------

ALL: dict[str, Any] = {"temperatures": TEMPERATURES, "hidden": "int8"}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_capture_with_all_fields_that_is_stopped_ends_in_the_same_bytes(
    cache: Path, tmp_path: Path, teacher: Teacher, share: float
) -> None:
    shutil.copytree(cache, tmp_path / "whole")
    with failing_at(-1) as counter:
        run(tmp_path / "whole", teacher, **ALL)
    with failing_at(round(share * counter.count)), pytest.raises(StorageError):
        run(cache, teacher, **ALL)
    run(cache, teacher, **ALL)
    assert folder_hashes(cache / "teachers" / "t") == folder_hashes(tmp_path / "whole" / "teachers" / "t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": "bf16"}, r"layout\.hidden\.kind: stored 'int8', asked for 'bf16'"),
        ({"hidden": "none"}, r"layout\.hidden: stored .*'int8'.*asked for None"),
    ],
)
def test_other_hidden_states_under_the_same_name_are_refused(
    cache: Path, teacher: Teacher, changes: dict[str, Any], message: str
) -> None:
    run(cache, teacher, **ALL)
    with pytest.raises(MismatchError, match=message):
        run(cache, teacher, **{**ALL, **changes})


def test_the_command_with_all_fields(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_teacher(tmp_path / "model", tiny_model("llama", V))
    command = ["capture", "--cache", str(cache), "--teacher", folder, "--name", "t", "--top-k", "8", "--device", "cpu"]
    assert cli.main([*command, "--temperatures", "2", "4.5", "--hidden", "bf16"]) == 0
    found = open_cache(cache).teacher("t")
    assert (found.temperatures, found.hidden_kind) == ((2.0, 4.5), "bf16")
    assert cli.main(["info", "--cache", str(cache)]) == 0
    printed = capsys.readouterr().out
    for word in ("temperature 2, temperature 4.5", "hidden states bf16 x 32", "log_z_tail", "head_weight"):
        assert word in printed
    assert cli.main(["verify", "--cache", str(cache)]) == 0
    assert cli.main(["compare", "--cache", str(cache)]) == 0
    assert cli.main([*command, "--hidden", "fp8"]) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_gpu_stores_what_the_cpu_stores(cache: Path, dtype: torch.dtype, kind: HiddenKind) -> None:
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", V).to(dtype).to(device)
        run(cache, Teacher(model, vocab_size=V), name=device, temperatures=TEMPERATURES, hidden=kind, device=device)
    assert verify(cache) == []
    a, b = (open_cache(cache).teacher(name).rows(0, 10, optional=["log_z_tail", "hidden"]) for name in ("cpu", "cuda"))
    tolerance = 0.001 if dtype == torch.float32 else 0.2
    np.testing.assert_allclose(a.log_z_tail, b.log_z_tail, atol=tolerance, rtol=2.0**-12)
    step = 2.0**-7 if kind == "bf16" else np.abs(hidden_float32(a.hidden, a.hidden_scale)).max() / 127
    found, expected = (hidden_float32(targets.hidden, targets.hidden_scale) for targets in (b, a))
    np.testing.assert_allclose(found, expected, atol=tolerance + step, rtol=step)
