"""Contexts that share latents, and zero-shot prompts in the same syntactic state: what function vectors are tried on.

The syntactic state is given by the roles of the sentence so far, as in ["subject"], after which a verb comes. A prompt
knows the exact distribution of its next token under a latent: the generator's truth.
"""

from dataclasses import dataclass

import torch

from latentree.data.corpus import HELD_OUT, Documents, position_within
from latentree.data.grammar import Grammar
from latentree.data.sampler import GrammarProcess
from latentree.exact.bayes import posterior_frequencies
from latentree.exact.parser import PrefixParser
from latentree.exact.predictors import predictive

FIRST_LATENT = 1_000_000  # held-out latents from here on: no other measurement has them
EVERY = 16  # in text without roles every so many tokens are a query


@dataclass
class Contexts:
    """Documents from their beginning, and the queries in them: the places where the sentence so far is in the state.

    tokens (document, position), filled up with the end token; latent (document,) numbers what documents share; unit
    (document,) is their row of the maps and habits in `source`, the process's own record of them; document and position
    (query,): where the state's last word stands.
    """

    process: object
    state: list[str]
    tokens: torch.Tensor
    latent: torch.Tensor
    unit: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    source: Documents

    @property
    def query_latent(self) -> torch.Tensor:
        """The latent of each query (query,)."""
        return self.latent[self.document]


@dataclass
class Prompts:
    """Prompts as tokens (prompt, position), each under the latent with number latent (prompt,).

    gold (prompt, vocabulary), float64, is the exact distribution of the next token under that latent.
    """

    tokens: torch.Tensor
    gold: torch.Tensor
    latent: torch.Tensor

    def of(self, latents) -> "Prompts":
        """Only the prompts of these latents (numbers)."""
        kept = torch.isin(self.latent, torch.as_tensor(latents))
        return Prompts(self.tokens[kept], self.gold[kept], self.latent[kept])


def contexts(
    process, state, latents: int, repetitions: int, length: int, shortest: int = 0, first: int = 0
) -> Contexts:
    """`repetitions` held-out documents for each of `latents` latents, cut off after `length` tokens.

    Queries stand from token `shortest` on; `first` skips latents. A process without a grammar has no states and no shared
    latents: each document then counts as its own, and every 16th token is a query. ValueError if the state cannot be, if
    several roles may follow it, if latents change within a document, or if no query is found.
    """
    number = HELD_OUT + (FIRST_LATENT + first) * repetitions + torch.arange(latents * repetitions)
    latent = torch.arange(len(number))
    if isinstance(process, GrammarProcess):
        next_role(process.grammar, state)
        process, latent = sharing(process, repetitions), latent // repetitions
    elif state:
        raise ValueError(
            f"state = {list(state)}: {process.name} has no grammar and so no roles; give the state []"
        )
    documents = process.documents(number)
    token = documents.token
    row, position = token["document"], position_within(token["document"])
    kept = position < length
    tokens = torch.full((len(number), length), process.end)
    tokens[row[kept], position[kept]] = documents.tokens[kept]
    there = (
        in_state(process.grammar, token, state)
        if state
        else (position % EVERY == 0) & (position < length - 1)
    )
    at = kept & (position >= shortest) & there
    at &= torch.diff(row, append=row.new_tensor([-1])) == 0  # something follows
    if not at.any():
        raise ValueError(
            f"state = {state}: is nowhere between tokens {shortest} and {length} of {len(number)} documents of "
            f"{process.name}; give another state or longer contexts"
        )
    unit = token["unit"][position == 0] if "unit" in token else torch.zeros_like(latent)
    return Contexts(process, state, tokens, latent, unit, row[at], position[at], documents)


def sharing(
    process: GrammarProcess, repetitions: int, share: float | None = None
) -> GrammarProcess:
    """The same process with so many documents for each latent; with `share`, the share of its latents that is not common.

    Documents then keep 1 - share of one map and of its habits, the corpus's, and draw the rest afresh.
    """
    file = process.grammar.file.model_dump() | {"repetitions": repetitions, "exclude_held_out": 0}
    if not set(file["redraw"]) <= {"corpus", "document"}:
        raise ValueError(
            f"{process.name}: redraws latents below the document {file['redraw']}, so that a document has no "
            "latent of its own; give a grammar that redraws for documents only"
        )
    if share is not None:
        file["redraw"] = {"corpus": 1.0, "document": share} if share else {"corpus": 1.0}
    return GrammarProcess(Grammar(file), process.seed)


