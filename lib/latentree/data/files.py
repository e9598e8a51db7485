"""Files that a user gives are read strictly, and files that a run leaves are written whole or not at all."""

import json
import os
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import yaml
from PIL import Image, ImageChops, ImageStat
from PIL.PngImagePlugin import PngInfo

MOST_LOST = (
    1.0  # mean error of a picture's shades that is not seen: red, green and blue together, of 255
)


class StrictLoader(yaml.SafeLoader):
    """YAML as papermill reads it, but a key that is empty, not text, or there twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            line = f"line {key.start_mark.line + 1}"
            if not key.value or key.tag != "tag:yaml.org,2002:str":
                raise ValueError(f"{line}: key {key.value!r} is not a name: write `name: value`")
            if key.value in seen:
                raise ValueError(f"{line}: {key.value} is there twice: keep one line")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path) -> dict:
    """The mapping in a YAML file."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not UTF-8")
        raise ValueError(f"{path}: cannot be read ({why}): name a YAML file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (
        yaml.YAMLError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:  # yaml passes on what a bad date or number raises
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise ValueError(f"{path}: line {line} is not YAML: write `name: value`") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: holds {values!r}, not a mapping: write lines `name: value`, or {{}} for none"
        )
    return values


def read_notebook(path) -> dict:
    """A notebook file of format 4, with the source of each cell as one text.

    It is JSON, read as such: nbformat takes a second to import, which every notebook would wait for.
    """
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
        if notebook["nbformat"] != 4:
            raise ValueError(
                f"{path}: has notebook format {notebook['nbformat']!r}: save it in format 4"
            )
        for cell in notebook["cells"]:
            cell["source"], cell["metadata"] = "".join(cell["source"]), dict(cell["metadata"])
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}): name a notebook file"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: is not a notebook: name an .ipynb file") from None
    return notebook


def readable(notebook: Path) -> bool:
    """Whether the file is a whole notebook: papermill's writes are not atomic."""
    try:
        return bool(read_notebook(notebook))
    except ValueError:
        return False


def code_cells(notebook: Path) -> list[tuple[str, dict]]:
    """The code cells that are executed (blank ones are not), each named by its number in Jupyter and its first line."""
    cells = [cell for cell in read_notebook(notebook)["cells"] if cell["cell_type"] == "code"]
    lines = [
        (cell["source"].strip().splitlines(), cell) for cell in cells if cell["source"].strip()
    ]
    return [
        (f"In [{number}] `{first[:60]}`", cell)
        for number, ((first, *_), cell) in enumerate(lines, start=1)
    ]


def read_json(path: Path, mend: str) -> dict:
    """The mapping in a JSON file; ValueError, with the `mend`, if there is none."""
    try:
        if isinstance(values := json.loads(path.read_text(encoding="utf-8")), dict):
            return values
        why = "no mapping"
    except OSError as error:
        why = error.strerror
    except ValueError:
        why = "not JSON"
    raise ValueError(f"{path}: cannot be read ({why}); {mend}")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader ever sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        if partial.is_symlink() or partial.exists():
            partial.unlink()
        raise


@contextmanager
def writing(path):
    """What the disk or missing rights raise becomes one ValueError about `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); make room there or name another folder"
        ) from None


def with_palette(png: bytes) -> bytes:
    """A PNG picture in at most 256 colours, a quarter of the size, if that is smaller; its resolution and texts are kept.

    By octree if no shades are lost by it (curves and points), else by median cut, which is larger (heatmaps).
    """
    picture = Image.open(BytesIO(png))
    options, colours = (
        {"dpi": picture.info["dpi"]} if "dpi" in picture.info else {},
        picture.convert("RGB"),
    )
    few = colours.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    white = [
        255 if min(shade) >= 250 else value
        for shade in zip(*[iter(few.getpalette())] * 3)
        for value in shade
    ]
    few.putpalette(white)  # an octree's white is a little grey
    if sum(ImageStat.Stat(ImageChops.difference(colours, few.convert("RGB"))).mean) > MOST_LOST:
        few = colours.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    texts = PngInfo()
    for name, text in picture.text.items():
        texts.add_itxt(name, text)
    few.save(drawn := BytesIO(), "PNG", optimize=True, pnginfo=texts, **options)
    return min(png, drawn.getvalue(), key=len)
