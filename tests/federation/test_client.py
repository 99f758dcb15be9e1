"""A site's answer to a task: the stages one by one, computed by hand with a model that is a number on a line."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide.data.records import RecordId
from fedmide.errors import MessageError
from fedmide.federation.client import handle
from fedmide.federation.client_state import ClientState
from fedmide.federation.ledger import Entry, standing
from fedmide.federation.messages import ClientReply, ClientTask, Metric
from fedmide.model.interface import Adapter, Epoch, Nll, TrainingPlan, personalization_plan

EXACT = "enrollment.rule=otsu-exact"


def place(adapter: Adapter | None) -> float:
    """The position of a line model's adapter."""
    assert adapter is not None
    return float(adapter["line.lora_B.weight"][0, 0])


def task(fakes: Any, number: int, at: float, **changes: Any) -> ClientTask:
    return ClientTask("test", "a", number, fakes.adapter(at), **changes)


def entries(state: ClientState, number: int) -> list[Entry]:
    return [entry for entry in state.ledger if entry.round == number]


def warmed_up(fakes: Any, *overrides: str) -> ClientState:
    """Site a with records 8, 9 and 13 after the warm-up, in which its local adapter moved to 5."""
    site = fakes.site("a", [8, 9, 13], fakes.config(EXACT, *overrides))
    state: ClientState = handle(task(fakes, -1, 0.0), site, fakes.line())[1]
    return state


def split(fakes: Any, *overrides: str) -> ClientState:
    """The same after round 0 under the common adapter 9: record 8 is personal, its local NLL 2.5 (from 5.5)."""
    state: ClientState = handle(task(fakes, 0, 9.0, restart=True), warmed_up(fakes, *overrides), fakes.line())[1]
    return state


# --- whom it is for


@pytest.mark.parametrize("changes", [{"client": "b"}, {"federation": "other"}])
def test_a_task_for_another_is_refused(fakes: Any, changes: dict[str, str]) -> None:
    site = fakes.site("a", [1], fakes.config())
    with pytest.raises(MessageError, match="came to 'a'"):
        handle(replace(task(fakes, 0, 0.0), **changes), site, fakes.line())


# --- warm-up


def test_the_warm_up_trains_on_all_and_measures_all_under_the_own_adapter(fakes: Any) -> None:
    site = fakes.site("a", [8, 9, 13], fakes.config(EXACT))
    reply, after = handle(task(fakes, -1, 0.0), site, fakes.line())
    assert (place(reply.adapter), reply.num_records) == (5.0, 3)
    assert [(entry.record_id, entry.nll_local, entry.num_tokens) for entry in after.ledger] == [
        ("a0", 3.0, 2),
        ("a1", 4.0, 3),
        ("a2", 8.0, 4),
    ]
    assert {(entry.reason, entry.set, entry.local_round) for entry in after.ledger} == {("own-nll", "shared", -1)}
    assert reply.metrics["loss"] == Metric(2 * 8.0 + 3 * 9.0 + 4 * 13.0, 9)
    assert reply.metrics["scored_tokens"] == Metric(9)
    assert (reply.metrics["shared"], reply.metrics["personal"]) == (Metric(3), Metric(0))


def test_only_the_last_warm_up_round_is_measured(fakes: Any) -> None:
    site = fakes.site("a", [8, 9, 13], fakes.config("warmup.rounds=2"))
    reply, after = handle(task(fakes, -2, 0.0), site, fakes.line())
    assert (place(reply.adapter), after.ledger) == (5.0, ())


# --- the split


def test_the_split_compares_the_received_adapter_with_the_own_and_trains_on_the_shared_from_a_fresh_one(
    fakes: Any,
) -> None:
    reply, after = handle(task(fakes, 0, 9.0, restart=True), warmed_up(fakes), fakes.line())
    threshold = (math.exp(-4) + math.exp(-2)) / 2
    judged, (own,) = entries(after, 0)[:3], entries(after, 0)[3:]
    assert [(entry.record_id, entry.nll_local, entry.nll_aggregated, entry.score) for entry in judged] == [
        ("a0", 3.0, 1.0, math.exp(-2)),
        ("a1", 4.0, 0.0, math.exp(-4)),
        ("a2", 8.0, 4.0, math.exp(-4)),
    ]
    assert [entry.set for entry in judged] == ["personal", "shared", "shared"]
    assert {(entry.threshold, entry.local_round) for entry in judged} == {(threshold, -1)}
    assert (place(reply.adapter), reply.num_records) == ((0 + (9 + 13) / 2) / 2, 2)
    assert own == Entry(0, RecordId("a0"), 2, 2.5, None, None, "personal", "own-nll", None, 0)
    assert reply.metrics["enrolled"] == Metric(0)
    assert (reply.metrics["shared"], reply.metrics["personal"]) == (Metric(2), Metric(1))


