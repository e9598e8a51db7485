"""Figures: one palette for the corpora, grids of curves, bars and heatmaps, trees, documents.

A picture is one call on a tidy table: `lines`, `bars` and `heatmaps` return seaborn's FacetGrid,
whose `set` names the axes. Columns value, low and high hold what is drawn and its interval.
"""

import os
import warnings
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
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
LINES = {  # of what is computed and not measured
    "syntax-only": ("#555555", ":"),
    "in-sentence": ("#555555", "-."),
    "ideal reader": ("#555555", "--"),
    "latent-aware": ("#555555", "-"),
}


def set_style():
    """Seaborn's notebook style, legible in print."""
    plain = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    sizes = {"figure.dpi": 100, "savefig.dpi": 130, "figure.constrained_layout.use": True}
    sns.set_theme(context="notebook", style="ticks", font_scale=0.9, rc=plain | sizes)


def palette(corpora) -> dict:
    """{name: colour} of these corpora, for seaborn: by their kinds, the same in all figures."""
    return {corpus.name: KIND_COLOURS[corpus.kind] for corpus in corpora}


def write(figure, path) -> None:
    """Write `figure` as a PNG file, with its description in words (`described`) inside."""
    drawn = BytesIO()
    figure.savefig(drawn, bbox_inches="tight", metadata={"Description": described(figure)})
    Path(path).write_bytes(with_palette(drawn.getvalue()))


def write_film(figures, path) -> None:
    """Write figures of the same size as an animated WebP file, and close them; the last stays."""
    frames = []
    for figure in figures:
        drawn = BytesIO()
        figure.savefig(drawn, dpi=80)
        plt.close(figure)
        frames.append(Image.open(drawn).convert("RGB"))
    times = [700] * (len(frames) - 1) + [2800]  # milliseconds
    film = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
    frames[0].save(path, quality=60, method=4, **film)


def described(figure):
    """What a figure shows, in words, from its titles, axes and legends: an alternative text."""
    panels = [ax for ax in figure.axes if ax.get_visible() and ax.has_data()]

    def all_of(texts):
        return ", ".join(dict.fromkeys(" ".join(text.split()) for text in texts if text.strip()))

    told = {
        "": all_of([figure.get_suptitle(), *(ax.get_title() for ax in panels)]),
        "horizontally": all_of([*(ax.get_xlabel() for ax in panels), figure.get_supxlabel()]),
        "vertically": all_of([*(ax.get_ylabel() for ax in panels), figure.get_supylabel()]),
        "legend": all_of(text for ax in panels for text in ax.get_legend_handles_labels()[1]),
    }
    if not any(told.values()):  # a drawn tree, say, is all words
        told[""] = all_of(text.get_text() for ax in panels for text in ax.texts)
    count = f"{len(panels)} panels" if len(panels) > 1 else "One panel"
    parts = [f"{what}: {text}".removeprefix(": ") for what, text in told.items() if text]
    return "; ".join([count, *parts]) + "."


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

    return _mapped(table, draw, hue, legend, grid).set_axis_labels(x, y)


def bars(table, x, hue, legend=True, **grid) -> sns.FacetGrid:
    """Bars of `value` at each `x`, side by side for each `hue`, with whiskers low..high."""
    places, hues = list(table[x].unique()), list(table[hue].unique())
    width = 0.8 / len(hues)

    def draw(data, color, label=None):
        shift = (hues.index(data[hue].iloc[0]) - (len(hues) - 1) / 2) * width
        reach = [data["value"] - data["low"], data["high"] - data["value"]]
        axes, at = plt.gca(), data[x].map(places.index) + shift
        axes.bar(at, data["value"], width, yerr=reach, color=color, label=label)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(places)), places)

    return _mapped(table, draw, hue, legend, {"hue_order": hues} | grid)


