"""Looking up, and counting by role: two scores that a fake of the other fails.

A grammar's habits bind a word (the child) to another word of its sentence (its parent). Where the
one of such a pair stands before the next word, which is the other, the LOOK-UP is the attention to
the earlier words of the next word's role that were in a pair with the same word in this document:
there the answer stands, if it stands anywhere. Words of that role in a pair with another word are
its DECOYS. The ROLE BAG is the attention to all earlier words of the role that comes next: what a
head needs that counts how frequent each word is.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import pandas as pd
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from latentree.data.corpus import held_out
from latentree.evidence.intervals import ratio
from latentree.measure.induction import attended, best_row, head_rows


@dataclass
class LookUps:
    """Where looking up should attend, in tokens (sequence, position).

    - kinds: names by the roles from the word that is looked up to the next one: "verb to object",
      past a word in between "verb past subject to object", and from a child to its parent, the
      inverse, "verb to subject".
    - kind (sequence, query): the number of the query's kind, -1 where there is nothing to look up.
    - match, decoy, stale (sequence, query, key): keys that were in a pair with the same word, with
      another, or with the same word under latents that no longer hold.
    - bag (sequence, query, key): the earlier words of the next word's role, in its document.
    - stands (sequence, query): whether the next word is one of those that match.
    - document (sequence, position): the number of each token's document.
    """

    tokens: torch.Tensor
    kinds: list[str]
    kind: torch.Tensor
    match: torch.Tensor
    decoy: torch.Tensor
    stale: torch.Tensor
    bag: torch.Tensor
    stands: torch.Tensor
    document: torch.Tensor

    @cached_property
    def targets(self) -> tuple:
        """Match, decoy and bag, then those of another sequence, and how many keys each has.

        (sequence, query, key, 6), booleans, and (sequence, query, 6).
        """
        own = torch.stack([self.match, self.decoy, self.bag], -1)
        both = torch.cat([own, own.roll(1, 0)], -1)
        return both, both.sum(2)


def look_ups(corpus, sequences: int, context: int, grammar=None) -> LookUps:
    """The look-ups in held-out sequences of a corpus.

    The derivation of its text says which words are pairs. A corpus without derivations (a chain) is
    read by another's `grammar`: neighbours are a pair where their roles fit. Without any grammar
    each word and the one before are a pair, and all words are of one role.
    """
    grammar = corpus.grammar or grammar
    annotate = partial(_pairs, grammar=grammar, callers=corpus.callers)
    rows = held_out(corpus, sequences, context, annotate=annotate)
    tokens, role, document = rows["tokens"], rows["role"], rows["document"]
    alive = rows.get("alive", document)  # whose latents: a role's own, or the document's
    place, names, kind = torch.arange(context), [], torch.full_like(tokens, -1)

    def same(field):  # of the word after the query, and of the key
        return field.roll(-1, 1)[:, :, None] == field[:, None]

    of_role = torch.ones(context, context, dtype=torch.bool).tril() & same(role)
    of_role[:, -1] = False  # nothing comes after the last word
    bag, fresh = of_role & same(document), same(alive)
    match, decoy, stale = (torch.zeros_like(bag) for _ in range(3))
    for field in [name for name in rows if name.startswith("pair")]:
        other = place + rows[field]  # where the other one of the pair stands
        paired = (other != place) & (other >= 0) & (other < context)
        word = tokens.gather(1, other.clamp(0, context - 1))
        asked, queries = paired & (other < place), {}
        for sequence, last in asked.nonzero().tolist():
            path = role[sequence, int(other[sequence, last]) : last + 1]  # from one to the other
            queries.setdefault(tuple(path.tolist()), []).append((sequence, last - 1))
        for path in sorted(queries):
            kind[tuple(torch.tensor(queries[path]).T)] = len(names)
            names.append(_told(grammar, path))
        seen = paired[:, None] & (other[:, None] <= place[:, None])  # both words of the key's pair
        keys = of_role & seen & asked.roll(-1, 1)[:, :, None]
        match |= keys & fresh & same(word)
        decoy |= keys & fresh & ~same(word)
        stale |= keys & ~fresh & same(word)
    stands = (match & same(tokens)).any(2)
    return LookUps(tokens, names, kind, match, decoy, stale, bag, stands, document)


def _told(grammar, path) -> str:
    if grammar is None:
        return "word to word"
    first, *between, last = [grammar.roles[number] for number in path]
    return f"{first}{''.join(f' past {word}' for word in between)} to {last}"


@torch.no_grad()
def measure(model, look_ups: LookUps, rows: int = 32) -> pd.DataFrame:
    """Every head's look-up and role bag, and the losses, for each kind and for `all`.

    Columns kind, score, variant, layer, head, value, low, high (95 %, sequences), null and queries.

    - look-up, role bag: attention on the targets, over queries that have some; variants `head`,
      and `best`, by `choose_and_score`. The null is the larger of two: a head that attends evenly,
      and what the same head pays to another sequence's targets, which its places alone explain.
    - decoys: what a head pays to a decoy over what it pays to a match, per key, over queries that
      have both: 1 is a head that cannot tell them apart.
    - loss, nats: variants `stands` (the next word is among the matches), `matched`, `unmatched`.

    Every corpus has the kind `all` with the role bag; the rest is there if words are pairs.
    """
    masks, keys = look_ups.targets

    def paid_to(part, probabilities):
        on = masks[part].to(probabilities.device, torch.float32)
        return torch.einsum("bhqk,bqkt->bqth", probabilities.float(), on).double()

    paid, losses = attended(model, look_ups.tokens, paid_to, rows)
    losses, heads = pad(losses, (0, 1)), model.config.num_attention_heads
    kinds = {kind: look_ups.kind == number for number, kind in enumerate(look_ups.kinds)}
    if kinds:
        kinds["all"] = look_ups.kind >= 0
    every = torch.ones_like(look_ups.kind, dtype=torch.bool)
    tables = [_scored("role bag", paid[:, :, 2::3], keys[..., 2::3], every, heads)]
    tables[0]["kind"] = "all"
    for kind, here in kinds.items():
        look_up = _scored("look-up", paid[:, :, 0::3], keys[..., 0::3], here, heads)
        of_kind = look_up, _decoys(paid, keys, here, heads), _losses(losses, look_ups, here)
        tables += [table.assign(kind=kind) for table in of_kind]
    first = ["kind", "score", "variant", "layer", "head", "value", "low", "high"]
    return pd.concat(tables, ignore_index=True)[[*first, "null", "queries"]]


def of_keys(keys, look_ups: LookUps) -> dict:
    """The scores of a head that attends evenly to its keys ((sequence,) query, key), booleans.

    look-up, decoys (over matches, per key), role bag, and role bag elsewhere: on the role bags of
    another sequence. NaN for the decoys of a head that never attends to a match.
    """
    match, decoy, bag = look_ups.match, look_ups.decoy, look_ups.bag
    pattern, both = _evenly(keys.expand_as(match)), match.any(2) & decoy.any(2)

    def per_key(targets):
        return ((pattern * targets).sum(2) / targets.sum(2).clamp(min=1))[both].mean()

    scores = {"look-up": _paid(pattern, match), "decoys": per_key(decoy) / per_key(match)}
    scores["role bag"] = _paid(pattern, bag)
    scores["role bag elsewhere"] = _paid(pattern, bag.roll(1, 0))
    return {name: float(score) for name, score in scores.items()}


def perfect(look_ups: LookUps) -> dict:
    """What a perfect head has beyond another sequence's targets, {score: share}, for each score."""
    targets = {"look-up": look_ups.match, "role bag": look_ups.bag}
    reach = {score: 1 - float(_paid(_evenly(on), on.roll(1, 0))) for score, on in targets.items()}
    return {score: share for score, share in reach.items() if targets[score].any()}


