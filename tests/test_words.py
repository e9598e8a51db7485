"""Words: all different, and a tokenizer that gives the tokens back."""

import pytest
import torch
from grammars import make
from latentree.data.corpus import load_corpus
from latentree.data.sampler import GrammarProcess
from latentree.data.words import tokenizer, words_of
from latentree.series.checkpoints import IDENTITY, LocalSeries, save_checkpoint
from latentree.train.model import build_model
from transformers import AutoTokenizer


def test_every_token_has_a_word_of_its_own():
    words = words_of({"subject": 12, "noun": 40, "verb": 300, "glue": 3, "then": 1})
    assert len(set(words)) == len(words) == 356
    assert words[:2] == ["fox", "crow"] and words[12] == "cat"  # nouns that are left
    assert words[52] == "verb0" and words[-4:] == ["glue0", "glue1", "glue2", "then"]
    chain, parent = load_corpus("bound-order3"), load_corpus("bound-static")
    assert chain.words == parent.words and parent.words[-1] == "."


def test_auto_tokenizer_reads_a_checkpoints_documents(tmp_path):
    corpus = GrammarProcess(make())
    (tmp_path / IDENTITY).write_text('{"corpus": "tiny"}')
    model = build_model("llama", corpus.vocabulary_size, 1, 8, 2, 8)
    save_checkpoint(model, tmp_path, 0)
    save_checkpoint(model, tmp_path, 5, tokenizer(corpus.words, corpus.end))
    reads = AutoTokenizer.from_pretrained(tmp_path / "step-00000005")
    tokens = corpus.documents([3]).tokens.tolist()
    text = reads.decode(tokens)
    assert text == " ".join(corpus.words[token] for token in tokens)
    assert reads(text)["input_ids"] == tokens and reads.eos_token_id == corpus.end
    unknown = reads("zebra", return_tensors="pt")["input_ids"]
    assert unknown.tolist() == [[len(corpus.words)]]
    with pytest.raises(IndexError):
        model(unknown)
    series = LocalSeries(tmp_path)  # with a tokenizer or without one
    first, last = (series.load(step).state_dict() for step in series.steps)
    assert all(torch.equal(first[name], last[name]) for name in first)