def test_without_a_restart_it_trains_from_the_received_adapter(fakes: Any) -> None:
    reply, _ = handle(task(fakes, 0, 9.0), warmed_up(fakes), fakes.line())
    assert place(reply.adapter) == (9 + 11) / 2


def test_a_site_not_drawn_for_round_0_only_scores(fakes: Any) -> None:
    reply, after = handle(task(fakes, 0, 9.0, train=False), warmed_up(fakes), fakes.line())
    assert (reply.adapter, reply.num_records) == (None, 0)
    assert standing(after.ledger, after.training).personal == ("a0",)
    assert [entry.reason for entry in entries(after, 0)] == ["at-or-above-threshold", *["below-threshold"] * 2]


def test_a_site_that_missed_round_0_splits_at_the_next_task_by_the_warm_up(fakes: Any) -> None:
    reply, after = handle(task(fakes, 3, 9.0), warmed_up(fakes), fakes.line())
    assert standing(after.ledger, after.training).personal == ("a0",)
    assert {entry.round - entry.local_round for entry in entries(after, 3)[:3]} == {4}
    assert (place(reply.adapter), reply.num_records) == ((9 + 11) / 2, 2)


def test_a_site_that_missed_the_warm_up_measures_after_its_first_training_and_splits_at_the_next_task(
    fakes: Any,
) -> None:
    site = fakes.site("a", [8, 9, 13], fakes.config(EXACT))
    reply, after = handle(task(fakes, 0, 9.0, restart=True), site, fakes.line())
    assert (place(reply.adapter), reply.num_records) == (5.0, 3)
    assert [entry.nll_local for entry in after.ledger] == [3.0, 4.0, 8.0]
    _, later = handle(task(fakes, 1, 9.0), after, fakes.line())
    assert [entry.score for entry in entries(later, 1)[:3]] == [math.exp(-2), math.exp(-4), math.exp(-4)]
    assert standing(later.ledger, later.training).personal == ("a0",)


def test_without_a_warm_up_nothing_is_measured_and_all_is_shared(fakes: Any) -> None:
    state = fakes.site("a", [8, 9, 13], fakes.config("warmup.rounds=0"))
    for number in range(3):
        reply, state = handle(task(fakes, number, 9.0), state, fakes.line())
        assert (reply.num_records, state.ledger) == (3, ())


def test_one_record_can_not_be_split_which_is_a_warning(fakes: Any) -> None:
    state = fakes.site("a", [8], fakes.config())
    _, state = handle(task(fakes, -1, 0.0), state, fakes.line())
    reply, after = handle(task(fakes, 0, 9.0), state, fakes.line())
    assert [entry.reason for entry in entries(after, 0)] == ["no-threshold"]
    assert (reply.metrics["warnings"], reply.metrics["shared"]) == (Metric(1), Metric(1))
    assert "loss" not in reply.metrics  # it would be that record's own


# --- enrollment


def test_a_record_that_the_received_adapter_predicts_better_is_enrolled_and_trains_at_once(fakes: Any) -> None:
    reply, after = handle(task(fakes, 1, 10.0), split(fakes), fakes.line())
    (entry,) = entries(after, 1)
    assert entry == Entry(1, RecordId("a0"), 2, 2.5, 2.0, math.exp(-0.5), "shared", "below-threshold", 1.0, 0)
    assert (place(reply.adapter), reply.num_records) == ((10 + 10) / 2, 3)
    assert (reply.metrics["enrolled"], reply.metrics["personal"]) == (Metric(1), Metric(0))


