"""The loop: a federation computed on paper, one client alone, and what holds in every federation whatever happens.

On paper, the model is a number on a line. An NLL is a distance, and training moves half of the way to the mean of the
records. Client a has records 8, 9, 13, and client b three records of 26. There are one warm-up round and two rounds:

    warm-up   a: 0 -> 5, b: 0 -> 13                         (3 * 5 + 3 * 13) / 6 = 9
    round 0   a: log scores 1 - 3, 0 - 4, 4 - 8: 8 is personal; b: all 17 - 13, nothing to split
              from 0 again, a: -> 11 / 2, b: -> 13          (2 * 5.5 + 3 * 13) / 5 = 10
    round 1   a: 8 is 2 away from 10 and was 2.5 from 5.5: it is enrolled, and 8, 9, 13 train
              a: 10 -> 10, b: 10 -> 18                      (3 * 10 + 3 * 18) / 6 = 14
"""

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmide.config import Config
from fedmide.data.records import Record, RecordId, with_ids
from fedmide.data.tokens import Example
from fedmide.federation.client import handle
from fedmide.federation.client_state import ClientState
from fedmide.federation.enrollment import score
from fedmide.federation.ledger import Entry, standing
from fedmide.federation.messages import ClientReply, ClientTask
from fedmide.federation.rounds import run
from fedmide.federation.runtimes.inprocess import InProcess
from fedmide.federation.server import Delivery, RoundSummary, ServerState, begin
from fedmide.federation.thresholds import RULES
from fedmide.model import adapters
from fedmide.model.interface import Adapter, TrainingPlan


def place(adapter: Adapter) -> float:
    return float(adapter["line.lora_B.weight"][0, 0])


def in_process(sites: MutableMapping[str, ClientState], model: Any) -> InProcess:
    return InProcess(sites, model, lambda state: None)


def paper_federation(fakes: Any, *overrides: str) -> tuple[list[float], list[RoundSummary], dict[str, ClientState]]:
    """The common adapter after each round, the summaries, and the sites at the end."""
    config = fakes.config("federation.rounds=2", "enrollment.rule=otsu-exact", *overrides)
    sites = {name: fakes.site(name, values, config) for name, values in (("a", [8, 9, 13]), ("b", [26, 26, 26]))}
    places, summaries = [], []

    def commit(state: ServerState, summary: RoundSummary) -> None:
        places.append(place(state.adapter))
        summaries.append(summary)

    run(begin("test", sites, fakes.adapter(0.0), config), config, in_process(sites, fakes.line()), commit)
    return places, summaries, sites


def test_a_federation_of_two_clients_and_two_rounds_is_as_on_paper(fakes: Any) -> None:
    places, summaries, sites = paper_federation(fakes)
    assert places == [9.0, 10.0, 14.0]
    assert [(summary.round, summary.stage, summary.aggregated) for summary in summaries] == [
        (-1, "warmup", True),
        (0, "train", True),
        (1, "train", True),
    ]
    assert [[row.num_records for row in summary.clients] for summary in summaries] == [[3, 3], [2, 3], [3, 3]]
    figures = [{name: metric.sum for name, metric in row.metrics.items()} for row in summaries[1].clients]
    assert [(each["shared"], each["personal"], each["warnings"], each["enrolled"]) for each in figures] == [
        (2, 1, 0, 0),
        (3, 0, 3, 0),
    ]
    assert summaries[2].clients[0].metrics["enrolled"].sum == 1
    told = [(e.round, e.record_id, e.nll_local, e.nll_aggregated, e.reason, e.local_round) for e in sites["a"].ledger]
    assert told == [
        (-1, "a0", 3.0, None, "own-nll", -1),
        (-1, "a1", 4.0, None, "own-nll", -1),
        (-1, "a2", 8.0, None, "own-nll", -1),
        (0, "a0", 3.0, 1.0, "at-or-above-threshold", -1),
        (0, "a1", 4.0, 0.0, "below-threshold", -1),
        (0, "a2", 8.0, 4.0, "below-threshold", -1),
        (0, "a0", 2.5, None, "own-nll", 0),
        (1, "a0", 2.5, 2.0, "below-threshold", 0),
    ]
    assert [entry.reason for entry in sites["b"].ledger] == ["own-nll"] * 3 + ["no-threshold"] * 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("enrollment.timing=next_round", [9.0, 10.0, (2 * 10.5 + 3 * 18) / 5]),
        ("enrollment.enabled=false", [9.0, 10.0, (2 * 10.5 + 3 * 18) / 5]),
        ("warmup.reset=false", [9.0, (2 * 10 + 3 * 17.5) / 5, None]),
        ("warmup.rounds=0", [(3 * 5 + 3 * 13) / 6, (3 * 9.5 + 3 * 17.5) / 6]),
        ("federation.rounds=0", [9.0]),
    ],
)
def test_each_setting_changes_only_its_own_subject(fakes: Any, override: str, expected: list[float | None]) -> None:
    places, _, _ = paper_federation(fakes, override)
    assert len(places) == len(expected)
    for found, value in zip(places, expected, strict=True):
        assert value is None or found == value


