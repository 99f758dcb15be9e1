"""The command line. Heavy imports are inside the commands, so that help appears at once.

Results go to stdout, as a table or with --json as one JSON object; progress and messages go to stderr. A user's
mistake is printed as one paragraph, with exit code 2.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from fedmide.cli import data, flower, reference, results, runs, studies
from fedmide.cli.shared import PANELS, RECORDS, SITES, print_json
from fedmide.errors import UserError
from fedmide.version import __version__


class _InPanels(TyperGroup):
    """The group of all commands. Its help has a panel per purpose, in the order of `PANELS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, panel by panel; within a panel as they were added."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: PANELS.index(getattr(self.commands[name], "rich_help_panel", "")))


app = typer.Typer(
    cls=_InPanels,
    help="Federated instruction tuning of language models, personalized for each site. Records never leave their "
    "site. To start: fedmide demo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


for part in (runs, studies, results, reference):
    app.add_typer(part.app)


app.add_typer(data.app, name="data", rich_help_panel=RECORDS)


app.add_typer(flower.app, name="flower", rich_help_panel=SITES)


EXIT_USER_ERROR = 2


EXIT_INTERRUPTED = 130


def main() -> None:
    """The entry point: a mistake of the user is one paragraph on stderr, without a traceback."""
    try:
        code = app(prog_name="fedmide", standalone_mode=False)
    except UserError as error:
        code = _refuse(str(error), error.problems, type(error).__name__)
    except click.ClickException as error:
        code = _refuse(*_usage(error)) if error.format_message() else error.exit_code  # else the help was printed
    except OSError as error:
        if error.filename is None:
            raise
        code = _refuse(f"{error.filename}: {error.strerror}", explained="OSError")
    except (KeyboardInterrupt, click.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        sys.stderr.write(f"\nfedmide: stopped; {_way_on(sys.argv[1:])}\n")
    sys.exit(code)


def _way_on(words: Sequence[str]) -> str:
    """The command that continues the work of a stopped command."""
    if words[:2] == ["flower", "site"]:
        return "give the command again; finished work is kept"
    deployed = words[:1] == ["flower"]
    verb = "fedmide flower resume SERVER RUN" if deployed else "fedmide run --resume RUN"
    return f"to resume a run that has begun: {verb}"


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"fedmide {__version__}\n")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _root(version: Version = False) -> None:
    """Accepts the options before a command."""


def _refuse(message: str, problems: Sequence[str] = (), explained: str = "") -> int:
    """Prints a mistake and returns its exit code. `explained`: the section of the error page that has more about it."""
    more = f"fedmide explain {explained}" if explained else ""
    sys.stderr.write(f"fedmide: {message}\n" + (f"More: {more}\n" if more else ""))
    if "--json" in sys.argv:
        print_json({"error": message, "problems": list(problems) or [message], "more": more})
    return EXIT_USER_ERROR


def _usage(error: click.ClickException) -> tuple[str, list[str]]:
    """A mistake on the command line: the paragraph to print, and its problem alone."""
    problem = error.format_message().rstrip(".")
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedmide"
    return f"{problem}. See {command} --help", [problem]
