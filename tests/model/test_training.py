"""The training loop equals a plain one, repeats bit for bit, and does not change the base model."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from fedmide.config.sections import LoraConfig, ModelConfig, PromptConfig, TrainingConfig
from fedmide.data.records import Record
from fedmide.data.tokens import Example, encode_all, encoder
from fedmide.model import adapters, scoring, training
from fedmide.model import lora as model
from fedmide.model.interface import Adapter, TrainingPlan, total
from fedmide.model.lora import LoraModel
from fedmide.model.pretrained.locate import locate

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = ModelConfig(dtype="float32", device="cpu")
MakeExamples = Callable[..., tuple[Example, ...]]


def plan(seed: int = 0, round_number: int = 3, client: str = "a", **settings: Any) -> TrainingPlan:
    return TrainingPlan(
        TrainingConfig(**{"batch_size": 4, "learning_rate": 2e-4, **settings}), seed, round_number, client
    )


@pytest.fixture(scope="module")
def exact(tiny_folder: Path, one_thread: None) -> LoraModel:
    """The tiny model without dropout."""
    return model.load(tiny_folder, FLOAT32, LoraConfig(dropout=0.0))


@pytest.fixture(scope="module")
def dropping(tiny_folder: Path, one_thread: None) -> LoraModel:
    """The tiny model with dropout."""
    return model.load(tiny_folder, FLOAT32, LoraConfig(dropout=0.3))


def start(lora: LoraModel) -> Adapter:
    return adapters.fresh(lora.shapes, seed=5)


def trained(lora: LoraModel, examples: Sequence[Example], how: TrainingPlan) -> Adapter:
    lora.put(start(lora))
    *_, last = training.train(lora, examples, how)
    return last.adapter


def distance(one: Adapter, two: Adapter) -> float:
    assert one.keys() == two.keys()
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)


@contextmanager
def watched(lora: LoraModel) -> Iterator[list[tuple[float, float]]]:
    """The learning rate and the norm of the gradient at each optimizer step."""
    steps: list[tuple[float, float]] = []

    def look(optimizer: torch.optim.Optimizer, _arguments: Any, _keywords: Any) -> None:
        squares = [float(each.grad.double().square().sum()) for each in lora.parameters().values()]
        steps.append((optimizer.param_groups[0]["lr"], sum(squares) ** 0.5))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield steps
    finally:
        handle.remove()


# --- the same as plain fine-tuning -----------------------------------------------------------------------------


def plain_fine_tuning(
    folder: Path, targets: list[str], begin: Adapter, examples: Sequence[Example], how: TrainingPlan
) -> Adapter:
    """One client's local training, in the usual way with transformers and PEFT: whole batches, masked."""
    settings = how.settings
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of PEFT itself
        network = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(network, {name: torch.tensor(array) for name, array in begin.items()})
    network.train()
    weights = [each for each in network.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    order = np.random.default_rng(how.stream_seed)
    chunks: list[Any] = []
    for _ in range(settings.epochs):
        shuffled = order.permutation(len(examples))
        chunks += [
            shuffled[first : first + settings.batch_size] for first in range(0, len(examples), settings.batch_size)
        ]
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=len(chunks))
    for chunk in chunks:
        batch = [examples[row] for row in chunk]
        width = max(len(each.ids) for each in batch)
        ids = torch.full((len(batch), width), 256)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, each in enumerate(batch):
            length, first = len(each.ids), each.prompt_length if settings.positions == "response" else 0
            ids[row, :length], mask[row, :length] = torch.from_numpy(each.ids), 1
            labels[row, first:length] = ids[row, first:length]
        network(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: tensor.numpy() for name, tensor in peft.get_peft_model_state_dict(network).items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"positions": "response", "epochs": 2, "tokens_per_batch": 64},
        {"weight_decay": 0.1, "max_grad_norm": 0.05, "batch_size": 3},
    ],
)
def test_equals_plain_fine_tuning(
    tiny_folder: Path, exact: LoraModel, random_examples: MakeExamples, settings: dict[str, Any]
) -> None:
    examples, how = random_examples(14), plan(**settings)
    ours = trained(exact, examples, how)
    theirs = plain_fine_tuning(tiny_folder, ["q_proj", "v_proj"], start(exact), examples, how)
    assert distance(ours, theirs) < 1e-6  # AdamW enlarges rounding differences of tiny gradients
    assert distance(ours, start(exact)) > 4e-4


