"""The entrants of a comparison: methods and variants, each a configuration with the same budget of local steps.

    K   optimizer steps of a client per round, however few of its records train
    U   units of K steps that a client trains, the same for all entrants: warm-up rounds, rounds and tuning passes

An entrant with W warm-up rounds and E tuning passes has U - W - E federated rounds; one with neither has U.
So a warm-up costs federated rounds, and a method without tuning has more of them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fedmide import methods
from fedmide.config import Config, parse
from fedmide.config.config import METHOD_TABLES, VARIANTS
from fedmide.config.knobs import for_method
from fedmide.config.loading import without_variants
from fedmide.config.sections import MethodName
from fedmide.data import load
from fedmide.errors import ConfigError, UsageError
from fedmide.model.training import num_steps

BUDGET = ("federation.rounds", "training.epochs", "training.max_steps", "personalization.max_steps")
"""Settings that make the budget, or that follow from it."""


SECOND_TRAINING_SETTINGS = ("ditto.epochs", "ditto.max_steps", "feddpa.max_steps")
"""Settings that limit a method's second training, which it does in addition to that of the common adapter."""


FIXED_SETTINGS = (*BUDGET, *SECOND_TRAINING_SETTINGS, "seed", "data", "model", "prompt", "evaluation")
"""Settings that a variant can't set: the budget decides them, or the comparison of records needs them equal."""


BASE = "base"
"""The name of the row of the model without an adapter; no entrant can have this name."""


RATES = ("training.learning_rate", "personalization.learning_rate", "scaffold.learning_rate")
"""The learning rates that change in proportion."""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Budget:
    """The training of each client in all: `rounds` (U) times `steps` (K)."""

    rounds: int
    steps: int


@dataclass(frozen=True)
class Entrant:
    """A method or a variant, by its name in the tables. `config` has its part of the budget."""

    name: str
    config: Config
    budget: Budget

    def config_for(self, seed: int, rate: float | None = None) -> Config:
        """The configuration of one run. All seeds have the same records; `rate` sets `training.learning_rate`."""
        values = for_method(self.config.model_dump(), self.config.method)
        values = merged(values, {"seed": seed, "data": {"seed": self.config.data_seed}})
        return parse(values if rate is None else _at_rate(values, rate))


def budget_of(values: Mapping[str, Any]) -> Budget:
    """The budget that a configuration gives FedMIDE: warm-up, rounds and tuning.

    K is `training.max_steps` or, if that is 0, the steps of the largest client for `training.epochs`.
    """
    config = parse(for_method(without_variants(values), "fedmide"))
    rounds = config.warmup.rounds + config.federation.rounds + config.personalization.epochs
    steps = config.training.max_steps or max(
        num_steps(len(client.training), config.training) for client in load(config.data, config.data_seed)
    )
    return Budget(rounds, steps)


def entrants(values: Mapping[str, Any], names: Sequence[str]) -> tuple[Entrant, ...]:
    """The methods, or the variants in the values' own table, with these names; all problems as one `ConfigError`."""
    check_names(values, names)
    budget = budget_of(values)
    return tuple(Entrant(name, within(budget, settings(values, name), name), budget) for name in names)


