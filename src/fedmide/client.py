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
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmide import methods
from fedmide.adapters import between, is_finite
from fedmide.aggregation import weighted_mean
from fedmide.config import Config
from fedmide.enrollment import Verdict, enroll, rearranged, split, weight
from fedmide.errors import MessageError
from fedmide.ledger import Ledger, Standing, before, measurements, scores, standing, verdicts
from fedmide.localmodel import (
    ZERO,
    Adapter,
    Epoch,
    LocalModel,
    Nll,
    TrainingPlan,
    after_training,
    personalization_plan,
    total,
)
from fedmide.messages import ClientReply, ClientTask, Metric, MetricName
from fedmide.methods.fedmide import adapter_alone, without_own
from fedmide.methods.method import Visit
from fedmide.records import RecordId
from fedmide.sections import TrainingConfig
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


def keeps_memory(config: Config) -> bool:
    """Whether sites keep anything but their ledgers from round to round."""
    return methods.of(config).remembers or config.keeps_own


def is_lost(kept: Sequence[Memory], trained_in: int) -> bool:
    """Whether what a round that a site trained in left there is missing: that of the round, or of a later one."""
    return all(memory.round < trained_in for memory in kept)


def has_trained(metrics: Container[str]) -> bool:
    """Whether a reply with these metrics comes of a training; where nothing travels no adapter tells."""
    return "steps" in metrics


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
    everything = dict.fromkeys(state.training, 1.0)
    if task.round == -1:
        trained, own = _train_and_measure(task, state, model)
    else:
        trained, own = _train(task, state, model, everything), {}
    measured = measurements(task.round, own, standing((), everything).sets)
    after = replace(state, ledger=state.ledger + measured, memory=_kept(task, state, trained))
    return _reply(task, trained, _num_seen(state, everything, trained), _set_metrics(after, (), measured)), after


