"""Figures of the search for personal records: of the method's scores and sets, and of rival scores that it must beat.

The figures need likelihoods, sets and the truth. The method itself has not seen the truth.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmide.config.sections import Positions
from fedmide.data.records import RecordId
from fedmide.evaluation.intervals import ends
from fedmide.evaluation.summary import Figures
from fedmide.federation.enrollment import score
from fedmide.model.interface import Nll
from fedmide.seeds import stream

RIVALS: Mapping[str, Callable[[Nll, Nll], float]] = {
    "length": lambda local, aggregated: local.num_tokens,
    "nll_local": lambda local, aggregated: local.mean,
    "nll_aggregated": lambda local, aggregated: aggregated.mean,
    "difference_nats": lambda local, aggregated: aggregated.sum - local.sum,
    "ratio": lambda local, aggregated: score(aggregated.mean, local.mean),
    "relative_gap": lambda local, aggregated: (aggregated.mean - local.mean) / aggregated.mean,
}
"""Scores from a record's NLL under the site's local adapter and under the common one. `ratio` is the published one."""


@dataclass(frozen=True)
class Moment:
    """A site at one moment: its sets, and its records' NLLs (local adapter, common adapter).

    `nlls`: over all tokens, or over those of the response. `scores`: the scores that the method itself used, if it did.
    """

    nlls: Mapping[Positions, Mapping[RecordId, tuple[Nll, Nll]]]
    personal: frozenset[RecordId]
    scores: Mapping[RecordId, float]


@dataclass(frozen=True)
class ObservedSite:
    """A site after the warm-up and after the last round, and its personal records (`truth`)."""

    truth: frozenset[RecordId]
    warmup: Moment
    rounds: Moment


def auroc(scores: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """The area under the ROC curve: the share of pairs in which a positive scores above a negative, ties counted half.

    >>> auroc([1.0, 2.0, 2.0, 3.0], [False, False, True, True])
    0.875
    """
    values, is_positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=np.bool_)
    above, below = values[is_positive], np.sort(values[~is_positive])
    lower = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
    return float(lower.sum() / (2 * len(above) * len(below)))


def average_precision(scores: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """The mean, over the positives, of the precision at their score; equal scores share one threshold.

    >>> round(average_precision([1.0, 2.0, 3.0], [True, False, True]), 6)
    0.833333
    """
    values, is_positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=np.bool_)
    at_least = len(values) - np.searchsorted(np.sort(values), values[is_positive], "left")
    hits = is_positive.sum() - np.searchsorted(np.sort(values[is_positive]), values[is_positive], "left")
    return float(np.mean(hits / at_least))


def found(said: Collection[RecordId], truth: Collection[RecordId]) -> Figures:
    """Precision, recall and F1 of the records in `said`, against those in `truth`.

    None if the divisor is 0; F1 is 0 if nothing is found.

    >>> found([RecordId("a"), RecordId("b")], [RecordId("b")])
    {'number': 2, 'right': 1, 'precision': 0.5, 'recall': 1.0, 'f1': 0.6666666666666666}
    """
    right = len(set(said) & set(truth))
    return {
        "number": len(said),
        "right": right,
        "precision": right / len(said) if said else None,
        "recall": right / len(truth) if truth else None,
        "f1": 2 * right / (len(said) + len(truth)) if said or truth else None,
    }


def summarize(sites: Mapping[str, ObservedSite], resamples: int, seed: int) -> Figures:
    """The figures of each site, their means over sites, and intervals of the mean AUROCs."""
    clients = {name: site_figures(site) for name, site in sites.items()}
    moments = {"after_warmup": "warmup", "after_rounds": "rounds"}
    return {
        "clients": clients,
        "mean": _mean(list(clients.values())),
        "auroc_intervals": {
            title: {
                positions: {rival: _interval(sites, name, positions, rival, (resamples, seed)) for rival in RIVALS}
                for positions in next(iter(sites.values())).warmup.nlls
            }
            for title, name in moments.items()
        },
    }


def site_figures(site: ObservedSite) -> Figures:
    """The figures of each score and of the sets at both moments, and those of the enrolled records."""
    enrolled = site.warmup.personal - site.rounds.personal
    return {
        "after_warmup": _moment_figures(site.warmup, site.truth),
        "after_rounds": _moment_figures(site.rounds, site.truth),
        "enrolled": found(enrolled, site.warmup.personal - site.truth),
    }


def _moment_figures(moment: Moment, truth: frozenset[RecordId]) -> Figures:
    return {
        "method": _ranking(moment.scores, truth),
        "rivals": {
            positions: {rival: _ranking(_scores(nlls, rival), truth) for rival in RIVALS}
            for positions, nlls in moment.nlls.items()
        },
        "personal": found(moment.personal, truth),
    }


def _scores(nlls: Mapping[RecordId, tuple[Nll, Nll]], rival: str) -> dict[RecordId, float]:
    return {record: RIVALS[rival](local, aggregated) for record, (local, aggregated) in nlls.items()}


def _ranking(scores: Mapping[RecordId, float], truth: frozenset[RecordId]) -> Figures | None:
    """AUROC and average precision of the finite scores; None if their records are all personal or all shared."""
    finite = {record: value for record, value in scores.items() if math.isfinite(value)}
    positive = [record in truth for record in finite]
    if not any(positive) or all(positive):
        return None
    values = list(finite.values())
    return {
        "auroc": auroc(values, positive),
        "average_precision": average_precision(values, positive),
        "num_records": len(finite),
        "num_not_finite": len(scores) - len(finite),
    }


def _mean(rows: Sequence[Any]) -> Any:
    """The mean of each figure over the sites that have it."""
    present = [row for row in rows if row is not None]
    if not present:
        return None
    if isinstance(present[0], Mapping):
        return {key: _mean([row[key] for row in present]) for key in present[0]}
    return fmean(present)


def _interval(
    sites: Mapping[str, ObservedSite], moment: str, positions: Positions, rival: str, draws: tuple[int, int]
) -> tuple[float, float] | None:
    """The 95 % interval of the mean AUROC over sites.

    Each site's personal and shared records are resampled separately. None if a score is not finite, or if a site has
    records of one kind only.
    """
    resamples, seed = draws
    means = np.zeros(resamples)
    for name, site in sites.items():
        values = _scores(getattr(site, moment).nlls[positions], rival)
        personal = np.array([values[record] for record in values if record in site.truth])
        shared = np.array([values[record] for record in values if record not in site.truth])
        if not len(personal) or not len(shared) or not np.isfinite([*personal, *shared]).all():
            return None
        generator = stream(seed, "identification bootstrap", client=name)
        truth = [True] * len(personal) + [False] * len(shared)
        means += [
            auroc(np.concatenate([_again(personal, generator), _again(shared, generator)]), truth)
            for _ in range(resamples)
        ]
    return ends(means / len(sites))


def _again(values: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    return values[generator.integers(len(values), size=len(values))]
