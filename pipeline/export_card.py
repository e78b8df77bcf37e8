"""The README.md of an export: a dataset card that says what is in it, how sure that is, and how to load it.

Its Python snippets run as they are once ``folder`` says where the export lies; the tests run them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from tailcache.pipeline.export_columns import AXOLOTL_COLUMNS, NO_LOGPROB, ExportColumns
from tailcache.pipeline.export_config import ExportConfig
from tailcache.storage.codec import Targets

__all__ = ["CardFacts", "SplitFacts", "dataset_card"]

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"))  # fmt: skip
_MEANINGS = {
    "input_ids": "token ids",
    "attention_mask": "1 everywhere: nothing is padded",
    "labels": "the same ids, not shifted; -100 where a token is not to be predicted",
    "target_token_ids": "per token, the ids of the {top_k} most likely next tokens, most likely first",
    "target_logprobs": "their log-probabilities (natural logs, temperature 1) under the teacher's whole distribution: "
    "not renormalised, so that exp of them and of log_tail sum to 1",
    "target_mask": "1 where there is a target, 0 where there is none; {top_k} equal numbers per token",
    "position_ids": "position within its own document; attention may not cross from one document to the next",
    "log_tail": "log of the mass of all other tokens, exact",
    "tail_entropy": "entropy, in nats, of the other tokens' distribution, normalised, exact",
    "log_target": "log-probability of the true next token",
    "log_not_target": "log of one minus that probability",
    "tail_samples": "{num_samples} draws, with repetition, from the other tokens in proportion to their probability: "
    "each stands for exp(log_tail)/{num_samples} of mass, and what is linear in them is unbiased",
    "log_z_tail": "log of the sum of p^(1/tau) over the other tokens, for tau = {temperatures}",
    "document_start": "the token is the first of its document (a document that spans rows has one start)",
    "row": "the row of the corpus that the example is from",
    "offset": "where in that row the example begins, in tokens",
}


@dataclass
class SplitFacts:
    """What was counted of one split on the way."""

    examples: int = 0
    tokens: int = 0
    positions: int = 0
    log_target: float = 0.0
    tail_mass: float = 0.0

    def add(self, examples: pa.RecordBatch, targets: Targets) -> None:
        """Count some examples and their targets."""
        self.examples += examples.num_rows
        self.tokens += pc.sum(pc.list_value_length(examples.column("input_ids"))).as_py() or 0
        self.positions += len(targets)
        self.log_target += float(targets.log_target.sum(dtype=np.float64))
        self.tail_mass += float(np.exp(targets.log_tail.astype(np.float64)).sum())

    @property
    def perplexity(self) -> float:
        """The teacher's, on the true next tokens."""
        return math.exp(-self.log_target / self.positions) if self.positions else math.nan

    @property
    def mean_tail_mass(self) -> float:
        """Mass beyond the kept tokens, mean over positions."""
        return self.tail_mass / self.positions if self.positions else math.nan


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that the card says."""

    config: ExportConfig
    teacher: str
    teacher_hash: str
    manifest: dict[str, Any]
    corpus_hash: str
    corpus_manifest: dict[str, Any]
    columns: ExportColumns
    source_top_k: int
    temperatures: tuple[float, ...]
    splits: dict[str, SplitFacts]
    data_bytes: int


def dataset_card(facts: CardFacts) -> str:
    """The card, as Markdown with a YAML header."""
    teacher = str(facts.manifest.get("provenance", {}).get("teacher") or facts.teacher)
    sections = [
        _header(facts),
        f"# Next-token distributions of {teacher}",
        f"What the teacher `{teacher}` expects after each token of a text: its {facts.columns.top_k} most likely next "
        "tokens with their probabilities"
        + (", and what is known of the others" if facts.columns.extras else "")
        + ". For knowledge distillation: a student is trained on these without running the teacher. Written by "
        "`tailcache export` from a tailcache cache.",
        _license_note(facts),
        _statistics(facts),
        _columns(facts),
        _alignment(facts),
        _loading(facts),
        _axolotl(facts),
        _pytorch(facts),
        _making(facts),
        _fingerprints(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(facts: CardFacts) -> str:
    examples = sum(split.examples for split in facts.splits.values())
    size = next((name for limit, name in _SIZES if examples < limit), "n>10B")
    pattern = "data/{0}-*.parquet" if facts.config.format == "parquet" else "{0}/data-*.arrow"
    files = [{"split": name, "path": pattern.format(name)} for name in facts.splits]
    configs: list[dict[str, Any]] = [{"config_name": "default", "data_files": files}]
    if _has_axolotl_config(facts):
        configs.append({"config_name": "axolotl", "data_files": files, "columns": list(AXOLOTL_COLUMNS)})
    header: dict[str, Any] = {
        "license": facts.config.license,
        **({"language": list(facts.config.language)} if facts.config.language else {}),
        "task_categories": ["text-generation"],
        "tags": ["knowledge-distillation", "logprobs", "tailcache"],
        "size_categories": [size],
        "configs": configs,
    }
    return "---\n" + yaml.dump(header, sort_keys=False, Dumper=_PlainDumper) + "---"


class _PlainDumper(yaml.SafeDumper):
    """YAML without references to what was said before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _has_axolotl_config(facts: CardFacts) -> bool:
    """A second configuration with Axolotl's columns alone; only Parquet files can be read in part."""
    return facts.config.format == "parquet" and set(facts.columns.schema().names) != set(AXOLOTL_COLUMNS)


