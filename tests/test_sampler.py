"""Documents against oracles: nltk's probabilities, Zipf's law, exact shares, themselves."""

import hashlib

import nltk
import numpy as np
import pytest
import torch
from grammars import CLAUSES, RECURSIVE, make, random_grammar, sentence_grammars
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.data.corpus import HELD_OUT, Stream, held_out, load_corpus
from latentree.data.sampler import GrammarProcess
from latentree.exact.predictors import role_losses
from scipy.stats import chi2_contingency, chisquare

ONE_SENTENCE = {"sections": 1, "paragraphs": 1, "sentences": 1}


def process(*args, seed=0, **fields):
    return GrammarProcess(make(*args, **fields), seed)


def sentences(documents, field="tokens"):
    """The values of a field, sentence by sentence, as tuples."""
    ends = (documents.token["place"] == 0).nonzero()[1:, 0]
    return [tuple(part.tolist()) for part in documents.token[field].tensor_split(ends)]


# ---------------------------------------------------------------------- by number


@pytest.mark.parametrize("name", ["bound", "bound-order3", "released-ngram"])
def test_a_document_depends_on_nothing_but_its_number(name):
    corpus, again = load_corpus(name), load_corpus(name)
    ids = torch.tensor([7, 0, 3, HELD_OUT + 2, 12, 5])
    together = corpus.documents(ids)
    for index, number in enumerate(ids.tolist()):
        alone = again.documents([number]).tokens
        assert torch.equal(together.tokens[together.token["document"] == index], alone)
    assert torch.equal(corpus.documents(ids, detail=False).tokens, together.tokens)


@pytest.mark.parametrize(
    "name, digest",
    [
        ("bound", "7c8edf108999"),
        ("filtered-2", "3114e10173e6"),
        ("released", "a03a80bcc20b"),
        ("bound-order3", "e08d2874f50e"),
        ("released-ngram", "d8a583e38320"),
    ],
)
def test_documents_are_for_ever_those_that_models_were_trained_on(name, digest):
    ids = torch.cat([torch.arange(100), HELD_OUT + torch.arange(100)])
    tokens = load_corpus(name, seed=1).documents(ids).tokens
    assert hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12] == digest


def test_another_seed_draws_other_documents():
    one, other = process(seed=0).documents([0]).tokens, process(seed=1).documents([0]).tokens
    assert not torch.equal(one[:6], other[:6])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["filtered-2", "released", "bound-order3", "released-ngram"])
def test_a_gpu_draws_the_same_documents(name):
    corpus = load_corpus(name)
    on_gpu = corpus.documents(range(200), "cuda").tokens.cpu()
    assert torch.equal(on_gpu, corpus.documents(range(200)).tokens)


# ---------------------------------------------------------------------- what a grammar draws


@pytest.mark.parametrize(
    "sentence",
    [CLAUSES, "Sentence -> 'noun' 'verb' [0.5] | Sentence 'and' Sentence [0.25] | 'verb' [0.25]"],
)
def test_role_sequences_have_the_probabilities_of_nltk(sentence):
    """Sampled strings, the longer ones pooled, against nltk's inside probabilities."""
    corpus = process(sentence, document=ONE_SENTENCE)
    roles = np.array(corpus.grammar.roles)
    sampled = sentences(corpus.documents(range(20_000)), "role")
    sampled = [tuple(roles[list(row[:-1])]) for row in sampled]
    strings = {string for string in sampled if len(string) <= 5}
    parser = nltk.parse.pchart.InsideChartParser(nltk.PCFG.fromstring(sentence))
    p = np.array([sum(tree.prob() for tree in parser.parse(list(s))) for s in strings])
    counts = np.array([sampled.count(string) for string in strings])
    often = p * len(sampled) > 10
    p, counts = p[often], counts[often]
    if p.sum() < 1 - 1e-9:
        p, counts = np.append(p, 1 - p.sum()), np.append(counts, len(sampled) - counts.sum())
    assert chisquare(counts, p * len(sampled)).pvalue > 1e-3


