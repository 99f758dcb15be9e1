"""If memory is full, work continues with half the tokens per pass: the same results, and one message."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmide.config import load
from fedmide.config.sections import LoraConfig, ModelConfig, TrainingConfig
from fedmide.data.batches import Batch
from fedmide.data.tokens import Example
from fedmide.errors import ModelError
from fedmide.model import generation, scoring, training
from fedmide.model import lora as model
from fedmide.model.interface import Adapter, TrainingPlan
from fedmide.model.lora import LoraModel
from fedmide.model.memory import BatchBudget, is_out_of_memory
from fedmide.runs import opening, stages

pytestmark = pytest.mark.usefixtures("one_thread")

MakeExamples = Callable[..., tuple[Example, ...]]
FLOAT32 = ModelConfig(dtype="float32", device="cpu")
TOLD = (
    "memory has no room for {} = {}: using {} from now on; "
    "the results' bytes may differ from those of a run with enough memory"
)

ERRORS: dict[str, Callable[[], BaseException]] = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "4000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "numpy": lambda: np._core._exceptions._ArrayMemoryError((10**9,), np.dtype("float64")),  # type: ignore[attr-defined]
    "blas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "onednn": lambda: RuntimeError("could not create a primitive"),
    "apple": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
}


@pytest.fixture(params=ERRORS)
def error(request: pytest.FixtureRequest) -> Callable[[], BaseException]:
    """A function that makes an error which means that memory is full."""
    return ERRORS[request.param]


@pytest.fixture
def lora(tiny_folder: Path) -> LoraModel:
    loaded = model.load(tiny_folder, FLOAT32, LoraConfig(dropout=0.3))
    loaded.put(start(loaded))
    return loaded


def start(lora: LoraModel) -> Adapter:
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in lora.shapes.items()}


def limited(monkeypatch: pytest.MonkeyPatch, most: int, error: Callable[[], BaseException]) -> list[int]:
    """Makes larger passes fail, after they have added to the gradient; returns the sizes that were tried."""
    tried: list[int] = []

    def within(work: Callable[..., Any]) -> Callable[..., Any]:
        def act(self: LoraModel, batch: Batch, *given: Any) -> Any:
            tried.append(batch.ids.size)
            result = work(self, batch, *given)
            if batch.ids.size > most:
                raise error()
            return result

        return act

    for name in ("nll", "backpropagate"):
        monkeypatch.setattr(LoraModel, name, within(getattr(LoraModel, name)))
    return tried


def listening(lora: LoraModel) -> list[str]:
    told: list[str] = []
    lora.training_budget.tell = lora.scoring_budget.tell = told.append
    return told


def trained(lora: LoraModel, examples: tuple[Example, ...], tokens: int) -> tuple[Adapter, list[float]]:
    lora.put(start(lora))
    how = TrainingConfig(epochs=2, batch_size=8, learning_rate=1e-2, tokens_per_batch=tokens)
    epochs = list(training.train(lora, examples, TrainingPlan(how, 0, 1, "a")))
    return epochs[-1].adapter, [epoch.loss.sum for epoch in epochs]


def test_training_continues_as_if_it_had_a_smaller_budget(
    lora: LoraModel, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    """Bit for bit, with dropout: a failed step leaves nothing behind, not even half a gradient."""
    examples, told = random_examples(20, shortest=20), listening(lora)
    wanted, losses = trained(lora, examples, 100)
    assert told == []
    tried = limited(monkeypatch, 150, error)
    found, their_losses = trained(lora, examples, 400)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    assert their_losses == losses
    assert told == [TOLD.format("training.tokens_per_batch", 400, 100)]
    assert sum(size > 150 for size in tried) == 2, "later steps do not try the failed size again"


def test_scoring_continues_with_the_remaining_records(
    lora: LoraModel, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    examples, told = random_examples(30), listening(lora)
    wanted = scoring.nll(lora, examples, "all", 10**6)
    limited(monkeypatch, 90, error)
    progress: list[int] = []
    found = scoring.nll(lora, examples, "all", 400, progress.append)
    assert [each.sum for each in found] == pytest.approx([each.sum for each in wanted], rel=1e-5)
    assert [each.num_tokens for each in found] == [each.num_tokens for each in wanted]
    assert sum(progress) == sum(len(example.ids) for example in examples), "nothing is counted twice"
    scoring.nll(lora, examples, "all", 400)
    assert told == [TOLD.format("scoring.tokens_per_batch", 400, 50)]


def test_generation_continues_with_fewer_prompts_at_a_time(
    lora: LoraModel, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    examples, told, tried = random_examples(12), list[str](), list[int]()
    lora.generation_budget.tell = told.append
    wanted = generation.generate(lora, examples, 4, 3)
    decode = LoraModel.continuations

    def limited_to_four(self: LoraModel, ids: torch.Tensor, *given: Any) -> torch.Tensor:
        tried.append(len(ids))
        if len(tried) > 2 and len(ids) > 4:  # the first batches are small enough for the free memory
            raise error()
        return decode(self, ids, *given)

    monkeypatch.setattr(LoraModel, "continuations", limited_to_four)
    progress: list[int] = []
    assert generation.generate(lora, examples, 4, 5, progress.append) == wanted
    assert tried == [5, 5, 2] and sum(progress) == 12
    assert generation.generate(lora, examples, 4, 8) == wanted
    assert tried[3:] == [8, 4, 4, 4]
    assert told == [TOLD.format("generation.batch_size", 8, 4)]


def test_one_record_that_is_too_large_alone_is_a_plain_error(
    lora: LoraModel, random_examples: MakeExamples, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    examples, told = random_examples(10, longest=40), listening(lora)
    limited(monkeypatch, 20, error)
    for act in (lambda: scoring.nll(lora, examples, "all", 400), lambda: trained(lora, examples, 400)):
        with pytest.raises(ModelError, match=r"^memory has no room for one record alone: .*Lower model\.cutoff"):
            act()
    assert told == []


@pytest.mark.parametrize("other", [RuntimeError("shapes do not match"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_pass_unchanged(other: BaseException) -> None:
    assert not is_out_of_memory(other)

    def act(tokens: int) -> None:
        raise other

    with pytest.raises(type(other)):
        BatchBudget("x").within(100, 1, act)


def test_a_budget_shrinks_for_good_and_uses_less_if_less_is_asked_for() -> None:
    budget, tried, told = BatchBudget("knob"), [], list[str]()
    budget.tell = told.append

    def act(tokens: int) -> int:
        tried.append(tokens)
        if tokens > 300:
            raise MemoryError
        return tokens

    assert [budget.within(wanted, 10, act) for wanted in (1000, 1000, 40, 280, 1000)] == [250, 250, 40, 250, 250]
    assert tried == [1000, 500, 250, 250, 40, 250, 250]
    assert told == [TOLD.format("knob", 1000, 250)]


LITTLE = """
import resource, sys
from pathlib import Path

