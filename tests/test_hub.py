"""Listing and downloading run as they are, against a server on this machine that speaks the hub's API."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.series.checkpoints import LocalSeries
from latentree.series.hub import (
    HubSeries,
    choose,
    gaps,
    lay_out,
    load_tokenizer,
    revisions,
    tokens_of,
)
from latentree.series.sweep import sweep
from latentree.train.model import build_model
from test_checkpoints import make_run
from tokenizers import Tokenizer, models
from transformers import BloomConfig, BloomForCausalLM

torch.set_num_threads(1)
SIZES = {"vocabulary_size": 12, "layers": 1, "width": 16, "heads": 2, "context": 8}
MODEL, WEIGHTS = "maker/model", "model.safetensors"
NAMES = {0: "step0", 1000: "step1000-tokens4B", 3000: "step3000-tokens12B"}
Usage = namedtuple("Usage", "total used free")


def is_large(file):
    return file.endswith((".safetensors", ".bin"))


def digest_on_hub(content, large):
    return (
        hashlib.sha256(content).hexdigest()
        if large
        else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    )


class Hub(ThreadingHTTPServer):
    """A server with one repository, `files` {revision: {file: content}}, that can be told to misbehave."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.lies = files, [], {}
        self.closed = (
            None  # "private", or what can be listed but not downloaded: "gated", "forbidden"
        )
        self.cuts = 0  # how many answers with weights are still to break off
        self.port = self.server_address[1]

    def commit(self, revision):
        return hashlib.sha1(revision.encode()).hexdigest()

    def entry(self, file, content):
        entry = {
            "rfilename": file,
            "size": len(content),
            "blobId": digest_on_hub(content, large=False),
        }
        digest = self.lies.get(file) or digest_on_hub(content, large=True)
        return entry | (
            {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 130}}
            if is_large(file)
            else {}
        )

    def fetched(self, file):
        """The ranges in which a file was fetched."""
        return [
            part
            for command, path, part in self.asked
            if command == "GET" and path.endswith(f"/{file}")
        ]


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(self.path.partition("?")[0]).strip("/")
        hub.asked.append((self.command, path, self.headers.get("Range")))
        api = path.startswith("api/models/")
        owner, name, kind, *rest = path.removeprefix("api/models/").split("/", 3 if api else 4)
        commits = {hub.commit(revision): revision for revision in hub.files}
        revision = rest and (rest[0] if rest[0] in hub.files else commits.get(rest[0]))
        if f"{owner}/{name}" != MODEL:
            self.refuse(404, "RepoNotFound")
        elif hub.closed == "private":
            self.refuse(401, "RepoNotFound")
        elif hub.closed in ("gated", "forbidden") and not api:
            self.refuse(*{"gated": (401, "GatedRepo"), "forbidden": (403, "")}[hub.closed])
        elif kind == "refs":
            refs = [
                {"name": name, "ref": name, "targetCommit": "0" * 40}
                for name in ["main", *hub.files]
            ]
            self.answer(
                json.dumps({"branches": refs[::2], "tags": refs[1::2], "converts": []}).encode()
            )
        elif revision is None:
            self.refuse(404, "RevisionNotFound")
        elif kind == "revision":
            siblings = [hub.entry(file, content) for file, content in hub.files[revision].items()]
            self.answer(
                json.dumps(
                    {"id": MODEL, "sha": hub.commit(revision), "siblings": siblings}
                ).encode()
            )
        elif rest[1] not in hub.files[revision]:
            self.refuse(404, "EntryNotFound")
        else:
            self.send_file(hub, hub.commit(revision), rest[1], hub.files[revision][rest[1]])

    def send_file(self, hub, commit, file, content):
        entry = hub.entry(file, content)
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{entry.get("lfs", {}).get("sha256", entry["blobId"])}"',
        }
        if is_large(file):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.command == "GET" and is_large(file) and hub.cuts > 0
        hub.cuts -= cut
        sent = 0 if cut and start else (len(content) // 2 if cut else None)
        self.answer(content[start:], headers, 206 if start else 200, sent)

    def refuse(self, status, error):
        self.answer(b"", {"X-Error-Code": error}, status)

    def answer(self, content, headers=(), status=200, sent=None):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:sent])

    def log_message(self, *_):
        pass


