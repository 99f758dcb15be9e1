"""Changes of a client's NLL from one adapter to another, paired on the same test records.

A change is second minus first, in nats per response token. Below 0 the second adapter is better.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmide.evaluation.intervals import FloatArray, Interval, draws, ends, paired_bootstrap, resampled


@dataclass(frozen=True, eq=False)
class ResponseNlls:
    """Response NLL (nats; NaN if not finite) and tokens of a client's test records, by record id."""

    record_ids: tuple[str, ...]
    nll_sums: FloatArray
    num_tokens: FloatArray

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ResponseNlls":
        """Reads the values of a client's evaluation file."""
        sums = [np.nan if value is None else value for value in values["nll_sums"]]
        return cls(tuple(values["record_ids"]), np.array(sums, float), np.array(values["num_tokens"], float))


@dataclass(frozen=True, eq=False)
class Pair:
    """NLL sums of the same records under two adapters, and their tokens. All are finite."""

    first: FloatArray
    second: FloatArray
    num_tokens: FloatArray

    def change(self) -> float:
        """Second minus first, in nats per token."""
        return float((self.second - self.first).sum() / self.num_tokens.sum())


def pair(first: ResponseNlls, second: ResponseNlls) -> Pair | None:
    """The records that were measured under both adapters, by id, without those whose NLL is not finite.

    None if no record is left, or if a record's number of tokens differs.
    """
    place = {record: index for index, record in enumerate(second.record_ids)}
    common = [(index, place[record]) for index, record in enumerate(first.record_ids) if record in place]
    ours, theirs = np.array(common, dtype=np.int64).reshape(-1, 2).T
    sums, others = first.nll_sums[ours], second.nll_sums[theirs]
    tokens = first.num_tokens[ours]
    if len(tokens) == 0 or (tokens != second.num_tokens[theirs]).any():
        return None
    finite = np.isfinite(sums) & np.isfinite(others)
    return Pair(sums[finite], others[finite], tokens[finite]) if finite.any() else None


def client_change(
    first: ResponseNlls | None, second: ResponseNlls | None, resamples: int, seed: int
) -> Interval | None:
    """One client's change of NLL with its 95 % interval over records."""
    paired = pair(first, second) if first is not None and second is not None else None
    if paired is None:
        return None
    return paired_bootstrap(paired.second, paired.first, paired.num_tokens, resamples=resamples, seed=seed)


def mean_change(clients: Mapping[str, tuple[ResponseNlls, ResponseNlls]], resamples: int, seed: int) -> Interval | None:
    """The unweighted mean of the clients' changes, with its 95 % interval.

    Each client's records are resampled with a random stream of their own. Clients are not resampled, because these
    are all clients.
    """
    pairs = {name: paired for name, sides in clients.items() if (paired := pair(*sides))}
    if not pairs:
        return None
    changes = [
        resampled(each.second - each.first, each.num_tokens, draws(len(each.num_tokens), resamples, seed, name))
        for name, each in pairs.items()
    ]
    low, high = ends(np.mean(changes, axis=0))
    return Interval(float(np.mean([paired.change() for paired in pairs.values()])), low, high)
