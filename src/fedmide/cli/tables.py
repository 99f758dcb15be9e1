"""Tables and sentences that commands print on stdout."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from fedmide.data.check import PartReport, Report
    from fedmide.data.partition import Dealt
    from fedmide.methods import Method
    from fedmide.studies.tables import Sheet


ARTICLES = dict.fromkeys("aeiou", "an")


MAX_CATEGORIES = 6
"""The maximum number of categories that are named per site."""


STAGES = ("base", "aggregated", "personalized")


def results_table(metrics: Mapping[str, Any]) -> Table:
    """Each site's shared records, and its response NLL and choice accuracy under every adapter.

    The last rows are the mean over sites and the worst site.
    """
    over = metrics["over_clients"]
    stages = [stage for stage in STAGES if stage in over]
    table = _table("Shared records; response NLL (nats per token), choice accuracy")
    table.add_column("site", overflow="fold")  # on a narrow terminal, names may break and figures may not
    table.add_column("shared\nfirst last", justify="right", no_wrap=True)
    for stage in stages:
        table.add_column(f"{stage}\n  NLL choice", justify="right", no_wrap=True)
    for name, client in metrics["clients"].items():
        rows = (client["stages"][stage] for stage in stages)
        measured = (_pair(row["response_nll"], "value", row["choice"], "accuracy") for row in rows)
        table.add_row(name, _shared(client["sets"]), *measured)
    table.add_section()
    for key in ("mean", "worst"):
        rows = (over[stage] for stage in stages)
        table.add_row(key, "", *(_pair(row["response_nll"], key, row["choice_accuracy"], key) for row in rows))
    return table


def questions_table(metrics: Mapping[str, Any]) -> Table:
    """The accuracies on public multiple-choice sets; for the tuned adapters, their mean and the worst."""
    table = _table("Choice accuracy on public questions; ± standard error")
    table.add_column("set", no_wrap=True)
    for column in ("questions", "base", "aggregated", "personalized", "worst"):
        table.add_column(column, justify="right")
    for name, figures in metrics["questions"].items():
        base, over = figures["base"], figures.get("over_clients")
        common = (_accuracy(figures[stage]) for stage in ("base", "aggregated"))
        own = (_number(over and over["accuracy"], key) for key in ("mean", "worst"))
        table.add_row(name, str(base["num_records"]) if base else "0", *common, *own)
    return table


def rivals_table(scenario: str, figures: Mapping[str, Any]) -> Table:
    """AUROC and average precision of each score in finding personal records, as means over sites.

    The row "as judged" is the score that the method itself used, at its own positions.
    """
    table = _table(f"{scenario}: AUROC and average precision of personal records, mean over sites")
    table.add_column("score", no_wrap=True)
    moments = ("after_warmup", "after_rounds")
    columns = [(moment, positions) for moment in moments for positions in figures["mean"][moment]["rivals"]]
    for moment, positions in columns:
        table.add_column(f"{moment.replace('_', ' ')}\n{positions} tokens", justify="right", no_wrap=True)
    for rival in figures["mean"]["after_warmup"]["rivals"]["all"]:
        rows = (figures["mean"][moment]["rivals"][positions][rival] for moment, positions in columns)
        table.add_row(rival, *(_pair(row, "auroc", row, "average_precision") for row in rows))
    table.add_section()
    judged = {figures["protocol"]["scoring_positions"]: [figures["mean"][moment]["method"] for moment in moments]}
    cells = (
        _pair(row := judged[positions][moments.index(moment)], "auroc", row, "average_precision")
        if positions in judged
        else "-"
        for moment, positions in columns
    )
    table.add_row("as judged", *cells)
    return table


def sets_table(scenario: str, figures: Mapping[str, Any]) -> Table:
    """Each site's personal set compared with the truth, after the split and at the end, and the enrolled records."""
    table = _table(f"{scenario}: the personal set; precision, recall, F1")
    table.add_column("site", no_wrap=True)
    for column in ("after the split", "after the rounds", "enrolled, of them shared"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, site in [*figures["clients"].items(), ("mean", figures["mean"])]:
        sets = (site[moment]["personal"] for moment in ("after_warmup", "after_rounds"))
        cells = (" ".join(_number(each, key) for key in ("precision", "recall", "f1")) for each in sets)
        table.add_row(name, *cells, f"{site['enrolled']['number']:.4g}, {site['enrolled']['right']:.4g}")
    return table


def sheet_table(sheet: "Sheet") -> Table:
    """A table of a comparison."""
    table = _table(sheet.title)
    for number, title in enumerate(sheet.header):
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def sweep_table(figures: Mapping[str, Any]) -> Table:
    """The mean over sites and the worst site at each value of a setting, with the deviation over seeds."""
    seeds = len(figures["seeds"])
    about = f"± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    table = _table(f"Response NLL by {figures['knob']}; {about}")
    table.add_column("method", no_wrap=True)
    for column in (figures["knob"], "mean", "worst client"):
        table.add_column(column, justify="right", no_wrap=True)
    for method, rows in figures["methods"].items():
        for value, row in rows.items():
            cells = (_deviating(row[name]) for name in ("response_nll", "response_nll_worst"))
            table.add_row(method, value, *cells)
    return table


def _deviating(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "no number"
    return f"{row['mean']:.4f}" + ("" if row["deviation"] is None else f" ± {row['deviation']:.4f}")


def partition_table(dealt: "Dealt") -> Table:
    """Each site's number of records per part, and per frequent value of the rule's field or, without one, category."""
    from fedmide.data.partition import counts
    from fedmide.data.partition_svg import shown_values, with_others

    values = shown_values(counts(dealt), 4)
    table = _table("Records; the most frequent values")
    table.add_column("site", no_wrap=True)
    parts = list(next(iter(dealt.values())))
    for part in parts:
        table.add_column(part, justify="right", no_wrap=True)
    for column in (*(value or "(none)" for value in values), "other"):
        table.add_column(column, justify="right", overflow="fold")
    for name, each in counts(dealt).items():
        sizes = [len(dealt[name][part]) for part in parts]
        table.add_row(name, *(str(number) for number in (*sizes, *with_others(each, values))))
    return table


def methods_table(methods: Iterable["Method"]) -> Table:
    """The summary and the source of each method."""
    table = _table('method = "NAME" in a configuration chooses one')
    table.add_column("method", no_wrap=True)
    table.add_column("summary")
    table.add_column("source")
    for method in methods:
        table.add_row(method.name, f"{method.summary}. Sent: {method.traffic}", method.source)
    return table


def check_table(report: "Report") -> Table:
    """Sizes, duplicates and lengths of each site's parts."""
    table = _table("Records; lengths in characters, mean/longest")
    table.add_column("site", no_wrap=True)
    for column in ("part", "records", "repeats", "categories", "concepts", "prompt", "response"):
        table.add_column(column, justify="right")
    for client in report.clients:
        for part in ("training", "validation", "test"):
            facts: PartReport = getattr(client, part)
            counts = (facts.records, facts.duplicates, facts.categories, facts.concepts)
            lengths = (facts.prompt_characters, facts.response_characters)
            means = (f"{length.mean:.0f}/{length.longest}" for length in lengths)
            table.add_row(client.name, part, *(str(count) for count in counts), *means)
    return table


def leak_lines(report: "Report") -> list[str]:
    """A sentence for each kind of held-out record that also occurs in training; one sentence if there is none."""
    if not report.leaks:
        return ["no held-out record occurs in training"]
    return [
        f"leak: {leak.records} {leak.part} records of site {leak.client} ({leak.distinct} distinct) share their "
        f"{leak.kind} with training records of site {leak.training_client}"
        for leak in report.leaks
    ]


def category_lines(report: "Report") -> list[str]:
    """A line for each site whose records have categories: the most frequent ones, each with its percentage."""
    lines = []
    for client in report.clients:
        mix: Counter[str] = Counter()
        for part in (client.training, client.validation, client.test):
            mix.update(part.category_mix)
        shown = ", ".join(f"{name} {count / mix.total():.0%}" for name, count in mix.most_common(MAX_CATEGORIES))
        more = f", {len(mix) - MAX_CATEGORIES} more" if len(mix) > MAX_CATEGORIES else ""
        lines += [f"categories of site {client.name}: {shown}{more}"] if mix else []
    return lines


def identifier_lines(report: "Report") -> list[str]:
    """A warning for each kind of identifier that records of a part seem to hold, and the limits of this search."""
    lines = [
        f"warning: {count} {part} records of site {client.name} seem to hold {ARTICLES.get(kind[0], 'a')} {kind}"
        for client in report.clients
        for part in ("training", "validation", "test")
        for kind, count in getattr(client, part).identifiers.items()
    ]
    known = "e-mail addresses, phone numbers, record numbers and dates of birth"
    return [*lines, f"searched for patterns of {known}; finding none does not make records anonymous"]


def _table(title: str) -> Table:
    """An empty table, narrow enough for eight columns of words on a terminal of 80 characters."""
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _shared(sets: Mapping[str, Any]) -> str:
    """The number of shared records after the split, if there was one, and at the end."""
    first = "-" if sets["shared_at_split"] is None else sets["shared_at_split"]
    return f"{first:>5} {sets['shared']:>4}"


def _pair(likelihood: Mapping[str, Any] | None, value: str, choice: Mapping[str, Any] | None, accuracy: str) -> str:
    """An NLL and an accuracy next to each other; a dash for one that is missing."""
    return f"{_number(likelihood, value):>5} {_number(choice, accuracy):>6}"


def _accuracy(figures: Mapping[str, Any] | None) -> str:
    return "-" if figures is None else f"{figures['accuracy']:.3f} ± {figures['standard_error']:.3f}"


def _number(figures: Mapping[str, Any] | None, key: str) -> str:
    return "-" if figures is None or figures[key] is None else f"{figures[key]:.3f}"
