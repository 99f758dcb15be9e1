"""Several runs side by side: each is compared with the first, on the same test records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedmide.config.knobs import flat
from fedmide.evaluation.intervals import Interval
from fedmide.report.facts import RunFacts
from fedmide.report.figure import (
    Figure,
    Plot,
    Row,
    Table,
    axis,
    dots,
    line,
    megabytes,
    number,
    ranged,
    rows_height,
    seconds,
    span,
    style,
    table,
)
from fedmide.report.findings import Headline
from fedmide.report.gains import ResponseNlls, client_change, mean_change
from fedmide.report.settings import shown

NOT_COMPARABLE = ("model", "prompt", "data")
"""Entries of the manifest. If two runs differ in one of them, their NLLs are not comparable."""


@dataclass(frozen=True)
class Difference:
    """The change of NLL from the first run to another: of each site, and their mean. Below 0 is better.

    Each run counts with its last adapter.
    """

    run: str
    clients: dict[str, Interval]
    mean: Interval | None

    @property
    def worse(self) -> tuple[str, ...]:
        """The sites with a higher NLL than in the first run."""
        return tuple(name for name, change in self.clients.items() if change.value > 0)


def labeled(runs: Sequence[RunFacts]) -> tuple[RunFacts, ...]:
    """The runs, renamed where several have one name."""
    names = [run.name for run in runs]
    return tuple(
        replace(run, name=f"{run.name} ({index})") if names.count(run.name) > 1 else run
        for index, run in enumerate(runs, 1)
    )


def differences(runs: Sequence[RunFacts]) -> tuple[Difference, ...]:
    """Each later run minus the first, paired by record. Sites without files of their records' NLLs are left out."""
    return tuple(_difference(runs[0], run) for run in runs[1:])


def headline(runs: Sequence[RunFacts]) -> Headline:
    """The runs that are better than the first by their intervals, and a sentence on each run."""
    found = differences(runs)
    details = tuple(_sentence(each, runs[0].name) for each in found)
    better = [each.run for each in found if each.mean and each.mean.high < 0]
    worse = [each.run for each in found if each.mean and each.mean.low > 0]
    if all(each.mean is None for each in found):
        return Headline("These runs have no test records in common, so they can't be compared.", ())
    if better:
        return Headline(f"Better than {runs[0].name}: {', '.join(better)}.", details)
    if worse and len(worse) == len(found):
        return Headline(f"{runs[0].name} is better than {'the other' if len(found) == 1 else 'all others'}.", details)
    return Headline(f"No run is clearly better than {runs[0].name}.", details)


def cautions(runs: Sequence[RunFacts]) -> tuple[str, ...]:
    """Reasons why the runs may not be comparable."""
    return tuple(_cautions(runs))


def figures(runs: Sequence[RunFacts]) -> tuple[Figure, ...]:
    """NLL of each client in each run, differences to the first run, and training loss."""
    made = (_nll_figure(runs), _difference_figure(runs), _loss_figure(runs))
    return tuple(figure for figure in made if figure is not None)


def runs_table(runs: Sequence[RunFacts]) -> Table:
    """A row per run."""
    means = {each.run: each for each in differences(runs)}
    rows = []
    for run in runs:
        likelihood, choice = _over(run, "response_nll"), _over(run, "choice_accuracy")
        found = means.get(run.name)
        cells = (
            run.name,
            run.config.method,
            str(run.manifest["status"]),
            str(run.config.seed),
            *(number(likelihood.get(key)) for key in ("mean", "worst", "standard_deviation")),
            number(choice.get("mean"), 2),
            ranged(found.mean, signed=True) if found else "–",
            f"{len(found.worse)} of {len(found.clients)}" if found and found.clients else "–",
            megabytes(sum(turn.bytes_up + turn.bytes_down for turn in run.turns)),
            f"{sum(turn.trained_tokens for turn in run.turns):,}",
            seconds(sum(run.manifest["seconds"].values())),
        )
        rows.append(Row(cells))
    header = (
        "run",
        "method",
        "status",
        "seed",
        "mean NLL",
        "worst site's NLL",
        "spread",
        "mean choice accuracy",
        f"change of NLL from {runs[0].name}",
        "sites worse off",
        "messages",
        "trained tokens",
        "time",
    )
    return table(header, rows)


def knobs_table(runs: Sequence[RunFacts]) -> Table:
    """The settings that differ between runs."""
    values = [flat(run.config.model_dump()) for run in runs]
    differing = [name for name in values[0] if len({shown(each[name]) for each in values}) > 1]
    rows = [Row((name, *(shown(each[name]) for each in values))) for name in differing]
    return table(("setting", *(run.name for run in runs)), rows or [Row(("none", *("" for _ in runs)))])


def _final(run: RunFacts) -> str:
    """The stage of the last adapter under which the run's clients were measured."""
    stages = ("personalized", "aggregated", "base")
    return next((stage for stage in stages if any(stage in each.nll for each in run.outcomes)), "base")


def _over(run: RunFacts, metric: str) -> dict[str, float]:
    figures: dict[str, float] | None = run.metrics.get("over_clients", {}).get(_final(run), {}).get(metric)
    return figures or {}


