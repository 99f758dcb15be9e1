"""The commands that look something up: methods and errors."""

import sys
from typing import Annotated

import typer

from fedmide.cli.shared import COMPARISON, MORE, AsJson, print_json
from fedmide.errors import UsageError

app = typer.Typer()


@app.command("methods", rich_help_panel=COMPARISON, epilog="Example: fedmide methods")
def list_methods(as_json: AsJson = False) -> None:
    """List the federated methods that a configuration can choose."""
    from rich.console import Console

    from fedmide.cli.tables import methods_table
    from fedmide.methods import METHODS

    if as_json:
        facts = ("summary", "traffic", "source")
        print_json({name: {key: getattr(each, key) for key in facts} for name, each in METHODS.items()})
    else:
        Console().print(methods_table(METHODS.values()))


@app.command(rich_help_panel=MORE, epilog="Example: fedmide explain DataError")
def explain(
    name: Annotated[str, typer.Argument(help="Name of an error, as at the end of a message.")], as_json: AsJson = False
) -> None:
    """Explain an error and its remedy."""
    from fedmide.cli.explanations import PAGE, explanation, sections

    text = explanation(name)
    if not text:
        raise UsageError(
            f"{name!r} is not the name of an error", f"Known: {', '.join(sections(PAGE.read_text('utf-8')))}"
        )
    if as_json:
        print_json({"name": name, "text": text})
    else:
        sys.stdout.write(text)
