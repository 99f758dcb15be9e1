"""Figures over rounds: training loss, the flow of records from personal to shared, convergence and cost."""

from collections import defaultdict
from collections.abc import Callable, Mapping

from fedmide.report.facts import RunFacts, Turn
from fedmide.report.figure import (
    Data,
    Figure,
    Plot,
    Row,
    Table,
    axis,
    bars,
    line,
    megabytes,
    number,
    seconds,
    style,
    table,
)

PHASES = {
    "trained": "warm-up and rounds",
    "personalized": "personalization",
    "generated": "generation",
    "evaluated": "evaluation",
}
"""A finished stage's name in the manifest, and its name for people."""


ROUNDS = {"automargin": True, "type": "category", "tickangle": -35}


def loss_figure(facts: RunFacts) -> Figure | None:
    """The training loss of each client by round."""
    lines = _lines(facts, lambda turn: turn.loss, "nats per token")
    if not lines:
        return None
    return Figure(
        "loss",
        "Training loss, round by round",
        "Mean NLL of the tokens that a site trained on in a round, as it reported to the server. Rounds with different "
        "records are not comparable: after the split only shared records train.",
        (Plot(lines, {"xaxis": ROUNDS, "yaxis": axis("nats per token"), "height": 420}),),
        _by_round(facts, lambda turn: number(turn.loss)),
    )


def enrollment_figure(facts: RunFacts) -> Figure | None:
    """Shared, newly enrolled and personal records by round."""
    turns = [turn for turn in facts.rounds if turn.shared is not None]
    if not any(turn.personal for turn in turns):
        return None
    kinds: dict[str, tuple[str, Callable[[Turn], int]]] = {
        "shared before": ("--shared", lambda turn: (turn.shared or 0) - turn.enrolled),
        "newly enrolled": ("--enrolled", lambda turn: turn.enrolled),
        "personal": ("--personal", lambda turn: turn.personal or 0),
    }
    data = []
    for kind, (color, count) in kinds.items():
        for index, client in enumerate(facts.clients):
            own = [turn for turn in turns if turn.client == client]
            trace = bars([turn.title for turn in own], [count(turn) for turn in own], kind, color, f"of {client}")
            data.append({**trace, "legendgroup": kind, "showlegend": index == 0, "meta": {"client": client}})
    layout = {
        "barmode": "stack",
        "xaxis": {**ROUNDS, "categoryorder": "array", "categoryarray": list(facts.titles)},
        "yaxis": axis("training records"),
        "height": 420,
        "legend": {"itemclick": False, "itemdoubleclick": False},
    }
    rows = [
        Row(
            (f"{turn.title}, {turn.client}", *(str(count(turn)) for _, count in kinds.values()), str(turn.num_records)),
            turn.client,
        )
        for turn in turns
    ]
    return Figure(
        "enrollment",
        "How records flowed into the common training",
        "Training records of the sites shown, after each round's verdicts. Before the split all are shared. "
        "A site that was not drawn for a round has no bar in it. Each section of a bar is a site.",
        (Plot(data, layout),),
        table(("round, site", *kinds, "trained on"), rows),
    )


def shared_part_figure(facts: RunFacts) -> Figure | None:
    """The shared part of each client's records by round."""
    if not any(turn.personal for turn in facts.rounds):
        return None

    def part(turn: Turn) -> float | None:
        total = (turn.shared or 0) + (turn.personal or 0)
        return (turn.shared or 0) / total if total else None

    layout = {"xaxis": ROUNDS, "yaxis": axis("shared part", tickformat=".0%", rangemode="tozero"), "height": 420}
    return Figure(
        "shared-part",
        "The shared part of each site's records",
        "A site whose line stays low holds most of its records back from the common training.",
        (Plot(_lines(facts, part, "of 1"), layout),),
        _by_round(facts, lambda turn: "–" if part(turn) is None else f"{part(turn):.0%}"),
    )


