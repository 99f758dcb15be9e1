"""The resident model: one loaded base model that works with any client's adapter and counts its work.

It is the `LocalModel` that clients train with. Evaluation and generation use it too.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedmide import methods
from fedmide.config import Config
from fedmide.config.sections import LoraConfig, Positions
from fedmide.data.tokens import Example
from fedmide.model import adapters, generation, scoring, training
from fedmide.model.interface import ZERO, Adapter, Epoch, Nll, TrainingPlan
from fedmide.model.lora import LoraModel, load
from fedmide.model.routing import routed
from fedmide.model.threads import available_cores, free_threads
from fedmide.progress import quiet


@dataclass
class Resident:
    """A loaded model.

    `work`: tokens or responses so far, by kind of work and without padding. `on_count` is called with each new count.
    `seconds`: time spent in training, scoring and generation.
    """

    model: LoraModel
    config: Config
    work: Counter[str] = field(default_factory=Counter)
    on_count: Callable[[str, int], None] = lambda kind, total: None
    seconds: Counter[str] = field(default_factory=Counter)
    _last_fresh: tuple[int, Adapter] | None = None

    def fresh(self, seed: int) -> Adapter:
        """A new adapter of the configured rank, which changes no prediction yet; all clients share the last one."""
        if self._last_fresh is None or self._last_fresh[0] != seed:
            shapes = {
                name: (self.config.lora.r, inner) if name.endswith(adapters.A) else (outer, self.config.lora.r)
                for name, (outer, inner) in self.model.shapes.items()
            }
            self._last_fresh = seed, adapters.fresh(shapes, seed)
        return self._last_fresh[1]

    def nll(self, adapter: Adapter, examples: Sequence[Example], positions: Positions) -> tuple[Nll, ...]:
        """NLL of each example under the adapter."""
        budget, count = self.config.scoring.tokens_per_batch, self._count("tokens scored")
        found: list[Nll] = [ZERO] * len(examples)
        with self._timed("scoring"):
            for rows, each in self._by_record(adapter, examples):
                values = scoring.nll(self._holding(each), [examples[row] for row in rows], positions, budget, count)
                for row, value in zip(rows, values, strict=True):
                    found[row] = value
        return tuple(found)

    def train(self, adapter: Adapter, examples: Sequence[Example], plan: TrainingPlan) -> Iterator[Epoch]:
        """Trains from the adapter, and gives the state after each epoch."""
        model = self._holding(adapter)  # runs at the first `next`: until then another adapter may be put in the model
        epochs = training.train(model, examples, plan, self._count("tokens trained"))
        while True:
            with self._timed("training"):
                epoch = next(epochs, None)
            if epoch is None:
                return
            yield replace(epoch, adapter=adapters.cut_like(epoch.adapter, adapter))

    def states(self, adapter: Adapter, examples: Sequence[Example]) -> NDArray[np.float32]:
        """The last layer's hidden state at the last token of each example's prompt under the adapter, (N, D)."""
        model = self._holding(adapter)
        found = [model.last_state(torch.from_numpy(each.ids[: each.prompt_length])).numpy() for each in examples]
        return np.stack(found) if found else np.zeros((0, 1), np.float32)

    def generate(self, adapter: Adapter, examples: Sequence[Example], max_new_tokens: int) -> tuple[str, ...]:
        """The responses to the examples' prompts under the adapter."""
        batch_size, count = self.config.generation.batch_size, self._count("responses generated")
        found = [""] * len(examples)
        with self._timed("generation"):
            for rows, each in self._by_record(adapter, examples):
                given = [examples[row] for row in rows]
                texts = generation.generate(self._holding(each), given, max_new_tokens, batch_size, count)
                for row, text in zip(rows, texts, strict=True):
                    found[row] = text
        return tuple(found)

    def stream(self, adapter: Adapter, example: Example, max_new_tokens: int, on_text: Callable[[str], None]) -> str:
        """The response to one example's prompt under the adapter; `on_text` gets each generated piece."""
        ((_, each),) = self._by_record(adapter, [example])
        text = generation.stream(self._holding(each), example, max_new_tokens, on_text)
        self._count("responses generated")(1)
        return text

    def _holding(self, adapter: Adapter) -> LoraModel:
        """The model with the adapter in it."""
        routers = [name for name in adapter if name.endswith(adapters.ROUTER)]
        model = routed(self.model, routers) if routers else self.model
        model.put(adapter)
        return model

    def _by_record(self, adapter: Adapter, examples: Sequence[Example]) -> Iterator[tuple[Sequence[int], Adapter]]:
        """Rows of the examples, each with their adapter.

        It is one for all, or one per prompt if the weights of two adapters depend on the record.
        """
        if adapters.MOST not in adapter:
            yield range(len(examples)), adapter
            return
        own, common = adapters.under(adapters.OWN, adapter), adapters.under(adapters.COMMON, adapter)
        prompts: dict[bytes, list[int]] = {}
        for row, example in enumerate(examples):
            prompts.setdefault(example.ids[: example.prompt_length].tobytes(), []).append(row)
        states = self.states(own, [examples[rows[0]] for rows in prompts.values()])
        for rows, state in zip(prompts.values(), states, strict=True):
            weight = float(adapter[adapters.MOST][0]) * likeness(state, adapter[adapters.REFERENCES])
            yield rows, adapters.stacked(own, common, weight, 1 - weight)

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - begun  # type: ignore[assignment]  # a Counter takes any number

    def _count(self, kind: str) -> Callable[[int], None]:
        def count(number: int) -> None:
            self.work[kind] += number
            self.on_count(kind, self.work[kind])

        return count


