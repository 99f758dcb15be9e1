"""Settings, commands, tests and files that the documents name exist, and their examples parse."""

import ast
import re
import tomllib
from pathlib import Path

import click
import pytest
import typer

from fedmide import cli
from fedmide.config import Config, load, read_toml
from fedmide.config.knobs import knobs
from tests.needs import ROOT

README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = {path.name: path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_parse(path: Path) -> None:
    load(path)


def test_the_demo_of_the_examples_is_that_of_the_command() -> None:
    shipped = ROOT / "src" / "fedmide" / "cli" / "presets" / "demo.toml"
    assert (ROOT / "examples" / "demo.toml").read_bytes() == shipped.read_bytes()


def test_the_published_example_has_the_defaults() -> None:
    published = load(ROOT / "examples" / "published.toml").model_dump()
    published["data"].pop("path")
    published["prompt"].pop("overflow")
    expected = Config().model_dump()
    expected["data"].pop("path")
    expected["prompt"].pop("overflow")
    assert published == expected


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_knobs_exist(name: str) -> None:
    sections = "|".join(field for field in Config.model_fields if field != "seed")
    named = set(re.findall(rf"`(?:--set )?((?:{sections})\.[a-z_0-9]+)", DOCUMENTS[name]))
    files = {f"{section}.{suffix}" for section in Config.model_fields for suffix in ("py", "toml")}
    assert named - files <= {knob for knob, _ in knobs()} | {"data.fields"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_tests_exist(name: str) -> None:
    written = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    functions = re.findall(r"`(test_\w+)`", DOCUMENTS[name])
    assert [function for function in functions if f"def {function}(" not in written] == []
    files = re.findall(r"`tests/([\w/]+\.py)`", DOCUMENTS[name])
    assert [file for file in files if not (ROOT / "tests" / file).is_file()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_commands_exist(name: str) -> None:
    typed = re.findall(r"(?:^|`)fedmide ([a-z][^`\n]*)", DOCUMENTS[name], re.MULTILINE)
    for words in map(str.split, typed):
        command = typer.main.get_command(cli.app)
        while isinstance(command, click.Group) and words:
            assert words[0] in command.commands, f"there is no fedmide {' '.join(words)}"
            command = command.commands[words.pop(0)]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_configurations_in_documents_parse(name: str, tmp_path: Path) -> None:
    for text in re.findall(r"^ *```toml\n(.*?)^ *```", DOCUMENTS[name], re.MULTILINE | re.DOTALL):
        path = tmp_path / "shown.toml"
        path.write_text(text)
        if "with_context" in text:
            assert set(read_toml(path)) == {"with_context", "without_context"}
        else:
            load(path)


def test_the_readers_of_documents_find_something() -> None:
    assert "fedmide data check" in DOCUMENTS["data.md"] and DOCUMENTS["data.md"].count("```toml") == 3


def tree_in_the_readme() -> set[str]:
    """The files and folders of the README's tree, by their paths from the repository's root."""
    found, open_folders = set[str](), list[str]()
    for line in README.split("## The tree")[1].split("```")[1].strip("\n").splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        open_folders[depth:] = [name]
        found.add("".join(open_folders[: depth + 1]))
    return found


def test_the_tree_in_the_readme_has_every_file_of_the_package() -> None:
    package = ROOT / "src" / "fedmide"
    whole = ("cli/presets/", "report/page/")  # named as folders, without their files
    files = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    files = {path for path in files if "__pycache__" not in path and not path.endswith(("__init__.py", "py.typed"))}
    named = {path.removeprefix("src/fedmide/") for path in tree_in_the_readme() if path.startswith("src/fedmide/")}
    expected = {path for path in files if not path.startswith(whole)}
    assert {path for path in named if not path.endswith("/") and path} == expected
    assert all((package / path).is_dir() for path in named if path.endswith("/"))


def test_the_other_folders_of_the_tree_exist() -> None:
    assert [path for path in tree_in_the_readme() if not (ROOT / path).exists()] == []


def defined(path: Path) -> set[str]:
    """The functions, classes and methods (Class.method) of a module."""
    found = set[str]()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_the_tour_names_files_and_functions_that_exist() -> None:
    text, package = DOCUMENTS["architecture.md"], ROOT / "src" / "fedmide"
    stops = re.findall(r"`([a-z_]+/[a-z_/]+\.py)`, `([A-Za-z_.]+)`", text)
    assert len(re.findall(r"^\d+\. `", text, re.MULTILINE)) == 10 and len(stops) > 10
    assert [(file, name) for file, name in stops if name not in defined(package / file)] == []
    files = set(re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text))
    assert [file for file in files if not (package / file).is_file()] == []


def test_the_table_of_layers_is_the_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]
    table = DOCUMENTS["architecture.md"].split("## Layers")[1].split("\n### ")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert rows == [layer.split(" | ") for layer in contract["layers"]]
