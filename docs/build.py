"""The book: `python docs/build.py` builds build/book/html from these pages and outputs/reading.

The notebooks are copied with what a page needs and a notebook does not: links to other notebooks,
to the literature and the glossary, alternative texts of figures, solutions folded away, and a box
that says how to run the page oneself.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image
from reading import READING, answers, as_markdown

DOCS, BOOK = Path(__file__).parent, Path("build/book")
CITED = {  # how the notebooks name a work (the year in brackets or not): its key in references.bib
    r"Akyurek et al\. 2024": "akyurek2024",
    r"Cochran 1977": "cochran1977",
    r"Elhage et al\. 2021": "elhage2021",
    r"Goldowsky-Dill et al\. 2023": "goldowskydill2023",
    r"Hewitt and Manning 2019": "hewitt2019",
    r"Jordan 2024": "jordan2024",
    r"Mantel 1967": "mantel1967",
    r"McGrath et al\. 2023": "mcgrath2023",
    r"Miller 1955": "miller1955",
    r"Olsson et al\. 2022": "olsson2022",
    r"Quenouille 1956": "quenouille1956",
    r"Stolcke 1995": "stolcke1995",
    r"Todd et al\. 2024": "todd2024",
}
# Terms that texts use in their everyday sense, too: these are not linked.
EVERYDAY = set(
    "choice claim cue filter habits interval maps margin place sequence transfer".split()
)
LINKS = {  # from files as they lie in the project to pages of the book
    rf"\]\((?:\.\./)?{READING.as_posix()}/((?:labs/)?\w+\.ipynb)": r"](\1",
    rf"\]\((?:\.\./)?{READING.as_posix()}/claims\.md": "](results.md",
    r"\(docs/(\w+\.md)\)": r"(\1)",
}
RUN = """:::{{admonition}} Run this yourself
:class: tip
In a clone of the repository, `make run` executes all notebooks, and `make exercises` writes a copy
of each with the solutions left to you. This one alone:

    .venv/bin/python -m latentree.run notebooks/{name}.ipynb \\
        --params params/laptop/{name}.yaml --out outputs/mine
:::
"""


def linked(text: str, own: str, names: dict) -> str:
    """Markdown with links from `notebook 03` and from cited works; code is left alone."""

    def numbers(match):
        return re.sub(
            r"\b0[1-9]\b",
            lambda n: n[0] if n[0] == own else f"[{n[0]}]({names[n[0]]}.ipynb)",
            match[0],
        )

    pieces = re.split(r"(```.*?```|`[^`\n]*`|\$[^$\n]+\$)", text, flags=re.DOTALL)
    for at in range(0, len(pieces), 2):
        pieces[at] = re.sub(r"\bnotebooks? (0[1-9])((, | and | to )0[1-9])*", numbers, pieces[at])
        for said, key in CITED.items():
            pieces[at] = re.sub(said, f"{{cite:alp}}`{key}`", pieces[at])
            pieces[at] = re.sub(rf"{said[:-4]}\({said[-4:]}\)", f"{{cite:t}}`{key}`", pieces[at])
    return "".join(pieces)


def with_terms(cells) -> None:
    """Link the first use of each term of the glossary in a notebook's text."""
    glossary = (DOCS / "glossary.md").read_text(encoding="utf-8")
    terms = set(re.findall(r"^(\w[^\n{]*)\n  ", glossary, re.MULTILINE)) - EVERYDAY
    longest_first = "|".join(map(re.escape, sorted(terms, key=len, reverse=True)))
    left_alone = r"```.*?```|`[^`]*`|\$[^$]+\$|\{[\w:]+\}|!?\[[^\]]*\]\([^)]*\)|<[^>]+>|^[#|][^\n]*"
    pattern = re.compile(rf"({left_alone})|\b({longest_first})(s?)\b", re.DOTALL | re.MULTILINE)

    def link(match):
        if match[1] or match[2] not in terms:
            return match[0]
        terms.remove(match[2])
        return f"{{term}}`{match[0]} <{match[2]}>`"

    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = pattern.sub(link, cell.source)


