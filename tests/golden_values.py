"""What a golden cache decodes to, as JSON values."""

from pathlib import Path
from typing import Any

from tailcache.storage.codec import OPTIONAL
from tailcache.storage.reader import open_cache


def decoded(cache: Path) -> dict[str, Any]:
    """All that a reader gives for the golden cache, as JSON."""
    opened = open_cache(cache)
    corpus, teacher = opened.corpus, opened.teacher("golden")
    rows, targets = corpus.rows(0, corpus.num_rows), teacher.rows(0, corpus.num_rows, optional=teacher.optional)
    absent = {name for name in vars(targets) if name.startswith(tuple(set(OPTIONAL) - set(teacher.optional)))}
    return {
        "corpus_hash": corpus.hash,
        "teacher_hash": teacher.hash,
        "rows": {name: values.tolist() for name, values in vars(rows).items()},
        "target_offsets": corpus.target_offsets(0, corpus.num_rows).tolist(),
        "token_counts": corpus.token_counts.tolist(),
        "targets": {name: values.tolist() for name, values in vars(targets).items() if name not in absent},
        "mean_tail": teacher.mean_tail.tolist(),
    }