def _evenly(keys):
    """Even attention (sequence, query, key) to some keys."""
    return keys.double() / keys.sum(2, keepdim=True).clamp(min=1)


def _paid(pattern, targets):
    """Mean attention to targets over the queries that have some."""
    return (pattern * targets).sum(2)[targets.any(2)].mean()


def _scored(score, paid, keys, here, heads) -> pd.DataFrame:
    """Rows of one score: paid (sequence, query, own or another's, head), keys without heads."""
    here = torch.stack([here, here.roll(1, 0)], -1) & (keys > 0)
    sums, counts = (paid * here[..., None]).sum(1), here.sum(1)
    own, count = sums[:, 0], counts[:, 0]
    even = keys[..., 0] / torch.arange(1, keys.shape[1] + 1)
    null = (sums[:, 1].sum(0) / counts[:, 1].sum()).clamp(min=float(even[here[..., 0]].mean()))
    each = torch.stack(ratio(own, count[:, None]))
    table = head_rows(each, heads, score=score, null=null.numpy(), queries=int(count.sum()))
    return pd.concat([table, best_row(table, int(each[0].argmax()), own, count)])


def _decoys(paid, keys, here, heads) -> pd.DataFrame:
    """Rows of decoys over matches, per key."""
    both = here & (keys[..., :2] > 0).all(-1)
    per_key = paid[:, :, :2] / keys[..., :2, None].clamp(min=1)
    match, decoy = (per_key * both[..., None, None]).sum(1).unbind(1)
    about = {"score": "decoys", "null": 1.0, "queries": int(both.sum())}
    return head_rows(torch.stack(ratio(decoy, match)), heads, **about)