def _federated_round(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """Stage 1: split or enroll, train on the shared set, measure what stays personal."""
    earlier = standing(state.ledger, state.training)
    judged = _judge(task, state, model, earlier)
    now = standing(state.ledger + judged, state.training)
    at_once = state.config.enrollment.timing == "same_round" or not earlier.is_split
    weights = _weights(now if at_once else earlier, state)
    trained: Epoch | None = None
    own: Mapping[RecordId, Nll] = {}
    if task.train and not now.is_split and state.config.warmup.rounds > 0:
        # a site that missed the warm-up's last round is split at its next task, as if this round had been that one
        trained, own = _train_and_measure(task, state, model)
    elif task.train and (trained := _train(task, state, model, weights)) is not None:
        compared = now.personal if state.config.enrollment.enabled else ()
        own = _nll(trained.adapter, compared, state, model)
    measured = measurements(task.round, own, now.sets)
    after = replace(state, ledger=state.ledger + judged + measured, memory=_kept(task, state, trained))
    enrolled = len(now.shared) - len(earlier.shared) if earlier.is_split else 0
    metrics = {**_set_metrics(after, judged, measured), "enrolled": Metric(enrolled)}
    return _reply(task, trained, _num_seen(state, weights, trained), metrics), after


def _weights(now: Standing, state: ClientState) -> Mapping[RecordId, float]:
    """What trains the common model, and how much each record weighs in it: the shared set, or softly by the scores."""
    softness = state.config.enrollment.softness
    if softness == 0 or not now.is_split:
        return dict.fromkeys(now.shared, 1.0)
    judged, kind = now.judged, state.config.scoring.kind
    weights = {
        record: weight(judged[record].score, judged[record].threshold, kind, softness) if record in judged else 1.0
        for record in state.training
    }
    return {record: value for record, value in weights.items() if value > 0}


def _plain_round(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """A round of a method that trains on all records."""
    if not state.training or not task.train:
        return _reply(task, None, 0, {}), state
    trained = methods.of(state.config).local(_visit(task, state), model)
    kept = _kept(task, state, trained.work)
    if trained.memory:
        # of the round in any case: that a memory of an earlier one is the last would be taken for a loss
        kept = (*state.memory[-1:], Memory(task.round, _unless_run_off(trained.memory, state)))
    num_records = _num_seen(state, dict.fromkeys(state.training, 1.0), trained.work)
    metrics = _training_metrics(trained.work, num_records, trained.beside)
    reply = ClientReply(task.federation, task.client, task.round, None, 0, metrics)
    if trained.travels:
        reply = replace(reply, adapter=trained.travels, num_records=num_records)
    return reply, replace(state, memory=kept)


def _visit(task: ClientTask, state: ClientState) -> Visit:
    memory = state.memory[-1].arrays if state.memory else {}
    return Visit(state.config, state.name, task.round, task.adapter, memory, tuple(state.training.values()))


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


def _judge(task: ClientTask, state: ClientState, model: LocalModel, now: Standing) -> Ledger:
    """The verdicts of this round: the split at the first aggregated adapter after the warm-up, later enrollment."""
    enrollment = state.config.enrollment
    if now.is_split and not enrollment.enabled:
        return ()
    candidates = [record for record in (now.personal if now.is_split else now.sets) if record in now.own]
    kind, kept = state.config.scoring.kind, {memory.round: memory.arrays for memory in state.memory}
    aggregated = _nll(without_own(task.adapter, kept), candidates, state, model)
    values = scores(aggregated, now.own, kind)
    judged = _enrolled(values, state, task.round) if now.is_split else _split(values, state)
    return verdicts(task.round, aggregated, now.own, values, judged)


def _enrolled(values: Mapping[RecordId, float], state: ClientState, round_number: int) -> dict[RecordId, Verdict]:
    """Who is enrolled by the scores, or otherwise where that is to be compared with."""
    by_score = enroll(values, state.config.enrollment.threshold)
    draw = stream(state.config.seed, "enrollment", round_number, state.name)
    return rearranged(by_score, values, _lengths(values, state), state.config.enrollment.choice, draw)


def _split(values: Mapping[RecordId, float], state: ClientState) -> dict[RecordId, Verdict]:
    """The split by the scores, or otherwise where that is to be compared with."""
    by_score = split(values, state.config.enrollment.rule, state.config.scoring.kind)
    draw = stream(state.config.seed, "split", 0, state.name)
    return rearranged(by_score, values, _lengths(values, state), state.config.enrollment.split, draw)


def _lengths(records: Iterable[RecordId], state: ClientState) -> dict[RecordId, int]:
    return {record: len(state.training[record].ids) for record in records}


def _train_and_measure(
    task: ClientTask, state: ClientState, model: LocalModel
) -> tuple[Epoch | None, Mapping[RecordId, Nll]]:
    """The own adapter after training on all records, and what it makes of each.

    With two folds, two adapters that train on half of the records each for half of the steps: the one that did not see
    a record measures it, and their mean is the own adapter.
    """
    everything = dict.fromkeys(state.training, 1.0)
    if state.config.warmup.folds == 1 or len(everything) < 2:
        trained = _train(task, state, model, everything)
        return trained, {} if trained is None else _nll(trained.adapter, everything, state, model)
    halves = _halves(tuple(everything), state)
    works = [_train(task, state, model, dict.fromkeys(half, 1.0), fold) for fold, half in enumerate(halves)]
    fitted = [work for work in works if work is not None]  # both: no half is empty
    measured: dict[RecordId, Nll] = {}
    for work, unseen in zip(fitted, reversed(halves), strict=True):
        measured |= _nll(work.adapter, unseen, state, model)
    adapter = weighted_mean((work.adapter, len(half)) for work, half in zip(fitted, halves, strict=True))
    assert adapter is not None  # both halves weigh something
    both = Epoch(adapter, total([work.loss for work in fitted]), sum(work.steps for work in fitted))
    return both, {record: measured[record] for record in everything}


def _halves(records: Sequence[RecordId], state: ClientState) -> tuple[Sequence[RecordId], Sequence[RecordId]]:
    """The records parted in two by lot, whatever their order."""
    ordered = sorted(records)
    drawn = [ordered[row] for row in stream(state.config.seed, "folds", client=state.name).permutation(len(ordered))]
    return drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]


def _settings(task: ClientTask, config: Config, fold: int | None) -> TrainingConfig:
    """How a round trains: a warm-up round may be shorter, and its two folds share its steps, at least one each."""
    longest = (task.round < 0 and config.warmup.max_steps) or config.training.max_steps
    if longest and fold is not None:
        longest = max(1, (longest + fold) // 2)
    return config.training.model_copy(update={"max_steps": longest})


def _kept(task: ClientTask, state: ClientState, trained: Epoch | None) -> tuple[Memory, ...]:
    """What stays on the site: its own adapter, where that is needed once more and has not run off."""
    if trained is None or not state.config.keeps_own or not is_finite(trained.adapter):
        return state.memory
    return (*state.memory[-1:], Memory(task.round, trained.adapter))


def _unless_run_off(arrays: Adapter, state: ClientState) -> Adapter:
    """What a method is to remember; where a training ran off what it did before, if anything: so it recovers."""
    if is_finite(arrays):
        return arrays
    return state.memory[-1].arrays if state.memory else {}


def _train(
    task: ClientTask, state: ClientState, model: LocalModel, records: Mapping[RecordId, float], fold: int | None = None
) -> Epoch | None:
    """The own adapter after training on the weighted records, its loss over all passes; None where there are none."""
    if not records:
        return None
    start = model.fresh(state.config.seed) if task.restart else adapter_alone(task.adapter)
    settings = _settings(task, state.config, fold)
    purpose = "training" if fold is None else f"fold {fold}"
    weights = _unless_equal(tuple(records.values()))
    plan = TrainingPlan(settings, state.config.seed, task.round, state.name, purpose=purpose, weights=weights)
    return after_training(model, start, [state.training[record] for record in records], plan)


def _unless_equal(weights: tuple[float, ...]) -> tuple[float, ...]:
    return weights if len(set(weights)) > 1 else ()


def _num_seen(state: ClientState, records: Mapping[RecordId, float], trained: Epoch | None) -> int:
    """How many of the records trained the adapter: with `training.max_steps` not all of them may have.

    A record counts as much as it weighs; together at least one.
    """
    if trained is None:
        return 0
    seen = min(len(records), trained.steps * state.config.training.batch_size)
    return max(1, round(sum(records.values()) / len(records) * seen))


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
