"""Values of metrics.json, by hand on two clients."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from fedmide.config import Config, parse
from fedmide.data.records import RecordId
from fedmide.evaluation.measure import Measured
from fedmide.evaluation.summary import (
    TEXT_METRICS,
    StageName,
    federation_figures,
    set_figures,
    stage_figures,
    summarize,
    text_figures,
)
from fedmide.federation.enrollment import Reason, SetName
from fedmide.federation.ledger import Entry

CONFIG = parse({"evaluation": {"bootstrap": 100}})
NO_RECORDS = Measured((), (), (), (), (), 0)


def measured(
    sums: tuple[float, ...],
    counts: tuple[int, ...],
    choices: tuple[tuple[float, ...], ...] = (),
    lengths: tuple[tuple[int, ...], ...] = (),
    num_truncated: int = 0,
) -> Measured:
    ids = tuple(f"r-{number}" for number in range(len(sums)))
    return Measured(ids, sums, counts, choices, lengths, num_truncated)


def entry(
    number: int, record: str, into: SetName, reason: Reason, score: float | None = None, tokens: int = 5
) -> Entry:
    threshold = None if reason == "own-nll" else 1.25
    return Entry(number, RecordId(record), tokens, 1.0, None, score, into, reason, threshold, -1)


# --- one client under one adapter


def test_the_nll_is_the_sum_over_records_by_the_sum_of_their_tokens() -> None:
    figures = stage_figures(measured((6.0, 2.0), (2, 6), num_truncated=1), CONFIG)
    assert figures["num_records"] == 2 and figures["num_not_finite"] == 0 and figures["num_truncated"] == 1
    nll = figures["response_nll"]
    assert (nll["sum"], nll["count"], nll["value"]) == (8.0, 8, 1.0)
    assert 2 / 6 <= nll["low"] <= 1.0 <= nll["high"] <= 3.0
    assert figures["perplexity"] == {name: math.exp(nll[name]) for name in ("value", "low", "high")}
    assert figures["choice"] is None


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_likelihood_that_is_not_a_number_is_left_out_and_counted(odd: float) -> None:
    choices = ((6.0, 7.0), (odd, 1.0), (2.0, 1.0))
    figures = stage_figures(measured((6.0, odd, 2.0), (2, 100, 6), choices, ((1, 1),) * 3), CONFIG)
    assert figures["num_records"] == 2 and figures["num_not_finite"] == 1
    assert (figures["response_nll"]["sum"], figures["response_nll"]["count"]) == (8.0, 8)
    assert figures["choice"]["num_records"] == 2 and figures["choice"]["accuracy"] == 0.5


def test_without_a_number_there_is_no_figure() -> None:
    figures = stage_figures(measured((math.nan,), (3,), ((math.nan, 1.0),), ((1, 1),)), CONFIG)
    assert figures["num_records"] == 0 and figures["num_not_finite"] == 1
    assert figures["response_nll"] is None and figures["choice"] is None
    assert stage_figures(NO_RECORDS, CONFIG) == {
        "num_records": 0,
        "num_not_finite": 0,
        "num_truncated": 0,
        "response_nll": None,
        "perplexity": None,
        "choice": None,
        "options": None,
    }


def test_the_choice_is_the_likeliest_by_its_sum_or_by_its_sum_per_character() -> None:
    choices = ((4.0, 5.0, 6.0), (4.0, 3.0, 9.0), (4.0, 4.0, 9.0), (1.0, 2.0, math.nan))
    lengths = ((1, 5, 6), (4, 1, 1), (2, 2, 2), (1, 1, 1))
    choice = stage_figures(measured((4.0, 4.0, 4.0, 1.0), (1, 1, 1, 1), choices, lengths), CONFIG)["choice"]
    assert choice["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert choice["accuracy_norm"] == (0 + 1 + 0.5 + 1) / 4
    assert choice["standard_error"] == math.sqrt(0.625 * 0.375 / 4)
    assert (choice["num_records"], choice["num_options"], choice["chance"]) == (4, 3, pytest.approx(1 / 3))
    assert 0 <= choice["low"] < choice["accuracy"] < choice["high"] <= 1 and choice["num_left_out"] == 0


def test_a_record_whose_choices_do_not_fit_is_left_out_and_counted() -> None:
    choices, lengths = ((4.0, 5.0), (), (5.0, 4.0), (math.nan, 1.0)), ((1, 1),) * 4
    choice = stage_figures(measured((4.0, 4.0, 5.0, 1.0), (1, 1, 1, 1), choices, lengths), CONFIG)["choice"]
    assert (choice["accuracy"], choice["num_records"], choice["num_left_out"]) == (0.5, 2, 2)
    assert stage_figures(measured((4.0,), (1,), ((),), ((1, 1),)), CONFIG)["choice"] is None


# --- the sets of one client


LEDGER = (
    entry(-1, "a", "shared", "own-nll"),
    entry(-1, "b", "shared", "own-nll"),
    entry(0, "a", "shared", "below-threshold", 0.9, tokens=40),
    entry(0, "b", "personal", "at-or-above-threshold", 1.6, tokens=10),
    entry(0, "c", "personal", "at-or-above-threshold", 1.3, tokens=20),
    entry(0, "d", "personal", "not-finite", None, tokens=5),
    entry(0, "b", "personal", "own-nll"),
    entry(1, "b", "personal", "at-or-above-threshold", 1.1),
    entry(1, "c", "shared", "below-threshold", 0.8),
    entry(1, "d", "personal", "not-finite", None),
    entry(1, "b", "personal", "own-nll"),
    entry(2, "b", "personal", "not-finite", None),
    entry(2, "d", "personal", "not-finite", None),
)
RECORDS = [RecordId(name) for name in "abcd"]


def test_the_sets_are_reported_after_the_split_and_at_the_end() -> None:
    assert set_figures(LEDGER, RECORDS) == {
        "shared": 2,
        "personal": 2,
        "shared_at_split": 1,
        "enrolled": 1,
        "not_finite": 2,
        "spearman_score_tokens": -1.0,
    }


def test_without_a_split_everything_is_shared() -> None:
    for ledger in ((), LEDGER[:2]):
        assert set_figures(ledger, RECORDS) == {
            "shared": 4,
            "personal": 0,
            "shared_at_split": None,
            "enrolled": 0,
            "not_finite": 0,
            "spearman_score_tokens": None,
        }


# --- the federation


def event(stage: str, number: int, client: str, num_records: int = 3, refused: str = "", **metrics: float) -> Any:
    sums = {name: {"sum": value, "count": 1} for name, value in metrics.items()}
    told = {"stage": stage, "round": number, "client": client, "num_records": num_records, "refused": refused}
    return {**told, "bytes_down": 10, "bytes_up": 5, "metrics": sums}


def test_rounds_refusals_and_costs_are_counted() -> None:
    events = [
        event("warmup", -1, "a", steps=2, trained_tokens=7, scored_tokens=5),
        event("warmup", -1, "b", num_records=0, refused="of another shape"),
        event("train", 0, "a", num_records=0, refused="of another shape"),
        event("train", 0, "b", num_records=0, scored_tokens=4),
        event("personalize", 1, "a", num_records=0, steps=3, trained_tokens=9),
    ]
    assert federation_figures(events) == {
        "rounds": 2,
        "rounds_without_aggregate": 1,
        "refused_replies": 2,
        "bytes_down": 50,
        "bytes_up": 25,
        "steps": 5,
        "trained_tokens": 16,
        "scored_tokens": 9,
    }


# --- generated responses


def test_text_metrics_are_means_over_records() -> None:
    figures = text_figures(
        [{"prediction": "the heart", "reference": "heart"}, {"prediction": "lung", "reference": "liver"}], CONFIG
    )
    assert figures is not None and figures["num_records"] == 2
    assert figures["exact_match"]["value"] == 0.5 and figures["token_f1"]["value"] == 0.5
    assert figures["rouge_l"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert {"bleu", "chrf", "protocol"} <= set(figures)
    assert text_figures([], CONFIG) is None


# --- all clients


def summarized(
    clients: Mapping[str, Mapping[StageName, Measured]], predictions: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    texts = {name: [] for name in clients} | dict(predictions or {})
    return summarize(CONFIG, clients, {name: {"shared": 1} for name in clients}, texts, [], "0123")


def test_figures_over_clients_weigh_clients_or_records() -> None:
    found = summarized(
        {
            "a": {"base": measured((2.0,), (1,)), "aggregated": measured((1.0,), (1,))},
            "b": {"base": measured((4.0, 4.0, 4.0), (1, 1, 1)), "aggregated": measured((3.0, 3.0, 3.0), (1, 1, 1))},
        }
    )
    over = found["over_clients"]
    assert set(over) == {"base", "aggregated"}
    nll = over["base"]["response_nll"]
    assert (nll["mean"], nll["weighted_mean"], nll["worst"], nll["worst_client"]) == (3.0, 3.5, 4.0, "b")
    assert (nll["num_clients"], nll["standard_deviation"]) == (2, 1.0)
    assert over["aggregated"]["response_nll"]["mean"] == 2.0
    assert over["base"]["choice_accuracy"] is None
    assert found["clients"]["a"]["sets"] == {"shared": 1} and found["clients"]["a"]["generation"] is None


def test_the_worst_accuracy_is_the_lowest() -> None:
    right, wrong = measured((1.0,), (1,), ((1.0, 2.0),), ((1, 1),)), measured((3.0,), (1,), ((3.0, 2.0),), ((1, 1),))
    accuracy = summarized({"a": {"base": right}, "b": {"base": wrong}})["over_clients"]["base"]["choice_accuracy"]
    assert (accuracy["mean"], accuracy["worst"], accuracy["worst_client"]) == (0.5, 0.0, "b")


def test_clients_without_test_records_are_left_out_of_the_figures_over_clients() -> None:
    found = summarized({"a": {"base": measured((2.0,), (1,))}, "b": {"base": NO_RECORDS}})
    assert set(found["clients"]) == {"a", "b"}
    assert found["over_clients"]["base"]["response_nll"]["num_clients"] == 1
    assert summarized({"a": {"base": NO_RECORDS}})["over_clients"] == {}


def test_generated_responses_have_figures_over_clients() -> None:
    right, wrong = {"prediction": "heart", "reference": "heart"}, {"prediction": "x", "reference": "heart"}
    found = summarized({name: {"base": NO_RECORDS} for name in "abc"}, {"a": [right], "b": [wrong, wrong, wrong]})
    assert set(found["over_clients"]) == {"generation"}
    exact = found["over_clients"]["generation"]["exact_match"]
    assert (exact["mean"], exact["weighted_mean"], exact["worst_client"], exact["num_clients"]) == (0.5, 0.25, "b", 2)
    assert set(found["over_clients"]["generation"]) == set(TEXT_METRICS)
    given = [found["clients"][name]["generation"]["bleu"]["value"] for name in "ab"]
    assert found["over_clients"]["generation"]["bleu"]["mean"] == pytest.approx(sum(given) / 2)


def test_the_protocol_explains_the_figures() -> None:
    protocol = summarize(Config(), {}, {}, {}, [], "0123")["protocol"]
    assert protocol["prompt"] == {"template": "alpaca", "hash": "0123"}
    assert protocol["cutoff"] == 512 and protocol["decoding"].startswith("greedy")
    assert "1000 resamples" in protocol["interval"] and "3 responses of other test records" in protocol["choice"]
