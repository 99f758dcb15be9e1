"""Public questions equal a slow loop over plain transformers; figures by hand."""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from fedmide.atomic import to_json
from fedmide.config import Config
from fedmide.config.sections import ModelConfig, RuntimeConfig
from fedmide.data.questions import FORMS, Question, fingerprint
from fedmide.data.tokens import encoder
from fedmide.evaluation.questions import Scored, draw_questions, score_questions, set_figures
from fedmide.model.interface import Adapter
from fedmide.runs.resident import Resident

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Config(model=ModelConfig(name="tiny-random", dtype="float32", device="cpu"), runtime=RuntimeConfig(threads=1))
ORGANS = ("heart", "liver", "lung", "skin", "bile duct", "{A}")
DECISIONS = FORMS["pubmedqa"].choices


def question(number: int) -> Question:
    values = {
        "question": f"Question {number}?",
        "abstract": "It helps. " * number,
        **{letter: ORGANS[(number + shift) % len(ORGANS)] for shift, letter in enumerate("ABCD")},
    }
    form = FORMS["pubmedqa" if number % 2 else "medqa"]
    return Question(form.prompt.format(**values), form.choices, number % len(form.choices))


QUESTIONS = tuple(question(number) for number in range(8))


def slow(network: Any, tokenizer: Any, asked: Question, choice: str, longest: int) -> float:
    """As the harness does it: both encoded together, the last tokens kept, the choice's log-probability."""
    whole = tokenizer(f"{asked.prompt} {choice}")["input_ids"]
    continuation = whole[len(tokenizer(asked.prompt)["input_ids"]) :]
    with torch.no_grad():
        logits = network(torch.tensor([whole[-longest:]])).logits[0].double()
    rows = torch.log_softmax(logits, dim=-1)[-len(continuation) - 1 : -1]
    return -sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))


@pytest.mark.parametrize("longest", [512, 48])
def test_scores_equal_a_slow_loop(merged: Any, resident: Resident, adapter: Adapter, longest: int) -> None:
    encode = encoder(resident.model.tokenizer, CONFIG.model, CONFIG.prompt)
    found = score_questions(resident, adapter, encode, QUESTIONS, longest)
    network, tokenizer = merged, resident.model.tokenizer
    right = []
    for asked, sums in zip(QUESTIONS, found.sums, strict=True):
        expected = {choice: slow(network, tokenizer, asked, choice, longest) for choice in asked.choices}
        gold = asked.choices[asked.answer]
        assert sums[0] == pytest.approx(expected.pop(gold), rel=1e-5)
        assert sums[1:] == pytest.approx(list(expected.values()), rel=1e-5)
        right.append(float(sums[0] == min(sums)))
    assert found.num_truncated == sum(
        len(tokenizer(f"{asked.prompt} {max(asked.choices, key=len)}")["input_ids"]) > longest for asked in QUESTIONS
    )
    assert (found.longest, found.num_truncated > 0) == (longest, longest == 48)
    assert found.questions == fingerprint(QUESTIONS)
    figures = set_figures("pubmedqa", QUESTIONS, {("base", ""): found}, CONFIG)
    assert figures["base"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert figures["base"]["num_truncated"] == found.num_truncated


def test_the_chat_template_changes_no_question(resident: Resident, adapter: Adapter) -> None:
    plain = encoder(resident.model.tokenizer, CONFIG.model, CONFIG.prompt)
    chat = encoder(resident.model.tokenizer, CONFIG.model, CONFIG.prompt.model_copy(update={"template": "chat"}))
    found = [score_questions(resident, adapter, encode, QUESTIONS[:2], 512) for encode in (plain, chat)]
    assert found[0] == found[1]


def scored(*rows: tuple[float, ...]) -> Scored:
    return Scored("x", rows, 512, 1)


THREE = tuple(Question(f"{number}?", DECISIONS, number) for number in range(3))


def test_figures_by_hand() -> None:
    # maybe (5 characters) has the lowest NLL a character of the last question, though not the lowest sum
    common = {("base", ""): scored((1, 2, 3), (2, 1, 3), (4, 3, 9)), ("aggregated", ""): scored(*[(1, 1, 1)] * 3)}
    own = {("personalized", "a"): scored(*[(1, 2, 3)] * 3), ("personalized", "b"): scored(*[(3, 2, 1)] * 3)}
    figures = set_figures("pubmedqa", THREE, {**common, **own}, CONFIG)  # type: ignore[dict-item]
    base = figures["base"]
    assert base["accuracy"] == pytest.approx(1 / 3)
    assert base["standard_error"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 3))
    assert base["accuracy_norm"] == pytest.approx(2 / 3)
    assert (base["num_records"], base["num_left_out"], base["num_truncated"]) == (3, 0, 1)
    assert base["low"] <= base["accuracy"] <= base["high"]
    assert figures["aggregated"]["accuracy"] == pytest.approx(1 / 3) == figures["aggregated"]["chance"]
    assert [figures["personalized"][client]["accuracy"] for client in "ab"] == [1.0, 0.0]
    assert figures["over_clients"]["accuracy"]["mean"] == 0.5
    assert figures["over_clients"]["accuracy"]["worst_client"] == "b"
    assert figures["protocol"]["hash"] == FORMS["pubmedqa"].hash


def test_without_own_adapters_there_are_no_figures_over_clients() -> None:
    figures = set_figures("pubmedqa", THREE, {("base", ""): scored(*[(1, 2, 3)] * 3)}, CONFIG)
    assert "over_clients" not in figures and "personalized" not in figures


def test_draws_keep_the_order_and_hang_on_the_seed() -> None:
    assert draw_questions(QUESTIONS, 0, 0) == draw_questions(QUESTIONS, 8, 0) == QUESTIONS
    drawn = draw_questions(QUESTIONS, 4, 0)
    places = [QUESTIONS.index(each) for each in drawn]
    assert len(drawn) == 4 and places == sorted(places)
    assert drawn == draw_questions(QUESTIONS, 4, 0)
    assert len({draw_questions(QUESTIONS, 4, seed) for seed in range(9)}) > 1


def test_json_and_back() -> None:
    found = scored((1.0, math.inf, 2.0))
    assert Scored.from_dict(json.loads(to_json(asdict(found)))) == found
