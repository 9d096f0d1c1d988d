"""Few points that look like many: the least and the largest of every bucket, so that no spike is lost.

    x = 0 … 999,999, 900 buckets   →   1,800 points, in order

All arrays have one dimension and the same length; x rises (it may stand still).
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def downsample(x: Floats, y: Floats, buckets: int) -> tuple[Floats, Floats]:
    """At most 2·buckets of the points: of each equal part of x's range the least and the largest y, where they stand.

    Points that are not finite are left out; `not_finite` finds them.
    """
    finite = np.isfinite(y)
    if not finite.all():
        x, y = x[finite], y[finite]
    if len(x) <= 2 * buckets:
        return x, y
    edges = _edges(x, buckets)
    sizes = np.diff(np.append(edges, len(y)))
    of_bucket = np.repeat(np.arange(len(edges)), sizes)
    # The first place at which each bucket's extreme stands.
    chosen = []
    for extreme in (np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)):
        places = np.flatnonzero(y == extreme[of_bucket])
        buckets_hit, first = np.unique(of_bucket[places], return_index=True)
        assert len(buckets_hit) == len(edges)
        chosen.append(places[first])
    kept = np.union1d(np.union1d(*chosen), [0, len(y) - 1])
    return x[kept], y[kept]


def bucket_means(x: Floats, y: Floats, edges: Floats) -> Floats:
    """Mean of the finite y in each [edges[i], edges[i+1]), the last bucket closed; NaN where there is none."""
    finite = np.isfinite(y)
    where = np.clip(np.searchsorted(edges, x[finite], side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(where, minlength=len(edges) - 1)
    sums = np.bincount(where, weights=y[finite], minlength=len(edges) - 1)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))


def smooth(y: Floats, window: int) -> Floats:
    """Mean over `window` points around each, of as many as there are on its shorter side near the ends, so that a
    falling curve is not drawn too high; what is not finite stays as it is and counts for no other point."""
    if window <= 1 or not len(y):
        return y
    finite = np.isfinite(y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    half = min(window // 2, (len(y) - 1) // 2)
    means = np.empty_like(y)
    # Slices for all but the ends: of 10⁶ points this takes a tenth of what gathering takes.
    wide = 2 * half + 1
    means[half : len(y) - half] = (sums[wide:] - sums[:-wide]) / np.maximum(counts[wide:] - counts[:-wide], 1)
    for places in (np.arange(half), np.arange(len(y) - half, len(y))):
        reach = np.minimum(places, len(y) - 1 - places)
        begin, end = places - reach, places + reach + 1
        means[places] = (sums[end] - sums[begin]) / np.maximum(counts[end] - counts[begin], 1)
    return np.asarray(np.where(finite, means, y))


def not_finite(x: Floats, y: Floats, most: int = 100) -> list[float]:
    """Where y is not finite: the last `most` of the places."""
    return [float(place) for place in x[~np.isfinite(y)][-most:]]


def _edges(x: Floats, buckets: int) -> npt.NDArray[np.intp]:
    """First place of every bucket that is not empty."""
    bounds = np.linspace(x[0], x[-1], buckets + 1)[:-1]
    return np.unique(np.searchsorted(x, bounds, side="left"))
