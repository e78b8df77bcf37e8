"""Plots: whole PNG files with titles and labels, the same bytes every time, and no pyplot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_fixtures import add_teacher, make_corpus, random_dense
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from tailcache.pipeline.compare import Comparison, compare
from tailcache.pipeline.config import CompareConfig
from tailcache.pipeline.plots import comparison_plots, plot_comparison, plot_curves
from tailcache.storage.errors import ConfigError

SERIES = {"clm": [(0, 3.0), (100, 2.0), (200, 1.5)], "tad": [(0, 3.0), (100, float("nan")), (200, 1.25)]}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    cache = tmp_path_factory.mktemp("plots") / "c"
    corpus, positions = make_corpus(cache, vocab_size=30, num_rows=12)
    dense = random_dense(len(positions), 30, seed=1)
    for name, values in (("one", dense), ("two", random_dense(len(positions), 30, seed=2, spread=0.5, near=dense))):
        add_teacher(corpus, positions, name, values, top_k=10, num_samples=4)
    return compare(CompareConfig(cache=cache, resamples=100), show_progress=False)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is saved."""
    axes: list[Axes] = []
    save = Canvas.savefig

    def spy(canvas: Canvas, *args: Any, **options: Any) -> None:
        axes.extend(canvas.axes)
        save(canvas, *args, **options)

    monkeypatch.setattr(Canvas, "savefig", spy)
    return axes


def test_curves_have_a_title_labels_and_a_legend(tmp_path: Path, drawn: list[Axes]) -> None:
    path = tmp_path / "new" / "curves.png"
    assert plot_curves(SERIES, title="Held-out", xlabel="positions", ylabel="nats", path=path) == path
    (axes,) = drawn
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Held-out", "positions", "nats")
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["clm", "tad"]
    assert [np.asarray(line.get_xdata()).tolist() for line in axes.get_lines()] == [[0, 100, 200]] * 2
    height, width = imread(path).shape[:2]
    assert width > 700
    assert height > 400


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot_curves(
            SERIES, title="t", xlabel="x", ylabel="y", path=tmp_path / name, yscale="log",
            bands={"clm": [(0, 2.5, 3.5), (200, 1.0, 2.0)]},
        )  # fmt: skip
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_to_draw(tmp_path: Path) -> None:
    nothing: list[dict[str, list[tuple[float, float]]]] = [{}, {"a": []}]
    for series in nothing:
        with pytest.raises(ConfigError, match="at least one point"):
            plot_curves(series, title="t", xlabel="x", ylabel="y", path=tmp_path / "p.png")


def test_plots_of_a_comparison_are_labelled(comparison: Comparison, tmp_path: Path, drawn: list[Axes]) -> None:
    paths = plot_comparison(comparison, tmp_path / "plots")
    assert [p.name for p in paths] == ["tail_mass.png", "divergence.png", "agreement.png", "divergence_by_context.png"]
    for axes in drawn:
        assert axes.get_title()
        assert axes.get_xlabel()
    masses = {str(line.get_label()): line for line in drawn[0].get_lines()}
    expected = comparison.teachers[1].tail_mass
    assert np.asarray(masses["two"].get_xdata()).tolist() == list(expected)
    assert np.asarray(masses["two"].get_ydata()).tolist() == [figure.value for figure in expected.values()]
    assert len(drawn[0].collections) == 2  # the bands
    assert [text.get_text() for text in drawn[1].get_yticklabels()] == ["one ‖ two", "two ‖ one"]
    widths = [bar.get_width() for bar in drawn[1].patches if isinstance(bar, Rectangle)]
    assert widths == pytest.approx(
        [d.kl_lower_bound.value for d in comparison.divergences] + [d.kl_estimate.value for d in comparison.divergences]
    )


def test_one_teacher_has_one_plot(comparison: Comparison) -> None:
    cache = Path(comparison.teachers[0].cache)
    alone = compare(CompareConfig(cache=cache, teachers=("one",), resamples=0), show_progress=False)
    assert list(comparison_plots(alone)) == ["tail_mass"]


def test_neither_pyplot_nor_torch_is_imported() -> None:
    code = "import sys, tailcache.pipeline.plots; assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
