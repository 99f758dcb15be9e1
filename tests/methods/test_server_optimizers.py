"""The server's optimizers: two rounds by hand, and their limits at extreme settings."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.config import Config, apply_overrides, parse
from fedmide.methods import METHODS
from fedmide.methods.method import Common, Contribution
from fedmide.model.interface import Adapter

Distance = Callable[[Adapter, Adapter], float]
NAMES = ("fedavgm", "fedadagrad", "fedadam", "fedyogi")


def at(value: float) -> Adapter:
    return {"x.lora_B.weight": np.full((3, 2), value, np.float32)}


def place(common: Common) -> float:
    return float(common.adapter["x.lora_B.weight"][0, 0])


def config(name: str, *overrides: str) -> Config:
    return parse(apply_overrides({"method": name}, [f"{name}.{each}" for each in overrides]))


def rounds(how: Config, steps: Sequence[Sequence[tuple[float, int]]]) -> Common:
    """The state after rounds in which clients come to stand at these places with these weights."""
    common = METHODS[how.method].begin(at(0.0), ("a", "b"), how)
    for step in steps:
        after = METHODS[how.method].combine(common, [Contribution("a", at(value), n) for value, n in step], how)
        assert after is not None
        common = after
    return common


def by_hand(name: str) -> float:
    """Round 0: D = (1 * 4 + 3 * 0) / 4 = 1. Round 1: D = 2 - theta. With beta1 1/2, beta2 1/4, eta 1/10, tau 1/100."""
    theta, m, v = 0.0, 0.0, 1e-4
    for mean in (1.0, 2.0):
        d = mean - theta
        m = 0.5 * m + 0.5 * d
        if name == "fedadagrad":
            v = v + d * d
        elif name == "fedadam":
            v = 0.25 * v + 0.75 * d * d
        else:
            v = v - 0.75 * d * d * (1 if v > d * d else -1)
        theta += 0.1 * m / (v**0.5 + 0.01)
    return theta


@pytest.mark.parametrize("name", NAMES[1:])
def test_two_rounds_by_hand(name: str) -> None:
    decay = [] if name == "fedadagrad" else ["beta2=0.25"]
    how = config(name, "beta1=0.5", "eta=0.1", "tau=0.01", *decay)
    assert place(rounds(how, [[(4.0, 1), (0.0, 3)], [(2.0, 5)]])) == pytest.approx(by_hand(name), rel=1e-5)


def test_the_three_are_three(run_federation: Any) -> None:
    """A misspelt name once made one of them plain averaging."""
    found = {name: run_federation(name).adapter for name in (*NAMES, "fedavg")}
    key = next(name for name in found["fedavg"] if ".lora_B." in name)
    assert len({adapter[key].tobytes() for adapter in found.values()}) == 5


def test_momentum_by_hand() -> None:
    """v: 1, then 0.5 * 1 + (3 - 1) = 2.5; theta: 1, then 3.5."""
    assert place(rounds(config("fedavgm", "beta=0.5"), [[(1.0, 2)], [(3.0, 1)]])) == 3.5


@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(1, 99)), min_size=1, max_size=4))
def test_without_method_state_each_is_a_mean_step(values: list[tuple[float, int]]) -> None:
    mean = sum(value * n for value, n in values) / sum(n for _, n in values)
    assert place(rounds(config("fedavgm", "beta=0"), [values])) == pytest.approx(mean, abs=1e-5)
    flat = ("beta1=0", "tau=1e4")
    for name, eta, extra in (("fedadam", 1e4, ["beta2=0"]), ("fedadagrad", 2e4, [])):
        assert place(rounds(config(name, *flat, f"eta={eta}", *extra), [values])) == pytest.approx(mean, abs=1e-2)


@pytest.mark.parametrize("name", NAMES)
@given(value=st.floats(-5, 5, width=32), weights=st.lists(st.integers(1, 99), min_size=1, max_size=4))
def test_equal_adapters_are_a_fixed_point(name: str, value: float, weights: list[int]) -> None:
    how = config(name)
    common = Common(("a",), 0, at(value))
    after = METHODS[name].combine(common, [Contribution("a", at(value), n) for n in weights], how)
    assert after is not None
    assert place(after) == place(common)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_moves_nothing(name: str) -> None:
    assert METHODS[name].combine(Common(("a",), 0, at(1.0)), [], config(name)) is None


def test_fedadam_as_a_mean_step_is_fedavg(run_federation: Any, distance: Distance) -> None:
    as_mean = [f"fedadam.{each}" for each in ("beta1=0", "beta2=0", "tau=1e5", "eta=1e5")]
    assert distance(run_federation("fedadam", *as_mean).adapter, run_federation("fedavg").adapter) < 1e-5