def saved(model, folder, form="safetensors"):
    """The files of a model as {name: content}, and others that are no part of it."""
    model.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if form == "bin":
        torch.save(model.state_dict(), buffer := io.BytesIO())
        del files[WEIGHTS]
        files["pytorch_model.bin"] = buffer.getvalue()
    return files | {
        "README.md": b"a model",
        "consolidated.safetensors": b"the same again",
        "onnx/model.safetensors": b"0",
    }


def model_at(step):
    return build_model("llama", **SIZES, seed=step)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of three revisions."""
    return {
        name: saved(model_at(step), tmp_path_factory.mktemp(name)) for step, name in NAMES.items()
    }


@pytest.fixture
def hub(made, monkeypatch):
    server = Hub({name: dict(files) for name, files in made.items()})
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for module in ("file_download", "utils._http"):  # no waiting before another try
        monkeypatch.setattr(
            f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda _: None, time=time.time)
        )
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def one(cache, step=1000, **options):
    return HubSeries(MODEL, {step: NAMES[step]}, cache=cache, **options)


def same(model, step):
    return all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), model_at(step).parameters(), strict=True)
    )


def on_disk(cache):
    """The files of weights in the cache, by content, and the snapshots."""
    folder = cache / "models--maker--model"
    snapshots = list((folder / "snapshots").glob("*"))
    return [path for path in (folder / "blobs").glob("*") if path.stat().st_size > 5000], snapshots


def words(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_revisions_that_name_a_step(hub, cache):
    hub.files |= {
        name: {}
        for name in (
            "v1.0",
            "step1000",
            "step20-tokens2.5M",
            "stage1-step7-tokens1B",
            "stepwise",
            "xstep3",
        )
    }
    assert revisions(MODEL, cache) == {
        0: "step0",
        7: "stage1-step7-tokens1B",
        20: "step20-tokens2.5M",
        1000: "step1000",
        3000: "step3000-tokens12B",
    }
    assert list(revisions(MODEL)) == [0, 7, 20, 1000, 3000]
    hub.files = {"v1.0": {}}
    with pytest.raises(ValueError, match="maker/model: no revision names a training step"):
        revisions(MODEL)


@pytest.mark.parametrize(
    "name, tokens",
    [
        ("step1000-tokens4B", 4e9),
        ("step1-tokens2.5M", 2.5e6),
        ("step9-tokens1.001M", 1001000),
        ("step5-tokens300K", 3e5),
        ("stage1-step5-tokens1T", 1e12),
        ("step5-tokens7", 7),
        ("step0-tokens0M", 0),
        ("step1000", None),
        ("main", None),
    ],
)
def test_tokens_in_a_name(name, tokens):
    assert tokens_of(name) == tokens


STEPS = st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True)


@settings(deadline=None)
@given(STEPS, st.integers(2, 12), st.sampled_from(["even", "log"]))
def test_chosen_steps_are_distinct_with_both_ends(steps, count, spacing):
    chosen = choose(steps, count, spacing)
    assert len(chosen) == min(count, len(steps)) and set(chosen) <= set(steps)
    assert chosen == sorted(set(chosen)) and chosen[0] == min(steps) and chosen[-1] == max(steps)
    assert choose(steps[::-1], count, spacing) == chosen


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 500), min_size=5, max_size=9, unique=True),
    st.integers(2, 5),
    st.sampled_from(["even", "log"]),
)
def test_chosen_steps_are_the_nearest_to_the_grid(steps, count, spacing):
    def distance(chosen):
        place = np.log if spacing == "log" else np.array
        return abs(
            place(sorted(chosen)) - np.linspace(place(min(steps)), place(max(steps)), count)
        ).sum()

    best = min(
        distance((min(steps), max(steps), *inner))
        for inner in combinations(set(steps) - {min(steps), max(steps)}, count - 2)
    )
    assert distance(choose(steps, count, spacing)) == pytest.approx(best)


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(1, 50))
def test_grid_that_exists_is_chosen(count, distance):
    steps = range(0, count * distance * 10, 1)
    assert choose(steps, count, "even")[:1] == [0]
    even = [i * distance for i in range(count)]
    assert choose([*range(even[-1])] + even, count, "even") == even
    log = [2**i for i in range(count)]
    assert choose([*range(1, log[-1] + 1)], count, "log") == log
    assert choose([*range(log[-1] + 1)], count + 1, "log") == [0, *log]


def test_choice_that_cannot_be():
    assert choose([0, 5], 2, "log") == [0, 5] == choose([0, 1, 2, 5], 2, "log")
    for count, spacing in ((1, "even"), (3, "cubic")):
        with pytest.raises(ValueError, match=f"count = {count}, spacing = '{spacing}'"):
            choose([0, 1, 2], count, spacing)


def test_gaps():
    olmo = [*range(0, 118000, 1000), *range(330000, 738000, 1000)]
    assert gaps(olmo) == "no checkpoints between steps 117,000 and 330,000"
    assert gaps([*olmo, 10**6]).endswith("; no checkpoints between steps 737,000 and 1,000,000")
    pythia = [0, *(2**i for i in range(10)), *range(1000, 144000, 1000)]
    for steps in (
        pythia,
        [0, 1, 10, 100],
        [2**i for i in range(20)],
        choose(pythia, 12, "log"),
        [],
        [4],
        [0, 1, 9],
    ):
        assert gaps(steps) == ""


def test_series_is_downloaded_as_it_is(hub, cache):
    found = revisions(MODEL, cache)
    series = HubSeries(MODEL, found, cache=cache)
    assert series.steps == [0, 1000, 3000] and series.revisions == found == NAMES
    of_one = series.identity["revisions"]["step1000-tokens4B"]
    content = hub.files["step1000-tokens4B"][WEIGHTS]
    assert of_one == {
        "commit": hub.commit("step1000-tokens4B"),
        "files": {WEIGHTS: hashlib.sha256(content).hexdigest()},
    }
    size = sum(len(hub.files["step0"][file]) for file in ("config.json", WEIGHTS))
    assert series.download_bytes == 3 * size and series.largest_bytes == size
    assert list(series.describe()["in cache"]) == [False] * 3 and not cache.exists()
    model = series.load(1000, attn_implementation="eager")
    assert same(model, 1000) and not model.training and model.config._attn_implementation == "eager"
    assert (
        series.load(1000, dtype=torch.bfloat16).dtype == torch.bfloat16
        and len(hub.fetched(WEIGHTS)) == 1
    )
    assert not any(
        hub.fetched(file)
        for file in ("README.md", "consolidated.safetensors", "generation_config.json")
    )
    table = series.describe()
    assert list(table.columns) == ["step", "revision", "commit", "gigabytes", "in cache"]
    assert list(table["in cache"]) == [False, True, False] and table.gigabytes[0] == size / 1e9
    assert (
        HubSeries(MODEL, found, cache=cache).identity
        == series.identity
        == json.loads(json.dumps(series.identity))
    )
    with pytest.raises(
        ValueError, match=r"step: 5 has no revision of maker/model; choose one of \[0, 1000, 3000\]"
    ):
        series.load(5)


def test_what_was_downloaded_is_there_offline(hub, cache, monkeypatch):
    online = one(cache)
    online.load(1000)
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert revisions(MODEL, cache) == {1000: NAMES[1000]}
    series = one(cache, free=True)
    assert series.identity == online.identity and series.download_bytes == 0
    assert same(series.load(1000), 1000) and not hub.asked
    with pytest.raises(
        ValueError,
        match="maker/model, revision step0: has no whole model .* in the cache; unset HF_HUB_OFFLINE",
    ):
        HubSeries(MODEL, {0: "step0"}, cache=cache)
    with pytest.raises(
        ValueError, match="maker/other: is not in .*; mend the name, or unset HF_HUB_OFFLINE"
    ):
        revisions("maker/other", cache)
    by_commit = HubSeries(MODEL, {1000: hub.commit(NAMES[1000])}, cache=cache)
    assert same(by_commit.load(1000), 1000) and [path.name for path in cache.rglob("refs/*")] == [
        NAMES[1000]
    ]
    next(cache.rglob(WEIGHTS)).unlink()
    with pytest.raises(
        ValueError, match="maker/model, revision step1000-tokens4B: is not whole in the cache"
    ):
        series.load(1000)
    with pytest.raises(ValueError, match="no revision names a training step"):
        revisions(MODEL, cache)


def test_shards(hub, cache, tmp_path, made):
    model_at(0).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    hub.files["step0"] = files
    series = one(cache, 0)
    assert (
        len(series.identity["revisions"]["step0"]["files"])
        == len([file for file in files if is_large(file)])
        > 1
    )
    assert same(series.load(0), 0)
    files.pop(max(file for file in files if is_large(file)))
    with pytest.raises(ValueError, match="revision step0: has no whole model"):
        one(cache, 0)
    hub.files["step0"] = files | saved(model_at(0), tmp_path / "bin", "bin")
    assert list(one(cache, 0).identity["revisions"]["step0"]["files"]) == ["pytorch_model.bin"]


def test_weights_in_a_bin_file(hub, cache, tmp_path):
    hub.files["step0"] = saved(model_at(0), tmp_path / "bin", "bin")
    assert same(one(cache, 0).load(0), 0)


class Pwned:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_bin_file_cannot_run_code(hub, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Pwned()}, buffer := io.BytesIO())
    hub.files["step0"] = saved(model_at(0), tmp_path / "bin", "bin") | {
        "pytorch_model.bin": buffer.getvalue()
    }
    with pytest.raises(ValueError, match="maker/model, revision step0: cannot be loaded") as raised:
        one(cache, 0).load(0)
    assert words(raised) and not Path("pwned").exists()


def test_break_is_resumed_where_it_was(hub, cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cuts = 1
    assert same(one(cache).load(1000), 1000)
    assert hub.fetched(WEIGHTS) == [
        None,
        f"bytes={len(hub.files['step0'][WEIGHTS]) // 2000 * 1000}-",
    ]


def test_broken_download_starts_again(hub, cache):
    hub.cuts = 10**6
    series = one(cache)
    with pytest.raises(
        ValueError, match="maker/model, revision step1000-tokens4B: cannot be had .*run again"
    ) as raised:
        series.load(1000)
    assert (
        words(raised) and not list(cache.rglob("*.incomplete")) and not list(cache.rglob(WEIGHTS))
    )
    assert series.download_bytes == len(hub.files["step0"][WEIGHTS])
    hub.cuts = 0
    assert (
        same(series.load(1000), 1000)
        and len(hub.fetched("config.json")) == 1
        and series.download_bytes == 0
    )


def test_left_overs_of_a_killed_download_are_removed(hub, cache):
    blobs = cache / "models--maker--model" / "blobs"
    blobs.mkdir(parents=True)
    for name, age in (("old", 4000), ("new", 0)):
        (blobs / f"{name}.incomplete").touch()
        os.utime(blobs / f"{name}.incomplete", (time.time() - age,) * 2)
    one(cache).load(1000)
    assert [path.name for path in blobs.glob("*.incomplete")] == ["new.incomplete"]


def test_wrong_hash(hub, cache):
    hub.lies[WEIGHTS] = "0" * 64
    series = one(cache)
    with pytest.raises(
        ValueError, match="model.safetensors has SHA-256 .*, expected 000.* removed from the cache"
    ) as raised:
        series.load(1000)
    assert hashlib.sha256(hub.files[NAMES[1000]][WEIGHTS]).hexdigest() in words(raised)
    assert not on_disk(cache)[0] and not list(cache.rglob(WEIGHTS)) and series.download_bytes
    hub.lies.clear()
    assert same(one(cache).load(1000), 1000)


def test_weights_damaged_in_the_cache(hub, cache):
    series = one(cache)
    series.load(1000)
    assert len(on_disk(cache)[0]) == 1
    blob = next(cache.rglob(WEIGHTS)).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="model.safetensors has SHA-256"):
        series.load(1000)
    assert same(series.load(1000), 1000)


@pytest.mark.parametrize("closed", ["gated", "forbidden", "private"])
def test_closed_repository(hub, cache, closed):
    hub.closed = closed
    with pytest.raises(
        ValueError,
        match=r"private or unknown \(HTTP 40[13]\); .*accept its licence and set HF_TOKEN",
    ) as raised:
        revisions(MODEL)
        one(cache).load(1000)
    assert words(raised).startswith(MODEL) and not list(cache.rglob("model*"))


def test_unknown_names(hub, cache):
    with pytest.raises(ValueError, match="maker/other: is not at http://.*; mend the name"):
        revisions("maker/other")
    with pytest.raises(
        ValueError,
        match=r"maker/model, revision step9: is not at http.*, or choose what revisions\(\) lists",
    ):
        HubSeries(MODEL, {9: "step9"}, cache=cache)
    with pytest.raises(ValueError, match="a//b: cannot be had") as raised:
        revisions("a//b")
    assert words(raised)
    with pytest.raises(ValueError, match="maker/model has no step"):
        HubSeries(MODEL, {}, cache=cache)


def test_no_network(hub, cache, monkeypatch):
    series = one(cache)
    hub.files["step0"].pop(WEIGHTS)
    with pytest.raises(ValueError, match="revision step0: has no whole model"):
        one(cache, 0)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for ask in (lambda: revisions(MODEL), lambda: one(cache), lambda: series.load(1000)):
        with pytest.raises(
            ValueError, match="maker/model.* cannot be had .*; mend the name, connect and run again"
        ) as raised:
            ask()
        assert words(raised)


def test_same_weights_are_left_out(hub, cache):
    hub.files[NAMES[3000]][WEIGHTS] = hub.files["step0"][WEIGHTS]
    with pytest.warns(
        UserWarning,
        match="maker/model: step3000-tokens12B has the same weights as step0, and is left out",
    ):
        series = HubSeries(MODEL, NAMES, cache=cache)
    assert series.steps == [0, 1000] and list(series.identity["revisions"]) == [
        "step0",
        "step1000-tokens4B",
    ]


def test_limits(hub, cache, monkeypatch):
    size = one(cache).download_bytes
    for free in (False, True):
        with pytest.raises(
            ValueError,
            match="download of 0.0 GB is above download_limit_gb = 1e-09: choose fewer .* or raise",
        ):
            one(cache, free=free, download_limit_gb=1e-9)
    assert one(cache, download_limit_gb=size / 1e9).steps == [1000]
    asked = []
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: asked.append(path) or Usage(0, 0, 2 * size)
    )
    assert HubSeries(MODEL, NAMES, free=True, cache=cache).steps == list(NAMES)
    with pytest.raises(
        ValueError,
        match="cache: .* GB are to be held at once, and its disk has room for .*free=True",
    ):
        HubSeries(MODEL, NAMES, cache=cache)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 2 * size - 1))
    with pytest.raises(ValueError, match="to be held at once"):
        HubSeries(MODEL, NAMES, free=True, cache=cache)
    assert set(asked) == {cache.parent} and not cache.exists()


def test_disk_that_fills_up(hub, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(ValueError, match="does not fit on the disk of the cache; make room"):
        one(cache).load(1000)


def test_free_series_holds_two_at_most(hub, cache, tmp_path):
    held = []
    series = HubSeries(MODEL, NAMES, free=True, cache=cache)

    def measure(model):
        held.append([len(found) for found in on_disk(cache)])
        return pd.DataFrame({"value": [model.lm_head.weight.sum().item()]})

    table = sweep(series, measure, tmp_path / "tables" / "x.csv", progress=False)
    assert table.step.tolist() == list(NAMES) and held == [[1, 1]] * 3
    assert series.load(3000) and series.load(0) and series.load(0) and len(on_disk(cache)[0]) == 1
    assert series.describe()["in cache"].tolist() == [True, False, False]
    assert HubSeries(MODEL, NAMES, cache=cache).load(1000) and len(on_disk(cache)[0]) == 2
    HubSeries(MODEL, NAMES, free=True, cache=cache).load(
        3000
    )  # removes what a killed run left of earlier steps
    assert [path.name for path in on_disk(cache)[1]] == [hub.commit(NAMES[3000])]
    assert revisions(MODEL, cache) == NAMES


def test_most_that_is_held_while_downloading(hub, cache, monkeypatch):
    """The revision before is still there when the next one has arrived, and no more."""
    series, most = HubSeries(MODEL, NAMES, free=True, cache=cache), []
    release = series._release
    monkeypatch.setattr(
        series, "_release", lambda step: (most.append(len(on_disk(cache)[1])), release(step))
    )
    for step in series.steps:
        series.load(step)
    assert most == [1, 2, 2]


def test_cache_in_disorder_is_not_filled(hub, cache):
    series = HubSeries(MODEL, NAMES, free=True, cache=cache)
    series.load(0)
    (cache / "models--maker--model" / "refs" / "main").write_text("0" * 40)
    with pytest.raises(
        ValueError,
        match="cannot be removed from the cache .*missing commit.*; remove it by hand, or set free",
    ):
        series.load(1000)


def test_wrong_architecture_is_refused_before_its_weights(hub, cache, tmp_path):
    model = BloomForCausalLM(BloomConfig(vocab_size=12, hidden_size=16, n_layer=1, n_head=2))
    hub.files["step0"] = saved(model, tmp_path / "bloom")
    with pytest.raises(ValueError, match="maker/model, revision step0: architecture = 'bloom'"):
        one(cache, 0).load(0)
    assert not hub.fetched(WEIGHTS)


def test_weights_that_do_not_fit(hub, cache, tmp_path):
    config = json.loads(hub.files["step0"]["config.json"])
    hub.files["step0"]["config.json"] = json.dumps(config | {"num_hidden_layers": 2}).encode()
    with pytest.raises(ValueError, match="revision step0: lacks the weights model.layers.1.* more"):
        one(cache, 0).load(0)
    hub.files[NAMES[1000]]["config.json"] = json.dumps(config | {"head_dim": 3}).encode()
    with pytest.raises(ValueError, match="revision step1000-tokens4B: ") as raised:
        one(cache).load(1000)
    assert words(raised)
    hub.files[NAMES[3000]][WEIGHTS] = hub.files[NAMES[3000]][WEIGHTS][:100]
    with pytest.raises(ValueError, match="revision step3000-tokens12B: cannot be loaded"):
        one(cache, 3000).load(3000)


def test_tokenizer(hub, cache, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError,
        match="maker/model, revision step0: has no whole tokenizer in .*; name a revision or a repo",
    ):
        load_tokenizer(MODEL, "step0", cache)
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")).save(
        str(tmp_path / "tokenizer.json")
    )
    hub.files["step0"] |= {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}
    hub.files["step0"]["tokenizer_config.json"] = b'{"tokenizer_class": "PreTrainedTokenizerFast"}'
    assert load_tokenizer(MODEL, "step0", cache)("b")["input_ids"] == [1] and not hub.fetched(
        WEIGHTS
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_tokenizer(MODEL, "step0", cache)("a")["input_ids"] == [0]
    with pytest.raises(
        ValueError, match="no revision names a training step"
    ):  # for it has no weights
        revisions(MODEL, cache)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.files["step0"] |= {"tokenizer.json": b"{}"}
    with pytest.raises(
        ValueError, match="revision step0: its tokenizer cannot be loaded"
    ) as raised:
        load_tokenizer(MODEL, "step0", tmp_path / "other")
    assert words(raised)


def contents(folder):
    return {
        path.relative_to(folder): (
            path.lstat().st_mtime_ns,
            path.is_symlink(),
            path.is_file() and path.read_bytes(),
        )
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_local_run_laid_out_as_a_cache(tmp_path, cache, monkeypatch, links):
    if not links:
        monkeypatch.setattr(
            Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here"))
        )
    local = LocalSeries(make_run(tmp_path / "run"))
    lay_out(local, MODEL, cache, tokens_per_step=500_500)
    before = contents(cache)
    lay_out(local, MODEL, cache, tokens_per_step=500_500)
    assert contents(cache) == before and any(is_link for _, is_link, _ in before.values()) == links

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    found = revisions(MODEL)
    assert found == {0: "step0-tokens0M", 3: "step3-tokens1.502M", 20: "step20-tokens10.01M"}
    assert tokens_of(found[20]) == 20 * 500_500
    series = HubSeries(MODEL, {step: found[step] for step in choose(found, 2, "log")}, free=True)
    assert (
        series.steps == [0, 20]
        and series.download_bytes == 0
        and all(series.describe()["in cache"])
    )
    for step in series.steps:
        pairs = zip(series.load(step).parameters(), local.load(step).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert contents(cache) == before
    weights = local.folder / "step-00000020" / WEIGHTS
    assert series.identity["revisions"][found[20]]["files"] == {
        WEIGHTS: hashlib.sha256(weights.read_bytes()).hexdigest()
    }


def test_laying_out_is_whole_or_not_at_all(tmp_path, cache, monkeypatch):
    local = LocalSeries(make_run(tmp_path / "run"))
    copied, copyfile = [], shutil.copyfile

    def killed(source, target):
        copied.append(copyfile(source, target))
        if len(copied) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.copyfile", killed)
        lay_out(local, MODEL, cache, 10**6)
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert revisions(MODEL, cache) == {0: "step0-tokens0M"}
        HubSeries(MODEL, {0: "step0-tokens0M"}, cache=cache).load(0)
    blob = next(cache.rglob(WEIGHTS))
    blob.unlink()
    lay_out(local, MODEL, cache, 10**6)
    lay_out(local, MODEL, tmp_path / "fresh", 10**6)
    assert {path for path in contents(cache)} == {
        path for path in contents(tmp_path / "fresh")
    } and blob.exists()
