"""Figures of the outcome: each client's change of NLL by personalization, and tables of all results per client."""

from collections.abc import Sequence

from fedmide.evaluation.intervals import Interval
from fedmide.report.facts import STAGE_NAMES, ClientOutcome, RunFacts
from fedmide.report.figure import Figure, Plot, Row, Table, axis, dots, number, ranged, rows_height, span, table

COLORS = {"base": "--base", "aggregated": "--aggregated", "personalized": "--personalized"}


SYMBOLS = {"base": "x", "aggregated": "square", "personalized": "circle"}


MEAN = "mean of the sites"


OVER_CLIENTS = {"mean": MEAN, "worst": "worst site", "standard_deviation": "spread (st. dev.)"}


TEXTS = {"rouge_l": "ROUGE-L", "token_f1": "token F1", "exact_match": "exact match"}


def change_figure(facts: RunFacts) -> Figure | None:
    """Each client's change of NLL by personalization with its interval, the best on top."""
    changes = {each.client: each.change for each in facts.outcomes if each.change}
    if not changes:
        return None
    # Plotly draws the first point at the bottom.
    ordered = dict(sorted(changes.items(), key=lambda item: item[1].value, reverse=True))
    data = [dots(ordered, "site", "--personalized")]
    if facts.mean_change and len(changes) > 1:
        mean = dots({MEAN: facts.mean_change}, MEAN, "--ink", "diamond")
        data.insert(0, {**mean, "meta": {}})
    layout = {
        "xaxis": axis("change of response NLL, nats per token (left of 0: personalization helped)", zeroline=True),
        "yaxis": {"automargin": True, "type": "category"},
        "showlegend": False,
        "height": rows_height(len(data[0]["y"]) + len(changes)),
    }
    rows = [Row((name, ranged(each, signed=True), _verdict(each)), name) for name, each in reversed(ordered.items())]
    if facts.mean_change and len(changes) > 1:
        rows.append(Row((MEAN, ranged(facts.mean_change, signed=True), _verdict(facts.mean_change))))
    return Figure(
        "gain",
        "Change by personalization",
        "NLL of a site's test responses under its tuned adapter minus NLL under the common adapter, on the same "
        "records. Below 0 is better. Lines are 95 % intervals over test records. A line that crosses 0 means that the "
        "records are too few to decide. The mean weighs sites equally, and includes hidden ones.",
        (Plot(data, layout),),
        table(("site", "change of NLL, nats per token", "personalization"), rows),
    )


def nll_figure(facts: RunFacts) -> Figure | None:
    """Each client's response NLL under each adapter."""
    outcomes = [each for each in facts.outcomes if each.nll]
    stages = _stages(facts)
    if not stages:
        return None
    data = [
        dots(
            {each.client: each.nll[stage] for each in reversed(outcomes) if stage in each.nll},
            STAGE_NAMES[stage],
            COLORS[stage],
            SYMBOLS[stage],
        )
        for stage in stages
    ]
    layout = {
        "xaxis": axis("response NLL, nats per token (lower is better)", range=span(data)),
        "yaxis": {"automargin": True, "type": "category"},
        "scattermode": "group",
        "scattergap": 0.3,
        "height": 60 + int(rows_height(len(outcomes)) * 1.25),
    }
    rows = [
        Row((each.client, str(each.num_records), *(ranged(each.nll.get(stage)) for stage in stages)), each.client)
        for each in outcomes
    ]
    return Figure(
        "nll",
        "NLL of the test responses under each adapter",
        "Sum of the NLL of all response tokens divided by their number, on each site's own test records. Intervals "
        "overlap easily here, because each is of one adapter alone. The figure above compares record by record.",
        (Plot(data, layout),),
        table(("site", "test records", *(STAGE_NAMES[stage] for stage in stages)), rows),
    )


def likelihood_table(facts: RunFacts) -> Table:
    """Each client's NLL and its changes; below them the figures over clients."""
    stages = _stages(facts)

    def cells(each: ClientOutcome) -> tuple[str, ...]:
        values = (number(_value(each.nll.get(stage))) for stage in stages)
        changes = (ranged(change, signed=True) for change in (each.learned, each.change))
        return (each.client, str(each.num_records), *values, *changes)

    rows = [Row(cells(each), each.client) for each in facts.outcomes]
    for key, title in OVER_CLIENTS.items():
        values = [number(_over(facts, stage, "response_nll", key)) for stage in stages]
        rows.append(Row((title, "", *values, "", ranged(facts.mean_change, signed=True) if key == "mean" else "")))
    return table(
        ("site", "test records", *_titles("NLL", stages), "change by common training", "change by personalization"),
        rows,
    )


def other_table(facts: RunFacts) -> Table:
    """Each client's choice accuracy, text metrics and sets; below them the figures over clients."""
    stages = _stages(facts)
    texts = [name for name in TEXTS if any(name in each.texts for each in facts.outcomes)]

    def cells(each: ClientOutcome) -> tuple[str, ...]:
        choices = (number(_value(each.choice.get(stage)), 2) for stage in stages)
        values = (number(_value(each.texts.get(name)), 2) for name in texts)
        split, spearman = each.sets.get("shared_at_split"), each.sets.get("spearman_score_tokens")
        total = each.sets["shared"] + each.sets["personal"]
        sets = (
            "–" if split is None else f"{split} of {total}",
            f"{each.sets['shared']} of {total}",
            number(spearman, 2),
        )
        return (each.client, *choices, number(each.chance, 2), *values, *sets)

    rows = [Row(cells(each), each.client) for each in facts.outcomes]
    for key, title in OVER_CLIENTS.items():
        choices = [number(_over(facts, stage, "choice_accuracy", key), 2) for stage in stages]
        values = [number(_over(facts, "generation", name, key), 2) for name in texts]
        rows.append(Row((title, *choices, "", *values, "", "", "")))
    sets = ("shared at the split", "shared at the end", "score with length, ρ")
    return table(("site", *_titles("choice", stages), "chance", *(TEXTS[name] for name in texts), *sets), rows)


def _stages(facts: RunFacts) -> list[str]:
    return [stage for stage in STAGE_NAMES if any(stage in each.nll for each in facts.outcomes)]


def _titles(measure: str, stages: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{measure}, {STAGE_NAMES[stage].split()[0]}" for stage in stages)


def _over(facts: RunFacts, stage: str, metric: str, key: str) -> float | None:
    """A figure over clients; None if the run has none."""
    figures = facts.metrics.get("over_clients", {}).get(stage, {}).get(metric)
    return figures[key] if figures else None


def _value(interval: Interval | None) -> float | None:
    return None if interval is None else interval.value


def _verdict(change: Interval) -> str:
    """The meaning of a change's interval in a word or two."""
    if change.high < 0:
        return "helped"
    return "hurt" if change.low > 0 else "not clear"
