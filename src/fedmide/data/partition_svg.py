"""A picture of the records per client: one bar per client, its values side by side; plain SVG without scripts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#dd8855", "#886644", "#44aa99")
"""Paul Tol's bright colors and some more. Most readers can distinguish them."""


OTHERS = "#bbbbbb"


ROW, BAR, LEFT, WIDTH, TEXT = 22, 16, 130, 560, 12


def bars_svg(counts: Mapping[str, Mapping[str, int]], title: str) -> str:
    """The picture as SVG: a stacked bar per client, with its number of records per value, and a legend."""
    values = shown_values(counts, len(COLORS))
    longest = max(sum(each.values()) for each in counts.values())
    scale = WIDTH / longest
    rows = [_bar(name, each, values, (48 + ROW * number, scale)) for number, (name, each) in enumerate(counts.items())]
    has_others = any(with_others(each, values)[-1] for each in counts.values())
    legend = _legend([*values, *(["other"] if has_others else [])], 70 + ROW * len(counts))
    height = 80 + ROW * (len(counts) + len(values) + 1)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 70}" height="{height}" '
            f'font-family="sans-serif" font-size="{TEXT}">',
            '<rect width="100%" height="100%" fill="white"/>',
            _text(10, 24, title),
            *rows,
            *legend,
            "</svg>\n",
        ]
    )


def shown_values(counts: Mapping[str, Mapping[str, int]], most: int) -> list[str]:
    """The most frequent values, at most `most`, most frequent first. The picture shows the rest together."""
    totals: Counter[str] = Counter()
    for each in counts.values():
        totals.update(each)
    return sorted(totals, key=lambda value: (-totals[value], value))[:most]


def with_others(counts: Mapping[str, int], values: Sequence[str]) -> list[int]:
    """One client's counts of the shown values, and of all others together.

    >>> with_others({"a": 3, "b": 2, "c": 1}, ["a"])
    [3, 3]
    """
    shown = [counts.get(value, 0) for value in values]
    return [*shown, sum(counts.values()) - sum(shown)]


def _bar(name: str, counts: Mapping[str, int], values: Sequence[str], place: tuple[float, float]) -> str:
    top, scale = place
    pieces, x = [_text(10, top + BAR - 3, name)], float(LEFT)
    for color, value, count in zip(
        [*COLORS[: len(values)], OTHERS], [*values, "other"], with_others(counts, values), strict=True
    ):
        if count:
            width = count * scale
            label = f"<title>{escape(value or '(none)')}: {count}</title>"
            pieces.append(
                f'<rect x="{x:.1f}" y="{top:.0f}" width="{width:.1f}" height="{BAR}" fill="{color}">{label}</rect>'
            )
            x += width
    return "\n".join([*pieces, _text(x + 6, top + BAR - 3, str(sum(counts.values())))])


def _legend(values: Sequence[str], top: float) -> list[str]:
    lines = []
    for number, (color, value) in enumerate(zip([*COLORS[: len(values)], OTHERS], values, strict=False)):
        y = top + ROW * number
        lines.append(f'<rect x="{LEFT}" y="{y:.0f}" width="{TEXT}" height="{TEXT}" fill="{color}"/>')
        lines.append(_text(LEFT + 20, y + TEXT - 1, value or "(none)"))
    return lines


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'
