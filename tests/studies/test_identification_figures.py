"""Figures of identification by hand, against scipy and against slow twins."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from fedmide.data.records import RecordId
from fedmide.model.interface import Nll
from fedmide.studies.identification_figures import (
    RIVALS,
    Moment,
    ObservedSite,
    auroc,
    average_precision,
    found,
    site_figures,
    summarize,
)

ranked = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30).filter(
    lambda rows: 0 < sum(positive for _, positive in rows) < len(rows)
)


@given(ranked)
def test_auroc_is_mann_and_whitneys(rows: list[tuple[int, bool]]) -> None:
    above = [value for value, positive in rows if positive]
    below = [value for value, positive in rows if not positive]
    expected = mannwhitneyu(above, below).statistic / (len(above) * len(below))
    assert auroc(*zip(*rows, strict=True)) == pytest.approx(expected)


@given(ranked)
def test_auroc_of_turned_scores_is_the_rest(rows: list[tuple[int, bool]]) -> None:
    values, positive = zip(*rows, strict=True)
    assert auroc(values, positive) + auroc([-value for value in values], positive) == pytest.approx(1)


@given(ranked)
def test_average_precision_is_the_area_under_its_steps(rows: list[tuple[int, bool]]) -> None:
    """Sum over thresholds, from the highest, of the gain in recall times the precision."""
    positives = sum(positive for _, positive in rows)
    area, recall = 0.0, 0.0
    for threshold in sorted({value for value, _ in rows}, reverse=True):
        taken = [positive for value, positive in rows if value >= threshold]
        area += (sum(taken) / positives - recall) * sum(taken) / len(taken)
        recall = sum(taken) / positives
    assert average_precision(*zip(*rows, strict=True)) == pytest.approx(area)


def test_a_perfect_and_a_reversed_order() -> None:
    truth = [False, False, True, True]
    assert auroc([1, 2, 3, 4], truth) == average_precision([1, 2, 3, 4], truth) == 1.0
    assert auroc([4, 3, 2, 1], truth) == 0.0
    assert average_precision([4, 3, 2, 1], truth) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert auroc([1, 1, 1, 1], truth) == average_precision([1, 1, 1, 1], truth) == 0.5


@pytest.mark.parametrize(
    ("said", "truth", "precision", "recall", "f1"),
    [
        ("abc", "bcde", 2 / 3, 2 / 4, 4 / 7),
        ("", "ab", None, 0.0, 0.0),
        ("ab", "", 0.0, None, 0.0),
        ("", "", None, None, None),
        ("ab", "ab", 1.0, 1.0, 1.0),
    ],
)
def test_found_by_hand(said: str, truth: str, precision: float, recall: float, f1: float) -> None:
    figures = found([RecordId(each) for each in said], [RecordId(each) for each in truth])
    assert (figures["precision"], figures["recall"]) == (precision, recall)
    assert figures["f1"] == (None if f1 is None else pytest.approx(f1))
    assert figures["right"] == len(set(said) & set(truth))


def test_rivals_by_hand() -> None:
    local, aggregated = Nll(6.0, 4), Nll(8.0, 4)
    values = {name: rival(local, aggregated) for name, rival in RIVALS.items()}
    assert values == {
        "length": 4,
        "nll_local": 1.5,
        "nll_aggregated": 2.0,
        "difference_nats": 2.0,
        "ratio": pytest.approx(math.exp(0.5)),
        "relative_gap": 0.25,
    }


def moment(differences: dict[str, float], personal: str) -> Moment:
    """Records whose aggregated NLL is 1 and whose own is less by so much."""
    nlls = {RecordId(name): (Nll(10 - 10 * value, 10), Nll(10.0, 10)) for name, value in differences.items()}
    scores = {record: math.exp(aggregated.mean - local.mean) for record, (local, aggregated) in nlls.items()}
    return Moment({"all": nlls, "response": nlls}, frozenset(map(RecordId, personal)), scores)


SITE = ObservedSite(
    truth=frozenset(map(RecordId, "cd")),
    warmup=moment({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.4}, "bcd"),
    rounds=moment({"a": 0.1, "b": 0.0, "c": 0.2, "d": 0.4}, "d"),
)


def test_a_site_by_hand() -> None:
    figures = site_figures(SITE)
    before, after = figures["after_warmup"], figures["after_rounds"]
    assert before["rivals"]["response"]["ratio"]["auroc"] == before["method"]["auroc"] == 0.75
    assert before["rivals"]["all"]["nll_local"]["auroc"] == 0.25
    assert before["rivals"]["all"]["length"]["auroc"] == before["rivals"]["all"]["nll_aggregated"]["auroc"] == 0.5
    assert before["personal"]["precision"] == pytest.approx(2 / 3) and before["personal"]["recall"] == 1.0
    assert after["method"]["auroc"] == 1.0
    assert (after["personal"]["precision"], after["personal"]["recall"]) == (1.0, 0.5)
    assert figures["enrolled"] == {"number": 2, "right": 1, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}


def test_means_are_over_the_sites_that_have_a_figure() -> None:
    none = ObservedSite(SITE.truth, SITE.warmup, moment({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.4}, ""))
    figures = summarize({"x": SITE, "y": none}, resamples=50, seed=0)
    assert set(figures["clients"]) == {"x", "y"}
    assert figures["mean"]["after_rounds"]["personal"]["precision"] == 1.0
    assert figures["mean"]["after_rounds"]["personal"]["recall"] == 0.25
    assert figures["mean"]["after_rounds"]["rivals"]["all"]["ratio"]["auroc"] == (1.0 + 0.75) / 2
    low, high = figures["auroc_intervals"]["after_rounds"]["all"]["ratio"]
    assert 0 <= low <= 0.875 <= high <= 1
    assert figures["auroc_intervals"]["after_warmup"]["all"]["length"] == (0.5, 0.5)


def test_scores_that_are_no_number_are_left_out_and_counted() -> None:
    nlls = {**SITE.warmup.nlls["all"], RecordId("c"): (Nll(math.nan, 10), Nll(10.0, 10))}
    odd = ObservedSite(SITE.truth, Moment({"all": nlls}, SITE.warmup.personal, {}), SITE.rounds)
    figures = site_figures(odd)["after_warmup"]
    assert figures["rivals"]["all"]["ratio"]["num_records"] == 3
    assert figures["rivals"]["all"]["ratio"]["num_not_finite"] == 1
    assert figures["rivals"]["all"]["ratio"]["auroc"] == 1.0
    assert figures["method"] is None
    assert summarize({"x": odd}, 10, 0)["auroc_intervals"]["after_warmup"]["all"]["ratio"] is None


@pytest.mark.parametrize("measure", [auroc, average_precision])
def test_a_rising_function_of_the_score_changes_nothing(measure: Callable[..., float]) -> None:
    values, truth = [0.1, 0.5, 0.5, 2.0, 3.0], [False, True, False, True, False]
    assert measure(values, truth) == measure([math.exp(value) for value in values], truth)