def _license_note(facts: CardFacts) -> str:
    if facts.config.license != "unknown":
        return ""
    return (
        "**Licence: not stated.** Whoever exported this gave no `--license`. The licences of the text and of the "
        "teacher both bear on it; find out before you share it."
    )


def _statistics(facts: CardFacts) -> str:
    lines = [
        "## Statistics",
        "",
        "| split | examples | tokens | positions with a target | teacher's perplexity | mean tail mass |",
        "|---|---|---|---|---|---|",
    ]
    for name, split in facts.splits.items():
        lines.append(
            f"| {name} | {split.examples:,} | {split.tokens:,} | {split.positions:,} | {split.perplexity:.4g} | "
            f"{split.mean_tail_mass:.4g} |"
        )
    held_out = "`test` holds the documents that were held out of training." if "test" in facts.splits else ""
    lines += [
        "",
        f"{facts.data_bytes:,} bytes. An example is "
        + (
            "a document, or its part within one row of the corpus: what the teacher saw at a time."
            if facts.columns.unit == "document"
            else "a row of the corpus, which may hold several documents; the teacher saw each by itself."
        )
        + f" The tail mass is what lies beyond the {facts.columns.top_k} kept tokens. {held_out}".rstrip(),
    ]
    return "\n".join(lines)


def _columns(facts: CardFacts) -> str:
    schema = facts.columns.schema()
    values = {
        "top_k": facts.columns.top_k,
        "num_samples": facts.columns.num_samples,
        "temperatures": ", ".join(f"{tau:g}" for tau in facts.temperatures),
    }
    lines = ["## Columns", "", "L is the number of tokens of an example.", "", "| column | type | |", "|---|---|---|"]
    second = {
        "target_token_ids": facts.columns.top_k,
        "target_logprobs": facts.columns.top_k,
        "target_mask": facts.columns.top_k,
        "tail_samples": facts.columns.num_samples,
        "log_z_tail": facts.columns.num_temperatures,
    }
    for field in schema:
        kind = field.type
        shape = "" if not pa.types.is_list(kind) else f"[L, {second[field.name]}] " if field.name in second else "[L] "
        while pa.types.is_list(kind):
            kind = kind.value_type
        kind = "float32" if pa.types.is_float32(kind) else kind
        lines.append(f"| `{field.name}` | {shape}{kind} | {_MEANINGS[field.name].format(**values)} |")
    lines += [
        "",
        f"Where there is no target, ids are 0, `target_logprobs` {NO_LOGPROB:g} and other numbers 0.",
    ]
    return "\n".join(lines)


