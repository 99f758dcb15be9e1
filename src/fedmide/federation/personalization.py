"""Stage 2 on a site: tuning on its own records, chosen on its validation records."""

import math
from dataclasses import replace

from fedmide import methods
from fedmide.federation.client_state import ClientState
from fedmide.federation.ledger import standing
from fedmide.federation.local_training import _reply, _unless_equal, _visit
from fedmide.federation.messages import ClientReply, ClientTask, Metric, MetricName
from fedmide.model.adapters import between, is_finite
from fedmide.model.interface import ZERO, Adapter, LocalModel, Nll, personalization_plan, total


def _personalize(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """Stage 2: tune the aggregated adapter, or the site's own last one, on its own records; keep the best epoch.

    The best is the one that validates best. Without validation records the last epoch is kept; without records or
    epochs, or where a tuning ran off to values that are not finite, the aggregated adapter itself (epoch 0). The
    personalised adapter stays in the state; the reply holds sums only. Where a method has another model than the
    aggregated one for its clients, that one is tuned, or is the personalised one as it is.
    """
    method, visit = methods.of(state.config), _visit(task, state)
    start = method.own(visit, model)
    now = standing(state.ledger, state.training)
    chosen = {
        "all": tuple(state.training),
        "personal-first": (*now.personal, *now.shared),
        "personal": now.personal,
        "shared": now.shared,
    }
    records = chosen[state.config.personalization.records]
    num_first = len(now.personal) if state.config.personalization.records == "personal-first" else 0
    if method.tuning is None or not records or state.config.personalization.epochs == 0:
        return _reply(task, None, 0, {}), replace(state, adapter=method.finish(visit, model, start))
    weights = [
        state.config.personalization.personal_weight if now.sets[each] == "personal" else 1.0 for each in records
    ]
    plan = personalization_plan(state.config, state.name, method.tuning(visit))
    plan = replace(plan, weights=_unless_equal(tuple(weights)), num_first=num_first)
    examples = [state.training[record] for record in records]
    kept, adapter, validated = 0, start, ZERO
    num_tokens = num_scored = num_steps = 0
    for number, epoch in enumerate(model.train(_own_last(task, state) or start, examples, plan), 1):
        nll = total(model.nll(epoch.adapter, state.validation, state.config.training.positions))
        num_scored += nll.num_tokens
        better = not state.validation or (math.isfinite(nll.mean) and (kept == 0 or nll.mean < validated.mean))
        if better and is_finite(epoch.adapter):
            kept, adapter, validated = number, epoch.adapter, nll
        num_tokens += epoch.loss.num_tokens
        num_steps = epoch.steps
    metrics: dict[MetricName, Metric] = {
        "epoch": Metric(kept),
        "steps": Metric(num_steps),
        "trained_tokens": Metric(num_tokens),
        "scored_tokens": Metric(num_scored),
    }
    if kept and state.config.personalization.interpolation != [1.0]:
        others = set(state.config.personalization.interpolation) - {1.0}
        beta, adapter, validated = _interpolated(start, adapter, validated, state, model)
        metrics |= {"beta": Metric(beta), "scored_tokens": Metric(num_scored + len(others) * validated.num_tokens)}
    if len(state.validation) > 1 and kept:
        metrics["validation_loss"] = Metric(validated.sum, validated.num_tokens)
    return _reply(task, None, 0, metrics), replace(state, adapter=method.finish(visit, model, adapter))


def _own_last(task: ClientTask, state: ClientState) -> Adapter:
    """The site's own adapter of the last round, if that is to be tuned and it trained in it; else {}.

    An older one would lack what the others have learned since.
    """
    has_one = state.memory and state.memory[-1].round == task.round - 1
    return state.memory[-1].arrays if has_one and state.config.personalization.start == "own" else {}


def _interpolated(
    start: Adapter, tuned: Adapter, tuned_loss: Nll, state: ClientState, model: LocalModel
) -> tuple[float, Adapter, Nll]:
    """The beta with the lowest validation loss, start + beta (tuned - start), and that loss."""
    betas = sorted(set(state.config.personalization.interpolation))
    if not state.validation:
        return betas[-1], between(start, tuned, betas[-1]), tuned_loss
    positions = state.config.training.positions
    tried = [
        (beta, adapter, total(model.nll(adapter, state.validation, positions)) if beta != 1 else tuned_loss)
        for beta, adapter in ((beta, between(start, tuned, beta)) for beta in betas)
    ]
    return min(tried, key=lambda each: each[2].mean if math.isfinite(each[2].mean) else math.inf)
