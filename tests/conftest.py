"""Fixtures that several test files share."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from fedmide.config import Config, apply_overrides, load, parse
from fedmide.config.sections import Positions
from fedmide.data.records import RecordId
from fedmide.data.tokens import Example
from fedmide.federation.client_state import ClientState
from fedmide.model import adapters
from fedmide.model.interface import Adapter, Epoch, Nll, TrainingPlan, total
from fedmide.model.pretrained.locate import locate
from fedmide.runs import opening, stages
from tests.needs import NEEDS, find_chromium

settings.register_profile("untimed", deadline=None)  # a slow machine is not an error of the code
settings.load_profile("untimed")

SMALL = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "gpt_neox": {},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
"""Architectures, with settings that make a small model show its special features on a few dozen tokens."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: workers take whole files, and a long one at the end leaves the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("flower")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test if something that it needs is missing; fails it where everything must be there."""
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            find, remedy = NEEDS[name]
            if not find():
                stop = pytest.fail if os.environ.get("FEDMIDE_TEST_EVERYTHING") else pytest.skip
                stop(f"this test needs {remedy}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window and without a network."""
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=find_chromium(), args=options)
        yield started
        started.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny random model."""
    return locate("tiny-random", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Torch on one thread: small matrices are slower on several, and the bytes are reproducible."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=SHAPES)
def shape_folder(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Path:
    """A folder with the name of its architecture, a small random model, and the tiny model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**SMALL, **SHAPES[request.param]})
    lora = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=SMALL["hidden_size"] ** -0.5)  # wide enough for likelihoods that differ
    folder = tmp_path_factory.mktemp("shapes") / request.param
    lora.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def shape_model(shape_folder: Path) -> Any:
    """The model in `shape_folder` in float32 with LoRA on all its linear layers; each test puts its own adapter in."""
    from fedmide.config.sections import LoraConfig, ModelConfig
    from fedmide.model import lora

    config = ModelConfig(name="small", dtype="float32", device="cpu")
    return lora.load(shape_folder, config, LoraConfig(targets="all-linear", dropout=0.5))


@pytest.fixture(scope="session")
def random_examples() -> Callable[..., tuple[Example, ...]]:
    """A function that makes `count` examples of random bytes, of `shortest` to `longest` tokens."""

    def make(count: int, shortest: int = 2, longest: int = 40, seed: int = 0) -> tuple[Example, ...]:
        draw = np.random.default_rng(seed)
        lengths = draw.integers(shortest, longest + 1, count)
        return tuple(
            Example(
                RecordId(f"{number}"), draw.integers(0, 256, length).astype(np.int64), int(draw.integers(1, length))
            )
            for number, length in enumerate(lengths)
        )

    return make


def line_adapter(value: float) -> Adapter:
    """The adapter of `LineModel` with this number as its value."""
    return {
        "line.lora_A.weight": np.ones((1, 1), np.float32),
        "line.lora_B.weight": np.full((1, 1), value, np.float32),
    }


class LineModel:
    """A model to compute by hand: an adapter is a number, a record is a number (its token), the NLL is their distance.

    An epoch of training moves the adapter half of the way to the mean of the records.
    """

    def fresh(self, seed: int) -> Adapter:
        return line_adapter(0.0)

    def nll(self, adapter: Adapter, examples: Sequence[Example], positions: Positions) -> tuple[Nll, ...]:
        place = float(adapter["line.lora_B.weight"][0, 0])
        counts = [example.num_predicted(positions) for example in examples]
        return tuple(Nll(n * abs(place - int(example.ids[0])), n) for n, example in zip(counts, examples, strict=True))

    def train(self, adapter: Adapter, examples: Sequence[Example], plan: TrainingPlan) -> Iterator[Epoch]:
        mean = sum(int(example.ids[0]) for example in examples) / len(examples)
        for step in range(1, plan.settings.epochs + 1):
            loss = total(self.nll(adapter, examples, plan.settings.positions))
            adapter = line_adapter((float(adapter["line.lora_B.weight"][0, 0]) + mean) / 2)
            yield Epoch(adapter, loss, step)


