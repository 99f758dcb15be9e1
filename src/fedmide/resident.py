"""The resident model: one base model that any client's adapter is put into, with its work counted.

This is the `LocalModel` that clients train with, and what evaluation and generation use.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fedmide import adapters, generation, methods, scoring, training
from fedmide.config import Config, Positions
from fedmide.localmodel import Adapter, Epoch, Nll, TrainingPlan
from fedmide.model import LoraModel, load
from fedmide.threads import available_cores, free_threads
from fedmide.tokens import Example


@dataclass
class Resident:
    """A loaded model. `work` counts what went through it by kind, padding left out; `heard` is told."""

    model: LoraModel
    config: Config
    work: Counter[str] = field(default_factory=Counter)
    heard: Callable[[str, int], None] = lambda kind, total: None

    def fresh(self, seed: int) -> Adapter:
        """An adapter that changes nothing yet, of the configured rank."""
        shapes = {
            name: (self.config.lora.r, inner) if ".lora_A." in name else (outer, self.config.lora.r)
            for name, (outer, inner) in self.model.shapes.items()
        }
        return adapters.fresh(shapes, seed)

    def nll(self, adapter: Adapter, examples: Sequence[Example], positions: Positions) -> tuple[Nll, ...]:
        """NLL of each example under the adapter."""
        self.model.put(adapter)
        budget = self.config.scoring.tokens_per_batch
        return scoring.nll(self.model, examples, positions, budget, self._count("tokens scored"))

    def train(self, adapter: Adapter, examples: Sequence[Example], plan: TrainingPlan) -> Iterator[Epoch]:
        """The states after each pass of a training that starts from the adapter."""
        self.model.put(adapter)  # only when the first state is asked for: until then another may be put in
        for epoch in training.train(self.model, examples, plan, self._count("tokens trained")):
            yield replace(epoch, adapter=adapters.cut_like(epoch.adapter, adapter))

    def generate(self, adapter: Adapter, examples: Sequence[Example], max_new_tokens: int) -> tuple[str, ...]:
        """The responses to the examples' prompts under the adapter."""
        self.model.put(adapter)
        batch_size = self.config.generation.batch_size
        return generation.generate(self.model, examples, max_new_tokens, batch_size, self._count("responses generated"))

    def _count(self, kind: str) -> Callable[[int], None]:
        def count(number: int) -> None:
            self.work[kind] += number
            self.heard(kind, self.work[kind])

        return count


def open_model(
    config: Config, folder: Path, threads: int = 0, tell: Callable[[str], None] = lambda message: None
) -> Resident:
    """The model in a folder, under LoRA layers as configured, on so many threads; 0: as configured.

    `tell` hears of what turns out otherwise than configured.
    """
    torch.set_num_threads(threads or config.runtime.threads or free_threads(tell))
    # batches side by side do not wait for each other at every product, and change no bit: every core is worth it
    num_workers = config.runtime.threads or available_cores()
    held = config.runtime.prefix_cache_mb * 10**6, config.training.checkpointing, num_workers
    rank = methods.of(config).rank(config)  # the scale alpha / r is the same at any rank
    lora = config.lora.model_copy(update={"r": rank, "alpha": config.lora.alpha * rank / config.lora.r})
    model = load(folder, config.model, lora, *held)
    for room in (model.training_room, model.scoring_room):
        room.tell = tell
    return Resident(model, config)