import numpy as np

from fedmide.config.sections import LoraConfig, ModelConfig
from fedmide.data.records import RecordId
from fedmide.data.tokens import Example
from fedmide.model import scoring
from fedmide.model.lora import load

lora = load(Path(sys.argv[1]), ModelConfig(dtype="float32", device="cpu"), LoraConfig())
draw = np.random.default_rng(0)

examples = [Example(RecordId(str(number)), draw.integers(0, 256, 200).astype(np.int64), 1) for number in range(400)]
few = scoring.nll(lora, examples[:3], "all", 200)

lora.scoring_budget.reset(print)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 24 * 10**6,) * 2)  # 80,000 tokens need ten times that
found = scoring.nll(lora, examples, "all", 80_000)
assert all(abs(one.sum - two.sum) < 1e-5 * two.sum for one, two in zip(found, few))
"""
"""Scores in another process, because this one has freed memory that it can use again."""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of a process from Linux")
def test_memory_that_is_really_full(tiny_folder: Path) -> None:
    command = [sys.executable, "-c", LITTLE, str(tiny_folder)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (told,) = done.stdout.splitlines()
    assert told.startswith("memory has no room for scoring.tokens_per_batch = 80000: using")


def test_a_run_reports_it_and_succeeds(small_input: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    limited(monkeypatch, 150, ERRORS["gpu"])
    with opening.start(load(small_input.config, ["training.batch_size=10"]), tmp_path / "run", told.append) as run:
        stages.train(run)
        stages.personalize(run)
    notices = [line for line in told if line.startswith("memory has no room")]
    assert len(notices) == len(set(notices)) == 2
    assert run.folder.read_manifest()["status"] == "personalized"
