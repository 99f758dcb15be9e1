"""Flower's simulation, inside a namespace that has only loopback: the bytes of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.flower, pytest.mark.needs("namespaces")]

COMMAND = [sys.executable, "-m", "fedmide", "run"]


def test_a_simulation_ends_with_the_bytes_of_one_process(small_input: Any, tmp_path: Path) -> None:
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, other = tmp_path / "one", tmp_path / "simulated"
    for out, options in ((one, []), (other, ["--runtime", "flower-simulation", "--json"])):
        done = subprocess.run(
            [*COMMAND, str(small_input.config), "--out", str(out), *options],
            env=settings,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "evaluated"
    assert {path: data for path, data in contents(other).items() if not path.endswith("answer.bin")} == contents(one)
    assert [event["bytes_up"] for event in events(one)] == [event["bytes_up"] for event in events(other)]


def contents(run: Path) -> dict[str, bytes]:
    """The bytes of every file that contains no time."""
    timed = ("manifest.json", "events.jsonl", "state.json", "personalization.json", "report.html")
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in timed]
    assert len(files) > 10
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
