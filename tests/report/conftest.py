"""Runs to report on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, finished_run: Callable[..., Path]) -> Path:
    """The folder of a whole small run; only to be read."""
    return finished_run(tmp_path_factory.mktemp("reported"))


@pytest.fixture
def run_folder(whole_run: Path) -> RunFolder:
    """The whole small run."""
    return reopen(whole_run)


@pytest.fixture
def copied(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the whole small run, to be changed."""
    return shutil.copytree(whole_run, tmp_path / "copy")


@pytest.fixture(scope="session")
def texts(whole_run: Path) -> tuple[str, ...]:
    """Every text and id of a record that the small run knows."""
    found: set[str] = set()
    for path in (whole_run.parent / "input" / "data").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found |= {record["instruction"], record["response"]}
    for path in whole_run.rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            found |= {value for key, value in json.loads(line).items() if key in ("record_id", "prediction") and value}
    return tuple(found)