def heatmaps(table, index="layer", columns="tokens", limit=None, label="", **grid) -> sns.FacetGrid:
    """A heatmap of `value` in each panel: a row for each `index`, a column for each of `columns`.

    Red is -limit, white 0, blue limit (by default the largest value, either way). `label` names the
    colour bar. Tokens are shown in millions.
    """
    limit = limit or float(table["value"].abs().max()) or 1.0
    shades = mpl.cm.ScalarMappable(mpl.colors.Normalize(-limit, limit), "RdBu")

    def draw(data, color=None):
        cells, axes = data.pivot(index=index, columns=columns, values="value"), plt.gca()
        look = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
        axes.imshow(cells, cmap=shades.cmap, norm=shades.norm, **look)
        marks = range(0, cells.shape[1], -(-cells.shape[1] // 3))  # three labels fit
        shown = cells.columns[marks]
        if columns == "tokens":
            shown = [f"{tokens / 1e6:.2g}" for tokens in shown]
        axes.set_xticks(marks, shown)
        axes.set_yticks(range(len(cells)), cells.index)

    found = _mapped(table, draw, None, False, {"height": 1.9, "aspect": 1.3} | grid)
    found.figure.colorbar(shades, ax=found.axes, label=label, extend="both", shrink=0.8)
    return found.set_axis_labels("tokens (millions)" if columns == "tokens" else columns, index)


def verdicts(claims):
    """A row for each of `claims` (claims.py) that has an interval, drawn over the region asked for.

    A dot is filled where the whole interval lies in the region.
    """
    shown = [claim for claim in reversed(claims) if claim.interval]
    figure, ax = plt.subplots(figsize=(7, 0.36 * len(shown) + 0.9))
    values = [end for claim in shown for end in claim.interval]
    edges = [edge for claim in shown for edge in (claim.above, claim.below) if edge is not None]
    least, most = min([0, *values, *edges]), max([0, *values, *edges])
    margin = 0.05 * (most - least) or 1.0  # nothing could be measured
    for row, claim in enumerate(shown):
        value, low, high = claim.interval
        left = least - margin if claim.above is None else claim.above
        right = most + margin if claim.below is None else claim.below
        ax.barh(row, right - left, left=left, height=0.7, color="#CCE5DD")
        ax.plot([low, high], [row, row], color="black", lw=1.5)
        ax.plot(value, row, "o", color="black", mfc="black" if claim.holds else "white")
    ax.axvline(0, color="#999999", lw=0.8)
    ax.set_yticks(range(len(shown)), [f"{claim.id} ({claim.verdict})" for claim in shown])
    ax.set(xlim=(least - margin, most + margin), title="green: where a whole interval must lie")
    return figure


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
        names = [name for name in map(str, found.hue_names) if name in drawn]
        found.figure.legend([drawn[name] for name in names], names, loc="outside center right")
    return found


def sliders(draw, **ranges):
    """`draw` with a slider or a list for each of its values, as ipywidgets' interact has them.

    Only where a person has opened the notebook on a Jupyter server (`make lab`): an executed one
    keeps pictures, and nothing that needs a kernel.
    """
    if "JPY_SESSION_NAME" in os.environ and find_spec("ipywidgets"):
        from ipywidgets import interact

        def shown(**values):
            draw(**values)  # what is returned would be shown twice

        interact(shown, **ranges)


# ---------------------------------------------------------------------- trees and documents


def draw_tree(tree, ax):
    """Draw an nltk tree: each nonterminal stands above the middle of what it spans."""
    next_leaf, middle = iter(range(len(tree.leaves()))), {"ha": "center", "va": "center"}

    def place(node, depth):
        if isinstance(node, str):
            x, y = next(next_leaf), -tree.height()
            look = {"fontsize": 9, "fontweight": "bold", "color": ROLE_COLOURS.get(node, "black")}
            ax.text(x, y, node, **middle, **look)
            return x, y + 0.25
        spots = [place(child, depth + 1) for child in node]
        x = (spots[0][0] + spots[-1][0]) / 2
        for cx, cy in spots:
            ax.plot([x, cx], [-depth - 0.2, cy], color="#BBBBBB", lw=1, zorder=0)
        box = {"fc": "white", "ec": "none", "pad": 1}
        ax.text(x, -depth, node.label(), fontsize=8, bbox=box, **middle)
        return x, -depth + 0.2

    place(tree, 0)
    ax.set(xlim=(-0.7, len(tree.leaves()) - 0.3), ylim=(-tree.height() - 0.8, 0.4))
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
    token = pd.DataFrame({name: value.tolist() for name, value in documents.token.items()})
    for word in token.itertuples():
        x, y = word.place, -word.sentence
        ax.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, fc=shades[word.role], ec="none"))
        ax.text(x, y, words[word.tokens], ha="center", va="center", fontsize=6, color="white")
    for level, width in (("paragraph", 0.7), ("section", 2.0)):
        for sentence in token.sentence[token[level].diff() > 0]:
            ax.axhline(0.5 - sentence, color="black", lw=width)
    last, across = token[["sentence", "place"]].max()
    ax.set(xlim=(-0.6, across + 0.6), ylim=(-last - 0.6, 0.6))
    ax.set(xlabel="place in the sentence (tokens)", ylabel="sentence of the document")
    ax.set_yticks(range(0, -last - 1, -4), range(0, last + 1, 4))


def with_palette(png: bytes) -> bytes:
    """A PNG picture in at most 256 colours, a quarter of the size; resolution and texts stay."""
    picture, texts, drawn = Image.open(BytesIO(png)), PngInfo(), BytesIO()
    for name, text in picture.text.items():
        texts.add_itxt(name, text)
    few = picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(drawn, "PNG", optimize=True, pnginfo=texts, dpi=picture.info.get("dpi", (100, 100)))
    return min(png, drawn.getvalue(), key=len)
