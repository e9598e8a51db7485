import pandas as pd
import pytest
import torch
from circuit_models import CONTEXT, VOCABULARY, repair_model
from grammars import RECURSIVE, make
from latentree.data.corpus import held_out
from latentree.data.ngrams import Chain, HashedTables
from latentree.data.sampler import GrammarProcess
from latentree.data.text import Text
from latentree.inside.names import Internals, norm_gain, norm_scale, weight
from latentree.measure.donors import Stimulus, draw_donors, stimulus, syntactic_states
from latentree.measure.hydra import COLUMNS, WAYS, Ablations, measure, most_repaired
from latentree.measure.released import as_released, measure_as_released
from latentree.measure.stimuli import bound_queries
from latentree.series.sweep import sweep
from latentree.train.model import build_model
from speed import counted
from test_internals import MODELS, SIZES, random_model

torch.set_num_threads(1)
ONE = {"attention": "attention", "mlp": "mlp", "head": "z"}
SEQUENCES = 6
COMPONENTS = [
    ("layer", 0, -1),
    ("attention", 0, -1),
    ("mlp", 0, -1),
    ("head", 0, 1),
    ("attention", 1, -1),
    ("mlp", 1, -1),
]


def by_hand(tokens, at, target=None, seed=0):
    """A stimulus of these tokens (sequence, position) in which all positions are of one state."""
    row = torch.arange(len(tokens))
    source = row[:, None].expand_as(tokens)
    target = tokens[row, at + 1] if target is None else target
    return Stimulus(tokens, at, target, torch.zeros_like(tokens), source, seed)


def random_stimulus():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (SEQUENCES, 12), generator=generator)
    return by_hand(tokens, torch.randint(5, 11, (SEQUENCES,), generator=generator))


def hooked(model, tokens, new=None, layer=None):
    """What every module of interest writes in a whole run by plain torch hooks: {(name, layer): tensor}, and the logits.

    `new` {site: function of what it writes} replaces it in `layer`.
    """
    inside, seen, hooks = Internals(model), {}, []

    def keep(name, number, module, before=False):
        def hook(module, given, out=None):
            value = given[0] if before else out
            if number == layer and name in (new or {}):
                value = new[name](value.clone())
            seen[name, number] = value
            return (value, *given[1:]) if before else value

        hooks.append(
            module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        )

    for number, block in enumerate(inside.blocks):
        keep("z", number, inside.o_proj(number), before=True)
        olmo2 = inside.architecture == "olmo2"
        keep(
            "attention", number, block.post_attention_layernorm if olmo2 else inside.o_proj(number)
        )
        keep("mlp", number, block.post_feedforward_layernorm if olmo2 else block.mlp)
    keep("embedding", 0, inside.blocks[0], before=True)
    keep("stream", 0, inside.final_norm, before=True)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


