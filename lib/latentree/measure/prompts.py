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
from latentree.exact.predictors import predictive

_FIRST_LATENT = 1_000_000  # held-out latents from here on: no other measurement has them


@dataclass
class Contexts:
    """Documents from their beginning, and the queries: places where the sentence is in the state.

    tokens (document, position) are filled up with the end token; latent (document,) numbers what
    documents share; document and position (query,) say where the state's last word stands.
    """

    corpus: Corpus
    state: list[str]
    tokens: torch.Tensor
    latent: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    source: Documents  # the corpus's own record of them

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


def contexts(corpus, state, latents, repetitions, length, shortest=0, first=0) -> Contexts:
    """`repetitions` held-out documents for each of `latents` latents, cut after `length` tokens.

    Queries stand from token `shortest` on; `first` skips latents. Of a bank there are as many
    documents in all, in the order of its latents. ValueError for a corpus without a grammar, if
    latents change within a document, or without a query.
    """
    if corpus.grammar is None:
        raise ValueError(f"{corpus.name}: has no grammar, so no roles; give a corpus with one")
    number = HELD_OUT + (_FIRST_LATENT + first) * repetitions + torch.arange(latents * repetitions)
    if corpus.grammar.file.bank:
        token = corpus.documents(number).token
        latent, order = token["latent"][token["position"] == 0].sort(stable=True)
        number = number[order]
    else:
        corpus = _sharing(corpus, repetitions)
        latent = torch.arange(latents).repeat_interleave(repetitions)
    documents = corpus.documents(number)
    token = documents.token
    row, position = token["document"], token["position"]
    sizes = torch.bincount(row)
    query = (position >= shortest) & (position < length) & (position < sizes[row] - 1)
    query &= token["place"] == len(state) - 1
    for back, role in enumerate(reversed(state)):
        query &= token["role"].roll(back) == corpus.grammar.roles.index(role)
    if not query.any():
        where = f"between tokens {shortest} and {length} of documents of {corpus.name}"
        raise ValueError(f"state = {state}: is nowhere {where}; give another or longer contexts")
    texts = documents.tokens.split(sizes.tolist())
    tokens = pad_sequence(texts, batch_first=True, padding_value=corpus.end)[:, :length]
    return Contexts(corpus, state, tokens, latent, row[query], position[query], documents)


def _sharing(corpus: GrammarProcess, repetitions: int) -> GrammarProcess:
    """The same corpus with so many documents for each latent."""
    file = corpus.grammar.file.model_dump() | {"repetitions": repetitions, "exclude_held_out": 0}
    if not set(file["redraw"]) <= {"corpus", "document"}:
        what = f"redraws latents within documents, {file['redraw']}"
        raise ValueError(f"{corpus.name}: {what}; give a grammar that redraws for whole documents")
    return GrammarProcess(Grammar(file), corpus.seed)


def same_words(contexts: Contexts) -> Prompts:
    """For each query a zero-shot prompt of its own words."""
    back = torch.arange(1 - len(contexts.state), 1)
    words = contexts.tokens[contexts.document[:, None], contexts.position[:, None] + back]
    return _prompts(contexts, contexts.document, words)


def fresh_words(contexts: Contexts, seed: int = 0, under=None) -> Prompts:
    """For each query a zero-shot prompt of words of the same roles that its context has not shown.

    They are drawn with `seed`; where all words of a role were shown, from all of them. With `under`
    (query,), numbers of queries, each is under that query's latent.
    """
    corpus, generator, drawn = contexts.corpus, torch.Generator().manual_seed(seed), []
    later = torch.arange(contexts.tokens.shape[1]) > contexts.position[:, None]
    shown = contexts.tokens[contexts.document].masked_fill(later, corpus.end)
    unseen = torch.ones(len(shown), corpus.vocabulary_size).scatter(1, shown, 1e-9)
    for role in contexts.state:
        words = torch.as_tensor(corpus.grammar.words[corpus.grammar.roles.index(role)])
        drawn.append(words[torch.multinomial(unseen[:, words], 1, generator=generator)])
    document = contexts.document if under is None else contexts.document[under]
    return _prompts(contexts, document, torch.cat(drawn, 1))


def in_context(contexts: Contexts, prompts: Prompts, length: int) -> Prompts:
    """Each query's zero-shot prompt after the `length` tokens before the query's sentence.

    ValueError if some query has fewer before it.
    """
    begin = contexts.position - len(contexts.state) + 1
    if begin.min() < length:
        has = f"a query has {int(begin.min())} tokens before its sentence"
        raise ValueError(f"length = {length}: {has}; give at most these")
    before = begin[:, None] - length + torch.arange(length)
    shown = contexts.tokens[contexts.document[:, None], before]
    return Prompts(torch.cat([shown, prompts.tokens[:, 1:]], 1), prompts.gold, prompts.latent)


def _prompts(contexts: Contexts, document, words) -> Prompts:
    """Prompts of `words` (prompt, state) after the end token, under the latents of `document`."""
    corpus, source, count = contexts.corpus, contexts.source, words.shape[1] + 1
    tokens = torch.cat([torch.full_like(words[:, :1], corpus.end), words], 1)
    maps = len(next(iter(source.maps.values())))  # as many as documents, or one for all
    token = {
        "tokens": torch.cat([words, words[:, -1:]], 1).flatten(),  # the last word is not looked at
        "place": torch.arange(count).repeat(len(words)),
        "unit": (document % maps).repeat_interleave(count),
    }
    asked = Documents(token, len(words), source.shapes, source.maps, source.habits)
    gold = predictive(corpus.grammar, asked)[count - 1 :: count]
    return Prompts(tokens, gold, contexts.latent[document])
