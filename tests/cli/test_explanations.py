"""Every error leads to its section of the page, and no section is of an error that is gone."""

import ast
import re
from pathlib import Path

import pytest

import fedmide
from fedmide import cli, errors
from fedmide.cli.explanations import PAGE, explanation, sections

TEXT = PAGE.read_text("utf-8")
SOURCES = Path(fedmide.__file__).parent


def raised() -> set[str]:
    """The names of all classes of errors that the source defines, and of the one that the system raises."""
    trees = [ast.parse(path.read_text("utf-8")) for path in SOURCES.rglob("*.py")]
    classes = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    return {name for name in classes if name.endswith("Error")} | {"OSError"}


def test_every_error_has_a_section_and_every_section_an_error() -> None:
    assert set(sections(TEXT)) == raised()
    assert len(raised()) > 8


@pytest.mark.parametrize("name", sections(TEXT))
def test_a_section_is_found_in_any_case_and_is_not_empty(name: str) -> None:
    assert explanation(name.upper()) == sections(TEXT)[name]
    assert len(explanation(name).split()) > 20


def test_the_sections_are_the_page() -> None:
    whole = "\n".join(sections(TEXT).values())
    assert TEXT.endswith(whole) and TEXT.startswith("# Errors\n")
    assert explanation("Config") == ""


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.DataError, errors.ModelError, errors.RunFolderError])
def test_a_mistake_ends_with_one_pointer_that_can_be_followed(
    kind: type[errors.UserError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise kind("a problem", "A remedy")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr().err
    assert told == f"fedmide: a problem. A remedy\nMore: fedmide explain {kind.__name__}\n"
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", told.splitlines()[-1].removeprefix("More: ").split())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and capsys.readouterr().out == explanation(kind.__name__)


def test_an_unknown_error_is_refused_with_the_known_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fedmide", "explain", "ValueError"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.match(r"fedmide: 'ValueError' is not the name of an error\. Known: ConfigError, DataError, ", told)
