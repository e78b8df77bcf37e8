"""Copy a corpus or a teacher to another place, byte for byte, with every hash checked on the way.

The order is that in which they were written: what belongs to a shard before its commit record, the record of the whole
last. So a copy that was interrupted is never taken for a whole one, and goes on where it stopped when it is run again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from tailcache.storage import durable
from tailcache.storage.commits import MANIFEST_COPY
from tailcache.storage.corpus import Corpus, corpus_arrays
from tailcache.storage.durable import TEMPORARY, sha256
from tailcache.storage.errors import CorruptError, MismatchError, StorageError
from tailcache.storage.layout import check_name, commit_path
from tailcache.storage.limits import MAX_COMMIT, MAX_MANIFEST
from tailcache.storage.place import Place
from tailcache.storage.records import (
    parse_checksums,
    parse_commit,
    parse_complete,
    parse_corpus_manifest,
    parse_manifest,
)

__all__ = ["copy_corpus", "copy_teacher"]

Progress = Callable[[int], object]


def copy_corpus(source: Place, target: Place, progress: Progress = lambda _: None) -> Corpus:
    """Copy the corpus of a cache.

    Args:
      source: the place of the cache.
      target: that of the copy.
      progress: called with the bytes of each file.

    Raises:
      MismatchError: there is another corpus at the target, or another process is writing one.
      CorruptError: a file is missing or not what was written.
    """
    manifest_data = _record(source, "corpus/manifest.json")
    manifest = parse_corpus_manifest(manifest_data, f"{source}/corpus/manifest.json")
    if target.exists("corpus/manifest.json"):
        return _same_corpus(target, manifest.hash)
    claim = target.claim("corpus.claim" + TEMPORARY)
    if claim is None:
        raise MismatchError(f"{target}: another process is copying a corpus there; wait for it")
    try:
        data = _record(source, "corpus/checksums.json")
        specs = corpus_arrays(manifest.vocab_size)
        checksums = parse_checksums(data, f"{source}/corpus/checksums.json", manifest, specs)
        here, there = source / "corpus", target / ("corpus" if target.local is None else "corpus" + TEMPORARY)
        for name in [name for name, _ in there.files() if name not in checksums.files]:
            there.delete(name)  # left by whoever was writing another corpus
        for name, expected in sorted(checksums.files.items()):
            _copy(here, there, name, expected, progress)
        there.write("checksums.json", data)
        if not there.create("manifest.json", manifest_data):
            return _same_corpus(target, manifest.hash)
        if target.local is not None and there.local is not None:
            durable.promote_folder(there.local, target.local / "corpus")
    finally:
        claim.release()
    return Corpus(target)


def _same_corpus(target: Place, expected: str) -> Corpus:
    corpus = Corpus(target)
    if corpus.hash != expected:
        raise MismatchError(
            f"{target}: expected the corpus {expected[:12]}…, or none, found {corpus.hash[:12]}…; choose another target"
        )
    return corpus


def copy_teacher(source: Place, target: Place, name: str, progress: Progress = lambda _: None) -> bool:
    """Copy a finished teacher.

    Args:
      source: the place of the cache.
      target: that of the copy; it must have the same corpus.
      name: the teacher's.
      progress: called with the bytes of each file.

    Returns:
      Whether anything had to be copied; False where it was there, whole, already.

    Raises:
      MismatchError: there is another teacher of that name at the target.
      CorruptError: a file is missing or not what was written.
    """
    here, there = (place / "teachers" / check_name(name) for place in (source, target))
    manifest_data, complete_data = _record(here, "manifest.json"), _record(here, "complete.json")
    manifest = parse_manifest(manifest_data, f"{here}/manifest.json")
    complete = parse_complete(complete_data, f"{here}/complete.json", manifest)
    if _is_there(there, "manifest.json", manifest_data):
        if _is_there(there, "complete.json", complete_data):
            return False
    else:
        for file, expected in sorted(manifest.files.items()):
            _copy(here, there, file, expected, progress)
        if manifest.layout.format_version > 1:
            there.write(MANIFEST_COPY, manifest_data)
        _seal(there, "manifest.json", manifest_data)
    chain = hashlib.sha256()
    for shard in range(manifest.layout.num_shards):
        data = _record(here, commit_path(shard), MAX_COMMIT)
        commit = parse_commit(data, f"{here}/{commit_path(shard)}", shard, manifest)
        chain.update(data)
        if _is_there(there, commit_path(shard), data):
            progress(commit.bytes)
            continue
        for file, entry in sorted(commit.files.items()):
            _copy(here, there, file, entry.sha256, progress)
        _seal(there, commit_path(shard), data)
    if chain.hexdigest() != complete.commits:
        raise CorruptError(f"{here}/complete.json: the commit records are not those it was written over")
    for file, expected in sorted(complete.files.items()):
        _copy(here, there, file, expected, progress)
    _seal(there, "complete.json", complete_data)
    return True


def _record(place: Place, name: str, limit: int = MAX_MANIFEST) -> bytes:
    try:
        return place.read_limited(name, limit)
    except FileNotFoundError as error:
        raise CorruptError(f"{place}/{name}: missing; restore it from a copy") from error


def _is_there(place: Place, name: str, expected: bytes) -> bool:
    """A record is at the target already.

    Raises:
      MismatchError: one is, but another.
    """
    try:
        found = place.read(name)
    except FileNotFoundError:
        return False
    if found != expected:
        raise MismatchError(
            f"{place}/{name}: expected the one of the source, or none, found another; choose another target, or delete "
            "what is there"
        )
    return True


def _seal(place: Place, name: str, data: bytes) -> None:
    if not place.create(name, data):
        _is_there(place, name, data)


def _copy(source: Place, target: Place, name: str, expected: str, progress: Progress) -> None:
    try:
        if sha256(target.uncached().read(name)) == expected:  # by a copy that was interrupted
            progress(target.size(name) or 0)
            return
    except FileNotFoundError:
        pass
    data = source.read_checked(name, expected)
    target.write(name, data)
    if target.uncached().read(name) != data:
        raise StorageError(
            f"{target}/{name}: read back other bytes than were written; the disk or file system is failing"
        )
    progress(len(data))
