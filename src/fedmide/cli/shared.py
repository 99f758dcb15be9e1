"""What commands share: options, and how results are written."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedmide.atomic import without_nan

RunFolderPath = Annotated[Path, typer.Argument(help="A run folder.")]
Overrides = Annotated[list[str], typer.Option("--set", help="section.key=value, over the configuration's own.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def preset(name: str) -> Path:
    """The file of a configuration that comes with the package."""
    return Path(__file__).parents[1] / "presets" / f"{name}.toml"


def print_json(values: Mapping[str, Any]) -> None:
    """Writes one JSON object to stdout."""
    sys.stdout.write(json.dumps(without_nan(values), indent=2, allow_nan=False) + "\n")
