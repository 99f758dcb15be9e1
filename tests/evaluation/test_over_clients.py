"""Figures over clients: by hand, against the libraries' own, and what must hold for any clients."""

import math
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmide.evaluation.over_clients import OverClients, over_clients, spearman, worse_than_local

names = st.text("abcdef", min_size=1, max_size=3)
positive = st.floats(1e-3, 1e3)
federations = st.dictionaries(names, st.tuples(positive, st.integers(1, 500)), min_size=1, max_size=8)


def test_figures_by_hand() -> None:
    found = over_clients({"a": 1.0, "b": 2.0, "c": 6.0}, {"a": 8, "b": 1, "c": 1}, lower_is_better=True)
    assert found == OverClients(
        num_clients=3,
        mean=3.0,
        weighted_mean=1.6,
        worst=6.0,
        worst_client="c",
        standard_deviation=math.sqrt(14 / 3),
        harmonic_mean=pytest.approx(1.8),
        jain=pytest.approx(81 / 123),
    )


@given(federations)
def test_figures_are_those_of_the_libraries(federation: dict[str, tuple[float, int]]) -> None:
    values = {client: value for client, (value, _) in federation.items()}
    weights = {client: weight for client, (_, weight) in federation.items()}
    found = over_clients(values, weights, lower_is_better=False)
    sample = list(values.values())
    assert found.mean == pytest.approx(statistics.fmean(sample))
    assert found.weighted_mean == pytest.approx(statistics.fmean(sample, list(weights.values())))
    assert found.standard_deviation == pytest.approx(statistics.pstdev(sample), abs=1e-9)
    assert found.harmonic_mean == pytest.approx(statistics.harmonic_mean(sample))
    assert found.jain is not None
    assert 1 / len(sample) - 1e-9 <= found.jain <= 1 + 1e-9
    assert (found.worst, values[found.worst_client]) == (min(sample), min(sample))


@given(federations, st.booleans())
def test_the_order_of_clients_does_not_matter(federation: dict[str, tuple[float, int]], lower: bool) -> None:
    values = {client: value for client, (value, _) in federation.items()}
    weights = {client: weight for client, (_, weight) in federation.items()}
    turned = dict(reversed(values.items()))
    assert over_clients(values, weights, lower) == over_clients(turned, weights, lower)


@given(federations, st.floats(1e-200, 1e150))
def test_jains_index_knows_no_unit(federation: dict[str, tuple[float, int]], unit: float) -> None:
    values = {client: value for client, (value, _) in federation.items()}
    weights = dict.fromkeys(values, 1)
    scaled = {client: value * unit for client, value in values.items()}
    assert over_clients(scaled, weights, True).jain == pytest.approx(over_clients(values, weights, True).jain)


def test_jains_index_at_its_ends() -> None:
    weights = {"a": 1, "b": 1, "c": 1, "d": 1}
    assert over_clients(dict.fromkeys(weights, 0.3), weights, True).jain == pytest.approx(1.0)
    assert over_clients({"a": 5.0, "b": 0.0, "c": 0.0, "d": 0.0}, weights, True).jain == 0.25


def test_the_worst_client_goes_by_direction_and_ties_by_name() -> None:
    values, weights = {"b": 1.0, "a": 1.0, "d": 3.0, "c": 3.0}, {"a": 1, "b": 1, "c": 1, "d": 1}
    assert over_clients(values, weights, lower_is_better=True).worst_client == "c"
    assert over_clients(values, weights, lower_is_better=False).worst_client == "a"


def test_zeros_and_negative_values() -> None:
    weights = {"a": 1, "b": 1}
    one_zero = over_clients({"a": 0.0, "b": 1.0}, weights, False)
    assert (one_zero.harmonic_mean, one_zero.jain) == (0.0, 0.5)
    all_zero = over_clients({"a": 0.0, "b": 0.0}, weights, False)
    assert (all_zero.harmonic_mean, all_zero.jain) == (0.0, None)
    negative = over_clients({"a": -1.0, "b": 1.0}, weights, False)
    assert (negative.mean, negative.harmonic_mean, negative.jain) == (0.0, None, None)


@pytest.mark.parametrize(
    ("values", "weights", "found"),
    [
        ({}, {}, "no clients"),
        ({"a": 1.0}, {"b": 1}, r"\['a', 'b'\]"),
        ({"a": 1.0, "b": math.nan}, {"a": 1, "b": 1}, r"values of clients \['b'\]"),
        ({"a": math.inf}, {"a": 1}, r"values of clients \['a'\]"),
        ({"a": 1.0, "b": 1.0}, {"a": 1, "b": 0}, r"weights of clients \['b'\]"),
    ],
)
def test_clients_without_figures_are_refused(values: dict[str, float], weights: dict[str, int], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        over_clients(values, weights, lower_is_better=True)


def test_the_gap_to_local_counts_the_worse_off_by_direction() -> None:
    method, local = {"b": 2.0, "a": 3.0, "c": 1.0}, {"a": 2.0, "b": 1.5, "c": 1.0}
    assert worse_than_local(method, local, lower_is_better=True) == ("a", "b")
    assert worse_than_local(method, local, lower_is_better=False) == ()
    assert worse_than_local(local, method, lower_is_better=False) == ("a", "b")


@pytest.mark.parametrize("local", [{"a": 1.0}, {"a": 1.0, "b": math.nan}])
def test_the_gap_to_local_needs_all_clients(local: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="'b'"):
        worse_than_local({"a": 1.0, "b": 1.0}, local, lower_is_better=True)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_spearman_is_the_correlation_of_ranks(pairs: list[tuple[int, int]]) -> None:
    scores, lengths = [score for score, _ in pairs], [length for _, length in pairs]
    found = spearman(scores, lengths)
    if len(pairs) < 3 or len(set(scores)) == 1 or len(set(lengths)) == 1:
        assert found is None
        return
    expected = np.corrcoef(stats.rankdata(scores), stats.rankdata(lengths))[0, 1]
    assert found == pytest.approx(expected, abs=1e-12)


def test_spearman_of_rankings_without_ties_by_its_formula() -> None:
    # squared rank differences 1, 1, 0, 1, 1: 1 - 6 * 4 / (5 * 24)
    assert spearman([0.1, 0.5, 0.7, 0.8, 2.0], [20, 10, 30, 50, 40]) == pytest.approx(0.8)


@given(st.lists(st.floats(0.01, 4.0), min_size=3, max_size=9, unique=True))
def test_spearman_of_one_order_is_1_even_with_an_infinite_score(scores: list[float]) -> None:
    ordered = [*sorted(scores), math.inf]
    assert all(first < second for first, second in pairwise(ordered))
    assert spearman(ordered, range(len(ordered))) == pytest.approx(1.0)


def test_spearman_refuses_what_does_not_pair() -> None:
    with pytest.raises(ValueError, match="one score and one length"):
        spearman([1.0, 2.0, 3.0], [1, 2])
    with pytest.raises(ValueError, match="not a number"):
        spearman([1.0, 2.0, math.nan], [1, 2, 3])
