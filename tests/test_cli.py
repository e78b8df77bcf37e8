"""The command: help that explains itself, typos answered with a suggestion, and honest exit statuses."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from tokenizer_fixtures import build_tokenizer

from tailcache.pipeline.config import PrepareConfig
from tailcache.scripts import cli
from tailcache.scripts.cli import VERBS, main
from tailcache.scripts.flags import flag_names
from tailcache.scripts.settings import default_settings, load_section
from tailcache.storage.errors import ConfigError, DataError
from tailcache.trainers.config import TrainConfig
from tailcache.trainers.loss_config import LossConfig, LossParameters
from tailcache.trainers.schedules import Schedule

MISSING: Any = object()


def test_the_list_of_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in ("prepare", "capture", "train", "compare", "verify", "info"))
    assert main([]) == 2
    assert capsys.readouterr().err == shown


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tailcache 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepar"], "there is no verb 'prepar'; did you mean prepare?"),
        (["comprae", "--cache", "x"], "did you mean compare?"),
        (["--hlep"], "there is no flag '--hlep'"),
        (["prepare", "--contxt-length", "5"], "there is no flag --contxt-length; did you mean --context-length?"),
        (
            ["prepare", "--cache", "a", "--source", "b", "--tokenizer", "c", "--held_uot", "0.5"],
            "there is no flag --held-uot; did you mean --held-out?",
        ),
        (["prepare", "--cache", "a", "--source", "b", "--tokenizer", "c", "--packing", "pakced"], "pakced"),
        (["prepare", "--cache", "a", "--source", "b", "--tokenizer", "c", "--seed", "x"], "--seed"),
        (["prepare", "--cache", "a", "--source", "b", "--tokenizer", "c", "--held-out", "2"], "--held-out"),
        (["prepare", "--cache", "a"], "--source"),
        (["prepare", "--config"], "--config: expected the name of a YAML file"),
        (["prepare", "--config", "a", "--config", "b"], "--config: expected one file"),
        (["prepare", "--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_are_answered_with_a_suggestion(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_every_setting_of_prepare_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(PrepareConfig):
        assert f"--{field.name.replace('_', '-')} " in shown
    assert "so no document, nor a copy of it, is on both sides. (default: 0.05)" in shown
    assert "--config FILE" in shown
    assert "Turn text, chats or ready token ids into the corpus" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["prepare", "--help"],
        ["train", "--help"],
        ["student", "--help"],
        ["prepare", "--cache", "x"],
        ["prepar"],
    ],
)
def test_nothing_heavy_is_imported_for_help(arguments: list[str]) -> None:
    code = (
        "import sys; from tailcache.scripts.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'zarr', 'pyarrow', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the work of prepare: the settings it would have run with."""
    runs: list[Any] = []
    module = ModuleType("recorder")
    module.run = runs.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recorder", module)
    monkeypatch.setitem(VERBS, "prepare", dataclasses.replace(VERBS["prepare"], module="recorder"))
    return runs


def test_flags_are_stronger_than_the_file(tmp_path: Path, recorded: list[Any]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "prepare:\n  cache: from/file\n  source: a.jsonl\n  tokenizer: t\n  context-length: 128\n  held_out: 1e-1\n"
        "capture:\n  anything: 1\n"
    )
    assert main(["prepare", "--config", str(file), "--context-length", "64", "--cache", "from/flag"]) == 0
    assert main([*("prepare", f"--config={file}")]) == 0
    expected = PrepareConfig(cache="from/flag", source="a.jsonl", tokenizer="t", context_length=64, held_out=0.1)
    assert recorded[0] == expected
    assert recorded[1] == dataclasses.replace(expected, cache="from/file", context_length=128)


