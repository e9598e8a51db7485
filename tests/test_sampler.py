"""Documents against independent oracles: nltk's probabilities, Zipf's law, exact entropies, and themselves."""

import multiprocessing

import nltk
import numpy as np
import pytest
import torch
from grammars import CLAUSES, RECURSIVE, make, random_grammar, sentence_grammars
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.data.corpus import HELD_OUT, Stream, held_out, load_corpus, pack
from latentree.data.sampler import GrammarProcess
from latentree.exact.ceilings import expected, in_sentence
from latentree.exact.information import estimated, exact, exact_chain
from latentree.exact.predictors import token_losses
from scipy.stats import chisquare


def process(*args, seed=0, **fields):
    return GrammarProcess(make(*args, **fields), seed)


def sentences(documents, field="tokens"):
    """The values of a field, sentence by sentence, as lists."""
    ends = (documents.token["place"] == 0).nonzero()[1:, 0]
    return [part.tolist() for part in documents.token[field].tensor_split(ends)]


# ---------------------------------------------------------------------- a pure function of (grammar, seed, id)


@pytest.mark.parametrize(
    "name",
    [
        "bound",
        "bound-flat",
        "bound-static",
        "released",
        "released-small",
        "bound-order3",
        "released-ngram",
    ],
)
def test_a_document_depends_on_nothing_but_its_number(name):
    corpus = load_corpus(name)
    ids = torch.tensor([7, 0, 3, HELD_OUT + 2, 12, 5])
    together, another = corpus.documents(ids), load_corpus(name)
    for index, number in enumerate(ids.tolist()):
        alone = another.documents([number]).tokens
        assert torch.equal(together.tokens[together.token["document"] == index], alone)
    assert torch.equal(corpus.documents(ids, detail=False).tokens, together.tokens)


def test_another_process_draws_the_same_documents():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.map(_tokens_of, [range(0, 5), range(5, 10)])
    assert sum(parts, []) == _tokens_of(range(10))


def _tokens_of(ids):
    torch.set_num_threads(1)
    return load_corpus("bound").documents(list(ids)).tokens.tolist()


def test_another_seed_draws_other_documents():
    assert not torch.equal(
        process(seed=0).documents([0]).tokens[:6], process(seed=1).documents([0]).tokens[:6]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", ["bound", "bound-flat", "released", "bound-order3", "released-ngram"]
)
def test_a_gpu_draws_the_same_documents(name):
    corpus = load_corpus(name)
    assert torch.equal(
        corpus.documents(range(200), "cuda").tokens.cpu(), corpus.documents(range(200)).tokens
    )


