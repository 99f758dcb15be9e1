"""FFA-LoRA and FedSA-LoRA: the factor that trains, that travels and that stays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedmide.model.adapters import encode, layers, named
from fedmide.model.interface import Adapter, Terms, TrainingPlan

Distance = Callable[[Adapter, Adapter], float]
A, B = ".lora_A.", ".lora_B."


def test_a_never_changes_and_never_travels(run_federation: Any, distance: Distance) -> None:
    done = run_federation("ffa-lora")
    begin = named(done.states[0].adapter, A)
    for state in done.states:
        assert distance(named(state.adapter, A), begin) == 0
    assert distance(named(done.own("a"), A), begin) == 0
    assert distance(named(done.adapter, B), named(done.states[0].adapter, B)) > 1e-3
    for number in (0, 1):
        for reply in done.replies(number).values():
            assert reply.keys() == named(done.adapter, B).keys()


def test_the_mean_of_ffa_is_exact(run_federation: Any, product: Callable[..., Any]) -> None:
    """sum p_k B_k A is the new B times A, on value layers of 64 in and 32 out."""
    done = run_federation("ffa-lora")
    a = named(done.adapter, A)
    products = {name: product({**a, **reply}) for name, reply in done.replies(1).items()}
    for layer, found in product(done.adapter).items():
        expected = (7 * products["a"][layer] + 4 * products["b"][layer] + 5 * products["c"][layer]) / 16
        assert np.allclose(found, expected, atol=1e-6)
    assert {array.shape for array in product(done.adapter).values()} == {(64, 64), (32, 64)}


def test_b_never_leaves_a_site(run_federation: Any, distance: Distance) -> None:
    done = run_federation("fedsa-lora")
    for delivery in done.deliveries:
        if delivery.reply.adapter is not None:
            assert not named(delivery.reply.adapter, B)
    assert all(not array.any() for array in named(done.adapter, B).values()), "nor does the server have one"
    replies = done.replies(1)
    expected = {name: sum(replies[client][name] for client in "abc") / 3 for name in named(done.adapter, A)}
    assert distance(named(done.adapter, A), expected) < 1e-6
    for name in "abc":
        own = done.own(name)
        assert distance(named(own, A), named(done.adapter, A)) == 0
        assert distance(named(own, B), done.sites[name].method_state[-1].arrays) == 0


def test_with_one_client_fedsa_is_training_alone(run_federation: Any, distance: Distance) -> None:
    alone = run_federation("local", "personalization.epochs=0", sizes=(7,))
    assert distance(alone.own("a"), run_federation("fedsa-lora", sizes=(7,)).own("a")) == 0


def test_with_one_client_ffa_is_training_b_alone(
    run_federation: Any, trained_by_hand: Callable[..., None], distance: Distance
) -> None:
    """Compared with plain torch, in which A is not a parameter."""
    import torch

    done = run_federation("ffa-lora", "training.batch_size=8", "training.epochs=3", sizes=(7,))
    begin = {name: torch.from_numpy(array.copy()) for name, array in done.states[0].adapter.items()}
    b = {name: tensor.requires_grad_() for name, tensor in begin.items() if B in name}

    def change(layer: str, x: torch.Tensor) -> torch.Tensor:
        return 2 * x @ begin[f"{layer}.lora_A.weight"].T @ b[f"{layer}.lora_B.weight"].T  # alpha / r is 2

    for _ in range(2):
        trained_by_hand(list(b.values()), change, layers(done.adapter), done.sites["a"])
    expected = {name: tensor.detach().numpy() for name, tensor in begin.items()}
    assert distance(done.adapter, expected) < 1e-4
    assert distance(done.own("a"), done.adapter) == 0
    both = run_federation("local", "training.batch_size=8", "training.epochs=3", "personalization.epochs=0", sizes=(7,))
    assert distance(named(both.own("a"), B), named(expected, B)) > 1e-3, "where A trains too, B ends elsewhere"


@pytest.mark.parametrize("method", ["ffa-lora", "fedsa-lora"])
def test_one_factor_travels(run_federation: Any, method: str) -> None:
    done, plain = run_federation(method), run_federation("fedavg")
    half = named(plain.adapter, B if method == "ffa-lora" else A)
    saved = len(encode(plain.adapter)) - len(encode(half))
    assert saved > 2000
    for mine, theirs in zip(done.deliveries, plain.deliveries, strict=True):
        assert theirs.bytes_down - mine.bytes_down == saved
        if mine.reply.adapter is not None:
            assert abs(theirs.bytes_up - mine.bytes_up - saved) < 50


# --- shares of values


def test_frozen_values_do_not_change_even_under_weight_decay(run_federation: Any, distance: Distance) -> None:
    done = run_federation("fedavg")
    share = {name: np.full_like(array, B in name) for name, array in done.adapter.items()}
    settings = done.config.training.model_copy(update={"weight_decay": 0.5})
    examples = list(done.sites["a"].training.values())
    *_, last = done.resident.train(done.adapter, examples, TrainingPlan(settings, 0, 0, "a", Terms(share=share)))
    assert distance(named(last.adapter, A), named(done.adapter, A)) == 0
    assert distance(named(last.adapter, B), named(done.adapter, B)) > 1e-3


def test_a_share_is_stepped_as_the_whole_value_is(run_federation: Any, distance: Distance) -> None:
    """The model sees half of B: as training the whole of B under half of the scale."""
    halved, plain = run_federation("fedavg", "lora.alpha=2"), run_federation("fedavg")
    examples = list(plain.sites["a"].training.values())
    start = plain.adapter
    share = {name: np.full_like(array, 0.5 if B in name else 1.0) for name, array in start.items()}
    seen = {name: array * share[name] for name, array in start.items()}
    settings = plain.config.training.model_copy(update={"weight_decay": 0.1})

    def after(resident: Any, begin: Adapter, terms: Terms) -> Adapter:
        *_, last = resident.train(begin, examples, TrainingPlan(settings, 0, 0, "a", terms))
        adapter: Adapter = last.adapter
        return adapter

    expected = after(halved.resident, start, Terms())
    found = {name: array / share[name] for name, array in after(plain.resident, seen, Terms(share=share)).items()}
    assert distance(found, expected) < 1e-5
