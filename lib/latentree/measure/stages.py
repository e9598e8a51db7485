"""What is learned when: a model's loss in parts that each tell of one level of the hierarchy, scaled by exact predictors.

One loss against nested ceilings passes them one after the other whatever is learned first. So the loss is split by the
chain rule into parts, each of which one level lowers most, and the same split of exact predictors scales it:

    frequencies  -log qm(t), with qm the mean of all predictions q: what is known of tokens without any context
    syntax       -log q(role) / qm(role), the role's loss beyond its mean
    maps         -log q(t | role) / qm(t | role), where the sentence so far cannot tell of the word (free)
    habits       -log q(called or not | role), whether the word is the one that a word seen earlier calls for
    section      (or whatever level redraws a part of the latents again) the same, where that level calls for another
                 word than the level above, and given that it is not the word called for above; habits then has the
                 places where both call for the same word, which who knows the section foresees better still

Parts of a loss are in nats for each token from the second one on, and not a number where they do not apply.
"""

from dataclasses import replace

import pandas as pd
import torch

from latentree.data.corpus import HELD_OUT, held_out
from latentree.data.grammar import LEVELS, Grammar
from latentree.data.sampler import GrammarProcess
from latentree.evidence.curves import sequence_sums
from latentree.exact.predictors import predictive
from latentree.train.model import log_probabilities


def exact_predictors(process: GrammarProcess, sequences: int, context: int) -> tuple[dict, dict]:
    """Held-out windows, and log probabilities (sequence, position, vocabulary) before each token of exact predictors.

    - uniform: knows the vocabulary. frequencies: also each token's share of the corpus.
    - syntax: the sentence grammar and each role's words, all alike within a role.
    - maps: also the frequencies of words by the maps of the first level that redraws latents (mostly the document's),
      each word drawn on its own. habits: also that level's habits.
    - the name of the deepest level, if latents are redrawn at several: all latents where the token stands. "maps" and
      "habits" then know how many of the latents are redrawn below, and take every word as from a redraw of its own.
    Windows have fields free (bool), and called and called_above (the token that the word's habit calls for, by all
    latents and by the first level's; -1 where no earlier word calls). ValueError for shared tokens or recursive
    grammars.
    """
    grammar, found = process.grammar, {}
    levels = [level for level in LEVELS if grammar.file.redraw.get(level)]
    if grammar.file.shared > 0 or grammar.shapes is None or not levels:
        raise ValueError(
            f"{process.name}: shared tokens, recursion, or nothing redrawn {grammar.file.redraw}: levels cannot "
            "be told apart; choose a grammar whose shapes can be enumerated, with shared 0"
        )

    def annotate(documents):
        above, trust = known_to(process, documents, levels[0])
        kinds = {
            "syntax": (documents, False, None),
            "maps": (above, True, {r: (t[0], 0.0) for r, t in trust.items()}),
            "habits": (above, True, trust),
        } | ({levels[-1]: (documents, True, None)} if len(levels) > 1 else {})
        found.update(
            {
                name: predictive(grammar, source, aware, trust=t)
                for name, (source, aware, t) in kinds.items()
            }
        )
        free, called = _calls(grammar, documents)
        return {
            "free": free,
            "called": called,
            "called_above": _calls(grammar, above)[1],
            "token": torch.arange(len(free)),
        }

    rows = held_out(process, sequences, context, annotate=annotate)
    flat = torch.full((grammar.vocabulary_size,), 1 / grammar.vocabulary_size, dtype=torch.float64)
    known = {"uniform": flat, "frequencies": torch.tensor(process.token_frequencies())}
    known = {name: p.expand(sequences, context - 1, -1) for name, p in known.items()}
    return rows, {
        name: p.log()
        for name, p in (
            known | {name: p[rows["token"][:, 1:]] for name, p in found.items()}
        ).items()
    }