def test_sentences_of_a_recursive_grammar_have_the_expected_length():
    corpus = process(RECURSIVE, document=ONE_SENTENCE)
    lengths = torch.bincount(corpus.documents(range(6000)).token["document"]).double()
    error = float(lengths.std()) / 6000**0.5
    assert abs(float(lengths.mean()) - corpus.grammar.mean_length) < 4 * error


def test_rank_frequencies_are_zipf():
    """One word of each role from each of many unrelated documents: independent draws."""
    corpus = load_corpus("released-small")
    documents = corpus.documents(corpus.apart(0, 8000))
    first = documents.token["position"] < 4
    for r, law in enumerate(corpus.grammar.frequencies[:3]):
        ranks = documents.token["rank"][first & (documents.token["role"] == r)]
        counts = np.bincount(ranks, minlength=len(law))
        assert chisquare(counts, counts.sum() * law).pvalue > 1e-3


@pytest.mark.parametrize(
    "redraw, binding",
    [
        ({"document": 1.0}, 0.0),
        ({"corpus": 1.0}, 0.8),
        ({"corpus": 1.0, "document": 0.5, "section": 0.25}, 0.8),
    ],
)
def test_token_frequencies_are_exact(redraw, binding):
    corpus, count = process(redraw=redraw, binding=binding, habits={"verb": "noun"}), 20_000
    documents = corpus.documents(range(count))
    cell = documents.token["document"] * corpus.vocabulary_size + documents.tokens
    table = torch.bincount(cell, minlength=count * corpus.vocabulary_size).double()
    table = table.view(count, -1)  # (document, token)
    share, length = torch.from_numpy(corpus.token_frequencies()), table.sum(1)
    assert float(share.sum()) == pytest.approx(1)
    error = (table - length[:, None] * share).std(0) / length.mean() / count**0.5
    assert (abs(table.sum(0) / length.sum() - share) < 4.5 * error + 1e-9).all()


def test_maps_are_uniformly_random_permutations():
    corpus = load_corpus("bound")
    maps = corpus.documents(torch.arange(12_000)).maps["verb"]
    words = torch.as_tensor(corpus.grammar.words[1])
    assert torch.equal(maps.sort(1).values, words.expand_as(maps))
    for rank in (0, 5):
        assert chisquare(np.bincount(maps[:, rank] - 12)).pvalue > 1e-3
    pairs = np.bincount((maps[:, 0] - 12) * 12 + maps[:, 1] - 12, minlength=144)
    assert chisquare(pairs[pairs > 0]).pvalue > 1e-3 and (pairs == 0).sum() == 12


@pytest.mark.parametrize("level, share", [("document", 0.5), ("section", 0.25), ("sentence", 1.0)])
def test_redraw_changes_the_stated_share_at_the_stated_level(level, share):
    roles = {"noun": {"size": 40, "zipf": 1.0}, "verb": {"size": 40, "zipf": 1.0}}
    fixed = process(
        roles=roles | {"and": {"size": 2}},
        redraw={"corpus": 1.0},
        document={"sections": 3, "paragraphs": 2, "sentences": 2},
        binding=0.5,
        habits={"verb": "noun"},
    )
    corpus = fixed.changed(redraw={"corpus": 1.0, level: share})
    documents, base = corpus.documents(range(50)), fixed.documents([0])
    units = {"document": 1, "section": 3, "sentence": 12}[level]
    for role in ("noun", "verb"):
        maps = documents.maps[role]
        assert len(maps) == 50 * units
        moved = (maps != base.maps[role]).float().mean(1)
        assert moved.max() <= share and moved.mean() == pytest.approx(share - 1 / 40, abs=0.01)
        assert torch.equal(maps.sort(1).values, base.maps[role].sort(1).values.expand_as(maps))
    changed = (documents.habits["verb"] != base.habits["verb"]).float().mean()
    same_by_chance = (corpus.grammar.frequencies[1] ** 2).sum()
    assert changed == pytest.approx(share * (1 - same_by_chance), abs=0.02)


