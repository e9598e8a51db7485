"""Files of a user are read strictly; files of a run are written whole or not at all."""

import os
from pathlib import Path

import yaml


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"{name} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path) -> dict:
    """The mapping in a YAML file. Raises ValueError, one line, if it holds none."""
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.load(file, _StrictLoader)
        except yaml.YAMLError as error:
            told = " ".join(str(error).split())
            raise ValueError(f"{path}: is not YAML: {told}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {values!r}; write lines `name: value`")
    return values


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
