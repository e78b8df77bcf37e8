"""The study's caches: one capture of its teacher, everything else derived from it; and SmolLM2's tail masses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tailcache.pipeline.config import CaptureConfig, CompareConfig, PrepareConfig
from tailcache.scripts.derive import DeriveConfig
from tailcache.scripts.embedded import docstring_corpus, smollm2
from tailcache.scripts.study_arms import CacheRecipe
from tailcache.scripts.study_settings import StudySize
from tailcache.scripts.study_text import END
from tailcache.storage.errors import MismatchError, TailcacheError
from tailcache.storage.reader import open_cache

__all__ = ["bytes_of", "make_caches", "tail_masses"]


def make_caches(out: Path, study: StudySize, recipes: tuple[CacheRecipe, ...], *, device: str, threads: int) -> None:
    """Prepare the students' rows, capture the teacher over them once, and derive the other sets of targets.

    Args:
      out: the study's folder, with text, tokenizer and teacher.
      study: its sizes.
      recipes: the sets that are wanted.
      device: of the teacher.
      threads: of the teacher.

    Raises:
      MismatchError: what is wanted cannot be derived from the capture.
    """
    from tailcache.scripts.capture import run as capture
    from tailcache.scripts.derive import run as derive
    from tailcache.scripts.prepare import run as prepare

    cache = out / "cache"
    full = CacheRecipe(top_k=study.top_k, num_samples=study.num_samples, hidden=True)
    if not _finished(cache, None):
        prepare(
            PrepareConfig(
                cache=cache,
                source=str(out / "text" / "students.jsonl"),
                tokenizer=str(out / "tokenizer"),
                text_column="text",
                separator=END,
                context_length=study.context_length,
                held_out=0.0,
                max_tokens=study.student_positions,
            )
        )
    if not _finished(cache, full.name):
        capture(
            CaptureConfig(
                cache=cache,
                teacher=str(out / "teacher"),
                name=full.name,
                top_k=full.top_k,
                num_samples=full.num_samples,
                hidden="bf16",
                dtype="float32",
                device=device,
                threads=threads,
            )
        )
    for recipe in recipes:
        if recipe.top_k > full.top_k or recipe.num_samples > full.num_samples:
            raise MismatchError(
                f"{recipe.name}: expected at most K = {full.top_k} and {full.num_samples} draws, those of the capture"
            )
        if not _finished(cache, recipe.name):
            derive(
                DeriveConfig(
                    source=cache,
                    target=cache,
                    teachers=(full.name,),
                    name=recipe.name,
                    top_k=recipe.top_k if recipe.top_k != full.top_k else None,
                    num_samples=recipe.num_samples if recipe != full else None,
                    drop=() if recipe.hidden else ("hidden",),
                )
            )


def _finished(cache: Path, name: str | None) -> bool:
    """Whether the corpus is there, or that teacher is there and complete."""
    try:
        opened = open_cache(cache)
        return name is None or opened.teacher(name) is not None
    except TailcacheError:
        return False


def bytes_of(out: Path, recipes: tuple[CacheRecipe, ...]) -> dict[str, dict[str, float]]:
    """Bytes per position of each set of targets, as they lie on disk.

    Returns:
      By name: "top_k", ids and log-probs alone, which is all that plain top-K needs; "targets", every field but the
      hidden states; "hidden", these.
    """
    from tailcache.storage.inventory import teacher_inventory

    corpus = open_cache(out / "cache").corpus
    found = {}
    for recipe in recipes:
        fields = teacher_inventory(corpus, recipe.name).bytes_per_position
        hidden = sum(size for field, size in fields.items() if field.startswith("hidden"))
        top_k = sum(fields.get(field, 0.0) for field in ("token_codes", "logprob_gaps", "position_class"))
        found[recipe.name] = {"top_k": top_k, "targets": sum(fields.values()) - hidden, "hidden": hidden}
    return found


def tail_masses(out: Path, study: StudySize, *, device: str, threads: int) -> dict[str, Any]:
    """Alpha_K by K and how often the most likely token is not the next one, with intervals over rows.

    Returns:
      By teacher, "study" and, if the study's sizes ask for it, "smollm2" (SmolLM2-135M-Instruct): positions, top_k,
      mismatch_rate, entropy, perplexity and tail_mass as `tailcache compare` gives them.
    """
    full = CacheRecipe(top_k=study.top_k, num_samples=study.num_samples, hidden=True)
    found = {"study": _compared(out / "cache", full.name, out / "tails" / "study.json")}
    if study.smollm2_tokens:
        found["smollm2"] = _smollm2(out, study, device=device, threads=threads)
    return found


def _smollm2(out: Path, study: StudySize, *, device: str, threads: int) -> dict[str, Any]:
    from tailcache.scripts.capture import run as capture
    from tailcache.scripts.prepare import run as prepare

    cache = out / "cache-smollm2"
    if not _finished(cache, None):
        prepare(docstring_corpus(cache, max_tokens=study.smollm2_tokens))
    if not _finished(cache, "smollm2"):
        capture(
            CaptureConfig(
                cache=cache,
                teacher=str(smollm2()),
                name="smollm2",
                top_k=64,
                num_samples=0,
                device=device,
                threads=threads,
                shard_positions=20_000,
            )
        )
    return _compared(cache, "smollm2", out / "tails" / "smollm2.json")


def _compared(cache: Path, name: str, path: Path) -> dict[str, Any]:
    from tailcache.pipeline.compare import compare
    from tailcache.storage import durable

    if not path.is_file():
        comparison = compare(CompareConfig(cache=cache, teachers=(name,), split="all")).to_json()
        durable.make_folder(path.parent)
        durable.write_file(path, json.dumps(comparison, indent=1).encode())
    record = json.loads(path.read_text(encoding="utf-8"))
    figures = record["teachers"][0]
    wanted = ("top_k", "mismatch_rate", "entropy", "perplexity", "tail_mass")
    return {"positions": record["positions"], **{field: figures[field] for field in wanted}}
