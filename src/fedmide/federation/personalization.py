"""Stage 2 on a site: tuning on its own records; the best epoch by its validation records."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedmide import methods
from fedmide.data.records import RecordId
from fedmide.federation.client_state import ClientState
from fedmide.federation.ledger import standing
from fedmide.federation.local_training import reply_of, unless_equal, visit_of
from fedmide.federation.messages import ClientReply, ClientTask, Metric, MetricName
from fedmide.model.adapters import between, is_finite
from fedmide.model.interface import ZERO, Adapter, Epoch, LocalModel, Nll, personalization_plan, total


def personalize(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """Stage 2: tune the common adapter, or the site's last local one, on the site's records; keep the best epoch.

    A method with another model for its clients has that one tuned, or keeps it as it is. The tuned adapter stays in the
    state. The reply holds only sums.
    """
    method, visit = methods.of(state.config), visit_of(task, state)
    start = method.own(visit, model)
    records, num_first, weights = _records(state)
    if method.tuning is None or not records or state.config.personalization.epochs == 0:
        return reply_of(task, None, 0, {}), replace(state, adapter=method.finish(visit, model, start))
    plan = personalization_plan(state.config, state.name, method.tuning(visit))
    plan = replace(plan, weights=unless_equal(weights), num_first=num_first)
    examples = [state.training[record] for record in records]
    best, metrics = _best_epoch(start, model.train(_own_last(task, state) or start, examples, plan), state, model)
    if best.epoch and state.config.personalization.interpolation != [1.0]:
        others = set(state.config.personalization.interpolation) - {1.0}
        beta, best = _interpolated(start, best, state, model)
        scored = Metric(metrics["scored_tokens"].sum + len(others) * best.loss.num_tokens)
        metrics |= {"beta": Metric(beta), "scored_tokens": scored}
    if len(state.validation) > 1 and best.epoch:
        metrics["validation_loss"] = Metric(best.loss.sum, best.loss.num_tokens)
    return reply_of(task, None, 0, metrics), replace(state, adapter=method.finish(visit, model, best.adapter))


@dataclass(frozen=True)
class _Best:
    """A tuned adapter, its epoch (0: before the tuning) and its loss on the validation records."""

    epoch: int
    adapter: Adapter
    loss: Nll


def _records(state: ClientState) -> tuple[Sequence[RecordId], int, tuple[float, ...]]:
    """The records to tune on, the number of them that come first in each epoch, and their weights."""
    settings, now = state.config.personalization, standing(state.ledger, state.training)
    records = {
        "all": tuple(state.training),
        "personal-first": (*now.personal, *now.shared),
        "personal": now.personal,
        "shared": now.shared,
    }[settings.records]
    num_first = len(now.personal) if settings.records == "personal-first" else 0
    weights = tuple(settings.personal_weight if now.sets[each] == "personal" else 1.0 for each in records)
    return records, num_first, weights


def _best_epoch(
    start: Adapter, epochs: Iterable[Epoch], state: ClientState, model: LocalModel
) -> tuple[_Best, dict[MetricName, Metric]]:
    """The epoch with the lowest validation loss, and the figures of the tuning.

    Without validation records it is the last epoch. If all epochs diverged it is epoch 0, the start.
    """
    best = _Best(0, start, ZERO)
    num_tokens = num_scored = num_steps = 0
    for number, epoch in enumerate(epochs, 1):
        nll = total(model.nll(epoch.adapter, state.validation, state.config.training.positions))
        num_scored += nll.num_tokens
        better = not state.validation or (math.isfinite(nll.mean) and (best.epoch == 0 or nll.mean < best.loss.mean))
        if better and is_finite(epoch.adapter):
            best = _Best(number, epoch.adapter, nll)
        num_tokens += epoch.loss.num_tokens
        num_steps = epoch.steps
    return best, {
        "epoch": Metric(best.epoch),
        "steps": Metric(num_steps),
        "trained_tokens": Metric(num_tokens),
        "scored_tokens": Metric(num_scored),
    }


def _own_last(task: ClientTask, state: ClientState) -> Adapter:
    """The site's local adapter of the last round, if `personalization.start` is "own" and it trained then; else {}.

    An older one would lack the training of the other sites since then.
    """
    has_one = state.method_state and state.method_state[-1].round == task.round - 1
    return state.method_state[-1].arrays if has_one and state.config.personalization.start == "own" else {}


def _interpolated(start: Adapter, tuned: _Best, state: ClientState, model: LocalModel) -> tuple[float, _Best]:
    """The beta with the lowest validation loss, and start + beta (tuned - start) with that loss."""
    betas = sorted(set(state.config.personalization.interpolation))
    if not state.validation:
        return betas[-1], replace(tuned, adapter=between(start, tuned.adapter, betas[-1]))
    positions = state.config.training.positions
    tried = [
        (beta, adapter, total(model.nll(adapter, state.validation, positions)) if beta != 1 else tuned.loss)
        for beta, adapter in ((beta, between(start, tuned.adapter, beta)) for beta in betas)
    ]
    beta, adapter, loss = min(tried, key=lambda each: each[2].mean if math.isfinite(each[2].mean) else math.inf)
    return beta, replace(tuned, adapter=adapter, loss=loss)
