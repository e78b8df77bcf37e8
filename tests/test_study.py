"""The study: text, arms, exact measurement, intervals, report; and its whole path once, killed in between."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tailcache.scripts import study_models, study_settings
from tailcache.scripts.study import Study, study
from tailcache.scripts.study_arms import BETAS, SPLITS, arms, recipes_of
from tailcache.scripts.study_measure import BINS, SUMS, full_ece, held_out_rows, module_sums
from tailcache.scripts.study_models import encode, language_model, train_tokenizer
from tailcache.scripts.study_report import PLOTS, filled
from tailcache.scripts.study_run import curve_steps, read_run, run_path, write_run
from tailcache.scripts.study_settings import SIZES, ModelSize
from tailcache.scripts.study_statistics import ArmSums, Intervals
from tailcache.scripts.study_tables import TABLES, shown
from tailcache.scripts.study_text import END, PARTS, Document, modules, part_of, read_part, study_documents, write_text
from tailcache.storage.errors import ConfigError, DataError, IncompleteError
from tailcache.trainers.loss_config import LossConfig
from tailcache.trainers.soundness import SOUND_TAILS

DOCUMENT = Path(__file__).parents[1] / "docs" / "study.md"


# ---- text ----


def test_no_module_is_on_two_sides_and_no_paragraph_comes_twice() -> None:
    found = [(f"package/{i}.py", [f"Only in {i}.\n\nSaid by all.", f"Again in {i}."]) for i in range(400)]
    parts = study_documents(found)
    texts = [d.text for documents in parts.values() for d in documents]
    assert sum("Said by all." in text for text in texts) == 1
    assert sum(text.count("Again in") for text in texts) == 400
    for part, documents in parts.items():
        assert documents
        assert all(part_of(d.module) == part for d in documents)


def test_parts_have_about_their_shares() -> None:
    counted = [part_of(f"module {i}") for i in range(4000)]
    for part, share in PARTS.items():
        assert counted.count(part) / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))


def test_long_modules_become_several_documents() -> None:
    paragraphs = "\n\n".join(f"Paragraph {i} " + "word " * 100 for i in range(40))
    parts = study_documents([("long.py", [paragraphs])])
    documents = [d for each in parts.values() for d in each]
    assert len(documents) > 3
    assert sum(d.text.count("Paragraph") for d in documents) == 40


def test_text_of_other_versions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps({"versions": {"python": "2.7"}, "parts": {}}))
    with pytest.raises(DataError, match=r"expected the text of .* found that of .*2\.7"):
        write_text(tmp_path, ())


def test_modules_of_a_package_carry_its_name() -> None:
    found = dict(modules("tqdm"))
    assert all(name.startswith("tqdm/") for name in found)
    assert "tqdm/std.py" in found


# ---- models ----


def test_a_language_model_that_was_killed_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(module=f"m{i}", text=f"Say {i} and then {i * i}, or rather {i + 7}.") for i in range(300)]
    tokenizer = train_tokenizer(documents, 280, tmp_path / "tokenizer")
    tokens = np.concatenate(encode(tokenizer, documents))
    assert tokenizer.decode(encode(tokenizer, documents[:1])[0]) == documents[0].text + END
    tiny = ModelSize(hidden_size=16, num_layers=1, num_heads=1)
    small = replace(SIZES["smoke"], context_length=16, batch_rows=2, vocab_size=280)

    def train(folder: Path) -> Path:
        return language_model(
            "model", tiny, tokens, tokenizer, folder, study=small, positions=640, seed=1, device="cpu",
            show_progress=False,
        )  # fmt: skip

    whole = train(tmp_path / "whole")
    monkeypatch.setattr(study_models, "SAVE_SECONDS", 0.0)
    save, calls = study_models._save, []

    def dying(*args: Any) -> None:
        save(*args)
        calls.append(args[3])
        if len(calls) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(study_models, "_save", dying)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    killed = train(tmp_path / "killed")
    assert calls == list(range(1, 21))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((killed / "loss.json").read_text()) == json.loads((whole / "loss.json").read_text())


def test_a_text_too_short_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 4096 tokens"):
        train_tokenizer([Document(module="m", text="Hardly a word.")], 4096, tmp_path / "tokenizer")


# ---- arms ----


def test_arms_cover_what_is_asked_and_every_loss_is_sound() -> None:
    every = arms()
    assert len({arm.name for arm in every}) == len(every)
    grid = {(arm.loss["top_k"], arm.loss["beta"]) for arm in every if arm.group == "grid" and arm.loss}
    assert grid == {(k, beta) for k in SPLITS for beta in BETAS}
    tails = {arm.loss["tail"] for arm in every if arm.group == "tails" and arm.loss}
    assert tails == set(SOUND_TAILS["kd"])
    names = {arm.loss["name"] if arm.loss else "clm" for arm in every}
    assert names == {"clm", "kd", "tad", "rs_kd", "reverse_kl", "todi", "atkd"}
    for arm in every:
        if arm.loss is not None:
            loss = LossConfig(**arm.loss)
            assert loss.tail is None or loss.tail in SOUND_TAILS[loss.name]
            assert (
                (loss.tail == "exact") == (arm.cache.hidden and arm.group in ("tails", "others"))
                or arm.online
                or (arm.group in ("truncation", "bytes"))
            )
            assert loss.name != "tad" or loss.top_k is None or loss.top_k <= arm.cache.top_k
            assert (loss.weight == 1 and arm.clm_weight == 1) or arm.group == "weights" or arm.name == "atkd"


def test_every_set_of_targets_can_be_derived_from_the_capture() -> None:
    for size in SIZES.values():
        for recipe in recipes_of(arms(full_k=size.top_k, full_m=size.num_samples)):
            assert recipe.top_k <= size.top_k
            assert recipe.num_samples <= size.num_samples


def test_an_unknown_arm_is_named() -> None:
    with pytest.raises(ConfigError, match="there is no kd-offline"):
        Study(arms=("kd-offline",)).chosen()


# ---- measuring ----


def _by_hand(p_logits: NDArray[np.float64], q_logits: NDArray[np.float64], nexts: list[int]) -> dict[str, float]:
    """The sums of a module in float64 and loops, in probability space."""
    found = dict.fromkeys(SUMS, 0.0)
    mass, hits = [0.0] * BINS, [0.0] * BINS
    for p_row, q_row, y in zip(np.exp(p_logits), np.exp(q_logits), nexts, strict=True):
        p, q = p_row / p_row.sum(), q_row / q_row.sum()
        head = sorted(range(len(p)), key=lambda i: -p[i])[:10]
        found["positions"] += 1
        found["cross_entropy"] += -math.log(q[y])
        found["kl"] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        found["reverse_kl"] += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        found["top1_agreement"] += int(np.argmax(p) == np.argmax(q))
        found["student_tail"] += sum(b for i, b in enumerate(q) if i not in head)
        found["mismatch"] += int(np.argmax(q) != y)
        for i, b in enumerate(q):
            place = max(0, math.ceil(b * BINS) - 1)
            mass[place] += b
            hits[place] += i == y
    ece = sum(abs(h - m) for h, m in zip(hits, mass, strict=True)) / found["positions"]
    return {**found, "full_ece": ece}


@pytest.mark.parametrize("scale", [1.0, 5.0, 12.0])
def test_module_sums_equal_loops_in_probability_space(scale: float) -> None:
    generator = np.random.default_rng(int(scale))
    p, q = (scale * generator.normal(size=(7, 40)) for _ in range(2))
    nexts = generator.integers(40, size=7)
    found = module_sums(torch.from_numpy(p), torch.from_numpy(q), torch.from_numpy(nexts), calibration=True)
    expected = _by_hand(p, q, nexts.tolist())
    for name, value in zip(SUMS, found["sums"].tolist(), strict=True):
        assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-9), name
    ece = full_ece(found["hits"].numpy(), found["mass"].numpy(), 7)
    assert ece == pytest.approx(expected["full_ece"], rel=1e-9)


def test_a_student_that_is_its_teacher_has_no_divergence() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    sums = dict(
        zip(SUMS, module_sums(logits, logits, torch.arange(5), calibration=False)["sums"].tolist(), strict=True)
    )
    assert sums["kl"] == sums["reverse_kl"] == 0
    assert sums["top1_agreement"] == 5


def test_held_out_rows_are_beginnings_of_modules_each_once() -> None:
    size = replace(SIZES["smoke"], held_out_tokens=800)
    encoded = [(f"m{i // 2}", np.arange(30 + 10 * i)) for i in range(60)]
    rows = held_out_rows(encoded, size)
    assert [len(row) for row in rows[:3]] == [30, 50, 64]
    assert sum(map(len, rows[:-1])) < 800 <= sum(map(len, rows))
    with pytest.raises(DataError, match="at least 10 modules"):
        held_out_rows(encoded[:8], size)


# ---- intervals ----


def _arm(kl_RC: NDArray[np.float64], positions_C: NDArray[np.float64]) -> ArmSums:
    sums = np.zeros((*kl_RC.shape, len(SUMS)))
    sums[..., SUMS.index("positions")] = positions_C
    sums[..., SUMS.index("kl")] = kl_RC * positions_C
    return ArmSums(seeds=tuple(range(len(kl_RC))), sums=sums)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Seeds and modules both vary; three seeds, as in the study."""
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        seeds, places = generator.normal(size=(3, 1)), generator.normal(size=(1, 60))
        kl = 2.0 + 0.05 * seeds + 0.3 * places + 0.05 * generator.normal(size=(3, 60))
        found = Intervals(60, resamples=200).figure("kl", _arm(kl, np.full(60, 10.0)))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2.0 <= found.high
    assert 0.91 <= covered / 300 <= 0.995


