"""The Rust pipeline reads the same values as our own reads, and damage is damage."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import flip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from storage_fixtures import Exact, make_corpus, make_exact

from tailcache.storage import compiled, rust_codecs
from tailcache.storage.arrays import ArraySpec
from tailcache.storage.errors import ConfigError, CorruptError
from tailcache.storage.reader import open_cache
from tailcache.storage.rust_codecs import SWITCH, use_rust

pytest.importorskip("zarrs")
OPTIONAL = ("log_z_tail", "hidden")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Exact:
    return written(tmp_path_factory.mktemp("rust"))


def written(path: Path) -> Exact:
    exact = make_exact(make_corpus(path), shard_positions=15, chunk=8, temperatures=(2.0, 0.5), hidden="int8")
    exact.write("t")
    return exact


@pytest.mark.parametrize("loops", ["never", "always"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted))
def test_the_same_values(shared: Exact, monkeypatch: pytest.MonkeyPatch, loops: str, rows: list[int]) -> None:
    if loops == "always":
        pytest.importorskip("numba")
    monkeypatch.setenv(compiled.SWITCH, loops)
    found = {}
    for switch in ("always", "never"):
        monkeypatch.setenv(SWITCH, switch)
        found[switch] = open_cache(shared.corpus.cache_place).teacher("t").stored(*rows, optional=OPTIONAL)
    assert found["always"].keys() == found["never"].keys()
    for name, values in found["never"].items():
        assert values.dtype == found["always"][name].dtype
        assert values.flags.f_contiguous == found["always"][name].flags.f_contiguous or min(values.shape) < 2
        np.testing.assert_array_equal(values, found["always"][name], err_msg=name)


def test_it_is_really_used(shared: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "always")
    calls = []
    original = rust_codecs.read_chunks

    def watched(folder: Path, spec: ArraySpec, number: int, first: int, last: int) -> NDArray[Any]:
        calls.append(spec.name)
        return original(folder, spec, number, first, last)

    monkeypatch.setattr("tailcache.storage.objects.read_chunks", watched)
    open_cache(shared.corpus.cache_place).teacher("t").rows(0, 4, optional=OPTIONAL)
    assert {"token_codes", "logprob_gaps", "tail_logit", "hidden"} <= set(calls)


@pytest.mark.parametrize("field", ["token_codes", "logprob_gaps", "tail_logit"])
@pytest.mark.parametrize("damage", ["gone", "flipped", "short", "header"])
def test_damage_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, damage: str) -> None:
    """Also when it comes after the object was first looked at."""
    monkeypatch.setenv(SWITCH, "always")
    written(tmp_path)
    teacher = open_cache(tmp_path).teacher("t")
    whole = teacher.rows(0, teacher.corpus.num_rows)
    assert len(whole) == teacher.num_targets
    path = tmp_path / "teachers" / "t" / field / "c" / "1"
    path = path / "0" if path.is_dir() else path
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:20])
    else:
        flip(path, 24 if damage == "flipped" else 5)
    with pytest.raises(CorruptError, match=f"shard 1, field {field}"):
        teacher.rows(0, teacher.corpus.num_rows)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "never")
    assert not use_rust(1000)
    monkeypatch.setenv(SWITCH, "always")
    assert use_rust(1)
    monkeypatch.delenv(SWITCH)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert use_rust(16)
    assert not use_rust(15)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert not use_rust(16)
    monkeypatch.setenv(SWITCH, "on")
    with pytest.raises(ConfigError, match="expected auto, always or never, found 'on'"):
        use_rust(1)
    monkeypatch.setattr(rust_codecs, "_pipeline", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv(SWITCH, "auto")
    assert not use_rust(16)
    monkeypatch.setenv(SWITCH, "always")
    with pytest.raises(ConfigError, match="expected the package zarrs, found none"):
        use_rust(1)


def test_a_forked_process_reads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "always")
    monkeypatch.setattr(rust_codecs, "_process", -1)
    assert not use_rust(1000)
