"""Who keeps the state of which parameter, where every rank keeps that of whole parameters; pure arithmetic."""

from collections.abc import Sequence


def assign_owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which of `ranks` owns each of the parameters of these `sizes`: the largest first, to who has the least so far."""
    owners, load = [0] * len(sizes), [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        owners[index] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[index]] += sizes[index]
    return owners