def _losses(losses, look_ups, here) -> pd.DataFrame:
    """Rows of the loss where the answer stands, where there is a match, and where there is none."""
    matched = look_ups.match.any(2)
    cases = {"stands": look_ups.stands, "matched": matched, "unmatched": ~matched}
    rows = []
    for name, where in cases.items():
        where = here & where
        interval = ratio((losses * where).sum(1), where.sum(1))
        rows.append([name, *map(float, interval), int(where.sum())])
    table = pd.DataFrame(rows, columns=["variant", "value", "low", "high", "queries"])
    return table.assign(score="loss", layer=-1, head=-1, null=float("nan"))


def _pairs(documents, grammar, callers=None) -> dict:
    """Each token's role, and by habit how far off the other one of its pair is; 0 without one."""
    token, tokens = documents.token, documents.tokens
    if grammar is None:
        called = token["position"] > 0
        if callers is not None:
            called &= tokens.roll(1) < callers
        return {"role": torch.zeros_like(tokens), "pair0": -called.long()}
    role, number = torch.as_tensor(grammar.role_of)[tokens], list(grammar.roles).index
    fields = {"role": role}
    for at, (child, parent) in enumerate(grammar.file.habits.items()):
        if documents.shapes:
            offsets = pad_sequence([_offsets(shape, child) for shape in documents.shapes], True)
            fields[f"pair{at}"] = offsets[token["shape"], token["place"]]
        else:
            fits = (role == number(child)) & (role.roll(1) == number(parent))
            fits &= token["position"] > 0
            fields[f"pair{at}"] = fits.roll(-1).long() - fits.long()
    return fields if grammar.file.binding else {"role": role}


def _offsets(shape, child: str) -> torch.Tensor:
    """For each place of a Shape: how far the other one of its pair stands, in pairs of a child."""
    offsets = torch.zeros(len(shape.roles), dtype=torch.int64)
    for place, parent in enumerate(shape.binds_to):
        if shape.roles[place] == child and parent >= 0:
            offsets[place] = parent - place
            offsets[parent] = place - parent
    return offsets
