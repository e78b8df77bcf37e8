"""Replay: a sound cache agrees with its teacher at every position, and any other cache does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_fixtures import config, pack, random_documents, save_teacher, tiny_model, write_corpus

from tailcache.pipeline import stored as stored_module
from tailcache.pipeline.capture import capture
from tailcache.pipeline.replay import Replay, replay_cache
from tailcache.pipeline.teacher import Teacher
from tailcache.scripts import cli
from tailcache.storage.errors import ConfigError, MismatchError
from tailcache.storage.reader import open_cache
from tailcache.storage.sealed import seal, unseal

V = 100
DOCUMENTS = random_documents(60, vocab_size=V, seed=1)
OPTIONS: dict[str, Any] = {"temperatures": (2.0, 0.5), "hidden": "int8"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("corpus") / "cache"
    write_corpus(cache, pack(DOCUMENTS, 3), vocab_size=V)
    return cache


@pytest.fixture
def cache(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus, tmp_path / "cache")
    return tmp_path / "cache"


def live(dtype: torch.dtype = torch.float32, **changes: Any) -> Teacher:
    return Teacher(tiny_model("llama", V, **changes).to(dtype), vocab_size=V)


def again(cache: Path, teacher: Teacher, **more: Any) -> Replay:
    return replay_cache(cache, None, live=teacher, **{"count": 150, **more})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"hidden": "bf16"}, {"top_k": V, "num_samples": 0}])
def test_a_sound_cache_agrees_with_its_teacher(cache: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    capture(config(cache, **options), teacher=live(dtype), show_progress=False)
    for seed in range(3):
        found = again(cache, live(dtype), seed=seed)
        assert found.good, [field for field in found.fields if not field.good]
        assert found.positions == 150
    names = [field.name for field in found.fields]
    assert names[:6] == ["logprobs", "token_ids", "log_tail", "tail_entropy", "log_target", "log_not_target"]
    assert ("log_z_tail at 2" in names, "hidden" in names) == ("temperatures" in options, "hidden" in options)
    assert ("tail_samples" in names) == (options.get("top_k") != V)
    log_target = next(field for field in found.fields if field.name == "log_target")
    assert 0 < log_target.mean < (2e-3 if dtype == torch.float32 else 0.1)
    assert log_target.control_largest < (1e-4 if dtype == torch.float32 else 0.2)


def test_more_positions_than_there_are(cache: Path) -> None:
    capture(config(cache), teacher=live(), show_progress=False)
    found = again(cache, live(), count=10**6)
    assert found.positions == open_cache(cache).corpus.num_targets
    assert found.good
    with pytest.raises(ConfigError, match="--replay: expected at least 1 position"):
        again(cache, live(), count=0)


@pytest.mark.parametrize(("strength", "dtype"), [(0.02, torch.float32), (0.3, torch.float32), (0.1, torch.bfloat16)])
def test_targets_of_another_model_are_found_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch, strength: float, dtype: torch.dtype
) -> None:
    """Though its manifest claims these very weights."""
    other = live(dtype)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(strength * parameter.std() * torch.randn_like(parameter)) if parameter.ndim > 1 else None
    capture(config(cache, **OPTIONS), teacher=other, show_progress=False)
    with pytest.raises(MismatchError, match=r"settings\.weights: stored .* found .*Give the same model"):
        again(cache, live(dtype))
    monkeypatch.setattr(stored_module, "differences", lambda *_: [])
    found = again(cache, live(dtype))
    assert not found.good
    wrong = {field.name for field in found.fields if not field.good}
    assert {"log_target", "log_tail", "tail_entropy", "log_z_tail at 2", "hidden", "tail_samples"} <= wrong
    assert "logprobs" in wrong


def test_targets_of_another_position_are_found_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored one position late: every value is one of this teacher's, but not there."""
    from tailcache.storage.reader import Teacher as Stored

    capture(config(cache), teacher=live(), show_progress=False)
    original = Stored.positions
    monkeypatch.setattr(
        Stored, "positions", lambda self, chosen, **more: original(self, (chosen + 1) % self.num_targets, **more)
    )
    found = again(cache, live())
    for field in found.fields:
        assert field.beyond > 100 or field.name == "tail_samples", field
        assert field.first is not None
    assert not found.good


def test_other_draws_are_found_out(cache: Path) -> None:
    """Another seed's: all else is the same."""
    capture(config(cache, num_samples=16), teacher=live(), show_progress=False)
    path = cache / "teachers" / "t" / "manifest.json"
    record = unseal(path.read_bytes(), "manifest")
    record["provenance"]["config"]["sample_seed"] = record["settings"]["sample_seed"] = 1
    manifest = seal(record)
    complete = unseal((cache / "teachers" / "t" / "complete.json").read_bytes(), "complete")
    from tailcache.storage.durable import sha256

    complete["manifest"] = sha256(manifest)
    path.write_bytes(manifest)
    (cache / "teachers" / "t" / "complete.json").write_bytes(seal(complete))
    for commit in (cache / "teachers" / "t" / "commits").iterdir():
        commit.write_bytes(seal({**unseal(commit.read_bytes(), "commit"), "manifest": sha256(manifest)}))
    found = again(cache, live())
    assert {field.name for field in found.fields if field.beyond} == {"tail_samples"}


def test_it_says_what_it_needs(cache: Path, tmp_path: Path) -> None:
    capture(config(cache), teacher=live(), show_progress=False)
    with pytest.raises(ConfigError, match="found no --teacher"):
        replay_cache(cache, None, count=3)
    capture(config(cache, name="u"), teacher=live(), show_progress=False)
    with pytest.raises(ConfigError, match=r"--name: expected one of the cache's teachers \(t, u\)"):
        again(cache, live())
    assert again(cache, live(), name="u").teacher == "u"
    with pytest.raises(MismatchError, match=r"settings\.dtype: stored 'float32', found 'bfloat16'"):
        again(cache, live(torch.bfloat16), name="u")


def test_the_command(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_teacher(tmp_path / "model", tiny_model("llama", V))
    capture(config(cache, folder), show_progress=False)
    arguments = ["verify", "--cache", str(cache), "--replay", "40", "--teacher", folder, "--json", str(tmp_path / "j")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "replay of t: 40 positions" in out
    assert "no faults in" in out
    report = json.loads((tmp_path / "j").read_text())
    assert report["good"]
    assert report["replay"]["good"]
    assert report["replay"]["positions"] == 40
    fields = {field["name"]: field for field in report["replay"]["fields"]}
    assert fields["log_target"]["largest"] <= fields["log_target"]["tolerance"]
    other = save_teacher(tmp_path / "other", tiny_model("llama", V, seed=1))
    arguments[arguments.index(folder)] = other
    assert cli.main(arguments) == 1
    assert "settings.weights" in capsys.readouterr().err
    assert not json.loads((tmp_path / "j").read_text())["good"]
    assert cli.main(["verify", "--cache", str(cache), "--replay", "4"]) == 2
    assert np.isfinite(fields["logprobs"]["mean"])
