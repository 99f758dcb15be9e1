"""Changes of NLL: signs and pairing by hand, intervals against a slow twin and against what is true by symmetry."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.report.gains import ResponseNlls, client_change, mean_change, pair
from fedmide.seeds import stream


def measures(sums: list[float], tokens: list[int], ids: str = "abcdefgh") -> ResponseNlls:
    return ResponseNlls.from_dict({"record_ids": list(ids[: len(sums)]), "nll_sums": sums, "num_tokens": tokens})


def test_a_lower_second_nll_is_a_change_below_0_over_all_tokens() -> None:
    change = client_change(measures([6.0, 10.0], [2, 6]), measures([4.0, 8.0], [2, 6]), resamples=50, seed=0)
    assert change is not None and change.value == pytest.approx((12 - 16) / 8)
    assert change.low == pytest.approx(-1.0) and change.high == pytest.approx(-2 / 6)  # of one record alone


def test_records_are_paired_by_id_whatever_their_order() -> None:
    first = measures([1.0, 2.0, 3.0], [1, 1, 2], "abc")
    second = measures([2.5, 0.5, 9.0], [2, 1, 5], "cax")
    paired = pair(first, second)
    assert paired is not None
    assert paired.first.tolist() == [1.0, 3.0] and paired.second.tolist() == [0.5, 2.5]
    assert paired.num_tokens.tolist() == [1.0, 2.0]


def test_a_record_that_is_not_a_number_is_left_out_on_both_sides() -> None:
    paired = pair(measures([1.0, None, 3.0], [1, 1, 1]), measures([None, 1.0, 2.0], [1, 1, 1]))  # type: ignore[list-item]
    assert paired is not None and paired.change() == -1.0


@pytest.mark.parametrize(
    "second",
    [measures([1.0], [1], "z"), measures([1.0], [2], "a"), measures([math.nan], [1], "a"), measures([], [])],
    ids=["nothing in common", "other tokens", "not finite", "no records"],
)
def test_records_that_cannot_be_paired_have_no_change(second: ResponseNlls) -> None:
    assert client_change(measures([1.0], [1], "a"), second, 50, 0) is None
    assert mean_change({"a": (measures([1.0], [1], "a"), second)}, 50, 0) is None


def test_without_one_side_there_is_no_change() -> None:
    assert client_change(None, measures([1.0], [1]), 50, 0) is None
    assert client_change(measures([1.0], [1]), None, 50, 0) is None


def test_the_mean_is_the_clients_own_and_its_interval_that_of_a_slow_twin() -> None:
    clients = {
        "a": (measures([6.0, 10.0, 4.0], [2, 6, 1]), measures([4.0, 8.0, 5.0], [2, 6, 1])),
        "b": (measures([3.0, 9.0], [1, 3]), measures([1.0, 9.5], [1, 3])),
    }
    found = mean_change(clients, resamples=40, seed=3)
    draws: list[list[float]] = []
    for name, (first, second) in clients.items():
        generator = stream(3, "bootstrap", client=name)
        draws.append([])
        for _ in range(40):
            rows = generator.integers(len(first.num_tokens), size=len(first.num_tokens))
            lost = sum(float(second.nll_sums[row]) - float(first.nll_sums[row]) for row in rows)
            draws[-1].append(lost / sum(float(first.num_tokens[row]) for row in rows))
    low, high = np.percentile([(one + two) / 2 for one, two in zip(*draws, strict=True)], (2.5, 97.5))
    assert found is not None
    assert found.value == pytest.approx(((4 + 8 + 5 - 6 - 10 - 4) / 9 + (10.5 - 12) / 4) / 2)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@given(st.lists(st.floats(0.1, 50), min_size=2, max_size=8), st.floats(-3, 3))
def test_a_constant_change_has_an_interval_of_no_width(sums: list[float], change: float) -> None:
    tokens = [1] * len(sums)
    pairs = {name: (measures(sums, tokens), measures([each + change for each in sums], tokens)) for name in "xy"}
    found = mean_change(pairs, 20, 0)
    assert found is not None
    assert (found.low, found.value, found.high) == tuple(pytest.approx(change, abs=1e-9) for _ in range(3))
