"""Several readers of one cache share what the system keeps of its files: none holds a copy of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from storage_fixtures import make_corpus, make_exact, make_head

READER = """
import sys
from tailcache.storage.reader import open_cache
teacher = open_cache(sys.argv[1]).teacher("t")
def memory(of):
    [line] = [line for line in open("/proc/self/status") if line.startswith(of)]
    return int(line.split()[1]) << 10
def read(row):
    return len(teacher.row(row, optional=("hidden",))), len(teacher.corpus.rows(row, row + 1).tokens)
read(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
before = memory("VmRSS")
positions = sum(read(row)[0] for row in range(teacher.num_rows))
grown = memory("VmHWM") - before
whole = teacher.place.read("hidden/c/0/0")
print(positions, grown, memory("VmHWM") - before)
"""
PROCESSES, ROWS, LENGTH, WIDTH = 3, 130, 500, 512


@pytest.mark.slow
def test_many_processes_read_a_shard_in_memory_that_does_not_grow_with_it(tmp_path: Path) -> None:
    """Memory of their own is a few chunks, far less than the shard that all of them read whole."""
    head = make_head(37, WIDTH)
    corpus = make_corpus(tmp_path, lengths=(LENGTH,) * ROWS)
    make_exact(corpus, shard_positions=1 << 20, chunk=512, hidden="bf16", head=head).write("t")
    shard_bytes = (tmp_path / "teachers" / "t" / "hidden" / "c" / "0" / "0").stat().st_size
    assert shard_bytes > 20 << 20
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    for reader in readers:
        output, _ = reader.communicate(timeout=200)
        assert reader.returncode == 0
        positions, grown, with_a_copy = map(int, output.split())
        assert positions == corpus.num_targets
        assert grown < shard_bytes / 3
        assert with_a_copy > shard_bytes * 0.9, "what is measured would have shown a copy"
