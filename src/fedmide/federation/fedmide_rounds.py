"""FedMIDE's rounds on a site: warm-up, split, enrollment, training on the shared set.

A federated round, step by step:

    receive the common adapter
    score the personal records with it: their NLL under it against their NLL under the local adapter
    enroll those whose score is below the threshold (`enrollment.threshold`, 1 as published)
    train on the shared set
    measure the records that stay personal under the new local adapter
    reply with the adapter and the number of records that trained it

The first common adapter after the warm-up splits all records by score, instead of enrolling.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fedmide.data.records import RecordId
from fedmide.federation.client_state import ClientState
from fedmide.federation.enrollment import Verdict, enroll, rearranged, split_by_score, weight
from fedmide.federation.ledger import Ledger, Standing, measurements, scores, standing, verdicts
from fedmide.federation.local_training import (
    kept_method_state,
    nll_of,
    num_seen,
    reply_of,
    set_metrics,
    train_and_measure,
    train_on,
)
from fedmide.federation.messages import ClientReply, ClientTask, Metric
from fedmide.methods.fedmide import without_own
from fedmide.model.interface import Epoch, LocalModel, Nll
from fedmide.seeds import stream


def warm_up(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """Stage 0: train on all records. After the last warm-up round, measure all of them."""
    everything = dict.fromkeys(state.training, 1.0)
    if task.round == -1:
        trained, own = train_and_measure(task, state, model)
    else:
        trained, own = train_on(task, state, model, everything), {}
    measured = measurements(task.round, own, standing((), everything).sets)
    after = replace(state, ledger=state.ledger + measured, method_state=kept_method_state(task, state, trained))
    return reply_of(task, trained, num_seen(state, everything, trained), set_metrics(after, (), measured)), after


def federated_round(task: ClientTask, state: ClientState, model: LocalModel) -> tuple[ClientReply, ClientState]:
    """Stage 1: split or enroll, train on the shared set, measure what stays personal."""
    earlier = standing(state.ledger, state.training)
    judged = _judge(task, state, model, earlier)
    now = standing(state.ledger + judged, state.training)
    at_once = state.config.enrollment.timing == "same_round" or not earlier.is_split
    weights = _weights(now if at_once else earlier, state)
    trained: Epoch | None = None
    own: Mapping[RecordId, Nll] = {}
    if task.train and not now.is_split and state.config.warmup.rounds > 0:
        # A site that missed the last warm-up round: this round serves as one, and its next task splits its records.
        trained, own = train_and_measure(task, state, model)
    elif task.train and (trained := train_on(task, state, model, weights)) is not None:
        compared = now.personal if state.config.enrollment.enabled else ()
        own = nll_of(trained.adapter, compared, state, model)
    measured = measurements(task.round, own, now.sets)
    after = replace(
        state, ledger=state.ledger + judged + measured, method_state=kept_method_state(task, state, trained)
    )
    enrolled = len(now.shared) - len(earlier.shared) if earlier.is_split else 0
    metrics = {**set_metrics(after, judged, measured), "enrolled": Metric(enrolled)}
    return reply_of(task, trained, num_seen(state, weights, trained), metrics), after


def _weights(now: Standing, state: ClientState) -> Mapping[RecordId, float]:
    """The records that train the common model, with their weights: the shared set, or soft weights by score."""
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
    """The verdicts of this round: the split at the first common adapter after the warm-up, enrollment later."""
    enrollment = state.config.enrollment
    if now.is_split and not enrollment.enabled:
        return ()
    candidates = [record for record in (now.personal if now.is_split else now.sets) if record in now.own]
    kind = state.config.scoring.kind
    kept = {each.round: each.arrays for each in state.method_state}
    aggregated = nll_of(without_own(task.adapter, kept), candidates, state, model)
    values = scores(aggregated, now.own, kind)
    judged = _enrolled(values, state, task.round) if now.is_split else _split(values, state)
    return verdicts(task.round, aggregated, now.own, values, judged)


def _enrolled(values: Mapping[RecordId, float], state: ClientState, round_number: int) -> dict[RecordId, Verdict]:
    """The enrollment by score, or another choice for comparison (`enrollment.choice`)."""
    by_score = enroll(values, state.config.enrollment.threshold)
    draw = stream(state.config.seed, "enrollment", round_number, state.name)
    return rearranged(by_score, values, _lengths(values, state), state.config.enrollment.choice, draw)


def _split(values: Mapping[RecordId, float], state: ClientState) -> dict[RecordId, Verdict]:
    """The split by score, or another one for comparison (`enrollment.split`)."""
    by_score = split_by_score(values, state.config.enrollment.rule, state.config.scoring.kind)
    draw = stream(state.config.seed, "split", 0, state.name)
    return rearranged(by_score, values, _lengths(values, state), state.config.enrollment.split, draw)


def _lengths(records: Iterable[RecordId], state: ClientState) -> dict[RecordId, int]:
    return {record: len(state.training[record].ids) for record in records}
