"""Contexts and prompts against the generator's own record; vectors of hand-set models."""

import pandas as pd
import pytest
import torch
from circuit_models import CONTEXT, HEADS, NEXT, VOCABULARY, blank_model, frequency_model
from grammars import CLAUSES, make
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.data.corpus import load_corpus
from latentree.data.ngrams import HashedTables
from latentree.data.sampler import GrammarProcess
from latentree.exact.predictors import predictive
from latentree.exact.reader import posterior_frequencies
from latentree.inside.names import Internals
from latentree.measure import function_vectors as fv
from latentree.measure.function_vectors import BEST, DIFFERENCE, FRESH, SAME
from latentree.measure.prompts import (
    Contexts,
    Prompts,
    contexts,
    copy_prompts,
    drawn_words,
    fresh_words,
    ideal_divergence,
    last_queries,
    next_role,
    same_words,
    shared_part,
    sharing,
    shuffle_contexts,
)
from latentree.train.model import build_model
from test_inside import random_model

torch.set_num_threads(1)
TINY = GrammarProcess(make())
BOUND, RELEASED = load_corpus("bound"), load_corpus("released-small")
STATES = [(TINY, ["noun"]), (BOUND, ["verb", "subject"]), (RELEASED, ["subject", "verb"])]


def law_of(process, role):
    """The frequencies of a role's words by rank (rank,)."""
    return torch.as_tensor(process.grammar.frequencies[process.grammar.roles.index(role)])


def record(taken, document):
    """A document's tokens, their roles and places, as the sampler keeps them."""
    token = taken.source.token
    here = token["document"] == document
    roles = [taken.corpus.grammar.roles[role] for role in token["role"][here]]
    return token["tokens"][here].tolist(), roles, token["place"][here].tolist()


def latents_of(taken, latent):
    """The maps {role: (words,)} and habits {child: (parent words,)} of one latent."""
    document = int((taken.latent == latent).nonzero()[0, 0])
    maps, habits = taken.source.maps, taken.source.habits
    return (
        {role: rows[document % len(rows)] for role, rows in maps.items()},
        {child: rows[document % len(rows)] for child, rows in habits.items()},
    )


# ---------------------------------------------------------------------- contexts


@pytest.mark.parametrize("process, role", [(TINY, "noun"), (BOUND, "subject")])
def test_documents_share_latents_exactly_where_they_say(process, role):
    taken = contexts(process, [role], 5, 3, 64)
    assert taken.latent.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    tables = [rows for rows in taken.source.maps.values() if len(rows) > 1]
    tables += taken.source.habits.values()
    for rows in tables:
        assert torch.equal(rows, rows[::3].repeat_interleave(3, 0))
    whole = torch.cat([rows[::3] for rows in tables], 1)
    assert len(whole.unique(dim=0)) == 5  # all together, two latents never agree
    assert len(taken.tokens.unique(dim=0)) == 15  # and their documents are others
    # `first` skips latents, and how many documents share one does not change it.
    later = contexts(process, [role], 2, 2, 64, first=3)
    for latent in (3, 4):
        for ours, theirs in zip(latents_of(taken, latent), latents_of(later, latent - 3)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(rows, theirs[name]) for name, rows in ours.items())


