"""The reading copy: what git keeps of the evening's run, and the paper's scorecard in README.md.

python docs/reading.py copy FOLDER [NN]    takes it over from a run's folder, or one notebook of it
python docs/reading.py report              writes the scorecard into README.md, between two marked
                                           lines, and all claims into outputs/reading/claims.md
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import yaml
from latentree.data.files import write_text
from latentree.evidence.compare import claims_of
from latentree.run.record import write_entry

READING = Path("outputs/reading")
STYLE = re.compile(r"<style scoped>.*?</style>\s*", re.DOTALL)
MOST = 3  # claims that a row of the scorecard shows; its verdict is that of all
WHOSE = {"paper": "Claims of the paper", "control": "Controls", "ours": "Our own claims"}
BEGIN, END = "<!-- scorecard: written by make report -->", "<!-- end of scorecard -->"


def copy(run: Path, reading: Path, number: str = "") -> None:
    """Take over the notebooks of a run whose names begin with `number`, and all that they wrote.

    The labs of a run, in its folder labs, go into the same folder of the reading copy.

    Raises ValueError if the run has no such notebook.
    """
    record = _record(run)
    names = [name for name in record if name.startswith(number)]
    if not names:
        raise ValueError(f"{run}: has no finished notebook {number}; execute it there first")
    for name in names:
        patterns = (
            f"{name}.ipynb",
            f"*/{name[:2]}[._]*.png",
            f"*/{name[:2]}_*.webp",
            f"tables/{name[:2]}_*.csv",
        )
        patterns += (f"results/{name[:2]}.json",)
        for earlier in [file for pattern in patterns for file in reading.glob(pattern)]:
            earlier.unlink()
        for file in [file for pattern in patterns for file in run.glob(pattern)]:
            target = reading / file.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        folder = Path("notebooks/labs" if run.name == "labs" else "notebooks")
        _take_prose(folder / f"{name}.ipynb", reading / f"{name}.ipynb")
        write_entry(reading, name, record[name])


def _take_prose(source: Path, executed: Path) -> None:
    """Give an executed notebook the prose of its source: it may change without a new run.

    When each cell was executed is left out, which is a sixth of the file, and how pandas would
    have each table set.
    """
    if not source.exists():
        return
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    cells, told = notebook["cells"], json.loads(source.read_text(encoding="utf-8"))["cells"]
    ran = {cell["id"]: cell for cell in cells if cell["cell_type"] == "code"}
    injected = [cell for cell in ran.values() if "injected-parameters" in _tags(cell)]
    if all(cell["id"] in ran for cell in told if cell["cell_type"] == "code"):
        cells = []
        for cell in told:
            cells.append(cell if cell["cell_type"] == "markdown" else ran[cell["id"]])
            cells += injected if "parameters" in _tags(cell) else []
    for cell in cells:
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output["data"]["text/html"] = STYLE.sub("", "".join(output["data"]["text/html"]))
        cell["metadata"] = {key: cell["metadata"][key] for key in cell["metadata"] if key == "tags"}
    text = json.dumps(notebook | {"cells": cells}, indent=1, ensure_ascii=False) + "\n"
    executed.write_text(text, encoding="utf-8")


def _tags(cell) -> list[str]:
    return cell["metadata"].get("tags", [])


def as_markdown(run: Path) -> str:
    """Verdicts by notebook, with the minutes and the memory that it took; every claim by whose."""
    record, claims = _record(run), claims_of(run).reset_index()
    claims["notebook"] = claims["file"].map({name[:2]: name for name in record})
    took = pd.DataFrame(record).T[["wall_seconds", "peak_memory_gb"]].astype(float)
    counts = pd.crosstab(claims["notebook"], claims["verdict"])
    counts.loc["all"] = counts.sum()
    minutes = took["wall_seconds"] / 60
    minutes["all"], took.loc["all"] = minutes.sum(), took.max()
    counts["minutes"] = minutes.round(1)
    counts["peak memory (GB)"] = took["peak_memory_gb"].round(1)
    device = next(iter(record.values()))["device"]
    machine = ", ".join([device["cpu"], *device["gpus"]])
    parts = [f"Run on {machine}; with 95 % intervals.", counts.to_markdown()]
    for whose, heading in WHOSE.items():
        shown = _shown(claims[claims["whose"] == whose])
        parts += [f"## {heading}", _narrow(shown.to_markdown(index=False, disable_numparse=True))]
    return "\n\n".join(parts)


def answers(labs: Path) -> str:
    """What each lab answers to "does hierarchy matter for this?": a row of a table each."""
    claims = claims_of(labs)
    rows = []
    for name in _record(labs):
        title = json.loads((labs / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]
        title = "".join(title["source"]).splitlines()[0].lstrip("# ")
        key = name[:2], "hierarchy-matters"
        claim = claims.loc[key]
        measured = _in_short(" ".join(key), claims).removeprefix("hierarchy-matters: ")
        link = f"[{title}](labs/{name}.ipynb)"
        rows.append([link, claim.statement, measured, f"**{matters(claim)}**"])
    columns = ["lab", "our question there", "measured, with 95 %", "does hierarchy matter?"]
    return _narrow(pd.DataFrame(rows, columns=columns).to_markdown(index=False))


def matters(claim) -> str:
    """What a claim that hierarchy adds something says: yes, no, or that it takes away."""
    if claim["above"] == claim["above"] and claim["high"] < claim["null"]:  # not NaN
        return "yes, the other way"
    return {"as predicted": "yes", "contradicted": "no"}.get(claim["verdict"], claim["verdict"])


def scorecard(run: Path) -> str:
    """The paper figure by figure (docs/scorecard.yaml): what was measured, and a verdict in words."""
    claims, rows = claims_of(run), []
    names = {name[:2]: name for name in _record(run)}
    for row in yaml.safe_load(Path(__file__).with_name("scorecard.yaml").read_text("utf-8")):
        other = {name: row[name] for name in ("against", "explained") if name in row}
        asked = claims.loc[[_key(name) for name in row["claims"]]]
        told = {name: claims.loc[_key(claim), "verdict"] for name, claim in other.items()}
        word = in_words(asked.verdict[asked.whose == "paper"], row.get("where", ""), **told)
        first = [*row["claims"][:MOST], *other.values()]
        named = [_in_short(name, claims) for name in first]
        file = f"{run.as_posix()}/figures/{row['picture']}.png"
        picture = f'<img src="{file}" width="180" alt="{row["figure"]}">'
        link = f"{run.as_posix()}/{names[row['picture'][:2]]}.ipynb"
        shown = [
            row["figure"].replace(" ", "&nbsp;"),
            row["says"],
            "<br>".join(named),
            f"**{word}**",
            row.get("released", ""),
        ]
        rows.append([*shown, f"[{picture}]({link})"])
    measured = "measured here, with 95 %"
    columns = ["paper", "it says", measured, "verdict", "what the release's score shows", "see"]
    return _narrow(pd.DataFrame(rows, columns=columns).to_markdown(index=False))


def badges(cited: dict) -> str:
    """Badges that open the notebooks on Colab and Binder, if CITATION.cff says where they are."""
    if "repository-code" not in cited:
        return ""
    name = cited["repository-code"].removeprefix("https://github.com/")
    colab, binder = "https://colab.research.google.com", "https://mybinder.org"
    first = f"{colab}/github/{name}/blob/main/notebooks/01_grammar_design.ipynb"
    notebooks = f"{binder}/v2/gh/{name}/main?labpath=notebooks"
    return (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({first}) "
        f"[![Open on Binder]({binder}/badge_logo.svg)]({notebooks})\n\n"
    )


def in_words(papers, where: str = "", against: str = "", explained: str = "") -> str:
    """What the verdicts on the paper's claims of a row, and on two of ours, say together."""
    tested = [verdict for verdict in papers if verdict != "not tested"]
    held = [verdict in ("present", "as predicted") for verdict in tested]
    if against == "as predicted":
        return "contradicted in part" if any(held) else "contradicted"
    if not tested:
        return "not tested"
    part = "" if len(tested) == len(papers) else ", as far as tested"
    if all(held):
        less = ", but something simpler does as well" if explained == "as predicted" else ""
        return f"holds {where}".strip() + less + part
    if any(held):
        return f"holds in part {where}".strip()
    if set(tested) <= {"absent", "contradicted"}:
        return f"not found {where}".strip() + part
    return "undecided"