class DiceModel:
    """A model with random figures: the NLL depends on adapter and record, and the result of a training on its start,
    records and plan. The share `odd` of the NLLs is NaN, infinite or too large.

    `trained` and `scored` list its calls: the bytes of the first adapter, and the ids of the records.
    """

    def __init__(self, salt: int = 0, odd: float = 0.0) -> None:
        self.salt, self.odd = salt, odd
        self.trained: list[tuple[bytes, tuple[RecordId, ...], TrainingPlan]] = []
        self.scored: list[tuple[bytes, tuple[RecordId, ...]]] = []

    def fresh(self, seed: int) -> Adapter:
        return self._throw("fresh", seed)

    def nll(self, adapter: Adapter, examples: Sequence[Example], positions: Positions) -> tuple[Nll, ...]:
        data = adapters.encode(adapter)
        self.scored.append((data, tuple(example.id for example in examples)))
        return tuple(self._nll(data, example, positions) for example in examples)

    def train(self, adapter: Adapter, examples: Sequence[Example], plan: TrainingPlan) -> Iterator[Epoch]:
        assert examples, "nobody trains on nothing"
        data, ids = adapters.encode(adapter), tuple(example.id for example in examples)
        self.trained.append((data, ids, plan))
        most = plan.settings.max_steps * plan.settings.batch_size or len(examples)
        for step in range(1, plan.settings.epochs + 1):
            after = self._throw("trained", data, ids, plan.stream_seed, step)
            loss = total([self._nll(data, example, plan.settings.positions) for example in examples[:most]])
            yield Epoch(after, loss, step)

    def _nll(self, data: bytes, example: Example, positions: Positions) -> Nll:
        dice = self._dice("nll", data, example.id)
        count = example.num_predicted(positions)
        if dice.random() < self.odd:
            return (Nll(math.nan, count), Nll(math.inf, count), Nll(-math.inf, count), Nll(1e308, count), Nll(0.0, 0))[
                dice.integers(5)
            ]
        return Nll(count * dice.uniform(0.5, 4.0), count)

    def _throw(self, *name: object) -> Adapter:
        dice = self._dice(*name)
        shapes = {"dice.lora_A.weight": (2, 3), "dice.lora_B.weight": (4, 2)}
        return {key: dice.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}

    def _dice(self, *name: object) -> np.random.Generator:
        digest = hashlib.sha256(repr((self.salt, *name)).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def line_site(name: str, values: Sequence[int], config: Config, **changes: Any) -> ClientState:
    """A site whose records are these numbers, with two or more predicted tokens, named a0, a1, ... for site a."""
    examples = [
        Example(RecordId(f"{name}{number}"), np.array([value] * (3 + number % 3), np.int64), 2)
        for number, value in enumerate(values)
    ]
    given: dict[str, Any] = {"validation": (), **changes}
    return ClientState(name, "test", config, {example.id: example for example in examples}, **given)


@dataclass(frozen=True)
class Fakes:
    """Stand-ins for a model and its sites, to test the federation's logic without torch."""

    line: Callable[[], LineModel] = LineModel
    dice: Callable[..., DiceModel] = DiceModel
    adapter: Callable[[float], Adapter] = line_adapter
    site: Callable[..., ClientState] = line_site

    def config(self, *overrides: str) -> Config:
        return parse(apply_overrides({}, overrides))


@pytest.fixture(scope="session")
def fakes() -> Fakes:
    """Stand-ins for a model and its sites."""
    return Fakes()


ORGANS = ("liver", "heart", "kidney", "lung", "skin", "brain", "colon", "spleen", "bone", "nerve", "ear", "eye")

SMALL_RUN = """
seed = 3
[data]
source = "files"
path = "{folder}/data"
[model]
name = "tiny-random"
dtype = "float32"
device = "cpu"
cutoff = 64
[prompt]
template = "{folder}/plain.toml"
[lora]
r = 2
[training]
batch_size = 4
learning_rate = 1e-2
[federation]
rounds = 2
[personalization]
epochs = 2
[generation]
max_new_tokens = 4
[evaluation]
choices = 3
bootstrap = 100
[runtime]
threads = 1
"""


@dataclass(frozen=True)
class SmallInput:
    """Two clients of ten training and three test records, and a configuration whose run takes less than a second."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "small.toml"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def hashes(self) -> dict[str, str]:
        """The hash of each file, by its path in the folder."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def small_input(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> SmallInput:
    """Input for a small complete run in the test's own folder; the tiny model is in the cache."""
    monkeypatch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
    return write_small_input(tmp_path / "input")


@pytest.fixture(scope="session")
def small_input_at() -> Callable[[Path], SmallInput]:
    """A function that writes input for a small complete run to a new folder."""
    return write_small_input


@pytest.fixture(scope="session")
def finished_run(tiny_folder: Path, one_thread: None) -> Callable[..., Path]:
    """A function that writes input for a small run to a new folder, and does all its stages in `run` in that folder."""

    def finish(folder: Path, overrides: Sequence[str] = ()) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDMIDE_CACHE", str(tiny_folder.parent))
            config = load(write_small_input(folder / "input").config, overrides)
            with opening.start(config, folder / "run") as run:
                for stage in (stages.train, stages.personalize, stages.generate, stages.evaluate):
                    stage(run)
        return folder / "run"

    return finish


@pytest.fixture(scope="session")
def lasting() -> Callable[[Path], dict[str, Any]]:
    """A function that reads every file of a run folder without the times in it; None for a folder."""
    return read_lasting


def read_lasting(folder: Path) -> dict[str, Any]:
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {name: None if path.is_dir() else without_times(path) for name, path in paths.items()}


TIMES = ("seconds", "model_seconds", "started", "updated", "peak_memory_mb", "prefix_cache_mb")


def without_times(path: Path) -> Any:
    def without(values: dict[str, Any]) -> dict[str, Any]:
        return {key: each for key, each in values.items() if key not in TIMES}

    if path.name == "report.html":  # it shows times and the folder's name; the files that it is made from are compared
        return path.read_bytes()[:15]
    if path.suffix != ".json" and path.name != "events.jsonl":
        return path.read_bytes()
    texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [json.loads(text, object_hook=without) for text in texts]


def write_small_input(folder: Path) -> SmallInput:
    for client, name in enumerate("ab"):
        site = folder / "data" / name
        site.mkdir(parents=True)
        for part, numbers in {"training": range(10), "test": range(10, 13)}.items():
            lines = [json.dumps(small_record(client, number)) + "\n" for number in numbers]
            (site / f"{part}.jsonl").write_text("".join(lines))
    (folder / "plain.toml").write_text(
        'with_context = "{instruction} ({context}): "\nwithout_context = "{instruction}: "\n'
    )
    (folder / "small.toml").write_text(SMALL_RUN.format(folder=folder))
    return SmallInput(folder)


def small_record(client: int, number: int) -> dict[str, str]:
    organ = ORGANS[(number * 5 + client * 3) % len(ORGANS)]
    return {
        "instruction": f"{('Name', 'Find')[client]} {organ} {number}",
        "context": "" if number % 3 else f"site {client}",
        "response": f"{organ[::-1]} {'ab'[client] * (1 + number % 4)}",
        "category": "anatomy",
    }