def open_model(config: Config, folder: Path, threads: int = 0, tell: Callable[[str], None] = quiet) -> Resident:
    """Loads the model in a folder, with LoRA layers as configured.

    `threads`: CPU threads to use; 0 stands for the configured number. `tell` gets a message if the model uses fewer
    threads than it may, or smaller batches than configured.
    """
    torch.set_num_threads(threads or config.runtime.threads or free_threads(tell))
    # use every core: parallel batches, unlike threads within a product, do not wait for each other; no bit changes
    num_workers = config.runtime.threads or available_cores()
    model = load(
        folder,
        config.model,
        _lora(config),
        prefix_bytes=config.runtime.prefix_cache_mb * 10**6,
        checkpointing=config.training.checkpointing,
        num_workers=num_workers,
    )
    return _begun(model, config, tell)


def _begun(model: LoraModel, config: Config, tell: Callable[[str], None]) -> Resident:
    """The model for a new run, with the configured batch sizes again: an earlier run may have had to lower them."""
    for budget in (model.training_budget, model.scoring_budget, model.generation_budget):
        budget.reset(tell)
    return Resident(model, config)


Opener = Callable[[Config, Path, int, Callable[[str], None]], Resident]
"""A function that opens the model in a folder, as `open_model` does."""


@dataclass
class Kept:
    """Opens models, and keeps the last one with its cached prefixes, so that the next run with the same one reuses it.

    All runs use as many threads as the first, unless their configuration gives a number.
    """

    key: tuple[object, ...] = ()
    model: LoraModel | None = None
    threads: int = 0

    def __call__(self, config: Config, folder: Path, threads: int = 0, tell: Callable[[str], None] = quiet) -> Resident:
        """The resident model, with all counts at zero."""
        wanted = threads or config.runtime.threads or self.threads
        key = (folder, config.model, _lora(config), config.runtime, config.training.checkpointing)
        if self.model is None or key != self.key or wanted != self.threads:
            self.model = None  # free its memory before another is loaded
            self.key, self.model = key, open_model(config, folder, wanted, tell).model
            self.threads = torch.get_num_threads()
        return _begun(self.model, config, tell)


def _lora(config: Config) -> LoraConfig:
    """The LoRA settings for the rank that the method needs; the scale alpha / r stays as configured."""
    rank = methods.of(config).rank(config)
    return config.lora.model_copy(update={"r": rank, "alpha": config.lora.alpha * rank / config.lora.r})


def likeness(state: NDArray[np.float32], references: NDArray[np.float32]) -> float:
    """The mean cosine similarity of a state (D,) to reference states (N, D); 0 if it is negative or there are none.

    >>> likeness(np.array([1.0, 0.0]), np.array([[2.0, 0.0], [0.0, 3.0]]))
    0.5
    """
    if not len(references):
        return 0.0
    norms = np.linalg.norm(references, axis=1) * np.linalg.norm(state)
    return max(0.0, float(np.mean(references @ state / norms)))
