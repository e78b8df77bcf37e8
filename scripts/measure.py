"""What every benchmark here shares: its command line, medians, the conditions of a run, and bars that can fail.

Machines are noisy, so a figure is a median of several runs, and what is claimed is a ratio of two things measured in
turn in one run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import random
import resource
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tailcache.scripts.flags import parse_flags
from tailcache.storage.errors import ConfigError, TailcacheError
from tailcache.trainers.processors import num_processors

__all__ = ["Bar", "benchmark", "conditions", "control_seconds", "peak_mib", "report", "reset_peak", "spread"]

Settings = TypeVar("Settings")


def benchmark(
    name: str,
    settings: type[Settings],
    bench: Callable[[Settings], object],
    text: str,
    *,
    may_be_zero: Collection[str] = (),
) -> None:
    """The command line of a benchmark: read its settings, look at them, and measure.

    Where a setting is wrong, or what it names, one line says so and the exit status is 2; 1 is a missed bar.

    Args:
      name: of the benchmark.
      settings: a dataclass; its numbers are to be positive.
      bench: measures and reports.
      text: what ``--help`` says.
      may_be_zero: settings that can be 0.
    """
    try:
        config = parse_flags(settings, sys.argv[1:], prog=name, description=text, default=None)
        for setting, value in vars(config).items():
            _check_numbers(setting, value, may_be_zero=setting in may_be_zero)
        bench(config)
    except TailcacheError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)


def _check_numbers(setting: str, value: object, *, may_be_zero: bool) -> None:
    """Refuse a setting that is a number, or has one in it, which cannot be a count, a share or a time."""
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if not 0 <= number < math.inf or (number == 0 and not may_be_zero):
            expected = "a number of at least 0" if may_be_zero else "a number above 0"
            raise ConfigError(f"--{setting.replace('_', '-')}: expected {expected}, found {number}")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure that has to be met."""

    name: str
    value: float
    limit: float
    at_most: bool

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        sign = "at most" if self.at_most else "at least"
        return f"{self.name}: {self.value:.4g}, bar {sign} {self.limit:.4g}: {'met' if self.met else 'MISSED'}"


def conditions() -> dict[str, Any]:
    """Where the figures were measured: processor, cores, versions, and the card if there is one."""
    import numpy
    import zarr

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    found: dict[str, Any] = {
        "processor": processor,
        "cores": num_processors(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "zarr": zarr.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }
    if "torch" in sys.modules:
        import torch

        found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def reset_peak() -> None:
    """Forget this process' peak memory so far, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory of this process since ``reset_peak``, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def control_seconds() -> float:
    """What a fixed piece of work takes on all processors at once: it varies with what else the machine has to do.

    A processor may be one half of a core whose other half serves somebody else, which no load average shows.
    """
    packed = _packed_control()
    start = time.perf_counter()
    threads = [threading.Thread(target=zlib.decompress, args=(packed,)) for _ in range(num_processors())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


@lru_cache(maxsize=1)
def _packed_control() -> bytes:
    return zlib.compress(bytes(random.Random(0).choices(range(40), k=1 << 18)) * 24, 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def report(name: str, figures: dict[str, Any], bars: Sequence[Bar], *, json_path: Path | None, check: bool) -> None:
    """Print figures and bars, write them as JSON, and exit with status 1 where ``check`` is set and a bar is missed."""
    where = conditions()
    record: dict[str, Any] = {"benchmark": name, "figures": figures, "conditions": where}
    record["bars"] = [
        {"name": b.name, "value": b.value, "limit": b.limit, "at_most": b.at_most, "met": b.met} for b in bars
    ]
    print(json.dumps(figures, indent=1))
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    for bar in bars:
        print(bar)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1) + "\n")
    missed = [bar.name for bar in bars if not bar.met]
    if check and missed:
        print(f"{name}: missed {', '.join(missed)}", file=sys.stderr)
        sys.exit(1)
