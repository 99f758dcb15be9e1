"""The examples are short, and print what they should, without a network."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.needs import ROOT

EXAMPLES = ROOT / "examples"
TELLS = {
    "own_data": ["north {'training': 9, 'validation': 1, 'test': 2}", "south   personalized  "],
    "own_model": ["'model.safetensors'", "values trained over weights in ", "rank 4, on down_proj, q_proj, v_proj"],
    "own_method": ["fedavg-ft   aggregated    mean ", "own:median  personalized  mean "],
    "reading_a_run": ["run: evaluated, method fedmide, seed 0", "gain, nats per token", "personal ", "round-001 "],
}
WITHOUT_NETWORK = """
import runpy, socket, sys
def refuse(*given):
    raise AssertionError(f"a connection to {given[1:]}")
socket.socket.connect = refuse
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_every_example_is_run_and_short() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in scripts] == sorted(TELLS)
    assert all(len(path.read_text("utf-8").splitlines()) < 60 for path in scripts)


def say(name: str, folder: Path, cache: Path) -> str:
    """The output of an example in a folder that has the examples and nothing else."""
    shutil.copytree(EXAMPLES, folder / "examples")
    command = [sys.executable, "-c", WITHOUT_NETWORK, f"examples/{name}.py"]
    told = {"FEDMIDE_CACHE": str(cache), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **told}, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", TELLS)
def test_an_example_prints_what_it_should(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    said = say(name, tmp_path, tiny_folder.parent)
    assert [part for part in TELLS[name] if part not in said] == []


@pytest.mark.slow
def test_a_run_that_is_there_is_read(tiny_folder: Path, tmp_path: Path, finished_run: Callable[..., Path]) -> None:
    (tmp_path / "runs").mkdir()
    finished_run(tmp_path).rename(tmp_path / "runs" / "demo-001")
    said = say("reading_a_run", tmp_path, tiny_folder.parent)
    assert said.startswith("demo-001: evaluated, method fedmide, seed 3\n")