def test_differences_are_paired() -> None:
    """What both arms share, by seed and by module, leaves the difference alone."""
    generator = np.random.default_rng(6)
    shared = 3 + generator.normal(size=(3, 50)) + 2 * generator.normal(size=(1, 50))
    positions = generator.integers(20, 200, size=50).astype(float)
    first, second = _arm(shared + 0.01, positions), _arm(shared, positions)
    intervals = Intervals(50)
    single, paired = intervals.figure("kl", first), intervals.difference("kl", first, second)
    assert paired.value == pytest.approx(0.01)
    assert (paired.low, paired.high) == pytest.approx((0.01, 0.01), abs=1e-9)
    assert single.low is not None
    assert single.value - single.low > 0.1
    back = intervals.difference("kl", second, first)
    assert back.value == pytest.approx(-paired.value)
    some = intervals.difference("kl", first.only([1, 2]), second)
    assert some.value == pytest.approx(0.01)


def test_intervals_at_once_are_wider_and_one_seed_has_none() -> None:
    generator = np.random.default_rng(7)
    arm = _arm(generator.normal(size=(3, 40)), np.full(40, 5.0))
    intervals = Intervals(40)
    one, many = intervals.figure("kl", arm), intervals.figure("kl", arm, comparisons=20)
    assert one.low is not None
    assert many.low is not None
    assert many.low < one.low < one.value
    assert intervals.figure("kl", arm.only([0])).low is None
    with pytest.raises(DataError, match="a seed that both arms have"):
        intervals.difference("kl", arm.only([0]), arm.only([1]))


