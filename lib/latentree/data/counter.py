"""Random numbers from counters: a draw is the hash of an integer key, and of nothing else.

So it is the same in any order, batch, process and on any device: 64-bit integers wrap alike
everywhere. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators").
"""

import numpy as np
import torch

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer: the increment of SplitMix64
BITS = 52  # a uniform draw is an integer below 2**BITS
MOST = 2047  # distributions whose draws lie side by side in 63 bits


def mix(key):
    """Hash integers (any shape, int64) to integers that look uniform over all 64 bits."""
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return key ^ ((key >> 31) & 0x1FFFFFFFF)


def subkey(key, index):
    """Key number `index` below `key`; both integers or int64 tensors that broadcast."""
    return mix(torch.as_tensor(key) + torch.as_tensor(index) * GOLDEN + GOLDEN)


def uniform(key):
    """Uniform integers in [0, 2**BITS) from keys."""
    return (mix(key) >> (64 - BITS)) & ((1 << BITS) - 1)


def below(count, key):
    """Uniform integers in [0, count) from keys; count <= 2**11."""
    return uniform(key) * count >> BITS


def happens(probability, key):
    """True with a probability, for each key."""
    return uniform(key) < int(probability * 2**BITS)


class Laws:
    """Distributions (n,) side by side, as integer cumulative limits; begins: where each starts."""

    def __init__(self, laws):
        if len(laws) > MOST:
            raise ValueError(f"{len(laws)} distributions to draw from: use at most {MOST}")
        limits = []
        for number, law in enumerate(laws):
            cumulative = torch.as_tensor(law, dtype=torch.float64).cumsum(0)
            limit = (cumulative / cumulative[-1] * 2**BITS).round().to(torch.int64)
            limits.append(limit + (number << BITS))
        self.limits = torch.cat(limits)
        self.begins = torch.tensor([0, *map(len, limits)]).cumsum(0)
        self._on = {}

    def draw(self, number, key):
        """Index for each key from the distribution of a number, which broadcasts to the keys."""
        if key.device not in self._on:
            self._on[key.device] = self.limits.to(key.device), self.begins.to(key.device)
        limits, begins = self._on[key.device]
        drawn = uniform(key) + (number << BITS)
        return torch.searchsorted(limits, drawn, right=True) - begins[number]


def shuffled(key, size):
    """A uniformly random order of `size` < 2**20 items for each key: (..., size).

    Items are sorted by random numbers that carry the item in their low 20 bits, all distinct.
    """
    place = torch.arange(size, device=key.device)
    tagged = subkey(key[..., None], place) & ~0xFFFFF | place
    if tagged.device.type == "cpu":  # where NumPy sorts rows several times faster than torch
        return torch.from_numpy(np.sort(tagged.numpy(), -1)) & 0xFFFFF
    return tagged.sort(-1).values & 0xFFFFF
