"""FedALT: a local adapter, the mean of all others', and routers between them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedmide.data.batches import batches
from fedmide.methods.feddpa import own_share
from fedmide.model.adapters import ROUTER, encode, layers, prefixed, stacked, under, unstacked
from fedmide.model.interface import Adapter, Terms, TrainingPlan
from fedmide.model.routing import routed

Distance = Callable[[Adapter, Adapter], float]


def random_adapter(like: Adapter, seed: int, width: float = 0.1) -> Adapter:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, width, array.shape).astype(np.float32) for name, array in like.items()}


def routers_of(like: Adapter, seed: int, width: float = 0.5) -> Adapter:
    draw = np.random.default_rng(seed)
    shapes = {layer + ROUTER: (2, like[f"{layer}.lora_A.weight"].shape[1]) for layer in layers(like)}
    return {name: draw.normal(0, width, shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_rest_of_the_world_is_the_others_mean(run_federation: Any, distance: Distance) -> None:
    done = run_federation("fedalt", "federation.rounds=3", failing=[(1, "c")])
    replies = {number: done.replies(number) for number in range(3)}
    downs = {(d.reply.client, d.reply.round): d for d in done.deliveries if d.reply}
    assert downs["a", 0].bytes_down < 300, "nobody has answered yet"
    from fedmide.federation import server

    for state, others in (
        (done.states[1], {"b": replies[0]["b"], "c": replies[0]["c"]}),
        (done.states[2], {"b": replies[1]["b"], "c": replies[0]["c"]}),  # c sat out; its latest still counts
        (done.states[3], {"b": replies[2]["b"], "c": replies[2]["c"]}),
    ):
        (task,) = [task for task in server.plan(state, done.config) if task.client == "a"]
        expected = {name: (others["b"][name] + others["c"][name]) / 2 for name in others["b"]}
        assert distance(task.adapter, expected) < 1e-7
        world = unstacked({k: v for k, v in done.own("a").items() if not k.endswith(ROUTER)}, expected)[1]
    assert distance(world, expected) < 1e-7
    mean = {name: sum(replies[2][client][name] for client in "abc") / 3 for name in expected}
    assert distance(done.adapter, mean) < 1e-7


def test_routers_never_leave_and_are_trained(run_federation: Any, distance: Distance) -> None:
    done = run_federation("fedalt")
    for number in (0, 1):
        for reply in done.replies(number).values():
            assert reply.keys() == done.adapter.keys()
    routers = {client: under("router", done.sites[client].method_state[-1].arrays) for client in "abc"}
    assert all(np.abs(array).max() > 1e-4 for each in routers.values() for array in each.values())
    assert distance(routers["a"], routers["b"]) > 1e-4
    for client in "abc":
        assert distance(under("own", done.sites[client].method_state[-1].arrays), done.replies(1)[client]) == 0
        assert distance({k: v for k, v in done.own(client).items() if k.endswith(ROUTER)}, routers[client]) == 0


def test_with_one_client_there_is_no_world(run_federation: Any) -> None:
    done = run_federation("fedalt", sizes=(7,))
    own = done.replies(1)["a"]
    _, world = unstacked({k: v for k, v in done.own("a").items() if not k.endswith(ROUTER)}, own)
    assert not any(array.any() for array in world.values())


def test_with_one_client_it_is_training_the_own_half_and_its_router(
    run_federation: Any, trained_by_hand: Callable[..., None], distance: Distance
) -> None:
    """Against plain torch, in which there is no other half: own(x) counts by the router's first share."""
    done = run_federation("fedalt", "training.batch_size=8", "training.epochs=3", sizes=(7,))
    own = {name: torch.from_numpy(array.copy()) for name, array in done.states[0].adapter.items()}
    routers = {name: torch.zeros(array.shape) for name, array in routers_of(done.adapter, 0).items()}
    trained = [tensor.requires_grad_() for tensor in (*own.values(), *routers.values())]

    def change(layer: str, x: torch.Tensor) -> torch.Tensor:
        share = torch.softmax(x @ routers[layer + ROUTER].T, dim=-1)[..., :1]
        return 2 * share * (x @ own[f"{layer}.lora_A.weight"].T @ own[f"{layer}.lora_B.weight"].T)  # alpha / r is 2

    for _ in range(2):
        trained_by_hand(trained, change, layers(done.adapter), done.sites["a"])
    method_state = done.sites["a"].method_state[-1].arrays
    assert distance(under("own", method_state), {name: tensor.detach().numpy() for name, tensor in own.items()}) < 1e-4
    found = {name: tensor.detach().numpy() for name, tensor in routers.items()}
    assert distance(under("router", method_state), found) < 1e-4
    nothing = {name: np.zeros_like(array) for name, array in done.adapter.items()}
    assert (
        distance(done.own("a"), {**stacked(under("own", method_state), nothing), **under("router", method_state)}) == 0
    )


