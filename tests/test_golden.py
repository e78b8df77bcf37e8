"""Every format version that was ever released stays readable, value for value."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_values import decoded

from tailcache.storage.corpus import CORPUS_VERSION
from tailcache.storage.layout import TARGETS_VERSION
from tailcache.storage.reader import open_cache
from tailcache.storage.verify import verify

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name.startswith("v"))


def test_the_version_that_is_written_has_a_golden_cache() -> None:
    assert f"v{CORPUS_VERSION}" == f"v{TARGETS_VERSION}" == VERSIONS[-1]


@pytest.mark.parametrize("version", VERSIONS)
def test_decodes_to_the_recorded_values(version: str) -> None:
    expected = json.loads((GOLDEN / f"{version}.json").read_text())
    found = decoded(GOLDEN / version)
    assert found.keys() == expected.keys()
    for group in ("rows", "targets"):
        assert found[group].keys() == expected[group].keys()
        for field, values in expected[group].items():
            if field == "logprobs":  # exponentials and logarithms differ in the last bit between processors
                np.testing.assert_allclose(found[group][field], values, rtol=1e-6, atol=1e-7)
            else:
                assert found[group][field] == values, field
    for key in ("corpus_hash", "teacher_hash", "target_offsets", "token_counts", "mean_tail"):
        assert found[key] == expected[key], key


@pytest.mark.parametrize("version", VERSIONS)
def test_is_whole(version: str) -> None:
    assert verify(GOLDEN / version) == []
    teacher = open_cache(GOLDEN / version).teacher("golden")
    assert abs(float(teacher.mean_tail.sum()) - 1) < 1e-6