def test_with_the_original_timing_it_trains_from_the_next_round_on(fakes: Any) -> None:
    state = split(fakes, "enrollment.timing=next_round")
    reply, state = handle(task(fakes, 1, 10.0), state, fakes.line())
    assert (place(reply.adapter), reply.num_records) == ((10 + 11) / 2, 2)
    assert standing(state.ledger, state.training).personal == ()
    assert reply.metrics["enrolled"] == Metric(1)
    reply, _ = handle(task(fakes, 2, 10.0), state, fakes.line())
    assert (place(reply.adapter), reply.num_records) == ((10 + 10) / 2, 3)


def test_a_score_of_exactly_the_threshold_stays_personal_and_is_measured_again(fakes: Any) -> None:
    reply, after = handle(task(fakes, 1, 10.5), split(fakes), fakes.line())  # 2.5 away from 8, as the own adapter was
    judged, own = entries(after, 1)
    assert (judged.score, judged.set, judged.reason) == (1.0, "personal", "at-or-above-threshold")
    assert own.nll_local == abs(place(reply.adapter) - 8) == abs((10.5 + 11) / 2 - 8)


@pytest.mark.parametrize(("threshold", "members"), [("0.6", "personal"), ("0.61", "shared")])
def test_the_threshold_of_enrollment_is_a_setting(fakes: Any, threshold: str, members: str) -> None:
    state = split(fakes, f"enrollment.threshold={threshold}")  # the score is exp(-0.5), 0.6065
    _, after = handle(task(fakes, 1, 10.0), state, fakes.line())
    assert standing(after.ledger, after.training).sets["a0"] == members


def test_with_enrollment_off_the_split_stands(fakes: Any) -> None:
    _, after = handle(task(fakes, 1, 10.0), split(fakes, "enrollment.enabled=false"), fakes.line())
    assert standing(after.ledger, after.training).personal == ("a0",)
    assert not entries(after, 1)  # nothing will be compared, so nothing is measured


def test_a_site_that_sat_out_compares_with_the_last_round_it_trained_in(fakes: Any) -> None:
    """Round 1 is trained in, 2 and 3 are not; in round 4 the NLL is that of round 1, three rounds old."""
    _, state = handle(task(fakes, 1, 12.0), split(fakes), fakes.line())
    own = entries(state, 1)[-1]
    _, state = handle(task(fakes, 4, 11.0), state, fakes.line())
    judged = entries(state, 4)[0]
    assert (own.nll_local, judged.nll_local) == (3.5, 3.5)  # at (12 + 11) / 2
    assert (judged.nll_aggregated, judged.round - judged.local_round, judged.set) == (3.0, 3, "shared")


def test_an_empty_shared_set_is_not_trained_on_and_weighs_nothing(fakes: Any) -> None:
    state = warmed_up(fakes, "enrollment.rule=otsu-256")
    state = replace(
        state, training={name: state.training[name] for name in list(state.training)[:2]}, ledger=state.ledger[:2]
    )
    reply, after = handle(task(fakes, 0, 9.0, restart=True), state, fakes.line())
    assert standing(after.ledger, after.training).shared == ()  # the lowest score is the left edge of its own bin
    assert (reply.adapter, reply.num_records, "loss" in reply.metrics) == (None, 0, False)
    reply, after = handle(task(fakes, 1, 20.0), after, fakes.line())
    assert {entry.local_round for entry in entries(after, 1)} == {-1}
    assert (reply.adapter, len(standing(after.ledger, after.training).personal)) == (None, 2)


class Odd:
    """A line model whose NLL of some records is not finite at some positions."""

    def __init__(self, fakes: Any, odd: Mapping[tuple[float, int], Nll]) -> None:
        self.line, self.odd = fakes.line(), odd

    def nll(self, adapter: Adapter, examples: Sequence[Any], positions: Any) -> tuple[Nll, ...]:
        usual = self.line.nll(adapter, examples, positions)
        keys = [(place(adapter), int(example.ids[0])) for example in examples]
        return tuple(self.odd.get(key, value) for key, value in zip(keys, usual, strict=True))

    def train(self, adapter: Adapter, examples: Sequence[Any], plan: TrainingPlan) -> Iterator[Epoch]:
        for epoch in self.line.train(adapter, examples, plan):
            yield replace(epoch, loss=sum(self.nll(adapter, examples, "all"), Nll(0.0, 0)))

    def fresh(self, seed: int) -> Adapter:
        adapter: Adapter = self.line.fresh(seed)
        return adapter