def test_equals_plain_fine_tuning_in_other_shapes(shape_folder: Path, random_examples: MakeExamples) -> None:
    targets = {"gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}.get(shape_folder.name, ["q_proj", "v_proj"])
    lora = model.load(shape_folder, FLOAT32, LoraConfig(dropout=0.0, targets=targets))
    examples, how = random_examples(6), plan(tokens_per_batch=64, batch_size=3)
    ours = trained(lora, examples, how)
    theirs = plain_fine_tuning(shape_folder, targets, start(lora), examples, how)
    assert distance(ours, theirs) < 1e-6
    assert distance(ours, start(lora)) > 2e-4


@pytest.mark.parametrize("positions", ["all", "response"])
def test_accumulation_equals_the_big_batch(exact: LoraModel, random_examples: MakeExamples, positions: str) -> None:
    examples = random_examples(16)
    big = trained(exact, examples, plan(tokens_per_batch=10**6, batch_size=8, positions=positions))
    for budget in (16, 100):
        small = trained(exact, examples, plan(tokens_per_batch=budget, batch_size=8, positions=positions))
        assert distance(small, big) < 1e-6


def test_loss_is_the_nll_before_each_step(exact: LoraModel, random_examples: MakeExamples) -> None:
    examples = random_examples(10)
    exact.put(start(exact))
    before = total(scoring.nll(exact, examples, "response", 1000))
    exact.put(start(exact))
    (epoch,) = training.train(exact, examples, plan(batch_size=10, positions="response", tokens_per_batch=50))
    assert (epoch.steps, epoch.loss.num_tokens) == (1, before.num_tokens)
    assert epoch.loss.sum == pytest.approx(before.sum, rel=1e-6)


def test_the_first_records_come_before_the_others_in_every_pass(
    exact: LoraModel, random_examples: MakeExamples
) -> None:
    examples = random_examples(12)
    first, others, changed = examples[:4], examples[4:8], examples[8:]
    how = replace(plan(batch_size=2, epochs=2), num_first=4)
    short = replace(how, settings=how.settings.model_copy(update={"max_steps": 2}))
    assert distance(trained(exact, first + others, short), trained(exact, first + changed, short)) == 0
    assert distance(trained(exact, first + others, how), trained(exact, first + changed, how)) > 0
    exact.put(start(exact))
    losses = [epoch.loss.num_tokens for epoch in training.train(exact, first + others, how)]
    assert losses == [sum(each.num_predicted("all") for each in first + others)] * 2  # every record


# --- steps, rates and clipping ---------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 12), st.integers(1, 4), st.integers(0, 20))
def test_number_of_steps(count: int, batch_size: int, epochs: int, max_steps: int) -> None:
    settings = TrainingConfig(batch_size=batch_size, epochs=epochs, max_steps=max_steps)
    counted = sum(1 for _ in range(epochs) for _ in range(0, count, batch_size))
    assert training.num_steps(count, settings) == (min(counted, max_steps) if max_steps else counted)


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({}, [3]),
        ({"epochs": 3}, [3, 6, 9]),
        ({"epochs": 3, "max_steps": 5}, [3, 5]),
        ({"epochs": 3, "max_steps": 6}, [3, 6]),
        ({"epochs": 2, "max_steps": 1}, [1]),
        ({"max_steps": 99}, [3]),
    ],
)
def test_rates_fall_from_the_full_rate(
    exact: LoraModel, random_examples: MakeExamples, settings: dict[str, Any], ends: list[int]
) -> None:
    examples = random_examples(10)  # three steps of four, four and two
    for schedule in ("linear", "constant"):
        exact.put(start(exact))
        told: list[int] = []
        with watched(exact) as steps:
            epochs = list(training.train(exact, examples, plan(schedule=schedule, **settings), told.append))
        assert [epoch.steps for epoch in epochs] == ends
        last = ends[-1]
        fallen = [2e-4 * (last - step) / last for step in range(last)]
        assert [rate for rate, _ in steps] == pytest.approx(
            fallen if schedule == "linear" else [2e-4] * last, rel=1e-12
        )
        assert steps[0][0] == 2e-4
        assert len(told) == last
    if not settings.get("max_steps"):
        assert sum(told) == len(ends) * sum(len(each.ids) for each in examples)  # every record once per epoch


def test_gradients_are_clipped(exact: LoraModel, random_examples: MakeExamples) -> None:
    examples = random_examples(10)
    for bound in (1e-3, 1e6):
        exact.put(start(exact))
        with watched(exact) as steps:
            list(training.train(exact, examples, plan(max_grad_norm=bound)))
        norms = [norm for _, norm in steps]
        if bound < 1:
            assert norms == pytest.approx([bound] * 3, rel=1e-2)
        else:
            assert min(norms) > 1e-3


