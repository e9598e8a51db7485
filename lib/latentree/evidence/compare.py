"""Two runs side by side: python -m latentree.evidence.compare FOLDER OTHER

Lists claims whose value, interval or verdict differs or that one run lacks; exits with 1 if any.
Numbers differ if they are further apart than a millionth of the larger of 1 and their sizes.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import pandas as pd


def claims_of(folder) -> pd.DataFrame:
    """The claims in folder/results/*.json, by (file, id); ValueError for a folder without any."""
    rows = []
    for file in sorted((Path(folder) / "results").rglob("*.json")):
        claims = json.loads(file.read_text(encoding="utf-8"))["claims"]
        rows += [{"file": file.stem} | claim for claim in claims]
    if not rows:
        raise ValueError(f"{folder}: has no results/*.json with claims; name the folder of a run")
    return pd.DataFrame(rows).set_index(["file", "id"])


def differences(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """What differs between two tables of `claims_of`: DataFrame (file, claim, what, one, other)."""
    rows = []
    for key in dict.fromkeys([*one.index, *other.index]):
        if key not in one.index or key not in other.index:
            rows.append((*key, "claim", key in one.index, key in other.index))
            continue
        for name in ("value", "low", "high", "verdict"):
            a, b = one.loc[key, name], other.loc[key, name]
            same = a == b or (pd.isna(a) and pd.isna(b))
            if name != "verdict":
                same = same or math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)
            if not same:
                rows.append((*key, name, a, b))
    return pd.DataFrame(rows, columns=["file", "claim", "what", "one", "other"])


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m latentree.evidence.compare", description=__doc__)
    parser.add_argument("run", nargs=2, help="folder of a run")
    try:
        one, other = map(claims_of, parser.parse_args(arguments).run)
    except ValueError as error:
        parser.error(str(error))
    found = differences(one, other)
    if len(found):
        print(found.to_string(index=False))
    changed = found[["file", "claim"]].drop_duplicates()
    print(f"{len(changed)} of {len(one.index.union(other.index))} claims differ")
    return int(len(found) > 0)


if __name__ == "__main__":
    sys.exit(main())
