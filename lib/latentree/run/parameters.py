"""Parameters of a notebook: declared in its cell tagged `parameters`, checked before it runs."""

import ast
import difflib
import sys
from typing import Literal

import nbformat
import papermill
from pydantic import BaseModel, ValidationError, create_model, model_validator

from latentree.train.settings import TrainingConfig

# The same name means the same in every notebook.
_CHOICES = {"device": Literal["auto", "cpu", "cuda"], "spacing": Literal["even", "log"]}
for _name in ("optimizer", "packing", "precision", "trackers"):
    _CHOICES[_name] = TrainingConfig.model_fields[_name].annotation
_MAY_BE_0 = {"mlp_width", "tokens_per_step"}
_MAY_BE_EMPTY = {"named", "once", "replicas", "trackers"}


class Parameters(
    BaseModel, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True
):
    """The parameters of one notebook: types are strict, whole numbers above 0, lists not empty."""

    @model_validator(mode="after")
    def _within_limits(self):
        for name, value in self:
            values = [*value.values()] if isinstance(value, dict) else value
            values = values if isinstance(values, list) else [values]
            whole = [number for number in values if type(number) is int]
            if not values and name not in _MAY_BE_EMPTY:
                raise ValueError(f"{name} = []: give at least one")
            if name.endswith(("seeds", "corpora")) and len(set(values)) < len(values):
                raise ValueError(f"{name} = {value}: give each only once")
            least = 0 if name in _MAY_BE_0 or name.endswith(("seed", "seeds")) else 1
            if whole and min(whole) < least:
                raise ValueError(f"{name} = {value}: must be {least} or more")
        return self


def declared(notebook) -> type[Parameters]:
    """What a notebook (a path) declares, `name: type = literal  # meaning`, as a pydantic model.

    Raises ValueError for a notebook that is none, or a declaration that is not of this form.
    """
    fields = {}
    try:
        inspected = papermill.inspect_notebook(str(notebook))
    except (ValueError, nbformat.ValidationError) as error:
        raise ValueError(f"{notebook}: {error}; give a notebook of version 4") from None
    for name, found in inspected.items():
        try:
            default = ast.literal_eval(found["default"])
        except (ValueError, SyntaxError):
            told = f"{notebook}: {name} = {found['default']}: write `name: type = literal`"
            raise ValueError(told) from None
        fields[name] = (_CHOICES.get(name, found["inferred_type_name"]), default)
    if "out" not in fields or "profile" not in fields:
        raise ValueError(f"{notebook}: its cell tagged `parameters` must declare profile and out")
    return create_model("Parameters", __base__=Parameters, **fields)


def check(values: dict, parameters: type[Parameters]) -> dict:
    """All parameters of a notebook: `values`, of their types and within their limits, and defaults.

    Raises ValueError, in one line, for the first that is not, or that is not declared.
    """
    if sys.flags.optimize > 1:
        raise ValueError("python -OO, PYTHONOPTIMIZE: transformers needs docstrings; run without")
    try:
        return parameters(**values).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
    if not first["loc"]:
        raise ValueError(first["msg"].removeprefix("Value error, "))
    name, given = first["loc"][0], first["input"]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, parameters.model_fields, n=1, cutoff=0)
        raise ValueError(f"{name} is not a parameter of this notebook: did you mean {near[0]}?")
    raise ValueError(f"{name} = {given!r}: {first['msg']}{_as_number(given)}")


def _as_number(given) -> str:
    """How to write a number that YAML reads as text, such as 1e-3."""
    try:
        float(given if isinstance(given, str) else "")
    except ValueError:
        return ""
    mantissa, e, exponent = given.lower().partition("e")
    number = f"{float(mantissa)}e{int(exponent):+d}" if e else f"{float(mantissa):.16g}"
    return f" (YAML reads text here: write {number})"