def next_role(grammar: Grammar, state) -> str:
    """The only role that may follow the roles `state` of a sentence so far."""
    unknown = [role for role in state if role not in grammar.roles]
    p = [0.0] if unknown or not state else PrefixParser(grammar).next_roles(tuple(state))
    if max(p) < 1 - 1e-9:
        raise ValueError(
            f"state = {list(state)}: is not followed by one certain role in {grammar.name}; give roles of a "
            f"sentence's beginning such as {[grammar.shapes[0].roles[0]] if grammar.shapes else []}"
        )
    return grammar.roles[int(max(range(len(p)), key=p.__getitem__))]


def in_state(grammar: Grammar, token: dict, state) -> torch.Tensor:
    """Whether each token (tokens,) is the last of a sentence's first words, and their roles are `state`."""
    at = token["place"] == len(state) - 1
    for back, role in enumerate(reversed(state)):
        at &= token["role"].roll(back) == grammar.roles.index(role)
    return at


def prompts(contexts: Contexts, document, words) -> Prompts:
    """Zero-shot prompts of `words` (prompt, state) after the end token, under the latents of `document` (prompt,)."""
    process, source, count = contexts.process, contexts.source, words.shape[1] + 1
    fields = {
        "tokens": torch.cat([words, words[:, -1:]], 1).flatten(),
        "place": torch.arange(count).repeat(len(words)),
        "unit": contexts.unit[document].repeat_interleave(count),
    }
    gold = predictive(
        process.grammar, Documents(fields, len(words), source.shapes, source.maps, source.habits)
    )
    return Prompts(after_end(process, words), gold[count - 1 :: count], contexts.latent[document])


def same_words(contexts: Contexts) -> Prompts:
    """For each query a zero-shot prompt of its own words. Without roles, gold is all on the token that followed."""
    back = torch.arange(1 - max(1, len(contexts.state)), 1)
    words = contexts.tokens[contexts.document[:, None], contexts.position[:, None] + back]
    if contexts.state:
        return prompts(contexts, contexts.document, words)
    followed = contexts.tokens[contexts.document, contexts.position + 1]
    gold = torch.nn.functional.one_hot(followed, contexts.process.vocabulary_size).double()
    return Prompts(after_end(contexts.process, words), gold, contexts.query_latent)


def fresh_words(contexts: Contexts, seed: int = 0) -> Prompts:
    """For each query a zero-shot prompt of words drawn from those of their roles that its context has not shown.

    Where it has shown all words of a role, from all of them.
    """
    later = torch.arange(contexts.tokens.shape[1]) > contexts.position[:, None]
    shown = contexts.tokens[contexts.document].masked_fill(later, contexts.process.end)
    unseen = torch.ones(len(shown), contexts.process.vocabulary_size).scatter(1, shown, 1e-9)
    return prompts(contexts, contexts.document, draw_words(contexts, unseen, seed))


def drawn_words(contexts: Contexts, each: int, seed: int = 0) -> Prompts:
    """`each` zero-shot prompts for each latent, of words drawn uniformly from those of their roles."""
    document = torch.searchsorted(contexts.latent, contexts.latent.unique()).repeat_interleave(each)
    anything = torch.ones(len(document), contexts.process.vocabulary_size)
    return prompts(contexts, document, draw_words(contexts, anything, seed))


def draw_words(contexts: Contexts, weights, seed: int) -> torch.Tensor:
    """A word for each role of the state (prompt, state), by weights (prompt, vocabulary) of all words."""
    grammar, generator = contexts.process.grammar, torch.Generator().manual_seed(seed)
    columns = []
    for role in contexts.state:
        words = torch.as_tensor(grammar.words[grammar.roles.index(role)])
        columns.append(words[torch.multinomial(weights[:, words], 1, generator=generator)[:, 0]])
    return torch.stack(columns, 1)


def after_end(process, words) -> torch.Tensor:
    """Rows of tokens (prompt, 1 + words): the end token, then the words."""
    return torch.cat([torch.full_like(words[:, :1], process.end), words], 1)


def shuffle_contexts(contexts: Contexts, zero_shot: Prompts, length: int, seed: int = 0) -> Prompts:
    """The same prompts after `length` tokens of sentences, each from a document drawn with `seed`.

    Such a context shows the syntax and no latent. Its first sentence may be cut off at the beginning.
    """
    token, generator = contexts.source.token, torch.Generator().manual_seed(seed)
    begins = (token["place"] == 0).nonzero()[:, 0]
    sizes = torch.diff(begins, append=begins.new_tensor([len(token["place"])]))
    rows = []
    for _ in zero_shot.tokens:
        row = []
        while len(row) < length:
            sentence = int(torch.randint(len(begins), (), generator=generator))
            row = (
                contexts.source.tokens[
                    begins[sentence] : begins[sentence] + sizes[sentence]
                ].tolist()
                + row
            )
        rows.append(row[-length:])
    return Prompts(
        torch.cat([torch.tensor(rows), zero_shot.tokens[:, 1:]], 1),
        zero_shot.gold,
        zero_shot.latent,
    )


