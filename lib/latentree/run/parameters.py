"""Parameters of a notebook: declared once, in its cell tagged `parameters`, and checked before a kernel starts."""

import ast
import difflib
import inspect
import io
import os
import tokenize
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from latentree.data.files import read_notebook, read_yaml

FORM = "write it as `name: type = literal  # meaning, unit`"

load = read_yaml  # a parameter file is any YAML mapping; `check` says whether it suits a notebook

# type as written in the cell: (type that pydantic checks strictly, what to write in the file)
TYPES = {
    "int": (int, "a whole number such as 3"),
    "float": (FiniteFloat, "a number such as 0.5 or 1.0e-3"),
    "bool": (bool, "true or false"),
    "str": (str, "text in quotes"),
    "list[int]": (list[int], "whole numbers such as [0, 1]"),
    "list[float]": (list[FiniteFloat], "numbers such as [0.5, 1.0]"),
    "list[str]": (list[str], "texts such as ['a', 'b']"),
}

CHOICES = {
    "profile": ["smoke", "laptop", "gpu", "paper", "paper-muon"],
    "optimizer": ["adamw", "muon"],
    "schedule": ["linear", "cosine"],
    "device": ["auto", "cpu", "cuda"],
    "spacing": ["even", "log"],
    "precision": ["float32", "bfloat16"],
}
POSITIVE = (lambda value: value > 0, "greater than 0")
SEED = (lambda seed: 0 <= seed < 2**63, "0 or more, below 2**63")
RATE = (lambda value: 0 < value <= 1, "greater than 0 and at most 1")

# The same name means the same in every notebook. name: (predicate, the values it accepts in words)
LIMITS = {
    "out": (lambda folder: folder.strip() != "", "a folder's name"),
    "seed": SEED,
    "seeds": (
        lambda seeds: len(set(seeds)) == len(seeds) > 0 and all(map(SEED[0], seeds)),
        "one or more, distinct, 0 or above, below 2**63",
    ),
    "corpora": (lambda names: len(set(names)) == len(names) > 0, "one or more, distinct"),
    "tokens": (
        lambda counts: len(counts) > 0 and min(counts) > 0,
        "a number greater than 0 for each corpus",
    ),
    "margin": (lambda margin: margin >= 0, "0 or more"),
    "corpus_seed": SEED,
    "learning_rate": RATE,
    "muon_learning_rate": RATE,
}
LIMITS |= {
    name: (choices.__contains__, "one of " + ", ".join(choices))
    for name, choices in CHOICES.items()
}
for name in "context width layers heads batch_sequences micro_batches held_out_sequences checkpoints documents longest_distance sequences ablated_heads draws latents repetitions swept each sequences_at_end furthest deep_layers deep_tokens level_tokens tree_tokens longest probed maps count local_tokens toy_tokens memory_limit_gb download_limit_gb".split():
    LIMITS[name] = POSITIVE
for name in "windows distances contrasts".split():
    LIMITS[name] = (
        lambda numbers: len(numbers) > 0 and min(numbers) > 0,
        "one number or more, each greater than 0",
    )


@dataclass
class Declaration:
    """One line of the parameters cell."""

    type: str
    default: object
    meaning: str


