"""FLoRA, FedEx-LoRA and FlexLoRA: the exact mean of products, on value layers of 64 in and 32 out."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.config import Config, parse
from fedmide.methods.flexlora import cut, decomposed
from fedmide.methods.flora_fedex import stacked
from fedmide.methods.method import Contribution
from fedmide.model import adapters
from fedmide.model.adapters import encode, named, under
from fedmide.model.interface import Adapter, TrainingPlan
from fedmide.seeds import entropy

Distance = Callable[[Adapter, Adapter], float]
Product = Callable[[Adapter], dict[str, Any]]
SHAPES = {"q": (6, 5), "v": (3, 5)}
"""Rows out and columns in of two layers, neither square."""


def random_adapter(rank: int, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    found = {}
    for layer, (num_out, num_in) in SHAPES.items():
        found[f"{layer}.lora_A.weight"] = draw.normal(size=(rank, num_in)).astype(np.float32)
        found[f"{layer}.lora_B.weight"] = draw.normal(size=(num_out, rank)).astype(np.float32)
    return found


answers = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 99), st.integers(1, 500)), min_size=1, max_size=4).map(
    lambda rows: [Contribution(f"{seed}", random_adapter(rank, seed), n) for rank, seed, n in rows]
)


def mean_of_products(given_: list[Contribution], product: Product) -> dict[str, Any]:
    total = sum(answer.num_records for answer in given_)
    products = [(product(answer.arrays), answer.num_records / total) for answer in given_]
    return {layer: sum(weight * each[layer] for each, weight in products) for layer in SHAPES}


@given(answers)
def test_a_stack_is_the_mean_of_the_products(product: Product, given_: list[Contribution]) -> None:
    found, expected = product(stacked(given_)), mean_of_products(given_, product)
    for layer, shape in SHAPES.items():
        assert found[layer].shape == shape
        assert np.allclose(found[layer], expected[layer], atol=1e-4)


@given(answers)
def test_at_full_rank_the_decomposition_is_the_mean_of_the_products(
    product: Product, given_: list[Contribution]
) -> None:
    found, expected = product(decomposed(stacked(given_), 5)), mean_of_products(given_, product)
    for layer in SHAPES:
        assert np.allclose(found[layer], expected[layer], atol=1e-4)


@given(answers, st.integers(1, 4))
def test_a_cut_is_the_nearest_of_its_rank(product: Product, given_: list[Contribution], rank: int) -> None:
    """Against the slow way: the singular values of the whole matrix."""
    found, expected = product(cut(decomposed(stacked(given_), 5), rank)), mean_of_products(given_, product)
    for layer in SHAPES:
        u, s, vt = np.linalg.svd(expected[layer], full_matrices=False)
        assert np.linalg.norm(found[layer] - expected[layer]) == pytest.approx(np.linalg.norm(s[rank:]), abs=1e-4)
        gap = 0.0 if rank >= len(s) else s[rank - 1] - s[rank]
        if gap > 0.1:
            assert np.allclose(found[layer], (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-3)


@given(st.integers(1, 3), st.integers(0, 99), st.lists(st.integers(1, 99), min_size=1, max_size=4))
def test_equal_adapters_are_a_fixed_point(product: Product, rank: int, seed: int, weights: list[int]) -> None:
    same = random_adapter(rank, seed)
    alike = [Contribution("a", same, n) for n in weights]
    for combined in (stacked(alike), decomposed(stacked(alike), 5)):
        for layer, value in product(combined).items():
            assert np.allclose(value, product(same)[layer], atol=1e-4)
    residual = product(stacked(alike, minus=same))
    assert all(np.allclose(value, 0, atol=1e-4) for value in residual.values())


# --- in a federation; the scale alpha / r is 2


def weighted(replies: dict[str, Adapter], product: Product) -> dict[str, Any]:
    products = {name: product(reply) for name, reply in replies.items()}
    return {
        layer: (7 * products["a"][layer] + 4 * products["b"][layer] + 5 * products["c"][layer]) / 16
        for layer in products["a"]
    }


def model_of(adapter: Adapter, product: Product) -> dict[str, Any]:
    """The change of each layer's weight by an adapter."""
    changes = {layer: 2 * value for layer, value in product(adapters.without_deltas(adapter)).items()}
    for name, delta in adapters.deltas(adapter).items():
        changes[name.removesuffix(adapters.DELTA)] += delta
    return changes


def test_flora_merges_the_exact_mean_of_every_round(run_federation: Any, product: Product) -> None:
    done = run_federation("flora")
    first, second = (weighted(done.replies(number), product) for number in (0, 1))
    for adapter in (done.adapter, *(done.own(name) for name in "abc")):
        for layer, change in model_of(adapter, product).items():
            assert np.allclose(change, 2 * (first[layer] + second[layer]), atol=1e-6)
    shapes = {array.shape for array in adapters.deltas(done.adapter).values()}
    assert shapes == {(64, 64), (32, 64)}


