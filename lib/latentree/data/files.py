"""Files of a user are read strictly; files of a run are written whole or not at all."""

import json
import os
from contextlib import contextmanager
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


def read_json(path: Path, mend: str) -> dict:
    """The mapping in a JSON file. Raises ValueError, with the `mend`, if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {mend}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no mapping; {mend}")
    return values


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path):
    """What the disk or missing rights raise becomes one ValueError about `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); make room there or name another folder"
        ) from None