@pytest.mark.parametrize("rows, context", [(4, 16), (4, 50)])
def test_stream_is_the_same_for_any_sharding_and_resumes_exactly(rows, context):
    corpus = load_corpus("released-small")
    whole = Stream(corpus, rows, context)
    halves = [
        Stream(corpus, rows // 2, context, first_row=first, total_rows=rows)
        for first in (0, rows // 2)
    ]
    for step in range(400 // context):
        batch = whole.next_batch()
        assert batch.shape == (rows, context) and batch.min() >= 0
        assert torch.equal(batch, torch.cat([half.next_batch() for half in halves]))
        if step == 2:
            state = whole.state_dict()
    resumed = Stream(corpus, rows, context)
    resumed.load_state_dict(state)
    for _ in range(3, 400 // context):
        last = resumed.next_batch()
    assert torch.equal(last, batch)


def test_stream_rows_are_documents_end_to_end():
    corpus, context = load_corpus("bound"), 64
    stream = Stream(corpus, 3, context)
    text = torch.cat([stream.next_batch() for _ in range(10)], 1)
    for row in range(3):
        documents = corpus.documents([row, row + 3, row + 6, row + 9, row + 12]).tokens
        assert torch.equal(text[row], documents[: text.shape[1]])


def test_documents_that_share_latents_are_shuffled_apart():
    corpus = load_corpus("released-small")
    places = torch.arange(70_000)
    ids = corpus.training_ids(places)
    block = 65_536 - 65_536 % 10
    assert torch.equal(ids[:block].sort().values, places[:block])
    assert ids[block:].min() >= block
    assert (ids[1:1000] // 10 == ids[:999] // 10).float().mean() < 0.05


# ---------------------------------------------------------------------- distributions


@pytest.mark.parametrize(
    "sentence",
    [CLAUSES, "Sentence -> 'noun' 'verb' [0.5] | Sentence 'and' Sentence [0.25] | 'verb' [0.25]"],
)
def test_role_sequences_have_the_probabilities_of_nltk(sentence):
    """Sampled strings (the recursive grammar's longer ones pooled) against nltk's inside probabilities."""
    corpus = process(sentence, document={"sections": 1, "paragraphs": 1, "sentences": 1})
    roles = corpus.grammar.roles
    sampled = [
        tuple(roles[r] for r in row[:-1])
        for row in sentences(corpus.documents(range(20_000)), "role")
    ]
    strings = {s for s in sampled if len(s) <= 5}
    parser = nltk.parse.pchart.InsideChartParser(nltk.PCFG.fromstring(sentence))
    p = np.array([sum(tree.prob() for tree in parser.parse(list(s))) for s in strings])
    counts = np.array([sampled.count(s) for s in strings])
    often = p * len(sampled) > 10
    p, counts = (
        np.append(p[often], 1 - p[often].sum()),
        np.append(counts[often], len(sampled) - counts[often].sum()),
    )
    kept = p > 1e-9
    assert chisquare(counts[kept], p[kept] * len(sampled)).pvalue > 1e-3


@pytest.mark.parametrize("name", ["bound", "released-small"])
def test_rank_frequencies_are_zipf(name):
    """One word of each role from each of many unrelated documents: independent draws."""
    corpus = load_corpus(name)
    documents = corpus.documents(torch.arange(8000) * corpus.repetitions)
    first = documents.token["position"] < 4
    for r, role in enumerate(corpus.grammar.roles[:3]):
        chosen = first & (documents.token["role"] == r)
        counts = np.bincount(documents.token["rank"][chosen], minlength=corpus.grammar.sizes[r])
        assert chisquare(counts, counts.sum() * corpus.grammar.frequencies[r]).pvalue > 1e-3


@pytest.mark.parametrize(
    "redraw",
    [
        {"document": 1.0},
        {"corpus": 1.0},
        {"corpus": 1.0, "document": 0.5, "section": 0.25},
        {"document": 0.25},
    ],
)
@pytest.mark.parametrize("binding", [0.0, 0.8])
def test_token_frequencies_are_exact(redraw, binding):
    corpus = process(redraw=redraw, binding=binding, habits={"verb": "noun"}, shared=0.4)
    documents = corpus.documents(range(20_000))
    per_document = torch.zeros(20_000, corpus.vocabulary_size, dtype=torch.float64)
    per_document.index_put_(
        (documents.token["document"], documents.tokens),
        torch.ones((), dtype=torch.float64),
        accumulate=True,
    )
    exact_share, length = torch.from_numpy(corpus.token_frequencies()), per_document.sum(1)
    assert float(exact_share.sum()) == pytest.approx(1)
    error = (per_document - length[:, None] * exact_share).std(0) / length.mean() / np.sqrt(20_000)
    assert (abs(per_document.sum(0) / length.sum() - exact_share) < 4.5 * error + 1e-9).all()


def test_maps_are_uniformly_random_permutations():
    corpus = load_corpus("bound")
    maps = corpus.documents(torch.arange(12_000)).maps["verb"]
    assert torch.equal(
        maps.sort(1).values, torch.as_tensor(corpus.grammar.words[1]).expand_as(maps)
    )
    for rank in (0, 5):
        assert chisquare(np.bincount(maps[:, rank] - 12)).pvalue > 1e-3
    pairs = np.bincount((maps[:, 0] - 12) * 12 + maps[:, 1] - 12, minlength=144)
    assert chisquare(pairs[pairs > 0]).pvalue > 1e-3 and (pairs == 0).sum() == 12


@pytest.mark.parametrize("level, share", [("document", 0.5), ("section", 0.25), ("sentence", 1.0)])
def test_redraw_changes_the_stated_share_at_the_stated_level(level, share):
    roles = {
        "noun": {"size": 40, "zipf": 1.0},
        "verb": {"size": 40, "zipf": 1.0},
        "and": {"size": 2},
    }
    layout = {"sections": 3, "paragraphs": 2, "sentences": 2}
    corpus = process(
        roles=roles,
        redraw={"corpus": 1.0, level: share},
        document=layout,
        binding=0.5,
        habits={"verb": "noun"},
    )
    documents = corpus.documents(range(50))
    base = process(
        roles=roles, redraw={"corpus": 1.0}, document=layout, binding=0.5, habits={"verb": "noun"}
    ).documents([0])
    units = {"document": 1, "section": 3, "sentence": 12}[level]
    for role in ("noun", "verb"):
        maps = documents.maps[role]
        assert len(maps) == 50 * units
        moved = (maps != base.maps[role]).float().mean(1)
        assert moved.max() <= share and moved.mean() == pytest.approx(share - 1 / 40, abs=0.01)
        assert torch.equal(maps.sort(1).values, base.maps[role].sort(1).values.expand_as(maps))
    changed = (documents.habits["verb"] != base.habits["verb"]).float().mean()
    assert changed == pytest.approx(
        share * (1 - (corpus.grammar.frequencies[1] ** 2).sum()), abs=0.02
    )


def test_habits_are_followed_with_the_stated_probability():
    corpus = load_corpus("bound")
    documents = corpus.documents(range(2000))
    rank, role = documents.token["rank"], documents.token["role"]
    svo = (role[:-2] == 0) & (role[1:-1] == 1) & (role[2:] == 2)
    at = svo.nonzero()[:, 0]
    called = documents.habits["verb"][documents.token["unit"][at], rank[at]]
    p = torch.as_tensor(corpus.grammar.frequencies[1])[called]
    expected_share, n = float((0.9 + 0.1 * p).mean()), len(at)
    share = float((rank[at + 1] == called).double().mean())
    assert abs(share - expected_share) < 4 * np.sqrt(expected_share * (1 - expected_share) / n)


@pytest.mark.parametrize(
    "parent, flat", [("bound", "bound-flat"), ("released-small", "released-small-flat")]
)
def test_flat_control_equals_its_parent_within_sentences(parent, flat):
    """Unigrams, and joint words of each sentence's first four tokens, two samples by chi-square."""
    draws = []
    for name in (parent, flat):
        corpus = load_corpus(name)
        documents = corpus.documents(torch.arange(6000) * corpus.repetitions)
        draws.append((documents, corpus))
    first = [d.tokens[d.token["position"] == 0] for d, _ in draws]
    size = draws[0][1].vocabulary_size
    _same_law(*[np.bincount(t, minlength=size) for t in first])
    second = [d.tokens[(d.token["position"] == 1)] for d, _ in draws]
    cells = [
        np.bincount((a // 4) * (size // 4 + 1) + b // 4, minlength=(size // 4 + 1) ** 2)
        for a, b in zip(first, second)
    ]
    _same_law(*cells)
    repeated = []  # which words of a three-clause sentence are equal: the pattern, one sentence a document
    for documents, _ in draws:
        rows = [s for s in sentences(documents)[::24] if len(s) == 12]
        repeated.append(
            np.bincount(
                [
                    sum(
                        2**k
                        for k, (i, j) in enumerate([(0, 4), (0, 8), (1, 5), (1, 9), (2, 6)])
                        if row[i] == row[j]
                    )
                    for row in rows
                ],
                minlength=32,
            )
        )
    _same_law(*repeated)
    for a, b in zip(
        expected(draws[0][1].grammar).latent_aware, expected(draws[1][1].grammar).latent_aware
    ):
        assert a == b


def _same_law(a, b):
    often = a + b > 10
    a, b = np.append(a[often], a[~often].sum()), np.append(b[often], b[~often].sum())
    both = (a + b) > 0
    share = (a + b)[both] / (a + b).sum()
    statistic = sum(((c[both] - share * c.sum()) ** 2 / (share * c.sum())).sum() for c in (a, b))
    from scipy.stats import chi2

    assert chi2.sf(statistic, both.sum() - 1) > 1e-3


# ---------------------------------------------------------------------- entropies


@pytest.mark.parametrize(
    "name", ["bound", "bound-flat", "bound-static", "released", "released-small"]
)
@pytest.mark.parametrize("latent_aware", [True, False])
def test_empirical_losses_are_within_three_standard_errors_of_the_exact_ones(name, latent_aware):
    corpus = load_corpus(name)
    count = 600 if name != "released" else 150
    documents = corpus.documents(HELD_OUT + torch.arange(count) * corpus.repetitions)
    losses = token_losses(corpus.grammar, documents, latent_aware)
    table = expected(corpus.grammar).set_index("role")[
        "latent_aware" if latent_aware else "syntax_only"
    ]
    if name != "bound-static":  # its maps are one draw, so only the syntax averages out
        for r, role in enumerate(corpus.grammar.roles):
            chosen = documents.token["role"] == r
            _within(losses[chosen], documents.token["document"][chosen], table[role], count)
        _within(losses, documents.token["document"], table["all"], count)
    elif not latent_aware:
        _within(losses, documents.token["document"], table["all"], count)


def _within(losses, document, value, count):
    """The ratio of sums over documents, with the standard error of a ratio."""
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, document, losses - value)
    n = torch.zeros(count, dtype=torch.float64).index_add_(0, document, torch.ones_like(losses))
    error = float(sums.std() / n.mean() / np.sqrt(count))
    assert abs(float(sums.mean() / n.mean())) < max(3.5 * error, 1e-9)


def test_mutual_information_is_exact():
    for name in ("bound", "bound-flat", "released-small", "bound-order3"):
        corpus = load_corpus(name)
        documents = corpus.documents(torch.arange(6000) * corpus.repetitions)
        distances = [1, 2, 4, 9, 30]
        for labels in (
            np.arange(corpus.vocabulary_size),
            load_corpus(name.replace("-order3", "")).grammar.role_of,
        ):
            words = len(set(labels)) == corpus.vocabulary_size
            if name == "bound-order3":
                formula, tolerance = (
                    exact_chain(corpus, distances, labels),
                    0.01,
                )  # a stationary chain has no document ends
            else:
                formula, tolerance = exact(corpus.grammar, distances, words), 0.006
            assert np.allclose(estimated(documents, distances, labels), formula, atol=tolerance), (
                name,
                words,
            )


def test_chain_has_the_static_corpus_statistics():
    chain, static = load_corpus("bound-order3"), load_corpus("bound-static")
    losses = chain.losses()
    assert losses == sorted(losses, reverse=True)
    a, b = (p.documents(range(3000)).tokens for p in (chain, static))
    for n in (1, 2):
        cells = [
            np.bincount(sum(t[i : len(t) - n + i] * 41**i for i in range(n)), minlength=41**n)
            / len(t)
            for t in (a, b)
        ]
        assert abs(cells[0] - cells[1]).sum() / 2 < 0.05  # total variation
    ends = torch.bincount(
        chain.documents(range(50)).token["document"][chain.documents(range(50)).tokens == chain.end]
    )
    assert (ends == 24).all()


def test_released_ngram_tables_are_those_of_the_release():
    """Token 0 has probability 0.55 on average; conditional entropy 2.21 and entropy of the average 2.42 nats."""
    p = load_corpus("released-ngram").probabilities
    assert float(p[:, 0].mean()) == pytest.approx(0.55, abs=0.02)
    assert float(-(p * p.log()).sum(1).mean()) == pytest.approx(2.21, abs=0.12)
    assert float(-(p.mean(0) * p.mean(0).log()).sum()) == pytest.approx(2.42, abs=0.12)


def test_released_ngram_losses_are_those_of_its_own_draws():
    """The mean loss equals the mean entropy of the mixture it was drawn from, and knowing the tables helps."""
    corpus = load_corpus("released-ngram")
    documents = corpus.documents(range(1500))
    aware, average = (corpus.token_losses(documents, knows) for knows in (True, False))
    assert aware.isfinite().all() and float(aware.mean()) < float(average.mean())
    # importance identity: E[q(x) / p(x)] = 1 for any other distribution q, here the average of the tables
    ratio = (aware - average).exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)


def test_released_ngram_has_the_lengths_and_the_unigram_of_its_tables():
    corpus = load_corpus("released-ngram")
    documents = corpus.documents(range(3000))
    lengths = torch.bincount(documents.token["document"])
    assert (
        lengths.min() >= 11 and lengths.max() <= 110 and abs(lengths.double().mean() - 60.5) < 2.5
    )
    zero = (documents.tokens == 0).double().mean()
    assert 0.45 < zero < 0.7
    assert (documents.tokens == corpus.end).sum() == 3000


# ---------------------------------------------------------------------- training and held-out


@pytest.mark.parametrize("name", ["bound", "released-small", "released"])
def test_held_out_documents_never_share_latents_with_training(name):
    corpus = load_corpus(name)
    training = corpus.documents(torch.arange(300))
    kept = corpus.documents(HELD_OUT + torch.arange(300))
    for role in ("subject", "verb", "object"):
        seen = {tuple(row) for row in training.maps[role].tolist()}
        assert seen.isdisjoint({tuple(row) for row in kept.maps[role].tolist()})
        assert len(seen) == 300 // corpus.repetitions  # and the test can tell: those that share do


def test_no_held_out_sentence_of_the_released_grammar_is_trained_on():
    corpus = load_corpus("released")
    excluded = {
        tuple(s) for s in sentences(corpus.documents(corpus.apart(HELD_OUT, corpus.held_out_limit)))
    }
    trained = sentences(corpus.documents(range(6000)))
    assert excluded.isdisjoint({tuple(s) for s in trained})
    content = corpus.grammar.file.model_dump() | {"exclude_held_out": 0}
    from latentree.data.grammar import Grammar

    unchecked = GrammarProcess(Grammar(content)).documents(range(6000))
    assert any(
        tuple(s) in excluded for s in sentences(unchecked)
    )  # without the redraw, some would be


def test_more_held_out_documents_than_are_kept_apart_are_refused():
    with pytest.raises(
        ValueError, match="exclude_held_out keeps 4096 out of training; ask for fewer"
    ):
        held_out(load_corpus("released"), 2000, 512)


def test_a_corpus_that_excludes_every_sentence_is_refused():
    tiny = process("Sentence -> 'noun' 'verb' 'and' [1.0]", exclude_held_out=5000)
    with pytest.raises(ValueError, match="leaves no sentence to train on; set it to 0"):
        tiny.documents([0])


def test_held_out_windows_share_no_latents_with_each_other():
    corpus = load_corpus("released-small")
    tops = held_out(
        corpus,
        40,
        96,
        annotate=lambda d: {"map": d.maps["subject"][d.token["unit"]] @ torch.arange(1, 31) ** 3},
    )
    assert len(tops["map"].unique()) == len(tops["document"].unique()) >= 40


def test_held_out_windows_begin_with_a_document():
    corpus = load_corpus("bound")
    windows = held_out(
        corpus, 20, 128, annotate=lambda d: {"loss": token_losses(corpus.grammar, d).float()}
    )
    assert (windows["position"][:, 0] == 0).all() and windows["tokens"].shape == (20, 128)
    assert windows["loss"].dtype == torch.float32 and (windows["loss"] >= 0).all()
    again = corpus.documents([HELD_OUT]).tokens
    n = min(128, len(again))
    assert torch.equal(windows["tokens"][0, :n], again[:n])


@settings(max_examples=15, deadline=None)
@given(
    sentence_grammars(),
    st.sampled_from([0.0, 0.6]),
    st.sampled_from([{"document": 1.0}, {"sentence": 0.5}, {"corpus": 1.0}]),
)
def test_random_grammars_sample_what_they_say(sentence, binding, redraw):
    try:
        grammar = random_grammar(sentence, binding, redraw)
    except ValueError as error:
        assert "appears in no production" in str(error)
        return
    corpus = GrammarProcess(grammar, 3)
    documents = corpus.documents(range(40))
    possible = {shape.roles for shape in grammar.shapes}
    for roles in sentences(documents, "role"):
        assert tuple(grammar.roles[r] for r in roles) in possible
    t = documents.token
    for r, role in enumerate(grammar.roles):
        here = t["role"] == r
        maps = documents.maps[role][t["unit"][here]]
        assert torch.equal(maps.gather(1, t["rank"][here][:, None])[:, 0], documents.tokens[here])
    packed, lengths = pack(documents, 4)
    assert lengths.sum() == len(documents.tokens)
    assert torch.equal(packed["tokens"][packed["tokens"] >= 0], documents.tokens)
    losses = token_losses(grammar, documents)
    assert (losses > -1e-9).all() and losses.isfinite().all()


def test_in_sentence_loss_is_the_floor_of_a_flat_corpus():
    """Against brute force: every latent of a two-word grammar enumerated, one sentence of two clauses."""
    sentence = "Sentence -> Clause Clause [1.0]\nClause -> 'noun' 'verb' [1.0]"
    roles = {"noun": {"size": 2, "zipf": 1.0}, "verb": {"size": 2, "zipf": 0.5}}
    grammar = make(
        sentence, roles=roles, binding=0.8, habits={"verb": "noun"}, redraw={"sentence": 1.0}
    )
    from itertools import permutations, product

    law_n, law_v = grammar.frequencies[0], grammar.frequencies[1]
    mass = {}
    for noun_map in permutations(range(2)):
        for verb_map in permutations(range(2)):
            for habit in product(range(2), repeat=2):
                latent = 0.25 * law_v[habit[0]] * law_v[habit[1]]
                for n1, v1, n2, v2 in product(range(2), repeat=4):
                    p = latent * law_n[n1] * law_n[n2]
                    for n, v in ((n1, v1), (n2, v2)):
                        p *= 0.8 * (habit[n] == v) + 0.2 * law_v[v]
                    words = (noun_map[n1], verb_map[v1], noun_map[n2], verb_map[v2])
                    mass[words] = mass.get(words, 0) + p
    entropy = -sum(p * np.log(p) for p in mass.values())
    assert sum(mass.values()) == pytest.approx(1)
    assert in_sentence(grammar) == pytest.approx(entropy / grammar.mean_length, abs=1e-12)


def test_recursive_grammar_is_sampled_and_scored():
    corpus = process(RECURSIVE, document={"sections": 1, "paragraphs": 1, "sentences": 2})
    documents = corpus.documents(range(4000))
    lengths = np.array([len(s) for s in sentences(documents)])
    mean, variance = corpus.grammar.length_moments()
    assert abs(lengths.mean() - mean) < 4 * np.sqrt(variance / len(lengths))
    few = corpus.documents(range(300))
    losses = token_losses(corpus.grammar, few, latent_aware=False)
    assert losses.isfinite().all()
    with pytest.raises(ValueError, match="recursive, or too many"):
        expected(corpus.grammar)