def test_a_flat_file_and_required_settings_from_either_place(
    tmp_path: Path, recorded: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("source: a.jsonl\ntokenizer: t\nmax_tokens: null\npacking: one-per-row\n")
    assert main(["prepare", "--config", str(file)]) == 2
    assert "--cache" in capsys.readouterr().err
    assert main(["prepare", "--config", str(file), "--cache", "c"]) == 0
    assert recorded == [PrepareConfig(cache="c", source="a.jsonl", tokenizer="t", packing="one-per-row")]


def test_checks_run_on_what_the_file_says(tmp_path: Path, recorded: list[Any]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("cache: c\nsource: a\ntokenizer: t\nheld_out: 3\n")
    assert main(["prepare", "--config", str(file)]) == 2
    assert recorded == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("contxt_length: 5\n", "there is no setting 'contxt_length'; did you mean context_length?"),
        ("prepare:\n  sed: 5\n", "there is no setting 'sed'; did you mean seed?"),
        ("prepare:\n  seed: 5\nprepar:\n  seed: 5\n", "found 'prepar'; did you mean prepare?"),
        ("prepar:\n  seed: 5\n", "there is no verb 'prepar'; did you mean prepare?"),
        ("seed: many\n", "seed: expected a whole number, found 'many'"),
        ("seed: 1.5\n", "seed: expected a whole number, found 1.5"),
        ("seed: true\n", "seed: expected a whole number, found True"),
        ("source: 5\n", "source: expected text, found 5; put it in quotes"),
        ("packing: pack\n", "packing: expected one of auto, packed, one-per-row, found 'pack'; did you mean packed?"),
        ("bos: no\n", "found False; put it in quotes"),
        ("seed: 1\nseed: 2\n", "line 1: seed is given twice"),
        ("max_tokens: 1\nmax-tokens: 2\n", "given twice"),
        ("- a\n- b\n", "expected settings by name"),
        ("a: [\n", "not YAML"),
        ("prepare: 5\ncapture:\n  x: 1\n", "prepare: expected settings by name"),
    ],
)
def test_mistakes_in_the_file(
    tmp_path: Path, recorded: list[Any], capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert main(["prepare", "--config", str(file), "--cache", "c", "--source", "s", "--tokenizer", "t"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert str(file) in shown
    assert recorded == []


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: Path
    inner: Inner = dataclasses.field(default_factory=Inner)
    rate: float = 1.0
    flag: bool = False
    pair: tuple[int, float] | None = None
    kind: Literal["a", 1] | None = None
    many: list[int] = dataclasses.field(default_factory=list)


def test_all_kinds_of_fields() -> None:
    values = {
        "path": "~/x",
        "inner": {"size": 4, "names": ["p", "q"]},
        "rate": "1e-4",
        "flag": True,
        "pair": [1, 2],
        "kind": 1,
        "many": [1, 2],
    }
    made = default_settings(Outer, values, "here", MISSING)
    assert made == Outer(
        path=Path.home() / "x",
        inner=Inner(size=4, names=("p", "q")),
        rate=1e-4,
        flag=True,
        pair=(1, 2.0),
        kind=1,
        many=[1, 2],
    )
    empty = default_settings(Outer, {}, "here", MISSING)
    assert empty.path is MISSING
    assert (empty.inner, empty.rate, empty.pair) == (Inner(), 1.0, None)
    for wrong, message in (
        ({"inner": {"sise": 1}}, "here, inner: there is no setting 'sise'; did you mean size"),
        ({"inner": 5}, "here, inner: expected"),
        ({"many": [1, "x"]}, r"here, many\[1\]: expected a whole number"),
        ({"many": 1}, "here, many: expected a list"),
        ({"pair": [1]}, "here, pair"),
        ({"flag": 1}, "here, flag: expected true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            default_settings(Outer, wrong, "here", MISSING)
    assert "--inner.size" in list(flag_names(Outer))


TRAIN = {"cache": "c", "out": "o"}


def test_a_weighted_sum_of_losses_comes_from_a_file() -> None:
    losses = [{"name": "tad", "beta": 3, "top-k": 5}, {"name": "hidden_cosine", "weight": "5e-1"}]
    made = default_settings(TrainConfig, {**TRAIN, "losses": losses}, "here", MISSING)
    assert made.losses == (
        LossConfig(name="tad", beta=3.0, top_k=5),
        LossConfig(name="hidden_cosine", weight=0.5),
    )


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([{"name": "tda"}], r"here, losses\[0\], name: expected one of kd, .*found 'tda'; did you mean tad"),
        ([{"name": "kd"}, {"weight": 1}], r"here, losses\[1\]: expected a setting 'name', found weight"),
        ([{}], r"here, losses\[0\]: expected a setting 'name', found nothing"),
        ([{"name": "kd", "bta": 1}], r"losses\[0\]: there is no setting 'bta'; did you mean beta"),
        ([{"name": "kd", "beta": 1}], r"losses\[0\], beta: belongs to tad, and the loss is 'kd'"),
        ([{"name": "tad", "beta": "much"}], r"losses\[0\], beta: expected a number, found 'much'"),
        ([{"name": "kd", "weight": -1}], r"losses\[0\], weight: expected a number >= 0"),
        ("tad", "losses: expected a list, found 'tad'"),
        (["tad"], r"losses\[0\]: expected settings by name, found 'tad'"),
    ],
)
def test_mistakes_in_a_list_of_losses(losses: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        default_settings(TrainConfig, {**TRAIN, "losses": losses}, "here", MISSING)


def test_a_list_of_losses_is_no_flag_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--losses" not in list(flag_names(TrainConfig))
    assert main(["train", "--cache", "c", "--out", "o", "--losses", "tad"]) == 2
    assert "--losses is a list of groups of settings, which flags cannot say" in capsys.readouterr().err
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(LossParameters):
        assert f"--{field.name.replace('_', '-')} " in shown
    assert "--losses" not in shown
    assert "tad: the split K': the head is the teacher's" in shown


def test_losses_reach_the_run_and_clash_with_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Any] = []
    module = ModuleType("recorder")
    module.run = runs.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recorder", module)
    monkeypatch.setitem(VERBS, "train", dataclasses.replace(VERBS["train"], module="recorder"))
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  cache: c\n  out: o\n  losses:\n  - {name: tad, beta: 3}\n  - {name: todi}\n")
    assert main(["train", "--config", str(file), "--clm-weight", "0.5"]) == 0
    assert runs[0].losses == (LossConfig(name="tad", beta=3.0), LossConfig(name="todi"))
    assert runs[0].clm_weight == 0.5
    assert main(["train", "--config", str(file), "--loss", "kd"]) == 2
    assert "loss: losses lists the divergences" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    flags = ["--beta", "2", "--beta-end", "5", "--beta-schedule", "cosine", "--top-k", "5"]
    flags += ["--top-k-end", "20", "--top-k-schedule", "linear"]
    assert main(["train", "--cache", "c", "--out", "o", *flags]) == 0
    [tad] = runs[1].divergences
    assert (tad.tail_weight, tad.split) == (Schedule(2.0, 5.0, "cosine"), Schedule(5, 20, "linear"))


def test_a_file_without_this_verb_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("capture:\n  x: 1\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    for name in ("a.yaml", "empty.yaml"):
        assert load_section(tmp_path / name, "prepare", VERBS) == {}


def test_exit_statuses_of_the_work(
    monkeypatch: pytest.MonkeyPatch, recorded: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "--cache", "c", "--source", "s", "--tokenizer", "t"]

    def fail(error: BaseException) -> None:
        def run(config: Any) -> None:
            raise error

        monkeypatch.setattr(sys.modules["recorder"], "run", run)

    fail(DataError("row 5: expected text"))
    assert main(arguments) == 1
    assert capsys.readouterr().err == "tailcache prepare: row 5: expected text\n"
    fail(KeyboardInterrupt())
    assert main(arguments) == 130
    fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(arguments)


def test_a_real_run_from_the_shell(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"the cat {index}"}) + "\n" for index in range(9)))
    command = [str(Path(sys.executable).with_name("tailcache")), "prepare", "--tokenizer", "tokenizer"]
    runs = [
        subprocess.run(
            [*command, "--cache", "cache", "--source", source],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        for source in ("b.jsonl", "a.jsonl")
    ]
    assert [run.returncode for run in runs] == [1, 0]
    assert runs[0].stderr == (
        "tailcache prepare: source b.jsonl: there is no such file or folder; did you mean a.jsonl?\n"
    )
    assert "documents                     9" in runs[1].stdout


def test_the_cache_may_come_first_without_its_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    for command in (["info", nowhere], ["verify", nowhere], ["derive", nowhere, str(tmp_path / "new")]):
        assert main(command) == 1
        assert nowhere in capsys.readouterr().err
    assert main(["info", nowhere, "another"]) == 2


def test_every_verb_is_declared_with_a_light_settings_class() -> None:
    assert set(VERBS) == {
        *("prepare", "capture", "train", "evaluate", "student", "compare", "export", "derive", "verify", "info")
    }
    assert all(":" in verb.config and verb.summary for verb in VERBS.values())
    assert cli.__all__ == ["VERBS", "Verb", "main"]
