"""Runs in trackers: the readers of MLflow and TensorBoard find what is in the run folder, and no more."""

import importlib.util
import json
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedmide import cli
from fedmide.config import load
from fedmide.config.knobs import flat, used
from fedmide.errors import TrackerError, UsageError
from fedmide.journal.creation import reopen
from fedmide.journal.folder import RunFolder
from fedmide.runs import tracking
from fedmide.runs.tracking import ALONE, EXPERIMENT, track, tracked


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, finished_run: Callable[..., Path]) -> Path:
    return finished_run(tmp_path_factory.mktemp("tracked"))


@pytest.fixture
def folder(run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of the run; the working directory is empty, and no network can be reached."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail(f"a connection to {args[1:]}"))
    return reopen(shutil.copytree(run_path, tmp_path / "run"))


class Store:
    """An MLflow store, read by MLflow's own client."""

    def __init__(self, uri: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow import MlflowClient

            self.client = MlflowClient(uri)

    def runs(self) -> list[Any]:
        return list(self.client.search_runs([self.client.get_experiment_by_name(EXPERIMENT).experiment_id]))

    def history(self, run: Any, name: str) -> list[tuple[int, float]]:
        return sorted((each.step, each.value) for each in self.client.get_metric_history(run.info.run_id, name))

    def files(self, run: Any) -> dict[str, bytes]:
        found = self.client.list_artifacts(run.info.run_id)
        return {
            each.path: Path(self.client.download_artifacts(run.info.run_id, each.path)).read_bytes() for each in found
        }


def losses(folder: RunFolder, client: str) -> list[tuple[int, float]]:
    events = [event for event in folder.events() if event["client"] == client and event["stage"] != "personalize"]
    return [(event["round"], event["metrics"]["loss"]["sum"] / event["metrics"]["loss"]["count"]) for event in events]


def test_mlflow_holds_the_figures_of_the_run(folder: RunFolder) -> None:
    where, withheld = track(folder, "mlflow")
    assert withheld == "" and where.endswith(" at sqlite:///mlflow.db")
    assert sorted(path.name for path in Path().iterdir()) == ["mlflow.db", "mlruns"]
    store = Store("sqlite:///mlflow.db")
    (run,) = store.runs()
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED") and run.info.run_id in where
    knobs = {name: str(value) for name, value in flat(used(folder.config)).items()}
    assert {name: run.data.params[name] for name in knobs} == knobs
    assert run.data.params["version.torch"] == folder.read_manifest()["versions"]["torch"]
    for client in "ab":
        assert store.history(run, f"clients/{client}/loss") == losses(folder, client)
        nll = folder.read_metrics()["clients"][client]["stages"]["personalized"]["response_nll"]["value"]
        assert store.history(run, f"clients/{client}/final/personalized/response_nll/value") == [(2, nll)]
    over = folder.read_metrics()["over_clients"]
    assert run.data.metrics["final/aggregated/response_nll/worst"] == over["aggregated"]["response_nll"]["worst"]
    assert [step for step, _ in store.history(run, "rounds/loss")] == [-1, 0, 1]
    files = store.files(run)
    assert set(files) == {"config.toml", "metrics.json", "report.html"}
    assert json.loads(files["metrics.json"]) == folder.read_metrics()
    Path("again.toml").write_bytes(files["config.toml"])
    assert load(Path("again.toml")) == folder.config


def test_a_runs_entry_in_mlflow_is_updated(folder: RunFolder) -> None:
    uri = f"sqlite:///{folder.path.parent}/elsewhere.db"
    metrics = (folder.path / "metrics.json").read_bytes()
    (folder.path / "metrics.json").unlink()
    folder.update_manifest(status="trained", updated=folder.read_manifest()["started"])
    track(folder, "mlflow", uri)
    store = Store(uri)
    (half,) = store.runs()
    assert half.info.status == "RUNNING" and "final/base/response_nll/mean" not in half.data.metrics
    (folder.path / "metrics.json").write_bytes(metrics)
    folder.update_manifest(status="evaluated", updated="2100-01-01T00:00:00+00:00")
    for _ in range(2):
        track(folder, "mlflow", uri)
    (whole,) = store.runs()
    assert whole.info.run_id == half.info.run_id and whole.info.status == "FINISHED"
    assert store.history(whole, "clients/a/loss") == losses(folder, "a")  # nothing is there twice
    values = json.loads(metrics)
    values["over_clients"]["base"]["response_nll"]["mean"] = 0.25
    (folder.path / "metrics.json").write_text(json.dumps(values))
    folder.update_manifest(updated="2100-01-02T00:00:00+00:00")
    track(folder, "mlflow", uri)
    (again,) = store.runs()
    assert again.data.metrics["final/base/response_nll/mean"] == 0.25
    assert not list(Path().iterdir()) and (folder.path.parent / "mlruns" / EXPERIMENT).is_dir()


def events_in(place: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(place))
    found.Reload()
    return found


def test_tensorboard_holds_the_figures_of_the_run(folder: RunFolder) -> None:
    for _ in range(2):  # the second time replaces the first
        where, withheld = track(folder, "tensorboard")
    assert (where, withheld) == (f"TensorBoard's log folder {folder.path / 'tensorboard'}", "")
    assert len(list((folder.path / "tensorboard").iterdir())) == 1
    found = events_in(folder.path / "tensorboard")
    for client in "ab":
        scalars = {each.step: each.value for each in found.Scalars(f"clients/{client}/loss")}
        assert scalars == pytest.approx(dict(losses(folder, client)))
    over = folder.read_metrics()["over_clients"]["personalized"]["response_nll"]["mean"]
    assert found.Scalars("final/personalized/response_nll/mean")[0].value == pytest.approx(over)
    (text,) = found.Tensors("configuration/text_summary")
    assert b"    lora.r = 2\n" in text.tensor_proto.string_val[0]
    track(folder, "tensorboard", "logs")
    assert events_in(Path("logs") / "run").Scalars("rounds/loss")


def stored(folder: RunFolder) -> Iterator[bytes]:
    """All bytes that the trackers got."""
    track(folder, "mlflow", f"sqlite:///{Path.cwd()}/store.db")
    track(folder, "tensorboard", "logs")
    for path in sorted(Path().rglob("*")):
        if path.is_file():
            yield path.read_bytes()


def test_nothing_of_a_single_record_is_tracked(folder: RunFolder) -> None:
    (folder.path / "report.html").write_text("here stands what --with-records --out put here")
    everything = b"\n".join(stored(folder))
    ledger = [entry for client in "ab" for entry in folder.read_ledger(client)]
    predictions = [line for client in "ab" for line in folder.read_predictions(client)]
    texts = {line[key] for line in predictions for key in ("record_id", "instruction", "reference", "prediction")}
    texts |= {str(entry.record_id) for entry in ledger}
    texts |= {json.dumps(entry.score) for entry in ledger if entry.score is not None}
    texts |= {json.dumps(value) for value in (folder.read_evaluation("a", "base") or {})["nll_sums"]}
    assert len(texts) > 50
    assert [text for text in texts if len(text) > 3 and text.encode() in everything] == []
    assert b"--with-records" not in everything and b"No scores are shown" in everything
    assert (
        json.dumps(folder.read_metrics()["clients"]["a"]["stages"]["base"]["perplexity"]["value"]).encode()
        in everything
    )


def test_figures_over_one_record_are_withheld(folder: RunFolder) -> None:
    metrics = folder.read_metrics()
    metrics["clients"]["b"]["generation"]["num_records"] = 1
    (folder.path / "metrics.json").write_text(json.dumps(metrics))
    told = tracked(folder)
    assert told.withheld == ALONE and set(told.files) == {"config.toml"}
    assert {point.name.split("/")[0] for point in told.final} == {"cost", "seconds"}
    assert told.rounds and track(folder, "tensorboard")[1] == ALONE


def test_names_are_changed_to_ones_that_mlflow_accepts(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = reopen(finished_run(tmp_path, ["method=central", "federation.rounds=1", "generation.enabled=false"]))
    assert "clients/_all clients_/loss" in {point.name for point in tracked(folder).rounds}
    track(folder, "mlflow", f"sqlite:///{tmp_path}/mlflow.db")


def test_a_missing_module_or_place_is_reported(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(tracking.importlib.util, "find_spec", lambda name: None if name == "alembic" else find(name))  # type: ignore[attr-defined]
        with pytest.raises(
            TrackerError, match=r"alembic is not installed\. Install it: pip install 'fedmide\[mlflow\]'"
        ):
            track(folder, "mlflow")
    with pytest.raises(TrackerError, match=r"MLflow at file:nowhere: .*maintenance mode"):
        track(folder, "mlflow", "file:nowhere")
    Path("taken").write_text("")
    with pytest.raises(
        TrackerError,
        match=r"taken/run: can't be written: .*Give another log folder: fedmide track RUN --to tensorboard --uri",
    ):
        track(folder, "tensorboard", "taken")


# --- the commands


def test_a_finished_run_is_tracked_by_command(folder: RunFolder) -> None:
    told = CliRunner().invoke(cli.app, ["track", str(folder.path), "--to", "tensorboard", "--uri", "logs"])
    assert (told.exit_code, told.stdout, told.stderr) == (0, "TensorBoard's log folder logs/run\n", "")
    uri = f"sqlite:///{Path.cwd()}/told.db"
    told = CliRunner().invoke(cli.app, ["track", str(folder.path), "--to", "mlflow", "--uri", uri, "--json"])
    (run,) = Store(uri).runs()
    assert json.loads(told.stdout) == {"run": str(folder.path), "tracked": f"MLflow run {run.info.run_id} at {uri}"}


def test_a_run_is_tracked_at_its_end(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: RunFolder
) -> None:
    command = ["run", str(small_input.config), "--out", "new", "--track", "tensorboard", "--json"]
    done = CliRunner().invoke(cli.app, command)
    assert json.loads(done.stdout)["status"] == "evaluated"
    assert "fedmide: TensorBoard's log folder new/tensorboard\n" in done.stderr
    assert events_in(Path("new/tensorboard")).Scalars("final/base/response_nll/mean")
    monkeypatch.setattr(tracking, "NEEDS", {"tensorboard": ("no_such_module",)})
    refused = CliRunner().invoke(cli.app, [*command, "--set", "seed=4", "--out", "never"])
    assert isinstance(refused.exception, TrackerError) and not Path("never").exists()
    elsewhere = CliRunner().invoke(cli.app, [*command, "--runtime", "flower"])
    assert isinstance(elsewhere.exception, UsageError)