def expected_effects(model, shown, clean, found, logits):
    """Direct effects from the definition: unembed the normed part, take the target, take off the vocabulary's mean."""
    inside, row = Internals(model), torch.arange(len(shown.tokens))
    stream = clean["stream", 0][row, shown.at].double()
    if "LayerNorm" in type(inside.final_norm).__name__:
        scale = (stream.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    else:
        scale = (
            stream.square().mean(-1, keepdim=True) + inside.final_norm.variance_epsilon
        ).rsqrt()

    def effect(vectors):
        with torch.no_grad():
            normed = norm_gain(inside.final_norm, vectors[row, shown.at].double()) * scale
            effects = normed @ weight(inside.unembedding).T.double()
        return effects[row, shown.target] - effects.mean(-1)

    layers = range(inside.layers)
    expected = {"embedding": effect(found["embedding", 0])}
    expected |= {
        name: torch.stack([effect(found[name, n]) for n in layers], 1)
        for name in ("attention", "mlp")
    }
    last = logits[row, shown.at].double()
    return expected | {"logit": last[row, shown.target] - last.mean(-1)}


@pytest.mark.parametrize("architecture, config", MODELS)
def test_direct_effects_sum_to_the_centred_logit(architecture, config):
    model, shown = random_model(architecture, **config), random_stimulus()
    clean = Ablations(model, shown).clean
    seen, logits = hooked(model, shown.tokens)
    for name, expected in expected_effects(model, shown, seen, seen, logits).items():
        torch.testing.assert_close(getattr(clean, name), expected, atol=1e-5, rtol=0)
    total = clean.embedding + clean.attention.sum(1) + clean.mlp.sum(1) + clean.bias
    torch.testing.assert_close(total, clean.logit, atol=1e-4, rtol=0)
    torch.testing.assert_close(clean.frozen, clean.logit, atol=1e-4, rtol=0)
    # Heads sum to their attention, but for the bias of o_proj.
    inside, whole = Internals(model), clean.head.sum(2)
    for layer in range(inside.layers):
        bias = getattr(inside.o_proj(layer), "bias", None)
        if bias is None:
            torch.testing.assert_close(
                whole[:, layer], clean.attention[:, layer], atol=1e-5, rtol=0
            )
        else:
            assert (whole[:, layer] - clean.attention[:, layer]).abs().max() > 1e-3
            biased = {("attention", n): bias.expand(SEQUENCES, 12, -1) for n in (0, 1)}
            rest = expected_effects(model, shown, seen, seen | biased, logits)["attention"]
            torch.testing.assert_close(
                whole[:, layer] + rest[:, layer], clean.attention[:, layer], atol=1e-5, rtol=0
            )


def expected_replacement(model, shown, seen, how, where, kind, layer, head):
    """{site: function of what it writes}, from the definitions; for all ways but the random one."""
    donor = shown.any_state if how == "anywhere" else shown.same_state
    scored = torch.zeros_like(shown.tokens, dtype=torch.bool)
    scored[torch.arange(len(scored)), shown.at] = True
    chosen = (scored if where == "scored" else torch.ones_like(scored))[..., None]
    sites = ("attention", "mlp") if kind == "layer" else (ONE[kind],)

    def replace(site):
        clean = seen[site, layer]
        new = {
            "resample": clean[donor],
            "anywhere": clean[donor],
            "mean": clean.mean((0, 1)).expand_as(clean),
            "zero": torch.zeros_like(clean),
        }[how]
        size = model.config.hidden_size // SIZES["heads"]
        own = (torch.arange(clean.shape[-1]) // size == head) | (kind != "head")
        return lambda value: torch.where(chosen & own, new, value)

    return {site: replace(site) for site in sites}


@pytest.mark.parametrize("where", ["scored", "everywhere"])
@pytest.mark.parametrize("architecture, config", MODELS)
def test_ablations_agree_with_plain_hooks(architecture, config, where):
    model, shown = random_model(architecture, **config), random_stimulus()
    clean_seen, clean_logits = hooked(model, shown.tokens)
    clean = expected_effects(model, shown, clean_seen, clean_seen, clean_logits)
    for how in ("resample", "anywhere", "mean", "zero"):
        runs = Ablations(model, shown, how, where)
        for kind, layer, head in COMPONENTS:
            new = expected_replacement(model, shown, clean_seen, how, where, kind, layer, head)
            seen, logits = hooked(model, shown.tokens, new, layer)
            after = expected_effects(model, shown, clean_seen, seen, logits)
            change, found = (
                {name: after[name] - clean[name] for name in clean},
                runs.ablate(kind, layer, head),
            )
            torch.testing.assert_close(found.total, change["logit"], atol=1e-5, rtol=0)
            sites = {"layer": ("attention", "mlp"), "head": ("attention",)}.get(kind, (kind,))
            torch.testing.assert_close(
                found.removed, -sum(change[s][:, layer] for s in sites), atol=1e-5, rtol=0
            )
            later = found.attention[:, layer + 1 :]
            torch.testing.assert_close(
                later, change["attention"][:, layer + 1 :], atol=1e-5, rtol=0
            )
            first = layer + (kind in ("layer", "mlp"))
            torch.testing.assert_close(
                found.mlp[:, first:], change["mlp"][:, first:], atol=1e-5, rtol=0
            )
            assert not found.attention[:, : layer + 1].any() and not found.mlp[:, :first].any()
            assert not found.head[:, : layer + 1].any()
            torch.testing.assert_close(
                found.head.sum(2), found.attention, atol=1e-5, rtol=0
            )  # biases do not change
            # Total = direct + indirect, and the self-repair's three parts add up, the norm's by its own definition.
            parts = found.attention.sum(1) + found.mlp.sum(1) + found.norm
            torch.testing.assert_close(parts, found.self_repair, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                found.total, -found.removed + found.compensation + found.norm, atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("where", ["scored", "everywhere"])
def test_random_perturbations_are_as_long_as_those_of_resampling(where):
    model, shown = random_model("llama"), random_stimulus()
    runs = {how: Ablations(model, shown, how, where) for how in ("resample", "random")}
    inside = runs["random"].inside
    for kind, layer, head in [
        ("layer", 1, -1),
        ("attention", 0, -1),
        ("mlp", 1, -1),
        ("head", 0, 1),
    ]:
        lost = []
        for one in runs.values():
            new = one.replacement(kind, layer, head)
            gap = sum(one.written[site][layer][one.places] - value for site, value in new.items())
            lost.append(
                torch.einsum("bphd,hdw->bpw", gap, inside.w_o(layer)) if kind == "head" else gap
            )
        lengths = [gap.norm(dim=-1) for gap in lost]
        assert lengths[0].min() > 0.05
        torch.testing.assert_close(*lengths, atol=1e-5, rtol=1e-5)
        cosine = torch.cosine_similarity(*lost, dim=-1)
        assert cosine.abs().max() < 0.99 and cosine.abs().mean() < 0.7
    again = Ablations(model, shown, "random", where).ablate("head", 0, 1)
    torch.testing.assert_close(
        again.total, runs["random"].ablate("head", 0, 1).total, atol=0, rtol=0
    )


def test_a_component_at_its_replacement_value_changes_nothing():
    model = random_model("gpt2")
    # Two sequences that are each other's donors, and are the same: what a component writes is what replaces it.
    tokens = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(3)).repeat(2, 1)
    shown = by_hand(tokens, torch.tensor([7, 7]))
    shown.state = torch.arange(12).expand_as(tokens)
    for where in ("scored", "everywhere"):
        for how in ("resample", "random"):
            runs = Ablations(model, shown, how, where)
            for component in [("layer", 0), ("attention", 1), ("mlp", 0), ("head", 0, 1)]:
                found = runs.ablate(*component)
                for values in (
                    found.removed,
                    found.total,
                    found.attention,
                    found.mlp,
                    found.head,
                    found.norm,
                ):
                    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-5, rtol=0)
    # And what is zero already can be zeroed.
    model.transformer.h[0].mlp.c_proj.weight.data.zero_()
    model.transformer.h[0].mlp.c_proj.bias.data.zero_()
    found = Ablations(model, random_stimulus(), "zero").ablate("mlp", 0)
    torch.testing.assert_close(found.total, torch.zeros_like(found.total), atol=1e-5, rtol=0)


def test_parallel_blocks_leave_their_own_mlp_alone():
    found = {
        name: Ablations(random_model(name), random_stimulus()).ablate("attention", 0)
        for name in ("llama", "gpt_neox")
    }
    assert (
        found["llama"].mlp[:, 0].abs().max() > 1e-3
        and found["gpt_neox"].mlp[:, 0].abs().max() < 1e-6
    )


# ---------------------------------------------------------------------- oracles


def repair_stimulus():
    tokens = torch.randint(VOCABULARY, (40, CONTEXT), generator=torch.Generator().manual_seed(1))
    at = torch.randint(4, CONTEXT, (40,), generator=torch.Generator().manual_seed(2))
    return by_hand(tokens, at, tokens[torch.arange(40), at])


@pytest.mark.parametrize(
    "later, share", [("head", 1.0), ("head", 0.4), ("mlp", 1.0), ("mlp", 0.4), ("idle", 1.0)]
)
def test_known_compensation(later, share):
    model, shown = repair_model(later, share), repair_stimulus()
    length = (
        shown.target + 1
    ) / VOCABULARY  # of the target's embedding: what head (0, 0) predicts it with
    table = measure(model, shown, kinds=("attention",))
    runs = Ablations(model, shown)
    centred = length.double() * (1 - 1 / VOCABULARY)
    torch.testing.assert_close(runs.clean.head[:, 0, 0], centred, atol=1e-3, rtol=0)
    mended = 0.0 if later == "idle" else share
    silent = runs.clean.attention[:, 1] + runs.clean.mlp[:, 1]
    torch.testing.assert_close(
        silent, centred if later == "idle" else 0 * centred, atol=1e-3, rtol=0
    )
    row = table[(table["layer"] == 0) & (table["responding"] == -1)].set_index(
        "quantity"
    )  # of which head (0, 0) is all
    for column in ("value", "low", "high"):
        assert row.loc["slope", column] == pytest.approx(mended, abs=1e-3)
    found = runs.ablate("head", 0, 0)
    assert found.removed.std() > 0.2
    part = {"head": found.head[:, 1, 1], "mlp": found.mlp[:, 1], "idle": found.compensation}[later]
    torch.testing.assert_close(part, mended * found.removed, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.total, (mended - 1) * found.removed, atol=2e-3, rtol=0)
    if mended:
        assert row.loc["R2", "value"] == pytest.approx(1, abs=1e-3)
        where = "by mlp" if later == "mlp" else "by attention"
        assert row.loc[f"fraction {where}", "value"] == pytest.approx(share, abs=2e-3)
        assert row.loc["fraction by norm", "value"] == pytest.approx(0, abs=2e-3)


# ---------------------------------------------------------------------- the stimulus


def bound_grammar(**fields):
    return make(binding=0.8, habits={"verb": "noun"}, **fields)


def naive_states(tokens, document, grammar):
    """The roles of the sentence so far, one tuple for each position."""
    states = []
    for words, numbers in zip(tokens.tolist(), document.tolist(), strict=True):
        for q in range(len(words)):
            start = q
            while (
                start > 0
                and words[start - 1] != grammar.end
                and numbers[start - 1] == numbers[start]
            ):
                start -= 1
            states.append(tuple(int(grammar.role_of[word]) for word in words[start : q + 1]))
    return states


@pytest.mark.parametrize("sentence", ["clauses", "recursive"])
def test_states_are_the_roles_of_the_sentence_so_far(sentence):
    grammar = make(RECURSIVE) if sentence == "recursive" else bound_grammar()
    fields = held_out(GrammarProcess(grammar), 6, 40)
    naive = naive_states(fields["tokens"], fields["document"], grammar)
    found = syntactic_states(grammar, fields)
    assert (
        len(set(zip(naive, found.flatten().tolist(), strict=True)))
        == len(set(naive))
        == len(found.unique())
    )
    without = {name: fields[name] for name in ("tokens", "document")}  # roles read from the tokens
    assert torch.equal(syntactic_states(grammar, without), found)
    assert not syntactic_states(None, fields).any()


def test_donors_are_of_the_same_state_in_another_document():
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(4, (6, 30), generator=generator)
    source = torch.arange(6 * 30).view(6, 30) // 40  # some span two sequences
    state[2, 5] = 9  # a state of its own
    state[3, 6:8] = 8  # a state that one sequence has
    row = torch.arange(6)[:, None].expand(6, 30)
    sequence, position = draw_donors(state, source, 1)
    alone = (state == 9) | (state == 8)
    assert torch.equal(sequence[alone], row[alone]) and torch.equal(position[2, 5], torch.tensor(5))
    donor = sequence[~alone], position[~alone]
    assert torch.equal(state[donor], state[~alone])
    assert (donor[0] != row[~alone]).all() and (source[donor] != source[~alone]).all()
    assert all(
        torch.equal(a, b)
        for a, b in zip(draw_donors(state, source, 1), (sequence, position), strict=True)
    )
    assert not torch.equal(draw_donors(state, source, 2)[1], position)
    # Uniform over all that may be drawn: here three others, for each of four.
    counts = torch.zeros(4, 4)
    for seed in range(300):
        drawn, _ = draw_donors(torch.zeros(4, 1, dtype=torch.long), torch.arange(4)[:, None], seed)
        counts[torch.arange(4), drawn[:, 0]] += 1
    assert not counts.diagonal().any() and (counts + 100 * torch.eye(4) - 100).abs().max() < 40


def test_the_stimulus():
    process = GrammarProcess(bound_grammar())
    fields = held_out(process, 20, 48)
    shown, row = stimulus(process, 20, 48, seed=3, same_word=False), torch.arange(20)
    assert torch.equal(shown.tokens, fields["tokens"]) and torch.equal(
        shown.target, shown.tokens[row, shown.at + 1]
    )
    assert (shown.at >= 24).all() and (shown.at < 47).all()
    assert torch.equal(fields["document"][row, shown.at], fields["document"][row, shown.at + 1])
    assert torch.equal(shown.at, stimulus(process, 20, 48, seed=3, same_word=False).at)
    assert not torch.equal(shown.at, stimulus(process, 20, 48, seed=4, same_word=False).at)
    mask = bound_queries(process.grammar, fields["tokens"])
    mask[5] = False
    scored = stimulus(process, 20, 48, where=mask, same_word=False)
    kept = row != 5
    assert (
        torch.equal(scored.tokens, fields["tokens"][kept]) and mask[kept][row[:19], scored.at].all()
    )
    assert scored.state.shape == scored.source.shape == (19, 48)
    document = fields["document"]
    assert torch.equal(shown.source, document)  # no document is its own donor
    sequence, position = shown.same_state
    assert (document[sequence, position] != document)[row, shown.at].all()
    chain = stimulus(Chain(process, order=1), 8, 48, grammar=process.grammar, same_word=False)
    fields = held_out(Chain(process, order=1), 8, 48)
    naive = naive_states(fields["tokens"], fields["document"], process.grammar)
    assert (
        len(set(zip(naive, chain.state.flatten().tolist(), strict=True)))
        == len(set(naive))
        == len(chain.state.unique())
    )
    assert not stimulus(HashedTables(), 4, 32, same_word=False).state.any()


def test_donors_of_the_same_word():
    """By default a donor has the same word in the same state of another document; what has none is left out."""
    process = GrammarProcess(bound_grammar())
    shown, any_word = stimulus(process, 20, 48), stimulus(process, 20, 48, same_word=False)
    row = torch.arange(len(shown.at))
    sequence, position = (donor[row, shown.at] for donor in shown.same_state)
    assert (sequence != row).all() and shown.tokens[sequence, position].equal(
        shown.tokens[row, shown.at]
    )
    numbers = shown.state // process.vocabulary_size
    assert numbers[sequence, position].equal(numbers[row, shown.at]) and len(row) <= 20
    kept = (any_word.tokens[:, None] == shown.tokens).all(-1).any(1)
    assert any_word.at[kept].equal(shown.at)


def test_the_layer_that_is_made_up_for_is_chosen_by_the_other_half():
    runs = Ablations(repair_model("head", 0.4), repair_stimulus())
    found, scores = most_repaired(runs, least=-1.0)
    assert found.layer == 0 and scores.tolist() == [False, True] * 20
    assert most_repaired(runs, least=1e6)[0] is None


def test_text_in_which_no_position_has_a_donor_is_refused_in_one_line():
    """No word comes twice in random text, so no document can stand in for another: fewer than two sequences are left."""
    words = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).view(20, 50)
    text = Text("random", [*words.numpy()], vocabulary_size=1001, end=1000)
    assert len(stimulus(text, 8, 24, same_word=False).at) == 8
    with pytest.raises(
        ValueError, match="where: leaves 0 of 8 sequences a position with a donor; .* for 2 or more"
    ) as error:
        stimulus(text, 8, 24)
    assert "\n" not in str(error.value)
    shown = random_stimulus()
    for kept in (0, 1):
        with pytest.raises(ValueError, match=f"where: leaves {kept} of 6 sequences"):
            shown.of(torch.arange(6) < kept)
    # Where two keep each other's donors, the rest is left out.
    shown.state = torch.arange(6)[:, None].clamp(min=1).expand_as(shown.tokens)
    assert shown.of(torch.arange(6) < 5).tokens.equal(shown.tokens[:2])
    with pytest.raises(ValueError, match="where: leaves 0 of 5 sequences"):
        shown.of(torch.arange(6) > 0)


