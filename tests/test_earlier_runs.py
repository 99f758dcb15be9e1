"""Run folders of an earlier commit are resumed and reported by the code of today."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedmide import report
from fedmide.journal import creation
from fedmide.runs import opening, stages

EARLIER = Path(__file__).parent / "earlier_runs"
STAGES = (stages.train, stages.personalize, stages.generate, stages.evaluate)


@pytest.fixture
def earlier(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A copy of the earlier runs and their records, as the working folder: their paths are relative."""
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    copy = shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(copy)
    return copy


def response_nlls(folder: Path) -> list[float]:
    """The response NLL of each client under each adapter, in the order of metrics.json."""
    clients = json.loads((folder / "metrics.json").read_text())["clients"]
    return [each["response_nll"]["value"] for client in clients.values() for each in client["stages"].values()]


@pytest.mark.parametrize("method", ["fedmide", "scaffold"])
def test_an_interrupted_run_ends_where_its_own_code_ended(earlier: Path, method: str) -> None:
    first = (earlier / f"interrupted-{method}" / "server" / "round-000" / "adapter.safetensors").read_bytes()
    with opening.resume(Path(f"interrupted-{method}")) as run:
        for stage in STAGES:
            stage(run)
    folder = earlier / f"interrupted-{method}"
    assert (folder / "server" / "round-000" / "adapter.safetensors").read_bytes() == first
    reached = {"common": folder / "adapter", **{name: folder / "clients" / name / "adapter" for name in "ab"}}
    for name, path in reached.items():
        expected = load_file(earlier / "ends" / method / f"{name}.safetensors")
        found = load_file(path / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for key, array in expected.items():  # another processor rounds otherwise
            np.testing.assert_allclose(found[key], array, rtol=1e-3, atol=1e-5)
    assert response_nlls(folder) == pytest.approx(response_nlls(earlier / "ends" / method), rel=1e-3)


def test_a_finished_run_is_reported(earlier: Path) -> None:
    folder = creation.reopen(earlier / "finished")
    page = report.write(folder).read_text("utf-8")
    assert "SmolLM" not in page and "tiny-random" in page
    assert "d0e5f1bb312081f39c46f42b1b44cc267ee27125" in page
