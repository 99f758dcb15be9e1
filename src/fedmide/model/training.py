"""Local training: a plain loop with torch's AdamW, or SGD where a method needs it.

One optimizer step is one batch of records. Its loss is the mean over the batch's predicted tokens.
Memory may require several passes through the model per step. They give the same as one big batch,
because the gradients of sums are added and divided once.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmide.config.sections import TrainingConfig
from fedmide.data.batches import Batch, batches
from fedmide.data.tokens import Example
from fedmide.model.interface import ZERO, Adapter, Epoch, Nll, TrainingPlan, rate_at
from fedmide.model.lora import LoraModel

PASSES = 2**20
"""More passes through the model than an optimizer step ever has. Each pass has its own seed."""


LOSS_SCALES = (2.0**15, 2.0**11, 2.0**7, 2.0**3, 1.0)
"""Factors of the loss over a float16 base, in the order in which they are tried.

Without a factor, most gradients would be below the smallest number of float16. If a gradient overflows, the next
factor is used (Micikevicius et al. 2018, arXiv:1710.03740)."""


def train(
    model: LoraModel,
    examples: Sequence[Example],
    plan: TrainingPlan,
    progress: Callable[[int], None] = lambda num_tokens: None,
) -> Iterator[Epoch]:
    """The state after each pass over the examples, starting from the adapter that the model holds.

    The optimizer starts fresh. Between two passes the caller may use the model for something else.
    """
    settings = plan.settings
    order = np.random.default_rng(plan.stream_seed)
    stepper = Stepper(model, plan)
    last_step = num_steps(len(examples), settings)
    weights = _of_mean_one(plan.weights)
    step = 0
    adapter: Adapter | None = None
    for _ in range(settings.epochs):
        if adapter is not None:
            model.put(adapter)  # the caller may have used the model
        loss = ZERO
        first, others = order.permutation(plan.num_first), order.permutation(len(examples) - plan.num_first)
        rows_in_order = np.concatenate([first, plan.num_first + others])
        for rows in _record_batches(rows_in_order, settings.batch_size):
            if step == last_step:
                break
            seed = plan.stream_seed + step * PASSES
            chosen = None if weights is None else weights[rows]
            loss += _gradient(model, [examples[row] for row in rows], settings, seed, chosen)
            stepper.step(rate_at(step, last_step, settings))
            step += 1
            progress(sum(len(examples[row].ids) for row in rows))
        adapter = model.take()
        yield Epoch(adapter, loss, step)
        if step == last_step:
            return


def num_steps(num_examples: int, settings: TrainingConfig) -> int:
    """The number of optimizer steps of a local training.

    >>> num_steps(33, TrainingConfig(batch_size=32, epochs=2))
    4
    """
    by_epochs = settings.epochs * -(-num_examples // settings.batch_size)
    return min(by_epochs, settings.max_steps) if settings.max_steps else by_epochs


def _record_batches(order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class Stepper:
    """The optimizer and the values it updates.

    The values are the flat parameter or, if the method scales what the model sees, the unscaled values.
    A method's terms become flat vectors here. Each local training makes its own, so the optimizer starts fresh.
    """

    def __init__(self, model: LoraModel, plan: TrainingPlan) -> None:
        settings, terms = plan.settings, plan.terms
        self.flat, self.max_norm, self.pull = model.flat.parameter, settings.max_grad_norm, terms.pull
        self.towards, self.push, self.share = (
            None if each is None else model.laid_out(each) for each in (terms.towards, terms.push, terms.share)
        )
        self.values = self.flat if self.share is None else torch.nn.Parameter(_whole(self.flat.detach(), self.share))
        make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[terms.optimizer]
        self.stepped = [self.values, *model.extra_parameters]
        self.optimizer = make(self.stepped, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step with the gradient that the model holds."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        assert self.flat.grad is not None
        if self.share is not None:
            self.values.grad = self.flat.grad * self.share
        assert self.values.grad is not None
        if self.pull and self.towards is not None:
            self.values.grad.add_(self.values - self.towards, alpha=self.pull)
        torch.nn.utils.clip_grad_norm_(self.stepped, self.max_norm)
        if self.push is not None:
            self.values.grad.add_(self.push)
        self.optimizer.step()
        if self.share is not None:
            self.flat.copy_(torch.where(self.share == 0, self.flat, self.values * self.share))


def _whole(seen: Tensor, share: Tensor) -> Tensor:
    """The unscaled values, out of the values that the model sees. Values with share 0 are frozen and stay unchanged."""
    return torch.where(share == 0, seen, seen / torch.where(share == 0, 1.0, share))


def _of_mean_one(weights: tuple[float, ...]) -> NDArray[np.float32] | None:
    """Weights scaled to a mean of 1: a step is longer if its records weigh more than average. None if all are equal.

    >>> _of_mean_one((1.0, 3.0)).tolist()
    [0.5, 1.5]
    """
    if len(set(weights)) < 2:
        return None
    values = np.asarray(weights)
    scaled: NDArray[np.float32] = (values / values.mean()).astype(np.float32)
    return scaled


def _gradient(
    model: LoraModel,
    examples: Sequence[Example],
    settings: TrainingConfig,
    seed: int,
    weights: NDArray[np.float32] | None,
) -> Nll:
    """The loss of these examples. The gradient of its mean is left in the model. Dropout follows from the seed.

    With weights, the gradient is that of sum(weight * NLL) / number of tokens; the returned loss has no weights.
    If memory has no room for a pass, all passes are repeated with fewer tokens each.
    """
    model.prepare(training=True)
    num_tokens = sum(example.num_predicted(settings.positions) for example in examples)

    def losses(most: int) -> float:
        """The sum of the losses, in passes of at most `most` tokens; leaves the gradient of their mean."""
        made = tuple(batches(examples, settings.positions, most, unpadded=model.unpadded))
        for scale in LOSS_SCALES if model.dtype == torch.float16 else (1.0,):
            loss_sum = _pass(model, made, scale / num_tokens, seed, weights)
            if scale == 1.0 or _unscale(model, scale):
                break
        return loss_sum

    longest = max(len(example.ids) for example in examples)
    loss_sum = model.training_budget.within(settings.tokens_per_batch, longest, losses)
    return Nll(loss_sum, num_tokens)


def _unscale(model: LoraModel, scale: float) -> bool:
    """Divides the gradients; returns True if all of them are finite."""
    gradients = _gradients(model)
    for each in gradients:
        each.div_(scale)
    return all(bool(each.isfinite().all()) for each in gradients)


def _gradients(model: LoraModel) -> list[Tensor]:
    """The gradients of all trained parameters."""
    return [each.grad for each in (model.flat.parameter, *model.extra_parameters) if each.grad is not None]


def _pass(
    model: LoraModel, made: Sequence[Batch], scale: float, seed: int, weights: NDArray[np.float32] | None
) -> float:
    """The sum of the batches' losses; leaves the gradient of `scale` times that sum."""
    for gradient in _gradients(model):
        gradient.zero_()
    loss_sum = 0.0
    for losses, gradient in model.workers.each(
        lambda each: model.backpropagate(each[1], scale, seed + each[0], _of_tokens(weights, each[1])),
        enumerate(made),
    ):
        model.flat.gradient.add_(gradient)
        loss_sum += float(losses.cpu().double().sum())
    return loss_sum


def _of_tokens(weights: NDArray[np.float32] | None, batch: Batch) -> NDArray[np.float32] | None:
    """The weight of each predicted token (N,), which is its record's, in row-major order of `predicts`."""
    return None if weights is None else weights[list(batch.rows)].repeat(batch.predicts.sum(axis=1))
