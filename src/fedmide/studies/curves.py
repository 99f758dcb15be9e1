"""Curves of figures over the values of a setting, as plain SVG without scripts.

A picture has one panel per figure and one line per method.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from fedmide.data.partition_svg import COLORS

WIDTH, HEIGHT, LEFT, TOP, GAP, TEXT = 300, 220, 70, 60, 90, 12
"""Sizes in pixels: of a panel, the margins left and above, the gap between panels, and the text."""


NUM_TICKS = 5


@dataclass(frozen=True)
class Point:
    """A value of the setting, with its figure and deviation; each is None if there is none."""

    label: str
    mean: float | None
    deviation: float | None = None

    @property
    def ends(self) -> tuple[float, ...]:
        """The figure minus its deviation, and the figure plus it; without a deviation, the figure twice."""
        if self.mean is None:
            return ()
        return self.mean - (self.deviation or 0.0), self.mean + (self.deviation or 0.0)


Panels = Mapping[str, Mapping[str, Sequence[Point]]]
"""The points by the panel's title and the line's name; all lines have points at the same labels."""


Marked = tuple[tuple[float, float], float, float]
"""The place of a point in the picture, and the ends of its bar."""


def curves_svg(panels: Panels, knob: str, title: str) -> str:
    """A picture of the panels side by side. Values stand at equal distances, in the order given."""
    names = list(next(iter(panels.values())))
    drawn = [
        _panel(name, lines, knob, LEFT + number * (WIDTH + GAP)) for number, (name, lines) in enumerate(panels.items())
    ]
    legend = [
        f'<rect x="{LEFT}" y="{(y := TOP + HEIGHT + 62 + 20 * number) - 10}" width="12" height="12" '
        f'fill="{COLORS[number % len(COLORS)]}"/>' + _text(LEFT + 20, y, name, "start")
        for number, name in enumerate(names)
    ]
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 70 + 20 * len(names)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            f'font-size="{TEXT}">',
            '<rect width="100%" height="100%" fill="white"/>',
            _text(10, 22, title, "start"),
            *drawn,
            *legend,
            "</svg>\n",
        ]
    )


def ticks(low: float, high: float) -> list[float]:
    """About `NUM_TICKS` round numbers, from `low` or less to `high` or more.

    >>> ticks(2.51, 2.58)
    [2.5, 2.52, 2.54, 2.56, 2.58]
    """
    span = max(high - low, 1e-4 * max(abs(low), abs(high), 1.0))  # equal values need an axis too
    rough = span / (NUM_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _panel(title: str, lines: Mapping[str, Sequence[Point]], knob: str, left: float) -> str:
    ends = [end for points in lines.values() for point in points for end in point.ends]
    marks = ticks(min(ends, default=0.0), max(ends, default=1.0))
    labels = [point.label for point in next(iter(lines.values()))]
    spacing = WIDTH / len(labels)

    def place(number: int, value: float) -> tuple[float, float]:
        share = (value - marks[0]) / (marks[-1] - marks[0])
        return left + spacing * (number + 0.5), TOP + HEIGHT * (1 - share)

    pieces = [_text(left + WIDTH / 2, TOP - 10, title)]
    for mark in marks:
        _, y = place(0, mark)
        pieces.append(f'<line x1="{left:.0f}" y1="{y:.1f}" x2="{left + WIDTH:.0f}" y2="{y:.1f}" stroke="#dddddd"/>')
        pieces.append(_text(left - 8, y + 4, f"{mark:g}", "end"))
    pieces += [_text(place(number, marks[0])[0], TOP + HEIGHT + 18, label) for number, label in enumerate(labels)]
    pieces.append(_text(left + WIDTH / 2, TOP + HEIGHT + 38, knob))
    for color, points in zip(COLORS * len(lines), lines.values(), strict=False):
        marked: list[Marked] = []
        for number, point in enumerate(points):
            if point.mean is not None:
                low, high = (place(number, end)[1] for end in point.ends)
                marked.append((place(number, point.mean), low, high))
        pieces += _line(marked, color)
    return "\n".join(pieces)


def _line(places: Sequence[Marked], color: str) -> list[str]:
    """A line through the points, each with its bar."""
    path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _, _ in places)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
    for (x, y), low, high in places:
        drawn.append(f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{color}"/>')
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>')
    return drawn


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'
