"""Choice by likelihood: what the draws promise, credits by hand and against a slow twin."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedmide.evaluation.choice import choice_accuracy, draw_choices, standard_error

responses_lists = st.lists(st.sampled_from(["yes", " yes", "no", "no\n", "maybe", "often", "rarely"]), max_size=12)


@given(responses_lists, st.integers(2, 6), st.integers(0, 3))
def test_draws_are_distinct_others_and_as_many_as_there_are(responses: list[str], choices: int, seed: int) -> None:
    draws = draw_choices(responses, choices, seed, "a")
    distinct = {response.strip() for response in responses}
    assert len(draws) == len(responses)
    for response, drawn in zip(responses, draws, strict=True):
        texts = [response.strip(), *(responses[index].strip() for index in drawn)]
        assert len(set(texts)) == len(texts) == min(choices, len(distinct))


def test_draws_repeat_and_hang_on_seed_and_client() -> None:
    responses = [f"answer {number}" for number in range(20)]
    assert draw_choices(responses, 4, 1, "a") == draw_choices(responses, 4, 1, "a")
    assert draw_choices(responses, 4, 1, "a") != draw_choices(responses, 4, 2, "a")
    assert draw_choices(responses, 4, 1, "a") != draw_choices(responses, 4, 1, "b")


def test_a_records_draw_does_not_hang_on_the_records_after_it() -> None:
    responses = [f"answer {number}" for number in range(20)]
    # A further record with a known response leaves the pool, and so every other record's draw, as it was.
    assert draw_choices([*responses, "answer 3"], 4, 0, "a")[:20] == draw_choices(responses, 4, 0, "a")


def test_every_distinct_response_is_as_likely() -> None:
    responses = ["often"] * 1997 + ["yes", "no", "maybe"]
    counts = Counter(index for drawn in draw_choices(responses, 2, 0, "a")[:1997] for index in drawn)
    assert set(counts) == {1997, 1998, 1999}
    # 1997 draws of probability 1/3 each: a standard deviation of 21.
    assert all(abs(count - 1997 / 3) < 4 * 21.1 for count in counts.values())


@pytest.mark.parametrize("responses", [[], ["yes"], ["yes", "yes ", "\nyes"]])
def test_fewer_than_two_distinct_responses_leave_no_choice(responses: list[str]) -> None:
    assert draw_choices(responses, 4, 0, "a") == ((),) * len(responses)


def test_a_single_option_is_not_a_choice() -> None:
    with pytest.raises(ValueError, match="at least 2 options"):
        draw_choices(["yes", "no"], 1, 0, "a")


def test_best_and_best_by_length_by_hand() -> None:
    nll_sums = [[10.0, 12.0, 30.0], [10.0, 12.0, 30.0], [5.0, 4.0], [7.0, 7.0, 7.0, 9.0]]
    lengths = [[10, 6, 10], [10, 20, 10], [10, 4], [7, 7, 14, 9]]
    scores = choice_accuracy(nll_sums, lengths)
    assert scores.correct.tolist() == [1.0, 1.0, 0.0, 1 / 3]
    # 1.0 2.0 3.0 | 1.0 0.6 3.0 | 0.5 1.0 | 1.0 1.0 0.5 1.0
    assert scores.correct_norm.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert scores.num_options.tolist() == [3, 3, 2, 4]
    assert scores.chance() == pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 4) / 4)


def slow_credit(values: list[float]) -> float:
    """The average over which of the tied choices is taken."""
    best = [position for position, value in enumerate(values) if all(value <= other for other in values)]
    return sum(1.0 for position in best if position == 0) / len(best)


choice_lists = st.lists(
    st.lists(st.tuples(st.integers(0, 6).map(float) | st.just(math.inf), st.integers(1, 3)), min_size=2, max_size=5),
    min_size=1,
    max_size=6,
)


@given(choice_lists)
def test_credits_are_those_of_a_slow_twin(records: list[list[tuple[float, int]]]) -> None:
    scores = choice_accuracy(
        [[nll_sum for nll_sum, _ in record] for record in records],
        [[length for _, length in record] for record in records],
    )
    assert scores.correct.tolist() == [slow_credit([nll for nll, _ in record]) for record in records]
    assert scores.correct_norm.tolist() == [slow_credit([nll / length for nll, length in record]) for record in records]


@given(st.lists(st.integers(0, 2).map(float), min_size=2, max_size=5))
def test_credits_over_all_places_of_the_reference_add_to_1(nll_sums: list[float]) -> None:
    turns = [nll_sums[place:] + nll_sums[:place] for place in range(len(nll_sums))]
    scores = choice_accuracy(turns, [[1] * len(nll_sums)] * len(turns))
    assert scores.correct.sum() == pytest.approx(1.0)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
def test_standard_error_is_never_below_the_credits_own(credits: list[float]) -> None:
    values = np.array(credits)
    own = float(np.std(values)) / math.sqrt(len(values))
    assume(own > 1e-6)
    assert standard_error(values) >= own - 1e-12
    assert standard_error(np.round(values)) == pytest.approx(float(np.std(np.round(values))) / math.sqrt(len(values)))


@pytest.mark.parametrize(
    ("nll_sums", "lengths", "found"),
    [
        ([], [], "no records"),
        ([[1.0]], [[1]], "fewer than 2"),
        ([[1.0, 2.0]], [[1]], "shape"),
        ([[1.0, 2.0]], [], "shape"),
        ([[1.0, math.nan]], [[1, 1]], "not a number"),
        ([[1.0, 2.0]], [[1, 0]], "no characters"),
    ],
)
def test_values_that_cannot_be_scored_are_refused(
    nll_sums: list[list[float]], lengths: list[list[int]], found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        choice_accuracy(nll_sums, lengths)
