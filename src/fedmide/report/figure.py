"""Figures: plots for plotly.js as plain data, a text on how to read them, and the same data as a table.

A color is the name of a CSS variable of the page ("--shared"), which the page looks up in the current theme.
The page filters by a trace's `meta`. `client`: the client of the trace. `clients`: the client of each of its points.
`choice`: the entry of the figure's list with which the trace is shown.
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
"""Scores that get a label on an axis, if they are within its range."""


@dataclass(frozen=True)
class Row:
    """A row of a table. `client`: the client that the row is about, if any."""

    cells: tuple[str, ...]
    client: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as shown on the page. The first column names the row."""

    header: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def is_prose(self) -> bool:
        """True if a cell is too long for one line."""
        return any(len(cell) > 60 for row in self.rows for cell in row.cells)


@dataclass(frozen=True)
class Plot:
    """One drawing. `client`: the client that it is about, if any. `label`: its name within the figure."""

    data: Sequence[Data]
    layout: Mapping[str, Any]
    label: str = ""
    client: str = ""


@dataclass(frozen=True)
class Figure:
    """One figure of the report. `key`: its name in the page's code. `reading`: the text on how to read it.

    `choices`: entries of the list next to it; the page starts with the first. `choices_label`: the list's label.
    """

    key: str
    title: str
    reading: str
    plots: tuple[Plot, ...]
    table: Table
    choices: tuple[str, ...] = field(default=())
    choices_label: str = ""


def style(index: int) -> tuple[str, str]:
    """Color and symbol of a line. Together they distinguish 64 lines."""
    return PALETTE[index % len(PALETTE)], SYMBOLS[(index + index // len(PALETTE)) % len(SYMBOLS)]


def dots(intervals: Mapping[str, Interval], name: str, color: str, symbol: str = "circle") -> Data:
    """Points with their intervals, one row of the vertical axis per client."""
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
    """A range of the horizontal axis with room for all points of `dots` and their intervals."""
    low, high = math.inf, -math.inf
    for trace in traces:
        error = trace["error_x"]
        low = min(low, *(x - below for x, below in zip(trace["x"], error["arrayminus"], strict=True)))
        high = max(high, *(x + above for x, above in zip(trace["x"], error["array"], strict=True)))
    room = 0.05 * (high - low) or 0.05
    return [low - room, high + room]


def rows_height(count: int) -> int:
    """Height in pixels for this many rows of a vertical axis of names."""
    return 110 + 34 * count


def score_axis(low: float, high: float) -> Data:
    """A logarithmic axis whose labels are the scores themselves."""
    values = [value for value in TICKS if low <= math.log(value) <= high]
    spread = _apart([math.log(value) for value in values], (high - low) / 6)
    return axis(
        "score (logarithmic)",
        tickvals=[math.log(value) for value in values if math.log(value) in spread],
        ticktext=[f"{value:g}" for value in values if math.log(value) in spread],
        range=[low, high],
    )


def _apart(places: Sequence[float], gap: float) -> set[float]:
    """Places at least `gap` apart, chosen from 0 outward. Score 1 has place 0, so it always gets a label."""
    kept: set[float] = set()
    for place in sorted(places, key=abs):
        if all(abs(place - other) >= gap for other in kept):
            kept.add(place)
    return kept


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A figure as text with a real minus sign; a dash for None and for non-finite values."""
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


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "site"), counted(8, "site")
    ('1 site', '8 sites')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def counted_rounds(warmup: int, federated: int) -> str:
    """Numbers of rounds as text. Warm-up rounds are counted separately.

    >>> counted_rounds(1, 4), counted_rounds(0, 1)
    ('1 warm-up round + 4 rounds', '1 round')
    """
    rounds = counted(federated, "round")
    return f"{counted(warmup, 'warm-up round')} + {rounds}" if warmup else rounds


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
    """A table from any iterables of cells."""
    return Table(tuple(header), tuple(rows))
