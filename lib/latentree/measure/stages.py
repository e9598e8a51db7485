"""What is learned when: a model's loss in parts that each tell of one level of the hierarchy.

One loss against nested ceilings passes them one after the other whatever is learned first. So the
loss is split by the chain rule into parts, each of which one level lowers most. With q a prediction
and qm the mean of all predictions:

    frequencies  -log qm(t): what is known of tokens without any context
    syntax       -log q(role) / qm(role), the role's loss beyond its mean
    maps         -log q(t | role) / qm(t | role), where the sentence tells nothing of the word
    habits       -log q(called or not | role): is it the word that an earlier word calls for?
    section      the same, where the section calls for another word than the document, given that
                 it is not that one; habits then has the places where both call for the same word.
                 (Or the name of whatever level redraws a part of the latents again.)

Parts are in nats for each token from the second one on, and not a number where they do not apply.
The same parts of exact predictors scale them.
"""

from dataclasses import replace

import pandas as pd
import torch

from latentree.data.corpus import HELD_OUT, held_out
from latentree.data.grammar import Grammar
from latentree.data.grammar_file import LEVELS
from latentree.data.sampler import GrammarProcess
from latentree.evidence.curves import Curve, sequence_sums
from latentree.exact.predictors import predictive
from latentree.train.model import log_probabilities


def exact_predictors(process: GrammarProcess, sequences: int, context: int) -> tuple[dict, dict]:
    """Held-out windows, and log probabilities (sequence, position, vocabulary) of exact predictors.

    - uniform: knows the vocabulary. frequencies: also each token's share of the corpus.
    - syntax: the sentence grammar and each role's words, all alike within a role.
    - maps: also the maps of the first level that redraws latents (mostly the document), each word
      drawn on its own. habits: also that level's habits.
    - the name of the deepest level, if several redraw latents: all latents where the token stands.
      "maps" and "habits" then know how many latents are redrawn below, and take every word as from
      a redraw of its own.
    Windows have the fields free (bool), called and called_above: the token that the word's habit
    calls for, by all latents and by the first level's; -1 where no earlier word calls.
    ValueError for recursive grammars, and where nothing is redrawn.
    """
    grammar, levels = process.grammar, _redrawn(process.grammar)
    if grammar.shapes is None or not levels:
        raise ValueError(
            f"{process.name}: recursive, or redraws nothing {grammar.file.redraw}, so that levels "
            "cannot be told apart; choose another grammar"
        )
    found = {}

    def annotate(documents):
        above, trust = _known_to(process, documents, levels[0])
        only_maps = {role: (of_map, 0.0) for role, (of_map, _) in trust.items()}
        found["syntax"] = predictive(grammar, documents, latent_aware=False)
        found["maps"] = predictive(grammar, above, trust=only_maps)
        found["habits"] = predictive(grammar, above, trust=trust)
        if len(levels) > 1:
            found[levels[-1]] = predictive(grammar, documents)
        free, called = _calls(grammar, documents)
        _, called_above = _calls(grammar, above)
        number = torch.arange(len(free))
        return {"free": free, "called": called, "called_above": called_above, "token": number}

    rows = held_out(process, sequences, context, annotate=annotate)
    size, shape = grammar.vocabulary_size, (sequences, context - 1, -1)
    predicted = {
        "uniform": torch.full((size,), 1 / size, dtype=torch.float64).expand(shape),
        "frequencies": torch.tensor(process.token_frequencies()).expand(shape),
    }
    predicted |= {name: p[rows["token"][:, 1:]] for name, p in found.items()}
    return rows, {name: p.log() for name, p in predicted.items()}


