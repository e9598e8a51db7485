"""Contexts that share latents, and zero-shot prompts in the same syntactic state.

The state is given by the roles of the sentence so far: after ["subject"] comes a verb. A prompt
knows the exact distribution of its next token under a latent: the generator's truth.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from latentree.data.corpus import HELD_OUT, Corpus, Documents
from latentree.data.grammar import Grammar
from latentree.data.sampler import GrammarProcess
from latentree.exact.parser import PrefixParser
from latentree.exact.predictors import predictive
from latentree.exact.reader import posterior_frequencies

_FIRST_LATENT = 1_000_000  # held-out latents from here on: no other measurement has them
_EVERY = 16  # in text without roles every so many tokens are a query


@dataclass
class Contexts:
    """Documents from their beginning, and the queries: places where the sentence is in the state.

    tokens (document, position) are filled up with the end token; latent (document,) numbers what
    documents share; document and position (query,) say where the state's last word stands; `source`
    is the corpus's own record of the documents.
    """

    corpus: Corpus
    state: list[str]
    tokens: torch.Tensor
    latent: torch.Tensor
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

    gold (prompt, vocabulary), float64, is the exact distribution of the next token under it.
    """

    tokens: torch.Tensor
    gold: torch.Tensor
    latent: torch.Tensor

    def of(self, latents) -> "Prompts":
        """Only the prompts of these latents (numbers)."""
        kept = torch.isin(self.latent, torch.as_tensor(latents))
        return Prompts(self.tokens[kept], self.gold[kept], self.latent[kept])


def contexts(corpus, state, latents, repetitions, length, shortest=0, first=0) -> Contexts:
    """`repetitions` held-out documents for each of `latents` latents, cut after `length` tokens.

    Queries stand from token `shortest` on; `first` skips latents. A corpus without a grammar has no
    roles and no shared latents: its state is [], each document counts as a latent of its own, and
    every 16th token is a query. ValueError if latents change within a document, or without a query.
    """
    number = HELD_OUT + (_FIRST_LATENT + first) * repetitions + torch.arange(latents * repetitions)
    latent = torch.arange(len(number))
    if corpus.grammar:
        corpus, latent = sharing(corpus, repetitions), latent // repetitions
    elif state:
        raise ValueError(f"state = {state}: {corpus.name} has no grammar, so no roles; give []")
    documents = corpus.documents(number)
    token = documents.token
    row, position = token["document"], token["position"]
    sizes = torch.bincount(row)
    query = (position >= shortest) & (position < length) & (position < sizes[row] - 1)
    if state:
        query &= token["place"] == len(state) - 1
        for back, role in enumerate(reversed(state)):
            query &= token["role"].roll(back) == corpus.grammar.roles.index(role)
    else:
        query &= (position % _EVERY == 0) & (position < length - 1)
    if not query.any():
        raise ValueError(
            f"state = {state}: is nowhere between tokens {shortest} and {length} of documents of "
            f"{corpus.name}; give another state or longer contexts"
        )
    texts = documents.tokens.split(sizes.tolist())
    tokens = pad_sequence(texts, batch_first=True, padding_value=corpus.end)[:, :length]
    return Contexts(corpus, state, tokens, latent, row[query], position[query], documents)


def sharing(corpus: GrammarProcess, repetitions: int, share: float | None = None) -> GrammarProcess:
    """The same corpus with so many documents for each latent.

    With `share`, documents keep 1 - share of one common map and of its habits, the corpus's, and
    draw the rest afresh. ValueError if latents change within a document.
    """
    file = corpus.grammar.file.model_dump() | {"repetitions": repetitions, "exclude_held_out": 0}
    if not set(file["redraw"]) <= {"corpus", "document"}:
        raise ValueError(
            f"{corpus.name}: redraws latents within documents, {file['redraw']}; give a grammar "
            "that redraws for whole documents, so that each has one latent"
        )
    if share is not None:
        file["redraw"] = {"corpus": 1.0, "document": share} if share else {"corpus": 1.0}
    return GrammarProcess(Grammar(file), corpus.seed)


