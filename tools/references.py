"""The reference pages, generated from the program; `python -m tools.references` writes them.

They are docs/cli.md, docs/configuration.md and docs/errors.md. A test fails while a page differs from the page that
this module generates from the command line, the configuration and the explanations.
"""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import typer
from pydantic import BaseModel

from fedmide import cli
from fedmide.cli import explanations
from fedmide.config import Config

DOCS = Path(__file__).resolve().parents[1] / "docs"

CLI_START = """# Commands

Every command takes `--help`, which ends with an example.
Results go to stdout: a table or, with `--json`, one JSON object.
Progress and messages go to stderr.
Exit codes: 0 done, 2 a mistake that you can fix ([errors](errors.md)), 130 stopped.
`fedmide --install-completion` sets up completion for your shell.
"""

CONFIGURATION_START = """# Configuration

A configuration is a TOML file.
A setting that it leaves out has the default below: that of the published method, if the method has one.
`--set section.key=value` on the command line overrides the file.
Unknown settings are refused with a suggestion.
Every run writes all its settings to `RUN/config.toml`; a run with that file repeats it.

The table of a method (`fedprox`, `ditto`, ...) is allowed with that method only.
`[variants.NAME]` is for [comparisons](compare.md#variants).
The folder `examples/` of the repository has configurations to start from.
"""


def cell(text: str) -> str:
    """The text in a form that fits into a cell of a table.

    >>> cell("iid | field")
    'iid \\\\| field'
    """
    return " ".join(text.split()).replace("|", r"\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; "" if it has no rows.

    >>> print(table(("a", "b"), [("1", "2")]), end="")
    | a | b |
    |---|---|
    | 1 | 2 |
    >>> table(("a",), [])
    ''
    """
    lines = [head, *rows]
    drawn = [f"| {' | '.join(line)} |" for line in lines]
    drawn.insert(1, f"|{'---|' * len(head)}")
    return "".join(f"{line}\n" for line in drawn) if rows else ""


def commands(command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for each command that is not a group, in the order of the help."""
    context = click.Context(command, parent=parent, info_name=command.name if parent else "fedmide")
    if not isinstance(command, click.Group):
        yield context
        return
    for name in command.list_commands(context):
        yield from commands(command.commands[name], context)


def command_section(context: click.Context) -> str:
    """The description of a command, its arguments and options, and its example."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    records = [each.get_help_record(context) for each in command.params if each.name != "help"]
    rows = [(f"`{cell(left)}`", cell(right)) for left, right in filter(None, records)]
    example = (command.epilog or "").removeprefix("Example: ")
    parts = [
        f"## {context.command_path}",
        inspect.cleandoc(command.help or ""),
        f"```\n{usage}\n```",
        table(("argument or option", "meaning"), rows).rstrip(),
        f"Example:\n\n```\n{example}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def commands_page() -> str:
    """The text of docs/cli.md."""
    sections = [command_section(context) for context in commands(typer.main.get_command(cli.app))]
    return "\n".join([CLI_START, *sections])


BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


def kind(schema: Mapping[str, Any]) -> str:
    """The values of a setting in words, from its JSON schema.

    >>> kind({"type": "integer", "minimum": 1}), kind({"type": "array", "items": {"type": "string"}})
    ('whole number, at least 1', 'list of text')
    """
    if "anyOf" in schema:
        return " or ".join(kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if schema["type"] == "array":
        return f"list of {kind(schema['items'])}"
    bounds = [f"{words} {schema[bound]:g}" for bound, words in BOUNDS.items() if bound in schema]
    return ", ".join([TYPES[schema["type"]], *bounds])


def tables_of(section: type[BaseModel], name: str = "") -> Iterator[str]:
    """A section of the page for the settings of a table, and one for each table within it."""
    schema = section.model_json_schema()["properties"]
    rows, inner = [], []
    for key, field in section.model_fields.items():
        dotted = f"{name}.{key}" if name else key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner.append((field.annotation, dotted))
            continue
        default = json.dumps(field.get_default(), ensure_ascii=False)
        rows.append((f"`{dotted}`", kind(schema[key]), f"`{default}`", cell(field.description or "")))
    title = f"## {name}\n\n{inspect.getdoc(section)}" if name else "## Settings at the top of the file"
    yield f"{title}\n\n{table(('setting', 'value', 'default', 'meaning'), rows)}"
    for kind_of_table, dotted in inner:
        yield from tables_of(kind_of_table, dotted)


def configuration_page() -> str:
    """The text of docs/configuration.md."""
    return "\n".join([CONFIGURATION_START, *tables_of(Config)])


def errors_page() -> str:
    """The text of docs/errors.md: the page that ships with the package."""
    return explanations.PAGE.read_text("utf-8")


PAGES = {"cli.md": commands_page, "configuration.md": configuration_page, "errors.md": errors_page}


def main() -> None:
    """Writes all pages."""
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
