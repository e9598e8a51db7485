"""Figures: one palette for the corpora, trees, documents, curves with intervals. Files land in out/figures/."""

from io import BytesIO
from pathlib import Path

import numpy as np
import seaborn as sns
from matplotlib.patches import Rectangle

from latentree.data.files import with_palette

# Okabe and Ito's colour-blind safe colours; a corpus has the same one in every figure.
KIND_COLOURS = {
    "PCFG": "#0072B2",
    "flat": "#D55E00",
    "static": "#009E73",
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
    "counts": ("#555555", "--"),
    "latent-aware": ("#555555", "-"),
}


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


def kind(corpus):
    """The kind of a corpus by its file's name: PCFG, flat, static, n-gram (order-n chain), hashed n-gram, small release."""
    endings = {"-flat": "flat", "-static": "static", "-ngram": "hashed n-gram"}
    found = next(
        (name for ending, name in endings.items() if corpus.endswith(ending)),
        "n-gram" if "-order" in corpus else "PCFG",
    )
    return (
        found.replace("PCFG", "small release").replace("flat", "small release, flat")
        if "-small" in corpus
        else found
    )


def colour(corpus):
    """The colour of a corpus in all figures."""
    return KIND_COLOURS[kind(corpus)]


def described(figure):
    """What a figure shows, in words, from its panels' titles, axes and legends: the picture's alternative text."""
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


def save(figure, out, name):
    """Write `figure` to out/figures/name.png, with its description in words (`described`) inside."""
    folder = Path(out) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, bbox_inches="tight", metadata={"Description": described(figure)})
    (folder / f"{name}.png").write_bytes(with_palette(drawn.getvalue()))


def save_table(table, out, name):
    """Write a DataFrame to out/tables/name.csv, numbers to six digits."""
    folder = Path(out) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")


def draw_tree(tree, ax, words=None):
    """Draw an nltk tree; `words` stand below its leaves. Nonterminals stand above the middle of what they span."""
    words = None if words is None else iter(words)
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
            if words is not None:
                ax.text(x, -tree.height() - 0.45, next(words), ha="center", va="center", fontsize=8)
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


def draw_document(documents, roles, ax, names=str):
    """Draw one document, a sentence a line, a box a token, coloured by role; lines between paragraphs and sections."""
    token = {name: value.tolist() for name, value in documents.token.items()}
    for i, word in enumerate(token["tokens"]):
        role = roles[token["role"][i]]
        x, y = token["place"][i], -token["sentence"][i]
        ax.add_patch(
            Rectangle(
                (x - 0.46, y - 0.42), 0.92, 0.84, fc=ROLE_COLOURS.get(role, "#777777"), ec="none"
            )
        )
        ax.text(x, y, names(word), ha="center", va="center", fontsize=7, color="white")
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


def reference_line(ax, name, value, **where):
    """A labelled horizontal reference: syntax-only, in-sentence, counts or latent-aware."""
    shade, dashes = LINES[name]
    ax.axhline(value, color=shade, ls=dashes, lw=1.2, label=name, **where)


def band(ax, x, rows, color, marker=".", **line):
    """A curve of `rows` ("value") over `x` with its interval ("low", "high") as a band; `line` goes to plot."""
    ax.plot(x, rows["value"], color=color, marker=marker, **line)
    ax.fill_between(x, rows["low"], rows["high"], color=color, alpha=0.2, lw=0)


def heatmap(ax, rows, limit: float, index="layer", dots=False):
    """Cells of `rows` (columns `index`, tokens, value), a row for each of `index`, a column for each checkpoint.

    Red is -limit, white 0, blue limit; with `dots` a dot marks where the interval (low, high) contains 0. Returns the image
    for a colour bar; without rows hides the axes and returns None.
    """
    if not len(rows):
        ax.axis("off")
        return None
    cells = rows.pivot(index=index, columns="tokens", values="value")
    image = ax.imshow(
        cells,
        cmap="RdBu",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    marks = range(0, cells.shape[1], max(1, cells.shape[1] // 4))
    ax.set_xticks(marks, [f"{cells.columns[mark] / 1e6:.1f}" for mark in marks])
    ax.set_yticks(range(len(cells)), cells.index)
    if dots:
        open_to_0 = rows.assign(value=(rows.low <= 0) & (rows.high >= 0)).pivot(
            index=index, columns="tokens", values="value"
        )
        ax.plot(*np.argwhere(open_to_0.to_numpy())[:, ::-1].T, ".", ms=2.5, color="#555555")
    return image