@pytest.mark.parametrize("bad", [Nll(math.nan, 4), Nll(math.inf, 4), Nll(-math.inf, 4), Nll(0.0, 0)])
def test_a_record_whose_nll_is_not_a_number_is_personal_and_counted_and_never_lost(fakes: Any, bad: Nll) -> None:
    """Record 13 fails at the split and in round 1, and is explained well in round 2."""
    model = Odd(fakes, {(9.0, 13): bad, (10.0, 13): bad})
    reply, state = handle(task(fakes, 0, 9.0, restart=True), warmed_up(fakes), model)
    failed = entries(state, 0)[2]
    assert (failed.nll_aggregated, failed.score, failed.set, failed.reason) == (None, None, "personal", "not-finite")
    assert reply.metrics["not_finite"] == Metric(1)
    reply, state = handle(task(fakes, 1, 10.0), state, model)
    assert reply.metrics["not_finite"] == Metric(1)
    assert "a2" in standing(state.ledger, state.training).personal
    reply, state = handle(task(fakes, 2, 13.0), state, model)
    assert reply.metrics["not_finite"] == Metric(0)
    assert "a2" in standing(state.ledger, state.training).shared


def test_a_loss_that_is_not_a_number_is_left_out_of_the_reply(fakes: Any) -> None:
    model = Odd(fakes, {(0.0, 13): Nll(math.nan, 4)})
    reply, _ = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], fakes.config()), model)
    assert "loss" not in reply.metrics
    assert reply.metrics["trained_tokens"] == Metric(9)


def test_failures_are_counted_even_if_nothing_can_be_split(fakes: Any) -> None:
    model = Odd(fakes, {(9.0, 9): Nll(math.nan, 3), (9.0, 13): Nll(math.nan, 4)})
    reply, _ = handle(task(fakes, 0, 9.0), warmed_up(fakes), model)
    assert (reply.metrics["warnings"], reply.metrics["not_finite"]) == (Metric(3), Metric(2))


# --- training


def test_the_plan_names_round_and_client(fakes: Any) -> None:
    model, config = fakes.dice(), fakes.config("seed=7", "training.epochs=2")
    handle(task(fakes, 5, 0.0), fakes.site("a", [1, 2], config), model)
    ((_, records, plan),) = model.trained
    assert records == ("a0", "a1")
    assert plan == TrainingPlan(config.training, 7, 5, "a")


def test_loss_and_trained_tokens_are_over_all_passes(fakes: Any) -> None:
    site = fakes.site("a", [8, 8], fakes.config("training.epochs=2"))  # 2 and 3 tokens; from 0 to 4 to 6
    reply, _ = handle(task(fakes, 5, 0.0), site, fakes.line())
    assert reply.metrics["loss"] == Metric(5 * 8.0 + 5 * 4.0, 10)
    assert (reply.metrics["trained_tokens"], reply.metrics["steps"]) == (Metric(10), Metric(2))
    assert place(reply.adapter) == 6.0


@pytest.mark.parametrize(("scored", "trained"), [("response", "all"), ("all", "response")])
def test_scored_and_trained_positions_are_two_settings(fakes: Any, scored: str, trained: str) -> None:
    """The records have 2, 3 and 4 predicted tokens, one of them the prompt's."""
    config = fakes.config(f"scoring.positions={scored}", f"training.positions={trained}")
    reply, after = handle(task(fakes, -1, 0.0), fakes.site("a", [8, 9, 13], config), fakes.line())
    num_tokens = {"all": [2, 3, 4], "response": [1, 2, 3]}
    assert [entry.num_tokens for entry in after.ledger] == num_tokens[scored]
    assert reply.metrics["trained_tokens"].sum == sum(num_tokens[trained])
    _, after = handle(task(fakes, 0, 9.0), after, fakes.line())
    assert [entry.num_tokens for entry in entries(after, 0)[:3]] == num_tokens[scored]


# --- again


def told(reply: ClientReply, state: ClientState) -> tuple[Any, ...]:
    adapter = None if state.adapter is None else place(state.adapter)
    return replace(reply, adapter=None), None if reply.adapter is None else place(reply.adapter), state.ledger, adapter