def test_habits_are_followed_with_the_stated_probability():
    corpus = load_corpus("bound")
    documents = corpus.documents(range(2000))
    rank, role = documents.token["rank"], documents.token["role"]
    chains = (role[:-2] == 0) & (role[1:-1] == 1) & (role[2:] == 2)
    at = chains.nonzero()[:, 0]
    called = documents.habits["verb"][documents.token["unit"][at], rank[at]]
    by_chance = torch.as_tensor(corpus.grammar.frequencies[1])[called]
    wanted = float((0.9 + 0.1 * by_chance).mean())
    share = float((rank[at + 1] == called).double().mean())
    assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(at))


def test_flat_control_equals_its_parent_within_sentences():
    """First words, first pairs, and which words of a three-clause sentence are equal."""
    pairs = [(0, 4), (0, 8), (1, 5), (1, 9), (2, 6)]
    first, second, repeated = [], [], []
    for name in ("bound", "bound-flat"):
        documents = load_corpus(name).documents(range(6000))
        position = documents.token["position"]
        one, two = documents.tokens[position == 0], documents.tokens[position == 1]
        first.append(np.bincount(one, minlength=41))
        second.append(np.bincount(one // 4 * 11 + two // 4, minlength=121))
        patterns = np.zeros(32)
        for row in sentences(documents)[::24]:  # one sentence a document
            if len(row) == 12:
                patterns[sum((row[i] == row[j]) << k for k, (i, j) in enumerate(pairs))] += 1
        repeated.append(patterns)
    for counts in (first, second, repeated):
        counts = np.array(counts)
        rare = counts.sum(0) <= 10
        table = np.column_stack([counts[:, ~rare], counts[:, rare].sum(1)])
        assert chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


@settings(max_examples=15, deadline=None)
@given(
    sentence_grammars(),
    st.sampled_from([0.0, 0.6]),
    st.sampled_from([{"document": 1.0}, {"sentence": 0.5}, {"corpus": 1.0}]),
)
def test_random_grammars_sample_what_they_say(sentence, binding, redraw):
    grammar = random_grammar(sentence, binding, redraw)
    documents = GrammarProcess(grammar, 3).documents(range(40))
    possible = {shape.roles for shape in grammar.shapes}
    for roles in sentences(documents, "role"):
        assert tuple(grammar.roles[r] for r in roles) in possible
    token = documents.token
    for r, role in enumerate(grammar.roles):
        here = token["role"] == r
        words = documents.maps[role][token["unit"][here], token["rank"][here]]
        assert torch.equal(words, documents.tokens[here])


# ---------------------------------------------------------------------- n-grams


def test_chain_has_the_static_corpus_statistics():
    chain, static = load_corpus("bound-order3"), load_corpus("bound-static")
    losses = chain.losses()
    assert losses == sorted(losses, reverse=True)
    shares = []
    for corpus in (chain, static):
        tokens = corpus.documents(range(3000)).tokens
        pairs = tokens[:-1] * 41 + tokens[1:]
        shares.append(np.bincount(pairs, minlength=41**2) / len(pairs))
    assert abs(shares[0] - shares[1]).sum() / 2 < 0.05  # total variation
    documents = chain.documents(range(50))
    ends = documents.token["document"][documents.tokens == chain.end]
    assert (torch.bincount(ends) == 24).all()


def test_released_ngram_tables_are_those_of_the_release():
    """Token 0 has 0.55 on average; entropy of a table 2.21, of the average 2.42 nats."""
    p = load_corpus("released-ngram").probabilities
    assert float(p[:, 0].mean()) == pytest.approx(0.55, abs=0.02)
    assert float(-(p * p.log()).sum(1).mean()) == pytest.approx(2.21, abs=0.12)
    assert float(-(p.mean(0) * p.mean(0).log()).sum()) == pytest.approx(2.42, abs=0.12)


def test_released_ngram_losses_are_those_of_its_own_draws():
    corpus = load_corpus("released-ngram")
    documents = corpus.documents(range(1500))
    aware, average = (corpus.token_losses(documents, knows) for knows in (True, False))
    assert aware.isfinite().all() and float(aware.mean()) < float(average.mean())
    # For any other distribution q, E[q(x) / p(x)] = 1: here the average of the tables.
    assert float((aware - average).exp().mean()) == pytest.approx(1, abs=0.05)
    lengths = torch.bincount(documents.token["document"])
    assert lengths.min() >= 11 and lengths.max() <= 110
    assert abs(lengths.double().mean() - corpus.mean_document_length) < 3
    assert (documents.tokens == corpus.end).sum() == 1500


# ---------------------------------------------------------------------- training and held-out


@pytest.mark.parametrize("packing", ["documents", "stream"])
@pytest.mark.parametrize("name", ["released-small", "bound-order3"])
def test_stream_is_the_same_for_any_sharding_and_resumes_exactly(name, packing):
    corpus, rows, context = load_corpus(name), 4, 50
    whole = Stream(corpus, rows, context, packing=packing)
    halves = []
    for first in (0, 2):
        part = {"packing": packing, "first_row": first, "total_rows": rows}
        halves.append(Stream(corpus, 2, context, **part))
    for step in range(8):
        batch = whole.next_batch()
        assert batch.shape == (rows, context) and batch.min() >= 0
        assert torch.equal(batch, torch.cat([half.next_batch() for half in halves]))
        if step == 2:
            state = whole.state_dict()
    resumed = Stream(corpus, rows, context, packing=packing)
    resumed.load_state_dict(state)
    for _ in range(3, 8):
        last = resumed.next_batch()
    assert torch.equal(last, batch)


def test_stream_rows_are_documents_end_to_end():
    corpus = load_corpus("bound")
    stream = Stream(corpus, 3, 64, packing="stream")
    text = torch.cat([stream.next_batch() for _ in range(10)], 1)
    for row in range(3):
        documents = corpus.documents([row, row + 3, row + 6, row + 9, row + 12]).tokens
        assert torch.equal(text[row], documents[: text.shape[1]])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 5), context=st.integers(20, 300))
