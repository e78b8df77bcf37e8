"""How many bytes of text each token is: what bits per byte are counted by.

Two families of tokenizers say so exactly. In byte-level ones every character of a token's name stands for a byte. In
SentencePiece ones the name is the text itself, with a mark for the space, and bytes as ``<0xE2>`` where a character has
no token. All others (WordPiece, words) put spaces between tokens when they decode, by rules, and get no bytes here. So
do those that change the text before they cut it, which a few probes show.

Special tokens are no text: they have 0 bytes, and what they cost counts.

Legend: V vocabulary, T target positions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["TokenBytes", "token_bytes"]

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PROBES = (
    "Hello, world! It's 3.14 o'clock.",
    "two  spaces,\ttab\n\n    and    lines \n",
    "na\u00efve caf\u00e9 \u2014 12 \u20ac",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8, \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\U0001f600 \U0001f469\u200d\U0001f467",
    "def f(x):\n    return x['a_b']  # 1_000",
)


@dataclass(frozen=True, kw_only=True)
class TokenBytes:
    """The bytes of each token's text.

    Attributes:
      lengths_V: [V] float64; NaN for a token whose text is not known (the unknown token); None where `why_not` says
        why there are none.
      special_V: [V] bool, tokens that are no text.
      added: 1 where the tokenizer puts a space before a text, which its first token then has in its name; else 0.
      why_not: a clause for a reader.
    """

    lengths_V: Tensor | None = None
    special_V: Tensor | None = None
    added: int = 0
    why_not: str | None = None

    def of(self, previous_T: Tensor, tokens_T: Tensor, *, first_T: Tensor) -> Tensor | None:
        """The bytes of some tokens, or None where they are not known for this tokenizer.

        Args:
          previous_T: [T] the token before each.
          tokens_T: [T] ids.
          first_T: [T] bool; the token before is the first of its document. If that is a special token, this one begins
            the text, and a space that the tokenizer put before it does not count.

        Returns:
          [T] float64 on the device of the tokens.
        """
        if self.lengths_V is None or self.special_V is None:
            return None
        device = tokens_T.device
        opens_T = first_T & self.special_V.to(device)[previous_T] & ~self.special_V.to(device)[tokens_T]
        return self.lengths_V.to(device)[tokens_T] - self.added * opens_T


def token_bytes(tokenizer: Any, vocab_size: int) -> TokenBytes:
    """Find out how many bytes each token is.

    Args:
      tokenizer: of transformers.
      vocab_size: V; ids that the tokenizer does not know are never met.

    Cost: one look at each token's name, and six short texts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return TokenBytes(why_not=f"{type(tokenizer).__name__} does not say how it decodes")
    kinds = set(_types(json.loads(backend.to_str())["decoder"]))
    byte_level = "ByteLevel" in kinds
    if not byte_level and not kinds & {"Metaspace", "ByteFallback"}:
        named = ", ".join(sorted(kinds)) or "none"
        return TokenBytes(
            why_not=f"neither a byte-level nor a SentencePiece tokenizer (its decoder: {named}), so that the bytes of "
            "a token depend on its neighbours"
        )
    lengths = torch.full((vocab_size,), torch.nan, dtype=torch.float64)
    for name, token in backend.get_vocab(with_added_tokens=False).items():
        if token < vocab_size:
            lengths[token] = len(name) if byte_level else _text_bytes(name)
    special = torch.zeros(vocab_size, dtype=torch.bool)
    for token, added in tokenizer.added_tokens_decoder.items():
        if token < vocab_size:
            special[token] = added.special
            lengths[token] = 0 if added.special else len(added.content.encode())
    unknown = tokenizer.unk_token_id
    if not byte_level and unknown is not None and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        lengths[unknown] = torch.nan
    return _checked(tokenizer, lengths, special)


def _checked(tokenizer: Any, lengths_V: Tensor, special_V: Tensor) -> TokenBytes:
    """The table, if it gives the right number of bytes for a few texts."""

    def counted(text: str) -> float:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return float(lengths_V[torch.tensor(ids, dtype=torch.long)].sum())

    added = counted("a") - 1
    if added not in (0, 1):
        return TokenBytes(why_not=f"the letter 'a' is {added + 1:g} bytes of its tokens")
    for probe in _PROBES:
        found, expected = counted(probe) - added, len(probe.encode())
        if found != expected and found == found:  # texts with unknown tokens tell nothing
            return TokenBytes(
                why_not=f"its tokens do not add up to the text ({found:g} bytes for {expected} of {probe!r}): it "
                "changes text before it cuts it"
            )
    return TokenBytes(lengths_V=lengths_V, special_V=special_V, added=int(added))


def _text_bytes(name: str) -> int:
    return 1 if _BYTE.fullmatch(name) else len(name.replace(_SPACE, " ").encode())


def _types(decoder: Any) -> Iterator[str]:
    """The names of a decoder and of those that it is made of."""
    if isinstance(decoder, dict):
        yield str(decoder["type"])
        for part in decoder.get("decoders", []):
            yield from _types(part)
