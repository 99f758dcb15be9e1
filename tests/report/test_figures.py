"""Figures: plotly's own schema accepts them, and drawing and table say what the facts say."""

from typing import Any

import plotly.graph_objects as go
import pytest

from fedmide.journal.folder import RunFolder
from fedmide.report import compared, outcome_figures, round_figures, score_figures
from fedmide.report.facts import RunFacts, read
from fedmide.report.figure import Figure, number, ranged, seconds, span, style
from fedmide.report.write import COST, OUTCOME, ROUNDS, SCORES

MAKERS = (*OUTCOME, *ROUNDS, *SCORES, *COST)


@pytest.fixture
def facts(run_folder: RunFolder) -> RunFacts:
    return read(run_folder)


def concrete(value: Any) -> Any:
    """The same with a color for every name of a CSS variable."""
    if isinstance(value, str):
        return "#123456" if value.startswith("--") else value
    if isinstance(value, dict):
        return {key: concrete(each) for key, each in value.items()}
    return [concrete(each) for each in value] if isinstance(value, list | tuple) else value


def check(figure: Figure) -> None:
    """Plotly knows every property of the figure, and its table has a cell for every column."""
    for plot in figure.plots:
        go.Figure({"data": concrete(list(plot.data)), "layout": concrete(dict(plot.layout))})
        assert {trace["type"] for trace in plot.data} <= {"scatter", "bar"}  # what the page's plotly.js has
    assert figure.plots and figure.table.rows
    assert {len(row.cells) for row in figure.table.rows} == {len(figure.table.header)}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_plotly_accepts_every_figure(make: Any, facts: RunFacts) -> None:
    figure = make(facts)
    assert figure is not None
    check(figure)


def test_plotly_would_refuse_a_wrong_one() -> None:
    with pytest.raises(ValueError, match="Invalid property"):
        go.Figure({"data": [{"type": "bar", "colour": "red"}]})


def test_the_changes_are_drawn_with_their_intervals_the_best_on_top(facts: RunFacts) -> None:
    figure = outcome_figures.change_figure(facts)
    assert figure is not None
    mean, clients = figure.plots[0].data
    changes = {each.client: each.change for each in facts.outcomes}
    for name, x, up, down in zip(
        clients["y"], clients["x"], clients["error_x"]["array"], clients["error_x"]["arrayminus"], strict=True
    ):
        change = changes[name]
        assert change is not None and (x, x + up, x - down) == pytest.approx((change.value, change.high, change.low))
    assert clients["x"] == sorted(clients["x"], reverse=True) and clients["meta"]["clients"] == clients["y"]
    assert facts.mean_change and mean["x"] == [facts.mean_change.value]


def test_enrollment_adds_up_to_all_records(facts: RunFacts) -> None:
    figure = round_figures.enrollment_figure(facts)
    assert figure is not None
    for title in facts.titles:
        for client in facts.clients:
            own = [trace for trace in figure.plots[0].data if trace["meta"]["client"] == client]
            assert sum(trace["y"][trace["x"].index(title)] for trace in own) == 9
    assert len(own) == 3 and sum(trace["showlegend"] for trace in figure.plots[0].data) == 3


def test_histograms_hold_the_ledgers_counts_and_thresholds(facts: RunFacts) -> None:
    figure = score_figures.histogram_figure(facts)
    assert figure is not None and figure.choices == ("round-000", "round-001")
    for plot in figure.plots:
        for each in facts.scores[plot.client]:
            traces = [trace for trace in plot.data if trace["meta"]["choice"] == each.title]
            bars = {trace["name"]: sum(trace["y"]) for trace in traces if trace["type"] == "bar"}
            assert bars == {"shared": each.is_shared.sum(), "personal": (~each.is_shared).sum()}
            assert [trace["name"] for trace in traces if trace["type"] == "scatter"] == ["threshold"]


def test_a_run_that_has_not_begun_has_no_figures(facts: RunFacts) -> None:
    from dataclasses import replace

    bare = replace(facts, turns=(), steps=(), outcomes=(), mean_change=None, scores={}, metrics={}, measures={})
    assert [make(bare) for make in MAKERS] == [None] * len(MAKERS)


def test_comparisons_are_accepted_too(facts: RunFacts) -> None:
    figures = compared.figures(compared.labeled((facts, facts)))
    assert [figure.key for figure in figures] == ["runs-nll", "runs-gain", "runs-loss"]
    for figure in figures:
        check(figure)


def test_figures_as_text() -> None:
    assert number(None) == number(float("nan")) == ranged(None) == "–"
    assert number(-0.5, 1) == "−0.5" and number(0.25, 2, signed=True) == "+0.25"
    assert seconds(59.9) == "59.9 s" and seconds(60) == "1 min 0 s"
    assert len({style(index) for index in range(64)}) == 64


def test_an_axis_holds_points_and_intervals(facts: RunFacts) -> None:
    trace = {"x": [1.0, 2.0], "error_x": {"array": [0.5, 1.0], "arrayminus": [2.0, 0.1]}}
    assert span([trace]) == pytest.approx([-1.2, 3.2])
    assert span([{"x": [1.0], "error_x": {"array": [0.0], "arrayminus": [0.0]}}]) == pytest.approx([0.95, 1.05])