def convergence_figure(facts: RunFacts) -> Figure | None:
    """The change of the common adapter per round, and the mean loss."""
    losses = {title: facts.mean_loss(title) for title in facts.titles}
    told = {title: loss for title, loss in losses.items() if loss is not None}
    if not told or not facts.steps:
        return None
    color, symbol = "--aggregated", "circle"
    moves = {step.title: step.relative_change for step in facts.steps}
    change = line(list(moves), list(moves.values()), "change", color, symbol, "of its length")
    mean = line(list(told), list(told.values()), "mean loss", color, symbol, "nats per token")
    common = {"xaxis": ROUNDS, "showlegend": False, "height": 340}
    return Figure(
        "convergence",
        "Does it converge?",
        "Left: change of the common adapter in a round, divided by the adapter's own length. Near 0 it has settled. "
        "Right: training loss over all tokens of all sites.",
        (
            Plot([change], {**common, "yaxis": axis("relative change", rangemode="tozero")}, "change of the adapter"),
            Plot([mean], {**common, "yaxis": axis("nats per token")}, "training loss of all sites"),
        ),
        table(
            ("round", "relative change", "training loss"),
            [Row((title, number(moves.get(title), 4), number(losses[title]))) for title in facts.titles],
        ),
    )


def cost_figure(facts: RunFacts) -> Figure | None:
    """Bytes and tokens per round, seconds per phase."""
    if not facts.turns:
        return None
    titles = tuple(dict.fromkeys(turn.title for turn in facts.turns))
    up, down = (_sums(facts, name) for name in ("bytes_up", "bytes_down"))
    trained, scored = (_sums(facts, name) for name in ("trained_tokens", "scored_tokens"))
    spent = {PHASES.get(name, name): value for name, value in facts.manifest["seconds"].items()}
    stacked = {"barmode": "stack", "xaxis": ROUNDS, "height": 340}
    traffic = [
        bars(titles, [down[title] / 1e6 for title in titles], "to the sites", "--aggregated", "MB"),
        bars(titles, [up[title] / 1e6 for title in titles], "to the server", "--personalized", "MB"),
    ]
    tokens = [
        bars(titles, [trained[title] for title in titles], "trained", "--shared", "tokens"),
        bars(titles, [scored[title] for title in titles], "scored", "--base", "tokens"),
    ]
    time = bars(list(spent), list(spent.values()), "seconds", "--aggregated", "s")
    rows = [
        Row(
            (
                title,
                megabytes(down[title]),
                megabytes(up[title]),
                f"{trained[title]:,}",
                f"{scored[title]:,}",
                seconds(sum(turn.seconds for turn in facts.turns if turn.title == title)),
            )
        )
        for title in titles
    ]
    rows += [Row((f"phase: {name}", "", "", "", "", seconds(value))) for name, value in spent.items()]
    return Figure(
        "cost",
        "What it cost",
        "Messages: bytes as encoded, in both directions. Tokens: those that went through the model. Time: wall time "
        "per phase, restarts included.",
        (
            Plot(traffic, {**stacked, "yaxis": axis("MB")}, "messages"),
            Plot(tokens, {**stacked, "yaxis": axis("tokens")}, "tokens"),
            Plot([time], {"xaxis": ROUNDS, "yaxis": axis("seconds"), "height": 340, "showlegend": False}, "time"),
        ),
        table(("round", "to the sites", "to the server", "trained tokens", "scored tokens", "time"), rows),
    )


def _lines(facts: RunFacts, value: Callable[[Turn], float | None], unit: str) -> list[Data]:
    """A line per client that has values."""
    data = []
    for index, client in enumerate(facts.clients):
        points = [(turn.title, value(turn)) for turn in facts.rounds if turn.client == client]
        if any(y is not None for _, y in points):
            color, symbol = style(index)
            trace = line([x for x, _ in points], [y for _, y in points], client, color, symbol, unit)
            data.append({**trace, "meta": {"client": client}})
    return data


def _by_round(facts: RunFacts, cell: Callable[[Turn], str]) -> Table:
    """A row per client, a column per round."""
    cells = {(turn.client, turn.title): cell(turn) for turn in facts.rounds}
    rows = [
        Row((client, *(cells.get((client, title), "–") for title in facts.titles)), client) for client in facts.clients
    ]
    return table(("site", *facts.titles), rows)


def _sums(facts: RunFacts, name: str) -> Mapping[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for turn in facts.turns:
        sums[turn.title] += getattr(turn, name)
    return sums
