import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from fedmide.evaluation.intervals import paired_bootstrap
from fedmide.evaluation.measure import Measured
from fedmide.studies.comparison_figures import RunOutcome, compare
from fedmide.studies.tables import sheets, to_html, to_markdown

RESAMPLES = 500
PROTOCOL = {
    "commits": ["a" * 40],
    "learning_rates": {"mine": {"rate": 0.1}},
    "protocol": {
        "seeds": [0, 1],
        "budget": {"rounds": 2, "steps_per_round": 3, "steps_per_client": 6},
        "data": {"a": {"truncated": 1}, "b": {"truncated": 0}},
        "cutoff": 64,
    },
}


def measured(sums: Sequence[float], tokens: Sequence[int], choices: Sequence[Sequence[float]] = ()) -> Measured:
    ids = tuple(f"r{number}" for number in range(len(sums)))
    lengths = tuple(tuple(1 for _ in row) for row in choices)
    return Measured(ids, tuple(sums), tuple(tokens), tuple(tuple(row) for row in choices), lengths, 0)


def outcome(costs: Mapping[str, float] | None = None, **clients: Measured) -> RunOutcome:
    return RunOutcome(clients, costs or {})


def two_methods() -> dict[str, dict[int, RunOutcome]]:
    """Client a: 2 and 4 nats per token over two records; b: one record. Of `mine` two seeds around 1 less."""
    tokens = [1, 3]
    theirs = outcome({"steps": 6.0}, a=measured([2.0, 12.0], tokens), b=measured([8.0], [2]))
    runs = [
        outcome({"steps": 6.0}, a=measured([1.0 + shift, 9.0 - shift], tokens), b=measured([7.0 + shift], [2]))
        for shift in (0.0, 1.0)
    ]
    return {"fedavg-ft": {0: theirs, 1: theirs}, "mine": {0: runs[0], 1: runs[1]}}


def test_figures_by_hand() -> None:
    figures = compare(two_methods(), ["fedavg-ft"], RESAMPLES, 0)
    theirs, mine = figures["methods"]["fedavg-ft"], figures["methods"]["mine"]
    # a: (2 + 12) / 4 = 3.5, b: 8 / 2 = 4
    assert theirs["response_nll"]["mean"] == pytest.approx(3.75)
    assert theirs["response_nll_worst"]["mean"] == pytest.approx(4.0)
    assert theirs["response_nll_deviation_over_clients"]["mean"] == pytest.approx(0.25)
    # seed 0: a 10 / 4, b 7 / 2; seed 1: a 10 / 4, b 8 / 2
    assert figures["by_seed"]["mine"]["response_nll"] == pytest.approx([3.0, 3.25])
    assert mine["response_nll"]["mean"] == pytest.approx(3.125)
    assert mine["response_nll_worst"]["mean"] == pytest.approx(3.75)
    assert figures["clients"]["mine"]["response_nll"] == pytest.approx({"a": 2.5, "b": 3.75})
    assert mine["steps"] == {"mean": 6.0, "low": 6.0, "high": 6.0, "seeds": 2}
    difference = figures["differences"]["fedavg-ft"]["mine"]
    assert difference["response_nll"]["difference"] == pytest.approx(3.125 - 3.75)
    assert difference["response_nll_worst"]["difference"] == pytest.approx(-0.25)


def test_every_figure_of_a_method_has_a_mean_two_ends_and_the_number_of_seeds() -> None:
    figures = compare(two_methods(), ["fedavg-ft"], RESAMPLES, 0)
    for rows in figures["methods"].values():
        for row in rows.values():
            assert row.keys() == {"mean", "low", "high", "seeds"}
            assert row["low"] <= row["mean"] <= row["high"]
            assert row["seeds"] == 2


def test_the_interval_of_a_single_client_is_the_paired_bootstraps() -> None:
    draw = np.random.default_rng(1)
    tokens = draw.integers(1, 9, 40)
    theirs, mine = draw.gamma(9.0, size=40) * tokens, draw.gamma(8.0, size=40) * tokens
    runs = {
        name: {0: outcome(a=measured(values.tolist(), tokens.tolist()))}
        for name, values in {"fedavg-ft": theirs, "mine": mine}.items()
    }
    found = compare(runs, ["fedavg-ft"], 4000, 0)["differences"]["fedavg-ft"]["mine"]["response_nll"]
    expected = paired_bootstrap(mine, theirs, tokens, resamples=4000, seed=5)
    assert found["difference"] == pytest.approx(expected.value)
    width = expected.high - expected.low
    assert found["low"] == pytest.approx(expected.low, abs=0.1 * width)
    assert found["high"] == pytest.approx(expected.high, abs=0.1 * width)
    assert found["clients"]["a"]["difference"] == pytest.approx(expected.value)


