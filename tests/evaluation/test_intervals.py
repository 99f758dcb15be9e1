"""Intervals: against a slow loop on the same draws, and coverage where the truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.evaluation import intervals
from fedmide.evaluation.intervals import Interval, bootstrap_mean, bootstrap_ratio, paired_bootstrap
from fedmide.seeds import stream

numbers = st.floats(-100.0, 100.0)


def slow_ratio(sums: list[float], counts: list[int], resamples: int, seed: int) -> Interval:
    """One resample after another, one record after another, from the stream of the same name."""
    generator = stream(seed, "bootstrap")
    ratios = []
    for _ in range(resamples):
        drawn = [int(generator.integers(len(sums))) for _ in sums]
        ratios.append(math.fsum(sums[index] for index in drawn) / sum(counts[index] for index in drawn))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(math.fsum(sums) / sum(counts), float(low), float(high))


def assert_close(found: Interval, expected: Interval) -> None:
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


@given(st.lists(st.tuples(numbers, st.integers(1, 50)), min_size=1, max_size=9), st.integers(0, 5))
def test_the_ratio_is_that_of_a_slow_loop(records: list[tuple[float, int]], seed: int) -> None:
    sums, counts = [nll for nll, _ in records], [count for _, count in records]
    assert_close(bootstrap_ratio(sums, counts, 20, seed), slow_ratio(sums, counts, 20, seed))


def test_the_number_of_draws_held_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = stream(0, "sums").normal(size=7), stream(0, "counts").integers(1, 9, size=7)
    whole = bootstrap_ratio(sums, counts, 100, 3)
    for held in (1, 7, 15, 699):
        monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", held)
        assert bootstrap_ratio(sums, counts, 100, 3) == whole


def test_the_value_weighs_records_by_tokens() -> None:
    assert bootstrap_ratio([10.0, 1.0], [5, 1], 100, 0).value == pytest.approx(11 / 6)


@given(st.lists(numbers, min_size=1, max_size=20), st.integers(0, 5))
def test_the_mean_is_the_ratio_to_ones_and_lies_within_the_values(values: list[float], seed: int) -> None:
    found = bootstrap_mean(values, 50, seed)
    assert found == bootstrap_ratio(values, [1] * len(values), 50, seed)
    assert found.low <= found.high
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


@given(numbers, st.integers(1, 100))
def test_one_record_has_an_interval_without_width(nll_sum: float, count: int) -> None:
    ratio = nll_sum / count
    assert bootstrap_ratio([nll_sum], [count], 100, 0) == Interval(ratio, ratio, ratio)


def test_intervals_repeat_and_hang_on_the_seed() -> None:
    values = stream(0, "values").normal(size=30)
    assert bootstrap_mean(values, 200, 0) == bootstrap_mean(values, 200, 0)
    assert bootstrap_mean(values, 200, 0) != bootstrap_mean(values, 200, 1)


def test_about_95_of_100_intervals_cover_the_mean() -> None:
    samples = stream(0, "coverage").normal(3.0, 2.0, size=(400, 60))
    found = [bootstrap_mean(sample, 300, seed) for seed, sample in enumerate(samples)]
    covered = np.mean([interval.low <= 3.0 <= interval.high for interval in found])
    # 400 tries at 95 % deviate by 1.1 points; percentile intervals of 60 values cover a point or so less.
    assert 0.90 <= covered <= 0.98


def test_about_95_of_100_intervals_cover_a_ratio() -> None:
    generator = stream(1, "coverage")
    covered = []
    for seed in range(400):
        counts = generator.integers(5, 100, size=80)
        # NLL per token 1.5, and noise that grows with the record: a sum goes with its count.
        sums = counts * generator.normal(1.5, 0.4, size=80)
        interval = bootstrap_ratio(sums, counts, 300, seed)
        covered.append(interval.low <= 1.5 <= interval.high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_the_normal_approximation_is_met_for_many_records() -> None:
    values = stream(2, "values").normal(size=2000)
    found = bootstrap_mean(values, 2000, 0)
    width = 2 * 1.96 * float(np.std(values)) / math.sqrt(2000)
    assert found.high - found.low == pytest.approx(width, rel=0.1)


@given(st.lists(st.tuples(numbers, numbers, st.integers(1, 50)), min_size=1, max_size=9), st.integers(0, 5))
def test_pairs_are_the_difference_of_both_methods_on_the_same_draws(
    records: list[tuple[float, float, int]], seed: int
) -> None:
    first, second, counts = ([record[part] for record in records] for part in range(3))
    generator = stream(seed, "bootstrap")
    differences = []
    for _ in range(20):
        drawn = [int(generator.integers(len(records))) for _ in records]
        tokens = sum(counts[index] for index in drawn)
        differences.append(sum(first[i] for i in drawn) / tokens - sum(second[i] for i in drawn) / tokens)
    low, high = np.percentile(differences, [2.5, 97.5])
    found = paired_bootstrap(first, second, counts, resamples=20, seed=seed)
    value = (sum(first) - sum(second)) / sum(counts)
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high), abs=1e-9)


def test_pairs_without_counts_are_differences_of_means() -> None:
    first, second = stream(3, "first").normal(size=40), stream(3, "second").normal(size=40)
    found = paired_bootstrap(first, second, resamples=200, seed=0)
    assert found == bootstrap_mean(first - second, 200, 0)
    turned = paired_bootstrap(second, first, resamples=200, seed=0)
    assert_close(turned, Interval(-found.value, -found.high, -found.low))


def test_pairing_sees_a_difference_that_two_intervals_hide() -> None:
    hard = stream(4, "hard").normal(3.0, 2.0, size=50)
    first, second = hard, hard - 0.1 + stream(4, "noise").normal(0.0, 0.05, size=50)
    assert bootstrap_mean(second, 300, 0).high > bootstrap_mean(first, 300, 0).low
    assert paired_bootstrap(first, second, resamples=300, seed=0).low > 0.0


def test_a_method_does_not_differ_from_itself() -> None:
    values = stream(5, "values").normal(size=11)
    assert paired_bootstrap(values, values, resamples=100, seed=0) == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("sums", "counts", "found"),
    [
        ([], [], "no records"),
        ([1.0], [1, 2], "one sum and one count"),
        ([[1.0]], [[1]], "one sum and one count"),
        ([math.nan], [1], "not finite"),
        ([math.inf], [1], "not finite"),
        ([1.0], [0], "not positive"),
        ([1.0], [math.nan], "not positive"),
    ],
)
def test_values_that_cannot_be_resampled_are_refused(sums: list[float], counts: list[int], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        bootstrap_ratio(sums, counts, 100, 0)


def test_no_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 resample"):
        bootstrap_mean([1.0], 0, 0)


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap([1.0, 2.0], [1.0], resamples=100, seed=0)
