"""What commands share: options, and how results are written."""

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


RunFolderPath = Annotated[Path, typer.Argument(help="A run folder.")]


Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, over the configuration's own.")]


TrackerName = Literal["mlflow", "tensorboard"]  # those of tracking


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def preset(name: str) -> Path:
    """The file of a configuration that comes with the package."""
    return Path(__file__).parent / "presets" / f"{name}.toml"


def track_run(folder: "RunFolder", tracker: TrackerName, place: str = "") -> str:
    """Where the run is tracked now; what was left out is told."""
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
    """What a run command ends with: where the folder lies, and the table where there is one."""
    from rich.console import Console

    from fedmide.cli.tables import questions_table, results_table

    manifest = opened.folder.read_manifest()
    if as_json:
        facts = {"run": str(opened.folder.path), "status": manifest["status"], "seconds": manifest["seconds"]}
        print_json({**facts, **(metrics or {})})
        return
    if metrics is not None:
        Console().print(results_table(metrics) if metrics["over_clients"] else "no test records, so no figures")
        if "questions" in metrics:
            Console().print(questions_table(metrics))
    sys.stdout.write(f"{manifest['status']}: {opened.folder.path}\n")
