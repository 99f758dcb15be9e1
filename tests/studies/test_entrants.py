import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide import methods
from fedmide.config import Config, parse
from fedmide.errors import ConfigError, UsageError
from fedmide.studies.entrants import Budget, budget_of, entrants, within

VALUES: dict[str, Any] = {
    "seed": 4,
    "training": {"max_steps": 6, "learning_rate": 4e-3},
    "federation": {"rounds": 5},
    "warmup": {"rounds": 1},
    "personalization": {"epochs": 3},
}


def steps(config: Config) -> int:
    """The local steps of a client through all stages, as the stages count them."""
    method = methods.of(config)
    rounds = config.warmup.rounds + config.federation.rounds
    tuning = 0 if method.tuning is None else config.personalization.max_steps
    second = config.ditto.max_steps if method.name == "ditto" else config.feddpa.max_steps
    return rounds * (config.training.max_steps + (second if method.trainings == 2 else 0)) + tuning


def test_a_warm_up_and_a_tuning_are_paid_with_rounds() -> None:
    names = ["fedmide", "fedavg-ft", "local", "fedavg", "ditto", "long"]
    values = {**VALUES, "variants": {"long": {"warmup": {"rounds": 3}, "personalization": {"epochs": 1}}}}
    configs = {each.name: each.config for each in entrants(values, names)}
    rounds = {name: (each.warmup.rounds, each.federation.rounds) for name, each in configs.items()}
    assert rounds == {
        "fedmide": (1, 5),
        "fedavg-ft": (0, 6),
        "local": (0, 6),
        "fedavg": (0, 9),
        "ditto": (0, 9),
        "long": (3, 5),
    }
    assert {name: steps(each) for name, each in configs.items()} == dict.fromkeys(names, 54)
    assert (configs["ditto"].training.max_steps, configs["ditto"].ditto.max_steps) == (3, 3)
    assert configs["ditto"].ditto.epochs >= 3


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 3), st.integers(0, 4), st.sampled_from(list(methods.METHODS))
)
def test_every_method_gets_the_steps_of_the_budget(k: int, t: int, w: int, e: int, method: str) -> None:
    values = {"training": {"max_steps": k}, "federation": {"rounds": t}, "warmup": {"rounds": w}}
    values["personalization"] = {"epochs": e}
    budget = budget_of(values)
    assert budget == Budget(w + t + e, k)
    if methods.METHODS[parse({"method": method}).method].in_one_place:
        return  # counts all clients' steps in one place, which needs records
    if k < methods.METHODS[method].trainings:
        with pytest.raises(ConfigError, match="trains 2 adapters in a round, which can't share 1 step"):
            within(budget, {**values, "method": method}, method)
        return
    assert steps(within(budget, {**values, "method": method}, method)) == budget.rounds * k


def test_steps_do_not_hang_on_the_number_of_records() -> None:
    from fedmide.model.training import num_steps

    for each in entrants(VALUES, ["fedmide", "fedavg-ft"]):
        for number in (1, 7, 500):
            assert num_steps(number, each.config.training) == 6


def test_without_a_limit_a_round_is_what_the_largest_client_needs(small_input: Any) -> None:
    from fedmide.config import read_toml

    values = read_toml(small_input.config)  # nine training records of ten, batches of four
    assert budget_of(values).steps == 3


def test_in_one_place_a_round_has_the_steps_of_all_clients(small_input: Any) -> None:
    from fedmide.config import read_toml

    values = read_toml(small_input.config)
    central, fedavg = (each.config for each in entrants(values, ["central", "fedavg"]))
    assert (fedavg.training.max_steps, central.training.max_steps, central.training.epochs) == (3, 2 * 3, 2 * 3)
    assert central.federation.rounds == fedavg.federation.rounds == 5
    shutil.rmtree(small_input.data / "b")
    (central,) = (each.config for each in entrants(values, ["central"]))
    assert central.training.max_steps == 3, "of one client its own"


def test_all_seeds_have_the_records_of_the_configurations_seed() -> None:
    (entrant,) = entrants(VALUES, ["fedmide"])
    runs = [entrant.config_for(seed) for seed in (0, 1)]
    assert [each.seed for each in runs] == [0, 1]
    assert [each.data_seed for each in runs] == [4, 4]


def test_rates_change_together() -> None:
    values = {**VALUES, "personalization": {"epochs": 3, "learning_rate": 8e-3}}
    scaffold, plain = entrants(values, ["scaffold", "fedavg-ft"])
    config = scaffold.config_for(0, 1e-3)
    assert config.training.learning_rate == 1e-3
    assert config.scaffold.learning_rate == pytest.approx(0.1 / 4)
    assert plain.config_for(0, 1e-3).personalization.learning_rate == pytest.approx(2e-3)
    assert entrants(VALUES, ["fedavg-ft"])[0].config_for(0, 1e-3).personalization.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("variants", "names", "expected"),
    [
        ({}, ["fedmidi"], "'fedmidi' is not a method and not a variant"),
        ({"fedavg": {}}, ["fedavg"], "variants.fedavg: this is the name of a method"),
        ({"base": {}}, ["base"], "variants.base: this is the name of the base model's row"),
        ({"../x": {}}, ["../x"], r"variants.../x: expected letters"),
        ({"x": {"method": "fedx"}}, ["x"], "variants.x: there is no method 'fedx'"),
        ({"x": {"federation": {"rounds": 2}}}, ["x"], "variants.x: federation.rounds is the same for all"),
        ({"x": {"method": "ditto", "ditto": {"epochs": 2}}}, ["x"], "variants.x: ditto.epochs is the same for all"),
        ({"x": {"data": {"max_records": 2}}}, ["x"], "variants.x: data is the same for all"),
        ({"x": {"warmup": {"rounds": 9}}}, ["x"], "leave nothing of a budget of 9 rounds"),
        ({"x": {"warmup": {"round": 9}}}, ["x"], "x: unknown key 'warmup.round'"),
        ({"x": 3}, ["x"], "not a table of tables"),
    ],
)
def test_names_of_nothing_are_refused(variants: dict[str, Any], names: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        entrants({**VALUES, "variants": variants}, names)


def test_names_are_given_once() -> None:
    for names in ([], ["fedmide", "fedmide"]):
        with pytest.raises(UsageError, match="each once"):
            entrants(VALUES, names)


def test_a_source_is_not_read_where_nothing_hangs_on_it(tmp_path: Path) -> None:
    values = {**VALUES, "data": {"path": str(tmp_path / "nowhere")}}
    assert entrants(values, ["fedmide"])
