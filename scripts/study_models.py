"""The study's tokenizer, its teacher, and the point that the students of a seed start from: plain language models.

Each is trained on the teacher's text by an ordinary loop over fixed-length pieces of it, every position once before any
twice, and ends as a plain ``transformers`` checkpoint with the tokenizer beside it. A loop that was killed goes on from
its last state, at most a minute back.

Legend: N tokens of the text, B rows, L context length.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tailcache.pipeline.precision import is_slow
from tailcache.scripts.study_settings import ModelSize, StudySize
from tailcache.scripts.study_text import END, Document
from tailcache.storage import durable
from tailcache.storage.errors import DataError
from tailcache.trainers.progress import quiet_progress

__all__ = ["encode", "language_model", "train_tokenizer"]

SAVE_SECONDS = 60.0
TOKENIZER_CHARACTERS = 8_000_000
WEIGHT_DECAY = 0.1


def train_tokenizer(documents: list[Document], vocab_size: int, folder: Path) -> Any:
    """A byte-level BPE tokenizer of exactly that vocabulary, trained on the beginning of the documents; saved once.

    Returns:
      The tokenizer, as it is read back from the folder.

    Raises:
      DataError: the text is too little for so many tokens.
    """
    if not (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        made: Any = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(_beginning(documents), trainer)
        if made.get_vocab_size() != vocab_size:
            raise DataError(
                f"tokenizer: expected {vocab_size} tokens, found text for {made.get_vocab_size()} only; read more text "
                "or ask for a smaller vocabulary"
            )
        building = folder.with_name(f"{folder.name}{durable.TEMPORARY}")
        durable.remove_tree(building)
        wrap: Any = PreTrainedTokenizerFast
        wrap(tokenizer_object=made, eos_token=END).save_pretrained(str(building))
        durable.promote_folder(building, folder)
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def _beginning(documents: list[Document]) -> Iterator[str]:
    length = 0
    for document in documents:
        if length > TOKENIZER_CHARACTERS:
            return
        length += len(document.text)
        yield document.text


def encode(tokenizer: Any, documents: list[Document]) -> list[NDArray[np.int64]]:
    """The ids of each document, with the token that ends it."""
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
    return [np.asarray([*ids, end], dtype=np.int64) for ids in encoded]


def language_model(
    name: str,
    sizes: ModelSize,
    tokens_N: NDArray[np.int64],
    tokenizer: Any,
    folder: Path,
    *,
    study: StudySize,
    positions: int,
    seed: int,
    device: str,
    show_progress: bool = True,
) -> Path:
    """Train a language model on a text, or find it trained.

    Args:
      name: for the progress bar.
      sizes: of the model.
      tokens_N: the text, its documents one after another.
      tokenizer: saved beside the model.
      folder: where the checkpoint goes; it is there if and only if training has finished. FOLDER.state holds the state
        of an unfinished run.
      study: the study's sizes.
      positions: to train on; the text is repeated if it has fewer.
      seed: of the weights and of the order of the pieces.
      device: "cpu" or "cuda".
      show_progress: draw a bar.

    Returns:
      The folder, with loss.json in it: the training loss over time.

    Raises:
      DataError: the text is shorter than one step.
    """
    if (folder / "config.json").is_file():
        return folder
    length, rows = study.context_length, study.batch_rows
    num_pieces = len(tokens_N) // length
    if num_pieces < rows:
        raise DataError(f"{name}: expected text of at least {rows * length} tokens, found {len(tokens_N)}")
    pieces_PL = torch.from_numpy(tokens_N[: num_pieces * length]).view(num_pieces, length)
    steps = max(1, positions // study.step_positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes.llama(len(tokenizer), length)))
    nn.Module.to(model, torch.device(device))
    optimizer = torch.optim.AdamW(_groups(model), lr=1.0, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    state_path = folder.with_name(f"{folder.name}.state")
    step, losses = _restore(state_path, model, optimizer)
    half = study.precision == "bf16" or (device == "cpu" and not is_slow(torch.bfloat16, torch.device(device)))
    saved = time.monotonic()
    nn.Module.train(model)
    with tqdm(total=steps, initial=step, desc=name, unit="step", disable=not show_progress) as bar:
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps, 2 * study.learning_rate, study.warmup)
            batch_BL = pieces_PL[_chosen(step, rows, num_pieces, seed)].to(device)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
                loss = model(input_ids=batch_BL, labels=batch_BL, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step += 1
            bar.update(1)
            if step % 10 == 0:
                bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
            if time.monotonic() - saved > SAVE_SECONDS:
                _save(state_path, model, optimizer, step, losses)
                saved = time.monotonic()
    building = folder.with_name(f"{folder.name}{durable.TEMPORARY}")
    durable.remove_tree(building)
    with quiet_progress():
        model.save_pretrained(str(building))
    tokenizer.save_pretrained(str(building))
    curve = {"positions": steps * study.step_positions, "epochs": steps * rows / num_pieces, "loss": _thinned(losses)}
    durable.write_file(building / "loss.json", json.dumps(curve).encode())
    durable.promote_folder(building, folder)
    state_path.unlink(missing_ok=True)
    return folder


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """No weight decay on norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """A linear warm-up, then a cosine to 0."""
    first = max(1, round(warmup * steps))
    if step < first:
        return peak * (step + 1) / first
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def _chosen(step: int, rows: int, num_pieces: int, seed: int) -> NDArray[np.int64]:
    """The pieces of a step: a fresh permutation for every pass, cut into steps; what is left over is not used."""
    per_pass = num_pieces // rows
    epoch, index = divmod(step, per_pass)
    order = np.random.default_rng((seed, epoch)).permutation(num_pieces)
    return order[index * rows : (index + 1) * rows]


def _thinned(losses: list[float], points: int = 60) -> list[float]:
    return [float(np.mean(part)) for part in np.array_split(np.asarray(losses), min(points, len(losses)))]


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, losses: list[float]) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "losses": losses}
    written = io.BytesIO()
    torch.save(state, written)
    durable.write_file(path, written.getvalue())


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
    if not path.is_file():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), list(state["losses"])
