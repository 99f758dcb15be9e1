"""What a figure is: plots for plotly.js as plain data, a sentence that says how to read them, and the same as a table.

A colour is the name of one of the page's CSS variables ("--shared"), which the page looks up in the theme at hand.
What a trace's `meta` says lets the page filter: `client` (whose trace it is), `clients` (whose each of its points is),
`choice` (with which entry of the figure's list it is shown).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmide.evaluation.intervals import Interval

Data = dict[str, Any]


PALETTE = tuple(f"--line-{number}" for number in range(8))


SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")


TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
"""Scores that are named on an axis, as far as it reaches."""


@dataclass(frozen=True)
class Row:
    """A row of a table; `client` where it is about one."""

    cells: tuple[str, ...]
    client: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def is_prose(self) -> bool:
        """Whether it has cells too long for one line."""
        return any(len(cell) > 60 for row in self.rows for cell in row.cells)


@dataclass(frozen=True)
class Plot:
    """One drawing. `client` where it is about one; `label` tells it from the others of its figure."""

    data: Sequence[Data]
    layout: Mapping[str, Any]
    label: str = ""
    client: str = ""


@dataclass(frozen=True)
class Figure:
    """One figure of the report. `choices`: what a list beside it chooses from, the first is shown at first."""

    key: str
    title: str
    reading: str
    plots: tuple[Plot, ...]
    table: Table
    choices: tuple[str, ...] = field(default=())
    choices_label: str = ""


def style(index: int) -> tuple[str, str]:
    """Colour and symbol of a line; together they tell 64 apart."""
    return PALETTE[index % len(PALETTE)], SYMBOLS[(index + index // len(PALETTE)) % len(SYMBOLS)]


def dots(intervals: Mapping[str, Interval], name: str, color: str, symbol: str = "circle") -> Data:
    """Points with their intervals, one line of the vertical axis for each client."""
    values = list(intervals.values())
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [each.value for each in values],
        "y": list(intervals),
        "orientation": "h",
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [each.high - each.value for each in values],
            "arrayminus": [each.value - each.low for each in values],
            "color": color,
            "thickness": 1.5,
            "width": 4,
        },
        "marker": {"color": color, "size": 10, "symbol": symbol},
        "hovertemplate": "%{y}: %{x:.3f}<extra>" + name + "</extra>",
        "meta": {"clients": list(intervals)},
    }


def line(x: Sequence[str], y: Sequence[float | None], name: str, color: str, symbol: str, unit: str) -> Data:
    """A line over rounds."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": color, "width": 2},
        "marker": {"color": color, "size": 8, "symbol": symbol},
        "hovertemplate": "%{x}: %{y:.4~g} " + unit + "<extra>" + name + "</extra>",
    }


def bars(x: Sequence[Any], y: Sequence[float], name: str, color: str, unit: str) -> Data:
    """Bars, meant to be stacked."""
    return {
        "type": "bar",
        "name": name,
        "x": list(x),
        "y": list(y),
        "marker": {"color": color, "line": {"color": "--paper", "width": 1}},
        "hovertemplate": "%{x}: %{y:.4~g} " + unit + "<extra>" + name + "</extra>",
    }


def axis(title: str, **more: Any) -> Data:
    """An axis with its title."""
    return {"title": {"text": title}, **more}


def span(traces: Iterable[Data]) -> list[float]:
    """A range of the horizontal axis that holds the points of `dots` with their intervals, and a little room."""
    low, high = math.inf, -math.inf
    for trace in traces:
        error = trace["error_x"]
        low = min(low, *(x - below for x, below in zip(trace["x"], error["arrayminus"], strict=True)))
        high = max(high, *(x + above for x, above in zip(trace["x"], error["array"], strict=True)))
    room = 0.05 * (high - low) or 0.05
    return [low - room, high + room]


def rows_height(count: int) -> int:
    """Pixels for so many lines of a vertical axis of names."""
    return 110 + 34 * count


def score_axis(low: float, high: float) -> Data:
    """An axis of logarithms that is labelled with the scores themselves."""
    values = [value for value in TICKS if low <= math.log(value) <= high]
    spread = _apart([math.log(value) for value in values], (high - low) / 6)
    return axis(
        "score (logarithmic)",
        tickvals=[math.log(value) for value in values if math.log(value) in spread],
        ticktext=[f"{value:g}" for value in values if math.log(value) in spread],
        range=[low, high],
    )


def _apart(places: Sequence[float], gap: float) -> set[float]:
    """Places that keep a gap, from 0 outwards, so that score 1 is always named."""
    kept: set[float] = set()
    for place in sorted(places, key=abs):
        if all(abs(place - other) >= gap for other in kept):
            kept.add(place)
    return kept


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A figure as text with a real minus sign, a dash for one that is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def ranged(interval: Interval | None, digits: int = 3, signed: bool = False) -> str:
    """A figure with its interval.

    >>> ranged(Interval(1.0, 0.5, 1.25), 2), ranged(Interval(0.5, -0.25, 1.0), 2, signed=True)
    ('1.00 [0.50, 1.25]', '+0.50 [−0.25, +1.00]')
    """
    if interval is None:
        return "–"
    value, low, high = (number(each, digits, signed) for each in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]" if interval.low < interval.high else value


def counted_rounds(warmup: int, federated: int) -> str:
    """Numbers of rounds as text: those of the warm-up are never part of the others.

    >>> counted_rounds(1, 4), counted_rounds(0, 1)
    ('1 warm-up round + 4 rounds', '1 round')
    """
    rounds = f"{federated} round{'' if federated == 1 else 's'}"
    return f"{warmup} warm-up round{'' if warmup == 1 else 's'} + {rounds}" if warmup else rounds


def megabytes(count: float) -> str:
    """Bytes as text in 10^6 bytes."""
    return f"{count / 1e6:,.1f} MB"


def seconds(count: float) -> str:
    """A duration as text.

    >>> seconds(4.25), seconds(125), seconds(7300)
    ('4.2 s', '2 min 5 s', '2 h 1 min')
    """
    if count < 60:
        return f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(header: Iterable[str], rows: Iterable[Row]) -> Table:
    """A table out of whatever gives its cells."""
    return Table(tuple(header), tuple(rows))
