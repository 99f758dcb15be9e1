"""A comparison as tables for people: Markdown, and one self-contained HTML page."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from fedmide.evaluation.summary import TEXT_METRICS, Figures

STYLE = (
    "body{font:15px/1.4 sans-serif;margin:2em;color:#222}table{border-collapse:collapse;margin:.6em 0 .4em}"
    "th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}p{max-width:60em}"
)


@dataclass(frozen=True)
class Sheet:
    """A table with its title and a note that explains it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def sheets(figures: Figures) -> tuple[Sheet, ...]:
    """The tables of a comparison: likelihood, differences, other measures, cost."""
    tables = [_likelihoods(figures)]
    for reference in figures["differences"]:
        tables += [_differences(figures, reference), *_by_seed(figures, reference)]
    texts = [_texts(figures)] if any("rouge_l" in each for each in figures["methods"].values()) else []
    return (*tables, *texts, *_costs(figures))


def validation_sheet(figures: Figures) -> Sheet:
    """The methods' NLL on validation records: one column per seed, then the means over seeds."""
    header = ("method", "rate", *(f"seed {seed}" for seed in figures["seeds"]), "mean", "worst client")
    rows = [
        (
            name,
            f"{figures['learning_rates'][name]['rate']:g}",
            *map(_number, each["validation_nll"]),
            _number(mean_of_all(each["validation_nll"])),
            _number(mean_of_all(each["validation_nll_worst"])),
        )
        for name, each in figures["by_seed"].items()
    ]
    note = (
        "Nats per response token of the validation records, mean over clients; lower is better. The epoch, "
        "and all else that a method chooses on validation records, was chosen on these. No test record was used."
    )
    return Sheet("Validation", header, tuple(rows), note)


def mean_of_all(values: Collection[float | None]) -> float | None:
    """The mean; None if there is no value, or if one of them is None."""
    given = [each for each in values if each is not None]
    return float(np.mean(given)) if given and len(given) == len(values) else None


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def to_markdown(tables: Sequence[Sheet]) -> str:
    """The tables as Markdown."""
    return "\n".join(f"## {each.title}\n\n{_markdown_rows(each)}\n\n{each.note}\n" for each in tables)


def to_html(tables: Sequence[Sheet], more: str = "") -> str:
    """A whole page: the tables, then `more` as it is."""
    body = "".join(f"<h2>{escape(each.title)}</h2>{_html_rows(each)}<p>{escape(each.note)}</p>\n" for each in tables)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fedmide: comparison</title>'
        f"<style>{STYLE}</style></head><body>\n{body}{more}</body></html>\n"
    )


def _likelihoods(figures: Figures) -> Sheet:
    header = ["method", "rate", "mean", "worst client", "sd clients", "sd seeds", "worse than local"]
    has_choice = any("choice_accuracy" in each for each in figures["methods"].values())
    rows = []
    for name, each in figures["methods"].items():
        rate = figures["learning_rates"].get(name)
        begin = (name, f"{rate['rate']:g}" if rate else "")
        if "response_nll" not in each:
            rows.append((*begin, "no number", *[""] * (len(header) - 3 + has_choice)))
            continue
        row = [
            *begin,
            _interval(each["response_nll"]),
            _interval(each["response_nll_worst"]),
            f"{each['response_nll_deviation_over_clients']['mean']:.3f}",
            _over_seeds(figures["by_seed"][name]["response_nll"]),
            ", ".join(figures["worse_than_local"][name]) or "none" if "worse_than_local" in figures else "",
        ]
        rows.append((*row, *([_interval(each["choice_accuracy"])] if has_choice else [])))
    seeds = ", ".join(map(str, figures["protocol"]["seeds"]))
    note = (
        "Nats per response token of the clients' test records, lower is better. Brackets: 95 % intervals over "
        f"records. Seeds {seeds}; the records are the same for all. Worse than local: the clients that do better with "
        "training alone."
    )
    data, cutoff = figures["protocol"]["data"].values(), figures["protocol"]["cutoff"]
    if cut := sum(each["truncated"] for each in data):
        note += f" Records that were cut because they have more than {cutoff} tokens: {cut:,}."
    if left_out := figures["num_left_out"].get("response_nll"):
        note += f" Left out for all methods: {left_out:,} test records, whose NLL is not a number under one of them."
    if figures["diverged"]:
        note += " No number: training diverged, and a client has no NLL that is a number; try a lower rate."
    return Sheet("Response NLL", (*header, "choice accuracy")[: len(header) + has_choice], tuple(rows), note)


