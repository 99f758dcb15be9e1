import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedmide.cli.tables import sweep_table
from fedmide.config import read_toml
from fedmide.errors import ConfigError, UsageError
from fedmide.studies import sweep


def values_of(config: Path) -> dict[str, Any]:
    values = read_toml(config)
    values["personalization"] = {"epochs": 1}
    values["evaluation"]["choices"] = 0
    values["generation"] = {"enabled": False}
    values["enrollment"] = {"rule": "median"}
    return values


def test_a_sweep_reports_each_value_and_draws_it(small_input: Any, tmp_path: Path) -> None:
    plan = sweep.planned(values_of(small_input.config), "warmup.rounds=1,2", ["fedmide"], [0, 1], tmp_path)
    said: list[str] = []
    figures = sweep.run(plan, said.append)
    assert sum(": run " in each for each in said) == 4
    rows = figures["methods"]["fedmide"]
    assert list(rows) == ["1", "2"]
    for value, row in rows.items():
        label = "as-set" if value == "1" else f"warmup.rounds={value}"
        runs = [tmp_path / f"runs/fedmide/{label}-seed-{seed}/metrics.json" for seed in (0, 1)]
        metrics = [json.loads(each.read_text())["over_clients"]["personalized"]["response_nll"] for each in runs]
        for name, key in (("response_nll", "mean"), ("response_nll_worst", "worst")):
            by_seed = [each[key] for each in metrics]
            assert row[name]["mean"] == pytest.approx(np.mean(by_seed))
            assert row[name]["deviation"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
        assert row["steps_per_client"]["low"] == row["steps_per_client"]["high"] == 12  # (1 + 2 + 1) rounds of 3 steps
    assert json.loads((tmp_path / "warmup.rounds/sweep.json").read_text())["knob"] == "warmup.rounds"
    assert (tmp_path / "warmup.rounds/sweep.svg").read_text().count("<circle") == 4
    said.clear()
    assert sweep.run(plan, said.append) == figures
    assert said == []


def test_a_run_that_diverged_is_reported_and_leaves_a_gap(small_input: Any, tmp_path: Path) -> None:
    plan = sweep.planned(values_of(small_input.config), "warmup.rounds=1,2", ["fedmide"], [0], tmp_path)
    sweep.run(plan)
    path = tmp_path / "runs/fedmide/warmup.rounds=2-seed-0/metrics.json"
    metrics = json.loads(path.read_text())
    changes = {"response_nll": None, "num_records": 0, "num_not_finite": 3}
    metrics["clients"]["a"]["stages"]["personalized"] |= changes
    path.write_text(json.dumps(metrics))
    rows = sweep.run(plan)["methods"]["fedmide"]
    assert rows["1"]["response_nll"]["mean"] > 0
    assert rows["2"]["response_nll"] == {**dict.fromkeys(("mean", "deviation", "low", "high")), "seeds": 1}
    assert (tmp_path / "warmup.rounds/sweep.svg").read_text().count("<circle") == 2
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(sweep_table(sweep.run(plan)))
    told = console.export_text()
    assert told.count("no number") == 2 and "one seed" in told


def test_clients_in_pieces_are_swept_too(small_input: Any, tmp_path: Path) -> None:
    plan = sweep.planned(values_of(small_input.config), "data.pieces=1,2", ["fedavg-ft"], [0], tmp_path)
    rows = sweep.run(plan)["methods"]["fedavg-ft"]
    runs = [tmp_path / f"runs/fedavg-ft/{each}-seed-0/metrics.json" for each in ("as-set", "data.pieces=2")]
    assert [len(json.loads(each.read_text())["clients"]) for each in runs] == [2, 4]
    assert {row["steps_per_client"]["mean"] for row in rows.values()} == {12}


def test_a_run_that_no_setting_changes_is_done_once_for_all_settings(small_input: Any, tmp_path: Path) -> None:
    values, said = values_of(small_input.config), list[str]()
    first, second = (
        sweep.run(sweep.planned(values, turned, ["fedavg-ft"], [0], tmp_path), said.append)["methods"]["fedavg-ft"]
        for turned in ("data.noisy_clients=0,1", f"training.batch_size={values['training']['batch_size']},2")
    )
    assert sum(": run " in each for each in said) == 3
    assert first["0"] == next(iter(second.values()))
    assert first["1"] != first["0"]


@pytest.mark.parametrize(
    "turned",
    [
        "federation.participation=0.25,1.0",
        "data.noisy_clients=0,1",
        "data.pieces=1,5",
        "lora.r=4,8",
        "enrollment.threshold=0.9,1.0,1.1",
        "federation.rounds=1,2",
    ],
)
def test_any_knob_turns(small_input: Any, tmp_path: Path, turned: str) -> None:
    plan = sweep.planned(values_of(small_input.config), turned, ["fedmide", "fedavg-ft"], [0], tmp_path)
    knob, _, given = turned.partition("=")
    section, name = knob.split(".")
    configs = [each.config.model_dump()[section][name] for each in plan.entrants["fedmide"]]
    assert configs == [pytest.approx(float(each)) for each in given.split(",")]
    steps = [(each.config.warmup.rounds + each.config.federation.rounds) for each in plan.entrants["fedmide"]]
    assert steps == ([2, 3] if knob == "federation.rounds" else [3] * len(steps))


def test_a_knob_that_takes_a_warm_up_away_pays_it_back(small_input: Any, tmp_path: Path) -> None:
    plan = sweep.planned(values_of(small_input.config), "warmup.rounds=0,1,2", ["fedmide"], [0], tmp_path)
    assert [each.config.federation.rounds for each in plan.entrants["fedmide"]] == [3, 2, 1]


def test_a_variant_is_turned_too_and_does_not_set_the_knob_back(small_input: Any, tmp_path: Path) -> None:
    values = values_of(small_input.config)
    values["variants"] = {
        "soft": {"enrollment": {"softness": 0.5}},
        "near": {"method": "fedprox", "fedprox": {"mu": 0.1}},
    }
    plan = sweep.planned(values, "enrollment.softness=0.1,0.2", ["soft", "near", "fedmide"], [0], tmp_path)
    assert list(plan.entrants) == ["soft", "near", "fedmide"]
    assert [each.config.enrollment.softness for each in plan.entrants["soft"]] == [0.1, 0.2]
    plan = sweep.planned(values, "training.batch_size=2,4", ["soft", "near"], [0], tmp_path)
    assert [each.config.enrollment.softness for each in plan.entrants["soft"]] == [0.5, 0.5]
    assert [each.config.training.batch_size for each in plan.entrants["near"]] == [2, 4]
    assert {each.config.fedprox.mu for each in plan.entrants["near"]} == {0.1}
    assert plan.attempt("near", 0, 0).path == tmp_path / "runs/near/training.batch_size=2-seed-0"
    assert plan.attempt("near", 1, 0).path == tmp_path / "runs/near/as-set-seed-0"


@pytest.mark.parametrize("turned", ["enrollment.threshold", "=1", "x.y=", "lora.r=4,4", "data.path=../x,y"])
def test_a_knob_without_values_is_refused(small_input: Any, tmp_path: Path, turned: str) -> None:
    with pytest.raises(UsageError, match="--knob"):
        sweep.planned(values_of(small_input.config), turned, ["fedmide"], [0], tmp_path)


@pytest.mark.parametrize("turned", ["personalization.max_steps=1,2", "scaffold.learning_rate=0.1,0.2"])
def test_a_knob_that_makes_no_difference_is_refused(small_input: Any, tmp_path: Path, turned: str) -> None:
    with pytest.raises(UsageError, match="makes no difference to fedmide"):
        sweep.planned(values_of(small_input.config), turned, ["fedmide"], [0], tmp_path)


def test_an_unknown_knob_is_refused_before_any_run(small_input: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"enrollment\.treshold"):
        sweep.planned(values_of(small_input.config), "enrollment.treshold=1,2", ["fedmide"], [0], tmp_path)
    assert list(tmp_path.glob("enrollment*")) == []


def test_unknown_methods_and_seeds_are_refused(small_input: Any, tmp_path: Path) -> None:
    values = values_of(small_input.config)
    with pytest.raises(ConfigError, match="'fedmidi' is not a method and not a variant"):
        sweep.planned(values, "lora.r=4,8", ["fedmidi"], [0], tmp_path)
    with pytest.raises(UsageError, match="--seeds"):
        sweep.planned(values, "lora.r=4,8", ["fedmide"], [], tmp_path)
