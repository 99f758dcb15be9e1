"""FedMIDE's own knobs beyond the published ones, each computed by hand on a site whose model is a number on a line."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedmide.data.records import RecordId
from fedmide.federation.client import handle
from fedmide.federation.client_state import ClientState
from fedmide.federation.ledger import Entry, standing
from fedmide.federation.messages import ClientTask, Metric
from fedmide.methods.fedmide import PROVENANCE
from fedmide.model.interface import Adapter, Epoch, Nll, TrainingPlan, total


def place(adapter: Adapter | None) -> float:
    assert adapter is not None
    return float(adapter["line.lora_B.weight"][0, 0])


def task(fakes: Any, number: int, at: float, **changes: Any) -> ClientTask:
    return ClientTask("test", "a", number, fakes.adapter(at), **changes)


def entries(state: ClientState, number: int) -> dict[RecordId, Entry]:
    """Each record's last entry of a round."""
    return {entry.record_id: entry for entry in state.ledger if entry.round == number}


class Watched:
    """A line model that remembers its trainings and heeds weights: a pass goes half of the way to the weighted mean."""

    def __init__(self, fakes: Any) -> None:
        self.line, self.fakes = fakes.line(), fakes
        self.trained: list[tuple[float, dict[RecordId, int], TrainingPlan]] = []

    def fresh(self, seed: int) -> Adapter:
        adapter: Adapter = self.line.fresh(seed)
        return adapter

    def nll(self, adapter: Adapter, examples: Sequence[Any], positions: Any) -> tuple[Nll, ...]:
        nlls: tuple[Nll, ...] = self.line.nll(adapter, examples, positions)
        return nlls

    def train(self, adapter: Adapter, examples: Sequence[Any], plan: TrainingPlan) -> Iterator[Epoch]:
        values = {example.id: int(example.ids[0]) for example in examples}
        self.trained.append((place(adapter), values, plan))
        mean = np.average(list(values.values()), weights=plan.weights or None)
        for step in range(1, plan.settings.epochs + 1):
            loss = total(self.nll(adapter, examples, plan.settings.positions))
            adapter = self.fakes.adapter((place(adapter) + mean) / 2)
            yield Epoch(adapter, loss, step)


# --- two folds


def folded(fakes: Any, *overrides: str, values: Sequence[int] = (8, 9, 13)) -> tuple[Any, ClientState, Watched]:
    model = Watched(fakes)
    site = fakes.site("a", values, fakes.config("warmup.folds=2", *overrides))
    reply, after = handle(task(fakes, -1, 0.0), site, model)
    return reply, after, model


def test_with_two_folds_a_record_is_measured_by_the_adapter_that_did_not_see_it(fakes: Any) -> None:
    reply, after, model = folded(fakes)
    (_, first, _), (_, second, _) = model.trained
    assert sorted([*first.values(), *second.values()]) == [8, 9, 13], "every record trains once"
    assert {len(first), len(second)} == {1, 2}
    own = entries(after, -1)
    for trained, unseen in ((first, second), (second, first)):
        at = np.mean(list(trained.values())) / 2  # from 0
        for record, value in unseen.items():
            assert own[record].nll_local == pytest.approx(abs(at - value))
    assert list(own) == list(after.training), "in the records' order"
    assert place(reply.adapter) == pytest.approx(30 / 3 / 2), "one adapter travels: the folds' mean by records"
    assert reply.num_records == 3
    assert reply.metrics["steps"] == Metric(2), "the steps of both are charged"
    assert reply.metrics["trained_tokens"] == Metric(9)
    assert reply.metrics["scored_tokens"] == Metric(9)


def test_the_folds_have_streams_of_their_own_and_share_the_steps(fakes: Any) -> None:
    _, _, model = folded(fakes, "training.max_steps=5", "seed=3")
    plans = [plan for _, _, plan in model.trained]
    assert [plan.settings.max_steps for plan in plans] == [2, 3], "that of more records has more"
    _, _, model = folded(fakes, "training.max_steps=1")
    assert [plan.settings.max_steps for _, _, plan in model.trained] == [1, 1], "none goes without"
    assert len({plan.stream_seed for plan in plans}) == 2


def test_the_folds_do_not_depend_on_the_order_of_the_records(fakes: Any) -> None:
    one, other = Watched(fakes), Watched(fakes)
    site = fakes.site("a", [8, 9, 13, 4, 7], fakes.config("warmup.folds=2"))
    _, after = handle(task(fakes, -1, 0.0), site, one)
    turned = replace(site, training=dict(reversed(site.training.items())))
    _, again = handle(task(fakes, -1, 0.0), turned, other)
    assert entries(after, -1) == entries(again, -1)


