"""Local training: a plain loop with torch's AdamW.

One optimiser step is one batch of records. Its loss is the mean over the batch's predicted tokens, whatever the
passes through the model that memory asks for: gradients of sums are added and divided once, so accumulation equals
the big batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedmide.config import TrainingConfig
from fedmide.localmodel import ZERO, Epoch, Nll, Terms, TrainingPlan
from fedmide.model import LoraModel
from fedmide.tokens import Example, batches

PASSES = 2**20
"""More passes through the model than an optimiser step ever has: each pass has a seed of its own."""


def train(
    model: LoraModel,
    examples: Sequence[Example],
    plan: TrainingPlan,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> Iterator[Epoch]:
    """The states after each pass, from the adapter that the model holds; the optimiser starts fresh.

    Between two of them the caller may use the model for something else.
    """
    settings = plan.settings
    order = np.random.default_rng(plan.stream_seed)
    optimizer = torch.optim.AdamW([model.flat.parameter], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    terms = _FlatTerms.of(plan.terms, model)
    last_step = num_steps(len(examples), settings)
    step = 0
    for _ in range(settings.epochs):
        loss = ZERO
        for rows in _record_batches(order.permutation(len(examples)), settings.batch_size):
            if step == last_step:
                break
            _set_rate(optimizer, settings, step, last_step)
            seed = plan.stream_seed + step * PASSES
            loss += _step(model, optimizer, [examples[row] for row in rows], settings, seed, terms)
            step += 1
            progress(sum(len(examples[row].ids) for row in rows))
        adapter = model.take()
        yield Epoch(adapter, loss, step)
        model.put(adapter)
        if step == last_step:
            return


def num_steps(num_examples: int, settings: TrainingConfig) -> int:
    """Optimiser steps that a local training takes.

    >>> num_steps(33, TrainingConfig(batch_size=32, epochs=2))
    4
    """
    by_epochs = settings.epochs * -(-num_examples // settings.batch_size)
    return min(by_epochs, settings.max_steps) if settings.max_steps else by_epochs


def _record_batches(order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _set_rate(optimizer: torch.optim.Optimizer, settings: TrainingConfig, step: int, last_step: int) -> None:
    """Linear decay from the full rate at the first step towards 0 after the last."""
    share = 1.0 if settings.schedule == "constant" else (last_step - step) / last_step
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * share


@dataclass(frozen=True)
class _FlatTerms:
    """A method's terms on the flat parameter."""

    pull: float
    towards: Tensor | None

    @staticmethod
    def of(terms: Terms, model: LoraModel) -> "_FlatTerms":
        return _FlatTerms(terms.pull, None if terms.towards is None else model.laid_out(terms.towards))

    def add_to_gradient(self, parameter: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        if self.pull and self.towards is not None:
            parameter.grad.add_(parameter.detach() - self.towards, alpha=self.pull)


def _step(
    model: LoraModel,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    settings: TrainingConfig,
    seed: int,
    terms: _FlatTerms,
) -> Nll:
    """One optimiser step on these examples; the loss before it. Dropout follows from the seed."""
    model.prepare(training=True)
    optimizer.zero_grad(set_to_none=False)
    num_tokens = sum(example.num_predicted(settings.positions) for example in examples)
    loss_sum = 0.0
    budget = settings.tokens_per_batch
    for number, batch in enumerate(batches(examples, settings.positions, budget, model.max_padding)):
        losses = model.backpropagate(batch, 1 / num_tokens, seed + number)
        loss_sum += float(losses.double().sum())
    terms.add_to_gradient(model.flat.parameter)
    torch.nn.utils.clip_grad_norm_(model.flat.parameter, settings.max_grad_norm)
    optimizer.step()
    return Nll(loss_sum, num_tokens)