def declared(notebook) -> dict[str, Declaration]:
    """The declarations in the cell of `notebook` (a path) that is tagged `parameters`, by name."""
    tagged = [
        cell
        for cell in read_notebook(notebook)["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    if len(tagged) != 1 or tagged[0]["cell_type"] != "code":
        raise ValueError(
            f"{notebook}: {len(tagged)} cells are tagged `parameters`: tag exactly one code cell"
        )
    source = tagged[0]["source"]
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(
            f"{notebook}: line {error.lineno} of the parameters cell is not Python: {FORM}"
        ) from None
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    found, lines = {}, source.splitlines()
    for statement in statements:
        line = lines[statement.lineno - 1].strip()
        try:
            name, declaration = declare(
                statement,
                line,
                next(
                    (
                        comments[n]
                        for n in range(statement.lineno, statement.end_lineno + 1)
                        if n in comments
                    ),
                    "",
                ),
            )
            if name in found:
                raise ValueError(f"{name} is declared twice: keep one line")
        except ValueError as error:
            raise ValueError(f"{notebook}: parameters cell, `{line}`: {error}") from None
        found[name] = declaration
    return found


def declare(statement: ast.stmt, line: str, meaning: str) -> tuple[str, Declaration]:
    """Name and declaration of one statement of the parameters cell, whose text is `line`."""
    named = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    if not named or statement.value is None or not meaning:
        raise ValueError(FORM)
    if line.count("=") > 1:
        raise ValueError(
            "papermill does not inspect a line with two `=` signs: keep the first one only"
        )
    type_name = ast.unparse(statement.annotation)
    if type_name not in TYPES:
        raise ValueError(f"type {type_name} is not known: choose one of {', '.join(TYPES)}")
    try:
        default = ast.literal_eval(statement.value)
    except ValueError:
        raise ValueError(
            f"default {ast.unparse(statement.value)} is not a literal: {FORM}"
        ) from None
    name = statement.target.id
    return name, Declaration(type_name, check_value(name, default, type_name), meaning)


def check(values: dict, declarations: dict[str, Declaration]) -> dict:
    """`values`, each of a declared name, of its type and within its limits; whole numbers become floats if asked."""
    for name in values:
        if name not in declarations:
            near = difflib.get_close_matches(str(name), declarations, n=1, cutoff=0)
            mend = f"did you mean {near[0]}?" if near else "the notebook declares none"
            raise ValueError(f"{name} is not a parameter of this notebook: {mend}")
    return {
        name: check_value(name, value, declarations[name].type) for name, value in values.items()
    }


def check_value(name: str, value, type_name: str):
    """`value` as a `type_name`, if the type is right and LIMITS allows it for this name."""
    type_, example = TYPES[type_name]
    try:
        value = TypeAdapter(type_).validate_python(value, strict=True)
    except ValidationError:
        if isinstance(value, str) and (number := as_yaml_number(value, type_name)):
            raise ValueError(
                f"{name} = {value!r} is read as text, not as {type_name}: write {number}"
            ) from None
        raise ValueError(
            f"{name} = {value!r} is not of type {type_name}: write {example}"
        ) from None
    allowed, words = LIMITS.get(name, (lambda value: True, ""))
    if not allowed(value):
        raise ValueError(f"{name} = {value!r} is out of range: it must be {words}")
    return value


def as_yaml_number(text: str, type_name: str) -> str:
    """How to write the number in `text` so that YAML reads a number ('1e-3' needs its point: 1.0e-3), or ''."""
    try:
        number = float(text)
    except ValueError:
        return ""
    if type_name != "float":
        return f"{number:.0f}" if type_name == "int" and number.is_integer() else ""
    mantissa, e, exponent = text.strip().lower().partition("e")
    sign = "" if exponent[:1] in ("-", "+", "") else "+"
    return mantissa + ("" if "." in mantissa or not e else ".0") + e + sign + exponent


def validate(namespace: dict) -> SimpleNamespace:
    """Check the parameters inside the notebook, as `validate(globals())` in the cell after the parameters cell.

    Jupyter starts a kernel in the notebook's folder: the nearest folder above that holds params/ becomes the working
    folder, so that paths are told from the project's root. Names and types are the annotations that the parameters cell left; values are the current ones, injected or not.
    """
    here = Path.cwd()
    os.chdir(
        next((folder for folder in (here, *here.parents) if (folder / "params").is_dir()), here)
    )
    types = {
        name: inspect.formatannotation(type_)
        for name, type_ in namespace.get("__annotations__", {}).items()
    }
    known = {name: Declaration(type_, None, "") for name, type_ in types.items() if type_ in TYPES}
    return SimpleNamespace(**check({name: namespace[name] for name in known}, known))
