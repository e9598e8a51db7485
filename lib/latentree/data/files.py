"""Files of a user are read strictly; files of a run are written whole or not at all."""

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, SoftFileLock, Timeout

_NO_FLOCK = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # filelock knows ENOSYS


class _StrictLoader(yaml.SafeLoader):
    """YAML that means what it says: no key twice, and no word that is a number or date in disguise.

    YAML 1.1 reads 010 as 8, 1:30 as 90, on, off, yes and no as truth values, and null as nothing.
    """

    def construct_plain(self, node):
        """A number in decimal digits, or true or false."""
        decimal = r"[-+]?(0|[1-9]\d*(_\d+)*|[0-9_]*\.[^:]*)|true|false"
        read = getattr(super(), f"construct_yaml_{node.tag.rsplit(':', 1)[1]}")(node)
        if not re.fullmatch(decimal, node.value.lower()):
            told = f"{node.value or 'nothing'} would be read as {read}: write what "
            told += f"is meant, as a word '{node.value}' in quotes"
            raise yaml.MarkedYAMLError(problem=told, problem_mark=node.start_mark)
        return read

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                told = f"{name} is there twice"
                raise yaml.MarkedYAMLError(problem=told, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


for _kind in ("int", "float", "bool", "null", "timestamp"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_plain)


def read_yaml(path) -> dict:
    """The mapping in a YAML file. Raises ValueError, one line, if it holds none."""
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.load(file, _StrictLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {values!r}; write lines `name: value`")
    return values


@contextmanager
def locked(file: Path, seconds: float = 0):
    """Hold a lock; TimeoutError that says how to free it if another has it for so many seconds."""
    try:
        try:
            held = FileLock(file).acquire(timeout=seconds)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            file = file.with_suffix(".held")
            held = SoftFileLock(file).acquire(timeout=seconds)
    except Timeout:
        holder = file.read_text().split()[:2]  # named on file systems that cannot lock
        by = f" (process {', on '.join(holder)})" if holder else ""
        told = f"{file}: another run{by} holds it; wait, or stop that run; if none is, remove it"
        raise TimeoutError(told) from None
    with held:
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
