"""What goes wrong, row by row: bad input and faults over the whole product, each really tried.

Every row proves that the error is one line which names the thing, its value and the mend; that a command ends with its exit
status and shows no traceback; that what was finished before is there as it was; and that nothing half-written is left.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from latentree.data.corpus import held_out, load_corpus
from latentree.data.grammar import Grammar
from latentree.data.ngrams import Chain
from latentree.data.text import load_text
from latentree.evidence.claims_old import Claim, write_results
from latentree.evidence.curves import Curve, doublings_later, half_way
from latentree.exact.information import exact
from latentree.measure.ablation import ablated_losses, control_heads
from latentree.measure.donors import stimulus
from latentree.measure.induction import emergence_step
from latentree.measure.prompts import contexts
from latentree.measure.stimuli import stimuli
from latentree.run.execution import BAD_INPUT, BUSY, CELL_ERROR, DEAD_KERNEL, NO_RESULT, report
from latentree.run.execution import execution as run
from latentree.series.checkpoints import LocalSeries, save_checkpoint
from latentree.series.footprint import rows_that_fit
from latentree.series.hub import HubSeries, choose, load_tokenizer, revisions
from latentree.series.sweep import sweep
from latentree.train import launch
from latentree.train.model import build_model
from latentree.train.side_by_side import train_all
from latentree.train.training import TrainingConfig, train
from test_checkpoints import change, cut, make_run
from test_hub import MODEL, NAMES, WEIGHTS, Usage, hub, made, one  # noqa: F401
from test_launch import params as launch_params
from test_training import HELD_OUT, SMALL, FakeProcess, FakeStream, small
from tiny import WAIT_ONCE, command, start, write_notebook, write_project
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
GRAMMARS = ROOT / "params" / "grammars"
HALF_WRITTEN = r"\.partial|\.tmp$|\.incomplete$"


@dataclass(frozen=True)
class Fault:
    """One row. `meet` raises ValueError, or gives a command's exit status or its finished process."""

    area: str
    name: str
    given: Callable  # prepares a Place
    meet: Callable  # meets the fault there
    said: tuple  # parts of the error: the thing with its value, and the mend
    status: int | None = None  # a command's
    leaves: str = "$^"  # files that may be new or other, as a regular expression
    after: Callable = lambda p: None  # what must still go

    def __str__(self):
        return f"{self.area}: {self.name}"


@dataclass
class Place:
    """An empty folder, the working folder of a row, and `want`, which gives a fixture by its name."""

    at: Path
    want: Callable

    def write(self, name, text="") -> Path:
        file = self.at / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def link(self, *names):
        for name in names:
            (self.at / name).symlink_to(ROOT / name)


dumped = partial(yaml.safe_dump, sort_keys=False)


def nothing(p):
    """Nothing needs to be there."""


def contents(folder):
    """Every file but locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def spawned(p, *line, **environment):
    """A finished process in the row's folder."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(
        line, cwd=p.at, capture_output=True, text=True, timeout=120, env=inherited | environment
    )


# ---------------------------------------------------------------------- parameters