# ---- report ----


def test_every_table_has_its_place_in_the_document_once() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in TABLES:
        assert text.count(f"<!-- study: {name} -->") == 1


def test_figures_in_the_document_are_those_of_its_json() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    results = json.loads(DOCUMENT.with_suffix(".json").read_text())
    drawn = [name for name in PLOTS if (DOCUMENT.parent / "images" / f"study_{name}.png").is_file()]
    assert filled(text, results, str(DOCUMENT), drawn) == text


def test_words_written_by_hand_stay_and_marks_are_checked() -> None:
    results: dict[str, Any] = {"questions": {"tails": {"drop": {"value": 0.5, "low": 0.25, "high": 0.75}}}}
    text = "Before.\n<!-- study: tails -->\nold\n<!-- end -->\nAfter.\n"
    made = filled(text, results, "study.md", ())
    assert made.startswith("Before.\n<!-- study: tails -->\n| tail beyond K = 10 |")
    assert "**+0.5000 [+0.2500, +0.7500]**" in made
    assert made.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in made
    assert filled(made, results, "study.md", ()) == made
    worth: dict[str, Any] = {"questions": {"worth": []}}
    text_worth = text.replace("tails", "worth")
    assert "Not run yet" in filled(text_worth, worth, "study.md", ())
    assert "](images/study_worth.png)\n<!-- end -->" in filled(text_worth, worth, "study.md", ("worth", "kl"))
    with pytest.raises(DataError, match=r"study\.md: there is no table tales"):
        filled(text.replace("tails", "tales"), results, "study.md", ())
    with pytest.raises(DataError, match="found 1 beginnings and 0 ends"):
        filled(text.replace("<!-- end -->", ""), results, "study.md", ())


