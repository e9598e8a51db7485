"""What an ideal reader knows of a document's words: exact posterior frequencies under a uniformly random map.

A map gives each word of a role one of the role's ranks. Its posterior given the words seen so far is a sum over all
permutations. Words seen equally often are interchangeable, so it is enough to count how many of each kind the ranks
1, 2, ... have used up, which takes a small table instead of n! terms.
"""

import torch


def posterior_frequencies(counts, law) -> torch.Tensor:
    """E[frequency of each word | counts] (words,), float64: the exact predictive distribution of the next draw.

    `counts` (words,) says how often each word was drawn; draws are independent from `law` (words,), the frequencies by
    rank, after a uniformly random assignment of words to ranks. With kinds k of words seen c_k times, the evidence is the
    coefficient of prod_k x_k^n_k in prod_r sum_k x_k law_r^c_k; its derivative by log law_r^c_k is the expected number of
    words of kind k at rank r.
    """
    law, counts = torch.as_tensor(law, dtype=torch.float64), torch.as_tensor(counts)
    seen, kind, size = counts.unique(return_inverse=True, return_counts=True)
    order = size.argsort(
        descending=True
    )  # the largest kind needs no axis: it takes the ranks that the others leave
    log_term = (seen[order][:, None] * law.log()).requires_grad_()
    # Prices of ranks and of kinds, under which the best assignment (most seen, most frequent) weighs 1 and no term more:
    # the table stays within range however many words were seen, and the derivatives are as before.
    level, place = law.log().sort(descending=True)
    steps = counts.sort(descending=True).values[:-1] * level.diff()
    price = torch.zeros_like(law).scatter(0, place[1:], steps.cumsum(0))
    price = price + (log_term.detach() - price).max(1, keepdim=True).values
    full = size[order][1:].tolist()
    table = torch.zeros([n + 1 for n in full], dtype=torch.float64)
    table[(0,) * len(full)] = 1.0
    log_evidence = torch.zeros((), dtype=torch.float64)
    for rank in range(len(law)):
        term = (log_term[:, rank] - price[:, rank]).exp()
        longer = table * term[0]
        for axis, n in enumerate(full):
            pad = [0] * (2 * len(full))
            pad[2 * (len(full) - 1 - axis)] = 1
            longer = (
                longer + torch.nn.functional.pad(table.narrow(axis, 0, n), pad) * term[axis + 1]
            )
        scale = longer.detach().max()
        table, log_evidence = longer / scale, log_evidence + scale.log()
    (log_evidence + table[tuple(full)].log()).backward()
    by_kind = torch.empty_like(law[: len(size)]).scatter(
        0, order, log_term.grad @ law / size[order]
    )
    return by_kind[kind]