# --- one client alone


@given(st.integers(0, 99), st.integers(1, 5), st.integers(0, 4), st.integers(0, 2))
def test_one_client_alone_trains_as_if_there_were_no_federation(
    fakes: Any, salt: int, num_records: int, num_rounds: int, num_warmups: int
) -> None:
    """Its own adapter is the aggregated one, whatever its weight: all scores are 1, so nothing is split."""
    overrides = (f"federation.rounds={num_rounds}", f"warmup.rounds={num_warmups}", "warmup.reset=false")
    model, config = fakes.dice(salt), fakes.config(*overrides)
    site = fakes.site("a", list(range(num_records)), config)
    fresh = model.fresh(0)
    after = run(begin("test", ["a"], fresh, config), config, in_process({"a": site}, model), lambda *_: None)
    chained = fresh
    for number in range(-num_warmups, num_rounds):
        plan = TrainingPlan(config.training, config.seed, number, "a")
        *_, last = model.train(chained, list(site.training.values()), plan)
        chained = last.adapter
    assert adapters.encode(after.adapter) == adapters.encode(chained)


# --- resuming, and adding to a federation


@given(st.integers(0, 99), st.integers(-1, 3))
def test_resuming_from_any_round_ends_with_the_same_bytes(fakes: Any, salt: int, stop: int) -> None:
    config = fakes.config("federation.rounds=3", "federation.participation=0.7")
    states: dict[int, tuple[ServerState, dict[str, ClientState]]] = {}
    sites = {name: fakes.site(name, [1, 2, 3, 4], config) for name in "abc"}

    def commit(state: ServerState, summary: RoundSummary) -> None:
        states[state.round] = (state, dict(sites))

    start = begin("test", sites, fakes.dice(salt).fresh(0), config)
    states[start.round] = (start, dict(sites))
    whole = run(start, config, in_process(sites, fakes.dice(salt)), commit)
    state, other = states[stop]
    again = run(state, config, in_process(other, fakes.dice(salt)), lambda *_: None)
    assert adapters.encode(again.adapter) == adapters.encode(whole.adapter)
    assert {name: site.ledger for name, site in other.items()} == {name: site.ledger for name, site in sites.items()}


def test_a_client_without_records_takes_part_and_changes_nothing(fakes: Any) -> None:
    results = []
    for names in ("ab", "abc"):
        config = fakes.config("federation.rounds=2")
        sites = {name: fakes.site(name, [] if name == "c" else [8, 9, 13], config) for name in names}
        model = fakes.dice(5)
        after = run(begin("test", sites, model.fresh(0), config), config, in_process(sites, model), lambda *_: None)
        results.append(adapters.encode(after.adapter))
    assert results[0] == results[1]


# --- whatever happens


