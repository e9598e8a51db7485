"""Looking up what a parent word called for: the score that asks a head for exactly that.

A grammar's habits bind a word (the child) to another word of its sentence (its parent). Where the
next word has a parent, its look-up is the attention to the earlier words of the child's role that
had the same parent word in this document: there the answer stands, if it stands anywhere. Words of
the same role with another parent are its decoys; a head that knows only roles and places attends to
both alike.
"""

from dataclasses import dataclass

import pandas as pd
import torch

from latentree.data.corpus import held_out
from latentree.evidence.intervals import ratio
from latentree.inside.attention import attention
from latentree.measure.induction import choose_and_score
from latentree.train.model import next_token_losses


@dataclass
class LookUps:
    """Where looking up should attend, in tokens (sequence, position).

    - kinds: names, "verb to object" or, past a word in between, "verb past subject to object".
    - kind (sequence, query): the number of the query's kind, -1 where the next word has no parent.
    - match, decoy (sequence, query, key): the keys whose parent was the same word, or another.
    - stands (sequence, query): whether the next word is one of those that match.
    """

    tokens: torch.Tensor
    kinds: list[str]
    kind: torch.Tensor
    match: torch.Tensor
    decoy: torch.Tensor
    stands: torch.Tensor


def look_ups(corpus, sequences: int, context: int) -> LookUps:
    """The look-ups in held-out sequences of a corpus whose grammar has habits.

    Raises ValueError if it has none.
    """
    grammar = corpus.grammar
    if grammar is None or not grammar.file.binding:
        raise ValueError(f"corpus {corpus.name}: no word calls for another; choose one with habits")
    rows = held_out(corpus, sequences, context, annotate=_parents)
    tokens, role, back = rows["tokens"], rows["role"], rows["back"]
    place = torch.arange(context)
    parent = (place - back).clamp(min=0)
    parent_word = tokens.gather(1, parent)
    bound = (back > 0) & (place >= back)  # the parent comes before its child

    names, kind = [], torch.full_like(tokens, -1)
    for child in range(len(grammar.roles)):
        for distance in back[bound & (role == child)].unique().tolist():
            here = bound & (role == child) & (back == distance)
            sequence, position = here.nonzero()[0].tolist()
            path = role[sequence, position - distance : position + 1].tolist()
            first, *between, last = [grammar.roles[number] for number in path]
            kind[:, :-1][here[:, 1:]] = len(names)
            names.append(f"{first}{''.join(f' past {word}' for word in between)} to {last}")

    def same(field):  # of the word after the query, and of the key
        return field.roll(-1, 1)[:, :, None] == field[:, None]

    earlier = torch.ones(context, context, dtype=torch.bool).tril()
    keys = earlier & (kind >= 0)[:, :, None] & bound[:, None] & same(role) & same(rows["document"])
    match, decoy = keys & same(parent_word), keys & ~same(parent_word)
    return LookUps(tokens, names, kind, match, decoy, (match & same(tokens)).any(2))


@torch.no_grad()
def measure(model, look_ups: LookUps, rows: int = 32) -> pd.DataFrame:
    """Every head's look-up and the losses, for each kind and for `all`.

    Columns kind, score, variant, layer, head, value, low, high (95 % over sequences), queries.

    - look-up: attention on the matches, over queries that have some; variant `head`, and `best`:
      of the best head, chosen on one half of the sequences and scored on the other, both ways.
    - chance: of a head that attends evenly. decoys: what is paid to a decoy, over what is paid to a
      match, per key, over queries that have both (a ratio: 1 is a head that cannot tell them apart).
    - loss, nats: variants `stands` (the next word is among the matches), `matched`, `unmatched`.
    """
    match, decoy = look_ups.match.double(), look_ups.decoy.double()
    parts, losses = [], []
    for first in range(0, len(look_ups.tokens), rows):
        chosen, found = slice(first, first + rows), []
        on = torch.stack([match[chosen], decoy[chosen]], -1)

        def see(layer, probabilities):
            found.append(torch.einsum("bhqk,bqkt->bqht", probabilities.double().cpu(), on))

        tokens = look_ups.tokens[chosen].to(model.device)
        with attention(model, see):
            logits = model(input_ids=tokens, use_cache=False).logits
        parts.append(torch.cat(found, 2))
        losses.append(next_token_losses(logits, tokens).double().cpu())
    paid, losses = torch.cat(parts), torch.nn.functional.pad(torch.cat(losses), (0, 1))
    tables = []
    for number, name in [*enumerate(look_ups.kinds), (-1, "all")]:
        here = look_ups.kind == number if number >= 0 else look_ups.kind >= 0
        tables.append(_rows_of(here, look_ups, paid, losses, model).assign(kind=name))
    table = pd.concat(tables, ignore_index=True)
    return table[["kind", "score", "variant", "layer", "head", "value", "low", "high", "queries"]]


def _rows_of(here, look_ups, paid, losses, model):
    """The rows of queries `here`; paid (sequence, query, head, match or decoy)."""
    matches, decoys = look_ups.match.sum(2), look_ups.decoy.sum(2)
    matched, both = here & (matches > 0), here & (matches > 0) & (decoys > 0)
    heads, found = model.config.num_attention_heads, []

    def add(score, variant, head, interval, queries):
        layer, head = divmod(head, heads) if head >= 0 else (-1, -1)
        value, low, high = (float(x) for x in interval)
        place = {"score": score, "variant": variant, "layer": layer, "head": head}
        found.append(place | {"value": value, "low": low, "high": high, "queries": int(queries)})

    counts = matched.sum(1)
    sums = (paid[..., 0] * matched[..., None]).sum(1)
    each = torch.stack(ratio(sums, counts[:, None]))
    per_key = paid / torch.stack([matches, decoys], -1).clamp(min=1)[:, :, None]
    per_key = (per_key * both[..., None, None]).sum(1)
    contrast = torch.stack(ratio(per_key[..., 1], per_key[..., 0]))
    for head in range(each.shape[1]):
        add("look-up", "head", head, each[:, head], counts.sum())
        add("decoys", "head", head, contrast[:, head], both.sum())
    *interval, chosen = choose_and_score(sums, counts)
    best = int(each[0].argmax())
    add("look-up", "best", best, interval, counts.sum())
    even = matches / torch.arange(1, matches.shape[1] + 1)
    add("chance", "model", -1, ratio((even * matched).sum(1), counts), counts.sum())
    cases = {"stands": here & look_ups.stands, "matched": matched, "unmatched": here & ~matched}
    for name, where in cases.items():
        interval = ratio((losses * where).sum(1), where.sum(1))
        add("loss", name, -1, interval, where.sum())
    return pd.DataFrame(found)


def _parents(documents):
    """How many tokens before each one its parent stands; 0 if it has none, or a later one."""
    longest = max(len(shape.roles) for shape in documents.shapes)
    bindings = torch.full((len(documents.shapes), longest), -1)
    for number, shape in enumerate(documents.shapes):
        bindings[number, : len(shape.roles)] = torch.tensor(shape.binds_to)
    place = documents.token["place"]
    parent = bindings[documents.token["shape"], place]
    return {"back": (place - parent).clamp(min=0) * (parent >= 0)}
