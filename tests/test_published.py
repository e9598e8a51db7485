"""A model that a package brings along: converted once, and read as any other."""

import json
import sys

import pytest
import torch
from latentree.inside.trace import run
from latentree.series import published
from latentree.series.checkpoints import load_whole
from latentree.series.published import packaged
from latentree.train.model import build_model
from test_text import tokenizer
from transformers.utils.quantization_config import GgufConfig

torch.set_num_threads(1)
TOKENS = torch.arange(12)[None]


class Reader:
    """What transformers makes of a GGUF file: a model that it would refuse to save."""

    def __init__(self):
        self.model = build_model("llama", 14, 2, 16, 4, 12, num_key_value_heads=2).eval()
        self.model.config.quantization_config = GgufConfig(gguf_file="tiny-Q4.gguf")
        self.read = 0

    def from_pretrained(self, folder, **options):
        assert (folder / options["gguf_file"]).read_bytes() == b"GGUF"
        self.read += 1
        return self.model


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A package on the path that must not be imported, and a reader of its file."""
    package = tmp_path / "shipping_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError")
    (package / "tiny-Q4.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    reader = Reader()
    monkeypatch.setattr(published, "AutoModelForCausalLM", reader)
    words = type("Words", (), {"from_pretrained": lambda *_, **__: tokenizer()})
    monkeypatch.setattr(published, "AutoTokenizer", words)
    return reader


def test_a_packaged_model_is_kept_once_with_all_its_weights(reader, tmp_path):
    cache = tmp_path / "cache"
    (cache / ".partial-tiny-Q4").mkdir(parents=True)  # a run that was killed
    folder = packaged("shipping_a_model", cache)
    assert folder == packaged("shipping_a_model", cache) == cache / "tiny-Q4" and reader.read == 1
    assert [path.name for path in cache.iterdir()] == ["tiny-Q4"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "tokenizer.json").exists() and "shipping_a_model" not in sys.modules
    logits = run(load_whole(folder), TOKENS, ["logits"])["logits"]
    assert torch.equal(logits, reader.model(input_ids=TOKENS).logits)


def test_a_package_that_is_not_there_is_none(tmp_path):
    assert packaged("shipping_nothing", tmp_path) is None and not list(tmp_path.iterdir())