def _alignment(facts: CardFacts) -> str:
    return f"""## Alignment

Entry `j` of `target_token_ids` and `target_logprobs`{" (and of the other columns with an entry per token)" * facts.columns.extras} is the teacher's distribution
after reading `input_ids[0]` to `input_ids[j]`{"" if facts.columns.unit == "document" else " (of the same document)"}, about the token `input_ids[j + 1]`. A causal model's logits at `j` are about the same token:
compare them without any shift. `target_mask[j]` is 0 where `labels[j + 1]` is -100, and for the last token, which has no next one."""  # noqa: E501


def _loading(facts: CardFacts) -> str:
    split = next(iter(facts.splits))
    load = 'load_dataset(folder, split="' + split + '")'
    if facts.config.format == "datasets":
        return f"""## Loading

```python
from datasets import load_from_disk

folder = "path/to/this/folder"
dataset = load_from_disk(folder)["{split}"]  # mapped into memory; {load} works too
example = dataset[0]
```"""
    return f"""## Loading

```python
from datasets import load_dataset

folder = "path/to/this/folder"  # or its name on the hub
dataset = {load}  # streaming=True reads it without a copy
example = dataset[0]
```"""


def _axolotl(facts: CardFacts) -> str:
    name = "\n    name: axolotl" if _has_axolotl_config(facts) else ""
    if facts.config.format == "datasets" and set(facts.columns.schema().names) != set(AXOLOTL_COLUMNS):
        return (
            "## Axolotl\n\nAxolotl's sample packing takes no further columns beside its own: export again with "
            "`--no-extras`, or as Parquet, where the configuration `axolotl` has its columns alone."
        )
    test = f"""
test_datasets:
  - path: path/to/this/folder{name}
    split: test""" * ("test" in facts.splits)
    warning = (
        ""
        if facts.columns.unit == "document"
        else "\n\n**Rows hold several documents.** Axolotl would let attention cross from one to the next, which the "
        "teacher did not: for Axolotl, export with `--unit document`."
    )
    train = f"""
datasets:
  - path: path/to/this/folder{name}
    split: train""" * ("train" in facts.splits)
    longest = facts.corpus_manifest.get("recipe", {}).get("context_length")
    return f"""## Axolotl

The columns are those of its KD plugin for targets made ahead of time, in the alignment it calls `current` (versions after
0.18.0; it also checks the alignment at the first batch). Without a `type`, ready token ids are taken as they are.

```yaml
base_model: a-student-with-the-same-tokenizer
plugins:
  - axolotl.integrations.kd.KDPlugin
kd_trainer: true
kd_alpha: 0.9
kd_ce_alpha: 0.1
kd_temperature: 1.0  # the log-probabilities are at temperature 1, and are not converted
kd_normalize_topk: true
kd_prepared_targets_alignment: current{train}{test}
sequence_len: {longest or 2048}
sample_packing: true
```

It compares the top {facts.columns.top_k} alone; the rest of the distribution is left to the cross-entropy (`kd_ce_alpha`).{warning}"""  # noqa: E501


