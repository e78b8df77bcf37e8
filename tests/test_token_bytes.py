"""Bytes per token: they add up to the text for tokenizers that can say it, and the others say why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import SPECIAL, TEXTS, build_tokenizer, wrap
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tailcache.trainers.token_bytes import TokenBytes, token_bytes


def _sentencepiece(*, prefix: bool = True, fallback: bool = True) -> Any:
    """BPE on spaces made visible, as Llama 2 (with a prefix) and Gemma (without) have it."""
    tokenizer: Any = Tokenizer(models.BPE(byte_fallback=fallback, unk_token="<unk>", fuse_unk=True))
    visible: list[Any] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *visible] if prefix else visible)
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)] if prefix else decode)
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    trainer: Any = trainers.BpeTrainer(vocab_size=360, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "a b  c"] * 3, trainer)
    state = tokenizer.get_vocab()
    model = models.BPE(
        vocab=state | {name: len(state) + i for i, name in enumerate(alphabet)},
        merges=[],
        byte_fallback=fallback,
        unk_token="<unk>",
    )
    tokenizer.model = model
    return wrap(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _metaspace() -> Any:
    """Unigram with a decoder, which marks every word's beginning, and has no token for most characters."""
    tokenizer = build_tokenizer("unigram")
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZERS = {
    "byte level": build_tokenizer("bpe"),
    "prefix": _sentencepiece(),
    "no prefix": _sentencepiece(prefix=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1, max_size=12))
def test_they_add_up_to_any_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    table = token_bytes(tokenizer, len(tokenizer))
    assert table.why_not is None
    assert table.lengths_V is not None
    text = f"t{text}"  # a text that begins with a space gets no prefix from some tokenizers
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert float(table.lengths_V[ids].sum()) == len(text.encode()) + table.added
    assert table.added == (name == "prefix")


def test_the_prefix_before_a_text_does_not_count() -> None:
    tokenizer = TOKENIZERS["prefix"]
    table = token_bytes(tokenizer, len(tokenizer))
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False)["input_ids"]])
    first = torch.arange(len(ids) - 1) == 0
    counted = table.of(ids[:-1], ids[1:], first_T=first)
    assert counted is not None
    assert float(counted.sum()) == len("the cat")
    # A row that goes on in the middle of a document has no prefix to take off.
    going_on = table.of(ids[1:-1], ids[2:], first_T=first[:-1])
    assert going_on is not None
    assert float(going_on.sum()) == len("the cat") + 1 - float(counted[0] + 1)


def test_special_tokens_are_no_text_and_added_ones_are() -> None:
    tokenizer = build_tokenizer("bpe")
    tokenizer.add_tokens([AddedToken("naïve"), AddedToken("<|tool|>", special=True)])
    table = token_bytes(tokenizer, len(tokenizer) + 3)
    assert table.lengths_V is not None
    vocabulary = tokenizer.get_vocab()
    assert [float(table.lengths_V[vocabulary[name]]) for name in (*SPECIAL, "<|tool|>")] == [0.0] * (len(SPECIAL) + 1)
    assert float(table.lengths_V[vocabulary["naïve"]]) == 6
    assert table.lengths_V[len(tokenizer) :].isnan().all()


def test_the_bytes_of_an_unknown_token_are_not_known() -> None:
    tokenizer = _metaspace()
    table = token_bytes(tokenizer, len(tokenizer))
    assert table.lengths_V is not None
    assert table.lengths_V[tokenizer.unk_token_id].isnan()
    assert not table.lengths_V[tokenizer.eos_token_id].isnan()


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (build_tokenizer("wordpiece"), "its decoder: none"),
        (build_tokenizer("wordlevel"), "its decoder: none"),
        (object(), "object does not say how it decodes"),
    ],
    ids=["wordpiece", "words", "not a fast tokenizer"],
)
def test_tokenizers_that_cannot_say_say_why(tokenizer: Any, reason: str) -> None:
    table = token_bytes(tokenizer, 300)
    assert table.lengths_V is None
    assert reason in (table.why_not or "")
    assert table.of(torch.zeros(2), torch.zeros(2), first_T=torch.zeros(2)) is None


def test_a_tokenizer_that_shortens_texts_is_found_out() -> None:
    tokenizer = build_tokenizer("bpe")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("  ", " ")
    assert "changes text before it cuts it" in (token_bytes(tokenizer, len(tokenizer)).why_not or "")
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert token_bytes(tokenizer, len(tokenizer)).added == 1
    assert TokenBytes().of(torch.zeros(1), torch.zeros(1), first_T=torch.zeros(1)) is None