def test_a_stack_travels_once_to_each_client_also_after_a_failure(run_federation: Any, product: Product) -> None:
    done = run_federation("flora", "federation.rounds=3", failing=[(1, "b")])
    plain = run_federation("flora", "federation.rounds=3")
    stack = len(encode(stacked([Contribution(n, a, 1) for n, a in plain.replies(0).items()])))
    down = {(each.reply.client, each.reply.round): each.bytes_down for each in plain.deliveries}
    assert down["a", 0] < 300, "the fresh adapter follows from the seed"
    assert all(0.9 * stack < down["a", number] < 1.2 * stack for number in (1, 2, 3))
    late = {(each.reply.client, each.reply.round): each.bytes_down for each in done.deliveries if each.reply}
    assert late["b", 2] > 1.4 * late["a", 2], "two stacks, the second one of two clients"
    for name in "abc":
        for layer, change in model_of(done.own(name), product).items():
            assert np.allclose(change, model_of(done.adapter, product)[layer], atol=1e-6)
    kept = {name.split(".")[0] for name in done.states[-1].method_state if name.startswith("stack")}
    assert kept == {"stack-002"}, "what everyone has had is forgotten"


def test_fedex_is_the_mean_of_products_where_fedavg_is_not(run_federation: Any, product: Product) -> None:
    done, fedavg = (run_federation(method, "federation.rounds=1") for method in ("fedex-lora", "fedavg"))
    expected = weighted(done.replies(0), product)
    inexact = {layer: 2 * value for layer, value in product(fedavg.adapter).items()}
    for layer, change in model_of(done.adapter, product).items():
        assert np.allclose(change, 2 * expected[layer], atol=1e-6)
        assert np.abs(inexact[layer] - 2 * expected[layer]).max() > 1e-5
    assert all(
        np.allclose(change, model_of(done.adapter, product)[layer], atol=1e-6)
        for layer, change in model_of(done.own("b"), product).items()
    )


def test_fedex_stays_exact_over_rounds(run_federation: Any, product: Product) -> None:
    """Round 1: the merged residual of round 0 stays, and the new mean of products stands on it."""
    done = run_federation("fedex-lora")
    second = weighted(done.replies(1), product)
    residual = adapters.deltas(done.states[1].adapter)
    for layer, change in model_of(done.adapter, product).items():
        assert np.allclose(change, residual[layer + adapters.DELTA] + 2 * second[layer], atol=1e-6)


def test_with_one_client_fedex_is_training_alone(run_federation: Any, distance: Distance, product: Product) -> None:
    alone = run_federation("local", "personalization.epochs=0", sizes=(7,))
    done = run_federation("fedex-lora", sizes=(7,))
    assert all(np.abs(array).max() < 1e-7 for array in adapters.deltas(done.adapter).values())
    assert distance(adapters.without_deltas(done.own("a")), alone.own("a")) < 1e-5


@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_with_one_client_one_round_is_training_alone(run_federation: Any, product: Product, method: str) -> None:
    """Later rounds train other factors of the same model, and so other ways. FLoRA draws a fresh adapter each round."""
    done = run_federation(method, "federation.rounds=1", sizes=(7,))
    begin = done.resident.fresh(entropy(3, "fresh", 0) if method == "flora" else 3)
    plan = TrainingPlan(done.config.training, 3, 0, "a")
    alone = list(done.resident.train(begin, list(done.sites["a"].training.values()), plan))[-1].adapter
    for layer, change in model_of(done.own("a"), product).items():
        assert np.allclose(change, 2 * product(alone)[layer], atol=1e-6)


# --- different ranks

RANKS = "flexlora.ranks=[4, 1, 2]"


def test_each_client_trains_and_sends_its_own_rank(run_federation: Any, product: Product) -> None:
    done = run_federation("flexlora", RANKS)
    for name, rank in zip("abc", (4, 1, 2), strict=True):
        for replies in (done.replies(0), done.replies(1)):
            assert {len(array) for array in named(replies[name], ".lora_A.").values()} == {rank}
        assert {array.shape[1] for array in named(done.own(name), ".lora_B.").values()} == {rank}
    expected = weighted(done.replies(1), product)
    for layer, change in product(done.adapter).items():
        values = np.linalg.svd(expected[layer], compute_uv=False)
        assert np.linalg.norm(change - expected[layer]) == pytest.approx(np.linalg.norm(values[4:]), abs=1e-5)


def test_ranks_that_no_product_has_train_from_the_next_round_on(run_federation: Any, product: Product) -> None:
    """If the one client of rank 4 is missing, the mean of products has 3 ranks; the fourth must not be all zeros."""
    done = run_federation("flexlora", RANKS, failing=[(0, "a")])
    for layer, change in product(done.replies(1)["a"]).items():
        assert np.linalg.svd(change, compute_uv=False)[3] > 1e-4, layer
    values = product(done.states[1].adapter)
    assert all(np.linalg.svd(value, compute_uv=False)[3] < 1e-7 for value in values.values())


def test_at_full_rank_flexlora_is_exact(run_federation: Any, product: Product) -> None:
    done = run_federation("flexlora", "flexlora.ranks=[32]", "federation.rounds=1")
    expected = weighted(done.replies(0), product)
    for layer, change in product(done.adapter).items():
        if change.shape == (32, 64):
            assert np.allclose(change, expected[layer], atol=1e-6)