# ---------------------------------------------------------------------- the table


def labelled(table, **labels):
    for name, value in labels.items():
        table = table[table[name] == value]
    return table


def test_the_table(tmp_path):
    process = GrammarProcess(bound_grammar())
    shown = stimulus(process, 16, 24)
    count = len(shown.at)
    model = build_model(
        "llama", process.vocabulary_size, layers=3, width=16, heads=2, context=24
    ).eval()
    with counted(model) as seen:
        table = measure(model, shown)
    assert seen == {
        "runs": 1 + 3 + 3,
        "tokens": count * (24 + 6),
    }  # a clean run, then one position for each component
    with counted(model) as seen:
        everywhere = measure(model, shown, where="everywhere", kinds=("mlp",))
    assert seen == {"runs": 4, "tokens": 4 * count * 24} and set(everywhere["ablated"]) == {"mlp"}
    assert list(table.columns) == COLUMNS and (table["n"] == count).all()
    assert not table.duplicated(COLUMNS[:7]).any()
    found = Ablations(model, shown).ablate("attention", 1)
    row = labelled(table, ablated="attention", layer=1, quantity="change")
    assert row["responding"].tolist() == [2]
    assert row["value"].tolist() == pytest.approx(
        [float((found.attention + found.mlp)[:, 2].mean())]
    )
    one = labelled(table, ablated="attention", layer=1, responding=-1).set_index("quantity")
    for name, values in {
        "removed": found.removed,
        "total": found.total,
        "compensation": found.compensation,
    }.items():
        assert one.loc[name, "value"] == pytest.approx(float(values.mean()))
        assert one.loc[name, "low"] < one.loc[name, "value"] < one.loc[name, "high"]
    parts = [one.loc[f"fraction by {name}", "value"] for name in ("attention", "mlp", "norm")]
    assert sum(parts) == pytest.approx(
        float(found.self_repair.mean() / found.removed.mean()), abs=1e-4
    )
    x, y = found.removed - found.removed.mean(), found.compensation - found.compensation.mean()
    assert one.loc["slope", "value"] == pytest.approx(float((x * y).sum() / (x * x).sum()))
    assert one.loc["R2", "value"] == pytest.approx(
        float(torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2)
    )
    # Nothing comes after the last layer: it has no slope, and its row of changes is empty.
    last = labelled(table, ablated="layer", layer=2)
    assert not set(last["quantity"]) & {"slope", "R2", "change"}

    class Series:
        steps, identity = [0], "one model"

        def load(self, step, **options):
            return model

    swept = sweep(Series(), lambda one: measure(one, shown), tmp_path / "hydra.csv", progress=False)
    pd.testing.assert_frame_equal(swept.drop(columns="step"), table, check_dtype=False)