@dataclass
class Watched:
    """A runtime that some tasks and replies do not get through, and that checks all that a site does.

    The check is the method written a second time, slowly and plainly: what is judged, by what, and what trains.
    """

    sites: dict[str, ClientState]
    model: Any
    config: Config
    failures: Mapping[tuple[int, str], str]
    last_trained: dict[str, int] = field(default_factory=dict)

    def __call__(self, tasks: Sequence[ClientTask]) -> Iterator[Delivery]:
        for task in tasks:
            failure = self.failures.get((task.round, task.client), "")
            if failure == "down":
                yield Delivery(task.client, None, failure)
                continue
            before = self.sites[task.client]
            self.model.trained.clear()
            reply, after = handle(task, before, self.model)
            self.check(task, before, reply, after)
            again = handle(task, after, self.model)
            assert (again[0].metrics, again[1].ledger) == (reply.metrics, after.ledger)
            assert _bytes(again[0].adapter) == _bytes(reply.adapter)
            self.sites[task.client] = after
            yield Delivery(task.client, None if failure else reply, failure)

    def check(self, task: ClientTask, before: ClientState, reply: ClientReply, after: ClientState) -> None:
        records = list(before.training)
        earlier, now = standing(before.ledger, records), standing(after.ledger, records)
        assert after.ledger[: len(before.ledger)] == before.ledger
        assert sorted((*now.shared, *now.personal)) == sorted(records)
        new = after.ledger[len(before.ledger) :]
        judged = [entry for entry in new if entry.reason != "own-nll"]
        measured = [entry for entry in new if entry.reason == "own-nll"]
        if earlier.is_split:
            assert set(earlier.shared) <= set(now.shared), "what is enrolled never goes back"
        self.check_judged(task, before, judged)
        self.check_trained(task, reply, expected := self.expected(task, records, earlier, now))
        if expected and task.round >= -1:
            waiting = task.round >= 0 and not now.is_split and self.config.warmup.rounds > 0
            compared = list(now.personal) if self.config.enrollment.enabled else []
            kept = records if task.round < 0 or waiting else compared
            assert [entry.record_id for entry in measured] == kept
            assert {entry.local_round for entry in measured} <= {task.round}
            for entry in measured:
                assert entry.nll_local == self.finite_nll(reply.adapter, before, entry)
        else:
            assert measured == []
        self.check_figures(task, reply, earlier, now, judged)
        if expected:
            self.last_trained[task.client] = task.round

    def expected(self, task: ClientTask, records: list[RecordId], earlier: Any, now: Any) -> list[RecordId]:
        """The records that train."""
        if not task.train:
            return []
        if task.round < 0:
            return records
        late = self.config.enrollment.timing == "next_round" and earlier.is_split
        return list(earlier.shared if late else now.shared)

    def check_trained(self, task: ClientTask, reply: ClientReply, expected: list[RecordId]) -> None:
        if not expected:
            assert (self.model.trained, reply.adapter, reply.num_records) == ([], None, 0)
            return
        ((start, ids, plan),) = self.model.trained
        fresh = self.model.fresh(self.config.seed)
        assert start == _bytes(fresh if task.restart else task.adapter)
        assert list(ids) == expected
        assert (plan.round_number, plan.client) == (task.round, task.client)
        assert reply.num_records == len(expected)
        assert reply.adapter is not None

    def check_judged(self, task: ClientTask, before: ClientState, judged: list[Entry]) -> None:
        """By the received adapter against the NLL of the last round trained in, joined by id; each record once."""
        earlier = standing(before.ledger, before.training)
        if task.round < 0 or (earlier.is_split and not self.config.enrollment.enabled):
            due: list[RecordId] = []
        elif earlier.is_split:
            due = list(earlier.personal)
        else:
            due = list(before.training) if earlier.own else []
        assert [entry.record_id for entry in judged] == due
        for entry in judged:
            own = [each for each in before.ledger if each.record_id == entry.record_id and each.reason == "own-nll"][-1]
            assert entry.local_round == own.round == self.last_trained[task.client]
            assert entry.nll_local == own.nll_local
            assert entry.nll_aggregated == self.finite_nll(task.adapter, before, entry)
        raw = {entry.record_id: _raw_score(entry) for entry in judged}
        finite = [value for value in raw.values() if math.isfinite(value)]
        rule = self.config.enrollment.rule
        threshold = self.config.enrollment.threshold if earlier.is_split else RULES[rule](finite)
        for entry in judged:
            value = raw[entry.record_id]
            assert entry.threshold == threshold
            assert entry.score == (value if math.isfinite(value) else None)
            is_shared = threshold is None or (math.isfinite(value) and value < threshold)
            assert entry.set == ("shared" if is_shared else "personal")

    def check_figures(self, task: ClientTask, reply: ClientReply, earlier: Any, now: Any, judged: list[Entry]) -> None:
        sums = {name: metric.sum for name, metric in reply.metrics.items()}
        assert (sums["shared"], sums["personal"]) == (len(now.shared), len(now.personal))
        assert sums["not_finite"] == sum(entry.score is None for entry in judged)
        assert sums["warnings"] == sum(entry.threshold is None for entry in judged)
        moved = len(now.shared) - len(earlier.shared) if earlier.is_split else 0
        assert sums.get("enrolled", 0) == moved
        assert all(math.isfinite(value) for value in sums.values())

    def finite_nll(self, adapter: Adapter | None, state: ClientState, entry: Entry) -> float | None:
        assert adapter is not None
        (nll,) = self.model.nll(adapter, [state.training[entry.record_id]], self.config.scoring.positions)
        assert entry.num_tokens == nll.num_tokens
        return nll.mean if math.isfinite(nll.mean) else None


