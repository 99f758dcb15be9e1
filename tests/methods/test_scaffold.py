"""SCAFFOLD: SGD, control variates by hand, twice the traffic."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fedmide.methods.aggregation import weighted_mean
from fedmide.model.adapters import encode, prefixed, shapes, under
from fedmide.model.interface import Adapter, Terms, TrainingPlan, rate_at

Distance = Callable[[Adapter, Adapter], float]


def sgd(done: Any, start: Adapter, client: str, number: int) -> Adapter:
    """A client's local training by plain SGD, with the random streams of a round."""
    settings = done.config.training.model_copy(update={"learning_rate": 0.1})
    plan = TrainingPlan(settings, 3, number, client, Terms(optimizer="sgd"))
    *_, last = done.resident.train(start, list(done.sites[client].training.values()), plan)
    adapter: Adapter = last.adapter
    return adapter


def test_the_first_round_is_fedavg_by_sgd(run_federation: Any, distance: Distance) -> None:
    done = run_federation("scaffold", "federation.rounds=1")
    start = done.states[0].adapter
    expected = weighted_mean([(sgd(done, start, name, 0), n) for name, n in zip("abc", (7, 4, 5), strict=True)])
    assert expected is not None
    assert distance(done.adapter, expected) < 1e-7
    assert distance(done.adapter, start) > 1e-4


def test_with_one_client_it_stays_sgd(run_federation: Any, distance: Distance) -> None:
    """c is c_1 in every round, so nothing is corrected."""
    done = run_federation("scaffold", sizes=(7,))
    start = done.states[0].adapter
    assert distance(done.adapter, sgd(done, sgd(done, start, "a", 0), "a", 1)) < 1e-5


def test_the_variates_are_mean_gradients(run_federation: Any, distance: Distance) -> None:
    """After round 0, c_k is what moved the client, over its rates; after round 1 it is that less the correction."""
    done = run_federation("scaffold")
    steps = {"a": 2, "b": 1, "c": 2}
    settings = done.config.training.model_copy(update={"learning_rate": 0.1})
    c_k: dict[str, Adapter] = {}
    for number in (0, 1):
        start, c = done.states[number].adapter, under("control", done.states[number].method_state)
        for name, reply in done.replies(number).items():
            rates = sum(rate_at(step, steps[name], settings) for step in range(steps[name]))
            moved = {key: (start[key] - array) / rates for key, array in under("adapter", reply).items()}
            before = c_k.get(name, {key: np.zeros_like(array) for key, array in start.items()})
            at_server = c or {key: np.zeros_like(array) for key, array in start.items()}
            c_k[name] = {key: before[key] - at_server[key] + moved[key] for key in moved}
            kept = done.sites[name].method_state[number].arrays
            assert distance(under("after", kept), c_k[name]) < 1e-5
        mean = {key: sum(c_k[name][key] for name in "abc") / 3 for key in start}
        assert distance(under("control", done.states[number + 1].method_state), mean) < 1e-5


def test_clients_that_sit_out_keep_their_variate(run_federation: Any, distance: Distance) -> None:
    """One of three answers: c moves by a third of its change."""
    done = run_federation("scaffold", "federation.rounds=1", failing=[(0, "a"), (0, "b")])
    own = under("after", done.sites["c"].method_state[0].arrays)
    assert (
        distance(under("control", done.states[1].method_state), {key: array / 3 for key, array in own.items()}) < 1e-7
    )
    assert done.sites["a"].method_state == ()


@pytest.mark.parametrize("knobs", [(), ("federation.participation=0.6", "seed=5")], ids=str)
@pytest.mark.parametrize(
    "lost", [[(0, "a")], [(1, "a")], [(0, "a"), (1, "a")], [(0, "a"), (1, "b"), (2, "a")]], ids=str
)
def test_the_server_keeps_the_mean_of_the_variates_though_answers_are_lost(
    run_federation: Any, distance: Distance, lost: list[tuple[int, str]], knobs: Sequence[str]
) -> None:
    """The c_k are summed up from the changes that arrived, and the sites continue from the same ones."""
    done = run_federation("scaffold", "federation.rounds=4", *knobs, lost=lost)
    c_k = {name: {key: np.zeros_like(array) for key, array in done.adapter.items()} for name in "abc"}
    for number in range(4):
        for name, reply in done.replies(number).items():
            c_k[name] = {key: c_k[name][key] + array for key, array in under("control", reply).items()}
        mean = {key: sum(c_k[name][key] for name in "abc") / 3 for key in done.adapter}
        assert distance(under("control", done.states[number + 1].method_state), mean) < 1e-5
    for name in "abc":
        kept = done.sites[name].method_state[-1]
        counted = (kept.round, name) not in lost
        assert distance(under("after" if counted else "before", kept.arrays), c_k[name]) < 1e-5


def test_twice_the_arrays_travel(run_federation: Any) -> None:
    done, plain = run_federation("scaffold"), run_federation("fedavg")
    size = len(encode(plain.adapter))
    for mine, theirs in zip(done.deliveries, plain.deliveries, strict=True):
        assert mine.bytes_down - theirs.bytes_down > 0.9 * size
        if mine.reply.adapter is not None:
            assert mine.bytes_up - theirs.bytes_up > 0.9 * size
            expected = shapes({**prefixed("adapter", done.adapter), **prefixed("control", done.adapter)})
            assert shapes(mine.reply.adapter) == expected


def test_the_server_can_go_less_far(run_federation: Any, distance: Distance) -> None:
    half, whole = (run_federation("scaffold", "federation.rounds=1", f"scaffold.server_rate={r}") for r in (0.5, 1.0))
    start = whole.states[0].adapter
    expected = {name: (array + start[name]) / 2 for name, array in whole.adapter.items()}
    assert distance(half.adapter, expected) < 1e-7


def test_the_push_is_added_after_clipping(run_federation: Any, distance: Distance) -> None:
    """SGD by hand: a clipped gradient of norm 1e-3 plus a push of ones."""
    done = run_federation("fedavg", sizes=(4,))
    start = done.adapter
    settings = done.config.training.model_copy(update={"max_grad_norm": 1e-3, "learning_rate": 1.0})
    push = {name: np.ones_like(array) for name, array in start.items()}
    plan = TrainingPlan(settings, 0, 0, "a", Terms(push=push, optimizer="sgd"))
    *_, last = done.resident.train(start, list(done.sites["a"].training.values()), plan)
    rest = {name: start[name] - 1 - array for name, array in last.adapter.items()}
    norm = sum(float(np.square(array.astype(float)).sum()) for array in rest.values()) ** 0.5
    assert norm == pytest.approx(1e-3, rel=0.05)