def _differences(figures: Figures, reference: str) -> Sheet:
    rows = []
    for name, each in figures["differences"][reference].items():
        nll = each["response_nll"]
        clients = nll["clients"].values()
        rows.append(
            (
                name,
                _change(nll),
                f"[{nll['low_of_all']:+.4f}, {nll['high_of_all']:+.4f}]",
                _change(each["response_nll_worst"]),
                str(sum(one["high"] < 0 for one in clients)),
                str(sum(one["low"] > 0 for one in clients)),
            )
        )
    header = ("method", "mean", "clients, seeds resampled too", "worst client", "clients better", "clients worse")
    note = (
        f"Response NLL minus that of {reference} on the same records: below 0 is better than {reference}. Brackets: "
        "95 % intervals of the paired bootstrap, over records unless the column names more. The worst client is each "
        "method's own. Clients better or worse: those whose own interval excludes 0."
    )
    return Sheet(f"Difference to {reference}", header, tuple(rows), note)


def _by_seed(figures: Figures, reference: str) -> Iterator[Sheet]:
    """The same differences seed by seed, if there are several seeds."""
    seeds = figures["protocol"]["seeds"]
    if len(seeds) < 2:
        return
    parts = {"": "response_nll", "worst, ": "response_nll_worst"}
    rows = tuple(
        (name, *(f"{value:+.4f}" for metric in parts.values() for value in each[metric]["by_seed"]))
        for name, each in figures["differences"][reference].items()
        if "by_seed" in each["response_nll"]
    )
    header = ("method", *(f"{part}seed {seed}" for part in parts for seed in seeds))
    note = "A difference that changes its sign from seed to seed is not settled, whatever its interval over records."
    yield Sheet(f"Difference to {reference}, by seed", header, rows, note)


def _texts(figures: Figures) -> Sheet:
    methods = {name: each for name, each in figures["methods"].items() if "rouge_l" in each}
    rows = tuple((name, *(f"{each[key]['mean']:.3f}" for key in TEXT_METRICS)) for name, each in methods.items())
    note = "Means over clients and seeds; higher is better. BLEU and chrF range from 0 to 100."
    return Sheet("Generated responses", ("method", *TEXT_METRICS), rows, note)


COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("steps_per_client", "steps per client", lambda value: f"{value:.4g}"),
    ("steps", "steps in all", lambda value: f"{value:,.0f}"),
    ("trained_tokens", "tokens trained", lambda value: f"{value:,.0f}"),
    ("scored_tokens", "tokens scored", lambda value: f"{value:,.0f}"),
    ("bytes_up", "MB up", lambda value: f"{value / 1e6:,.1f}"),
    ("bytes_down", "MB down", lambda value: f"{value / 1e6:,.1f}"),
    ("seconds", "seconds", lambda value: f"{value:,.0f}"),
    ("seconds_training", "seconds of training", lambda value: f"{value:,.0f}"),
    ("seconds_scoring", "of scoring", lambda value: f"{value:,.0f}"),
    ("seconds_evaluation", "of evaluation", lambda value: f"{value:,.0f}"),
    ("trained_parameters", "parameters trained", lambda value: f"{value:,.0f}"),
    ("extra_parameters", "extra at inference", lambda value: f"{value:,.0f}"),
)


NUM_OF_RUN = 7
"""The number of `COSTS` in the table "Cost"; the others are in the table "Model"."""


def _costs(figures: Figures) -> Iterator[Sheet]:
    """The cost of runs and of the model: two tables, each narrow enough for a terminal."""
    methods = {name: each for name, each in figures["methods"].items() if "steps" in each}
    budget = figures["protocol"]["budget"]
    note = (
        f"Means over seeds. Every method's budget is {budget['rounds']} rounds of {budget['steps_per_round']} "
        f"optimizer steps: {budget['steps_per_client']} per client, fewer for a client without a shared record. "
        "Tokens trained: those whose loss counted. Tokens scored: those whose likelihood was computed for records' "
        "scores or for choices on validation records. The rest of their texts went through the model too. "
        "Seconds: rounds and tuning, without evaluation. Bytes are left out if records would travel, not adapters."
    )
    if len(figures["commits"]) > 1:
        note += f" The runs are of several commits: {', '.join(map(_short, figures['commits']))}."
    model_note = "Means over seeds. Extra at inference: values that can't be merged into the base weights."
    for title, costs, about in (("Cost", COSTS[:NUM_OF_RUN], note), ("Model", COSTS[NUM_OF_RUN:], model_note)):
        shown = [cost for cost in costs if any(cost[0] in each for each in methods.values())]
        rows = tuple(
            (name, *(as_text(each[key]["mean"]) if key in each else "" for key, _, as_text in shown))
            for name, each in methods.items()
        )
        if shown:
            yield Sheet(title, ("method", *(name for _, name, _ in shown)), rows, about)


def _short(commit: str) -> str:
    return commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")


def _interval(row: Figures) -> str:
    return f"{row['mean']:.4f} [{row['low']:.3f}, {row['high']:.3f}]"


def _change(row: Figures) -> str:
    return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


def _over_seeds(values: Sequence[float]) -> str:
    """The sample's standard deviation over seeds; empty for one seed."""
    return f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""


def _markdown_rows(table: Sheet) -> str:
    lines = [table.header, ("---", *("---:" for _ in table.header[1:])), *table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _html_rows(table: Sheet) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