@pytest.mark.parametrize("process, state", STATES)
def test_queries_are_all_places_in_the_state(process, state):
    taken, shortest, length = contexts(process, state, 4, 3, 48, shortest=9), 9, 48
    expected = []
    for document in range(12):
        tokens, roles, places = record(taken, document)
        shown = tokens[:length]
        padded = shown + [process.end] * (taken.tokens.shape[1] - len(shown))
        assert taken.tokens[document].tolist() == padded
        for position in range(shortest, len(shown)):
            begin = position - places[position]
            if roles[begin : position + 1] == state:
                assert roles[position + 1] == next_role(process.grammar, state)
                expected.append((document, position))
    assert list(zip(taken.document.tolist(), taken.position.tolist())) == expected
    assert len(expected) >= 10
    assert taken.query_latent.tolist() == [document // 3 for document, _ in expected]
    last = {document: number for number, (document, _) in enumerate(expected)}
    assert last_queries(taken).tolist() == list(last.values())


def test_text_without_roles():
    process, length = HashedTables(vocabulary_size=30, tables=4), 33
    taken = contexts(process, [], 4, 3, length, shortest=5)
    assert taken.latent.tolist() == list(range(12))
    assert (taken.position % 16 == 0).all() and (taken.position >= 5).all()
    prompt = same_words(taken)
    for number, (document, position) in enumerate(zip(taken.document, taken.position)):
        whole = taken.source.tokens[taken.source.token["document"] == document].tolist()
        assert prompt.tokens[number].tolist() == [process.end, whole[position]]
        assert prompt.gold[number].argmax() == whole[position + 1]
        assert prompt.gold[number].sum() == 1
    ends = torch.bincount(taken.source.token["document"]).tolist()
    expected = sum(p + 1 < min(n, length) for n in ends for p in range(16, n, 16))
    assert len(taken.position) == expected


def test_no_query_stands_at_the_end_of_the_last_document():
    process, count = HashedTables(vocabulary_size=30, tables=4), 0
    for first in range(60):  # whose last documents have any length
        taken = contexts(process, [], 2, 1, 200, first=first)
        length = torch.bincount(taken.source.token["document"])
        count += int(length[-1] % 16 == 1)
        assert (taken.position + 1 < length[taken.document]).all()
    assert count > 0


def test_what_would_be_wrong_unseen_is_refused_by_name():
    with pytest.raises(ValueError, match="bound-flat: redraws latents within .*'sentence'.*; give"):
        contexts(load_corpus("bound-flat"), ["subject"], 2, 2, 64)
    with pytest.raises(ValueError, match=r"\['subject'\]: is nowhere between tokens 60 and 50 of"):
        contexts(BOUND, ["subject"], 2, 2, 50, shortest=60)
    with pytest.raises(ValueError, match="bound: binding = 0.9: the ideal reader is exact only"):
        ideal_divergence(contexts(BOUND, ["subject"], 2, 2, 64), [[0]])
    for state in (["wizard"], ["subject", "verb", "object"], ["object"]):
        with pytest.raises(ValueError, match="state = .*is not followed by one certain role in"):
            next_role(BOUND.grammar, state)


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize("process, state", STATES[1:])
def test_the_same_words_have_the_documents_own_predictive(process, state):
    taken = contexts(process, state, 4, 2, 48, shortest=9)
    prompt = same_words(taken)
    begins = torch.bincount(taken.source.token["document"]).cumsum(0).roll(1)
    begins[0] = 0
    at = begins[taken.document] + taken.position
    expected = predictive(process.grammar, taken.source)[at + 1]
    torch.testing.assert_close(prompt.gold, expected, atol=1e-12, rtol=0)
    words = [taken.source.tokens[at - back] for back in reversed(range(len(state)))]
    assert torch.equal(prompt.tokens, torch.stack([torch.full_like(at, process.end), *words], 1))
    assert torch.equal(prompt.latent, taken.query_latent)


@pytest.mark.parametrize("process", [BOUND, RELEASED], ids=lambda process: process.name)
def test_gold_after_a_subject_is_its_latents_law_and_habit(process):
    taken, binding = contexts(process, ["subject"], 6, 2, 64), process.grammar.file.binding
    for prompt in (same_words(taken), fresh_words(taken), drawn_words(taken, 5)):
        expected = torch.zeros_like(prompt.gold)
        for row, words, latent in zip(expected, prompt.tokens, prompt.latent):
            maps, habits = latents_of(taken, int(latent))
            row[maps["verb"]] += (1 - binding) * law_of(process, "verb")
            if binding:
                subject = maps["subject"].tolist().index(int(words[-1]))
                row[maps["verb"][habits["verb"][subject]]] += binding
        torch.testing.assert_close(prompt.gold, expected, atol=1e-12, rtol=0)


def test_gold_before_the_word_that_was_bound_is_by_bayes():
    """An inverted sentence's verb says which subjects call for it."""
    taken, binding = contexts(BOUND, ["verb"], 4, 2, 64), 0.9
    prompt, law = same_words(taken), law_of(BOUND, "subject")  # subjects and verbs have one law
    for gold, words, latent in zip(prompt.gold, prompt.tokens, prompt.latent):
        maps, habits = latents_of(taken, int(latent))
        verb = maps["verb"].tolist().index(int(words[-1]))
        called = (habits["verb"] == verb).double()
        joint = law * (binding * called + (1 - binding) * law[verb])
        expected = joint / joint.sum()
        torch.testing.assert_close(gold[maps["subject"]], expected, atol=1e-12, rtol=0)
        assert abs(gold.sum() - 1) < 1e-12


@pytest.mark.parametrize("process, state", STATES[:2])
def test_fresh_words_have_not_been_shown(process, state):
    taken, exhausted, left = contexts(process, state, 8, 3, 64, shortest=4), 0, 0
    prompt = fresh_words(taken, seed=3)
    for words, document, position in zip(prompt.tokens, taken.document, taken.position):
        shown = set(taken.tokens[document, : position + 1].tolist())
        assert words[0] == process.end
        for word, role in zip(words[1:].tolist(), state):
            all_words = set(process.grammar.words[process.grammar.roles.index(role)].tolist())
            assert word in all_words
            if all_words <= shown:
                exhausted += 1
            else:
                left += 1
                assert word not in shown
    assert left > 10 and (exhausted > 0 or process is not TINY)
    assert torch.equal(fresh_words(taken, 3).tokens, prompt.tokens)
    assert not torch.equal(fresh_words(taken, 4).tokens, prompt.tokens)
    assert torch.equal(prompt.latent, taken.query_latent)


def test_drawn_words_are_uniform_and_as_many_for_each_latent():
    taken = contexts(BOUND, ["subject"], 5, 3, 64)
    prompt = drawn_words(taken, 400, seed=1)
    assert torch.equal(prompt.latent, torch.arange(5).repeat_interleave(400))
    counts = torch.bincount(prompt.tokens[:, 1], minlength=BOUND.vocabulary_size)
    counts = counts[torch.as_tensor(BOUND.grammar.words[0])]
    assert counts.sum() == 2000
    assert (counts - 2000 / 12).abs().max() < 5 * (2000 / 12) ** 0.5
    kept = prompt.of([1, 4])
    assert kept.latent.unique().tolist() == [1, 4] and len(kept.latent) == 800
    assert torch.equal(kept.gold[400:], prompt.gold[1600:])
    assert torch.equal(kept.tokens[:400], prompt.tokens[400:800])


def test_shuffled_contexts_are_sentences_of_the_documents():
    process, state = BOUND, ["verb", "subject"]
    taken = contexts(process, state, 6, 2, 48)
    sentences, sources = set(), {}
    for document in range(12):
        tokens, _, places = record(taken, document)
        begins = [i for i, place in enumerate(places) if place == 0] + [len(tokens)]
        for begin, end in zip(begins, begins[1:]):
            sentences.add(tuple(tokens[begin:end]))
            sources.setdefault(tuple(tokens[begin:end]), set()).add(document)
    zero_shot, drawn_from = drawn_words(taken, 4), set()
    shuffled = shuffle_contexts(taken, zero_shot, 30, seed=2)
    assert shuffled.tokens.shape == (24, 30 + len(state))
    assert torch.equal(shuffled.tokens[:, 30:], zero_shot.tokens[:, 1:])
    assert torch.equal(shuffled.gold, zero_shot.gold)
    assert torch.equal(shuffled.latent, zero_shot.latent)
    for row in shuffled.tokens[:, :30].tolist():
        ends = [i + 1 for i, token in enumerate(row) if token == process.end]
        assert ends[-1] == 30
        first, *others = [tuple(row[begin:end]) for begin, end in zip([0, *ends], ends)]
        assert any(sentence[-len(first) :] == first for sentence in sentences)
        assert sentences.issuperset(others)
        drawn_from |= {min(sources[other]) for other in others if len(sources[other]) == 1}
    assert len(drawn_from) > 6  # of 12


def test_latents_that_share_a_part():
    tables = {}
    for share in (0.0, 0.5, 1.0):
        taken = contexts(sharing(BOUND, 2, share), ["subject"], 30, 2, 64)
        tables[share] = {"map": taken.source.maps["verb"], "habit": taken.source.habits["verb"]}
    for name in ("map", "habit"):
        base = tables[0.0][name]
        assert len(base) == 1  # one for all documents
        half = (tables[0.5][name] == base).double().mean(1)
        assert (half >= 0.5).all() and half.mean() < 0.65
        other = (tables[1.0][name] == base).double().mean()
        assert other == pytest.approx(1 / 12, abs=0.06)
        assert len(tables[1.0][name].unique(dim=0)) == 30
    common = contexts(sharing(BOUND, 2, 0), ["subject"], 3, 2, 64)
    law, maps = law_of(BOUND, "verb"), taken.source.maps["verb"]
    assert shared_part(common, common, "verb").tolist() == pytest.approx([1.0] * 3)
    found = shared_part(taken, common, "verb")
    for latent in range(30):  # from the definition
        p, q = torch.zeros(2, BOUND.vocabulary_size, dtype=torch.float64)
        p[maps[2 * latent]], q[common.source.maps["verb"][0]] = law, law
        u = (p > 0) / 12
        expected = float(((p - u) * (q - u)).sum() / ((q - u) ** 2).sum())
        assert found[latent] == pytest.approx(expected, abs=1e-12)
    assert abs(found.mean()) < 0.15


def test_copy_prompts_have_other_words_and_the_sources_answer():
    source, target = copy_prompts(RELEASED.grammar, 200, seed=1)
    role_of = [RELEASED.grammar.roles[role] for role in RELEASED.grammar.role_of]
    expected = ["subject", "verb", "object", "connector", "subject", "verb"]
    for a, b, gold in zip(source.tolist(), target.tokens.tolist(), target.gold):
        assert [role_of[token] for token in a] == expected
        assert [role_of[token] for token in b] == expected
        assert not set(a) & set(b) and a[:2] == a[4:] and b[:2] == b[4:]
        assert gold[a[2]] == gold.sum() == 1
    assert torch.equal(copy_prompts(RELEASED.grammar, 200, 1)[0], source)


# ---------------------------------------------------------------------- the ideal reader

NOUNS = "Sentence -> 'noun' 'noun' 'verb' 'and' [1.0]"


@pytest.mark.parametrize("sentence, role", [(CLAUSES, "verb"), (NOUNS, "noun")])
def test_ideal_divergence_counts_the_words_of_its_documents(sentence, role):
    """Those up to the state's last word, which may be of the role that follows."""
    process = GrammarProcess(make(sentence))
    taken = contexts(process, ["noun"], 20, 3, 40)
    law, ends = law_of(process, role), last_queries(taken)
    groups = [[0]] + [ends[taken.query_latent[ends] == latent].tolist() for latent in range(20)]
    for group, found in zip(groups, ideal_divergence(taken, groups)):
        seen = []
        for query in group:
            tokens, roles, _ = record(taken, int(taken.document[query]))
            before = range(int(taken.position[query]) + 1)
            seen += [tokens[i] for i in before if roles[i] == role]
        ranked = latents_of(taken, int(taken.query_latent[group[0]]))[0][role]
        counts = torch.tensor([seen.count(word) for word in ranked.tolist()])
        believed = posterior_frequencies(counts, law)
        assert found == pytest.approx(float((law * (law / believed).log()).sum()), abs=1e-12)


def test_before_the_first_word_nothing_is_known():
    taken = contexts(TINY, ["noun"], 20, 3, 40)
    first = (taken.position == 0).nonzero()[:, 0]
    law = law_of(TINY, "verb")
    nothing = float((law * (law * len(law)).log()).sum())  # from a uniform prediction
    assert len(first) > 20
    found = ideal_divergence(taken, first[:, None])
    assert found.tolist() == pytest.approx([nothing] * len(first))


def test_more_documents_leave_less_to_know():
    taken = contexts(RELEASED, ["subject"], 24, 4, 60)
    ends, law = last_queries(taken), law_of(RELEASED, "verb")
    means = [float((law * (law * len(law)).log()).sum())]
    for count in (1, 2, 4):
        groups = [ends[taken.query_latent[ends] == latent][:count] for latent in range(24)]
        found = ideal_divergence(taken, groups)
        assert (found >= 0).all() and found.max() <= (law.max() / law.min()).log()
        means.append(float(found.mean()))
    assert means == sorted(means, reverse=True) and means[-1] < 0.6 * means[0]


# ---------------------------------------------------------------------- vectors added to a run

TOKENS = torch.randint(11, (5, 12), generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def hooked_logits(model, module, vectors):
    """Logits after the last token when `vectors` join a module's output there, by a plain hook."""

    def add(module, given, out):
        changed = (out[0] if isinstance(out, tuple) else out).clone()
        changed[:, -1] += vectors
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    hook = module.register_forward_hook(add)
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits[:, -1]
    hook.remove()
    return logits


@pytest.mark.parametrize("architecture", ["olmo2", "gpt_neox"])
def test_added_vectors_agree_with_plain_hooks(architecture):
    model = random_model(architecture)
    inside, clean = Internals(model), fv.last_logits(model, TOKENS)
    for layer in range(2):
        block = inside.blocks[layer]
        attention = inside.attention(layer)
        if architecture == "olmo2":
            attention = block.post_attention_layernorm
        for to, module in (("attention", attention), ("stream", block)):
            found = fv.added_logits(model, TOKENS, layer, VECTORS, to)
            expected = hooked_logits(model, module, VECTORS)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            assert (found - clean).abs().max() > 0.1
        # Unless the MLP does not see what the attention writes (parallel ones), the places differ.
        same = torch.allclose(found, fv.added_logits(model, TOKENS, layer, VECTORS), atol=1e-4)
        assert same == (architecture == "gpt_neox")


def test_the_whole_difference_of_the_streams_carries_the_whole_prediction():
    model, streams = random_model("llama"), []
    source, target = TOKENS, TOKENS.flip(0)[:, 3:]

    def keep(module, given, out):
        streams.append(given[0][:, -1])

    hook = Internals(model).final_norm.register_forward_hook(keep)
    expected = fv.last_logits(model, source)
    assert not torch.allclose(fv.last_logits(model, target), expected, atol=1e-2)
    hook.remove()
    found = fv.added_logits(model, target, 1, streams[0] - streams[1], to="stream")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["olmo2", "gpt2"])
def test_states_are_what_attention_writes_at_the_queries(architecture):
    model, seen = random_model(architecture), []
    row, position = torch.tensor([0, 0, 2, 3, 3, 4]), torch.tensor([3, 11, 0, 5, 7, 2])
    inside = Internals(model)

    def keep(module, given, out):
        seen.append(out)

    for layer in range(2):
        (inside.output_norm(layer) or inside.o_proj(layer)).register_forward_hook(keep)
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    z, predicted = fv.states(model, TOKENS, row, position)
    torch.testing.assert_close(predicted, logits[row, position], atol=1e-5, rtol=0)
    written = fv.attention_outputs(model, z)
    for layer in range(2):
        bias = getattr(inside.o_proj(layer), "bias", None)
        whole = written[layer] if bias is None else written[layer] + bias
        torch.testing.assert_close(whole, seen[layer][row, position], atol=1e-5, rtol=0)
    for rows in (1, 3):
        again = fv.states(model, TOKENS, row, position, rows)
        torch.testing.assert_close(again, (z, predicted), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- known vectors

SCALE = 20.0
VERBS = slice(29, 57)
ROLES = {"noun": {"size": 29, "zipf": 1.0}, "verb": {"size": 28, "zipf": 1.5}, "and": {"size": 2}}
READ = make(roles=ROLES)


def frequencies(tokens):
    """How often each verb is among all tokens (vocabulary,)."""
    counts = torch.bincount(tokens, minlength=VOCABULARY).double()
    counts[: VERBS.start], counts[VERBS.stop :] = 0, 0
    return counts / len(tokens)


def distance(frequency, gold):
    """KL of the prediction that these frequencies make, from its definition."""
    predicted = (SCALE * frequency).softmax(-1)
    return sum(float(p * (p / q).log()) for p, q in zip(gold, predicted) if p > 0)


@pytest.fixture(scope="module")
def taken():
    assert READ.vocabulary_size == VOCABULARY
    assert READ.words[1].tolist() == list(range(VERBS.start, VERBS.stop))
    return contexts(GrammarProcess(READ), ["noun"], 12, 8, CONTEXT, shortest=6)


@pytest.fixture(scope="module")
def seen(taken):
    """What the model's head has to write at each query (query, vocabulary)."""
    places = zip(taken.document, taken.position)
    return torch.stack([frequencies(taken.tokens[row, : last + 1]) for row, last in places])


@pytest.fixture(scope="module")
def by_latent(taken, seen):
    """The mean of `seen` over each latent's queries (latent, vocabulary)."""
    return torch.stack([seen[taken.query_latent == latent].mean(0) for latent in range(12)])


@pytest.fixture(scope="module")
def model():
    return frequency_model(SCALE, VERBS)


@pytest.fixture(scope="module")
def means(model, taken):
    return fv.mean_heads(model, taken)


@pytest.fixture(scope="module")
def shuffled(taken):
    return shuffle_contexts(taken, drawn_words(taken, 5), 24)


def test_vectors_are_the_frequencies_that_the_contexts_show(model, taken, seen, by_latent, means):
    z, logits = fv.states(model, taken.tokens, taken.document, taken.position)
    torch.testing.assert_close(logits.double(), SCALE * seen, atol=1e-5, rtol=0)
    written = fv.attention_outputs(model, z).double()
    torch.testing.assert_close(written[0][:, NEXT], seen, atol=1e-6, rtol=0)
    written[0][:, NEXT] = 0
    assert (written == 0).all()  # nothing anywhere else
    assert means.shape == (12, 2, HEADS, z.shape[-1])
    vectors = fv.function_vectors(model, means, [(0, 1)])
    torch.testing.assert_close(vectors[:, NEXT].double(), by_latent, atol=1e-6, rtol=0)
    assert vectors[:, : NEXT.start].abs().max() == 0
    with_idle = fv.function_vectors(model, means, [(0, 1), (1, 0), (0, 0)])
    torch.testing.assert_close(with_idle, vectors)
    # Read out, they rank the words as the contexts do: the latent's most frequent one first.
    spoken = fv.decoded(model, vectors).double()
    torch.testing.assert_close(spoken, SCALE * by_latent, atol=1e-5, rtol=0)
    most_frequent = [int(latents_of(taken, latent)[0]["verb"][0]) for latent in range(12)]
    assert spoken.argmax(1).tolist() == most_frequent
    assert fv.decoded(model, vectors[None]).shape == (1, 12, VOCABULARY)


def test_means_of_heads_are_over_each_latents_queries(model, taken):
    z = fv.states(model, taken.tokens, taken.document, taken.position)[0]
    last = last_queries(taken)
    found, of_last = fv.mean_heads(model, taken), fv.mean_heads(model, taken, last)
    for latent in range(12):
        own = (taken.query_latent == latent).nonzero()[:, 0]
        torch.testing.assert_close(found[latent], z[:, own].mean(1))
        own = own[torch.isin(own, last)]
        assert 0 < len(own) <= 8  # one for each document, if it has any
        torch.testing.assert_close(of_last[latent], z[:, own].mean(1))


def test_layerwise_is_what_the_frequencies_predict(model, taken, seen):
    prompts = {SAME: same_words(taken), FRESH: fresh_words(taken)}
    table = fv.layerwise(model, taken, prompts, seed=4)
    assert (table.latents == 12).all()
    rows = table.set_index(["prompt", "vector", "layer", "quantity"]).sort_index()
    nothing, other = torch.zeros(VOCABULARY), fv.of_next_latent(taken, 4)
    for name, prompt in prompts.items():
        zero_shot = torch.tensor([distance(nothing, gold) for gold in prompt.gold])
        own = torch.tensor([distance(f, gold) for f, gold in zip(seen, prompt.gold)])
        another = torch.tensor([distance(f, gold) for f, gold in zip(seen[other], prompt.gold)])
        expected = {
            ("zero-shot", -1): zero_shot,
            ("own", 0): zero_shot - own,
            ("another", 0): zero_shot - another,
            (DIFFERENCE, 0): another - own,
        }
        for (vector, layer), values in expected.items():
            found = rows.loc[name, vector, layer, "KL"].value
            assert found == pytest.approx(float(values.mean()), abs=1e-4), vector
        likely = prompt.gold.argmax(1, keepdim=True)
        log_p, other_log_p = [
            (SCALE * f).log_softmax(-1).gather(1, likely).mean() for f in (seen, seen[other])
        ]
        found = rows.loc[name, DIFFERENCE, 0, "gold word"].value
        assert found == pytest.approx(float(log_p - other_log_p), abs=1e-4)
        for quantity in ("KL", "gold word"):
            difference = rows.loc[name, DIFFERENCE, 0, quantity]
            assert difference.low > 0.02
            assert rows.loc[name, BEST, -1, quantity].value == difference.value
            idle = rows.loc[name].xs((1, quantity), level=("layer", "quantity"))
            assert len(idle) == 4 and idle[["value", "low", "high"]].abs().max().max() < 1e-6
    # What is added is all that the context did: the prediction is then the one in context.
    in_context = rows.loc[SAME, "in context", -1, "KL"].value
    gap = rows.loc[SAME, "zero-shot", -1, "KL"].value - in_context
    assert gap == pytest.approx(rows.loc[SAME, "own", 0, "KL"].value, abs=1e-6)
    assert (FRESH, "in context", -1, "KL") not in rows.index


def test_only_the_head_that_reads_has_an_effect(model, by_latent, means, shuffled):
    effects = fv.indirect_effects(model, means, shuffled)
    expected = []
    for tokens, gold, latent in zip(shuffled.tokens, shuffled.gold, shuffled.latent):
        expected.append(distance(frequencies(tokens), gold) - distance(by_latent[latent], gold))
    assert effects[0, 1] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert effects[0, 1] > 0.02
    effects[0, 1] = 0
    assert effects.abs().max() < 1e-6


def test_improvement_is_that_of_the_sum_of_logits(model, taken, means, shuffled):
    vectors = fv.function_vectors(model, means, [(0, 1)])
    for prompt in (drawn_words(taken, 3), shuffled):
        base = fv.last_logits(model, prompt.tokens).double()
        moved = base + (vectors @ model.lm_head.weight.T).double()[prompt.latent]
        log_gold = prompt.gold.clamp(min=1e-300).log()
        before, after = [
            (prompt.gold * (log_gold - logits.log_softmax(-1))).sum(1) for logits in (base, moved)
        ]
        for layer in range(2):  # nothing reads it on the way
            found = fv.improvement(model, prompt, layer, vectors)
            torch.testing.assert_close(found, before - after, atol=1e-5, rtol=0)


def test_the_head_that_reads_is_chosen_and_beats_its_controls(model, taken, means, shuffled):
    zero_shot = drawn_words(taken, 3)
    heads, layer = fv.choose(model, means, fv.indirect_effects(model, means, shuffled), zero_shot)
    assert heads[0] == (0, 1)
    own = fv.function_vectors(model, means, [(0, 1)])
    for other in (own.roll(-1, 0), fv.random_like(own, 1)):
        gain = fv.improvement(model, zero_shot, layer, own)
        assert gain.mean() > 0.02 + fv.improvement(model, zero_shot, layer, other).mean()


def test_vectors_are_linear_in_the_part_that_is_shared(model):
    """Half-way words make half-way vectors: what `along` is for, on a model where it is known."""
    process, read, vectors = GrammarProcess(READ), [], []
    for share in (0.0, 0.5, 1.0):
        read.append(contexts(sharing(process, 200, share), ["noun"], 2, 200, CONTEXT, 6))
        vectors.append(fv.function_vectors(model, fv.mean_heads(model, read[-1]), [(0, 1)]))
    base = torch.zeros(Internals(model).width)
    base[NEXT.start + VERBS.start : NEXT.start + VERBS.stop] = vectors[0][0].sum() / 28
    for there, found in zip(read, vectors):
        truth = shared_part(there, read[0], "verb").tolist()
        along = fv.along(found, base, vectors[0][0], vectors[0][1])
        assert along.tolist() == pytest.approx(truth, abs=0.1)


# ---------------------------------------------------------------------- models that carry nothing


def test_a_model_that_does_nothing_has_no_vector(taken):
    table = fv.layerwise(blank_model(), taken, {SAME: same_words(taken)})
    injected = table[~table.vector.isin(["zero-shot", "in context"])]
    assert len(injected) == 2 * (4 * 2 + 1)
    assert injected[["value", "low", "high"]].abs().max().max() < 1e-6


def test_an_untrained_model_carries_nothing():
    process = sharing(RELEASED, 2)
    sizes = {"layers": 2, "width": 32, "heads": 4, "context": 64}
    untrained = build_model("llama", process.vocabulary_size, **sizes).eval()
    taken = contexts(process, ["subject"], 16, 2, 64, shortest=20)
    prompts = {SAME: same_words(taken), FRESH: fresh_words(taken)}
    table = fv.layerwise(untrained, taken, prompts, seed=1)
    differences = table[table.vector.isin([DIFFERENCE, BEST]) & (table.quantity == "KL")]
    assert len(differences) == 6
    assert differences[["value", "low", "high"]].abs().max().max() < 0.005
    pd.testing.assert_frame_equal(fv.layerwise(untrained, taken, prompts, seed=1), table)
    assert not fv.layerwise(untrained, taken, prompts, seed=2).equals(table)
    zero_shot = table[(table.vector == "zero-shot") & (table.quantity == "KL")].value
    assert (zero_shot > 0.5).all()  # there is a distance that could have shrunk


# ---------------------------------------------------------------------- pieces by hand


def queries_of(latents):
    """Contexts with nothing but the latent of each query."""
    number = torch.arange(len(latents))
    return Contexts(None, [], torch.zeros(0), torch.tensor(latents), number, number, None)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_another_query_is_of_the_next_latent(latents, seed):
    there = sorted(set(latents))
    found = fv.of_next_latent(queries_of(latents), seed)
    for latent, number in zip(latents, found.tolist()):
        assert latents[number] == there[(there.index(latent) + 1) % len(there)]


def test_any_query_of_the_next_latent_is_drawn():
    latents = [0, 2, 0, 2, 2, 5]
    drawn = torch.stack([fv.of_next_latent(queries_of(latents), seed) for seed in range(200)])
    expected = [{1, 3, 4}, {5}, {1, 3, 4}, {5}, {5}, {0, 2}]
    assert [set(column.tolist()) for column in drawn.T] == expected
    assert (torch.bincount(drawn[:, 0])[[1, 3, 4]] > 40).all()


def test_random_vectors_keep_norms():
    found = fv.random_like(VECTORS.expand(2, 5, 16), seed=2)
    torch.testing.assert_close(found.norm(dim=-1), VECTORS.norm(dim=-1).expand(2, 5))
    assert torch.equal(fv.random_like(VECTORS, 2), fv.random_like(VECTORS, 2))
    assert not torch.equal(found[0], found[1])
    wide = torch.ones(2, 10_000)
    assert torch.cosine_similarity(fv.random_like(wide), wide).abs().max() < 0.05


def test_decoded_has_the_final_norms_gain():
    for architecture in ("llama", "gpt2"):
        model = random_model(architecture)
        inside, vectors = Internals(model), VECTORS
        if architecture == "gpt2":  # its norm takes the mean off
            vectors = VECTORS - VECTORS.mean(1, keepdim=True)
        expected = (vectors * inside.final_norm.weight) @ inside.unembedding.weight.T
        torch.testing.assert_close(fv.decoded(model, VECTORS), expected, atol=1e-5, rtol=0)


def test_along_a_line():
    generator = torch.Generator().manual_seed(0)
    base, end = torch.randn(2, 50, generator=generator)
    points = torch.stack([base, base + (end - base) / 2, end, 2 * end - base])
    assert fv.along(points, base, end, end).tolist() == pytest.approx([0, 0.5, 1, 2], abs=1e-5)
    noise = 2 * torch.randn(2, 4000, 50, generator=generator)
    twice = fv.along(points[1], base, end + noise[0], end)
    assert twice.tolist() == pytest.approx([0.5] * 4000, abs=1e-3)  # noise in the line alone
    first, second = (noise / 4).double()
    found = fv.along(points[1], base, end + first, end + second)
    same = fv.along(points[1], base, end + first, end + first)
    assert abs(found.mean() - 0.5) < 0.01 and same.mean() < 0.47


def test_ranked_heads_leave_half_of_each_layer():
    effects = torch.tensor([[9.0, 8.0, 7.0, 1.0], [2.0, 3.0, 0.5, 0.4]])
    assert fv._ranked_heads(effects) == [(0, 0), (0, 1), (1, 1), (1, 0)]
    single = torch.tensor([[1.0], [2.0]])
    assert fv._ranked_heads(single) == [(1, 0), (0, 0)]  # a layer's only head may be taken


def test_distances_from_their_definition():
    gold = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    prompt = Prompts(torch.zeros(2, 1), gold, torch.arange(2))
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    log_p, uniform = logits.double().log_softmax(1), torch.tensor(4.0).log().item()
    expected = 0.5 * (0.5 / log_p[0, 0].exp()).log() + 2 * 0.25 * (0.25 / log_p[0, 1].exp()).log()
    assert fv.divergence(logits, prompt).tolist() == pytest.approx([float(expected), uniform])
    assert fv.surprise(logits, prompt).tolist() == pytest.approx([-float(log_p[0, 0]), uniform])
    exact = gold.clamp(min=1e-300).log().float()
    assert fv.divergence(exact, prompt).abs().max() < 1e-6


def test_the_best_layer_is_chosen_by_the_other_half():
    latent = torch.tensor([3, 0, 1, 2, 2, 3])  # in any order; two have two queries
    first = torch.tensor([5.0, 1, 5, 0, 2, 5])
    second = torch.tensor([0.0, 2, 0, 2, 2, 0])
    rows = {
        ("p", DIFFERENCE, 0, "KL"): first,
        ("p", DIFFERENCE, 1, "KL"): second,
        ("p", "own", 0, "KL"): first,
    }
    table = fv.over_latents(rows, latent).set_index(["vector", "layer"])
    assert table.loc[(DIFFERENCE, 0), "value"] == pytest.approx(3) == table.value["own", 0]
    assert table.loc[(DIFFERENCE, 1), "value"] == pytest.approx(1)
    assert (table.latents == 4).all()
    # Even latents (0, 2) are best in layer 1, which scores the odd ones: 0; these choose layer 0,
    # which scores 1, 0, 2.
    assert table.loc[(BEST, -1), "value"] == pytest.approx(3 / 6)
    sums, counts = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 2.0, 2.0])
    spread = ((sums - sums.sum() / 6 * counts) ** 2).sum() * 4 / 3
    reach = 3.182446 * float(spread) ** 0.5 / 6  # Student's t with 3 degrees of freedom
    bounds = table.loc[(BEST, -1), ["low", "high"]].tolist()
    assert bounds == pytest.approx([0.5 - reach, 0.5 + reach], abs=1e-5)
    alone = fv.over_latents({("p", "own", 0, "KL"): first}, latent)
    assert alone["vector"].tolist() == ["own"]  # without differences there is no best layer
