"""A text through the same interface as the sampled corpora, and what measuring a model takes, told before it is loaded."""

import gzip
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from urllib.parse import unquote, urlsplit
from zlib import crc32

import pytest
import torch
from latentree.data.corpus import HELD_OUT, held_out
from latentree.data.text import Text, load_text
from latentree.measure import function_vectors as fv
from latentree.measure import hydra, induction, prompts
from latentree.measure.donors import stimulus
from latentree.measure.stimuli import stimuli
from latentree.series.footprint import footprint, rows_that_fit
from latentree.train.model import build_model, parameter_count
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OlmoConfig, PreTrainedTokenizerFast

torch.set_num_threads(1)
WORDS = "the cat sat on a mat and then dog ran off with it again".split()


def tokenizer(**special):
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<end>", *WORDS])}, unk_token="<end>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def lines(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (20 + 3 * (n % 9),), generator=draw))
        for n in range(count)
    ]


def as_tokens(line):
    return [1 + WORDS.index(word) for word in line.split()] + [0]


def shard(field, texts):
    return gzip.compress(
        "\n".join(json.dumps({field: text, "url": "http://web.test"}) for text in texts).encode()
    )


CARD = (
    "---\nconfigs:\n"
    + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}/*validation*.json.gz\n"
        for name in ("en", "raw")
    )
    + "---\n"
)
SHARDS = [f"en/c4-validation.0000{n}-of-00002.json.gz" for n in (0, 1)]
FILES = {
    "README.md": CARD.encode(),
    SHARDS[0]: shard("text", lines(60)[:30]),
    SHARDS[1]: shard("text", lines(60)[30:]),
    "raw/c4-validation.00000-of-00001.json.gz": shard("html", lines(30)),
}
COMMIT = "a" * 40


class DataSets(BaseHTTPRequestHandler):
    """A hub with the data sets maker/words, of FILES, and maker/closed, gated; the proxy also of all other hosts, with nothing there."""

    def do_GET(self):
        known = re.fullmatch(
            r"(?:/api)?/datasets/(maker/\w+)/(resolve|revision|tree)/\w+/?(.*)",
            unquote(urlsplit(self.path).path),
        )
        data_set, kind, place = known.groups() if known else ("", "", "")
        if data_set == "maker/closed":
            self.answer(401, error="GatedRepo")
        elif data_set != "maker/words":
            self.answer(404, error="RepoNotFound")
        elif kind == "revision":
            self.answer(200, json.dumps({"id": data_set, "sha": COMMIT, "siblings": []}).encode())
        elif kind == "tree":
            folders = (
                []
                if place
                else [{"type": "directory", "path": name, "oid": COMMIT} for name in ("en", "raw")]
            )
            files = [name for name in FILES if name.rpartition("/")[0] == place]
            found = [
                {"type": "file", "path": name, "oid": COMMIT, "size": len(FILES[name])}
                for name in files
            ]
            self.answer(200, json.dumps(folders + found).encode())
        elif place in FILES:
            self.answer(200, FILES[place])
        else:
            self.answer(404, error="EntryNotFound")

    do_HEAD = do_GET

    def answer(self, status, content=b"", error=""):
        self.send_response(status)
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Error-Code": error,
            "ETag": f'"{crc32(content)}"',
            "Content-Length": str(len(content)),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_request(self, *_):
        self.server.asked.append(self.path)

    def log_message(self, *_):
        pass


ADDRESSES = set()


def watch():
    """Notes whatever address this process looks up or connects to."""
    at = {"socket.getaddrinfo": lambda given: given[0], "socket.connect": lambda given: given[1][0]}
    sys.addaudithook(lambda event, given: event in at and ADDRESSES.add(at[event](given)))


def streamed(source, documents):
    text = load_text(source, tokenizer(eos_token="<end>"), documents)
    return text.documents(HELD_OUT + torch.arange(text.count)).tokens.tolist(), ADDRESSES


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server, and `streamed` of a process of its own, since datasets reads the hub's address when it is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), DataSets)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in [
            name for name in os.environ if re.search("^HF_|proxy|offline", name, re.IGNORECASE)
        ]:
            patch.delenv(name)
        proxy = f"http://127.0.0.1:{server.server_address[1]}"
        for name, value in {
            "HF_ENDPOINT": "http://hub.test",
            "HTTP_PROXY": proxy,
            "HTTPS_PROXY": proxy,
            "HF_HOME": str(tmp_path_factory.mktemp("hf")),
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }.items():
            patch.setenv(name, value)
        pool = get_context("spawn").Pool(1, watch)
    with pool:
        yield server, lambda *source: pool.apply_async(streamed, source).get(60)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("\n\n".join(lines(300)))
    return load_text(str(file), tokenizer(eos_token="<end>"), documents=250, vocabulary_size=24)


def test_documents_are_the_texts_and_end_with_the_end_token(text, tmp_path):
    assert text.name == "story" and text.count == 250 and text.end == 0
    found = text.documents(HELD_OUT + torch.tensor([3, 0]))
    want = [as_tokens(lines(300)[n]) for n in (3, 0)]
    assert found.tokens.tolist() == want[0] + want[1] and found.count == 2
    assert found.token["position"].tolist() == [*range(len(want[0])), *range(len(want[1]))]
    assert torch.equal(
        text.documents(HELD_OUT + torch.tensor([253])).tokens, found.tokens[: len(want[0])]
    )  # round the text
    jsonl = tmp_path / "story.jsonl"
    jsonl.write_text("\n".join(json.dumps({"text": line}) for line in lines(300)))
    assert torch.equal(
        load_text(str(jsonl), tokenizer(eos_token="<end>"), 250).documents([HELD_OUT + 3]).tokens,
        torch.tensor(want[0]),
    )
    cut = load_text(str(jsonl), tokenizer(eos_token="<end>"), 6, shortest=4, longest=7)
    assert cut.mean_document_length == 8 and len(held_out(cut, 2, 16)["tokens"]) == 2


def test_every_measurement_takes_a_text(text):
    assert text.vocabulary_size == 24  # the model's, larger than the tokenizer's
    model = build_model("olmo", 24, 3, 16, 2, 32).eval()
    scores = induction.measure(model, stimuli(text, 6, 32), rows=4)
    assert (
        set(scores["stimulus"]) == {"natural", "legal repeat", "random repeat"}
        and scores["value"].notna().any()
    )
    taken = prompts.contexts(text, [], 6, 1, 24, 8)
    vectors = fv.layerwise(model, taken, {fv.SAME: prompts.same_words(taken)}, 0)
    few = fv.layerwise(model, taken, {fv.SAME: prompts.same_words(taken)}, 0, rows=2)
    assert (vectors["value"] - few["value"]).abs().max() < 1e-5
    assert (vectors["quantity"] == "gold word").any() and vectors["value"].notna().all()
    scored = stimulus(text, 12, 32)
    assert scored.peers is None and hydra.measure(model, scored)["value"].notna().all()


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("no.txt", None, "no such file"),
        ("short.txt", "the cat", "has 0 documents of 16 tokens or more"),
        ("bad.jsonl", '{"words": "the cat"}', "cannot be read .KeyError"),
        ("worse.jsonl", "the cat", "cannot be read .JSONDecodeError"),
        ("bytes.txt", b"\xff\xfe\xff", "cannot be read .UnicodeDecodeError"),
    ],
)
def test_texts_that_cannot_be_read_are_told(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=match) as error:
        load_text(str(tmp_path / name), tokenizer(eos_token="<end>"), 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("documents, shards", [(20, SHARDS[:1]), (45, SHARDS)])
def test_a_data_set_is_streamed_in_order_and_only_the_shards_that_are_needed_are_fetched(
    hub, documents, shards
):
    server, stream = hub
    server.asked.clear()
    tokens, addresses = stream("maker/words:en", documents)
    assert tokens == [token for line in lines(60)[:documents] for token in as_tokens(line)]
    fetched = dict.fromkeys(
        url for url in server.asked if url.endswith(".gz")
    )  # the first is opened twice, once for its columns
    assert list(fetched) == [
        f"http://hub.test/datasets/maker/words/resolve/{COMMIT}/{file}" for file in shards
    ]
    assert addresses == {"127.0.0.1"} and all(
        urlsplit(url).netloc in ("hub.test", "datasets-server.hub.test") for url in server.asked
    )


@pytest.mark.parametrize(
    "source, match",
    [
        ("maker/none:en", "Dataset 'maker/none' doesn't exist on the Hub .*mend the name"),
        (
            "maker/closed:en",
            "'maker/closed' is a gated dataset .*accept its licence and set HF_TOKEN",
        ),
        ("maker/words:fr", "'fr' not found. Available: .'en', 'raw'.*mend the name"),
        ("maker/words:raw", "KeyError: 'text'.*choose a data set with the field text"),
    ],
)
def test_data_sets_that_the_hub_does_not_give_are_told(hub, source, match):
    with pytest.raises(
        ValueError, match=f"text = '{source}': cannot be streamed .*{match}"
    ) as error:
        hub[1](source, 10)
    assert "\n" not in str(error.value)


def test_a_data_set_without_network_or_package_is_told(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="text = 'maker/words:en': cannot be streamed .*connect to the network"
    ):
        load_text("maker/words:en", tokenizer(eos_token="<end>"), 10)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="text = 'maker/words:en'.*pip install"):
        load_text("maker/words:en", tokenizer(eos_token="<end>"), 10)


def test_a_tokenizer_without_an_end_token_and_too_many_documents_are_told(text):
    with pytest.raises(ValueError, match="no end token"):
        load_text("any.txt", tokenizer(), 10)
    with pytest.raises(ValueError, match="251 documents are asked for, it has 250"):
        text.documents(HELD_OUT + torch.arange(251))
    with pytest.raises(ValueError, match="documents are asked for, it has 3"):
        held_out(Text("tiny", [[1, 2, 0]] * 3, 5, 0), 4, 8)


def test_the_footprint_counts_weights_and_grows_with_rows_and_context():
    config = OlmoConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=50,
    )
    model = build_model("olmo", 50, 2, 32, 4, 64, mlp_width=64)
    assert footprint(config, 1, 64)["weights"] == pytest.approx(4 * parameter_count(model) / 1e9)
    half, whole = footprint(config, 2, 64, torch.bfloat16), footprint(config, 4, 64, torch.bfloat16)
    assert (
        whole["attention"] == 2 * half["attention"]
        and footprint(config, 2, 128, torch.bfloat16)["attention"] == 4 * half["attention"]
    )
    assert rows_that_fit(config, 1.0, 64, most=32) == 32
    rows = rows_that_fit(config, 0.02, 512)
    assert (
        sum(footprint(config, rows, 512).values())
        <= 0.02
        < sum(footprint(config, rows + 1, 512).values())
    )
    with pytest.raises(
        ValueError, match="memory_limit_gb = 0.0001: one sequence of 512 tokens takes"
    ):
        rows_that_fit(config, 0.0001, 512)


def test_a_billion_parameters_fit_twelve_gigabytes_with_2048_tokens():
    config = OlmoConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        intermediate_size=8192,
        vocab_size=50304,
        tie_word_embeddings=True,
    )
    assert 1.1e9 < footprint(config, 1, 2048)["weights"] / 4 * 1e9 < 1.3e9
    assert (
        rows_that_fit(config, 12.0, 2048) >= 1
        and rows_that_fit(config, 12.0, 2048, torch.bfloat16) >= 2
    )
