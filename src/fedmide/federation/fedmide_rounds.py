"""FedMIDE's rounds on a site: warm-up, split, enrollment, training on the shared set."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fedmide.data.records import RecordId
from fedmide.federation.client_state import ClientState
from fedmide.federation.enrollment import Verdict, enroll, rearranged, split, weight
from fedmide.federation.ledger import Ledger, Standing, measurements, scores, standing, verdicts
from fedmide.federation.local_training import _kept, _nll, _num_seen, _reply, _set_metrics, _train, _train_and_measure
from fedmide.federation.messages import ClientReply, ClientTask, Metric
from fedmide.methods.fedmide import without_own
from fedmide.model.interface import Epoch, LocalModel, Nll
from fedmide.seeds import stream


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
