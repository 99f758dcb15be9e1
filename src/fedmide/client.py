"""What a site does with a task: score, enroll, train, measure, reply. Pure: state and model in, reply and state out.

The method, as one round runs on a site:

    receive the aggregated adapter
    score the personal records with it against what the own adapter made of them; enroll those that score < 1
    train on the shared set
    measure the records that stay personal under the new own adapter
    reply with the adapter and the number of records it was trained on

Any other method trains on all records; how, and what it replies, is the method's own (`methods`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmide import methods
from fedmide.adapters import is_finite
from fedmide.config import Config
from fedmide.enrollment import Verdict, enroll, rearranged, split
from fedmide.errors import MessageError
from fedmide.ledger import Ledger, Standing, before, measurements, scores, standing, verdicts
from fedmide.localmodel import (
    ZERO,
    Adapter,
    Epoch,
    LocalModel,
    Nll,
    TrainingPlan,
    personalization_plan,
    total,
)
from fedmide.messages import ClientReply, ClientTask, Metric, MetricName
from fedmide.methods.method import Visit
from fedmide.records import RecordId
from fedmide.seeds import stream
from fedmide.tokens import Example


@dataclass(frozen=True)
class Memory:
    """What a method keeps on the site after a round that it trained in; it never leaves."""

    round: int
    arrays: Adapter


@dataclass(frozen=True)
class ClientState:
    """A site: its training and validation records as examples, the configuration, and its ledger so far.

    `memory` is of the last two rounds that kept any, so that the last can be handled again. `adapter` is the
    personalised one, once there is one; it never leaves.
    """

    name: str
    federation: str
    config: Config
    training: Mapping[RecordId, Example]
    validation: Sequence[Example]
    ledger: Ledger = ()
    memory: tuple[Memory, ...] = ()
    adapter: Adapter | None = None

    def before(self, round_number: int) -> "ClientState":
        """The state with what earlier rounds left, and no more."""
        kept = tuple(memory for memory in self.memory if memory.round < round_number)
        return replace(self, ledger=before(self.ledger, round_number), memory=kept)


def handle(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """The reply to a task and the state after it.

    Handling a round again starts from the state before that round, so it is done once however often it is asked for.
    """
    if (task.federation, task.client) != (state.federation, state.name):
        raise MessageError(f"a task for {task.client!r} of {task.federation!r} came to {state.name!r}")
    state = state.before(task.round)
    if task.round >= state.config.federation.rounds:
        return _personalize(task, state, model)
    if state.config.method != "fedmide":
        return _plain_round(task, state, model)
    if task.round < 0:
        return _warm_up(task, state, model)
    return _federated_round(task, state, model)


def _warm_up(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """Stage 0: train on all records; after the last warm-up round measure all of them."""
    everything = tuple(state.training)
    trained = _train(task, state, model, everything)
    measured: Ledger = ()
    if task.round == -1 and trained is not None:
        sets = standing((), everything).sets
        measured = measurements(task.round, _nll(trained.adapter, everything, state, model), sets)
    after = replace(state, ledger=state.ledger + measured)
    return _reply(task, trained, _num_seen(state, everything, trained), _set_metrics(after, (), measured)), after


def _federated_round(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """Stage 1: split or enroll, train on the shared set, measure what stays personal."""
    earlier = standing(state.ledger, state.training)
    judged = _judge(task, state, model, earlier)
    now = standing(state.ledger + judged, state.training)
    at_once = state.config.enrollment.timing == "same_round" or not earlier.is_split
    shared = now.shared if at_once else earlier.shared
    trained = _train(task, state, model, shared) if task.train else None
    measured: Ledger = ()
    if trained is not None:
        # a site that missed the warm-up's last round is split at its next task, as if this round had been that one
        never_split = not now.is_split and state.config.warmup.rounds > 0
        compared = now.personal if state.config.enrollment.enabled else ()
        kept = tuple(state.training) if never_split else compared
        measured = measurements(task.round, _nll(trained.adapter, kept, state, model), now.sets)
    after = replace(state, ledger=state.ledger + judged + measured)
    enrolled = len(now.shared) - len(earlier.shared) if earlier.is_split else 0
    metrics = {**_set_metrics(after, judged, measured), "enrolled": Metric(enrolled)}
    return _reply(task, trained, _num_seen(state, shared, trained), metrics), after


def _plain_round(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """A round of a method that trains on all records."""
    if not state.training or not task.train:
        return _reply(task, None, 0, {}), state
    trained = methods.of(state.config).local(_visit(task, state), model)
    kept = (*state.memory[-1:], Memory(task.round, trained.memory)) if trained.memory else state.memory
    num_records = _num_seen(state, tuple(state.training), trained.work)
    metrics = _training_metrics(trained.work, num_records, trained.beside)
    reply = ClientReply(task.federation, task.client, task.round, None, 0, metrics)
    if trained.travels:
        reply = replace(reply, adapter=trained.travels, num_records=num_records)
    return reply, replace(state, memory=kept)


def _visit(task: ClientTask, state: ClientState) -> Visit:
    memory = state.memory[-1].arrays if state.memory else {}
    return Visit(state.config, state.name, task.round, task.adapter, memory, tuple(state.training.values()))


def _personalize(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """Stage 2: tune the aggregated adapter on the client's own records; keep the epoch that validates best.

    Without validation records the last epoch is kept; without records or epochs, or where a tuning ran off to values
    that are not finite, the aggregated adapter itself (epoch 0). The personalised adapter stays in the state; the
    reply holds sums only. Where a method has another model than the aggregated one for its clients, that one is tuned,
    or is the personalised one as it is.
    """
    method, visit = methods.of(state.config), _visit(task, state)
    start = method.own(visit, model)
    now = standing(state.ledger, state.training)
    chosen = {"all": tuple(state.training), "shared": now.shared, "personal": now.personal}
    records = chosen[state.config.personalization.records]
    if method.tuning is None or not records or state.config.personalization.epochs == 0:
        return _reply(task, None, 0, {}), replace(state, adapter=method.finish(visit, model, start))
    plan = personalization_plan(state.config, state.name, method.tuning(visit))
    examples = [state.training[record] for record in records]
    kept, adapter, validated = 0, start, ZERO
    num_tokens = num_steps = 0
    for number, epoch in enumerate(model.train(start, examples, plan), 1):
        nll = total(model.nll(epoch.adapter, state.validation, state.config.training.positions))
        better = not state.validation or (math.isfinite(nll.mean) and (kept == 0 or nll.mean < validated.mean))
        if better and is_finite(epoch.adapter):
            kept, adapter, validated = number, epoch.adapter, nll
        num_tokens += epoch.loss.num_tokens
        num_steps = epoch.steps
    metrics: dict[MetricName, Metric] = {
        "epoch": Metric(kept),
        "steps": Metric(num_steps),
        "trained_tokens": Metric(num_tokens),
    }
    if len(state.validation) > 1 and kept:
        metrics["validation_loss"] = Metric(validated.sum, validated.num_tokens)
    return _reply(task, None, 0, metrics), replace(state, adapter=method.finish(visit, model, adapter))


def _judge(task: ClientTask, state: ClientState, model: LocalModel, now: Standing) -> Ledger:
    """The verdicts of this round: the split at the first aggregated adapter after the warm-up, later enrollment."""
    enrollment = state.config.enrollment
    if now.is_split and not enrollment.enabled:
        return ()
    candidates = [record for record in (now.personal if now.is_split else now.sets) if record in now.own]
    aggregated = _nll(task.adapter, candidates, state, model)
    values = scores(aggregated, now.own)
    judged = enroll(values, enrollment.threshold) if now.is_split else _split(values, state)
    return verdicts(task.round, aggregated, now.own, judged)


def _split(values: Mapping[RecordId, float], state: ClientState) -> dict[RecordId, Verdict]:
    """The split by the scores, or otherwise where that is to be compared with."""
    enrollment = state.config.enrollment
    by_score = split(values, enrollment.rule)
    lengths = {record: len(state.training[record].ids) for record in values}
    draw = stream(state.config.seed, "split", 0, state.name)
    return rearranged(by_score, values, lengths, enrollment.split, draw)


def _train(task: ClientTask, state: ClientState, model: LocalModel, records: Sequence[RecordId]) -> Epoch | None:
    """The own adapter after training on the records, its loss over all passes; None where there are none."""
    if not records:
        return None
    start = model.fresh(state.config.seed) if task.restart else task.adapter
    plan = TrainingPlan(state.config.training, state.config.seed, task.round, state.name)
    loss = ZERO
    for last in model.train(start, [state.training[record] for record in records], plan):
        loss += last.loss
    return replace(last, loss=loss)


def _num_seen(state: ClientState, records: Sequence[RecordId], trained: Epoch | None) -> int:
    """How many of the records trained the adapter: with `training.max_steps` not all of them may have."""
    return 0 if trained is None else min(len(records), trained.steps * state.config.training.batch_size)


def _nll(adapter: Adapter, records: Iterable[RecordId], state: ClientState, model: LocalModel) -> dict[RecordId, Nll]:
    ids = tuple(records)
    examples = [state.training[record] for record in ids]
    return dict(zip(ids, model.nll(adapter, examples, state.config.scoring.positions), strict=True))


def _reply(
    task: ClientTask, trained: Epoch | None, num_records: int, metrics: Mapping[MetricName, Metric]
) -> ClientReply:
    """The reply; without training it carries no adapter and weighs nothing."""
    if trained is None:
        return ClientReply(task.federation, task.client, task.round, None, 0, metrics)
    trained_metrics = {**metrics, **_training_metrics(trained, num_records)}
    return ClientReply(task.federation, task.client, task.round, trained.adapter, num_records, trained_metrics)


def _set_metrics(after: ClientState, judged: Ledger, measured: Ledger) -> dict[MetricName, Metric]:
    now = standing(after.ledger, after.training)
    return {
        "shared": Metric(len(now.shared)),
        "personal": Metric(len(now.personal)),
        "not_finite": Metric(sum(entry.score is None for entry in judged)),
        "warnings": Metric(sum(entry.reason == "no-threshold" for entry in judged)),
        "scored_tokens": Metric(sum(entry.num_tokens for entry in judged + measured)),
    }


def _training_metrics(trained: Epoch, num_records: int, beside: Epoch | None = None) -> dict[MetricName, Metric]:
    """The figures of a training; a loss over a single record would be that record's own, so it stays."""
    everything = [trained] if beside is None else [trained, beside]
    metrics: dict[MetricName, Metric] = {
        "steps": Metric(sum(each.steps for each in everything)),
        "trained_tokens": Metric(sum(each.loss.num_tokens for each in everything)),
    }
    if num_records > 1 and math.isfinite(trained.loss.sum):
        metrics["loss"] = Metric(trained.loss.sum, trained.loss.num_tokens)
    return metrics