def test_a_common_shift_of_all_records_has_no_width() -> None:
    draw = np.random.default_rng(2)
    sums = {name: draw.gamma(9.0, size=30) for name in "abc"}
    runs = {
        "fedavg-ft": {0: outcome(**{name: measured(each.tolist(), [1] * 30) for name, each in sums.items()})},
        "mine": {0: outcome(**{name: measured((each - 0.5).tolist(), [1] * 30) for name, each in sums.items()})},
    }
    row = compare(runs, ["fedavg-ft"], RESAMPLES, 0)["differences"]["fedavg-ft"]["mine"]["response_nll"]
    assert [row[end] for end in ("difference", "low", "high", "low_of_all", "high_of_all")] == (
        pytest.approx([-0.5] * 5)
    )


def test_resampled_clients_widen_the_interval_of_a_gain_that_one_client_has_alone() -> None:
    sums = [float(value) for value in np.random.default_rng(3).gamma(9.0, size=30)]
    shifted = [each - 1.0 for each in sums]
    tokens = [1] * 30
    theirs = outcome(**{name: measured(sums, tokens) for name in "abcd"})
    mine = outcome(a=measured(shifted, tokens), **{name: measured(sums, tokens) for name in "bcd"})
    runs = {"fedavg-ft": {0: theirs}, "mine": {0: mine}}
    row = compare(runs, ["fedavg-ft"], RESAMPLES, 0)["differences"]["fedavg-ft"]["mine"]["response_nll"]
    assert (row["low"], row["high"]) == (pytest.approx(-0.25), pytest.approx(-0.25))
    assert row["high_of_all"] == pytest.approx(0.0)
    assert row["low_of_all"] < -0.4


def test_a_gain_of_one_seed_alone_is_reported_by_seed_and_widens_the_interval_of_all() -> None:
    sums, tokens = [float(value) for value in np.random.default_rng(5).gamma(9.0, size=30)], [1] * 30
    clients = "ab"
    theirs = outcome(**{name: measured(sums, tokens) for name in clients})
    gain = outcome(**{name: measured([each - 3.0 for each in sums], tokens) for name in clients})
    loss = outcome(**{name: measured([each + 0.5 for each in sums], tokens) for name in clients})
    runs = {"fedavg-ft": dict.fromkeys((7, 8, 9), theirs), "mine": {7: gain, 8: loss, 9: loss}}
    row = compare(runs, ["fedavg-ft"], RESAMPLES, 0)["differences"]["fedavg-ft"]["mine"]["response_nll"]
    assert row["by_seed"] == pytest.approx([-3.0, 0.5, 0.5])
    assert [row[end] for end in ("difference", "low", "high")] == pytest.approx([-2 / 3] * 3)
    # three seeds drawn out of these: all gain in 1 of 27 resamples, none in 8
    assert (row["low_of_all"], row["high_of_all"]) == (pytest.approx(-3.0), pytest.approx(0.5))


def test_the_seeds_of_a_difference_are_those_of_the_worst_client_on_average() -> None:
    theirs = outcome(a=measured([4.0], [1]), b=measured([3.0], [1]))
    runs = {
        "fedavg-ft": dict.fromkeys((0, 1), theirs),
        "mine": {
            0: outcome(a=measured([5.0], [1]), b=measured([1.0], [1])),
            1: outcome(a=measured([2.0], [1]), b=measured([2.5], [1])),
        },
    }
    row = compare(runs, ["fedavg-ft"], RESAMPLES, 0)["differences"]["fedavg-ft"]["mine"]["response_nll_worst"]
    assert row["difference"] == pytest.approx(-0.5)
    assert row["by_seed"] == pytest.approx([1.0, -2.0])


def test_clients_of_one_size_are_not_resampled_alike() -> None:
    sums = [float(value) for value in np.random.default_rng(4).gamma(9.0, size=50)]
    one = compare({"m": {0: outcome(a=measured(sums, [1] * 50))}}, [], RESAMPLES, 0)
    four = compare({"m": {0: outcome(**{name: measured(sums, [1] * 50) for name in "abcd"})}}, [], RESAMPLES, 0)

    def width(figures: Mapping[str, object]) -> float:
        row = figures["methods"]["m"]["response_nll"]  # type: ignore[index]
        return float(row["high"] - row["low"])

    assert width(four) == pytest.approx(width(one) / 2, rel=0.2)


