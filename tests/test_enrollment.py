"""Enrollment: scores in log space, a verdict on every record, sets by the threshold and by nothing else."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.config import ThresholdRule
from fedmide.enrollment import Verdict, enroll, members, score, split
from fedmide.records import RecordId
from fedmide.thresholds import RULES

nlls = st.floats(0.0, 20.0)
numbers = st.one_of(st.floats(0.5, 2.0), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 1e300]))
scored = st.dictionaries(st.text("abc", min_size=1, max_size=3).map(RecordId), numbers, max_size=20)
rules = st.sampled_from(sorted(RULES))


# --- scores


@given(nlls, nlls)
def test_a_score_is_the_ratio_of_the_perplexities(aggregated: float, local: float) -> None:
    assert score(aggregated, local) == pytest.approx(math.exp(aggregated) / math.exp(local), rel=1e-12)


def test_huge_nlls_are_compared_though_their_perplexities_overflow() -> None:
    assert score(5000.0, 5000.0) == 1.0
    assert score(1000.5, 1000.0) == math.exp(0.5)
    assert score(0.0, 1e6) == 0.0  # underflow is no failure: the aggregated model explains it far better


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_of_what_is_not_finite_is_no_number(bad: float) -> None:
    assert math.isnan(score(bad, 1.0))
    assert math.isnan(score(1.0, bad))
    assert math.isnan(score(bad, bad))


def test_a_ratio_too_large_for_a_float_is_no_number() -> None:
    assert math.isnan(score(1e6, 0.0))
    assert math.isnan(score(1e308, -1e308))


# --- the split


@given(scored, rules)
def test_every_record_gets_one_verdict_by_the_threshold_of_the_finite(
    scores: dict[RecordId, float], rule: ThresholdRule
) -> None:
    verdicts = split(scores, rule)
    threshold = RULES[rule]([value for value in scores.values() if math.isfinite(value)])
    assert list(verdicts) == list(scores)
    for record, value in scores.items():
        if threshold is None:
            expected = Verdict("shared", "no-threshold", None)
        elif not math.isfinite(value):
            expected = Verdict("personal", "not-finite", threshold)
        elif value < threshold:
            expected = Verdict("shared", "below-threshold", threshold)
        else:
            expected = Verdict("personal", "at-or-above-threshold", threshold)
        assert verdicts[record] == expected


@given(scored, rules, st.randoms(use_true_random=False))
def test_the_order_of_the_records_decides_nothing(
    scores: dict[RecordId, float], rule: ThresholdRule, random: object
) -> None:
    ids = list(scores)
    random.shuffle(ids)  # type: ignore[attr-defined]
    assert split({record: scores[record] for record in ids}, rule) == split(scores, rule)


@pytest.mark.parametrize("values", [[1.5], [1.0, 1.0, 1.0], [math.nan, math.inf], [1.0, math.nan]])
def test_where_nothing_can_be_parted_all_is_shared_with_a_warning(values: list[float]) -> None:
    verdicts = split({RecordId(str(number)): value for number, value in enumerate(values)}, "otsu-256")
    assert set(verdicts.values()) == {Verdict("shared", "no-threshold", None)}


# --- enrollment


@given(scored, st.floats(0.5, 2.0))
def test_what_scores_below_the_threshold_is_enrolled_and_nothing_else(
    scores: dict[RecordId, float], threshold: float
) -> None:
    verdicts = enroll(scores, threshold)
    assert list(verdicts) == list(scores)
    for record, value in scores.items():
        is_enrolled = math.isfinite(value) and value < threshold
        assert verdicts[record].set == ("shared" if is_enrolled else "personal")
        assert (verdicts[record].reason == "not-finite") is not math.isfinite(value)
        assert verdicts[record].threshold == threshold


def test_a_score_of_exactly_one_stays_personal() -> None:
    verdicts = enroll({RecordId("a"): math.nextafter(1.0, 0.0), RecordId("b"): 1.0}, threshold=1.0)
    assert [verdict.set for verdict in verdicts.values()] == ["shared", "personal"]


@given(st.dictionaries(st.text(max_size=3).map(RecordId), st.sampled_from(["shared", "personal"])))
def test_the_sets_are_a_partition_in_order(sets: dict[RecordId, str]) -> None:
    shared, personal = members(sets, "shared"), members(sets, "personal")  # type: ignore[arg-type]
    assert sorted((*shared, *personal)) == sorted(sets)
    assert all(sets[record] == "shared" for record in shared)
    assert list(shared) == [record for record in sets if record in set(shared)]
