"""Figures: one palette for the corpora, grids of curves, bars and heatmaps, trees, documents.

A picture is one call on a tidy table: `lines`, `bars` and `heatmaps` return seaborn's FacetGrid,
whose `set` names the axes. Columns value, low and high hold what is drawn and its interval.
"""

import warnings
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# Okabe and Ito's colour-blind safe colours; a corpus has the same one in every figure.
KIND_COLOURS = {
    "PCFG": "#0072B2",
    "flat": "#D55E00",
    "static": "#009E73",
    "treeless": "#882255",
    "filtered tree": "#332288",
    "bank": "#999933",
    "n-gram": "#CC79A7",
    "hashed n-gram": "#8C6D1F",
    "small release": "#56B4E9",
    "small release, flat": "#E69F00",
    "OLMo": "#000000",
}
ROLE_COLOURS = {
    "subject": "#0072B2",
    "verb": "#D55E00",
    "object": "#009E73",
    "connector": "#E69F00",
    "end": "#999999",
}
LINES = {
    "syntax-only": ("#555555", ":"),
    "in-sentence": ("#555555", "-."),
    "ideal reader": ("#555555", "--"),
    "latent-aware": ("#555555", "-"),
}
_REFERENCE = "#555555"  # the grey of what is computed and not measured


def set_style():
    """Seaborn's paper style, legible in print."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        font_scale=0.9,
        rc={
            "figure.dpi": 100,
            "savefig.dpi": 130,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
            "legend.frameon": False,
        },
    )


def palette(corpora) -> dict:
    """{name: colour} of these corpora, for seaborn: by their kinds, the same in all figures."""
    return {corpus.name: KIND_COLOURS[corpus.kind] for corpus in corpora}


def write(figure, path) -> None:
    """Write `figure` as a PNG file, with its description in words (`described`) inside."""
    drawn = BytesIO()
    figure.savefig(drawn, bbox_inches="tight", metadata={"Description": described(figure)})
    Path(path).write_bytes(with_palette(drawn.getvalue()))


def write_film(figures, path, milliseconds: int = 700) -> None:
    """Write figures of the same size as an animated WebP file, and close them; the last stays."""
    frames = []
    for figure in figures:
        drawn = BytesIO()
        figure.savefig(drawn, dpi=80)
        plt.close(figure)
        frames.append(Image.open(drawn).convert("RGB"))
    times = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=60, method=4
    )


def described(figure):
    """What a figure shows, in words, from its titles, axes and legends: an alternative text."""
    panels = [ax for ax in figure.axes if ax.get_visible() and ax.has_data()]

    def all_of(texts):
        return ", ".join(dict.fromkeys(" ".join(text.split()) for text in texts if text.strip()))

    told = {
        "": all_of(ax.get_title() for ax in panels),
        "horizontally": all_of([*(ax.get_xlabel() for ax in panels), figure.get_supxlabel()]),
        "vertically": all_of([*(ax.get_ylabel() for ax in panels), figure.get_supylabel()]),
        "legend": all_of(text for ax in panels for text in ax.get_legend_handles_labels()[1]),
    }
    if not any(told.values()):  # a drawn tree, say, is all words
        told[""] = all_of(text.get_text() for ax in panels for text in ax.texts)
    count = f"{len(panels)} panels" if len(panels) > 1 else "One panel"
    return (
        "; ".join(
            [count, *(f"{what}: {text}".removeprefix(": ") for what, text in told.items() if text)]
        )
        + "."
    )


# ---------------------------------------------------------------------- tables as pictures


def pick(table: pd.DataFrame, **wanted) -> pd.DataFrame:
    """The rows in which each named column equals, or is one of, what is wanted."""
    for column, value in wanted.items():
        values = value if isinstance(value, (list, tuple, set)) else [value]
        table = table[table[column].isin(values)]
    return table


def lines(
    table, x="tokens", y="value", hue=None, null=None, legend=True, marker=".", **grid
) -> sns.FacetGrid:
    """Curves of `y` over `x`, one for each `hue`; the interval low..high is a band, if it is there.

    `null` names a column that is drawn beside each curve, in thin dashes. `grid` goes to FacetGrid:
    col, row, col_wrap, palette, hue_order, height, aspect, sharey, ...
    """

    def draw(data, color, label=None):
        data, axes = data.sort_values(x), plt.gca()
        axes.plot(data[x], data[y], color=color, marker=marker, label=label)
        if "low" in data:
            axes.fill_between(data[x], data["low"], data["high"], color=color, alpha=0.2, lw=0)
        if null:
            axes.plot(data[x], data[null], color=color, ls="--", lw=0.8)

    found = _mapped(table, draw, hue, legend, grid)
    return found.set_axis_labels(x, y)


def bars(table, x, hue, legend=True, **grid) -> sns.FacetGrid:
    """Bars of `value` at each `x`, side by side for each `hue`, with whiskers low..high."""
    places, hues = list(table[x].unique()), list(table[hue].unique())
    width = 0.8 / len(hues)

    def draw(data, color, label=None):
        shift = (hues.index(data[hue].iloc[0]) - (len(hues) - 1) / 2) * width
        reach = [data["value"] - data["low"], data["high"] - data["value"]]
        axes = plt.gca()
        axes.bar(
            data[x].map(places.index) + shift,
            data["value"],
            width,
            yerr=reach,
            color=color,
            label=label,
        )
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(places)), places)

    return _mapped(table, draw, hue, legend, {"hue_order": hues} | grid)


def heatmaps(
    table, index="layer", columns="tokens", limit=None, label="", dots=False, **grid
) -> sns.FacetGrid:
    """A heatmap of `value` in each panel: a row for each `index`, a column for each of `columns`.

    Red is -limit, white 0, blue limit (by default the largest value, either way); with `dots` a dot
    marks where the interval contains 0. `label` names the colour bar. Tokens are shown in millions.
    """
    limit = limit or float(table["value"].abs().max()) or 1.0

    def draw(data, color=None):
        _heatmap(plt.gca(), data, limit, index, columns, dots)

    found = _mapped(table, draw, None, False, {"height": 1.9, "aspect": 1.3} | grid)
    shades = mpl.cm.ScalarMappable(mpl.colors.Normalize(-limit, limit), "RdBu")
    found.figure.colorbar(shades, ax=found.axes, label=label, extend="both", shrink=0.8)
    return found.set_axis_labels("tokens (millions)" if columns == "tokens" else columns, index)


def _mapped(table, draw, hue, legend, grid) -> sns.FacetGrid:
    """A FacetGrid with `draw` in every panel, its titles without the columns' names."""
    # Seaborn sets a layout of its own, which is replaced. (Not by mpl.rc_context: around the first
    # figure, for which Jupyter's backend begins to show figures, it would end that again.)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        found = sns.FacetGrid(table, hue=hue, **({"height": 2.8, "aspect": 1.2} | grid))
    found.tight_layout = lambda: found
    found.figure.set_layout_engine("constrained")
    found.map_dataframe(draw)
    for axes in found.axes.flat:
        if not axes.has_data():  # a panel without rows
            axes.axis("off")
    panel = [name for name in ("row", "col") if name in grid]
    found.set_titles(", ".join(f"{{{name}_name}}" for name in panel), "{row_name}", "{col_name}")
    if legend and hue:
        drawn = {}
        for axes in found.axes.flat:
            drawn |= dict(zip(*reversed(axes.get_legend_handles_labels())))
        found.figure.legend(drawn.values(), drawn.keys(), loc="outside center right")
    return found


