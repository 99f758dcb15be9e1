"""Thresholds that split a set of scores in two: Otsu's, of the scores or of their logarithms, and quantiles.

Each rule gives None if it can't split the scores: fewer than two, all equal, or one that is not finite. The rule of 256
bins also gives None if the scores are so close that their bins have the same float64 edges.

Reference: N. Otsu, A threshold selection method from gray-level histograms, IEEE Trans. SMC 9(1), 1979.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmide.config.sections import ThresholdRule

NUM_BINS = 256


def otsu_256(scores: ArrayLike) -> float | None:
    """Otsu's threshold as the published method computes it: the left edge of the best of 256 bins.

    As published, probabilities and their sums are float32, and class means are of the bins' left edges. All bins of a
    gap are equally good except for rounding, so float64 would split some sets elsewhere.

    Two weaknesses follow, and `otsu_exact` has neither. The left edge can be the lowest score itself, if the best cut
    lies within the first bin; then no record is below it. Float32 sums can end just below 1, so scores that all lie
    within about 1e-4 of each other are not split sensibly.

    >>> otsu_256([0.0, 0.1, 1.0, 1.2])
    0.0984375
    """
    values = _usable(scores)
    if values is None:
        return None
    edges = np.linspace(values.min(), values.max(), NUM_BINS + 1)
    if not (edges[:-1] < edges[1:]).all():
        return None
    unit = np.frexp(np.abs(values).max())[1]  # a power of two: exact, and squares can't overflow
    counts, scaled_edges = np.histogram(np.ldexp(values, -unit), bins=NUM_BINS)
    probability = counts.astype(np.float32) / np.float32(counts.sum())
    below = np.cumsum(probability)
    moment = np.cumsum(probability * scaled_edges[:-1])
    between = np.full(NUM_BINS, -np.inf)
    inner = (below > 0) & (below < 1)
    weight = below[inner]
    mean_below = moment[inner] / weight
    mean_above = (moment[-1] - moment[inner]) / (1 - weight)
    between[inner] = weight * (1 - weight) * (mean_below - mean_above) ** 2
    return float(edges[np.argmax(between)])


def otsu_exact(scores: ArrayLike) -> float | None:
    """The middle of the cut of the sorted scores that maximizes the variance between the two classes.

    >>> otsu_exact([0.0, 0.0, 1.0, 1.0])
    0.5
    """
    values = _usable(scores)
    if values is None:
        return None
    ordered = np.sort(values)
    num_below = np.arange(1, len(ordered))
    sums = np.cumsum((ordered - ordered[0]) / (ordered[-1] - ordered[0]))
    mean_below = sums[:-1] / num_below
    mean_above = (sums[-1] - sums[:-1]) / (len(ordered) - num_below)
    between = num_below * (len(ordered) - num_below) * (mean_below - mean_above) ** 2
    between[ordered[1:] == ordered[:-1]] = -np.inf  # equal scores can't be split
    cut = int(np.argmax(between))
    lowest_above = np.nextafter(ordered[cut], ordered[cut + 1])  # the middle of two adjacent floats is one of them
    return float(max(lowest_above, ordered[cut] + (ordered[cut + 1] - ordered[cut]) / 2))


def otsu_log(scores: ArrayLike) -> float | None:
    """Otsu's exact threshold of the scores' logarithms, as a score: a long right tail does not pull it up.

    None also if a score is not positive.

    >>> round(otsu_log([0.01, 0.01, 1.0, 1.0]), 9)
    0.1
    """
    values = _usable(scores)
    if values is None or values.min() <= 0:
        return None
    logs = np.log(values)
    cut = otsu_exact(logs)
    if cut is None:
        return None
    lowest_above = np.nextafter(values[logs < cut].max(), np.inf)  # exp may round past the next score
    return float(np.clip(np.exp(cut), lowest_above, values[logs >= cut].min()))


def quantile(part: float, scores: ArrayLike) -> float | None:
    """The threshold that makes about this fraction of the records shared, whatever their scores.

    >>> quantile(0.5, [3.0, 1.0, 2.0])
    2.0
    """
    values = _usable(scores)
    # not np.median, which adds two scores and so can overflow
    return None if values is None else float(np.quantile(values, part))


RULES: Mapping[ThresholdRule, Callable[[ArrayLike], float | None]] = MappingProxyType(
    {
        "otsu-256": otsu_256,
        "otsu-exact": otsu_exact,
        "otsu-log": otsu_log,
        "lower-quartile": partial(quantile, 0.25),
        "median": partial(quantile, 0.5),
        "upper-quartile": partial(quantile, 0.75),
    }
)
"""The rules that use the scores, by their names in the configuration."""


def _usable(scores: ArrayLike) -> NDArray[np.float64] | None:
    values = np.asarray(scores, dtype=np.float64)
    if values.size < 2 or not np.isfinite(values).all() or values.min() == values.max():
        return None
    return values
