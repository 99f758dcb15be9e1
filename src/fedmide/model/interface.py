"""The interface of a model: it scores records, trains adapters, makes fresh ones, and returns states of prompts.

The federation's logic sees nothing else of a model.
This module imports no torch, so the logic can be read and tested without it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedmide.config import Config
from fedmide.config.sections import PersonalizationConfig, Positions, TrainingConfig
from fedmide.data.tokens import Example
from fedmide.seeds import entropy

Adapter: TypeAlias = Mapping[str, NDArray[np.float32]]
"""LoRA weights by PEFT's names: `...lora_A.weight` is (r, in), `...lora_B.weight` is (out, r)."""


@dataclass(frozen=True, slots=True)
class Nll:
    """A negative log-likelihood (NLL) in nats: its sum, and the number of predicted tokens."""

    sum: float
    num_tokens: int

    @property
    def mean(self) -> float:
        """Nats per token; NaN if no token was predicted."""
        return self.sum / self.num_tokens if self.num_tokens else math.nan

    def __add__(self, other: "Nll") -> "Nll":
        return Nll(self.sum + other.sum, self.num_tokens + other.num_tokens)


ZERO = Nll(0.0, 0)


def total(values: Sequence[Nll]) -> Nll:
    """The sum of several NLLs.

    >>> total([Nll(1.0, 2), Nll(3.0, 2)]).mean
    1.0
    """
    return sum(values, ZERO)


@dataclass(frozen=True, eq=False)
class Terms:
    """The changes that a method makes to plain local training. Without values, it changes nothing.

    `pull` adds `pull / 2 * norm(adapter - towards)^2` to the loss, before its gradient is clipped.
    `push` is added to the gradient after clipping.
    `share`: factor per value. The model computes with share * value, the optimizer updates value. 0 freezes the value.
    """

    pull: float = 0.0
    towards: Adapter | None = None
    push: Adapter | None = None
    share: Adapter | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"


PLAIN = Terms()


@dataclass(frozen=True)
class TrainingPlan:
    """One local training: its settings, the names of its random streams, and the changes that a method makes."""

    settings: TrainingConfig
    seed: int
    round_number: int
    client: str
    terms: Terms = PLAIN
    purpose: str = "training"
    """The first name of the random stream: trainings for different purposes draw different numbers."""
    weights: tuple[float, ...] = ()
    """The weight of each record's loss, in the records' order: positive, and only ratios matter. Empty: all equal."""
    num_first: int = 0
    """The number of records that come first in every pass. They are those at the beginning of the list."""

    @property
    def stream_seed(self) -> int:
        """The seed of the records' order and of dropout."""
        return entropy(self.seed, self.purpose, self.round_number, self.client)


def rate_at(step: int, num_steps: int, settings: TrainingConfig) -> float:
    """The learning rate of a step, counted from 0: constant, or falling linearly from the full rate.

    The linear schedule would reach 0 one step after the last.

    >>> rate_at(1, 2, TrainingConfig(learning_rate=0.5))
    0.25
    """
    share = 1.0 if settings.schedule == "constant" else (num_steps - step) / num_steps
    return settings.learning_rate * share


def personalization_plan(config: Config, client: str, terms: Terms = PLAIN) -> TrainingPlan:
    """The plan of personalization: the settings of training, with its own epochs, learning rate and step limit."""
    own: PersonalizationConfig = config.personalization
    changes = {"epochs": max(1, own.epochs), "learning_rate": own.learning_rate, "max_steps": own.max_steps}
    settings = config.training.model_copy(update=changes)
    return TrainingPlan(settings, config.seed, config.federation.rounds, client, terms)


@dataclass(frozen=True)
class Epoch:
    """The state after one pass over the records: the adapter, the training loss of the pass, and the steps so far."""

    adapter: Adapter
    loss: Nll
    steps: int


class LocalModel(Protocol):
    """A frozen base model, under adapters that replace each other in place."""

    def nll(self, adapter: Adapter, examples: Sequence[Example], positions: Positions) -> tuple[Nll, ...]:
        """NLL of each example under the adapter, without dropout, in the examples' order."""

    def train(self, adapter: Adapter, examples: Sequence[Example], plan: TrainingPlan) -> Iterator[Epoch]:
        """The state after each pass over the examples. Starts from the adapter. `nll` may be called between passes."""

    def fresh(self, seed: int) -> Adapter:
        """An adapter that changes nothing yet."""

    def states(self, adapter: Adapter, examples: Sequence[Example]) -> NDArray[np.float32]:
        """The last layer's state at the last token of each example's prompt, under the adapter: (N, D)."""


def after_training(model: LocalModel, start: Adapter, examples: Sequence[Example], plan: TrainingPlan) -> Epoch:
    """The state after the last pass over the examples, with the loss summed over all passes."""
    loss = ZERO
    for last in model.train(start, examples, plan):
        loss += last.loss
    return replace(last, loss=loss)
