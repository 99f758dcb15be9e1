"""A record's NLL equals the loss of transformers for that record alone, in any batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedmide.config.sections import LoraConfig, ModelConfig, Positions, PromptConfig
from fedmide.data.records import Record
from fedmide.data.tokens import Example, encode_all, encoder
from fedmide.model import adapters, scoring
from fedmide.model import lora as model
from fedmide.model.interface import Nll
from fedmide.model.lora import LoraModel
from fedmide.model.pretrained.locate import locate

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH: tuple[Positions, ...] = ("all", "response")
MakeExamples = Callable[..., tuple[Example, ...]]


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path, one_thread: None) -> LoraModel:
    """The tiny model under an adapter that changes its output."""
    lora = model.load(tiny_folder, ModelConfig(dtype="float32", device="cpu"), LoraConfig(dropout=0.5))
    draw = np.random.default_rng(0)
    lora.put({name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in lora.shapes.items()})
    return lora


def their_loss(network: Any, example: Example, positions: Positions) -> float:
    """The mean loss of one record by transformers, with label -100 at positions that do not count."""
    ids = torch.from_numpy(example.ids)[None]
    labels = ids.clone()
    if positions == "response":
        labels[:, : example.prompt_length] = -100
    with torch.no_grad():
        return float(network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss)


def means(values: Sequence[Nll]) -> list[float]:
    return [value.mean for value in values]


@pytest.mark.parametrize("positions", BOTH)
def test_equals_transformers_own_loss(
    shape_folder: Path, shape_model: LoraModel, random_examples: MakeExamples, positions: Positions
) -> None:
    examples, lora = random_examples(12), shape_model
    base = AutoModelForCausalLM.from_pretrained(shape_folder).eval()
    lora.put(adapters.fresh(lora.shapes, seed=0))
    found = scoring.nll(lora, examples, positions, tokens_per_batch=200)
    assert means(found) == pytest.approx([their_loss(base, each, positions) for each in examples], rel=1e-5)
    assert np.std(means(found)) > 0.1
    draw = np.random.default_rng(0)
    lora.put({name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in lora.shapes.items()})
    adapted = scoring.nll(lora, examples, positions, tokens_per_batch=200)
    assert means(adapted) == pytest.approx([their_loss(lora.network, each, positions) for each in examples], rel=1e-5)
    assert np.abs(np.subtract(means(adapted), means(found))).max() > 0.1
    by_budget = [scoring.nll(lora, examples, positions, budget) for budget in (1, 10**6)]
    assert all(means(values) == pytest.approx(means(adapted), rel=1e-5) for values in by_budget)


@pytest.mark.parametrize("positions", BOTH)
def test_counts_exactly_the_chosen_positions(
    tiny: LoraModel, random_examples: MakeExamples, positions: Positions
) -> None:
    examples = random_examples(30, longest=20)
    for example, value in zip(examples, scoring.nll(tiny, examples, positions, 100), strict=True):
        with torch.no_grad():
            logits = tiny.network(input_ids=torch.from_numpy(example.ids)[None]).logits[0]
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        first = 1 if positions == "all" else example.prompt_length
        chosen = [-float(log_probabilities[t - 1, example.ids[t]]) for t in range(first, len(example.ids))]
        assert value.num_tokens == len(chosen)
        assert value.sum == pytest.approx(sum(chosen), rel=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 12), budget=st.integers(1, 500), positions=st.sampled_from(BOTH)
)
def test_neighbors_order_and_budget_change_nothing(
    tiny: LoraModel, random_examples: MakeExamples, seed: int, count: int, budget: int, positions: Positions
) -> None:
    examples = random_examples(count, seed=seed)
    alone = [scoring.nll(tiny, [example], positions, 1)[0] for example in examples]
    order = np.random.default_rng(seed).permutation(count)
    together = scoring.nll(tiny, [examples[row] for row in order], positions, budget)
    for row, value in zip(order, together, strict=True):
        assert value.num_tokens == alone[row].num_tokens
        assert value.sum == pytest.approx(alone[row].sum, rel=1e-5)


@pytest.mark.parametrize("positions", BOTH)
def test_lengths_that_are_not_multiples_of_8(
    tiny: LoraModel, random_examples: MakeExamples, positions: Positions
) -> None:
    """The original pads on the left to a multiple of 8, so it predicts the first token of most records from padding."""
    longest = random_examples(1, shortest=33, longest=33)[0]
    cut = [Example(longest.id, longest.ids[:length], 5) for length in range(6, 34)]
    found = scoring.nll(tiny, cut, positions, 10**4)
    sums = [value.sum for value in found]
    # one more token adds only its own NLL, at multiples of 8 as at other lengths
    whole = scoring.nll(tiny, cut[-1:], positions, 1)[0]
    with torch.no_grad():
        logits = tiny.network(input_ids=torch.from_numpy(longest.ids)[None]).logits[0]
    added = -torch.log_softmax(logits.double(), dim=-1)[torch.arange(32), torch.from_numpy(longest.ids[1:])].numpy()
    assert np.diff(sums) == pytest.approx(added[5:], rel=1e-4)
    assert sums[-1] == pytest.approx(whole.sum, rel=1e-5)


def test_no_examples(tiny: LoraModel) -> None:
    assert scoring.nll(tiny, [], "all", 100) == ()


def test_dropout_is_off_and_nothing_is_left_behind(tiny: LoraModel, random_examples: MakeExamples) -> None:
    examples = random_examples(8)
    tiny.network.train()
    before = tiny.take()
    one, two = (scoring.nll(tiny, examples, "all", 100) for _ in range(2))
    assert one == two
    assert all(np.array_equal(before[name], array) for name, array in tiny.take().items())
    assert not any(parameter.grad.any() for parameter in tiny.parameters().values())
    ids = torch.arange(10)[None]
    assert tiny.network(input_ids=ids).logits.shape == (1, 10, 260)  # all positions again for the next caller


def test_all_positions_pass_again_after_an_error(tiny: LoraModel) -> None:
    with pytest.raises(IndexError):
        tiny.token_nll(torch.tensor([[1, 9999]]), torch.tensor([[True, False]]))
    assert tiny.chosen.rows is None


def test_an_adapter_of_nan_gives_an_nll_of_nan(tiny_folder: Path, random_examples: MakeExamples) -> None:
    lora = model.load(tiny_folder, ModelConfig(dtype="float32", device="cpu"), LoraConfig())
    lora.put({name: np.full(shape, np.nan, np.float32) for name, shape in lora.shapes.items()})
    values = scoring.nll(lora, random_examples(3), "all", 100)
    assert all(np.isnan(value.sum) and value.num_tokens > 0 for value in values)


def test_tokens_are_reported_as_they_are_scored(tiny: LoraModel, random_examples: MakeExamples) -> None:
    examples, told = random_examples(20), []
    scoring.nll(tiny, examples, "response", 64, told.append)
    assert sum(told) == sum(len(example.ids) for example in examples)
    assert len(told) > 1


# --- the real model --------------------------------------------------------------------------------------------

RECORDS = (
    Record("Which organ makes bile?", "The liver."),
    Record("Name 3 signs.", "1. Jaundice\n2. Itching\n3. Dark urine", context="A 54-year-old man has hepatitis A."),
    Record("What is 12 mg/kg for 70 kg?", "840 mg."),
)


@pytest.mark.model
def test_smollm2_equals_transformers_own_loss() -> None:
    folder = locate("smollm2-135m")
    lora = model.load(folder, ModelConfig(dtype="float32", device="cpu"), LoraConfig())
    rough = model.load(folder, ModelConfig(dtype="bfloat16", device="cpu"), LoraConfig())
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert not isinstance(base, PeftModel)
    examples = encode_all(encoder(lora.tokenizer, ModelConfig(), PromptConfig()), RECORDS, "records")
    for each in (lora, rough):
        each.put(adapters.fresh(lora.shapes, 0))
    for positions in BOTH:
        found = scoring.nll(lora, examples, positions, 4096)
        assert means(found) == pytest.approx([their_loss(base, each, positions) for each in examples], rel=1e-5)
        assert means(scoring.nll(rough, examples, positions, 4096)) == pytest.approx(means(found), rel=0.02)
