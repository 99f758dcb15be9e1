"""Who is shared, who is personal, and why: scores and a rule in, verdicts out.

Everything is joined by record id. Verdicts are given for every record asked about, so nothing can get lost.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedmide.config import ThresholdRule
from fedmide.records import RecordId
from fedmide.thresholds import RULES

SetName = Literal["shared", "personal"]
Reason = Literal[
    "below-threshold",  # its score is below the threshold: shared, or enrolled
    "at-or-above-threshold",  # its score is not: personal
    "no-threshold",  # a warning: the rule could part nothing, everything is shared
    "not-finite",  # its score is no number: personal, and counted
    "own-nll",  # no verdict: what the site's own model made of the record after training
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a record belongs, why, and the threshold that its score was compared with."""

    set: SetName
    reason: Reason
    threshold: float | None


def score(nll_aggregated: float, nll_local: float) -> float:
    """Ratio of perplexities, aggregated over local: above 1 the site's own model explains the record better.

    Computed in log space, so that huge perplexities do not overflow before they are divided. NaN where either NLL is
    not finite, and where the ratio itself is too large for a float.

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


def split(scores: Mapping[RecordId, float], rule: ThresholdRule) -> dict[RecordId, Verdict]:
    """The verdict on every record after the warm-up: score < threshold is shared, else personal.

    The threshold is the rule's over the finite scores. Where it gives none, everything is shared, with the warning
    "no-threshold"; else a score that is not finite makes its record personal.
    """
    threshold = RULES[rule]([value for value in scores.values() if math.isfinite(value)])
    if threshold is None:
        return {record: Verdict("shared", "no-threshold", None) for record in scores}
    return {record: _verdict(value, threshold) for record, value in scores.items()}


def enroll(scores: Mapping[RecordId, float], threshold: float) -> dict[RecordId, Verdict]:
    """The verdict on every personal record: those that score below the threshold become shared.

    >>> enroll({RecordId("a"): 0.99, RecordId("b"): 1.0}, threshold=1.0)[RecordId("b")].set
    'personal'
    """
    return {record: _verdict(value, threshold) for record, value in scores.items()}


def members(sets: Mapping[RecordId, SetName], which: SetName) -> Sequence[RecordId]:
    """The records of one set, in their order."""
    return tuple(record for record, name in sets.items() if name == which)


def _verdict(value: float, threshold: float) -> Verdict:
    if not math.isfinite(value):
        return Verdict("personal", "not-finite", threshold)
    if value < threshold:
        return Verdict("shared", "below-threshold", threshold)
    return Verdict("personal", "at-or-above-threshold", threshold)
