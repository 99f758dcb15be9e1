"""Enrollment: scores in log space, a verdict on every record, sets by the threshold and by nothing else."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.config.sections import ThresholdRule
from fedmide.data.records import RecordId
from fedmide.federation.enrollment import (
    Verdict,
    enroll,
    members,
    rearranged,
    relative_gap,
    score,
    split_by_score,
    weight,
)
from fedmide.federation.thresholds import RULES

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
    assert score(0.0, 1e6) == 0.0  # underflow is not a failure: the common model predicts it far better


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_of_values_that_are_not_finite_is_nan(bad: float) -> None:
    assert math.isnan(score(bad, 1.0))
    assert math.isnan(score(1.0, bad))
    assert math.isnan(score(bad, bad))


def test_a_ratio_too_large_for_a_float_is_nan() -> None:
    assert math.isnan(score(1e6, 0.0))
    assert math.isnan(score(1e308, -1e308))


# --- the split


@given(scored, rules)
def test_every_record_gets_one_verdict_by_the_threshold_of_the_finite(
    scores: dict[RecordId, float], rule: ThresholdRule
) -> None:
    verdicts = split_by_score(scores, rule)
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
    assert split_by_score({record: scores[record] for record in ids}, rule) == split_by_score(scores, rule)


@pytest.mark.parametrize("values", [[1.5], [1.0, 1.0, 1.0], [math.nan, math.inf], [1.0, math.nan]])
def test_if_nothing_can_be_split_all_is_shared_with_a_warning(values: list[float]) -> None:
    verdicts = split_by_score({RecordId(str(number)): value for number, value in enumerate(values)}, "otsu-256")
    assert set(verdicts.values()) == {Verdict("shared", "no-threshold", None)}


# --- enrollment


@given(scored, st.floats(0.5, 2.0))
def test_only_records_with_scores_below_the_threshold_are_enrolled(
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


# --- other splits of the same size


HOWS = ("random", "reversed", "length-matched")
some_scores = st.lists(st.tuples(st.floats(0.5, 2.0), st.integers(5, 60)), min_size=2, max_size=60)


def arrange(rows: list[tuple[float, int]], how: str, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    scores = {RecordId(f"r{number:03d}"): score for number, (score, _) in enumerate(rows)}
    lengths = {RecordId(f"r{number:03d}"): length for number, (_, length) in enumerate(rows)}
    by_score = split_by_score(scores, "median")
    return by_score, rearranged(by_score, scores, lengths, how, np.random.default_rng(seed)), scores, lengths  # type: ignore[arg-type]


def shared_of(verdicts: Any) -> set[RecordId]:
    return {record for record, verdict in verdicts.items() if verdict.set == "shared"}


@pytest.mark.parametrize("how", HOWS)
@given(rows=some_scores, seed=st.integers(0, 9))
def test_another_split_shares_as_many_and_loses_no_record(how: str, rows: list[tuple[float, int]], seed: int) -> None:
    by_score, found, scores, _ = arrange(rows, how, seed)
    assert list(found) == list(scores)
    assert len(shared_of(found)) == len(shared_of(by_score))
    threshold = next(iter(by_score.values())).threshold
    assert {verdict.threshold for verdict in found.values()} == {threshold}
    assert {verdict.reason for verdict in found.values()} == ({"no-threshold"} if threshold is None else {"ablation"})


def test_the_reversed_split_shares_the_highest_scores() -> None:
    _, found, _, _ = arrange([(1.0, 9), (2.0, 9), (1.5, 9), (1.2, 9), (0.7, 9)], "reversed")
    assert shared_of(found) == {"r001", "r002"}


def test_a_length_matched_split_is_as_long_group_by_group() -> None:
    """100 records whose score falls with their length: the score's shared half are the long ones, and so are these."""
    rows = [(2.0 - number / 100, number) for number in range(100)]
    by_score, matched, _, lengths = arrange(rows, "length-matched")
    mean = np.mean([lengths[record] for record in shared_of(matched)])
    assert mean == pytest.approx(np.mean([lengths[record] for record in shared_of(by_score)]), abs=1.0)
    _, drawn, _, _ = arrange(rows, "random")
    assert abs(np.mean([lengths[record] for record in shared_of(drawn)]) - mean) > 10