def test_only_the_last_warm_up_round_is_folded_and_one_record_can_not_be(fakes: Any) -> None:
    model = Watched(fakes)
    site = fakes.site("a", [8, 9, 13], fakes.config("warmup.folds=2", "warmup.rounds=2"))
    handle(task(fakes, -2, 0.0), site, model)
    assert [list(values.values()) for _, values, _ in model.trained] == [[8, 9, 13]]
    reply, after, model = folded(fakes, values=[8])
    assert (place(reply.adapter), len(model.trained), entries(after, -1)[RecordId("a0")].nll_local) == (4.0, 1, 4.0)


def test_a_site_that_missed_the_warm_up_folds_its_first_training(fakes: Any) -> None:
    model = Watched(fakes)
    site = fakes.site("a", [8, 9, 13], fakes.config("warmup.folds=2"))
    reply, after = handle(task(fakes, 0, 2.0), site, model)
    assert [start for start, _, _ in model.trained] == [2.0, 2.0]
    assert (reply.num_records, len(entries(after, 0))) == (3, 3)


def test_the_warm_up_may_take_fewer_steps(fakes: Any) -> None:
    model, config = Watched(fakes), fakes.config("warmup.max_steps=2", "training.max_steps=7", "enrollment.rule=median")
    site = fakes.site("a", [8, 9], config)
    _, after = handle(task(fakes, -1, 0.0), site, model)
    handle(task(fakes, 0, 9.0), after, model)
    assert [plan.settings.max_steps for _, _, plan in model.trained] == [2, 7]


# --- the relative gap


def test_the_gap_splits_and_enrolls_at_its_own_zero(fakes: Any) -> None:
    """After the warm-up (at 5) NLLs 3, 4, 8; under 2: 6, 7, 11, so nobody trains; under 9: 1, 0, 4."""
    knobs = ("scoring.kind=relative-gap", "enrollment.rule=natural")
    model = Watched(fakes)
    _, state = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], fakes.config(*knobs)), model)
    _, state = handle(task(fakes, 0, 2.0), state, model)
    first = list(entries(state, 0).values())
    assert [entry.score for entry in first] == [(6 - 3) / 6, (7 - 4) / 7, (11 - 8) / 11]
    assert {(entry.set, entry.threshold) for entry in first} == {("personal", 0.0)}
    _, state = handle(task(fakes, 1, 9.0), state, model)
    scores = {entry.record_id: entry.score for entry in state.ledger if entry.round == 1 and entry.score is not None}
    assert scores == {"a0": (1 - 3) / 1, "a2": (4 - 8) / 4}, "record 9 has an NLL of 0, so no gap"
    assert standing(state.ledger, state.training).sets == {"a0": "shared", "a1": "personal", "a2": "shared"}


# --- the own adapter left out


def behind(adapter: Adapter, total_records: int, own: int, number: int) -> Adapter:
    return {**adapter, PROVENANCE: np.array([total_records, own, number], np.float32)}


def test_a_site_scores_with_what_the_others_made_and_trains_from_what_all_did(fakes: Any) -> None:
    """Its own adapter stands at 5 with 3 of 9 records; the mean at 9 is (5 * 3 + 11 * 6) / 9."""
    model = Watched(fakes)
    site = fakes.site("a", [8, 9, 13], fakes.config("scoring.without_own=true", "enrollment.rule=natural"))
    _, state = handle(task(fakes, -1, 0.0), site, model)
    assert [(each.round, place(each.arrays)) for each in state.method_state] == [(-1, 5.0)]
    received = behind(fakes.adapter(9.0), 9, 3, -1)
    reply, after = handle(replace(task(fakes, 0, 0.0), adapter=received), state, model)
    judged = [entry.nll_aggregated for entry in after.ledger if entry.round == 0 and entry.nll_aggregated is not None]
    assert judged == [3.0, 2.0, 2.0]
    assert model.trained[-1][0] == 9.0
    assert reply.adapter is not None and PROVENANCE not in reply.adapter
    assert [each.round for each in after.method_state] == [-1, 0]
    again, same = handle(replace(task(fakes, 0, 0.0), adapter=received), after, model)
    assert (place(again.adapter), same.ledger) == (place(reply.adapter), after.ledger)


@pytest.mark.parametrize("told", [None, (9, 3, -2), (3, 3, -1), (9, 0, -1), (2, 3, -1)])
def test_it_scores_with_the_whole_mean_where_it_is_not_in_it_or_alone(fakes: Any, told: Any) -> None:
    site = fakes.site("a", [8, 9, 13], fakes.config("scoring.without_own=true"))
    _, state = handle(task(fakes, -1, 0.0), site, fakes.line())
    received = fakes.adapter(9.0) if told is None else behind(fakes.adapter(9.0), *told)
    _, after = handle(replace(task(fakes, 0, 0.0), adapter=received), state, fakes.line())
    judged = [entry.nll_aggregated for entry in after.ledger if entry.round == 0 and entry.nll_aggregated is not None]
    assert judged == [1.0, 0.0, 4.0]