def _difference(first: RunFacts, run: RunFacts) -> Difference:
    pairs: dict[str, tuple[ResponseNlls, ResponseNlls]] = {}
    for client, measures in run.measures.items():
        ours, theirs = measures.get(_final(run)), first.measures.get(client, {}).get(_final(first))
        if ours is not None and theirs is not None:
            pairs[client] = (theirs, ours)
    settings = (first.config.evaluation.bootstrap, first.config.seed)
    changes = {client: change for client, sides in pairs.items() if (change := client_change(*sides, *settings))}
    return Difference(run.name, changes, mean_change(pairs, *settings))


def _sentence(each: Difference, first: str) -> str:
    if each.mean is None:
        return f"{each.run}: no test records in common with {first}."
    worse = f"{len(each.worse)} of {len(each.clients)} sites are worse off{': ' if each.worse else ''}"
    return (
        f"{each.run}: NLL differs from that of {first} by {ranged(each.mean, signed=True)} nats per token on average "
        "(below 0 is better). "
        f"{worse}{', '.join(each.worse)}."
    )


def _cautions(runs: Sequence[RunFacts]) -> Iterator[str]:
    first = runs[0]
    for run in runs[1:]:
        other = [name for name in NOT_COMPARABLE if run.manifest[name] != first.manifest[name]]
        if other:
            names = f"{run.name} and {first.name}"
            yield f"{names} do not have the same {' and '.join(other)}: their NLLs are not comparable."
    for run in runs:
        if not run.outcomes:
            yield f"{run.name} is not evaluated yet (status: {run.manifest['status']})."
    steps = {run.name: sum(turn.steps for turn in run.turns) for run in runs}
    if len(set(steps.values())) > 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in steps.items())
        yield f"The runs took different numbers of optimizer steps ({listed}), which may explain part of a difference."
    yield "Intervals are over test records only. Another seed may give other figures."


def _nll_figure(runs: Sequence[RunFacts]) -> Figure | None:
    data, height = [], 0
    for index, run in enumerate(runs):
        color, symbol = style(index)
        values = {each.client: each.nll[_final(run)] for each in reversed(run.outcomes) if _final(run) in each.nll}
        if values:
            data.append(dots(values, run.name, color, symbol))
            height = max(height, len(values))
    if not data:
        return None
    layout = {
        "xaxis": axis("response NLL, nats per token (lower is better)", range=span(data)),
        "yaxis": {"automargin": True, "type": "category"},
        "scattermode": "group",
        "height": 60 + rows_height(height) * (2 + len(runs)) // 3,
    }
    clients = dict.fromkeys(each.client for run in runs for each in run.outcomes)
    found = {(run.name, each.client): each.nll.get(_final(run)) for run in runs for each in run.outcomes}
    rows = [Row((client, *(ranged(found.get((run.name, client))) for run in runs)), client) for client in clients]
    return Figure(
        "runs-nll",
        "Each site's test responses in each run",
        "Response NLL under the last adapter of each run: the tuned adapter if there is one.",
        (Plot(data, layout),),
        table(("site", *(run.name for run in runs)), rows),
    )


def _difference_figure(runs: Sequence[RunFacts]) -> Figure | None:
    found = [each for each in differences(runs) if each.clients]
    if not found:
        return None
    data = []
    for index, each in enumerate(found, 1):
        color, symbol = style(index)
        data.append(dots(dict(reversed(each.clients.items())), each.run, color, symbol))
    height = max(len(each.clients) for each in found)
    layout = {
        "xaxis": axis(f"change of NLL from {runs[0].name}, nats per token (left of 0: better)", zeroline=True),
        "yaxis": {"automargin": True, "type": "category"},
        "scattermode": "group",
        "showlegend": True,
        "height": 60 + rows_height(height) * (2 + len(found)) // 3,
    }
    clients = dict.fromkeys(client for each in found for client in each.clients)
    rows = [
        Row((client, *(ranged(each.clients.get(client), signed=True) for each in found)), client) for client in clients
    ]
    rows.append(Row(("mean of the sites", *(ranged(each.mean, signed=True) for each in found))))
    return Figure(
        "runs-gain",
        f"Better or worse than {runs[0].name}",
        f"NLL minus that of {runs[0].name}, paired on the same test records, with 95 % intervals over them. Below 0 is "
        f"better. Sites right of 0 would have been better off in {runs[0].name}.",
        (Plot(data, layout),),
        table(("site", *(each.run for each in found)), rows),
    )


def _loss_figure(runs: Sequence[RunFacts]) -> Figure | None:
    data, means = [], []
    for index, run in enumerate(runs):
        color, symbol = style(index)
        losses = {title: run.mean_loss(title) for title in run.titles}
        known = {title: loss for title, loss in losses.items() if loss is not None}
        if known:
            data.append(line(list(known), list(known.values()), run.name, color, symbol, "nats per token"))
        means.append(known)
    if not data:
        return None
    titles = dict.fromkeys(title for each in means for title in each)
    rows = [Row((title, *(number(each.get(title)) for each in means))) for title in titles]
    return Figure(
        "runs-loss",
        "Training loss of all sites, round by round",
        "Over all trained tokens. Runs that train on different records or positions are not comparable here.",
        (
            Plot(
                data,
                {"xaxis": {"type": "category", "automargin": True}, "yaxis": axis("nats per token"), "height": 400},
            ),
        ),
        table(("round", *(run.name for run in runs)), rows),
    )
