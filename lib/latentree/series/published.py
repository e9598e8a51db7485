"""A published model that a Python package brings along, for where there is no network."""

import os
import shutil
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def packaged(package: str, cache) -> Path | None:
    """The folder of the model that an installed package ships as GGUF; None if it is not there.

    Such weights are quantised. They are written once to a folder in `cache`, as float32
    safetensors, with the tokenizer beside them. The package `gguf` reads the file; `package` is
    not imported.
    """
    shipped = find_spec(package)
    if shipped is None or find_spec("gguf") is None:
        return None
    file = next(Path(shipped.origin).parent.glob("*.gguf"))
    folder, partial = Path(cache) / file.stem, Path(cache) / f".partial-{file.stem}"
    if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        source, where = file.parent, {"gguf_file": file.name, "local_files_only": True}
        with redirect_stderr(StringIO()):  # a progress bar of every tensor
            quantised = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **where)
        del quantised.config.quantization_config  # with which transformers would not save it
        model = type(quantised)(quantised.config)
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, **where).save_pretrained(partial)
        os.replace(partial, folder)
    return folder