def test_no_records_no_steps(exact: LoraModel) -> None:
    exact.put(start(exact))
    (epoch,) = training.train(exact, [], plan(epochs=3))
    assert (epoch.steps, epoch.loss.num_tokens) == (0, 0)
    assert distance(epoch.adapter, start(exact)) == 0


# --- repeatable, and without side effects ----------------------------------------------------------------------


def test_the_same_plan_gives_the_same_bits_and_another_plan_others(
    dropping: LoraModel, random_examples: MakeExamples
) -> None:
    examples, how = random_examples(12), plan()
    first = trained(dropping, examples, how)
    torch.rand(3)  # other draws do not matter
    assert distance(trained(dropping, examples, how), first) == 0
    for other in (replace(how, seed=1), replace(how, round_number=4), replace(how, client="b")):
        assert distance(trained(dropping, examples, other), first) > 0


def test_dropout_works_in_training(exact: LoraModel, dropping: LoraModel, random_examples: MakeExamples) -> None:
    examples = random_examples(12)
    assert distance(trained(exact, examples, plan()), trained(dropping, examples, plan())) > 1e-5
    dropping.put(start(dropping))
    exact.put(start(exact))
    assert scoring.nll(exact, examples, "all", 100) == scoring.nll(dropping, examples, "all", 100)


