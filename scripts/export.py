"""``tailcache export``: a teacher's targets for other tools, as Parquet or a `datasets` folder with a dataset card."""

from __future__ import annotations

from tailcache.pipeline.export_config import ExportConfig

__all__ = ["run"]


def run(config: ExportConfig) -> None:
    """Export, and say what was written.

    Raises:
      TailcacheError: the cache cannot be read, or the place cannot be written.
    """
    from tailcache.pipeline.export import export

    report = export(config)
    for name, split in report.splits.items():
        print(
            f"{name}: {split.examples:,} examples, {split.tokens:,} tokens, {split.positions:,} positions with a "
            f"target; the teacher's perplexity {split.perplexity:.4g}, mean tail mass {split.mean_tail_mass:.4g}"
        )
    print(f"wrote {sum(report.files.values()):,} bytes in {len(report.files)} files to {report.out}; see its README.md")
    if config.license == "unknown":
        print("the dataset card says that the licence is unknown; --license states it")
