"""Measures of test records equal a slow loop over plain transformers, and survive JSON."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedmide.atomic import to_json
from fedmide.config import Config
from fedmide.config.sections import EvaluationConfig, ModelConfig, PromptConfig, RuntimeConfig
from fedmide.data.prompts import ALPACA, Template, render
from fedmide.data.records import ClientData, Record, client_data
from fedmide.data.tokens import Encoder, encoder
from fedmide.evaluation.choice import choice_accuracy, draw_choices
from fedmide.evaluation.measure import Measured, measure
from fedmide.evaluation.summary import stage_figures
from fedmide.model.interface import Adapter
from fedmide.runs.resident import Resident

pytestmark = pytest.mark.usefixtures("one_thread")

ANSWERS = ("yes", "no", "the liver", "a stone in the bile duct", "no", "rest", "fluids and rest")
CLIENT = client_data(
    "a",
    [Record("never measured", "x")],
    test=[Record(f"Question {number}?", answer, context="on " * number) for number, answer in enumerate(ANSWERS)],
)
CONFIG = Config(
    seed=4,
    model=ModelConfig(name="tiny-random", dtype="float32", device="cpu"),
    runtime=RuntimeConfig(threads=1),
)


def measured(resident: Resident, adapter: Adapter, client: ClientData = CLIENT, config: Config = CONFIG) -> Measured:
    encode = encoder(resident.model.tokenizer, config.model, config.prompt)
    return measure(resident, adapter, encode, client, config)


def response_nll(network: Any, tokenizer: Any, record: Record, response: str) -> tuple[float, int]:
    """Summed NLL of the response's tokens and the end of sequence, after the record's prompt."""
    prompt = tokenizer(render(ALPACA, record))["input_ids"]
    answer = [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = network(torch.tensor([prompt + answer])).logits[0].double()
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return -sum(float(log_probabilities[len(prompt) - 1 + t, token]) for t, token in enumerate(answer)), len(answer)


def test_choices_equal_a_slow_loop(merged: Any, resident: Resident, adapter: Adapter) -> None:
    found = measured(resident, adapter)
    network, tokenizer = merged, resident.model.tokenizer
    draws = draw_choices(ANSWERS, 4, CONFIG.seed, "a")
    best = []
    for number, (record, drawn) in enumerate(zip(CLIENT.test, draws, strict=True)):
        options = [record.response, *(ANSWERS[other] for other in drawn)]
        assert len(set(options)) == 4
        slow = [response_nll(network, tokenizer, record, option) for option in options]
        assert found.choices[number] == pytest.approx([nll for nll, _ in slow], rel=1e-5)
        assert found.lengths[number] == tuple(map(len, options))
        assert (found.nll_sums[number], found.num_tokens[number]) == (found.choices[number][0], slow[0][1])
        best.append(float(min(slow)[0] == slow[0][0]))
    assert found.record_ids == tuple(record.id for record in CLIENT.test)
    assert found.num_truncated == 0
    assert choice_accuracy(found.choices, found.lengths).correct.tolist() == best
    assert 0 < sum(best) < len(best)


LISTING = client_data(
    "a",
    [Record("never measured", "x")],
    test=[
        Record("Which organ makes bile?\nA. The heart\nB. The liver\nC. A stone", "It is B. The liver."),
        Record("Which organ beats?\nA. The heart\nB. The liver", "Nobody knows."),
        Record("Which organ?", "The liver."),
        Record("Which?\nA. Skin\nB. Ear", "The answer is A.", context="Both are outside."),
    ],
)


def test_listed_options_equal_a_slow_loop(merged: Any, resident: Resident, adapter: Adapter) -> None:
    """The options' texts, without letter and end of sequence, the right one first; unclear ones have none."""
    found = measured(resident, adapter, LISTING)
    network, tokenizer = merged, resident.model.tokenizer
    expected = [["The liver", "The heart", "A stone"], [], ["Skin", "Ear"]]
    assert found.option_lengths == tuple(tuple(map(len, row)) for row in expected)
    for row, record, sums in zip(expected, (LISTING.test[number] for number in (0, 1, 3)), found.options, strict=True):
        prompt = tokenizer(render(ALPACA, record))["input_ids"]
        slow = []
        for text in row:
            ids = torch.tensor([prompt + tokenizer(text)["input_ids"]])
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(
                    network(ids).logits[0, len(prompt) - 1 : -1].double(), ids[0, len(prompt) :], reduction="none"
                )
            slow.append(float(losses.sum()))
        assert sums == pytest.approx(slow, rel=1e-5)
    assert Measured.from_dict(json.loads(to_json(asdict(found)))) == found
    figures = stage_figures(found, CONFIG)["options"]
    assert (figures["num_records"], figures["num_left_out"], figures["num_options"]) == (2, 1, 3)


def test_number_of_choices_is_configured(resident: Resident, adapter: Adapter) -> None:
    config = CONFIG.model_copy(update={"evaluation": EvaluationConfig(choices=3)})
    assert {len(row) for row in measured(resident, adapter, config=config).choices} == {3}


