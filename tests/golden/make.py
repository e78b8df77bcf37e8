"""Write the golden caches of the newest format version and the values they must decode to, for ever.

``v2`` has what every cache has, ``v2_optional`` all optional fields too; those of earlier versions were written by this
script as it was then. Run once per format version, from the repository's root: ``python tests/golden/make.py NAME``.
Never run it to make a failing test pass: that a later version reads the files of an earlier one is what the golden
caches are there to prove.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from golden_values import decoded  # noqa: E402
from storage_fixtures import log_softmax, make_exact, make_head, summarise  # noqa: E402

from tailcache.storage.corpus import CORPUS_VERSION, Corpus  # noqa: E402
from tailcache.storage.corpus_writer import CorpusWriter  # noqa: E402
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
SETTINGS = {"made_by": "tests/golden/make.py"}


def make_corpus(cache: Path) -> Corpus:
    """The same for all of them."""
    with CorpusWriter(cache, vocab_size=VOCAB_SIZE) as writer:
        for tokens, starts, unwanted, held_out in ROWS:
            flags = np.zeros((2, len(tokens)), np.bool_)
            flags[0, starts] = True
            flags[1] = True
            flags[1, unwanted] = False
            writer.append(np.array(tokens), flags[0], flags[1], held_out=held_out)
        return writer.finish(
            tokenizer_files={"tokenizer.json": b"{}\n"},
            tokenizer={"fingerprint": {}, "vocab_size": VOCAB_SIZE},
            source={"kind": "golden"},
            recipe={},
            report={},
        )


def write_plain(corpus: Corpus) -> None:
    """What every cache has, and classes of positions, for which so small a corpus would not be given any."""
    layout = plan_layout(
        corpus, top_k=TOP_K, num_samples=2 * NUM_SAMPLES, shard_positions=6, chunk=4, classes=(2, 4)
    )  # fmt: skip
    generator = np.random.default_rng(1)
    logits = np.round(generator.normal(size=(corpus.num_targets, VOCAB_SIZE)) * 3)  # rounded, so that there are ties
    logprobs = log_softmax(logits)
    rows = corpus.rows(0, corpus.num_rows)
    following = rows.tokens[np.flatnonzero(rows.supervised) + 1]
    offsets = corpus.target_offsets(0, corpus.num_rows)
    with TargetsWriter(corpus, "golden", layout=layout, settings=SETTINGS) as writer:
        for shard in range(layout.num_shards):
            first, last = layout.shard_rows(shard)
            part = slice(int(offsets[first]), int(offsets[last]))
            writer.write_shard(shard, *summarise(logprobs[part], following[part], TOP_K, 2 * NUM_SAMPLES, seed=shard))
        writer.finish()


def write_optional(corpus: Corpus) -> None:
    """Sums at two temperatures; hidden states under a head with all there can be: a bias, a scale and a soft cap."""
    head = make_head(VOCAB_SIZE, 6, "bfloat16", scale=0.5, soft_cap=8.0)
    exact = make_exact(
        corpus, top_k=TOP_K, num_samples=NUM_SAMPLES, shard_positions=6, chunk=4, temperatures=(2.0, 0.5),
        hidden="int8", head=head,
    )  # fmt: skip
    exact.write("golden", SETTINGS)


def main(name: str) -> None:
    """Write one and its values."""
    assert (CORPUS_VERSION, TARGETS_VERSION) == (1, 2)
    cache = HERE / name
    shutil.rmtree(cache, ignore_errors=True)
    {"v2": write_plain, "v2_optional": write_optional}[name](make_corpus(cache))
    (HERE / f"{name}.json").write_text(json.dumps(decoded(cache), indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
