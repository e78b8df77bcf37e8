"""``tailcache evaluate``: a student on held-out text, and against a cached teacher."""

from __future__ import annotations

import json

from tailcache.trainers.evaluate_config import EvaluateConfig

__all__ = ["run"]


def run(config: EvaluateConfig) -> None:
    """Evaluate, print the tables and write the files that were asked for.

    Raises:
      TailcacheError: the cache or the student cannot be read, they do not fit, or a file cannot be written.
    """
    from tailcache.scripts.evaluate_report import evaluation_plots, evaluation_text
    from tailcache.scripts.slow_products import warn_of_slow_products
    from tailcache.storage.durable import make_folder, write_file
    from tailcache.trainers.evaluate_run import evaluate

    warn_of_slow_products(config.precision, config.device)
    found = evaluate(config)
    text = evaluation_text(found)
    print(text)
    written = []
    if config.json is not None:
        make_folder(config.json.parent)
        record = json.dumps(found.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_file(config.json, record.encode() + b"\n")
        written.append(config.json)
    if config.plots is not None:
        from tailcache.pipeline.tables import page

        plots = evaluation_plots(found)
        make_folder(config.plots)
        for name, png in plots.items():
            write_file(config.plots / f"{name}.png", png)
            written.append(config.plots / f"{name}.png")
        html = config.plots / "evaluation.html"
        write_file(html, page(f"tailcache evaluate: {config.student}", text, plots).encode())
        written.append(html)
    if written:
        print(f"\nwrote {', '.join(map(str, written))}")