@pytest.mark.parametrize("number", [-1, 0, 1, 2, 20])
def test_a_task_that_is_handled_again_is_answered_the_same_and_done_once(fakes: Any, number: int) -> None:
    state, model = fakes.site("a", [8, 9, 13], fakes.config(EXACT)), fakes.line()
    for earlier in range(-1, number):
        _, state = handle(task(fakes, earlier, 9.0 + earlier), state, model)
    once = handle(task(fakes, number, 10.0), state, model)
    twice = handle(task(fakes, number, 10.0), once[1], model)
    assert told(*twice) == told(*once)


def test_a_repeated_round_forgets_all_later_entries(fakes: Any) -> None:
    """As a site does that was stopped after it wrote its ledger, before the server wrote the round."""
    state = split(fakes)
    _, further = handle(task(fakes, 1, 10.0), state, fakes.line())
    _, further = handle(task(fakes, 2, 10.0), further, fakes.line())
    assert told(*handle(task(fakes, 1, 12.0), further, fakes.line())) == told(
        *handle(task(fakes, 1, 12.0), state, fakes.line())
    )


# --- the order of the records


@given(st.permutations([8, 9, 13, 2, 30]), st.permutations(range(5)))
def test_a_site_judges_each_record_alike_in_whatever_order_they_come(
    fakes: Any, values: list[int], order: list[int]
) -> None:
    """The original joins by position; there this fails from its second round on."""
    state = fakes.site("a", values, fakes.config(EXACT))
    ids = list(state.training)
    other = replace(state, training={ids[index]: state.training[ids[index]] for index in order})
    for number, at in ((-1, 0.0), (0, 9.0), (1, 11.0), (2, 8.0)):
        _, state = handle(task(fakes, number, at), state, fakes.line())
        _, other = handle(task(fakes, number, at), other, fakes.line())
    assert sorted(state.ledger, key=repr) == sorted(other.ledger, key=repr)


# --- personalization


class Path:
    """A model whose training moves through given positions, with a given validation loss at each."""

    def __init__(self, fakes: Any, losses: Sequence[float]) -> None:
        self.fakes, self.losses = fakes, losses
        self.trained: list[tuple[float, list[str], TrainingPlan]] = []

    def fresh(self, seed: int) -> Adapter:
        raise AssertionError("personalization starts from the common adapter")

    def nll(self, adapter: Adapter, examples: Sequence[Any], positions: Any) -> tuple[Nll, ...]:
        return tuple(Nll(4 * self.losses[int(place(adapter)) - 1], 4) for _ in examples)

    def train(self, adapter: Adapter, examples: Sequence[Any], plan: TrainingPlan) -> Iterator[Epoch]:
        self.trained.append((place(adapter), [example.id for example in examples], plan))
        for number in range(1, plan.settings.epochs + 1):
            yield Epoch(self.fakes.adapter(number), Nll(1.0, 10), 3 * number)


def personalized(fakes: Any, losses: Sequence[float], *overrides: str, num_validation: int = 2) -> Any:
    config = fakes.config(EXACT, f"personalization.epochs={len(losses)}", *overrides)
    state = replace(split(fakes), config=config)
    validation = tuple(fakes.site("v", [1] * num_validation, config).training.values())
    model = Path(fakes, losses)
    reply, after = handle(task(fakes, 20, 50.0), replace(state, validation=validation), model)
    return model, reply, after


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0, 2.0, 2.5], 2),
        ([3.0, 2.0, 2.0], 2),  # the earlier of equals
        ([1.0, 2.0, 2.5], 1),
        ([3.0, math.nan, 2.5], 3),
        ([math.nan, math.inf, 9.0], 3),
    ],
)
def test_the_epoch_with_the_lowest_validation_loss_is_kept_on_the_site(
    fakes: Any, losses: list[float], kept: int
) -> None:
    _, reply, after = personalized(fakes, losses)
    assert place(after.adapter) == kept
    assert (reply.adapter, reply.num_records) == (None, 0)
    assert (reply.metrics["epoch"], reply.metrics["steps"]) == (Metric(kept), Metric(9))
    assert reply.metrics["trained_tokens"] == Metric(30)
    expected = Metric(2 * 4 * losses[kept - 1], 8) if math.isfinite(losses[kept - 1]) else None
    assert reply.metrics.get("validation_loss") == expected