def base_hash(lora: LoraModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in lora.network.state_dict().items():
        if "lora_" not in name:
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_base_weights_never_change(dropping: LoraModel, random_examples: MakeExamples) -> None:
    before = base_hash(dropping)
    trained(dropping, random_examples(12), plan(weight_decay=0.5, learning_rate=0.1))
    assert base_hash(dropping) == before
    assert all(each.grad is None for name, each in dropping.network.named_parameters() if "lora_" not in name)


def test_states_do_not_change_after_they_are_given(exact: LoraModel, random_examples: MakeExamples) -> None:
    exact.put(start(exact))
    states, copies = [], []
    for epoch in training.train(exact, random_examples(8), plan(epochs=3)):
        states.append(epoch.adapter)
        copies.append({name: array.copy() for name, array in epoch.adapter.items()})
    assert [distance(state, copy) for state, copy in zip(states, copies, strict=True)] == [0, 0, 0]
    assert distance(states[0], states[1]) > 0
    assert distance(states[1], states[2]) > 0


def test_caller_may_use_the_model_between_epochs(dropping: LoraModel, random_examples: MakeExamples) -> None:
    examples, how = random_examples(12), plan(epochs=3)
    dropping.put(start(dropping))
    undisturbed = [epoch.adapter for epoch in training.train(dropping, examples, how)]
    dropping.put(start(dropping))
    disturbed = []
    for epoch in training.train(dropping, examples, how):
        disturbed.append(epoch.adapter)
        dropping.put({name: np.full(shape, 7, np.float32) for name, shape in dropping.shapes.items()})
        scoring.nll(dropping, examples, "all", 64)
        torch.manual_seed(99)
    assert [distance(one, two) for one, two in zip(disturbed, undisturbed, strict=True)] == [0, 0, 0]


def test_adapter_stays_float32_over_a_bfloat16_base(tiny_folder: Path, random_examples: MakeExamples) -> None:
    rough = model.load(tiny_folder, ModelConfig(dtype="bfloat16", device="cpu"), LoraConfig(dropout=0.0))
    after = trained(rough, random_examples(12), plan(learning_rate=1e-6))
    assert {array.dtype for array in after.values()} == {np.dtype(np.float32)}
    moved = distance(after, start(rough))
    assert 0 < moved < 1e-5  # bfloat16 weights would round such steps to zero


# --- the real model --------------------------------------------------------------------------------------------


# --- float16


@pytest.fixture(scope="module", params=["passes", "modules"])
def halves(request: pytest.FixtureRequest, tiny_folder: Path, one_thread: None) -> LoraModel:
    """The tiny model in float16, by the hand-written passes and by its modules."""
    lora = model.load(tiny_folder, ModelConfig(dtype="float16", device="cpu"), LoraConfig(dropout=0.0))
    return lora if request.param == "passes" else replace(lora, prefixes=None)


def first_gradient(lora: LoraModel, examples: tuple[Example, ...]) -> np.ndarray:
    """The gradient of the first step. A learning rate of almost zero keeps it unchanged in later steps."""
    draw = np.random.default_rng(1)
    shapes = sorted(lora.shapes.items())
    lora.put({name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes})
    how = plan(batch_size=100, max_grad_norm=1e6, learning_rate=1e-30)
    list(training.train(lora, examples, how))
    return np.concatenate([lora.parameters()[name].grad.numpy().reshape(-1) for name, _ in shapes])  # type: ignore[union-attr]


def test_gradients_too_small_for_float16_are_not_lost(
    halves: LoraModel, tiny_folder: Path, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = random_examples(60)
    truth = first_gradient(model.load(tiny_folder, FLOAT32, LoraConfig(dropout=0.0)), examples)

    def error() -> float:
        return float(np.linalg.norm(first_gradient(halves, examples) - truth) / np.linalg.norm(truth))

    assert error() < 0.01
    small, scale = 2.0**-12, training.LOSS_SCALES[0]  # as if the mean were over 4,096 times as many tokens
    monkeypatch.setattr(training, "LOSS_SCALES", (small,))
    lost = error()
    monkeypatch.setattr(training, "LOSS_SCALES", (small * scale,))
    assert error() < 0.01 < 0.1 < lost


def test_a_gradient_too_large_for_float16_is_computed_again(
    halves: LoraModel, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = random_examples(8)
    wanted = first_gradient(halves, examples)
    monkeypatch.setattr(training, "LOSS_SCALES", (2.0**60, *training.LOSS_SCALES))
    found = first_gradient(halves, examples)
    assert np.isfinite(found).all() and found.tobytes() == wanted.tobytes()


def test_other_types_are_not_scaled(
    exact: LoraModel, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOSS_SCALES", ())
    assert np.isfinite(first_gradient(exact, random_examples(8))).all()


@pytest.mark.model
def test_smollm2_learns() -> None:
    lora = model.load(locate("smollm2-135m"), ModelConfig(device="cpu"), LoraConfig())
    records = [
        Record(f"What is the code of finding {number}?", f"It is F{number * 37 % 100:02}.") for number in range(4)
    ]
    examples = encode_all(encoder(lora.tokenizer, ModelConfig(), PromptConfig()), records, "records")
    lora.put(adapters.fresh(lora.shapes, seed=0))
    before = total(scoring.nll(lora, examples, "response", 4096)).mean
    settings = {"learning_rate": 2e-3, "epochs": 3, "batch_size": 2, "positions": "response"}
    *_, last = training.train(lora, examples, plan(**settings))
    assert last.steps == 6
    assert total(scoring.nll(lora, examples, "response", 4096)).mean < 0.8 * before


# --- weights of records


def weighted(lora: LoraModel, examples: Sequence[Example], weights: Sequence[float], **settings: Any) -> Adapter:
    return trained(lora, examples, replace(plan(**settings), weights=tuple(weights)))


def test_a_record_of_weight_two_trains_like_two_records(exact: LoraModel, random_examples: MakeExamples) -> None:
    """One step over all records. In AdamW's first step only the direction of the gradient matters."""
    first, second, third = random_examples(3, 12, 12)
    twice = trained(exact, [first, first, second, third], plan(batch_size=4, max_steps=1))
    assert distance(weighted(exact, [first, second, third], [2, 1, 1], batch_size=4, max_steps=1), twice) < 1e-6
    assert distance(trained(exact, [first, second, third], plan(batch_size=4, max_steps=1)), twice) > 1e-5


def test_only_the_ratios_of_weights_matter_and_equal_ones_do_not(
    exact: LoraModel, random_examples: MakeExamples
) -> None:
    examples = random_examples(6)
    plain = trained(exact, examples, plan())
    assert distance(weighted(exact, examples, [0.3] * 6), plain) == 0
    one, other = ([scale * number for number in range(1, 7)] for scale in (1.0, 8.0))
    assert distance(weighted(exact, examples, one), weighted(exact, examples, other)) == 0
    assert distance(weighted(exact, examples, one), plain) > 1e-5


def test_the_loss_has_no_weights_and_does_not_depend_on_passes(exact: LoraModel, random_examples: MakeExamples) -> None:
    examples = random_examples(8)
    weights = tuple(float(number) for number in range(1, 9))
    ends = []
    for how in (replace(plan(batch_size=8, tokens_per_batch=each), weights=weights) for each in (16, 1024)):
        exact.put(start(exact))
        (last,) = training.train(exact, examples, how)
        ends.append(last)
    exact.put(start(exact))
    (plain,) = training.train(exact, examples, plan(batch_size=8))
    assert ends[0].loss.sum == pytest.approx(plain.loss.sum, rel=1e-5) == pytest.approx(ends[1].loss.sum, rel=1e-5)
    assert distance(ends[0].adapter, ends[1].adapter) < 1e-5