def _raw_score(entry: Entry) -> float:
    both = (entry.nll_aggregated, entry.nll_local)
    return score(*(math.nan if value is None else value for value in both))


def _bytes(adapter: Adapter | None) -> bytes | None:
    return None if adapter is None else adapters.encode(adapter)


def site_of(name: str, texts: list[str], config: Config) -> ClientState:
    """A site whose records may be the same text several times."""
    records = with_ids([Record(text, text) for text in texts])
    examples = {
        record.id: Example(record.id, np.full(3 + number, 7, np.int64), 2) for number, record in enumerate(records)
    }
    return ClientState(name, "test", config, examples, ())


configs = st.fixed_dictionaries(
    {
        "federation.rounds": st.sampled_from([4, 4, 3, 2, 1, 0]),
        "federation.participation": st.sampled_from([1.0, 0.5, 0.3]),
        "warmup.rounds": st.sampled_from([1, 1, 2, 0]),
        "warmup.reset": st.booleans(),
        "enrollment.enabled": st.sampled_from([True, True, True, False]),
        "enrollment.timing": st.sampled_from(["same_round", "next_round"]),
        "enrollment.rule": st.sampled_from(["median", "otsu-exact", "otsu-256"]),
        "enrollment.threshold": st.sampled_from([0.2, 1.0, 3.0]),
        "training.epochs": st.integers(1, 2),
        "scoring.positions": st.sampled_from(["all", "response"]),
        "seed": st.integers(0, 3),
    }
)
# most often what makes much happen: several clients with several records each, some the same
num_records = st.sampled_from([6, 5, 4, 3, 2, 1, 0])
sites_texts = st.fixed_dictionaries({name: num_records.map(lambda count: list("ABAACB"[:count])) for name in "abc"})
tasks = [(number, name) for number in range(-2, 4) for name in "abc"]
failures = st.dictionaries(st.sampled_from(tasks), st.sampled_from(["down", "lost"]), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    values=configs,
    data=sites_texts,
    salt=st.integers(0, 1000),
    odd=st.sampled_from([0.1, 0.0, 0.4, 1.0]),
    failures=failures,
)
def test_nothing_is_lost_and_the_method_is_followed_whatever_happens(
    fakes: Any,
    values: dict[str, Any],
    data: dict[str, list[str]],
    salt: int,
    odd: float,
    failures: dict[tuple[int, str], str],
) -> None:
    config = fakes.config(*(f"{name}={str(value).lower()}" for name, value in values.items()))
    sites = {name: site_of(name, texts, config) for name, texts in data.items()}
    model = fakes.dice(salt, odd)
    runtime = Watched(dict(sites), model, config, failures)
    begun = begin("test", sorted(sites), model.fresh(0), config)
    states: list[ServerState] = []
    after = run(begun, config, runtime, lambda state, summary: states.append(state))
    assert after.round == max(config.federation.rounds, -config.warmup.rounds)
    assert [state.round for state in states] == list(range(1 - config.warmup.rounds, config.federation.rounds + 1))
    for name, site in runtime.sites.items():
        now = standing(site.ledger, sites[name].training)
        assert sorted((*now.shared, *now.personal)) == sorted(sites[name].training)
        assert site.training == sites[name].training
        if config.warmup.rounds == 0:
            assert (site.ledger, now.personal) == ((), ())
