"""Settings of the whole suite."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from real_teacher import smollm2_folder
from s3_server import faults, s3_server, s3_url

__all__ = ["faults", "s3_server", "s3_url", "smollm2_folder"]

Tally = Callable[[str, int], None]

# Tiny models gain nothing from threads, and lose a lot to each other's where the suite shares two cores.
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def temporary_files_in_memory(folder: str = "/dev/shm", room: int = 4 << 30) -> None:
    """Let ``tmp_path`` lie in memory where there is room: the tests make and delete some hundred thousand files."""
    if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= room:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", folder)


temporary_files_in_memory()


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: the collector of garbage, and the pages of forked processes, skip them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Where a test asks for more threads, those of the next module do without them."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def tally(record_property: Callable[[str, Any], None]) -> Tally:
    """Say how many faults of a kind a test has injected; the sums are printed at the end of a run."""

    def add(kind: str, number: int) -> None:
        record_property("tally", [kind, number])

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the sums of ``tally``, those of other processes too."""
    sums: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "call":
            for name, value in report.user_properties:
                if name == "tally":
                    sums[value[0]] += value[1]
    if sums:
        terminalreporter.section("faults injected")
        for kind, number in sorted(sums.items()):
            terminalreporter.write_line(f"{number:8,} {kind}")
