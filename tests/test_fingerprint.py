"""The fingerprint says whether two tokenizers give the same ids, and nothing else."""

from pathlib import Path

import pytest
from tokenizer_fixtures import build_tokenizer as build
from tokenizer_fixtures import wrap
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from tailcache.storage.fingerprint import COMPONENTS, differing_components, fingerprint


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "wordlevel"])
def test_survives_saving_and_loading(tmp_path: Path, kind: str) -> None:
    tokenizer = build(kind)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer)
    loaded.save_pretrained(tmp_path / "again")
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "again")) == fingerprint(tokenizer)


def test_is_hex_per_component_and_deterministic() -> None:
    first, second = fingerprint(build("wordlevel")), fingerprint(build("wordlevel"))
    assert first == second
    assert set(first) == {*COMPONENTS, "all"}
    assert all(len(value) == 64 and int(value, 16) >= 0 for value in first.values())
    assert differing_components(first, second) == []


def test_does_not_depend_on_padding_truncation_or_chat_template() -> None:
    tokenizer = build("bpe")
    before = fingerprint(tokenizer)
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = "{{ messages }}"
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=4)
    assert fingerprint(tokenizer) == before


def test_names_the_component_that_differs() -> None:
    tokenizer = build("bpe")
    base = fingerprint(tokenizer)
    assert differing_components(base, fingerprint(build("bpe", eos="<s>"))) == ["special_ids"]
    assert differing_components(base, fingerprint(build("bpe", lowercase=True))) == ["merges"]
    grown = build("bpe")
    grown.add_tokens(["brandnew"])
    assert "vocabulary" in differing_components(base, fingerprint(grown))
    assert "all" not in differing_components(base, fingerprint(grown))


def test_sees_the_order_of_merges_alone() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    one = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c")]))
    two = Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b")]))
    assert one.encode("abc").ids != two.encode("abc").ids
    hashes = [fingerprint(wrap(each)) for each in (one, two)]
    assert differing_components(*hashes) == ["merges"]


def test_sees_how_an_added_token_matches() -> None:
    plain, stripping = build("wordlevel"), build("wordlevel")
    plain.add_tokens([AddedToken("<x>")])
    stripping.add_tokens([AddedToken("<x>", lstrip=True)])
    assert differing_components(fingerprint(plain), fingerprint(stripping)) == ["merges"]


def test_a_slow_tokenizer_is_told_apart_by_its_merges() -> None:
    class Slow:
        bos_token_id, eos_token_id, unk_token_id = None, 1, 0

        def __init__(self, ranks: dict[tuple[str, str], int]) -> None:
            self.bpe_ranks = ranks

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "ab": 2}

    one, two = Slow({("a", "b"): 0, ("b", "a"): 1}), Slow({("a", "b"): 1, ("b", "a"): 0})
    assert fingerprint(one) == fingerprint(Slow(dict(one.bpe_ranks)))
    assert differing_components(fingerprint(one), fingerprint(two)) == ["merges"]
