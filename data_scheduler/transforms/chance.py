"""Yes or no from a random number, the same on every machine."""

import numpy as np
import numpy.typing as npt

BITS = 53
"""Of a 64-bit number, those compared; a float64 holds so many exactly."""


def is_drawn(draw: np.uint64, rate: float) -> bool:
    """Whether something that happens with probability `rate` happens; never at 0, always at 1."""
    return float(int(draw) >> (64 - BITS)) < rate * float(2**BITS)


def are_drawn(draws: npt.NDArray[np.uint64], rate: float) -> npt.NDArray[np.bool_]:
    """`is_drawn` of each, bool[n]."""
    drawn: npt.NDArray[np.bool_] = (draws >> np.uint64(64 - BITS)) < rate * 2**BITS
    return drawn
