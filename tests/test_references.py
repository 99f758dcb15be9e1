"""The generated pages match the command line and the configuration."""

import pytest
import typer

from fedmide import cli
from fedmide.config import Config
from fedmide.config.knobs import knobs
from tools import references


@pytest.mark.parametrize("name", references.PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    written = (references.DOCS / name).read_text("utf-8")
    assert written == references.PAGES[name](), f"docs/{name} is stale: make docs writes it again"


def test_every_command_and_option_is_on_the_page() -> None:
    page = references.commands_page()
    contexts = list(references.commands(typer.main.get_command(cli.app)))
    assert len(contexts) > 20
    for context in contexts:
        section = page.split(f"## {context.command_path}\n")[1].split("\n## ")[0]
        options = [name for each in context.command.params for name in each.opts if name.startswith("--")]
        assert [name for name in options if f"`{name}" not in section and f" {name}" not in section] == []
        assert f"Example:\n\n```\n{context.command_path}" in section


def test_every_knob_is_on_the_page_with_its_default_and_meaning() -> None:
    rows = [line.split(" | ") for line in references.configuration_page().splitlines() if line.startswith("| `")]
    assert {row[0] for row in rows} == {f"| `{name}`" for name, _ in knobs()}
    assert all(len(row) == 4 and row[3].strip("| ") for row in rows)
    assert [
        "| `lora.r`",
        "whole number, at least 1",
        f"`{Config().lora.r}`",
        "Rank of the adapter's matrices. |",
    ] in rows