def _narrow(table: str) -> str:
    """A Markdown table without the spaces and dashes that only align it: short lines, for git."""
    return re.sub("-{4,}", "---", re.sub(" {2,}", " ", table))


def _key(name: str) -> tuple:
    return tuple(name.split())


def _in_short(name: str, claims: pd.DataFrame) -> str:
    """A claim's id, value and interval, its null unless it is 0, and how many seeds; or why it has none."""
    claim, (_, id) = claims.loc[_key(name)], _key(name)
    if pd.isna(claim.value):
        return f"{id}: not tested ({claim.reason})"
    about = [f"null {claim.null:.2g}"] if abs(claim.null or 0) > 0 else []
    about += [f"{claim.n:.0f} {claim.over}"] if claim.over == "seeds" else []
    told = f" ({', '.join(about)})" if about else ""
    return f"{id}: {claim.value:.2g} [{claim.low:.2g}, {claim.high:.2g}]{told}"


def _shown(claims: pd.DataFrame) -> pd.DataFrame:
    """Every claim as texts: its interval, the region in which it must lie, its verdict."""
    texts = claims.reindex(columns=["value", "low", "high", "null", "above", "below"])
    texts = texts.map(lambda number: "" if pd.isna(number) else f"{number:.3g}")
    interval = texts["value"] + " [" + texts["low"] + ", " + texts["high"] + "]"
    above = ("> " + texts["above"]).where(texts["above"] != "", "")
    below = ("< " + texts["below"]).where(texts["below"] != "", "")
    table = claims.assign(
        value=interval.where(texts["value"] != "", claims.get("reason", "")),
        null=texts["null"],
        region=(above + " " + below).str.strip(),
        seeds=claims["seeds"].map(len),
        claim=claims["id"],
        notebook=claims["file"],
    )
    columns = "notebook claim source definition statement corpus paper value null region seeds"
    table = table.reindex(columns=[*columns.split(), "verdict"]).astype(object).fillna("")
    return table.replace({r"\|": r"\\|"}, regex=True)  # inside a table's cell


def _record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    try:
        if arguments[:1] == ["copy"]:
            run = Path(arguments[1])
            copy(run, READING / "labs" if run.name == "labs" else READING, *arguments[2:])
        else:
            readme = Path("README.md")
            before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
            cited = yaml.safe_load(Path("CITATION.cff").read_text("utf-8"))
            table = f"{BEGIN}\n\n{badges(cited)}{scorecard(READING)}\n\n{END}"
            write_text(readme, before + table + rest.split(END)[1])
            write_text(READING / "claims.md", f"# All claims\n\n{as_markdown(READING)}\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