def test_a_lower_rank_in_the_same_layers_trains_as_alone(run_federation: Any, distance: Distance) -> None:
    """Rank 2 in a network of rank 4 is rank 2: same scale, and the rest stays zero."""
    wide, narrow = (run_federation("flexlora", f"flexlora.ranks={r}", "federation.rounds=1") for r in ([4, 2, 2], [2]))
    assert distance(wide.replies(0)["b"], narrow.replies(0)["b"]) < 1e-5, "a fresh A is the same row by row"
    begin = cut(wide.states[0].adapter, 2)
    examples = list(wide.sites["b"].training.values())
    plan = TrainingPlan(wide.config.training, 0, 0, "b")
    found = [list(done.resident.train(begin, examples, plan))[-1].adapter for done in (wide, narrow)]
    assert distance(*found) < 1e-5
    assert wide.resident.nll(begin, examples, "all")[0].sum == pytest.approx(
        narrow.resident.nll(begin, examples, "all")[0].sum, abs=1e-4
    )


# --- changes of base weights in the model


@pytest.fixture
def changed(run_federation: Any) -> tuple[Any, Adapter]:
    """A federation, and an adapter of it with factors and changes of base weights."""
    done = run_federation("fedex-lora")
    draw = np.random.default_rng(0)
    adapter = {name: draw.normal(0, 0.1, array.shape).astype(np.float32) for name, array in done.adapter.items()}
    return done, adapter


def test_a_change_is_taken_back_exactly(changed: tuple[Any, Adapter]) -> None:
    done, adapter = changed
    resident, examples = done.resident, list(done.sites["a"].training.values())
    plain = adapters.without_deltas(adapter)

    def weights() -> bytes:
        return b"".join(
            each.detach().numpy().tobytes() for each in resident.model.network.get_base_model().parameters()
        )

    resident.nll(plain, examples, "all")
    before, first = weights(), resident.nll(plain, examples, "all")
    other = resident.nll(adapter, examples, "all")
    assert max(abs(one.sum - two.sum) for one, two in zip(first, other, strict=True)) > 0.1
    assert resident.nll(plain, examples, "all") == first
    assert weights() == before


def test_a_change_is_the_one_of_peft_for_it_as_factors(
    changed: tuple[Any, Adapter], tiny_folder: Path, tmp_path: Path
) -> None:
    """The passes over changed weights against a model that PEFT loads from the folder that a run leaves."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from fedmide.atomic import write_folder
    from fedmide.model.pretrained.hf import OURS, peft_files

    done, adapter = changed
    write_folder(tmp_path / "adapter", peft_files(adapter, done.resident.model.lora))
    again = adapters.read(tmp_path / "adapter" / OURS)
    assert all(np.array_equal(again[name], array) for name, array in adapter.items())
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        network = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    examples = list(done.sites["a"].training.values())
    for example, found in zip(examples, done.resident.nll(adapter, examples, "all"), strict=True):
        ids = torch.from_numpy(example.ids)[None]
        with torch.no_grad():
            logits = network(input_ids=ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        assert found.sum == pytest.approx(float(expected), rel=1e-4)


def test_training_continues_over_changed_weights(changed: tuple[Any, Adapter]) -> None:
    """Between two epochs another adapter is put in, without its changes: the second epoch is not misled."""
    done, adapter = changed
    from fedmide.model.interface import TrainingPlan

    examples = list(done.sites["a"].training.values())
    plan = TrainingPlan(done.config.training.model_copy(update={"epochs": 2}), 0, 0, "a")
    whole = [epoch.adapter for epoch in done.resident.train(adapter, examples, plan)]
    disturbed = []
    for epoch in done.resident.train(adapter, examples, plan):
        disturbed.append(epoch.adapter)
        done.resident.nll(done.resident.fresh(0), examples, "all")
    for one, two in zip(whole, disturbed, strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)
        assert adapters.deltas(one).keys() == adapters.deltas(adapter).keys()


def test_a_change_that_does_not_fit_is_refused(changed: tuple[Any, Adapter]) -> None:
    from fedmide.errors import ModelError

    done, adapter = changed
    name = next(iter(adapters.deltas(adapter)))
    examples = list(done.sites["a"].training.values())
    for wrong, match in (
        ({**adapter, name: adapter[name][:3]}, "has shape"),
        ({**adapter, "no.such.layer.base_delta.weight": adapter[name]}, "has no adapter"),
    ):
        with pytest.raises(ModelError, match=match):
            done.resident.nll(wrong, examples, "all")
    done.resident.nll(done.resident.fresh(0), examples, "all")


def test_ranks_are_dealt_out_in_order() -> None:
    from fedmide.methods.flexlora import highest_rank, rank_of

    config: Config = parse({"method": "flexlora", "flexlora": {"ranks": [8, 2]}})
    assert [rank_of(name, ("a", "b", "c"), config) for name in "abc"] == [8, 2, 8]
    assert (highest_rank(config), highest_rank(parse({"method": "flexlora"}))) == (8, 8)
    assert under("x", {}) == {}