def _heatmap(axes, rows, limit: float, index: str, columns: str, dots: bool) -> None:
    """One panel of `heatmaps`."""
    cells = rows.pivot(index=index, columns=columns, values="value")
    shades = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    axes.imshow(cells, **shades, aspect="auto", origin="lower", interpolation="nearest")
    marks = range(0, cells.shape[1], max(1, cells.shape[1] // 4))
    shown = cells.columns[marks]
    if columns == "tokens":
        shown = [f"{tokens / 1e6:.1f}" for tokens in shown]
    axes.set_xticks(marks, shown)
    axes.set_yticks(range(len(cells)), cells.index)
    if dots:
        zero = rows.assign(inside=(rows["low"] <= 0) & (rows["high"] >= 0))
        zero = zero.pivot(index=index, columns=columns, values="inside").to_numpy()
        layer, column = np.nonzero(zero.astype(float) > 0)
        axes.plot(column, layer, ".", ms=2.5, color=_REFERENCE)


# ---------------------------------------------------------------------- trees and documents


def draw_tree(tree, ax):
    """Draw an nltk tree: each nonterminal stands above the middle of what it spans."""
    next_leaf = iter(range(len(tree.leaves())))

    def place(node, depth):
        if isinstance(node, str):
            x = next(next_leaf)
            ax.text(
                x,
                -tree.height(),
                node,
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold",
                color=ROLE_COLOURS.get(node, "black"),
            )
            return x, -tree.height() + 0.25
        spots = [place(child, depth + 1) for child in node]
        x = (spots[0][0] + spots[-1][0]) / 2
        for cx, cy in spots:
            ax.plot([x, cx], [-depth - 0.2, cy], color="#BBBBBB", lw=1, zorder=0)
        ax.text(
            x,
            -depth,
            node.label(),
            ha="center",
            va="center",
            fontsize=8,
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )
        return x, -depth + 0.2

    place(tree, 0)
    ax.set_xlim(-0.7, len(tree.leaves()) - 0.3)
    ax.set_ylim(-tree.height() - 0.8, 0.4)
    ax.axis("off")


def role_colours(roles) -> dict:
    """A colour for each of the names of `roles`: those of ROLE_COLOURS, and others for the rest."""
    others = iter(sns.color_palette("husl", len(roles)).as_hex())
    return {role: ROLE_COLOURS.get(role) or next(others) for role in roles}


def draw_document(documents, roles, words, ax):
    """Draw one document: a sentence a line, a box a token, coloured by role, rules at levels.

    Thick rules stand between sections, thin ones between paragraphs. `roles` names the roles,
    `words` (vocabulary) what is written for each token.
    """
    shades = list(role_colours(roles).values())
    token = {name: value.tolist() for name, value in documents.token.items()}
    for i, number in enumerate(token["tokens"]):
        x, y = token["place"][i], -token["sentence"][i]
        ax.add_patch(
            Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, fc=shades[token["role"][i]], ec="none")
        )
        ax.text(x, y, words[number], ha="center", va="center", fontsize=6, color="white")
    for i in range(1, len(token["tokens"])):
        for level, width in (("section", 2.0), ("paragraph", 0.7)):
            if token[level][i] != token[level][i - 1]:
                ax.axhline(0.5 - token["sentence"][i], color="black", lw=width)
                break
    ax.set(
        xlim=(-0.6, max(token["place"]) + 0.6),
        ylim=(-max(token["sentence"]) - 0.6, 0.6),
        xlabel="place in the sentence (tokens)",
        ylabel="sentence of the document",
    )
    ax.set_yticks(
        -np.arange(0, max(token["sentence"]) + 1, 4), np.arange(0, max(token["sentence"]) + 1, 4)
    )


def with_palette(png: bytes) -> bytes:
    """A PNG picture in at most 256 colours, a quarter of the size; resolution and texts stay."""
    picture, texts, drawn = Image.open(BytesIO(png)), PngInfo(), BytesIO()
    for name, text in picture.text.items():
        texts.add_itxt(name, text)
    few = picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(drawn, "PNG", optimize=True, pnginfo=texts, dpi=picture.info.get("dpi", (100, 100)))
    return min(png, drawn.getvalue(), key=len)
