"""Every format version that was ever released stays readable, value for value."""

import json
from pathlib import Path
from typing import Any

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
    assert CORPUS_VERSION == 1
    assert VERSIONS[-2:] == [f"v{TARGETS_VERSION}", f"v{TARGETS_VERSION}_optional"]


@pytest.mark.parametrize("version", VERSIONS)
def test_decodes_to_the_recorded_values(version: str) -> None:
    expected = json.loads((GOLDEN / f"{version}.json").read_text())
    found = decoded(GOLDEN / version)
    assert_same(found, expected)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        if isinstance(values, dict):
            assert_same(found[key], values)
        elif key in (
            "logprobs",
            "logits",
            "log_tail",
            "log_target",
            "log_not_target",
        ):  # their last bits depend on the processor
            np.testing.assert_allclose(found[key], values, rtol=1e-6, atol=1e-6)
        else:
            assert found[key] == values, key


def test_what_version_1_has_been_given_since_is_small() -> None:
    sizes = [path.stat().st_size for path in (GOLDEN / "v1_optional").rglob("*") if path.is_file()]
    assert sum(sizes) < 150_000


@pytest.mark.parametrize("version", VERSIONS)
def test_is_whole(version: str) -> None:
    assert verify(GOLDEN / version) == []
    teacher = open_cache(GOLDEN / version).teacher("golden")
    assert abs(float(teacher.mean_tail.sum()) - 1) < 1e-6
