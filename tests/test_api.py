"""The package as a library: the same run as by command, its figures as rows, and a user's own method."""

import builtins
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

import fedmide
from fedmide.config import load, parse, to_toml
from fedmide.errors import ConfigError, RunFolderError, UsageError
from fedmide.journal.creation import reopen
from fedmide.methods import registry
from fedmide.methods.registry import DITTO, FEDAVG, FEDMIDE


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory, finished_run: Callable[..., Path]) -> Path:
    return finished_run(tmp_path_factory.mktemp("read"))


def test_a_run_from_python_equals_the_commands(
    small_input: Any, run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = fedmide.run(str(small_input.config), out=tmp_path / "run", quiet=True)
    assert capsys.readouterr() == ("", "")
    assert results.manifest["status"] == "evaluated" and results.path == tmp_path / "run"
    assert results.metrics["clients"] == reopen(run_path).read_metrics()["clients"]
    adapter = (run_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (results.path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_values_and_configurations_work_too_and_a_run_is_resumed(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(small_input.config, ["federation.rounds=1", "generation.enabled=false"])
    first = fedmide.run(config)
    assert first.path == Path("runs/run-001") and "fedmide: rounds: " in capsys.readouterr().err
    second = fedmide.run(tomllib.loads(to_toml(config)), out="again", quiet=True)
    assert second.metrics["clients"] == first.metrics["clients"]
    done = second.path / "server" / "round-000" / "state.json"
    before = done.stat().st_mtime_ns
    (second.path / "metrics.json").unlink()
    assert fedmide.run(config, out="again", quiet=True).metrics["clients"] == first.metrics["clients"]
    assert done.stat().st_mtime_ns == before
    with pytest.raises(RunFolderError, match="seed is 3 in again and 4 here"):
        fedmide.run(config.model_copy(update={"seed": 4}), out="again")


def test_rows_equal_the_files_of_the_folder(run_path: Path) -> None:
    results, folder = fedmide.read_run(str(run_path)), reopen(run_path)
    events = folder.events()
    rounds = results.rounds()
    assert [(row["client"], row["round"], row["bytes_up"]) for row in rounds] == [
        (event["client"], event["round"], event["bytes_up"]) for event in events
    ]
    assert rounds[0]["loss"] == events[0]["metrics"]["loss"]["sum"] / events[0]["metrics"]["loss"]["count"]
    metrics = folder.read_metrics()
    clients = results.clients()
    assert [(row["client"], row["adapter"]) for row in clients] == [
        (client, adapter) for client in "ab" for adapter in ("base", "aggregated", "personalized")
    ]
    last = metrics["clients"]["b"]["stages"]["personalized"]
    assert clients[-1]["response_nll_low"] == last["response_nll"]["low"]
    assert clients[-1]["choice_accuracy"] == last["choice"]["accuracy"]
    (row,) = (row for row in results.over_clients() if (row["adapter"], row["measure"]) == ("base", "response_nll"))
    assert row["worst"] == metrics["over_clients"]["base"]["response_nll"]["worst"]
    ledger = folder.read_ledger("a")
    assert [(row["record_id"], row["score"]) for row in results.scores("a")] == [(e.record_id, e.score) for e in ledger]
    assert results.responses("b") == folder.read_predictions("b") and len(results.responses("b")) == 3
    with pytest.raises(RunFolderError, match=r"there is no site 'c'\. Known: a, b"):
        results.scores("c")


def test_rows_become_a_data_frame(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = fedmide.read_run(run_path).clients()
    frame = clients.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame) == list(clients[0])
    wide = frame.pivot(index="client", columns="adapter", values="response_nll")
    assert wide.loc["a", "base"] == clients[0]["response_nll"]
    imports = builtins.__import__

    def without_pandas(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return imports(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(UsageError, match=r"pandas is not installed\. Install it: pip install pandas"):
        clients.to_pandas()


def test_a_run_that_is_not_evaluated_has_no_figures_yet(run_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_path, tmp_path / "copy")
    (copy / "metrics.json").unlink()
    results = fedmide.read_run(copy)
    assert (results.metrics, results.clients(), results.over_clients()) == ({}, [], []) and results.rounds()


def test_the_package_is_light_to_import() -> None:
    program = (
        "import sys, fedmide; fedmide.__version__\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "fedmide.read_run, fedmide.register, fedmide.Results, fedmide.run\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not hasattr(fedmide, 'nonsense')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


# --- a user's own method


def test_a_users_own_method_runs_under_its_name(
    small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_OWN", {})
    config = load(small_input.config, ["method=own:mine", "generation.enabled=false", "federation.rounds=1"])
    assert load_again(config, tmp_path) == config and config.warmup.rounds == 0
    with pytest.raises(ConfigError, match=r"method = 'own:mine' is not known to this process\. Call fedmide\.register"):
        fedmide.run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    fedmide.register(replace(DITTO, name="own:mine"))
    fedmide.register(replace(FEDAVG, name="own:mine"))  # the later one
    ours = fedmide.run(config, tmp_path / "run", quiet=True)
    theirs = fedmide.run(config.model_copy(update={"method": "fedavg"}), tmp_path / "fedavg", quiet=True)
    assert ours.metrics["clients"] == theirs.metrics["clients"]
    assert ours.metrics["method"]["name"] == "own:mine"
    monkeypatch.setattr(registry, "_OWN", {})
    assert fedmide.read_run(ours.path).config.method == "own:mine"  # reading a run does not need the method


def load_again(config: Any, folder: Path) -> Any:
    (folder / "written.toml").write_text(to_toml(config))
    return load(folder / "written.toml")


def test_a_method_of_your_own_cannot_enroll() -> None:
    """Configurations fit the settings of enrollment to `fedmide` alone, so such a method would never split."""
    with pytest.raises(ConfigError, match="own:mine: a method of your own can't enroll"):
        fedmide.register(replace(FEDMIDE, name="own:mine"))


@pytest.mark.parametrize("name", ["mine", "fedavg", "own:", "own:Mine", "own:a b"])
def test_a_name_that_does_not_begin_with_own_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name for a method of your own"):
        fedmide.register(replace(FEDAVG, name=name))
    if name != "fedavg":
        with pytest.raises(ConfigError, match=r"not a method.*expected fedmide, local, .* or own:NAME"):
            parse({"method": name})
    with pytest.raises(ConfigError, match=r"did you mean 'fedavg'\?"):
        parse({"method": "fedavgg"})