def test_likelihoods_do_not_hang_on_the_choices(resident: Resident, adapter: Adapter) -> None:
    config = CONFIG.model_copy(update={"seed": 5, "evaluation": EvaluationConfig(choices=2)})
    one, two = measured(resident, adapter), measured(resident, adapter, config=config)
    assert two.nll_sums == pytest.approx(one.nll_sums, rel=1e-6)
    assert two.num_tokens == one.num_tokens


def test_one_response_for_all_gives_no_choice(resident: Resident, adapter: Adapter) -> None:
    same = replace(CLIENT, test=tuple(replace(record, response="no") for record in CLIENT.test))
    found = measured(resident, adapter, same)
    assert (found.choices, found.lengths) == ((), ())
    assert len(found.nll_sums) == len(CLIENT.test)


def test_no_test_records(resident: Resident, adapter: Adapter) -> None:
    found = measured(resident, adapter, replace(CLIENT, test=()))
    assert found == Measured((), (), (), (), (), 0)


def test_cut_records_are_counted(resident: Resident, adapter: Adapter) -> None:
    longest = max(len(render(ALPACA, record)) for record in CLIENT.test)
    tight = CONFIG.model_copy(
        update={"model": CONFIG.model.model_copy(update={"cutoff": longest + 4}), "prompt": PromptConfig()}
    )
    found = measured(resident, adapter, config=tight)
    assert 0 < found.num_truncated < len(CLIENT.test)
    assert found.num_tokens == tuple(
        min(len(answer.encode()) + 1, longest + 4 - len(render(ALPACA, record)))
        for record, answer in zip(CLIENT.test, ANSWERS, strict=True)
    )
    assert [bool(row) for row in found.choices] == [
        len(render(ALPACA, record)) + max(len(option.encode()) + 1 for option in row_of(number)) <= longest + 4
        for number, record in enumerate(CLIENT.test)
    ], "where an answer does not fit whole, a choice would not be fair"
    assert 0 < sum(map(bool, found.choices)) < len(CLIENT.test)


def test_a_choice_is_after_one_prompt_and_whole_or_left_out(resident: Resident, adapter: Adapter) -> None:
    """With prompts that are cut, the reference's likelihood stays what it is after its own prompt."""
    rooms = {"with_context": "{context}{instruction}", "without_context": "{instruction}"}
    config = CONFIG.model_copy(
        update={
            "model": CONFIG.model.model_copy(update={"cutoff": 40}),
            "prompt": PromptConfig(overflow="cut"),
        }
    )
    encode = Encoder(resident.model.tokenizer, Template("bare", **rooms), 40, "cut")
    found = measure(resident, adapter, encode, CLIENT, config)
    for number, record in enumerate(CLIENT.test):
        options = [encode.encode_options(record, row_of(number))[n] for n in range(4)]
        whole = [
            len(each.ids) - each.prompt_length == len(text) + 1
            for each, text in zip(options, row_of(number), strict=True)
        ]
        assert bool(found.choices[number]) == all(whole)
        if all(whole):
            expected = [nll.sum for nll in resident.nll(adapter, options, "response")]
            assert found.choices[number] == pytest.approx(expected, rel=1e-5)
    assert 0 < sum(map(bool, found.choices)) < len(CLIENT.test)
    alone = resident.nll(adapter, [encode.encode(record) for record in CLIENT.test], "response")
    assert found.nll_sums == pytest.approx([nll.sum for nll in alone], rel=1e-5)


def row_of(number: int) -> list[str]:
    return [ANSWERS[number], *(ANSWERS[other] for other in draw_choices(ANSWERS, 4, CONFIG.seed, "a")[number])]


def test_json_and_back(resident: Resident, adapter: Adapter) -> None:
    found = measured(resident, adapter)
    assert Measured.from_dict(json.loads(to_json(asdict(found)))) == found


def test_values_that_are_not_finite_come_back() -> None:
    """Likelihoods as NaN, which is counted; choices as infinite, which is the worst."""
    found = Measured(("x", "y"), (math.nan, 2.0), (3, 4), ((math.nan, 1.0), (2.0, math.inf)), ((1, 2), (3, 4)), 1)
    again = Measured.from_dict(json.loads(to_json(asdict(found))))
    assert math.isnan(again.nll_sums[0])
    assert again.choices == ((math.inf, 1.0), (2.0, math.inf))
    assert replace(again, nll_sums=(0.0, 2.0), choices=()) == replace(found, nll_sums=(0.0, 2.0), choices=())


def test_adapter_that_is_not_a_number_is_measured(resident: Resident, adapter: Adapter) -> None:
    found = measured(resident, {name: np.full_like(array, np.nan) for name, array in adapter.items()})
    assert all(math.isnan(value) for value in found.nll_sums)
    assert sum(found.num_tokens) == sum(len(answer.encode()) + 1 for answer in ANSWERS)
