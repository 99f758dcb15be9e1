"""The display of long work on stderr: messages, progress bars, lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

if TYPE_CHECKING:
    from fedmide.progress import Advance


LINE_SECONDS = 10.0
"""Seconds between two progress lines in a log."""


class Rate(ProgressColumn):
    """A column of the progress bar: units of work per minute."""

    def render(self, task: Task) -> Text:
        """The rate as text; empty until there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed * 60:.1f}/min" if speed else "", style="progress.data.speed")


def tell(message: str) -> None:
    """Prints a message on stderr."""
    sys.stderr.write(f"fedmide: {message}\n")
    sys.stderr.flush()


@contextmanager
def bars(stage: str, total: int, unit: str) -> Iterator["Advance"]:
    """A progress bar on stderr; in a log, or anything else but a terminal, a line from time to time."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(stage, total, unit)
        return
    columns = (
        TextColumn("{task.description:<15}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),  # moves even while the first unit takes long
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Bars(*columns, console=console, expand=True, speed_estimate_period=600) as progress:
        task = progress.add_task(stage, total=total, note="")
        yield lambda units, note: progress.update(task, advance=units, note=note)


def _lines(stage: str, total: int, unit: str) -> "Advance":
    """Prints a line when a stage begins, when all is done, and every `LINE_SECONDS` in between."""
    begun = told = time.monotonic()
    done = 0
    tell(f"{stage}: {total} {unit}" if total else f"{stage}: nothing left to do")

    def advance(units: int, note: str) -> None:
        nonlocal told, done
        done += units
        at = time.monotonic()
        if (units == 0 or done < total) and at - told < LINE_SECONDS:
            return
        told = at
        left = f"{timedelta(seconds=round((at - begun) * (total - done) / done))} left" if done else "just begun"
        tell(f"{stage}: {done}/{total} {unit}, {60 * done / max(at - begun, 1e-9):.1f}/min, {left}, {note}")

    return advance
