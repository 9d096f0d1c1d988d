"""Nearest shares within bounds, in whole units: exact, the same on every machine.

    minimise Σ (x_i − w_i)²  over  low_i ≤ x_i ≤ high_i,  Σ x_i = ONE

has the solution x_i = clip(w_i − τ, low_i, high_i) for the one τ that makes the sum right. As τ rises x_i stays at its
upper bound, falls with τ, then stays at its lower one; so the sum falls in straight pieces, and τ is found by going
through their ends in order. What whole units leave over is taken from the first sources that are between their bounds.
"""

from collections.abc import Sequence

from data_scheduler.mixture import ONE


def project(wanted: Sequence[int], low: Sequence[int], high: Sequence[int]) -> list[int]:
    """The shares nearest to `wanted` within the bounds, all in units of 1/ONE; `wanted` sums to ONE.

    The bounds must leave room: low_i ≤ high_i, Σ low ≤ ONE ≤ Σ high.
    """
    if all(least <= share <= most for least, share, most in zip(low, wanted, high, strict=True)):
        return list(wanted)

    ends = sorted(
        [(share - most, 1) for share, most in zip(wanted, high, strict=True)]
        + [(share - least, -1) for share, least in zip(wanted, low, strict=True)]
    )
    over, moving, shift = sum(high) - ONE, 0, ends[0][0]
    for end, change in ends:
        if over < moving * (end - shift):
            break
        over -= moving * (end - shift)
        moving, shift = moving + change, end
    # From here the sum falls by `moving` a unit; the last whole unit at which it is not below ONE:
    shift += over // moving if moving else 0
    shares = [min(max(share - shift, least), most) for least, share, most in zip(low, wanted, high, strict=True)]
    left = sum(shares) - ONE
    for number, (least, share, most) in enumerate(zip(low, wanted, high, strict=True)):
        if left and least < shares[number] and share - shift <= most:
            shares[number] -= 1
            left -= 1
    return shares
