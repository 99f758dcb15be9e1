"""What every method has to survive: one client, sampled participation, a client that fails, a round handled again."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from fedmide import adapters, methods, server
from fedmide.client import handle
from fedmide.config import METHOD_TABLES, Config, for_method, parse
from fedmide.errors import ConfigError
from fedmide.messages import ClientReply
from fedmide.sections import MethodName
from fedmide.server import Delivery

ALL = [name for name in get_args(MethodName) if name != "central"]


def test_every_method_says_what_it_is() -> None:
    assert tuple(methods.METHODS) == get_args(MethodName)
    for name, method in methods.METHODS.items():
        assert method.name == name
        assert method.summary and method.source and len(method.summary) < 110


def test_every_method_has_its_box_in_the_documents() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text("utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert {name for title in titles for name in title.split(", ")} == set(get_args(MethodName))


def test_a_table_of_another_method_is_refused() -> None:
    for table, users in METHOD_TABLES.items():
        for name in get_args(MethodName):
            if name in users:
                parse({"method": name, table: {}})
            else:
                with pytest.raises(ConfigError, match=f"{table} = .*: method '{name}' has no use for this table"):
                    parse({"method": name, table: {}})
                assert table not in for_method({"method": users[0], table: {}}, name)


def test_an_unknown_method_is_refused_with_all_other_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"method": "fedavgg", "fedprox": {"nu": 1}})
    assert len(caught.value.problems) == 2
    assert "fedavgg" in caught.value.problems[0] and "fedprox.nu" in caught.value.problems[1]


def test_only_fedmide_has_a_warm_up() -> None:
    given = {"warmup": {"rounds": 3}, "personalization": {"records": "personal", "epochs": 4}}
    config = parse({**given, "method": "fedavg-ft"})
    assert (config.warmup.rounds, config.personalization.records, config.personalization.epochs) == (0, "all", 4)
    assert parse(given).warmup.rounds == 3


@pytest.mark.parametrize("name", ALL)
def test_it_survives_a_client_that_fails_and_sampled_participation(run_federation: Any, name: str) -> None:
    done = run_federation(
        name, "federation.participation=0.6", "federation.rounds=3", failing=[(0, "a"), (1, "b"), (1, "c"), (2, "a")]
    )
    assert adapters.is_finite(done.adapter)
    for client in "abc":
        assert adapters.is_finite(done.own(client))
        assert all(
            np.isfinite(nll.sum) for nll in done.resident.nll(done.own(client), done.sites[client].validation, "all")
        )
    assert not any(row.refused for summary in done.summaries for row in summary.clients if "reached" not in row.refused)


@pytest.mark.parametrize("name", ALL)
def test_a_round_handled_again_gives_the_same_bytes(run_federation: Any, name: str) -> None:
    done = run_federation(name)
    states = done.states[-2], done.states[-1]
    for state in states:
        site = done.sites["a"]
        (task,) = [task for task in server.plan(state, done.config) if task.client == "a"]
        first, after = handle(task, site, done.resident)
        second, again = handle(task, after, done.resident)
        assert told(first) == told(second)
        assert [(each.round, adapters.encode(each.arrays)) for each in after.memory] == [
            (each.round, adapters.encode(each.arrays)) for each in again.memory
        ]
        sent = [each.reply for each in done.deliveries if each.client == "a" and each.reply.round == state.round]
        assert told(first) == told(sent[0])


def told(reply: ClientReply) -> Any:
    return None if reply.adapter is None else adapters.encode(reply.adapter), reply.num_records, reply.metrics


@pytest.mark.parametrize("name", ALL)
def test_a_reply_that_is_not_what_the_method_lets_travel_is_refused(run_federation: Any, name: str) -> None:
    done = run_federation(name, "federation.rounds=1")
    state, config = done.states[-2], done.config
    whole = {"a.lora_A.weight": np.zeros((2, 2), np.float32)}
    reply = ClientReply("f", "a", state.round, whole, 3)
    _, summary = server.apply(state, [Delivery("a", reply)], config)
    assert "arrays unknown" in summary.clients[0].refused
    for delivery in done.deliveries:
        if delivery.client == "a" and delivery.reply.round == state.round and delivery.reply.adapter is not None:
            odd = {key: np.full_like(array, np.nan) for key, array in delivery.reply.adapter.items()}
            bad = replace(delivery, reply=replace(delivery.reply, adapter=odd))
            _, summary = server.apply(state, [bad], config)
            assert "not finite" in summary.clients[0].refused


def test_the_default_is_fedmide() -> None:
    assert methods.of(Config()).name == "fedmide"
