"""Pictures show the numbers of their tables, where they belong."""

import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from io import BytesIO

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import pytest
from latentree.data.corpus import load_corpus
from latentree.evidence import figures
from latentree.evidence.claims import Claim
from matplotlib import pyplot as plt
from PIL import Image

TABLE = pd.DataFrame(
    [
        (corpus, layer, tokens, layer + tokens / 1e6, -1.0 if layer else 1.0, 9.0)
        for corpus in ("bound", "bound-flat")
        for layer in (0, 1)
        for tokens in (2e6, 1e6)
    ],
    columns=["corpus", "layer", "tokens", "value", "low", "high"],
)


@pytest.fixture(autouse=True)
def closed():
    figures.set_style()
    yield
    plt.close("all")


def test_pick_keeps_what_equals_or_is_one_of_the_wanted():
    assert len(figures.pick(TABLE, corpus="bound", layer=1)) == 2
    assert len(figures.pick(TABLE, layer=[0, 1], tokens=1e6)) == 4
    assert figures.pick(TABLE, corpus="nowhere").empty


def test_lines_are_sorted_coloured_by_corpus_and_have_bands():
    corpora = [load_corpus(name) for name in ("bound", "bound-flat")]
    colours = figures.palette(corpora)
    assert len(set(colours.values())) == 2
    grid = figures.lines(TABLE, hue="corpus", col="layer", palette=colours)
    panel = grid.axes[0, 1]
    assert panel.get_title() == "1"
    drawn = {line.get_label(): line for line in panel.lines}
    assert drawn["bound"].get_xydata().tolist() == [[1e6, 2.0], [2e6, 3.0]]
    assert matplotlib.colors.same_color(drawn["bound-flat"].get_color(), colours["bound-flat"])
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (-1.0, 9.0)


def test_bars_stand_side_by_side_with_their_whiskers():
    rows = figures.pick(TABLE, tokens=1e6)
    axes = figures.bars(rows, x="layer", hue="corpus").axes[0, 0]
    assert [bar.get_height() for bar in axes.patches] == [1.0, 2.0, 1.0, 2.0]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(right <= left + 1e-9 for (_, right), (left, _) in zip(edges, edges[1:]))


def test_heatmaps_put_each_value_in_its_cell():
    grid = figures.heatmaps(TABLE, col="corpus")
    panel = grid.axes[0, 0]
    assert panel.images[0].get_array().tolist() == [[1.0, 2.0], [2.0, 3.0]]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "2"]
    assert panel.images[0].get_clim() == (-3.0, 3.0)


def test_a_written_picture_says_in_words_what_it_shows(tmp_path):
    grid = figures.lines(TABLE, hue="corpus", col="layer")
    grid.set(xlabel="training tokens", ylabel="loss (nats)")
    figures.write(grid.figure, tmp_path / "a.png")
    told = Image.open(tmp_path / "a.png").text["Description"]
    assert "2 panels" in told and "training tokens" in told and "bound, bound-flat" in told


def test_sliders_are_for_a_person_in_jupyter_and_a_run_keeps_none(monkeypatch):
    asked, drawn = [], []
    widgets = types.ModuleType("ipywidgets", "a stand-in, that moves each slider to its end")
    widgets.__spec__ = ModuleSpec("ipywidgets", None)

    def interact(shown, **ranges):
        asked.append(ranges)
        assert shown(**{name: values[-1] for name, values in ranges.items()}) is None

    widgets.interact = interact
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    figures.sliders(lambda **values: drawn.append(values), binding=(0, 1))
    assert not asked and not drawn
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/01.ipynb")
    figures.sliders(lambda **values: drawn.append(values) or "a figure", binding=(0, 1))
    assert asked == [{"binding": (0, 1)}] and drawn == [{"binding": 1}]
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # not installed
    figures.sliders(drawn.append, binding=(0, 1))
    assert len(asked) == 1


def test_small_pictures_keep_their_shades():
    figure, axes = plt.subplots()
    axes.imshow(np.random.default_rng(0).random((64, 64)), cmap="RdBu")
    drawn = BytesIO()
    figure.savefig(drawn, dpi=130)
    small = figures.with_palette(drawn.getvalue())
    assert len(small) < len(drawn.getvalue())
    before = np.asarray(Image.open(drawn).convert("RGB"), float)
    after = np.asarray(Image.open(BytesIO(small)).convert("RGB"), float)
    assert abs(before - after).mean() < 1.0


def test_a_verdicts_interval_is_drawn_over_its_region():
    about = {"source": "Figure 2", "statement": "s", "corpus": "c", "n": 3, "seeds": [0]}
    claims = [
        Claim("in", interval=(0.5, 0.4, 0.6), above=0.1, **about),
        Claim("out", interval=(0.2, 0.0, 0.4), above=-0.1, below=0.1, **about),
        Claim("none", interval=None, above=0.1, reason="no model", **about),
    ]
    ax = figures.verdicts(claims).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "out (undecided)",
        "in (present)",
    ]
    region = ax.patches[0]
    assert (region.get_x(), region.get_x() + region.get_width()) == pytest.approx((-0.1, 0.1))
    assert ax.patches[1].get_x() == 0.1
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [0.2, 0.5]
    assert [dot.get_markerfacecolor() for dot in dots] == ["white", "black"]


def test_verdicts_on_nothing_are_an_empty_picture():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not figures.verdicts([]).axes[0].patches
