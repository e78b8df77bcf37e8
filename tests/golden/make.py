"""Write the golden cache of format version 1 and the values it must decode to, for ever.

Run once per format version, from the repository's root: ``python tests/golden/make.py``. Never run it to make a failing
test pass: that a later version reads the files of an earlier one is what the golden cache is there to prove.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from golden_values import decoded  # noqa: E402
from storage_fixtures import log_softmax, summarise  # noqa: E402

from tailcache.storage.corpus import CORPUS_VERSION, CorpusWriter  # noqa: E402
from tailcache.storage.layout import TARGETS_VERSION  # noqa: E402
from tailcache.storage.targets import TargetsWriter, plan_layout  # noqa: E402

VOCAB_SIZE, TOP_K, NUM_SAMPLES = 12, 5, 2
# (tokens, first tokens of documents, tokens that are not wanted, held out)
ROWS: list[tuple[list[int], list[int], list[int], bool]] = [
    ([3, 1, 4, 1, 5], [0], [], False),
    ([9, 2, 6, 5, 3, 5], [0, 3], [2], False),
    ([8], [0], [], False),
    ([9, 7, 9, 3], [], [], True),
    ([2, 3, 8], [0], [], False),
]


def main() -> None:
    """Write both."""
    name = f"v{CORPUS_VERSION}"
    assert CORPUS_VERSION == TARGETS_VERSION
    cache = HERE / name
    shutil.rmtree(cache, ignore_errors=True)
    with CorpusWriter(cache, vocab_size=VOCAB_SIZE) as writer:
        for tokens, starts, unwanted, held_out in ROWS:
            flags = np.zeros((2, len(tokens)), np.bool_)
            flags[0, starts] = True
            flags[1] = True
            flags[1, unwanted] = False
            writer.append(np.array(tokens), flags[0], flags[1], held_out=held_out)
        corpus = writer.finish(
            tokenizer_files={"tokenizer.json": b"{}\n"},
            tokenizer={"fingerprint": {}, "vocab_size": VOCAB_SIZE},
            source={"kind": "golden"},
            recipe={},
            report={},
        )
    layout = plan_layout(corpus, top_k=TOP_K, num_samples=NUM_SAMPLES, shard_positions=6, chunk=4)
    generator = np.random.default_rng(1)
    logits = np.round(generator.normal(size=(corpus.num_targets, VOCAB_SIZE)) * 3)  # rounded, so that there are ties
    logprobs = log_softmax(logits)
    rows = corpus.rows(0, corpus.num_rows)
    following = rows.tokens[np.flatnonzero(rows.supervised) + 1]
    offsets = corpus.target_offsets(0, corpus.num_rows)
    with TargetsWriter(corpus, "golden", layout=layout, settings={"made_by": "tests/golden/make.py"}) as targets_writer:
        for shard in range(layout.num_shards):
            first, last = layout.shard_rows(shard)
            part = slice(int(offsets[first]), int(offsets[last]))
            targets_writer.write_shard(
                shard, *summarise(logprobs[part], following[part], TOP_K, NUM_SAMPLES, seed=shard)
            )
        targets_writer.finish()
    (cache / "teachers" / "golden.lock").unlink()
    (HERE / f"{name}.json").write_text(json.dumps(decoded(cache), indent=1) + "\n")


if __name__ == "__main__":
    main()
