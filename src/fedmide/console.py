"""What a person at a terminal sees: progress on stderr with rate and remaining time, the table of results on stdout."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from fedmide.sources.check import PartReport, Report
from fedmide.stages import Advance

STAGE_TITLES = {"base": "base", "aggregated": "aggregated", "personalized": "personalised"}


class Rate(ProgressColumn):
    """Units of work a minute."""

    def render(self, task: Task) -> Text:
        """The rate as text, once there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed * 60:.1f}/min" if speed else "", style="progress.data.speed")


@contextmanager
def bars(stage: str, total: int, unit: str) -> Iterator[Advance]:
    """A progress bar on stderr; on something that is no terminal, a line when the stage begins and ends."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Bars(*columns, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task(stage, total=total, note="")
        yield lambda units, note: progress.update(task, advance=units, note=note)


def results_table(metrics: Mapping[str, Any]) -> Table:
    """Each client's response NLL and choice accuracy under every adapter, and the means over clients."""
    stages = [stage for stage in STAGE_TITLES if stage in metrics["over_clients"]]
    table = Table(title="Test records: response NLL (nats per token) and accuracy of the choice by likelihood")
    table.add_column("client", no_wrap=True)
    for measure in ("NLL", "choice"):
        for stage in stages:
            table.add_column(f"{measure}\n{STAGE_TITLES[stage]}", justify="right")
    for name, client in metrics["clients"].items():
        likelihoods = [_number(client["stages"][stage]["response_nll"], "value") for stage in stages]
        choices = [_number(client["stages"][stage]["choice"], "accuracy") for stage in stages]
        table.add_row(name, *likelihoods, *choices)
    table.add_section()
    over = metrics["over_clients"]
    for title, key in (("mean", "mean"), ("worst", "worst")):
        likelihoods = [_number(over[stage]["response_nll"], key) for stage in stages]
        table.add_row(title, *likelihoods, *(_number(over[stage]["choice_accuracy"], key) for stage in stages))
    return table


def check_table(report: Report) -> Table:
    """Sizes, duplicates and lengths of each client's parts."""
    table = Table(title="Records")
    table.add_column("client", no_wrap=True)
    for column in ("part", "records", "duplicates", "categories", "concepts", "prompt chars", "response chars"):
        table.add_column(column, justify="right")
    for client in report.clients:
        for part in ("training", "validation", "test"):
            facts: PartReport = getattr(client, part)
            counts = (facts.records, facts.duplicates, facts.categories, facts.concepts)
            lengths = (facts.prompt_characters, facts.response_characters)
            means = (f"{length.mean:.0f} (max {length.longest})" for length in lengths)
            table.add_row(client.name, part, *(str(count) for count in counts), *means)
    return table


def leak_lines(report: Report) -> list[str]:
    """A sentence for each kind of held-out record that also occurs in training; one sentence where there is none."""
    if not report.leaks:
        return ["no held-out record occurs in training"]
    return [
        f"leak: {leak.records} {leak.part} records of client {leak.client} ({leak.distinct} distinct) share their "
        f"{leak.kind} with training records of client {leak.training_client}"
        for leak in report.leaks
    ]


def _number(figures: Mapping[str, Any] | None, key: str) -> str:
    return "-" if figures is None else f"{figures[key]:.3f}"
