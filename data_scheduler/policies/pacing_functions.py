"""Pacing functions: how much of the data is open, easiest part first, as training goes on.

Each takes x, the part of the pacing that is over (0 ≤ x < 1), and b, what is open at its beginning (0 < b ≤ 1), and
gives the part c of the data that is open, 0 < c ≤ 1. At x = 1 all is open, but for `constant`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal

Function = Literal["constant", "linear", "root", "step", "geometric", "cyclical"]


def constant(x: float, b: float) -> float:
    """c = b: the same part all the time; with b = 1 no curriculum, the baseline."""
    return b


def linear(x: float, b: float) -> float:
    """c = b + (1 − b)·x (Platanios et al. 2019, arXiv 1903.09848, section 3.2)."""
    return b + (1 - b) * x


def root(x: float, b: float, exponent: float) -> float:
    """c = (b^p + (1 − b^p)·x)^(1/p): the more is open, the slower more is opened, so that new data gets less time the
    less of a part of all it is. p = 2 is the square root of Platanios et al. 2019 (arXiv 1903.09848, section 3.2), the
    best of theirs; p = 1 is `linear`; 0 < p < 1 begins slowly.
    """
    return float((b**exponent + (1 - b**exponent) * x) ** (1 / exponent))


def step(x: float, b: float, levels: int) -> float:
    """c = b + (1 − b)·⌊n·x⌋/(n − 1): n levels of equal time; with n = 2 the single step of Hacohen and Weinshall 2019
    (arXiv 1904.03626)."""
    return b + (1 - b) * math.floor(levels * x) / (levels - 1)


def band_by_band(x: float, ends: Sequence[float]) -> float:
    """c = s_k, k = 1 + ⌊K·x⌋, of K bands that end at s_1 … s_K: a band more each time, whatever their sizes. The Baby
    Steps of Spitkovsky et al. 2010 (NAACL); with replay 0 a band at a time, as in Bengio et al. 2009 (ICML)."""
    return ends[math.floor(len(ends) * x)]


def geometric(x: float, b: float) -> float:
    """c = b^(1 − x): multiplied by the same factor in equal times. The geometric progression of Penha and Hauff 2020
    (arXiv 1912.08555), and without its steps the exponential pacing of Hacohen and Weinshall 2019 (arXiv 1904.03626).
    """
    return float(b ** (1 - x))


def cyclical(x: float, b: float, cycles: float) -> float:
    """c = b^(1 − z), z = 1 − |1 − 2·(m·x mod 1)|: up to all the data and back, m times, by the same factor in equal
    times. Cyclical Curriculum Learning (Kesgin and Amasyali 2022, arXiv 2202.05531) multiplies by 1/α until all is
    open, then by α until b is; here without its steps, and from the easiest part itself, where theirs draws samples by
    their scores.
    """
    phase = (cycles * x) % 1.0
    return geometric(1 - abs(1 - 2 * phase), b)


PLAIN: Final[dict[str, Callable[[float, float], float]]] = {
    "constant": constant, "linear": linear, "geometric": geometric,
}  # fmt: skip
"""Those without an option of their own."""
