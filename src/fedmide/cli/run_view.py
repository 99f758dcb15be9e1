"""The progress of a run in the terminal. It is read from the run folder alone, not from the process at work.

A round appears when it is complete: before that, the folder holds nothing of it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedmide.journal.folder import RunFolder
from fedmide.report.facts import Turn, turns

BLOCKS = "▁▂▃▄▅▆▇█"


LAST = "evaluated"
"""The status of a finished run."""


@dataclass(frozen=True)
class Snapshot:
    """The content of a run folder at one moment. `silent_seconds`: the time since its last change."""

    name: str
    status: str
    rounds_done: int
    rounds: int
    personalized: int
    generated: int
    clients: tuple[str, ...]
    turns: tuple[Turn, ...]
    elapsed_seconds: float
    silent_seconds: float


def look(folder: RunFolder, now: datetime) -> Snapshot:
    """The content of the folder now."""
    manifest = folder.read_manifest()
    clients, told = tuple(manifest["data"]), turns(folder)
    files = [folder.path / "manifest.json", folder.path / "events.jsonl"]
    latest = max(file.stat().st_mtime for file in files if file.exists())
    ended = datetime.fromisoformat(manifest["updated"]) if manifest["status"] == LAST else now
    return Snapshot(
        name=folder.path.resolve().name,
        status=manifest["status"],
        rounds_done=len({turn.round for turn in told if turn.stage != "personalize"}),
        rounds=folder.config.warmup.rounds + folder.config.federation.rounds,
        personalized=sum(folder.personal_adapter(client).is_dir() for client in clients),
        generated=sum(folder.predictions(client).exists() for client in clients),
        clients=clients,
        turns=told,
        elapsed_seconds=(ended - datetime.fromisoformat(manifest["started"])).total_seconds(),
        silent_seconds=max(0.0, now.timestamp() - latest),
    )


def render(seen: Snapshot) -> RenderableType:
    """The snapshot as text for people."""
    count = len(seen.clients)
    head = Text(f"{seen.name}: {seen.status}, {clock(seen.elapsed_seconds)}", style="bold")
    if seen.status != LAST:
        head.append(f", last change {clock(seen.silent_seconds)} ago", style="dim")
    stages = f"rounds {seen.rounds_done}/{seen.rounds}   personalized {seen.personalized}/{count}   "
    stages += f"generated {seen.generated}/{count}"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("site", overflow="fold")
    for column in ("rounds", "loss", "", "shared", "personal", "enrolled", "time"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    for client in seen.clients:
        table.add_row(client, *_cells([turn for turn in seen.turns if turn.client == client]))
    refused = [turn for turn in seen.turns if turn.refused]
    notes = [Text(f"{turn.title}, {turn.client}: {turn.refused}", style="red") for turn in refused[-5:]]
    return Group(head, Text(stages), Text(""), table, *notes)


def follow(folder: RunFolder, seconds: float, once: bool = False) -> None:
    """Shows the run until it is evaluated. With `once`, or if stdout is not a terminal: shows it once."""
    console = Console()
    seen = look(folder, datetime.now(UTC))
    if once or not console.is_terminal:
        console.print(render(seen))
        return
    with Live(render(seen), console=console, auto_refresh=False) as live:
        while seen.status != LAST:
            time.sleep(seconds)
            seen = look(folder, datetime.now(UTC))
            live.update(render(seen), refresh=True)


def sparkline(values: Sequence[float]) -> str:
    """The values as a line of blocks; the highest value is a full block.

    >>> sparkline([3.0, 2.0, 1.0]), sparkline([1.0, 1.0]), sparkline([])
    ('█▄▁', '▁▁', '')
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[int((value - low) * scale)] for value in values)


def clock(seconds: float) -> str:
    """A duration in hours, minutes and seconds.

    >>> clock(3725.9), clock(0)
    ('1:02:05', '0:00:00')
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _cells(own: Sequence[Turn]) -> tuple[str, ...]:
    """The cells of a site's row after its name."""
    rounds = [turn for turn in own if turn.stage != "personalize"]
    losses = [turn.loss for turn in rounds if turn.loss is not None]
    sets = next(((turn.shared, turn.personal) for turn in reversed(rounds) if turn.shared is not None), ("–", "–"))
    return (
        str(len(rounds)),
        f"{losses[-1]:.3f}" if losses else "–",
        sparkline(losses[-20:]),
        *(str(count) for count in sets),
        str(sum(turn.enrolled for turn in rounds)),
        clock(sum(turn.seconds for turn in own)),
    )
