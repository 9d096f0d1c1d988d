"""Nearest shares within bounds, in whole units: exact, the same on every machine.

    minimise Σ (x_i − w_i)²  over  low_i ≤ x_i ≤ high_i,  Σ x_i = ONE

has the solution x_i = clip(w_i − τ, low_i, high_i) for the one τ that makes the sum right. The sum falls as τ rises, so
τ is found by halving; what whole units leave over goes to the first sources that have room for one.
"""

from collections.abc import Sequence

from data_scheduler.mixture import ONE


def project(wanted: Sequence[int], low: Sequence[int], high: Sequence[int]) -> list[int]:
    """The shares nearest to `wanted` within the bounds, all in units of 1/ONE; `wanted` sums to ONE.

    The bounds must leave room: low_i ≤ high_i, Σ low ≤ ONE ≤ Σ high.
    """
    if all(least <= share <= most for least, share, most in zip(low, wanted, high, strict=True)):
        return list(wanted)

    def clipped(shift: int) -> list[int]:
        return [min(max(share - shift, least), most) for least, share, most in zip(low, wanted, high, strict=True)]

    # The sum is at least ONE at `under`, below ONE at `over`.
    under, over = -2 * ONE, 2 * ONE
    while over - under > 1:
        middle = (under + over) // 2
        if sum(clipped(middle)) >= ONE:
            under = middle
        else:
            over = middle
    shares, next_ones = clipped(under), clipped(over)
    left = sum(shares) - ONE
    for number, following in enumerate(next_ones):
        if left and following < shares[number]:
            shares[number] -= 1
            left -= 1
    return shares
