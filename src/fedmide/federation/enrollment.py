"""Verdicts on records, shared or personal, with their reasons: computed from scores and a rule.

Everything is joined by record id. Every record asked about gets a verdict, so none can get lost.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import numpy as np
from scipy.special import expit

from fedmide.config.sections import NATURAL, ScoreKind, SplitRule, ThresholdRule
from fedmide.data.records import RecordId
from fedmide.federation.thresholds import RULES

SetName = Literal["shared", "personal"]


Reason = Literal[
    "below-threshold",  # its score is below the threshold: shared, or enrolled
    "at-or-above-threshold",  # its score is at the threshold or above it: personal
    "no-threshold",  # a warning: the rule found no threshold, everything is shared
    "ablation",  # not decided by the score, but by `enrollment.split` or `enrollment.choice`
    "not-finite",  # its score is not a finite number: personal, and counted
    "own-nll",  # no verdict: the record's NLL under the site's local adapter after training
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The set of a record, the reason, and the threshold that its score was compared with."""

    set: SetName
    reason: Reason
    threshold: float | None


def score(nll_aggregated: float, nll_local: float) -> float:
    """Ratio of perplexities, common adapter over local adapter: above 1 the local adapter predicts the record better.

    Computed in log space, so huge perplexities do not overflow before they are divided. NaN if either NLL is not
    finite, or if the ratio itself is too large for a float.

    >>> round(score(math.log(12.0), math.log(10.0)), 12)
    1.2
    """
    difference = nll_aggregated - nll_local
    if not math.isfinite(difference):
        return math.nan
    try:
        return math.exp(difference)
    except OverflowError:
        return math.nan


def relative_gap(nll_aggregated: float, nll_local: float) -> float:
    """The fraction of the common adapter's NLL that the local one saves: above 0 the local one is better.

    NaN if either NLL is not finite, or if the common adapter's is 0.

    >>> relative_gap(2.0, 1.5)
    0.25
    """
    if not math.isfinite(nll_aggregated - nll_local) or nll_aggregated == 0:
        return math.nan
    return (nll_aggregated - nll_local) / nll_aggregated


SCORES: Mapping[ScoreKind, Callable[[float, float], float]] = MappingProxyType(
    {"ratio": score, "relative-gap": relative_gap}
)
"""The scores by their names in the configuration, as functions of the NLL under the common and the local adapter."""


def split_by_score(
    scores: Mapping[RecordId, float], rule: ThresholdRule, kind: ScoreKind = "ratio"
) -> dict[RecordId, Verdict]:
    """The verdict on every record after the warm-up: score < threshold is shared, else personal.

    The rule computes the threshold from the finite scores; for "natural" the kind of score gives it. Without a
    threshold everything is shared, with the warning "no-threshold". With one, a score that is not finite makes its
    record personal.
    """
    finite = [value for value in scores.values() if math.isfinite(value)]
    threshold = NATURAL[kind] if rule == "natural" else RULES[rule](finite)
    if threshold is None:
        return {record: Verdict("shared", "no-threshold", None) for record in scores}
    return {record: _verdict(value, threshold) for record, value in scores.items()}


LENGTH_GROUPS = 10
"""Number of groups of similar length: each is one tenth of a client's records, in order of length."""


def rearranged(
    verdicts: Mapping[RecordId, Verdict],
    scores: Mapping[RecordId, float],
    lengths: Mapping[RecordId, int],
    how: SplitRule,
    draw: np.random.Generator,
) -> dict[RecordId, Verdict]:
    """An ablation of a split or of a round's enrollment: the same number of shared records, but other ones.

    A record without a threshold, or with a score that is not finite, keeps its verdict. The result does not depend on
    the order of the records.
    """
    movable = sorted(record for record, verdict in verdicts.items() if verdict.reason in _BY_SCORE)
    count = sum(verdicts[record].set == "shared" for record in movable)
    if how == "score" or not movable:
        return dict(verdicts)
    if how == "random":
        shared = set(_drawn(movable, count, draw))
    elif how == "reversed":
        shared = set(sorted(movable, key=lambda record: (-scores[record], record))[:count])
    else:
        by_length = sorted(movable, key=lambda record: (lengths[record], record))
        groups = [by_length[first:last] for first, last in pairwise(_cuts(len(by_length)))]
        counts = [sum(verdicts[record].set == "shared" for record in group) for group in groups]
        pairs = zip(groups, counts, strict=True)
        shared = {record for group, number in pairs for record in _drawn(group, number, draw)}
    moved = {record: Verdict(_set(record in shared), "ablation", verdicts[record].threshold) for record in movable}
    return {record: moved.get(record, verdict) for record, verdict in verdicts.items()}


_BY_SCORE: tuple[Reason, ...] = ("below-threshold", "at-or-above-threshold")


def _drawn(records: Sequence[RecordId], count: int, draw: np.random.Generator) -> list[RecordId]:
    return [records[row] for row in draw.permutation(len(records))[:count]]


def _cuts(count: int) -> list[int]:
    return [count * number // LENGTH_GROUPS for number in range(LENGTH_GROUPS + 1)]


def _set(shared: bool) -> SetName:
    return "shared" if shared else "personal"


def enroll(scores: Mapping[RecordId, float], threshold: float) -> dict[RecordId, Verdict]:
    """The verdict on every personal record: those that score below the threshold become shared.

    >>> enroll({RecordId("a"): 0.99, RecordId("b"): 1.0}, threshold=1.0)[RecordId("b")].set
    'personal'
    """
    return {record: _verdict(value, threshold) for record, value in scores.items()}


def weight(value: float | None, threshold: float | None, kind: ScoreKind, softness: float) -> float:
    """The weight of a record's loss in the common training, by its last score: 1 / (1 + exp(d / softness)).

    d is the score minus the threshold that it was compared with; for a ratio, the difference of their logarithms. The
    weight is 1 without a threshold, and 0 without a score.

    >>> weight(1.0, 1.0, "ratio", 0.1), weight(0.25, 0.0, "relative-gap", 0.25)
    (0.5, 0.2689414213699951)
    """
    if threshold is None:
        return 1.0
    if value is None:
        return 0.0
    distance = value - threshold if kind == "relative-gap" else _log(value) - _log(threshold)
    return 0.5 if math.isnan(distance) else float(expit(-distance / softness))  # both logarithms may be minus infinity


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def members(sets: Mapping[RecordId, SetName], which: SetName) -> Sequence[RecordId]:
    """The records of one set, in their order."""
    return tuple(record for record, name in sets.items() if name == which)


def _verdict(value: float, threshold: float) -> Verdict:
    if not math.isfinite(value):
        return Verdict("personal", "not-finite", threshold)
    if value < threshold:
        return Verdict("shared", "below-threshold", threshold)
    return Verdict("personal", "at-or-above-threshold", threshold)
