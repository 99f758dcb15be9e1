"""By how much one adapter explains a client's test records better than another, paired on the same records.

A gain is in nats per response token and above 0 where the second adapter is the better one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmide.evaluation.intervals import PERCENTILES, Interval, paired_bootstrap
from fedmide.seeds import stream

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measures:
    """The response NLL (nats, NaN where it is no number) and tokens of a client's test records, by record id."""

    record_ids: tuple[str, ...]
    nll_sums: FloatArray
    num_tokens: FloatArray

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measures":
        """Out of what a client's evaluation file holds."""
        sums = [np.nan if value is None else value for value in values["nll_sums"]]
        return cls(tuple(values["record_ids"]), np.array(sums, float), np.array(values["num_tokens"], float))


@dataclass(frozen=True, eq=False)
class Pair:
    """The sums of the same records under two adapters, and their tokens; all finite."""

    first: FloatArray
    second: FloatArray
    num_tokens: FloatArray

    def gain(self) -> float:
        """By how much the second is lower, in nats per token."""
        return float((self.first - self.second).sum() / self.num_tokens.sum())


def pair(first: Measures, second: Measures) -> Pair | None:
    """The records that both measured, by id; None where there are none, or where a record's tokens differ."""
    place = {record: index for index, record in enumerate(second.record_ids)}
    common = [(index, place[record]) for index, record in enumerate(first.record_ids) if record in place]
    ours, theirs = np.array(common, dtype=np.int64).reshape(-1, 2).T
    sums, others = first.nll_sums[ours], second.nll_sums[theirs]
    tokens = first.num_tokens[ours]
    if len(tokens) == 0 or (tokens != second.num_tokens[theirs]).any():
        return None
    finite = np.isfinite(sums) & np.isfinite(others)
    return Pair(sums[finite], others[finite], tokens[finite]) if finite.any() else None


def client_gain(first: Measures | None, second: Measures | None, resamples: int, seed: int) -> Interval | None:
    """One client's gain with its 95 % interval over records."""
    paired = pair(first, second) if first is not None and second is not None else None
    if paired is None:
        return None
    return paired_bootstrap(paired.first, paired.second, paired.num_tokens, resamples=resamples, seed=seed)


def mean_gain(clients: Mapping[str, tuple[Measures, Measures]], resamples: int, seed: int) -> Interval | None:
    """The unweighted mean of the clients' gains, with its 95 % interval.

    The records of each client are resampled by its own stream; the clients are all there are and are not resampled.
    """
    pairs = {name: paired for name, sides in clients.items() if (paired := pair(*sides))}
    if not pairs:
        return None
    draws = np.mean([_resampled(paired, name, resamples, seed) for name, paired in pairs.items()], axis=0)
    low, high = np.percentile(draws, PERCENTILES)
    return Interval(float(np.mean([paired.gain() for paired in pairs.values()])), float(low), float(high))


def _resampled(paired: Pair, client: str, resamples: int, seed: int) -> FloatArray:
    """The client's gain in each resample of its records."""
    generator = stream(seed, "bootstrap", client=client)
    differences, count = paired.first - paired.second, len(paired.num_tokens)
    gains = np.empty(resamples)
    for number in range(resamples):
        drawn = generator.integers(count, size=count)
        gains[number] = differences[drawn].sum() / paired.num_tokens[drawn].sum()
    return gains