def test_figures_are_shown_with_their_intervals() -> None:
    assert shown({"value": 1.5, "low": 1.25, "high": 1.75}, 2) == "1.50 [1.25, 1.75]"
    assert shown({"value": -0.5, "low": -1.0, "high": 0.25}, 2, difference=True) == "-0.50 [-1.00, +0.25]"
    assert shown({"value": 0.5, "low": None, "high": None}, 1, scale=100) == "50.0 (one seed)"
    assert shown(None) == "-"


def test_curves_end_with_the_last_step() -> None:
    assert curve_steps(100, 5) == [25, 50, 75, 100]
    assert curve_steps(2, 7) == [1, 2]


def test_a_run_is_read_back_as_written(tmp_path: Path) -> None:
    path = run_path(tmp_path, "kd", 3)
    write_run(path, {"final": np.arange(6.0).reshape(2, 3)}, {"arm": "kd", "β": 2})
    arrays, record = read_run(path)
    assert arrays["final"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert record == {"arm": "kd", "β": 2}


# ---- the whole path ----


@pytest.mark.slow
def test_the_whole_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms, then two more; what was there is not made again, and the document has figures with intervals."""
    tiny = replace(
        SIZES["smoke"],
        packages=(),
        held_out_tokens=1200,
        teacher_positions=4096,
        warm_positions=1024,
        student_positions=5000,
    )
    monkeypatch.setitem(study_settings.SIZES, "smoke", tiny)
    library = [(name, texts[:8]) for name, texts in itertools.islice(modules(None), 160)]
    monkeypatch.setattr("tailcache.scripts.study_text.modules", lambda package: iter(library))
    for part, share in (("held-out", 0.2), ("students", 0.3), ("teacher", 0.5)):
        monkeypatch.setitem(PARTS, part, share)
    config = Study(size="smoke", out=tmp_path, parallel=1, arms=("kd", "kd-online"))
    with pytest.raises(IncompleteError, match="expected a run that has finished"):
        study(replace(config, report=True))
    study(config)
    first = run_path(tmp_path, "kd", 0)
    before, teacher = first.read_bytes(), (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    more = ("kd", "kd-online", "kd-k10-renormalise", "tad-k10-b2", "tad-online", "kd-w2")
    document = tmp_path / "words.md"
    results = study(replace(config, arms=more, document=document))
    assert first.read_bytes() == before
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    assert not (tmp_path / "teacher.state").exists()
    assert len(read_part(tmp_path / "text", "held-out")) >= results["held_out"]["modules"]
    for figures in results["students"].values():
        assert figures["kl"]["low"] < figures["kl"]["value"] < figures["kl"]["high"]
        assert figures["seeds"] == [0, 1]
    assert results["teacher"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    live = results["questions"]["cache_against_live"]
    assert set(live) == {"KD", "TAD (K=10, β=2)"}
    [heavier] = results["questions"]["weights"]
    assert heavier["arm"] == "kd-w2"
    assert heavier["kl"]["value"] != 0
    assert "kd-w2" not in [each["arm"] for each in results["questions"]["worth"]]
    # Training is short: what the cache and the live teacher give differ by less than training changes.
    learnt = results["start"]["kl"]["value"] - results["students"]["kd-online"]["kl"]["value"]
    assert learnt > 0
    assert abs(live["KD"]["kl"]["value"]) < 0.2 * learnt
    assert json.loads(document.with_suffix(".json").read_text()) == json.loads(json.dumps(results))
    text = document.read_text(encoding="utf-8")
    assert "KD, live teacher" in text
    assert "](images/study_kl.png)" in text
    assert (tmp_path / "images" / "study_kl.png").is_file()
    monkeypatch.setitem(study_settings.SIZES, "smoke", replace(tiny, student_positions=6000))
    with pytest.raises(ConfigError, match="holds a study with another student_positions"):
        study(config)
