"""Figures of the scores: distribution, split by the threshold, and relation to the length of records.

Only counts in bins are drawn, never a record's own score.
"""

import math
from collections.abc import Sequence

from fedmide.report.facts import RunFacts
from fedmide.report.figure import Data, Figure, Plot, Row, axis, bars, number, score_axis, table
from fedmide.report.scores import NUM_LEVELS, Cell, Histogram, ScoreRound, edges, grid, histogram

MAX_CLIENTS = 40
"""At most this many small plots are drawn. Tables have every client."""


def histogram_figure(facts: RunFacts) -> Figure | None:
    """Each client's scores in each round of verdicts, with the threshold."""
    if not facts.scores:
        return None
    bins = edges(facts.scores)
    titles = _titles(facts)
    counts = {(client, each.title): histogram(each, bins) for client, rounds in facts.scores.items() for each in rounds}
    plots = []
    for client, rounds in list(facts.scores.items())[:MAX_CLIENTS]:
        data = [trace for each in rounds for trace in _histogram(each, counts[client, each.title])]
        layout = {
            "xaxis": score_axis(bins[0], bins[-1]),
            "yaxis": axis("records"),
            "barmode": "stack",
            "bargap": 0.05,
            "height": 250,
            "showlegend": False,
        }
        plots.append(Plot(data, layout, client, client))
    rows = [
        _histogram_row(client, each, counts[client, each.title])
        for client, rounds in facts.scores.items()
        for each in rounds
    ]
    return Figure(
        "scores",
        "The scores and the threshold",
        "Score: perplexity under the common adapter divided by that under the site's local adapter. Above 1 the local "
        "adapter predicts the record better. Records left of the dashed threshold become shared (blue), those right of "
        "it stay personal (orange). At the split each site has its own threshold. Later all sites have the same, and "
        "only records that are still personal are scored. The outermost bars also count the scores beyond them."
        f"{_only(facts)}",
        tuple(plots),
        table(
            ("site", "round", "scored", "below threshold", "threshold", "not a number", "counts by score"),
            rows,
        ),
        titles,
        "Round",
    )


def length_figure(facts: RunFacts) -> Figure | None:
    """Score against length at the split."""
    splits = {client: rounds[0] for client, rounds in facts.scores.items() if len(rounds[0].logs)}
    if not splits:
        return None
    bins = edges({client: (each,) for client, each in splits.items()}, NUM_LEVELS)
    cells = {client: grid(each, bins) for client, each in splits.items()}
    most = max((cell.shared + cell.personal for rows in cells.values() for cell in rows), default=1)
    plots = []
    for client, rows in list(cells.items())[:MAX_CLIENTS]:
        margin = 0.06 * (bins[-1] - bins[0])
        layout = {
            "xaxis": axis("scored tokens", rangemode="tozero"),
            "yaxis": score_axis(bins[0] - margin, bins[-1] + margin),
            "height": 250,
            "showlegend": False,
        }
        title = f"{client} (ρ = {number(splits[client].spearman, 2)})"
        plots.append(Plot([_dots(rows, most)], layout, title, client))
    return Figure(
        "length",
        "Does the score only measure length?",
        "Records at the split by length and score. The area of a dot is their number. Blue: most became shared. "
        "Orange: most stayed personal. A rank correlation ρ far from 0 means that the split follows length as much as "
        f"content.{_only(facts)}",
        tuple(plots),
        table(
            ("site", "tokens", "score", "shared", "personal"),
            [_length_row(client, cell) for client, rows in cells.items() for cell in rows],
        ),
    )


def _dots(cells: Sequence[Cell], most: int) -> Data:
    """One dot per cell of lengths and scores; a dot of `most` records is the largest."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [(cell.shortest + cell.longest) / 2 for cell in cells],
        "y": [(cell.low + cell.high) / 2 for cell in cells],
        "marker": {
            "size": [6 + 22 * math.sqrt((cell.shared + cell.personal) / most) for cell in cells],
            "color": ["--shared" if cell.shared >= cell.personal else "--personal" for cell in cells],
            "opacity": 0.85,
            "line": {"width": 0},
        },
        "text": [_cell_text(cell.shortest, cell.longest, cell.shared, cell.personal) for cell in cells],
        "hovertemplate": "%{text}<extra></extra>",
        "meta": {},
    }


def _length_row(client: str, cell: Cell) -> Row:
    tokens = f"{cell.shortest}–{cell.longest}"
    scores = f"{math.exp(cell.low):.2f}–{math.exp(cell.high):.2f}"
    return Row((client, tokens, scores, str(cell.shared), str(cell.personal)), client)


def _histogram(each: ScoreRound, counts: Histogram) -> list[Data]:
    """The bars of one round, and its threshold as a line."""
    places = [(low + high) / 2 for low, high in zip(counts.edges, counts.edges[1:], strict=False)]
    names = [
        f"{math.exp(low):.3g} to {math.exp(high):.3g}"
        for low, high in zip(counts.edges, counts.edges[1:], strict=False)
    ]
    traces = [
        {
            **bars(places, values, name, color, "records"),
            "customdata": names,
            "hovertemplate": "score %{customdata}: %{y} records<extra>" + name + "</extra>",
            "meta": {"choice": each.title},
        }
        for name, color, values in (
            ("shared", "--shared", counts.shared),
            ("personal", "--personal", counts.personal),
        )
    ]
    if each.threshold is not None and each.threshold > 0:
        # Rounded, because a threshold can be a record's own score.
        place = round(min(max(math.log(each.threshold), counts.edges[0]), counts.edges[-1]), 3)
        top = max((a + b for a, b in zip(counts.shared, counts.personal, strict=True)), default=1)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "threshold",
                "x": [place, place],
                "y": [0, max(1, top) * 1.05],
                "line": {"color": "--ink", "width": 2, "dash": "dash"},
                "hovertemplate": f"threshold {each.threshold:.3f}<extra></extra>",
                "meta": {"choice": each.title},
            }
        )
    return traces


def _histogram_row(client: str, each: ScoreRound, counts: Histogram) -> Row:
    bins = zip(counts.edges, counts.edges[1:], counts.shared, counts.personal, strict=False)
    binned = "; ".join(
        f"{math.exp(low):.2f}–{math.exp(high):.2f}: {shared + personal}"
        for low, high, shared, personal in bins
        if shared + personal
    )
    below = f"{int(each.is_shared.sum())}"
    cells = (client, _name(each), str(len(each.logs)), below, number(each.threshold), str(each.num_not_finite), binned)
    return Row(cells, client)


def _name(each: ScoreRound) -> str:
    return f"{each.title} (split)" if each.is_split else each.title


def _titles(facts: RunFacts) -> tuple[str, ...]:
    """The rounds in which records were judged, in order."""
    judged = {each.title for rounds in facts.scores.values() for each in rounds}
    return tuple(title for title in facts.titles if title in judged)


def _cell_text(shortest: int, longest: int, shared: int, personal: int) -> str:
    return f"{shortest} to {longest} tokens: {shared} shared, {personal} personal"


def _only(facts: RunFacts) -> str:
    shown = min(len(facts.scores), MAX_CLIENTS)
    return "" if shown == len(facts.scores) else f" The first {shown} sites are drawn; the table has all."