def test_nothing_is_kept_where_nothing_is_left_out(fakes: Any) -> None:
    _, state = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], fakes.config()), fakes.line())
    assert state.method_state == ()


# --- weights


def soft(fakes: Any, *overrides: str) -> tuple[Any, ClientState, Watched]:
    """Scores exp(-2), exp(-4), exp(-4) after the warm-up, as in the tests of the published method."""
    model = Watched(fakes)
    config = fakes.config("enrollment.softness=0.5", "enrollment.rule=natural", *overrides)
    _, state = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], config), model)
    reply, after = handle(task(fakes, 0, 9.0), state, model)
    return reply, after, model


def test_with_softness_all_records_train_and_weigh_by_their_scores(fakes: Any) -> None:
    reply, _, model = soft(fakes)
    start, values, plan = model.trained[-1]
    expected = [1 / (1 + math.exp(d / 0.5)) for d in (-2, -4, -4)]
    assert (start, list(values)) == (9.0, ["a0", "a1", "a2"])
    assert plan.weights == pytest.approx(expected)
    assert place(reply.adapter) == pytest.approx((9 + np.average([8, 9, 13], weights=expected)) / 2)
    assert reply.num_records == round(sum(expected)) == 3
    assert (reply.metrics["shared"], reply.metrics["personal"]) == (Metric(3), Metric(0))


def test_a_site_with_only_personal_records_trains_a_little_and_weighs_as_little(fakes: Any) -> None:
    model = Watched(fakes)
    config = fakes.config("enrollment.softness=0.5", "enrollment.rule=natural")
    _, state = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], config), model)
    reply, _ = handle(task(fakes, 0, 2.0), state, model)  # each 3 nats worse than under its own
    assert model.trained[-1][2].weights == (), "all alike"
    assert reply.num_records == 1 == max(1, round(3 / (1 + math.exp(6))))
    assert reply.metrics["personal"] == Metric(3)


def test_a_record_that_is_enrolled_later_weighs_by_its_new_score(fakes: Any) -> None:
    model = Watched(fakes)
    config = fakes.config("enrollment.softness=0.5", "enrollment.rule=otsu-exact")
    _, state = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], config), model)
    _, state = handle(task(fakes, 0, 9.0), state, model)
    assert standing(state.ledger, state.training).personal == ("a0",)
    _, state = handle(task(fakes, 1, 9.0), state, model)
    entry = entries(state, 1)[RecordId("a0")]
    score, moved = entry.score, entry.reason
    assert score is not None and moved == "below-threshold"
    assert model.trained[-1][2].weights[0] == pytest.approx(1 / (1 + math.exp(math.log(score) / 0.5)))


# --- personalization


class Valley:
    """Tuning goes from wherever it starts to 10; validation records lie at their own values."""

    def __init__(self, fakes: Any) -> None:
        self.fakes, self.plans, self.scored = fakes, list[TrainingPlan](), 0
        self.starts: list[float] = []

    def fresh(self, seed: int) -> Adapter:
        raise AssertionError("not asked for")

    def nll(self, adapter: Adapter, examples: Sequence[Any], positions: Any) -> tuple[Nll, ...]:
        self.scored += 1
        return tuple(Nll(abs(place(adapter) - int(example.ids[0])), 1) for example in examples)

    def train(self, adapter: Adapter, examples: Sequence[Any], plan: TrainingPlan) -> Iterator[Epoch]:
        self.plans.append(plan)
        self.starts.append(place(adapter))
        yield Epoch(self.fakes.adapter(10.0), Nll(1.0, 1), 1)


def tuned(fakes: Any, validation: Sequence[int], *overrides: str) -> tuple[float, Mapping[Any, Metric], Valley]:
    config = fakes.config("personalization.epochs=1", *overrides)
    held_out = tuple(fakes.site("v", validation, config).training.values())
    model = Valley(fakes)
    reply, after = handle(task(fakes, 20, 2.0), fakes.site("a", [1, 2], config, validation=held_out), model)
    return place(after.adapter), reply.metrics, model


BETAS = "personalization.interpolation=[1.0, 0.0, 0.5, 0.5]"