def known_to(process: GrammarProcess, documents, level: str) -> tuple:
    """Held-out documents (from the first on) with the latents down to `level` only, and the `trust` of `predictive` in them.

    A map of which k of n words are permuted below holds with probability (n - k) / (n - 1), else a word is any of the n
    (one of the k may keep its place); a habit holds with 1 - k / n, else it is drawn afresh.
    """
    grammar, file = process.grammar, process.grammar.file
    kept = {
        name: share
        for name, share in file.redraw.items()
        if LEVELS.index(name) <= LEVELS.index(level)
    }
    content = file.model_dump() | {"redraw": kept, "exclude_held_out": 0}
    base = GrammarProcess(Grammar(content), process.seed).documents(
        process.apart(HELD_OUT, documents.count)
    )
    each, units = file.document.per_document("sentence"), len(next(iter(base.maps.values())))
    number = documents.token["document"] * each + documents.token["sentence"]
    trust = {role: [1.0, 1.0] for role in grammar.roles}
    for share in (share for name, share in file.redraw.items() if name not in kept):
        for role, spec, n in zip(grammar.roles, grammar.role_specs, grammar.sizes.tolist()):
            parent = (
                grammar.sizes[grammar.roles.index(file.habits[role])] if role in file.habits else 1
            )
            trust[role][0] *= min(1.0, (n - round(share * n)) / (n - 1)) if spec.has_map else 1.0
            trust[role][1] *= 1 - round(share * parent) / parent
    token = documents.token | {"unit": number * units // (documents.count * each)}
    return replace(documents, token=token, maps=base.maps, habits=base.habits), trust


def _calls(grammar, documents):
    """Whether each word with a map is free of the sentence's earlier words, and the token that its habit calls for, or -1."""
    token, tokens, called = documents.token, documents.tokens, torch.full_like(documents.tokens, -1)
    longest = max(len(shape.roles) for shape in documents.shapes)
    padded = torch.tensor(
        [[*s.binds_to, *[-1] * (longest - len(s.roles))] for s in documents.shapes]
    )
    place, parents = token["place"], padded[token["shape"]]  # parents (tokens, longest)
    parent = parents.gather(1, place[:, None])[:, 0]
    has_children = ((parents == place[:, None]) & (torch.arange(longest) < place[:, None])).any(1)
    mapped = torch.tensor([role.has_map for role in grammar.role_specs])[token["role"]]
    for child, habit in documents.habits.items():
        here = (
            (parent >= 0) & (parent < place) & (token["role"] == grammar.roles.index(child))
        ).nonzero()[:, 0]
        unit, words = token["unit"][here], tokens[here - place[here] + parent[here]]
        above, below = (documents.maps[role] for role in (grammar.file.habits[child], child))
        rank = (above[unit % len(above)] == words[:, None]).int().argmax(1)
        called[here] = below[unit % len(below), habit[unit, rank]]
    return (parent < 0) & ~has_children & mapped, called


def loss_parts(grammar: Grammar, log_p: torch.Tensor, rows: dict) -> dict:
    """Parts of the loss {name: (sequence, position - 1)} of predictions log_p (sequence, position - 1, vocabulary).

    They are of all tokens but the first in the windows `rows` of `exact_predictors`: a model's log_softmax(logits[:,
    :-1]).
    """
    token, role, called, above, free = (
        rows[name][:, 1:] for name in ("tokens", "role", "called", "called_above", "free")
    )
    members = torch.zeros(len(grammar.roles), grammar.vocabulary_size, dtype=torch.float64)
    for r, words in enumerate(grammar.words):
        members[r, words] = 1
    p = log_p.double().exp()
    mean = p.mean((0, 1))
    mean_role, of_role = (members @ mean)[role], (p @ members.T).gather(-1, role[..., None])[..., 0]
    of_word, of_called, of_above = (
        p.gather(-1, t.clamp(min=0)[..., None])[..., 0] / of_role for t in (token, called, above)
    )
    word = (mean[token] / mean_role / of_word).log()
    bound, same = called >= 0, called == above
    chance = torch.where(same, of_called, of_called / (1 - of_above).clamp(min=1e-12))
    event = -torch.where(token == called, chance, (1 - chance).clamp(min=1e-12)).log()
    parts = {
        "frequencies": -mean[token].log(),
        "syntax": (mean_role / of_role).log(),
        "maps": word.where(free, torch.nan),
        "habits": event.where(bound & same, torch.nan),
    }
    deepest = [level for level in LEVELS if grammar.file.redraw.get(level)][1:][-1:]
    return parts | {
        level: event.where(bound & ~same & (token != above), torch.nan) for level in deepest
    }


def losses_by_level(model, grammar: Grammar, rows: dict) -> pd.DataFrame:
    """Sums of `loss_parts` of a model over each of the windows `rows`: DataFrame (level, sequence, sum, count)."""
    parts = loss_parts(grammar, log_probabilities(model, rows["tokens"])[:, :-1], rows)
    return pd.concat(
        [sequence_sums(part).assign(name=level) for level, part in parts.items()]
    ).rename(columns={"name": "level"})


def level_curves(own: dict, exact: dict) -> dict:
    """Recovered share of each level, a `Curve` (without - loss) / (without - with), by loss curves `own` {level: Curve}.

    `exact` {predictor: parts of `loss_parts`} has those of `exact_predictors`, in their order: `with` is the predictor of
    the level's name, `without` the one before. Nothing is clipped; a level that has nothing to tell is left out.
    """
    found, names = {}, list(exact)
    for before, name in zip(names, names[1:]):
        without, aware = (exact[predictor][name].nansum(1).numpy() for predictor in (before, name))
        if abs((without - aware).sum()) > 1e-6 * max(1, abs(without).sum()):
            found[name] = own[name].recovered(without, aware)
    return found
