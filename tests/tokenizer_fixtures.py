"""Tiny tokenizers, trained in the test: no file and no hub needed."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the cat sat on the mat", "a tailcache keeps the tail", "naïve café, 12 € — done"] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<sep>"]


def wrap(tokenizer: Tokenizer, **settings: Any) -> Any:
    """The transformers tokenizer around a bare one."""
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, **settings)


def build_tokenizer(
    kind: str = "bpe",
    *,
    eos: str = "</s>",
    lowercase: bool = False,
    trim_offsets: bool = True,
    size: int = 300,
) -> Any:
    """A trained tokenizer: "bpe" (byte level), "unigram", "wordpiece" or "wordlevel"."""
    tokenizer: Any
    trainer: Any
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.train_from_iterator(TEXTS, trainer)
    return wrap(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=eos)
