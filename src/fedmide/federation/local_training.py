"""One local training on a site: its plan, its measurements, and the reply that reports it."""

import math
from collections.abc import Iterable, Mapping, Sequence

from fedmide.config import Config
from fedmide.config.sections import TrainingConfig
from fedmide.data.records import RecordId
from fedmide.federation.client_state import ClientState, MethodState
from fedmide.federation.ledger import Ledger, standing
from fedmide.federation.messages import ClientReply, ClientTask, Metric, MetricName
from fedmide.methods.aggregation import weighted_mean
from fedmide.methods.fedmide import adapter_alone
from fedmide.methods.method import Visit
from fedmide.model.adapters import is_finite
from fedmide.model.interface import Adapter, Epoch, LocalModel, Nll, TrainingPlan, after_training, total
from fedmide.seeds import stream


def visit_of(task: ClientTask, state: ClientState) -> Visit:
    """The round as a method sees it."""
    method_state = state.method_state[-1].arrays if state.method_state else {}
    return Visit(state.config, state.name, task.round, task.adapter, method_state, tuple(state.training.values()))


def train_and_measure(
    task: ClientTask, state: ClientState, model: LocalModel
) -> tuple[Epoch | None, Mapping[RecordId, Nll]]:
    """The local adapter after training on all records, and the NLL of each record under it.

    With two folds, two adapters train on half of the records each, for half of the steps. Each measures the records
    that it did not see. Their mean is the local adapter.
    """
    everything = dict.fromkeys(state.training, 1.0)
    if state.config.warmup.folds == 1 or len(everything) < 2:
        trained = train_on(task, state, model, everything)
        return trained, {} if trained is None else nll_of(trained.adapter, everything, state, model)
    halves = _halves(tuple(everything), state)
    works = [train_on(task, state, model, dict.fromkeys(half, 1.0), fold) for fold, half in enumerate(halves)]
    fitted = [work for work in works if work is not None]  # both: no half is empty
    measured: dict[RecordId, Nll] = {}
    for work, unseen in zip(fitted, reversed(halves), strict=True):
        measured |= nll_of(work.adapter, unseen, state, model)
    adapter = weighted_mean((work.adapter, len(half)) for work, half in zip(fitted, halves, strict=True))
    assert adapter is not None  # both halves weigh something
    both = Epoch(adapter, total([work.loss for work in fitted]), sum(work.steps for work in fitted))
    return both, {record: measured[record] for record in everything}


def _halves(records: Sequence[RecordId], state: ClientState) -> tuple[Sequence[RecordId], Sequence[RecordId]]:
    """The records in two random halves, independent of their order."""
    ordered = sorted(records)
    drawn = [ordered[row] for row in stream(state.config.seed, "folds", client=state.name).permutation(len(ordered))]
    return drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]


def _settings(task: ClientTask, config: Config, fold: int | None) -> TrainingConfig:
    """The settings of a round's training: shorter in a warm-up; two folds share its steps, at least one each."""
    longest = (task.round < 0 and config.warmup.max_steps) or config.training.max_steps
    if longest and fold is not None:
        longest = max(1, (longest + fold) // 2)
    return config.training.model_copy(update={"max_steps": longest})


def kept_method_state(task: ClientTask, state: ClientState, trained: Epoch | None) -> tuple[MethodState, ...]:
    """The method state after the round: with the local adapter, if that is needed again and is finite."""
    if trained is None or not state.config.keeps_own or not is_finite(trained.adapter):
        return state.method_state
    return (*state.method_state[-1:], MethodState(task.round, trained.adapter))


def unless_diverged(arrays: Adapter, state: ClientState) -> Adapter:
    """A method's new state. After a training that diverged: the earlier one, if any, so that the site recovers."""
    if is_finite(arrays):
        return arrays
    return state.method_state[-1].arrays if state.method_state else {}


def train_on(
    task: ClientTask, state: ClientState, model: LocalModel, records: Mapping[RecordId, float], fold: int | None = None
) -> Epoch | None:
    """The local adapter after training on the weighted records, with its loss over all passes; None without records."""
    if not records:
        return None
    start = model.fresh(state.config.seed) if task.restart else adapter_alone(task.adapter)
    settings = _settings(task, state.config, fold)
    purpose = "training" if fold is None else f"fold {fold}"
    weights = unless_equal(tuple(records.values()))
    plan = TrainingPlan(settings, state.config.seed, task.round, state.name, purpose=purpose, weights=weights)
    return after_training(model, start, [state.training[record] for record in records], plan)


def unless_equal(weights: tuple[float, ...]) -> tuple[float, ...]:
    """The weights; empty if all are equal, since equal weights change nothing."""
    return weights if len(set(weights)) > 1 else ()


def num_seen(state: ClientState, records: Mapping[RecordId, float], trained: Epoch | None) -> int:
    """The number of records that trained the adapter: with `training.max_steps` it may be fewer than all.

    A record counts as much as it weighs. The sum is at least 1.
    """
    if trained is None:
        return 0
    seen = min(len(records), trained.steps * state.config.training.batch_size)
    return max(1, round(sum(records.values()) / len(records) * seen))


def nll_of(adapter: Adapter, records: Iterable[RecordId], state: ClientState, model: LocalModel) -> dict[RecordId, Nll]:
    """The NLL of each record under an adapter."""
    ids = tuple(records)
    examples = [state.training[record] for record in ids]
    return dict(zip(ids, model.nll(adapter, examples, state.config.scoring.positions), strict=True))


def reply_of(
    task: ClientTask, trained: Epoch | None, num_records: int, metrics: Mapping[MetricName, Metric]
) -> ClientReply:
    """The reply. Without training it has no adapter and no weight."""
    if trained is None:
        return ClientReply(task.federation, task.client, task.round, None, 0, metrics)
    trained_metrics = {**metrics, **training_metrics(trained, num_records)}
    return ClientReply(task.federation, task.client, task.round, trained.adapter, num_records, trained_metrics)


def set_metrics(after: ClientState, judged: Ledger, measured: Ledger) -> dict[MetricName, Metric]:
    """Sizes of the sets after a round, and counts of its verdicts and measurements."""
    now = standing(after.ledger, after.training)
    return {
        "shared": Metric(len(now.shared)),
        "personal": Metric(len(now.personal)),
        "not_finite": Metric(sum(entry.score is None for entry in judged)),
        "warnings": Metric(sum(entry.reason == "no-threshold" for entry in judged)),
        "scored_tokens": Metric(sum(entry.num_tokens for entry in judged + measured)),
    }


def training_metrics(trained: Epoch, num_records: int, beside: Epoch | None = None) -> dict[MetricName, Metric]:
    """The figures of a training. A loss over a single record would be that record's own, so it is left out."""
    everything = [trained] if beside is None else [trained, beside]
    metrics: dict[MetricName, Metric] = {
        "steps": Metric(sum(each.steps for each in everything)),
        "trained_tokens": Metric(sum(each.loss.num_tokens for each in everything)),
    }
    if num_records > 1 and math.isfinite(trained.loss.sum):
        metrics["loss"] = Metric(trained.loss.sum, trained.loss.num_tokens)
    return metrics
