"""Options that several commands share, and the output of results."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedmide.atomic import without_nan

if TYPE_CHECKING:
    from fedmide.journal.folder import RunFolder
    from fedmide.runs.opening import Run


START = "Start"


COMPARISON = "Compare"


STAGES = "Stages of a run"


RECORDS = "Data"


SITES = "Hospitals"


MORE = "More"


PANELS = (START, COMPARISON, STAGES, RECORDS, SITES, MORE)
"""The panels of `fedmide --help`, in their order."""


RunFolderPath = Annotated[Path, typer.Argument(help="Run folder.")]


Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a setting, e.g. --set training.learning_rate=1e-3 (repeatable).")
]


TrackerName = Literal["mlflow", "tensorboard"]  # the trackers of runs.tracking


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def preset(name: str) -> Path:
    """The file of a configuration that ships with the package."""
    return Path(__file__).parent / "presets" / f"{name}.toml"


def track_run(folder: "RunFolder", tracker: TrackerName, place: str = "") -> str:
    """Logs a run to a tracker and returns the entry's place. Prints what was not sent."""
    from fedmide.runs.tracking import track
    from fedmide.terminal import tell

    where, withheld = track(folder, tracker, place)
    if withheld:
        tell(withheld)
    return where


def print_json(values: Mapping[str, Any]) -> None:
    """Writes one JSON object to stdout."""
    sys.stdout.write(json.dumps(without_nan(values), indent=2, allow_nan=False) + "\n")


def tell_results(opened: "Run", as_json: bool, metrics: Mapping[str, Any] | None = None) -> None:
    """Prints the end of a run command: the table of results, if there is one, and the run folder."""
    from rich.console import Console

    from fedmide.cli.tables import questions_table, results_table

    manifest = opened.folder.read_manifest()
    if as_json:
        facts = {"run": str(opened.folder.path), "status": manifest["status"], "seconds": manifest["seconds"]}
        print_json({**facts, **(metrics or {})})
        return
    if metrics is not None:
        Console().print(results_table(metrics) if metrics["over_clients"] else "no test records, so no results")
        if "questions" in metrics:
            Console().print(questions_table(metrics))
    sys.stdout.write(f"{manifest['status']}: {opened.folder.path}\n")
