"""Load a tokenizer once, with everything a corpus stores about it.

A tokenizer comes from a folder, from the hub, or out of a GGUF file. What is stored is its own files,
written by ``save_pretrained`` and cleaned of what depends on the machine (where it was loaded from, with
which version of the library), so that the same tokenizer gives the same bytes anywhere.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailcache.storage.errors import ConfigError, NotFoundError
from tailcache.storage.fingerprint import fingerprint

__all__ = [
    "LoadedTokenizer",
    "ending_id",
    "load_tokenizer",
    "opening_id",
    "real_vocab_size",
    "tokenizer_files",
]

# Settings that say how or where a tokenizer was loaded, not what it does.
VOLATILE_SETTINGS = (
    "_commit_hash",
    "cache_dir",
    "force_download",
    "gguf_file",
    "is_local",
    "local_files_only",
    "name_or_path",
    "processor_class",
    "revision",
    "token",
    "tokenizer_file",
    "transformers_version",
    "vocab_file",
    "merges_file",
)


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer and what the corpus stores about it.

    Attributes:
      tokenizer: the transformers tokenizer.
      vocab_size: number of real token ids; not the padded width of any head.
      fingerprint: sha256 per component, see `tailcache.storage.fingerprint`.
      files: the tokenizer's files by name, the same bytes wherever they are made.
    """

    tokenizer: Any
    vocab_size: int
    fingerprint: dict[str, str]
    files: dict[str, bytes]


def load_tokenizer(name: str, *, revision: str | None = None, chat_template: Path | None = None) -> LoadedTokenizer:
    """Load a tokenizer from a folder, the hub or a GGUF file.

    Args:
      name: a folder, a hub id, or the path of a .gguf file.
      revision: branch, tag or commit on the hub.
      chat_template: a Jinja file to use instead of the tokenizer's own template.

    Raises:
      NotFoundError: nothing of that name, here or on the hub.
      ConfigError: it is there but cannot be loaded, or it tokenises at random (BPE dropout).
    """
    from transformers import AutoTokenizer

    path = Path(name).expanduser()
    settings: dict[str, Any] = {}
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise NotFoundError(f"tokenizer {name}: there is no such GGUF file")
        source, settings["gguf_file"] = str(path.parent), path.name
    elif path.is_dir():
        source = str(path)
    elif path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise NotFoundError(
            f"tokenizer {name}: expected a folder with a tokenizer, a .gguf file or a hub id; found "
            f"{'a file' if path.exists() else 'nothing of that name'}"
        )
    else:
        source, settings["revision"] = name, revision
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, **settings)
    except Exception as error:  # the libraries raise a dozen kinds for a missing or broken tokenizer
        kind = ConfigError if path.exists() else NotFoundError
        raise kind(f"tokenizer {name}: cannot be loaded: {type(error).__name__}: {error}") from error
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {chat_template}: cannot be read: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and (dropout := getattr(backend.model, "dropout", None)):
        raise ConfigError(
            f"tokenizer {name}: it drops merges at random (dropout {dropout}), so the same text would not "
            "give the same tokens; set dropout to null in its tokenizer.json"
        )
    return LoadedTokenizer(tokenizer, real_vocab_size(tokenizer), fingerprint(tokenizer), tokenizer_files(tokenizer))


def real_vocab_size(tokenizer: Any) -> int:
    """The number of ids the tokenizer can produce: its length, or its largest id + 1 if ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files ``save_pretrained`` writes, by relative name, without what varies from machine to machine."""
    with tempfile.TemporaryDirectory(prefix="tailcache-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        root = Path(folder)
        files = {
            path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
        }
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files:
            settings = json.loads(files[name])
            for key in VOLATILE_SETTINGS:
                settings.pop(key, None)
            text = json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
            files[name] = text.encode("utf-8")
    return files


def opening_id(tokenizer: Any, choice: str) -> int | None:
    """The id that begins each text, or None.

    Args:
      tokenizer: a transformers tokenizer.
      choice: "always", "never", or "auto": if the tokenizer does so when asked for special tokens.

    Raises:
      ConfigError: "always", and the tokenizer has no bos token.
    """
    bos = tokenizer.bos_token_id
    if choice == "never":
        return None
    if choice == "always":
        if bos is None:
            raise ConfigError("--bos always: the tokenizer has no bos token; use --bos never")
        return int(bos)
    opened = tokenizer("a", add_special_tokens=True)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return int(bos) if bos is not None and opened[:1] == [bos] and opened[: len(plain)] != plain else None


def ending_id(tokenizer: Any, choice: str, separator: str | None) -> int | None:
    """The id that ends each text, or None.

    Args:
      tokenizer: a transformers tokenizer.
      choice: "always", "never", or "auto": if the tokenizer has an eos token.
      separator: a token to use instead of eos.

    Raises:
      ConfigError: "always" without an eos token, or a separator that is not one token of the vocabulary.
    """
    if separator is not None:
        found = tokenizer.get_vocab().get(separator)
        if found is None:
            special = ", ".join(sorted(tokenizer.all_special_tokens)) or "none"
            raise ConfigError(
                f"--separator {separator!r}: not a token of this vocabulary; its special tokens: {special}"
            )
        return int(found)
    if choice == "never":
        return None
    if tokenizer.eos_token_id is None:
        if choice == "always":
            raise ConfigError("--eos always: the tokenizer has no eos token; name one with --separator")
        return None
    return int(tokenizer.eos_token_id)