def page_of(path: Path, names: dict):
    """An executed notebook as a page of the book."""
    notebook, figures, section = nbformat.read(path, 4), path.parent / "figures", ""
    own = path.name[:2]
    if path.parent.name == "labs":  # its pages lie one folder lower
        own, names = "", {number: f"../{name}" for number, name in names.items()}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            section = [section, *re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)][-1]
            cell.source = linked(cell.source, own, names)
        elif "solution" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("hide-input")
        saved = [
            name
            for name in re.findall(r'"(\d\d_\w+)"', cell.source)
            if (figures / f"{name}.png").exists()
        ]
        if cell.cell_type == "code" and any(
            "image/png" in output.get("data", {}) for output in cell.outputs
        ):
            described = "a figure that the next cell finishes"
            if saved:
                described = Image.open(figures / f"{saved[-1]}.png").text["Description"]
            cell.metadata["mystnb"] = {"image": {"alt": f"{section}: {described}"}}
        for output in cell.get("outputs", []):
            if "image/webp" in output.get("data", {}):
                film = output.data.pop("image/webp").replace("\n", "")
                alt = f"{section}: a moving picture"
                output.data["text/html"] = f'<img alt="{alt}" src="data:image/webp;base64,{film}">'
    with_terms(notebook.cells)
    title, rest = notebook.cells[0].source.split("\n", 1)
    name = path.relative_to(READING).with_suffix("").as_posix()
    notebook.cells[0].source = f"{title}\n\n{RUN.format(name=name)}\n{rest}"
    return notebook


def exercise_list(pages: dict) -> str:
    """A table of all exercises: notebook, title, difficulty, minutes."""
    title = re.compile(r"^### Exercise \d+ · (.+) \((\w+), (\d+) minutes\)$", re.MULTILINE)
    rows = [
        (f"[{name.split('_')[0]}]({name}.ipynb)", *found)
        for name, notebook in pages.items()
        for cell in notebook.cells
        for found in title.findall(cell.source)
    ]
    columns = ["notebook", "exercise", "difficulty", "minutes"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False)


def minutes_of(folder: Path) -> str:
    """A table of what each notebook takes to execute."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    rows = [(name, round(entry["wall_seconds"] / 60, 1)) for name, entry in record.items()]
    return pd.DataFrame(rows, columns=["notebook", "minutes to execute"]).to_markdown(index=False)


def main() -> int:
    folder, source = READING, BOOK / "source"
    shutil.rmtree(BOOK, ignore_errors=True)
    shutil.copytree(
        DOCS, source, ignore=shutil.ignore_patterns("build.py", "reading.py", "__pycache__")
    )
    readme = Path("README.md").read_text(encoding="utf-8")
    Path(source, "README.md").write_text(readme, encoding="utf-8")
    shutil.copytree(folder / "figures", source / folder / "figures")
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    names = {path.name[:2]: path.stem for path in paths}
    pages = {path.stem: page_of(path, names) for path in paths}
    labs = {
        f"labs/{path.stem}": page_of(path, names)
        for path in sorted((folder / "labs").glob("[0-9][0-9]_*.ipynb"))
    }
    Path(source, "labs").mkdir()
    for name, notebook in (pages | labs).items():
        nbformat.write(notebook, source / f"{name}.ipynb")
    filled = {
        "NOTEBOOKS": "\n".join(pages),
        "LABS": "\n".join(labs),
        "EXERCISES": exercise_list(pages | labs),
        "MINUTES": minutes_of(folder),
        "CLAIMS": as_markdown(folder),
        "ANSWERS": answers(folder / "labs"),
        "OF_LABS": as_markdown(folder / "labs"),
    }
    room = re.compile(rf"^(?:\*A table in the book: )?({'|'.join(filled)})(?:\.\*)?$", re.MULTILINE)
    for page in source.rglob("*.md"):
        text = room.sub(lambda match: filled[match[1]], page.read_text(encoding="utf-8"))
        for link, target in LINKS.items():
            text = re.sub(link, target, text)
        page.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    return subprocess.run([*command, source, BOOK / "html"]).returncode


if __name__ == "__main__":
    sys.exit(main())
