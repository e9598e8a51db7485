"""A document to point at: where a head looks from each word, and what belongs to the word there.

The page's own script does it, with nothing from outside; without scripts, the words are plain text.
"""

import json
from html import escape
from importlib.resources import files

from IPython.display import HTML


def hover(words, colours, attention, belongs) -> HTML:
    """`words` as a text; the one that is pointed at, or has the keyboard's focus, is the query.

    `colours` underline them. Of `attention` (query, key) each key is shaded by what it is paid, in
    hundredths, and those that `belongs` (query, key) names are boxed. At first the query is the one
    that pays most to what belongs to it. The arrow keys go from word to word.

    ValueError if an array is not square, with a row for each word.
    """
    for name, array in (("attention", attention), ("belongs", belongs)):
        if tuple(array.shape) != (len(words), len(words)):
            raise ValueError(
                f"{name}: is of shape {tuple(array.shape)} for {len(words)} words; give "
                "(query, key), both words"
            )
    percent = (100 * attention).round().int()
    paid = [{key: row[key].item() for key in row.nonzero()[:, 0].tolist()} for row in percent]
    boxed = [row.nonzero()[:, 0].tolist() for row in belongs]
    first = int((attention * belongs).sum(1).argmax())
    spans = []
    for word, colour in zip(words, colours, strict=True):
        spans.append(f'<span tabindex="-1" style="--colour: {colour}">{escape(word)}</span>')
    page = files("latentree.evidence").joinpath("hover.html").read_text("utf-8")
    data = json.dumps([paid, boxed, first], separators=(",", ":"))
    return HTML(page.replace("WORDS", "\n".join(spans)).replace("DATA", data))
