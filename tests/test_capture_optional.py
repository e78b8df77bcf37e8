"""Optional fields from the teacher to the reader: the right values at the right positions, and nothing without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capture_fixtures import (
    config,
    document_logits,
    pack,
    random_documents,
    tiny_model,
    write_corpus,
)

from tailcache.pipeline.capture import capture
from tailcache.pipeline.teacher import Teacher
from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.reader import open_cache
from tailcache.storage.verify import verify

V = 100
DOCUMENTS = random_documents(40, vocab_size=V, seed=1)
TEMPERATURES = (2.0, 0.5, 10.0)


def run(cache: Path, teacher: Teacher, **changes: Any) -> Any:
    return capture(config(cache, **changes), teacher=teacher, show_progress=False)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(tiny_model("llama", V), vocab_size=V)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "cache", pack(DOCUMENTS, 3), vocab_size=V)
    return tmp_path / "cache"


# -- other temperatures --------------------------------------------------------------------------------------------


def test_the_partition_function_at_other_temperatures(cache: Path, teacher: Teacher) -> None:
    """Stored tail and stored head give log sum p^(1/tau) over the vocabulary, and both parts of it."""
    run(cache, teacher, temperatures=TEMPERATURES)
    found = open_cache(cache).teacher("t")
    assert found.temperatures == TEMPERATURES
    assert found.manifest["layout"]["temperatures"] == list(TEMPERATURES)
    targets = found.rows(0, found.corpus.num_rows, optional=["log_z_tail"])
    logits = document_logits(teacher.model, DOCUMENTS, V)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    beyond = logprobs.copy()
    np.put_along_axis(beyond, targets.token_ids.astype(np.int64), -np.inf, axis=1)
    assert targets.log_z_tail.shape == (len(logits), 3)
    for i, tau in enumerate(TEMPERATURES):
        tail = np.logaddexp.reduce(beyond / tau, axis=1)
        np.testing.assert_allclose(targets.log_z_tail[:, i], tail, rtol=2.0**-13, atol=1e-4)
        head = np.logaddexp.reduce(targets.logprobs.astype(np.float64) / tau, axis=1)
        whole = np.logaddexp(head, targets.log_z_tail[:, i])
        expected = np.logaddexp.reduce(logprobs / tau, axis=1)
        # The head's log-probs are off by up to an eighth of a nat, divided by tau; on average hardly at all.
        assert np.abs(whole - expected).max() < 0.15 / tau
        assert np.abs(whole - expected).mean() < 0.01 / tau
    assert verify(cache) == []


def test_without_options_nothing_is_stored_or_said(cache: Path, teacher: Teacher) -> None:
    run(cache, teacher)
    found = open_cache(cache).teacher("t")
    assert (found.temperatures, found.optional) == ((), ())
    folder = cache / "teachers" / "t"
    assert set(found.manifest["layout"]) == {
        "format", "format_version", "vocab_size", "top_k", "num_samples", "num_levels", "num_rows", "num_positions",
        "rows_per_shard", "shard_slots", "chunk", "compression_level",
    }  # fmt: skip
    assert not {"temperatures", "hidden"} & set(found.manifest["provenance"]["config"])
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "token_codes", "logprob_gaps", "log_tail", "tail_entropy", "log_target", "log_not_target", "tail_sample_codes",
        "vocabulary_order", "logprob_levels", "mean_tail", "commits",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"'t'.*log_z_tail, found that it was not stored.*--temperatures"):
        found.rows(0, 1, optional=["log_z_tail"])


def test_the_other_fields_are_the_same_with_options(cache: Path, teacher: Teacher) -> None:
    for name, options in (("plain", {}), ("more", {"temperatures": TEMPERATURES})):
        run(cache, teacher, name=name, **options)
    for path in sorted((cache / "teachers" / "plain").rglob("c/*")):
        if path.is_file():
            twin = cache / "teachers" / "more" / path.relative_to(cache / "teachers" / "plain")
            assert twin.read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("temperatures", "message"),
    [
        ((2.0, 0.0), "temperatures: expected numbers from 0.001 to 1000 and not 1, .* found 0"),
        ((-2.0,), "found -2"),
        ((1.0,), "not 1, which is always stored; found 1"),
        ((float("nan"),), "found nan"),
        ((float("inf"),), "found inf"),
        ((2.0, 4.0, 2.0), "expected each temperature once, found 2 4 2"),
    ],
)
def test_temperatures_that_make_no_sense(
    cache: Path, teacher: Teacher, temperatures: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(cache, teacher, temperatures=temperatures)
    assert not (cache / "teachers" / "t").exists()


def test_other_temperatures_under_the_same_name_are_refused(cache: Path, teacher: Teacher) -> None:
    run(cache, teacher, temperatures=(2.0, 4.0))
    for other, asked in (((4.0, 2.0), r"\[4.0, 2.0\]"), ((), "None")):
        with pytest.raises(MismatchError, match=rf"layout.temperatures: stored \[2.0, 4.0\], asked for {asked}"):
            run(cache, teacher, temperatures=other)
    run(cache, teacher, temperatures=(2.0, 4.0))


def test_no_tail_no_sum(cache: Path, teacher: Teacher) -> None:
    run(cache, teacher, top_k=V, num_samples=0, temperatures=(3.0,))
    targets = open_cache(cache).teacher("t").rows(0, 5, optional=["log_z_tail"])
    assert (targets.log_z_tail == -np.inf).all()
    assert verify(cache) == []
