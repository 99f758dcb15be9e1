"""The output of `--help` for each command has an example that can be typed. The test walks the app itself."""

import shlex
from collections.abc import Iterator

import click
import pytest
import typer
from typer import rich_utils

from fedmide import cli
from fedmide.cli.shared import PANELS
from fedmide.config import apply_overrides, parse

START = "Example: fedmide "


def walk(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that is not a group, with the words that lead to it."""
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walk(inner, (*words, name))
    else:
        yield words, command


COMMANDS = dict(walk(typer.main.get_command(cli.app)))
BY_NAME = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


def parsed(words: tuple[str, ...], arguments: list[str]) -> click.Context:
    """The parsed command line; nothing is run. Raises the error of click if click refuses it."""
    return COMMANDS[words].make_context(" ".join(words), list(arguments))


def test_commands_at_every_depth_are_found() -> None:
    assert {("run",), ("data", "check"), ("flower", "init"), ("flower", "server", "start")} <= set(COMMANDS)
    assert len(COMMANDS) > 20


def test_the_help_begins_with_the_commands_of_a_newcomer() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group)
    names = group.list_commands(click.Context(group))
    assert sorted(names) == sorted(group.commands) and names[:4] == ["demo", "run", "report", "chat"]
    panels = [getattr(group.commands[name], "rich_help_panel", None) for name in names]
    assert tuple(dict.fromkeys(panels)) == PANELS


@BY_NAME
def test_an_example_ends_the_help_and_parses(words: tuple[str, ...]) -> None:
    epilog = COMMANDS[words].epilog or ""
    assert epilog.startswith(START), f"fedmide {' '.join(words)} has no example: give it epilog='{START}...'"
    typed = shlex.split(epilog.removeprefix(START))
    assert tuple(typed[: len(words)]) == words
    context = parsed(words, typed[len(words) :])
    parse(apply_overrides({}, context.params.get("overrides", [])))


def test_an_example_that_would_be_refused_is_found() -> None:
    with pytest.raises(click.NoSuchOption):
        parsed(("run",), ["my.toml", "--nonsense"])
    with pytest.raises(click.MissingParameter):
        parsed(("flower", "site", "check"), [])


@BY_NAME
def test_a_line_describes_the_command(words: tuple[str, ...]) -> None:
    first = (COMMANDS[words].help or "").split("\n\n")[0]
    assert first.endswith(".") and len(first) <= 120


@BY_NAME
def test_the_printed_help_has_the_text_of_every_argument_and_option(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 1000)
    with pytest.raises(SystemExit):
        COMMANDS[words].main(["--help"], prog_name="fedmide")
    printed = " ".join(capsys.readouterr().out.split())
    texts = [getattr(each, "help", None) or "" for each in COMMANDS[words].params]
    assert [text for text in texts if " ".join(text.split()) not in printed] == []
