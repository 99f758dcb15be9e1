"""Things that the source must not do, read from the source. import-linter checks which module may import which."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedmide

ROOT = Path(fedmide.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(path: Path) -> Iterator[str]:
    """The full names of everything that a module imports, at any place in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importing(*packages: str) -> set[str]:
    return {name_of(path) for path in SOURCES if {name.split(".")[0] for name in imported(path)} & set(packages)}


def dotted(node: ast.expr) -> str:
    """An attribute as it is written, such as `torch.load`; empty if it is not the attribute of a name."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def uses(path: Path) -> set[str]:
    """The names and attributes that a module mentions."""
    return {dotted(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Name | ast.Attribute)}


def using(*names: str) -> set[str]:
    return {name_of(path) for path in SOURCES if uses(path) & set(names)}


def test_the_readers_of_source_find_what_they_look_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from torch import load\n    import os.path\n    torch.load(sys.stdout.buffer)\n")
    assert set(imported(path)) == {"torch.load", "os.path"}
    assert {"torch.load", "sys.stdout"} <= uses(path)
    assert len(SOURCES) > 30


def test_nothing_is_unpickled() -> None:
    assert importing(*UNPICKLING) == set()
    assert using("torch.load", "numpy.load", "np.load", "eval", "exec") == set()
    assert not any(name in ("torch.load", "numpy.load") for path in SOURCES for name in imported(path))


def test_three_modules_import_transformers_and_peft() -> None:
    assert importing("transformers", "peft") == {"model/lora.py", "model/hooks.py", "model/pretrained/hf.py"}


def test_one_module_imports_flwr() -> None:
    assert importing("flwr") == {"flower/apps.py"}


def test_private_names_stay_in_their_module() -> None:
    assert [(name_of(path), name) for path in SOURCES for name in imported(path) if re.search(r"\._(?!_)", name)] == []


@pytest.mark.parametrize("package", ["ray", "accelerate", "trl", "lightning"])
def test_rejected_packages_are_not_imported(package: str) -> None:
    assert importing(package) == set()


def test_few_modules_know_the_terminal_and_fewer_write_to_it() -> None:
    assert using("print", "input") == set()
    verbs = ("__init__", "shared", "runs", "studies", "results", "reference", "data", "flower")
    commands = {f"cli/{name}.py" for name in verbs}
    views = {"cli/chat_view.py", "cli/record_view.py", "cli/run_view.py", "cli/tables.py", "terminal.py"}
    assert using("sys.stdout", "sys.stderr") == {*commands, "cli/chat_view.py", "terminal.py"} - {"cli/runs.py"}
    assert importing("rich", "typer", "click") == commands | views


def test_one_module_reads_the_command_line_and_ends_the_process() -> None:
    assert using("sys.argv", "sys.exit") == {"cli/__init__.py"}