def _pytorch(facts: CardFacts) -> str:
    extras = facts.columns.extras
    split = next(iter(facts.splits))
    load = (
        f'load_from_disk(folder)["{split}"]'
        if facts.config.format == "datasets"
        else f'load_dataset(folder, split="{split}")'
    )
    function = "load_from_disk" if facts.config.format == "datasets" else "load_dataset"
    masks = "Padding on the right needs no attention\nmask in a causal model."
    if facts.columns.unit == "row":
        masks = (
            "The rows hold several documents, which the teacher saw one\nby one: the model has to keep them apart, by "
            "`position_ids` or a mask of its own (in `transformers`, one row per batch and `use_cache=False`)."
        )
    wanted = ["input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask"] + ["log_tail"] * extras
    if extras:
        what = "the top K tokens and all others as one more, a lower bound of KL(teacher, student)"
        tail = """
    student_tail = student.scatter(-1, ids, -torch.inf).logsumexp(-1)
    kl += batch["log_tail"].exp() * (batch["log_tail"] - student_tail)"""
        if facts.columns.top_k == facts.corpus_manifest.get("vocab_size"):
            what, tail = "KL(teacher, student)", ""
    else:
        what, tail = "the top K tokens' part of KL(teacher, student)", ""
    return f"""## Plain PyTorch

{what[0].upper()}{what[1:]}:

```python
import torch
from datasets import {function}

folder = "path/to/this/folder"
dataset = {load}.with_format("torch")
PADDING = {{"labels": -100, "target_logprobs": {NO_LOGPROB:g}}}
COLUMNS = {wanted}


def collate(examples):
    \"\"\"Pad on the right; every column keeps its own alignment.\"\"\"
    pad = torch.nn.utils.rnn.pad_sequence
    return {{
        name: pad([example[name] for example in examples], batch_first=True, padding_value=PADDING.get(name, 0))
        for name in COLUMNS
    }}


def distillation_loss(logits, batch):
    \"\"\"Nats per position with a target; logits [examples, tokens, vocabulary], not shifted.\"\"\"
    student, ids = logits.float().log_softmax(-1), batch["target_token_ids"].long()
    student_K, teacher_K = student.gather(-1, ids), batch["target_logprobs"]
    kl = (teacher_K.exp() * (teacher_K - student_K)).sum(-1){tail}
    has_target = batch["target_mask"][..., 0].bool()
    return kl[has_target].mean()


loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=collate)
```

Then `distillation_loss(model(batch["input_ids"]).logits, batch)` for each `batch` of the loader. {masks}"""


def _making(facts: CardFacts) -> str:
    provenance, settings = facts.manifest.get("provenance", {}), facts.manifest.get("settings", {})
    layout = facts.manifest.get("layout", {})
    steps = layout.get("scalar_steps")
    lines = ["## How it was made", ""]
    rows = {
        "teacher": provenance.get("teacher"),
        "revision": provenance.get("revision"),
        "precision": settings.get("dtype"),
        "logits": provenance.get("logits"),
        "kept by the cache": f"K = {facts.source_top_k}; exported K = {facts.columns.top_k}",
        "draws from the tail": _draws(facts, settings),
        "text": facts.corpus_manifest.get("source"),
        "packing": facts.corpus_manifest.get("recipe"),
        "tokenizer": {k: v for k, v in facts.corpus_manifest.get("tokenizer", {}).items() if k != "fingerprint"},
        "derived": provenance.get("derived"),
    }
    for name, value in rows.items():
        if value not in (None, {}, []):
            lines.append(f"- **{name}**: {_plain(value)}")
    lines += [
        "",
        "Text was tokenised and laid out once; the teacher read each document by itself, once, without dropout. The "
        f"log-probabilities of the kept tokens are stored with a resolution at which the KL error is at most "
        f"{layout.get('kl_budget', 1e-5):g} nats on average over positions; the scalars "
        + (f"to {1 / steps:g} nats" if steps else "with a relative error of 2^-14")
        + "; ids are exact.",
    ]
    return "\n".join(lines)


def _draws(facts: CardFacts, settings: dict[str, Any]) -> str | None:
    if not (facts.columns.num_samples and facts.columns.extras):
        return None
    how = str(settings.get("sampling", "independent"))
    if facts.columns.top_k < facts.source_top_k:
        how += f"; drawn again for the smaller K, from the known tokens and the stored draws, seed {facts.config.seed}"
    return how


def _fingerprints(facts: CardFacts) -> str:
    tokenizer = facts.corpus_manifest.get("tokenizer", {}).get("fingerprint", {})
    hashes = {
        "corpus": facts.corpus_hash,
        "teacher's targets": facts.teacher_hash,
        "teacher's weights": facts.manifest.get("settings", {}).get("weights"),
        **{f"tokenizer, {name}": value for name, value in tokenizer.items()},
    }
    lines = ["## Fingerprints", "", "SHA-256. Equal hashes mean equal content.", "", "| of | hash |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in hashes.items() if value]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items() if each is not None)
    if isinstance(value, list):
        return "; ".join(_plain(each) for each in value)
    return f"`{value}`" if isinstance(value, str) else f"{value}"