@pytest.mark.parametrize(
    ("validation", "at", "beta"), [([6, 6], 6.0, 0.5), ([9, 9], 10.0, 1.0), ([1, 3], 2.0, 0.0), ([4, 8], 6.0, 0.5)]
)
def test_as_much_of_the_tuning_is_kept_as_validates_best(
    fakes: Any, validation: list[int], at: float, beta: float
) -> None:
    found, metrics, _ = tuned(fakes, validation, BETAS)
    assert (found, metrics["beta"]) == (at, Metric(beta))
    assert metrics["validation_loss"] == Metric(sum(abs(at - value) for value in validation), 2)
    assert metrics["scored_tokens"] == Metric(3 * 2), "of the tuned adapter, and of two betas other than 1"


def test_of_equal_betas_the_smaller_is_kept_and_without_validation_the_largest(fakes: Any) -> None:
    assert tuned(fakes, [4, 8], "personalization.interpolation=[0.25, 0.5, 0.75]")[0] == 4.0  # 4, 6 and 8 are alike
    found, metrics, model = tuned(fakes, [], BETAS)
    assert (found, metrics["beta"], model.scored) == (10.0, Metric(1.0), 1)


def test_a_tuning_can_be_overshot(fakes: Any) -> None:
    assert tuned(fakes, [14, 14], "personalization.interpolation=[1.0, 1.5]")[0] == 14.0


def test_without_a_choice_nothing_is_reported_or_scored_for_it(fakes: Any) -> None:
    found, metrics, model = tuned(fakes, [6, 6])
    assert (found, "beta" in metrics, model.scored) == (10.0, False, 1)
    assert metrics["scored_tokens"] == Metric(2)


def test_tuning_starts_from_the_local_adapter_of_the_last_round(fakes: Any) -> None:
    config = fakes.config("personalization.epochs=1", "personalization.start=own", "enrollment.rule=natural", BETAS)
    site = fakes.site("a", [8, 9, 13], config, validation=tuple(fakes.site("v", [6, 6], config).training.values()))
    _, state = handle(task(fakes, -1, 0.0), site, fakes.line())
    last = config.federation.rounds - 1
    reply, state = handle(task(fakes, last, 9.0), state, fakes.line())
    assert [(each.round, each.arrays) for each in state.method_state][-1] == (
        last,
        reply.adapter,
    )
    model = Valley(fakes)
    _, after = handle(task(fakes, last + 1, 2.0), state, model)
    assert model.starts == [place(reply.adapter)] != [2.0]
    assert place(after.adapter) == 6.0, "between the aggregated adapter and the tuned one"


def test_an_own_adapter_of_an_earlier_round_is_not_tuned(fakes: Any) -> None:
    config = fakes.config("personalization.epochs=1", "personalization.start=own")
    _, state = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], config), fakes.line())
    last = config.federation.rounds - 1
    _, state = handle(task(fakes, last, 9.0, train=False), state, fakes.line())  # not drawn: it has none of this round
    assert [each.round for each in state.method_state] == [-1]
    model = Valley(fakes)
    handle(task(fakes, last + 1, 2.0), state, model)
    assert model.starts == [2.0]


class RunsOff(Valley):
    """A training that ends in no numbers."""

    def train(self, adapter: Adapter, examples: Sequence[Any], plan: TrainingPlan) -> Iterator[Epoch]:
        yield Epoch(self.fakes.adapter(math.nan), Nll(1.0, 1), 1)


def test_a_local_adapter_that_diverged_is_not_kept(fakes: Any) -> None:
    config = fakes.config("personalization.start=own", "enrollment.rule=natural")
    _, state = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], config), fakes.line())
    reply, state = handle(task(fakes, 0, 9.0), state, RunsOff(fakes))
    assert math.isnan(place(reply.adapter))
    assert [each.round for each in state.method_state] == [-1]


def test_a_site_that_never_trained_tunes_the_common_adapter(fakes: Any) -> None:
    assert tuned(fakes, [6, 6], "personalization.start=own")[2].starts == [2.0]


def test_any_tuned_method_can_be_interpolated(fakes: Any) -> None:
    assert tuned(fakes, [6, 6], BETAS, "method=fedavg-ft")[0] == 6.0


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["personalization.personal_weight=3.0"], (3.0, 1.0, 1.0)),
        ([], ()),
        (["personalization.personal_weight=3.0", "personalization.records=personal"], ()),
    ],
)
def test_personal_records_weigh_more_where_shared_ones_are_replayed(
    fakes: Any, overrides: list[str], weights: tuple[float, ...]
) -> None:
    model = Watched(fakes)
    config = fakes.config("enrollment.rule=otsu-exact", "personalization.epochs=1", *overrides)
    _, state = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], config), model)
    _, state = handle(task(fakes, 0, 9.0), state, model)
    assert standing(state.ledger, state.training).personal == ("a0",)
    handle(task(fakes, 20, 9.0), state, model)
    assert model.trained[-1][2].weights == weights
