"""What a tokenizer is, as a handful of hashes: two tokenizers with equal hashes give equal ids.

Student and teacher must read the same ids, so a cache stores these hashes and every later step compares
them. They are taken from what decides the ids and from nothing else: not from file names, the version of
the library, padding, truncation or the chat template. A tokenizer therefore keeps its fingerprint when it
is saved and loaded again, and one read from a GGUF file has that of the same tokenizer in a folder.

The tokenizer is duck-typed (anything with ``get_vocab`` and, for the fast ones, ``backend_tokenizer``), so
that this module needs no transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["COMPONENTS", "differing_components", "fingerprint"]

COMPONENTS = ("vocabulary", "merges", "special_ids")


def fingerprint(tokenizer: Any) -> dict[str, str]:
    """Hash each part of a tokenizer that decides which ids a text becomes.

    Args:
      tokenizer: a transformers tokenizer, fast or slow.

    Returns:
      sha256, hex, of each component: ``vocabulary`` (every token and its id, added tokens included);
      ``merges`` (the tokenization model apart from the ids: merges or scores, the normalizer, the
      pre-tokenizer, how added tokens match); ``special_ids`` (bos, eos and unk; padding is a choice of the
      training run, not of the tokenizer); and ``all``, over the three.

    Cost: one serialisation of the tokenizer, some 0.2 s for a vocabulary of 50,000.
    """
    special_ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    hashes = {
        "vocabulary": _digest(sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())),
        "merges": _digest(_segmentation(tokenizer)),
        "special_ids": _digest(special_ids),
    }
    return {**hashes, "all": _digest(hashes)}


def differing_components(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The components in which two fingerprints differ, in the order of `COMPONENTS`; empty if none."""
    return [name for name in COMPONENTS if expected.get(name) != found.get(name)]


def _segmentation(tokenizer: Any) -> Any:
    """How text is cut into tokens, as plain JSON, apart from the token → id table of dictionary models."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _slow_segmentation(tokenizer)
    described = json.loads(backend.to_str())
    model = {key: value for key, value in described["model"].items() if not _unset(value)}
    if isinstance(model.get("vocab"), dict):  # a list holds Unigram's scores, which are part of the model
        del model["vocab"]
    if "merges" in model:  # written as "a b" by older versions, as [a, b] by newer ones
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    deciding = ("id", "content", "single_word", "lstrip", "rstrip", "normalized")
    added = [{key: token.get(key, False) for key in deciding} for token in described.get("added_tokens") or []]
    return {
        "model": model,
        "normalizer": described.get("normalizer"),
        "pre_tokenizer": described.get("pre_tokenizer"),
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }


def _slow_segmentation(tokenizer: Any) -> Any:
    """The same for a tokenizer written in Python: its SentencePiece model, else class and merges."""
    pieces = getattr(tokenizer, "sp_model", None)
    if pieces is not None and hasattr(pieces, "serialized_model_proto"):
        return {"sentencepiece": hashlib.sha256(pieces.serialized_model_proto()).hexdigest()}
    ranks = getattr(tokenizer, "bpe_ranks", None)
    merges = [list(pair) for pair, _ in sorted(ranks.items(), key=lambda item: item[1])] if ranks else None
    return {"class": type(tokenizer).__name__, "merges": merges}


def _unset(value: Any) -> bool:
    """Whether a setting of the model is absent: versions of the format write that in different ways."""
    return value is None or value is False or value in ("", [])


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