def _known_to(process: GrammarProcess, documents, level: str) -> tuple:
    """Held-out documents with the latents down to `level` only, and `predictive`'s trust in them.

    A map of which k of n words are permuted below holds with probability (n - k) / (n - 1), else a
    word is any of the n (one of the k may keep its place); a habit holds with 1 - k / n, else it is
    drawn afresh.
    """
    grammar, file = process.grammar, process.grammar.file
    kept = _redrawn(grammar)[: _redrawn(grammar).index(level) + 1]
    below = [share for name, share in file.redraw.items() if name not in kept]
    redraw = {name: file.redraw[name] for name in kept}
    content = file.model_dump() | {"redraw": redraw, "exclude_held_out": 0}
    above = GrammarProcess(Grammar(content), process.seed)
    base = above.documents(process.apart(HELD_OUT, documents.count))
    each, units = file.document.per_document("sentence"), len(next(iter(base.maps.values())))
    number = documents.token["document"] * each + documents.token["sentence"]
    token = documents.token | {"unit": number * units // (documents.count * each)}
    trust, sizes = {}, dict(zip(grammar.roles, grammar.sizes.tolist()))
    for role, spec in zip(grammar.roles, grammar.role_specs):
        of_map, of_habit = 1.0, 1.0
        words, parents = sizes[role], sizes.get(file.habits.get(role), 1)
        for share in below:
            if spec.has_map:
                of_map *= min(1.0, (words - round(share * words)) / (words - 1))
            of_habit *= 1 - round(share * parents) / parents
        trust[role] = (of_map, of_habit)
    return replace(documents, token=token, maps=base.maps, habits=base.habits), trust


def _redrawn(grammar):
    """The levels that redraw latents, the highest first."""
    return [level for level in LEVELS if grammar.file.redraw.get(level)]


def _calls(grammar, documents):
    """Whether each word with a map is free of earlier words; the token called for, or -1."""
    token, tokens = documents.token, documents.tokens
    place, role = token["place"], token["role"]
    binds = [torch.tensor(shape.binds_to) for shape in documents.shapes]
    binds = torch.nn.utils.rnn.pad_sequence(binds, batch_first=True, padding_value=-1)
    parents = binds[token["shape"]]  # (tokens, longest)
    parent = parents.gather(1, place[:, None])[:, 0]
    earlier = torch.arange(binds.shape[1]) < place[:, None]
    has_children = ((parents == place[:, None]) & earlier).any(1)
    mapped = torch.tensor([spec.has_map for spec in grammar.role_specs])[role]
    called = torch.full_like(tokens, -1)
    for child, habit in documents.habits.items():
        bound = (parent >= 0) & (parent < place) & (role == grammar.roles.index(child))
        here = bound.nonzero()[:, 0]
        unit, words = token["unit"][here], tokens[here - place[here] + parent[here]]
        above, below = documents.maps[grammar.file.habits[child]], documents.maps[child]
        rank = (above[unit % len(above)] == words[:, None]).int().argmax(1)
        called[here] = below[unit % len(below), habit[unit, rank]]
    return (parent < 0) & ~has_children & mapped, called


def loss_parts(grammar: Grammar, log_p: torch.Tensor, rows: dict) -> dict:
    """Parts of the loss {level: (sequence, position - 1)} of predictions log_p, vocabulary last.

    They are of all tokens but the first in the windows `rows` of `exact_predictors`.
    """
    fields = ("tokens", "role", "called", "called_above", "free")
    token, role, called, above, free = [rows[name][:, 1:] for name in fields]
    members = torch.nn.functional.one_hot(torch.as_tensor(grammar.role_of)).double()
    p = log_p.double().exp()
    mean = p.mean((0, 1))
    mean_role = (mean @ members)[role]
    of_role = (p @ members).gather(-1, role[..., None])[..., 0]

    def within_role(word):
        return p.gather(-1, word.clamp(min=0)[..., None])[..., 0] / of_role

    word = (mean[token] / mean_role / within_role(token)).log()
    same, chance = called == above, within_role(called)
    rest = (1 - within_role(above)).clamp(min=1e-12)
    chance = torch.where(same, chance, chance / rest)
    event = -torch.where(token == called, chance, (1 - chance).clamp(min=1e-12)).log()
    parts = {
        "frequencies": -mean[token].log(),
        "syntax": (mean_role / of_role).log(),
        "maps": word.where(free, torch.nan),
        "habits": event.where((called >= 0) & same, torch.nan),
    }
    for deepest in _redrawn(grammar)[1:][-1:]:
        parts[deepest] = event.where((called >= 0) & ~same & (token != above), torch.nan)
    return parts


def losses_by_level(model, grammar: Grammar, rows: dict) -> pd.DataFrame:
    """Sums of a model's `loss_parts` over the windows: DataFrame (level, sequence, sum, count)."""
    parts = loss_parts(grammar, log_probabilities(model, rows["tokens"])[:, :-1], rows)
    tables = [sequence_sums(part).assign(level=level) for level, part in parts.items()]
    return pd.concat(tables)[["level", "sequence", "sum", "count"]]


def level_curves(own: dict, exact: dict) -> dict:
    """{level: `Curve` of its recovered share, (without - loss) / (without - with)}, not clipped.

    `own` {level: Curve} are the model's losses, `exact` {predictor: its loss_parts} those of
    `exact_predictors` in their order: `with` is the predictor of the level's name, `without` the
    one before. A level that has nothing to tell is left out.
    """
    found, predictors = {}, list(exact)
    for before, level in zip(predictors, predictors[1:]):
        without = exact[before][level].nansum(1, keepdim=True).numpy()
        gap = without - exact[level][level].nansum(1, keepdim=True).numpy()
        if abs(gap.sum()) > 1e-6 * max(1, abs(without).sum()):
            loss = own[level].sums
            found[level] = Curve(own[level].tokens, without - loss, gap + 0 * loss)
    return found
