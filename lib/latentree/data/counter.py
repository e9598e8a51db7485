"""Random numbers from counters: every draw is a pure function of integer keys.

A draw is the hash of a key, so it does not depend on what was drawn before it, in which batch, by
which process or on which device: all arithmetic is on 64-bit integers, which wrap alike everywhere.
The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators").
"""

import numpy as np
import torch

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer: the increment of SplitMix64
BITS = 52  # a uniform draw is an integer below 2**BITS


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


def thresholds(probabilities):
    """Integer cumulative thresholds (n,) with which `draw` gives index i with probability p[i]."""
    cumulative = torch.as_tensor(probabilities, dtype=torch.float64).cumsum(-1)
    limits = (cumulative / cumulative[..., -1:] * 2**BITS).round().to(torch.int64)
    return limits


def draw(limits, key):
    """Index drawn for each key from the distribution that `limits` (n,) describes."""
    return torch.searchsorted(limits, uniform(key), right=True).clamp_(max=limits.shape[-1] - 1)


def draw_rows(rows, row, key):
    """Index for each key from the distribution rows[row]; rows (n, m), `row` broadcasts to key."""
    limits = thresholds(rows)
    offset = torch.arange(len(limits))[:, None] << BITS
    flat = (limits + offset).flatten().to(key.device)
    found = torch.searchsorted(flat, uniform(key) + (row << BITS), right=True)
    return (found - row * limits.shape[1]).clamp(max=limits.shape[1] - 1)


def shuffled(key, size):
    """A uniformly random order of `size` < 2**20 items for each key: (..., size).

    Items are sorted by random numbers that carry the item in their low 20 bits. NumPy sorts rows
    several times faster than torch on a CPU; the numbers are distinct, so both give the same order.
    """
    place = torch.arange(size, device=key.device)
    tagged = subkey(key[..., None], place) & ~0xFFFFF | place
    ordered = (
        torch.from_numpy(np.sort(tagged.numpy(), -1))
        if tagged.device.type == "cpu"
        else tagged.sort(-1).values
    )
    return ordered & 0xFFFFF
