"""Contexts and prompts against the generator's own record; vectors of hand-set models."""

import pandas as pd
import pytest
import torch
from circuit_models import CONTEXT, NEXT, VOCABULARY, blank_model, frequency_model
from grammars import make
from hypothesis import given, settings
from hypothesis import strategies as st
from latentree.data.corpus import load_corpus
from latentree.data.ngrams import HashedTables
from latentree.data.sampler import GrammarProcess
from latentree.exact.predictors import predictive
from latentree.inside.names import Internals
from latentree.measure import function_vectors as fv
from latentree.measure.function_vectors import BEST, DIFFERENCE, FRESH, SAME
from latentree.measure.prompts import (
    Contexts,
    Prompts,
    _sharing,
    contexts,
    fresh_words,
    in_context,
    same_words,
)
from latentree.train.model import build_model
from test_inside import random_model

torch.set_num_threads(1)
TINY = GrammarProcess(make())
BOUND, RELEASED, BANK = map(load_corpus, ("bound", "released-small", "banked"))
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
                expected.append((document, position))
    assert list(zip(taken.document.tolist(), taken.position.tolist())) == expected
    assert len(expected) >= 10
    assert taken.query_latent.tolist() == [document // 3 for document, _ in expected]


def test_what_would_be_wrong_unseen_is_refused_by_name():
    with pytest.raises(ValueError, match="released-ngram: has no grammar, so no roles; give"):
        contexts(HashedTables(vocabulary_size=30, tables=4), ["subject"], 2, 2, 64)
    with pytest.raises(ValueError, match="bound-flat: redraws latents within .*'sentence'.*; give"):
        contexts(load_corpus("bound-flat"), ["subject"], 2, 2, 64)
    with pytest.raises(ValueError, match=r"\['subject'\]: is nowhere between tokens 60 and 50 of"):
        contexts(BOUND, ["subject"], 2, 2, 50, shortest=60)
    taken = contexts(BOUND, ["subject"], 2, 2, 64, shortest=20)
    with pytest.raises(ValueError, match="length = 30: a query has .*; give at most these"):
        in_context(taken, same_words(taken), 30)


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
    for prompt in (same_words(taken), fresh_words(taken)):
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


def test_a_prompt_in_context_stands_after_the_text_before_its_sentence():
    taken = contexts(BOUND, ["verb", "subject"], 4, 2, 48, shortest=21)
    other = fv._of_next_latent(taken, 1)
    prompt = fresh_words(taken, 2, under=other)
    assert torch.equal(prompt.latent, taken.query_latent[other])
    assert torch.equal(prompt.tokens, fresh_words(taken, 2).tokens)  # fresh where they will stand
    whole = in_context(taken, prompt, 20)
    assert torch.equal(whole.gold, prompt.gold) and torch.equal(whole.latent, prompt.latent)
    for row, document, position in zip(whole.tokens, taken.document, taken.position):
        text = taken.tokens[document, position - 21 : position - 1]
        assert torch.equal(row[:20], text) and row[19] == BOUND.end
    assert torch.equal(whole.tokens[:, 20:], prompt.tokens[:, 1:])


def test_documents_of_a_bank_are_in_the_order_of_its_latents():
    taken = contexts(BANK, ["subject"], 24, 2, 64, shortest=36)
    assert taken.latent.tolist() == sorted(taken.latent.tolist()) and len(taken.latent) == 48
    assert torch.equal(taken.source.habits["verb"], BANK.bank["verb"][taken.latent])
    called = BANK.bank["verb"][taken.query_latent, fresh_words(taken).tokens[:, 1]]
    assert torch.equal(fresh_words(taken).gold.argmax(1), 16 + called)  # one to one, and all there


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
        normed = architecture == "olmo2"
        attention = block.post_attention_layernorm if normed else block.attention
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
    asked = Contexts(None, [], TOKENS, row, row, position, None)
    z, predicted = fv._states(model, asked)
    torch.testing.assert_close(predicted, logits[row, position], atol=1e-5, rtol=0)
    written = fv.attention_outputs(model, z)
    for layer in range(2):
        bias = getattr(inside.o_proj(layer), "bias", None)
        whole = written[layer] if bias is None else written[layer] + bias
        torch.testing.assert_close(whole, seen[layer][row, position], atol=1e-5, rtol=0)
    for rows in (1, 3):
        again = fv._states(model, asked, rows)
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


def test_layerwise_is_what_the_frequencies_predict(model, taken, seen):
    prompts = {SAME: same_words(taken), FRESH: fresh_words(taken)}
    table = fv.layerwise(model, taken, prompts, seed=4)
    assert (table.latents == 12).all()
    rows = table.set_index(["prompt", "vector", "layer", "quantity"]).sort_index()
    nothing, other = torch.zeros(VOCABULARY), fv._of_next_latent(taken, 4)
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


def test_vectors_are_the_frequencies_that_the_contexts_show(model, taken, seen):
    z, logits = fv._states(model, taken)
    torch.testing.assert_close(logits.double(), SCALE * seen, atol=1e-5, rtol=0)
    written = fv.attention_outputs(model, z).double()
    torch.testing.assert_close(written[0][:, NEXT], seen, atol=1e-6, rtol=0)
    written[0][:, NEXT] = 0
    assert (written == 0).all()  # nothing anywhere else
    assert fv.readable(written[0], taken) < 0.2
    assert fv.readable(seen, taken) > 0.7  # the frequencies name the latent, one of twelve


def test_only_the_head_that_reads_has_an_effect(model, taken):
    """And what replaces its output is the mean of the latent's queries at other words."""
    prompt = in_context(taken, fresh_words(taken, under=fv._of_next_latent(taken)), 5)
    z = fv._states(model, taken)[0]
    means = fv.mean_heads(z, taken, prompt)
    word = taken.tokens[taken.document, taken.position]
    for number in (0, 7, len(word) - 1):
        own = (taken.query_latent == prompt.latent[number]) & (word != prompt.tokens[number, -1])
        torch.testing.assert_close(means[:, number], z[:, own].mean(1))
    assert torch.equal(fv.mean_heads(z, taken, prompt, prompt.latent), means)
    before = fv.divergence(fv.last_logits(model, prompt.tokens), prompt)
    effects = fv.head_effects(model, means, prompt)
    logits = fv.replaced_logits(model, prompt.tokens, means, [0])
    expected = (before - fv.divergence(logits, prompt)).mean()
    assert effects[0, 1] == pytest.approx(float(expected), abs=1e-5) and expected > 0.02
    effects[0, 1] = 0
    assert effects.abs().max() < 1e-5
    few = Contexts(
        taken.corpus,
        ["noun"],
        taken.tokens,
        taken.latent * 0 + 40,
        taken.document,
        taken.position,
        taken.source,
    )
    with pytest.raises(ValueError, match="a latent has no query at another word; give more"):
        fv.mean_heads(z, few, prompt)


def test_transplants_of_a_model_whose_latent_is_a_bias(model, taken):
    """The means say the wanted latent's frequencies; the best bias says more, whatever the word."""
    table = fv.transplants(model, taken, 0, 5)
    counts = table.groupby("change").size()
    assert len(counts) == 7 and counts.nunique() == 1
    fell = table.groupby("change").divergence.mean()
    assert fell["wanted latent"] < min(fell["a third latent"], fell["mean of all"]) - 0.02
    assert fell["best bias"] < fell["wanted latent"]
    assert fell["other layers"] == pytest.approx(fell["no change"], abs=1e-5)  # it is idle
    gains = fv.steering(model, taken, 0, [0.0, 1.0]).pivot(index="scale", columns="way")["value"]
    assert gains.loc[0].abs().max() < 1e-6
    assert gains.loc[1, "directly"] == pytest.approx(gains.loc[1, "through the model"], abs=1e-5)
    assert gains.loc[1, "directly"] > 0.02


# ---------------------------------------------------------------------- a function, or a bias


def asked_of(gold, latent):
    return Prompts(torch.zeros(len(latent), 2).long(), gold, torch.tensor(latent))


def test_a_bias_of_each_latent_is_found_exactly_where_there_is_one():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 6, generator=draw, dtype=torch.float64)
    latent = [number // 50 for number in range(200)]
    bias = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    prompt = asked_of((logits + bias[latent]).softmax(-1), latent)
    assert fv.divergence(logits, prompt).mean() > 0.1
    assert fv.divergence(fv.best_bias(logits, prompt), prompt).abs().max() < 1e-6


def test_no_bias_can_fake_a_bank():
    """Truths that are permutations of the parents: a bias, however well fitted, gains nothing."""
    parents, latents = 16, 8
    latent = torch.arange(latents).repeat_interleave(parents).tolist()
    called = BANK.bank["verb"].flatten()
    gold = torch.nn.functional.one_hot(called, parents).double() * 0.9 + 0.1 / parents
    prompt = asked_of(gold, latent)
    unsure = torch.zeros(latents * parents, parents)
    assert fv.divergence(fv.best_bias(unsure, prompt), prompt).mean() == pytest.approx(
        float(fv.divergence(unsure, prompt).mean()), abs=1e-6
    )
    of_another = torch.nn.functional.one_hot(called.view(8, 16).roll(1, 0).flatten(), parents) * 6.0
    fitted = fv.best_bias(of_another, prompt)
    assert fv.accuracy(fitted, prompt).mean() < 0.1  # a confident answer of another latent stays
    assert fv.accuracy(gold.log(), prompt).mean() == 1  # what knows the latent has all


def test_readable_latents_are_named_by_documents_that_were_not_read():
    latent, draw = torch.arange(3).repeat_interleave(40), torch.Generator().manual_seed(1)
    number = torch.arange(120)
    known = Contexts(None, [], torch.zeros(0), latent, number, number, None)
    noise = torch.randn(120, 5, generator=draw)
    assert fv.readable(noise + 9 * torch.eye(3, 5)[latent], known) == 1
    assert fv.readable(noise, known) == pytest.approx(1 / 3, abs=0.2)
    own = torch.eye(120)  # each document has a vector of its own, which says nothing of others
    assert fv.readable(own, known) == pytest.approx(1 / 3, abs=0.01)


# ---------------------------------------------------------------------- models that carry nothing


def test_a_model_that_does_nothing_has_no_vector(taken):
    table = fv.layerwise(blank_model(), taken, {SAME: same_words(taken)})
    injected = table[~table.vector.isin(["zero-shot", "in context"])]
    assert len(injected) == 2 * (4 * 2 + 1)
    assert injected[["value", "low", "high"]].abs().max().max() < 1e-6


def test_an_untrained_model_carries_nothing():
    process = _sharing(RELEASED, 2)
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
    found = fv._of_next_latent(queries_of(latents), seed)
    for latent, number in zip(latents, found.tolist()):
        assert latents[number] == there[(there.index(latent) + 1) % len(there)]


def test_any_query_of_the_next_latent_is_drawn():
    latents = [0, 2, 0, 2, 2, 5]
    drawn = torch.stack([fv._of_next_latent(queries_of(latents), seed) for seed in range(200)])
    expected = [{1, 3, 4}, {5}, {1, 3, 4}, {5}, {5}, {0, 2}]
    assert [set(column.tolist()) for column in drawn.T] == expected
    assert (torch.bincount(drawn[:, 0])[[1, 3, 4]] > 40).all()


def test_random_vectors_keep_norms():
    found = fv._random_like(VECTORS.expand(2, 5, 16), seed=2)
    torch.testing.assert_close(found.norm(dim=-1), VECTORS.norm(dim=-1).expand(2, 5))
    assert torch.equal(fv._random_like(VECTORS, 2), fv._random_like(VECTORS, 2))
    assert not torch.equal(found[0], found[1])
    wide = torch.ones(2, 10_000)
    assert torch.cosine_similarity(fv._random_like(wide), wide).abs().max() < 0.05


def test_distances_from_their_definition():
    gold = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    prompt = Prompts(torch.zeros(2, 1), gold, torch.arange(2))
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    log_p, uniform = logits.double().log_softmax(1), torch.tensor(4.0).log().item()
    expected = 0.5 * (0.5 / log_p[0, 0].exp()).log() + 2 * 0.25 * (0.25 / log_p[0, 1].exp()).log()
    assert fv.divergence(logits, prompt).tolist() == pytest.approx([float(expected), uniform])
    assert fv._surprise(logits, prompt).tolist() == pytest.approx([-float(log_p[0, 0]), uniform])
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
    table = fv._over_latents(rows, latent).set_index(["vector", "layer"])
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
    alone = fv._over_latents({("p", "own", 0, "KL"): first}, latent)
    assert alone["vector"].tolist() == ["own"]  # without differences there is no best layer
