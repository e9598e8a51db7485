"""All claims of a run in one table: python -m latentree.run.report FOLDER writes claims.csv there and the table into README.md.

The README has it between two markers, with the run's time and memory beside it.
"""

import re
import sys
from pathlib import Path

import pandas as pd

from latentree.data.files import read_json, write_text, writing
from latentree.evidence.claims_old import Claim
from latentree.run.record import project_root

BEGIN, END = "<!-- claims: written by make report -->", "<!-- end of claims -->"


def claims_of(folder: Path) -> pd.DataFrame:
    """The claims of a run, one row each, in the order of the notebooks. ValueError if the folder has no results."""
    files = sorted((folder / "results").glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: has no results/*.json; name the folder of a finished run")
    results = [read_json(file, "execute its notebook again") for file in files]
    for file, result in zip(files, results):
        for claim in result.setdefault("claims", []):
            if missing := {*Claim.model_fields, "verdict"} - claim.keys():
                raise ValueError(
                    f"{file}: claim {claim.get('id')!r} has no {min(missing)}; execute its notebook again"
                )
    rows = [
        {"notebook": result["notebook"]} | claim for result in results for claim in result["claims"]
    ]
    if not rows:
        raise ValueError(f"{folder}: its results hold no claims; name the folder of a finished run")
    table = pd.DataFrame(rows)
    return table.assign(seeds=table.seeds.map(len), cell=table.cell.astype("Int64")).rename(
        columns={"id": "claim"}
    )


def number(value) -> str:
    """A value to three digits; nothing for none."""
    return "" if value is None or pd.isna(value) else f"{value:.3g}"


def as_markdown(folder: Path) -> str:
    """Verdicts by notebook with what the run took, then every claim."""
    claims, record = (
        claims_of(folder),
        read_json(folder / "run.json", "name the folder of a finished run").get("notebooks", {}),
    )
    counts = pd.crosstab(claims.notebook, claims.verdict)
    took = pd.DataFrame(
        {
            name: {
                "minutes": entry["wall_seconds"] / 60,
                "peak memory (GB)": entry["peak_memory_gb"],
            }
            for name, entry in record.items()
        }
    ).T
    summary = counts.join(took.round(1))
    summary.loc["all"] = [
        *counts.sum(),
        took.minutes.sum().round(1),
        took["peak memory (GB)"].max().round(1),
    ]
    summary[counts.columns] = summary[counts.columns].astype(int)
    intervals = [
        f"{number(c.value)} [{number(c.low)}, {number(c.high)}]" if number(c.value) else ""
        for c in claims.itertuples()
    ]
    shown = claims.assign(
        value=intervals, null=claims.null.map(number), notebook=claims.notebook.str[:2]
    )
    shown = shown.replace({r"\|": r"\\|"}, regex=True)  # inside a table's cell
    shown = shown[
        [
            "notebook",
            "cell",
            "claim",
            "source",
            "definition",
            "statement",
            "corpus",
            "value",
            "null",
            "seeds",
            "verdict",
        ]
    ]
    processor = next(iter(record.values()))["device"]
    where = processor["cpu"] + "".join(f", {gpu}" for gpu in processor["gpus"])
    every = shown.to_markdown(index=False, disable_numparse=True)  # "01" is no number
    every = re.sub(
        "-{4,}", "---", re.sub(" {2,}", " ", every)
    )  # no columns of spaces in a file that is read as a page
    return "\n\n".join(
        [
            f"Run on {where}; with 95 % intervals.",
            summary.rename_axis("notebook").to_markdown(),
            f"<details><summary>All {len(claims)} claims</summary>",
            every,
            "</details>",
        ]
    )


def main(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    try:
        if len(arguments) != 1:
            raise ValueError(
                "usage: python -m latentree.run.report FOLDER, the folder of a finished run"
            )
        folder, readme = Path(arguments[0]), project_root() / "README.md"
        if not readme.is_file():
            raise ValueError(f"{readme}: cannot be read; start it in the project's folder")
        text = readme.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            raise ValueError(
                f"README.md: has no lines {BEGIN} and {END}; put them where the table shall be"
            )
        shown = as_markdown(folder)
        with writing(folder / "claims.csv"):
            write_text(folder / "claims.csv", claims_of(folder).to_csv(index=False))
        write_text(readme, f"{text.split(BEGIN)[0]}{BEGIN}\n\n{shown}\n\n{END}{text.split(END)[1]}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
