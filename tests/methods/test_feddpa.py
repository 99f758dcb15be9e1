"""FedDPA: the common adapter is fedavg's, the local one trains next to it, and each record weights the two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmide.federation.messages import Metric
from fedmide.methods.feddpa import own_share
from fedmide.model import adapters
from fedmide.model.adapters import COMMON, MOST, OWN, REFERENCES, stacked, under, unstacked
from fedmide.model.interface import Adapter, Terms, TrainingPlan
from fedmide.runs.resident import likeness

Distance = Callable[[Adapter, Adapter], float]
Product = Callable[[Adapter], dict[str, Any]]
BOTH = ["feddpa-t", "feddpa-f"]


def random_adapter(like: Adapter, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, 0.1, array.shape).astype(np.float32) for name, array in like.items()}


@given(st.floats(0.1, 0.9), st.floats(0.1, 2.0))
def test_a_stack_is_the_weighted_sum(product: Product, one: float, two: float) -> None:
    like = {"q.lora_A.weight": np.zeros((2, 5), np.float32), "q.lora_B.weight": np.zeros((3, 2), np.float32)}
    own, other = random_adapter(like, 1), random_adapter(like, 2)
    stack = stacked(own, other, one, two)
    assert stack["q.lora_A.weight"].shape == (4, 5)
    assert np.allclose(product(stack)["q"], one * product(own)["q"] + two * product(other)["q"], atol=1e-6)
    for found, expected in zip(unstacked(stack, own, one, two), (own, other), strict=True):
        assert all(np.allclose(found[name], expected[name], rtol=1e-5) for name in own)


@pytest.mark.parametrize("method", BOTH)
def test_the_common_adapter_is_fedavgs(run_federation: Any, distance: Distance, method: str) -> None:
    done, plain = run_federation(method), run_federation("fedavg")
    assert distance(done.adapter, plain.adapter) < 1e-5
    for name in "abc":
        assert distance(under(COMMON, done.own(name)), done.adapter) == 0
        assert distance(under(OWN, done.own(name)), done.adapter) > 1e-3
    for mine, theirs in zip(done.deliveries[:6], plain.deliveries[:6], strict=True):
        assert (mine.bytes_down, len(adapters.encode(mine.reply.adapter))) == (
            theirs.bytes_down,
            len(adapters.encode(theirs.reply.adapter)),
        )


def test_the_first_round_trains_no_local_adapter_and_later_ones_do(run_federation: Any, distance: Distance) -> None:
    done = run_federation("feddpa-t")
    steps = [[d.reply.metrics["steps"].sum for d in done.deliveries if d.reply.round == number] for number in (0, 1)]
    assert steps == [[2, 1, 2], [4, 2, 4]]
    first, second = done.sites["a"].method_state
    assert distance(first.arrays, done.replies(0)["a"]) == 0
    assert distance(first.arrays, second.arrays) > 1e-3


def test_the_local_adapter_trains_as_it_is_written(
    run_federation: Any, trained_by_hand: Callable[..., None], distance: Distance
) -> None:
    """Against torch, one client: L begins as G of round 0, then trains from its last state with the received G."""
    knobs = ("training.batch_size=8", "training.epochs=3", "federation.rounds=3", "feddpa.references=7")
    done = run_federation("feddpa-t", *knobs, "feddpa.weight=0.3", sizes=(7,))
    site, names = done.sites["a"], adapters.layers(done.adapter)
    common = {name: torch.from_numpy(array.copy()) for name, array in done.states[0].adapter.items()}

    def output(adapter: dict[str, torch.Tensor], layer: str, x: torch.Tensor) -> torch.Tensor:
        return 2 * (x @ adapter[f"{layer}.lora_A.weight"].T @ adapter[f"{layer}.lora_B.weight"].T)  # alpha / r is 2

    def copied(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in adapter.items()}

    def train_common() -> dict[str, torch.Tensor]:
        after = copied(common)
        trained_by_hand(list(after.values()), lambda layer, x: output(after, layer, x), names, site)
        return {name: tensor.detach() for name, tensor in after.items()}

    common = train_common()
    own = copied(common)
    for _ in range(2):
        received = common
        trained_by_hand(
            list(own.values()),
            lambda layer, x, other=received: 0.3 * output(own, layer, x) + 0.7 * output(other, layer, x),
            names,
            site,
        )
        common = train_common()
    expected = {name: tensor.detach().numpy() for name, tensor in own.items()}
    assert distance(done.adapter, {name: tensor.numpy() for name, tensor in common.items()}) < 1e-4
    assert distance(site.method_state[-1].arrays, expected) < 1e-4
    assert distance(expected, done.adapter) > 1e-3
    kept = done.own("a")
    assert distance(under(OWN, kept), site.method_state[-1].arrays) < 1e-6
    states = done.resident.states(under(OWN, kept), list(site.training.values()))
    assert np.allclose(kept[REFERENCES], states, atol=1e-5)
    under_the_common_one = done.resident.states(done.adapter, list(site.training.values()))
    assert not np.allclose(kept[REFERENCES], under_the_common_one, atol=1e-4)


def test_variant_f_tunes_and_keeps_the_best_epoch(run_federation: Any) -> None:
    done = run_federation("feddpa-f")
    assert [d.reply.metrics["steps"] for d in done.deliveries[-3:]] == [Metric(4), Metric(2), Metric(4)]
    assert all("validation_loss" in d.reply.metrics for d in done.deliveries[-3:])
    assert done.sites["a"].method_state == ()


def test_only_the_local_half_trains(run_federation: Any, distance: Distance) -> None:
    done = run_federation("feddpa-t")
    common, own = done.adapter, random_adapter(done.adapter, 1)
    examples = list(done.sites["a"].training.values())
    plan = TrainingPlan(done.config.training, 0, 0, "a", Terms(share=own_share(common, 0.3)))
    *_, last = done.resident.train(stacked(own, common, 0.3, 0.7), examples, plan)
    trained, frozen = unstacked(last.adapter, common, 0.3, 0.7)
    assert distance(frozen, common) < 1e-7
    assert all(not np.allclose(trained[name], own[name], atol=1e-4) for name in own)


def test_a_mixture_is_the_one_of_peft_for_two_adapters(
    run_federation: Any, tiny_folder: Path, random_examples: Callable[..., Any]
) -> None:
    """The forward pass, against two PEFT adapters whose outputs are added."""
    import warnings

    import peft
    from transformers import AutoModelForCausalLM

    done = run_federation("feddpa-t")
    own, common = random_adapter(done.adapter, 1), random_adapter(done.adapter, 2)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    blocks = sorted({int(name.split("layers.")[1].split(".")[0]) for name in own})
    how = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], layers_to_transform=blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        network = peft.get_peft_model(base, how)
        network.add_adapter("common", how)
        for adapter, arrays in (("default", own), ("common", common)):
            weights = {
                name.replace("base_model.model.model", "base_model.model.model"): torch.from_numpy(
                    array * np.float32({"default": 0.3, "common": 0.7}[adapter]) if "lora_B" in name else array
                )
                for name, array in arrays.items()
            }
            peft.set_peft_model_state_dict(network, weights, adapter_name=adapter)
    network.base_model.set_adapter(["default", "common"])
    examples = random_examples(4, 6, 20)
    found = done.resident.nll(stacked(own, common, 0.3, 0.7), examples, "all")
    for example, nll in zip(examples, found, strict=True):
        ids = torch.from_numpy(example.ids)[None]
        with torch.no_grad():
            logits = network(input_ids=ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert nll.sum == pytest.approx(float(expected), rel=1e-4)


# --- at inference


def test_the_state_is_transformers_own(run_federation: Any, random_examples: Callable[..., Any]) -> None:
    resident, examples = run_federation("feddpa-t").resident, random_examples(3)
    found = resident.states(resident.fresh(0), examples)
    for state, example in zip(found, examples, strict=True):
        ids = torch.from_numpy(example.ids[: example.prompt_length])[None]
        with torch.no_grad():
            output = resident.model.network.get_base_model()(input_ids=ids, output_hidden_states=True)
        assert np.allclose(state, output.hidden_states[-1][0, -1].numpy(), atol=1e-5)


def test_each_record_weights_the_two_by_its_likeness(run_federation: Any) -> None:
    done = run_federation("feddpa-t")
    resident, kept = done.resident, done.own("a")
    own, common = under(OWN, kept), under(COMMON, kept)
    assert kept[REFERENCES].shape == (5, 64)
    assert kept[MOST] == np.float32(0.5)
    examples = [*done.sites["a"].training.values(), *done.sites["b"].training.values()]
    weights = [0.5 * likeness(state, kept[REFERENCES]) for state in resident.states(own, examples)]
    assert len({round(weight, 4) for weight in weights}) > 5
    assert all(0 <= weight <= 0.5 + 1e-6 for weight in weights)
    found = resident.nll(kept, examples, "response")
    for example, weight, nll in zip(examples, weights, found, strict=True):
        (alone,) = resident.nll(stacked(own, common, weight, 1 - weight), [example], "response")
        assert nll.sum == pytest.approx(alone.sum, rel=1e-5)
        assert nll.num_tokens == alone.num_tokens
    backwards = resident.nll(kept, examples[::-1], "response")[::-1]
    assert [each.sum for each in backwards] == pytest.approx([each.sum for each in found], rel=1e-6)


def test_without_a_weight_it_is_the_common_model(run_federation: Any) -> None:
    done = run_federation("feddpa-t", "feddpa.most=0")
    examples = list(done.sites["a"].training.values())
    found, plain = done.resident.nll(done.own("a"), examples, "all"), done.resident.nll(done.adapter, examples, "all")
    assert [each.sum for each in found] == pytest.approx([each.sum for each in plain], rel=1e-5)


def test_responses_are_decoded_under_each_records_own_mixture(run_federation: Any) -> None:
    done = run_federation("feddpa-t", "generation.batch_size=4")
    kept, examples = done.own("a"), list(done.sites["a"].training.values())
    own, common = under(OWN, kept), under(COMMON, kept)
    for example, text in zip(examples, done.resident.generate(kept, examples, 4), strict=True):
        weight = 0.5 * likeness(done.resident.states(own, [example])[0], kept[REFERENCES])
        assert done.resident.generate(stacked(own, common, weight, 1 - weight), [example], 4) == (text,)


def test_likeness_to_nothing_or_to_the_opposite_is_none() -> None:
    assert likeness(np.ones(3, np.float32), np.zeros((0, 1), np.float32)) == 0
    assert likeness(np.ones(3, np.float32), -np.ones((2, 3), np.float32)) == 0
