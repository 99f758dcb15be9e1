"""Ditto: the common adapter equals fedavg's, and a personal one is pulled to it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedmide.federation.messages import Metric
from fedmide.model.interface import Adapter

Distance = Callable[[Adapter, Adapter], float]


def test_the_common_part_is_fedavg(run_federation: Any, distance: Distance) -> None:
    ditto, fedavg = run_federation("ditto"), run_federation("fedavg")
    assert distance(ditto.adapter, fedavg.adapter) == 0
    assert [each.bytes_up for each in ditto.deliveries[-3:]] == [each.bytes_up for each in fedavg.deliveries[-3:]]


def test_a_client_ends_with_its_personal_adapter(run_federation: Any, distance: Distance) -> None:
    done = run_federation("ditto")
    for name in "abc":
        assert distance(done.own(name), done.sites[name].method_state[-1].arrays) == 0
        assert all(distance(done.own(name), reply) > 1e-4 for reply in done.replies(1).values()), "and keeps it"


def test_without_a_pull_the_personal_adapter_is_training_alone(run_federation: Any, distance: Distance) -> None:
    """It trains from its last state, independent of the common one."""
    whole = ("training.batch_size=8", "federation.rounds=3")
    done = run_federation("ditto", "ditto.lam=0", *whole)
    alone = run_federation("local", "personalization.epochs=0", *whole)
    for name in "abc":
        assert distance(done.own(name), alone.own(name)) < 1e-5
        assert distance(done.own(name), done.adapter) > 1e-3


def test_the_pull_holds_it_near_the_common_one(run_federation: Any, distance: Distance) -> None:
    near, far = (run_federation("ditto", f"ditto.lam={lam}") for lam in (1000, 0))

    def apart(done: Any) -> float:
        return float(np.mean([distance(done.own(name), done.states[-2].adapter) for name in "abc"]))

    assert apart(near) < apart(far)


def test_both_trainings_are_counted(run_federation: Any) -> None:
    ditto, fedavg = run_federation("ditto", "ditto.epochs=2"), run_federation("fedavg")
    for mine, theirs in zip(ditto.deliveries[:6], fedavg.deliveries[:6], strict=True):
        for name in ("steps", "trained_tokens"):
            assert mine.reply.metrics[name] == Metric(3 * theirs.reply.metrics[name].sum)
        assert mine.reply.metrics["loss"] == theirs.reply.metrics["loss"]
        assert mine.reply.num_records == theirs.reply.num_records
