"""A model on a GPU gives the measurements that it gives on the CPU."""

from functools import partial

import numpy as np
import pytest
import torch
from latentree.data.corpus import load_corpus
from latentree.measure import hydra, induction, lookup
from latentree.measure.ablation import each_head
from latentree.measure.circuits import paths_into
from latentree.measure.donors import at_answers
from latentree.measure.stimuli import stimuli
from latentree.series.checkpoints import load_whole
from latentree.train.model import build_model, log_probabilities

CORPUS, SEQUENCES, CONTEXT = load_corpus("bound"), 24, 48
SHOWN = lookup.look_ups(CORPUS, SEQUENCES, CONTEXT)
ANSWERS = at_answers(CORPUS, SEQUENCES, CONTEXT)
MEASURES = {
    "induction": partial(
        induction.measure, stimuli=stimuli(CORPUS, SEQUENCES, CONTEXT, 0), rows=SEQUENCES
    ),
    "look-up": partial(lookup.measure, look_ups=SHOWN),
    "ablation": lambda model: each_head(model, SHOWN.tokens, {"all": SHOWN.kind[:, :-1] >= -1}),
    "repair": lambda model: hydra.repairs(model, ANSWERS),
    "paths": lambda model: paths_into(
        model, SHOWN.tokens, (1, 0), lambda logits: {"mean": float(logits.max(-1).values.mean())}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"layers": 2, "width": 32, "heads": 4, "initializer_range": 0.3}
    build_model("llama", CORPUS.vocabulary_size, context=CONTEXT, **sizes).save_pretrained(folder)
    return folder


def test_a_model_is_measured_on_a_gpu_where_torch_sees_one(folder, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda model, device: moved.append(device) or model)
    for sees_one in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees_one=sees_one: sees_one)
        load_whole(folder)
    load_whole(folder, "cpu")
    assert moved == ["cpu", "cuda", "cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MEASURES)
def test_a_gpu_gives_the_table_that_a_cpu_gives(folder, name):
    here, there = (MEASURES[name](load_whole(folder, device)) for device in ("cpu", "cuda"))
    numbers = here.select_dtypes("number")
    assert list(here.columns) == list(there.columns) and len(here) == len(there)
    assert np.allclose(numbers, there[numbers.columns], rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_predictions_come_back_to_the_cpu(folder):
    here, there = (
        log_probabilities(load_whole(folder, on), SHOWN.tokens) for on in ("cpu", "cuda")
    )
    assert there.device.type == "cpu" and torch.allclose(here, there, atol=1e-4)
