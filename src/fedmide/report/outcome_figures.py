"""Figures of what came out: whom personalisation helped and by how much, and every client's figures in one table."""

from collections.abc import Sequence

from fedmide.evaluation.intervals import Interval
from fedmide.report.facts import STAGE_NAMES, Outcome, RunFacts
from fedmide.report.figure import Figure, Plot, Row, Table, axis, dots, number, ranged, rows_height, span, table

COLORS = {"base": "--base", "aggregated": "--aggregated", "personalized": "--personalized"}


SYMBOLS = {"base": "x", "aggregated": "square", "personalized": "circle"}


MEAN = "mean of the clients"


OVER_CLIENTS = {"mean": MEAN, "worst": "worst client", "standard_deviation": "spread (st. dev.)"}


TEXTS = {"rouge_l": "ROUGE-L", "token_f1": "token F1", "exact_match": "exact match"}


def gain_figure(facts: RunFacts) -> Figure | None:
    """Each client's gain from personalisation with its interval, the largest on top."""
    gains = {each.client: each.gain for each in facts.outcomes if each.gain}
    if not gains:
        return None
    ordered = dict(sorted(gains.items(), key=lambda item: item[1].value))
    data = [dots(ordered, "client", "--personalized")]
    if facts.mean_gain and len(gains) > 1:
        mean = dots({MEAN: facts.mean_gain}, MEAN, "--ink", "diamond")
        data.insert(0, {**mean, "meta": {}})
    layout = {
        "xaxis": axis("lower response NLL, nats per token (right of 0: personalisation helped)", zeroline=True),
        "yaxis": {"automargin": True, "type": "category"},
        "showlegend": False,
        "height": rows_height(len(data[0]["y"]) + len(gains)),
    }
    rows = [Row((name, ranged(gain, signed=True), _verdict(gain)), name) for name, gain in reversed(ordered.items())]
    if facts.mean_gain and len(gains) > 1:
        rows.append(Row((MEAN, ranged(facts.mean_gain, signed=True), _verdict(facts.mean_gain))))
    return Figure(
        "gain",
        "What personalisation changed",
        "How much lower the NLL of a client's test responses is under its personalised adapter than under the "
        "aggregated one, on the same records. Lines are 95 % intervals over test records: where one crosses 0, they "
        "are too few to tell. The mean weighs clients alike and stays that of all clients when some are hidden.",
        (Plot(data, layout),),
        table(("client", "gain, nats per token", "personalisation"), rows),
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
        "How well each adapter explains the test responses",
        "Sum of the NLL of all response tokens over their number, on each client's own test records. Intervals overlap "
        "easily here, because they take each adapter alone; the figure above compares record by record.",
        (Plot(data, layout),),
        table(("client", "test records", *(STAGE_NAMES[stage] for stage in stages)), rows),
    )


def likelihood_table(facts: RunFacts) -> Table:
    """Each client's likelihood and what moved it, and under them the figures over clients."""
    stages = _stages(facts)

    def cells(each: Outcome) -> tuple[str, ...]:
        values = (number(_value(each.nll.get(stage))) for stage in stages)
        changes = (ranged(change, signed=True) for change in (each.learned, each.gain))
        return (each.client, str(each.num_records), *values, *changes)

    rows = [Row(cells(each), each.client) for each in facts.outcomes]
    for key, title in OVER_CLIENTS.items():
        values = [number(_over(facts, stage, "response_nll", key)) for stage in stages]
        rows.append(Row((title, "", *values, "", ranged(facts.mean_gain, signed=True) if key == "mean" else "")))
    return table(
        ("client", "test records", *_titles("NLL", stages), "learned in common", "gain from personalising"), rows
    )


def other_table(facts: RunFacts) -> Table:
    """Each client's choice accuracy, text metrics and sets, and under them the figures over clients."""
    stages = _stages(facts)
    texts = [name for name in TEXTS if any(name in each.texts for each in facts.outcomes)]

    def cells(each: Outcome) -> tuple[str, ...]:
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
    return table(("client", *_titles("choice", stages), "chance", *(TEXTS[name] for name in texts), *sets), rows)


def _stages(facts: RunFacts) -> list[str]:
    return [stage for stage in STAGE_NAMES if any(stage in each.nll for each in facts.outcomes)]


def _titles(measure: str, stages: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{measure}, {STAGE_NAMES[stage].split()[0]}" for stage in stages)


def _over(facts: RunFacts, stage: str, metric: str, key: str) -> float | None:
    """A figure over clients; None where it has none."""
    figures = facts.metrics.get("over_clients", {}).get(stage, {}).get(metric)
    return figures[key] if figures else None


def _value(interval: Interval | None) -> float | None:
    return None if interval is None else interval.value


def _verdict(gain: Interval) -> str:
    """What an interval of a gain says in a word."""
    if gain.low > 0:
        return "helped"
    return "hurt" if gain.high < 0 else "can't tell"
