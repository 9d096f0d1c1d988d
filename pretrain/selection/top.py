"""The largest values over all data-parallel ranks, without bringing them together: a radix select by counts."""

import math

import numpy as np
import torch

from parallel import accelerator, exchange, process_groups
from pretrain.loss import FIXED_POINT
from pretrain.selection import BoolArray, Float64, Int64

DIGIT = 8
"""Bits decided in one round: losses between 0 and 60 nats take four rounds of 256 counts."""


def fixed(values: Float64) -> Int64:
    """Values in whole multiples of 1/FIXED_POINT, int64[n]; what is not finite counts as the largest there is."""
    bounded = np.where(np.isfinite(values), values, 2.0**20)
    rounded: Int64 = np.rint(np.clip(bounded, -(2.0**20), 2.0**20) * FIXED_POINT).astype(np.int64)
    return rounded


def top(values: Float64, share: float) -> BoolArray:
    """`pretrain.selection.Top` over the ranks of this run."""
    whole = fixed(values)
    most, least, any_here = exchange.largest(
        [float(whole.max(initial=-(1 << 50))), -float(whole.min(initial=1 << 50)), float(len(whole) > 0)]
    )
    if not any_here:
        return np.zeros(0, np.bool_)
    above = whole + int(least)  # from 0 on
    bits = max(1, int(most + least).bit_length())
    rounds = -(-bits // DIGIT)
    found, wanted = 0, 0
    for number in reversed(range(rounds)):
        inside = above >> (DIGIT * (number + 1)) == found
        digits = above[inside] >> (DIGIT * number) & ((1 << DIGIT) - 1)
        counts = _summed(np.bincount(digits, minlength=1 << DIGIT))
        if number == rounds - 1:
            # 1e-9: a share such as 0.6 of 5 is 3, whatever its last bit says.
            wanted = max(1, math.ceil(share * int(counts.sum()) - 1e-9))
        from_top = counts[::-1].cumsum()[::-1]
        digit = int(np.flatnonzero(from_top >= wanted)[-1])
        wanted -= int(from_top[digit] - counts[digit])
        found = found << DIGIT | digit
    chosen: BoolArray = above >= found
    return chosen


def _summed(counts: Int64) -> Int64:
    tensor = torch.from_numpy(counts.astype(np.int64)).to(accelerator.device())
    summed: Int64 = process_groups.sum_over_replicas(tensor).cpu().numpy()
    return summed
