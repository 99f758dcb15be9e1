"""95 % percentile intervals by resampling the records of one client.

Records are drawn with replacement; a record's tokens stay together. The draws depend only on the seed and the number
of records. So two metrics, or two methods, get the same resamples of the same records. Intervals show how much a
figure depends on the choice of test records. They do not cover seeds or training.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmide.seeds import stream

FloatArray = npt.NDArray[np.float64]


Draws = npt.NDArray[np.int64]
"""Indices of drawn records, [resamples, records]."""


PERCENTILES = (2.5, 97.5)


DRAWS_AT_ONCE = 1 << 20
"""Indices in memory at a time: 8 MiB."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure on the original records, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_ratio(sums: npt.ArrayLike, counts: npt.ArrayLike, resamples: int, seed: int) -> Interval:
    """The sum of `sums` divided by the sum of `counts`, such as NLL per token, with its interval.

    Both hold one value per record. With one record both ends are the value. Raises ValueError if there are no
    records, a sum is not finite, or a count is not positive. `exp` of the ends gives the interval of a perplexity.

    >>> bootstrap_ratio([6.0], [4], resamples=100, seed=0)
    Interval(value=1.5, low=1.5, high=1.5)
    """
    numerators, denominators = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    _check(numerators, denominators, resamples)
    low, high = ends(resampled(numerators, denominators, draws(len(numerators), resamples, seed)))
    return Interval(float(numerators.sum() / denominators.sum()), low, high)


def bootstrap_mean(values: npt.ArrayLike, resamples: int, seed: int) -> Interval:
    """The mean of one value per record, with its interval.

    >>> bootstrap_mean([0.5, 0.5, 0.5], resamples=100, seed=0)
    Interval(value=0.5, low=0.5, high=0.5)
    """
    values = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(values, np.ones_like(values), resamples, seed)


def paired_bootstrap(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    counts: npt.ArrayLike | None = None,
    *,
    resamples: int,
    seed: int,
) -> Interval:
    """The first method's figure minus the second's on the same records, with its interval.

    Without `counts` the figures are the means of `first` and `second`. With `counts` they are ratios: the sum of
    `first`, or of `second`, divided by the sum of `counts`. Both share the counts, such as the tokens of the same
    responses.

    >>> paired_bootstrap([3.0, 5.0], [1.0, 3.0], resamples=100, seed=0)
    Interval(value=2.0, low=2.0, high=2.0)
    """
    minuend, subtrahend = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if minuend.shape != subtrahend.shape:
        raise ValueError(f"{minuend.shape} values are paired with {subtrahend.shape}")
    # Each resample has the same records for both, so the records' differences can be resampled.
    difference = minuend - subtrahend
    if counts is None:
        return bootstrap_mean(difference, resamples, seed)
    return bootstrap_ratio(difference, counts, resamples, seed)


def draws(num_records: int, resamples: int, seed: int, client: str = "") -> Iterator[Draws]:
    """The drawn indices of all resamples, in blocks of about `DRAWS_AT_ONCE` indices.

    Each client's name gives draws of its own. So two clients with equally many records get different resamples.
    """
    generator = stream(seed, "bootstrap", client=client)
    rows = max(1, DRAWS_AT_ONCE // num_records)
    for start in range(0, resamples, rows):
        yield generator.integers(num_records, size=(min(rows, resamples - start), num_records))


def resampled(sums: FloatArray, counts: FloatArray, drawn: Iterable[Draws]) -> FloatArray:
    """The ratio of the sums in each resample."""
    return np.concatenate([sums[each].sum(axis=1) / counts[each].sum(axis=1) for each in drawn])


def ends(values: FloatArray) -> tuple[float, float]:
    """The ends of the 95 % interval, from one value per resample."""
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)


def _check(sums: FloatArray, counts: FloatArray, resamples: int) -> None:
    if sums.ndim != 1 or sums.shape != counts.shape:
        raise ValueError(f"expected one sum and one count per record, got {sums.shape} and {counts.shape}")
    if not len(sums):
        raise ValueError("there are no records to resample")
    if not np.isfinite(sums).all():
        raise ValueError("a record's sum is not finite")
    if not (np.isfinite(counts) & (counts > 0)).all():
        raise ValueError("a record's count is not positive")
    if resamples < 1:
        raise ValueError(f"expected at least 1 resample, got {resamples}")
