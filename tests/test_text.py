"""A text through the same interface as the sampled corpora, and through every measurement."""

import json

import datasets
import pytest
import torch
from latentree.data.corpus import HELD_OUT, held_out
from latentree.data.text import Text, _texts, load_text
from latentree.measure import function_vectors as fv
from latentree.measure import hydra, induction, prompts
from latentree.measure.donors import stimulus
from latentree.measure.stimuli import stimuli
from latentree.train.model import build_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)
WORDS = "the cat sat on a mat and then dog ran off with it again".split()


def tokenizer(end="<end>"):
    numbers = {word: i for i, word in enumerate(["<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end)


def lines(count):
    draw, found = torch.Generator().manual_seed(0), []
    for n in range(count):
        words = torch.randint(len(WORDS), (20 + 3 * (n % 9),), generator=draw)
        found.append(" ".join(WORDS[word] for word in words))
    return found


def as_tokens(line):
    return [1 + WORDS.index(word) for word in line.split()] + [0]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("\n\n".join(lines(300)))
    return load_text(str(file), tokenizer(), documents=250, vocabulary_size=24)


def test_documents_are_the_texts_and_end_with_the_end_token(text):
    assert text.name == "story" and text.count == 250 and text.end == 0
    found = text.documents(HELD_OUT + torch.tensor([3, 0]))
    want = [as_tokens(lines(300)[n]) for n in (3, 0)]
    assert found.tokens.tolist() == want[0] + want[1] and found.count == 2
    assert found.token["position"].tolist() == [*range(len(want[0])), *range(len(want[1]))]
    assert text.documents([HELD_OUT + 253]).tokens.tolist() == want[0]  # round the text


def test_a_file_of_json_lines_is_the_same_text(text, tmp_path):
    file = tmp_path / "story.jsonl"
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines(300)))
    ids = HELD_OUT + torch.arange(250)
    again = load_text(str(file), tokenizer(), 250)
    assert torch.equal(again.documents(ids).tokens, text.documents(ids).tokens)
    assert again.digest == text.digest
    cut = load_text(str(file), tokenizer(), 6, shortest=4, longest=7)
    assert cut.mean_document_length == 8 and len(held_out(cut, 2, 16)["tokens"]) == 2
    assert cut.digest != text.digest


def test_a_data_set_of_the_hub_is_streamed_in_order(monkeypatch):
    asked, read = [], []

    def load_dataset(*name, **options):
        asked.append((name, options))
        for line in lines(60):
            read.append(line)
            yield {"text": line}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = load_text("maker/words:en", tokenizer(), 20)
    assert asked == [(("maker/words", "en"), {"split": "validation", "streaming": True})]
    found = text.documents(HELD_OUT + torch.arange(20)).tokens.tolist()
    assert found == sum(map(as_tokens, lines(20)), []) and len(read) == 20


def test_pythons_manual_is_prose(text):
    manual = list(_texts("python"))
    assert len(manual) > 60 and min(map(len, manual)) > 800
    assert not any(">>>" in document or "`" in document for document in manual)
    assert "assignment" in manual[0] and load_text("python", tokenizer(), 20).name == "python"


def test_every_measurement_takes_a_text(text):
    assert text.vocabulary_size == 24  # the model's, larger than the tokenizer's
    model = build_model("olmo", 24, 3, 16, 2, 32).eval()
    scores = induction.measure(model, stimuli(text, 6, 32), rows=4)
    assert set(scores["stimulus"]) == {"natural", "legal repeat", "random repeat"}
    assert scores["value"].notna().any()
    tokens, at = stimuli(text, 6, 32)["natural"].tokens, torch.arange(6)
    taken = prompts.Contexts(text, [], tokens, at, at, torch.full((6,), 20), None)
    gold = torch.nn.functional.one_hot(tokens[:, 21], 24).double()
    asked = prompts.Prompts(tokens[:, 19:21], gold, at)
    vectors = fv.layerwise(model, taken, {fv.SAME: asked})
    assert (vectors["quantity"] == "gold word").any() and vectors["value"].notna().all()
    scored = stimulus(text, 12, 32)
    assert scored.peers is None and hydra.measure(model, scored)["value"].notna().all()


def test_a_file_in_the_home_folder_is_found_and_one_that_is_not_there_is_named(
    text, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load_text("~/story.txt", tokenizer(), 250, vocabulary_size=24)
    assert torch.equal(found.documents([HELD_OUT]).tokens, text.documents([HELD_OUT]).tokens)
    with pytest.raises(ValueError, match="text = 'gone.txt': there is no such file"):
        load_text("gone.txt", tokenizer(), 1)


def test_too_little_text_and_a_tokenizer_without_an_end_token_are_refused(text, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("the cat")
    with pytest.raises(ValueError, match="has 0 documents of 16 tokens or more"):
        load_text(str(file), tokenizer(), 10)
    with pytest.raises(ValueError, match="has no end token"):
        load_text(str(file), tokenizer(end=None), 10)
    with pytest.raises(ValueError, match="251 documents are asked for, it has 250"):
        text.documents(HELD_OUT + torch.arange(251))
    with pytest.raises(ValueError, match="documents are asked for, it has 3"):
        held_out(Text("tiny", [[1, 2, 0]] * 3, 5, 0), 4, 8)
