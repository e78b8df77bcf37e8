"""``tailcache compare``: teachers against the text and against each other, from their caches alone."""

from __future__ import annotations

import json

from tailcache.pipeline.config import CompareConfig

__all__ = ["run"]


def run(config: CompareConfig) -> None:
    """Compare, print the table and write the files that were asked for.

    Raises:
      TailcacheError: a cache or teacher cannot be read, the corpora differ, or a file cannot be written.
    """
    from tailcache.pipeline.compare import compare
    from tailcache.pipeline.compare_report import comparison_html, comparison_text
    from tailcache.storage.durable import make_folder, write_file

    comparison = compare(config)
    print(comparison_text(comparison))
    written = []
    if config.json is not None:
        make_folder(config.json.parent)
        text = json.dumps(comparison.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_file(config.json, text.encode() + b"\n")
        written.append(config.json)
    if config.plots is not None or config.html is not None:
        from tailcache.pipeline.plots import comparison_plots

        plots = comparison_plots(comparison)
        if config.plots is not None:
            make_folder(config.plots)
            for name, png in plots.items():
                write_file(config.plots / f"{name}.png", png)
                written.append(config.plots / f"{name}.png")
        if config.html is not None:
            make_folder(config.html.parent)
            write_file(config.html, comparison_html(comparison, plots).encode())
            written.append(config.html)
    if written:
        print(f"\nwrote {', '.join(map(str, written))}")
