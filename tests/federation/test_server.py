"""The server: the clients that it asks, the replies that count, and that a bad one stops no other."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmide import methods
from fedmide.config import Config
from fedmide.federation.messages import MAX_RECORDS, ClientReply, Metric
from fedmide.federation.server import Delivery, ServerState, apply, asked, begin, plan, stage_of
from fedmide.methods import Method, registry
from fedmide.methods.aggregation import weighted_mean
from fedmide.methods.method import Common
from fedmide.model import adapters
from fedmide.model.interface import Adapter

SHAPES = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (3, 2)}
CLIENTS = tuple("abcdefgh")


def adapter_of(value: float) -> Adapter:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def state_of(number: int, clients: tuple[str, ...] = CLIENTS) -> ServerState:
    return ServerState("f", clients, number, adapter_of(0.5))


# --- plan


@pytest.mark.parametrize(
    ("number", "stage"), [(-2, "warmup"), (-1, "warmup"), (0, "train"), (4, "train"), (5, "personalize")]
)
def test_a_round_belongs_to_a_stage(fakes: Any, number: int, stage: str) -> None:
    assert stage_of(number, fakes.config("federation.rounds=5", "warmup.rounds=2")) == stage


def test_it_begins_with_the_warm_up(fakes: Any) -> None:
    assert begin("f", iter("ab"), adapter_of(1.0), fakes.config("warmup.rounds=2")).round == -2
    assert begin("f", "ab", adapter_of(1.0), fakes.config("warmup.rounds=0")).round == 0
    assert begin("f", iter("ab"), adapter_of(1.0), fakes.config()).clients == ("a", "b")


@given(st.integers(-2, 6), st.integers(1, 8), st.floats(0.01, 1.0), st.booleans(), st.integers(0, 2))
def test_the_clients_that_are_asked_to_train_or_to_score(
    fakes: Any, number: int, num_clients: int, participation: float, reset: bool, num_warmups: int
) -> None:
    config = fakes.config(
        f"federation.participation={participation}",
        "federation.rounds=5",
        f"warmup.rounds={num_warmups}",
        f"warmup.reset={str(reset).lower()}",
    )
    state = state_of(number, CLIENTS[:num_clients])
    tasks = plan(state, config)
    asked, training = [task.client for task in tasks], [task.client for task in tasks if task.train]
    assert asked == [name for name in state.clients if name in asked], "in client order, each once"
    assert all((task.federation, task.round) == ("f", number) and task.adapter is state.adapter for task in tasks)
    if number < 0 or number >= 5:
        assert asked == training == list(state.clients)
    else:
        assert len(training) == max(1, round(participation * num_clients))
        assert asked == (list(state.clients) if number == 0 and num_warmups else training)
    is_restart = number == 0 and num_warmups > 0 and reset
    assert {task.restart for task in tasks} == {is_restart}


def test_adapters_are_made_once_for_each_task_and_none_to_judge_replies(
    fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def down(common: Common, client: str, config: Config) -> Adapter:
        made.append(client)
        return common.adapter

    monkeypatch.setattr(registry, "_OWN", {})
    methods.register(Method("own:counted", "counts what it sends", "nowhere", down=down))
    config = fakes.config("method=own:counted", "federation.participation=0.5")
    tasks = plan(state_of(2), config)
    assert made == [task.client for task in tasks] and len(made) == 4
    assert asked(state_of(2), config) == dict.fromkeys(made, True)
    deliveries = [delivery(task.client) for task in tasks]
    for limit, expected in ((0.0, []), (1e-3, made[:])):
        made.clear()
        replies = config.replies.model_copy(update={"max_update_norm": limit, "oversized": "clip"})
        apply(state_of(2), deliveries, config.model_copy(update={"replies": replies}))
        assert made == expected, "with a limit, what each reply is measured from, once"


def drawn(fakes: Any, number: int, *overrides: str, clients: tuple[str, ...] = CLIENTS) -> set[str]:
    config = fakes.config("federation.participation=0.5", *overrides)
    return {task.client for task in plan(state_of(number, clients), config) if task.train}


def test_the_draw_follows_from_seed_and_round_alone(fakes: Any) -> None:
    draws = [drawn(fakes, number) for number in range(20)]
    assert draws == [drawn(fakes, number) for number in reversed(range(20))][::-1]
    assert draws == [drawn(fakes, number, "warmup.rounds=3", "training.epochs=9") for number in range(20)]
    assert len({frozenset(each) for each in draws}) > 10
    assert [drawn(fakes, number, "seed=1") for number in range(20)] != draws


def test_the_draw_is_fair(fakes: Any) -> None:
    """200 rounds, each client drawn half of the time: a standard deviation is 7."""
    counts = Counter(name for number in range(200) for name in drawn(fakes, number, "federation.rounds=200"))
    assert sum(counts.values()) == 200 * 4
    assert all(abs(counts[name] - 100) < 35 for name in CLIENTS)


def test_neither_order_nor_company_changes_a_clients_own_draw(fakes: Any) -> None:
    """Those drawn from a part of the clients are the foremost of that part in the draw of all."""
    for number in range(1, 10):
        assert drawn(fakes, number, clients=CLIENTS[::-1]) == drawn(fakes, number)
        few, all_drawn = drawn(fakes, number, clients=CLIENTS[:6]), drawn(fakes, number) & set(CLIENTS[:6])
        assert len(few) == 3
        assert few <= all_drawn or all_drawn <= few


# --- apply


def delivery(sender: str, value: float = 1.0, num_records: int = 3, **changes: Any) -> Delivery:
    """A good reply, except for the changes."""
    reply = ClientReply("f", sender, 2, adapter_of(value), num_records, {"loss": Metric(6.0, 3)})
    return Delivery(sender, replace(reply, **changes), "", 10, 20, 0.5)


def test_the_adapter_is_the_mean_weighted_by_records_and_the_round_continues(fakes: Any) -> None:
    state, summary = apply(state_of(2), [delivery("a", 1.0, 3), delivery("b", 5.0, 1)], fakes.config())
    assert (state.round, state.federation, state.clients) == (3, "f", CLIENTS)
    assert {float(value) for array in state.adapter.values() for value in array.flat} == {2.0}
    assert (summary.round, summary.stage, summary.aggregated) == (2, "train", True)
    row = summary.clients[1]
    assert (row.client, row.num_records, row.bytes_down, row.bytes_up, row.seconds) == ("b", 1, 10, 20, 0.5)
    assert (row.metrics, row.refused) == ({"loss": Metric(6.0, 3)}, "")


NAN = {**adapter_of(1.0), "x.lora_B.weight": np.full((3, 2), np.nan, np.float32)}
HIGHER_RANK = {"x.lora_A.weight": np.ones((4, 3), np.float32), "x.lora_B.weight": np.ones((3, 4), np.float32)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter": {"x.lora_A.weight": np.ones((2, 3), np.float32)}}, "1 arrays missing, first 'x.lora_B.weight'"),
        ({"adapter": {**adapter_of(1.0), "y": np.ones(1, np.float32)}}, "1 arrays unknown, first 'y'"),
        ({"adapter": {}}, "2 arrays missing"),
        ({"adapter": HIGHER_RANK}, "has shape (4, 3), expected (2, 3)"),
        ({"adapter": {name: array.T for name, array in adapter_of(1.0).items()}}, "has shape (3, 2), expected (2, 3)"),
        ({"adapter": {name: array.astype(np.float64) for name, array in adapter_of(1.0).items()}}, "type float64"),
        ({"adapter": NAN}, "not finite"),
        ({"round": 1}, "answers round 1"),
        ({"round": 3}, "answers round 3"),
        ({"federation": "other"}, "of 'other'"),
        ({"client": "z"}, "no client 'z'"),
        ({"client": "a"}, "answers for another client, or twice"),
        ({"adapter": None}, "3 records, but no adapter"),
        ({"num_records": 0}, "0 records, but an adapter"),
        ({"num_records": -3}, "-3 is not a valid number of records"),
        ({"num_records": MAX_RECORDS + 1}, "is not a valid number of records"),
        ({"num_records": 10**400}, "is not a valid number of records"),
    ],
)
def test_a_reply_that_can_not_be_trusted_is_refused_and_the_others_count(
    fakes: Any, changes: dict[str, Any], reason: str
) -> None:
    state, summary = apply(
        state_of(2), [delivery("a", 1.0), delivery("b", 9.0, **changes), delivery("c", 3.0)], fakes.config()
    )
    assert adapters.encode(state.adapter) == adapters.encode(adapter_of(2.0))
    assert reason in summary.clients[1].refused
    row = summary.clients[1]
    assert (row.client, row.num_records, row.metrics, row.bytes_up) == ("b", 0, {}, 20)
    assert [row.refused for row in summary.clients if row.client != "b"] == ["", ""]


def test_a_second_reply_is_refused_but_not_one_after_a_refused_one(fakes: Any) -> None:
    twice = [delivery("a", 1.0), delivery("a", 9.0), delivery("b", 9.0, round=1), delivery("b", 3.0)]
    state, summary = apply(state_of(2), twice, fakes.config())
    assert adapters.encode(state.adapter) == adapters.encode(adapter_of(2.0))
    assert [bool(row.refused) for row in summary.clients] == [False, True, True, False]


def test_a_client_not_asked_to_train_changes_nothing(fakes: Any) -> None:
    config = fakes.config("federation.participation=0.5", "warmup.rounds=1")
    for number in (0, 2):  # in round 0 all are asked, some of them for scores alone
        tasks = {task.client: task.train for task in plan(state_of(number), config)}
        trains = [client for client in CLIENTS if tasks.get(client)]
        deliveries = [delivery(client, 1.0 if client in trains else 9.0, round=number) for client in CLIENTS]
        state, summary = apply(state_of(number), deliveries, config)
        assert adapters.encode(state.adapter) == adapters.encode(adapter_of(1.0))
        assert [row.client for row in summary.clients if not row.refused] == trains
        assert {row.refused for row in summary.clients if row.refused} == {"it was not asked to train in this round"}


def test_a_client_without_an_answer_has_a_row_with_the_reason(fakes: Any) -> None:
    state, summary = apply(state_of(2), [Delivery("a", None, "no connection", 10), delivery("b")], fakes.config())
    assert adapters.encode(state.adapter) == adapters.encode(adapter_of(1.0))
    assert (summary.clients[0].refused, summary.clients[0].bytes_down) == ("no connection", 10)


def test_a_client_that_did_not_train_has_a_row_and_no_weight(fakes: Any) -> None:
    idle = delivery("a", adapter=None, num_records=0)
    state, summary = apply(state_of(2), [idle, delivery("b", 4.0)], fakes.config())
    assert adapters.encode(state.adapter) == adapters.encode(adapter_of(4.0))
    assert (summary.clients[0].refused, summary.clients[0].metrics) == ("", {"loss": Metric(6.0, 3)})


@pytest.mark.parametrize(
    "deliveries",
    [
        [],
        [delivery("a", adapter=None, num_records=0)],
        [delivery("a", adapter=NAN), delivery("b", round=7), Delivery("c", None, "no connection")],
    ],
)
def test_without_a_reply_that_counts_the_adapter_stays_and_the_round_is_over(
    fakes: Any, deliveries: list[Delivery]
) -> None:
    state, summary = apply(state_of(2), deliveries, fakes.config())
    assert (state.round, summary.aggregated) == (3, False)
    assert adapters.encode(state.adapter) == adapters.encode(adapter_of(0.5))
    assert len(summary.clients) == len(deliveries)


@given(st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 9), st.booleans()), max_size=8))
def test_replies_that_count_are_folded_by_the_weighted_mean(fakes: Any, replies: list[tuple[int, int, bool]]) -> None:
    deliveries, counted = [], []
    for client, (value, num_records, is_bad) in zip(CLIENTS, replies, strict=False):
        own = adapter_of(float(value)) if num_records else None
        deliveries.append(delivery(client, num_records=num_records, adapter=own, round=9 if is_bad else 2))
        if own is not None and not is_bad:
            counted.append((own, num_records))
    state, summary = apply(state_of(2), iter(deliveries), fakes.config())
    mean = weighted_mean(counted)
    assert summary.aggregated is (mean is not None)
    assert adapters.encode(state.adapter) == adapters.encode(adapter_of(0.5) if mean is None else mean)


def test_a_stage_that_sends_no_adapters_leaves_the_common_one(fakes: Any) -> None:
    config = fakes.config("federation.rounds=2")
    tuned = delivery("a", adapter=None, num_records=0)
    state, summary = apply(state_of(2), [tuned], config)
    assert (summary.stage, summary.aggregated) == ("personalize", False)
    assert adapters.encode(state.adapter) == adapters.encode(adapter_of(0.5))
