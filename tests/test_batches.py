"""Rows to batches: alignment, order, caching, layouts; and that no document sees another one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BOUNDARY
from torch import nn
from training_fixtures import LLAMA, logprobs_of, make_cache, tiny_model

from tailcache.storage.blocks import gather, read_block
from tailcache.storage.errors import MismatchError, NotFoundError, StudentError
from tailcache.storage.reader import Teacher
from tailcache.trainers.batches import (
    CacheRows,
    Layout,
    RowTokens,
    block_rows_of,
    collate,
    collate_block,
    lay_out,
    teacher_terms,
)
from tailcache.trainers.forward import HeadSeat, check_documents_kept_apart, default_layout, target_logits

LAYOUTS: list[Layout] = ["rows", "flat", "documents"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return make_cache(tmp_path_factory.mktemp("batches") / "cache")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return make_cache(tmp_path_factory.mktemp("unpacked") / "cache", packed=False)


@cache
def _all_rows(teacher: Teacher) -> CacheRows:
    return CacheRows(teacher, np.arange(teacher.corpus.num_rows))


def test_every_row_comes_with_its_own_targets(teacher: Teacher) -> None:
    dataset = CacheRows(teacher, teacher.corpus.train_rows())
    assert len(dataset) == len(teacher.corpus.train_rows())
    for index, row in enumerate(teacher.corpus.train_rows().tolist()):
        item, stored = dataset[index], teacher.corpus.rows(row, row + 1)
        assert (item.tokens == stored.tokens).all()
        assert (item.document_start == stored.document_start).all()
        assert len(item.targets) == stored.supervised.sum()
        for name in ("token_ids", "logprobs", "log_tail", "tail_samples", "log_target"):
            assert (getattr(item.targets, name) == getattr(teacher.row(row), name)).all()
    with pytest.raises(NotFoundError, match=r"index in \[0, 18\), found 18"):
        dataset[18]


def test_far_apart_rows_of_a_block_are_read_in_runs(teacher: Teacher) -> None:
    rows = np.array([0, 2, 20, 23])
    dataset = CacheRows(teacher, rows)
    for index, row in enumerate(rows.tolist()):
        assert (dataset[index].targets.logprobs == teacher.row(row).logprobs).all()


def test_reading_in_order_decodes_every_block_once(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailcache.trainers.batches.BLOCK_POSITIONS", 46)
    dataset = CacheRows(teacher, np.arange(24), kept_blocks=3)
    assert dataset.block_rows == block_rows_of(teacher.corpus) == 3
    for index in range(24):
        dataset[index]
    assert dataset.num_decoded == 8
    assert len(dataset._blocks) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("multiple", [1, 8])
def test_a_batch_of_a_block_is_that_of_its_rows(teacher: Teacher, layout: Layout, multiple: int) -> None:
    chosen = np.array([2, 3, 5, 8, 20])
    held = {0: read_block(teacher, chosen)}
    block = gather(held, np.zeros(4, np.int64), np.array([3, 0, 4, 1]), teacher.decode)
    found = collate_block(block, layout=layout, pad_to_multiple_of=multiple)
    rows = [_all_rows(teacher)[row] for row in (8, 2, 20, 3)]
    expected = collate(rows, layout=layout, pad_to_multiple_of=multiple)
    assert found.keys() == expected.keys()
    assert found["teacher"].keys() == expected["teacher"].keys()
    for one, other in ((found, expected), (found["teacher"], expected["teacher"])):
        for name, values in one.items():
            if name != "teacher":
                assert values.dtype == other[name].dtype
                assert torch.equal(values, other[name]), name


def test_rows_of_several_blocks_are_gathered_in_the_order_asked_for(teacher: Teacher) -> None:
    held = {visit: read_block(teacher, np.arange(3 * visit, 3 * visit + 3)) for visit in range(8)}
    visits, places = np.array([4, 0, 4, 7, 0, 2]), np.array([2, 1, 0, 0, 2, 2])
    found = gather(held, visits, places, teacher.decode)
    wanted = (3 * visits + places).tolist()
    assert found.rows.row_indices.tolist() == wanted
    for i, row in enumerate(wanted):
        one, expected = found.slice(i, i + 1), teacher.corpus.rows(row, row + 1)
        for name in ("tokens", "document_start", "supervised", "held_out"):
            assert (getattr(one.rows, name) == getattr(expected, name)).all(), name
        for name in ("token_ids", "logprobs", "log_tail", "tail_entropy", "log_target", "tail_samples"):
            assert (getattr(one.targets, name) == getattr(teacher.row(row), name)).all(), name


def test_targets_that_do_not_fit_the_corpus_are_refused(teacher: Teacher) -> None:
    class Short:
        name, corpus = "short", teacher.corpus

        def stored(self, first: int, last: int, *, optional: Any) -> Any:
            return {name: values[1:] for name, values in teacher.stored(first, last, optional=optional).items()}

    rows: Any = Short()
    with pytest.raises(MismatchError, match=r"teacher 'short', rows 0 to 23: expected 368 targets.*found 367"):
        CacheRows(rows, np.arange(24))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("multiple", [1, 8])
def test_a_batch_holds_its_rows_and_nothing_else(teacher: Teacher, layout: Layout, multiple: int) -> None:
    """Checked against the rows token by token, in plain Python."""
    items = [_all_rows(teacher)[i] for i in (3, 0, 7, 8)]
    batch = collate(items, layout=layout, pad_to_multiple_of=multiple)
    ids, positions = batch["input_ids"].reshape(-1).tolist(), batch["position_ids"].reshape(-1).tolist()
    assert batch["input_ids"].shape[1] % multiple == 0
    target = 0
    seen_segments: list[int] = []
    for item in items:
        position = 0
        for t, token in enumerate(item.tokens.tolist()):
            position = 0 if t == 0 or item.document_start[t] else position + 1
            if position == 0:
                seen_segments.append(len(seen_segments))
            if not item.supervised[t]:
                continue
            slot = int(batch["target_index"][target])
            assert ids[slot] == token
            assert positions[slot] == position
            assert batch["segments"][target] == seen_segments[-1]
            assert batch["labels"][target] == item.tokens[t + 1]
            assert not item.document_start[t + 1]
            target += 1
    assert target == len(batch["labels"]) == len(batch["teacher"]["logprobs"])
    expected = np.concatenate([item.targets.token_ids for item in items])
    assert (batch["teacher"]["token_ids"].numpy() == expected).all()
    assert batch["rows"].tolist() == [row for row in (3, 0, 7, 8) for _ in range(len(_all_rows(teacher)[row].targets))]
    terms = teacher_terms(batch, 21)
    assert terms.token_ids.dtype == terms.tail_samples.dtype == torch.int64
    assert torch.equal(terms.next_tokens, batch["labels"])
    assert (terms.temperatures, terms.log_z_tail) == ((), None)


def test_optional_fields_are_carried_only_when_they_were_read(tmp_path: Path) -> None:
    teacher = make_cache(tmp_path / "cache", num_rows=8, temperatures=(2.0, 4.0))
    rows = np.arange(8)
    plain, read = CacheRows(teacher, rows), CacheRows(teacher, rows, optional=("log_z_tail",))
    assert "log_z_tail" not in collate([plain[1], plain[3]])["teacher"]
    batch = collate([read[1], read[3]])
    terms = teacher_terms(batch, 21, teacher.temperatures)
    assert terms.temperatures == (2.0, 4.0)
    stored = [teacher.row(row, optional=("log_z_tail",)).log_z_tail for row in (1, 3)]
    assert terms.log_z_tail is not None
    assert (terms.log_z_tail.numpy() == np.concatenate(stored)).all()
    assert teacher_terms(collate([plain[1]]), 21, teacher.temperatures).temperatures == ()


def test_layouts_have_the_shapes_they_promise(teacher: Teacher, unpacked: Teacher) -> None:
    items = [_all_rows(teacher)[i] for i in range(6)]
    lengths = [len(item.tokens) for item in items]
    documents = sum(1 + int(item.document_start[1:].sum()) for item in items)
    assert collate(items)["input_ids"].shape == (6, max(lengths))
    assert collate(items, layout="flat")["input_ids"].shape == (1, sum(lengths))
    assert collate(items, layout="documents")["input_ids"].shape[0] == documents
    # Without packed documents, padding continues the positions: transformers then needs no mask at all.
    plain = collate([_all_rows(unpacked)[i] for i in range(4)])
    assert (plain["position_ids"].diff(dim=-1) == 1).all()


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) > 0),
    seed=st.integers(0, 1000),
    layout=st.sampled_from(LAYOUTS),
    multiple=st.sampled_from([1, 4]),
)
def test_any_rows_survive_being_laid_out(lengths: list[int], seed: int, layout: Layout, multiple: int) -> None:
    """Also empty rows, one-token documents and rows that begin in the middle of a document."""
    generator = np.random.default_rng(seed)
    rows = [RowTokens(generator.integers(1, 9, n), generator.random(n) < 0.4) for n in lengths]
    lines = lay_out(rows, layout, pad_to_multiple_of=multiple)
    tokens = np.concatenate([row.tokens for row in rows])
    flat = lines.input_ids.reshape(-1)
    assert (flat[lines.slots] == tokens).all()
    assert len(np.unique(lines.slots)) == len(tokens)
    assert flat.sum() == tokens.sum()  # the rest is padding
    start = 0
    for row in rows:
        starts = row.document_start.copy()
        starts[:1] = True
        began = np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
        found = lines.position_ids.reshape(-1)[lines.slots[start : start + len(starts)]]
        assert (found == np.arange(len(starts)) - began).all()
        start += len(starts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_a_document_has_the_same_logits_packed_or_alone(
    teacher: Teacher, model_type: str, layout: Layout, attention: str
) -> None:
    """Several packed rows of different lengths in one batch, against every document by itself."""
    sizes: dict[str, Any] = {**LLAMA, "head_dim": 8, "sliding_window": 4} if model_type == "gemma3_text" else LLAMA
    model = tiny_model(21, model_type=model_type, **sizes)
    model.set_attn_implementation(attention)
    dataset = _all_rows(teacher)
    items = [dataset[i] for i in range(24)]
    assert sum(item.document_start[1:].any() for item in items) > 8
    assert len({len(item.tokens) for item in items}) > 3
    batch = collate(items, layout=layout)
    with torch.no_grad():
        logits = target_logits(model, batch)
    alone, _ = logprobs_of(model, teacher.corpus)
    together = torch.log_softmax(logits.double(), -1)
    assert (together - alone).abs().max() <= BOUNDARY * alone.std()
    # The same check sees a leak: without restarting positions the documents of a row flow into one another.
    if layout != "documents":
        leaking = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        leaking = leaking.clamp_max(63)
        with torch.no_grad():
            wrong = target_logits(model, {**batch, "position_ids": leaking})
        assert (torch.log_softmax(wrong.double(), -1) - alone).abs().max() > 0.1 * alone.std()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba", "opt"])
def test_the_probe_finds_models_that_leak_and_the_layout_for_them(
    teacher: Teacher, unpacked: Teacher, model_type: str
) -> None:
    sizes: dict[str, Any] = {"mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}}.get(
        model_type, LLAMA
    )
    if model_type == "opt":
        sizes = {**sizes, "word_embed_proj_dim": 32, "ffn_dim": 48}
    model = tiny_model(21, model_type=model_type, **sizes)
    rows: list[RowTokens] = [_all_rows(teacher)[i] for i in range(24)]
    if model_type in ("mamba", "opt"):
        with pytest.raises(StudentError, match=r"lets one see the one before it.*--layout documents"):
            check_documents_kept_apart(model, rows, "rows")
    else:
        check_documents_kept_apart(model, rows, "rows")
        check_documents_kept_apart(model, rows, "flat")
    check_documents_kept_apart(model, rows, "documents")
    check_documents_kept_apart(model, [_all_rows(unpacked)[i] for i in range(24)], "rows")
    assert not model.training
    assert "forward" not in model.get_output_embeddings().__dict__


def test_the_probe_works_on_freshly_initialised_weights(teacher: Teacher) -> None:
    """At the usual initial scale of 0.02 a leak is small, and found all the same."""
    rows: list[RowTokens] = [_all_rows(teacher)[i] for i in range(24)]
    sizes: dict[str, Any] = {**LLAMA, "word_embed_proj_dim": 32, "ffn_dim": 48}
    model = tiny_model(21, model_type="opt", std=0.02, **sizes)
    with pytest.raises(StudentError, match="lets one see"):
        check_documents_kept_apart(model.train(), rows, "rows")
    assert model.training
    check_documents_kept_apart(tiny_model(21, std=0.02), rows, "rows")


def test_flash_attention_gets_one_line() -> None:
    model = tiny_model(21)
    assert default_layout(model) == "rows"
    model.config._attn_implementation = "flash_attention_2"
    assert default_layout(model) == "flat"


def test_logits_are_made_for_target_positions_only(teacher: Teacher) -> None:
    """The head sees T hidden states, not B * L; the result and the gradient are those of the plain forward."""
    model = tiny_model(21).train()
    seen: list[torch.Size] = []
    weight = model.get_output_embeddings().weight
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.shape))
    batch = collate([_all_rows(teacher)[i] for i in range(5)])
    logits = target_logits(model, batch)
    assert seen == [torch.Size([1, len(batch["labels"]), 21])]
    (gradient,) = torch.autograd.grad(logits.square().sum(), weight)
    plain = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    plain = plain.reshape(-1, 21)[batch["target_index"]]
    torch.testing.assert_close(logits, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.square().sum(), weight)[0])


def test_soft_capped_logits_and_models_without_a_known_head(teacher: Teacher) -> None:
    sizes: dict[str, Any] = {**LLAMA, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}
    model = tiny_model(21, model_type="gemma2", **sizes)
    batch = collate([_all_rows(teacher)[i] for i in range(5)])
    with torch.no_grad():
        capped = target_logits(model, batch)
        plain = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        expected = plain.reshape(-1, 21)[batch["target_index"]]
        assert capped.abs().max() <= 2.0
        torch.testing.assert_close(capped, expected)
        model.get_output_embeddings = lambda: None
        torch.testing.assert_close(target_logits(model, batch), expected)


def test_the_head_computes_in_float32_under_autocast_and_from_16_bit_weights(teacher: Teacher) -> None:
    """A 16-bit head rounds logits to 8 bits; ours are the float32 product of the hidden states they came from."""
    batch = collate([_all_rows(teacher)[i] for i in range(5)])
    for model, autocast in ((tiny_model(21), True), (tiny_model(21).bfloat16(), False)):
        hidden: list[torch.Tensor] = []
        body: nn.Module = model.model.norm
        body.register_forward_hook(lambda m, a, out, into=hidden: into.append(out))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = target_logits(model, batch)
        picked = hidden[0].reshape(-1, 32)[batch["target_index"]].float()
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, picked @ model.lm_head.weight.float().T)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_what_sits_at_the_heads_place_gets_its_input_and_gives_the_models_result(
    teacher: Teacher, model_type: str
) -> None:
    """Whatever the model does to logits; gradients reach the trunk; the head is itself again afterwards."""
    sizes: dict[str, Any] = {**LLAMA, "head_dim": 8, "sliding_window": 4} if model_type == "gemma2" else LLAMA
    model = tiny_model(21, model_type=model_type, **sizes)
    seat, head = HeadSeat(model), model.get_output_embeddings()
    batch = collate([_all_rows(teacher)[i] for i in range(5)])
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    handle.remove()
    (hidden,) = seat.run(model, batch, lambda hidden_TD: (hidden_TD,))
    torch.testing.assert_close(hidden, seen[0].reshape(-1, 32)[batch["target_index"]])
    hidden.square().sum().backward()  # type: ignore[no-untyped-call]
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert "forward" not in head.__dict__
    assert not model._forward_hooks
    with pytest.raises(ZeroDivisionError):
        seat.run(model, batch, lambda hidden_TD: (hidden_TD / (1 // 0),))
    assert "forward" not in head.__dict__
    assert not model._forward_hooks


def test_a_model_that_does_not_call_its_head_once_is_refused(teacher: Teacher) -> None:
    batch = collate([_all_rows(teacher)[0]])
    for times in (0, 2):
        model = tiny_model(21)
        head, norm = model.get_output_embeddings(), model.model.norm
        seat = HeadSeat(model)
        if times == 0:
            model.lm_head = nn.Linear(32, 21, bias=False)
        else:
            norm.register_forward_hook(lambda module, arguments, output, head=head: (head(output), output)[1])
        with pytest.raises(StudentError, match=f"to call its head once, found {times} calls"):
            seat.run(model, batch, lambda hidden_TD: (hidden_TD,))
