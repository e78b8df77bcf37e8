"""From the name of a source to the source: files, a folder, a pattern, a saved dataset, or the hub.

Which files belong to which split follows the words in their paths, as `datasets` does, but only where every
file of the folder has such a word: a folder that merely contains a file called "test.txt" is read whole.
"""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path

from tailcache.pipeline.config import PrepareConfig
from tailcache.pipeline.files import file_format, supported_suffixes
from tailcache.pipeline.text import DOCSTRINGS, DocstringSource, FileSource, HubSource, Source
from tailcache.storage.errors import ConfigError, DataError, NotFoundError

__all__ = ["open_source"]

DATASET_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def open_source(config: PrepareConfig) -> Source:
    """Find what a source name means.

    Raises:
      NotFoundError: no such file, pattern, or dataset on the hub.
      ConfigError: it is there, but a split or another setting does not fit.
    """
    if config.source == DOCSTRINGS:
        return DocstringSource()
    path = Path(config.source).expanduser()
    if path.is_dir():
        return _open_folder(path, config)
    if path.is_file():
        return _open_files([(path.name, path)], config, config.source)
    if re.search(r"[*?\[]", config.source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise NotFoundError(f"source {config.source}: no file matches this pattern")
        names = _relative_names(found)
        return _open_files(sorted(zip(names, found, strict=True)), config, config.source)
    if file_format(path) or config.source.startswith((".", "/", "~")) or config.source.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise NotFoundError(f"source {config.source}: there is no such file or folder{hint}")
    return _open_hub(config)


def _relative_names(paths: Sequence[Path]) -> list[str]:
    """Names of files below the deepest folder they share."""
    shared = paths[0].parent
    while not all(path.is_relative_to(shared) for path in paths):
        shared = shared.parent
    return [path.relative_to(shared).as_posix() for path in paths]


def _open_files(files: list[tuple[str, Path]], config: PrepareConfig, what: str) -> FileSource:
    unknown = [name for name, path in files if file_format(path) is None]
    if unknown:
        raise ConfigError(f"source {what}: cannot read {', '.join(unknown[:5])}; expected {supported_suffixes()}")
    if config.split not in (None, "train"):
        raise ConfigError(f"source {what}: a file has no splits, found --split {config.split}; drop it")
    return FileSource(files, None, config.text_files)


def _open_folder(folder: Path, config: PrepareConfig) -> FileSource:
    """A folder of data files, or one that `datasets` wrote with ``save_to_disk``."""
    if (folder / "dataset_dict.json").is_file():
        splits = list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", []))
        split, notes = _choose_split(splits, config, str(folder))
        return FileSource(_saved_files(folder / split), split, config.text_files, notes)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _open_files(_saved_files(folder), config, str(folder))
    files, ignored = [], []
    for path in sorted(folder.rglob("*"), key=lambda each: each.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if file_format(path) is None:
            ignored.append(relative.as_posix())
        elif path.name not in DATASET_METADATA:
            files.append((relative.as_posix(), path))
    if not files:
        raise NotFoundError(f"source {folder}: no file that can be read; expected {supported_suffixes()}")
    by_split: dict[str, list[tuple[str, Path]]] = {}
    for name, path in files:
        by_split.setdefault(_split_of(name), []).append((name, path))
    notes = [f"not read, of another format: {_some(ignored)}"] if ignored else []
    if "" in by_split and (config.split in (None, "train") or len(by_split) == 1):
        source = _open_files(files, config, str(folder))  # not a folder laid out by splits: all of it
        return FileSource(source.files, None, config.text_files, notes)
    by_split.pop("", None)
    split, more = _choose_split(list(by_split), config, str(folder))
    return FileSource(by_split[split], split, config.text_files, notes + more)


def _saved_files(folder: Path) -> list[tuple[str, Path]]:
    """The Arrow files of a dataset on disk, in its own order."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a complete dataset folder: state.json: {error}") from error
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: saved with a selection by an old version of datasets; save it again with a new one")
    return [(name, folder / name) for name in names]


def _split_of(name: str) -> str:
    """The split a file belongs to by the words in its path ("train-00000.parquet", "test/a.txt"), or ""."""
    for part in name.split("/"):
        words = re.split(r"[-._ 0-9]+", part.lower())
        for split, spellings in SPLIT_WORDS.items():
            if any(word in spellings for word in words):
                return split
    return ""


def _choose_split(splits: Sequence[str], config: PrepareConfig, what: str) -> tuple[str, list[str]]:
    """The split to read, and a note about those that are not."""
    wanted = config.split
    if wanted is None:
        wanted = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
    if wanted is None:
        raise ConfigError(f"source {what}: expected a choice of split; name one of {', '.join(splits)} with --split")
    if wanted not in splits:
        near = difflib.get_close_matches(wanted, splits, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"source {what}: no split {wanted}, found {', '.join(splits) or 'none'}{hint}")
    others = [split for split in splits if split != wanted]
    return wanted, [f"split {wanted} read; also there, not read: {', '.join(others)}"] if others else []


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _open_hub(config: PrepareConfig) -> HubSource:
    import datasets
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source):
        raise NotFoundError(f"source {config.source}: neither a file or folder nor a possible name on the hub")
    try:
        commit = str(HfApi().dataset_info(config.source, revision=config.revision).sha)
        splits = datasets.get_dataset_split_names(config.source, config.subset, revision=commit)
    except Exception as error:  # no network, no such dataset, no access, a missing subset: all say so themselves
        raise NotFoundError(
            f"source {config.source}: neither a local file or folder, nor to be had from the hub: "
            f"{type(error).__name__}: {error}"
        ) from error
    split, notes = _choose_split([str(each) for each in splits], config, config.source)
    return HubSource(config.source, config.subset, split, commit, notes)
