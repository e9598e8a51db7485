"""The linear probe on states that hold the label, and on states that do not."""

import torch
from latentree.measure.probes import linear_probe

torch.set_num_threads(1)


def test_a_label_in_the_states_is_read_and_none_is_at_chance():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (400, 1), generator=draw).expand(400, 12).clone()
    noise = torch.randn(400, 12, 9, generator=draw)
    told = torch.nn.functional.one_hot(labels, 9) + 0.1 * noise
    at = torch.zeros(400, 12, dtype=torch.bool)
    at[:, [5, 11]] = True
    labels[~at] = -1  # what stands elsewhere is not asked
    table = linear_probe(torch.stack([told, noise]), labels, at)
    totals = table.groupby("layer")[["sum", "count"]].sum()
    assert totals["count"].tolist() == [400, 400]  # two places in 200 sequences
    share = totals["sum"] / totals["count"]
    assert share[0] == 1 and abs(share[1] - 1 / 5) < 4 * (0.16 / 400) ** 0.5


def test_a_product_of_two_symbols_is_not_read_linearly():
    """Exclusive or: both symbols tell it together, and nothing linear in them does."""
    symbols = torch.randint(2, (600, 2), generator=torch.Generator().manual_seed(0))
    label = (symbols[:, :1] != symbols[:, 1:]).long()
    both = torch.nn.functional.one_hot(symbols).flatten(1)[:, None].float()
    pair = torch.nn.functional.one_hot(symbols @ torch.tensor([2, 1]), 4)[:, None].float()
    at = torch.ones(600, 1, dtype=torch.bool)
    apart = linear_probe(both[None], label, at)
    together = linear_probe(pair[None], label, at)
    assert apart["sum"].sum() / apart["count"].sum() < 0.65
    assert together["sum"].sum() == together["count"].sum()
