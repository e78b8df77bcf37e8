"""The fast path of reading equals zarr-python's own, slice by slice, and refuses what that refuses."""

from pathlib import Path

import numpy as np
import pytest
from faults import flip
from storage_fixtures import make_corpus, make_exact

from tailcache.storage.arrays import open_array, read_slice
from tailcache.storage.compiled import SWITCH
from tailcache.storage.errors import ConfigError, CorruptError
from tailcache.storage.local_place import LocalPlace
from tailcache.storage.objects import read_object
from tailcache.storage.rust_codecs import SWITCH as RUST_SWITCH


@pytest.mark.parametrize("loops", ["never", "always"])
@pytest.mark.parametrize(
    ("vocab_size", "top_k", "num_samples", "chunk"), [(37, 5, 3, 4), (37, 1, 1, 1), (70_000, 7, 0, 5)]
)
def test_equals_zarr(
    tmp_path: Path,
    vocab_size: int,
    top_k: int,
    num_samples: int,
    chunk: int,
    loops: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if loops == "always":
        pytest.importorskip("numba")
    monkeypatch.setenv(SWITCH, loops)
    exact = make_exact(make_corpus(tmp_path, vocab_size=vocab_size), top_k=top_k, num_samples=num_samples, chunk=chunk)
    exact.write("t")
    folder = tmp_path / "teachers" / "t"
    for name, spec in exact.layout.fields().items():
        array = open_array(folder / name)
        for shard in range(exact.layout.num_shards):
            base = shard * exact.layout.shard_slots
            num = len(exact.shards[shard][0])
            slow = read_slice(array, base, base + num, lambda: "here")
            for first in range(0, num + 1, 2):
                for last in range(first, num + 1, 3):
                    fast = read_object(LocalPlace(folder), spec.object_path(shard), spec, first, last, "here")
                    assert fast.dtype == slow.dtype
                    assert fast.shape == slow[first:last].shape
                    np.testing.assert_array_equal(fast, slow[first:last])
                    assert fast.flags.c_contiguous or (loops == "never" and fast.flags.f_contiguous)


@pytest.mark.parametrize("switch", [SWITCH, RUST_SWITCH])
def test_a_wrong_setting_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    exact = make_exact(make_corpus(tmp_path), chunk=4)
    exact.write("t")
    spec = exact.layout.fields()["logprob_gaps"]
    monkeypatch.setenv(switch, "sometimes")
    with pytest.raises(ConfigError, match=f"^{switch}: expected auto, always or never, found 'sometimes'"):
        read_object(LocalPlace(tmp_path / "teachers" / "t"), spec.object_path(0), spec, 0, 4, "here")


@pytest.mark.slow
def test_every_flipped_byte_of_what_is_read_is_refused(tmp_path: Path) -> None:
    exact = make_exact(make_corpus(tmp_path), chunk=4)
    exact.write("t")
    for name in ("logprob_gaps", "tail_logit"):
        spec = exact.layout.fields()[name]
        path = tmp_path / "teachers" / "t" / spec.object_path(0)
        data = path.read_bytes()
        num = len(exact.shards[0][0])
        for offset in range(len(data)):
            flip(path, offset, 1 << offset % 8)
            with pytest.raises(CorruptError, match=r"here: .* cannot be decoded"):
                read_object(LocalPlace(path.parent), path.name, spec, 0, num, "here")
            path.write_bytes(data)
        for cut in range(0, len(data), 7):
            path.write_bytes(data[:cut])
            with pytest.raises(CorruptError, match=r"here: .* cannot be decoded"):
                read_object(LocalPlace(path.parent), path.name, spec, 0, num, "here")
        path.unlink()
        with pytest.raises(CorruptError, match=r"here: .* cannot be decoded"):
            read_object(LocalPlace(path.parent), path.name, spec, 0, num, "here")


def test_slots_that_are_not_stored_are_refused(tmp_path: Path) -> None:
    """Behind the last value there is nothing; asking for it is damage, not zeros."""
    exact = make_exact(make_corpus(tmp_path, lengths=(30, 3)), top_k=2, num_samples=0, shard_positions=1, chunk=4)
    exact.write("t")
    spec = exact.layout.fields()["tail_logit"]
    with pytest.raises(CorruptError, match="chunk 1 is not stored"):
        read_object(LocalPlace(tmp_path / "teachers" / "t"), spec.object_path(1), spec, 0, 8, "here")
