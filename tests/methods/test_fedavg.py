"""FedAvg, its fine-tuning, FedProx and training alone, with a real tiny model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedmide.federation.messages import Metric
from fedmide.model.interface import Adapter, Terms, TrainingPlan

Distance = Callable[[Adapter, Adapter], float]


def test_fedavg_is_the_mean_by_records_of_each_factor(run_federation: Any, distance: Distance) -> None:
    done = run_federation("fedavg", "federation.rounds=1")
    replies = done.replies(0)
    expected = {
        name: (7 * replies["a"][name] + 4 * replies["b"][name] + 5 * replies["c"][name]) / 16 for name in done.adapter
    }
    assert distance(done.adapter, expected) < 1e-7
    assert distance(done.adapter, done.own("a")) == 0, "nobody tunes"


def test_fedavg_equals_fedmide_that_shares_everything_without_a_warm_up(run_federation: Any) -> None:
    fedmide = run_federation("fedmide", "warmup.rounds=0")
    fedavg = run_federation("fedavg-ft")
    for name, array in fedmide.adapter.items():
        assert np.array_equal(array, fedavg.adapter[name])
        assert np.array_equal(fedmide.own("b")[name], fedavg.own("b")[name])


def test_fedavg_ft_tunes_the_common_adapter(run_federation: Any, distance: Distance) -> None:
    plain, tuned = run_federation("fedavg"), run_federation("fedavg-ft")
    assert distance(plain.adapter, tuned.adapter) == 0
    assert distance(tuned.own("a"), tuned.adapter) > 1e-3
    assert distance(tuned.own("a"), tuned.own("b")) > 1e-3
    last = [each.reply.metrics for each in tuned.deliveries[-3:]]
    assert [each["steps"] for each in last] == [Metric(4), Metric(2), Metric(4)]


def test_fedavg_ft_may_tune_the_adapter_that_each_site_sent_last(run_federation: Any, distance: Distance) -> None:
    tuned = run_federation("fedavg-ft", "personalization.start=own")
    sent = tuned.replies(1)
    assert all(distance(tuned.sites[name].method_state[-1].arrays, sent[name]) == 0 for name in "abc")
    untouched = run_federation("fedavg-ft", "personalization.start=own", "personalization.interpolation=[0.0]")
    assert distance(untouched.own("b"), tuned.adapter) == 0, "a beta is between the mean and what was tuned"
    fedmide = run_federation("fedmide", "warmup.rounds=0", "personalization.start=own")
    assert distance(tuned.own("b"), fedmide.own("b")) == 0
    assert distance(tuned.own("b"), run_federation("fedavg-ft").own("b")) > 1e-4


# --- alone


def test_nothing_travels_if_each_trains_alone(run_federation: Any) -> None:
    done = run_federation("local")
    assert [done.replies(number) for number in (0, 1, 2)] == [{}, {}, {}]
    assert all(each.bytes_down < 200 and each.bytes_up < 500 for each in done.deliveries), "frames without an array"
    assert not any(summary.aggregated for summary in done.summaries)
    assert len({done.own(name)["".join(list(done.adapter)[:1])].tobytes() for name in "abc"}) == 3


@pytest.mark.parametrize("method", ["fedavg-ft", "fedmide"])
def test_with_one_client_a_federation_is_training_alone(run_federation: Any, method: str, distance: Distance) -> None:
    overrides = ["warmup.rounds=0"] if method == "fedmide" else []
    alone, together = (run_federation(each, *overrides, sizes=(7,)) for each in ("local", method))
    assert distance(alone.own("a"), together.own("a")) == 0


def test_with_one_client_fedavg_is_training_alone_without_tuning(run_federation: Any, distance: Distance) -> None:
    alone = run_federation("local", "personalization.epochs=0", sizes=(7,))
    assert distance(alone.own("a"), run_federation("fedavg", sizes=(7,)).adapter) == 0


def test_a_client_that_never_answered_ends_with_its_own_tuning(run_federation: Any, distance: Distance) -> None:
    done = run_federation("local", failing=[(0, "b"), (1, "b")])
    assert done.sites["b"].method_state == ()
    assert distance(done.own("b"), done.resident.fresh(3)) > 1e-3


# --- FedProx


def test_fedprox_without_a_pull_is_fedavg(run_federation: Any, distance: Distance) -> None:
    assert distance(run_federation("fedprox", "fedprox.mu=0").adapter, run_federation("fedavg").adapter) == 0


def test_a_pull_keeps_the_clients_near(run_federation: Any, distance: Distance) -> None:
    far, near = (
        run_federation("fedprox", "federation.rounds=1"),
        run_federation("fedprox", "fedprox.mu=1000", "federation.rounds=1"),
    )
    assert distance(near.replies(0)["a"], near.states[0].adapter) < distance(far.replies(0)["a"], far.states[0].adapter)


def test_the_pull_is_mu_times_the_distance_on_the_gradient(run_federation: Any, distance: Distance) -> None:
    """One step of it by hand, from somewhere else than what it is pulled to: torch's AdamW on g + mu (theta - t)."""
    import torch

    done = run_federation("fedavg", sizes=(4,))
    resident, site = done.resident, done.sites["a"]
    examples = list(site.training.values())
    settings = done.config.training.model_copy(update={"max_grad_norm": 1e6})
    start, towards = done.adapter, resident.fresh(1)

    def after(terms: Terms) -> Adapter:
        *_, last = resident.train(start, examples, TrainingPlan(settings, 0, 0, "a", terms))
        adapter: Adapter = last.adapter
        return adapter

    resident.model.put(start)
    resident.model.prepare(training=True)
    resident.model.flat.parameter.grad.zero_()
    from fedmide.data.batches import batches

    num_tokens = sum(each.num_predicted("all") for each in examples)
    for batch in batches(examples, "all", 1024, 64):
        resident.model.flat.gradient.add_(resident.model.backpropagate(batch, 1 / num_tokens, 0)[1])
    parameter = resident.model.flat.parameter.detach().clone().requires_grad_()
    pulled = resident.model.laid_out(towards)
    parameter.grad = resident.model.flat.parameter.grad + 0.5 * (parameter.detach() - pulled)
    torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.0).step()
    found = resident.model.laid_out(after(Terms(0.5, towards)))
    assert torch.allclose(found, parameter.detach(), atol=1e-5)
    assert not torch.allclose(found, resident.model.laid_out(after(Terms())), atol=1e-3)
