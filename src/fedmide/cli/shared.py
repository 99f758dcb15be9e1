"""What commands share: options, and how results are written."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedmide.atomic import without_nan

if TYPE_CHECKING:
    from fedmide.journal import RunFolder

RunFolderPath = Annotated[Path, typer.Argument(help="A run folder.")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, over the configuration's own.")]
TrackerName = Literal["mlflow", "tensorboard"]  # those of tracking
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def preset(name: str) -> Path:
    """The file of a configuration that comes with the package."""
    return Path(__file__).parents[1] / "presets" / f"{name}.toml"


def track_run(folder: "RunFolder", tracker: TrackerName, place: str = "") -> str:
    """Where the run is tracked now; what was left out is told."""
    from fedmide.console import tell
    from fedmide.tracking import track

    where, withheld = track(folder, tracker, place)
    if withheld:
        tell(withheld)
    return where


def print_json(values: Mapping[str, Any]) -> None:
    """Writes one JSON object to stdout."""
    sys.stdout.write(json.dumps(without_nan(values), indent=2, allow_nan=False) + "\n")