@pytest.mark.parametrize("losses", [[math.nan, math.nan], [math.inf, math.nan], [math.inf, math.inf]])
def test_if_no_epoch_validates_the_common_adapter_is_kept(fakes: Any, losses: list[float]) -> None:
    _, reply, after = personalized(fakes, losses)
    assert (place(after.adapter), reply.metrics["epoch"]) == (50.0, Metric(0))
    assert "validation_loss" not in reply.metrics


@pytest.mark.parametrize(("num_validation", "kept"), [(0, 2), (2, 1)])
def test_an_adapter_that_is_not_finite_is_never_kept(fakes: Any, num_validation: int, kept: int) -> None:
    """Epochs at 1, 2 and nowhere: without validation the last that is somewhere, with it the best of those."""
    state = replace(split(fakes), config=fakes.config(EXACT, "personalization.epochs=3"))
    validation = tuple(fakes.site("v", [1] * num_validation, state.config).training.values())

    class RunsOff(Path):
        def train(self, adapter: Adapter, examples: Sequence[Any], plan: TrainingPlan) -> Iterator[Epoch]:
            *finite, last = super().train(adapter, examples, plan)
            yield from finite
            yield replace(last, adapter={name: array * math.nan for name, array in last.adapter.items()})

        def nll(self, adapter: Adapter, examples: Sequence[Any], positions: Any) -> tuple[Nll, ...]:
            at = place(adapter)
            return tuple(Nll(4 * self.losses[int(at) - 1 if math.isfinite(at) else -1], 4) for _ in examples)

    reply, after = handle(task(fakes, 20, 50.0), replace(state, validation=validation), RunsOff(fakes, [2.0, 3.0, 1.0]))
    assert (place(after.adapter), reply.metrics["epoch"]) == (kept, Metric(kept))


@pytest.mark.parametrize(("batch_size", "max_steps", "seen"), [(1, 1, 1), (2, 1, 2), (2, 2, 3), (32, 0, 3)])
def test_weight_and_loss_are_of_the_records_that_were_trained_on(
    fakes: Any, batch_size: int, max_steps: int, seen: int
) -> None:
    knobs = (f"training.batch_size={batch_size}", f"training.max_steps={max_steps}", "training.epochs=2")
    site = fakes.site("a", [8, 9, 13], fakes.config(EXACT, *knobs))

    class Steps(type(fakes.line())):  # type: ignore[misc]
        def train(self, adapter: Adapter, examples: Sequence[Any], plan: TrainingPlan) -> Iterator[Epoch]:
            for epoch in super().train(adapter, examples, plan):
                yield replace(epoch, steps=max_steps or epoch.steps)

    reply, _ = handle(task(fakes, -1, 0.0), site, Steps())
    assert reply.num_records == seen
    assert ("loss" in reply.metrics) == (seen > 1)


def test_without_validation_records_the_last_epoch_is_kept(fakes: Any) -> None:
    _, reply, after = personalized(fakes, [1.0, 2.0, 3.0], num_validation=0)
    assert (place(after.adapter), "validation_loss" in reply.metrics) == (3.0, False)


def test_the_loss_of_a_single_validation_record_stays_on_the_site(fakes: Any) -> None:
    _, reply, after = personalized(fakes, [3.0, 1.0], num_validation=1)
    assert (place(after.adapter), "validation_loss" in reply.metrics) == (2.0, False)


@pytest.mark.parametrize(
    ("records", "expected"), [("all", ["a0", "a1", "a2"]), ("shared", ["a1", "a2"]), ("personal", ["a0"])]
)
def test_it_tunes_the_common_adapter_on_the_chosen_records(fakes: Any, records: str, expected: list[str]) -> None:
    rate = "personalization.learning_rate=0.5"
    model, _, after = personalized(fakes, [1.0], f"personalization.records={records}", rate, "training.max_steps=1")
    ((start, trained, plan),) = model.trained
    assert (start, trained) == (50.0, expected)
    assert plan == personalization_plan(after.config, "a")
    assert (plan.settings.epochs, plan.settings.learning_rate, plan.settings.max_steps) == (1, 0.5, 0)
    assert after.ledger == split(fakes).ledger