def next_role(grammar: Grammar, state) -> str:
    """The role that must follow a sentence's first roles `state`; ValueError if others may."""
    following = PrefixParser(grammar).legal_roles(tuple(state)) if state else set()
    if len(following) != 1:
        raise ValueError(
            f"state = {list(state)}: is not followed by one certain role in {grammar.name}; give "
            "the first roles of a sentence, such as ['subject']"
        )
    return following.pop()


def same_words(contexts: Contexts) -> Prompts:
    """For each query a zero-shot prompt of its own words. Without roles, gold is what followed."""
    back = torch.arange(1 - max(1, len(contexts.state)), 1)
    words = contexts.tokens[contexts.document[:, None], contexts.position[:, None] + back]
    return _prompts(contexts, contexts.document, words)


def fresh_words(contexts: Contexts, seed: int = 0) -> Prompts:
    """For each query a zero-shot prompt of words of the same roles that its context has not shown.

    They are drawn with `seed`; where all words of a role were shown, from all of them.
    """
    later = torch.arange(contexts.tokens.shape[1]) > contexts.position[:, None]
    shown = contexts.tokens[contexts.document].masked_fill(later, contexts.corpus.end)
    unseen = torch.ones(len(shown), contexts.corpus.vocabulary_size).scatter(1, shown, 1e-9)
    return _prompts(contexts, contexts.document, _draw_words(contexts, unseen, seed))


def drawn_words(contexts: Contexts, each: int, seed: int = 0) -> Prompts:
    """`each` zero-shot prompts for each latent, of words drawn uniformly for their roles."""
    document = _first_documents(contexts).repeat_interleave(each)
    alike = torch.ones(len(document), contexts.corpus.vocabulary_size)
    return _prompts(contexts, document, _draw_words(contexts, alike, seed))


def shuffle_contexts(contexts: Contexts, zero_shot: Prompts, length: int, seed: int = 0) -> Prompts:
    """The same prompts after `length` tokens of sentences, each from a document drawn with `seed`.

    Such a context shows the syntax and no latent. Its first sentence may be cut off.
    """
    generator = torch.Generator().manual_seed(seed)
    begins = (contexts.source.token["place"] == 0).nonzero()[:, 0]
    sentences = contexts.source.tokens.tensor_split(begins[1:])
    rows = []
    for _ in zero_shot.tokens:
        row = zero_shot.tokens[0, :0]
        while len(row) < length:
            sentence = sentences[torch.randint(len(sentences), (), generator=generator)]
            row = torch.cat([sentence, row])
        rows.append(row[-length:])
    tokens = torch.cat([torch.stack(rows), zero_shot.tokens[:, 1:]], 1)
    return Prompts(tokens, zero_shot.gold, zero_shot.latent)


def copy_prompts(grammar: Grammar, count: int, seed: int = 0) -> tuple[torch.Tensor, Prompts]:
    """The release's prompts: source (count, 6), s1 v1 o1 c s1 v1, and target, s2 v2 o2 c s2 v2.

    The target's words are others, and its gold is the source's answer o1, which stands in the
    source: they measure copying. The grammar has roles subject, verb, object and connector.
    """
    generator, drawn = torch.Generator().manual_seed(seed), []
    for role in ("subject", "verb", "object", "connector"):
        words = _words(grammar, role)
        two = torch.rand(count, len(words), generator=generator).argsort(1)[:, :2]
        drawn.append(words[two].T)
    (s1, s2), (v1, v2), (o1, o2), (c1, c2) = drawn
    gold = torch.nn.functional.one_hot(o1, grammar.vocabulary_size).double()
    target = Prompts(torch.stack([s2, v2, o2, c2, s2, v2], 1), gold, torch.arange(count))
    return torch.stack([s1, v1, o1, c1, s1, v1], 1), target


def last_queries(contexts: Contexts) -> torch.Tensor:
    """The number of each document's last query (document with a query,)."""
    following = contexts.document.diff(append=contexts.document.new_tensor([-1]))
    return following.nonzero()[:, 0]


# ------------------------------------------------------------------ what can be known of a latent


