"""The weighted mean: equal to a slow reference, and unchanged to the bit by what must not matter."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmide.federation.messages import MAX_RECORDS
from fedmide.methods.aggregation import weighted_mean
from fedmide.model import adapters
from fedmide.model.interface import Adapter

SHAPES = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (4, 2)}
any_value = st.floats(width=32, allow_nan=False, allow_infinity=False)
# of alike size, 20 binary digits: so few records sum up exactly in float64, as they do in practice but for rounding
coarse_value = st.integers(-(2**20), 2**20).map(lambda number: number / 2**20)


def adapter_of(values: st.SearchStrategy[float]) -> st.SearchStrategy[Adapter]:
    return st.fixed_dictionaries({name: arrays(np.float32, shape, elements=values) for name, shape in SHAPES.items()})


def replies(values: st.SearchStrategy[float], min_size: int = 1) -> st.SearchStrategy[list[tuple[Adapter, int]]]:
    return st.lists(st.tuples(adapter_of(values), st.integers(0, 2000)), min_size=min_size, max_size=6)


def encoded(adapter: Adapter | None) -> bytes | None:
    return None if adapter is None else adapters.encode(adapter)


@given(replies(any_value))
def test_the_mean_is_exact_except_for_rounding(given_replies: list[tuple[Adapter, int]]) -> None:
    mean = weighted_mean(given_replies)
    total = sum(weight for _, weight in given_replies)
    if total == 0:
        assert mean is None
        return
    assert mean is not None
    assert adapters.problems(mean, SHAPES) == ()
    for name in SHAPES:
        largest = max(float(np.abs(adapter[name]).max()) for adapter, _ in given_replies)
        for index, value in np.ndenumerate(mean[name]):
            exact = sum(Fraction(float(adapter[name][index])) * weight for adapter, weight in given_replies) / total
            # half a float32 step of the result (or of the smallest float32), and float64's rounding on the way
            allowed = Fraction(abs(exact) * Fraction(1, 2**24)) + Fraction(largest) / 2**50 + Fraction(1, 2**149)
            assert abs(Fraction(float(value)) - exact) <= allowed


@given(adapter_of(any_value), st.lists(st.integers(1, MAX_RECORDS // 8), min_size=1, max_size=8))
def test_equal_adapters_give_themselves_to_the_bit(adapter: Adapter, weights: list[int]) -> None:
    mean = weighted_mean((adapter, weight) for weight in weights)
    assert mean is not None
    assert encoded(mean) == encoded(adapter)


@given(replies(coarse_value), st.randoms(use_true_random=False))
def test_the_order_of_the_replies_does_not_show(given_replies: list[tuple[Adapter, int]], random: Any) -> None:
    shuffled = list(given_replies)
    random.shuffle(shuffled)
    assert encoded(weighted_mean(shuffled)) == encoded(weighted_mean(given_replies))


@given(replies(any_value), adapter_of(any_value), st.integers(0, 6))
def test_a_reply_without_weight_is_as_if_it_were_not_there(
    given_replies: list[tuple[Adapter, int]], idle: Adapter, place: int
) -> None:
    more = [*given_replies[:place], (idle, 0), *given_replies[place:]]
    assert encoded(weighted_mean(more)) == encoded(weighted_mean(given_replies))


@pytest.mark.parametrize("weights", [[], [0], [0, 0]])
def test_without_any_weight_there_is_no_mean(weights: list[int]) -> None:
    assert weighted_mean((adapters.fresh(SHAPES, weight), weight) for weight in weights) is None


@given(replies(any_value))
def test_the_replies_stay_as_they_are_even_if_they_can_not_be_written(given_replies: list[tuple[Adapter, int]]) -> None:
    before = [encoded(adapter) for adapter, _ in given_replies]
    for adapter, _ in given_replies:
        for array in adapter.values():
            array.setflags(write=False)
    mean = weighted_mean(given_replies)
    assert [encoded(adapter) for adapter, _ in given_replies] == before
    for array in (mean or {}).values():
        array.fill(1)  # the result is nobody else's
    assert [encoded(adapter) for adapter, _ in given_replies] == before


def test_factors_are_averaged_separately() -> None:
    """mean(B) mean(A), as FedIT and FedMIDE do, which is not mean(BA)."""
    one = {"x.lora_A.weight": np.ones((1, 1), np.float32), "x.lora_B.weight": np.ones((1, 1), np.float32)}
    two = {name: 3 * array for name, array in one.items()}
    mean = weighted_mean([(one, 1), (two, 1)])
    assert mean is not None
    assert (mean["x.lora_B.weight"] @ mean["x.lora_A.weight"]).item() == 4.0  # mean(BA) is 5


def test_weights_are_numbers_of_records() -> None:
    low, high = ({"x": np.full((1,), value, np.float32)} for value in (0.0, 4.0))
    mean = weighted_mean([(low, 3), (high, 1)])
    assert mean is not None
    assert mean["x"].tolist() == [1.0]


def test_one_adapter_is_held_at_a_time() -> None:
    """Replies are folded in as they arrive: each is requested only after the one before is folded in."""
    told: list[str] = []

    def come() -> Any:
        for name in ("first", "second"):
            told.append(name)
            yield {"x": np.ones((1,), np.float32)}, 1
            told.append(f"{name} folded")

    assert weighted_mean(come()) is not None
    assert told == ["first", "first folded", "second", "second folded"]
