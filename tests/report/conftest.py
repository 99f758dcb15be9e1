"""Runs to report on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmide import stages
from fedmide.config import load
from fedmide.journal import RunFolder, reopen


@pytest.fixture(scope="session")
def whole_run(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, small_input_at: Callable[[Path], Any], one_thread: None
) -> Path:
    """The folder of a whole small run; only to be read."""
    folder = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
        given = small_input_at(folder / "input")
        with stages.start(load(given.config), folder / "run") as run:
            for stage in (stages.train, stages.personalize, stages.generate, stages.evaluate):
                stage(run)
    return folder / "run"


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