def test_it_tunes_on_personal_records_before_the_shared_ones(fakes: Any) -> None:
    config = fakes.config("enrollment.rule=otsu-exact", "personalization.epochs=1")
    for records, order, num_first in (("all", ["a0", "a1", "a2"], 0), ("personal-first", ["a2", "a0", "a1"], 1)):
        chosen = config.personalization.model_copy(update={"records": records})
        model, site = Path(fakes, [1.0]), fakes.site("a", [9, 13, 8], config)
        _, state = handle(task(fakes, -1, 0.0), site, fakes.line())
        _, state = handle(task(fakes, 0, 9.0), state, fakes.line())
        assert standing(state.ledger, state.training).personal == ("a2",)
        state = replace(state, config=config.model_copy(update={"personalization": chosen}))
        handle(task(fakes, 20, 9.0), state, model)
        ((_, trained, plan),) = model.trained
        assert (trained, plan.num_first) == (order, num_first)


def test_without_epochs_or_records_the_aggregated_adapter_is_the_personal_one(fakes: Any) -> None:
    for overrides in ([], ["personalization.records=personal", "personalization.epochs=3"]):
        config = fakes.config("personalization.epochs=0", *overrides)
        reply, after = handle(task(fakes, 20, 50.0), fakes.site("a", [1, 2], config), Path(fakes, []))
        assert (place(after.adapter), reply.adapter, reply.metrics) == (50.0, None, {})


def test_with_the_whole_line_model_personalization_moves_toward_the_own_records(fakes: Any) -> None:
    config = fakes.config("personalization.epochs=3")
    validation = tuple(fakes.site("v", [9], config).training.values())
    site = fakes.site("a", [10, 10], config, validation=validation)
    _, after = handle(task(fakes, 20, 2.0), site, fakes.line())  # 6, 8, 9
    assert place(after.adapter) == 9.0


# --- splits to compare with


@pytest.mark.parametrize(
    ("how", "personal", "reasons"),
    [("score", ["a0"], {"below-threshold", "at-or-above-threshold"}), ("reversed", ["a2"], {"ablation"})],
)
def test_the_split_can_be_made_otherwise(fakes: Any, how: str, personal: list[str], reasons: set[str]) -> None:
    """Under 9 the scores of 8, 9 and 13 are exp(1 - 3), exp(0 - 4) and exp(4 - 8): of the two that are equal the first
    by name is shared."""
    site = warmed_up(fakes, f"enrollment.split={how}")
    _, state = handle(task(fakes, 0, 9.0, restart=True), site, fakes.line())
    assert list(standing(state.ledger, state.training).personal) == personal
    assert {entry.reason for entry in entries(state, 0) if entry.score is not None} == reasons


def test_a_random_split_is_the_sites_own_and_stays_when_handled_again(fakes: Any) -> None:
    site = fakes.site("a", list(range(30)), fakes.config(EXACT, "enrollment.split=random"))
    _, warmed = handle(task(fakes, -1, 0.0), site, fakes.line())
    once = handle(task(fakes, 0, 3.0), warmed, fakes.line())[1]
    again = handle(task(fakes, 0, 3.0), once, fakes.line())[1]
    assert once.ledger == again.ledger
    assert 0 < len(standing(once.ledger, once.training).personal) < 30


def test_as_many_are_enrolled_by_lot_as_by_their_scores(fakes: Any) -> None:
    moved: dict[str, set[RecordId]] = {}
    for choice in ("score", "random"):
        config = fakes.config("enrollment.rule=median", f"enrollment.choice={choice}")
        _, state = handle(task(fakes, -1, 0.0), fakes.site("a", list(range(30)), config), fakes.line())
        _, state = handle(task(fakes, 0, 3.0), state, fakes.line())
        before = standing(state.ledger, state.training).personal
        _, after = handle(task(fakes, 1, 22.0), state, fakes.line())
        assert handle(task(fakes, 1, 22.0), after, fakes.line())[1].ledger == after.ledger
        moved[choice] = set(before) - set(standing(after.ledger, after.training).personal)
        assert len(before) > 17, "so that a lot can differ"
    assert 0 < len(moved["score"]) == len(moved["random"]) <= 17
    assert moved["score"] != moved["random"]
