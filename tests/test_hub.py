"""Listing and downloading run as they are, against a server on this machine that speaks the hub's API."""

import json
import re
import threading
from collections import namedtuple
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hub import MODEL, Hub, lay_out
from huggingface_hub import HfApi, constants
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.data.files import read_yaml
from latentree.run.parameters import check, declared
from latentree.series.checkpoints import LocalSeries
from latentree.series.hub import HubSeries, choose, gaps, revisions, tokens_of
from latentree.series.sweep import sweep
from latentree.train.model import build_model
from safetensors.torch import load, save
from test_checkpoints import make_run

SIZES = {"vocabulary_size": 12, "layers": 1, "width": 16, "heads": 2, "context": 8}
WEIGHTS = "model.safetensors"
NAMES = {0: "step0", 1000: "step1000-tokens4B", 3000: "step3000-tokens12B"}


def model_at(step):
    return build_model("llama", **SIZES, seed=step)


def same(model, step):
    pairs = zip(model.parameters(), model_at(step).parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of three revisions, and one that is no part of the model."""
    files = {}
    for step, name in NAMES.items():
        folder = tmp_path_factory.mktemp(name)
        model_at(step).save_pretrained(folder)
        files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        files[name]["optimizer.safetensors"] = b"large"
    return files


@pytest.fixture
def hub(made, monkeypatch):
    server = Hub({name: dict(files) for name, files in made.items()})
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def snapshots(cache):
    return [path.parent.name for path in cache.glob(f"*/snapshots/*/{WEIGHTS}")]


# ---------------------------------------------------------------------- steps


def test_revisions_that_name_a_step(hub, cache):
    names = {  # as SmolLM, OLMo 2, OLMo 3, a Trainer, LLM360 and GPT-NeoX write them
        7: "stage1-step7-tokens1B",
        8: "stage1-step-8",
        20: "step20-tokens2.5M",
        40: "step-000040-2BT",
        60: "step_60",
        100: "checkpoint-100",
        110: "ckpt_110",
        120: "global_step120",
        240000: "step-240000",
    }
    others = ["v1.0", "stepwise", "xstep3", "checkpoint", "step1000-final"]
    hub.files |= dict.fromkeys([*names.values(), *others], {})
    assert revisions(MODEL, cache) == dict(sorted((names | NAMES).items()))
    hub.files |= dict.fromkeys(["stage2-step9", "stage2-ingredient1-step1000-tokens3B"], {})
    with pytest.warns(UserWarning, match="2 revisions of later stages are left out, as stage2-in"):
        assert 9 not in revisions(MODEL, cache)
    hub.files = {"v1.0": {}}
    with pytest.raises(ValueError, match="maker/model: no revision names a training step"):
        revisions(MODEL, cache)


def test_tokens_in_a_name():
    names = ["step1000-tokens4B", "step9-tokens1.001M", "stage1-step5-tokens1T", "step5-tokens7"]
    assert [tokens_of(name) for name in names] == [4e9, 1001000, 1e12, 7]
    assert tokens_of("step-001000-2BT") == 2e9
    assert tokens_of("step1000") is None and tokens_of("main") is None


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True),
    st.integers(2, 12),
    st.sampled_from(["even", "log"]),
)
def test_chosen_steps_are_distinct_with_both_ends(steps, count, spacing):
    chosen = choose(steps, count, spacing)
    assert len(chosen) == min(count, len(steps)) and set(chosen) <= set(steps)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == min(steps) and chosen[-1] == max(steps)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 500), min_size=5, max_size=9, unique=True),
    st.integers(2, 5),
    st.sampled_from(["even", "log"]),
)
def test_chosen_steps_are_the_nearest_to_the_grid(steps, count, spacing):
    place = np.log if spacing == "log" else np.array
    grid = np.linspace(place(min(steps)), place(max(steps)), count)

    def distance(chosen):
        return abs(place(sorted(chosen)) - grid).sum()

    ends = (min(steps), max(steps))
    inner = combinations(set(steps) - set(ends), count - 2)
    best = min(distance((*ends, *between)) for between in inner)
    assert distance(choose(steps, count, spacing)) == pytest.approx(best)


def test_gaps():
    olmo = [*range(0, 118000, 1000), *range(330000, 738000, 1000)]
    assert gaps(olmo) == "no checkpoints between steps 117,000 and 330,000"
    pythia = [0, *(2**i for i in range(10)), *range(1000, 144000, 1000)]
    for steps in (pythia, [0, 1, 10, 100], choose(pythia, 12, "log"), [4]):
        assert gaps(steps) == ""


# ---------------------------------------------------------------------- downloads


def test_a_series_is_downloaded_as_it_is_and_nothing_else(hub, cache):
    series = HubSeries(MODEL, revisions(MODEL, cache), cache=cache)
    assert series.steps == list(NAMES) and series.revisions == NAMES
    size = sum(len(hub.files["step0"][file]) for file in ("config.json", WEIGHTS))
    assert series.download_bytes == 3 * size and not hub.fetched
    model = series.load(1000)
    assert same(model, 1000) and not model.training
    assert sorted(hub.fetched) == ["config.json", WEIGHTS]
    assert series.load(1000, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert hub.fetched.count(WEIGHTS) == 1 and series.download_bytes == 2 * size
    assert series.describe()["in cache"].tolist() == [False, True, False]
    assert series.config().vocab_size == 12


def test_what_was_downloaded_is_there_offline(hub, cache, monkeypatch):
    online = HubSeries(MODEL, {1000: NAMES[1000]}, cache=cache)
    online.load(1000)
    HubSeries(MODEL, {0: NAMES[0]}, cache=cache).config()  # without its weights
    hub.fetched.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert revisions(MODEL, cache) == {1000: NAMES[1000]}
    series = HubSeries(MODEL, {1000: NAMES[1000]}, free=True, cache=cache)
    assert series.identity == online.identity == json.loads(json.dumps(series.identity))
    assert same(series.load(1000), 1000) and series.download_bytes == 0 and not hub.fetched


def test_weights_in_a_bin_file_are_taken_where_there_are_no_others(hub, cache, tmp_path):
    torch.save(model_at(5).state_dict(), tmp_path / "weights")
    for name in (NAMES[0], NAMES[1000]):
        hub.files[name]["pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    del hub.files[NAMES[0]][WEIGHTS]
    series = HubSeries(MODEL, NAMES, cache=cache)
    assert same(series.load(0), 5) and same(series.load(1000), 1000)
    assert hub.fetched.count("pytorch_model.bin") == 1


def test_of_revisions_that_share_weights_none_is_kept(hub, cache):
    """Early branches that serve late weights: a trained model must not stand as step 0."""
    hub.files[NAMES[3000]][WEIGHTS] = hub.files["step0"][WEIGHTS]
    with pytest.warns(UserWarning, match="step0, step3000-tokens12B share weights, and are left"):
        assert HubSeries(MODEL, NAMES, cache=cache).steps == [1000]
    only = {step: NAMES[step] for step in (0, 3000)}
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="all revisions share weights"):
        HubSeries(MODEL, only, cache=cache)


def test_one_that_shares_weights_with_a_neighbour_that_was_not_chosen_is_not_kept(hub, cache):
    hub.files[NAMES[1000]][WEIGHTS] = hub.files[NAMES[0]][WEIGHTS]
    ends = {step: NAMES[step] for step in (0, 3000)}
    assert HubSeries(MODEL, ends, cache=cache).steps == [0, 3000]  # nobody told of step 1000
    with pytest.warns(UserWarning, match="step0 share weights, and are left out"):
        assert HubSeries(MODEL, ends, cache=cache, among=NAMES).steps == [3000]


def test_one_shared_shard_of_several_is_enough(hub, cache):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for number, files in enumerate((hub.files[NAMES[0]], hub.files[NAMES[1000]])):
        files[first], files[second] = b"the same", bytes([number])
    with pytest.warns(UserWarning, match="step0, step1000-tokens4B share"):
        assert HubSeries(MODEL, NAMES, cache=cache).steps == [3000]


def test_what_is_too_large_is_refused_before_it_is_fetched(hub, cache, monkeypatch):
    size = HubSeries(MODEL, {0: "step0"}, cache=cache).download_bytes
    with pytest.raises(ValueError, match="download of 0.0 GB is above download_limit_gb = 1e-09"):
        HubSeries(MODEL, NAMES, free=True, download_limit_gb=1e-9, cache=cache)
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(size))
    assert HubSeries(MODEL, NAMES, free=True, cache=cache).steps == list(NAMES)
    with pytest.raises(ValueError, match="are to be held at once, and its disk has room"):
        HubSeries(MODEL, NAMES, cache=cache)
    assert not hub.fetched


def test_with_free_one_revision_at_a_time_is_on_the_disk(hub, cache, tmp_path):
    HubSeries(MODEL, NAMES, cache=cache).load(0)  # what a killed run left
    series, held = HubSeries(MODEL, NAMES, free=True, cache=cache), []

    def measure(model):
        held.append(snapshots(cache))
        return pd.DataFrame({"value": [model.lm_head.weight.sum().item()]})

    sweep(series, measure, tmp_path / "tables" / "x.csv")
    assert held == [[hub.commit(name)] for name in NAMES.values()]
    assert same(series.load(0), 0) and snapshots(cache) == [hub.commit("step0")]


def test_weights_that_are_missing_are_not_drawn_at_random(hub, cache):
    weights = load(hub.files["step0"][WEIGHTS])
    del weights["lm_head.weight"]
    hub.files["step0"][WEIGHTS] = save(weights, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights lm_head.weight"):
        HubSeries(MODEL, {0: "step0"}, cache=cache).load(0)


def test_an_unknown_architecture_is_refused_before_its_weights_are_fetched(hub, cache):
    hub.files["step0"]["config.json"] = json.dumps({"model_type": "bloom"}).encode()
    with pytest.raises(ValueError, match="maker/model: is a bloom; use one of llama"):
        HubSeries(MODEL, {0: "step0"}, cache=cache).load(0)
    assert WEIGHTS not in hub.fetched


def test_a_revision_that_has_moved_is_refused(hub, cache):
    series = HubSeries(MODEL, {0: "step0"}, cache=cache)
    series.config()
    hub.files |= {"before": hub.files["step0"], "step0": hub.files[NAMES[1000]]}
    with pytest.raises(ValueError, match="step0 has moved; make the series again"):
        series.load(0)


def test_a_cache_without_links_is_read(tmp_path, cache, monkeypatch):
    local = LocalSeries(make_run(tmp_path / "run"))
    folders = {f"step{step}": local.folder / f"step-{step:08d}" for step in local.steps}
    lay_out(folders, MODEL, cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    series = HubSeries(MODEL, revisions(MODEL, cache), cache=cache)
    assert series.steps == local.steps
    for step in series.steps:
        assert torch.equal(series.load(step).lm_head.weight, local.load(step).lm_head.weight)


def test_the_same_training_with_another_seed_is_another_repository(hub, cache):
    hub.others["maker/again"] = {
        "step-000000": hub.files[NAMES[1000]],  # other names, other weights
        "step-001000": hub.files[NAMES[0]],
        "step-007000": {},
    }
    one = HubSeries(MODEL, {0: NAMES[0], 1000: NAMES[1000]}, cache=cache)
    listed = revisions("maker/again", cache)
    assert listed == {0: "step-000000", 1000: "step-001000", 7000: "step-007000"}
    two = HubSeries("maker/again", {step: listed[step] for step in one.steps}, cache=cache)
    assert same(one.load(0), 0) and same(two.load(0), 1000) and same(two.load(1000), 0)
    assert one.identity != two.identity and one.download_bytes > 0 == two.download_bytes


def test_what_the_hub_refuses_is_told_with_its_reason_and_a_mend(hub, cache):
    def told(status, message, code=""):
        hub.refuses = status, {"X-Error-Message": message, "X-Error-Code": code}
        with pytest.raises(ValueError, match="^maker/model: ") as refused:
            revisions(MODEL, cache)
        return str(refused.value)

    gated = told(403, "Access to it is restricted", "GatedRepo")
    assert "Access to it is restricted" in gated and gated.endswith("log in by `hf auth login`")
    expired = told(401, "User Access Token is expired")
    assert "Token is expired" in expired and "log in again" in expired and "gated" not in expired
    unknown = told(404, "Repository not found", "RepoNotFound")
    assert "404" in unknown and "look at its name" in unknown


@pytest.mark.parametrize(
    "error, mend",
    [
        (PermissionError(13, "Permission denied"), ".*Permission denied; give a cache"),
        (OSError(30, "Read-only file system"), ".*Read-only file system; give a cache"),
    ],
)
def test_what_the_network_or_the_disk_refuses_is_told_with_its_reason(error, mend, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(HfApi, "list_repo_refs", refuse)
    with pytest.raises(ValueError, match=f"maker/model: {mend}"):
        revisions("maker/model")


def test_that_there_is_no_network_or_no_cache_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match="maker/model: .*refused.*; look at the network"):
        revisions(MODEL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="maker/model: .*; give the cache that has it"):
        revisions(MODEL, tmp_path / "nothing")


def test_an_early_step_with_the_final_weights_is_left_out_though_the_last_is_not_chosen(hub, cache):
    hub.files["main"] = hub.files[NAMES[3000]]
    hub.files[NAMES[0]] = hub.files[NAMES[3000]]
    with pytest.warns(UserWarning, match="step0 share weights"):
        assert HubSeries(MODEL, {0: NAMES[0], 1000: NAMES[1000]}, cache=cache).steps == [1000]
    assert HubSeries(MODEL, {1000: NAMES[1000], 3000: NAMES[3000]}, cache=cache).steps[-1] == 3000


def test_offline_an_empty_cache_is_named_and_not_the_names_of_steps(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"OFFLINE: in {cache} no revision names .*there is none"):
        revisions(MODEL, cache)


# Some names of the listings, and the steps that they mean.
LISTINGS = {
    "olmo-1b": {"step1000-tokens4B": 1000, "step738000-tokens3094B": 738000, "main": None},
    "allenai/OLMo-2-0425-1B-early-training": {"stage1-step0-tokens0B": 0},
    "allenai/Olmo-3-1025-7B": {"stage1-step1000": 1000, "stage2-step7000": None},
    "EleutherAI/pythia-14m-seed1": {"step0": 0, "step512": 512, "step143000": 143000},
    "stanford-crfm/alias-gpt2-small-x21": {"checkpoint-10": 10, "checkpoint-400000": 400000},
    "HuggingFaceTB/SmolLM2-135M-intermediate-checkpoints": {"step-240000": 240000},
    "HuggingFaceTB/SmolLM3-3B-checkpoints": {"stage1-step-40000": 40000, "stage2-step-1": None},
    "LLM360/Amber": {"ckpt_000": 0, "ckpt_358": 358},
    "HuggingFaceFW/ablation-model-fineweb-edu": {
        "step-001000-2BT": 1000,
        "step-167000-350BT": 167000,
    },
}


def lines_of_parameters():
    """The parameters of each series in docs/series.md."""
    rows = re.findall(
        r"^\|.*\| (`series: .*) \|$", Path("docs/series.md").read_text(), re.MULTILINE
    )
    return [yaml.safe_load("\n".join(re.findall("`([^`]*)`", row))) for row in rows]


@pytest.mark.filterwarnings("ignore:.*later stages are left out")
def test_the_line_of_every_series_is_read_and_its_listing_too(hub, cache):
    parameters, shown = declared("notebooks/07_olmo.ipynb"), lines_of_parameters()
    assert {values["series"] for values in shown} == LISTINGS.keys()
    for file in Path("params/series").glob("*.yaml"):
        shown.append(read_yaml(file))
    for values in shown:
        check(values, parameters)
        names = LISTINGS.get(values["series"], {"step-001000-2BT": 1000})
        hub.files = dict.fromkeys(names, {})
        steps = {step: name for name, step in names.items() if step is not None}
        assert revisions(MODEL, cache) == dict(sorted(steps.items()))