def test_a_record_that_is_not_a_number_anywhere_is_left_out_everywhere() -> None:
    runs = two_methods()
    runs["mine"][1] = outcome({"steps": 6.0}, a=measured([1.0, math.nan], [1, 3]), b=measured([7.0], [2]))
    figures = compare(runs, ["fedavg-ft"], RESAMPLES, 0)
    assert figures["num_left_out"]["response_nll"] == 1
    assert figures["clients"]["fedavg-ft"]["response_nll"] == pytest.approx({"a": 2.0, "b": 4.0})
    text = to_markdown(sheets({**figures, **PROTOCOL, "commits": ["a" * 40, "a" * 40 + "-dirty"]}))
    assert "Left out for all methods: 1 test records, whose NLL is not a number under one of them." in text
    assert "The runs are of several commits: aaaaaaa, aaaaaaa-dirty." in text


def test_a_method_that_diverged_takes_no_record_from_the_others() -> None:
    runs = two_methods()
    runs["wild"] = {
        0: outcome({"steps": 6.0}, a=measured([math.nan, math.inf], [1, 3]), b=measured([7.0], [2])),
        1: runs["mine"][1],
    }
    figures = compare(runs, ["wild", "fedavg-ft"], RESAMPLES, 0)
    assert figures["diverged"] == ["wild"]
    assert figures["num_left_out"]["response_nll"] == 0
    without = compare(two_methods(), ["fedavg-ft"], RESAMPLES, 0)
    assert figures["differences"] == without["differences"]
    assert figures["methods"] == {**without["methods"], "wild": {"steps": without["methods"]["mine"]["steps"]}}
    tables = sheets({**figures, **PROTOCOL})
    assert all(len(row) == len(each.header) for each in tables for row in each.rows)
    assert "| wild |  | no number |" in to_markdown(tables) and "try a lower rate" in to_markdown(tables)
    alone = compare({"wild": runs["wild"]}, [], RESAMPLES, 0)
    assert alone["methods"].keys() == {"wild"} and sheets({**alone, **PROTOCOL})


def test_clients_that_are_worse_off_than_alone() -> None:
    runs = two_methods()
    runs["local"] = runs.pop("fedavg-ft")
    runs["bad"] = {
        seed: outcome({"steps": 6.0}, a=measured([3.0, 12.0], [1, 3]), b=measured([7.0], [2])) for seed in (0, 1)
    }
    figures = compare(runs, ["fedavg-ft"], RESAMPLES, 0)
    assert figures["worse_than_local"] == {"mine": [], "local": [], "bad": ["a"]}
    assert figures["methods"]["bad"]["clients_worse_than_local"]["mean"] == 1.0
    assert figures["differences"] == {}


def test_choice_accuracy_is_over_the_records_with_a_choice() -> None:
    right, wrong, none = [1.0, 2.0], [2.0, 1.0], []
    rows = {"a": [right, wrong, none, right], "b": [right, right, wrong, wrong]}
    one = {name: measured([1.0] * 4, [1] * 4, each) for name, each in rows.items()}
    figures = compare({"m": {0: outcome(**one)}}, [], RESAMPLES, 0)
    assert figures["clients"]["m"]["choice_accuracy"] == pytest.approx({"a": 2 / 3, "b": 0.5})
    assert figures["methods"]["m"]["choice_accuracy_worst"]["mean"] == pytest.approx(0.5)
    assert figures["num_left_out"]["choice_accuracy"] == 1


def test_other_records_are_refused() -> None:
    runs = two_methods()
    runs["mine"][1] = outcome(a=measured([1.0], [1]), b=measured([7.0], [2]))
    with pytest.raises(ValueError, match="mine, seed 1"):
        compare(runs, [], RESAMPLES, 0)


def test_tables_show_every_method_and_escape_what_they_show() -> None:
    figures = compare(two_methods(), ["fedavg-ft"], RESAMPLES, 0)
    tables = sheets({**figures, **PROTOCOL})
    assert [each.title for each in tables] == [
        "Response NLL",
        "Difference to fedavg-ft",
        "Difference to fedavg-ft, by seed",
        "Cost",
    ]
    assert all(len(row) == len(each.header) for each in tables for row in each.rows)
    text = to_markdown(tables)
    assert "| mine | 0.1 | 3.1250 [" in text
    assert "-0.6250 [" in text
    assert "that were cut because they have more than 64 tokens: 1." in text
    assert "Left out for all" not in text and "commits" not in text
    page = to_html(tables, "<svg></svg>")
    assert page.count("<table>") == 4
    assert "<svg></svg>" in page
    assert "src=" not in page