def check_names(values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses a name that is neither a method's nor a variant's, and a variant with settings that it can't set."""
    problems = list(_problems(values.get(VARIANTS, {}), names))
    if problems:
        raise ConfigError(problems, "See `fedmide methods` and docs/compare.md")


def settings(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of a method, or of a variant in the values' own table, before the budget is applied."""
    base, variant = without_variants(values), values.get(VARIANTS, {}).get(name)
    if variant is None:
        return for_method(base, name)
    return merged(for_method(base, variant.get("method", "fedmide")), variant)


def within(budget: Budget, values: Mapping[str, Any], name: str) -> Config:
    """The configuration with its part of the budget.

    Raises `ConfigError` if warm-up and tuning leave no round, or if a round has fewer steps than adapters to train.
    """
    config = parse(values, name)
    method = methods.of(config)
    tuning = 0 if method.tuning is None else config.personalization.epochs
    rounds = budget.rounds - config.warmup.rounds - tuning
    if rounds < 1:
        raise ConfigError(
            f"{name}: {config.warmup.rounds} warm-up rounds and {tuning} passes of tuning leave nothing of a budget of "
            f"{budget.rounds} rounds",
            "Set a larger federation.rounds",
        )
    steps = budget.steps
    if method.in_one_place:
        steps *= len(load(config.data, config.data_seed))
    changes: dict[str, Any] = {
        "federation": {"rounds": rounds},
        "personalization": {"epochs": tuning * budget.steps, "max_steps": tuning * budget.steps},
    }
    parts = config.warmup.folds if config.warmup.rounds else method.trainings
    if budget.steps < parts:
        raise ConfigError(
            f"{name}: trains {parts} adapters in a round, which can't share {budget.steps} step",
            "Set a larger training.max_steps",
        )
    # A pass has one step or more, so as many passes as steps are enough, whatever the number of records.
    changes["training"] = {"max_steps": steps, "epochs": steps}
    if method.trainings == 2:
        changes["training"]["max_steps"] = steps - steps // 2
        changes |= _second_training(config, steps // 2)
    return parse(merged(for_method(config.model_dump(), config.method), changes), name)


def _second_training(config: Config, steps: int) -> dict[str, Any]:
    """The limit `steps` for the second training of a method, in the method's own table."""
    (table,) = (table for table, users in METHOD_TABLES.items() if config.method in users)
    limits = {"epochs": steps, "max_steps": steps}
    return {table: {knob: value for knob, value in limits.items() if hasattr(getattr(config, table), knob)}}


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the changes, table by table.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    result = dict(values)
    for key, each in changes.items():
        old = result.get(key)
        result[key] = merged(old, each) if isinstance(old, Mapping) and isinstance(each, Mapping) else each
    return result


def _at_rate(values: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """The values with another learning rate. The rates of tuning and of SCAFFOLD change in proportion to it."""
    own = values["training"]["learning_rate"]
    changes: dict[str, Any] = {}
    for name in RATES:
        section, knob = name.split(".")
        if section in values:
            old = values[section][knob]
            changes[section] = {knob: rate if old == own else old * (rate / own)}
    return merged(values, changes)


def _problems(given: Any, names: Sequence[str]) -> list[str]:
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--methods {','.join(names)!r}: expected names, each once", "For example fedmide,fedavg-ft")
    if not isinstance(given, Mapping) or not all(isinstance(each, Mapping) for each in given.values()):
        return [f"'{VARIANTS}' is not a table of tables: expected [{VARIANTS}.NAME]"]
    known = get_args(MethodName)
    problems = [f"{VARIANTS}.{name}: this is the name of a method" for name in given if name in known]
    problems += [f"{VARIANTS}.{name}: this is the name of the base model's row" for name in given if name == BASE]
    problems += [f"{VARIANTS}.{name}: expected letters, digits, . _ + -" for name in given if not _NAME.fullmatch(name)]
    for name, each in given.items():
        if each.get("method", "fedmide") not in known:
            problems.append(f"{VARIANTS}.{name}: there is no method {each['method']!r}")
        problems += [
            f"{VARIANTS}.{name}: {key} is the same for all, or follows from the budget"
            for key in fixed_settings_set_by(each)
        ]
    return problems + [f"{name!r} is not a method and not a variant" for name in names if name not in (*known, *given)]


def fixed_settings_set_by(variant: Mapping[str, Any]) -> list[str]:
    """The settings of a variant that it can't set."""
    return [key for key in FIXED_SETTINGS if contains(variant, key.split("."))]


def contains(values: Any, path: Sequence[str]) -> bool:
    """True if the nested tables have a value at the path."""
    return isinstance(values, Mapping) and path[0] in values and (not path[1:] or contains(values[path[0]], path[1:]))
