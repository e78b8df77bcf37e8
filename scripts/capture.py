"""``tailcache capture``: run a teacher once over the corpus."""

from __future__ import annotations

from tailcache.pipeline.config import CaptureConfig

__all__ = ["run"]


def run(config: CaptureConfig) -> None:
    """Capture, then say what was done."""
    from tailcache.pipeline.capture import capture

    report = capture(config)
    if report.resumed_shards:
        print(f"continued after {report.resumed_shards} of {report.num_shards} committed shards")
    if report.other_shards:
        print(f"{report.other_shards} of {report.num_shards} shards were captured by other processes meanwhile")
    rate = report.positions / report.seconds if report.seconds else 0.0
    print(
        f"captured {config.name}: {report.positions:,} positions in {report.seconds:.1f} s ({rate:,.0f} positions/s), "
        f"{report.bytes_per_position:.1f} bytes/position, {report.num_shards} shards"
    )
    print(report.logits)
