"""Each method as a whole run in a folder: from records to metrics, and resumed after a stop."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from fedmide.config import apply_overrides, load, read_toml
from fedmide.config.sections import MethodName
from fedmide.errors import RunFolderError
from fedmide.methods import METHODS
from fedmide.model import adapters
from fedmide.runs import opening, stages
from fedmide.studies.entrants import entrants

QUICK = ("generation.enabled=false", "data.max_test_records=2", "lora.blocks=top:1", "data.validation_fraction=0.2")


def go(opened: Any) -> dict[str, Any]:
    with opened as run:
        stages.train(run)
        stages.personalize(run)
        return stages.evaluate(run)


EVERY_OPTION = (
    "warmup.folds=2",
    "warmup.reset=false",
    "scoring.kind=relative-gap",
    "scoring.without_own=true",
    "enrollment.rule=natural",
    "enrollment.softness=0.1",
    "personalization.start=own",
    "personalization.personal_weight=2.0",
    "personalization.interpolation=[0.0, 0.5, 1.0]",
)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, ()) for name in get_args(MethodName)),
        ("fedavg-ft", ("personalization.start=own",)),
        ("fedmide", EVERY_OPTION),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    name: str, options: tuple[str, ...], small_input: Any, tmp_path: Path, lasting: Callable[[Path], dict[str, Any]]
) -> None:
    """Stopped after the sites stored their states of the last round, before the server did."""
    config = load(small_input.config, [f"method={name}", *options, *QUICK])
    metrics = go(opening.start(config, tmp_path / "run"))
    assert metrics["over_clients"]["personalized"]["response_nll"]["num_clients"] == 2
    stopped = Path(shutil.copytree(tmp_path / "run", tmp_path / "stopped"))
    shutil.rmtree(stopped / "server" / "round-001")
    shutil.rmtree(stopped / "adapter")
    for path in stopped.glob("clients/*/adapter"):
        shutil.rmtree(path)
    for path in (*stopped.glob("clients/*/personalization.json"), *stopped.glob("clients/*/evaluation-*.json")):
        path.unlink()
    go(opening.resume(stopped))
    assert lasting(stopped) == lasting(tmp_path / "run")


@pytest.mark.parametrize(
    "how",
    [
        ["method=local"],
        ["scoring.without_own=true"],
        ["personalization.start=own"],
        ["method=fedavg-ft", "personalization.start=own"],
    ],
)
def test_a_lost_method_state_is_never_taken_for_none(how: list[str], small_input: Any, tmp_path: Path) -> None:
    config = load(small_input.config, [*how, *QUICK])
    with opening.start(config, tmp_path / "run") as run:
        stages.train(run)
    kept = sorted(path.name for path in (tmp_path / "run/clients/b/memory").iterdir())
    assert kept == ["000.safetensors", "001.safetensors"]
    (tmp_path / "run/clients/b/memory/001.safetensors").unlink()
    with pytest.raises(RunFolderError, match="clients/b: the method state of round 1 is missing"):
        opening.resume(tmp_path / "run").__enter__()


def test_nor_is_that_of_a_site_that_has_only_scored_since(small_input: Any, tmp_path: Path) -> None:
    few = ["personalization.start=own", "federation.participation=0.5", "federation.rounds=1"]
    with opening.start(load(small_input.config, [*few, *QUICK]), tmp_path / "run") as run:
        stages.train(run)
        (scored,) = {event["client"] for event in run.folder.events() if "steps" not in event["metrics"]}
    (kept,) = (tmp_path / "run/clients" / scored / "memory").iterdir()
    kept.unlink()
    with pytest.raises(RunFolderError, match=f"clients/{scored}: the method state of round -1 is missing"):
        opening.resume(tmp_path / "run").__enter__()


@pytest.mark.parametrize("number", [0, 1])
def test_the_state_of_a_training_that_diverged_is_not_taken_for_a_lost_one(
    number: int, small_input: Any, tmp_path: Path, running_off: Callable[[str, int], None]
) -> None:
    running_off("b", number)
    with opening.start(load(small_input.config, ["method=local", *QUICK]), tmp_path / "run") as run:
        stages.train(run)
    go(opening.resume(tmp_path / "run"))
    assert adapters.is_finite(adapters.read(tmp_path / "run/clients/b/adapter/adapter_model.safetensors"))


def test_training_in_one_place_is_on_everyones_records(small_input: Any, tmp_path: Path) -> None:
    config = load(small_input.config, ["method=central", *QUICK])
    assert METHODS["central"].in_one_place
    go(opening.start(config, tmp_path / "run"))
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["stage"] == "train"]
    assert [(event["client"], event["num_records"]) for event in rounds] == [("(all clients)", 16)] * 2
    assert {event["client"] for event in events if event["stage"] == "personalize"} == {"a", "b"}


def test_in_one_place_as_many_steps_are_taken_as_by_all_clients_together(small_input: Any, tmp_path: Path) -> None:
    values = apply_overrides(read_toml(small_input.config), [*QUICK, "training.max_steps=3"])
    steps = {}
    for each in entrants(values, ["central", "fedavg", "fedavg-ft"]):
        with opening.start(each.config_for(0), tmp_path / each.name) as run:
            stages.train(run)
            stages.personalize(run)
            steps[each.name] = sum(event["metrics"].get("steps", {"sum": 0})["sum"] for event in run.folder.events())
    assert steps == dict.fromkeys(steps, 2 * 3 * 5), "two clients, three steps, a warm-up, two rounds, two passes"


def test_one_client_in_one_place_is_a_federation_of_one(small_input: Any, tmp_path: Path) -> None:
    """Up to the order of its records, whose stream has another name: so all of them are in one batch."""
    shutil.rmtree(small_input.data / "b")
    adapter = {}
    for method in ("central", "fedavg"):
        knobs = [f"method={method}", *QUICK, "training.batch_size=16", "training.epochs=2", "lora.dropout=0"]
        with opening.start(load(small_input.config, knobs), tmp_path / method) as run:
            stages.train(run)
            begin = run.inputs.fresh_adapter()
        adapter[method] = adapters.read(tmp_path / method / "server/round-001/adapter.safetensors")
    assert adapters.distance(adapter["central"], begin) > 0.1
    assert adapters.distance(adapter["central"], adapter["fedavg"]) < 1e-3


@pytest.mark.parametrize(
    ("method", "trained", "extra"),
    [
        ("fedmide", 448, 0),
        ("ffa-lora", 192, 0),
        ("ditto", 896, 0),
        ("feddpa-t", 896, 896),
        ("feddpa-f", 448, 896),
        ("fedalt", 448 + 256, 896 + 256),
        ("flora", 448, 0),
        ("flexlora", 448, 0),
        ("flexlora flexlora.ranks=[1,4]", 224 * 5 // 2, 0),
    ],
)
def test_the_figures_count_what_a_method_trains_and_needs(
    method: str, trained: int, extra: int, small_input: Any, tmp_path: Path
) -> None:
    """Rank 2 in one block: q 64 in and out, v 64 in and 32 out: A 2 * 128, B 2 * 96; two routers of 2 * 64."""
    method, *knobs = method.split()
    config = load(small_input.config, [f"method={method}", *knobs, *QUICK, "federation.rounds=1"])
    figures = go(opening.start(config, tmp_path / "run"))["method"]
    assert (figures["name"], figures["trained_parameters"], figures["extra_parameters"]) == (method, trained, extra)
    assert figures["source"] == METHODS[method].source  # type: ignore[index]
