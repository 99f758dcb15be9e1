"""Figures of a metric over the clients of a federation, and the correlation of scores with lengths of records.

Each client has one value here, computed earlier from the sum and count over its records. A figure over clients does not
replace the clients' figures over their records.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class OverClients:
    """The figures of one metric over clients.

    `standard_deviation` is that of a population, because the clients are all there are, not a sample. `jain`,
    Jain's fairness index, is 1 if all n clients are equal, and 1/n if one has everything. `harmonic_mean` and `jain`
    are None if a value is negative. `jain` is also None if all are zero. A client at zero makes `harmonic_mean` zero.
    """

    num_clients: int
    mean: float
    weighted_mean: float
    worst: float
    worst_client: str
    standard_deviation: float
    harmonic_mean: float | None
    jain: float | None


def over_clients(values: Mapping[str, float], weights: Mapping[str, int], lower_is_better: bool) -> OverClients:
    """The figures over clients, from one value and one weight (the number of test records) per client.

    They don't depend on the order of the clients. Of several worst clients the first by name is reported. Raises
    ValueError if there are no clients, the two arguments have different clients, a value is not finite, or a weight
    is not positive.

    >>> figures = over_clients({"a": 1.0, "b": 3.0}, {"a": 3, "b": 1}, lower_is_better=True)
    >>> figures.mean, figures.weighted_mean, figures.worst_client, figures.harmonic_mean
    (2.0, 1.5, 'b', 1.5)
    """
    _check(values, weights)
    num_clients = len(values)
    mean = math.fsum(values.values()) / num_clients
    worst_client = _worst_client(values, lower_is_better)
    weighted_sum = math.fsum(value * weights[client] for client, value in values.items())
    variance = math.fsum((value - mean) ** 2 for value in values.values()) / num_clients
    return OverClients(
        num_clients=num_clients,
        mean=mean,
        weighted_mean=weighted_sum / sum(weights.values()),
        worst=float(values[worst_client]),
        worst_client=worst_client,
        standard_deviation=math.sqrt(variance),
        harmonic_mean=_harmonic_mean(values),
        jain=_jain(values),
    )


def worse_than_local(values: Mapping[str, float], local: Mapping[str, float], lower_is_better: bool) -> tuple[str, ...]:
    """The clients, by name, that are worse off under a method than when they train alone.

    Studies report their number as `clients_worse_than_local`. A client with an equal value is not among them. Raises
    ValueError if the two arguments have different clients.

    >>> worse_than_local({"a": 0.6, "b": 0.4}, {"a": 0.5, "b": 0.5}, lower_is_better=False)
    ('b',)
    """
    _check_same_clients(values, local)
    _check_finite(values)
    _check_finite(local)
    sign = 1.0 if lower_is_better else -1.0
    return tuple(sorted(client for client, value in values.items() if sign * value > sign * local[client]))


def spearman(scores: npt.ArrayLike, num_tokens: npt.ArrayLike) -> float | None:
    """Spearman's rank correlation of the records' scores with their lengths; None if undefined.

    It is undefined for fewer than three records, and if either is constant. A value far from 0 means that the score
    ranks records by length more than by content.

    >>> spearman([0.9, 1.1, 1.4], [30, 20, 10])
    -1.0
    """
    first, second = np.asarray(scores, dtype=np.float64), np.asarray(num_tokens, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"expected one score and one length per record, got {first.shape}, {second.shape}")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("a score or a length is not a number")
    if len(first) < 3 or (first == first[0]).all() or (second == second[0]).all():
        return None
    from scipy.stats import spearmanr  # takes a second to import

    return float(spearmanr(first, second).statistic)


def _check(values: Mapping[str, float], weights: Mapping[str, int]) -> None:
    _check_same_clients(values, weights)
    _check_finite(values)
    if not values:
        raise ValueError("there are no clients")
    refused = sorted(client for client, weight in weights.items() if weight < 1)
    if refused:
        raise ValueError(f"the weights of clients {refused} are not positive")


def _check_same_clients(first: Mapping[str, float], second: Mapping[str, float]) -> None:
    apart = sorted(first.keys() ^ second.keys())
    if apart:
        raise ValueError(f"only one of the two has clients {apart}")


def _check_finite(values: Mapping[str, float]) -> None:
    refused = sorted(client for client, value in values.items() if not math.isfinite(value))
    if refused:
        raise ValueError(f"the values of clients {refused} are not finite")


def _worst_client(values: Mapping[str, float], lower_is_better: bool) -> str:
    sign = -1.0 if lower_is_better else 1.0
    return min(values, key=lambda client: (sign * values[client], client))


def _harmonic_mean(values: Mapping[str, float]) -> float | None:
    if min(values.values()) < 0:
        return None
    if min(values.values()) == 0:
        return 0.0
    return len(values) / math.fsum(1.0 / value for value in values.values())


def _jain(values: Mapping[str, float]) -> float | None:
    largest = max(values.values())
    if min(values.values()) < 0 or largest == 0:
        return None
    # Shares of the largest: squares of the values themselves can underflow or overflow.
    shares = [value / largest for value in values.values()]
    return math.fsum(shares) ** 2 / (len(shares) * math.fsum(share**2 for share in shares))