def test_a_length_matched_split_shuffles_within_a_group() -> None:
    draw = np.random.default_rng(1)
    rows = [(float(score), 10) for score in draw.uniform(0.5, 2.0, 100)]
    by_score, matched, _, _ = arrange(rows, "length-matched")
    overlap = len(shared_of(matched) & shared_of(by_score))
    assert 15 < overlap < 35


def test_a_score_that_is_not_a_number_keeps_its_verdict() -> None:
    for how in HOWS:
        by_score, found, _, _ = arrange([(math.nan, 5), (1.0, 5), (2.0, 5), (3.0, 5)], how)
        assert found[RecordId("r000")] == by_score[RecordId("r000")]


@given(some_scores, st.randoms())
def test_the_order_of_the_records_does_not_show(rows: list[tuple[float, int]], shuffle: Any) -> None:
    for how in HOWS:
        by_score, found, scores, lengths = arrange(rows, how)
        order = list(scores)
        shuffle.shuffle(order)
        mixed = {record: by_score[record] for record in order}
        again = rearranged(mixed, scores, lengths, how, np.random.default_rng(0))  # type: ignore[arg-type]
        assert again == found


# --- other scores, the natural threshold, weights


@given(nlls, nlls)
def test_the_relative_gap_has_the_sign_of_the_ratios_logarithm(aggregated: float, local: float) -> None:
    if aggregated == 0:
        assert math.isnan(relative_gap(aggregated, local))
        return
    assert relative_gap(aggregated, local) == pytest.approx(1 - local / aggregated, rel=1e-9, abs=1e-9)
    assert (relative_gap(aggregated, local) > 0) == (aggregated > local)


@pytest.mark.parametrize(("aggregated", "local"), [(math.nan, 1.0), (1.0, math.inf), (0.0, 1.0), (math.inf, math.inf)])
def test_a_gap_of_values_that_are_not_finite_is_nan(aggregated: float, local: float) -> None:
    assert math.isnan(relative_gap(aggregated, local))


def test_the_natural_threshold_is_known_without_looking_at_the_scores() -> None:
    scores = {RecordId("a"): 0.5, RecordId("b"): 0.0, RecordId("c"): math.nan, RecordId("d"): 1.0}
    by_ratio = split_by_score(scores, "natural")
    assert [by_ratio[record].set for record in scores] == ["shared", "shared", "personal", "personal"]
    by_gap = split_by_score(scores, "natural", "relative-gap")
    assert [by_gap[record].set for record in scores] == ["personal"] * 4
    assert {verdict.threshold for verdict in by_gap.values()} == {0.0}
    assert split_by_score({RecordId("a"): 0.5}, "natural")[RecordId("a")] == Verdict("shared", "below-threshold", 1.0)


positive = st.floats(0.01, 100.0)


@given(positive, positive, positive)
def test_a_weight_is_half_at_the_threshold_and_falls_with_the_score(
    first: float, second: float, softness: float
) -> None:
    low, high = sorted([first, second])
    assert weight(low, low, "ratio", softness) == 0.5
    assert weight(low, 1.0, "ratio", softness) >= weight(high, 1.0, "ratio", softness)
    by_hand = 1 / (1 + (high / low) ** (1 / softness)) if math.log(high / low) / softness < 500 else 0.0
    assert weight(high, low, "ratio", softness) == pytest.approx(by_hand, abs=1e-12)
    expected = 1 / (1 + math.exp(min(500, (high - low) / softness)))
    assert weight(high, low, "relative-gap", softness) == pytest.approx(expected, abs=1e-12)


def test_weights_go_from_a_hard_split_to_all_alike() -> None:
    assert [round(weight(value, 1.0, "ratio", 1e-6), 9) for value in (0.9, 1.1)] == [1.0, 0.0]
    assert [round(weight(value, 1.0, "ratio", 1e6), 6) for value in (0.9, 1.1)] == [0.5, 0.5]


def test_the_weight_of_what_has_no_score_or_no_threshold() -> None:
    assert weight(None, 1.0, "ratio", 0.1) == 0.0  # not finite: personal
    assert weight(1.0, None, "ratio", 0.1) == 1.0  # nothing could be split: shared
    assert weight(0.0, 1.0, "ratio", 0.1) == 1.0  # underflow: the common model predicts it far better
    assert weight(0.0, 0.0, "ratio", 0.1) == 0.5