def test_the_bytes_are_an_adapters_each_way(run_federation: Any) -> None:
    done, plain = run_federation("fedalt"), run_federation("fedavg")
    size = len(encode(plain.adapter))
    for mine in done.deliveries[3:6]:
        assert abs(mine.bytes_down - size) < 300
        assert abs(mine.bytes_up - size) < 500


# --- the router


@pytest.fixture(scope="module")
def given_(run_federation: Any) -> Any:
    """A resident model, two adapters and routers."""
    done = run_federation("fedalt")
    own, world = random_adapter(done.adapter, 1), random_adapter(done.adapter, 2)
    return done, own, world, routers_of(done.adapter, 3)


def test_a_router_at_zero_is_half_of_each(given_: Any) -> None:
    """Against the written-out passes, to which half of each is one adapter."""
    done, own, world, routers = given_
    examples = list(done.sites["a"].training.values())
    zeros = {name: np.zeros_like(array) for name, array in routers.items()}
    found = done.resident.nll({**stacked(own, world), **zeros}, examples, "all")
    expected = done.resident.nll(stacked(own, world, 0.5, 0.5), examples, "all")
    assert [each.sum for each in found] == pytest.approx([each.sum for each in expected], rel=1e-5)


def test_a_router_that_is_sure_takes_one(given_: Any) -> None:
    """A layer's input has a sign that a steep router sees; with all layers' routers steep it is 0 or 1 per token."""
    done, own, world, routers = given_
    examples = list(done.sites["a"].training.values())
    steep = {name: array * 1e4 for name, array in routers.items()}
    turned = {name: array[::-1] for name, array in steep.items()}
    one = done.resident.nll({**stacked(own, world), **steep}, examples, "all")
    two = done.resident.nll({**stacked(world, own), **turned}, examples, "all")
    assert [each.sum for each in one] == pytest.approx([each.sum for each in two], rel=1e-5)
    half = done.resident.nll(stacked(own, world, 0.5, 0.5), examples, "all")
    assert max(abs(x.sum - y.sum) for x, y in zip(one, half, strict=True)) > 1e-2


def test_the_routers_gradient_is_the_losses_slope(given_: Any) -> None:
    done, own, world, routers = given_
    examples = list(done.sites["a"].training.values())[:3]
    model = routed(done.resident.model, list(routers))
    model.put({**stacked(own, world), **routers})
    (batch,) = batches(examples, "all", 4096, 64)
    for parameter in (model.flat.parameter, *model.extra_parameters):
        parameter.grad.zero_()
    model.backpropagate(batch, 1.0, 0)
    name = max(routers, key=lambda each: float(model.routers[each].grad.abs().max()))
    gradient = model.routers[name].grad.clone()
    place = np.unravel_index(int(gradient.abs().argmax()), tuple(gradient.shape))

    def loss(move: float) -> float:
        moved = routers[name].copy()
        moved[place] += move
        found = done.resident.nll({**stacked(own, world), **routers, name: moved}, examples, "all")
        return float(sum(each.sum for each in found))

    slope = (loss(0.1) - loss(-0.1)) / 0.2
    assert float(gradient[place]) == pytest.approx(slope, rel=0.05)
    assert torch.isfinite(model.flat.parameter.grad).all()


def test_the_world_is_frozen_while_own_and_routers_train(given_: Any, distance: Distance) -> None:
    done, own, world, routers = given_
    examples = list(done.sites["a"].training.values())
    settings = done.config.training.model_copy(update={"epochs": 2, "weight_decay": 0.05})
    plan = TrainingPlan(settings, 0, 0, "a", Terms(share=own_share(own, 1.0)))
    start = {**stacked(own, world), **routers}
    whole = [epoch.adapter for epoch in done.resident.train(start, examples, plan)]
    disturbed = []
    for epoch in done.resident.train(start, examples, plan):
        disturbed.append(epoch.adapter)
        done.resident.nll({**stacked(world, own), **routers_of(own, 9)}, examples, "all")
        done.resident.nll(done.resident.fresh(0), examples, "all")
    for one, two in zip(whole, disturbed, strict=True):
        assert distance(one, two) == 0, "scoring between two epochs leaves no trace"
    trained, frozen = unstacked({k: v for k, v in whole[-1].items() if not k.endswith(ROUTER)}, own)
    assert distance(frozen, world) == 0
    assert distance(trained, own) > 1e-3
    assert all(np.abs(whole[-1][name] - routers[name]).max() > 1e-3 for name in routers)


def test_after_it_the_model_works_as_before(given_: Any) -> None:
    done, own, world, routers = given_
    examples = list(done.sites["a"].training.values())
    before = done.resident.nll(own, examples, "all")
    done.resident.nll({**stacked(own, world), **routers}, examples, "all")
    done.resident.generate({**stacked(own, world), **routers}, examples[:2], 3)
    assert done.resident.nll(own, examples, "all") == before
    assert prefixed("x", {}) == {}