def ideal_divergence(contexts: Contexts, groups) -> torch.Tensor:
    """KL in nats (group,) from the latent-aware prediction to an ideal reader's, exact.

    Each of `groups` is a list of queries of one latent: the reader has seen their contexts up to
    there, knows the grammar, and predicts the word after the state (`posterior_frequencies`).
    ValueError for a grammar with binding, where words are not independent draws.
    """
    corpus, grammar = contexts.corpus, contexts.corpus.grammar
    if grammar.file.binding > 0:
        raise ValueError(
            f"{corpus.name}: binding = {grammar.file.binding}: the ideal reader is exact only "
            "without; choose a grammar with binding 0"
        )
    role = next_role(grammar, contexts.state)
    law, ranked = _law(grammar, role), ranked_words(contexts, role)
    found = []
    for queries in groups:
        document, position = contexts.document[queries], contexts.position[queries]
        before = torch.arange(contexts.tokens.shape[1]) <= position[:, None]
        shown = torch.bincount(contexts.tokens[document][before], minlength=corpus.vocabulary_size)
        believed = posterior_frequencies(shown[ranked[contexts.latent[document[0]]]], law)
        found.append((law * (law / believed).log()).sum())
    return torch.stack(found)


def ranked_words(contexts: Contexts, role: str) -> torch.Tensor:
    """The words of a role under each latent, from the most frequent one on: (latent, rank)."""
    maps = contexts.source.maps[role]  # for each document, or one for all
    return maps[_first_documents(contexts) % len(maps)]


def shared_part(contexts: Contexts, common: Contexts, role: str) -> torch.Tensor:
    """What part of a role's map each latent (latent,) has in common with the first of `common`.

    <p - u, q - u> / <q - u, q - u> for the two latents' word frequencies p and q, with u uniform:
    1 for the same map, 0 on average for an independent one.
    """
    law = _law(contexts.corpus.grammar, role)
    words = torch.cat([ranked_words(contexts, role), ranked_words(common, role)[:1]])
    p = torch.zeros(len(words), contexts.corpus.vocabulary_size, dtype=torch.float64)
    p.scatter_(1, words, (law - law.mean()).expand(words.shape))
    return (p[:-1] * p[-1]).sum(1) / p[-1].square().sum()


def _law(grammar: Grammar, role: str) -> torch.Tensor:
    """The frequencies of a role's words by rank (rank,)."""
    return torch.as_tensor(grammar.frequencies[grammar.roles.index(role)])


def _words(grammar: Grammar, role: str) -> torch.Tensor:
    """The tokens of a role (words,)."""
    return torch.as_tensor(grammar.words[grammar.roles.index(role)])


def _first_documents(contexts: Contexts) -> torch.Tensor:
    """The first document of each latent (latent,)."""
    return torch.searchsorted(contexts.latent, contexts.latent.unique())


def _draw_words(contexts: Contexts, weights, seed: int) -> torch.Tensor:
    """A word for each role of the state (prompt, state), by weights (prompt, vocabulary)."""
    generator, columns = torch.Generator().manual_seed(seed), []
    for role in contexts.state:
        words = _words(contexts.corpus.grammar, role)
        columns.append(words[torch.multinomial(weights[:, words], 1, generator=generator)[:, 0]])
    return torch.stack(columns, 1)


def _prompts(contexts: Contexts, document, words) -> Prompts:
    """Prompts of `words` (prompt, state) after the end token, under the latents of `document`."""
    corpus, source, count = contexts.corpus, contexts.source, words.shape[1] + 1
    tokens = torch.cat([torch.full_like(words[:, :1], corpus.end), words], 1)
    if not contexts.state:  # one prompt for each query, whose next token is known
        followed = contexts.tokens[document, contexts.position + 1]
        gold = torch.nn.functional.one_hot(followed, corpus.vocabulary_size).double()
        return Prompts(tokens, gold, contexts.latent[document])
    maps = len(next(iter(source.maps.values())))  # as many as documents, or one for all
    token = {
        "tokens": torch.cat([words, words[:, -1:]], 1).flatten(),  # the last word is not looked at
        "place": torch.arange(count).repeat(len(words)),
        "unit": (document % maps).repeat_interleave(count),
    }
    asked = Documents(token, len(words), source.shapes, source.maps, source.habits)
    gold = predictive(corpus.grammar, asked)[count - 1 :: count]
    return Prompts(tokens, gold, contexts.latent[document])