def ours(text, p):
    """The parameter file given.yaml beside this project's notebooks and parameters."""
    p.link("params", "notebooks")
    (p.at / "given.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())


def run_line(notebook):
    return [f"notebooks/{notebook}.ipynb", "--params", "given.yaml", "--out", "out"]


def parameters(name, text, *said, notebook="02_training"):
    """latentree.run.execution with one of our notebooks and a parameter file that holds `text`."""
    return Fault(
        "parameters",
        name,
        partial(ours, text),
        lambda p: run.main(run_line(notebook)),
        said,
        BAD_INPUT,
    )


def launched(area, name, *said, **values):
    """latentree.train.launch with other parameters."""

    def given(p):
        p.link("params", "notebooks")
        launch_params(p.at / "out", **values)

    return Fault(
        area,
        name,
        given,
        lambda p: launch.main(["--params", "out/params.yaml", "--out", "out"]),
        said,
        BAD_INPUT,
    )


def of_notebook(name, notebook, *said, **values):
    """latentree.run.execution with one of our notebooks, which tells it in a cell."""
    text = dumped(yaml.safe_load((ROOT / f"params/smoke/{notebook}.yaml").read_text()) | values)
    leaves = rf"out/({notebook}\.failed\.ipynb|\.{notebook}\.failure)$"
    return Fault(
        "parameters",
        name,
        partial(ours, text),
        lambda p: run.main(run_line(notebook)),
        said,
        CELL_ERROR,
        leaves,
    )


SMOKE = (ROOT / "params/smoke/02_training.yaml").read_text()
PARAMETERS = [
    Fault(
        "parameters",
        "misspelt name, as a command",
        partial(ours, SMOKE + "lerning_rate: 0.1"),
        lambda p: spawned(
            p, sys.executable, "-m", "latentree.run.execution", *run_line("02_training")
        ),
        ("given.yaml: lerning_rate is not a parameter", "did you mean learning_rate?"),
        BAD_INPUT,
    ),
    parameters(
        "name of another notebook's",
        "toy_tokens: 5",
        "given.yaml: toy_tokens is not a parameter",
        "did you mean tokens?",
    ),
    parameters("wrong type", "layers: four", "layers = 'four'", "write a whole number such as 3"),
    parameters("true for a number", "layers: true", "layers = True", "whole number"),
    parameters(
        "number read as text",
        "learning_rate: 1e-3",
        "learning_rate = '1e-3' is read as text",
        "write 1.0e-3",
    ),
    parameters(
        "out of range", "learning_rate: 2.0", "learning_rate = 2.0 is out of range", "at most 1"
    ),
    parameters("no sequences", "batch_sequences: 0", "batch_sequences = 0", "greater than 0"),
    parameters("no such choice", "optimizer: sgd", "optimizer = 'sgd'", "one of adamw, muon"),
    parameters("seed twice in a list", "seeds: [1, 1]", "seeds = [1, 1]", "distinct"),
    parameters(
        "name twice",
        "layers: 2\nlayers: 3",
        "given.yaml: line 2: layers is there twice",
        "keep one line",
    ),
    parameters("bad YAML", "layers: [2", "given.yaml: line", "is not YAML: write `name: value`"),
    parameters(
        "date that is none", "profile: 2024-13-45", "given.yaml: line 1", "write `name: value`"
    ),
    parameters(
        "a list for a mapping",
        "- layers",
        "given.yaml: holds ['layers'], not a mapping",
        "write lines `name: value`",
    ),
    parameters(
        "not UTF-8", b"out: \xff\xfe", "given.yaml: cannot be read (not UTF-8)", "name a YAML file"
    ),
    parameters("no output folder", "out: ''", "out = ''", "a folder's name"),
    parameters(
        "missing notebook",
        "{}",
        "notebooks/09_none.ipynb: cannot be read",
        "name a notebook file",
        notebook="09_none",
    ),
    Fault(
        "parameters",
        "missing file",
        lambda p: p.link("params", "notebooks"),
        lambda p: run.main(run_line("02_training")),
        ("given.yaml: cannot be read (No such file", "name a YAML file"),
        BAD_INPUT,
    ),
    Fault(
        "parameters",
        "unknown profile",
        nothing,
        lambda p: run.main(["--folder-of", "huge"]),
        ("profile 'huge' has no files params/huge/*.yaml", "choose one of gpu, laptop"),
        BAD_INPUT,
    ),
    Fault(
        "parameters",
        "unknown profile, by make run",
        lambda p: installed(p),
        lambda p: spawned(p, "make", "run", "PROFILE=huge"),
        ("profile 'huge' has no files", "choose one of gpu, laptop"),
        2,
        r"^\.snakemake/",
    ),
    Fault(
        "parameters",
        "unknown profile, by make report",
        lambda p: installed(p),
        lambda p: spawned(p, "make", "report", "PROFILE=huge"),
        ("profile 'huge' has no files", "choose one of gpu, laptop"),
        2,
    ),
    launched(
        "parameters",
        "wrong corpus name",
        "corpus 'bund': no file params/grammars/bund.yaml",
        "corpora there: bound, bound-flat",
        corpora=["bund"],
    ),
    launched(
        "parameters",
        "lists of unequal length, by launch",
        "tokens = [1, 2]: 2 numbers for 1 corpora",
        "give one for each",
        tokens=[1, 2],
    ),
    launched(
        "parameters",
        "seed that is no 64-bit number",
        f"seeds = [{2**70}]",
        "it must be",
        seeds=[2**70],
    ),
    launched(
        "parameters",
        "misspelt name, by launch",
        "sede is not a parameter",
        "did you mean seeds?",
        sede=1,
    ),
    of_notebook(
        "lists of unequal length, in notebook 02",
        "02_training",
        "02_training: In [3]",
        "tokens = [5]: 1 numbers for 7 corpora; give one for each",
        "see out/02_training.failed.ipynb",
        tokens=[5],
    ),
    of_notebook(
        "notebook 03 without trained models",
        "03_induction_heads",
        "out/checkpoints/bound/seed-0: has no readable training.json",
        "name a folder",
    ),
]


# ---------------------------------------------------------------------- grammar files

BOUND = yaml.safe_load((GRAMMARS / "bound.yaml").read_text())
CHAIN = {"kind": "n-gram", "name": "chain", "parent": "bound", "order": 2, "sample_tokens": 1000}
TABLES = {"kind": "hashed n-gram", "name": "hashed", "vocabulary_size": 9, "tables": 3}


def grammar(name, *said, base=BOUND, without="", **fields):
    """A grammar file with other fields, beside the one named bound."""
    values = {field: value for field, value in (base | fields).items() if field != without}

    def given(p):
        p.write("g/bound.yaml", dumped(BOUND))
        p.write("g/mine.yaml", dumped(values))

    return Fault("grammar files", name, given, lambda p: load_corpus("mine", "g"), said)


def sized(**fields):
    return BOUND["roles"] | {"connector": {"size": 4} | fields}


GRAMMAR_FILES = [
    grammar("missing field", "grammar bound: sentence", "Field required", without="sentence"),
    grammar("unknown field", "bound: reptitions, got 3", "remove it (fields: name", reptitions=3),
    grammar(
        "negative probability",
        "[-0.5]",
        "write lines like S -> A 'role' [0.5]",
        sentence="S -> 'verb' [1.5] | 'verb' 'verb' [-0.5]",
    ),
    grammar(
        "probabilities that sum to less",
        "Productions for S do not sum to 1",
        "write lines like",
        sentence="S -> 'verb' [0.5]",
    ),
    grammar(
        "unknown nonterminal",
        "'S -> Clause [1.0]' uses Clause, which has no production",
        "add one",
        sentence="S -> Clause [1.0]",
    ),
    grammar(
        "unknown role",
        "uses role 'noun'",
        "roles: subject, verb, object",
        sentence="S -> 'noun' [1.0]",
    ),
    grammar(
        "role that no sentence has",
        "role 'idle' appears in no production",
        "use it or remove it",
        roles=BOUND["roles"] | {"idle": {"size": 2}},
    ),
    grammar(
        "infinite mean length",
        "the expected sentence length is infinite: S yields on average 1.4",
        "lower its recursive productions",
        sentence="S -> 'verb' [0.3] | S S [0.7]",
    ),
    grammar(
        "symbol that is never reached",
        "Lost is never reached from Sentence",
        "remove it",
        sentence=BOUND["sentence"] + "  Lost -> 'verb' [1.0]",
    ),
    grammar(
        "unknown level",
        "redraw level 'chapter' is unknown",
        "levels: corpus, document",
        redraw={"chapter": 1.0},
    ),
    grammar(
        "share above one",
        "redraw.document is 1.5",
        "write a number in 0..1",
        redraw={"document": 1.5},
    ),
    grammar(
        "habits in a circle",
        "habits of 'verb' lead back to 'verb'",
        "remove one",
        habits={"verb": "object", "object": "verb"},
    ),
    grammar("binding without habits", "binding is 0.9 but no habits", "add 'habits", habits={}),
    grammar("no words", "roles.connector.size, got 0", "greater than 0", roles=sized(size=0)),
    grammar(
        "infinite exponent",
        "roles.connector.zipf, got inf",
        "finite",
        roles=sized(zipf=float("inf")),
    ),
    grammar(
        "unknown kind",
        "grammar file mine.yaml: kind 'tree' is unknown",
        "kinds: grammar, hashed tables, chain",
        kind="tree",
    ),
    grammar("chain without a parent", "mine: parent", "required", base=CHAIN, without="parent"),
    grammar(
        "chain that is its own parent",
        "mine",
        "parent 'mine' is no grammar",
        base=CHAIN,
        parent="mine",
    ),
    grammar(
        "chain with a missing parent",
        "corpus 'nobody': no file g/nobody.yaml",
        "corpora there: bound, mine",
        base=CHAIN,
        parent="nobody",
    ),
    grammar("chain of order two in words", "order, got 'two'", "integer", base=CHAIN, order="two"),
    grammar("chain of order 0", "order, got 0", "greater than 0", base=CHAIN, order=0),
    grammar(
        "hashed tables without words",
        "vocabulary_size, got 0",
        "greater than",
        base=TABLES,
        vocabulary_size=0,
    ),
    Fault(
        "grammar files",
        "missing file",
        nothing,
        lambda p: load_corpus("bund", GRAMMARS),
        ("corpus 'bund': no file", "corpora there: bound, bound-flat"),
    ),
    launched(
        "grammar files",
        "missing folder, by launch",
        "no file nowhere/bound.yaml",
        "corpora there: none",
        grammars="nowhere",
    ),
]


# ---------------------------------------------------------------------- checkpoints

MEND = "remove this folder, or train again in a new one"


def checkpoint(name, damage, *said, meet=lambda p: LocalSeries(p.at / "run")):
    """A run of three checkpoints, damaged."""
    return Fault("checkpoints", name, lambda p: damage(make_run(p.at / "run")), meet, said)


def training(area, name, fixture, damage, *said, leaves="$^", **settings):
    """A finished or interrupted training that goes on in a folder with this damage."""

    def given(p):
        damage(shutil.copytree(p.want(fixture), p.at / "run"))

    return Fault(area, name, given, lambda p: small(p.at / "run", **settings), said, leaves=leaves)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    small(folder)
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    class Stops(FakeStream):
        def next_batch(self):
            if self.count == 6:
                raise KeyboardInterrupt
            return super().next_batch()

    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(KeyboardInterrupt):
        train(
            TrainingConfig(**SMALL), FakeProcess(), HELD_OUT, folder, stream=Stops(), progress=False
        )
    return folder


def step(run):
    return run / "step-00000003"


def other_model(run):
    """The checkpoint of another architecture in the place of one."""
    save_checkpoint(build_model("gpt2", 7, layers=1, width=8, heads=2, context=8), run, 3)


def renamed(file, old, new):
    """Other bytes of the same length inside a file."""
    file.write_bytes(file.read_bytes().replace(old, new, 1))


def emptied(run):
    for folder in run.glob("step-*"):
        shutil.rmtree(folder)


def state_cut(run):
    for file in run.glob("state-*/model*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])


CHECKPOINTS = [
    checkpoint(
        "no such folder",
        lambda run: shutil.rmtree(run),
        "run: has no readable training.json",
        "name a folder",
    ),
    checkpoint(
        "foreign folder",
        lambda run: (run / "training.json").unlink(),
        "run: has no readable training.json",
        "name a folder",
    ),
    checkpoint(
        "identity cut off",
        lambda run: (run / "training.json").write_text('{"seed'),
        "has no readable training.json",
        "name a folder",
    ),
    checkpoint(
        "identity that is a list",
        lambda run: (run / "training.json").write_text("[]"),
        "has no readable training.json",
        "name a folder",
    ),
    checkpoint(
        "weights cut off",
        lambda run: cut(step(run), 0.9),
        "step-00000003: truncated checkpoint, model.safetensors",
        MEND,
    ),
    checkpoint(
        "weights missing",
        lambda run: (step(run) / WEIGHTS).unlink(),
        "model.safetensors is missing or cut off",
        MEND,
    ),
    checkpoint(
        "config without a model",
        lambda run: (step(run) / "config.json").write_text("{}"),
        "step-00000003: truncated",
        MEND,
    ),
    checkpoint(
        "another architecture",
        other_model,
        "step-00000003: foreign checkpoint, its architecture is 'gpt2'",
        MEND,
    ),
    checkpoint(
        "another seed",
        lambda run: change(step(run), seed=1),
        "foreign checkpoint, its seed is 1 and this run's is 0",
        MEND,
    ),
    checkpoint(
        "step that is not there",
        lambda run: None,
        "step: 4 has no checkpoint in",
        "choose one of [0, 3, 20]",
        meet=lambda p: LocalSeries(p.at / "run").load(4),
    ),
    checkpoint(
        "no checkpoints yet",
        emptied,
        "run: has no checkpoints",
        "train",
        meet=lambda p: LocalSeries(p.at / "run").steps[-1],
    ),
    checkpoint(
        "header damaged",
        lambda run: renamed(step(run) / WEIGHTS, b'"F32"', b'"F99"'),
        "step-00000003: damaged checkpoint",
        MEND,
        meet=lambda p: LocalSeries(p.at / "run").load(3),
    ),
    checkpoint(
        "a weight missing, others in its place",
        lambda run: renamed(step(run) / WEIGHTS, b"lm_head", b"xx_head"),
        "step-00000003: damaged checkpoint, lacks the weights lm_head.weight",
        MEND,
        meet=lambda p: LocalSeries(p.at / "run").load(3),
    ),
    training(
        "checkpoints",
        "changed settings",
        "trained",
        lambda run: None,
        "was trained with width = 16, not 32",
        "give width back its value",
        width=32,
    ),
    training(
        "checkpoints",
        "checkpoints of nobody",
        "trained",
        lambda run: (run / "training.json").unlink(),
        "has checkpoints but no training.json",
        "name a new folder",
    ),
    training(
        "checkpoints",
        "damaged run card",
        "trained",
        lambda run: (run / "run_card.json").write_text("{"),
        "run_card.json",
        "remove it",
    ),
    training(
        "checkpoints",
        "finished, with a table gone",
        "trained",
        lambda run: (run / "losses.csv").unlink(),
        "losses.csv",
        "remove run_card.json",
    ),
    training(
        "checkpoints",
        "state cut off",
        "interrupted",
        state_cut,
        "run/state-00000006: cannot be read",
        "remove it",
    ),
]


# ---------------------------------------------------------------------- series on the hub


CACHE = r"^cache/(CACHEDIR.TAG|models--maker--model/(blobs/[0-9a-f]{40}|snapshots/[0-9a-f]*/config.json))$"  # whole, and no weights


def series(name, spoil, *said, step=1000, meet=None, area="hub", leaves=CACHE, **options):
    """A series of a hub on this machine, which `spoil` has changed."""

    def given(p):
        spoil(p.want("hub"), p)

    meet = meet or (lambda p: one(p.at / "cache", step, **options).load(step))
    return Fault(area, name, given, meet, said, leaves=leaves)


def closed(how):
    return lambda hub, p: setattr(hub, "closed", how)


def environment(**values):
    return lambda hub, p: [
        p.want("monkeypatch").setenv(name, value) for name, value in values.items()
    ]


def bloom(hub, p):
    model = BloomForCausalLM(BloomConfig(vocab_size=12, hidden_size=16, n_layer=1, n_head=2))
    model.save_pretrained(folder := p.want("tmp_path_factory").mktemp("bloom"))
    hub.files["step0"] = {file.name: file.read_bytes() for file in folder.iterdir()}


def unchanged(hub, p):
    pass


LICENCE = "mend the name, or accept its licence and set HF_TOKEN"
HUB = [
    series(
        "unknown repository",
        unchanged,
        "maker/other: is not at http://127.0.0.1",
        "mend the name",
        meet=lambda p: revisions("maker/other"),
    ),
    series(
        "private repository (401)",
        closed("private"),
        "maker/model: is gated, private or unknown (HTTP 401)",
        LICENCE,
        meet=lambda p: revisions(MODEL),
    ),
    series(
        "gated repository (403)",
        closed("forbidden"),
        "maker/model, revision step1000",
        "(HTTP 403)",
        LICENCE,
    ),
    series(
        "unknown revision (404)",
        unchanged,
        "maker/model, revision step9: is not at",
        "choose what revisions() lists",
        meet=lambda p: HubSeries(MODEL, {9: "step9"}, cache=p.at / "cache"),
    ),
    series(
        "no network",
        environment(HF_ENDPOINT="http://127.0.0.1:9"),
        "maker/model, revision step1000-tokens4B: cannot be had",
        "connect and run again",
    ),
    series(
        "download that breaks off",
        lambda hub, p: setattr(hub, "cuts", 10**6),
        "revision step1000-tokens4B: cannot be had",
        "run again (it goes on)",
    ),
    series(
        "offline, and not in the cache",
        environment(HF_HUB_OFFLINE="1"),
        "revision step1000-tokens4B: has no whole model",
        "unset HF_HUB_OFFLINE and connect",
    ),
    series(
        "wrong SHA-256",
        lambda hub, p: hub.lies.update({WEIGHTS: "0" * 64}),
        "model.safetensors has SHA-256",
        "expected 000",
        "run again",
    ),
    series(
        "no weights",
        lambda hub, p: hub.files[NAMES[1000]].pop(WEIGHTS),
        "step1000-tokens4B: has no whole model",
        "name a revision or a repository",
    ),
    series(
        "weights that are none on the hub",
        lambda hub, p: hub.files[NAMES[1000]].update({WEIGHTS: b"12345678"}),
        "step1000-tokens4B: cannot be loaded",
        "choose another revision",
        leaves="^cache/",
    ),
    series(
        "no tokenizer",
        unchanged,
        "revision step0: has no whole tokenizer",
        "name a revision",
        meet=lambda p: load_tokenizer(MODEL, "step0", p.at / "cache"),
    ),
    series(
        "no revision that names a step",
        lambda hub, p: setattr(hub, "files", {"v1": {}}),
        "maker/model: no revision names a training step",
        "give {step: revision} yourself",
        meet=lambda p: revisions(MODEL),
    ),
    series(
        "step that is not there",
        unchanged,
        "step: 5 has no revision of maker/model",
        "choose one of [1000]",
        meet=lambda p: one(p.at / "cache").load(5),
    ),
    series(
        "a single checkpoint asked for",
        unchanged,
        "count = 1, spacing = 'even'",
        "give 2 or more",
        meet=lambda p: choose([0, 1], 1, "even"),
    ),
]


# ---------------------------------------------------------------------- disk, folders and memory

NAME = "01_tiny"
FAILED = rf"^out/({NAME}\.failed\.ipynb|\.{NAME}\.failure)$"


def tiny(*cells, more=nothing):
    """A project with a tiny notebook, and what another one has finished before in the same folder."""

    def given(p):
        write_project(p.at, **{NAME: list(cells)})
        p.write("out/results/09.json", '{"claims": []}')
        p.write("out/09_other.ipynb", "finished")
        p.write(
            "out/run.json", '{"notebooks": {"09_other": {"wall_seconds": 1, "peak_memory_gb": 1}}}'
        )
        more(p)

    return given


def execute(p):
    return run.main(command(NAME)[3:])


def full(name):
    """Where this process will write the file `name` before it is renamed, a device that is always full."""

    def given(p):
        if not Path("/dev/full").exists():
            pytest.skip("there is no /dev/full here")
        file = p.at / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_name(f".{file.name}.{os.getpid()}.tmp").symlink_to("/dev/full")

    return given


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def second_checkpoint_fails(p):
    real, folders = PreTrainedModel.save_pretrained, []

    def save(model, folder, **options):
        folders.append(folder)
        if len(folders) == 2:
            (Path(folder) / WEIGHTS).write_bytes(b"half")
            no_space()
        return real(model, folder, **options)

    p.want("monkeypatch").setattr(PreTrainedModel, "save_pretrained", save)


def no_room(hub, p):
    p.want("monkeypatch").setattr("shutil.disk_usage", lambda path: Usage(0, 0, 0))


class Numbers:
    """A series whose models are its steps."""

    steps, identity = [0, 3], None

    def load(self, step, **_):
        return step


def swept(p, **options):
    return sweep(
        Numbers(),
        lambda model: pd.DataFrame({"value": [model]}),
        p.at / "tables/x.csv",
        progress=False,
        **options,
    )


ROOM = "make room"
DISK = [
    Fault(
        "full disk",
        "checkpoint of a training",
        second_checkpoint_fails,
        lambda p: small(p.at / "run"),
        ("run: no space left on the disk", "free some and train again: it goes on"),
        leaves="^run/",
        after=lambda p: LocalSeries(p.at / "run").load(0),
    ),
    Fault(
        "full disk",
        "record of a run",
        tiny(more=full("out/run.json")),
        execute,
        ("out", "No space left on device", ROOM),
        NO_RESULT,
        FAILED,
    ),
    Fault(
        "full disk",
        "claims of a notebook",
        lambda p: (p.link("params"), full("out/results/03.json")(p)),
        lambda p: write_results("out", "03_a", "smoke", [Claim(**CLAIM)]),
        ("out/results/03.json", "No space left on device", ROOM),
    ),
    Fault(
        "full disk",
        "table of a sweep",
        full("tables/x.csv"),
        swept,
        ("tables/x.csv", "No space left on device", ROOM),
        leaves=r"^tables/\.x/",
    ),
    series(
        "download",
        lambda hub, p: p.want("monkeypatch").setattr(
            "huggingface_hub.file_download.http_get", no_space
        ),
        "revision step1000-tokens4B: does not fit on the disk of the cache",
        ROOM,
        area="full disk",
    ),
    series(
        "too small for the download, told before it",
        no_room,
        "are to be held at once, and its disk has room for 0.0 GB",
        "choose fewer revisions, set free=True",
        area="full disk",
    ),
]


def write_claims(p):
    return write_results(p.at / "out", "03_a", "smoke", [Claim(**CLAIM)])


def file_named(name):
    return lambda p: p.write(name, "a file")


FOLDERS = [
    Fault(
        "folders",
        "out is a file",
        lambda p: (tiny()(p), p.write("other", "a file")),
        lambda p: run.main([*command(NAME)[3:-1], "other"]),
        ("--out", "other: cannot be written", "name another folder"),
        BAD_INPUT,
    ),
    Fault(
        "folders",
        "a folder in the place of a result",
        tiny(more=lambda p: p.write("out/results/01.json/kept", "finished")),
        execute,
        ("out/results/01.json: cannot be replaced", "remove it"),
        BAD_INPUT,
        FAILED,
    ),
    Fault(
        "folders",
        "run.json cut off",
        tiny(more=lambda p: p.write("out/run.json", '{"notebooks')),
        execute,
        ("out/run.json: cannot be read", "remove it"),
        BAD_INPUT,
        FAILED,
    ),
    Fault(
        "folders",
        "training in a file",
        file_named("run"),
        lambda p: small(p.at / "run"),
        ("run: is a file", "name a folder"),
    ),
    Fault(
        "folders",
        "training below a file",
        file_named("other"),
        lambda p: small(p.at / "other/run"),
        ("other/run: cannot be written", "name another folder"),
    ),
    Fault(
        "folders",
        "launch with a file as out",
        lambda p: (
            p.link("params", "notebooks"),
            launch_params(p.at / "in"),
            p.write("other", "a file"),
        ),
        lambda p: launch.main(["--params", "in/params.yaml", "--out", "other"]),
        ("other/checkpoints/bound", "name another folder"),
        BAD_INPUT,
    ),
    Fault(
        "folders",
        "claims below a file",
        lambda p: (p.link("params"), p.write("out", "a file")),
        write_claims,
        ("out/results", "cannot be written", "name another folder"),
    ),
    Fault(
        "folders",
        "sweep below a file",
        file_named("tables"),
        swept,
        ("tables", "cannot be written", "name another folder"),
    ),
]

CONFIG = build_model("llama", 7, layers=1, width=8, heads=2, context=8).config
MEMORY = [
    Fault(
        "memory",
        "model too large to measure",
        nothing,
        lambda p: rows_that_fit(CONFIG, 1e-9, 8),
        (
            "memory_limit_gb = 1e-09: one sequence of 8 tokens takes",
            "give a shorter context, bfloat16, or a higher limit",
        ),
    ),
    Fault(
        "memory",
        "model too large to train",
        nothing,
        lambda p: small(p.at / "run", width=2 * 10**7),
        ("width = 20000000", "memory", "give"),
        leaves="^run/training.json$",
    ),
    series(
        "download above the limit",
        unchanged,
        "download of 0.0 GB is above download_limit_gb = 1e-09",
        "raise the limit",
        area="memory",
        download_limit_gb=1e-9,
    ),
    Fault(
        "memory",
        "chain of too high an order",
        nothing,
        lambda p: Chain(load_corpus("bound", GRAMMARS), order=50),
        ("chain of order 50: 41 words to the power 51", "use a lower order"),
    ),
    Fault(
        "memory",
        "role with too many words",
        nothing,
        lambda p: Grammar(BOUND | {"roles": sized(size=10**13, zipf=1.0)}),
        ("bound: roles.connector.size, got 10000000000000", "less than"),
    ),
    Fault(
        "memory",
        "more held-out sequences than are kept apart",
        nothing,
        lambda p: held_out(load_corpus("released", GRAMMARS), 2000, 512),
        ("released: 2000 held-out sequences of 512 tokens", "ask for fewer"),
    ),
    Fault(
        "memory",
        "array too large, in a notebook",
        tiny("import numpy as np\nnp.ones(10**15)"),
        execute,
        (
            f"{NAME}: In [4] `import numpy as np`: MemoryError: Unable to allocate",
            f"see out/{NAME}.failed.ipynb",
        ),
        CELL_ERROR,
        FAILED,
    ),
]


# ---------------------------------------------------------------------- killed, and two at once


class Deadly(FakeProcess):
    """A corpus that ends the process which is given it."""

    def __reduce__(self):
        return os._exit, (9,)


class Twice(FakeStream):
    """Starts the same training once more while it is in the middle."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def next_batch(self):
        if self.count == 5:
            small(self.folder)
        return super().next_batch()


def trained_twice(p):
    return train(
        TrainingConfig(**SMALL),
        FakeProcess(),
        HELD_OUT,
        p.at / "run",
        stream=Twice(p.at / "run"),
        progress=False,
    )


def running(p):
    """A run that is in the middle."""
    tiny(WAIT_ONCE)(p)
    first = start(command(NAME), p.at)
    p.want("request").addfinalizer(lambda: (first.terminate(), first.wait(20)))
    p.first = first


def still_runs(p):
    assert p.first.poll() is None


KILLED = [
    Fault(
        "killed",
        "kernel, by kill -9",
        tiny("import os\nos.kill(os.getpid(), 9)"),
        execute,
        (
            f"{NAME}: In [4] `import os`: the kernel died (out of memory?)",
            f"see out/{NAME}.failed.ipynb",
        ),
        DEAD_KERNEL,
        FAILED,
    ),
    Fault(
        "killed",
        "training process",
        nothing,
        lambda p: train_all(
            {p.at / "run": (TrainingConfig(**SMALL), Deadly(), HELD_OUT)}, "cpu", progress=False
        ),
        (
            "a training process was killed (out of memory?)",
            "start again, it goes on where it stopped",
        ),
    ),
]
AT_ONCE = [
    Fault(
        "two at once",
        "runs of one notebook in one folder",
        running,
        execute,
        (f"{NAME}: another run is writing to out", "wait for it or stop it"),
        BUSY,
        rf"^out/\.{NAME}\.partial\.ipynb$",
        still_runs,
    ),
    Fault(
        "two at once",
        "trainings in one folder",
        nothing,
        trained_twice,
        ("run: another training is writing", "wait for it or stop it"),
        leaves="run",
        after=lambda p: small(p.at / "run"),
    ),
]


# ---------------------------------------------------------------------- versions, devices and settings of a training

OLD_PYTHON = """#!/bin/sh
# answers as Python 3.10 does
case "$1 $2" in
"-c "*) exec "{python}" -c "import sys; sys.version_info = (3, 10, 13); $2" ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*) echo "ERROR: Package 'latentree' requires a different Python: 3.10.13 not in '<3.14,>=3.11'" >&2; exit 1 ;;
esac
"""


def installed(p, python=True):
    """What make reads, and a .venv with this Python."""
    for name in ("Makefile", "Snakefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, p.at / name)
    p.link("params", "notebooks", "profiles")
    if python:
        p.write(".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n').chmod(0o755)
        p.write(".venv/.installed")


def not_installed(p):
    installed(p, python=False)
    p.write("old", OLD_PYTHON.format(python=sys.executable)).chmod(0o755)


def tokenizer(end):
    return type(
        "Tokenizer",
        (),
        {
            "eos_token_id": end,
            "name_or_path": "maker/model",
            "__call__": lambda *_, **__: {"input_ids": [1, 2]},
        },
    )()


def without_datasets(p):
    p.want("monkeypatch").setitem(sys.modules, "datasets", None)


PYTHONS = "give a Python from 3.11 to 3.13"
VERSIONS = [
    Fault(
        "versions",
        "no Python",
        not_installed,
        lambda p: spawned(p, "make", "run", "PYTHON=./none"),
        ("PYTHON = ./none", PYTHONS),
        2,
    ),
    Fault(
        "versions",
        "Python 3.10",
        not_installed,
        lambda p: spawned(p, "make", "run", "PYTHON=./old"),
        ("PYTHON = ./old", PYTHONS),
        2,
    ),
    Fault(
        "versions",
        "notebook of an old format",
        lambda p: (tiny()(p), p.write(f"notebooks/{NAME}.ipynb", '{"nbformat": 3}')),
        execute,
        (f"{NAME}.ipynb: has notebook format 3", "save it in format 4"),
        BAD_INPUT,
    ),
    Fault(
        "versions",
        "notebook with bare cells",
        lambda p: (
            tiny()(p),
            p.write(f"notebooks/{NAME}.ipynb", '{"nbformat": 4, "cells": [{"source": "1"}]}'),
        ),
        execute,
        (f"{NAME}.ipynb: is not a notebook", "name an .ipynb file"),
        BAD_INPUT,
    ),
    Fault(
        "versions",
        "notebook without an out",
        lambda p: (
            tiny()(p),
            write_notebook(p.at / f"notebooks/{NAME}.ipynb", parameters="a: int = 0  # a"),
        ),
        execute,
        (f"{NAME}.ipynb: declares no `out`", "add `out: str"),
        BAD_INPUT,
    ),
    Fault(
        "versions",
        "package datasets missing",
        without_datasets,
        lambda p: load_text("maker/words:en", tokenizer(1), 10),
        (
            "text = 'maker/words:en': reading data sets of the hub needs the package datasets",
            "pip install 'latentree[text]'",
        ),
    ),
    Fault(
        "versions",
        "claims of an older version",
        lambda p: (
            finished(p),
            p.write("run/results/01.json", '{"notebook": "01_a", "claims": [{"id": "a-claim"}]}'),
        ),
        lambda p: report.main(["run"]),
        ("run/results/01.json: claim 'a-claim' has no", "execute its notebook again"),
        BAD_INPUT,
    ),
    series(
        "model of an architecture without names here",
        bloom,
        "maker/model, revision step0: architecture = 'bloom'",
        "use one of",
        step=0,
        area="versions",
    ),
]


def setting(name, *said, unseen=HELD_OUT, device="auto", **settings):
    def meet(p):
        return train(
            TrainingConfig(**SMALL | settings),
            FakeProcess(),
            unseen,
            p.at / "run",
            stream=FakeStream(),
            device=device,
        )

    return Fault("training", name, nothing, meet, said)


TRAINING = [
    setting(
        "misspelt setting",
        "learning_rat = 0.1: is no setting",
        "did you mean learning_rate?",
        learning_rat=0.1,
    ),
    setting("whole number written as another", "tokens = 3000000.0", "valid integer", tokens=3.0e6),
    setting(
        "learning rate that is no number",
        "learning_rate = nan",
        "finite number",
        learning_rate=float("nan"),
    ),
    setting("context of one token", "context = 1", "greater than or equal to 2", context=1),
    setting(
        "width that heads do not divide",
        "width: 15 does not divide by heads=2",
        "give a width that is a multiple of 2",
        width=15,
    ),
    setting(
        "heads that cannot turn",
        "width: 18 gives llama heads of 9 coordinates",
        "multiple of 4",
        width=18,
    ),
    setting(
        "unknown architecture",
        "architecture: 'bert' is not known",
        "choose one of llama",
        architecture="bert",
    ),
    setting("unknown device", "device = 'tpu'", "give auto, cpu or cuda", device="tpu"),
    setting(
        "held-out sequences of another length",
        "held_out: is torch.int64 (6, 8)",
        "of 16 tokens",
        unseen=HELD_OUT[:, :8],
    ),
    setting(
        "held-out tokens of another corpus",
        "held_out: has tokens from 5 to 15",
        "below the vocabulary_size 11",
        unseen=HELD_OUT + 5,
    ),
    Fault(
        "training",
        "device cuda without a GPU",
        lambda p: (p.link("params", "notebooks"), launch_params(p.at / "in", device="cuda")),
        lambda p: spawned(
            p,
            sys.executable,
            "-m",
            "latentree.train.launch",
            "--params",
            "in/params.yaml",
            "--out",
            "out",
            CUDA_VISIBLE_DEVICES="",
        ),
        ("device = 'cuda': torch sees no GPU here", "give auto or cpu"),
        BAD_INPUT,
    ),
    launched(
        "training",
        "sizes that do not fit, by launch",
        "width: 16 does not divide by heads=3",
        "multiple of 3",
        heads=3,
    ),
    launched(
        "training",
        "a single held-out sequence, by launch",
        "held_out: is torch.int64 (1, 32)",
        "2 sequences or more",
        held_out_sequences=1,
    ),
    Fault(
        "training",
        "seed that was not trained",
        lambda p: (p.link("params", "notebooks"), launch_params(p.at / "out")),
        lambda p: launch.main(["--params", "out/params.yaml", "--out", "out", "--seed", "7"]),
        ("--seed 7: not in params.yaml", "its seeds [0]"),
        BAD_INPUT,
    ),
    Fault(
        "training",
        "loss that is not finite",
        nothing,
        lambda p: small(p.at / "run", learning_rate=1e30, muon_learning_rate=1e30),
        ("loss: not finite at step", "give a lower learning rate or a longer warmup"),
        leaves="^run/",
        after=lambda p: LocalSeries(p.at / "run").load(0),
    ),
]


# ---------------------------------------------------------------------- measurements


def measured(name, meet, *said):
    return Fault("measurements", name, nothing, lambda p: meet(), said)


def corpus(name="bound"):
    return load_corpus(name, GRAMMARS)


def ablated(heads, how):
    model = build_model("llama", 7, layers=1, width=8, heads=2, context=8)
    return ablated_losses(model, torch.zeros(2, 4, dtype=torch.int64), heads, how)


def curve(sequences, checkpoints=2):
    return Curve(
        10.0 ** np.arange(checkpoints),
        np.ones((sequences, checkpoints)),
        np.ones((sequences, checkpoints)),
    )


MEASUREMENTS = [
    measured(
        "curves: fewer values than tokens",
        lambda: half_way([1, 10, 100], [0.1, 0.2]),
        "values: ",
        "2",
        "3",
        "give",
    ),
    measured(
        "curves: of other sequences",
        lambda: doublings_later(curve(5), curve(4)),
        "(5, 2)",
        "(4, 2)",
        "give",
    ),
    measured(
        "curves: several in one table",
        lambda: emergence_step(pd.DataFrame({"step": [0, 0], "low": [1, 1]}), 0, 0.1),
        "curve: has 2 rows for 1 steps",
        "choose one curve",
    ),
    measured(
        "stimuli: odd context",
        lambda: stimuli(corpus(), 4, 7),
        "context = 7, sequences = 4",
        "give an even context",
    ),
    measured(
        "stimuli: places of another shape",
        lambda: stimulus(corpus(), 4, 16, where=torch.ones(4, 8, dtype=torch.bool)),
        "where: has shape (4, 8), and the tokens (4, 16)",
        "give one boolean for each token",
    ),
    measured(
        "stimuli: no place left",
        lambda: stimulus(corpus(), 4, 16, where=torch.zeros(4, 16, dtype=torch.bool)),
        "where: leaves 0 of 4 sequences",
        "allow more positions or states",
    ),
    measured(
        "stimuli: grammar of another vocabulary",
        lambda: stimulus(corpus("released-small"), 4, 16, grammar=corpus().grammar),
        "grammar bound: has 41 tokens, and token",
        "give a grammar with the same vocabulary",
    ),
    measured(
        "prompts: unknown role",
        lambda: contexts(corpus(), ["wizard"], 2, 2, 64),
        "state = ['wizard']",
        "give roles of a sentence's beginning",
    ),
    measured(
        "heads: too many for a control",
        lambda: control_heads([(0, 0), (0, 1), (0, 2)], 4),
        "chosen: has 3 of the 4 heads of layer 0",
        "at most half",
    ),
    measured(
        "heads: not in the model",
        lambda: ablated([(2, 0)], "mean"),
        "head (2, 0): is not in the model",
        "give layers below 1",
    ),
    measured(
        "heads: unknown ablation", lambda: ablated([(0, 0)], "zero"), "how = 'zero'", "use one of"
    ),
    measured(
        "information: distance beyond a document",
        lambda: exact(corpus().grammar, [10**6]),
        "distance = 288: no document of bound is so long",
        "give a smaller one",
    ),
    measured(
        "text: no such file",
        lambda: load_text("none.txt", tokenizer(1), 10),
        "text = 'none.txt': no such file",
        "name a .txt or .jsonl file",
    ),
    measured(
        "text: tokenizer without an end",
        lambda: load_text("none.txt", tokenizer(None), 10),
        "tokenizer of maker/model: has no end token",
        "give a model whose tokenizer has one",
    ),
    Fault(
        "measurements",
        "text: too short",
        file_named("short.txt"),
        lambda p: load_text("short.txt", tokenizer(1), 10),
        ("text = 'short.txt': has 0 documents of 16 tokens", "give a longer text"),
    ),
    Fault(
        "measurements",
        "sweep: step without a checkpoint",
        nothing,
        partial(swept, steps=[0, 4]),
        ("steps = [4]: no such checkpoints", "choose among [0, 3]"),
    ),
    Fault(
        "measurements",
        "sweep: column of its own",
        nothing,
        lambda p: sweep(
            Numbers(), lambda model: pd.DataFrame({"step": [1]}), p.at / "x.csv", progress=False
        ),
        ("measure: its table ['step'] has a column step", "leave it to the sweep"),
        leaves=r"^\.x/measured.json$",
    ),
]


# ---------------------------------------------------------------------- claims and the report

CLAIM = {
    "id": "a-claim",
    "source": "Figure 2",
    "statement": "it is so",
    "definition": "field",
    "corpus": "bound",
    "value": 1.0,
    "low": 0.5,
    "high": 1.5,
    "null": 0.0,
    "n": 4,
    "seeds": [0],
    "rule": "low > null + margin",
}


def claim(name, *said, **fields):
    return Fault("results", name, nothing, lambda p: Claim(**CLAIM | fields), said)


def finished(p):
    """A finished run with one claim, in a project whose README has the two markers."""
    p.link("params")
    p.write("README.md", f"before\n{report.BEGIN}\nold\n{report.END}\nafter")
    write_results(p.at / "run", "01_a", "smoke", [Claim(**CLAIM)])
    entry = {
        "wall_seconds": 60,
        "peak_memory_gb": 1.0,
        "device": {"cpu": "cpu", "gpus": [], "threads": 1},
    }
    p.write("run/run.json", json.dumps({"notebooks": {"01_a": entry}}))


def reported(name, damage, *said, folder="run"):
    """latentree.run.report of a run with this damage."""
    return Fault(
        "report", name, lambda p: (finished(p), damage(p)), lambda p: report.main([folder]), said, 2
    )


RESULTS = [
    claim(
        "id that is none", "claim 'A claim': id = 'A claim'", "should match pattern", id="A claim"
    ),
    claim(
        "unknown rule",
        "claim 'a-claim': rule = 'low > 0'",
        "should be 'low > null + margin'",
        rule="low > 0",
    ),
    claim(
        "verdict typed in",
        "claim 'a-claim': verdict = 'reproduced'",
        "not permitted",
        verdict="reproduced",
    ),
    claim("interval upside down", "low = 2.0 is above high = 1.5", "exchange them", low=2.0),
    claim(
        "rule without its null",
        "null is missing",
        "the rule `low > null + margin` needs it",
        null=None,
    ),
    claim("no value and no reason", "value is None", "give the reason", value=None),
    claim("value that is no number", "value = nan", "finite number", value=float("nan")),
    claim("no units behind it", "n = 0, seeds = [0]", "a measured value has both", n=0),
    Fault(
        "results",
        "claim twice",
        lambda p: p.link("params"),
        lambda p: write_results("out", "03_a", "smoke", [Claim(**CLAIM)] * 2),
        ("claim 'a-claim' is there twice", "give each its own id"),
    ),
    Fault(
        "results",
        "unknown profile",
        lambda p: p.link("params"),
        lambda p: write_results("out", "03_a", "huge", []),
        ("profile 'huge' has no files", "choose one of gpu"),
    ),
    Fault(
        "results",
        "bad claim in a notebook",
        tiny("from latentree.evidence.claims_old import Claim\nClaim(id='a b', source='Figure 2')"),
        execute,
        (f"{NAME}: In [4]", "ValueError: claim 'a b': id = 'a b'", f"see out/{NAME}.failed.ipynb"),
        CELL_ERROR,
        FAILED,
    ),
]
REPORT = [
    Fault(
        "report",
        "empty folder, as a command",
        lambda p: (finished(p), (p.at / "empty").mkdir()),
        lambda p: spawned(p, sys.executable, "-m", "latentree.run.report", "empty"),
        ("empty: has no results/*.json", "name the folder of a finished run"),
        2,
    ),
    reported(
        "no such folder",
        nothing,
        "nowhere: has no results/*.json",
        "name the folder of a finished run",
        folder="nowhere",
    ),
    reported(
        "no run.json",
        lambda p: (p.at / "run/run.json").unlink(),
        "run/run.json: cannot be read",
        "name the folder of a finished run",
    ),
    reported(
        "run.json cut off",
        lambda p: p.write("run/run.json", "{"),
        "run/run.json: cannot be read",
        "name the folder of a finished run",
    ),
    reported(
        "result cut off",
        lambda p: p.write("run/results/01.json", "{"),
        "run/results/01.json: cannot be read",
        "execute its notebook again",
    ),
    reported(
        "results without claims",
        lambda p: p.write("run/results/01.json", '{"notebook": "01_a", "claims": []}'),
        "run: ",
        "no claims",
        "name the folder of a finished run",
    ),
    reported(
        "README without markers",
        lambda p: p.write("README.md", "mine"),
        "README.md: has no lines",
        "put them where the table shall be",
    ),
    reported(
        "no README",
        lambda p: (p.at / "README.md").unlink(),
        "README.md: cannot be read",
        "start it in the project's folder",
    ),
    Fault(
        "report",
        "no folder named",
        finished,
        lambda p: report.main([]),
        ("usage: python -m latentree.run.report FOLDER", "the folder of a finished run"),
        2,
    ),
]

FAULTS = [
    *PARAMETERS,
    *GRAMMAR_FILES,
    *CHECKPOINTS,
    *HUB,
    *DISK,
    *FOLDERS,
    *MEMORY,
    *KILLED,
    *AT_ONCE,
    *VERSIONS,
    *TRAINING,
    *MEASUREMENTS,
    *RESULTS,
    *REPORT,
]
AREAS = {
    "parameters",
    "grammar files",
    "checkpoints",
    "hub",
    "full disk",
    "folders",
    "memory",
    "killed",
    "two at once",
    "versions",
    "training",
    "measurements",
    "results",
    "report",
}


def met(fault, place, capfd):
    """The exit status (None outside of commands) and the error."""
    capfd.readouterr()
    try:
        answer = fault.meet(place)
    except ValueError as error:
        return None, str(error)
    told = (
        answer.stderr if isinstance(answer, subprocess.CompletedProcess) else capfd.readouterr().err
    )
    assert "Traceback" not in told and 'File "' not in told, told
    lines = [line for line in told.splitlines() if not line.startswith("make")]
    assert lines and lines[-1].startswith("error: "), f"no error: {answer!r} {told}"
    assert sum(line.startswith("error: ") for line in lines) == 1, told
    return getattr(answer, "returncode", answer), lines[-1]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_fault(fault, tmp_path, request, monkeypatch, capfd):
    place = Place(tmp_path, request.getfixturevalue)
    monkeypatch.chdir(tmp_path)
    fault.given(place)
    before = contents(tmp_path)
    status, error = met(fault, place, capfd)
    assert status == fault.status and status != 0
    assert [part for part in fault.said if part not in error] == [], error
    assert "\n" not in error
    left = contents(tmp_path)
    lost = [
        name
        for name in before
        if left.get(name) != before[name] and not re.search(fault.leaves, name)
    ]
    new = [name for name in left.keys() - before.keys() if not re.search(fault.leaves, name)]
    assert lost == [] and new == []
    assert [name for name in left.keys() - before.keys() if re.search(HALF_WRITTEN, name)] == []
    fault.after(place)


def test_the_table_is_large_covers_every_area_and_repeats_no_row():
    rows = Counter(fault.area for fault in FAULTS)
    assert len(FAULTS) >= 100 and set(rows) == AREAS and min(rows.values()) >= 2
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS)
    assert all(len(fault.said) >= 2 for fault in FAULTS)