# ---------------------------------------------------------------------- as released


def test_a_block_without_biases_maps_zero_to_zero():
    tokens = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(0))
    model = random_model("llama")
    clean, ablated = as_released(model, tokens)
    assert clean.shape == (2, 4) and ablated.shape == (2, 2, 4) and (ablated[0, 1] == 0).all()
    deep = build_model("llama", 11, **SIZES | {"layers": 4}, seed=1).eval()
    clean, ablated = as_released(deep, tokens, furthest=3)
    known = ablated.isfinite().all(-1)
    assert known.tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [False, False, False, True],
    ]
    assert (ablated[known] == 0).all() and clean.abs().min() > 0
    # From the definition: the stream after each block, unembedded without the final norm, for the current token.
    with torch.no_grad():
        streams = hooked_streams(deep, tokens)
        zero = torch.zeros(1, 3, 16)
        block = deep.model.layers[1](
            zero, position_embeddings=deep.model.rotary_emb(zero, torch.arange(3)[None])
        )
        lens = [stream[:, -1] @ deep.lm_head.weight.T for stream in streams]
        expected = torch.stack([logits[torch.arange(4), tokens[:, -1]] for logits in lens])
    assert not block.any()
    torch.testing.assert_close(clean, expected, atol=1e-6, rtol=0)
    # GPT-2's biases make something out of nothing.
    clean, ablated = as_released(random_model("gpt2"), tokens)
    assert ablated[0, 1].abs().min() > 1e-3 and (ablated[0, 1] == ablated[0, 1, 0]).sum() < 4