def last_queries(contexts: Contexts) -> torch.Tensor:
    """The number of each document's last query (document with a query,)."""
    return (contexts.document.diff(append=contexts.document.new_tensor([-1])) != 0).nonzero()[:, 0]


def ideal_divergence(contexts: Contexts, groups) -> torch.Tensor:
    """KL in nats (group,) from the latent-aware prediction to an ideal reader's, exact.

    Each of `groups` is a list of queries of one latent: the reader has seen their contexts up to there, knows the grammar,
    and predicts the word after the state (bayes.py). ValueError for a grammar with binding or shared tokens.
    """
    process, grammar = contexts.process, contexts.process.grammar
    if grammar.file.binding > 0 or grammar.file.shared > 0:
        raise ValueError(
            f"{process.name}: binding = {grammar.file.binding}, shared = {grammar.file.shared}: the ideal reader is "
            "exact where both are 0; choose such a grammar"
        )
    number = grammar.roles.index(next_role(grammar, contexts.state))
    truth, maps = (
        torch.as_tensor(grammar.frequencies[number]),
        contexts.source.maps[grammar.roles[number]],
    )
    found = []
    for queries in groups:
        document, position = contexts.document[queries], contexts.position[queries]
        shown = contexts.tokens[document][
            torch.arange(contexts.tokens.shape[1]) <= position[:, None]
        ]
        ranked = maps[contexts.unit[document[0]] % len(maps)]  # from the most frequent word on
        believed = posterior_frequencies(
            torch.bincount(shown, minlength=process.vocabulary_size)[ranked], truth
        )
        found.append((truth * (truth / believed).log()).sum())
    return torch.stack(found)


def nothing_known(grammar: Grammar, role: str) -> float:
    """KL in nats from the frequencies of a role's words by rank to a uniform prediction: all that a latent can tell."""
    law = torch.as_tensor(grammar.frequencies[grammar.roles.index(role)])
    return float((law * (law * len(law)).log()).sum())


def ranked_words(contexts: Contexts, role: str) -> torch.Tensor:
    """The words of a role under each latent, from the most frequent one on: (latent, rank)."""
    maps, first = (
        contexts.source.maps[role],
        torch.searchsorted(contexts.latent, contexts.latent.unique()),
    )
    return maps[contexts.unit[first] % len(maps)]


def shared_part(contexts: Contexts, common: Contexts, role: str) -> torch.Tensor:
    """What part of a role's map each latent (latent,) has in common with the first of `common`, weighted by frequency.

    <p - u, q - u> / <q - u, q - u> for the two latents' word frequencies p and q, with u uniform: 1 for the same map, 0 on
    average for an independent one.
    """
    grammar = contexts.process.grammar
    above = torch.as_tensor(grammar.frequencies[grammar.roles.index(role)])
    above = above - above.mean()
    words = torch.cat([ranked_words(contexts, role), ranked_words(common, role)[:1]])
    p = torch.zeros(len(words), grammar.vocabulary_size, dtype=torch.float64).scatter(
        1, words, above.expand(words.shape)
    )
    return (p[:-1] * p[-1]).sum(1) / (p[-1] ** 2).sum()


def copy_prompts(grammar: Grammar, count: int, seed: int = 0) -> tuple[torch.Tensor, Prompts]:
    """The release's prompts: source (count, 6) of tokens s1 v1 o1 c s1 v1, and the target s2 v2 o2 c s2 v2 with other words.

    The target's gold is the source's answer o1, which stands in the source: they measure copying. ValueError for a grammar
    without the roles subject, verb, object and connector.
    """
    generator, drawn = torch.Generator().manual_seed(seed), []
    for role in ("subject", "verb", "object", "connector"):
        if role not in grammar.roles:
            raise ValueError(
                f"grammar {grammar.name}: has no role {role!r}, which the released prompts need"
            )
        words = torch.as_tensor(grammar.words[grammar.roles.index(role)])
        two = torch.rand(count, len(words), generator=generator).argsort(1)[:, :2]  # different ones
        drawn.append(words[two])
    (s1, s2), (v1, v2), (o1, o2), (c1, c2) = (two.T for two in drawn)
    gold = torch.nn.functional.one_hot(o1, grammar.vocabulary_size).double()
    target = Prompts(torch.stack([s2, v2, o2, c2, s2, v2], 1), gold, torch.arange(count))
    return torch.stack([s1, v1, o1, c1, s1, v1], 1), target
