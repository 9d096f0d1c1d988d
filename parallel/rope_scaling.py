"""Frequencies of a rotary embedding that was made for shorter sequences, stretched to longer ones.

The pair of dimensions 2i, 2i + 1 of a head of size d turns by θᵢ = base^(−2i/d) a position: the first pairs tell near
tokens apart, the last ones turn less than once over the length L that the model was trained with, and were never seen
beyond. With a factor s, so that s·L positions can be told apart:

    linear   θᵢ / s: all pairs are slowed down (position interpolation, arXiv 2306.15595, equation 4)
    ntk      base' = base · s^(d / (d − 2)): the first pair as it was, the last θ / s (arXiv 2309.00071, definition 1)
    yarn     θᵢ where a pair turns more than `beta_fast` times in L, θᵢ / s where less than `beta_slow` times, a mix in
             between; cosines and sines are 0.1 · ln s + 1 times as large, so that attention stays as sharp as it was
             (arXiv 2309.00071, definition 3 and equation 22; the mix is linear in i between whole dimensions, as in the
             authors' code and in transformers, and not in the number of turns)
    llama3   likewise by turns in L, `low_freq_factor` and `high_freq_factor`, the mix linear in the turns; attention is
             left alone (Llama 3.1's code)
"""

import math
from typing import Literal, NamedTuple

import torch

Kind = Literal["linear", "ntk", "yarn", "llama3"]


class RopeScaling(NamedTuple):
    """How frequencies are stretched; hashable."""

    kind: Kind
    factor: float
    """s: how many times longer."""
    original_seq_len: int = 0
    """L: the length that the model was made for; `yarn` and `llama3`."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """`yarn`"""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """`llama3`"""
    attention_factor: float | None = None
    """Of cosines and sines, in the place of YaRN's own."""


def scaled_base(base: float, head_size: int, factor: float) -> float:
    """The base of `ntk`: its rotary embedding is a plain one of this base."""
    if head_size == 2:  # a single pair, which stays as it was
        return base
    return base * float(factor ** (head_size / (head_size - 2)))


def scaled_frequencies(base: float, head_size: int, scaling: RopeScaling, device: torch.device) -> torch.Tensor:
    """Angle per position of each pair of dimensions, float32[head_size / 2]."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    if scaling.kind == "ntk":
        stretched: torch.Tensor = scaled_base(base, head_size, scaling.factor) ** -exponents
        return stretched
    plain = base**-exponents
    slowed = plain / scaling.factor
    if scaling.kind == "linear":
        return slowed
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_seq_len * plain / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    else:
        first = math.floor(_pair_that_turns(scaling.beta_fast, base, head_size, scaling.original_seq_len))
        last = math.ceil(_pair_that_turns(scaling.beta_slow, base, head_size, scaling.original_seq_len))
        first, last = max(first, 0), min(last, head_size - 1)
        pairs = torch.arange(head_size // 2, dtype=torch.float32, device=device)
        kept = 1.0 - ((pairs - first) / (last - first if last != first else 0.001)).clamp(0.0, 1.0)
    return slowed * (1.0 - kept) + plain * kept


def attention_factor(scaling: RopeScaling) -> float:
    """Factor of cosines and sines; attention scores are its square times as large."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.kind == "yarn" and scaling.factor > 1.0 else 1.0


def _pair_that_turns(times: float, base: float, head_size: int, length: int) -> float:
    """The (fractional) pair of dimensions that turns so many times within `length` positions."""
    return head_size * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))
