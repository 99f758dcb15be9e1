"""One model in memory serves any adapter, and nothing of one client remains for the next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmide.config import Config
from fedmide.config.sections import (
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    RuntimeConfig,
    ScoringConfig,
    TrainingConfig,
)
from fedmide.data.tokens import Example
from fedmide.errors import ModelError
from fedmide.model.interface import Adapter, LocalModel, TrainingPlan
from fedmide.runs import resident as resident_module
from fedmide.runs.resident import Kept, Resident, open_model

pytestmark = pytest.mark.usefixtures("one_thread")

MakeExamples = Callable[..., tuple[Example, ...]]
CONFIG = Config(
    model=ModelConfig(name="tiny-random", dtype="float32", device="cpu"),
    lora=LoraConfig(dropout=0.2),
    scoring=ScoringConfig(tokens_per_batch=100),
    generation=GenerationConfig(batch_size=3),
    runtime=RuntimeConfig(threads=1),
)
PLAN = TrainingPlan(TrainingConfig(epochs=2, batch_size=4, learning_rate=1e-2), 0, 1, "a")


@pytest.fixture(scope="module")
def resident(tiny_folder: Path) -> Resident:
    return open_model(CONFIG, tiny_folder)


def noisy(resident: Resident, seed: int) -> Adapter:
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in resident.model.shapes.items()}


def same(one: Adapter, two: Adapter) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_clients_take_turns_and_leave_no_trace(resident: Resident, random_examples: MakeExamples) -> None:
    model: LocalModel = resident
    examples, others = random_examples(10), random_examples(10, seed=1)
    one, two = noisy(resident, 1), noisy(resident, 2)

    def all_of(adapter: Adapter, which: Any) -> Any:
        epochs = list(model.train(adapter, which, PLAN))
        return (
            model.nll(adapter, which, "all"),
            [(epoch.loss, epoch.steps) for epoch in epochs],
            epochs[-1].adapter,
            resident.generate(adapter, which, 5),
        )

    alone = all_of(one, examples)
    all_of(two, others)
    again = all_of(one, examples)
    assert alone[:2] == again[:2]
    assert alone[3] == again[3]
    assert same(alone[2], again[2])


def test_training_starts_from_its_adapter_whenever_it_is_begun(
    resident: Resident, random_examples: MakeExamples
) -> None:
    examples, adapter = random_examples(10), noisy(resident, 1)
    at_once = list(resident.train(adapter, examples, PLAN))
    waiting = resident.train(adapter, examples, PLAN)
    resident.nll(noisy(resident, 2), examples, "all")  # before the first state is asked for
    states = []
    for epoch in waiting:
        states.append(epoch)
        resident.nll(noisy(resident, 3), examples, "response")
    assert all(same(one.adapter, two.adapter) for one, two in zip(at_once, states, strict=True))
    assert [epoch.loss for epoch in at_once] == [epoch.loss for epoch in states]


def test_given_adapters_are_left_alone(resident: Resident, random_examples: MakeExamples) -> None:
    adapter = noisy(resident, 1)
    before = {name: array.copy() for name, array in adapter.items()}
    list(resident.train(adapter, random_examples(6), PLAN))
    assert same(adapter, before)


def test_fresh_adapters_follow_the_seed(resident: Resident) -> None:
    assert same(resident.fresh(1), resident.fresh(1))
    assert not same(resident.fresh(1), resident.fresh(2))


def test_work_is_counted_without_padding(tiny_folder: Path, random_examples: MakeExamples) -> None:
    resident, examples = open_model(CONFIG, tiny_folder), random_examples(9)
    heard: dict[str, int] = {}
    resident.on_count = heard.__setitem__
    tokens = sum(len(example.ids) for example in examples)
    resident.nll(resident.fresh(0), examples, "response")
    list(resident.train(resident.fresh(0), examples, PLAN))
    assert resident.work == {"tokens scored": tokens, "tokens trained": 2 * tokens}
    assert heard == resident.work


def test_adapter_of_another_shape_is_refused(resident: Resident, random_examples: MakeExamples) -> None:
    wrong = {name: array[:1] for name, array in resident.fresh(0).items()}
    for act in (
        lambda: resident.nll(wrong, random_examples(1), "all"),
        lambda: list(resident.train(wrong, random_examples(1), PLAN)),
        lambda: resident.generate(wrong, random_examples(1), 2),
    ):
        with pytest.raises(ModelError, match="adapter: "):
            act()


def test_threads_are_as_configured(tiny_folder: Path) -> None:
    threads = torch.get_num_threads()
    try:
        open_model(CONFIG.model_copy(update={"runtime": RuntimeConfig(threads=2)}), tiny_folder)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_threads_that_are_not_configured_are_measured_when_a_model_is_opened(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, told = torch.get_num_threads(), list[str]()
    monkeypatch.setattr(resident_module, "free_threads", lambda tell: tell("measured") or 3)
    try:
        open_model(CONFIG.model_copy(update={"runtime": RuntimeConfig(threads=0)}), tiny_folder, tell=told.append)
        assert torch.get_num_threads() == 3 and told == ["measured"]
        open_model(CONFIG, tiny_folder, 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_cached_model_begins_every_run_alike(tiny_folder: Path) -> None:
    """If memory ran out in one run, the next starts with its configured batches again, and reports its own shortage."""
    config, said = Config(runtime=RuntimeConfig(threads=1)), {"first": list[str](), "second": list[str]()}
    kept, taken = Kept(), list[int]()

    def passes(most: int) -> None:
        taken.append(most)
        if most > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for number, (name, heard) in enumerate(said.items()):
        resident = kept(config, tiny_folder, tell=heard.append)
        resident.model.scoring_budget.within(128, 10, passes)
        resident.model.scoring_budget.within(128, 10, passes)
        assert [each.split(":")[0] for each in heard] == ["memory has no room for scoring.tokens_per_batch = 128"], name
        assert taken == [128, 64, 64] * (number + 1)
    assert resident.model is kept.model