def test_packed_by_documents_windows_begin_documents_and_leave_out_only_long_tails(seed, context):
    corpus = load_corpus("bound", seed=seed)
    stream = Stream(corpus, 1, context)
    text = torch.cat([stream.next_batch() for _ in range(40)])
    number = 0  # of the document that the next window must begin with
    for window in text:
        ids = torch.arange(number, number + context)
        documents = corpus.documents(ids)
        assert torch.equal(window, documents.tokens[:context])
        ends = torch.bincount(documents.token["document"]).cumsum(0)
        number += max(1, int((ends <= context).sum()))  # those that are whole are not read again


def test_a_document_that_fits_no_refill_is_read_all_the_same():
    corpus = load_corpus("bound")
    long = Stream(corpus, 1, 400_000, packing="stream").next_batch()
    assert long.shape == (1, 400_000)


def test_documents_that_share_latents_are_shuffled_apart():
    corpus = load_corpus("released-small")
    places = torch.arange(70_000)
    ids = corpus.training_ids(places)
    block = 65_536 - 65_536 % 10
    assert torch.equal(ids[:block].sort().values, places[:block])
    assert ids[block:].min() >= block
    assert (ids[1:1000] // 10 == ids[:999] // 10).float().mean() < 0.05


def test_held_out_documents_never_share_latents_with_training():
    corpus = load_corpus("released-small")
    training = corpus.documents(torch.arange(300)).maps["subject"].tolist()
    kept = corpus.documents(HELD_OUT + torch.arange(300)).maps["subject"].tolist()
    training, kept = set(map(tuple, training)), set(map(tuple, kept))
    assert training.isdisjoint(kept)
    assert len(training) == len(kept) == 30  # the test can tell: ten documents share


def test_no_held_out_sentence_of_the_released_grammar_is_trained_on():
    corpus = load_corpus("released")
    kept = set(sentences(corpus.documents(corpus.apart(HELD_OUT, corpus.held_out_limit))))
    assert kept.isdisjoint(sentences(corpus.documents(range(6000))))
    unchecked = corpus.changed(exclude_held_out=0).documents(range(6000))
    assert not kept.isdisjoint(sentences(unchecked))  # without the check, some would be


def test_more_held_out_text_than_is_kept_apart_is_refused():
    with pytest.raises(ValueError, match="exclude_held_out keeps 4096 out of training; ask for"):
        held_out(load_corpus("released"), 2000, 512)
    tiny = process("Sentence -> 'noun' 'verb' 'and' [1.0]", exclude_held_out=5000)
    with pytest.raises(ValueError, match="leaves no sentence to train on; set it to 0"):
        tiny.documents([0])


def test_held_out_windows_begin_with_a_document_and_share_no_latents():
    corpus = load_corpus("released-small")

    def annotate(documents):
        maps = documents.maps["subject"][documents.token["unit"]]
        return {"map": maps @ torch.arange(1, 31) ** 3}

    rows = held_out(corpus, 40, 96, annotate=annotate)
    assert rows["tokens"].shape == (40, 96) and (rows["position"][:, 0] == 0).all()
    assert len(rows["map"].unique()) == len(rows["document"].unique()) >= 40
    first = corpus.documents([HELD_OUT]).tokens[:96]
    assert torch.equal(rows["tokens"][0, : len(first)], first)


def test_in_treeless_text_each_document_has_its_own_successors():
    corpus = load_corpus("treeless")
    without, aware = corpus.losses()
    tokens = corpus.documents(range(400)).tokens.view(400, corpus.length)
    allowed = torch.zeros(36, 36, dtype=torch.bool)
    allowed[torch.arange(36)[:, None], corpus.choices] = True
    assert allowed[tokens[:, :-1], tokens[:, 1:]].all()
    counts = torch.zeros(400, 36, 36, dtype=torch.float64)
    pair = (torch.arange(400)[:, None].expand(-1, corpus.length - 1), tokens[:, :-1], tokens[:, 1:])
    counts.index_put_(pair, torch.ones(1, dtype=torch.float64), accumulate=True)
    often = counts.sum(2) > 7
    usual = counts.max(2)
    share = usual.values[often].sum() / counts[often].sum()
    assert float(share) == pytest.approx(0.7 + 0.3 / 12, abs=0.03)
    document, word = often.nonzero().T
    number = (corpus.choices[word] == usual.indices[document, word][:, None]).int().argmax(1)
    shares = np.bincount(number, minlength=12) / len(number)
    assert abs(shares - 1 / 12).max() < 0.03, len(number)  # any choice, as often
    assert 1 < aware < 1.5 < without < 2.5


# ---------------------------------------------------------------------- recursive grammars

NESTED = """
S -> 'and' S 'noun' S 'verb' [0.2] | 'noun' 'verb' [0.5]
S -> 'verb' 'and' 'noun' [0.2] | S 'verb' 'noun' [0.1]
"""


@pytest.mark.parametrize("sentence", [NESTED, RECURSIVE])
def test_roles_and_bindings_are_those_of_the_derivation(sentence):
    habits = {"habits": {"verb": "noun"}, "binding": 0.5} if sentence == NESTED else {}
    corpus = process(sentence, **habits)
    documents = corpus.documents(range(30))
    roles = np.array(corpus.grammar.roles)
    drawn = sentences(documents, "role")
    for row, number in zip(drawn, sentences(documents, "shape")):
        shape = documents.shapes[number[0]]
        assert tuple(roles[list(row)]) == shape.roles == tuple(shape.tree.leaves())
    bindings = corpus._roles(torch.arange(40))["binds_to"]
    shapes, number = corpus._derivations.shapes(torch.arange(40))
    told = [place for n in number.tolist() for place in shapes[n].binds_to]
    assert bindings.tolist() == told and (max(told) >= 0) == (sentence == NESTED)


def test_a_derivation_may_be_a_thousand_deep_and_none_is_kept():
    corpus = process("List -> 'noun' List [0.998] | 'noun' 'verb' 'and' [0.002]")
    documents = corpus.documents(range(6))
    assert max(len(shape.roles) for shape in documents.shapes) > 1000
    text = corpus.documents([0])
    long = int((text.token["role"] == 0).sum()) - 6  # one more noun in the last step of each of six
    loss = float(role_losses(corpus.grammar, text).sum())
    assert loss == pytest.approx(-6 * np.log(0.002) - long * np.log(0.998))
    chain = [f"A{i} -> 'noun' A{i + 1} [0.9] | 'and' [0.1]" for i in range(300)]
    finite = make("\n".join([*chain, "A300 -> 'verb' [1.0]"]))
    assert len(finite.shapes) == 301 and max(len(s.roles) for s in finite.shapes) == 302