def hooked_streams(model, tokens):
    """The stream after each block."""
    streams, hooks = [], []
    for block in model.model.layers:
        hooks.append(block.register_forward_hook(lambda module, given, out: streams.append(out)))
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return streams


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="among = 'role': the stimulus does not know roles"):
        Ablations(random_model("llama"), random_stimulus(), among="role")
    model, shown, process = (
        random_model("llama"),
        random_stimulus(),
        GrammarProcess(bound_grammar()),
    )
    with pytest.raises(ValueError, match="how = 'noise'.* resample, anywhere"):
        measure(model, shown, "noise")
    with pytest.raises(ValueError, match="where = 'nowhere'.* scored, everywhere"):
        measure(model, shown, where="nowhere")
    with pytest.raises(ValueError, match="kind = 'neuron'.* layer, attention, mlp, head"):
        measure(model, shown, kinds=("neuron",))
    for component, message in [
        (("layer", 2), r"\(2, 0\).* layers below 2"),
        (("head", 0, 2), r"\(0, 2\).* heads below 2"),
        (("attention", -1), r"\(-1, 0\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            Ablations(model, shown).ablate(*component)
    with pytest.raises(ValueError, match="1 sequence.* 2 or more"):
        measure(model, by_hand(shown.tokens[:1], shown.at[:1]))
    shown = random_stimulus()
    shown.state[0, shown.at[0]] = 1
    for how in WAYS:
        if how in ("resample", "random"):
            with pytest.raises(
                ValueError, match=f"how = '{how}': 1 scored positions have no donor"
            ):
                Ablations(model, shown, how)
        else:
            Ablations(model, shown, how)
    with pytest.raises(ValueError, match=r"where: has shape \(2, 3\), and the tokens \(4, 24\)"):
        stimulus(process, 4, 24, where=torch.ones(2, 3, dtype=torch.bool))
    one = torch.zeros(4, 24, dtype=torch.bool)
    one[0, 12:] = True
    with pytest.raises(ValueError, match="where: leaves 1 of 4 sequences"):
        stimulus(process, 4, 24, where=one)
    with pytest.raises(
        ValueError, match="grammar tiny: has 12 tokens, and token .* the same vocabulary"
    ):
        stimulus(HashedTables(), 4, 24, grammar=process.grammar)


@pytest.mark.parametrize("architecture, config", MODELS)
def test_norms_are_gain_times_scale(architecture, config):
    norm = Internals(random_model(architecture, **config)).final_norm
    vectors = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    bias = getattr(norm, "bias", None)
    parts = norm_gain(norm, vectors) * norm_scale(norm, vectors) + (0 if bias is None else bias)
    torch.testing.assert_close(parts, norm(vectors), atol=1e-6, rtol=1e-6)
    assert torch.equal(norm_scale(None, vectors), torch.ones(5, 1))


def test_among_the_words_of_the_role():
    """The clean logit is the target's minus its role's mean, what raises all of a role counts for nothing, parts still add up."""
    process = GrammarProcess(bound_grammar())
    shown = stimulus(process, 12, 24)
    model = build_model(
        "llama", process.vocabulary_size, layers=2, width=16, heads=2, context=24
    ).eval()
    runs, whole = Ablations(model, shown, among="role"), Ablations(model, shown)
    with torch.no_grad():
        logits = (
            model(input_ids=shown.tokens).logits[torch.arange(len(shown.at)), shown.at].double()
        )
    role = torch.as_tensor(process.grammar.role_of)
    for i, target in enumerate(shown.target.tolist()):
        assert shown.peers[i].tolist() == (role == role[target]).tolist()
        assert float(runs.clean.logit[i]) == pytest.approx(
            float(logits[i, target] - logits[i, shown.peers[i]].mean()), abs=1e-4
        )
    clean = runs.clean
    assert torch.allclose(
        clean.embedding + clean.attention.sum(1) + clean.mlp.sum(1) + clean.bias,
        clean.logit,
        atol=1e-4,
    )
    found = runs.ablate("layer", 0)
    assert torch.allclose(found.total, -found.removed + found.compensation + found.norm, atol=1e-4)
    moved = torch.zeros_like(model.lm_head.weight)
    for number in role.unique().tolist():
        moved[role == number] = torch.randn(16, generator=torch.Generator().manual_seed(number))
    model.lm_head.weight.data += moved  # the same for all words of a role
    assert torch.allclose(
        Ablations(model, shown, among="role").clean.attention, clean.attention, atol=1e-4
    )
    assert not torch.allclose(
        Ablations(model, shown).clean.attention, whole.clean.attention, atol=1e-2
    )


def test_a_part_of_a_stimulus():
    process = GrammarProcess(bound_grammar())
    shown = stimulus(process, 12, 24, same_word=False)
    kept = torch.arange(12) % 3 > 0
    part = shown.of(kept)
    assert (
        part.tokens.equal(shown.tokens[kept])
        and part.target.equal(shown.target[kept])
        and part.peers.equal(shown.peers[kept])
    )
    assert part.seed == shown.seed and len(part.at) == 8


def test_the_released_measurement_as_a_table():
    model = random_model("gpt2")
    tokens = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(0))
    clean, ablated = as_released(model, tokens, 1)
    table = measure_as_released(model, tokens, 1).set_index(["m", "layer"])
    assert [*table.index] == [(1, layer) for layer in range(1, len(clean))]
    for layer in range(1, len(clean)):
        row = table.loc[(1, layer)]
        assert (
            row["clean"] == pytest.approx(float(clean[layer].mean()), abs=1e-5)
            and row["low"] < row["clean"] < row["high"]
        )
        assert row["ablated"] == pytest.approx(float(ablated[0, layer].mean()), abs=1e-5)
